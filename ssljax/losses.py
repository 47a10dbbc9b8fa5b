"""Loss terms on logits and probabilities, without network or state."""

import chex
import jax
import jax.numpy as jnp
import optax

from ssljax.core import UNLABELLED

# Added inside a logarithm of a probability that may be zero.
EPSILON = 1e-8


def cross_entropy(logits, labels, *, smoothing: float = 0.0) -> jax.Array:
  """Compute the cross-entropy `[B]`, 0 for rows without a label.

  −Σ_c t_c log softmax(logits)_c with t = (1−s)·onehot + s/C.

  Args:
    logits: `[B, C]`.
    labels: `[B]` int32; rows that are `UNLABELLED` give 0.
    smoothing: s, the mass of the target that is uniform over all C classes.

  Examples:
    >>> logits = jnp.array([[2.0, 0.0], [0.0, 0.0], [5.0, 1.0]])
    >>> print(cross_entropy(logits, jnp.array([0, 1, UNLABELLED])).round(3))
    [0.127 0.693 0.   ]
  """
  chex.assert_rank([logits, labels], [2, 1])
  known = labels != UNLABELLED
  targets = jax.nn.one_hot(jnp.where(known, labels, 0), logits.shape[-1])
  targets = optax.smooth_labels(targets, smoothing)
  return jnp.where(known, optax.softmax_cross_entropy(logits, targets), 0.0)


def entropy(p) -> jax.Array:
  """Compute the entropy −Σ p log(p + ε) `[...]` in nats.

  Args:
    p: `[..., C]` probabilities.

  Examples:
    >>> print(entropy(jnp.array([0.5, 0.5])).round(3))  # log 2
    0.693
  """
  return -jnp.sum(p * jnp.log(p + EPSILON), axis=-1)


def logit_entropy(logits) -> jax.Array:
  """Compute the entropy −Σ p log p `[...]` in nats, p = softmax(logits).

  Args:
    logits: `[..., C]`.
  """
  log_p = jax.nn.log_softmax(logits)
  return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def logit_kl_divergence(logits, other) -> jax.Array:
  """Compute D_KL(p‖q) `[...]` in nats, p = softmax(logits), q = softmax(other).

  Args:
    logits: `[..., C]`.
    other: `[..., C]`.

  Examples:
    >>> certain, uniform = jnp.array([20.0, 0.0]), jnp.zeros(2)
    >>> print(logit_kl_divergence(certain, uniform).round(3))  # log 2
    0.693
  """
  log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def kl_divergence(p, q) -> jax.Array:
  """Compute D_KL(p‖q) = Σ p log((p + ε)/(q + ε)) `[...]` in nats.

  Args:
    p: `[..., C]` probabilities.
    q: `[..., C]` probabilities.
  """
  chex.assert_equal_shape([p, q])
  ratio = jnp.log(p + EPSILON) - jnp.log(q + EPSILON)
  return jnp.sum(p * ratio, axis=-1)


def mean_where(values, mask) -> jax.Array:
  """Compute the mean `[]` of the values where the mask is True, else 0.

  Args:
    values: `[B]`.
    mask: `[B]` bool; the mean over no row is 0.

  Examples:
    >>> values = jnp.array([1.0, 2.0, 6.0])
    >>> print(mean_where(values, jnp.array([True, False, True])))
    3.5
  """
  chex.assert_equal_shape([values, mask])
  total = jnp.sum(jnp.where(mask, values, 0.0))
  count = jnp.sum(mask.astype(values.dtype))
  return total / jnp.maximum(count, 1.0)
