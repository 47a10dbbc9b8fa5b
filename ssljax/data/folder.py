"""Data sets from a folder of images and, if given, a file of labels.

Three layouts are recognised:

  class folders  FOLDER/CLASS/**/image; images in `unlabelled/` (also spelled
                 `unlabeled`) have no label
  splits         FOLDER/train, and FOLDER/test or FOLDER/val, each with class
                 folders; unlabelled images in FOLDER/unlabelled or in
                 FOLDER/train/unlabelled
  labels file    any folder, and a CSV file with the columns `file` and `label`
                 or a text file with `FILE LABEL` on each line. Files are
                 relative to the folder. An image whose label is empty, or which
                 the file does not list, is unlabelled

Hidden files and the folders of operating systems are skipped. An image that
cannot be decoded is reported once, with the reason, and left out.

Without a folder of test images the test split is empty; `splits.hold_out` then
chooses labelled images to test on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import csv
import functools
import logging
import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from ssljax import files
from ssljax.core import UNLABELLED
from ssljax.data import decode, duplicates, near_duplicates, records
from ssljax.data.arrays import check_image_size, in_memory, without_rows
from ssljax.data.tfds_reader import few, listed, one_line
from ssljax.data.types import RESIDENT_BYTES, Dataset, Images, Source
from ssljax.errors import InputError, require

_LOG = logging.getLogger(__name__)
_UNLABELLED_FOLDERS = ('unlabelled', 'unlabeled')
_SPLITS = 'train', 'test', 'val', 'valid', 'validation'
_SYSTEM = ('__macosx', '@eadir', '$recycle.bin', 'thumbs.db', 'desktop.ini')
MAX_SIDE = 64  # the largest `image_size` that is chosen without asking
_SHOWN = 20  # unreadable files that a message names


class Stored(NamedTuple):
  """A place that holds encoded images by name."""

  name: str
  setting: str  # that names it in messages: 'images'
  read: Callable[[str], bytes]  # by path
  open: Callable[[str], Any]  # what `PIL.Image.open` takes, by path


class StoredImage(NamedTuple):
  """An encoded image."""

  path: str  # relative to the folder, with '/'; or another name
  label: str | None  # class name; None if it has none
  split: str  # of `_SPLITS`


class Decoded(NamedTuple):
  """The images of a folder that can be decoded, in the order of their paths."""

  images: tuple[StoredImage, ...]  # [N]
  source: Source  # of all images; its labels are not known yet
  digests: np.ndarray  # [N] uint64, of the files' bytes
  groups: np.ndarray  # [N] uint64, equal for near duplicates


def load(
  folder: str,
  labels_file: str | None = None,
  *,
  train_split: str = 'train',
  test_split: str | None = None,
  image_size: int | None = None,
  crop: bool = False,
  with_test: bool = True,
  resident: bool = True,
  strict: bool = True,
) -> Dataset:
  """Return the data set of a folder.

  Args:
    folder: of the images.
    labels_file: names images and their classes; None for class folders.
    train_split: 'train', or another folder of the layout with splits.
    test_split: 'test', 'val', 'valid' or 'validation' in that layout; by
      default the first of them that is there, else none.
    image_size: side of the square that images are resized to; by default the
      median of the shorter sides, at most `MAX_SIDE`.
    crop: give `Source.crop`, see `datasets.load`.
    with_test: False leaves the test split empty.
    resident: False decodes images whenever they are read, also few ones.
    strict: False admits images that cannot be trained on: without labels, of
      one class, or of classes that only the test images have.

  Raises:
    InputError: the folder or the file cannot be used.
  """
  root = _root(folder)
  check_image_size(image_size)
  found = _listed(folder, root, labels_file, strict)
  within = functools.partial(os.path.join, root)
  read = lambda path: _content(within(path))
  stored = Stored(str(root), 'images', read, within)
  decoded = decode_all(stored, found, image_size, crop, resident)
  classes = _classes(folder, labels_file, decoded.images, strict)
  labels = _numbers(decoded.images, classes)
  splits = train_split, test_split
  test = _test_rows(folder, decoded.images, labels, splits, with_test)
  train = _of_split(decoded.images, train_split)
  if strict:
    _refuse_few(folder, labels[train], classes, labelled=labels_file)
  source = decoded.source._replace(labels=labels)
  rows = lambda mask: some_rows(source, decoded, np.flatnonzero(mask))
  tests = rows(test) if test.any() else without_rows(source)
  return Dataset(str(root), rows(train), tests, classes)


def to_predict(folder: str, shape: tuple[int, int, int]) -> Images:
  """Return the images of a folder, decoded whenever they are read.

  Args:
    folder: of the images.
    shape: H, W, c of the images of a model; H = W.

  Raises:
    InputError: it is no folder, or has no images.
  """
  root = _root(folder)
  names = sorted(_walk(root))
  _refuse_none(folder, names)
  layout = _has_splits(names)

  def read(rows: Sequence[int]) -> tuple[np.ndarray, dict[int, str]]:
    pixels, reasons = np.empty((len(rows), *shape), np.uint8), {}
    for k, row in enumerate(rows):
      try:
        content = _content(os.path.join(root, names[row]))
        pixels[k] = decode.centre(content, shape, shape[0])
      except Exception as error:  # codecs and disks raise many kinds
        reasons[row] = _reason(error)
    kept = [k for k, row in enumerate(rows) if row not in reasons]
    return pixels[kept], reasons

  return Images(names, [_folder_class(layout, name) for name in names], read)


# Files and labels.


def _content(path: str) -> bytes:
  """Return the bytes of a file; pathlib takes longer than a small file."""
  with open(path, 'rb', buffering=0) as file:
    return file.readall()


def _root(folder: str) -> pathlib.Path:
  """Return the path of a folder."""
  root = files.as_path('images', folder)
  require(
    root.is_dir(), f'`images`={folder}: is no folder: give a folder of images'
  )
  return root


def _listed(
  folder: str, root: pathlib.Path, labels_file: str | None, strict: bool
) -> tuple[StoredImage, ...]:
  """Return the image files of a folder, sorted by path."""
  paths = sorted(_walk(root))
  _refuse_none(folder, paths)
  has_splits = _has_splits(paths)
  if labels_file is not None:
    given = _read_labels(labels_file, paths, folder)
    label_of = lambda path: given.get(path) or None
  else:
    label_of = functools.partial(_folder_class, has_splits)
    require(
      not strict or any(label_of(path) for path in paths),
      f'`images`={folder}: no image lies in the folder of a class; make '
      f'{folder}/CLASS/..., or give a `labels_file` with file,label on each '
      'line',
    )
  first = lambda path: path.split('/')[0] if has_splits else 'train'
  split_of = lambda path: first(path) if first(path) in _SPLITS else 'train'
  return tuple(
    StoredImage(path, label_of(path), split_of(path)) for path in paths
  )


def _refuse_none(folder: str, paths: Sequence[str]) -> None:
  require(
    bool(paths),
    f'`images`={folder}: has no image files; give a folder with files that '
    'Pillow reads, such as PNG or JPEG',
  )


def _has_splits(paths: Sequence[str]) -> bool:
  """True for the layout with a folder for each split.

  A class may have the name of a split: there are other folders beside it then.
  """
  folders = {path.split('/')[0] for path in paths if '/' in path}
  return 'train' in folders and folders <= {*_SPLITS, *_UNLABELLED_FOLDERS}


def _walk(root: pathlib.Path) -> Iterable[str]:
  """Yield the relative paths of all files with an image's extension."""
  # Pillow asks its formats in the order in which they were registered: the
  # common ones first, which saves a tenth of the time for a small JPEG.
  PIL.Image.preinit()
  PIL.Image.init()
  known = {e for e, f in PIL.Image.EXTENSION.items() if f in PIL.Image.OPEN}
  for where, folders, names in os.walk(root, followlinks=True):
    folders[:] = sorted(f for f in folders if not _is_system(f))
    for name in names:
      path = pathlib.Path(where, name)
      is_image = path.suffix.lower() in known and not _is_system(name)
      if is_image and files.is_regular(path):  # opening a FIFO would block
        yield path.relative_to(root).as_posix()


