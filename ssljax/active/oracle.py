"""Oracles for active learning: hidden labels, or a person with a folder.

An oracle has one method, `ask(seed, number, rows [Q]) -> labels [Q]` int32. It
returns the labels of batch `number` in the run of `seed`. UNLABELLED marks a
row that stays without a label and must not be asked about again. The same
question always has the same answer, so that a resumed run may repeat its last
question.

A person finds this folder per batch:

  seed-0/batch-0001/
    001-row-4711.png    the images; small ones are enlarged
    answers.csv         row,image,label: fill in the last column
    classes.txt         number and name of every class, or the names alone
    batch.json          run, seed, batch and rows of the question

A label is the name or number of a class, or 'skip' or 'unsure'. Where a name is
itself a number, but not the number of its class ('1' to '10' in alphabetic
order), names alone count, and classes.txt says so.
"""

from collections.abc import Callable, Sequence
import contextlib
import csv
import io
import json
import os
import pathlib
import shutil
import stat
from typing import Any, NamedTuple
import unicodedata

import numpy as np
import PIL.Image

from ssljax.core import UNLABELLED
from ssljax.errors import InputError, require

COLUMNS = ['row', 'image', 'label']
DELIMITERS = ',;\t'  # spreadsheets use different ones in different countries
DECLINED = ('skip', 'unsure')
MIN_SIDE = 128  # pixels; smaller images are enlarged so that a person can see
_MAX_BYTES = 2**26  # of a file that a person fills in


class WaitingError(Exception):
  """Answers of a person are missing. The message names the file to fill in."""


class Simulation:
  """An oracle that answers with the true labels and counts the questions."""

  def __init__(self, truth: np.ndarray):
    """Take the true labels `[N]`, which are hidden from the run."""
    self._truth = np.asarray(truth, np.int32)
    self._asked: dict[int, dict[int, Any]] = {}  # seed -> number -> rows

  def count(self, seed: int) -> int:
    """Return the number of labels this process gave in the run of a seed."""
    return sum(len(rows) for rows in self._asked.get(seed, {}).values())

  def ask(self, seed: int, number: int, rows) -> np.ndarray:
    """Return the labels `[Q]` of rows `[Q]`.

    Raises:
      InputError: a row has no label, or another batch of this seed had it.
    """
    rows = _unique_rows(rows)
    asked = self._asked.setdefault(seed, {})
    if asked.get(number) != rows:
      earlier = {row for batch in asked.values() for row in batch}
      for row in rows:
        require(
          0 <= row < len(self._truth) and self._truth[row] != UNLABELLED,
          f'row {row} has no true label: leave it out',
        )
        require(
          row not in earlier and number not in asked,
          f'row {row}, batch {number}: the row or the batch was asked about '
          'before: ask about new rows in a new batch',
        )
      asked[number] = rows
    return self._truth[rows]


def _unique_rows(rows) -> list[int]:
  """Return rows `[Q]` as integers; raise InputError if one is repeated."""
  rows = np.asarray(rows).tolist()
  repeated = [row for row in rows if rows.count(row) > 1]
  if repeated:
    raise InputError(f'row {repeated[0]}: is in the batch twice: give it once')
  return rows


class Batch(NamedTuple):
  """The question about Q rows that is put to a person."""

  folder: pathlib.Path
  identity: dict  # content of batch.json
  rows: list[int]  # [Q]

  @property
  def answers(self) -> pathlib.Path:
    """The file to fill in."""
    return self.folder / 'answers.csv'

  @property
  def images(self) -> dict[int, str]:
    """File name of the image of each row."""
    return {
      row: f'{number:03d}-row-{row}.png'
      for number, row in enumerate(self.rows, 1)
    }

  def error(self, line: int, message: str) -> InputError:
    """Return the error to raise for a line of the answers."""
    return InputError(f'{self.answers}, line {line}: {message}')


