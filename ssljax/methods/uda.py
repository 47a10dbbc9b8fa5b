"""UDA: unsupervised data augmentation for consistency training.

Xie, Dai, Hovy, Luong, Le, NeurIPS 2020. With predictions q_b of the weak view
of an unlabelled image and Q_b of its strong view, a step minimises L_s + λ L_u:

  L_u = 1/μB Σ_b 1[max q_b > β] D_KL(q_b^(τ)‖Q_b)
  L_s = Σ_b 1[p_b(y_b) ≤ η] CE(y_b, p_b) / max(1, Σ_b 1[p_b(y_b) ≤ η])
  η = α (1 − 1/C) + 1/C

q^(τ) is the softmax of the logits over τ (sharpening), a constant of the
gradient. Training signal annealing (TSA) leaves out the labelled images that
are predicted well already; α rises with the step t of T:

  linear: t/T   log: 1 − exp(−5 t/T)   exp: exp(5 (t/T − 1))   none: η = 1

The three views are one batch for batch norm, as in the authors' code. An
average of the weights is evaluated.

Departures from the paper:
  - The strong view adds `strong_augment` to the run's own augmentations. The
    paper's RandAugment on CIFAR-10 has the operations of AutoAugment.
  - The decay of the average rises to its value, as (1+t)/(10+t), and the
    batch statistics are averaged too.
  - The learning rate has no warm-up.
  - The authors' weak view of an unlabelled image is cropped and mirrored as
    here; images are standardized per channel, where the authors scale them.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from ssljax import losses
from ssljax.core import (
  UNLABELLED,
  BatchSpec,
  Loss,
  Method,
  Stage,
  visible_labels,
)
from ssljax.errors import non_negative, positive, probability
from ssljax.methods import consistency
from ssljax.methods.fixmatch import DEFAULTS as FIXMATCH

Annealing = Literal['none', 'linear', 'log', 'exp']
SCALE = 5.0  # of the exponentials of the annealing


def annealed_threshold(
  kind: Annealing, step, steps: int, classes: int
) -> jax.Array:
  """Compute η `[]`.

  Args:
    kind: schedule of α.
    step: t `[]` int32.
    steps: T.
    classes: C.
  """
  t = jnp.asarray(step, jnp.float32) / steps
  alpha = {
    'none': jnp.ones_like(t),
    'linear': t,
    'log': 1 - jnp.exp(-SCALE * t),
    'exp': jnp.exp(SCALE * (t - 1)),
  }[kind]
  return alpha * (1 - 1 / classes) + 1 / classes


def annealed_cross_entropy(
  logits, labels, threshold
) -> tuple[jax.Array, jax.Array]:
  """Compute L_s `[]`, and the share `[]` of the labelled images that it keeps.

  Args:
    logits: `[L, C]`.
    labels: `[L]` int32, UNLABELLED where there is none.
    threshold: η `[]`.
  """
  known = labels != UNLABELLED
  terms = losses.cross_entropy(logits, labels)
  p = jnp.exp(-jax.lax.stop_gradient(terms))  # of the label
  kept = known & (p <= threshold)
  share = losses.mean_where(kept.astype(logits.dtype), known)
  return losses.mean_where(terms, kept), share


def uda_loss(
  net,
  batch_spec: BatchSpec,
  steps: int,
  threshold: float,
  temperature: float,
  weight: float,
  annealing: Annealing,
) -> Loss:
  """Return the loss of the stage; the arguments are those of `uda`."""

  def loss(params, state, batch, key):
    logits, stats = consistency.forward(net, params, state.stats, batch, key)
    labels = visible_labels(state, batch)[: batch_spec.labelled]
    limit = annealed_threshold(
      annealing, batch.step, steps, logits.labelled.shape[-1]
    )
    if annealing == 'none':
      limit = jnp.full_like(limit, jnp.inf)  # p = 1 may round to above 1
    labelled, kept = annealed_cross_entropy(
      batch.adjusted(logits.labelled), labels, limit
    )
    p = consistency.probabilities(logits.weak)
    p, state = consistency.align(p, state, batch)
    confidence = jnp.max(p, axis=-1)
    mask = (confidence > threshold).astype(confidence.dtype)
    weak = jax.lax.stop_gradient(logits.weak)
    target = consistency.aligned_logits(weak, state) / temperature
    divergence = losses.logit_kl_divergence(target, logits.strong)
    metrics = {
      'cross_entropy': labelled,
      'consistency': jnp.mean(mask * divergence),
      'mask': jnp.mean(mask),
      'confidence': jnp.mean(confidence),
      'labelled_kept': kept,
    }
    total = labelled + weight * metrics['consistency']
    return total, (state.replace(stats=stats), metrics)

  return loss


def uda(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  threshold: float = 0.8,
  temperature: float = 0.4,
  weight: float = 1.0,
  annealing: Annealing = 'none',
  strong_augment: Sequence[str] = ('randaugment:2:10', 'cutout'),
  distribution_alignment: bool = False,
  ema: float = 0.9999,
) -> Method:
  """Return UDA with the authors' constants on CIFAR-10.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step; their ratio is μ.
    steps: length of the only stage.
    threshold: β, confidence above which an unlabelled image is learned from.
    temperature: τ, of the sharpened predictions.
    weight: λ, weight of the loss on unlabelled images.
    annealing: schedule of the training signal annealing.
    strong_augment: augmentations of the strong view, after the run's own.
    distribution_alignment: align the predictions that become pseudo-labels with
      the class frequencies of the labels (ReMixMatch).
    ema: decay of the average of the weights that is evaluated; 0 leaves it to
      `average`.
  """
  consistency.check(batch_spec, steps)
  probability(threshold=threshold)
  positive(temperature=temperature)
  non_negative(weight=weight)
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=uda_loss(
      net, batch_spec, steps, threshold, temperature, weight, annealing
    ),
    views=(consistency.strong_view(strong_augment),),
  )
  return Method(
    name='uda',
    aligns=distribution_alignment,
    stages=(stage,),
    averaging=consistency.averaging(ema),
    quality=consistency.predicted_quality(
      net, lambda p, memory: jnp.max(p, axis=-1) > threshold
    ),
  )


# Settings of the authors' code on CIFAR-10 that differ from FixMatch's.
DEFAULTS = {**FIXMATCH, 'average': 0.9999}
