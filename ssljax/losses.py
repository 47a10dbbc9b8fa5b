"""Loss terms on logits, probabilities and embeddings; no network, no state."""

import chex
import jax
import jax.numpy as jnp
import optax

from ssljax.core import UNLABELLED

# Added inside a logarithm of a probability that may be zero.
EPSILON = 1e-8


def cross_entropy(logits, labels, *, smoothing: float = 0.0) -> jax.Array:
  """Cross-entropy with uniform label smoothing, 0 where there is no label.

  Args:
    logits: `[B, C]`.
    labels: `[B]` int32, `UNLABELLED` rows give 0.
    smoothing: mass of the target spread evenly over all C classes.

  Returns:
    `[B]`, −Σ_c t_c log softmax(logits)_c with t = (1−s)·onehot + s/C.
  """
  chex.assert_rank([logits, labels], [2, 1])
  known = labels != UNLABELLED
  targets = jax.nn.one_hot(jnp.where(known, labels, 0), logits.shape[-1])
  targets = optax.smooth_labels(targets, smoothing)
  return jnp.where(known, optax.softmax_cross_entropy(logits, targets), 0.0)


def entropy(p) -> jax.Array:
  """Entropy in nats of `p [..., C]`: H(p) = −Σ p log(p + ε) `[...]`."""
  return -jnp.sum(p * jnp.log(p + EPSILON), axis=-1)


def kl_divergence(p, q) -> jax.Array:
  """D_KL(p‖q) = Σ p log((p + ε)/(q + ε)) of `[..., C]` pairs, `[...]` nats."""
  chex.assert_equal_shape([p, q])
  ratio = jnp.log(p + EPSILON) - jnp.log(q + EPSILON)
  return jnp.sum(p * ratio, axis=-1)


def mean_where(values, mask) -> jax.Array:
  """Mean of `values [B]` over the rows of `mask [B]`; 0 where there is none."""
  chex.assert_equal_shape([values, mask])
  total = jnp.sum(jnp.where(mask, values, 0.0))
  count = jnp.sum(mask.astype(values.dtype))
  return total / jnp.maximum(count, 1.0)