class Folder:
  """An oracle that asks a person, who answers by filling in a CSV file."""

  def __init__(
    self,
    path: pathlib.Path,
    read: Callable,
    classes: Sequence[str],
    digest: str,
  ):
    """Store the arguments; files are written at the first question.

    Args:
      path: the folder, created if absent.
      read: `rows [B] -> uint8 [B, H, W, c]`.
      classes: names `[C]`.
      digest: identifies the run, so that answers to another run are refused.

    Raises:
      InputError: a class cannot be named, see `check_classes`.
    """
    self._path, self._read = pathlib.Path(path).expanduser(), read
    self._digest, self._classes = digest, [str(name) for name in classes]
    check_classes(self._classes)
    self._parse = LabelParser(self._classes)

  def ask(self, seed: int, number: int, rows) -> np.ndarray:
    """Return the labels `[Q]` of rows `[Q]`.

    Raises:
      WaitingError: the labels are not filled in yet.
      InputError: the answers are invalid. The files are not changed.
    """
    seed, number, rows = int(seed), int(number), _unique_rows(rows)
    folder = self._path / f'seed-{seed}' / f'batch-{number:04d}'
    identity = dict(run=self._digest, seed=seed, batch=number, rows=rows)
    batch = Batch(folder, identity, rows)
    if not folder.exists():
      images = self._images(rows)
      with _disk_errors(folder):
        self._write(batch, images)
    with _disk_errors(folder):
      _check_identity(batch)
      labels = _read_answers(batch, self._parse)
    if labels is None:
      raise WaitingError(
        f'{batch.answers}: fill in the labels of the {len(rows)} images '
        f'({self._parse.help}), then run the same command again'
      )
    return np.array([labels[row] for row in rows], np.int32)

  def _images(self, rows: list[int]) -> np.ndarray:
    """Return images `[Q, H, W, c]` of rows `[Q]`."""
    images = self._read(np.array(rows))
    require(
      images.dtype == np.uint8,
      f'{self._path}: the data set has no images that a person could look at '
      f'(its rows are {images.dtype}): give `oracle=truth`',
    )
    return images

  def _write(self, batch: Batch, images: np.ndarray) -> None:
    """Write the folder of a batch atomically."""
    folder = batch.folder.with_suffix('.partial')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, image in zip(batch.images.values(), images, strict=True):
      enlarge(image).save(folder / name)
    lines = [f'{row},{name},' for row, name in batch.images.items()]
    _write_lines(folder / 'answers.csv', [','.join(COLUMNS), *lines])
    _write_lines(folder / 'classes.txt', self._parse.listed)
    _write_lines(folder / 'batch.json', [json.dumps(batch.identity)])
    os.rename(folder, batch.folder)


def enlarge(image: np.ndarray) -> PIL.Image.Image:
  """Convert `[H, W, c]` to a PIL image, repeating pixels if it is small."""
  times = -(-MIN_SIDE // min(image.shape[:2]))
  image = image.repeat(times, axis=0).repeat(times, axis=1)
  return PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _write_lines(path: pathlib.Path, lines: list[str]) -> None:
  path.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')


@contextlib.contextmanager
def _disk_errors(folder: pathlib.Path):
  """Convert an OSError into an InputError with a one-line message."""
  try:
    yield
  except OSError as error:
    raise InputError(
      f'{error.filename or folder}: cannot be read or written '
      f'({error.strerror or error}): close other programs that have it open, '
      'free disk space or give another folder, then run the same command again'
    ) from error


def _check_identity(batch: Batch) -> None:
  """Raise InputError if the folder belongs to another question."""
  path = batch.folder / 'batch.json'
  try:
    content = _read_bytes(path)
  except FileNotFoundError:
    content = b''
  try:
    found = json.loads(content)
  except (ValueError, RecursionError):  # the latter: too deeply nested
    found = None
  require(
    found == batch.identity,
    f'{path}: the folder belongs to another run, or to another state of this '
    'run: move it away to repeat the question, or give another folder',
  )


# Reading the answers.


def check_classes(classes: Sequence[str]) -> None:
  """Raise `InputError` for names of classes that a person cannot answer by.

  Args:
    classes: names `[C]`.
  """
  names = [_normalize(str(name)) for name in classes]
  for number, name in enumerate(names):
    require(
      name.casefold() not in DECLINED,
      f'class {number} is named {name!r}, which as an answer means no label: '
      'rename the class, or give `oracle`=truth',
    )
  if _numbers_count(names):
    return
  for number, name in enumerate(names):
    require(
      bool(name) and names.count(name) == 1 and name.isprintable(),
      f'class {number} is named {name!r}, which as an answer is ambiguous, and '
      'numbers are names of other classes: rename the class, or give '
      '`oracle`=truth',
    )


class LabelParser:
  """Converts the label a person entered to the number of a class.

  Attributes:
    help: the labels that can be given, for messages.
    listed: lines that name every class, for people.
  """

  def __init__(self, classes: Sequence[str]):
    """Index the classes by name."""
    names = [_normalize(name) for name in classes]
    self._count = len(names) if _numbers_count(names) else 0
    self._exact = _positions(names)
    self._folded = _positions([name.casefold() for name in names])
    # Spreadsheets drop leading zeros: '007' becomes 7.
    self._values = _positions([_number(name) for name in names])
    if self._count:
      self.help = 'the name or number of a class, skip or unsure'
      self.listed = [f'{number} {name}' for number, name in enumerate(classes)]
    else:
      self.help = 'the name of a class as in classes.txt, skip or unsure'
      self.listed = [
        '# Give the name of a class. A number is a name here, not a place in '
        'this list.',
        *classes,
      ]

  def __call__(self, label: str) -> int | None:
    """Return a class or UNLABELLED; None if the label is unknown or ambiguous.

    A name takes precedence over a number, and an exact name over one that
    differs in case. If a name is a number other than its place, numbers are
    only names.
    """
    label = _normalize(label)
    folded, value = label.casefold(), _number(label)
    found = self._exact.get(label) or self._folded.get(folded)
    if not found and value is not None:
      found = self._values.get(value) or [value] * (value < self._count)
    if not found and folded in DECLINED:
      found = [UNLABELLED]
    return found[0] if found and len(found) == 1 else None


def _numbers_count(names: Sequence[str]) -> bool:
  """True if a number is the place of a class, and no name says otherwise."""
  values = enumerate(map(_number, names))
  return all(value is None or value == place for place, value in values)


def _positions(values: list) -> dict:
  """Return a dict from each value to its positions in the list."""
  positions: dict[Any, list[int]] = {}
  for position, value in enumerate(values):
    positions.setdefault(value, []).append(position)
  return positions


def _normalize(name: str) -> str:
  """Strip spaces and compose characters: 'é' may be one code point or two."""
  return unicodedata.normalize('NFC', name).strip()


def _number(text: str) -> int | None:
  """Return the whole number that a text is, or None."""
  # `int` raises on very long numbers, and no class has 10 digits.
  is_number = text.isascii() and text.isdigit() and len(text) < 10
  return int(text) if is_number else None


def _read_bytes(path: pathlib.Path) -> bytes:
  """Return the content of a file that a person may have changed.

  Raises:
    FileNotFoundError: it is missing.
    InputError: it is a folder or a pipe, or too large to be meant.
  """
  # Without O_NONBLOCK, opening a pipe waits for somebody to write into it.
  number = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0))
  try:
    require(
      stat.S_ISREG(os.fstat(number).st_mode),
      f'{path}: is no regular file: move it away, and put the file back',
    )
    with os.fdopen(number, 'rb', closefd=False) as file:
      content = file.read(_MAX_BYTES + 1)
  finally:
    os.close(number)
  require(
    len(content) <= _MAX_BYTES,
    f'{path}: has more than {_MAX_BYTES} bytes: put the right file there',
  )
  return content


