"""Optimisers as the papers use them, and the averaged weights to evaluate."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssljax.core import TrainState
from ssljax.errors import fraction, non_negative, positive, require

Decay = Literal['constant', 'linear', 'half_linear', 'cosine', 'steps']


class AverageState(NamedTuple):
  """The state of `average_weights`."""

  count: jax.Array  # [] int32, updates so far
  average: optax.Params


def average_weights(decay: float) -> optax.GradientTransformation:
  """Carries w̄ ← d·w̄ + (1−d)·w with d = min(decay, (1+t)/(10+t)).

  Stands last in a chain: w are the weights after the update it is given, t
  the updates before it (TensorFlow's `ExponentialMovingAverage`).
  """

  def init(params):
    # A copy: the weights' own buffers are donated to the next step.
    return AverageState(
      jnp.zeros([], jnp.int32), jax.tree.map(jnp.copy, params)
    )

  def update(updates, state, params):
    t = state.count.astype(jnp.float32)
    d = jnp.minimum(decay, (1 + t) / (10 + t))
    weights = optax.apply_updates(params, updates)
    average = jax.tree.map(
      lambda old, new: (d * old + (1 - d) * new).astype(old.dtype),
      state.average,
      weights,
    )
    return updates, AverageState(state.count + 1, average)

  return optax.GradientTransformation(init, update)


def weights(state: TrainState):
  """(params, stats) to evaluate: averaged where the optimiser averages."""
  found = optax.tree_utils.tree_get_all_with_path(state.opt_state, 'average')
  return (found[0][1] if found else state.params), state.stats


def kernels(params: optax.Params):
  """True for the leaves named 'kernel': what weight decay applies to."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key == 'kernel', params
  )


def schedule(
  decay: Decay,
  learning_rate: float,
  steps: int,
  at: Sequence[int] = (),
  factor: float = 0.1,
) -> optax.Schedule:
  """Learning rate over `steps`.

  'linear' and 'cosine' fall to 0 from the first step; 'half_linear' is
  constant for the first half, then linear to 0 (MA-DNN's code on CIFAR);
  'steps' is multiplied by `factor` at each of the steps `at`.
  """
  if decay == 'steps':
    passed = lambda step: jnp.sum(step >= jnp.asarray(at, jnp.int32))
    return lambda step: learning_rate * factor ** passed(step).astype(float)
  if decay == 'constant':
    return optax.constant_schedule(learning_rate)
  if decay == 'cosine':
    cosine = optax.cosine_decay_schedule(learning_rate, steps)
    return lambda step: cosine(jnp.asarray(step, float))
  begin = steps // 2 if decay == 'half_linear' else 0
  return optax.linear_schedule(learning_rate, 0.0, steps - begin, begin)


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
  average: float = 0.9999,
) -> optax.GradientTransformation:
  """The optimiser of a stage of `steps` steps; defaults are MA-DNN's code.

  With its keywords bound it is what the factories of methods take as `tx`.

  Args:
    steps: length of the stage, over which the learning rate decays.
    scale: of the learning rate, for a stage that has its own.
    optimizer: 'adam' has optax's defaults.
    learning_rate: at the first step.
    decay: see `schedule`.
    decay_at: the steps of decay 'steps', counted from the stage's first; one
      that is named twice counts twice.
    decay_factor: of the learning rate at each of them.
    momentum: of 'sgd', and β₁ of 'adam'.
    nesterov: Nesterov's momentum, of 'sgd'.
    weight_decay: coefficient of ½‖kernel‖² added to the loss; kernels only.
    clip: bound on the absolute value of each gradient entry, weight decay
      included; 0 clips nothing.
    average: largest decay of the averaged weights; 0 averages nothing.
  """
  positive(learning_rate=learning_rate, decay_factor=decay_factor)
  _check_decay_at(decay, decay_at)
  non_negative(weight_decay=weight_decay, clip=clip)
  fraction(momentum=momentum, average=average)
  rate = schedule(decay, scale * learning_rate, steps, decay_at, decay_factor)
  if optimizer == 'sgd':
    descend = optax.sgd(
      rate, momentum or None, nesterov=nesterov and momentum > 0
    )
  else:
    descend = _promoting(optax.adam(rate, b1=momentum))
  parts = [optax.add_decayed_weights(weight_decay, mask=kernels)]
  parts += [optax.clip(clip)] if clip else []
  parts += [descend]
  parts += [average_weights(average)] if average else []
  return optax.chain(*parts)


def _check_decay_at(decay: Decay, decay_at: Sequence[int]) -> None:
  """Refuses steps that are none, and those without their decay."""
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


def _promoting(tx: optax.GradientTransformation):
  """Lets optax's Adam mix dtypes where the program forbids itself to."""

  def update(updates, state, params=None):
    with jax.numpy_dtype_promotion('standard'):
      return tx.update(updates, state, params)

  return optax.GradientTransformation(tx.init, update)
