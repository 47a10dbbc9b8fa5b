"""Data sets from arrays in memory: images, or vectors of features.

`from_arrays` takes NumPy arrays, `load_npz` a file written by `np.savez`. Both
validate their input and report every fault as one `InputError`.
"""

from collections.abc import Iterable, Mapping, Sequence
import functools
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from ssljax.core import UNLABELLED
from ssljax.data import decode, duplicates, npz
from ssljax.data.tfds_reader import few, listed, one_line
from ssljax.data.types import MAX_CLASSES, Dataset, Source
from ssljax.errors import InputError, positive, require

_ROWS = 'train', 'test'
_ARRAYS = (
  *(f'{split}{part}' for split in _ROWS for part in ('', '_labels')),
  *(f'{split}{part}' for split in _ROWS for part in ('_files', '_digests')),
  'classes',
)
_SAVE = (
  'give a file written by np.savez(path, train=..., train_labels=..., '
  'test=..., test_labels=...)'
)
# Floats above 1 are read as 0..255 only if the largest is at least this: 1.3 or
# 16 (scikit-learn's digits) are of another scale, and would be nearly black.
_ABOVE_ONE = 1.001  # rounding may leave white a little above 1
_LEAST_WHITE = 128
MAX_SIDE = 4096  # pixels of `image_size`
# Bytes of images that are resized once, when a data set is opened. More are
# resized whenever they are read.
_RESIZED_ONCE = 2**30
_CHUNK = 2**22  # values of float images that are converted at once


class _Part(NamedTuple):
  """The unchecked arrays of one split, and what messages call them."""

  images: Any
  labels: Any
  images_are: str  # e.g. '`test_images`'
  labels_are: str


def from_arrays(
  images,
  labels,
  test_images=None,
  test_labels=None,
  *,
  classes: Sequence[str] | int | None = None,
  name: str = 'arrays',
  image_size: int | None = None,
) -> Dataset:
  """Return a data set of arrays in memory.

  Args:
    images: one row per example, in one of these forms. Images: integers in 0 to
      255 `[N, H, W, c]` with c = 1 or 3, or grey ones `[N, H, W]`; or floats of
      these shapes, in [0, 1] (converted to uint8 as round(255 x)) or in
      [0, 255] with a maximum of at least 128 (rounded). Features: numbers
      `[N, D]`, converted to float32 and used as they are.
    labels: `[N]` integer classes from 0, -1 for an unlabelled example.
    test_images: the test examples, of the same form and shape. Without them the
      test split is empty.
    test_labels: `[M]` their classes, all known.
    classes: the class names, or their number; by default they are numbered up
      to the largest label.
    name: the name of the data set in messages and results.
    image_size: the side of the square that images are resized to: the shorter
      side is resized, then the centre is cropped.

  Raises:
    InputError: an array cannot be used. The message names it and a remedy.
  """
  parts = {'train': _Part(images, labels, '`images`', '`labels`')}
  if test_images is not None or test_labels is not None:
    names = '`test_images`', '`test_labels`'
    parts['test'] = _Part(test_images, test_labels, *names)
  sources, classes = _checked(parts, classes, '`classes`')
  sources = dict(resized(name, sources, image_size))
  return select(name, sources, classes, 'train', None)


def load_npz(
  path: str,
  *,
  train_split: str = 'train',
  test_split: str | None = None,
  image_size: int | None = None,
  with_test: bool = True,
  strict: bool = True,
) -> Dataset:
  """Return the data set of an .npz file.

  The file holds the arrays `train` and `train_labels`, and may hold `test`,
  `test_labels` and `classes` (names), all as in `from_arrays`. It may also hold
  `train_files` and `test_files`, the names of the rows, and `train_digests` and
  `test_digests` uint64, equal for rows of equal images (of features: their
  values may differ in the last bit).

  Args:
    path: of the file; `~` and gs:// are expanded.
    train_split: 'train', or 'test' to train on the test arrays.
    test_split: likewise; by default 'test' if it is in the file, else none.
    image_size: as in `from_arrays`.
    with_test: False leaves the test split empty.
    strict: False admits a training split without labels, to be predicted.

  Raises:
    InputError: the file or an array in it cannot be used.
  """
  found = _read_npz(path)
  parts = {}
  for split in _ROWS:
    names = split, f'{split}_labels'
    if split == 'train' or any(name in found for name in names):
      called = [f'`dataset`={path}, array {name}' for name in names]
      rows, labels = map(found.get, names)
      parts[split] = _Part(rows, labels, *called)
  where = f'`dataset`={path}, array classes'
  sources, classes = _checked(parts, found.get('classes'), where, strict)
  sources = dict(resized(path, sources, image_size))
  sources = {
    split: _described(source, found, split, path)
    for split, source in sources.items()
  }
  return select(path, sources, classes, train_split, test_split, with_test)


