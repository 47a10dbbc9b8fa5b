"""Random views of noise, for the tests of augmentations."""

import functools

import jax
import numpy as np

# Nearly all of the time is compilation; unoptimised it takes a third.
compiled = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def picture(*shape, seed=0):
  """Float32 noise in [0, 1): no two of its shifts agree."""
  return np.random.default_rng(seed).random(shape, np.float32)


@functools.partial(compiled, static_argnums=(0, 2))
def _many(augmentation, image, n):
  keys = jax.random.split(jax.random.key(7), n)
  return jax.vmap(augmentation, (0, None))(keys, image)


def many(augmentation, image, n):
  """The results [n, H, W, c] of n keys on one image."""
  return np.asarray(_many(augmentation, image, n))
