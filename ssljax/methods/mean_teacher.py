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

from flax import struct
import jax
import jax.numpy as jnp

from ssljax import optimizers
from ssljax.core import BatchSpec, Loss, Method, Stage, TrainState, View
from ssljax.errors import fraction, non_negative, probability
from ssljax.methods import consistency


@struct.dataclass
class Teacher:
  """The memory: a moving average of the student."""

  params: dict  # θ', as `TrainState.params`
  stats: dict  # as `TrainState.stats`
  count: jax.Array  # [] int32, updates so far


def init_teacher(key, params, stats, spec) -> Teacher:
  """Return the initial teacher: a copy of the student."""
  del key, spec
  # A copy, because the buffers of the weights are donated to the next step.
  copy = lambda tree: jax.tree.map(jnp.copy, tree)
  return Teacher(copy(params), copy(stats), jnp.zeros([], jnp.int32))


def updated_teacher(
  teacher: Teacher, params, stats, teacher_ema: float
) -> Teacher:
  """Return θ' ← α θ' + (1 − α) θ, α = min(α_max, 1 − 1/(t+1)).

  Args:
    teacher: θ' before the update.
    params: parameters θ after the student's update.
    stats: its running statistics.
    teacher_ema: α_max.
  """
  count = teacher.count + 1
  t = count.astype(jnp.float32)
  alpha = jnp.minimum(teacher_ema, 1 - 1 / (t + 1))
  mean = lambda old, new: (alpha * old + (1 - alpha) * new).astype(old.dtype)
  return Teacher(
    jax.tree.map(mean, teacher.params, params),
    jax.tree.map(mean, teacher.stats, stats),
    count,
  )


def follow_student(teacher_ema: float):
  """Return the `AfterUpdate` of a stage, which updates the teacher."""

  def after_update(state: TrainState, batch) -> TrainState:
    del batch
    teacher = updated_teacher(
      state.memory, state.params, state.stats, teacher_ema
    )
    return state.replace(memory=teacher)

  return after_update


def teacher_weights(state: TrainState):
  """Return the teacher's weights: `Method.weights`."""
  return state.memory.params, state.memory.stats


def teacher_probabilities(net, teacher: Teacher, images, key) -> jax.Array:
  """Return the teacher's probabilities `[B, C]`, without gradients.

  Args:
    net: the `Network`, in training mode.
    teacher: its weights.
    images: `[B, H, W, c]`.
    key: random key of dropout.
  """
  outputs, _ = net.train(teacher.params, teacher.stats, images, key)
  return consistency.probabilities(outputs.logits)


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
      net, state.memory, batch.views['teacher'], teacher_key
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
  fraction(teacher_ema=teacher_ema)
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=mean_teacher_loss(net, batch_spec, weight, ramp * steps),
    views=(View('teacher'),),
    after_update=follow_student(teacher_ema),
  )
  return Method(
    name='mean_teacher',
    stages=(stage,),
    init=init_teacher,
    weights=teacher_weights,
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
