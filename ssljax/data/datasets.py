"""Named data sets: embedded ones, .npz files, and sets in the TFDS layout.

`digits` and `yin-yang` (points in the plane) are embedded. A name that ends in
.npz is a file of arrays, see `arrays.load_npz`. Every other name is a TFDS
image classification set, or one prepared in the TFDS layout, read row by row
through its data source; no TensorFlow is imported unless a set has to be
prepared first. Letters: N rows of a split, B rows of one read, H x W x c the
size of an image.
"""

from collections.abc import Callable
from concurrent import futures
import logging
import os
import threading
from typing import Any, NamedTuple

import numpy as np
import tqdm

from ssljax.core import UNLABELLED
from ssljax.data import decode, tfds_reader, toy
from ssljax.data.arrays import (
  check_image_size,
  in_memory,
  load_npz,
  resized,
  select,
)
from ssljax.data.types import Dataset, Source
from ssljax.distributed import watchdog
from ssljax.errors import InputError, non_negative, require

_LOG = logging.getLogger(__name__)
_CHUNK = 512  # rows that a thread reads at once
_MANY = 10_000  # rows from which a progress bar is shown
_DIGITS_TEST = 50  # test images of each digit
# Ratio of the resized shorter side to the crop at its centre, 256 / 224.
_MARGIN = 8 / 7


def load(
  name: str,
  data_dir: str | None = None,
  *,
  train_split: str = 'train',
  test_split: str | None = None,
  image_size: int | None = None,
  corrupt: int = 0,
  crop: bool = False,
) -> Dataset:
  """Open a data set.

  Images of a TFDS set stay on disk until their rows are read; the others are
  in memory.

  Args:
    name: `digits`, `yin-yang`, the path of an .npz file, a TFDS name, or a set
      in the TFDS layout in `data_dir`.
    data_dir: the folder that holds prepared TFDS sets; only these need it.
    train_split: in TFDS split notation, as 'train+extra' or 'train[:90%]';
      'train' or 'test' for sets in memory.
    test_split: likewise. By default 'test', or for TFDS sets 'validation' where
      'test' is missing or has no labels.
    image_size: the side of the square that images are resized to: the shorter
      side is resized, then the centre is cropped. Required for sets whose
      images differ in size.
    corrupt: the number of undecodable images, over both splits, that are
      tolerated and read as zeros.
    crop: give `Source.crop` to sets whose images differ in size. `Source.read`
      then resizes the shorter side to 8/7 of the image size, so that the centre
      crop leaves out as much border as is usual beside random crops.

  Returns:
    The data set. `Source.read` may be called from many threads at once.

  Raises:
    InputError: the data set cannot be read with these arguments.
  """
  non_negative(corrupt=corrupt)
  check_image_size(image_size)
  if not is_in_memory(name):
    return _prepared_set(
      name, data_dir, train_split, test_split, image_size, corrupt, crop
    )
  if name not in EMBEDDED:
    return load_npz(
      name,
      train_split=train_split,
      test_split=test_split,
      image_size=image_size,
    )
  sources, classes = EMBEDDED[name]()
  sources = resized(name, sources, image_size)
  return select(name, sources, classes, train_split, test_split)


def is_in_memory(name: str) -> bool:
  """Return True for data sets that `load` reads whole: not TFDS sets."""
  return name in EMBEDDED or name.endswith('.npz')


def arrays(source: Source) -> np.ndarray:
  """Return all rows of `source`, of its dtype, `[N, H, W, c]`."""
  images = np.empty((len(source.labels), *source.shape), source.dtype)

  def fill(rows):
    images[rows] = source.read(np.arange(rows.start, rows.stop))

  _by_chunk(fill, len(images), 'images')
  return images


# The embedded data sets.


def _digits() -> tuple[dict[str, Source], tuple[str, ...]]:
  """Return the splits and classes of scikit-learn's 1,797 real 8 x 8 digits.

  1,297 are to train on, 500 to test.
  """
  from sklearn import datasets  # slow to import, and only needed here

  digits = datasets.load_digits()
  # 16 levels of ink over [0, 255]; adding a half makes the rounding exact.
  images = np.floor(digits.images * 255 / 16 + 0.5).astype(np.uint8)[..., None]
  labels = digits.target.astype(np.int32)
  test = _digits_test(labels)
  sources = {
    split: in_memory(images[rows], labels[rows])
    for split, rows in (('train', ~test), ('test', test))
  }
  return sources, tuple('0123456789')


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


