import numpy as np
import pytest

from ssljax import config, registry
from ssljax.data import datasets
from ssljax.errors import InputError
from ssljax.runs import build, defaults


def facts(images=7000, labelled=100, side=16, classes=10, is_images=True):
  each = labelled // classes
  return defaults.Facts(
    *(images, labelled, each, classes),
    (side, side, 1) if is_images else (1, 1, 40),
    is_images,
  )


@pytest.mark.parametrize('method', registry._OWN_METHODS)
@pytest.mark.parametrize(
  'of_data',
  [
    facts(),
    facts(images=40, labelled=20),
    facts(images=20_000, labelled=10),
    facts(images=300, labelled=300),
    facts(is_images=False),
  ],
)
def test_the_suggestion_for_any_data_is_a_valid_config(method, of_data):
  made = defaults.complete(method, {}, of_data)
  # The factory checks its hyper-parameters, and batches fit into the data.
  assert made.batch.batch_unlabelled <= of_data.images
  assert (made.batch.batch_labelled or 1) <= of_data.labelled
  net = build.make_network(made, of_data.classes)
  assert net.init and made.run.steps > 0


def test_lengths_follow_the_number_of_images_within_bounds():
  llp = lambda n: defaults.suggest('llp', facts(images=n))
  # 50 passes of 6,400 images in batches of 128 are 2,500 steps.
  assert llp(6400)['warm'] == 2500
  assert llp(1000)['warm'] == 1500 and llp(50_000)['warm'] == 3000
  r2d2 = lambda labelled: defaults.suggest('r2d2', facts(labelled=labelled))
  # Ten passes of 6,400 labelled images in batches of 32 are 2,000 steps.
  assert r2d2(100)['pretrain'] == 1500 and r2d2(6400)['pretrain'] == 2000
  found = r2d2(100)
  assert found['repeat'] == 4 * found['interval']
  # An iteration passes 7,000 images once and 100 labelled ones 20 times.
  found = defaults.suggest('deepbass', facts())
  assert found['iterations'] == round(160_000 / 9000)


def test_settings_that_are_given_win_over_the_suggestion():
  made = defaults.complete('madnn', {'epochs': 3.0, 'eta': 0.3}, facts())
  assert made.run.steps is None and made.run.epochs == 3.0
  assert made.parameters['eta'] == 0.3
  made = defaults.complete('association', {'batch_labelled': 7}, facts())
  assert made.batch.batch_per_class is None and made.batch.batch_labelled == 7
  with pytest.raises(InputError, match='no such setting'):
    defaults.complete('madnn', {'etta': 0.3}, facts())


def test_the_facts_of_a_split_count_the_images_that_it_admits():
  dataset = datasets.load('digits')
  values = {'labels': '3', 'unlabelled': '200', 'validation': 37, 'steps': 1}
  made = config.from_values('madnn', values)
  split = build.draw_splits(made, dataset)[0]
  found = defaults.facts_of_split(dataset, split)
  assert found.images == 230 and found.labelled == 30 and found.least == 3
  assert found.unlabelled == 200 and found.shape == (8, 8, 1)
  assert not np.isin(split.validation, split.unlabelled).any()
