"""The rows of a split in the TFDS layout: records, labels and images.

A record is a serialized example. Letters: N rows of a split, B rows of one
read, H x W x c the size of an image.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import logging
import os
import threading
from typing import Any, NamedTuple

import numpy as np

from ssljax import progress
from ssljax.core import UNLABELLED
from ssljax.data import decode, duplicates, label_cache, tfds_reader
from ssljax.data.tfds_reader import few, listed, one_line
from ssljax.distributed import multihost, watchdog
from ssljax.errors import InputError, require

_LOG = logging.getLogger(__name__)
_CHUNK = 512  # rows that a thread reads at once, at most
_SHARES = 4  # slices for each thread, at least
_CHUNK_BYTES = 2**28  # of pixels that a thread reads at once, if several rows
_SHOWN = 10  # undecodable images that a message lists
_OPEN = 32  # files that are looked into at the same time


class SplitName(NamedTuple):
  """A split as the user named it, for messages."""

  dataset: str
  parameter: str  # 'train_split' or 'test_split'
  name: str  # in TFDS split notation


def split_size(split: SplitName, builder) -> int:
  """Return the number of images of a split, at least 1.

  Args:
    split: its names.
    builder: the TFDS builder of the data set.

  Raises:
    InputError: there is no such split, or it is empty.
  """
  known = builder.info.splits
  try:
    count = known[split.name].num_examples
  except (KeyError, ValueError, AssertionError) as error:
    raise InputError(
      f'`{split.parameter}`={split.name}: no such split in '
      f'`dataset`={split.dataset}; give one of {listed(known)}'
    ) from error
  require(
    count > 0,
    f'`{split.parameter}`={split.name}: no images in this split of '
    f'`dataset`={split.dataset}; give another of {listed(known)}, or prepare '
    'the data set again',
  )
  return count


# Overlap.


def refuse_overlap(builder, train: SplitName, test: SplitName) -> None:
  """Raise `InputError` if two splits have common rows."""
  held: dict[Any, Any] = {}
  for file, *piece in _pieces(builder, test):
    held.setdefault(file, []).append(piece)
  common = sum(
    max(0, min(end, other_end) - max(start, other_start))
    for file, start, end in _pieces(builder, train)
    for other_start, other_end in held.get(file, ())
  )
  require(
    not common,
    f'`train_split`={train.name}, `test_split`={test.name}: {common} images of '
    f'`dataset`={train.dataset} are in both and would be trained on; give '
    'splits without common images, such as train[:90%] and train[90%:]',
  )


def _refuse_repeats(builder, split: SplitName) -> None:
  """Raise `InputError` if a split has a row more than once."""
  pieces, twice, last = sorted(_pieces(builder, split)), 0, ('', 0)
  for file, start, end in pieces:
    covered = last[1] if file == last[0] else 0
    twice += max(0, min(end, covered) - start)
    last = file, max(end, covered)
  require(
    not twice,
    f'`{split.parameter}`={split.name}: has {twice} images of '
    f'`dataset`={split.dataset} more than once; name no part twice',
  )


def _pieces(builder, split: SplitName) -> list[tuple[str, int, int]]:
  """Return the file, first record and end of every piece of a split."""
  split_size(split, builder)
  return [
    (piece.filename, piece.skip, piece.skip + piece.take)
    for piece in builder.info.splits[split.name].file_instructions
  ]


# Records and labels.


def open_records(split: SplitName, builder):
  """Return the records of a split: len(), __getitems__(rows).

  Raises:
    InputError: the split has a row twice, is not stored by row, or its files do
      not have the lengths that dataset_info.json says.
  """
  import tensorflow_datasets as tfds

  _refuse_repeats(builder, split)
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  try:
    records = builder.as_data_source(split.name, deserialize_method=raw)
  except NotImplementedError as error:
    raise InputError(
      f'`dataset`={split.dataset}: it was prepared as '
      f'{builder.info.file_format.value}, which cannot be read by row; convert '
      "it to array_record: pip install 'ssljax[prepare]' and tfds "
      f'convert_format --dataset_version_dir={builder.data_dir} '
      '--out_file_format=array_record'
    ) from error
  _check_lengths(split, builder)
  return records


def _check_lengths(split: SplitName, builder) -> None:
  """Raise `InputError` if a file has another length than is said of it.

  TFDS reads as many records as dataset_info.json says, even if a file has more.
  """
  from array_record.python import array_record_module

  if builder.info.file_format.value != 'array_record':
    return
  pieces = builder.info.splits[split.name].file_instructions
  said = {piece.filename: piece.examples_in_shard for piece in pieces}

  def length(file: str) -> int:
    reader = array_record_module.ArrayRecordReader(file)
    try:
      return reader.num_records()
    finally:
      reader.close()

  with _damage(split), futures.ThreadPoolExecutor(_OPEN) as pool:
    for file, found in zip(said, pool.map(length, said), strict=True):
      if found != said[file]:
        raise ValueError(
          f'{os.path.basename(file)} has {found} records, dataset_info.json '
          f'says {said[file]}'
        )


@contextlib.contextmanager
def _damage(split: SplitName) -> Iterator[None]:
  """Convert the errors of missing and damaged files."""
  try:
    yield
  except InputError:
    raise
  except Exception as error:  # they are of many kinds
    raise InputError(
      f'`dataset`={split.dataset}: the files of its split {split.name} are '
      f'missing or damaged ({one_line(error)}); prepare or copy it again'
    ) from error


def fetch(
  split: SplitName, records, rows: Sequence[int], field: Callable
) -> list:
  """Return `field(record)` of the records of some rows.

  Raises:
    InputError: the files are missing or damaged.
  """
  with _damage(split):
    return [field(record) for record in records.__getitems__(list(rows))]


def read_labels(
  split: SplitName, records, columns: tfds_reader.Columns, builder
) -> tuple[np.ndarray, np.ndarray]:
  """Return the labels of a split and hashes of its images; none is decoded.

  They are kept for the next start, see `label_cache`. Each process of a run
  reads its share of the records.

  Returns:
    labels: int32 `[N]`.
    digests: uint64 `[N]`, see `duplicates`, of the encoded images.

  Raises:
    InputError: a label lies outside the classes.
  """
  labels, digests = label_cache.cached(
    builder,
    split.name,
    len(records),
    lambda: _read_share(split, records, columns),
  )
  count = len(columns.classes)
  wrong = np.flatnonzero((labels < UNLABELLED) | (labels >= count))
  if wrong.size:
    row = wrong[0]
    raise InputError(
      f'`{split.parameter}`={split.name}: {wrong.size} labels of '
      f'`dataset`={split.dataset} lie outside its {count} classes, the first '
      f'is {labels[row]} in row {row}; prepare it again with the right number '
      'of classes'
    )
  return labels.astype(np.int32), digests


def _read_share(
  split: SplitName, records, columns: tfds_reader.Columns
) -> tuple[np.ndarray, np.ndarray]:
  """Return the labels int64 `[N]` and digests of all records.

  A process reads its share of the records, and gets the others' from them.
  """
  share = multihost.share(len(records))
  # TFDS stores labels of 64 bits: they are compared before they are converted.
  labels = np.empty(len(share), np.int64)
  digests = np.empty(len(share), np.uint64)

  def read(record: bytes) -> tuple[int, int]:
    image, label = columns.both(record)
    return label, duplicates.digest(image)

  def fill(rows: slice):
    found = fetch(split, records, share[rows], read)
    labels[rows], digests[rows] = zip(*found, strict=True)

  with multihost.failing_together('the labels'):
    by_chunk(fill, len(labels), 'labels')
  gather = lambda part: multihost.gather_shares(part, len(records))
  return gather(labels), gather(digests)


def by_chunk(
  fill: Callable[[slice], None], count: int, unit: str, size: int = 1
) -> None:
  """Call `fill` with slices that cover range(count), on many threads.

  Args:
    fill: called once per slice.
    count: number of rows.
    unit: of the progress bar.
    size: bytes of a row; slices of large rows are shorter.
  """
  workers = min(32, os.cpu_count() or 1)
  share = -(-count // (_SHARES * workers))  # so that all threads end together
  step = max(1, min(_CHUNK, share, _CHUNK_BYTES // size))
  chunks = [slice(i, min(i + step, count)) for i in range(0, count, step)]
  bar = progress.progress(count, 'reading', unit=f' {unit}')
  with bar, futures.ThreadPoolExecutor(workers) as pool:
    for chunk, _ in zip(chunks, pool.map(fill, chunks), strict=True):
      watchdog.reset()
      bar.update(chunk.stop - chunk.start)


# Images.


class Reader(NamedTuple):
  """The `Source.read` and `Source.crop` of a split on disk."""

  split: SplitName
  records: Any  # of `open_records`
  columns: tfds_reader.Columns
  shape: tuple[int, int, int]  # H, W, c
  shorter: int | None  # the length that shorter sides are resized to
  audit: 'Audit'  # of all splits of the data set
  kept: np.ndarray | None = None  # rows of `records` that are rows here

  def __call__(self, rows, draws=None) -> np.ndarray:
    """Return the images of rows `[B]`, uint8 `[B, H, W, c]`.

    With draws `[B, T, 4]` they are random windows, see `imagenet.window`.

    Raises:
      InputError: an image cannot be decoded. The message lists all such images.
    """
    rows = np.asarray(rows)
    rows = (rows if self.kept is None else self.kept[rows]).tolist()
    images = np.empty((len(rows), *self.shape), np.uint8)
    encoded = fetch(self.split, self.records, rows, self.columns.image)
    draws = [None] * len(rows) if draws is None else draws
    for image, row, content, own in zip(
      images, rows, encoded, draws, strict=True
    ):
      try:
        image[:] = self._decode(content, own)
      except Exception as error:  # codecs raise many kinds
        raise self.audit.error(self, row, error) from error
    return images

  def _decode(self, encoded: bytes, draws: np.ndarray | None) -> np.ndarray:
    """Return the pixels uint8 `[H, W, c]` of an encoded image."""
    if draws is None:
      return decode.centre(encoded, self.shape, self.shorter)
    return decode.crop(encoded, self.shape, draws)

  def undecodable(self) -> dict[int, str]:
    """Decode all records; return those that cannot be: row -> a description."""
    found = {}

    def look(part: slice):
      rows = range(part.start, part.stop)
      records = fetch(self.split, self.records, rows, lambda record: record)
      for row, record in zip(rows, records, strict=True):
        try:
          self._decode(self.columns.image(record), None)
        except Exception as error:  # codecs raise many kinds
          found[row] = self.described(row, record, error)

    by_chunk(look, len(self.records), 'images checked')
    return dict(sorted(found.items()))

  def described(self, row: int, record: bytes, error: Exception) -> str:
    """Return 'row 3 (c.png): why it cannot be decoded'."""
    title = self.columns.title(record)
    title = title.decode() if isinstance(title, bytes) else title
    title = f' ({title:.60})' if title else ''
    return f'row {row}{title}: {one_line(error):.80}'


class Audit:
  """The search for images of a data set that cannot be decoded."""

  def __init__(self, dataset: str):
    """Begin; `readers` is filled in by the caller."""
    self.dataset, self._lock = dataset, threading.Lock()
    self.readers: list[Reader] = []
    self._message: str | None = None

  def error(self, reader: Reader, row: int, error: Exception) -> InputError:
    """Return the error to raise for an image, which lists all others too."""
    with self._lock:  # threads that fail at the same time share one search
      if self._message is None:
        (record,) = fetch(reader.split, reader.records, [row], lambda x: x)
        text = reader.described(row, record, error)
        _LOG.warning(
          '%s: an image of %s cannot be decoded, %s; looking for others',
          self.dataset,
          reader.split.name,
          text,
        )
        found = [each.undecodable() for each in self.readers]
        splits = [each.split for each in self.readers]
        found[splits.index(reader.split)].setdefault(row, text)
        self._message = self._advice(found)
    return InputError(self._message)

  def _advice(self, found: list[dict[int, str]]) -> str:
    count = sum(map(len, found))
    return (
      f'{self._said(found)}; repair or remove them, or leave them out with '
      f'`corrupt`={count}'
    )

  def _said(self, found: list[dict[int, str]]) -> str:
    """Return a line that lists undecodable images, a dict per reader."""
    lines = [
      f'{reader.split.name} {text}'
      for reader, texts in zip(self.readers, found, strict=True)
      for text in texts.values()
    ]
    return (
      f'`dataset`={self.dataset}: {len(lines)} images cannot be decoded: '
      f'{few(lines, _SHOWN)}'
    )

  def keep(self, corrupt: int) -> list[np.ndarray | None]:
    """Decode all images; return the decodable rows of every reader.

    Args:
      corrupt: the number of undecodable images that may be left out. If it is
        0, no image is decoded.

    Returns:
      For every reader, rows int `[N]`, or None for all rows.

    Raises:
      InputError: more images cannot be decoded.
    """
    if not corrupt:
      return [None] * len(self.readers)
    found = [reader.undecodable() for reader in self.readers]
    count = sum(map(len, found))
    require(count <= corrupt, self._advice(found))
    if count:
      said = InputError(self._said(found))
      _LOG.warning('%s; they are left out (corrupt=%d)', said, corrupt)
    return [
      np.setdiff1d(np.arange(len(reader.records)), list(rows)) if rows else None
      for reader, rows in zip(self.readers, found, strict=True)
    ]
