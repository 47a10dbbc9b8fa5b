"""Features of a data set's images by a pretrained backbone, in an .npz file.

The file is a data set for `arrays.load_npz`: `train`, `train_labels`, `test`,
`test_labels` and `classes`; `train_files` and `test_files`, the images' names;
and `train_digests` and `test_digests`, hashes of the original images, equal for
near duplicates, which are kept together when images are held out.

Images are read, embedded and written in batches, so that memory does not grow
with their number. An interrupted call continues: the features lie in
OUT.partial, and OUT.partial.json names the backbone and the rows that are done.
"""

from collections.abc import Iterator
from concurrent import futures
import json
import os
import pathlib
from typing import Any
import zipfile

import numpy as np

from ssljax import files, progress
from ssljax.data import duplicates
from ssljax.data.backbones import Backbone
from ssljax.data.types import Dataset, Source
from ssljax.errors import InputError, require

BATCH = 32


def write(
  dataset: Dataset, backbone: Backbone, out: pathlib.Path, batch: int = BATCH
) -> dict[str, Any]:
  """Embed the images of a data set, and write them to an .npz file.

  Args:
    dataset: of images, each with shorter side `backbone.preprocessing.resized`.
    backbone: the network.
    out: the file.
    batch: images that are embedded at once.

  Returns:
    {'train': N, 'test': M, 'features': D}.

  Raises:
    InputError: the data set has no images, a feature is not finite, or the
      file cannot be written.
  """
  require(
    dataset.train.is_images,
    f'`dataset`={dataset.name}: holds features already; give images',
  )
  partial = out.with_name(f'{out.name}.partial')
  note = out.with_name(f'{out.name}.partial.json')
  sources = {'train': dataset.train, 'test': dataset.test}
  digests = {name: _digests(source) for name, source in sources.items()}
  key = _key(backbone, digests)
  try:
    width = _embed(sources, backbone, partial, note, key, batch)
    _finish(dataset, digests, partial, width, out)
    partial.unlink()
    note.unlink()
  except OSError as error:
    raise InputError(
      f'`out`={out}: cannot be written ({error.strerror}): give another file, '
      'or make room; the same command continues'
    ) from error
  counts = {name: len(source.labels) for name, source in sources.items()}
  return counts | {'features': width}


def _digests(source: Source) -> np.ndarray:
  """Return the hash of each image `[N]` uint64."""
  found = source.groups or source.digests
  return np.zeros(0, np.uint64) if found is None else found()


def _key(backbone: Backbone, digests: dict[str, np.ndarray]) -> str:
  """Return a text that is equal if features can be continued."""
  hashed = duplicates.fingerprint(digests['train'], digests['test'])
  return json.dumps([backbone.fingerprint, *backbone.preprocessing, hashed])


def _embed(sources, backbone, partial, note, key: str, batch: int) -> int:
  """Write the features of all rows to a file of floats; return D."""
  done, width = _begun(partial, note, key)
  total = sum(len(source.labels) for source in sources.values())
  bar = progress.progress(total, 'embedding', done)
  first = 0
  with bar, partial.open('r+b' if done else 'wb') as file:
    file.seek(0, os.SEEK_END)
    for source in sources.values():
      count = len(source.labels)
      starts = range(max(0, done - first), count, batch)
      for rows, images in _batches(source, starts, batch):
        features = backbone.apply(images)
        _refuse_infinite(features, source, rows)
        width = features.shape[1]
        file.write(np.ascontiguousarray(features, '<f4').tobytes())
        file.flush()
        now = {'key': key, 'rows': first + int(rows[-1]) + 1, 'width': width}
        _replace(note, json.dumps(now))
        bar.update(len(rows))
      first += count
    os.fsync(file.fileno())
  return width


def _batches(
  source: Source, starts: range, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yield rows and their images; the next ones are read in the meantime."""
  count = len(source.labels)
  parts = [np.arange(i, min(i + batch, count)) for i in starts]
  with futures.ThreadPoolExecutor(1) as pool:
    ahead = [pool.submit(source.read, rows) for rows in parts[:1]]
    for k, rows in enumerate(parts):
      if k + 1 < len(parts):
        ahead.append(pool.submit(source.read, parts[k + 1]))
      yield rows, ahead.pop(0).result()


def _replace(path: pathlib.Path, text: str) -> None:
  """Replace a small file, without waiting for the disk."""
  fresh = path.with_name(f'{path.name}.new')
  fresh.write_text(text, encoding='utf-8')
  os.replace(fresh, path)


def _begun(partial, note, key: str) -> tuple[int, int]:
  """Return the number of rows that are done, and D; cut off what follows."""
  try:
    state = json.loads(note.read_text(encoding='utf-8'))
    rows, width = int(state['rows']), int(state['width'])
    size = 4 * rows * width
    if state['key'] != key or partial.stat().st_size < size:
      return 0, 0
    os.truncate(partial, size)
    return rows, width
  except (OSError, ValueError, KeyError, TypeError):  # begin anew
    return 0, 0


def _refuse_infinite(features, source: Source, rows: np.ndarray) -> None:
  """Raise `InputError` for features that are NaN or infinite."""
  wrong = np.flatnonzero(~np.isfinite(features).all(axis=1))
  if not wrong.size:
    return
  row = rows[wrong[0]]
  name = f'row {row}' if source.names is None else source.names[row]
  raise InputError(
    f'`backbone`: its features of {name} are NaN or infinite; check `mean` and '
    '`std`, or give another backbone'
  )


def _finish(dataset: Dataset, digests, partial, width: int, out) -> None:
  """Write the .npz file of features, labels, names and hashes."""
  fresh = out.with_name(f'{out.name}.new')
  first = 0
  with zipfile.ZipFile(
    fresh, 'w', zipfile.ZIP_STORED, allowZip64=True
  ) as whole:

    def add(name: str, array: np.ndarray) -> None:
      with whole.open(f'{name}.npy', 'w', force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)

    for name, source in (('train', dataset.train), ('test', dataset.test)):
      count = len(source.labels)
      if not count:
        continue
      shape, offset = (count, width), 4 * first * width
      add(name, np.memmap(partial, '<f4', 'r', offset, shape))
      add(f'{name}_labels', source.labels)
      if source.names is not None:
        add(f'{name}_files', np.asarray(source.names, str))
      if len(digests[name]) == count:
        add(f'{name}_digests', digests[name])
      first += count
    if dataset.classes:
      add('classes', np.asarray(dataset.classes, str))
  with open(fresh, 'rb') as file:
    os.fsync(file.fileno())
  os.replace(fresh, out)
  files.sync_folder(out.parent)
