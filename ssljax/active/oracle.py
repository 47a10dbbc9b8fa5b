"""Who is asked for labels: hidden truth, or a person with a folder of images.

An oracle has one method, `ask(seed, number, rows [Q]) -> labels [Q]` int32, of
the batch of that number of a seed's run; UNLABELLED is a row that stays without
a label and is not to be asked about again. The same question has the same
answer, so that a run that is resumed may ask again what it asked last.

A person's folder:

  seed-0/batch-0001/
    001-row-4711.png    the images, small ones enlarged
    answers.csv         row,image,label: the last column is to be filled in
    classes.txt         number and name of every class
    batch.json          whose question it is

A label is a class's name or number, or 'skip' or 'unsure'.
"""

from collections.abc import Callable, Sequence
import contextlib
import csv
import io
import json
import os
import pathlib
import shutil
from typing import NamedTuple
import unicodedata

import numpy as np
import PIL.Image

from ssljax.core import UNLABELLED
from ssljax.errors import InputError, require

COLUMNS = ['row', 'image', 'label']
DELIMITERS = ',;\t'  # of spreadsheets in one country or another
DECLINED = ('skip', 'unsure')
SHORTEST = 128  # pixels of an image's shorter side that a person can see
LABEL = "a class's name or number, skip or unsure"


class WaitingError(Exception):
  """A person has been asked: one line that names the file to fill in."""


class Simulation:
  """Answers with the truth, and counts."""

  def __init__(self, truth: np.ndarray):
    """Knows labels `[N]` that the run does not."""
    self._truth = np.asarray(truth, np.int32)
    self._asked = {}  # seed -> number -> rows

  def count(self, seed: int) -> int:
    """Labels that this process was asked for in a seed's run."""
    return sum(len(rows) for rows in self._asked.get(seed, {}).values())

  def ask(self, seed: int, number: int, rows) -> np.ndarray:
    """The labels `[Q]` of rows `[Q]`, each asked about once in a seed's run."""
    rows = _rows(rows)
    asked = self._asked.setdefault(seed, {})
    if asked.get(number) != rows:
      earlier = {row for batch in asked.values() for row in batch}
      for row in rows:
        require(
          0 <= row < len(self._truth) and self._truth[row] != UNLABELLED,
          f'row {row} has no label to be asked for: leave it out',
        )
        require(
          row not in earlier and number not in asked,
          f'row {row}, batch {number}: was asked about before',
        )
      asked[number] = rows
    return self._truth[rows]


def _rows(rows) -> list[int]:
  """Rows `[Q]` as integers, none of them twice."""
  rows = np.asarray(rows).tolist()
  twice = [row for row in rows if rows.count(row) > 1]
  if twice:
    raise InputError(f'row {twice[0]}: is asked about twice at once')
  return rows


class Batch(NamedTuple):
  """Q rows that a person is asked about."""

  folder: pathlib.Path
  whose: dict  # what batch.json holds
  rows: list[int]  # [Q]

  @property
  def answers(self) -> pathlib.Path:
    """The file to fill in."""
    return self.folder / 'answers.csv'

  @property
  def images(self) -> dict[int, str]:
    """File name of each row."""
    return {
      row: f'{place:03d}-row-{row}.png'
      for place, row in enumerate(self.rows, 1)
    }

  def error(self, line: int, message: str) -> InputError:
    """What is wrong in a line of the answers."""
    return InputError(f'{self.answers}, line {line}: {message}')


