"""A named data set as rows: images uint8 [N, H, W, c], truth int32 [N].

`digits` is embedded. Every other name is a TFDS image classification set, or
one prepared in the TFDS layout, read row by row through its data source; no
TensorFlow is imported unless a set has to be prepared first. Letters: N images
of a split, B rows of one read, H x W x c the size of an image.
"""

from collections.abc import Callable
from concurrent import futures
import difflib
import importlib.util
import io
import os
import re
import threading
from typing import Any, NamedTuple

from absl import logging
import numpy as np
import PIL.Image
import tqdm

from ssljax import core

UNLABELLED = core.UNLABELLED
InputError = core.InputError
require = core.require

_CHUNK = 512  # rows of one task of a thread
_MANY = 10_000  # rows from which on the wait deserves a progress bar
_DIGITS_TEST = 50  # test images of each digit
_FILE_NAMES = ('file_name', 'filename', 'image/filename')


class Source(NamedTuple):
  """The images of one split, read by row."""

  labels: np.ndarray  # [N] int32 truth, UNLABELLED where there is none
  shape: tuple[int, int, int]  # H, W, c of every image
  read: Callable[[Any], np.ndarray]  # rows [B] int -> uint8 [B, H, W, c]


class Dataset(NamedTuple):
  """A training and a test split over the same C classes."""

  name: str
  train: Source
  test: Source
  classes: tuple[str, ...]  # [C]


def load(
  name: str,
  data_dir: str | None = None,
  *,
  train_split: str = 'train',
  test_split: str | None = None,
  image_size: int | None = None,
  corrupt: int = 0,
) -> Dataset:
  """Opens a data set; images stay on disk until their rows are read.

  Args:
    name: `digits`, a TFDS name, or a set in the TFDS layout in `data_dir`.
    data_dir: the folder that holds prepared data sets; `digits` needs none.
    train_split: TFDS split notation, as 'train+extra' or 'train[:90%]'.
    test_split: the same; by default 'test', or 'validation' where 'test' is
      missing or has no labels.
    image_size: shorter sides are resized to it, then the centre is cropped.
      Sets whose images differ in size need it.
    corrupt: how many undecodable images, over both splits, are read as zeros.

  Returns:
    The data set. `Source.read` may be called from many threads at once.

  Raises:
    InputError: what was asked for cannot be read.
  """
  core.non_negative(corrupt=corrupt)
  if image_size is not None:
    core.positive(image_size=image_size)
  if name == 'digits':
    return _digits(train_split, test_split or 'test', image_size)
  return _prepared_set(
    name, data_dir, train_split, test_split, image_size, corrupt
  )


def arrays(source: Source) -> np.ndarray:
  """Decodes every image of `source` -> uint8 [N, H, W, c]."""
  images = np.empty((len(source.labels), *source.shape), np.uint8)

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
  fitted = _fit(PIL.Image.fromarray(image[..., 0]), size)
  return np.asarray(fitted)[..., None]


# Assembling a prepared data set.


def _prepared_set(
  name, data_dir, train_split, test_split, image_size, corrupt
) -> Dataset:
  """Opens a set in the TFDS layout; the arguments are those of `load`."""
  builder = _open(name, data_dir)
  columns = _columns(name, builder.info)
  shape = _shape(name, columns.feature, image_size)
  test_split = test_split or _test_split(name, builder, columns)
  tolerance = _Tolerance(corrupt)

  def source(flag, split):
    records = _records(name, builder, flag, split)
    labels = _labels(name, records, columns, flag, split)
    reader = _Reader(
      f'--dataset={name} --{flag}={split}',
      records,
      columns,
      shape,
      image_size,
      tolerance,
    )
    return Source(labels, shape, reader)

  train = source('train_split', train_split)
  test = source('test_split', test_split)
  splits = _names(builder.info.splits)
  require(
    (train.labels != UNLABELLED).any(),
    f'--train_split={train_split}: none of its images has a label; name a '
    f'split that has labels, of {splits}',
  )
  require(
    (test.labels != UNLABELLED).all(),
    f'--test_split={test_split}: it has images without labels; name another '
    f'split, of {splits}',
  )
  return Dataset(name, train, test, columns.classes)


# Finding a prepared data set, or preparing it.


def _open(name: str, data_dir: str | None):
  """The TFDS builder of a prepared data set."""
  import tensorflow_datasets as tfds  # slow to import; `digits` needs none

  root = _root(name, data_dir)
  try:
    builder = _builder(name, root)
    prepared = builder.is_prepared() and bool(builder.info.splits)
  except tfds.core.DatasetNotFoundError as error:
    raise InputError(_unknown_name(name, root)) from error
  except Exception as error:  # its parsers and imports raise nearly anything
    raise InputError(
      f'--dataset={name}: TFDS cannot open it in --data_dir={root} '
      f'({_line(_cause(error))}); give it as name, name/config or '
      "name:version, prepare it again, or pip install 'ssljax[prepare]'"
    ) from error
  return builder if prepared else _prepared(name, root, builder)


def _builder(name: str, root):
  """The class's own version, else the newest on disk, else unprepared."""
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(name, data_dir=str(root))
  except tfds.core.DatasetNotFoundError:
    raise
  except Exception:  # a class may import what only preparing it needs
    newest = _newest(root / name)
    if newest is None:
      raise
    return tfds.builder_from_directory(newest)
  if builder.is_prepared() or ':' in name:
    return builder
  config = builder.builder_config
  newest = _newest(root / builder.name / (config.name if config else ''))
  return tfds.builder_from_directory(newest) if newest else builder


def _root(name: str, data_dir: str | None):
  """`data_dir` as an existing folder; cloud addresses work too."""
  from etils import epath

  if not data_dir:
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    plain = re.split('[/:]', name)[0]
    require(plain in known, _unknown_name(name, None))
    raise InputError(
      f'--data_dir: --dataset={name} needs it; give the folder that holds '
      'prepared TFDS data sets, e.g. --data_dir=~/tensorflow_datasets'
    )
  root = epath.Path(data_dir).expanduser()
  require(
    root.is_dir(),
    f'--data_dir={data_dir}: there is no such folder; give one that holds '
    'prepared TFDS data sets, or make it',
  )
  return root


def _newest(folder):
  """The folder of the newest version of a data set in `folder`, or None."""
  import tensorflow_datasets as tfds

  if not folder.is_dir():
    return None
  found = [
    path
    for path in folder.iterdir()
    if tfds.core.Version.is_valid(path.name)
    and (path / 'dataset_info.json').exists()
    and (path / 'features.json').exists()
  ]
  return max(found, key=lambda p: tfds.core.Version(p.name), default=None)


def _prepared(name: str, root, builder):
  """Downloads and prepares a data set, which TensorFlow has to be there for."""
  require(
    _tensorflow_is_there(),
    f'--dataset={name}: it is not prepared in --data_dir={root} (there: '
    f'{_names(_on_disk(root))}), and preparing it needs TensorFlow; '
    "pip install 'ssljax[prepare]' and run this again, or copy in a prepared "
    'one (array_record)',
  )
  logging.info('preparing %s in %s', name, root)
  try:
    builder.download_and_prepare(file_format='array_record')
  except Exception as error:  # the network, the disk, a manual download
    raise InputError(
      f'--dataset={name}: it could not be prepared in --data_dir={root}: '
      f'{_line(error)}; see https://www.tensorflow.org/datasets/catalog/'
      f'{builder.name}'
    ) from error
  return builder


def _tensorflow_is_there() -> bool:
  return importlib.util.find_spec('tensorflow') is not None


def _on_disk(root) -> list[str]:
  """The data sets that seem to be under `root`."""
  if root is None:
    return []
  hidden = ('.', '_')
  paths = [p for p in root.iterdir() if not p.name.startswith(hidden)]
  return sorted(p.name for p in paths if p.is_dir() and p.name != 'downloads')


