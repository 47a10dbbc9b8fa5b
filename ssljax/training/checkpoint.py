"""Saves and restores a run: orbax, asynchronous, the newest good one wins."""

from collections.abc import Callable, Collection
import contextlib
import functools
import itertools
import logging
import pathlib
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ssljax.core import TrainState
from ssljax.distributed import multihost
from ssljax.errors import InputError, require

_LOG = logging.getLogger(__name__)


def _plain(state: TrainState) -> TrainState:
  """The state with its random key as the integers behind it."""
  return state.replace(key=jax.random.key_data(state.key))


def examine(state: TrainState) -> tuple[bool, int]:
  """Whether weights and memory are finite, and a checksum of the whole state.

  It is made where the arrays lie, and does not depend on where that is.
  """
  finite, total = jax.device_get(_examined(_plain(state)))
  return bool(finite), int(total)


@jax.jit
def _examined(state: TrainState) -> tuple[jax.Array, jax.Array]:
  numbers = jax.tree.leaves((state.params, state.memory))
  finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in numbers])
  sums = [_sum(leaf, i) for i, leaf in enumerate(jax.tree.leaves(state))]
  return jnp.all(finite), jnp.sum(jnp.stack(sums))


def _sum(x: jax.Array, number: int) -> jax.Array:
  """Sum, modulo 2**32, of the words of an array, each times an odd number.

  Sums of integers have no order, so that devices may add up what they hold; a
  word that changes changes its product.
  """
  bits = x.astype(jnp.uint8) if x.dtype == bool else x
  kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
  words = jax.lax.bitcast_convert_type(bits, kinds[bits.dtype.itemsize])
  place = jnp.full(words.shape, number, jnp.uint32) * jnp.uint32(0x9E3779B1)
  for axis, length in enumerate(words.shape):
    along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    place = place * jnp.uint32(length) + along
  # The finaliser of MurmurHash3.
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    place = (place ^ (place >> shift)) * jnp.uint32(factor)
  return jnp.sum(words.astype(jnp.uint32) * (place ^ (place >> 16) | 1))


def _crc(state: TrainState) -> str:
  """The checksum of checkpoints that are older than `examine`."""
  total = 0
  for leaf in jax.tree.leaves(_plain(state)):
    total = zlib.crc32(np.ascontiguousarray(multihost.fetch(leaf)), total)
  return f'{total:08x}'


class _Manager(ocp.CheckpointManager):
  """Orbax's, that leaves it to the run when it is asked to go.

  It would tell JAX the step at which it looks, and `preemption.Notice` another
  number: JAX has one count of looks.
  """

  def reached_preemption(self, step: int) -> bool:
    """Never."""
    del step
    return False


class Checkpoints:
  """The checkpoints of one job in one folder."""

  def __init__(
    self,
    folder: str | pathlib.Path,
    keep: int = 2,
    permanent: Collection[int] = (),
  ):
    """Opens the folder, made if absent.

    Args:
      folder: of the checkpoints.
      keep: of the checkpoints, how many of the newest stay.
      permanent: steps whose checkpoints stay beside those.
    """
    self.folder = pathlib.Path(folder).absolute()
    self._kept = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(keep),
        checkpoint_managers.CustomSteps(list(permanent)),
      ]
    )
    self._open()

  def _open(self):
    self._manager = _Manager(
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
      progress: JSON values that go with it, the checksum among them.
    """
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
        with shardings. A table that was saved with another length comes with
        that one, whole on each device.
      put_aside: False renames nothing.
      step: only this one will do.

    Raises:
      InputError: there are checkpoints, and none can be read.
    """
    steps = self.steps()[::-1]
    if step is not None:
      steps = tuple(saved for saved in steps if saved == step)
    for step in steps:
      found = None
      try:
        found = self._read(step, like)
      except (ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error).split('\n')[0]
        _LOG.warning(
          'Checkpoint %s of step %d cannot be read (%s): trying the one '
          'before it.',
          self.folder,
          step,
          reason,
        )
      if multihost.all_true(found is not None):
        return found
      if put_aside:
        self._put_aside(step)
    require(
      not steps,
      f'`workdir`: no checkpoint in {self.folder} can be read: run the same '
      'command again to start this part anew, or give another `workdir`',
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
    plain = self._as_saved(step, plain)
    state = read(
      args=ocp.args.Composite(state=ocp.args.StandardRestore(plain))
    ).state
    state = state.replace(key=jax.random.wrap_key_data(state.key))
    checksum = progress.pop('checksum')
    older = isinstance(checksum, str)
    if checksum != (_crc(state) if older else examine(state)[1]):
      raise ValueError('its content does not match its checksum')
    return state, progress

  def _as_saved(self, step: int, plain: TrainState) -> TrainState:
    """The shapes that are wanted, with the lengths that tables were saved in.

    Orbax itself would fill up or cut off what has another length.
    """
    saved = ocp.StandardCheckpointHandler().metadata(
      self.folder / str(step) / 'state'
    )
    shapes = {x.name: x.shape for x in jax.tree.leaves(saved.tree)}
    whole = plain.step.sharding

    def one(path, like):
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      if shapes[name] == like.shape:
        return like
      return jax.ShapeDtypeStruct(shapes[name], like.dtype, sharding=whole)

    labels, memory = jax.tree_util.tree_map_with_path(
      one, {'labels': plain.labels, 'memory': plain.memory}
    ).values()
    return plain.replace(labels=labels, memory=memory)

  def _put_aside(self, step: int) -> None:
    self._manager.close()
    names = (f'damaged-{step}{"+" * n}' for n in itertools.count())
    target = next(n for n in names if not (self.folder / n).exists())
    multihost.barrier('all have closed it')
    if multihost.is_main_process():
      (self.folder / str(step)).rename(self.folder / target)
    multihost.barrier('it is put aside')
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
      f'`workdir`: a checkpoint cannot be written to {folder} (is the disk '
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
