"""A named data set as rows: images uint8 [N, H, W, c], truth int32 [N].

`digits` is embedded, and so is `yin-yang`, of points in the plane: "images"
float32 [N, 1, 2, 1] that are fed as they are. Every other name is a TFDS image
classification set, or one prepared in the TFDS layout, read row by row through
its data source; no TensorFlow is imported unless a set has to be prepared
first. Letters: N images of a split, B rows of one read, H x W x c the size of
an image.
"""

from collections.abc import Callable
from concurrent import futures
import os
import threading
from typing import Any, NamedTuple

from absl import logging
import numpy as np
import PIL.Image
import tqdm

from ssljax.core import UNLABELLED
from ssljax.data import decode, tfds_reader, toy
from ssljax.distributed import watchdog
from ssljax.errors import InputError, non_negative, positive, require

_CHUNK = 512  # rows of one task of a thread
_MANY = 10_000  # rows from which on the wait deserves a progress bar
_DIGITS_TEST = 50  # test images of each digit
_MARGIN = 8 / 7  # a shorter side of 256 of which 224 are looked at


class Source(NamedTuple):
  """The images of one split, read by row."""

  labels: np.ndarray  # [N] int32 truth, UNLABELLED where there is none
  shape: tuple[int, int, int]  # H, W, c of every image
  read: Callable[[Any], np.ndarray]  # rows [B] int -> uint8 [B, H, W, c]
  # (rows [B], draws [B, T, 4] of `imagenet.window`) -> uint8 [B, H, W, c]: a
  # random window of each original; None where `load` was not asked for it.
  crop: Callable[[Any, np.ndarray], np.ndarray] | None = None
  dtype: Any = np.uint8  # of what is read; float32 where it is no image


class Dataset(NamedTuple):
  """A training and a test split over the same C classes."""

  name: str
  train: Source
  test: Source
  classes: tuple[str, ...]  # [C]
  unlabelled_from: int = 0  # training rows before it are never seen unlabelled


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
  """Opens a data set; images stay on disk until their rows are read.

  Args:
    name: `digits`, `yin-yang`, a TFDS name, or a set in the TFDS layout in
      `data_dir`.
    data_dir: the folder that holds prepared data sets; embedded ones need none.
    train_split: TFDS split notation, as 'train+extra' or 'train[:90%]'.
    test_split: the same; by default 'test', or 'validation' where 'test' is
      missing or has no labels.
    image_size: shorter sides are resized to it, then the centre is cropped.
      Sets whose images differ in size need it.
    corrupt: how many undecodable images, over both splits, are read as zeros.
    crop: give images that differ in size a `Source.crop`. What is read without
      it then has its shorter side resized to 8/7 of the image size, so that as
      much of the border is left out.

  Returns:
    The data set. `Source.read` may be called from many threads at once.

  Raises:
    InputError: what was asked for cannot be read.
  """
  non_negative(corrupt=corrupt)
  if image_size is not None:
    positive(image_size=image_size)
  if name == 'digits':
    return _digits(train_split, test_split or 'test', image_size)
  if name == 'yin-yang':
    return _yin_yang(train_split, test_split or 'test', image_size)
  return _prepared_set(
    name, data_dir, train_split, test_split, image_size, corrupt, crop
  )


def arrays(source: Source) -> np.ndarray:
  """Decodes every image of `source` -> its dtype [N, H, W, c]."""
  images = np.empty((len(source.labels), *source.shape), source.dtype)

  def fill(rows):
    images[rows] = source.read(np.arange(rows.start, rows.stop))

  _by_chunk(fill, len(images), 'images')
  return images


# The embedded digits.


def _digits(train_split, test_split, image_size) -> Dataset:
  """Scikit-learn's 1,797 real 8 x 8 digits: 1,297 to train on, 500 to test."""
  from sklearn import datasets  # slow to import, and only needed here

  digits = datasets.load_digits()
  # 16 levels of ink over [0, 255]; the half keeps the rounding exact.
  images = np.floor(digits.images * 255 / 16 + 0.5).astype(np.uint8)[..., None]
  labels = digits.target.astype(np.int32)
  if image_size is not None:
    images = np.stack([_resized(image, image_size) for image in images])
  test = _digits_test(labels)
  parts = {'train': np.flatnonzero(~test), 'test': np.flatnonzero(test)}

  def source(flag, split):
    require(split in parts, _unknown_split(flag, split, parts))
    mine = images[parts[split]]
    return Source(
      labels[parts[split]], mine.shape[1:], lambda rows: mine[np.asarray(rows)]
    )

  return Dataset(
    'digits',
    source('train_split', train_split),
    source('test_split', test_split),
    tuple('0123456789'),
  )


