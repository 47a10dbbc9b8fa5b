import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssljax import optimizers, registry
from ssljax.core import Averaging
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


def side(name):
  """A height and width of images that a network of the table accepts."""
  return {'deepbass_toy': 1, 'elu_stl10': 96, 'lenet': 28}.get(name, 32)


@pytest.mark.parametrize('name', registry.NETWORKS)
def test_the_same_parameters_decay_as_those_that_are_called_kernel(name):
  net = registry.NETWORKS[name](10)
  channels = 2 if name == 'deepbass_toy' else 1
  image = jnp.zeros([2, side(name), side(name), channels])
  params, _ = jax.eval_shape(net.init, jax.random.key(0), image)
  by_name = jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key == 'kernel', params
  )
  assert optimizers.decayed(params) == by_name
  assert any(jax.tree.leaves(by_name)) and not all(jax.tree.leaves(by_name))


def test_a_network_of_vectors_alone_has_nothing_to_decay():
  vectors = {'scale': jnp.ones(3), 'shift': jnp.zeros([])}
  tx = plain(weight_decay=0.5)
  with pytest.raises(InputError, match=r'weight_decay=0\.5.*rank 2'):
    tx.init(vectors)
  moved, _ = run(plain(), jax.tree.map(jnp.zeros_like, vectors), vectors)
  chex.assert_trees_all_equal(moved, vectors)


@pytest.mark.parametrize(
  ('decay', 'rates'),
  [
    ('constant', [1, 1, 1, 1, 1]),
    ('linear', [1, 0.75, 0.5, 0.25, 0]),
    ('half_linear', [1, 1, 1, 0.5, 0]),
    ('cosine', [1, 0.853553, 0.5, 0.146447, 0]),  # ½(1 + cos πt/4)
    # cos(7πt / 64): 0.19509 = cos(7π/16) at the end.
    ('cosine716', np.cos(7 * np.pi * np.arange(5) / 64)),
  ],
)
def test_schedules(decay, rates):
  schedule = optimizers.schedule(decay, 1.0, 4)
  got = [float(schedule(t)) for t in range(5)]
  np.testing.assert_allclose(got, rates, atol=1e-6)


def test_the_7_16_cosine_ends_above_0_and_stays_there():
  schedule = optimizers.schedule('cosine716', 0.03, 100)
  assert abs(float(schedule(100)) - 0.03 * 0.195090) < 1e-7
  assert float(schedule(1000)) == float(schedule(100))
  # Within a compiled step the step is an int32.
  np.testing.assert_allclose(
    jax.jit(schedule)(jnp.int32(50)), 0.03 * np.cos(7 * np.pi / 32), rtol=1e-6
  )


def test_ramps_by_hand():
  steps = jnp.array([0, 2, 4, 6, 8, 100], jnp.int32)
  t = np.array([0, 0.25, 0.5, 0.75, 1, 1])
  ramps = jax.vmap(lambda k: optimizers.ramp_up_sigmoid(k, 8))(steps)
  np.testing.assert_allclose(ramps, np.exp(-5 * (1 - t) ** 2), rtol=1e-6)
  ramps = jax.vmap(lambda k: optimizers.ramp_up_linear(k, 8))(steps)
  np.testing.assert_allclose(ramps, t, rtol=1e-6)
  # Over the last 4 of 8 steps.
  ramps = jax.vmap(lambda k: optimizers.ramp_down_sigmoid(k, 4, 8))(steps)
  t = np.array([0, 0, 0, 0.5, 1, 1])
  np.testing.assert_allclose(ramps, np.exp(-12.5 * t**2), rtol=1e-6)


def test_a_ramp_of_no_steps_is_1_from_the_first_step_on():
  assert float(optimizers.ramp_up_sigmoid(0, 0)) == 1
  assert float(optimizers.ramp_up_linear(0, 0)) == 1
  assert float(optimizers.ramp_down_sigmoid(7, 0, 8)) == 1


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
  ],
)
def test_a_bad_value_is_refused_by_name(name, bad):
  with pytest.raises(InputError, match=f'{name}={bad}'):
    plain(**{name: bad})


def test_an_average_of_0_averages_nothing():
  assert optimizers.averaging() == Averaging(0.9999, statistics=False)
  assert optimizers.averaging(average=0.5) == Averaging(0.5)
  assert optimizers.averaging(average=0) is None


@pytest.mark.parametrize('bad', [1.0, -0.1, float('nan')])
def test_an_average_outside_of_0_to_1_is_refused(bad):
  with pytest.raises(InputError, match=f'average={bad}'):
    optimizers.averaging(average=bad)
