"""The image files of a folder: an index on disk, their bytes, thumbnails.

The index is an SQLite file, so that 200,000 files need no more memory than 20.
A file keeps its number for as long as it is there, also when the program starts
again. Only files of the index are served, by number, and no symbolic link is
followed: nothing outside the folder can be read.
"""

from collections.abc import Iterator
import contextlib
import io
import os
import pathlib
import sqlite3
import stat
import threading
import time
from typing import NamedTuple

from ssljax.errors import InputError, require

INDEX = 'index.sqlite'
MAX_BYTES = 2**28  # of a file
THUMB, FULL = 192, 4096  # longest sides in pixels
_SMALL = 20_000  # bytes of a file that is its own thumbnail
_BATCH = 1000  # files of a transaction
_SYSTEM = ('__macosx', '@eadir', '$recycle.bin', 'thumbs.db', 'desktop.ini')
# First bytes of the formats that browsers show, and their type.
_NATIVE = (
  (b'\xff\xd8\xff', 'image/jpeg'),
  (b'\x89PNG\r\n\x1a\n', 'image/png'),
  (b'GIF8', 'image/gif'),
  (b'BM', 'image/bmp'),
)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS file(
  id INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT UNIQUE NOT NULL,
  stamp TEXT NOT NULL, scan INTEGER NOT NULL);