def _digits_test(labels: np.ndarray) -> np.ndarray:
  """Which of `labels` [N] are the test set -> bool [N].

  The first 50 of each digit in an order that sorts the raw words of a Philox
  generator with key 0: raw words, for NumPy pins them and not `permutation`.
  """
  order = np.argsort(np.random.Philox(key=0).random_raw(len(labels)))
  test = np.zeros(len(labels), bool)
  for digit in range(10):
    test[order[labels[order] == digit][:_DIGITS_TEST]] = True
  return test


def _resized(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes a grey image [H, W, 1] -> [size, size, 1]."""
  fitted = decode.fit(PIL.Image.fromarray(image[..., 0]), size, size)
  return np.asarray(fitted)[..., None]


# The embedded points.


def _yin_yang(train_split, test_split, image_size) -> Dataset:
  """DeepBASS's 500 + 500 points to train on, and as many to test."""
  require(
    image_size is None,
    f'`image_size`={image_size}: `dataset`=yin-yang is of points, not of '
    'images: leave it out',
  )
  splits = ('train', 'test')

  def source(flag, split):
    require(split in splits, _unknown_split(flag, split, splits))
    mine, labels = toy.yin_yang(500, key=splits.index(split))
    mine = mine.reshape(-1, 1, 2, 1)
    read = lambda rows: mine[np.asarray(rows)]
    return Source(labels, (1, 2, 1), read, dtype=np.float32)

  return Dataset(
    'yin-yang',
    source('train_split', train_split),
    source('test_split', test_split),
    toy.CLASSES,
  )


# Assembling a prepared data set.


def _prepared_set(
  name, data_dir, train_split, test_split, image_size, corrupt, crop
) -> Dataset:
  """Opens a set in the TFDS layout; the arguments are those of `load`."""
  builder = tfds_reader.open_builder(name, data_dir)
  columns = tfds_reader.find_columns(name, builder.info)
  shape = image_shape(name, columns.feature, image_size)
  test_split = test_split or default_test_split(name, builder, columns)
  crop = crop and None in columns.feature.shape[:2]
  shorter = round(_MARGIN * image_size) if crop else image_size
  tolerance = _Tolerance(corrupt)

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
    f'`train_split`={train_split}: none of its images has a label; name a '
    f'split that has labels, of {splits}',
  )
  require(
    (test.labels != UNLABELLED).all(),
    f'`test_split`={test_split}: it has images without labels; name another '
    f'split, of {splits}',
  )
  return Dataset(name, train, test, columns.classes)


# Finding a prepared data set, or preparing it.


def image_shape(name: str, feature, image_size) -> tuple[int, int, int]:
  """H, W, c of every image as `_decode` returns it."""
  require(
    len(feature.shape) == 3 and feature.np_dtype == np.uint8,
    f'`dataset`={name}: its images are {feature.np_dtype} of shape '
    f'{feature.shape}; name a set of 8-bit images [H, W, c]',
  )
  height, width, channels = feature.shape
  channels = 1 if channels == 1 else 3
  if image_size is not None:
    return image_size, image_size, channels
  require(
    None not in (height, width),
    f'`image_size`: the images of `dataset`={name} differ in size; give the '
    'side of the square to fit them to, e.g. `image_size`=224',
  )
  return height, width, channels


def default_test_split(name: str, builder, columns: tfds_reader.Columns) -> str:
  """'test', or 'validation' where the labels of 'test' are not published."""
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
    f'validation; name one of {tfds_reader.listed(splits)}, or slices: '
    '`train_split`=train[:90%] `test_split`=train[90%:]'
  )


def _unknown_split(flag: str, split: str, splits) -> str:
  return (
    f'`{flag}`={split}: no such split; there are {tfds_reader.listed(splits)}'
  )


# Reading.


def split_size(name: str, builder, flag: str, split: str) -> int:
  """How many images a split has; refuses one without."""
  splits = builder.info.splits
  try:
    count = splits[split].num_examples
  except (KeyError, ValueError, AssertionError) as error:
    raise InputError(_unknown_split(flag, split, splits)) from error
  require(
    count > 0,
    f'`{flag}`={split}: no images in this split of `dataset`={name}; name '
    f'another of {tfds_reader.listed(splits)}, or prepare the data set again',
  )
  return count


