"""Temporal Ensembling: consistency with an image's earlier predictions.

Laine, Aila, ICLR 2017, Algorithm 2. A table has a running sum Z_i of the
network's probabilities for every image, 0 at first. A step minimises over the
images of its batch B, with probabilities z_i,

  L = mean_{L} CE(y_i, z_i) + w(t) 1/(C|B|) Σ_{i∈B} ‖z_i − z̃_i‖²
  z̃_i = Z_i / Σ_c Z_ic, through which no gradient flows
  w(t) = w_max exp(−5 (1 − t/T)²) for t < T, then w_max

where L are the labelled images of the batch, and then sets

  Z_i ← α Z_i + (1 − α) z_i.

Z_i after n visits is (1 − α^n) times a weighted mean of n probabilities. So z̃_i
is the Z_i / (1 − α^n) of the paper, with n counted for each image.

Departures from the paper:
  - The cross-entropy is the mean over the labelled images of the batch. The
    authors divide its sum by |B| and multiply w_max = 30 by the share M/N of
    images that have a label. The two agree up to the scale of the loss where a
    batch has the same share of labelled images as the data set.
  - Z_i is updated when image i is visited and not at the end of the epoch. For
    images that occur once in an epoch this is the same. Labelled images may
    occur more often. An image that occurs twice in a batch is updated once, by
    the first prediction.
  - An image before its first visit has no consistency loss; in the paper w = 0
    in the first epoch.
  - The learning rate and Adam's β₁ have no ramps but those of the run's
    `decay`, see `pi_model`.
  - The noise of the paper's input is `noise` in `augment`.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ssljax import neighbours, optimizers
from ssljax.core import BatchSpec, Loss, Method, Stage, UsedLabels
from ssljax.errors import fraction, non_negative, probability
from ssljax.methods import consistency
from ssljax.methods.pi_model import DEFAULTS as PI_MODEL


def no_predictions(key, params, stats, spec) -> jax.Array:
  """Return the initial memory Z `[N, C]`: zeros."""
  del key, params, stats
  return jnp.zeros([spec.rows, spec.classes])


def targets(z_sum) -> tuple[jax.Array, jax.Array]:
  """Return z̃ `[B, C]`, and True `[B]` for the images that were visited.

  Args:
    z_sum: `[B, C]` rows of Z.
  """
  total = jnp.sum(z_sum, axis=-1)
  visited = total > 0
  scale = jnp.where(visited, total, 1.0)
  return z_sum / scale[:, None], visited


def ensembled(state, rows, image) -> UsedLabels:
  """Return the most likely classes by z̃, see `core.Quality`."""
  del image
  z_tilde, visited = targets(state.memory[rows])
  label = jnp.argmax(z_tilde, axis=-1).astype(jnp.int32)
  return UsedLabels(label, visited.astype(z_tilde.dtype))


def accumulate(z_sums, rows, z, alpha: float) -> jax.Array:
  """Return Z `[N, C]` after Z_i ← α Z_i + (1 − α) z_i for the rows of a batch.

  Args:
    z_sums: Z `[N, C]`.
    rows: `[B]` int32.
    z: `[B, C]` probabilities.
    alpha: α.
  """
  new = alpha * z_sums[rows] + (1 - alpha) * z
  place = jnp.where(neighbours.first_of_each(rows), rows, len(z_sums))
  return z_sums.at[place].set(new, mode='drop')


def temporal_ensembling_loss(
  net, batch_spec: BatchSpec, weight: float, length: float, alpha: float
) -> Loss:
  """Return the loss of the stage.

  Args:
    net: the `Network`.
    batch_spec: composition of the batch.
    weight: w_max.
    length: T in steps.
    alpha: α.
  """

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    labelled = consistency.labelled_cross_entropy(
      outputs.logits[: batch_spec.labelled], state, batch
    )
    z = jax.nn.softmax(outputs.logits)
    z_tilde, visited = targets(state.memory[batch.rows])
    squares = consistency.squared_distance(z, z_tilde)
    distance = jnp.mean(jnp.where(visited, squares, 0.0))
    constant = jax.lax.stop_gradient(z)
    memory = accumulate(state.memory, batch.rows, constant, alpha)
    ramp = weight * optimizers.ramp_up_sigmoid(batch.step, length)
    metrics = {
      'cross_entropy': labelled,
      'consistency': distance,
      'visited': jnp.mean(visited.astype(z.dtype)),
      'weight': ramp,
    }
    total = labelled + ramp * distance
    return total, (state.replace(stats=stats, memory=memory), metrics)

  return loss


def temporal_ensembling(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  weight: float = 30.0,
  ramp: float = 80 / 300,
  ensemble_decay: float = 0.6,
) -> Method:
  """Return Temporal Ensembling with the paper's constants.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step.
    steps: length of the only stage.
    weight: w_max, largest weight of the consistency loss.
    ramp: T, length of the weight's ramp, as a share of the steps.
    ensemble_decay: α, decay of the average over an image's predictions.
  """
  consistency.check(batch_spec, steps)
  non_negative(weight=weight)
  probability(ramp=ramp)
  fraction(ensemble_decay=ensemble_decay)
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=temporal_ensembling_loss(
      net, batch_spec, weight, ramp * steps, ensemble_decay
    ),
  )
  return Method(
    name='temporal_ensembling',
    stages=(stage,),
    init=no_predictions,
    layout=P('data'),
    quality=ensembled,
  )


DEFAULTS = PI_MODEL  # on CIFAR-10, as in the paper
