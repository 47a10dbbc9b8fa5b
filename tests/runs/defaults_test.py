import numpy as np
import pytest

from ssljax import config, registry
from ssljax.core import UNLABELLED
from ssljax.data import arrays, datasets
from ssljax.errors import InputError
from ssljax.runs import build, defaults


def facts(images=7000, labelled=100, side=16, classes=10, is_images=True):
  each = labelled // classes
  return defaults.Facts(
    *(images, labelled, each, classes),
    (side, side, 1) if is_images else (1, 1, 40),
    is_images,
  )


@pytest.mark.parametrize('method', sorted(registry._OWN_METHODS))
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
  # 128 * 100 / 6,400 = 2 labelled images in a batch; of 1,000 images 12.8.
  assert llp(6400)['labelled_per_step'] == 32
  assert llp(1000)['labelled_per_step'] == 0
  r2d2 = lambda labelled: defaults.suggest('r2d2', facts(labelled=labelled))
  # Ten passes of 6,400 labelled images in batches of 32 are 2,000 steps.
  assert r2d2(100)['pretrain'] == 1500 and r2d2(6400)['pretrain'] == 2000
  found = r2d2(100)
  assert found['repeat'] == 4 * found['interval']
  # An iteration passes 7,000 images once and 100 labelled ones 20 times.
  found = defaults.suggest('deepbass', facts())
  assert found['iterations'] == round(160_000 / 9000)


def test_batches_fit_into_the_images_that_they_are_drawn_from():
  few = facts()._replace(pool=40)
  for method in registry._OWN_METHODS:
    assert defaults.suggest(method, few)['batch_unlabelled'] <= 40
  rest = defaults.complete(
    'association', {'unlabelled': 'rest'}, facts(images=140, labelled=100)
  )
  assert rest.batch.batch_unlabelled == 40


@pytest.mark.parametrize('method', ['r2d2', 'mean_teacher', 'mixmatch', 'vat'])
def test_features_need_no_setting(method, tmp_path):
  rows = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
  labels = np.where(np.arange(60) < 20, np.arange(60) % 4, UNLABELLED)
  data = dict(train=rows, train_labels=labels)
  np.savez(tmp_path / 'f.npz', test=rows[:9], test_labels=labels[:9], **data)
  given = {'dataset': f'{tmp_path}/f.npz', 'labels': 'all'}
  made, dataset, _ = defaults.for_data(method, given, defaults.load)
  assert made.network.network == 'mlp' and not dataset.train.is_images
  assert made.augmentation.augment == ()


def test_features_of_a_pretrained_network_get_a_linear_one():
  of = lambda method, width: defaults.suggest(
    method, facts()._replace(is_images=False, shape=(1, width, 1))
  )
  assert of('llp', 255)['network'] == 'mlp'
  assert of('llp', 256)['network'] == 'linear_probe'
  assert of('association', 256)['network'] == 'mlp'
  assert [of('madnn', width)['weight'] for width in (255, 256)] == [0.3, 0.1]
  assert of('laplacenet', 30)['strong_augment'] == ()
  assert defaults.suggest('laplacenet', facts())['strong_augment']
  assert of('pseudo_label', 256)['distribution_alignment']
  assert 'distribution_alignment' not in of('pseudo_label', 255)


def test_tiny_images_get_a_network_that_takes_them():
  assert defaults.network_for('madnn', facts(side=4)) == 'mlp'
  assert defaults.network_for('madnn', facts(side=5)) == 'digits'


def test_a_network_without_batch_norm_gets_a_lower_learning_rate():
  rate = lambda method, network: defaults.complete(
    method, {'network': network}, facts()
  ).optimizer['learning_rate']
  assert rate('supervised', 'deepbass_mnist') == 0.01
  assert rate('supervised', 'mnist') == 0.1
  # A method that states a rate keeps it: DeepBASS has Adam's.
  assert rate('deepbass', 'deepbass_mnist') == 1e-3


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


def arrays_of(labelled=(20, 8, 12), unlabelled=60, side=8):
  labels = np.repeat([0, 1, 2, UNLABELLED], [*labelled, unlabelled])
  images = np.zeros((len(labels), side, side, 1), np.uint8)
  return arrays.from_arrays(images, labels)


def test_facts_are_counted_without_the_held_out_images():
  facts = defaults.facts_of(arrays_of())
  assert (facts.images, facts.labelled, facts.unlabelled) == (100, 40, 60)
  assert (facts.least, facts.classes) == (8, 3)
  # A quarter of the labelled images is held out: 6 of the rarest are left.
  held_out = defaults.facts_of(arrays_of(), 10)
  assert (held_out.images, held_out.labelled) == (90, 30)
  assert held_out.unlabelled == 60 and held_out.least == 6


@pytest.mark.parametrize('method', sorted(registry.METHODS))
@pytest.mark.parametrize('held_out', [0, 31])
def test_no_batch_is_larger_than_its_images(method, held_out):
  facts = defaults.facts_of(arrays_of(), held_out)
  found = defaults.suggest(method, facts)
  if found.get('batch_labelled'):
    assert 0 < found['batch_labelled'] <= facts.labelled
  all_images = found['unlabelled'] == 'all'
  pool = facts.images if all_images else facts.unlabelled
  assert 0 < found['batch_unlabelled'] <= pool
  assert found['labels'] == 'all'
