"""Checkpoints of a run, written by Orbax and verified on restore.

Every checkpoint carries a checksum of its arrays, the type and shape of each,
and a digest of its JSON values. A damaged checkpoint is set aside, and the one
before it is restored. A checkpoint of other types or shapes than expected is
refused and stays where it is: the settings have changed, not the files.

Checkpoints of version 0.1 can be restored too: they hold the moving average of
the parameters as the last element of the optimiser's state, and may lack fields
of a memory, see `core.UpgradeMemory`.
"""

from collections.abc import Callable, Collection, Iterator
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import time
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ssljax import files, lazy
from ssljax.core import Average, TrainState
from ssljax.distributed import multihost
from ssljax.errors import InputError, require
from ssljax.networks.cpu import conv

if TYPE_CHECKING:
  import orbax.checkpoint as ocp
  from orbax.checkpoint import checkpoint_managers
else:  # they take a second
  ocp = lazy.module('orbax.checkpoint')
  checkpoint_managers = lazy.module('orbax.checkpoint.checkpoint_managers')

_LOG = logging.getLogger(__name__)
_FIELDS = tuple(
  field.name
  for field in dataclasses.fields(TrainState)
  if field.metadata.get('pytree_node', True)
)
_AVERAGE_0_1 = re.compile(r'opt_state\.\d+\.average\.')  # names of version 0.1


PAUSES = (1.0, 4.0, 16.0)  # seconds before a failed write is repeated
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = tuple(os.strerror(number) for number in _FULL)


_STEP = re.compile(r'0|[1-9]\d{0,15}')  # name of a checkpoint
_COMMITTED = 'commit_success.txt'  # Orbax's, of a checkpoint in a bucket


class DamagedError(Exception):
  """The files of a checkpoint are not those that were written."""


class OtherArraysError(Exception):
  """The arrays have other types or shapes than this run's."""


# The checksum.

# Types of words by the bytes of a number.
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}
_SPREAD = 0x9E3779B1  # separates the places of arrays; 2**32 / golden ratio
_PART = 2**16  # words that NumPy sums at a time


def _plain(state: TrainState) -> TrainState:
  """Return the state with its random key as integers."""
  return state.replace(key=jax.random.key_data(state.key))


def examine(state: TrainState) -> tuple[bool, int]:
  """Check a state before it is saved.

  Both results are computed where the arrays are, and do not depend on the
  sharding.

  Returns:
    True if parameters and memory are finite, and a checksum of all arrays.
  """
  plain = _plain(state)
  if all(map(_is_in_memory, jax.tree.leaves(plain))):
    return _examined_in_memory(plain)
  finite, total = jax.device_get(_compiled_examined()(plain))
  return bool(finite), int(total)


@functools.cache
def _compiled_examined():
  return jax.jit(_examined, compiler_options=conv.run_once_options())


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
  words = jax.lax.bitcast_convert_type(bits, _WORDS[bits.dtype.itemsize])
  place = jnp.full(words.shape, number, jnp.uint32) * jnp.uint32(_SPREAD)
  for axis, length in enumerate(words.shape):
    along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    place = place * jnp.uint32(length) + along
  return jnp.sum(words.astype(jnp.uint32) * _factors(place))