def _described(
  source: Source, found: Mapping[str, np.ndarray], split: str, path: str
) -> Source:
  """Return a split with the names and hashes of its rows in a file."""
  count = len(source.labels)
  for part, kind in (('files', 'U'), ('digests', 'u')):
    array = found.get(f'{split}_{part}')
    if array is None:
      continue
    require(
      array.shape == (count,) and array.dtype.kind == kind,
      f'`dataset`={path}, array {split}_{part}: is {array.dtype} of shape '
      f'{array.shape} for {count} rows; give one '
      f'{"text" if kind == "U" else "uint64"} for each',
    )
    if part == 'files':
      source = source._replace(names=array)
    else:
      digests = array.astype(np.uint64)
      source = source._replace(digests=functools.partial(np.asarray, digests))
  return source


def _read_npz(path: str) -> dict[str, np.ndarray]:
  """Return the arrays of a file, only those that a data set has."""
  from etils import epath  # slow to import

  try:
    where = epath.Path(path).expanduser()
    local = pathlib.Path(where)
    if local.exists() and not local.is_file():  # reading a pipe would wait
      raise ValueError('it is no regular file')
    with where.open('rb') as file:
      found, members = npz.read(file, _ARRAYS)
  except Exception as error:  # zip, zlib, NumPy and the disk raise many kinds
    raise InputError(
      f'`dataset`={path}: cannot be read as an .npz file ({one_line(error)}); '
      f'{_SAVE}, without Python objects'
    ) from error
  missing = [key for key in _ARRAYS[:2] if key not in found]
  require(
    not missing,
    f'`dataset`={path}: lacks the array {listed(missing)} (it has '
    f'{few(members)}); {_SAVE}',
  )
  return found


def select(
  name: str,
  sources: Mapping[str, Source],
  classes: tuple[str, ...],
  train_split: str,
  test_split: str | None,
  with_test: bool = True,
) -> Dataset:
  """Return the data set of two splits out of several in memory.

  Args:
    name: of the data set.
    sources: the splits by name.
    classes: `[C]` names.
    train_split: the one to train on.
    test_split: the one to test on; by default 'test' if it is there, else an
      empty one.
    with_test: False leaves the test split empty.
  """
  for parameter, split in (
    ('train_split', train_split),
    ('test_split', test_split),
  ):
    require(
      split is None or split in sources,
      f'`{parameter}`={split}: no such split in `dataset`={name}; give one of '
      f'{listed(sources)}',
    )
  train, test_split = sources[train_split], test_split or 'test'
  if not with_test or test_split not in sources:
    return Dataset(name, train, without_rows(train), classes)
  others = [split for split in sources if split != train_split]
  instead = f'`test_split`={others[0]}' if others else 'no `test_split`'
  require(
    test_split != train_split,
    f'`train_split`={train_split}, `test_split`={test_split}: the test images '
    f'of `dataset`={name} would be trained on; give {instead}',
  )
  test = sources[test_split]
  require(
    bool((test.labels != UNLABELLED).all()),
    f'`test_split`={test_split}: some of its rows have no label; give another '
    'split',
  )
  return Dataset(name, train, test, classes)