def _yin_yang() -> tuple[dict[str, Source], tuple[str, ...]]:
  """Return DeepBASS's 500 + 500 points to train on, and as many to test."""
  splits = enumerate(('train', 'test'))
  sources = {split: in_memory(*toy.yin_yang(500, key)) for key, split in splits}
  return sources, toy.CLASSES


EMBEDDED = {'digits': _digits, 'yin-yang': _yin_yang}


# Sets in the TFDS layout.


def _prepared_set(
  name, data_dir, train_split, test_split, image_size, corrupt, crop
) -> Dataset:
  """Open a set in the TFDS layout; the arguments are those of `load`."""
  builder = tfds_reader.open_builder(name, data_dir)
  columns = tfds_reader.find_columns(name, builder.info)
  shape = image_shape(name, columns.feature, image_size)
  test_split = test_split or default_test_split(name, builder, columns)
  crop = crop and None in columns.feature.shape[:2]
  shorter = round(_MARGIN * image_size) if crop else image_size
  tolerance = _CorruptCount(corrupt)

  def source(flag, split):
    records = _records(name, builder, flag, split)
    labels = _labels(name, records, columns, flag, split)
    reader = _Reader(
      f'`dataset`={name} `{flag}`={split}',
      records,
      columns,
      shape,
      shorter,
      tolerance,
    )
    return Source(labels, shape, reader, reader if crop else None)

  train = source('train_split', train_split)
  test = source('test_split', test_split)
  splits = tfds_reader.listed(builder.info.splits)
  require(
    (train.labels != UNLABELLED).any(),
    f'`train_split`={train_split}: none of its images has a label; give a '
    f'split that has labels, one of {splits}',
  )
  require(
    (test.labels != UNLABELLED).all(),
    f'`test_split`={test_split}: some of its images have no label; give '
    f'another split, one of {splits}',
  )
  return Dataset(name, train, test, columns.classes)


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
  return height, width, channels


def default_test_split(name: str, builder, columns: tfds_reader.Columns) -> str:
  """Return 'test', or 'validation' if the labels of 'test' are unpublished."""
  splits = builder.info.splits
  for split in ('test', 'validation'):
    if split in splits and splits[split].num_examples:
      records = _records(name, builder, 'test_split', split)
      few = slice(0, min(8, len(records)))
      first = _fetch(name, split, records, few, columns.label)
      if any(label != UNLABELLED for label in first):
        return split
  raise InputError(
    f'`test_split`: `dataset`={name} has no labelled split test or '
    f'validation; give one of {tfds_reader.listed(splits)}, or slices: '
    '`train_split`=train[:90%] `test_split`=train[90%:]'
  )


# Reading sets in the TFDS layout.


def split_size(name: str, builder, flag: str, split: str) -> int:
  """Return the number of images of a split, at least 1.

  Args:
    name: of the data set, for messages.
    builder: its TFDS builder.
    flag: the parameter that named the split, for messages.
    split: in TFDS split notation.

  Raises:
    InputError: there is no such split, or it is empty.
  """
  splits = builder.info.splits
  try:
    count = splits[split].num_examples
  except (KeyError, ValueError, AssertionError) as error:
    raise InputError(
      f'`{flag}`={split}: no such split in `dataset`={name}; give one of '
      f'{tfds_reader.listed(splits)}'
    ) from error
  require(
    count > 0,
    f'`{flag}`={split}: no images in this split of `dataset`={name}; give '
    f'another of {tfds_reader.listed(splits)}, or prepare the data set again',
  )
  return count


def _records(name: str, builder, flag: str, split: str):
  """Return the serialized examples of a split: len(), __getitems__(rows)."""
  import tensorflow_datasets as tfds

  split_size(name, builder, flag, split)
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  try:
    return builder.as_data_source(split, deserialize_method=raw)
  except NotImplementedError as error:
    raise InputError(
      f'`dataset`={name}: it was prepared as {builder.info.file_format.value}'
      ', which cannot be read by row; convert it to array_record: pip install'
      " 'ssljax[prepare]' and tfds convert_format --dataset_version_dir="
      f'{builder.data_dir} --out_file_format=array_record'
    ) from error