def _is_system(name: str) -> bool:
  """True for hidden files and those of operating systems."""
  return name.startswith('.') or name.lower() in _SYSTEM


def _folder_class(has_splits: bool, path: str) -> str | None:
  """Return the class folder of an image, None without one."""
  parts = path.split('/')
  if has_splits and parts[0] in _SPLITS:
    parts = parts[1:]
  if len(parts) < 2 or parts[0].lower() in _UNLABELLED_FOLDERS:
    return None
  return parts[0]


def _read_labels(
  labels_file: str, paths: Sequence[str], folder: str
) -> dict[str, str]:
  """Return the label of each listed file, '' for none."""
  where = f'`labels_file`={labels_file}'
  try:
    text = files.as_path('labels_file', labels_file).read_text('utf-8-sig')
  except UnicodeDecodeError as error:
    raise InputError(
      f'{where}: is not UTF-8 text (byte {error.start}); save it as UTF-8'
    ) from error
  except OSError as error:
    reason = error.strerror or one_line(error)
    raise InputError(
      f'{where}: cannot be read ({reason}): give a CSV or text file'
    ) from error
  pairs = _csv_pairs(text, where) if _is_csv(labels_file) else _text_pairs(text)
  known = set(paths)
  given: dict[str, Any] = {}
  for line, name, label in pairs:
    path = pathlib.PurePath(name.replace('\\', '/')).as_posix()
    require(
      path in known,
      f'{where}, line {line}: {name!r} is not an image in `images`={folder}; '
      'give paths relative to that folder',
    )
    require(
      given.get(path, label) == label,
      f'{where}, line {line}: {name!r} has the label {label!r}, but '
      f'{given.get(path)!r} before; give one label for each file',
    )
    given[path] = label
  require(bool(given), f'{where}: lists no file; give lines of file and label')
  return given


