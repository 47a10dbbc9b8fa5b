"""Saves and restores a run: orbax, asynchronous, the newest good one wins."""

from collections.abc import Callable, Collection
import contextlib
import functools
import itertools
import pathlib
from typing import Any
import zlib

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ssljax.core import InputError, TrainState, require


def _plain(state: TrainState) -> TrainState:
  """The state with its random key as the integers behind it."""
  return state.replace(key=jax.random.key_data(state.key))


def checksum(state: TrainState) -> str:
  """A checksum over every array of a state, as saved."""
  total = 0
  for leaf in jax.tree.leaves(_plain(state)):
    total = zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)), total)
  return f'{total:08x}'


class Checkpoints:
  """The checkpoints of one job in one folder."""

  def __init__(
    self,
    folder: str | pathlib.Path,
    keep: int = 2,
    lasting: Collection[int] = (),
  ):
    """Opens the folder, made if absent.

    Args:
      folder: of the checkpoints.
      keep: of the checkpoints, how many of the newest stay.
      lasting: steps whose checkpoints stay beside those.
    """
    self.folder = pathlib.Path(folder).absolute()
    self._kept = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(keep),
        checkpoint_managers.CustomSteps(list(lasting)),
      ]
    )
    self._open()

  def _open(self):
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(preservation_policy=self._kept),
      item_names=('state', 'progress'),
    )

  def steps(self) -> tuple[int, ...]:
    """The steps there are checkpoints of, in rising order."""
    return tuple(sorted(self._manager.all_steps()))

  def save(self, step: int, state: TrainState, progress: dict) -> None:
    """Saves in the background.

    Args:
      step: of the state.
      state: is copied before this returns, so it may be donated.
      progress: JSON values that go with it.
    """
    progress = progress | {'checksum': checksum(state)}
    with _write_errors(self.folder):  # of this one or the one before
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(_plain(state)),
          progress=ocp.args.JsonSave(progress),
        ),
      )

  def restore(
    self,
    like: Callable[[dict], TrainState],
    put_aside: bool = True,
    step: int | None = None,
  ) -> tuple[TrainState, dict] | None:
    """The newest checkpoint that can be read, or None if there is none.

    A damaged one is reported, renamed 'damaged-STEP', and the one before it
    is taken.

    Args:
      like: what was saved beside a state -> a tree of `jax.ShapeDtypeStruct`s
        with shardings.
      put_aside: False renames nothing.
      step: only this one will do.

    Raises:
      InputError: there are checkpoints, and none can be read.
    """
    steps = self.steps()[::-1]
    if step is not None:
      steps = tuple(saved for saved in steps if saved == step)
    for step in steps:
      try:
        return self._read(step, like)
      except (ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error).split('\n')[0]
        logging.warning(
          'Checkpoint %s of step %d cannot be read (%s): trying the one '
          'before it.',
          self.folder,
          step,
          reason,
        )
        if put_aside:
          self._put_aside(step)
    require(
      not steps,
      f'--workdir: no checkpoint in {self.folder} can be read: run the same '
      'command again to start this part anew, or give another --workdir',
    )
    return None

  def _read(self, step: int, like) -> tuple[TrainState, dict]:
    read = functools.partial(self._manager.restore, step)
    progress = read(
      args=ocp.args.Composite(progress=ocp.args.JsonRestore())
    ).progress
    plain = like(progress)
    key_data = jax.eval_shape(jax.random.key_data, plain.key)
    plain = plain.replace(
      key=jax.ShapeDtypeStruct(
        key_data.shape, key_data.dtype, sharding=plain.step.sharding
      )
    )
    state = read(
      args=ocp.args.Composite(state=ocp.args.StandardRestore(plain))
    ).state
    state = state.replace(key=jax.random.wrap_key_data(state.key))
    if checksum(state) != progress.pop('checksum'):
      raise ValueError('its content does not match its checksum')
    return state, progress

  def _put_aside(self, step: int) -> None:
    self._manager.close()
    free = (self.folder / f'damaged-{step}{"+" * n}' for n in itertools.count())
    target = next(path for path in free if not path.exists())
    (self.folder / str(step)).rename(target)
    self._open()

  def wait(self) -> None:
    """Returns when everything is on disk.

    Raises:
      InputError: it could not be written.
    """
    with _write_errors(self.folder):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and frees the threads behind it."""
    with _write_errors(self.folder):
      self._manager.close()


@contextlib.contextmanager
def _write_errors(folder: pathlib.Path):
  """Makes one line of what TensorStore says of a disk that is full."""
  try:
    yield
  except (ValueError, OSError) as error:
    raise InputError(
      f'--workdir: a checkpoint cannot be written to {folder} (is the disk '
      'full?): make room and run the same command again, it goes on from the '
      'last checkpoint'
    ) from error


def abstract(tree: Any, sharding: Any) -> Any:
  """Shapes, dtypes and shardings of a tree; `sharding` is a prefix tree."""
  shardings = jax.tree.broadcast(sharding, tree)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )
