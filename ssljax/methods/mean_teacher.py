"""Mean Teacher: consistency with an average of the student's weights.

Tarvainen, Valpola, NeurIPS 2017. The student has parameters θ, the teacher θ'.
A step has two noisy views η, η' of the same images. It minimises

  L = mean CE(y, f(x, η; θ)) over labelled images
      + w(t) mean 1/C ‖f(x, η; θ) − f(x, η'; θ')‖² over all images       J(θ)
  w(t) = w_max exp(−5 (1 − t/T)²) for t < T, then w_max

where f are probabilities and no gradient flows through the teacher. After the
update of the student at step t = 1, 2, ... the teacher becomes

  θ' ← α θ' + (1 − α) θ,  α = min(α_max, 1 − 1/(t+1))

for parameters and batch statistics, so it includes the last update. The teacher
is evaluated.

Departures from the paper:
  - The cross-entropy is the mean over the labelled images of the batch. The
    authors divide its sum by the size of the batch and multiply w_max = 100 by
    the share of images that have a label. The two agree up to the scale of the
    loss where a batch has the same share of labelled images as the data set.
  - α rises to its value, as in the authors' PyTorch code; their TensorFlow code
    for CIFAR-10 has α = 0.999 throughout.
  - The teacher's running statistics of batch norm are averages of the
    student's; while training it uses the statistics of the batch, as in the
    authors' code.
  - The learning rate and Adam's β₁ and β₂ have no ramps but those of the run's
    `decay`. The authors ramp the rate up over 40,000 steps and down over the
    last 25,000 of 150,000, and β₁ down to 0.5.
  - The views are two draws of the run's own augmentations; the noise of the
    paper's input is `noise` in `augment`.
"""

import jax
import jax.numpy as jnp

from ssljax import optimizers
from ssljax.core import (
  Averaging,
  BatchSpec,
  Loss,
  Method,
  Quality,
  Stage,
  TrainState,
  View,
  evaluated_weights,
)
from ssljax.errors import fraction, non_negative, probability
from ssljax.methods import consistency
from ssljax.methods.pi_model import DEFAULTS as PI_MODEL


def teacher(teacher_ema: float) -> Averaging:
  """Return the average that is the teacher: α = (1+t)/(2+t), at most α_max.

  Here t counts the updates before this one, so that this is 1 − 1/(t+1) with
  the paper's t. The average includes the last update of the student.

  Args:
    teacher_ema: α_max.
  """
  fraction(teacher_ema=teacher_ema)
  return Averaging(teacher_ema, statistics=True, warmup=2)


def teacher_probabilities(net, state: TrainState, images, key) -> jax.Array:
  """Return the teacher's probabilities `[B, C]`, without gradients.

  Args:
    net: the `Network`, in training mode.
    state: state before the step.
    images: `[B, H, W, c]`.
    key: random key of dropout.
  """
  outputs, _ = net.train(*evaluated_weights(state), images, key)
  return consistency.probabilities(outputs.logits)


def teacher_quality(net) -> Quality:
  """Return the `Method.quality` of the teacher's predictions."""
  return consistency.predicted_quality(
    net, consistency.use_all, evaluated_weights
  )


def mean_teacher_loss(
  net, batch_spec: BatchSpec, weight: float, length: float
) -> Loss:
  """Return the loss of the stage, J(θ).

  Args:
    net: the `Network`.
    batch_spec: composition of the batch.
    weight: w_max.
    length: T in steps.
  """

  def loss(params, state, batch, key):
    student_key, teacher_key = jax.random.split(key)
    outputs, stats = net.train(params, state.stats, batch.image, student_key)
    logits = outputs.logits
    labelled = consistency.labelled_cross_entropy(
      logits[: batch_spec.labelled], state, batch
    )
    target = teacher_probabilities(
      net, state, batch.views['teacher'], teacher_key
    )
    distance = consistency.squared_distance(jax.nn.softmax(logits), target)
    ramp = weight * optimizers.ramp_up_sigmoid(batch.step, length)
    metrics = {
      'cross_entropy': labelled,
      'consistency': jnp.mean(distance),
      'weight': ramp,
    }
    total = labelled + ramp * metrics['consistency']
    return total, (state.replace(stats=stats), metrics)

  return loss


def mean_teacher(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  weight: float = 100.0,
  ramp: float = 40_000 / 150_000,
  teacher_ema: float = 0.999,
) -> Method:
  """Return Mean Teacher with the paper's constants on CIFAR-10.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step.
    steps: length of the only stage.
    weight: w_max, largest weight of the consistency loss.
    ramp: T, length of the weight's ramp, as a share of the steps.
    teacher_ema: α_max, largest decay of the teacher's average.
  """
  consistency.check(batch_spec, steps)
  non_negative(weight=weight)
  probability(ramp=ramp)
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=mean_teacher_loss(net, batch_spec, weight, ramp * steps),
    views=(View('teacher'),),
  )
  return Method(
    name='mean_teacher',
    stages=(stage,),
    averaging=teacher(teacher_ema),
    quality=teacher_quality(net),
  )


DEFAULTS = PI_MODEL  # on CIFAR-10, as in the paper
