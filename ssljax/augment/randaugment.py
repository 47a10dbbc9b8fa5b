"""RandAugment: a few random operations of random magnitude.

Cubuk, Zoph, Shlens, Le 2020 (arXiv:1909.13719), with the operations and ranges
of FixMatch (Sohn et al. 2020, arXiv:2001.07685, Table 12). For each of n
operations, drawn with replacement from the first 14 of `ops.OPS`, a level l in
[0, 1] sets the value:

  brightness, color, contrast, sharpness   factor 0.95 - 0.9 l
  posterize                                ⌊8 - 4 l⌋ bits
  solarize                                 from grey level 256 (1 - l) on
  rotate                                   ± 30 l degrees
  shear_x, shear_y                         ± 0.3 l
  translate_x, translate_y                 ± 0.3 l of the side
  autocontrast, equalize, identity         no level

FixMatch's variant, which is the default, draws l ~ U(0, m / 10) for each
operation; at m = 10 these are the paper's ranges. Cubuk et al. use l = m / 10.
Signs are fair coins.

Departures from FixMatch's TensorFlow code, which differs from its paper: there
an operation is applied with probability 1/2, factors are 0.1 + 1.8 l, and
translations are at most 10 pixels. Cubuk et al. have other ranges, too: factors
from 0.1 to 1.9, for example.
FixMatch applies cutout afterwards: add `cutout:0.5` to the chain.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ssljax import errors
from ssljax.augment import ops as operations
from ssljax.augment import standard

COUNT = 14  # operations, the first of `ops.OPS`
MOST = 10  # the largest magnitude
MANY = 16  # operations on one image, at most
_FACTOR = (0.95, 0.05)
# Name: (value at level 0, value at level 1).
RANGES = {
  'autocontrast': (1.0, 1.0),
  'brightness': _FACTOR,
  'color': _FACTOR,
  'contrast': _FACTOR,
  'equalize': (1.0, 1.0),
  'identity': (0.0, 0.0),
  'posterize': (8.0, 4.0),
  'rotate': (0.0, 30.0),
  'sharpness': _FACTOR,
  'shear_x': (0.0, 0.3),
  'shear_y': (0.0, 0.3),
  'solarize': (256.0, 0.0),
  'translate_x': (0.0, 0.3),
  'translate_y': (0.0, 0.3),
}
SIGNED = ('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y')


def randaugment(
  ops: int = 2, magnitude: float = 10.0, *, fixed: bool = False
) -> standard.Augmentation:
  """Apply random operations, each with its own magnitude.

  Apply it before preprocessing, to images [H, W, c] in [0, 1].

  Args:
    ops: n, number of operations; 2 in FixMatch.
    magnitude: m, the largest magnitude, in [0, 10].
    fixed: give every operation the magnitude m instead of a random one.

  Raises:
    InputError: a value is out of range.
  """
  errors.require(
    isinstance(ops, (int, np.integer)) and 0 < ops <= MANY,
    f'`ops`={ops}: give a number of operations from 1 to {MANY}',
  )
  errors.require(
    0 <= magnitude <= MOST,
    f'`magnitude`={magnitude}: give a number from 0 to {MOST}',
  )
  count, share = int(ops), float(magnitude) / MOST

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    # A single draw, because each generator costs compile time.
    which, level, sign = jax.random.uniform(key, (3, count))
    op = jnp.floor(which * COUNT).astype(jnp.int32)
    level = jnp.full_like(level, share) if fixed else share * level
    value = values(op, level, jnp.where(sign < 0.5, -1.0, 1.0))
    return transform_all(image, op, value)

  return apply


def values(op: chex.Array, level: chex.Array, sign: chex.Array) -> chex.Array:
  """Return the value of every operation, as `ops.transform` takes it.

  Args:
    op: [n] int32, index into `ops.OPS`, below COUNT.
    level: [n] in [0, 1].
    sign: [n] -1 or 1, for the operations that have two directions.
  """
  names = operations.OPS[:COUNT]
  start, end = jnp.asarray([RANGES[name] for name in names], jnp.float32).T
  signed = jnp.asarray([name in SIGNED for name in names])
  value = start[op] + level * (end - start)[op]
  return jnp.where(signed[op], sign * value, value)


def _transform_each(
  image: chex.Array, op: chex.Array, value: chex.Array
) -> chex.Array:
  """Apply operations [n] with values [n] to [H, W, c], one after another."""
  for i in range(len(op)):
    image = operations.transform(image, op[i], value[i])
  return image


transform_all = operations.batched(_transform_each)
