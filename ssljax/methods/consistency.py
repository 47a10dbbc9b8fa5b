"""Parts that the consistency methods share: views, forward passes, losses.

Letters: L labelled and U unlabelled rows of a batch of B = L + U, C classes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from ssljax import losses
from ssljax.augment import named
from ssljax.core import (
  UNLABELLED,
  Averaging,
  Batch,
  BatchSpec,
  Quality,
  TrainState,
  UsedLabels,
  View,
  class_frequencies,
  visible_labels,
)
from ssljax.errors import InputError, fraction, positive, require

CTAUGMENT = 'ctaugment'  # a strong augmentation that needs a memory


def strong_view(names: Sequence[str]) -> View:
  """Return the strongly augmented view 'strong' of the unlabelled rows.

  The run's own augmentations, which make the weak view, are applied before it.

  Args:
    names: strong augmentations in order, see `augment.named`; () for none, and
      the view then is a second weak one.
  """
  require(
    CTAUGMENT not in names,
    f'`strong_augment`={",".join(names)}: {CTAUGMENT} has rates that only '
    '`method`=fixmatch learns: give another augmentation, as randaugment:2:10',
  )
  if not names:
    return View('strong', rows='unlabelled')
  try:
    on_pixels, augment = named.split_chain(names)
  except InputError as error:
    message = error.marked.replace('`augment`', '`strong_augment`')
    raise InputError(message) from error
  return View('strong', on_pixels=on_pixels, augment=augment, rows='unlabelled')


def check(batch_spec: BatchSpec, steps: int) -> None:
  """Raise `InputError` unless a step has labelled and unlabelled images."""
  positive(steps=steps)
  positive(
    batch_labelled=batch_spec.labelled, batch_unlabelled=batch_spec.unlabelled
  )


def averaging(ema: float) -> Averaging | None:
  """Return the average of weights and batch statistics that is evaluated.

  Args:
    ema: decay of the average; 0 leaves it to the run (`average`).
  """
  fraction(ema=ema)
  return Averaging(ema, statistics=True) if ema else None


# Forward passes.


class Logits(NamedTuple):
  """The logits of a step's views, from one pass over all of them."""

  labelled: jax.Array  # [L, C], weak view
  weak: jax.Array  # [U, C], weak view
  strong: jax.Array  # [U, C], strong view of the same images


def forward(net, params, stats, batch: Batch, key):
  """Apply the network once, in training mode, to the weak and strong views.

  The statistics of batch norm are over all L + 2 U images.

  Args:
    net: the `Network`.
    params: its parameters.
    stats: its statistics before the step.
    batch: images `[L + U, H, W, c]`, and the view 'strong' `[U, H, W, c]`.
    key: random key of dropout.

  Returns:
    `Logits`, and the statistics after the step.
  """
  strong = batch.views['strong']
  assert isinstance(strong, jax.Array)  # not `Recorded`
  images = jnp.concatenate([batch.image, strong])
  outputs, stats = net.train(params, stats, images, key)
  size, unlabelled = len(batch.image), len(strong)
  at = [size - unlabelled, size]
  return Logits(*jnp.split(outputs.logits, at)), stats


def labelled_cross_entropy(logits, state, batch: Batch) -> jax.Array:
  """Compute the mean cross-entropy `[]` of the labelled rows.

  Args:
    logits: `[L, C]` of the labelled rows, the first of the batch.
    state: state before the step.
    batch: batch of the step.
  """
  labels = visible_labels(state, batch)[: len(logits)]
  terms = losses.cross_entropy(batch.adjusted(logits), labels)
  return losses.mean_where(terms, labels != UNLABELLED)


# Pseudo-labels.


def probabilities(logits) -> jax.Array:
  """Return softmax(logits) `[..., C]`, through which no gradient flows."""
  return jax.lax.stop_gradient(jax.nn.softmax(logits))


class PseudoLabels(NamedTuple):
  """The most likely classes of some images."""

  label: jax.Array  # [U] int32
  confidence: jax.Array  # [U], probability of the label


def pseudo_labels(p) -> PseudoLabels:
  """Return the most likely class of each of `p [U, C]`."""
  label = jnp.argmax(p, axis=-1).astype(jnp.int32)
  return PseudoLabels(label, jnp.max(p, axis=-1))


# Distribution alignment.

ALIGNMENT_DECAY = 0.99  # of the average p̃; ReMixMatch has the last 128 batches
_LEAST = 1e-6  # added to both distributions, as in SoftMatch's code