def in_memory(pixels: np.ndarray, labels: np.ndarray) -> Source:
  """Return the source of rows in memory.

  Args:
    pixels: `[N, H, W, c]` uint8 images, or `[N, D]` float32 features.
    labels: `[N]` int32.
  """
  if pixels.ndim == 2:
    pixels = pixels[:, None, :, None]
  return Source(
    labels,
    pixels.shape[1:],
    lambda rows: pixels[np.asarray(rows, int)],
    dtype=pixels.dtype.type,
    digests=lambda: duplicates.digests(pixels),
  )


def without_rows(like: Source) -> Source:
  """Return an empty split of the same row shape."""
  empty = np.empty((0, *like.shape), like.dtype)
  read = lambda rows: empty[np.asarray(rows, int)]
  return Source(
    np.empty(0, np.int32),
    like.shape,
    read,
    dtype=like.dtype,
    digests=lambda: np.empty(0, np.uint64),
  )


def resized(
  name: str, sources: Mapping[str, Source], size: int | None
) -> Mapping[str, Source]:
  """Return splits in memory with images resized to a square, if `size`."""
  check_image_size(size)
  if size is None:
    return sources
  require(
    all(source.is_images for source in sources.values()),
    f'`image_size`={size}: `dataset`={name} holds features, not images; give '
    'images, or features to a run on features without this size',
  )
  return {split: _resized(source, size) for split, source in sources.items()}


def check_image_size(size: int | None) -> None:
  """Raise `InputError` for an `image_size` that cannot be meant."""
  if size is not None:
    positive(image_size=size)
    require(
      size <= MAX_SIDE,
      f'`image_size`={size}: give a side of at most {MAX_SIDE} pixels',
    )


def _resized(source: Source, size: int) -> Source:
  shape = size, size, source.shape[-1]
  grey = shape[-1] == 1

  def read(rows) -> np.ndarray:
    images = np.empty((len(rows), *shape), np.uint8)
    for image, row in zip(images, source.read(rows), strict=True):
      original = PIL.Image.fromarray(row[..., 0] if grey else row)
      image[:] = np.asarray(decode.fit(original, size, size)).reshape(shape)
    return images

  if len(source.labels) * math.prod(shape) > _RESIZED_ONCE:
    return source._replace(shape=shape, read=read)
  return in_memory(read(np.arange(len(source.labels))), source.labels)


# Validation.


def white_of(rows) -> float | None:
  """Return the value of white in float images: 1 or 255; None of others."""
  array = np.asarray(rows)
  if array.ndim not in (3, 4) or array.dtype.kind != 'f' or not array.size:
    return None
  return 1.0 if float(array.max()) <= _ABOVE_ONE else 255.0


def convert(
  rows, *, where: str = '`images`', white: float | None = None
) -> np.ndarray:
  """Return a user's rows as they are stored in a `Source`.

  Args:
    rows: images or features in any form that `from_arrays` takes.
    where: how messages name the argument.
    white: value of white in float images; decided from `rows` if None.

  Returns:
    uint8 images `[N, H, W, c]`, or float32 features `[N, D]`.

  Raises:
    InputError: they cannot be used.
  """
  array = _array(rows, where)
  require(
    array.ndim in (2, 3, 4),
    f'{where}: has shape {array.shape}; give images [N, H, W, c] or [N, H, W], '
    'or features [N, D]',
  )
  require(
    array.dtype.kind in 'iuf',
    f'{where}: has dtype {array.dtype}; give numbers: images as uint8 or as '
    'floats in [0, 1], features as float32',
  )
  require(
    array.size > 0,
    f'{where}: has shape {array.shape} and so no values; give at least one row',
  )
  if array.ndim == 2:
    return _features(array, where)
  array = array if array.ndim == 4 else array[..., None]
  return _images(array, where, white)


def _features(array: np.ndarray, where: str) -> np.ndarray:
  """Return `[N, D]` numbers as float32."""
  with np.errstate(over='ignore'):  # refused below, as infinite
    features = array.astype(np.float32, copy=False)
  _refuse_infinite(features, where)
  return features