def _records(name: str, builder, flag: str, split: str):
  """The serialized examples of a split: len(), __getitems__(rows)."""
  import tensorflow_datasets as tfds

  split_size(name, builder, flag, split)
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  try:
    return builder.as_data_source(split, deserialize_method=raw)
  except NotImplementedError as error:
    raise InputError(
      f'`dataset`={name}: it was prepared as {builder.info.file_format.value}'
      ', which cannot be read by row; prepare it as array_record: pip install'
      " 'ssljax[prepare]' and tfds convert_format --dataset_version_dir="
      f'{builder.data_dir} --out_file_format=array_record'
    ) from error


def _fetch(name: str, split: str, records, rows: slice, field) -> list:
  """Reads `field` of the records of `rows`."""
  try:
    fetched = records.__getitems__(list(range(rows.start, rows.stop)))
    return [field(record) for record in fetched]
  except Exception as error:  # whatever a missing or damaged file makes
    raise InputError(
      f'`dataset`={name}: the files of its split {split} are missing or '
      f'damaged ({tfds_reader.one_line(error)}); prepare or copy it again'
    ) from error


def _labels(name, records, columns, flag, split) -> np.ndarray:
  """Every label of a split -> int32 [N]; no image is decoded."""
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
      'it again with as many classes as it has'
    )
  return labels


class _Tolerance:
  """Counts distinct corrupt images up to a limit; shared by threads."""

  def __init__(self, limit: int):
    self._limit = limit
    self._seen = set()
    self._lock = threading.Lock()

  def admit(self, where: str, row: int, title: str, error: Exception):
    """Warns of a corrupt image, or raises past the limit."""
    which = f'{where}: the image in row {row}{title} cannot be decoded'
    with self._lock:
      if (where, row) in self._seen:
        return
      if len(self._seen) >= self._limit:
        raise InputError(
          f'{which} ({tfds_reader.one_line(error)}); repair it, or have up to '
          'n such images read as zeros: `corrupt`=n, here at least '
          f'{self._limit + 1}'
        ) from error
      self._seen.add((where, row))
      logging.warning(
        '%s and is read as zeros (%d of corrupt=%d)',
        which,
        len(self._seen),
        self._limit,
      )


class _Reader(NamedTuple):
  """Decodes rows: `Source.read` of a split on disk."""

  where: str  # the data set and split, for messages
  records: Any  # the split's serialized examples
  columns: tfds_reader.Columns
  shape: tuple[int, int, int]  # H, W, c
  shorter: int | None  # what shorter sides are resized to
  tolerance: _Tolerance

  def __call__(self, rows, draws=None) -> np.ndarray:
    """Rows [B] int -> uint8 [B, H, W, c], with draws random windows."""
    rows = np.asarray(rows).tolist()
    images = np.zeros((len(rows), *self.shape), np.uint8)
    records = self.records.__getitems__(rows)
    draws = [None] * len(rows) if draws is None else draws
    for image, row, record, own in zip(
      images, rows, records, draws, strict=True
    ):
      try:
        image[:] = self._decode(self.columns.image(record), own)
      except Exception as error:  # a damaged file makes codecs raise anything
        self.tolerance.admit(self.where, row, self._title(record), error)
    return images

  def _decode(self, encoded: bytes, draws: np.ndarray | None) -> np.ndarray:
    """One PNG, JPEG ... -> uint8 [H, W, c]."""
    if draws is None:
      return decode.centre(encoded, self.shape, self.shorter)
    return decode.crop(encoded, self.shape, draws)

  def _title(self, record: bytes) -> str:
    title = self.columns.title(record)
    title = title.decode() if isinstance(title, bytes) else title
    return f' ({title})' if title else ''


def _by_chunk(fill: Callable[[slice], None], count: int, unit: str) -> None:
  """Calls `fill` with slices that cover range(count), on many threads."""
  chunks = [slice(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]
  # None: a bar on a terminal only.
  bar = tqdm.tqdm(
    total=count,
    unit=f' {unit}',
    leave=False,
    disable=None if count >= _MANY else True,
  )
  with bar, futures.ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
    for chunk, _ in zip(chunks, pool.map(fill, chunks), strict=True):
      watchdog.alive()
      bar.update(chunk.stop - chunk.start)
