"""Folders in buckets of Google Cloud Storage: gs://BUCKET/FOLDER.

Orbax and TFDS read and write them by themselves, through TensorStore, `gcsfs`
and array_record. `BucketPath` is for the small files of a run, which need more
than `gcsfs` has: conditional writes, and errors where `exists` of fsspec
returns False, so that a run whose token has expired does not look absent.

An object is written as a whole or not at all, and cannot be appended to. A file
that grows is a folder of parts, `GrowingFile`, and is read as one file.

Imported only when a path begins with gs://.
"""

from collections.abc import Iterator
import contextlib
import errno
import functools
import os
import pathlib
import re
import threading
from typing import Any

# Else gcsfs asks for the type of every bucket, which needs one more permission.
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')

from etils.epath import gpath
from google.api_core import exceptions
from google.api_core import retry as retries
import google.auth.exceptions
from google.cloud import storage
import requests.exceptions

from ssljax.errors import InputError, require

RETRY_SECONDS = 60.0  # a failing request is repeated for so long
GROWS = '.jsonl'  # suffix of files that are folders of parts
MOST_PARTS = 64
_CREDENTIALS = google.auth.exceptions.GoogleAuthError
_NETWORK = requests.exceptions.RequestException
_ERRORS = (
  *(exceptions.GoogleAPICallError, exceptions.RetryError),
  *(_CREDENTIALS, _NETWORK),
)
_PERMISSION = (exceptions.Unauthorized, exceptions.Forbidden, _CREDENTIALS)
_TRANSIENT = (401, 408, 429, 500, 502, 503, 504)
_PART = re.compile(r'(\d{6})-(\d{12})')
_of_thread = threading.local()
_impatient = threading.Event()  # until a request succeeds


def _is_transient(error: BaseException) -> bool:
  """Return True for an error that may pass.

  A new token may be on its way, so those of credentials may.
  """
  response = getattr(error, 'response', None)
  status = getattr(response, 'status_code', getattr(error, 'code', None))
  if status is None:
    return isinstance(error, (_NETWORK, _CREDENTIALS))
  return status in _TRANSIENT


def _how() -> dict[str, Any]:
  """Return the arguments of every request: how long it is repeated."""
  # One request waits for the end of an outage, the next ones do not.
  seconds = 1.0 if _impatient.is_set() else RETRY_SECONDS
  return {'retry': retries.Retry(_is_transient, timeout=seconds)}


def _client() -> storage.Client:
  """Return this thread's client: its connection is not for several."""
  if not hasattr(_of_thread, 'client'):
    _of_thread.client = storage.Client()
  return _of_thread.client


def reason(error: BaseException) -> str:
  """Return what went wrong in a few words, from an error of any library."""
  if isinstance(error, exceptions.RetryError) and error.cause is not None:
    return reason(error.cause)
  text = (getattr(error, 'message', None) or str(error)).strip()
  said = re.search(r'"message": "([^"]+)"', text)  # of an upload: JSON
  text = said[1] if said else re.sub(r'^[A-Z]+ https?://\S+: ', '', text)
  text = (text.split('\n')[0] or type(error).__name__)[:200]
  if isinstance(error, exceptions.NotFound):
    return f'it does not exist: {text}'
  if isinstance(error, _PERMISSION):
    return f'no permission, or no valid credentials: {text}'
  return text


@contextlib.contextmanager
def _os_errors(path: os.PathLike) -> Iterator[None]:
  """Turn an error of Google's client into an `OSError` about a path."""
  try:
    yield
    _impatient.clear()
  except _ERRORS as error:
    cause = getattr(error, 'cause', None) or error
    if _is_transient(cause):
      _impatient.set()
    number = errno.EACCES if isinstance(cause, _PERMISSION) else errno.EIO
    number = errno.ENOENT if isinstance(cause, exceptions.NotFound) else number
    raise OSError(number, reason(error), os.fspath(path)) from error


