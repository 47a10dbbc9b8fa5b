"""Checkpoints of a run, written by Orbax and verified on restore.

Every checkpoint carries a checksum of its arrays. A damaged checkpoint is set
aside, and the one before it is restored.

Checkpoints of version 0.1 can be restored too: they hold the moving average of
the parameters as the last element of the optimiser's state.
"""

from collections.abc import Callable, Collection
import contextlib
import dataclasses
import functools
import itertools
import logging
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ssljax.core import Average, TrainState
from ssljax.distributed import multihost
from ssljax.errors import InputError, require

_LOG = logging.getLogger(__name__)
_FIELDS = tuple(
  field.name
  for field in dataclasses.fields(TrainState)
  if field.metadata.get('pytree_node', True)
)
_AVERAGE_0_1 = re.compile(r'opt_state\.\d+\.average\.')  # names of version 0.1


# The checksum.


def _plain(state: TrainState) -> TrainState:
  """Return the state with its random key as integers."""
  return state.replace(key=jax.random.key_data(state.key))


def examine(state: TrainState) -> tuple[bool, int]:
  """Check a state before it is saved.

  Both results are computed on the devices that hold the arrays and do not
  depend on the sharding.

  Returns:
    True if parameters and memory are finite, and a checksum of all arrays.
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
  """Compute the checksum of one array.

  It is the sum, modulo 2**32, of the array's words, each times an odd number
  that depends on its place. A sum of integers does not depend on its order, so
  every device adds up its own shard. A changed word changes its product.

  Args:
    x: the array.
    number: its position among the arrays of the state.
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


# The layout on disk.


def _to_tree(plain: TrainState) -> dict[str, Any]:
  """Return the fields to save of a plain state, without an absent average."""
  fields = {name: getattr(plain, name) for name in _FIELDS}
  if isinstance(plain.average, Average):
    return fields
  return {k: v for k, v in fields.items() if k != 'average'}


def _to_0_1(tree: dict[str, Any]) -> dict[str, Any]:
  """Return the fields in the layout of version 0.1.

  There the average of the parameters is the last element of the optimiser's
  state. The arrays have the same order, and so the state the same checksum.
  """
  average = tree['average']
  last = {'count': average.count, 'average': average.params}
  rest = {k: v for k, v in tree.items() if k != 'average'}
  return rest | {'opt_state': (*tree['opt_state'], last)}


def _from_0_1(tree: dict[str, Any]) -> dict[str, Any]:
  """Return the fields in the current layout; the inverse of `_to_0_1`."""
  *opt_state, last = tree['opt_state']
  average = Average(count=last['count'], params=last['average'], stats=())
  return tree | {'opt_state': tuple(opt_state), 'average': average}


def _abstract_plain(state: TrainState) -> TrainState:
  """Return shapes with the random key as integers, as `_plain` of a state."""
  key = jax.eval_shape(jax.random.key_data, state.key)
  where = state.step.sharding
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=where)
  return state.replace(key=key)


def _with_lengths(tree: dict[str, Any], saved, whole) -> dict[str, Any]:
  """Return shapes whose tables have the lengths that were saved.

  Orbax would otherwise pad or truncate a table that has another length.

  Args:
    tree: expected shapes.
    saved: saved shapes by name.
    whole: sharding of a table that has another length: replicated.
  """

  def one(path, like):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    if saved[name] == like.shape:
      return like
    return jax.ShapeDtypeStruct(saved[name], like.dtype, sharding=whole)

  tables = {name: tree[name] for name in ('labels', 'memory')}
  return tree | jax.tree_util.tree_map_with_path(one, tables)