def _unknown_name(name: str, root) -> str:
  import tensorflow_datasets as tfds

  there = ['digits', *_on_disk(root)]
  known = [*there, *tfds.list_builders(with_community_datasets=False)]
  near = dict.fromkeys(difflib.get_close_matches(name, known, n=5))
  hint = f'did you mean {_names(near)}?' if near else f'try {_names(there)}'
  place = f' and not in --data_dir={root}' if root else ''
  return f'--dataset={name}: not a TFDS data set{place}; {hint}'


# Which features are the image and the label, and which splits there are.


class _Columns(NamedTuple):
  """How to take an example's parts out of a record."""

  feature: Any  # the image's TFDS feature
  classes: tuple[str, ...]  # [C]
  image: Callable[[bytes], bytes]  # the encoded image
  label: Callable[[bytes], int]
  title: Callable[[bytes], str]  # the example's file name, '' without one


def _columns(name: str, info) -> _Columns:
  """Finds image and label among the features of a data set."""
  from tensorflow_datasets import features as kinds

  features = info.features
  require(
    isinstance(features, kinds.FeaturesDict),
    f'--dataset={name}: not an image classification set; name one with an '
    'image and a label',
  )
  images = [k for k, f in features.items() if type(f) is kinds.Image]
  labels = [k for k, f in features.items() if isinstance(f, kinds.ClassLabel)]
  keys = info.supervised_keys or (None, None)
  image = _only(name, 'image', images, keys[0])
  label = _only(name, 'label', labels, keys[1])
  require(
    bool(features[label].num_classes),
    f'--dataset={name}: its label {label!r} states no classes; prepare it '
    'again with num_classes or names',
  )
  title = next((k for k in _FILE_NAMES if k in features), None)
  return _Columns(
    features[image],
    tuple(features[label].names),
    _field(features, image, encoded=True),
    _field(features, label),
    _field(features, title) if title else lambda record: '',
  )


def _only(name: str, kind: str, found: list[str], supervised) -> str:
  """The one feature of a kind, or the one the data set names for learning."""
  require(
    bool(found),
    f'--dataset={name}: not an image classification set, it has no {kind} '
    'feature; name one with an image and a label',
  )
  if isinstance(supervised, str) and supervised in found:
    return supervised
  require(
    len(found) == 1,
    f'--dataset={name}: it has several {kind} features '
    f'({_names(sorted(found))}) and no supervised_keys to choose by; prepare '
    'it again with them',
  )
  return found[0]


def _field(features, key: str, encoded: bool = False) -> Callable[[bytes], Any]:
  """A function that parses one feature of a record and leaves the others."""
  import tensorflow_datasets as tfds

  alone = tfds.features.FeaturesDict({key: features[key]})
  decoders = {key: tfds.decode.SkipDecoding()} if encoded else None
  parse = alone.deserialize_example_np
  return lambda record: parse(record, decoders=decoders)[key]


def _shape(name: str, feature, image_size) -> tuple[int, int, int]:
  """H, W, c of every image as `_decode` returns it."""
  require(
    len(feature.shape) == 3 and feature.np_dtype == np.uint8,
    f'--dataset={name}: its images are {feature.np_dtype} of shape '
    f'{feature.shape}; name a set of 8-bit images [H, W, c]',
  )
  height, width, channels = feature.shape
  channels = 1 if channels == 1 else 3
  if image_size is not None:
    return image_size, image_size, channels
  require(
    None not in (height, width),
    f'--image_size: the images of --dataset={name} differ in size; give the '
    'side of the square to fit them to, e.g. --image_size=224',
  )
  return height, width, channels


def _test_split(name: str, builder, columns: _Columns) -> str:
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
    f'--test_split: --dataset={name} has no labelled split test or '
    f'validation; name one of {_names(splits)}, or slices: '
    '--train_split=train[:90%] --test_split=train[90%:]'
  )


def _unknown_split(flag: str, split: str, splits) -> str:
  return f'--{flag}={split}: no such split; there are {_names(splits)}'


# Reading.


