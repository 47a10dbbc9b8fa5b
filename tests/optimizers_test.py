import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssljax import optimizers
from ssljax.errors import InputError

PARAMS = {
  'a': {'kernel': jnp.array([[2.0, -4.0]]), 'bias': jnp.array([1.0])},
}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)


def run(tx, slopes, params=PARAMS, steps=1):
  state = tx.init(params)
  for _ in range(steps):
    updates, state = tx.update(slopes, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def plain(steps=10, **more):
  defaults = dict(
    decay='constant',
    learning_rate=0.1,
    momentum=0.0,
    weight_decay=0.0,
    clip=0.0,
    average=0.0,
  )
  return optimizers.optimizer(steps, **(defaults | more))


def test_weight_decay_moves_kernels_only():
  # w ← w − 0.1·0.5·w = 0.95 w; the bias stays.
  params, _ = run(plain(weight_decay=0.5), ZERO)
  expected = {
    'a': {'kernel': 0.95 * PARAMS['a']['kernel'], 'bias': PARAMS['a']['bias']}
  }
  chex.assert_trees_all_close(params, expected, rtol=1e-6)


def test_clipping_bounds_each_entry_with_the_decay_included():
  # Slopes 5·w = (10, −20) are clipped to ±2: w ∓ 0.1·2.
  params, _ = run(plain(weight_decay=5.0, clip=2.0), ZERO)
  np.testing.assert_allclose(params['a']['kernel'], [[1.8, -3.8]], rtol=1e-6)


def test_nesterov_momentum_by_hand():
  # m₁ = 1, step 1 + 0.9·1; m₂ = 1.9, step 1 + 0.9·1.9; sum 1.9 + 2.71.
  ones = jax.tree.map(jnp.ones_like, PARAMS)
  params, _ = run(plain(momentum=0.9), ones, steps=2)
  expected = jax.tree.map(lambda w: w - 0.1 * 4.61, PARAMS)
  chex.assert_trees_all_close(params, expected, rtol=1e-5)


def test_averaged_weights_follow_tensorflows_formula():
  ones = jax.tree.map(jnp.ones_like, PARAMS)
  _, state = run(plain(average=0.15), ones, steps=3)
  w, average = 1.0, 1.0
  for t in range(3):
    w -= 0.1
    d = min(0.15, (1 + t) / (10 + t))
    average = d * average + (1 - d) * w
  found = optax.tree_utils.tree_get(state, 'average')
  np.testing.assert_allclose(found['a']['bias'], [average], rtol=1e-6)


def test_the_average_is_no_alias_of_the_weights():
  state = jax.jit(plain(average=0.9).init)(PARAMS)
  average = optax.tree_utils.tree_get(state, 'average')
  pointer = lambda x: x.unsafe_buffer_pointer()
  assert pointer(average['a']['kernel']) != pointer(PARAMS['a']['kernel'])


@pytest.mark.parametrize(
  ('decay', 'rates'),
  [
    ('constant', [1, 1, 1, 1, 1]),
    ('linear', [1, 0.75, 0.5, 0.25, 0]),
    ('half_linear', [1, 1, 1, 0.5, 0]),
    ('cosine', [1, 0.853553, 0.5, 0.146447, 0]),  # ½(1 + cos πt/4)
  ],
)
def test_schedules(decay, rates):
  schedule = optimizers.schedule(decay, 1.0, 4)
  got = [float(schedule(t)) for t in range(5)]
  np.testing.assert_allclose(got, rates, atol=1e-6)


def test_a_schedule_of_steps_falls_at_each_twice_where_named_twice():
  schedule = optimizers.schedule('steps', 8.0, 10, (2, 4, 4), 0.5)
  got = [float(schedule(t)) for t in (0, 1, 2, 3, 4, 9)]
  np.testing.assert_allclose(got, [8, 8, 4, 4, 1, 1])


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (dict(decay='steps'), 'decay=steps: say at which'),
    (dict(decay_at=(3,)), 'decay_at: decay=constant has no steps'),
    (dict(decay='steps', decay_at=(5, -3)), 'decay_at=-3'),
    (dict(decay='steps', decay_at=(2**31,)), 'decay_at=2147483648'),
  ],
)
def test_steps_go_with_the_decay_of_that_name(more, message):
  with pytest.raises(InputError, match=message):
    plain(**more)


def test_a_stage_may_scale_the_learning_rate():
  make = functools.partial(
    optimizers.optimizer,
    learning_rate=0.1,
    decay='linear',
    momentum=0.0,
    weight_decay=0.0,
    average=0,
  )
  ones = jax.tree.map(jnp.ones_like, PARAMS)
  params, _ = run(make(4, 0.5), ones, steps=2)  # 0.05 then 0.0375
  expected = jax.tree.map(lambda w: w - 0.0875, PARAMS)
  chex.assert_trees_all_close(params, expected, rtol=1e-6)


@pytest.mark.parametrize(
  ('name', 'bad'),
  [
    ('learning_rate', 0.0),
    ('learning_rate', -1.0),
    ('learning_rate', float('nan')),
    ('weight_decay', -1e-4),
    ('clip', float('inf')),
    ('momentum', 1.0),
    ('average', float('nan')),
  ],
)
def test_a_bad_value_is_refused_by_name(name, bad):
  with pytest.raises(InputError, match=f'{name}={bad}'):
    plain(**{name: bad})
