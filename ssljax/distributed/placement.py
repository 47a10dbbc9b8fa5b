"""Devices: the mesh, where things lie on it, and compiling onto it."""

from collections.abc import Callable, Sequence
import ctypes
import math
import os

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from ssljax.core import TrainState
from ssljax.distributed import multihost
from ssljax.errors import require


def make_mesh(
  batches: Sequence[int] = (),
  most: int | None = None,
  flags: str = '`batch_labelled`, `batch_unlabelled`',
) -> Mesh:
  """A ('data',) mesh over as many devices as divide every batch size.

  Args:
    batches: the sizes.
    most: devices to use at most; all if None.
    flags: that decide the sizes.

  Raises:
    InputError: there are several processes, and not all devices do.
  """
  whole = math.gcd(*batches) if batches else 0
  count = most or jax.device_count()
  require(
    whole % count == 0 or not multihost.are_several(),
    f'{flags}: batches of {sorted(set(batches))} images are not divided by the '
    f'{count} devices of all processes: change them',
  )
  while whole % count:
    count -= 1
  return jax.make_mesh(
    (count,),
    ('data',),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:count],
  )


def start() -> None:
  """What a program that trains on a CPU does before it computes anything."""
  keep_freed_memory()
  order_exchanges()


def keep_freed_memory() -> None:
  """Has a CPU's allocator keep what a step frees for the next one.

  By default glibc returns large buffers to the system, and every step faults
  all its pages in again: a fifth of the processor time of a small network.
  Does nothing elsewhere.
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


def order_exchanges(several: bool = False) -> None:
  """Has the devices of CPUs exchange one thing after the other.

  By default XLA starts what waits for nothing at once: then one device waits
  in one exchange and another in the next, for ever, where there are no more
  threads than devices; and one process takes what another one sends for what
  belongs to another exchange.

  Args:
    several: processes; else it is only done for several devices of this one.
  """
  given = os.environ.get('XLA_FLAGS', '')
  if several or 'device_count' in given or 'JAX_NUM_CPU_DEVICES' in os.environ:
    flag = '--xla_cpu_enable_concurrency_optimized_scheduler=false'
    os.environ['XLA_FLAGS'] = f'{given} {flag}'


def row_multiple(mesh: Mesh) -> int:
  """Of it are the lengths of tables that are split over the devices.

  The same for every number of devices that divides 256, so that tables are
  seldom cut anew.
  """
  return math.lcm(256, mesh.size)


def on_mesh(f: Callable, mesh: Mesh) -> Callable:
  """`f`, to be compiled, with what it is compiled on as its mesh."""

  def call(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return f(*args)

  return call


def split_images(read: Callable) -> Callable:
  """`read`, with the images `[B, ...]` it returns split over the devices.

  A compiler that is left to choose may have every device compute all of them.
  """

  def call(*args):
    images = read(*args)
    if jax.sharding.get_abstract_mesh().empty:
      return images
    return jax.lax.with_sharding_constraint(images, P('data'))

  return call


class Placer:
  """Puts arrays of the host on the devices, split or whole on each."""

  def __init__(self, mesh: Mesh):
    """Of a mesh over one axis."""
    self._mesh = mesh

  def __call__(self, array: np.ndarray, axis: int | None) -> jax.Array:
    """An array that every process has whole.

    Args:
      array: on the host.
      axis: that is split over the devices; None to have it whole on each.
    """
    where = self._sharding(axis)
    with jax.transfer_guard('allow'):  # JAX takes neither for meant
      return jax.make_array_from_callback(array.shape, where, array.__getitem__)

  def share(self, length: int) -> np.ndarray:
    """Places `[n]` of an axis of this length that lie on this process."""
    where = self._sharding(0).addressable_devices_indices_map((length,))
    places = np.arange(length)
    return np.unique(np.concatenate([places[i] for i in where.values()]))

  def own(self, array: np.ndarray, axis: int, length: int) -> jax.Array:
    """An array of which every process has its own share.

    Args:
      array: on the host, with the places of `share(length)` along an axis.
      axis: which.
      length: of that axis, over all processes.
    """
    shape = *array.shape[:axis], length, *array.shape[axis + 1 :]
    with jax.transfer_guard('allow'):
      return jax.make_array_from_process_local_data(
        self._sharding(axis), array, shape
      )

  def _sharding(self, axis: int | None) -> NamedSharding:
    spec = P() if axis is None else P(*[None] * axis, 'data')
    return NamedSharding(self._mesh, spec)


def state_sharding(mesh: Mesh, layout, images: int) -> TrainState:
  """Where a state `[S, ...]` lies: what has a row per image is split.

  Args:
    mesh: of `make_mesh`.
    layout: of a method, where its memory lies.
    images: N.
  """
  whole = NamedSharding(mesh, P())
  split = NamedSharding(mesh, P(None, 'data'))
  memory = jax.tree.map(
    lambda spec: NamedSharding(mesh, P(None, *spec)),
    layout,
    is_leaf=lambda leaf: isinstance(leaf, P),
  )
  return TrainState(
    step=whole,
    key=whole,
    params=whole,
    stats=whole,
    opt_state=whole,
    average=whole,
    labels=split,
    memory=memory,
    images=images,
  )


def bytes_per_device(shapes, sharding) -> int:
  """What a tree of `jax.ShapeDtypeStruct` takes on the fullest device.

  Args:
    shapes: the tree.
    sharding: a prefix tree of `Sharding`.
  """
  of_leaf = lambda x, where: (
    math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize
  )
  shardings = jax.tree.broadcast(sharding, shapes)
  return sum(jax.tree.leaves(jax.tree.map(of_leaf, shapes, shardings)))


def device_bytes() -> int:
  """Memory of a device; devices of one CPU share its own."""
  stats = jax.local_devices()[0].memory_stats()
  if stats:
    return stats['bytes_limit']
  whole = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return whole // jax.local_device_count()


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
