"""Metrics of a run: JSON lines, TensorBoard events and progress bars."""

import json
import os
import pathlib
import time

import tensorboardX
import tqdm

from ssljax.distributed import multihost

# Fields of a measurement that differ between identical runs.
TIMING = ('seconds', 'images_per_second', 'time')


class MetricsWriter:
  """Appends measurements to `metrics.jsonl` and to TensorBoard events."""

  def __init__(self, folder: str | pathlib.Path):
    """Open the run's folder, and create it if it does not exist."""
    self.folder = pathlib.Path(folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    self._file = open(self.folder / 'metrics.jsonl', 'ab')
    self._events = {}

  def write(self, job: str, measurement: dict) -> None:
    """Append a measurement.

    Args:
      job: name of the method.
      measurement: 'step', 'seed' and numbers by name.
    """
    line = {'job': job} | measurement | {'time': round(time.time(), 3)}
    self._file.write(json.dumps(line).encode() + b'\n')
    name = f'{job}/seed-{measurement["seed"]}'
    if name not in self._events:
      # Purges what an interrupted run wrote after its last checkpoint.
      self._events[name] = tensorboardX.SummaryWriter(
        str(self.folder / 'events' / name), purge_step=measurement['step']
      )
    for key, value in measurement.items():
      if isinstance(value, float):
        self._events[name].add_scalar(key, value, measurement['step'])

  def flush(self) -> int:
    """Write everything to disk, and return the bytes in `metrics.jsonl`."""
    self._file.flush()
    os.fsync(self._file.fileno())
    for writer in self._events.values():
      writer.flush()
    return self._file.tell()

  def rewind(self, length: int) -> None:
    """Remove everything past the first `length` bytes of `metrics.jsonl`."""
    self._file.flush()
    if self._file.tell() > length:
      self._file.truncate(length)
      self._file.seek(length)

  def close(self) -> None:
    """Flush and close."""
    self.flush()
    self._file.close()
    for writer in self._events.values():
      writer.close()


class NoMetrics(MetricsWriter):
  """Writes nothing: only the first process writes metrics."""

  def __init__(self):
    """Open nothing."""

  def write(self, job: str, measurement: dict) -> None:
    """Ignore a measurement."""

  def flush(self) -> int:
    """Return 0: only the first process knows the length of the file."""
    return 0

  def rewind(self, length: int) -> None:
    """Do nothing."""

  def close(self) -> None:
    """Do nothing."""


def read(folder: pathlib.Path, job: str) -> list[dict]:
  """Return the measurements of a job in order; none without `metrics.jsonl`."""
  path = folder / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  measured = map(json.loads, lines)
  return [m for m in measured if m['job'] == job]


def progress_bar(
  name: str, done: int, total: int | None, shown: bool = True
) -> tqdm.tqdm:
  """Return a progress bar, shown by the first process only.

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
    disable=not (shown and multihost.is_main_process()),
  )
