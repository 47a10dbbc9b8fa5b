"""Named data sets: embedded ones, .npz files, and sets in the TFDS layout.

`digits`, `yin-yang` and `yin-yang-redrawn` (points in the plane, see `toy`) are
embedded. A name that ends in
.npz is a file of arrays, see `arrays.load_npz`; one that ends in .parquet, or a
folder of such files, see `parquet`. Every other name is a TFDS
image classification set, or one prepared in the TFDS layout, read row by row
through its data source; no TensorFlow is imported unless a set has to be
prepared first. Letters: N rows of a split, H x W x c the size of an image.
"""

import importlib.util
import math
import pathlib
import re
from typing import Any

import numpy as np

from ssljax.core import UNLABELLED
from ssljax.data import decode, parquet, records, tfds_reader, toy
from ssljax.data.arrays import (
  check_image_size,
  in_memory,
  load_npz,
  resized,
  select,
  without_rows,
)
from ssljax.data.types import Dataset, Source
from ssljax.errors import InputError, non_negative, require

_DIGITS_TEST = 50  # test images of each digit
# Sets whose original pixels are stored without loss.
_LOSSLESS = {
  'mnist': 'MNIST',
  'fashion_mnist': 'Fashion-MNIST',
  'kmnist': 'KMNIST',
  'cifar10': 'CIFAR-10',
  'cifar100': 'CIFAR-100',
  'svhn_cropped': 'SVHN',
  'stl10': 'STL-10',
}
_JPEG = b'\xff\xd8\xff'  # the first bytes of a JPEG file


def load(
  name: str,
  data_dir: str | None = None,
  *,
  train_split: str = 'train',
  test_split: str | None = None,
  image_size: int | None = None,
  corrupt: int = 0,
  crop: bool = False,
  with_test: bool = True,
  seed: int = 0,
  strict: bool = True,
) -> Dataset:
  """Open a data set.

  Images of a TFDS set stay on disk until their rows are read; the others are
  in memory.

  Args:
    name: `digits`, `yin-yang`, `yin-yang-redrawn`, the path of an .npz file, a
      .parquet file or a folder of these, a TFDS name, or a set in the TFDS
      layout in `data_dir`.
    data_dir: the folder that holds prepared TFDS sets; only these need it.
    train_split: in TFDS split notation, as 'train+extra' or 'train[:90%]';
      'train' or 'test' for sets in memory.
    test_split: likewise, without images of `train_split`. By default 'test', or
      for TFDS sets 'validation' where 'test' is missing or has no labels.
    image_size: the side of the square that images are resized to: the shorter
      side is resized, then the centre is cropped. Required for sets whose
      images differ in size.
    corrupt: the number of undecodable images, over both splits, that may be
      left out of the data set. If it is not 0, every image is decoded once to
      find them, and rows are numbered without them. If it is 0, the first one
      that is read raises an error that lists all of them.
    crop: give `Source.crop` to sets whose images differ in size. `Source.read`
      then resizes the shorter side to 8/7 of the image size, so that the centre
      crop leaves out as much border as is usual beside random crops.
    with_test: False leaves the test split empty.
    seed: of a set in `REDRAWN`; the others do not depend on it.
    strict: False admits a file without labels, to be predicted.

  Returns:
    The data set. `Source.read` may be called from many threads at once.

  Raises:
    InputError: the data set cannot be read with these arguments.

  Examples:
    >>> digits = load('digits')
    >>> digits.train.read([0, 1]).shape, len(digits.train.labels)
    ((2, 8, 8, 1), 1297)
  """
  non_negative(corrupt=corrupt)
  check_image_size(image_size)
  if not is_in_memory(name):
    return _prepared_set(
      name,
      data_dir,
      train_split,
      test_split,
      image_size=image_size,
      corrupt=corrupt,
      crop=crop,
      with_test=with_test,
    )
  if name not in EMBEDDED and not name.endswith('.npz'):
    return parquet.load(
      name,
      train_split=train_split,
      test_split=test_split,
      image_size=image_size,
      crop=crop,
      with_test=with_test,
      strict=strict,
    )
  if name not in EMBEDDED:
    return load_npz(
      name,
      train_split=train_split,
      test_split=test_split,
      image_size=image_size,
      with_test=with_test,
      strict=strict,
    )
  sources, classes = EMBEDDED[name](seed)
  sources = dict(resized(name, sources, image_size))
  return select(name, sources, classes, train_split, test_split, with_test)


