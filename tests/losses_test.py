import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from ssljax import losses
from ssljax.core import UNLABELLED


def test_cross_entropy_of_uniform_logits_is_log_c():
  loss = losses.cross_entropy(jnp.zeros([2, 5]), jnp.array([0, 3]))
  chex.assert_trees_all_close(loss, jnp.full([2], np.log(5)), rtol=1e-6)


def test_cross_entropy_by_hand():
  # softmax(0, log 3) = (1/4, 3/4).
  logits = jnp.array([[0.0, np.log(3)]])
  chex.assert_trees_all_close(
    losses.cross_entropy(logits, jnp.array([1])),
    jnp.array([-np.log(3 / 4)], jnp.float32),
    rtol=1e-6,
  )
  # Smoothing 0.2 over two classes makes the target (0.1, 0.9).
  chex.assert_trees_all_close(
    losses.cross_entropy(logits, jnp.array([1]), smoothing=0.2),
    jnp.array([-0.1 * np.log(1 / 4) - 0.9 * np.log(3 / 4)], jnp.float32),
    rtol=1e-6,
  )


def test_a_row_without_a_label_has_no_cross_entropy_and_no_slope():
  logits = jnp.array([[1.0, 2.0, 3.0]])
  loss = lambda x: losses.cross_entropy(x, jnp.array([UNLABELLED])).sum()
  value, slope = jax.value_and_grad(loss)(logits)
  assert value == 0
  chex.assert_trees_all_equal(slope, jnp.zeros_like(logits))


@pytest.mark.parametrize('scale', [1e4, 1e38])
def test_losses_stay_finite_at_extreme_logits(scale):
  logits = jnp.array([[scale, -scale, 0.0], [0.0, 0.0, 0.0]])

  def total(logits):
    p = jax.nn.softmax(logits)
    terms = losses.cross_entropy(logits[:1], jnp.array([0]))
    return (
      terms.sum() + losses.entropy(p).sum() + losses.kl_divergence(p, p).sum()
    )

  chex.assert_tree_all_finite(jax.value_and_grad(total)(logits))


def test_entropy_is_zero_when_certain_and_log_c_when_uniform():
  p = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
  expected = jnp.array([0.0, np.log(4)], jnp.float32)
  chex.assert_trees_all_close(losses.entropy(p), expected, atol=1e-6)


def test_the_entropy_of_logits_by_hand_and_at_extreme_logits():
  # softmax(0, log 3) = (1/4, 3/4).
  logits = jnp.array([[0.0, np.log(3)], [5.0, 5.0], [1e4, -1e4]])
  by_hand = -np.log(1 / 4) / 4 - 3 / 4 * np.log(3 / 4)
  expected = jnp.array([by_hand, np.log(2), 0.0], jnp.float32)
  chex.assert_trees_all_close(losses.logit_entropy(logits), expected, rtol=1e-5)
  total = lambda x: losses.logit_entropy(x).sum()
  chex.assert_tree_all_finite(jax.grad(total)(logits))


def test_kl_divergence_by_hand_and_zero_when_equal():
  p, q = jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75])
  # ½ log 2 + ½ log ⅔
  expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
  assert losses.kl_divergence(p, q) == pytest.approx(expected, rel=1e-5)
  assert losses.kl_divergence(p, p) == 0


def test_slopes_equal_numerical_ones():
  key = jax.random.key(0)
  logits = jax.random.normal(key, [4, 3])
  q = jax.nn.softmax(jax.random.normal(jax.random.key(1), [4, 3]))

  def total(logits):
    p = jax.nn.softmax(logits)
    cross = losses.cross_entropy(
      logits, jnp.array([0, 1, 2, -1]), smoothing=0.1
    )
    return jnp.mean(cross + losses.entropy(p) + losses.kl_divergence(p, q))

  slope = np.asarray(jax.grad(total)(logits))
  assert np.abs(slope).max() > 0.01
  step = 1e-2
  for place in np.ndindex(*logits.shape):
    up, down = (total(logits.at[place].add(s * step)) for s in (1, -1))
    np.testing.assert_allclose(
      slope[place], (up - down) / (2 * step), rtol=1e-2, atol=1e-4
    )


def test_mean_where_of_no_row_is_zero():
  assert losses.mean_where(jnp.ones([3]), jnp.zeros([3], bool)) == 0
  mask = jnp.array([True, False, True])
  assert losses.mean_where(jnp.array([1.0, 9.0, 3.0]), mask) == 2
