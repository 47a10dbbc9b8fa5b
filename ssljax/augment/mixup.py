"""Mixup: convex combinations of the rows of a batch.

Zhang, Cisse, Dauphin, Lopez-Paz 2018 (arXiv:1710.09412): with λ ~ Beta(α, α)
and a random partner j of every row i,

  x'_i = λ x_i + (1 - λ) x_j        y'_i = λ y_i + (1 - λ) y_j

MixMatch (Berthelot et al. 2019, arXiv:1905.02249, equations 8 to 11) takes
λ' = max(λ, 1 - λ), so that a mixed row stays closer to x_i, and draws one λ per
row. ICT (Verma et al. 2019, arXiv:1903.03825) draws one λ per batch.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from ssljax import errors


class Mix(NamedTuple):
  """The partner of every row of a batch, and its weight."""

  partner: chex.Array  # [B] int32, a permutation
  weight: chex.Array  # [B] λ, the weight of the row itself


def draw_mix(
  key: chex.PRNGKey,
  rows: int,
  alpha: float,
  *,
  dominant: bool = True,
  per_row: bool = True,
) -> Mix:
  """Draw partners and weights.

  Args:
    key: random key.
    rows: B.
    alpha: α, above 0; 0.75 in MixMatch, 1 draws λ uniformly.
    dominant: use max(λ, 1 - λ), as MixMatch.
    per_row: draw one λ per row, not one per batch.

  Raises:
    InputError: α is not a number above 0.
  """
  errors.positive(alpha=alpha)
  key_partner, key_weight = jax.random.split(key)
  both = jnp.float32(alpha)
  weight = jax.random.beta(key_weight, both, both, (rows if per_row else 1,))
  if dominant:
    weight = jnp.maximum(weight, 1 - weight)
  partner = jax.random.permutation(
    key_partner, jnp.arange(rows, dtype=jnp.int32)
  )
  return Mix(partner, jnp.broadcast_to(weight, (rows,)))


def combine(mix: Mix, rows: chex.Array) -> chex.Array:
  """Return λ x_i + (1 - λ) x_j for every row i of x [B, ...], j its partner."""
  chex.assert_equal_shape_prefix([mix.partner, mix.weight, rows], 1)
  weight = jnp.expand_dims(mix.weight, tuple(range(1, rows.ndim)))
  return weight * rows + (1 - weight) * rows[mix.partner]


def mixup(
  key: chex.PRNGKey,
  x: chex.Array,
  y: chex.Array,
  alpha: float,
  *,
  dominant: bool = True,
  per_row: bool = True,
) -> tuple[chex.Array, chex.Array]:
  """Return the mixed images [B, ...] and targets [B, C].

  Args:
    key: random key.
    x: [B, ...] images or features.
    y: [B, C] probabilities.
    alpha: as in `draw_mix`.
    dominant: as in `draw_mix`.
    per_row: as in `draw_mix`.
  """
  mix = draw_mix(key, len(x), alpha, dominant=dominant, per_row=per_row)
  return combine(mix, x), combine(mix, y)
