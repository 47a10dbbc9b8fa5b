"""ICT: interpolation consistency training.

Verma, Kawaguchi, Lamb, Kannala, Solin, Bengio, Lopez-Paz, IJCAI 2019 (Neural
Networks 2022), Algorithm 1. The student has parameters θ, the teacher θ' is
their moving average. A step has labelled images x and unlabelled images u; u'
is a shuffle of u, and one λ ~ Beta(α, α) mixes a and b to Mix(a, b) = λ a +
(1 − λ) b. It minimises

  L = mean CE(y, f_θ(x)) + w(t) mean 1/C ‖f_θ(Mix(u, u'))
                                          − Mix(f_θ'(u), f_θ'(u'))‖²
  w(t) = w_max exp(−5 (1 − t/T)²) for t < T, then w_max

where f are probabilities and no gradient flows through the teacher, which is
updated after the student as in `mean_teacher` and evaluated.

Departures from the paper:
  - The labelled images are not mixed; in the authors' code they are.
  - The authors' code mixes the teacher's logits and not its probabilities.
  - Labelled and mixed images are one batch for batch norm; in the authors' code
    each is a batch of its own.
  - The teacher's running statistics are averages of the student's.
"""

import jax
import jax.numpy as jnp

from ssljax import optimizers
from ssljax.augment import mixup
from ssljax.core import BatchSpec, Loss, Method, Stage
from ssljax.errors import non_negative, positive, probability
from ssljax.methods import consistency, mean_teacher


def ict_loss(
  net, batch_spec: BatchSpec, alpha: float, weight: float, length: float
) -> Loss:
  """Return the loss of the stage.

  Args:
    net: the `Network`.
    batch_spec: composition of the batch.
    alpha: α.
    weight: w_max.
    length: T in steps.
  """
  first = batch_spec.labelled

  def loss(params, state, batch, key):
    student_key, teacher_key, mix_key = jax.random.split(key, 3)
    u = batch.image[first:]
    target = mean_teacher.teacher_probabilities(net, state, u, teacher_key)
    mix = mixup.draw_mix(
      mix_key, batch_spec.unlabelled, alpha, dominant=False, per_row=False
    )
    images = jnp.concatenate([batch.image[:first], mixup.combine(mix, u)])
    outputs, stats = net.train(params, state.stats, images, student_key)
    one, two = jnp.split(outputs.logits, [first])
    labelled = consistency.labelled_cross_entropy(one, state, batch)
    distances = consistency.squared_distance(
      jax.nn.softmax(two), mixup.combine(mix, target)
    )
    ramp = weight * optimizers.ramp_up_sigmoid(batch.step, length)
    metrics = {
      'cross_entropy': labelled,
      'consistency': jnp.mean(distances),
      'weight': ramp,
    }
    total = labelled + ramp * metrics['consistency']
    return total, (state.replace(stats=stats), metrics)

  return loss


def ict(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  alpha: float = 1.0,
  weight: float = 100.0,
  ramp: float = 0.25,
  teacher_ema: float = 0.999,
) -> Method:
  """Return ICT with the paper's constants on CIFAR-10.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step.
    steps: length of the only stage.
    alpha: α of the Beta distribution; 1 draws λ uniformly.
    weight: w_max, largest weight of the consistency loss.
    ramp: T, length of the weight's ramp, as a share of the steps.
    teacher_ema: largest decay of the teacher's average.
  """
  consistency.check(batch_spec, steps)
  positive(alpha=alpha)
  non_negative(weight=weight)
  probability(ramp=ramp)
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=ict_loss(net, batch_spec, alpha, weight, ramp * steps),
  )
  return Method(
    name='ict',
    stages=(stage,),
    averaging=mean_teacher.teacher(teacher_ema),
    quality=mean_teacher.teacher_quality(net),
  )


# Settings of the paper on CIFAR-10 that differ from the defaults of other runs.
DEFAULTS = {
  'unlabelled': 'all',
  'batch_labelled': 100,
  'batch_unlabelled': 100,
  'learning_rate': 0.1,
  'decay': 'cosine',
  'weight_decay': 1e-4,
  'clip': 0.0,
  'average': 0.0,
  'preprocess': 'zca',
  'augment': ['flip', 'translate'],
}