def _factors(place):
  """Return an odd number for each place, uint32: MurmurHash3's finaliser."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    place = (place ^ (place >> shift)) * np.uint32(factor)
  return place ^ (place >> 16) | 1


def _is_in_memory(x: jax.Array) -> bool:
  """Return True if NumPy can read the array where it is: on one CPU."""
  devices: list[Any] = list(x.sharding.device_set)
  return len(devices) == 1 and devices[0].platform == 'cpu'


def _examined_in_memory(state: TrainState) -> tuple[bool, int]:
  """Compute `_examined` in NumPy, which needs no compilation."""
  numbers = jax.device_get(jax.tree.leaves((state.params, state.memory)))
  leaves = jax.device_get(jax.tree.leaves(state))
  total = sum(_sum_in_memory(leaf, i) for i, leaf in enumerate(leaves))
  return all(bool(np.isfinite(x).all()) for x in numbers), total % 2**32


def _sum_in_memory(x: np.ndarray, number: int) -> int:
  """Compute `_sum` in parts that stay in the cache."""
  words = np.ascontiguousarray(x).reshape(-1).view(_WORDS[x.dtype.itemsize])
  first, total = number * _SPREAD * words.size, 0
  for start in range(0, words.size, _PART):
    part = words[start : start + _PART]
    place = np.arange(len(part), dtype=np.uint32)
    place += np.uint32((first + start) % 2**32)
    total += int(np.sum(part * _factors(place), dtype=np.uint32))
  return total


def _digest(progress: dict) -> str:
  """Return the SHA-256 of JSON values."""
  text = json.dumps(progress, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


# The layout on disk.


def _signatures(tree: Any) -> dict[str, str]:
  """Return type and shape of every array by name, as 'float32[3,5]'."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): _signature(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def _signature(x) -> str:
  return f'{jnp.dtype(x.dtype).name}[{",".join(map(str, x.shape))}]'


def _refuse_other_arrays(saved: dict[str, str], expected: dict[str, str]):
  """Raise `OtherArraysError` unless all arrays agree.

  The lengths of tables, in labels and memory, may differ.

  Args:
    saved: types and shapes by name.
    expected: those of this run.
  """

  def comparable(name: str, signature: str) -> str:
    is_table = name.split('.')[0] in ('labels', 'memory')
    return re.sub(r'\d+(?=[,\]])', 'n', signature) if is_table else signature

  for name in sorted(saved.keys() | expected.keys()):
    there, here = saved.get(name, 'absent'), expected.get(name, 'absent')
    if comparable(name, there) != comparable(name, here):
      hint = ' (JAX_ENABLE_X64?)' if '64' in there + here else ''
      raise OtherArraysError(f'{name} is {there}, but {here} here{hint}')


def _refuse_irregular(folder: pathlib.Path) -> None:
  """Raise `DamagedError` if a folder has more than folders and regular files.

  Orbax would block when it opens a FIFO. In a bucket there are none.
  """
  if files.in_bucket(folder):
    return
  for where, folders, names in os.walk(folder):
    paths = [os.path.join(where, name) for name in names]
    links = [os.path.join(where, name) for name in folders]
    bad = [p for p in paths if not files.is_regular(p)]
    bad += [p for p in links if os.path.islink(p)]
    if bad:
      name = os.path.relpath(bad[0], folder)
      raise DamagedError(f'{name} is no regular file')


def _is_irregular(folder: pathlib.Path) -> bool:
  try:
    _refuse_irregular(folder)
  except DamagedError:
    return True
  return False


class _Names:
  """Orbax's names of steps, without the steps that it must not open."""

  def __init__(self):
    self._all = ocp.path.step.standard_name_format()

  def build_name(self, step: int) -> str:
    """Return the name of a step."""
    return self._all.build_name(step)

  def find_step(self, base_path, step: int):
    """Return Orbax's metadata of a step."""
    return self._all.find_step(base_path, step)

  def find_all(self, base_path) -> Iterator:
    """Yield Orbax's metadata of every step that is safe to open."""
    for found in self._all.find_all(base_path):
      if not _is_irregular(files.as_folder(found.path)):
        yield found


def _to_tree(plain: TrainState) -> dict[str, Any]:
  """Return the fields to save of a plain state, without absent ones.

  The average may be absent, and fields of the memory that are None.
  """
  fields = {name: getattr(plain, name) for name in _FIELDS}
  if not isinstance(plain.average, Average):
    del fields['average']
  if isinstance(plain.predicted, tuple):
    del fields['predicted']
  optional = _optional(plain.memory)
  if optional:
    memory = {k: v for k, v in vars(plain.memory).items() if v is not None}
    fields['memory'] = memory
  return fields


