"""Data sets in Parquet files, as Hugging Face stores sets of images.

A row has an image, a struct with its encoded `bytes` (and its `path`), and a
label: a class number, whose names are in the schema's metadata, or a text. The
columns are those that the metadata name, else the first struct with `bytes` and
the column `label`. A file whose name begins with train, test, val, valid or
validation, or which lies in a folder of that name, belongs to that split; any
other file to 'train'. Files of one split are shards, in the order of their
names. A row whose label is null or negative is unlabelled.

The encoded images are kept in memory, and decoded as those of a folder.
"""

from collections.abc import Mapping, Sequence
import importlib
import io
import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from ssljax import files
from ssljax.core import UNLABELLED
from ssljax.data import folder
from ssljax.data.arrays import check_image_size, select
from ssljax.data.tfds_reader import few, one_line
from ssljax.data.types import Dataset, Source
from ssljax.errors import InputError, require

_SUFFIX = '.parquet'
_SPLIT = re.compile(
  r'(train|test|validation|valid|val)(?![a-z])', re.IGNORECASE
)
_LABELS = 'label', 'labels', 'fine_label', 'class'


class _Rows(NamedTuple):
  """The rows of a file."""

  split: str
  names: list[str]
  content: Any  # Arrow array of encoded images
  labels: list[Any]  # class numbers or texts, None where unknown
  classes: tuple[str, ...] | None  # of the metadata


def is_parquet(name: str) -> bool:
  """True for a Parquet file, and a folder with Parquet files alone."""
  if name.endswith(_SUFFIX):
    return True
  try:
    path = pathlib.Path(name).expanduser()
    return path.is_dir() and bool(_shards(path))
  except (OSError, RuntimeError, ValueError):
    return False


def load(
  name: str,
  *,
  train_split: str = 'train',
  test_split: str | None = None,
  image_size: int | None = None,
  crop: bool = False,
  with_test: bool = True,
  strict: bool = True,
) -> Dataset:
  """Return the data set of a Parquet file, or of a folder of them.

  Args:
    name: of the file or the folder.
    train_split: a split of the files.
    test_split: another one; by default test, else validation, if it has labels.
    image_size: as in `folder.load`.
    crop: as in `folder.load`.
    with_test: False leaves the test split empty.
    strict: False admits files without labels, to be predicted.

  Raises:
    InputError: a file cannot be used, or pyarrow is missing.
  """
  check_image_size(image_size)
  path = files.as_path('dataset', name)
  shards = _shards(path) if path.is_dir() else [path]
  rows = [_read(name, path, shard) for shard in shards]
  found, stored = _listed(name, rows)
  decoded = folder.decode_all(stored, found, image_size, crop, True)
  classes, labels = _labels(name, rows, decoded.images)
  sources = {}
  for split in dict.fromkeys(image.split for image in decoded.images):
    own = np.array([image.split == split for image in decoded.images])
    source = decoded.source._replace(labels=labels)
    sources[split] = folder.some_rows(source, decoded, np.flatnonzero(own))
  require(
    not strict
    or train_split not in sources
    or (sources[train_split].labels >= 0).any(),
    f'`dataset`={name}: no image of `train_split`={train_split} has a label; '
    'give files with labels',
  )
  test_split = test_split or _default_test(sources)
  with_test = with_test and test_split is not None
  return select(name, sources, classes, train_split, test_split, with_test)


def _default_test(sources: Mapping[str, Source]) -> str | None:
  """Return the split to test on: the first whose rows all have labels."""
  for split in ('test', 'validation'):
    if split in sources and (sources[split].labels != UNLABELLED).all():
      return split
  return None


# Files.


def _shards(path: pathlib.Path) -> list[pathlib.Path]:
  """Return the Parquet files of a folder, at most one folder deeper."""
  found = {*path.glob(f'*{_SUFFIX}'), *path.glob(f'*/*{_SUFFIX}')}
  return sorted(shard for shard in found if files.is_regular(shard))


def _split_of(root: pathlib.Path, shard: pathlib.Path) -> str:
  """Return the split that a file's name, or its folder's, begins with."""
  parts = [shard.name] if root == shard else shard.relative_to(root).parts
  for part in reversed(parts):
    match = _SPLIT.match(part)
    if match:
      split = match[1].lower()
      return 'validation' if split.startswith('val') else split
  return 'train'