def _is_csv(path: str) -> bool:
  return path.lower().endswith('.csv')


def _csv_pairs(text: str, where: str) -> list[tuple[int, str, str]]:
  """Return line number, file and label of each row of a CSV file."""
  reader = csv.DictReader(text.splitlines())
  columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
  missing = [name for name in ('file', 'label') if name not in columns]
  require(
    not missing,
    f'{where}: lacks the column {listed(missing)} (it has '
    f'{few(reader.fieldnames or ())}); begin it with the line file,label',
  )
  cell = lambda row, name: (row[columns[name]] or '').strip()
  return [
    (reader.line_num, cell(row, 'file'), cell(row, 'label'))
    for row in reader
    if cell(row, 'file')
  ]


def _text_pairs(text: str) -> list[tuple[int, str, str]]:
  """Return line number, file and label of each line `FILE LABEL`."""
  pairs = []
  for number, line in enumerate(text.splitlines(), 1):
    if not line.strip():
      continue
    parts = line.strip().replace('\t', ' ').rsplit(' ', 1)
    pairs.append((number, parts[0].strip(), ''.join(parts[1:])))
  return pairs


def _classes(
  folder, labels_file, images: Sequence[StoredImage], strict: bool
) -> tuple[str, ...]:
  """Return the sorted class names of the training images, after checks."""
  names = sorted({image.label for image in images if image.label})
  where = f'`images`={folder}'
  by_lower: dict[str, str] = {}
  for name in names:
    other = by_lower.setdefault(name.casefold(), name)
    require(
      other == name,
      f"{where}: the classes '{other}' and '{name}' differ only in case; "
      'rename one if they are the same',
    )
  if not strict:
    return tuple(names)
  require(
    bool(names),
    f'{where}: no image has a label; label some of each class'
    + (f' in `labels_file`={labels_file}' if labels_file else ''),
  )
  require(
    len(names) > 1,
    f"{where}: all labelled images have the class '{names[0]}'; give images of "
    'at least two classes',
  )
  return tuple(names)


def _numbers(
  images: Sequence[StoredImage], classes: Sequence[str]
) -> np.ndarray:
  """Return the labels `[N]` int32."""
  numbers: Mapping[str | None, int] = {n: i for i, n in enumerate(classes)}
  return np.array([numbers.get(i.label, UNLABELLED) for i in images], np.int32)