def _optional(memory: Any) -> list[str]:
  """Return the names of the fields of a memory that may be None."""
  if not dataclasses.is_dataclass(memory):
    return []
  return [x.name for x in dataclasses.fields(memory) if x.default is None]


def _known_to(saved: Collection[str], plain: TrainState) -> TrainState:
  """Return the expected state without memory fields that were not saved.

  Args:
    saved: names of the saved arrays.
    plain: the expected state.
  """
  absent = [
    name
    for name in _optional(plain.memory)
    if not any(array.startswith(f'memory.{name}') for array in saved)
  ]
  if not absent:
    return plain
  return plain.replace(memory=plain.memory.replace(**dict.fromkeys(absent)))


def _from_tree(tree: dict[str, Any], plain: TrainState) -> TrainState:
  """Return the state with the fields of `tree`; the inverse of `_to_tree`."""
  if _optional(plain.memory):
    tree = tree | {'memory': type(plain.memory)(**tree['memory'])}
  return TrainState(**tree, images=plain.images)


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


@functools.cache
def _manager_class() -> type:
  """Return Orbax's manager, without its own response to preemption.

  Orbax would report its steps to JAX's preemption service, and
  `preemption.Notice` others, but JAX counts both together. The loop saves when
  it is preempted.
  """

  class Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
      """Return False."""
      del step
      return False

  return Manager


