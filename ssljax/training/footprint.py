"""Memory that the state of a method needs on a device, computed from shapes."""

from typing import Any, NamedTuple

import jax
import numpy as np

from ssljax.core import TrainState, init_stage, init_state
from ssljax.distributed import placement
from ssljax.errors import require

NAMES = {
  'step': 'step and key',
  'key': 'step and key',
  'params': 'parameters',
  'stats': 'batch-norm statistics',
  'opt_state': 'optimiser',
  'average': 'averaged weights',
}


class Part(NamedTuple):
  """Memory of one part of a state."""

  bytes: int  # on the device that holds most
  split: bool  # sharded over the devices, not replicated


def stage_shapes(
  method,
  net,
  shape,
  rows: int,
  *,
  labelled,
  multiple,
  extra,
  seeds,
  trained=None,
) -> list[TrainState]:
  """Return the shapes `[S, ...]` of the state in each stage.

  No arrays are created.

  Args:
    method: the `Method`.
    net: the `Network` it trains.
    shape: (H, W, c) of an image.
    rows: N, the number of training images.
    labelled: as in `core.MemorySpec`.
    multiple: as in `core.MemorySpec`.
    extra: as in `core.MemorySpec`.
    seeds: S.
    trained: A of `core.MemorySpec`; all rows if None.

  Raises:
    InputError: the method refuses these sizes.
  """
  options = dict(labelled=labelled, multiple=multiple, extra=extra)
  admitted = None
  if method.uses_admitted and trained is not None and trained < rows:
    admitted = jax.ShapeDtypeStruct((trained,), np.int32)
  state = jax.eval_shape(
    lambda key, labels, image, admitted: init_state(
      method, net, key, labels, image, admitted=admitted, **options
    ),
    jax.random.key(0),
    jax.ShapeDtypeStruct((rows,), np.int32),
    jax.ShapeDtypeStruct((1, *shape), np.float32),
    admitted,
  )
  with_seeds = lambda x: jax.ShapeDtypeStruct((seeds, *x.shape), x.dtype)
  states = []
  for stage in method.stages:
    state = jax.eval_shape(
      lambda state, stage=stage: init_stage(stage, state, method.averaging),
      state,
    )
    states.append(jax.tree.map(with_seeds, state))
  return states


def parts(state: TrainState, sharding: TrainState) -> dict[str, Part]:
  """Return the parts of a state by name; the memory field by field.

  Args:
    state: shapes of the state.
    sharding: a prefix tree of `NamedSharding`.
  """
  shardings = jax.tree.leaves(jax.tree.broadcast(sharding, state))
  leaves = jax.tree_util.tree_leaves_with_path(state)
  found: dict[str, Any] = {}
  for (path, leaf), where in zip(leaves, shardings, strict=True):
    name = _name(path)
    size = placement.bytes_per_device(leaf, where)
    total, split = found.get(name, Part(0, True))
    found[name] = Part(total + size, split and any(where.spec))
  return found


def _name(path) -> str:
  """Return the name in `NAMES`, or 'memory, FIELD'."""
  field = path[0].name
  if field == 'memory':
    inner = jax.tree_util.keystr(path[1:2], simple=True)
    return f'memory, {inner}'
  return NAMES.get(field, field)


def refuse_too_large(method, state: TrainState, mesh) -> None:
  """Raise InputError if a state does not fit on the devices of a mesh."""
  sharding = placement.state_sharding(mesh, method.layout, state.images)
  sizes = {name: part.bytes for name, part in parts(state, sharding).items()}
  needed, available = sum(sizes.values()), placement.device_bytes()
  largest = max(sizes, key=sizes.__getitem__)
  require(
    needed <= available,
    f'`seeds_at_once`={len(state.step)}: the state of {method.name} needs '
    f'{needed} bytes on each of {mesh.size} devices, most of them for '
    f'{largest}, {sizes[largest]}, but a device has {available}: use more '
    'devices, fewer seeds at once, or a network with a smaller embedding; '
    'experiments/plan.py has the details',
  )
