"""Mixup compared with a loop over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ssljax.augment import mixup
from ssljax.errors import InputError

RNG = np.random.default_rng(0)


def test_rows_and_targets_are_mixed_alike():
  x = RNG.random((6, 3, 2, 1), np.float32)
  y = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1]]
  key = jax.random.key(0)
  mix = mixup.draw_mix(key, 6, 0.75)
  got_x, got_y = mixup.mixup(key, x, y, 0.75)
  assert sorted(np.asarray(mix.partner)) == list(range(6))
  for i, (j, share) in enumerate(zip(mix.partner, mix.weight, strict=True)):
    for got, rows in ((got_x, x), (got_y, y)):
      np.testing.assert_allclose(
        got[i], share * rows[i] + (1 - share) * rows[int(j)], rtol=1e-5
      )
  np.testing.assert_allclose(got_y.sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize('alpha', [0.75, 1, 4.0])
@pytest.mark.parametrize('dominant', [False, True])
def test_weights_have_a_beta_distribution(alpha, dominant):
  mix = mixup.draw_mix(jax.random.key(1), 2000, alpha, dominant=dominant)
  beta = scipy.stats.beta(alpha, alpha).cdf
  # The larger of λ and 1 - λ is below t if λ is in (1 - t, t).
  folded = lambda t: np.where(t > 0.5, beta(t) - beta(1 - t), 0)
  test = scipy.stats.kstest(
    np.asarray(mix.weight), folded if dominant else beta
  )
  assert test.pvalue > 1e-3
  assert (mix.weight >= 0.5).all() == dominant


def test_a_batch_may_share_its_weight():
  mix = mixup.draw_mix(jax.random.key(0), 8, 1.0, per_row=False)
  assert len(np.unique(mix.weight)) == 1
  assert len(np.unique(mixup.draw_mix(jax.random.key(0), 8, 1.0).weight)) == 8


@pytest.mark.parametrize('alpha', [0, -1.0, float('nan')])
def test_a_bad_alpha_is_refused_by_name(alpha):
  with pytest.raises(InputError, match=f'alpha={alpha}'):
    mixup.mixup(jax.random.key(0), jnp.ones([2, 1]), jnp.ones([2, 1]), alpha)
