"""Pseudo-Label: the predicted class of an unlabelled image as its label.

Lee, ICML 2013 workshop on Challenges in Representation Learning. A step has n
labelled images x and n' unlabelled images x'. It minimises

  L = 1/n Σ CE(y, f(x)) + α(t) 1/n' Σ CE(y', f(x'))                     Eq. 15
  y' = argmax f(x'), through which no gradient flows                   Eq. 14
  α(t) = 0 for t < T1, α_f (t − T1)/(T2 − T1) for T1 ≤ t < T2,
         α_f from T2 on                                               Eq. 16

The pseudo-labels come from the same forward pass, dropout included.

Departures from the paper:
  - The outputs are a softmax with its cross-entropy; the paper's are sigmoid
    units with the sum of C binary cross-entropies.
  - T1 and T2 are shares of the steps. The paper's are the epochs 100 and 600 of
    a run whose length it does not state.
  - There is no pre-training with a denoising auto-encoder.
  - Optional: a threshold on the confidence (`threshold`), as in later
    comparisons of methods.
"""

import jax.numpy as jnp

from ssljax.core import BatchSpec, Loss, Method, Stage
from ssljax.errors import non_negative, probability, require
from ssljax.methods import consistency


def alpha(step, t1: float, t2: float, final: float):
  """Compute α(t) `[]`, Eq. 16.

  Args:
    step: t `[]` int32.
    t1: T1 in steps.
    t2: T2 in steps, at least T1.
    final: α_f.
  """
  step = jnp.asarray(step, jnp.float32)
  rising = (step - t1) / max(t2 - t1, 1e-6)
  return final * jnp.clip(rising, 0.0, 1.0)


def pseudo_label_loss(
  net, batch_spec: BatchSpec, t1: float, t2: float, final: float, threshold
) -> Loss:
  """Return the loss of the stage, Eq. 15; see `alpha` and `pseudo_label`."""

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    first, others = jnp.split(outputs.logits, [batch_spec.labelled])
    labelled = consistency.labelled_cross_entropy(first, state, batch)
    p = consistency.probabilities(others)
    p, state = consistency.align(p, state, batch)
    guess = consistency.pseudo_labels(p)
    mask = guess.confidence >= threshold
    unlabelled = consistency.weighted_cross_entropy(others, guess.label, mask)
    weight = alpha(batch.step, t1, t2, final)
    metrics = {
      'cross_entropy': labelled,
      'pseudo_cross_entropy': unlabelled,
      'mask': jnp.mean(mask.astype(labelled.dtype)),
      'confidence': jnp.mean(guess.confidence),
      'weight': weight,
    }
    total = labelled + weight * unlabelled
    return total, (state.replace(stats=stats), metrics)

  return loss


def pseudo_label(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  weight: float = 3.0,
  ramp_from: float = 0.1,
  ramp_to: float = 0.6,
  distribution_alignment: bool = False,
  threshold: float = 0.0,
) -> Method:
  """Return Pseudo-Label with the paper's constants.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step.
    steps: length of the only stage.
    weight: α_f, final weight of the loss on unlabelled images.
    ramp_from: T1, where the weight begins to rise, as a share of the steps.
    ramp_to: T2, where it ends to rise, as a share of the steps.
    distribution_alignment: align the predictions that become pseudo-labels with
      the class frequencies of the labels (ReMixMatch).
    threshold: least confidence of a pseudo-label that is learned; 0 in the
      paper.
  """
  consistency.check(batch_spec, steps)
  non_negative(weight=weight)
  probability(ramp_from=ramp_from, ramp_to=ramp_to, threshold=threshold)
  require(
    ramp_from <= ramp_to,
    f'`ramp_from`={ramp_from}, `ramp_to`={ramp_to}: give the lower one first',
  )
  t1, t2 = ramp_from * steps, ramp_to * steps
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=pseudo_label_loss(net, batch_spec, t1, t2, weight, threshold),
  )
  return Method(
    name='pseudo_label',
    aligns=distribution_alignment,
    stages=(stage,),
    quality=consistency.predicted_quality(
      net, consistency.use_confident(threshold)
    ),
  )


# Batch sizes of the paper, which is on MNIST; the other settings are those of
# other runs.
DEFAULTS = {'batch_labelled': 32, 'batch_unlabelled': 256}
