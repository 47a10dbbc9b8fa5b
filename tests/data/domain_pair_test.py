import functools

import fake_tfds
import numpy as np
import pytest

from ssljax.core import UNLABELLED
from ssljax.data import datasets, domain_pair, splits
from ssljax.errors import InputError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sets')
  rng = np.random.default_rng(0)
  for name, side, channels, classes in (
    ('grey', 6, 1, 3),
    ('colour', 8, 3, 3),
    ('other', 8, 3, 4),
  ):
    images = rng.integers(0, 256, (12, side, side, channels)).astype(np.uint8)
    fake_tfds.write(folder, name, list(images), np.arange(12) % classes)
  return folder


@pytest.mark.parametrize(
  ('source', 'target'), [('grey', 'colour'), ('colour', 'grey')]
)
def test_two_sets_become_one_of_the_larger_size_in_colour(
  folder, source, target
):
  joined = domain_pair.load(source, target, str(folder))
  alone = {
    name: datasets.load(name, str(folder), image_size=8)
    for name in (source, target)
  }
  assert joined.name == f'{source}-{target}'
  assert joined.train.shape == joined.test.shape == (8, 8, 3)
  # Rows of both in one read, in any order; grey has three equal channels.
  images = joined.train.read([14, 0, 23, 11])
  tiled = lambda x: np.broadcast_to(x, (len(x), 8, 8, 3))
  np.testing.assert_array_equal(
    images[[1, 3]], tiled(alone[source].train.read([0, 11]))
  )
  np.testing.assert_array_equal(
    images[[0, 2]], tiled(alone[target].train.read([2, 11]))
  )
  np.testing.assert_array_equal(
    joined.test.read([3]), tiled(alone[target].test.read([3]))
  )
  np.testing.assert_array_equal(joined.test.labels, alone[target].test.labels)


def test_the_targets_training_labels_are_nowhere(folder):
  joined = domain_pair.load('grey', 'colour', str(folder))
  np.testing.assert_array_equal(joined.train.labels[:12], np.arange(12) % 3)
  assert (joined.train.labels[12:] == UNLABELLED).all()


def test_only_the_target_is_seen_unlabelled(folder):
  joined = domain_pair.load('grey', 'colour', str(folder))
  assert joined.unlabelled_from == 12
  split = splits.draw_split(
    joined.train.labels,
    joined.classes,
    per_class=2,
    seed=0,
    unlabelled='all',
    among=np.arange(24) >= joined.unlabelled_from,
  )
  assert len(split.labelled) == 6 and split.labelled.max() < 12
  assert set(split.unlabelled) == set(range(12, 24))


def test_digits_take_the_size_of_the_other_set(folder):
  fake_tfds.write(
    folder,
    'ten',
    list(np.zeros((20, 12, 12, 1), np.uint8)),
    np.arange(20) % 10,
    [str(n) for n in range(10)],
  )
  joined = domain_pair.load('digits', 'ten', str(folder))
  assert joined.train.shape == (12, 12, 1)
  assert len(joined.train.labels) == 1297 + 20


def test_classes_that_differ_are_refused(folder):
  with pytest.raises(InputError, match=r'target=other.*4.*source=grey.*3'):
    domain_pair.load('grey', 'other', str(folder))


@pytest.mark.parametrize('flag', ['source', 'target'])
def test_features_cannot_be_a_source_or_target(flag):
  names = dict(source='digits', target='digits') | {flag: 'yin-yang'}
  with pytest.raises(InputError, match=f'{flag}=yin-yang: holds features'):
    domain_pair.load(**names)


def test_images_that_differ_in_size_are_not_cropped_at_random(tmp_path):
  sizes = [np.zeros((side, 9, 3), np.uint8) for side in (8, 9)]
  for name in ('here', 'there'):
    fake_tfds.write(tmp_path, name, sizes, [0, 1], ['a', 'b'])
  load = functools.partial(
    domain_pair.load, 'here', 'there', str(tmp_path), image_size=4
  )
  assert load().train.read([3]).shape == (1, 4, 4, 3)
  with pytest.raises(InputError, match='augment=crop'):
    load(crop=True)