def _records(name: str, builder, flag: str, split: str):
  """The serialized examples of a split: len(), __getitems__(rows)."""
  import tensorflow_datasets as tfds

  splits = builder.info.splits
  try:
    count = splits[split].num_examples
  except (KeyError, ValueError, AssertionError) as error:
    raise InputError(_unknown_split(flag, split, splits)) from error
  require(
    count > 0,
    f'--{flag}={split}: no images in this split of --dataset={name}; name '
    f'another of {_names(splits)}, or prepare the data set again',
  )
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  try:
    return builder.as_data_source(split, deserialize_method=raw)
  except NotImplementedError as error:
    raise InputError(
      f'--dataset={name}: it was prepared as {builder.info.file_format.value}'
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
      f'--dataset={name}: the files of its split {split} are missing or '
      f'damaged ({_line(error)}); prepare or copy it again'
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
      f'--{flag}={split}: {wrong.size} labels of --dataset={name} lie outside '
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
          f'{which} ({_line(error)}); repair it, or have up to n such images '
          f'read as zeros: --corrupt=n, here at least {self._limit + 1}'
        ) from error
      self._seen.add((where, row))
      logging.warning(
        '%s and is read as zeros (%d of --corrupt=%d)',
        which,
        len(self._seen),
        self._limit,
      )


class _Reader(NamedTuple):
  """Decodes rows: `Source.read` of a split on disk."""

  where: str  # the data set and split, for messages
  records: Any  # the split's serialized examples
  columns: _Columns
  shape: tuple[int, int, int]  # H, W, c
  image_size: int | None
  tolerance: _Tolerance

  def __call__(self, rows) -> np.ndarray:
    """Rows [B] int -> uint8 [B, H, W, c]."""
    rows = np.asarray(rows).tolist()
    images = np.zeros((len(rows), *self.shape), np.uint8)
    records = self.records.__getitems__(rows)
    for image, row, record in zip(images, rows, records, strict=True):
      try:
        encoded = self.columns.image(record)
        image[:] = _decode(encoded, self.shape, self.image_size)
      except Exception as error:  # a damaged file makes codecs raise anything
        self.tolerance.admit(self.where, row, self._title(record), error)
    return images

  def _title(self, record: bytes) -> str:
    title = self.columns.title(record)
    title = title.decode() if isinstance(title, bytes) else title
    return f' ({title})' if title else ''


def _decode(encoded: bytes, shape, image_size) -> np.ndarray:
  """One PNG, JPEG ... -> uint8 [H, W, c]."""
  mode = 'L' if shape[-1] == 1 else 'RGB'
  with PIL.Image.open(io.BytesIO(encoded)) as image:
    if image_size is not None:
      # A large JPEG is decoded at 1/2, 1/4, 1/8 where that leaves enough.
      image.draft(mode, (2 * image_size, 2 * image_size))
    image = image if image.mode == mode else image.convert(mode)
    pixels = np.asarray(_fit(image, image_size))
  if pixels.shape[:2] != shape[:2]:
    raise ValueError(f'{pixels.shape[:2]} pixels where {shape[:2]} are stated')
  return pixels.reshape(shape)


def _fit(image: PIL.Image.Image, size: int | None) -> PIL.Image.Image:
  """Resizes the shorter side to `size` and crops the centre."""
  if size is None or image.size == (size, size):
    return image
  shorter = min(image.size)
  width, height = (max(size, round(s * size / shorter)) for s in image.size)
  image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
  left, top = (width - size) // 2, (height - size) // 2
  return image.crop((left, top, left + size, top + size))


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
      bar.update(chunk.stop - chunk.start)


def _names(names) -> str:
  return ', '.join(map(str, names)) or 'nothing'


def _cause(error: BaseException) -> BaseException:
  """The error at the bottom of a chain of them."""
  while error.__cause__ is not None:
    error = error.__cause__
  return error


def _line(error: BaseException) -> str:
  """What an error says, in at most one short line."""
  text = re.sub(' <[^<>]* at 0x[0-9a-f]+>', '', str(error))
  text = ' '.join(text.split()) or type(error).__name__
  text = re.sub('^Failed to construct dataset .*?}": ', '', text)
  return text if len(text) <= 200 else text[:197] + '...'
