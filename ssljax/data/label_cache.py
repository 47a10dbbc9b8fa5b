"""Labels of data sets that are kept on disk, so that a start reads no record.

The labels and digests of a split in the TFDS layout are known only when all of
its records have been read. They are kept in a file beside the data, or where
that is not writable in the user's cache folder, with a fingerprint of the files
of the split: their names, sizes and times, and the records that are taken of
each. Where the fingerprint differs, the file is written anew.
"""

from collections.abc import Callable, Iterator
import hashlib
import io
import json
import logging
import os
import pathlib
import re
import zipfile

import numpy as np

from ssljax import files
from ssljax.distributed import multihost

_LOG = logging.getLogger(__name__)
_FORMAT = 1

Columns = tuple[np.ndarray, np.ndarray]  # labels [N] int64, digests [N] uint64


def cached(builder, split: str, count: int, read: Callable[[], Columns]):
  """Return labels and digests of a split, read or from the cache.

  All processes of a run call this at the same time.

  Args:
    builder: TFDS builder of the data set.
    split: in TFDS split notation.
    count: N.
    read: reads all records.

  Returns:
    Labels `[N]` int64 and digests `[N]` uint64.
  """
  mark = fingerprint(builder, split)
  found: Columns | None = None
  places: list[pathlib.Path] = []
  if mark is not None:
    places = list(_places(builder, split))
    found = next(filter(None, (_load(p, mark, count) for p in places)), None)
  if multihost.all_true(found is not None) and found is not None:
    return found
  found = read()
  if mark is not None and places:
    _keep(places, mark, found)
  return found


def fingerprint(builder, split: str) -> str | None:
  """Return a hash of the files of a split, None if they cannot be looked at."""
  pieces, seen = [], {}
  try:
    for piece in builder.info.splits[split].file_instructions:
      path = str(piece.filename)
      if path not in seen:
        found = os.stat(path)
        seen[path] = [os.path.basename(path), found.st_size, found.st_mtime_ns]
      pieces.append([*seen[path], piece.skip, piece.take])
  except OSError:  # of another file system
    return None
  text = json.dumps([_FORMAT, builder.info.full_name, pieces])
  return hashlib.sha256(text.encode()).hexdigest()


def _places(builder, split: str) -> Iterator[pathlib.Path]:
  """Yield the files in which labels may be kept."""
  plain = re.sub(r'\W+', '_', split).strip('_')[:40]
  name = f'labels-{plain}-{hashlib.sha256(split.encode()).hexdigest()[:8]}.npz'
  folder = os.path.realpath(builder.data_dir)
  yield pathlib.Path(folder) / f'ssljax-{name}'
  own = hashlib.sha256(folder.encode()).hexdigest()[:16]
  yield files.user_cache() / 'labels' / own / name


def _load(path: pathlib.Path, mark: str, count: int) -> Columns | None:
  """Return what a file holds, None if it is of other files or damaged."""
  if not files.is_regular(path):
    return None
  try:
    with np.load(path, allow_pickle=False) as held:
      same = str(held['fingerprint']) == mark
      labels, digests = held['labels'], held['digests']
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None
  same &= labels.shape == digests.shape == (count,)
  same &= labels.dtype == np.int64 and digests.dtype == np.uint64
  return (labels, digests) if same else None


def _keep(places: list[pathlib.Path], mark: str, found: Columns) -> None:
  """Write to the first place that can be written to, or warn."""
  file = io.BytesIO()
  labels, digests = found
  np.savez(file, fingerprint=np.array(mark), labels=labels, digests=digests)
  for place in places:
    reason = files.folder_problem(place.parent)
    try:
      if reason is None:
        files.write_atomically(place, file.getvalue())
        return
    except OSError as error:
      reason = error.strerror or str(error)
  _LOG.warning(
    'the labels are not kept for the next start: neither %s nor %s can be '
    'written (%s): set XDG_CACHE_HOME to a folder that can',
    *(place.parent for place in places),
    reason,
  )