"""


class MissingError(Exception):
  """A file is not there any more, or cannot be read."""


class Entry(NamedTuple):
  """A file of the index."""

  id: int
  path: str  # relative to the folder, with '/'
  stamp: str  # size and time of the last change


class Picture(NamedTuple):
  """An image as it is sent to the browser."""

  content: bytes
  kind: str  # media type


def _connect(path: pathlib.Path) -> sqlite3.Connection:
  connection = sqlite3.connect(path, timeout=30, isolation_level=None)
  connection.execute('PRAGMA journal_mode=WAL')
  connection.execute('PRAGMA synchronous=OFF')  # it can be made again
  return connection


class Index:
  """The numbers and paths of the files; any number of processes may read."""

  def __init__(self, path: pathlib.Path):
    """Open or make the index."""
    self._path, self._local = path, threading.local()
    try:
      self._connection.executescript(_SCHEMA)
    except sqlite3.DatabaseError as error:
      raise InputError(
        f'`store`={path.parent}: {path.name} is damaged ({error}): remove it, '
        'it is made again'
      ) from error

  @property
  def _connection(self) -> sqlite3.Connection:
    found = getattr(self._local, 'connection', None)
    if found is None:
      found = self._local.connection = _connect(self._path)
    return found

  def _one(self, query: str, *values) -> Entry | None:
    row = self._connection.execute(query, values).fetchone()
    return None if row is None else Entry(*row)

  def entry(self, number: int) -> Entry | None:
    """Return the file with a number."""
    return self._one('SELECT id,path,stamp FROM file WHERE id=?', number)

  def find(self, path: str) -> Entry | None:
    """Return the file with a path."""
    if not _is_text(path):
      return None
    return self._one('SELECT id,path,stamp FROM file WHERE path=?', path)

  def ending(self, name: str) -> list[str]:
    """Return at most two paths whose last part is a name."""
    query = (
      'SELECT path FROM file WHERE path=? OR path LIKE ? ESCAPE "~" LIMIT 2'
    )
    escaped = name.replace('~', '~~').replace('%', '~%').replace('_', '~_')
    found = self._connection.execute(query, (name, f'%/{escaped}'))
    return [path for (path,) in found]

  def count(self) -> int:
    """Return the number of files."""
    return self._connection.execute('SELECT COUNT(*) FROM file').fetchone()[0]

  def largest(self) -> int:
    """Return the largest number of a file; 0 if there are none."""
    query = 'SELECT COALESCE(MAX(id),0) FROM file'
    return self._connection.execute(query).fetchone()[0]

  def after(self, number: int, count: int) -> list[Entry]:
    """Return the next files after a number."""
    query = 'SELECT id,path,stamp FROM file WHERE id>? ORDER BY id LIMIT ?'
    found = self._connection.execute(query, (number, count))
    return [Entry(*row) for row in found]

  def write(self, entries: list[tuple[str, str]], scan: int) -> None:
    """Add or update files by (path, stamp)."""
    with self._transaction() as connection:
      # An upsert would use up a number for each file that is there already.
      for path, stamp in entries:
        found = connection.execute(
          'UPDATE file SET stamp=?, scan=? WHERE path=?', (stamp, scan, path)
        )
        if not found.rowcount:
          connection.execute(
            'INSERT INTO file(path,stamp,scan) VALUES(?,?,?)',
            (path, stamp, scan),
          )

  def remove_older(self, scan: int) -> None:
    """Remove the files that a complete scan has not found."""
    with self._transaction() as connection:
      connection.execute('DELETE FROM file WHERE scan<>?', (scan,))

  @contextlib.contextmanager
  def _transaction(self) -> Iterator[sqlite3.Connection]:
    connection = self._connection
    connection.execute('BEGIN IMMEDIATE')
    try:
      yield connection
    except BaseException:
      connection.execute('ROLLBACK')
      raise
    connection.execute('COMMIT')


class Images:
  """The images of a folder.

  Attributes:
    index: of the files.
    complete: True once the whole folder has been scanned.
    links: symbolic links that were left out.
  """

  def __init__(self, root: str | os.PathLike, store: pathlib.Path):
    """Open the index of a folder; `scan` fills it.

    Raises:
      InputError: it is no folder.
    """
    self.root = pathlib.Path(os.path.realpath(root))
    require(
      self.root.is_dir(),
      f'`images`={root}: is no folder: give a folder of images',
    )
    self._thumbs = store / 'thumbs'
    self.index = Index(store / INDEX)
    self.complete, self.links, self.problem = False, 0, ''
    self.seconds = 0.0  # of the last scan
    self._stop = threading.Event()

  # The index.

  def scan(self) -> None:
    """Bring the index up to date with the folder."""
    import PIL.Image  # slow to import

    PIL.Image.init()
    known = {e for e, f in PIL.Image.EXTENSION.items() if f in PIL.Image.OPEN}
    began, scan, links, batch = time.monotonic(), time.time_ns(), 0, []
    for entry in _walk(self.root):
      if self._stop.is_set():
        return
      if entry is None:
        links += 1
        continue
      if os.path.splitext(entry.name)[1].lower() not in known:
        continue
      try:
        status = entry.stat(follow_symlinks=False)
      except OSError:
        continue  # removed meanwhile
      path = os.path.relpath(entry.path, self.root).replace(os.sep, '/')
      if not _is_text(path) or not stat.S_ISREG(status.st_mode):
        continue
      batch.append((path, _stamp(status)))
      # The first images are there at once.
      if len(batch) >= (_BATCH if self.complete or self.seconds else 50):
        self.index.write(batch, scan)
        self.seconds = time.monotonic() - began
        batch = []
    self.index.write(batch, scan)
    self.index.remove_older(scan)
    self.links, self.complete = links, True
    self.seconds = time.monotonic() - began

  def watch(self) -> None:
    """Scan now, and again while the program runs, in a thread."""

    def run():
      while True:
        try:
          self.scan()
          self.problem = ''
        except (OSError, sqlite3.Error) as error:  # e.g. a full disk
          self.problem = f'the folder cannot be indexed ({error})'
        # At most 2 % of the time.
        if self._stop.wait(max(20.0, 50 * self.seconds)):
          return

    threading.Thread(target=run, daemon=True).start()

  def close(self) -> None:
    """End the thread of `watch`."""
    self._stop.set()

  # Content.

  def stamp(self, path: str) -> str:
    """Return the stamp of a file as it is now; '' if it is gone."""
    try:
      return _stamp(os.stat(self.root / path, follow_symlinks=False))
    except (OSError, ValueError):
      return ''

  def read(self, path: str) -> bytes:
    """Return the bytes of a file.

    Raises:
      MissingError: it is gone, is reached by a link, or is too large.
    """
    return read(self.root, path)

  def original(self, entry: Entry) -> Picture:
    """Return an image in its own size, if browsers show the format.

    Raises:
      MissingError: the file cannot be read.
      ValueError: it cannot be decoded.
    """
    content = self.read(entry.path)
    kind = media_type(content)
    return Picture(content, kind) if kind else _encoded(content, FULL)

  def thumbnail(self, entry: Entry) -> Picture:
    """Return a small image; raise as `original`."""
    folder = self._thumbs / str(entry.id // 1000)
    cached = folder / f'{entry.id}-{entry.stamp}'
    with contextlib.suppress(OSError):
      content = cached.read_bytes()
      if kind := media_type(content):  # else it was cut by a kill
        return Picture(content, kind)
    content = self.read(entry.path)
    kind = media_type(content)
    if kind and len(content) <= _SMALL:
      _decoded(content, THUMB)  # raises if it cannot be shown
      return Picture(content, kind)
    made = _encoded(content, THUMB)
    with contextlib.suppress(OSError):  # A full disk only makes it slower.
      folder.mkdir(parents=True, exist_ok=True)
      partial = folder / f'{entry.id}.{threading.get_ident()}.partial'
      partial.write_bytes(made.content)
      os.replace(partial, cached)
    return made


def _walk(root: pathlib.Path) -> Iterator[os.DirEntry | None]:
  """Yield the files of a folder; None for a symbolic link."""
  folders = [str(root)]
  while folders:
    try:
      found = os.scandir(folders.pop())
    except OSError:
      continue  # removed meanwhile, or not readable
    with found:
      for entry in found:
        if entry.name.startswith('.') or entry.name.lower() in _SYSTEM:
          continue
        if entry.is_symlink():
          yield None
        elif entry.is_dir(follow_symlinks=False):
          folders.append(entry.path)
        else:
          yield entry


def _is_text(path: str) -> bool:
  """Return True for a name that is UTF-8."""
  try:
    path.encode()
  except UnicodeEncodeError:
    return False
  return True


def _stamp(status: os.stat_result) -> str:
  return f'{status.st_size:x}-{status.st_mtime_ns:x}'


def read(root: pathlib.Path, path: str) -> bytes:
  """Return the bytes of a file below a folder; no link is followed.

  Raises:
    MissingError: it is gone, no regular file, behind a link, or too large.
  """
  parts = path.split('/')
  if not path or any(part in ('', '.', '..') for part in parts):
    raise MissingError('it is not in the folder')
  no_link = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
  try:
    where = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
      for part in parts[:-1]:
        inside = os.open(part, no_link | os.O_DIRECTORY, dir_fd=where)
        os.close(where)
        where = inside
      file = os.open(parts[-1], no_link, dir_fd=where)
    finally:
      os.close(where)
    with os.fdopen(file, 'rb') as opened:
      status = os.fstat(file)
      if not stat.S_ISREG(status.st_mode):
        raise MissingError('it is no regular file')
      if status.st_size > MAX_BYTES:
        raise MissingError(f'it has more than {MAX_BYTES // 2**20} MiB')
      return opened.read()
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or str(error)
    raise MissingError(f'it cannot be read ({reason})') from error


def media_type(content: bytes) -> str:
  """Return the type of an image that browsers show, '' for other formats."""
  for first, kind in _NATIVE:
    if content.startswith(first):
      return kind
  is_webp = content[:4] == b'RIFF' and content[8:12] == b'WEBP'
  return 'image/webp' if is_webp else ''


def _decoded(content: bytes, side: int):
  """Return the decoded image; raise `ValueError` with the reason."""
  import PIL

  from ssljax.data import decode  # slow to import

  try:
    return decode.shrink(content, side)
  except PIL.UnidentifiedImageError as error:
    raise ValueError('no image that Pillow can read') from error
  except Exception as error:  # codecs raise many kinds
    text = ' '.join(str(error).split())[:200]
    raise ValueError(text or type(error).__name__) from error


def _encoded(content: bytes, side: int) -> Picture:
  image, file = _decoded(content, side), io.BytesIO()
  if max(image.size) <= 64 or image.mode not in ('L', 'RGB'):
    image.save(file, 'PNG')
    return Picture(file.getvalue(), 'image/png')
  image.save(file, 'JPEG', quality=85)
  return Picture(file.getvalue(), 'image/jpeg')
