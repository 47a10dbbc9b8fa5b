"""Optimisers and learning rate schedules as the papers use them."""

from collections.abc import Sequence
import functools
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import optax

from ssljax.core import Averaging
from ssljax.errors import fraction, non_negative, positive, require

Decay = Literal[
  'constant', 'linear', 'half_linear', 'cosine', 'cosine716', 'steps'
]


def averaging(*, average: float = 0.9999) -> Averaging | None:
  """Return the moving average of weights that a run evaluates.

  Args:
    average: largest decay of the averaged weights; 0 averages nothing.
  """
  fraction(average=average)
  return Averaging(average) if average else None


def decayed(params: optax.Params) -> optax.Params:
  """Return True for parameters of rank 2 or more: kernels, without biases."""
  return jax.tree.map(lambda x: jnp.ndim(x) >= 2, params)


def _decayed_some(params: optax.Params, weight_decay: float) -> optax.Params:
  """Return `decayed(params)`; raise if weight decay would have no effect."""
  mask = decayed(params)
  leaves = jax.tree.leaves(mask)
  require(
    not weight_decay or not leaves or any(leaves),
    f'`weight_decay`={weight_decay}: the network has no parameter of rank 2 or '
    'more, and only those decay: give `weight_decay`=0',
  )
  return mask


def schedule(
  decay: Decay,
  learning_rate: float,
  steps: int,
  at: Sequence[int] = (),
  factor: float = 0.1,
) -> optax.Schedule:
  """Return the learning rate as a function of the step.

  Args:
    decay: 'linear' and 'cosine' fall to 0 from the first step on; 'half_linear'
      is constant for the first half of the steps and then falls linearly to 0
      (MA-DNN's code on CIFAR); 'cosine716' is FixMatch's, the rate times
      cos(7πk / 16K) at step k of K, which ends at 0.195 times the first rate;
      'steps' falls by `factor` at each step in `at`.
    learning_rate: rate at the first step.
    steps: length of the schedule.
    at: steps of decay 'steps'; a step that is listed twice counts twice.
    factor: factor of decay 'steps'.
  """
  if decay == 'steps':
    passed = lambda step: jnp.sum(step >= jnp.asarray(at, jnp.int32))
    return lambda step: learning_rate * factor ** passed(step).astype(float)
  if decay == 'constant':
    return optax.constant_schedule(learning_rate)
  if decay == 'cosine716':
    return lambda step: (
      learning_rate * jnp.cos(7 * jnp.pi / 16 * _elapsed(step, steps))
    )
  if decay == 'cosine':
    cosine = optax.cosine_decay_schedule(learning_rate, steps)
    return lambda step: cosine(jnp.asarray(step, float))
  begin = steps // 2 if decay == 'half_linear' else 0
  return optax.linear_schedule(learning_rate, 0.0, steps - begin, begin)


def _elapsed(step: chex.Numeric, length: float) -> chex.Array:
  """Return the share [] in [0, 1] of `length` steps that have passed."""
  if length <= 0:
    return jnp.ones([])
  return jnp.clip(jnp.asarray(step, float) / length, 0.0, 1.0)


def ramp_up_sigmoid(step: chex.Numeric, length: float) -> chex.Array:
  """Return exp(−5 (1 − t)²) [] with t = min(step / length, 1).

  Laine and Aila 2017 ramp the weight of the unsupervised loss up by it, over
  the first 80 epochs; it starts at exp(−5) = 0.0067.

  Args:
    step: [] step within the stage, as `Batch.step`.
    length: steps until the value is 1; 0 means 1 from the first step on.
  """
  return jnp.exp(-5 * jnp.square(1 - _elapsed(step, length)))


def ramp_up_linear(step: chex.Numeric, length: float) -> chex.Array:
  """Return min(step / length, 1) [], MixMatch's ramp.

  Args:
    step: [] step within the stage.
    length: steps until the value is 1; 0 means 1 from the first step on.

  Examples:
    >>> [float(ramp_up_linear(step, 100)) for step in (0, 25, 200)]
    [0.0, 0.25, 1.0]
  """
  return _elapsed(step, length)


