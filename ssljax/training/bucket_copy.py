"""The files of a run that grow, in a bucket: metrics and TensorBoard's events.

They are written to a folder of this machine, as those of a local run, and the
bucket gets what is new whenever they are flushed, that is at every checkpoint.
"""

import hashlib
import os
import pathlib
import shutil
import tempfile
from typing import Any

_EVENTS = 'events'


def scratch_folder(folder: Any) -> pathlib.Path:
  """Return the local folder for a run in a bucket, made if absent.

  It is the same one whenever the run goes on on this machine, if possible.
  """
  caches = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  digest = hashlib.sha256(os.fspath(folder).encode()).hexdigest()[:16]
  root = pathlib.Path(caches).expanduser() / 'ssljax' / 'runs'
  scratch = root / digest / folder.name
  try:
    scratch.mkdir(parents=True, exist_ok=True)
  except OSError:  # a home that is read-only, or none
    return pathlib.Path(tempfile.mkdtemp(prefix='ssljax-'))
  return scratch


class BucketCopy:
  """Copies metrics and events of a run to its folder in a bucket."""

  def __init__(self, folder, name: str):
    """Fetch the metrics.

    Args:
      folder: of the run, a `buckets.BucketPath`.
      name: of the file of metrics.
    """
    from ssljax import buckets  # slow to import

    self.folder, self._remote = scratch_folder(folder), folder
    self._path = self.folder / name
    self._sizes: dict[pathlib.Path, int] = {}
    shutil.rmtree(self.folder / _EVENTS, ignore_errors=True)  # of before
    is_there = (folder / name).is_file()
    self._path.write_bytes((folder / name).read_bytes() if is_there else b'')
    self._file = buckets.GrowingFile(folder / name)

  def flush(self) -> None:
    """Copy what is new."""
    self._file.update(self._path)
    for path in sorted(self.folder.glob(f'{_EVENTS}/**/*')):
      if path.is_file() and self._sizes.get(path) != path.stat().st_size:
        data = path.read_bytes()
        (self._remote / path.relative_to(self.folder)).write_bytes(data)
        self._sizes[path] = len(data)

  def truncate(self, length: int) -> None:
    """Remove everything past the first `length` bytes of the metrics."""
    self._file.truncate(self._path, length)

  def replace(self) -> None:
    """Write all metrics again."""
    self._file.replace(self._path.read_bytes())


class NoCopy:
  """Copies nothing: the files of a local run are in place already."""

  def __init__(self, folder: pathlib.Path):
    """Take the run's folder."""
    self.folder = folder

  def flush(self) -> None:
    """Do nothing."""

  def truncate(self, length: int) -> None:
    """Do nothing."""

  def replace(self) -> None:
    """Do nothing."""
