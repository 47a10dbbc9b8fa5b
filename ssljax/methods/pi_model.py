"""Π-model: consistency of two noisy passes of one network.

Laine, Aila, ICLR 2017, Algorithm 1. Every image of a batch B is augmented and
passed through the network twice, which gives probabilities z and z̃. A step
minimises

  L = mean_{L} CE(y_i, z_i) + w(t) 1/(C|B|) Σ_{i∈B} ‖z_i − z̃_i‖²
  w(t) = w_max exp(−5 (1 − t/T)²) for t < T, then w_max

where L are the labelled images of the batch. Gradients flow through both
passes.

Departures from the paper:
  - The cross-entropy is the mean over the labelled images of the batch. The
    authors divide its sum by |B| and multiply w_max = 100 by the share M/N of
    images that have a label. The two agree up to the scale of the loss where a
    batch has the same share of labelled images as the data set.
  - Both passes are one batch for batch norm. The paper's network has weight
    normalisation and batch norm of means, per pass.
  - w is a function of the step, and not 0 in the first epoch: exp(−5) w_max.
  - The learning rate and Adam's β₁ have no ramps but those of the run's
    `decay`. The authors ramp the rate up over the first 80 of 300 epochs and
    down over the last 50, and β₁ down to 0.5.
  - The noise of the paper's input is `noise` in `augment`.
"""

import jax
import jax.numpy as jnp

from ssljax import optimizers
from ssljax.core import BatchSpec, Loss, Method, Stage, View
from ssljax.errors import non_negative, probability
from ssljax.methods import consistency


def pi_model_loss(
  net, batch_spec: BatchSpec, weight: float, length: float
) -> Loss:
  """Return the loss of the stage.

  Args:
    net: the `Network`.
    batch_spec: composition of the batch.
    weight: w_max.
    length: T in steps.
  """

  def loss(params, state, batch, key):
    images = jnp.concatenate([batch.image, batch.views['second']])
    outputs, stats = net.train(params, state.stats, images, key)
    one, two = jnp.split(outputs.logits, 2)
    labelled = consistency.labelled_cross_entropy(
      one[: batch_spec.labelled], state, batch
    )
    z, z_tilde = jax.nn.softmax(one), jax.nn.softmax(two)
    distance = jnp.mean(consistency.squared_distance(z, z_tilde))
    ramp = weight * optimizers.ramp_up_sigmoid(batch.step, length)
    metrics = {
      'cross_entropy': labelled,
      'consistency': distance,
      'weight': ramp,
    }
    total = labelled + ramp * distance
    return total, (state.replace(stats=stats), metrics)

  return loss


def pi_model(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  weight: float = 100.0,
  ramp: float = 80 / 300,
) -> Method:
  """Return the Π-model with the paper's constants.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step.
    steps: length of the only stage.
    weight: w_max, largest weight of the consistency loss.
    ramp: T, length of the weight's ramp, as a share of the steps.
  """
  consistency.check(batch_spec, steps)
  non_negative(weight=weight)
  probability(ramp=ramp)
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=pi_model_loss(net, batch_spec, weight, ramp * steps),
    views=(View('second'),),
  )
  return Method(
    name='pi_model',
    stages=(stage,),
    quality=consistency.predicted_quality(net, consistency.use_all),
  )


# Settings of the paper on CIFAR-10 that differ from the defaults of other runs.
DEFAULTS = {
  'unlabelled': 'all',
  'batch_labelled': 8,  # 4,000 of 50,000 images have a label
  'batch_unlabelled': 92,
  'optimizer': 'adam',
  'learning_rate': 3e-3,
  'decay': 'constant',
  'weight_decay': 0.0,
  'clip': 0.0,
  'average': 0.0,
  'preprocess': 'zca',
  'augment': ['flip', 'translate', 'noise'],
}