def ramp_down_sigmoid(
  step: chex.Numeric, length: float, steps: int
) -> chex.Array:
  """Return exp(−12.5 t²) [], t in [0, 1] over the last `length` of `steps`.

  Laine and Aila 2017 ramp the learning rate down by it, over the last 50
  epochs; it is 1 before, and exp(−12.5) after the last step.

  Args:
    step: [] step within the stage.
    length: steps of the ramp; 0 means 1 at every step.
    steps: length of the stage.
  """
  if length <= 0:
    return jnp.ones([])
  passed = jnp.asarray(step, float) - (steps - length)
  return jnp.exp(-12.5 * jnp.square(_elapsed(passed, length)))


def optimizer(
  steps: int,
  scale: float = 1.0,
  *,
  optimizer: Literal['sgd', 'adam'] = 'sgd',
  learning_rate: float = 0.1,
  decay: Decay = 'half_linear',
  decay_at: Sequence[int] = (),
  decay_factor: float = 0.1,
  momentum: float = 0.9,
  nesterov: bool = True,
  weight_decay: float = 4e-5,
  clip: float = 2.0,
) -> optax.GradientTransformation:
  """Return the optimiser of a stage; the defaults are those of MA-DNN's code.

  Factories of methods take this function as `tx`, with its keywords bound.

  Args:
    steps: length of the stage, over which the learning rate decays.
    scale: factor of the learning rate, for stages with a rate of their own.
    optimizer: optimiser; 'adam' uses optax's defaults.
    learning_rate: learning rate at the first step.
    decay: shape of the learning rate over the steps, see `schedule`.
    decay_at: steps of decay 'steps', counted from the first step of the stage;
      a step that is listed twice counts twice.
    decay_factor: factor of the learning rate at each step in decay_at.
    momentum: momentum of 'sgd', β₁ of 'adam'.
    nesterov: use Nesterov's momentum in 'sgd'.
    weight_decay: coefficient of ½‖w‖² in the loss, for parameters w of rank 2
      or more: kernels of convolutions and dense layers. Biases, scales and
      other vectors do not decay.
    clip: bound on the absolute value of each gradient entry, weight decay
      included; 0 does not clip.

  Raises:
    InputError: a value is out of range. Initialising the optimiser raises it
      if weight_decay is above 0 and the network has no parameter that decays.
  """
  positive(learning_rate=learning_rate, decay_factor=decay_factor)
  _check_decay_at(decay, decay_at)
  non_negative(weight_decay=weight_decay, clip=clip)
  fraction(momentum=momentum)
  rate = schedule(decay, scale * learning_rate, steps, decay_at, decay_factor)
  if optimizer == 'sgd':
    descend = optax.sgd(
      rate, momentum or None, nesterov=nesterov and momentum > 0
    )
  else:
    descend = optax.adam(rate, b1=momentum)
  mask = functools.partial(_decayed_some, weight_decay=weight_decay)
  parts = [optax.add_decayed_weights(weight_decay, mask=mask)]
  parts += [optax.clip(clip)] if clip else []
  parts += [descend]
  return optax.chain(*parts)


def _check_decay_at(decay: Decay, decay_at: Sequence[int]) -> None:
  """Raise unless `decay_at` is valid and given with, and only with, 'steps'."""
  if decay == 'steps':
    require(
      len(decay_at) > 0,
      '`decay`=steps: say at which, as `decay_at`=5000,10000',
    )
  for step in decay_at:
    require(
      decay == 'steps',
      f'`decay_at`: `decay`={decay} has no steps: give `decay`=steps too',
    )
    require(
      0 < step < 2**31, f'`decay_at`={step}: give a step between 1 and 2**31'
    )
