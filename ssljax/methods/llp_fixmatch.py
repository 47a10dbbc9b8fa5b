"""LLP-FixMatch: FixMatch whose pseudo-labels come from LLP's bank.

A combination of two methods (`llp`, `fixmatch`), not of a paper. A step has B
labelled images x_b and μB unlabelled images u_b; α is a weak and 𝒜 a strong
augmentation. v is the embedding of a weak view, of length 1, and the bank holds
v̄, y and c of every image, as in `llp`. The step

  1. looks the weak view of every unlabelled image up in the bank:
       ω_i = exp(v̄_i·v/τ) / ρ_i for the K labelled rows with the largest value
       w_j = Σ_{y_i = j} ω_i, y ← argmax w, c ← max w / Σ w     LLP, Eq. 6–8
  2. minimises  L_s + λ_u L_u + λ_a L_A
       L_s = 1/B Σ_b CE(y_b, p(α(x_b)))                         FixMatch, Eq. 3
       L_u = 1/μB Σ_b 1[c_b ≥ θ] CE(y_b, p(𝒜(u_b)))
       L_A = mean −c' log P(A|v), A = {i: y_i = y'}             LLP, Eq. 1, 3, 4
     with y, c from 1 and y', c' those of the image's last visit; L_A is over
     the weak views of all images, and trains the embedding
  3. updates v̄ ← l2_normalize(m v̄ + (1−m) v), and writes y and c.

So L_u is FixMatch's loss (Eq. 4) with the neighbours' vote in the place of the
classifier's prediction. No gradient flows through y and c: L_u trains the
network through the strong view alone. In a bank of random rows no vote is
confident, and the loss on unlabelled images sets in by itself: there is no
first stage as in `llp`. Before each epoch ρ_i is computed anew (LLP, Eq. 7).

Choices where the two methods differ:
  - An unlabelled image of a step that has a label votes with it, c = 1, as in
    LLP; in FixMatch its label is not used.
  - The labelled, weak and strong images are one batch for batch norm, and an
    average of the weights is evaluated, as in FixMatch.
  - L_C of LLP, the cross-entropy of the weak view with y', is left out.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp

from ssljax import losses
from ssljax import neighbours as rows_of_a_bank
from ssljax.core import (
  UNLABELLED,
  BatchSpec,
  Loss,
  Method,
  Quality,
  Stage,
  UsedLabels,
)
from ssljax.errors import fraction, non_negative, positive, probability
from ssljax.methods import consistency, llp
from ssljax.methods.fixmatch import DEFAULTS as FIXMATCH


def llp_fixmatch_loss(
  net,
  batch_spec: BatchSpec,
  settings: llp.Settings,
  threshold: float,
  weight: float,
  aggregation_weight: float,
) -> Loss:
  """Return the loss of the stage, which also updates the bank.

  Args:
    net: the `Network`.
    batch_spec: composition of the batch.
    settings: hyper-parameters of the bank.
    threshold: θ of L_u.
    weight: λ_u.
    aggregation_weight: λ_a.
  """
  first = batch_spec.labelled

  def loss(params, state, batch, key):
    images = jnp.concatenate([batch.image, batch.views['strong']])
    outputs, stats = net.train(params, state.stats, images, key)
    weak, strong = jnp.split(outputs.logits, [batch_spec.size])
    v = rows_of_a_bank.l2_normalize(outputs.embedding[: batch_spec.size])
    memory = state.memory
    places = memory.places(batch.rows)
    own, sure = memory.labels[places], memory.confidence[places]
    aggregation = jnp.mean(
      sure * llp.aggregate(v, own, memory, settings.temperature)
    )

    v = jax.lax.stop_gradient(v)
    labels, confidence = llp.infer(v, weak, state, settings)
    truth = state.labels[batch.rows]
    unknown = truth == UNLABELLED
    labels = jnp.where(unknown, labels, truth)
    confidence = jnp.where(unknown, confidence, 1.0)
    mask = confidence[first:] >= threshold
    metrics = {
      'cross_entropy': consistency.labelled_cross_entropy(
        weak[:first], state, batch
      ),
      'consistency': consistency.weighted_cross_entropy(
        strong, labels[first:], mask
      ),
      'aggregation': aggregation,
      'mask': jnp.mean(mask.astype(v.dtype)),
      'confidence': losses.mean_where(confidence, unknown),
    }
    total = (
      metrics['cross_entropy']
      + weight * metrics['consistency']
      + aggregation_weight * aggregation
    )
    memory = llp.write(
      memory, batch.rows, v, labels, confidence, settings.bank_momentum
    )
    return total, (state.replace(stats=stats, memory=memory), metrics)

  return loss


def confident(propagated: Quality, threshold: float) -> Quality:
  """Return the `Method.quality` of the confident labels in the bank.

  Args:
    propagated: of all labels in the bank, see `llp.propagated`.
    threshold: θ.
  """

  def quality(state, rows, image):
    found = propagated(state, rows, image)
    mask = (found.weight >= threshold).astype(found.weight.dtype)
    return UsedLabels(found.label, mask)

  return quality


def llp_fixmatch(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  neighbours: int = 10,
  density_neighbours: int = 25,
  temperature: float = 0.07,
  bank_momentum: float = 0.5,
  threshold: float = 0.95,
  weight: float = 1.0,
  aggregation_weight: float = 1.0,
  strong_augment: Sequence[str] = ('randaugment:2:10', 'cutout'),
  ema: float = 0.999,
) -> Method:
  """Return FixMatch with pseudo-labels from LLP's bank.

  The constants are those of the two papers.

  Args:
    net: the `Network`; this method normalises its embedding to length 1.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step; their ratio is μ.
    steps: length of the only stage.
    neighbours: K, labelled neighbours that vote.
    density_neighbours: T, neighbours in the density of a labelled row.
    temperature: τ, the temperature of all softmax functions over the bank.
    bank_momentum: m, the share of the old row when the bank is updated.
    threshold: θ, least confidence of a pseudo-label that is learned.
    weight: λ_u, weight of the loss on strong views.
    aggregation_weight: λ_a, weight of the loss that trains the embedding.
    strong_augment: augmentations of the strong view, after the run's own.
    ema: decay of the average of the weights that is evaluated; 0 leaves it to
      `average`.
  """
  consistency.check(batch_spec, steps)
  positive(neighbours=neighbours, density_neighbours=density_neighbours)
  positive(temperature=temperature)
  fraction(bank_momentum=bank_momentum)
  probability(threshold=threshold)
  non_negative(weight=weight, aggregation_weight=aggregation_weight)
  settings = llp.Settings(
    neighbours=neighbours,
    density_neighbours=density_neighbours,
    temperature=temperature,
    bank_momentum=bank_momentum,
    confidence=True,
    categorize=False,
    density=True,
    pseudo_labels='neighbours',
    bank_dtype='float32',
  )
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=llp_fixmatch_loss(
      net, batch_spec, settings, threshold, weight, aggregation_weight
    ),
    views=(consistency.strong_view(strong_augment),),
    epoch_update=llp.estimate_density(settings),
  )
  return Method(
    name='llp_fixmatch',
    stages=(stage,),
    init=functools.partial(llp.init_bank, settings),
    layout=llp.LAYOUT,
    add_labels=functools.partial(llp.add_voters, settings),
    uses_admitted=True,
    averaging=consistency.averaging(ema),
    quality=confident(llp.propagated(net, settings), threshold),
  )


DEFAULTS = FIXMATCH  # on CIFAR-10
