"""A function of the state over every image of a data set, in batches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ssljax import parallel
from ssljax.batches import Feed
from ssljax.networks import conv

_SWEEP = 0x73776570  # 'swep', in the keys of a sweep


def make_sweep(
  observe: Callable, feed: Feed, read: Callable, *, seeds: int, batch: int
) -> Callable:
  """Compiles `observe` once and sweeps it over any rows of a feed.

  Args:
    observe: `(state, image [B, H, W, c], key) -> pytree of [B, ...]`.
    feed: brings the images.
    read: `(source, rows, key) -> images`, usually without augmentation.
    seeds: S, length of the state's leading axis.
    batch: images per call; the last one is padded and cut off again.

  Returns:
    `(state, fitted, rows [M]) -> pytree of [S, M, ...]`.
  """

  def one(state, source, rows):
    key = jax.random.fold_in(state.key, state.step)
    # Away from the step's own keys, and another one for every batch.
    key = jax.random.fold_in(jax.random.fold_in(key, _SWEEP), rows[0])
    read_key, key = jax.random.split(key)
    return observe(state, read(source, rows, read_key), key)

  compiled = jax.jit(
    parallel.over_seeds(one, seeds, (0, None, None)),
    compiler_options=conv.compiler_options(),
  )

  def sweep(state, fitted, rows: np.ndarray):
    padded = np.resize(rows, -(-len(rows) // batch) * batch).astype(np.int32)
    chunks = padded.reshape(-1, batch)
    observed = [
      compiled(state, (pixels, fitted), chunk)
      for pixels, chunk in feed.batches(lambda i: chunks[i], range(len(chunks)))
    ]
    return jax.tree.map(
      lambda *parts: jnp.concatenate(parts, axis=1)[:, : len(rows)], *observed
    )

  return sweep
