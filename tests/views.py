"""Noise images and random augmentations of them, for tests."""

import functools

import jax
import numpy as np

# Nearly all of the time is compilation; without optimisation it takes a third.
# The emitters are the usual ones, not those of `conftest.py`: these round a
# pixel that they compute twice in two ways, and `pix.adjust_hue`, which asks
# which channel equals the largest, then returns another hue.
_OPTIONS = {
  'xla_backend_optimization_level': 0,
  'xla_cpu_use_fusion_emitters': True,
}
compiled = functools.partial(jax.jit, compiler_options=_OPTIONS)


def picture(*shape, seed=0):
  """Float32 noise in [0, 1): no two shifts of the image are equal."""
  return np.random.default_rng(seed).random(shape, np.float32)


@functools.partial(compiled, static_argnums=(0, 2))
def _many(augmentation, image, n):
  keys = jax.random.split(jax.random.key(7), n)
  return jax.vmap(augmentation, (0, None))(keys, image)


def many(augmentation, image, n):
  """Augmentations [n, H, W, c] of one image under n different keys."""
  return np.asarray(_many(augmentation, image, n))


def which(results, candidates):
  """For each result, the index of the candidate that it equals, or -1."""
  same = (results[:, None] == candidates[None]).all(axis=(2, 3, 4))
  return np.where(same.any(axis=1), same.argmax(axis=1), -1)