class BucketPath(gpath.PosixGPath):
  """A file or folder in a bucket, with the methods of `pathlib.Path`.

  A folder is there if a file is in it. All methods that use the bucket repeat
  failing requests for `RETRY_SECONDS`, and then raise an `OSError` with the
  path.
  """

  @property
  def _place(self) -> tuple[storage.Bucket, str]:
    """The bucket, and the name of the object in it."""
    name, _, key = os.fspath(self)[len('gs://') :].partition('/')
    return _client().bucket(name), key

  @property
  def _blob(self) -> storage.Blob:
    bucket, key = self._place
    return bucket.blob(key)

  def _list(self, **more):
    """Return the iterator of the objects in this folder."""
    bucket, key = self._place
    prefix = f'{key}/' if key else ''
    return _client().list_blobs(bucket, prefix=prefix, **more, **_how())

  def is_file(self) -> bool:
    """Return True for an object, and for a file of parts."""
    with _os_errors(self):
      if self._blob.exists(**_how()):
        return True
      return self.suffix == GROWS and bool(self.parts_of_file())

  def is_dir(self) -> bool:
    """Return True if anything is in this folder."""
    with _os_errors(self):
      return any(True for _ in self._list(max_results=1))

  def exists(self) -> bool:
    """Return True for a file and a folder."""
    return self.is_file() or self.is_dir()

  def iterdir(self) -> Iterator['BucketPath']:
    """Yield the files and folders in this folder."""
    with _os_errors(self):
      found = self._list(delimiter='/')
      names = [pathlib.PurePosixPath(blob.name).name for blob in found]
      names += [pathlib.PurePosixPath(p).name for p in found.prefixes]
    yield from (self / name for name in dict.fromkeys(names))

  def read_bytes(self) -> bytes:
    """Return the content, joined if the file is one of parts."""
    with _os_errors(self):
      parts = self.parts_of_file() if self.suffix == GROWS else []
      blobs = [(self / part)._blob for part in parts] or [self._blob]
      return b''.join(blob.download_as_bytes(**_how()) for blob in blobs)

  def read_text(self, encoding: str | None = 'utf-8') -> str:
    """Return the content as text."""
    return self.read_bytes().decode(encoding or 'utf-8')

  def write_bytes(self, data: bytes) -> int:
    """Write the file as a whole or not at all."""
    with _os_errors(self):
      self._blob.upload_from_string(data, **_how())
    return len(data)

  def write_text(self, data: str, encoding: str | None = 'utf-8', **_) -> int:
    """Write the file as a whole or not at all."""
    return self.write_bytes(data.encode(encoding or 'utf-8'))

  def write_if(self, data: bytes, generation: int) -> int:
    """Write the file if its generation is the given one; 0: if it is absent.

    Returns:
      The new generation.

    Raises:
      FileExistsError: another process has written it.
    """
    with _os_errors(self):
      blob = self._blob
      try:
        blob.upload_from_string(data, if_generation_match=generation, **_how())
      except exceptions.PreconditionFailed as error:
        found = self.read_with_generation()
        # The answer to a request that succeeded may have been lost.
        if found and found[0] == data:
          return found[1]
        text = os.strerror(errno.EEXIST)
        raise FileExistsError(errno.EEXIST, text, os.fspath(self)) from error
      return blob.generation

  def read_with_generation(self) -> tuple[bytes, int, float] | None:
    """Return content, generation and time of the last write; None if absent.

    The time is the server's, in seconds.
    """
    bucket, key = self._place
    with _os_errors(self):
      blob = bucket.get_blob(key, **_how())
      if blob is None:
        return None
      generation, written = blob.generation, blob.updated.timestamp()
      try:
        data = blob.download_as_bytes(if_generation_match=generation, **_how())
      except (exceptions.NotFound, exceptions.PreconditionFailed):
        return self.read_with_generation()  # written or removed meanwhile
      return data, generation, written

  def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
    """Write an empty file."""
    del mode, exist_ok
    self.write_bytes(b'')

  def unlink(self, missing_ok: bool = False, generation: int | None = None):
    """Remove the file, if it has the given generation."""
    with _os_errors(self):
      try:
        self._blob.delete(if_generation_match=generation, **_how())
      except (exceptions.NotFound, exceptions.PreconditionFailed):
        if not missing_ok:
          raise

  def mkdir(self, *args, **kwargs) -> None:
    """Do nothing: a folder is there once a file is in it."""

  def rmdir(self) -> None:
    """Do nothing: an empty folder is not there."""

  def rmtree(self, missing_ok: bool = False) -> None:
    """Remove everything in the folder."""
    with _os_errors(self):
      for blob in list(self._list()):
        with contextlib.suppress(exceptions.NotFound):
          blob.delete(**_how())

  def rename(self, target: os.PathLike) -> 'BucketPath':
    """Move the file, or all of the folder, copying it; not at one moment."""
    (bucket, key), (_, new) = self._place, type(self)(target)._place
    with _os_errors(self):
      file = bucket.get_blob(key, **_how())
      for blob in [*([file] if file else []), *self._list()]:
        name = new + blob.name[len(key) :]
        bucket.copy_blob(blob, bucket, name, **_how())
        blob.delete(**_how())
    return type(self)(target)

  def absolute(self) -> 'BucketPath':
    """Return the path itself."""
    return self

  def parts_of_file(self) -> list[str]:
    """Return the names of the parts of the newest revision, in their order."""
    names = [pathlib.PurePosixPath(blob.name).name for blob in self._list()]
    found = sorted(name for name in names if _PART.fullmatch(name))
    newest = found[-1].split('-')[0] if found else ''
    return [name for name in found if name.startswith(f'{newest}-')]