class Checkpoints:
  """The checkpoints of one job in one folder."""

  def __init__(
    self,
    folder: str | pathlib.Path,
    keep: int = 2,
    permanent: Collection[int] = (),
    clean_up: bool = False,
    keep_hours: float | None = None,
  ):
    """Open the folder, and create it if it does not exist.

    Args:
      folder: folder of the checkpoints.
      keep: number of newest checkpoints to keep.
      permanent: steps whose checkpoints are kept as well.
      clean_up: remove checkpoints that a killed process has not finished. The
        lock on the run's folder must be held.
      keep_hours: keep one checkpoint of every so many hours as well.
    """
    self.folder = files.as_folder(folder).absolute()
    self._keep, self._permanent = keep, list(permanent)
    self._keep_hours = keep_hours
    self._opened: Any = None  # Orbax's manager
    self._pending: tuple[int, Any, Any] | None = None
    # The steps of the checkpoints written last, and begun last.
    self._newest: int | None = None
    self._begun: int | None = None
    with _bucket_errors(self.folder, self.remedy()):
      if clean_up:
        multihost.on_main_process(self._remove_unfinished)
      if multihost.is_multiprocess():
        _ = self._manager  # the processes open it at the same time
      self._newest = self._begun = max(self.steps(), default=None)

  @property
  def _manager(self):
    """Orbax's manager, opened when it is first needed."""
    if self._opened is None:
      policies = [
        checkpoint_managers.LatestN(self._keep),
        checkpoint_managers.CustomSteps(self._permanent),
      ]
      if self._keep_hours:
        seconds = max(1, round(3600 * self._keep_hours))
        policies.append(checkpoint_managers.EveryNSeconds(seconds))
      self._opened = _manager_class()(
        self.folder,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=checkpoint_managers.AnyPreservationPolicy(
            policies
          ),
          step_name_format=_Names(),
          # A folder that another thread cannot create leaves threads behind
          # which wait for it, and with them the process, for ten minutes.
          async_options=ocp.AsyncOptions(
            create_directories_asynchronously=False
          ),
        ),
        item_names=('state', 'progress'),
      )
    return self._opened

  @property
  def _is_new(self) -> bool:
    """True if nothing was ever written to the folder."""
    return self._opened is None and not files.exists(self.folder)

  def _remove_unfinished(self) -> None:
    """Remove the checkpoints that a killed process has not finished.

    In a bucket they have their final names, and lack the mark of a commit.
    """
    if self._is_new:
      return
    if files.in_bucket(self.folder):
      for path in self.folder.iterdir():
        if _STEP.fullmatch(path.name) and not (path / _COMMITTED).is_file():
          path.rmtree()
      return
    for rest in self.folder.glob(f'*{ocp.utils.TMP_DIR_SUFFIX}*'):
      shutil.rmtree(rest, ignore_errors=True)

  def steps(self) -> tuple[int, ...]:
    """Return the steps that have a checkpoint, in rising order."""
    return () if self._is_new else tuple(sorted(self._manager.all_steps()))

  def _on_disk(self) -> tuple[int, ...]:
    """Return the steps of all checkpoints, readable or not, newest first."""
    if self._is_new:
      return ()
    numbers = [p.name for p in self.folder.iterdir()]
    found = {int(n) for n in numbers if _STEP.fullmatch(n)}
    return tuple(sorted(found | set(self.steps()), reverse=True))

  def save(self, step: int, state: TrainState, progress: dict) -> None:
    """Save in the background; a failed write is repeated a few times.

    Args:
      step: step of the state.
      state: copied before this returns, so its buffers may be donated.
      progress: JSON values to save with it, the checksum of `examine` among
        them.

    Raises:
      InputError: this write, or the one before it, failed again and again.
    """
    tree = _to_tree(_plain(state))
    progress = json.loads(json.dumps(progress | {'arrays': _signatures(tree)}))
    progress['digest'] = _digest(progress)
    self._pending = step, tree, progress
    self._repeating(self._write)  # the error may be of the one before
    self._newest, self._begun = self._begun, step

  def _write(self) -> None:
    """Begin to write the newest state."""
    assert self._pending is not None
    step, tree, progress = self._pending
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(tree),
        progress=ocp.args.JsonSave(progress),
      ),
    )

  def _finish(self) -> None:
    """Wait until nothing is being written."""
    self._manager.wait_until_finished()

  def _rewrite(self) -> None:
    """Write the newest state from the start, and wait for it."""
    with contextlib.suppress(Exception):  # of the write that failed, any kind
      self._manager.close()
    self._opened = None
    self._remove_unfinished()
    if self._pending is None or self._pending[0] not in self.steps():
      self._write()
    self._finish()

  def _repeating(self, call: Callable[[], None]) -> None:
    """Call a function that writes; after an error, write the newest state.

    Raises:
      InputError: the last attempt failed, too.
    """
    # The clients of buckets raise many kinds of errors.
    in_bucket = files.in_bucket(self.folder)
    kinds = Exception if in_bucket else (ValueError, OSError)
    for pause in (*PAUSES, None):
      try:
        return call()
      except kinds as error:
        if pause is None or not self._can_rewrite():
          raise self._failed(error) from error
        reason = _first_line(error)
      _LOG.warning(
        'a checkpoint cannot be written to %s (%s): trying again in %g s',
        self.folder,
        reason,
        pause,
      )
      time.sleep(pause)
      call = self._rewrite

  def _can_rewrite(self) -> bool:
    """Return True if the newest state is still there, in this process."""
    if self._pending is None or multihost.is_multiprocess():
      return False
    arrays = jax.tree.leaves(self._pending[1])
    return not any(array.is_deleted() for array in arrays)

  def _failed(self, error: Exception) -> InputError:
    """Return the error that ends the run, with the last good checkpoint."""
    if files.in_bucket(self.folder):
      return _bucket_error(self.folder, error, self.remedy())
    reason = 'the disk is full' if _is_full(error) else _first_line(error)
    good = []
    with contextlib.suppress(OSError):
      # Orbax names a checkpoint so when it is complete.
      good = [int(p.name) for p in self.folder.iterdir() if p.name.isdecimal()]
    last = f'that of step {max(good)}' if good else 'there is none'
    return InputError(
      f'`workdir`: a checkpoint cannot be written to {self.folder} ({reason}): '
      'make the folder writable, with room for it, and run the same command '
      f'again, it goes on from the last good checkpoint ({last})'
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
      InputError: there are checkpoints, and none can be restored; or raised by
        `like`.
    """
    steps, found = self._on_disk(), None
    if step is not None:
      steps = tuple(saved for saved in steps if saved == step)
    failed: dict[int, Exception] = {}
    for step in steps:
      found, problem = self._attempt(step, like)
      if multihost.all_true(found is not None):
        break
      found, failed[step] = None, problem or DamagedError('on another host')
    self._report(failed, step if found else None, put_aside)
    if found:
      self._newest = self._begun = step
    return found

  def _attempt(self, step: int, like):
    """Return a checkpoint and None, or None and the reason."""
    try:
      return self._read(step, like), None
    except (InputError, MemoryError):
      raise
    # Orbax, TensorStore and JAX raise many types for damaged files, among them
    # bare `Exception`. Every one of them leaves the checkpoint before it.
    except Exception as error:
      if 'RESOURCE_EXHAUSTED' in str(error):
        raise  # out of device memory
      if files.in_bucket(self.folder):
        self.folder.is_dir()  # raises if the bucket cannot be read
      return None, error

  def _report(self, failed, restored: int | None, put_aside: bool) -> None:
    """Report the checkpoints that were not restored, and put them aside.

    Args:
      failed: reasons by step.
      restored: step of an older one that was restored instead.
      put_aside: rename the damaged ones.

    Raises:
      InputError: none was restored.
    """
    # Arrays of another type come from other settings if no checkpoint fits, and
    # from damage if an older one does.
    others = {
      step: error
      for step, error in failed.items()
      if isinstance(error, OtherArraysError) and restored is None
    }
    damaged = {s: e for s, e in failed.items() if s not in others}
    names = self._put_aside(damaged) if put_aside and damaged else {}
    for step, error in damaged.items():
      kept = f': kept as {names[step]}' if step in names else ''
      _LOG.warning(
        'Checkpoint %s of step %d cannot be read (%s)%s',
        self.folder,
        step,
        _first_line(error),
        kept,
      )
    if restored is not None and failed:
      _LOG.warning(
        'Resuming from the checkpoint of step %d, the newest before it',
        restored,
      )
    if restored is not None or not failed:
      return
    require(
      not others,
      f'`workdir`: the checkpoints in {self.folder} are of other settings or '
      f'versions ({_first_line(next(iter(others.values()), None))}): use those '
      'that the run was begun with, or `overwrite=True`',
    )
    raise InputError(
      f'`workdir`: no checkpoint in {self.folder} can be read: run the same '
      'command again to start this part anew, or give another `workdir`',
    )

  def _read(self, step: int, like) -> tuple[TrainState, dict]:
    _refuse_irregular(self.folder / str(step))
    if step not in self.steps():
      raise DamagedError('it is incomplete')
    read = functools.partial(self._manager.restore, step)
    progress = self._progress(step)
    signed = progress.pop('arrays', None)
    saved = self._saved_arrays(step)
    plain = _known_to(saved, _abstract_plain(like(progress)))
    is_0_1 = any(map(_AVERAGE_0_1.match, saved))
    expected = _to_tree(plain)
    expected = _to_0_1(expected) if is_0_1 else expected
    types = {name: _signature(x) for name, x in saved.items()}
    if signed is not None:
      _refuse_other_arrays(signed, _signatures(expected))
      if signed != types:
        raise DamagedError('its metadata are of other arrays')
    else:
      _refuse_other_arrays(types, _signatures(expected))
    shapes = {name: x.shape for name, x in saved.items()}
    tree = _with_lengths(expected, shapes, plain.step.sharding)
    tree = read(
      args=ocp.args.Composite(state=ocp.args.StandardRestore(tree))
    ).state
    tree = _from_0_1(tree) if is_0_1 else tree
    state = _from_tree(tree, plain)
    state = state.replace(key=jax.random.wrap_key_data(state.key))
    if progress.pop('checksum') != examine(state)[1]:
      raise DamagedError('its content does not match its checksum')
    return state, progress

  def _progress(self, step: int) -> dict:
    """Return the JSON values of a checkpoint, verified.

    Checkpoints of version 0.1 have no digest.
    """
    progress = self._manager.restore(
      step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())
    ).progress
    if not isinstance(progress, dict):
      raise DamagedError('its progress is no JSON object')
    digest = progress.pop('digest', None)
    if digest is not None and digest != _digest(progress):
      raise DamagedError('its progress does not match its digest')
    return progress

  def _saved_arrays(self, step: int) -> dict[str, Any]:
    """Return Orbax's metadata of the arrays by name, as 'memory.logits'."""
    saved = ocp.StandardCheckpointHandler().metadata(
      self.folder / str(step) / 'state'
    )
    return {x.name: x for x in jax.tree.leaves(saved.tree)}

  def _put_aside(self, steps: Collection[int]) -> dict[int, str]:
    """Rename checkpoints to 'damaged-STEP', and return the new names."""
    self._manager.close()
    self._opened = None
    multihost.barrier('all processes have closed the checkpoints')
    names = multihost.on_main_process(
      lambda: {step: self._rename(step) for step in steps}
    )
    _ = self._manager  # open it again
    return names

  def _rename(self, step: int) -> str:
    names = (f'damaged-{step}{"+" * n}' for n in itertools.count())
    name = next(n for n in names if not files.exists(self.folder / n))
    (self.folder / str(step)).rename(self.folder / name)
    files.sync_folder(self.folder)
    return name

  def wait(self) -> None:
    """Block until every checkpoint is on disk.

    Raises:
      InputError: a checkpoint could not be written.
    """
    if self._opened is not None:
      self._repeating(self._finish)
    self._pending, self._newest = None, self._begun

  def remedy(self) -> str:
    """Return what to do after the bucket has failed; names the checkpoint."""
    last = 'there is no checkpoint yet'
    if self._newest is not None:
      last = f'the last checkpoint is step {self._newest}'
    if self._begun != self._newest:
      last += f', or step {self._begun} if its write has ended'
    return (
      f'{last}: see that the bucket can be used, and run the same command '
      'again, it goes on from there'
    )

  def close(self) -> None:
    """Wait, and release Orbax's threads."""
    if self._opened is None:
      return
    try:
      with _bucket_errors(self.folder, self.remedy()):
        self._opened.close()
    except (ValueError, OSError) as error:
      raise self._failed(error) from error


def _bucket_error(
  folder: pathlib.Path, error: Exception, remedy: str
) -> InputError:
  """Return the line for an error of a bucket."""
  return InputError(
    f'`workdir`: the checkpoints in {folder} cannot be used '
    f'({_first_line(error)}): {remedy}'
  )


@contextlib.contextmanager
def _bucket_errors(folder: pathlib.Path, remedy: str):
  """Turn an error of a bucket into an `InputError`.

  Args:
    folder: of the checkpoints.
    remedy: of `Checkpoints.remedy`.
  """
  try:
    yield
  except Exception as error:  # the clients of buckets raise many kinds
    if not files.in_bucket(folder) or isinstance(error, InputError):
      raise
    raise _bucket_error(folder, error, remedy) from error


def _first_line(error: BaseException | None) -> str:
  """Return the first line of an error, shortened."""
  text = str(error).strip() or type(error).__name__
  return text.split('\n')[0][:200]


def _is_full(error: BaseException | None) -> bool:
  """Return True if an error, or one that led to it, is of a full disk."""
  while error is not None:
    if getattr(error, 'errno', None) in _FULL:
      return True
    if any(text in str(error) for text in _FULL_TEXTS):
      return True
    error = error.__cause__ or error.__context__
  return False


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