def _fetch(name: str, split: str, records, rows: slice, field) -> list:
  """Return `field` of the records of `rows`."""
  try:
    fetched = records.__getitems__(list(range(rows.start, rows.stop)))
    return [field(record) for record in fetched]
  except Exception as error:  # missing and damaged files raise many kinds
    raise InputError(
      f'`dataset`={name}: the files of its split {split} are missing or '
      f'damaged ({tfds_reader.one_line(error)}); prepare or copy it again'
    ) from error


def _labels(name, records, columns, flag, split) -> np.ndarray:
  """Return every label of a split, int32 `[N]`; no image is decoded."""
  labels = np.empty(len(records), np.int32)

  def fill(rows):
    labels[rows] = _fetch(name, split, records, rows, columns.label)

  _by_chunk(fill, len(labels), 'labels')
  count = len(columns.classes)
  wrong = np.flatnonzero((labels < UNLABELLED) | (labels >= count))
  if wrong.size:
    row = wrong[0]
    raise InputError(
      f'`{flag}`={split}: {wrong.size} labels of `dataset`={name} lie outside '
      f'its {count} classes, the first is {labels[row]} in row {row}; prepare '
      'it again with the right number of classes'
    )
  return labels


class _CorruptCount:
  """A count of distinct corrupt images, up to a limit; shared by threads."""

  def __init__(self, limit: int):
    self._limit = limit
    self._seen = set()
    self._lock = threading.Lock()

  def add(self, where: str, row: int, title: str, error: Exception):
    """Log a warning about a corrupt image, or raise beyond the limit."""
    which = f'{where}: the image in row {row}{title} cannot be decoded'
    with self._lock:
      if (where, row) in self._seen:
        return
      if len(self._seen) >= self._limit:
        raise InputError(
          f'{which} ({tfds_reader.one_line(error)}); repair it, or read up to '
          'n such images as zeros with `corrupt`=n, here at least '
          f'{self._limit + 1}'
        ) from error
      self._seen.add((where, row))
      _LOG.warning(
        '%s; it is read as zeros (%d of corrupt=%d)',
        which,
        len(self._seen),
        self._limit,
      )


class _Reader(NamedTuple):
  """The `Source.read` and `Source.crop` of a split on disk."""

  where: str  # the data set and split, for messages
  records: Any  # the split's serialized examples
  columns: tfds_reader.Columns
  shape: tuple[int, int, int]  # H, W, c
  shorter: int | None  # the length that shorter sides are resized to
  tolerance: _CorruptCount

  def __call__(self, rows, draws=None) -> np.ndarray:
    """Return the images of rows `[B]`, uint8 `[B, H, W, c]`.

    With draws `[B, T, 4]` they are random windows, see `imagenet.window`.
    """
    rows = np.asarray(rows).tolist()
    images = np.zeros((len(rows), *self.shape), np.uint8)
    records = self.records.__getitems__(rows)
    draws = [None] * len(rows) if draws is None else draws
    for image, row, record, own in zip(
      images, rows, records, draws, strict=True
    ):
      try:
        image[:] = self._decode(self.columns.image(record), own)
      except Exception as error:  # codecs raise many kinds
        self.tolerance.add(self.where, row, self._title(record), error)
    return images

  def _decode(self, encoded: bytes, draws: np.ndarray | None) -> np.ndarray:
    """Return the pixels uint8 `[H, W, c]` of an encoded image."""
    if draws is None:
      return decode.centre(encoded, self.shape, self.shorter)
    return decode.crop(encoded, self.shape, draws)

  def _title(self, record: bytes) -> str:
    title = self.columns.title(record)
    title = title.decode() if isinstance(title, bytes) else title
    return f' ({title})' if title else ''


def _by_chunk(fill: Callable[[slice], None], count: int, unit: str) -> None:
  """Call `fill` with slices that cover range(count), on many threads."""
  chunks = [slice(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]
  # `disable=None` shows the bar only on a terminal.
  bar = tqdm.tqdm(
    total=count,
    unit=f' {unit}',
    leave=False,
    disable=None if count >= _MANY else True,
  )
  with bar, futures.ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
    for chunk, _ in zip(chunks, pool.map(fill, chunks), strict=True):
      watchdog.reset()
      bar.update(chunk.stop - chunk.start)
