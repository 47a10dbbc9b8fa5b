"""What the state of a method takes on a device, before it is made."""

from typing import NamedTuple

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
  """Some of what lies on the devices."""

  bytes: int  # on the fullest device
  split: bool  # over the devices, and not whole on each


def stage_shapes(
  method, net, shape, rows: int, *, labelled, multiple, extra, seeds
) -> list[TrainState]:
  """Shapes `[S, ...]` of the state in each stage; nothing is made.

  Args:
    method: the `Method`.
    net: the `Network` it trains.
    shape: (H, W, c) of an image.
    rows: N, training images.
    labelled: as in `core.Spec`.
    multiple: likewise.
    extra: likewise.
    seeds: S.

  Raises:
    InputError: such a memory cannot be.
  """
  how = dict(labelled=labelled, multiple=multiple, extra=extra)
  state = jax.eval_shape(
    lambda key, labels, image: init_state(
      method, net, key, labels, image, **how
    ),
    jax.random.key(0),
    jax.ShapeDtypeStruct((rows,), np.int32),
    jax.ShapeDtypeStruct((1, *shape), np.float32),
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
  """What a state is made of; a memory by its fields.

  Args:
    state: its shapes.
    sharding: a prefix tree of `NamedSharding`.
  """
  shardings = jax.tree.leaves(jax.tree.broadcast(sharding, state))
  leaves = jax.tree_util.tree_leaves_with_path(state)
  found = {}
  for (path, leaf), where in zip(leaves, shardings, strict=True):
    name = _name(path)
    more = placement.bytes_per_device(leaf, where)
    so_far, split = found.get(name, Part(0, True))
    found[name] = Part(so_far + more, split and any(where.spec))
  return found


def _name(path) -> str:
  """As `NAMES` has it, or 'memory, FIELD'."""
  field = path[0].name
  if field == 'memory':
    inner = jax.tree_util.keystr(path[1:2], simple=True)
    return f'memory, {inner}'
  return NAMES.get(field, field)


def refuse_too_large(method, state: TrainState, mesh) -> None:
  """Refuses a state that does not fit on the devices of a mesh."""
  where = placement.state_sharding(mesh, method.layout, state.images)
  of_part = {name: part.bytes for name, part in parts(state, where).items()}
  need, have = sum(of_part.values()), placement.device_bytes()
  largest = max(of_part, key=of_part.get)
  require(
    need <= have,
    f'`seeds_at_once`={len(state.step)}: the state of {method.name} needs '
    f'{need} bytes on each of {mesh.size} devices, which have {have}, most of '
    f'them for {largest}, {of_part[largest]}: take more devices, fewer seeds '
    'at once, or a network with a smaller embedding; experiments/plan.py has '
    'the details',
  )
