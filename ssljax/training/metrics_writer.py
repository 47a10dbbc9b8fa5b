"""Metrics of a run: JSON lines, trackers such as TensorBoard, progress bars.

A checkpoint holds length and digest of `metrics.jsonl`, and the steps that
were measured. A file that was changed since is noticed on resume: its readable
lines are kept, and the steps that are missing are reported.
"""

from collections.abc import Callable, Sequence
import hashlib
import itertools
import json
import logging
import os
import pathlib
import sys
import time

import tqdm

from ssljax import files
from ssljax.distributed import multihost
from ssljax.errors import InputError, require
from ssljax.training import bucket_copy, trackers
from ssljax.training.job import PARTS, Progress

_LOG = logging.getLogger(__name__)
_FILE = 'metrics.jsonl'

# Fields of a measurement that differ between identical runs.
TIMING = (
  *('seconds', 'images_per_second', 'time', 'step_time', 'device_bytes'),
  *('seconds_steps', 'seconds_compilation'),
  *(f'seconds_{part}' for part in PARTS),
)


class MetricsWriter:
  """Appends measurements to `metrics.jsonl` and to `trackers`."""

  def __init__(
    self,
    folder: str | pathlib.Path,
    writers: Sequence[str] = ('tensorboard',),
  ):
    """Open the run's folder, and create it if it does not exist.

    Args:
      folder: of the run.
      writers: names of `trackers.TRACKERS`.

    Raises:
      InputError: there is no such writer, or its package is missing.
    """
    make = [trackers.find(name) for name in writers]
    self.folder = files.as_folder(folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    self._copy = _copy_of(self.folder)
    self._path = self._copy.folder / _FILE
    self._trackers = [each(self._copy.folder) for each in make]
    self.missing: dict[str, list[int]] = {}  # steps without metrics, by job
    self._changed = False
    self._open()

  def _open(self):
    require(
      files.is_regular(self._path) or not files.exists(self._path),
      f'`workdir`={self.folder}: its {_FILE} is no regular file: remove it; '
      'the run goes on without the measurements',
    )
    self._file = open(self._path, 'ab')
    self._hash = self._hash_of(self._file.tell())

  def _hash_of(self, length: int):
    """Return the hash object of the first bytes of the file."""
    found, rest = hashlib.sha256(), length
    with open(self._path, 'rb') as file:
      while rest > 0 and (block := file.read(min(rest, 2**20))):
        found.update(block)
        rest -= len(block)
    return found

  def write(self, job: str, measurement: dict) -> None:
    """Append a measurement.

    Args:
      job: name of the method.
      measurement: 'step', 'seed' and numbers by name.
    """
    line = {'job': job} | measurement | {'time': round(time.time(), 3)}
    text = json.dumps(line).encode() + b'\n'
    self._file.write(text)
    self._hash.update(text)
    name = f'{job}/seed-{measurement["seed"]}'
    scalars = {k: v for k, v in measurement.items() if isinstance(v, float)}
    for tracker in self._trackers:
      tracker.log(name, scalars, measurement['step'])

  def flush(self) -> int:
    """Write everything to disk, and return the bytes in `metrics.jsonl`."""
    self._file.flush()
    os.fsync(self._file.fileno())
    for tracker in self._trackers:
      tracker.flush()
    self._copy.flush()
    return self._file.tell()

  def digest(self) -> str:
    """Return the SHA-256 of `metrics.jsonl`, as of the last `flush`."""
    return self._hash.hexdigest()

  def rewind(self, length: int) -> None:
    """Remove everything past the first `length` bytes of `metrics.jsonl`."""
    self._file.flush()
    if self._file.tell() > length:
      self._file.truncate(length)
      self._file.seek(length)
      self._hash = self._hash_of(length)
      self._copy.truncate(length)

  def start_job(self, job: str, seeds: Sequence[int], start: int) -> int:
    """Remove earlier measurements of a job that starts anew.

    Args:
      job: name of its method.
      seeds: numbers of its splits.
      start: bytes of the jobs before it.

    Returns:
      The bytes in `metrics.jsonl`.
    """
    if self._changed:
      self._filter(lambda m: not _is_of(m, job, seeds))
    else:
      self.rewind(start)
    return self.flush()

  def resume_job(
    self, job: str, seeds: Sequence[int], progress: Progress, is_over: bool
  ) -> None:
    """Go back to the measurements at a checkpoint, and report missing ones.

    Args:
      job: name of the method.
      seeds: numbers of its splits.
      progress: progress at the checkpoint.
      is_over: the job has ended; measurements of later jobs may follow.
    """
    length, digest = progress.metrics_bytes, progress.metrics_digest
    self._file.flush()
    is_whole = self._file.tell() >= length
    if is_whole and digest:
      is_whole = self._hash_of(length).hexdigest() == digest
    later = lambda m: _is_of(m, job, seeds) and m['step'] > progress.step
    if not is_whole:
      self._changed = True
      self._filter(lambda m: is_over or not later(m))
    elif not is_over and self._others_follow(length, job, seeds):
      self._filter(lambda m: not later(m))
    elif not is_over:
      self.rewind(length)
    if is_whole and not progress.measured:
      return
    self._note_missing(job, seeds, progress, is_whole)

  def _others_follow(self, length: int, job: str, seeds) -> bool:
    """Return True if other jobs have measurements past `length` bytes."""
    with open(self._path, 'rb') as file:
      file.seek(length)
      measured = map(_parsed, file)
      return any(m and not _is_of(m, job, seeds) for m in measured)

  def _filter(self, keep: Callable[[dict], bool]) -> None:
    """Keep the readable lines that satisfy `keep`, in their order.

    If an unreadable line is removed, a copy of the file is kept.
    """
    self._file.close()
    lines = self._path.read_bytes().splitlines(keepends=True)
    measured = [_parsed(line) for line in lines]
    kept = [
      line
      for line, m in zip(lines, measured, strict=True)
      if m is not None and keep(m)
    ]
    if None in measured:
      names = (f'metrics-damaged{"+" * n}.jsonl' for n in itertools.count())
      copy = next(n for n in names if not files.exists(self.folder / n))
      files.write_atomically(self.folder / copy, b''.join(lines))
    if kept != lines:
      files.write_atomically(self._path, b''.join(kept))
      self._copy.replace()
    self._open()

  def _note_missing(self, job, seeds, progress: Progress, is_whole) -> None:
    """Report the measured steps that are not in the file."""
    with open(self._path, 'rb') as file:
      lines = [m for m in map(_parsed, file) if m and _is_of(m, job, seeds)]
    trained = {(m['step'], m['seed']) for m in lines if 'loss' in m}
    is_evaluation = lambda m: any(
      '_error_' in key or key.startswith('pseudo_label_') for key in m
    )
    tested = {(m['step'], m['seed']) for m in lines if is_evaluation(m)}
    evaluated = {e['step'] for e in progress.evaluations if len(e) > 1}
    missing = [
      step
      for step in sorted({*progress.measured_steps(), *evaluated})
      if any((step, seed) not in trained for seed in seeds)
      or (
        (step in evaluated)
        and any((step, seed) not in tested for seed in seeds)
      )
    ]
    if missing or not is_whole:
      found = {*self.missing.get(job, ()), *missing}
      self.missing[job] = sorted(found)
      _LOG.warning(
        '%s was changed since the checkpoint of step %d: kept as it is, '
        'measurements of %s are missing at %s',
        self.folder / _FILE,
        progress.step,
        job,
        f'steps {_shortened(missing)}' if missing else 'no step',
      )

  def close(self) -> None:
    """Flush and close."""
    self.flush()
    self._file.close()
    for tracker in self._trackers:
      tracker.close()


def _copy_of(folder: pathlib.Path):
  """Return what copies the growing files of a run to its folder."""
  if not files.in_bucket(folder):
    return bucket_copy.NoCopy(folder)
  return bucket_copy.BucketCopy(folder, _FILE)


class NoMetrics(MetricsWriter):
  """Writes nothing: only the first process writes metrics."""

  def __init__(self):
    """Open nothing."""
    self.missing = {}

  def write(self, job: str, measurement: dict) -> None:
    """Ignore a measurement."""

  def flush(self) -> int:
    """Return 0: only the first process knows the length of the file."""
    return 0

  def digest(self) -> str:
    """Return '': only the first process knows the content of the file."""
    return ''

  def rewind(self, length: int) -> None:
    """Do nothing."""

  def start_job(self, job: str, seeds: Sequence[int], start: int) -> int:
    """Return the bytes of the jobs before."""
    return start

  def resume_job(self, *args) -> None:
    """Do nothing."""

  def close(self) -> None:
    """Do nothing."""


def _is_of(measurement: dict, job: str, seeds: Sequence[int]) -> bool:
  return measurement['job'] == job and measurement['seed'] in seeds


def _parsed(line: bytes) -> dict | None:
  """Return the measurement of a line, or None if it is damaged."""
  try:
    found = json.loads(line)
  except (ValueError, RecursionError):
    return None
  is_measurement = (
    line.endswith(b'\n')
    and isinstance(found, dict)
    and {'job', 'step', 'seed'} <= found.keys()
    and type(found['step']) is int
  )
  return found if is_measurement else None


def _shortened(steps: Sequence[int]) -> str:
  """Return '1, 2, 3', or '1, 2, ..., 90 (40 steps)' of many."""
  if len(steps) <= 10:
    return ', '.join(map(str, steps))
  return f'{steps[0]}, {steps[1]}, ..., {steps[-1]} ({len(steps)} steps)'


def read(folder: pathlib.Path, job: str) -> list[dict]:
  """Return the measurements of a job in order; none without `metrics.jsonl`.

  Raises:
    InputError: the file is damaged.
  """
  path = folder / _FILE
  if not files.exists(path):
    return []
  try:
    text = files.read_text(path)
  except InputError as error:
    raise InputError(f'`run`={folder}: {error}: restore the file') from error
  found = []
  for number, line in enumerate(text.splitlines(keepends=True), 1):
    measurement = _parsed(line.encode())
    if measurement is None:
      raise InputError(
        f'`run`={folder}: line {number} of {_FILE} is damaged: remove the line'
      )
    found.append(measurement)
  return [m for m in found if m['job'] == job]


def progress_bar(
  name: str, done: int, total: int | None, shown: bool = True
) -> tqdm.tqdm:
  """Return a progress bar, shown by the first process on a terminal only.

  Args:
    name: description of the bar.
    done: steps that are finished already.
    total: steps in total, if known.
    shown: False shows nothing.
  """
  return tqdm.tqdm(
    desc=name,
    initial=done,
    total=total,
    unit='step',
    dynamic_ncols=True,
    # A log file would hold every state of the bar.
    disable=not (shown and multihost.is_main_process() and sys.stderr.isatty()),
  )