class _Manager(ocp.CheckpointManager):
  """Orbax's manager, without its own response to preemption.

  Orbax would report its steps to JAX's preemption service, and
  `preemption.Notice` others, but JAX counts both together. The loop saves when
  it is preempted.
  """

  def reached_preemption(self, step: int) -> bool:
    """Return False."""
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
    """Open the folder, and create it if it does not exist.

    Args:
      folder: folder of the checkpoints.
      keep: number of newest checkpoints to keep.
      permanent: steps whose checkpoints are kept as well.
    """
    self.folder = pathlib.Path(folder).absolute()
    self._policy = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(keep),
        checkpoint_managers.CustomSteps(list(permanent)),
      ]
    )
    self._open()

  def _open(self):
    self._manager = _Manager(
      self.folder,
      options=ocp.CheckpointManagerOptions(preservation_policy=self._policy),
      item_names=('state', 'progress'),
    )

  def steps(self) -> tuple[int, ...]:
    """Return the steps that have a checkpoint, in rising order."""
    return tuple(sorted(self._manager.all_steps()))

  def save(self, step: int, state: TrainState, progress: dict) -> None:
    """Save in the background.

    Args:
      step: step of the state.
      state: copied before this returns, so its buffers may be donated.
      progress: JSON values to save with it, the checksum of `examine` among
        them.
    """
    with _write_errors(self.folder):  # of this write or the one before
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(_to_tree(_plain(state))),
          progress=ocp.args.JsonSave(progress),
        ),
      )

  def restore(
    self,
    like: Callable[[dict], TrainState],
    put_aside: bool = True,
    step: int | None = None,
  ) -> tuple[TrainState, dict] | None:
    """Return the newest readable state and its progress, or None without any.

    A damaged checkpoint is reported and renamed 'damaged-STEP', and the one
    before it is restored.

    Args:
      like: function of the progress that returns the expected state as a tree
        of `jax.ShapeDtypeStruct` with shardings. A table of labels or memory
        that was saved with another length is returned with that length,
        replicated on each device.
      put_aside: False renames nothing.
      step: restore only the checkpoint of this step.

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
      if multihost.everywhere(found is not None):
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
    plain, saved = _abstract_plain(like(progress)), self._shapes(step)
    tree = _with_lengths(_to_tree(plain), saved, plain.step.sharding)
    is_0_1 = any(map(_AVERAGE_0_1.match, saved))
    tree = read(
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(_to_0_1(tree) if is_0_1 else tree)
      )
    ).state
    tree = _from_0_1(tree) if is_0_1 else tree
    state = TrainState(**tree, images=plain.images)
    state = state.replace(key=jax.random.wrap_key_data(state.key))
    if progress.pop('checksum') != examine(state)[1]:
      raise ValueError('its content does not match its checksum')
    return state, progress

  def _shapes(self, step: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the saved arrays by name, as 'memory.logits'."""
    saved = ocp.StandardCheckpointHandler().metadata(
      self.folder / str(step) / 'state'
    )
    return {x.name: x.shape for x in jax.tree.leaves(saved.tree)}

  def _put_aside(self, step: int) -> None:
    self._manager.close()
    names = (f'damaged-{step}{"+" * n}' for n in itertools.count())
    target = next(n for n in names if not (self.folder / n).exists())
    multihost.meet('all processes have closed the checkpoint')
    if multihost.is_first():
      (self.folder / str(step)).rename(self.folder / target)
    multihost.meet('the checkpoint is renamed')
    self._open()

  def wait(self) -> None:
    """Block until every checkpoint is on disk.

    Raises:
      InputError: a checkpoint could not be written.
    """
    with _write_errors(self.folder):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Wait, and release Orbax's threads."""
    with _write_errors(self.folder):
      self._manager.close()


@contextlib.contextmanager
def _write_errors(folder: pathlib.Path):
  """Turn a write error of Orbax into an `InputError`."""
  try:
    yield
  except (ValueError, OSError) as error:
    raise InputError(
      f'`workdir`: a checkpoint cannot be written to {folder} (is the disk '
      'full?): make room and run the same command again, it goes on from the '
      'last checkpoint'
    ) from error


def abstract(tree: Any, sharding: Any) -> Any:
  """Return shapes, dtypes and shardings of a tree.

  Args:
    tree: tree of arrays or of `jax.ShapeDtypeStruct`.
    sharding: prefix tree of `jax.sharding.Sharding`.
  """
  shardings = jax.tree.broadcast(sharding, tree)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )
