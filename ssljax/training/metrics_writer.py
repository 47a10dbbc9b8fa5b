"""What a run leaves behind while it trains: JSON lines, events, a bar."""

import json
import os
import pathlib
import time

import tensorboardX
import tqdm

from ssljax.distributed import multihost

# Fields that say how fast, not what: they differ between identical runs.
TIMING = ('seconds', 'images_per_second', 'time')


class Recorder:
  """Appends measurements to `metrics.jsonl` and to TensorBoard events."""

  def __init__(self, folder: str | pathlib.Path):
    """Opens the run's folder, made if absent."""
    self.folder = pathlib.Path(folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    self._file = open(self.folder / 'metrics.jsonl', 'ab')
    self._events = {}

  def write(self, job: str, measurement: dict) -> None:
    """Adds one measurement: at least 'step', 'seed' and numbers."""
    line = {'job': job} | measurement | {'time': round(time.time(), 3)}
    self._file.write(json.dumps(line).encode() + b'\n')
    name = f'{job}/seed-{measurement["seed"]}'
    if name not in self._events:
      # What an interrupted run wrote beyond its checkpoint is purged.
      self._events[name] = tensorboardX.SummaryWriter(
        str(self.folder / 'events' / name), purge_step=measurement['step']
      )
    for key, value in measurement.items():
      if isinstance(value, float):
        self._events[name].add_scalar(key, value, measurement['step'])

  def flush(self) -> int:
    """Brings everything to disk; returns the length of the file in bytes."""
    self._file.flush()
    os.fsync(self._file.fileno())
    for writer in self._events.values():
      writer.flush()
    return self._file.tell()

  def rewind(self, length: int) -> None:
    """Forgets what was written after the file was `length` bytes long."""
    self._file.flush()
    if self._file.tell() > length:
      self._file.truncate(length)
      self._file.seek(length)

  def close(self) -> None:
    """Flushes and closes."""
    self.flush()
    self._file.close()
    for writer in self._events.values():
      writer.close()


class Silent(Recorder):
  """Writes nothing: of a process that is not the first."""

  def __init__(self):
    """Opens nothing."""

  def write(self, job: str, measurement: dict) -> None:
    """Forgets a measurement."""

  def flush(self) -> int:
    """The length of what was written: the first process knows it."""
    return 0

  def rewind(self, length: int) -> None:
    """Has nothing to forget."""

  def close(self) -> None:
    """Has nothing to close."""


def read(folder: pathlib.Path, job: str) -> list[dict]:
  """The measurements of a job in `metrics.jsonl`, in order, if it is there."""
  path = folder / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  measured = map(json.loads, lines)
  return [m for m in measured if m['job'] == job]


def progress_bar(
  name: str, done: int, total: int, shown: bool = True
) -> tqdm.tqdm:
  """Return a progress bar over `total` steps, `done` of which are done."""
  return tqdm.tqdm(
    desc=name,
    initial=done,
    total=total,
    unit='step',
    dynamic_ncols=True,
    disable=not (shown and multihost.is_main_process()),
  )
