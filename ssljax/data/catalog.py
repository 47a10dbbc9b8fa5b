"""The sizes of data sets, without reading their rows.

An outline is a `datasets.Dataset` whose labels are `jax.ShapeDtypeStruct` and
whose images cannot be read. It suffices to plan the memory and time of a run.
"""

from collections.abc import Callable
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from ssljax.data import arrays, datasets, records, tfds_reader
from ssljax.errors import require

SIDE = 224  # the default `image_size` of sets whose images differ in size
# TFDS sets that can be planned without being on disk: name -> number of
# classes, (H, W, c) with None where images differ, number of images per split.
KNOWN = {
  'mnist': (10, (28, 28, 1), {'train': 60_000, 'test': 10_000}),
  'fashion_mnist': (10, (28, 28, 1), {'train': 60_000, 'test': 10_000}),
  'cifar10': (10, (32, 32, 3), {'train': 50_000, 'test': 10_000}),
  'cifar100': (100, (32, 32, 3), {'train': 50_000, 'test': 10_000}),
  'svhn_cropped': (
    10,
    (32, 32, 3),
    {'train': 73_257, 'test': 26_032, 'extra': 531_131},
  ),
  'stl10': (
    10,
    (96, 96, 3),
    {'train': 5_000, 'test': 8_000, 'unlabelled': 100_000},
  ),
  'imagenet2012': (
    1000,
    (None, None, 3),
    {'train': 1_281_167, 'validation': 50_000},
  ),
}


class _Feature(NamedTuple):
  """The attributes of a TFDS image feature that `image_shape` reads."""

  shape: tuple[int | None, ...]  # H, W, c
  np_dtype: Any = np.uint8


class _Found(NamedTuple):
  """The description of a data set, from its files or from `KNOWN`."""

  classes: tuple[str, ...]  # [C]
  feature: Any  # of the images
  count: Callable[[records.SplitName], int]  # number of images
  test_split: Callable[[], str]  # the default test split
  # (train, test) -> None; raises if they have common images
  refuse_overlap: Callable[[records.SplitName, records.SplitName], None]


def outline(
  name: str,
  data_dir: str | None = None,
  *,
  train_split: str = 'train',
  test_split: str | None = None,
  image_size: int | None = None,
  crop: bool = False,
  with_test: bool = True,
) -> datasets.Dataset:
  """Return a data set without its rows.

  Args:
    name: as in `datasets.load`.
    data_dir: as in `datasets.load`. For a set that is not in it, the sizes of
      `KNOWN` are used.
    train_split: as in `datasets.load`.
    test_split: as in `datasets.load`.
    image_size: as in `datasets.load`; by default 224 if images differ in size.
    crop: as in `datasets.load`.
    with_test: as in `datasets.load`.

  Raises:
    InputError: the size of the data set is not known.
  """
  arrays.check_image_size(image_size)
  if datasets.is_in_memory(name):
    dataset = datasets.load(
      name,
      train_split=train_split,
      test_split=test_split,
      image_size=image_size,
      with_test=with_test,
    )
    parts = {
      part: _source(len(s.labels), s.shape, dtype=s.dtype)
      for part, s in (('train', dataset.train), ('test', dataset.test))
    }
    return dataset._replace(train=parts['train'], test=parts['test'])
  found = _found(name, data_dir)
  differ = None in found.feature.shape[:2]
  side = SIDE if differ and image_size is None else image_size
  shape = datasets.image_shape(name, found.feature, side)
  source = lambda count: _source(count, shape, crop=crop and differ)
  train = records.SplitName(name, 'train_split', train_split)
  tests = 0
  if with_test:
    test_split = test_split or found.test_split()
    test = records.SplitName(name, 'test_split', test_split)
    found.refuse_overlap(train, test)
    tests = found.count(test)
  return datasets.Dataset(
    name, source(found.count(train)), source(tests), found.classes
  )


def joined(
  source: datasets.Dataset, target: datasets.Dataset
) -> datasets.Dataset:
  """Return the outline of `domain_pair.join`, from two outlines."""
  require(
    len(source.classes) == len(target.classes),
    f'`target`={target.name}: has {len(target.classes)} classes, '
    f'`source`={source.name} {len(source.classes)}; give two data sets of the '
    'same classes',
  )
  shape = tuple(map(max, source.train.shape, target.train.shape))
  first, second = len(source.train.labels), len(target.train.labels)
  return datasets.Dataset(
    f'{source.name}-{target.name}',
    _source(first + second, shape),
    _source(len(target.test.labels), shape),
    source.classes,
    unlabelled_from=first,
  )


def _source(count: int, shape, crop=False, dtype=np.uint8) -> datasets.Source:
  labels: Any = jax.ShapeDtypeStruct((count,), np.int32)  # for the array
  return datasets.Source(
    labels, shape, _no_images, _no_images if crop else None, dtype
  )


def _no_images(*rows):
  """Raise in place of reading images."""
  raise NotImplementedError('an outline has no images')


def _found(name: str, data_dir: str | None) -> _Found:
  builder = tfds_reader.on_disk(name, data_dir) if data_dir else None
  if builder is None:
    return _known(name)
  columns = tfds_reader.find_columns(name, builder.info)
  return _Found(
    columns.classes,
    columns.feature,
    lambda split: records.split_size(split, builder),
    lambda: datasets.default_test_split(name, builder, columns),
    lambda train, test: records.refuse_overlap(builder, train, test),
  )


def _known(name: str) -> _Found:
  plain = re.split('[/:]', name)[0]
  require(
    plain in KNOWN,
    f'`dataset`={name}: its size is not known; give the `data_dir` in which it '
    f'is prepared, or one of {", ".join((*datasets.EMBEDDED, *KNOWN))}',
  )
  classes, shape, sizes = KNOWN[plain]

  def parts(split: records.SplitName) -> set[str]:
    found = split.name.split('+')
    require(
      all(part in sizes for part in found) and len(set(found)) == len(found),
      f'`{split.parameter}`={split.name}: {name} is not on disk, so only whole '
      f'splits are known; give {", ".join(sizes)}, or several joined by +, or '
      'the `data_dir` in which it is prepared',
    )
    return set(found)

  def refuse_overlap(train: records.SplitName, test: records.SplitName) -> None:
    require(
      not parts(train) & parts(test),
      f'`train_split`={train.name}, `test_split`={test.name}: the test images '
      f'of `dataset`={name} would be trained on; give splits without common '
      'images',
    )

  test = 'test' if 'test' in sizes else 'validation'
  names = tuple(map(str, range(classes)))
  return _Found(
    names,
    _Feature(shape),
    lambda split: sum(sizes[part] for part in parts(split)),
    lambda: test,
    refuse_overlap,
  )
