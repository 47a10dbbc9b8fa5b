"""R2-D2-FixMatch: FixMatch whose pseudo-labels are R2-D2's pseudo-logits.

A combination of two methods (`r2d2`, `fixmatch`), not of a paper. Every image
has pseudo-logits ỹ of its own, p̃ = σ(ỹ), where σ is the softmax. A step has B
labelled images x_b and μB unlabelled images u_b; α is a weak and 𝒜 a strong
augmentation, with predictions p̂ = p(α(u)) and Q = p(𝒜(u)). The step

  1. minimises  L_s + λ_u L_u
       L_s = 1/B Σ_b CE(y_b, p(α(x_b)))                         FixMatch, Eq. 3
       L_u = 1/μB Σ_b 1[max p̃_b ≥ θ] [KL(Q_b‖p̃_b) + β H(Q_b)]     R2-D2, Eq. 2
  2. moves ỹ by the gradient of the divergence at the weak view:
       ỹ_b ← ỹ_b − γ ∂KL(p̂_b‖p̃_b)/∂ỹ_b = ỹ_b + γ (p̂_b − p̃_b)  R2-D2, Eq. 6, 7

and before the first epoch, and if E > 0 again every E epochs, the pseudo-logits
are predicted, ỹ ← ŷ of images without augmentation, or 10·onehot(y) for
labelled images, where ỹ never changes (R2-D2, "repetitive reprediction").

So a pseudo-label is an average over all visits of an image, where FixMatch's is
the prediction of one view. L_u uses ỹ before step 2. The gradient of the
network flows through both factors of the divergence at the strong view, and
through no weak view of an unlabelled image.

Choices where the two methods differ:
  - There is one stage: L_s trains the network from the start, as in FixMatch,
    and takes the place of R2-D2's stages `supervised` and `finetune`.
  - L_u has the form of Eq. 2 divided by α. R2-D2's α = 0.1 and β = 0.03 are
    β = 0.3 here, and its λα/B = 0.78125 is γ.
  - An unlabelled image of a step that has a label learns it, since its p̃ does.
  - The labelled, weak and strong images are one batch for batch norm, and an
    average of the weights is evaluated, as in FixMatch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ssljax import losses
from ssljax.core import (
  UNLABELLED,
  BatchSpec,
  Loss,
  Method,
  Quality,
  Stage,
  UsedLabels,
)
from ssljax.errors import non_negative, positive, probability
from ssljax.methods import consistency, r2d2
from ssljax.methods.fixmatch import DEFAULTS as FIXMATCH


def moved(y_tilde, y_hat, rate: float, kind: r2d2.Divergence) -> jax.Array:
  """Return ỹ `[U, C]` after step 2.

  Args:
    y_tilde: `[U, C]` pseudo-logits ỹ.
    y_hat: `[U, C]` logits ŷ of the weak views.
    rate: γ.
    kind: divergence, see `r2d2.classification_loss`.
  """
  total = lambda y: jnp.sum(r2d2.classification_loss(y_hat, y, kind))
  return y_tilde - rate * jax.grad(total)(y_tilde)


def r2d2_fixmatch_loss(
  net,
  batch_spec: BatchSpec,
  threshold: float,
  weight: float,
  beta: float,
  rate: float,
  kind: r2d2.Divergence,
) -> Loss:
  """Return the loss of the stage, which also moves ỹ.

  Args:
    net: the `Network`.
    batch_spec: composition of the batch.
    threshold: θ of L_u.
    weight: λ_u.
    beta: β of L_u.
    rate: γ.
    kind: divergence, see `r2d2.classification_loss`.
  """

  def loss(params, state, batch, key):
    logits, stats = consistency.forward(net, params, state.stats, batch, key)
    rows = batch.rows[batch_spec.labelled :]
    y_tilde = state.memory.logits[rows]
    mask = consistency.pseudo_labels(jax.nn.softmax(y_tilde)).confidence
    mask = (mask >= threshold).astype(y_tilde.dtype)
    divergence = r2d2.classification_loss(logits.strong, y_tilde, kind)
    entropy = losses.logit_entropy(logits.strong)

    unknown = state.labels[rows] == UNLABELLED
    weak = jax.lax.stop_gradient(logits.weak)
    step = moved(y_tilde, weak, rate, kind) - y_tilde
    memory = state.memory.replace(
      logits=state.memory.logits.at[rows].add(
        jnp.where(unknown[:, None], step, 0.0)
      )
    )
    metrics = {
      'cross_entropy': consistency.labelled_cross_entropy(
        logits.labelled, state, batch
      ),
      'divergence': jnp.mean(mask * divergence),
      'entropy': jnp.mean(mask * entropy),
      'mask': jnp.mean(mask),
      'confidence': losses.mean_where(
        jnp.max(jax.nn.softmax(y_tilde), axis=-1), unknown
      ),
    }
    unlabelled = metrics['divergence'] + beta * metrics['entropy']
    total = metrics['cross_entropy'] + weight * unlabelled
    return total, (state.replace(stats=stats, memory=memory), metrics)

  return loss


def confident_logits(threshold: float) -> Quality:
  """Return the `Method.quality` of pseudo-logits that are confident."""

  def quality(state, rows, image):
    del image
    p = jax.nn.softmax(state.memory.logits[rows])
    found = consistency.pseudo_labels(p)
    mask = (found.confidence >= threshold).astype(p.dtype)
    return UsedLabels(found.label, mask)

  return quality


def r2d2_fixmatch(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  threshold: float = 0.95,
  weight: float = 1.0,
  beta: float = 0.3,
  divergence: r2d2.Divergence = 'kl_reverse',
  pseudo_rate: float = 0.78125,
  repredict_every: int = 0,
  strong_augment: Sequence[str] = ('randaugment:2:10', 'cutout'),
  ema: float = 0.999,
) -> Method:
  """Return FixMatch with R2-D2's pseudo-logits.

  The constants are those of the two papers, but for `repredict_every`, which in
  R2-D2 is a number of steps that depends on the data set.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step; their ratio is μ.
    steps: length of the only stage.
    threshold: θ, least confidence of a pseudo-label that is learned.
    weight: λ_u, weight of the loss on strong views.
    beta: β, weight of the entropy relative to that of the divergence.
    divergence: KL(Q‖p̃), KL(p̃‖Q) or the squared distance, in both steps.
    pseudo_rate: γ, factor of the gradient that moves the pseudo-logits.
    repredict_every: E, epochs between predictions of the pseudo-logits by the
      network; 0 predicts them at the start alone.
    strong_augment: augmentations of the strong view, after the run's own.
    ema: decay of the average of the weights that is evaluated; 0 leaves it to
      `average`.
  """
  consistency.check(batch_spec, steps)
  probability(threshold=threshold)
  positive(pseudo_rate=pseudo_rate)
  non_negative(weight=weight, beta=beta, repredict_every=repredict_every)
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=r2d2_fixmatch_loss(
      net, batch_spec, threshold, weight, beta, pseudo_rate, divergence
    ),
    views=(consistency.strong_view(strong_augment),),
    per_example=r2d2.predict(net),
    epoch_update=r2d2.predict_pseudo,
    every=repredict_every,
  )
  return Method(
    name='r2d2_fixmatch',
    stages=(stage,),
    init=r2d2.no_pseudo_labels,
    layout=P('data'),
    add_labels=r2d2.add_known_logits,
    averaging=consistency.averaging(ema),
    quality=confident_logits(threshold),
  )


DEFAULTS = FIXMATCH  # on CIFAR-10