def _refuse_few(folder, labels: np.ndarray, classes, labelled) -> None:
  """Raise `InputError` if a class has no image to train on."""
  counts = np.bincount(labels[labels != UNLABELLED], minlength=len(classes))
  absent = [classes[i] for i in np.flatnonzero(counts == 0)]
  where = f'`labels_file`={labelled}' if labelled else f'`images`={folder}'
  require(
    not absent,
    f'{where}: no training image has the class {listed(absent)}; label at '
    'least one of each, or remove its test images',
  )


# Splits.


def _of_split(images: Sequence[StoredImage], split: str) -> np.ndarray:
  """Return the mask `[N]` bool of the images of a split."""
  return np.array([image.split == split for image in images])


def _test_rows(
  folder: str,
  images: Sequence[StoredImage],
  labels: np.ndarray,
  splits: tuple[str, str | None],
  with_test: bool,
) -> np.ndarray:
  """Return the mask `[N]` bool of the test images, which have labels."""
  train_split, test_split = splits
  there = [s for s in _SPLITS if any(i.split == s for i in images)]
  for parameter, split in (
    ('train_split', train_split),
    ('test_split', test_split),
  ):
    require(
      split is None or split in there,
      f'`{parameter}`={split}: `images`={folder} has no folder of this name; '
      f'give one of {listed(there)}',
    )
  require(
    train_split != test_split,
    f'`train_split`={train_split}, `test_split`={test_split}: the test images '
    'would be trained on; give another one',
  )
  others = [s for s in _SPLITS[1:] if s in there and s != train_split]
  if not with_test or (test_split is None and not others):
    return np.zeros(len(labels), bool)
  test = _of_split(images, test_split or others[0])
  unlabelled = int((labels[test] == UNLABELLED).sum())
  if unlabelled:
    _LOG.warning(
      '%s: %d images of %s have no label and are left out of the test error',
      folder,
      unlabelled,
      test_split or others[0],
    )
  return test & (labels != UNLABELLED)


def some_rows(source: Source, of: Decoded, rows: np.ndarray) -> Source:
  """Return some rows of a source."""
  assert source.names is not None
  from_ = lambda read: lambda at, *draws: read(rows[np.asarray(at)], *draws)
  return source._replace(
    labels=source.labels[rows],
    read=from_(source.read),
    crop=source.crop and from_(source.crop),
    names=source.names[rows],
    digests=lambda: of.digests[rows],
    groups=lambda: of.groups[rows],
  )


# Pixels.


def decode_all(
  stored: Stored,
  found: tuple[StoredImage, ...],
  image_size: int | None,
  crop: bool,
  resident: bool,
) -> Decoded:
  """Decode all images once; leave out those that cannot be decoded.

  Args:
    stored: holds them.
    found: the images.
    image_size: as in `load`.
    crop: as in `load`.
    resident: as in `load`.
  """
  headers, reasons = _headers(stored, found)
  found = tuple(i for i in found if i.path in headers)
  _refuse_unreadable(stored, found, reasons)
  size = image_size or _side(headers.values())
  channels = 3 if any(header[2] for header in headers.values()) else 1
  shape = size, size, channels
  small = len(found) * math.prod(shape) <= RESIDENT_BYTES
  resident = resident and small and not crop
  pixels = np.empty((len(found) if resident else 0, *shape), np.uint8)
  digests = np.zeros(len(found), np.uint64)
  shorter = round(decode.MARGIN * size) if crop else size
  looks: list[near_duplicates.Look | None] = [None] * len(found)

  def fill(rows: slice):
    for row in range(rows.start, rows.stop):
      path = found[row].path
      try:
        content = stored.read(path)
        digests[row] = duplicates.digest(content)
        image = decode.centre(content, shape, shorter)
        if len(found) <= near_duplicates.LARGEST:
          looks[row] = near_duplicates.look(image)
      except Exception as error:  # codecs and disks raise many kinds
        reasons[path] = _reason(error)
        continue
      if resident:
        pixels[row] = image

  records.by_chunk(fill, len(found), 'images decoded', math.prod(shape))
  kept = np.array([image.path not in reasons for image in found])
  if reasons:
    _LOG.warning('%s', _unreadable(stored.name, reasons))
  images = tuple(i for i, keep in zip(found, kept, strict=True) if keep)
  _refuse_unreadable(stored, images, reasons)
  names = np.array([image.path for image in images])
  nowhere = np.full(len(images), UNLABELLED, np.int32)
  if resident:
    pixels = _without_equal_channels(pixels if kept.all() else pixels[kept])
    source = in_memory(pixels, nowhere)
  else:
    source = _on_disk(stored, names, nowhere, shape, shorter, crop)
  digests = digests[kept]
  looks = [one for one, keep in zip(looks, kept, strict=True) if keep]
  groups = near_duplicates.groups(looks, digests)
  for said in near_duplicates.describe(groups, digests, names):
    _LOG.warning('%s: %s', stored.name, said)
  return Decoded(images, source._replace(names=names), digests, groups)


