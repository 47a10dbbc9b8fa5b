"""The device mesh, placement of arrays on it, and settings for CPU devices.

Training runs under `jax.jit` over a one-dimensional mesh with the axis 'data'.
Batches and tables with a row per image are sharded over it; everything else is
replicated.
"""

from collections.abc import Callable, Sequence
import ctypes
import math
import os
import re
from typing import Any, Literal

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from ssljax.core import TrainState
from ssljax.distributed import multihost
from ssljax.errors import require


def make_mesh(
  batches: Sequence[int] = (),
  max_devices: int | None = None,
  flags: str = '`batch_labelled`, `batch_unlabelled`',
) -> Mesh:
  """Return a ('data',) mesh of as many devices as divide every batch size.

  Args:
    batches: the batch sizes.
    max_devices: largest number of devices; all if None.
    flags: names of the parameters that set the sizes, for the message.

  Raises:
    InputError: there are several processes, and the batch sizes are not
      divisible by the number of all devices.
  """
  divisor = math.gcd(*batches) if batches else 0
  count = max_devices or jax.device_count()
  require(
    divisor % count == 0 or not multihost.is_multiprocess(),
    f'{flags}: batches of {sorted(set(batches))} images are not divisible by '
    f'the {count} devices of all processes: give multiples of {count}',
  )
  while divisor % count:
    count -= 1
  return jax.make_mesh(
    (count,),
    ('data',),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:count],
  )


def compute_dtype() -> Literal['float32', 'bfloat16']:
  """Return the dtype in which the devices compute fastest: a network's default.

  It is bfloat16 on TPUs, and on GPUs with matrix units for it (compute
  capability 8.0 and more, or those of AMD's); float32 elsewhere.
  """
  device = jax.devices()[0]
  if device.platform == 'tpu':
    return 'bfloat16'
  capability = getattr(device, 'compute_capability', '0')
  if device.platform != 'gpu':
    return 'float32'
  number = re.fullmatch(r'(\d+)(\.\d+)?', str(capability))
  return 'bfloat16' if number is None or float(number[0]) >= 8 else 'float32'


def configure_cpu() -> None:
  """Configure memory and collectives of CPU devices.

  Call at the start of a program, before anything is computed.
  """
  keep_freed_memory()
  serialize_cpu_collectives()


def keep_freed_memory() -> None:
  """Configure glibc's allocator to keep freed memory for the next step.

  By default glibc returns large buffers to the system, and every step has page
  faults for all of them: a fifth of the CPU time of a small network. Without
  glibc this does nothing.
  """
  arena_max, mmap_max, top_pad, trim_threshold = -8, -4, -2, -1
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # the C library is not glibc
    return
  mallopt(arena_max, 1)  # only the main arena can hold large buffers
  mallopt(mmap_max, 0)
  mallopt(trim_threshold, 2**31 - 1)
  mallopt(top_pad, 2**26)


def serialize_cpu_collectives(multiprocess: bool = False) -> None:
  """Make CPU devices run collectives one after the other, by an XLA flag.

  By default XLA starts independent collectives concurrently. With no more
  threads than devices this deadlocks: one device waits in one collective,
  another device in the next. With several processes, one process may also take
  the data of another collective for its own.

  Args:
    multiprocess: set the flag for several processes; otherwise it is set only
      if this process has several CPU devices.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  several_devices = (
    'device_count' in flags or 'JAX_NUM_CPU_DEVICES' in os.environ
  )
  if multiprocess or several_devices:
    flag = '--xla_cpu_enable_concurrency_optimized_scheduler=false'
    os.environ['XLA_FLAGS'] = f'{flags} {flag}'


def row_multiple(mesh: Mesh) -> int:
  """Return the number whose multiples are the lengths of sharded tables.

  It is the same for every number of devices that divides 256, so that tables
  seldom have to be padded again on another number of devices.
  """
  return math.lcm(256, mesh.size)


def on_mesh(f: Callable, mesh: Mesh) -> Callable:
  """Return `f` for compilation with `mesh` as the mesh of the context."""

  def call(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return f(*args)

  return call


def split_images(read: Callable) -> Callable:
  """Return `read` with a constraint that shards its images `[B, ...]`.

  Without the constraint the compiler may let every device compute all images.
  """

  def call(*args):
    images = read(*args)
    if jax.sharding.get_abstract_mesh().empty:
      return images
    return jax.lax.with_sharding_constraint(images, P('data'))

  return call


class Placer:
  """Transfer of host arrays to the devices, sharded or replicated."""

  def __init__(self, mesh: Mesh):
    """Take a mesh of one axis."""
    self._mesh = mesh

  def __call__(self, array: np.ndarray, axis: int | None) -> jax.Array:
    """Place an array that every process has in full.

    Args:
      array: on the host.
      axis: the axis to shard over the devices; None to replicate.
    """
    sharding = self._sharding(axis)
    # `jax.transfer_guard('disallow')` does not see that these are explicit.
    with jax.transfer_guard('allow'):
      return jax.make_array_from_callback(
        array.shape, sharding, array.__getitem__
      )

  def local_indices(self, length: int) -> np.ndarray:
    """Return the indices `[n]` of a sharded axis on this process's devices."""
    slices = self._sharding(0).addressable_devices_indices_map((length,))
    indices = np.arange(length)
    return np.unique(np.concatenate([indices[i] for i in slices.values()]))

  def place_local(self, array: np.ndarray, axis: int, length: int) -> jax.Array:
    """Place an array of which every process has its own part.

    Args:
      array: on the host, with `local_indices(length)` along an axis.
      axis: the axis that is sharded.
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
  """Return the sharding of a state `[S, ...]`: labels and memory by rows.

  Args:
    mesh: from `make_mesh`.
    layout: `Method.layout`, the partition specs of the memory.
    images: N.
  """
  # Shardings stand for the arrays of the state.
  whole: Any = NamedSharding(mesh, P())
  split: Any = NamedSharding(mesh, P(None, 'data'))
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
    predicted=whole,
    images=images,
  )


def bytes_per_device(shapes, sharding) -> int:
  """Return the bytes of a tree of arrays on the device that holds most.

  Args:
    shapes: a tree of `jax.ShapeDtypeStruct`.
    sharding: a prefix tree of `Sharding`.
  """
  leaf_bytes = lambda x, sharding: (
    math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
  )
  shardings = jax.tree.broadcast(sharding, shapes)
  return sum(jax.tree.leaves(jax.tree.map(leaf_bytes, shapes, shardings)))


def device_bytes() -> int:
  """Return the memory of a device; CPU devices share the host's equally."""
  stats = jax.local_devices()[0].memory_stats()
  if stats:
    return stats['bytes_limit']
  host = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return host // jax.local_device_count()


def memory_in_use() -> tuple[int, int] | None:
  """Return bytes in use now, and at most so far, of this process's devices.

  Returns:
    The largest numbers of any device; None of devices that do not report it,
    as CPUs.
  """
  found = [device.memory_stats() or {} for device in jax.local_devices()]
  if not all('bytes_in_use' in stats for stats in found):
    return None
  now = max(stats['bytes_in_use'] for stats in found)
  most = max(stats.get('peak_bytes_in_use', 0) for stats in found)
  return now, max(now, most)


def over_seeds(f: Callable, seeds: int, in_axes: tuple) -> Callable:
  """Map `f` over the leading axis [S] of the arguments that have one.

  For a single seed the axis is removed instead of using vmap, because vmap
  turns a convolution into a grouped convolution, which is slow on some
  backends.

  Args:
    f: a function of one seed.
    seeds: S.
    in_axes: 0 for each argument with a seed axis, None for the others.
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
