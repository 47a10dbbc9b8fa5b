"""CTAugment: RandAugment with learned magnitudes.

ReMixMatch (Berthelot et al. 2020, arXiv:1911.09785, section 3.2.2 and appendix
D); FixMatch uses it too. The level of every operation is divided into bins, and
every bin has a rate ρ, a running mean of the match between prediction and label
for images that were changed at this level. A strong view draws each operation
uniformly, and its bin with probability proportional to

  p̂ / max p̂ where that is at least 0.85, else 0      p̂ = ρ + 0.01

and its level uniformly in the bin. A labelled image is changed with uniform
levels (a probe), and the bins used are updated with the match ω:

  ρ ← 0.99 ρ + 0.01 ω        ω = 1 - ½ Σ_c |p_c - y_c|

The rates are the memory of a method: this module has no state.

Values of the operations of `ops.OPS` at the level l in [0, 1]:

  autocontrast, equalize, invert, smooth   blend with weight l
  brightness, color, contrast, sharpness   factor 0.1 + 1.9 l
  cutout                                   square of l / 2 of the side
  posterize                                ⌊1 + 8 l⌋ bits, at most 8
  rescale                                  l / 4 of each border is cropped
  rotate                                   45 (2 l - 1) degrees
  shear_x, shear_y                         0.3 (2 l - 1)
  translate_x, translate_y                 0.3 (2 l - 1) of the side
  solarize                                 from grey level 256 l on

Departures: `rescale` has one parameter, the scale, and the nearest neighbour's
interpolation, of the six that the authors choose from by a second parameter.
The released code translates by 0.3 pixels; this module follows the paper, which
says a share of the side. Angles and factors are not rounded.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from ssljax.augment import ops as operations

BINS = 17  # of a level; operations with fewer are in FEWER
FEWER = {'posterize': 8, 'identity': 1}
DECAY = 0.99  # of the rates
THRESHOLD = 0.85  # bins with a smaller share of the best rate are not used
DEPTH = 2  # operations on one image
# Name: (value at level 0, value at level 1).
RANGES = {
  'autocontrast': (0.0, 1.0),
  'brightness': (0.1, 2.0),
  'color': (0.1, 2.0),
  'contrast': (0.1, 2.0),
  'equalize': (0.0, 1.0),
  'identity': (0.0, 0.0),
  'posterize': (1.0, 8.999),
  'rotate': (-45.0, 45.0),
  'sharpness': (0.1, 2.0),
  'shear_x': (-0.3, 0.3),
  'shear_y': (-0.3, 0.3),
  'solarize': (0.0, 256.0),
  'translate_x': (-0.3, 0.3),
  'translate_y': (-0.3, 0.3),
  'cutout': (0.0, 0.5),
  'invert': (0.0, 1.0),
  'rescale': (0.0, 0.25),
  'smooth': (0.0, 1.0),
}


class Policy(NamedTuple):
  """The operations on one image, in order."""

  ops: chex.Array  # [n] int32, index into `ops.OPS`
  bins: chex.Array  # [n] int32, bin of the level
  levels: chex.Array  # [n] in [0, 1)
  positions: chex.Array  # [n, 2] in [0, 1), centre of cutout


def bin_counts() -> chex.Array:
  """Return the number of bins of every operation [K] int32."""
  counts = [FEWER.get(name, BINS) for name in operations.OPS]
  return jnp.asarray(counts, jnp.int32)


def init_rates() -> chex.Array:
  """Return the initial rates [K, BINS] float32, 1 for every bin."""
  return jnp.ones([len(operations.OPS), BINS], jnp.float32)


def bin_probabilities(
  rates: chex.Array, *, decay: float = DECAY, threshold: float = THRESHOLD
) -> chex.Array:
  """Return the probability of every bin, given the operation.

  Args:
    rates: [K, BINS].
    decay: of `update`; 1 - decay is added to every rate, so that none is 0.
    threshold: smallest share of the best rate with a probability above 0.

  Returns:
    [K, BINS], 0 beyond the bins of an operation.
  """
  exists = jnp.arange(BINS)[None, :] < bin_counts()[:, None]
  p = jnp.where(exists, rates + (1 - decay), 0.0)
  p = p / jnp.max(p, axis=1, keepdims=True)
  p = jnp.where(p < threshold, 0.0, p)
  return p / jnp.sum(p, axis=1, keepdims=True)


def draw(
  key: chex.PRNGKey,
  rates: chex.Array | None,
  *,
  depth: int = DEPTH,
  decay: float = DECAY,
  threshold: float = THRESHOLD,
) -> Policy:
  """Draw the operations on one image.

  Args:
    key: random key.
    rates: [K, BINS]; None draws uniform levels, for a probe.
    depth: n, number of operations.
    decay: as in `bin_probabilities`.
    threshold: as in `bin_probabilities`.
  """
  which, which_bin, level, *position = jax.random.uniform(key, (5, depth))
  op = jnp.floor(which * len(operations.OPS)).astype(jnp.int32)
  count = bin_counts()[op]
  length = count.astype(level.dtype)
  if rates is None:
    bins = jnp.floor(level * length).astype(jnp.int32)
  else:
    p = bin_probabilities(rates, decay=decay, threshold=threshold)[op]
    total = jnp.cumsum(p, axis=1)
    # Rounding may leave the last total below 1, and a bin of probability 0
    # must not be drawn: the draw is scaled to the total.
    point = which_bin[:, None] * total[:, -1:]
    bins = jnp.sum(point >= total, axis=1).astype(jnp.int32)
    level = (bins.astype(level.dtype) + level) / length
  # A product of float32 may be rounded up to the next whole number.
  bins = jnp.minimum(bins, count - 1)
  return Policy(op, bins, level, jnp.stack(position, axis=1))


def transform(image: chex.Array, policy: Policy) -> chex.Array:
  """Apply a policy to an image [H, W, c] in [0, 1]."""
  start, end = jnp.asarray(
    [RANGES[name] for name in operations.OPS], jnp.float32
  ).T
  value = start[policy.ops] + policy.levels * (end - start)[policy.ops]
  return _transform_all(image, policy.ops, value, policy.positions)


def _transform_each(image, op, value, position):
  """Apply operations [n] to [H, W, c], one after another."""
  for i in range(len(op)):
    image = operations.transform(image, op[i], value[i], position[i])
  return image


_transform_all = operations.batched(_transform_each)


def apply(
  key: chex.PRNGKey, image: chex.Array, rates: chex.Array, *, depth: int = DEPTH
) -> chex.Array:
  """Return a strong view of an image [H, W, c] in [0, 1].

  Args:
    key: random key of the image.
    image: [H, W, c], before preprocessing.
    rates: [K, BINS].
    depth: number of operations.
  """
  return transform(image, draw(key, rates, depth=depth))


def probe(
  key: chex.PRNGKey, image: chex.Array, *, depth: int = DEPTH
) -> tuple[chex.Array, chex.Array, chex.Array]:
  """Return an image changed at uniform levels, for `update`.

  Args:
    key: random key of the image.
    image: [H, W, c], before preprocessing.
    depth: n, number of operations.

  Returns:
    The image [H, W, c], the operations [n] and their bins [n], both int32.
  """
  policy = draw(key, None, depth=depth)
  return transform(image, policy), policy.ops, policy.bins


def match(probabilities: chex.Array, targets: chex.Array) -> chex.Array:
  """Return ω = 1 - ½ Σ|p - y| [B] of predictions and one-hot labels [B, C]."""
  chex.assert_equal_shape([probabilities, targets])
  return 1 - 0.5 * jnp.sum(jnp.abs(probabilities - targets), axis=-1)


def update(
  rates: chex.Array,
  ops: chex.Array,
  bins: chex.Array,
  proximity: chex.Array,
  *,
  decay: float = DECAY,
) -> chex.Array:
  """Return the rates after ρ ← decay ρ + (1 - decay) ω for every bin used.

  The updates follow one another in the order of the rows and, in a row, of its
  operations. In closed form, a bin with m updates ω_1 .. ω_m becomes
  decay^m ρ + (1 - decay) Σ_j decay^(m - j) ω_j.

  Args:
    rates: [K, BINS].
    ops: [B, n] int32, operations of the probes.
    bins: [B, n] int32, their bins.
    proximity: [B] ω in [0, 1], see `match`.
    decay: in [0, 1).
  """
  chex.assert_equal_shape([ops, bins])
  depth = ops.shape[1]
  cell = (ops * rates.shape[1] + bins).reshape(-1)  # [B n]
  omega = jnp.repeat(proximity, depth)
  same = cell[:, None] == cell[None, :]
  order = jnp.arange(len(cell))
  later = jnp.sum(same & (order[:, None] < order[None, :]), axis=1)
  power = lambda count: jnp.float32(decay) ** count.astype(jnp.float32)
  flat = rates.reshape(-1)
  count = jnp.zeros(flat.shape, jnp.int32).at[cell].add(1)
  added = jnp.zeros_like(flat).at[cell].add((1 - decay) * power(later) * omega)
  return (power(count) * flat + added).reshape(rates.shape)