class Folder:
  """Asks a person, who answers by filling in a CSV file."""

  def __init__(
    self,
    path: pathlib.Path,
    read: Callable,
    classes: Sequence[str],
    digest: str,
  ):
    """Nothing is written before the first question.

    Args:
      path: the folder, made if absent.
      read: `rows [B] -> uint8 [B, H, W, c]`.
      classes: names `[C]`.
      digest: of the run, so that another one's answers are recognised.
    """
    self._path, self._read, self._digest = pathlib.Path(path), read, digest
    self._classes = [str(name) for name in classes]
    self._meaning = _Meaning(self._classes)

  def ask(self, seed: int, number: int, rows) -> np.ndarray:
    """The labels `[Q]` of rows `[Q]`.

    Raises:
      WaitingError: they are not there yet.
      InputError: what is there cannot be used. It is left as it is.
    """
    seed, number, rows = int(seed), int(number), _rows(rows)
    folder = self._path / f'seed-{seed}' / f'batch-{number:04d}'
    whose = dict(run=self._digest, seed=seed, batch=number, rows=rows)
    batch = Batch(folder, whose, rows)
    if not folder.exists():
      images = self._images(rows)
      with _disk_errors(folder):
        self._write(batch, images)
    with _disk_errors(folder):
      _check_whose(batch)
      given = _read_answers(batch, self._meaning)
    if given is None:
      raise WaitingError(
        f'{batch.answers}: give the {len(rows)} images their labels ({LABEL}), '
        'then run the same command again'
      )
    return np.array([given[row] for row in rows], np.int32)

  def _images(self, rows: list[int]) -> np.ndarray:
    """Images `[Q, H, W, c]` of rows `[Q]`."""
    images = self._read(np.array(rows))
    require(
      images.dtype == np.uint8,
      f'{self._path}: what the data set has are no images that a person could '
      'look at: have the hidden labels answer instead',
    )
    return images

  def _write(self, batch: Batch, images: np.ndarray) -> None:
    """Writes the folder of a batch, whole or not at all."""
    folder = batch.folder.with_suffix('.partial')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, image in zip(batch.images.values(), images, strict=True):
      picture(image).save(folder / name)
    lines = [f'{row},{name},' for row, name in batch.images.items()]
    _write_lines(folder / 'answers.csv', [','.join(COLUMNS), *lines])
    names = [f'{number} {name}' for number, name in enumerate(self._classes)]
    _write_lines(folder / 'classes.txt', names)
    _write_lines(folder / 'batch.json', [json.dumps(batch.whose)])
    os.rename(folder, batch.folder)


def picture(image: np.ndarray) -> PIL.Image.Image:
  """An image `[H, W, c]` for a person: each pixel a square if it is small."""
  times = -(-SHORTEST // min(image.shape[:2]))
  image = image.repeat(times, axis=0).repeat(times, axis=1)
  return PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _write_lines(path: pathlib.Path, lines: list[str]) -> None:
  path.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')


@contextlib.contextmanager
def _disk_errors(folder: pathlib.Path):
  """Turns a refusal of the disk into one clear line."""
  try:
    yield
  except OSError as error:
    raise InputError(
      f'{error.filename or folder}: cannot be read or written '
      f'({error.strerror or error}); close other programs that have it open, '
      'make room, or give another folder, and run the same command again'
    ) from error


def _check_whose(batch: Batch) -> None:
  """Refuses a folder of another question."""
  path = batch.folder / 'batch.json'
  try:
    there = json.loads(path.read_text(encoding='utf-8'))
  except (FileNotFoundError, ValueError):
    there = None
  require(
    there == batch.whose,
    f'{path}: the folder belongs to another run, or to another state of this '
    'one: move it away to be asked anew, or give another folder',
  )


# Reading the answers.


class _Meaning:
  """What a person means by a label."""

  def __init__(self, classes: Sequence[str]):
    """Prepares to find a class by its name."""
    names = [_plain(name) for name in classes]
    self._count = len(names)
    self._exact = _places(names)
    self._folded = _places([name.casefold() for name in names])
    # '007' is 7 once a spreadsheet has seen it.
    values = [int(name) if _is_number(name) else None for name in names]
    self._values = _places(values)

  def __call__(self, label: str) -> int | None:
    """A class, UNLABELLED, or None for what is neither, or more than one."""
    label = _plain(label)
    folded = label.casefold()
    found = self._exact.get(label) or self._folded.get(folded)
    if not found and _is_number(label):
      value = int(label)
      found = self._values.get(value) or [value] * (value < self._count)
    if not found and folded in DECLINED:
      found = [UNLABELLED]
    return found[0] if found and len(found) == 1 else None


def _places(values: list) -> dict:
  """Value -> where it is in a list."""
  places = {}
  for place, value in enumerate(values):
    places.setdefault(value, []).append(place)
  return places


def _plain(name: str) -> str:
  """Without spaces around, and composed: 'é' may be one letter or two."""
  return unicodedata.normalize('NFC', name).strip()


def _is_number(text: str) -> bool:
  # Of more digits `int` would refuse some, and no class has such a number.
  return text.isascii() and text.isdigit() and len(text) < 10


def _text(batch: Batch) -> str:
  """The answers as text, whatever mark precedes it."""
  try:
    content = batch.answers.read_bytes()
  except FileNotFoundError as error:
    raise InputError(
      f'{batch.answers}: is missing; put it back, or move the folder away to '
      'be asked anew'
    ) from error
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = content.count(b'\n', 0, error.start) + 1
    raise batch.error(
      line, "is not UTF-8; save the file as 'CSV UTF-8'"
    ) from error


def _records(batch: Batch) -> list[tuple[int, list[str]]]:
  """Line number and cells of every line that is not empty."""
  text = _text(batch)
  first = text.lstrip().partition('\n')[0]
  # The header has two of them and nothing else that could be one.
  delimiter = max(DELIMITERS, key=first.count)
  reader = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter)
  records, line = [], 1
  try:
    for cells in reader:
      cells = [cell.strip() for cell in cells]
      while len(cells) > len(COLUMNS) and not cells[-1]:
        cells.pop()  # a spreadsheet has looked at a column further right
      if any(cells):
        records.append((line, cells))
      line = reader.line_num + 1
  except csv.Error as error:
    raise batch.error(
      line, f'is no CSV ({error}); save the file as CSV'
    ) from error
  return records


