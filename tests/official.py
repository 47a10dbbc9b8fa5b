"""Small data sets with the names, image sizes and classes of official ones."""

import fake_tfds
import numpy as np


def write_sets(folder):
  """Write small data sets in the TFDS layout under official names."""
  rng = np.random.default_rng(0)
  for name, side, channels, classes in (
    ('mnist', 28, 1, 10),
    ('svhn_cropped', 32, 3, 10),
    ('cifar10', 32, 3, 10),
    ('cifar100', 32, 3, 100),
  ):
    labels = np.arange(2 * classes + 60) % classes
    images = rng.integers(0, 256, (len(labels), side, side, channels))
    fake_tfds.write(folder, name, list(images.astype(np.uint8)), labels)
  images = rng.integers(0, 256, (60, 96, 96, 3)).astype(np.uint8)
  labels = np.where(np.arange(60) < 40, np.arange(60) % 10, -1)
  splits = {
    'train': list(range(20)),
    'test': list(range(20, 40)),
    'unlabelled': list(range(40, 60)),
  }
  fake_tfds.write(folder, 'stl10', list(images), labels, splits=splits)
  labels = np.arange(2060) % 1000
  # Images of mixed sizes, as in the official set.
  sides = rng.integers(6, 40, (len(labels), 2))
  images = [rng.integers(0, 256, (*side, 3)).astype(np.uint8) for side in sides]
  splits = {'train': list(range(2040)), 'validation': list(range(2040, 2060))}
  fake_tfds.write(
    folder, 'imagenet2012', images, labels, splits=splits, encoding='jpeg'
  )
