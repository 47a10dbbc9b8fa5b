"""Files that are read and written safely.

Only regular files are read and replaced: opening a FIFO would block, and a
device or a folder is no record of a run. A file is written as a whole or not
at all, also if the machine fails.

A path is a `pathlib.Path`, or a `buckets.BucketPath` with the same methods,
whose objects are regular files.
"""

import errno
import importlib.util
import os
import pathlib
import stat
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from ssljax.errors import InputError, require

if TYPE_CHECKING:
  from ssljax import buckets

BUCKET = 'gs://'


def in_bucket(path: Any) -> TypeGuard['buckets.BucketPath']:
  """Return True for a path in a bucket."""
  return os.fspath(path).startswith(BUCKET)


def is_regular(path: str | os.PathLike) -> bool:
  """Return True for a regular file, also behind a symbolic link."""
  if in_bucket(path):
    return path.is_file()
  try:
    return stat.S_ISREG(os.stat(path).st_mode)
  except OSError:
    return False


def as_path(name: str, text: str) -> pathlib.Path:
  """Return the path that a user gave, with `~` expanded.

  Args:
    name: of the parameter.
    text: its value.

  Raises:
    InputError: there is no such home folder, or the system cannot have such a
      path.
  """
  require(bool(text.strip()), f'`{name}`={text}: give a path')
  require(
    '://' not in text,
    f'`{name}`={text}: is no path on a disk: mount the bucket (gcsfuse), or '
    'copy it',
  )
  try:
    path = pathlib.Path(text).expanduser()
  except RuntimeError as error:
    raise InputError(
      f'`{name}`={text}: there is no such home folder: give the full path'
    ) from error
  try:
    path.stat()
  except (FileNotFoundError, NotADirectoryError):
    pass
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', error)
    raise InputError(
      f'`{name}`={text}: cannot be used ({reason}): give another path'
    ) from error
  return path


def as_place(name: str, text: str) -> pathlib.Path:
  """Return the path that a user gave, local or in a bucket.

  Args:
    name: of the parameter.
    text: its value.

  Raises:
    InputError: it cannot be used, see `as_path` and `buckets.as_bucket`.
  """
  if not in_bucket(text):
    return as_path(name, text)
  missing = importlib.util.find_spec('gcsfs') is None
  require(
    not missing,
    f"`{name}`={text}: buckets need gcsfs: pip install 'ssljax[bucket]', or "
    'mount the bucket (gcsfuse)',
  )
  from ssljax import buckets  # slow to import

  return buckets.as_bucket(name, text)


def as_folder(path: str | os.PathLike) -> pathlib.Path:
  """Return a path as an object; one in a bucket is an object already."""
  if in_bucket(path):
    return cast(pathlib.Path, path)  # it has the methods of one
  return pathlib.Path(path)


def absolute(path: str | os.PathLike) -> str:
  """Return an absolute path as text; one in a bucket is absolute."""
  return os.fspath(path) if in_bucket(path) else os.path.abspath(path)


def exists(path: str | os.PathLike) -> bool:
  """Return True if the name is taken, by a dangling link too."""
  if in_bucket(path):
    return path.exists()
  return os.path.lexists(path)


def read_text(path: pathlib.Path) -> str:
  """Return the content of a regular UTF-8 file.

  Raises:
    InputError: it is no regular file, or cannot be read.
  """
  if not is_regular(path):
    what = 'is no regular file' if exists(path) else 'does not exist'
    raise InputError(f'{path.name}: {what}')
  try:
    return path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or 'it is not UTF-8'
    raise InputError(f'{path.name}: cannot be read ({reason})') from error


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
  """Write a file as a whole or not at all, and wait until it is on disk.

  A symbolic link to a file is followed.

  Args:
    path: file to create or replace.
    content: text, or bytes.

  Raises:
    OSError: the name is taken by something that is not a regular file, or the
      file cannot be written.
  """
  data = content.encode() if isinstance(content, str) else content
  if in_bucket(path):
    path.write_bytes(data)
    return
  path = pathlib.Path(path)
  if exists(path) and not is_regular(path):
    raise OSError(errno.EEXIST, 'it is no regular file', str(path))
  path = pathlib.Path(os.path.realpath(path))
  partial = path.with_name(f'{path.name[:200]}.{os.getpid()}.partial')
  partial.unlink(missing_ok=True)
  try:
    with open(partial, 'xb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise
  sync_folder(path.parent)


def move(source: pathlib.Path, target: pathlib.Path) -> None:
  """Move a file or folder; in a bucket, an interrupted move can be repeated.

  Args:
    source: what is moved.
    target: in the same file system or bucket; a file there is replaced.
  """
  if in_bucket(source):
    source.rename(target)
  else:
    os.replace(source, target)


def sync_folder(folder: str | os.PathLike) -> None:
  """Wait until the names in a folder are on disk, where that is supported."""
  if in_bucket(folder):
    return
  try:
    descriptor = os.open(folder, os.O_RDONLY)
  except OSError:
    return
  try:
    os.fsync(descriptor)
  except OSError:
    pass  # some network file systems cannot
  finally:
    os.close(descriptor)


def user_cache() -> pathlib.Path:
  """Return the folder for files of the user that can be made again."""
  given = os.environ.get('XDG_CACHE_HOME', '')
  if os.path.isabs(given):  # others are to be ignored
    return pathlib.Path(given) / 'ssljax'
  return pathlib.Path(os.path.expanduser('~')) / '.cache' / 'ssljax'


def folder_problem(folder: pathlib.Path) -> str | None:
  """Make a folder; return why nothing can be written to it, or None."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    return error.strerror or str(error)
  if not os.access(folder, os.W_OK | os.X_OK):
    return os.strerror(errno.EACCES)
  return None