def _read_answers(batch: Batch, meaning: Callable) -> dict[int, int] | None:
  """Row -> label; None where nothing has been filled in."""
  (line, header), *records = _records(batch) or [(1, [])]
  if [cell.lower() for cell in header] != COLUMNS:
    raise batch.error(line, f'has to be {",".join(COLUMNS)}: put it back')
  images = {str(row): name for row, name in batch.images.items()}
  for line, cells in records:
    _check_cells(batch, line, cells, images)
  there = {row for _, (row, _, _) in records}
  missing = [row for row in images if row not in there]
  if missing:
    raise InputError(
      f'{batch.answers}: {len(missing)} of {len(images)} rows are missing, the '
      f'first is {missing[0]}; put them back, with {LABEL}'
    )
  if not any(label for _, (_, _, label) in records):
    return None
  return _labels(batch, records, meaning)


def _check_cells(batch: Batch, line: int, cells, images: dict) -> None:
  """Refuses a line that is not about one of the images."""
  if any('\n' in cell or '\r' in cell for cell in cells):
    raise batch.error(line, 'a quotation mark is not closed: close it')
  if len(cells) != len(COLUMNS):
    raise batch.error(
      line,
      f'has {len(cells)} columns, not the {len(COLUMNS)} of '
      f'{",".join(COLUMNS)}: correct it',
    )
  row, image, _ = cells
  if row not in images:
    raise batch.error(
      line, f'row {row!r} was not asked about in this batch: remove the line'
    )
  if image != images[row]:
    raise batch.error(
      line,
      f'row {row} is the image {images[row]}, not {image!r}: were the columns '
      'sorted apart? Put each label beside its image',
    )


def _labels(batch: Batch, records, meaning: Callable) -> dict[int, int]:
  """Row -> label of checked records, refusing what is no label."""
  given, where = {}, {}
  for line, (row, image, label) in records:
    found = meaning(label) if label else None
    if found is None:
      what = f'the label {label!r} is unknown' if label else 'has no label'
      raise batch.error(line, f'{what} ({image}): give {LABEL}')
    if given.setdefault(int(row), found) != found:
      raise batch.error(
        line,
        f'row {row} has another label in line {where[row]}: remove one of them',
      )
    where.setdefault(row, line)
  return given
