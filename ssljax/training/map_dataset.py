"""Maps a function of the state over the images of a data set, in batches."""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from ssljax.core import PerExample, Quality, rounded_up
from ssljax.data.feeds import Feed
from ssljax.distributed import placement, watchdog
from ssljax.networks.cpu import conv

_MAP = 0x73776570  # folded into the random keys of a pass over a data set
_EVEN = 32  # a batch of even size is a multiple of it


def row_writer(mesh) -> tuple[Callable, Callable]:
  """Return functions that assemble trees of `[S, size, ...]` from batches.

  The trees are sharded over the mesh by rows (their second axis).

  Returns:
    `(part [S, B, ...], size) -> zeros [S, size, ...]`, and `(whole, part,
    places [B]) -> whole` with the part's rows written to those places. Places
    of `size` and above are left out.
  """
  by_rows = NamedSharding(mesh, P(None, 'data'))

  @functools.partial(jax.jit, static_argnums=1, out_shardings=by_rows)
  def empty(part, size):
    zeros = lambda x: jnp.zeros([x.shape[0], size, *x.shape[2:]], x.dtype)
    return jax.tree.map(zeros, part)

  # In a scatter every device keeps only its own rows of a part; a concatenation
  # would gather all rows on each device.
  @functools.partial(jax.jit, donate_argnums=0, out_shardings=by_rows)
  def write(whole, part, places):
    put = lambda whole, part: whole.at[:, places].set(part, mode='drop')
    return jax.tree.map(put, whole, part)

  return empty, write


def even_batch(rows: int, most: int, devices: int) -> int:
  """Return the size of the fewest batches of equal size for some rows.

  Args:
    rows: at least 1.
    most: rows of a batch.
    devices: that share a batch.
  """
  batches = math.ceil(rows / most)
  multiple = math.lcm(_EVEN, devices)
  return min(most, rounded_up(math.ceil(rows / batches), multiple))


def make_map(
  per_example: PerExample | Quality,
  feed: Feed,
  read: Callable,
  mesh,
  *,
  seeds: int,
  batch: int,
  fitted_axis: int | None = None,
  by_row: bool = False,
) -> Callable:
  """Compile a function once and return its map over rows of a feed.

  Args:
    per_example: function to map. Its key is the same for all batches, so that
      a pass with dropout is the same function of every image.
    feed: source of the images.
    read: `(source, rows, key) -> images`, usually without augmentation.
    mesh: the outputs are sharded over it by rows.
    seeds: S, length of the state's leading axis.
    batch: images per call.
    fitted_axis: 0 if `fitted` has a leading axis [S].
    by_row: the function is a `Quality`, which takes row numbers and no key.

  Returns:
    `(state, fitted, rows [M], in_place=False, before=None, even=False) ->
    outputs`, a tree of `[S, M, ...]` with M padded to a multiple of
    `placement.row_multiple` and zeros in the padding. `in_place` returns
    `[S, N, ...]` instead, padded likewise, with the output of a row at its row
    number and zeros in all other rows. `before()` is called before each batch;
    if it raises, the pass ends. `even` takes smaller batches of equal size,
    instead of computing much padding, and compiles for each size.
  """

  def one(state, source, rows):
    key = jax.random.fold_in(state.key, state.step)
    # Distinct from the keys of the train step.
    read_key, key = jax.random.split(jax.random.fold_in(key, _MAP))
    read_key = jax.random.fold_in(read_key, rows[0])
    images = placement.split_images(read)(source, rows, read_key)
    if by_row:
      return per_example(state, rows, images)
    return per_example(state, images, key)

  over_seeds = placement.over_seeds(one, seeds, (0, (None, fitted_axis), None))
  compiled = jax.jit(
    placement.on_mesh(over_seeds, mesh),
    compiler_options=conv.compiler_options(),
  )
  empty, write = row_writer(mesh)

  def map_rows(
    state, fitted, rows: np.ndarray, in_place=False, before=None, even=False
  ):
    each = even_batch(len(rows), batch, mesh.size) if even else batch
    padded = np.resize(rows, rounded_up(len(rows), each)).astype(np.int32)
    chunks = padded.reshape(-1, each)
    count = feed.size if in_place else len(rows)
    size = rounded_up(count, placement.row_multiple(mesh))
    number = np.arange(padded.size, dtype=np.int32)
    places = padded if in_place else number
    places = np.where(number < len(rows), places, size).reshape(-1, each)
    whole = None
    fed = feed.batches(lambda i: chunks[i], range(len(chunks)))
    for (pixels, chunk), here in zip(fed, places, strict=True):
      watchdog.reset()
      if before:
        before()
      part = compiled(state, (pixels, fitted), chunk)
      whole = empty(part, size) if whole is None else whole
      whole = write(whole, part, here)
    return whole

  return map_rows
