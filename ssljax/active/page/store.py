"""Answers of people, as append-only JSON lines.

A line is written and synchronised with the disk before the answer is
acknowledged, so that a kill loses at most the answer in flight. Nothing is ever
changed in the file: undo, new classes and renamed ones are lines too. `State`
is the result of all lines in order.

  store      version, id, folder of the images
  class      op add, rename or merge; name, to
  guideline  name, text
  answer     n, time, annotator, file, answer (label, skip or unsure), label,
             shown (queue, suggestion, confidence, round, blind), key, batch,
             stamp (size and time of the file), final (settles a conflict)
  undo       time, annotator, of (numbers n)
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import datetime
import json
import logging
import os
import pathlib
import threading
from typing import Any
import uuid

from ssljax.errors import InputError, require
from ssljax.runs import run_lock

NAME = 'labels.jsonl'
LABEL, SKIP, UNSURE = 'label', 'skip', 'unsure'
MAX_CLASSES = 1000
_MAX_NAME, _MAX_GUIDELINE, _MAX_KEY, _MAX_SHOWN = 100, 4000, 64, 1000
_SHOWN = 'queue', 'suggestion', 'confidence', 'round', 'blind'
_LOG = logging.getLogger(__name__)


class SaveError(Exception):
  """An answer could not be written: it is not saved."""


@dataclasses.dataclass(slots=True)
class Answer:
  """An answer of an annotator for a file."""

  number: int
  time: str
  annotator: str
  file: str
  answer: str  # LABEL, SKIP or UNSURE
  label: str | None  # name of a class as it is called now
  shown: Mapping[str, Any]
  batch: str
  stamp: str  # of the file that was shown; '' if not known
  final: bool
  labelled_before: int  # labelled files before this answer
  undone: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Resolved:
  """The label of a file, from the answers of all annotators."""

  label: str | None  # None: skipped, unsure, or a tie
  is_conflict: bool
  stamp: str
  is_final: bool = False  # somebody settled a conflict


class State:
  """The result of the lines of a store.

  Attributes:
    id: of the store.
    images: folder that it was made for.
    classes: names, in the order in which they were added.
    guidelines: text by class.
    answers: all answers in order, undone ones too.
    resolved: of every file with an answer.
    counts: labelled files by class.
  """

  def __init__(self):
    self.id, self.images = '', None
    self.classes: list[str] = []
    self.guidelines: dict[str, str] = {}
    self.answers: list[Answer] = []
    self.resolved: dict[str, Resolved] = {}
    self.counts: collections.Counter[str] = collections.Counter()
    self.conflicts: set[str] = set()
    self.keys: set[str] = set()
    self._renamed: dict[str, str] = {}
    self._of_file: dict[str, list[Answer]] = {}
    self._batches: dict[str, list[list[Answer]]] = {}

  @property
  def labelled(self) -> int:
    """Number of files with a label."""
    return sum(self.counts.values())

  def latest(self, file: str) -> dict[str, Answer]:
    """Return the answer that holds for each annotator."""
    return {a.annotator: a for a in self._of_file.get(file, ()) if not a.undone}

  def labels(self) -> dict[str, str]:
    """Return the label of every labelled file."""
    return {f: r.label for f, r in self.resolved.items() if r.label is not None}

  def last_batch(self, annotator: str) -> list[Answer]:
    """Return the answers that undo takes back; empty if there are none."""
    batches = self._batches.get(annotator)
    return batches[-1] if batches else []

  def current_name(self, name: str) -> str | None:
    """Return what a class is called now; None if it was never one."""
    while name not in self.classes:
      if name not in self._renamed:
        return None
      name = self._renamed[name]
    return name

  def apply(self, line: Mapping[str, Any]) -> None:
    """Add a line.

    Raises:
      KeyError, TypeError, ValueError: the line is damaged.
    """
    kinds = {
      'store': self._open,
      'class': self._class,
      'guideline': self._guideline,
      'answer': self._answer,
      'undo': self._undo,
    }
    kinds[line['kind']](line)

  def _open(self, line) -> None:
    self.id, self.images = self.id or line['id'], line['images']

  def _class(self, line) -> None:
    name, to = line['name'], line.get('to')
    self._renamed.pop(to or name, None)
    if line['op'] == 'add':
      self.classes.append(name)
      return
    place = self.classes.index(name)
    if line['op'] == 'rename':
      self.classes[place] = to
    else:
      self.classes.remove(name)
    self._renamed[name] = to
    text = self.guidelines.pop(name, None)
    if text is not None:
      self.guidelines.setdefault(to, text)
    for answer in self.answers:
      if answer.label == name:
        answer.label = to
      if answer.shown.get('suggestion') == name:
        answer.shown = {**answer.shown, 'suggestion': to}
    for file in self._of_file:
      self._resolve(file)

  def _guideline(self, line) -> None:
    self.guidelines[line['name']] = line['text']

  def _answer(self, line) -> None:
    answer = Answer(
      number=line['n'],
      time=line['time'],
      annotator=line['annotator'],
      file=line['file'],
      answer=line['answer'],
      label=self._current(line['label']) if line.get('label') else None,
      shown=line.get('shown') or {},
      batch=line.get('batch') or str(line['n']),
      stamp=line.get('stamp') or '',
      final=bool(line.get('final')),
      labelled_before=self.labelled,
    )
    if line.get('key'):
      self.keys.add(line['key'])
    self.answers.append(answer)
    self._of_file.setdefault(answer.file, []).append(answer)
    batches = self._batches.setdefault(answer.annotator, [])
    if batches and batches[-1][0].batch == answer.batch:
      batches[-1].append(answer)
    else:
      batches.append([answer])
    self._resolve(answer.file)

  def _current(self, label: str) -> str:
    if label not in self.classes:
      raise ValueError(f'there is no class {label!r}')
    return label

  def _undo(self, line) -> None:
    numbers = set(line['of'])
    batches = self._batches.get(line['annotator'], [])
    for answer in reversed(self.answers):
      if not numbers:
        break
      if answer.number in numbers:
        numbers.discard(answer.number)
        answer.undone = True
        self._resolve(answer.file)
    while batches and all(a.undone for a in batches[-1]):
      batches.pop()

  def _resolve(self, file: str) -> None:
    old = self.resolved.pop(file, None)
    if old is not None and old.label is not None:
      self.counts[old.label] -= 1
    self.conflicts.discard(file)
    latest = list(self.latest(file).values())
    if not latest:
      return
    new = _resolved(latest)
    self.resolved[file] = new
    if new.label is not None:
      self.counts[new.label] += 1
    if new.is_conflict:
      self.conflicts.add(file)

  def agreement(self) -> dict[str, Any]:
    """Return the agreement of annotators on files that several labelled.

    Returns:
      files: number that at least two annotators labelled; agreed: share with
      one label; pairs: (annotator, annotator, files, share, Cohen's kappa).
    """
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = {}
    files = agreed = 0
    for file, answers in self._of_file.items():
      if len(answers) < 2:
        continue
      given = {
        name: a.label for name, a in self.latest(file).items() if a.label
      }
      if len(given) < 2:
        continue
      files += 1
      agreed += len(set(given.values())) == 1
      names = sorted(given)
      for k, one in enumerate(names):
        for other in names[k + 1 :]:
          both = given[one], given[other]
          pairs.setdefault((one, other), []).append(both)
    rows = [
      [*names, len(both), *_kappa(both)]
      for names, both in sorted(pairs.items())
    ]
    share = agreed / files if files else None
    return {'files': files, 'agreed': share, 'pairs': rows}


def _resolved(latest: Sequence[Answer]) -> Resolved:
  """Return the label that the latest answers of all annotators give."""
  final = [a for a in latest if a.final]
  if final:
    chosen = max(final, key=lambda a: a.number)
    return Resolved(chosen.label, False, chosen.stamp, True)
  stamp = max(latest, key=lambda a: a.number).stamp
  votes = collections.Counter(a.label for a in latest if a.label is not None)
  if not votes:
    return Resolved(None, False, stamp)
  ranked = votes.most_common(2)
  is_tie = len(ranked) > 1 and ranked[0][1] == ranked[1][1]
  return Resolved(None if is_tie else ranked[0][0], len(votes) > 1, stamp)


def _kappa(both: Sequence[tuple[str, str]]) -> tuple[float, float | None]:
  """Return the share of equal labels, and Cohen's kappa (1960).

  Kappa is None if chance alone gives full agreement.
  """
  count = len(both)
  share = sum(a == b for a, b in both) / count
  first, second = (
    collections.Counter(side) for side in zip(*both, strict=True)
  )
  chance = sum(first[c] * second[c] for c in first) / count**2
  return share, (share - chance) / (1 - chance) if chance < 1 else None


# The file.


class Log:
  """An append-only file of JSON lines."""

  def __init__(self, path: pathlib.Path):
    """Open or make the file, and drop an incomplete last line."""
    self._path, self._broken = path, False
    self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
      lines, self._size = read_lines(path)
      left = os.fstat(self._descriptor).st_size - self._size
      if left:
        _LOG.warning(
          '%s: dropped %d bytes of an incomplete last line', path, left
        )
        os.ftruncate(self._descriptor, self._size)
    except BaseException:
      os.close(self._descriptor)
      raise
    self.lines = lines

  def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write lines durably: all of them, or none.

    Raises:
      SaveError: they could not be written.
    """
    if self._broken:
      raise SaveError(
        f'{self._path.name} cannot be written; restart the server'
      )
    data = ''.join(json.dumps(line) + '\n' for line in lines).encode()
    try:
      written = 0
      while written < len(data):
        written += os.pwrite(
          self._descriptor, data[written:], self._size + written
        )
      os.fsync(self._descriptor)
    except OSError as error:
      try:
        os.ftruncate(self._descriptor, self._size)
      except OSError:
        self._broken = True
      raise SaveError(error.strerror or str(error)) from error
    self._size += len(data)

  def close(self) -> None:
    """Close the file."""
    os.close(self._descriptor)


def read_lines(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
  """Return the complete lines of a file, and their length in bytes.

  An incomplete last line, which a kill may leave, is ignored.

  Raises:
    InputError: another line is damaged.
  """
  lines, size = [], 0
  with open(path, 'rb') as file:
    for number, text in enumerate(file, 1):
      if not text.endswith(b'\n'):
        break
      try:
        line = json.loads(text)
        if not isinstance(line, dict):
          raise ValueError('it is no JSON object')
      except (ValueError, RecursionError) as error:
        raise _damaged(path, number, error) from error
      lines.append(line)
      size += len(text)
  return lines, size


def _damaged(path: pathlib.Path, number: int, error: Exception) -> InputError:
  reason = f'{type(error).__name__}: {error}'[:100]
  return InputError(
    f'`store`={path.parent}: {path.name}, line {number} is damaged ({reason}): '
    'correct or remove that line'
  )


def _state_of(path: pathlib.Path, lines: Sequence[Mapping]) -> State:
  state = State()
  for number, line in enumerate(lines, 1):
    try:
      state.apply(line)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise _damaged(path, number, error) from error
  return state


def read(folder: str | os.PathLike) -> State:
  """Return the state of a store that another process may be writing.

  Raises:
    InputError: there is none, or it is damaged.
  """
  path = pathlib.Path(folder) / NAME
  require(
    path.is_file(),
    f'`store`={folder}: holds no {NAME}: give the folder of a store',
  )
  return _state_of(path, read_lines(path)[0])


class Store:
  """The answers for a folder of images; one process writes at a time.

  Attributes:
    folder: of the store.
    state: the result of all lines.
    version: increases with every change.
    mutex: held while the state changes.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    images: str = '',
    classes: Sequence[str] = (),
    *,
    moved: bool = False,
  ):
    """Open or make a store.

    Args:
      folder: of the store.
      images: absolute path of the folder of images.
      classes: names to add if the store lacks them.
      moved: accept another folder of images than the store was made for.

    Raises:
      InputError: another process writes in it, it is damaged, or it belongs to
        another folder of images.
    """
    self.folder = pathlib.Path(folder)
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise InputError(
        f'`store`={folder}: cannot be made ({error.strerror}): give another '
        'folder'
      ) from error
    try:
      self._lock = run_lock.RunLock(self.folder)
    except InputError as error:
      message = error.marked.replace('`workdir`', '`store`')
      raise InputError(message) from error
    self.mutex = threading.RLock()
    self.version = 0
    try:
      self._open(images, classes, moved)
    except BaseException:
      self._lock.release()
      raise

  def _open(self, images: str, classes: Sequence[str], moved: bool) -> None:
    path = self.folder / NAME
    try:
      self._log = Log(path)
    except OSError as error:
      raise InputError(
        f'`store`={self.folder}: {NAME} cannot be opened ({error.strerror}): '
        'give another folder'
      ) from error
    try:
      self.state = _state_of(path, self._log.lines)
      self._log.lines = []
      known = self.state.images
      require(
        known in (None, images) or moved,
        f'`images`={images}: the store {self.folder} has labels of the folder '
        f'{known}: give `store`={self.folder} to use it if that folder was '
        'moved, or another `store`',
      )
      if images != known:
        line = {'kind': 'store', 'version': 1, 'id': uuid.uuid4().hex}
        self._save(line | {'images': images})
      # A class that was renamed or merged is there under its present name.
      known_as = self.state.current_name
      self.add_classes(c for c in classes if known_as(c) is None)
    except SaveError as error:
      self._log.close()
      raise InputError(
        f'`store`={self.folder}: cannot be written ({error}): make room, or '
        'give another folder'
      ) from error
    except BaseException:
      self._log.close()
      raise

  def close(self) -> None:
    """Close the file, and release the lock."""
    self._log.close()
    self._lock.release()

  def _save(self, *lines: dict[str, Any]) -> None:
    """Write lines and apply them, or neither."""
    self._log.append(lines)
    for line in lines:
      self.state.apply(line)
    self.version += 1

  # Answers.

  def answer(
    self, annotator: str, answers: Sequence[Mapping[str, Any]], batch: str = ''
  ) -> int:
    """Save answers of one annotator; return the number of new ones.

    An answer whose key is saved already is not saved again, so that a client
    may repeat a request whose reply it has lost.

    Args:
      annotator: name.
      answers: each has file, answer, and may have label, shown, key, stamp and
        final.
      batch: answers with the same text are undone together.

    Raises:
      InputError: an answer is invalid; none is saved.
      SaveError: the disk is full, or fails; none is saved.
    """
    _text('annotator', annotator, _MAX_NAME)
    with self.mutex:
      number, now = len(self.state.answers), _now()
      lines: list[Any] = []
      keys = set()
      for given in answers:
        line = self._checked(given)
        if line['key'] in self.state.keys or line['key'] in keys:
          continue
        keys |= {line['key']} - {''}
        lines.append(
          {'kind': 'answer', 'n': number + len(lines), 'time': now}
          | {'annotator': annotator, 'batch': batch or f'{now} {number}'}
          | line
        )
      if lines:
        self._save(*lines)
      return len(lines)

  def _checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an answer, after checks."""
    kind, label = given.get('answer', LABEL), given.get('label')
    require(
      kind in (LABEL, SKIP, UNSURE),
      f'`answer`={kind!r:.50}: give label, skip or unsure',
    )
    if kind == LABEL:
      now = self.state.current_name(label) if isinstance(label, str) else None
      require(
        now is not None,
        f'`label`={label!r:.120}: there is no such class: load the page again',
      )
      label = now
    shown = given.get('shown') or {}
    require(isinstance(shown, Mapping), '`shown`: give an object')
    shown = {k: shown[k] for k in _SHOWN if shown.get(k) is not None}
    require(
      all(isinstance(v, str | int | float | bool) for v in shown.values())
      and len(json.dumps(shown)) <= _MAX_SHOWN,
      '`shown`: give short texts and numbers',
    )
    key = given.get('key') or ''
    require(
      isinstance(key, str) and len(key) <= _MAX_KEY,
      f'`key`: give a text of at most {_MAX_KEY} characters',
    )
    return {
      'file': given['file'],
      'answer': kind,
      'label': label if kind == LABEL else None,
      'shown': shown,
      'key': key,
      'stamp': given.get('stamp') or '',
    } | ({'final': True} if given.get('final') else {})

  def undo(self, annotator: str) -> list[Answer]:
    """Take back the last answers of an annotator that were given together.

    Raises:
      SaveError: the disk is full, or fails.
    """
    with self.mutex:
      last = list(self.state.last_batch(annotator))
      if last:
        numbers = [a.number for a in last]
        line = {'kind': 'undo', 'time': _now(), 'annotator': annotator}
        self._save(line | {'of': numbers})
      return last

  # Classes.

  def add_classes(self, names: Iterable[str]) -> None:
    """Add those classes that are not there. Raise as `add_class`."""
    with self.mutex:
      new = [c for c in dict.fromkeys(names) if c not in self.state.classes]
      for k, name in enumerate(new):
        self._check_new(name, *new[:k])
      self._check_count(len(new))
      self._save(
        *({'kind': 'class', 'op': 'add', 'name': name} for name in new)
      )

  def add_class(self, name: str) -> None:
    """Add a class.

    Raises:
      InputError: the name cannot be used.
      SaveError: the disk is full, or fails.
    """
    with self.mutex:
      self._check_new(name)
      self._check_count(1)
      self._save({'kind': 'class', 'op': 'add', 'name': name})

  def rename_class(self, name: str, to: str) -> None:
    """Rename a class in all answers. Raise as `add_class`."""
    with self.mutex:
      self._check_known(name)
      self._check_new(to, besides=name)
      self._save({'kind': 'class', 'op': 'rename', 'name': name, 'to': to})

  def merge_class(self, name: str, to: str) -> None:
    """Make all answers of a class those of another. Raise as `add_class`."""
    with self.mutex:
      self._check_known(name)
      self._check_known(to)
      require(name != to, f'`to`={to}: give another class to merge with')
      self._save({'kind': 'class', 'op': 'merge', 'name': name, 'to': to})

  def set_guideline(self, name: str, text: str) -> None:
    """Set the guideline of a class. Raise as `add_class`."""
    with self.mutex:
      self._check_known(name)
      require(
        isinstance(text, str)
        and len(text) <= _MAX_GUIDELINE
        and all(c.isprintable() or c in '\n\t' for c in text),
        f'`text`: give at most {_MAX_GUIDELINE} printable characters',
      )
      self._save({'kind': 'guideline', 'name': name, 'text': text})

  def _check_known(self, name) -> None:
    require(
      isinstance(name, str) and name in self.state.classes,
      f'`name`={name!r:.120}: there is no such class; load the page again',
    )

  def _check_count(self, more: int) -> None:
    require(
      len(self.state.classes) + more <= MAX_CLASSES,
      f'`classes`: {MAX_CLASSES} are the most that the page takes',
    )

  def _check_new(self, name, *others: str, besides: str = '') -> None:
    _text('classes', name, _MAX_NAME)
    there = [*self.state.classes, *others]
    folded = {c.casefold() for c in there if c != besides}
    require(
      name.casefold() not in folded,
      f'`classes`: there is a class {name!r} already, perhaps in other case: '
      'give another name',
    )


def _text(parameter: str, value, longest: int) -> None:
  """Raise `InputError` for a value that is no short printable text."""
  require(
    isinstance(value, str)
    and 0 < len(value) <= longest
    and value.isprintable()
    and value == value.strip(),
    f'`{parameter}`={value!r:.120}: give 1 to {longest} printable characters '
    'without spaces around them',
  )


def _now() -> str:
  now = datetime.datetime.now().astimezone()
  return now.isoformat(timespec='milliseconds')
