"""FixMatch: consistency and confidence in one loss.

Sohn, Berthelot, Li, Zhang, Carlini, Cubuk, Kurakin, Zhang, Raffel, NeurIPS
2020. A step has B labelled images x_b and μB unlabelled images u_b; α is a weak
and 𝒜 a strong augmentation. It minimises L_s + λ_u L_u, where

  L_s = 1/B Σ_b CE(y_b, p(α(x_b)))                                     Eq. 3
  L_u = 1/μB Σ_b 1[max q_b ≥ τ] CE(argmax q_b, p(𝒜(u_b)))              Eq. 4
  q_b = p(α(u_b)), through which no gradient flows.

The labelled, weak and strong images are one batch for batch norm, as in the
authors' code. An average of the weights is evaluated.

Departures from the paper:
  - α are the run's own augmentations (`augment`), 𝒜 adds `strong_augment` to
    them: RandAugment and Cutout, the paper's FixMatch (RA). The variant with
    CTAugment is not available here.
  - The decay of the average rises to its value, as (1+t)/(10+t), and the
    batch statistics are averaged too. In the authors' code the decay is
    constant and the running statistics are those of training.
  - Images are standardized per channel; the authors scale them to [-1, 1].
  - The paper's unlabelled images include the labelled ones (`unlabelled`=all).
"""

from collections.abc import Sequence

import jax.numpy as jnp

from ssljax.core import BatchSpec, Loss, Method, Stage
from ssljax.errors import non_negative, probability
from ssljax.methods import consistency


def fixmatch_loss(net, threshold: float, weight: float) -> Loss:
  """Return the loss of the stage, L_s + λ_u L_u.

  Args:
    net: the `Network`.
    threshold: τ of Eq. 4.
    weight: λ_u.
  """

  def loss(params, state, batch, key):
    logits, stats = consistency.forward(net, params, state.stats, batch, key)
    labelled = consistency.labelled_cross_entropy(logits.labelled, state, batch)
    q = consistency.pseudo_labels(consistency.probabilities(logits.weak))
    mask = q.confidence >= threshold
    unlabelled = consistency.weighted_cross_entropy(
      logits.strong, q.label, mask
    )
    metrics = {
      'cross_entropy': labelled,
      'consistency': unlabelled,
      'mask': jnp.mean(mask.astype(labelled.dtype)),
      'confidence': jnp.mean(q.confidence),
    }
    total = labelled + weight * unlabelled
    return total, (state.replace(stats=stats), metrics)

  return loss


def fixmatch(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  threshold: float = 0.95,
  weight: float = 1.0,
  strong_augment: Sequence[str] = ('randaugment:2:10', 'cutout'),
  ema: float = 0.999,
) -> Method:
  """Return FixMatch with the paper's constants.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step; their ratio is μ.
    steps: length of the only stage.
    threshold: τ, least confidence of a pseudo-label that is learned.
    weight: λ_u, weight of the loss on unlabelled images.
    strong_augment: augmentations of the strong view, after the run's own.
    ema: decay of the average of the weights that is evaluated; 0 leaves it to
      `average`.
  """
  consistency.check(batch_spec, steps)
  probability(threshold=threshold)
  non_negative(weight=weight)
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=fixmatch_loss(net, threshold, weight),
    views=(consistency.strong_view(strong_augment),),
  )
  return Method(
    name='fixmatch',
    stages=(stage,),
    averaging=consistency.averaging(ema),
    quality=consistency.predicted_quality(
      net, consistency.use_confident(threshold)
    ),
  )


# Settings of the paper on CIFAR-10 that differ from the defaults of other runs.
DEFAULTS = {
  'unlabelled': 'all',
  'network': 'wrn28_2',
  'batch_labelled': 64,
  'batch_unlabelled': 448,
  'learning_rate': 0.03,
  'decay': 'cosine716',
  'weight_decay': 5e-4,
  'clip': 0.0,
  'average': 0.999,
  'preprocess': 'standardize',
  'augment': ['flip', 'translate4'],
}