def is_in_memory(name: str) -> bool:
  """Return True for data sets that `load` reads whole: not TFDS sets."""
  return name in EMBEDDED or name.endswith('.npz') or parquet.is_parquet(name)


def arrays(source: Source) -> np.ndarray:
  """Return all rows of `source`, of its dtype, `[N, H, W, c]`.

  Raises:
    InputError: they do not fit into memory, or cannot be read.
  """
  count, values = len(source.labels), math.prod(source.shape)
  try:
    images = np.empty((count, *source.shape), source.dtype)
  except (MemoryError, ValueError) as error:
    raise InputError(
      f'`feed`=resident: {count} images of {source.shape} do not fit into '
      'memory; give `feed`=stream, or a smaller `image_size`'
    ) from error

  def fill(rows):
    images[rows] = source.read(np.arange(rows.start, rows.stop))

  records.by_chunk(fill, count, 'images', values)
  return images


# The embedded data sets.


def _digits(seed: int) -> tuple[dict[str, Source], tuple[str, ...]]:
  """Return the splits and classes of scikit-learn's 1,797 real 8 x 8 digits.

  1,297 are to train on, 500 to test.
  """
  del seed
  # `sklearn.datasets.load_digits` reads this file, too; importing scikit-learn
  # takes seconds.
  table = np.loadtxt(_digits_file(), delimiter=',')
  ink, labels = table[:, :-1].reshape(-1, 8, 8, 1), table[:, -1]
  # 16 levels of ink over [0, 255]; adding a half makes the rounding exact.
  images = np.floor(ink * 255 / 16 + 0.5).astype(np.uint8)
  labels = labels.astype(np.int32)
  test = _digits_test(labels)
  sources = {
    split: in_memory(images[rows], labels[rows])
    for split, rows in (('train', ~test), ('test', test))
  }
  return sources, tuple('0123456789')


def _digits_file() -> pathlib.Path:
  """Return the file of the digits, which scikit-learn brings."""
  spec = importlib.util.find_spec('sklearn')
  assert spec is not None and spec.submodule_search_locations  # it is required
  folder = pathlib.Path(next(iter(spec.submodule_search_locations)))
  return folder / 'datasets' / 'data' / 'digits.csv.gz'


def _digits_test(labels: np.ndarray) -> np.ndarray:
  """Return the mask `[N]` bool of the test images among `labels` `[N]`.

  They are the first 50 of each digit, in an order that sorts the raw words of a
  Philox generator with key 0. NumPy guarantees the raw words across versions,
  but not `permutation`.
  """
  order = np.argsort(np.random.Philox(key=0).random_raw(len(labels)))
  test = np.zeros(len(labels), bool)
  for digit in range(10):
    test[order[labels[order] == digit][:_DIGITS_TEST]] = True
  return test


def _yin_yang(seed: int) -> tuple[dict[str, Source], tuple[str, ...]]:
  """Return 500 + 500 points to train on, and as many to test."""
  del seed
  return _of_points(toy.fixed())


def _yin_yang_redrawn(seed: int) -> tuple[dict[str, Source], tuple[str, ...]]:
  """Return as many points as `_yin_yang`, drawn for the seed."""
  return _of_points(toy.redrawn(seed))


def _of_points(points) -> tuple[dict[str, Source], tuple[str, ...]]:
  sources = {split: in_memory(*of_split) for split, of_split in points.items()}
  return sources, toy.CLASSES


EMBEDDED = {
  'digits': _digits,
  'yin-yang': _yin_yang,
  'yin-yang-redrawn': _yin_yang_redrawn,
}
# Sets whose images, but not their labels, are drawn anew for every seed.
REDRAWN = frozenset({'yin-yang-redrawn'})


# Sets in the TFDS layout.