def _without_equal_channels(pixels: np.ndarray) -> np.ndarray:
  """Return grey images `[N, H, W, 1]` that were stored with three channels."""
  equal = all(np.ptp(image, axis=-1).max() == 0 for image in pixels)
  return pixels[..., :1].copy() if equal else pixels


def _headers(
  stored: Stored, found: Sequence[StoredImage]
) -> tuple[dict[str, tuple[int, int, bool]], dict[str, str]]:
  """Read width, height and whether it has colours of each file.

  Also return the reason for each file that has no such header.
  """
  looked: dict[str, Any] = {}

  def look(rows: slice) -> None:
    for image in found[rows]:
      try:
        with PIL.Image.open(stored.open(image.path)) as opened:
          has_colours = opened.mode not in ('1', 'L', 'LA', 'I', 'I;16')
          looked[image.path] = *opened.size, has_colours
      except Exception as error:  # Pillow's parsers raise many kinds
        looked[image.path] = _reason(error)

  records.by_chunk(look, len(found), 'headers')
  headers = {path: x for path, x in looked.items() if not isinstance(x, str)}
  return headers, {path: x for path, x in looked.items() if isinstance(x, str)}


def _reason(error: Exception) -> str:
  """Return why an image cannot be decoded, without its path."""
  if isinstance(error, PIL.UnidentifiedImageError):
    return 'no image that Pillow can read'
  return one_line(error)


def _side(headers: Iterable[tuple[int, int, bool]]) -> int:
  """Return the default `image_size`."""
  return min(MAX_SIDE, int(np.median([min(w, h) for w, h, _ in headers])))


def _on_disk(
  stored: Stored, names, labels, shape, shorter: int, crop: bool
) -> Source:
  """Return the source of images that are decoded whenever they are read."""

  def decoded(rows, function):
    images = np.empty((len(rows), *shape), np.uint8)
    for k, row in enumerate(np.asarray(rows).tolist()):
      try:
        images[k] = function(k, stored.read(names[row]))
      except Exception as error:  # the file was decoded when the run started
        raise InputError(
          f'`{stored.setting}`: {names[row]} cannot be decoded any more '
          f'({one_line(error)}); restore it, and start again'
        ) from error
    return images

  def read(rows):
    return decoded(rows, lambda k, data: decode.centre(data, shape, shorter))

  def cropped(rows, draws):
    return decoded(rows, lambda k, data: decode.crop(data, shape, draws[k]))

  return Source(labels, shape, read, cropped if crop else None)


def _unreadable(folder: str, reasons: Mapping[str, str]) -> str:
  """Return a line that lists the images that cannot be decoded."""
  lines = [f'{path} ({reason:.80})' for path, reason in sorted(reasons.items())]
  return (
    f'{folder}: {len(lines)} images cannot be decoded and are left out: '
    f'{few(lines, _SHOWN)}'
  )


def _refuse_unreadable(
  stored: Stored, images, reasons: Mapping[str, str]
) -> None:
  require(
    bool(images),
    f'`{stored.setting}`={stored.name}: none of its {len(reasons)} images can '
    'be decoded, '
    f'{few([f"{p} ({r:.80})" for p, r in sorted(reasons.items())], 3)}',
  )