def _images(array: np.ndarray, where: str, white: float | None) -> np.ndarray:
  """Return `[N, H, W, c]` numbers as uint8."""
  require(
    array.shape[-1] in (1, 3),
    f'{where}: has shape {array.shape}; give images [N, H, W, c] with c = 1 '
    '(grey) or 3 (colour) channels, the last axis',
  )
  if array.dtype == np.uint8:
    return array
  _refuse_infinite(array, where)
  least, most = float(array.min()), float(array.max())
  is_float = array.dtype.kind == 'f'
  require(
    least >= 0 and most <= 255,
    f'{where}: has values from {least:g} to {most:g}; give images as uint8, or '
    'as floats in [0, 1] or [0, 255]',
  )
  if not is_float:
    return array.astype(np.uint8)
  require(
    white is not None or most <= _ABOVE_ONE or most >= _LEAST_WHITE,
    f'{where}: has floats up to {most:g}, neither in [0, 1] nor clearly in '
    '[0, 255]; divide them by the value of white, or give uint8',
  )
  white = white or (1.0 if most <= _ABOVE_ONE else 255.0)
  require(
    most <= white * _ABOVE_ONE,
    f'{where}: has floats up to {most:g}, the images of the training have '
    f'white at {white:g}; give images of the same scale',
  )
  scale, images = np.float32(255 / white), np.empty(array.shape, np.uint8)
  for part in _parts(array):
    pixels = np.minimum(scale * array[part].astype(np.float32), 255)
    images[part] = np.floor(pixels + 0.5)
  return images