def _read_text(batch: Batch) -> str:
  """Return the answers as text, without a byte order mark."""
  try:
    content = _read_bytes(batch.answers)
  except FileNotFoundError as error:
    raise InputError(
      f'{batch.answers}: is missing: put it back, or move the folder away to '
      'repeat the question'
    ) from error
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = content.count(b'\n', 0, error.start) + 1
    raise batch.error(
      line, "is not UTF-8: save the file as 'CSV UTF-8'"
    ) from error


def _read_records(batch: Batch) -> list[tuple[int, list[str]]]:
  """Return line number and cells of every line that is not empty."""
  text = _read_text(batch)
  first = text.lstrip().partition('\n')[0]
  # The header contains its delimiter twice and none of the others.
  delimiter = max(DELIMITERS, key=first.count)
  reader = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter)
  records, line = [], 1
  try:
    for cells in reader:
      cells = [cell.strip() for cell in cells]
      while len(cells) > len(COLUMNS) and not cells[-1]:
        cells.pop()  # spreadsheets may save empty columns on the right
      if any(cells):
        records.append((line, cells))
      line = reader.line_num + 1
  except csv.Error as error:
    raise batch.error(
      line, f'is not valid CSV ({error}): save the file as CSV'
    ) from error
  return records


def _read_answers(batch: Batch, parse: LabelParser) -> dict[int, int] | None:
  """Return the label of each row; None if no label is filled in."""
  (line, header), *records = _read_records(batch) or [(1, [])]
  if [cell.lower() for cell in header] != COLUMNS:
    raise batch.error(
      line, f'the header has to be {",".join(COLUMNS)}: put it back'
    )
  images = {str(row): name for row, name in batch.images.items()}
  for line, cells in records:
    _check_cells(batch, line, cells, images)
  present = {row for _, (row, _, _) in records}
  missing = [row for row in images if row not in present]
  if missing:
    raise InputError(
      f'{batch.answers}: {len(missing)} of {len(images)} rows are missing, the '
      f'first is {missing[0]}: put them back, with {parse.help}'
    )
  if not any(label for _, (_, _, label) in records):
    return None
  return _parse_labels(batch, records, parse)


def _check_cells(batch: Batch, line: int, cells, images: dict) -> None:
  """Raise InputError unless the line names a row of the batch and its image."""
  if any('\n' in cell or '\r' in cell for cell in cells):
    raise batch.error(line, 'a quotation mark is not closed: close it')
  if len(cells) != len(COLUMNS):
    raise batch.error(
      line,
      f'has {len(cells)} columns instead of {len(COLUMNS)} '
      f'({",".join(COLUMNS)}): correct it',
    )
  row, image, _ = cells
  if row not in images:
    raise batch.error(
      line, f'row {row!r} is not in this batch: remove the line'
    )
  if image != images[row]:
    raise batch.error(
      line,
      f'row {row} is the image {images[row]}, not {image!r}, as if the columns '
      'were sorted separately: put each label beside its image',
    )


def _parse_labels(batch: Batch, records, parse: LabelParser) -> dict[int, int]:
  """Return the label of each row; raise InputError for an invalid label."""
  labels: dict[int, int] = {}
  lines: dict[int, int] = {}
  for line, (row, image, label) in records:
    parsed = parse(label) if label else None
    if parsed is None:
      problem = f'the label {label!r} is unknown' if label else 'has no label'
      raise batch.error(line, f'{problem} ({image}): give {parse.help}')
    if labels.setdefault(int(row), parsed) != parsed:
      raise batch.error(
        line,
        f'row {row} has another label in line {lines[row]}: remove one of them',
      )
    lines.setdefault(row, line)
  return labels