def _prepared_set(
  name: str,
  data_dir: str | None,
  train_split: str,
  test_split: str | None,
  *,
  image_size: int | None,
  corrupt: int,
  crop: bool,
  with_test: bool,
) -> Dataset:
  """Open a set in the TFDS layout; the arguments are those of `load`."""
  builder = tfds_reader.open_builder(name, data_dir)
  columns = tfds_reader.find_columns(name, builder.info)
  shape = image_shape(name, columns.feature, image_size)
  parts = [records.SplitName(name, 'train_split', train_split)]
  if with_test:
    test_split = test_split or default_test_split(name, builder, columns)
    parts.append(records.SplitName(name, 'test_split', test_split))
    records.refuse_overlap(builder, *parts)
  crop = crop and None in columns.feature.shape[:2]
  shorter = image_size
  if crop:  # images of different sizes, so there is an `image_size`
    shorter = round(decode.MARGIN * shape[0])
  audit = records.Audit(name)
  audit.readers = [
    records.Reader(
      part, records.open_records(part, builder), columns, shape, shorter, audit
    )
    for part in parts
  ]
  labels = [
    records.read_labels(part, reader.records, columns, builder)
    for part, reader in zip(parts, audit.readers, strict=True)
  ]
  kept = audit.keep(corrupt)
  sources = [
    _source(*of_part, crop)
    for of_part in zip(audit.readers, labels, kept, strict=True)
  ]
  _refuse_labels(parts, sources, builder)
  test = sources[1] if with_test else without_rows(sources[0])
  return Dataset(
    name,
    sources[0],
    test,
    columns.classes,
    variant=variant_of(name, audit.readers[0]),
  )


def variant_of(name: str, reader: records.Reader) -> str:
  """Return 'CIFAR-10 (JPEG)' for such a copy of a lossless set, else ''.

  JPEG changes the pixels, so that errors on the copy are not those on the
  original.

  Args:
    name: of the data set.
    reader: of one of its splits, whose first image is looked at.
  """
  title = _LOSSLESS.get(re.split('[/:]', name)[0])
  if title is None:
    return ''
  columns = reader.columns
  (image,) = records.fetch(reader.split, reader.records, [0], columns.image)
  return f'{title} (JPEG)' if image.startswith(_JPEG) else ''


def _source(reader: Any, found, kept, crop: bool) -> Source:
  """Return the source of a split.

  Args:
    reader: `records.Reader` of all its images.
    found: their labels and digests.
    kept: the rows that are rows of the source, or None for all.
    crop: images can be cropped at random.
  """
  if kept is not None:
    reader = reader._replace(kept=kept)
    found = [values[kept] for values in found]
  labels, digests = found
  return Source(
    labels,
    reader.shape,
    reader,
    reader if crop else None,
    digests=lambda: digests,
  )


def _refuse_labels(parts, sources, builder) -> None:
  """Raise `InputError` for images that are unlabelled in the wrong place."""
  known = tfds_reader.listed(builder.info.splits)
  require(
    (sources[0].labels != UNLABELLED).any(),
    f'`train_split`={parts[0].name}: none of its images has a label; give a '
    f'split that has labels, one of {known}',
  )
  for part, source in zip(parts[1:], sources[1:], strict=True):
    require(
      (source.labels != UNLABELLED).all(),
      f'`test_split`={part.name}: some of its images have no label; give '
      f'another split, one of {known}',
    )


def image_shape(name: str, feature, image_size) -> tuple[int, int, int]:
  """Return H, W, c of every image after decoding and resizing.

  Args:
    name: of the data set, for messages.
    feature: the TFDS feature of the images.
    image_size: as in `load`.
  """
  require(
    len(feature.shape) == 3 and feature.np_dtype == np.uint8,
    f'`dataset`={name}: its images have dtype {feature.np_dtype} and shape '
    f'{feature.shape}; give a set of 8-bit images [H, W, c]',
  )
  height, width, channels = feature.shape
  channels = 1 if channels == 1 else 3
  if image_size is not None:
    return image_size, image_size, channels
  require(
    None not in (height, width),
    f'`image_size`: the images of `dataset`={name} differ in size; give the '
    'side of the square to resize them to, e.g. `image_size`=224',
  )
  require(
    min(height, width) > 0 and height * width <= decode.MAX_PIXELS,
    f'`dataset`={name}: its images have {height} x {width} pixels, at most '
    f'{decode.MAX_PIXELS} are supported; give `image_size`, the side of the '
    'square to resize them to',
  )
  return height, width, channels


def default_test_split(name: str, builder, columns: tfds_reader.Columns) -> str:
  """Return 'test', or 'validation' if the labels of 'test' are unpublished."""
  splits = builder.info.splits
  for split in ('test', 'validation'):
    if split in splits and splits[split].num_examples:
      part = records.SplitName(name, 'test_split', split)
      opened = records.open_records(part, builder)
      few = range(min(8, len(opened)))
      first = records.fetch(part, opened, few, columns.label)
      if any(label != UNLABELLED for label in first):
        return split
  raise InputError(
    f'`test_split`: `dataset`={name} has no labelled split test or '
    f'validation; give one of {tfds_reader.listed(splits)}, or slices: '
    '`train_split`=train[:90%] `test_split`=train[90%:]'
  )
