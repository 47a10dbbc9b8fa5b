"""Devices: the mesh, where things lie on it, and compiling onto it."""

from collections.abc import Callable, Sequence
import ctypes
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from ssljax.core import TrainState


def make_mesh(batches: Sequence[int] = ()) -> Mesh:
  """A ('data',) mesh over as many devices as divide every batch size."""
  whole = math.gcd(*batches) if batches else 0
  count = jax.device_count()
  while whole % count:
    count -= 1
  return jax.make_mesh(
    (count,),
    ('data',),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:count],
  )


def keep_freed_memory() -> None:
  """Has a CPU's allocator keep what a step frees for the next one.

  By default glibc returns large buffers to the system, and every step faults
  all its pages in again: a fifth of the processor time of a small network.
  To be called before anything is computed; does nothing elsewhere.
  """
  arena_max, mmap_max, top_pad, trim_threshold = -8, -4, -2, -1
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # not glibc
    return
  mallopt(arena_max, 1)  # other arenas cannot hold large buffers
  mallopt(mmap_max, 0)
  mallopt(trim_threshold, 2**31 - 1)
  mallopt(top_pad, 2**26)


def rounded_up(count: int, mesh: Mesh) -> int:
  """The least multiple of the number of devices that is not below `count`."""
  return -(-count // mesh.size) * mesh.size


def placer(mesh: Mesh) -> Callable:
  """`(array, batch axis or None) -> jax.Array`, split or whole on each."""

  def place(array: np.ndarray, axis: int | None) -> jax.Array:
    spec = P() if axis is None else P(*[None] * axis, 'data')
    return jax.device_put(array, NamedSharding(mesh, spec))

  return place


def state_sharding(mesh: Mesh, layout) -> TrainState:
  """Where a state [S, ...] lies: the memory by layout, the rest whole."""
  whole = NamedSharding(mesh, P())
  memory = jax.tree.map(
    lambda spec: NamedSharding(mesh, P(None, *spec)),
    layout,
    is_leaf=lambda leaf: isinstance(leaf, P),
  )
  return TrainState(whole, whole, whole, whole, whole, whole, memory)


def over_seeds(f: Callable, seeds: int, in_axes: tuple) -> Callable:
  """Maps `f` over the leading axis [S] of the arguments that have one.

  One seed is not vmapped but stripped of the axis: a convolution under vmap
  becomes a grouped one, which some backends run badly.
  """
  if seeds > 1:
    return jax.vmap(f, in_axes)

  def single(*args):
    stripped = jax.tree.map(
      lambda axis, arg: arg if axis is None else jax.tree.map(_first, arg),
      in_axes,
      args,
      is_leaf=lambda axis: axis is None,
    )
    return jax.tree.map(lambda x: x[None], f(*stripped))

  return single


def _first(x: jax.Array) -> jax.Array:
  return x[0]