class GrowingFile:
  """A file in a bucket that is appended to: parts, which are joined on reading.

  A part is called REVISION-START: its first byte is number START of the file. A
  file that does not only grow gets a new revision, whose first part is all of
  it, so that the newest revision is whole at every moment.
  """

  def __init__(self, path: BucketPath):
    """Look which parts there are."""
    self._path, self.length = path, 0
    with _os_errors(path):
      parts = path.parts_of_file()
    self._revision = int(parts[-1].split('-')[0]) if parts else 0
    self._starts = [int(part.split('-')[1]) for part in parts]
    if parts:
      self.length = len(path.read_bytes())

  def update(self, local: pathlib.Path) -> None:
    """Write what a local copy of the file has more."""
    with open(local, 'rb') as file:
      if len(self._starts) >= MOST_PARTS:
        return self.replace(file.read())
      file.seek(self.length)
      more = file.read()
    if more:
      self._write(self.length, more)

  def _write(self, start: int, data: bytes) -> None:
    name = f'{self._revision:06d}-{start:012d}'
    (self._path / name).write_bytes(data)
    self._starts.append(start)
    self.length = start + len(data)

  def replace(self, data: bytes) -> None:
    """Write another content, as a new revision."""
    before = [p for p in self._path.iterdir() if _PART.fullmatch(p.name)]
    self._revision, self._starts = self._revision + 1, []
    self._write(0, data)
    for part in before:
      part.unlink(missing_ok=True)

  def truncate(self, local: pathlib.Path, length: int) -> None:
    """Remove everything past the first `length` bytes of a local copy."""
    if length >= self.length:
      return
    with open(local, 'rb') as file:
      self.replace(file.read(length))


def as_bucket(name: str, text: str) -> BucketPath:
  """Return the path that a user gave, whose bucket exists and can be read.

  Args:
    name: of the parameter.
    text: its value, gs://BUCKET/FOLDER.

  Raises:
    InputError: the bucket does not exist, or cannot be used.
  """
  return _as_bucket(name, text)


@functools.cache  # a start asks several times
def _as_bucket(name: str, text: str) -> BucketPath:
  path = BucketPath(text.rstrip('/'))
  require(
    re.fullmatch(r'gs://[a-z0-9][a-z0-9._-]+(/[^/\s]+)+', os.fspath(path))
    is not None,
    f'`{name}`={text}: is no folder in a bucket: give gs://BUCKET/FOLDER',
  )
  bucket = os.fspath(path).split('/')[2]
  _impatient.set()  # what fails at the start will fail in a minute, too
  try:
    path.is_dir()
  except FileNotFoundError as error:
    raise InputError(
      f'`{name}`={text}: the bucket {bucket} does not exist: create it, or '
      'give another one'
    ) from error
  except OSError as error:  # also of a client without a project
    raise InputError(
      f'`{name}`={text}: the bucket {bucket} cannot be used '
      f'({error.strerror or error}): log in (gcloud auth application-default '
      'login), set GOOGLE_CLOUD_PROJECT, or give this account the roles of '
      'docs/pods.md'
    ) from error
  return path
