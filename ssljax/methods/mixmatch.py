"""MixMatch: guessed labels, sharpened and mixed with the labelled images.

Berthelot, Carlini, Goodfellow, Papernot, Oliver, Raffel, NeurIPS 2019,
Algorithm 1. A step has B labelled images x_b, with labels p_b, and U unlabelled
images u_b in K = 2 views û_bk:

  q̄_b = 1/K Σ_k p(û_bk),  q_b ∝ q̄_b^(1/T), a constant
  X̂ = ((x_b, p_b)), Û = ((û_bk, q_b)), W a shuffle of both
  X' = MixUp(X̂_i, W_i),  U' = MixUp(Û_i, W_{B+i})
  L = 1/B Σ_{X'} CE(p, p(x)) + λ(t) 1/(C·KU) Σ_{U'} ‖q − p(u)‖²
  MixUp(a, b) = λ' a + (1 − λ') b,  λ' = max(λ, 1 − λ), λ ~ Beta(α, α)

for images and labels, with a λ for each pair. λ(t) rises linearly from 0. An
average of the weights is evaluated.

Departures from the paper:
  - X' and U' are one batch for batch norm, and its running statistics are of
    this batch. The authors' code passes B images at a time, each a mixture of
    X' and U' (interleaving), and keeps the statistics of the first.
  - The guess is one pass over the KU views, in training mode as in the authors'
    code; its running statistics are dropped.
  - The decay of the average rises to its value, as (1+t)/(10+t), and the
    batch statistics are averaged too.
  - Weight decay is a part of the gradient, as in all runs; the paper shrinks
    the weights directly, by 0.0004 at each update.
"""

import jax
import jax.numpy as jnp

from ssljax import optimizers
from ssljax.augment import mixup
from ssljax.core import (
  UNLABELLED,
  BatchSpec,
  Loss,
  Method,
  Stage,
  View,
  visible_labels,
)
from ssljax.errors import non_negative, positive, probability
from ssljax.methods import consistency

VIEWS = 2  # K


def mixed(key, images, targets, alpha: float) -> tuple[jax.Array, jax.Array]:
  """Return MixUp of images `[R, H, W, c]` and targets `[R, C]` with a shuffle.

  Args:
    key: random key.
    images: X̂ and Û.
    targets: their labels.
    alpha: α; 0 mixes nothing.
  """
  if not alpha:
    return images, targets
  return mixup.mixup(key, images, targets, alpha)


def mixmatch_loss(
  net,
  batch_spec: BatchSpec,
  temperature: float,
  alpha: float,
  weight: float,
  length: float,
) -> Loss:
  """Return the loss of the stage.

  Args:
    net: the `Network`.
    batch_spec: composition of the batch.
    temperature: T.
    alpha: α.
    weight: largest λ(t).
    length: of the ramp of λ(t), in steps.
  """
  first = batch_spec.labelled

  def loss(params, state, batch, key):
    guess_key, mix_key, pass_key = jax.random.split(key, 3)
    views = jnp.concatenate([batch.image[first:], batch.views['second']])
    constant = jax.lax.stop_gradient(params)
    outputs, _ = net.train(constant, state.stats, views, guess_key)
    by_view = outputs.logits.reshape(VIEWS, batch_spec.unlabelled, -1)
    q = jnp.mean(consistency.probabilities(by_view), axis=0)
    q, state = consistency.align(q, state, batch)
    q = consistency.sharpen(q, temperature)

    labels = visible_labels(state, batch)[:first]
    known = labels != UNLABELLED
    p = jax.nn.one_hot(labels, q.shape[-1])  # zeros without a label
    images, targets = mixed(
      mix_key,
      jnp.concatenate([batch.image[:first], views]),
      jnp.concatenate([p, *[q] * VIEWS]),
      alpha,
    )
    outputs, stats = net.train(params, state.stats, images, pass_key)
    one, two = jnp.split(outputs.logits, [first])
    terms = consistency.soft_cross_entropy(batch.adjusted(one), targets[:first])
    count = jnp.maximum(jnp.sum(known.astype(terms.dtype)), 1.0)
    distances = consistency.squared_distance(
      jax.nn.softmax(two), targets[first:]
    )
    ramp = weight * optimizers.ramp_up_linear(batch.step, length)
    metrics = {
      'cross_entropy': jnp.sum(jnp.where(known, terms, 0.0)) / count,
      'consistency': jnp.mean(distances),
      'confidence': jnp.mean(jnp.max(q, axis=-1)),
      'weight': ramp,
    }
    total = metrics['cross_entropy'] + ramp * metrics['consistency']
    return total, (state.replace(stats=stats), metrics)

  return loss


def mixmatch(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  temperature: float = 0.5,
  alpha: float = 0.75,
  weight: float = 75.0,
  ramp: float = 1 / 64,
  distribution_alignment: bool = False,
  ema: float = 0.999,
) -> Method:
  """Return MixMatch with the paper's constants on CIFAR-10.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step.
    steps: length of the only stage.
    temperature: T, of the sharpened guesses.
    alpha: α of MixUp's Beta distribution; 0 mixes nothing.
    weight: λ_U, largest weight of the loss on unlabelled images.
    ramp: length of the weight's linear ramp, as a share of the steps; 16,384
      of 2^20 steps in the authors' code.
    distribution_alignment: align the predictions that become pseudo-labels with
      the class frequencies of the labels (ReMixMatch).
    ema: decay of the average of the weights that is evaluated; 0 leaves it to
      `average`.
  """
  consistency.check(batch_spec, steps)
  positive(temperature=temperature)
  non_negative(alpha=alpha, weight=weight)
  probability(ramp=ramp)
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=mixmatch_loss(
      net, batch_spec, temperature, alpha, weight, ramp * steps
    ),
    views=(View('second', rows='unlabelled'),),
  )
  return Method(
    name='mixmatch',
    aligns=distribution_alignment,
    stages=(stage,),
    averaging=consistency.averaging(ema),
    quality=consistency.predicted_quality(net, consistency.use_all),
  )


# Settings of the paper on CIFAR-10 that differ from the defaults of other runs.
DEFAULTS = {
  'unlabelled': 'all',
  'network': 'wrn28_2',
  'batch_labelled': 64,
  'batch_unlabelled': 64,
  'optimizer': 'adam',
  'learning_rate': 2e-3,
  'decay': 'constant',
  'weight_decay': 4e-4,
  'clip': 0.0,
  'average': 0.999,
  'preprocess': 'standardize',
  'augment': ['flip', 'translate4'],
}
