"""Programs that show metrics: TensorBoard, Weights & Biases, and trackio.

Each gets the numbers of a measurement, for a name such as 'madnn/seed-0'. W&B
and trackio are optional packages. Both are configured by their own environment
variables; WANDB_MODE=offline writes to the run's folder alone, and `wandb sync`
sends it later.
"""

from collections.abc import Callable, Mapping
import hashlib
import importlib
import pathlib
from typing import Any, Protocol

from ssljax.errors import InputError, choose

PROJECT = 'ssljax'


class Tracker(Protocol):
  """A place that numbers are written to."""

  def log(self, name: str, scalars: Mapping[str, float], step: int) -> None:
    """Write the numbers of a step."""

  def flush(self) -> None:
    """Write everything to disk."""

  def close(self) -> None:
    """Flush and close."""


class TensorBoard:
  """Writes event files to the folder `events` of a run."""

  def __init__(self, folder: pathlib.Path):
    """Take the run's folder."""
    self._folder = folder
    self._events: dict[str, Any] = {}

  def log(self, name: str, scalars: Mapping[str, float], step: int) -> None:
    """Write the numbers of a step."""
    import tensorboardX

    if name not in self._events:
      # Purges what an interrupted run wrote after its last checkpoint.
      self._events[name] = tensorboardX.SummaryWriter(
        str(self._folder / 'events' / name), purge_step=step
      )
    for key, value in scalars.items():
      self._events[name].add_scalar(key, value, step)

  def flush(self) -> None:
    """Write everything to disk."""
    for writer in self._events.values():
      writer.flush()

  def close(self) -> None:
    """Flush and close."""
    for writer in self._events.values():
      writer.close()


class _Runs:
  """Opens a run of another program for each name."""

  def __init__(self, folder: pathlib.Path):
    """Take the run's folder."""
    self._folder = folder
    self._runs: dict[str, Any] = {}

  def _open(self, name: str) -> Any:
    """Return the run of a name; the same one after a resume."""
    raise NotImplementedError

  def log(self, name: str, scalars: Mapping[str, float], step: int) -> None:
    """Write the numbers of a step."""
    if name not in self._runs:
      self._runs[name] = self._open(name)
    self._runs[name].log(dict(scalars), step=step)

  def flush(self) -> None:
    """Do nothing: the program writes by itself."""

  def close(self) -> None:
    """Finish all runs."""
    for run in self._runs.values():
      run.finish()


class WandB(_Runs):
  """Writes to Weights & Biases, one of its runs for each method and split."""

  def _open(self, name: str) -> Any:
    wandb = importlib.import_module('wandb')
    where = str(self._folder.resolve())
    return wandb.init(
      project=PROJECT,
      group=self._folder.name,
      name=name,
      id=hashlib.sha256(f'{where}/{name}'.encode()).hexdigest()[:16],
      dir=where,
      resume='allow',
      reinit='create_new',
    )


class Trackio(_Runs):
  """Writes to trackio, one of its runs for each method and split."""

  def _open(self, name: str) -> Any:
    trackio = importlib.import_module('trackio')
    return trackio.init(
      project=PROJECT,
      group=self._folder.name,
      name=f'{self._folder.name}/{name}',
      resume='allow',
    )


TRACKERS: dict[str, Callable[[pathlib.Path], Tracker]] = {
  'tensorboard': TensorBoard,
  'wandb': WandB,
  'trackio': Trackio,
}


def find(name: str) -> Callable[[pathlib.Path], Tracker]:
  """Return the class of a tracker.

  Raises:
    InputError: there is none of this name, or its package is missing.
  """
  choose('writers', name, TRACKERS)
  if name != 'tensorboard':
    try:
      importlib.import_module(name)
    except ImportError as error:
      raise InputError(
        f'`writers`={name}: {name} is not installed: pip install {name}'
      ) from error
  return TRACKERS[name]