def _parts(array: np.ndarray) -> list[slice]:
  """Return slices of rows, so that temporary copies are small."""
  size = max(1, _CHUNK // max(1, math.prod(array.shape[1:])))
  return [slice(i, i + size) for i in range(0, len(array), size)]


def _refuse_infinite(array: np.ndarray, where: str) -> None:
  axes = tuple(range(1, array.ndim))
  finite = np.concatenate(
    [np.isfinite(array[part]).all(axis=axes) for part in _parts(array)]
  )
  if not finite.all():
    raise InputError(
      f'{where}: {np.sum(~finite)} rows hold NaN or infinite values, the first '
      f'is row {np.argmin(finite)}; remove or replace them'
    )


def _array(values, where: str) -> np.ndarray:
  """Return any array-like as a NumPy array."""
  require(values is not None, f'{where}: is missing; give it')
  try:
    return np.asarray(values)
  except Exception as error:  # NumPy calls the object's own conversion
    raise InputError(
      f'{where}: cannot be made an array ({one_line(error)}); give a NumPy '
      'array whose rows have one shape'
    ) from error


def _checked(
  parts: Mapping[str, _Part], classes, classes_are: str, strict: bool = True
) -> tuple[dict[str, Source], tuple[str, ...]]:
  """Return the splits and the class names, after all checks."""
  pixels, white = {}, None  # the test images have the scale of the training's
  for split, part in parts.items():
    pixels[split] = convert(part.images, where=part.images_are, white=white)
    white = white_of(part.images) if white is None else white
  labels = {
    split: _labels(part, len(pixels[split])) for split, part in parts.items()
  }
  _refuse_other_shape(parts, pixels)
  names = _class_names(labels.values(), classes, classes_are, parts['train'])
  for split, part in parts.items():
    _refuse_outside(labels[split], len(names), part.labels_are)
  if strict:
    _refuse_too_few(labels['train'], parts['train'].labels_are)
  if 'test' in parts:
    _refuse_unlabelled(labels['test'], parts['test'].labels_are)
  sources = {
    split: in_memory(pixels[split], labels[split].astype(np.int32))
    for split in parts
  }
  return sources, names


def _labels(part: _Part, rows: int) -> np.ndarray:
  """Return the labels `[N]` of a split, int64."""
  where = part.labels_are
  labels = _array(part.labels, where)
  require(
    labels.ndim == 1,
    f'{where}: has shape {labels.shape}; give one class per row, [N] (of '
    'one-hot rows the argmax over axis 1)',
  )
  require(
    labels.dtype.kind in 'iu',
    f'{where}: has dtype {labels.dtype}; give integer classes from 0, -1 where '
    'unlabelled (of names: np.unique(names, return_inverse=True))',
  )
  require(
    len(labels) == rows,
    f'{where}: has {len(labels)} labels for {rows} rows; give one per row',
  )
  wrong = np.flatnonzero(labels > np.iinfo(np.int64).max)
  if wrong.size:  # Cast to int64, the largest uint64 would be -1.
    raise InputError(
      f'{where}: has the label {labels[wrong[0]]} in row {wrong[0]}; give '
      'integer classes from 0, -1 where unlabelled'
    )
  return labels.astype(np.int64)


def _refuse_other_shape(parts: Mapping[str, _Part], pixels) -> None:
  if 'test' not in parts:
    return
  train, test = (pixels[split].shape[1:] for split in ('train', 'test'))
  require(
    train == test,
    f'{parts["test"].images_are}: rows have shape {test}, training rows '
    f'{train}; give test rows of the same shape',
  )


def _class_names(labels, classes, where: str, train: _Part) -> tuple[str, ...]:
  """Return the names of the C classes."""
  if classes is None:
    return _numbered(np.concatenate(list(labels)), train.labels_are)
  if isinstance(classes, np.ndarray) and classes.ndim == 0:
    classes = classes.item()
  if isinstance(classes, (int, np.integer)):
    _refuse_many(int(classes), where)
    return tuple(map(str, range(classes)))
  are_names = isinstance(classes, Iterable) and not isinstance(classes, str)
  if are_names and hasattr(classes, '__len__'):
    _refuse_many(len(classes), where)
  names = [_decoded(name, where) for name in classes] if are_names else []
  require(
    len(set(names)) == len(names) > 0,
    f'{where}: is {" ".join(repr(classes).split()):.100}; give a list of '
    'different names, one for each class, or the number of classes',
  )
  return tuple(names)


def _refuse_many(count: int, where: str) -> None:
  require(
    count <= MAX_CLASSES,
    f'{where}: {count} classes are more than the limit of {MAX_CLASSES}; give '
    'as many as there are',
  )


def _decoded(name, where: str) -> str:
  """Return a class name as a text."""
  if not isinstance(name, bytes):
    return str(name)
  try:
    return name.decode()
  except UnicodeDecodeError as error:
    raise InputError(
      f'{where}: the name {bytes(name)!r:.40} is not UTF-8; give texts'
    ) from error


def _numbered(labels: np.ndarray, where: str) -> tuple[str, ...]:
  """Return the names '0', '1', ... of the classes that occur in `labels`."""
  known = np.unique(labels[labels >= 0])
  gaps = np.flatnonzero(known != np.arange(len(known)))
  if gaps.size:
    raise InputError(
      f'{where}: class {gaps[0]} has no example, but class {known[-1]} has; '
      'number the classes from 0 without gaps, or give `classes`'
    )
  return tuple(map(str, range(len(known))))


def _refuse_outside(labels: np.ndarray, classes: int, where: str) -> None:
  wrong = np.flatnonzero((labels < UNLABELLED) | (labels >= classes))
  if wrong.size:
    raise InputError(
      f'{where}: {wrong.size} labels lie outside the {classes} classes, the '
      f'first is {labels[wrong[0]]} in row {wrong[0]}; give 0 to '
      f'{classes - 1}, or -1 where unlabelled'
    )


def _refuse_too_few(labels: np.ndarray, where: str) -> None:
  known = np.unique(labels[labels != UNLABELLED])
  if not known.size:
    raise InputError(
      f'{where}: every label is -1; give the classes of some examples'
    )
  if known.size == 1:
    raise InputError(
      f'{where}: only class {known[0]} is labelled; give examples of at least '
      '2 classes'
    )


def _refuse_unlabelled(labels: np.ndarray, where: str) -> None:
  wrong = np.flatnonzero(labels == UNLABELLED)
  if wrong.size:
    raise InputError(
      f'{where}: {wrong.size} test rows are unlabelled, the first is row '
      f'{wrong[0]}; leave them out of the test rows'
    )
