"""A function of the state over every image of a data set, in batches."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from ssljax.core import rounded_up
from ssljax.data.feeds import Feed
from ssljax.distributed import placement, watchdog
from ssljax.networks.cpu import conv

_SWEEP = 0x73776570  # 'swep', in the keys of a sweep


def row_writer(mesh) -> tuple[Callable, Callable]:
  """Makes trees of `[S, size, ...]`, split over the mesh by rows, in parts.

  Returns:
    `(part [S, B, ...], size) -> zeros`, and `(whole, part, places [B]) ->
    whole` with the part's rows in those places, `size` and above left out.
  """
  by_rows = NamedSharding(mesh, P(None, 'data'))

  @functools.partial(jax.jit, static_argnums=1, out_shardings=by_rows)
  def empty(part, size):
    zeros = lambda x: jnp.zeros([x.shape[0], size, *x.shape[2:]], x.dtype)
    return jax.tree.map(zeros, part)

  # By a scatter every device takes its own rows of a part: a concatenation
  # would bring all rows to each of them.
  @functools.partial(jax.jit, donate_argnums=0, out_shardings=by_rows)
  def write(whole, part, places):
    put = lambda whole, part: whole.at[:, places].set(part, mode='drop')
    return jax.tree.map(put, whole, part)

  return empty, write


def make_sweep(
  per_example: Callable,
  feed: Feed,
  read: Callable,
  mesh,
  *,
  seeds: int,
  batch: int,
) -> Callable:
  """Compiles `per_example` once and sweeps it over any rows of a feed.

  Args:
    per_example: `(state, image [B, H, W, c], key) -> pytree of [B, ...]`; the key
      is the same for all batches of a sweep.
    feed: brings the images.
    read: `(source, rows, key) -> images`, usually without augmentation.
    mesh: what is observed is split over it by rows.
    seeds: S, length of the state's leading axis.
    batch: images per call.

  Returns:
    `(state, fitted, rows [M], in_place=False, before=None) -> pytree of [S, M,
    ...]`, with M rounded up to a multiple of `parallel.row_multiple`: there are
    zeros after the M. In place it is of [S, N, ...], rounded up likewise, with
    what is of a row in that row, and zeros in the others. `before()` is called
    before each batch, and may end the sweep by raising.
  """

  def one(state, source, rows):
    key = jax.random.fold_in(state.key, state.step)
    # Away from the step's own keys. All batches are observed with one key, so
    # that a pass with dropout is the same function of every image.
    read_key, key = jax.random.split(jax.random.fold_in(key, _SWEEP))
    read_key = jax.random.fold_in(read_key, rows[0])
    images = placement.split_images(read)(source, rows, read_key)
    return per_example(state, images, key)

  mapped = placement.over_seeds(one, seeds, (0, None, None))
  compiled = jax.jit(
    placement.on_mesh(mapped, mesh), compiler_options=conv.compiler_options()
  )
  empty, write = row_writer(mesh)

  def sweep(state, fitted, rows: np.ndarray, in_place=False, before=None):
    padded = np.resize(rows, -(-len(rows) // batch) * batch).astype(np.int32)
    chunks = padded.reshape(-1, batch)
    count = feed.size if in_place else len(rows)
    size = rounded_up(count, placement.row_multiple(mesh))
    number = np.arange(padded.size, dtype=np.int32)
    places = padded if in_place else number
    places = np.where(number < len(rows), places, size).reshape(-1, batch)
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

  return sweep