def _read(name: str, root: pathlib.Path, shard: pathlib.Path) -> _Rows:
  """Read a file."""
  try:
    pq = importlib.import_module('pyarrow.parquet')
  except ImportError as error:
    raise InputError(
      f'`dataset`={name}: pyarrow is not installed: pip install '
      "'ssljax[parquet]'"
    ) from error
  where = f'`dataset`={name}, {shard.name}'
  require(files.is_regular(shard), f'{where}: there is no such file')
  try:
    schema = pq.read_schema(shard)
    image, label = _columns(where, schema)
    table = pq.read_table(shard, columns=[c for c in (image, label) if c])
    column = table[image].combine_chunks()
    content = column.field('bytes') if _has_bytes(column.type) else column
    labels = table[label].to_pylist() if label else [None] * len(table)
    paths = _paths(column)
  except InputError:
    raise
  except Exception as error:  # Arrow raises kinds of its own
    raise InputError(
      f'{where}: cannot be read as a Parquet file ({one_line(error):.150}); '
      'write it again'
    ) from error
  stem = shard.name if root == shard else shard.relative_to(root).as_posix()
  names = [
    f'{stem}:{row}' + (f':{path}' if path else '')
    for row, path in enumerate(paths)
  ]
  classes = _class_names(schema, label) if label else None
  return _Rows(_split_of(root, shard), names, content, labels, classes)


def _has_bytes(kind) -> bool:
  """True for the type of an image: a struct with a field of bytes."""
  try:
    field = kind.field('bytes')
  except (AttributeError, KeyError, TypeError):
    return False
  return str(field.type) in ('binary', 'large_binary')


def _paths(column) -> list[str | None]:
  """Return the names of the images, None where there is none."""
  names = (
    [field.name for field in column.type] if _has_bytes(column.type) else ()
  )
  if 'path' not in names:
    return [None] * len(column)
  return column.field('path').to_pylist()


def _columns(where: str, schema) -> tuple[str, str | None]:
  """Return the names of the columns of images and labels."""
  features = _features(schema)
  named = lambda kind: [
    n for n in schema.names if _kind(features.get(n)) == kind
  ]
  images = named('Image') or [
    field.name
    for field in schema
    if _has_bytes(field.type)
    or (field.name == 'image' and 'binary' in str(field.type))
  ]
  require(
    bool(images),
    f'{where}: has no column of images (it has {few(schema.names)}); give '
    'files with a struct of `bytes`, as Hugging Face writes them',
  )
  labels = named('ClassLabel') or [n for n in _LABELS if n in schema.names]
  return images[0], labels[0] if labels else None


def _features(schema) -> Mapping[str, Any]:
  """Return the descriptions of the columns by Hugging Face, {} without."""
  try:
    text = (schema.metadata or {})[b'huggingface']
    found = json.loads(text)['info']['features']
    return found if isinstance(found, dict) else {}
  except (KeyError, TypeError, ValueError):
    return {}


def _kind(feature: Any) -> str | None:
  return feature.get('_type') if isinstance(feature, dict) else None


def _class_names(schema, label: str) -> tuple[str, ...] | None:
  """Return the class names of the metadata."""
  feature = _features(schema).get(label)
  names = feature.get('names') if isinstance(feature, dict) else None
  return tuple(map(str, names)) if isinstance(names, list) else None


# Rows.


def _listed(
  name: str, rows: Sequence[_Rows]
) -> tuple[tuple[folder.StoredImage, ...], folder.Stored]:
  """Return all images, and the place that holds them."""
  place, found = {}, []
  for part in rows:
    for row, image in enumerate(part.names):
      place[image] = part.content, row
      found.append(folder.StoredImage(image, None, part.split))
  require(bool(found), f'`dataset`={name}: has no rows; give files with images')

  def read(image: str) -> bytes:
    content, row = place[image]
    found = content[row].as_py()
    if found is None:
      raise ValueError('its bytes are missing')
    return found

  opened = lambda image: io.BytesIO(read(image))
  return tuple(found), folder.Stored(name, 'dataset', read, opened)


def _labels(
  name: str, rows: Sequence[_Rows], images: Sequence[folder.StoredImage]
) -> tuple[tuple[str, ...], np.ndarray]:
  """Return the class names, and the labels `[N]` of the kept images."""
  given = {
    n: y for part in rows for n, y in zip(part.names, part.labels, strict=True)
  }
  known = {part.classes for part in rows if part.classes is not None}
  require(
    len(known) < 2,
    f'`dataset`={name}: its files have different class names; give files of '
    'one set',
  )
  values = [given[image.path] for image in images]
  texts = {y for y in values if isinstance(y, str) and y}
  require(
    not texts or all(y is None or isinstance(y, str) for y in values),
    f'`dataset`={name}: some labels are numbers and some are texts; give one '
    'kind',
  )
  if texts:
    classes = tuple(sorted(texts))
    numbers = {text: i for i, text in enumerate(classes)}
    labels = [numbers.get(y, UNLABELLED) for y in values]
    return classes, np.array(labels, np.int32)
  wrong = [y for y in values if y is not None and not isinstance(y, int)]
  require(
    not wrong,
    f'`dataset`={name}: has the label {str(wrong[:1])[1:-1]:.40}; give class '
    'numbers or texts',
  )
  labels = [UNLABELLED if y is None or y < 0 else y for y in values]
  count = max(labels, default=0) + 1
  classes = next(iter(known), ()) or tuple(map(str, range(count)))
  require(
    count <= len(classes),
    f'`dataset`={name}: has the label {count - 1}, but {len(classes)} class '
    'names; write it again',
  )
  return classes, np.array(labels, np.int32)
