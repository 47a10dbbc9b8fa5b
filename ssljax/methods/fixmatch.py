"""FixMatch: consistency and confidence in one loss.

Sohn, Berthelot, Li, Zhang, Carlini, Cubuk, Kurakin, Zhang, Raffel, NeurIPS
2020. A step has B labelled images x_b and μB unlabelled images u_b; α is a weak
and 𝒜 a strong augmentation. It minimises L_s + λ_u L_u, where

  L_s = 1/B Σ_b CE(y_b, p(α(x_b)))                                     Eq. 3
  L_u = 1/μB Σ_b 1[max q_b ≥ τ] CE(argmax q_b, p(𝒜(u_b)))              Eq. 4
  q_b = p(α(u_b)), through which no gradient flows.

The labelled, weak and strong images are one batch for batch norm, as in the
authors' code. An average of the weights is evaluated.

With CTAugment (`augment.ctaugment`) the memory has the rates of its bins. In
each step the labelled images are also changed at uniform levels (probes), the
evaluated weights predict them in inference mode, and the rates of the levels
used are updated with the match of prediction and label, one image after the
other, with decay 0.99. Bins with a rate below 0.8 of the best are not used.

Departures from the paper:
  - α are the run's own augmentations (`augment`), 𝒜 adds `strong_augment` to
    them: RandAugment and Cutout, the paper's FixMatch (RA), or CTAugment and
    Cutout (`strong_augment`=ctaugment,cutout:0.5), its FixMatch (CTA). What
    precedes the preprocessing, as RandAugment and CTAugment do, precedes those
    of the run's own augmentations that follow it.
  - The decay of the average rises to its value, as (1+t)/(10+t), and the
    batch statistics are averaged too. In the authors' code the decay is
    constant and the running statistics are those of training.
  - Images are standardized per channel; the authors scale them to [-1, 1].
  - The probes are predicted by the weights before the step.
  - The paper's unlabelled images include the labelled ones (`unlabelled`=all).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ssljax.augment import ctaugment, named
from ssljax.core import (
  BatchSpec,
  Loss,
  Method,
  Stage,
  View,
  evaluated_weights,
  no_memory,
  visible_labels,
)
from ssljax.errors import non_negative, probability, require
from ssljax.methods import consistency

# CTAugment.

CTA_THRESHOLD = 0.8  # of the authors' code; ReMixMatch has 0.85


def init_rates(key, params, stats, spec) -> jax.Array:
  """Return the memory with CTAugment: the rates of its bins, all 1."""
  del key, params, stats, spec
  return ctaugment.init_rates()


def adaptive_views(names: Sequence[str]) -> tuple[View, View]:
  """Return the strong view and the labelled view 'probe' of CTAugment.

  Args:
    names: strong augmentations in order, 'ctaugment' among them.
  """
  at = names.index(consistency.CTAUGMENT)
  before, after = names[:at], names[at + 1 :]
  require(
    not {name.partition(':')[0] for name in after}.intersection(
      (*named.ON_PIXELS, consistency.CTAUGMENT)
    ),
    f'`strong_augment`={",".join(names)}: {consistency.CTAUGMENT} is the last '
    'augmentation before the preprocessing: name it once, after those in '
    f'{", ".join(named.ON_PIXELS)}',
  )

  def strong(key, image, rates):
    policy = ctaugment.draw(key, rates, threshold=CTA_THRESHOLD)
    return ctaugment.transform(image, policy), ()

  def probe(key, image, rates):
    del rates
    image, ops, bins = ctaugment.probe(key, image)
    return image, (ops, bins)

  chains = [consistency.strong_view(part) for part in (before, after)]
  first = [chain.on_pixels or chain.augment for chain in chains]
  view = View(
    'strong',
    on_pixels=first[0],
    augment=first[1],
    rows='unlabelled',
    adaptive=strong,
  )
  return view, View('probe', rows='labelled', adaptive=probe)


def update_rates(net, state, batch) -> tuple[jax.Array, jax.Array]:
  """Return the rates `[K, bins]` after a step, and the mean match ω `[]`.

  Args:
    net: the `Network`.
    state: state before the step.
    batch: batch of the step, with the view 'probe'.
  """
  probe, (ops, bins) = batch.views['probe']
  p = jax.nn.softmax(net.infer(*evaluated_weights(state), probe).logits)
  labels = visible_labels(state, batch)[: len(probe)]
  match = ctaugment.match(p, jax.nn.one_hot(labels, p.shape[-1]))
  rates = ctaugment.update(state.memory, ops, bins, match)
  return jax.lax.stop_gradient((rates, jnp.mean(match)))


# The method.


def fixmatch_loss(
  net, threshold: float, weight: float, adaptive: bool = False
) -> Loss:
  """Return the loss of the stage, L_s + λ_u L_u.

  Args:
    net: the `Network`.
    threshold: τ of Eq. 4.
    weight: λ_u.
    adaptive: the views are those of `adaptive_views`.
  """

  def loss(params, state, batch, key):
    memory, more = state.memory, {}
    if adaptive:
      memory, more['match'] = update_rates(net, state, batch)
      strong = batch.views['strong'].image
      batch = batch._replace(views={'strong': strong})
    logits, stats = consistency.forward(net, params, state.stats, batch, key)
    labelled = consistency.labelled_cross_entropy(logits.labelled, state, batch)
    p = consistency.probabilities(logits.weak)
    p, state = consistency.align(p, state, batch)
    q = consistency.pseudo_labels(p)
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
    state = state.replace(stats=stats, memory=memory)
    return total, (state, metrics | more)

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
  distribution_alignment: bool = False,
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
    strong_augment: augmentations of the strong view, after the run's own;
      ctaugment learns its strength from the labelled images.
    distribution_alignment: align the predictions that become pseudo-labels with
      the class frequencies of the labels (ReMixMatch).
    ema: decay of the average of the weights that is evaluated; 0 leaves it to
      `average`.
  """
  consistency.check(batch_spec, steps)
  probability(threshold=threshold)
  non_negative(weight=weight)
  adaptive = consistency.CTAUGMENT in strong_augment
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=fixmatch_loss(net, threshold, weight, adaptive),
    views=adaptive_views(tuple(strong_augment))
    if adaptive
    else (consistency.strong_view(strong_augment),),
  )
  return Method(
    name='fixmatch',
    aligns=distribution_alignment,
    stages=(stage,),
    init=init_rates if adaptive else no_memory,
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
