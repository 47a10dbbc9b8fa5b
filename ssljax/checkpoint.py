"""Saves and restores a run: orbax, asynchronous, the newest good one wins."""

import pathlib
from typing import Any
import zlib

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from ssljax.core import TrainState


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

  def __init__(self, folder: str | pathlib.Path, keep: int = 2):
    """Opens the folder, made if absent, keeping the newest `keep`."""
    self.folder = pathlib.Path(folder).absolute()
    self._keep = keep
    self._open()

  def _open(self):
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(max_to_keep=self._keep),
      item_names=('state', 'progress'),
    )

  def save(self, step: int, state: TrainState, progress: dict) -> None:
    """Saves in the background.

    Args:
      step: of the state.
      state: is copied before this returns, so it may be donated.
      progress: JSON values that go with it.
    """
    progress = progress | {'checksum': checksum(state)}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(_plain(state)),
        progress=ocp.args.JsonSave(progress),
      ),
    )

  def restore(self, like: TrainState) -> tuple[TrainState, dict] | None:
    """The newest checkpoint that can be read, or None.

    A damaged one is reported, renamed 'damaged-STEP', and the one before it
    is taken.

    Args:
      like: a tree of `jax.ShapeDtypeStruct`s with shardings.
    """
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        return self._read(step, like)
      except (ValueError, OSError, KeyError, TypeError) as error:
        logging.warning(
          'Checkpoint %s of step %d cannot be read (%s): going on from the '
          'one before it.',
          self.folder,
          step,
          str(error).split('\n')[0],
        )
        self._put_aside(step)
    return None

  def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
    key_data = jax.eval_shape(jax.random.key_data, like.key)
    plain = like.replace(
      key=jax.ShapeDtypeStruct(
        key_data.shape, key_data.dtype, sharding=like.step.sharding
      )
    )
    read = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(plain),
        progress=ocp.args.JsonRestore(),
      ),
    )
    state = read.state.replace(key=jax.random.wrap_key_data(read.state.key))
    if checksum(state) != read.progress.pop('checksum'):
      raise ValueError('its content does not match its checksum')
    return state, read.progress

  def _put_aside(self, step: int) -> None:
    self._manager.close()
    (self.folder / str(step)).rename(self.folder / f'damaged-{step}')
    self._open()

  def wait(self) -> None:
    """Returns when everything is on disk; raises what failed there."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and frees the threads behind it."""
    self._manager.close()


def abstract(tree: Any, sharding: Any) -> Any:
  """Shapes, dtypes and shardings of a tree; `sharding` is a prefix tree."""
  shardings = jax.tree.broadcast(sharding, tree)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )
