"""The table of settings that suit a data set."""

import numpy as np
import pytest

from ssljax.data import arrays
from ssljax.runs import choices, defaults


def images(side, channels, count=60):
  shape = (count, side, side, channels)
  return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


def chosen(given, side=8, channels=1, tests=0):
  pixels = images(side, channels)
  labels = np.where(np.arange(60) < 20, np.arange(60) % 2, -1)
  test = (pixels[:tests], labels[:tests]) if tests else (None, None)
  dataset = arrays.from_arrays(pixels, labels, *test, classes=2)
  facts = defaults.facts_of(dataset)
  load = lambda config: (dataset, facts)
  made, _, _ = defaults.for_data('r2d2', given, load)
  return {c.setting: c for c in choices.table(made, dataset, facts, given)}


def test_every_choice_has_a_value_and_a_reason():
  found = chosen({'dataset': 'x.npz', 'learning_rate': 0.3})
  value = lambda name: (found[name].value, found[name].why)
  assert value('image size') == ('8x8x1', 'as stored')
  assert value('network') == ('digits', 'for images of 8 pixels')
  assert found['augmentation'].value == 'none'
  assert found['augmentation'].why.startswith('grey images')
  # At most 32 of the 20 labelled images, and 96 of the 40 others.
  assert found['batch'].value == '20 labelled, 40 unlabelled'
  assert found['lengths'].value.startswith('steps 300, pretrain 1,500')
  assert value('learning rate') == ('0.3, constant', 'given')
  # 1 - 6 / 300
  assert value('batch-norm momentum') == ('0.98', '1 - 6 / 300 steps')
  assert found['hold-out'].value == 'one of five folds for each seed'
  assert chosen({'dataset': 'x.npz'}, tests=3)['hold-out'].value == 'none'


@pytest.mark.parametrize(
  ('side', 'channels', 'expected'),
  [(32, 3, 'flip, translate:4'), (16, 3, 'none'), (32, 1, 'none')],
)
def test_only_colour_images_of_a_folder_are_mirrored(side, channels, expected):
  found = chosen({'images': 'photos'}, side, channels)['augmentation']
  assert found.value == expected
  own = chosen({'images': 'photos', 'augment': ('noise',)}, side, channels)
  assert own['augmentation'] == choices.Choice('augmentation', 'noise', 'given')
  # Files of arrays keep the defaults that were measured.
  file = chosen({'dataset': 'x.npz'}, side, channels)['augmentation']
  assert file.value == 'none'


def test_choices_that_methods_share_are_listed_once():
  one = choices.Choice('image size', '8x8x1', 'as stored')
  lengths = [choices.Choice('lengths', f'steps {n}', 'x') for n in (1, 2)]
  momentum = choices.Choice('batch-norm momentum', '0.9', 'y')
  found = choices.merged(
    {'a': [one, lengths[0]], 'b': [one, lengths[1], momentum]}
  )
  assert found == [
    one,
    lengths[0]._replace(setting='lengths of a'),
    lengths[1]._replace(setting='lengths of b'),
    momentum._replace(setting='batch-norm momentum of b'),
  ]