def align(q, state: TrainState, batch: Batch) -> tuple[jax.Array, TrainState]:
  """Align predictions with the class frequencies of the labels.

  Berthelot, Carlini, Cubuk, Kurakin, Sohn, Zhang, Raffel, ReMixMatch, ICLR
  2020: q̃ = Normalize(q · p(y) / p̃), with the frequencies p(y) of the labels and
  the moving average p̃ of the predictions, which is updated before it is used
  and starts as the first batch's mean.

  Args:
    q: `[U, C]` probabilities of the unlabelled images.
    state: state before the step.
    batch: batch of the step.

  Returns:
    q̃ `[U, C]`, and the state with the new average; both are the arguments in a
    state without `predicted`.
  """
  if isinstance(state.predicted, tuple):
    return q, state
  mean = jnp.mean(q, axis=0)
  moved = ALIGNMENT_DECAY * state.predicted + (1 - ALIGNMENT_DECAY) * mean
  predicted = jnp.where(batch.step == 0, mean, moved)
  state = state.replace(predicted=predicted)
  return aligned(q, state), state


def aligned(q, state: TrainState) -> jax.Array:
  """Return q̃ `[B, C]` of probabilities q by the averages of a state."""
  if isinstance(state.predicted, tuple):
    return q
  p = q * _ratio(state, q.shape[-1])
  return p / jnp.sum(p, axis=-1, keepdims=True)


def aligned_logits(logits, state: TrainState) -> jax.Array:
  """Return logits `[B, C]` of q̃ for logits `[B, C]` of q, see `aligned`."""
  if isinstance(state.predicted, tuple):
    return logits
  return logits + jnp.log(_ratio(state, logits.shape[-1]))


def _ratio(state: TrainState, classes: int) -> jax.Array:
  """Return p(y) / p̃ `[1, C]`."""
  target = class_frequencies(state.labels, classes)
  return ((target + _LEAST) / (state.predicted + _LEAST))[None]


def trained_weights(state: TrainState):
  """Return (params, stats) of the trained weights."""
  return state.params, state.stats


def predicted_quality(
  net, use: Callable, weights: Callable = trained_weights
) -> Quality:
  """Return the `Method.quality` of pseudo-labels that the network predicts.

  Args:
    net: the `Network`, in inference mode.
    use: `(probabilities [B, C], memory) -> weight [B]` of the predicted class,
      see `core.UsedLabels`.
    weights: `state -> (params, stats)` of the weights that predict.
  """

  def quality(state, rows, image):
    del rows
    p = jax.nn.softmax(net.infer(*weights(state), image).logits)
    p = aligned(p, state)
    weight = use(p, state.memory).astype(p.dtype)
    return UsedLabels(pseudo_labels(p).label, weight)

  return quality


def use_all(p, memory) -> jax.Array:
  """Return weight 1 for every image, see `predicted_quality`."""
  del memory
  return jnp.ones_like(p[:, 0])


def use_confident(threshold: float) -> Callable:
  """Return the weights of images of at least a confidence."""
  return lambda p, memory: jnp.max(p, axis=-1) >= threshold


def weighted_cross_entropy(logits, labels, weights) -> jax.Array:
  """Compute 1/U Σ_b w_b CE(label_b, softmax logits_b) `[]`.

  Args:
    logits: `[U, C]`.
    labels: `[U]` int32.
    weights: `[U]` float or bool.
  """
  weights = weights.astype(logits.dtype)
  return jnp.mean(weights * losses.cross_entropy(logits, labels))


def soft_cross_entropy(logits, targets) -> jax.Array:
  """Compute −Σ_c t_c log softmax(logits)_c `[B]`.

  Args:
    logits: `[B, C]`.
    targets: `[B, C]` probabilities.
  """
  chex.assert_equal_shape([logits, targets])
  return optax.softmax_cross_entropy(logits, targets)


def sharpen(p, temperature: float) -> jax.Array:
  """Return p^(1/T) / Σ_c p_c^(1/T) of probabilities `[..., C]`."""
  logits = jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny)) / temperature
  return jax.nn.softmax(logits)


def squared_distance(p, q) -> jax.Array:
  """Compute 1/C ‖p − q‖² `[B]` of probabilities `[B, C]`."""
  chex.assert_equal_shape([p, q])
  return jnp.mean(jnp.square(p - q), axis=-1)
