"""The predictions of a learning round, in one SQLite file.

The learner writes a new file and moves it to its place; the server opens the
file again when it has changed. So a reader sees one round, as a whole, and
needs the same memory for any number of images.
"""

from collections.abc import Iterable, Iterator
import contextlib
import json
import os
import pathlib
import sqlite3
from typing import Any, NamedTuple

NAME = 'suggestions.sqlite'
_SCHEMA = """
CREATE TABLE suggestion(
  path TEXT PRIMARY KEY, class INTEGER, confidence REAL, score REAL,
  x REAL, y REAL) WITHOUT ROWID;
CREATE TABLE unseen(
  path TEXT PRIMARY KEY, class TEXT, confidence REAL) WITHOUT ROWID;
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""
_INDEXES = """
CREATE INDEX by_score ON suggestion(score) WHERE score IS NOT NULL;
CREATE INDEX by_confidence ON suggestion(confidence);
CREATE INDEX by_class ON suggestion(class, confidence);
CREATE INDEX on_map ON suggestion(x) WHERE x IS NOT NULL;
"""


class Suggestion(NamedTuple):
  """A prediction for a file."""

  label: str | None  # None before the first round
  confidence: float | None


class Point(NamedTuple):
  """A file on the map."""

  path: str
  x: float  # in [0, 1], as y
  y: float
  label: str | None


class Writer:
  """Writes the predictions of a round."""

  def __init__(self, folder: pathlib.Path):
    """Begin a file."""
    self._path = folder / NAME
    self._partial = folder / f'{NAME}.{os.getpid()}.partial'
    self._partial.unlink(missing_ok=True)
    self._connection = sqlite3.connect(self._partial)
    self._connection.executescript(_SCHEMA)

  def add(self, rows: Iterable[tuple[str, int | None, float | None]]) -> None:
    """Add rows (path, class, confidence)."""
    self._connection.executemany(
      'INSERT OR REPLACE INTO suggestion(path,class,confidence) VALUES(?,?,?)',
      rows,
    )

  def score(self, rows: Iterable[tuple[str, float]]) -> None:
    """Set the scores by path; the largest are labelled first."""
    self._update('score=?', ((score, path) for path, score in rows))

  def place(self, rows: Iterable[tuple[str, float, float]]) -> None:
    """Set the places on the map by path."""
    self._update('x=?, y=?', ((x, y, path) for path, x, y in rows))

  def _update(self, what: str, rows: Iterable[tuple]) -> None:
    query = f'UPDATE suggestion SET {what} WHERE path=?'
    self._connection.executemany(query, rows)

  def unseen(self, rows: Iterable[tuple[str, str, float]]) -> None:
    """Add predictions (path, class, confidence) without the file's label."""
    self._connection.executemany('INSERT INTO unseen VALUES(?,?,?)', rows)

  def publish(self, **meta: Any) -> None:
    """Complete the file and move it to its place."""
    self._connection.executemany(
      'INSERT INTO meta VALUES(?,?)',
      [(key, json.dumps(value)) for key, value in meta.items()],
    )
    self._connection.executescript(_INDEXES)
    self._connection.commit()
    self._connection.close()
    os.replace(self._partial, self._path)

  def abandon(self) -> None:
    """Remove an incomplete file."""
    self._connection.close()
    self._partial.unlink(missing_ok=True)


class Suggestions:
  """The newest predictions; used by one thread at a time."""

  def __init__(self, folder: pathlib.Path):
    """Read the file in a folder, once it is there."""
    self._path = folder / NAME
    self._file: tuple[int, int] | None = None
    self._connection: sqlite3.Connection | None = None
    self.meta: dict[str, Any] = {}
    self.classes: list[str] = []

  def refresh(self) -> None:
    """Open the file if there is a new one."""
    try:
      status = os.stat(self._path)
    except OSError:
      return
    identity = status.st_ino, status.st_mtime_ns
    if identity == self._file:
      return
    connection = sqlite3.connect(
      f'file:{self._path}?mode=ro&immutable=1'.replace('#', '%23'),
      uri=True,
      check_same_thread=False,
    )
    try:
      found = dict(connection.execute('SELECT key,value FROM meta'))
      meta = {key: json.loads(value) for key, value in found.items()}
    except (sqlite3.Error, ValueError):
      connection.close()
      return  # damaged; the next round replaces it
    if self._connection is not None:
      self._connection.close()
    self._connection, self._file = connection, identity
    self.meta, self.classes = meta, meta.get('classes', [])

  def _rows(self, query: str, *values) -> Iterator[tuple]:
    if self._connection is None:
      return
    with contextlib.suppress(sqlite3.Error):
      yield from self._connection.execute(query, values)

  def _named(self, number: int | None) -> str | None:
    return None if number is None else self.classes[number]

  def of(self, path: str) -> Suggestion:
    """Return the prediction for a file."""
    query = 'SELECT class,confidence FROM suggestion WHERE path=?'
    for number, confidence in self._rows(query, path):
      return Suggestion(self._named(number), confidence)
    return Suggestion(None, None)

  def by_score(self) -> Iterator[str]:
    """Yield paths, those to label first at the beginning."""
    query = (
      'SELECT path FROM suggestion WHERE score IS NOT NULL ORDER BY score DESC'
    )
    yield from (path for (path,) in self._rows(query))
    yield from self.by_confidence()

  def by_confidence(self) -> Iterator[str]:
    """Yield paths, the least confident predictions first."""
    query = (
      'SELECT path FROM suggestion WHERE confidence IS NOT NULL '
      'ORDER BY confidence'
    )
    yield from (path for (path,) in self._rows(query))

  def of_class(self, label: str, order: str) -> Iterator[str]:
    """Yield the paths of a predicted class.

    Args:
      label: name of the class.
      order: 'asc' or 'desc', of the confidence.
    """
    if label not in self.classes:
      return
    direction = 'DESC' if order == 'desc' else 'ASC'
    query = (
      'SELECT path FROM suggestion WHERE class=? '
      f'ORDER BY confidence {direction}'
    )
    rows = self._rows(query, self.classes.index(label))
    yield from (path for (path,) in rows)

  def by_class(self) -> Iterator[str]:
    """Yield paths by class; the most confident ones of a class first."""
    query = (
      'SELECT path FROM suggestion WHERE class IS NOT NULL '
      'ORDER BY class, confidence DESC'
    )
    yield from (path for (path,) in self._rows(query))

  def points(self) -> list[Point]:
    """Return the files on the map."""
    query = 'SELECT path,x,y,class FROM suggestion WHERE x IS NOT NULL'
    return [
      Point(path, x, y, self._named(number))
      for path, x, y, number in self._rows(query)
    ]

  def unseen(self) -> Iterator[tuple[str, str, float]]:
    """Yield (path, class, confidence) of models without the file's label.

    The most confident ones come first.
    """
    query = 'SELECT path,class,confidence FROM unseen ORDER BY confidence DESC'
    yield from self._rows(query)
