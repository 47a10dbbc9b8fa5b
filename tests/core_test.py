"""The train step by hand, on a network of a single number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssljax import core
from ssljax.errors import InputError
from ssljax.networks import network

RATE, DECAY = 0.5, 0.99
ROWS = np.array([2, 0, 1], np.int32)


def init(key, image):
  del key, image
  return {'w': jnp.float32(2.0)}, {'mean': jnp.float32(5.0)}


def infer(params, stats, image):
  logits = image.reshape(len(image), -1) * params['w'] + stats['mean']
  return network.Outputs(logits, logits)


NET = network.Network(init, None, infer, infer, 1)


def squared_loss(params, state, batch, key):
  """½ w², and a running statistic that falls by 1 per step; logs its step."""
  del key
  stats = {'mean': state.stats['mean'] - 1}
  step = jnp.asarray(batch.step, jnp.float32)
  half = jnp.square(params['w']) / 2
  return half, (state.replace(stats=stats), {'at': step})


STAGE = core.Stage(
  name='only',
  tx=optax.sgd(RATE),
  batch_spec=core.BatchSpec(2, 1),
  loss=squared_loss,
  steps=4,
)


def read(source, rows, key):
  del key
  return {'image': source[rows]}


def start(stage=STAGE, averaging=None, memory=core.no_memory):
  """The state before the first step, and the compiled step."""
  method = core.Method(
    name='by hand', stages=(stage,), init=memory, averaging=averaging
  )
  labels, image = jnp.array([0, 1, -1]), jnp.ones([3, 1, 1, 1])
  state = core.init_state(method, NET, jax.random.key(0), labels, image)
  state = core.init_stage(stage, state, averaging)
  step = jax.jit(core.make_step(stage, read, averaging))
  return state, lambda state, first=0: step(state, image, ROWS, first)


def test_a_step_descends_and_reports_the_loss():
  state, step = start()
  state, metrics = step(state)
  assert float(metrics['loss']) == 2.0  # ½ 2²
  assert float(state.params['w']) == 1.0  # 2 − ½·2
  assert int(state.step) == 1 and float(state.stats['mean']) == 4.0
  assert state.average == ()


def test_the_step_of_a_batch_counts_from_the_start_of_the_stage():
  state, step = start()
  state = state.replace(step=jnp.int32(7))
  seen = []
  for _ in range(3):
    state, metrics = step(state, 6)
    seen.append(float(metrics['at']))
  assert seen == [1, 2, 3] and int(state.step) == 10


def test_only_the_labelled_part_of_a_batch_shows_its_labels():
  def loss(params, state, batch, key):
    del key
    labels = core.visible_labels(state, batch)
    seen = {f'label {i}': label for i, label in enumerate(labels)}
    return params['w'], (state, seen)

  # A batch of two labelled rows, 2 and 0, and one unlabelled row, 1, all of
  # which have a label in the table.
  state, step = start(STAGE._replace(loss=loss))
  state = state.replace(labels=jnp.array([4, 5, 6]))
  _, metrics = step(state)
  seen = [int(metrics[f'label {i}']) for i in range(3)]
  assert seen == [6, 4, core.UNLABELLED]


def test_every_step_has_other_keys_for_its_images_and_its_loss():
  noise = lambda key: jax.random.uniform(key)

  def loss(params, state, batch, key):
    seen = {'loss key': noise(key), 'read key': batch.image.ravel()[0]}
    return params['w'], (state, seen)

  def noisy_read(source, rows, key):
    return {'image': jnp.full([len(rows), 1, 1, 1], noise(key))}

  stage = STAGE._replace(loss=loss)
  state, _ = start(stage)
  step = jax.jit(core.make_step(stage, noisy_read, None))
  seen = []
  for seed in (0, 1):
    now = state.replace(key=jax.random.key(seed))
    for _ in range(2):
      now, metrics = step(now, (), ROWS, 0)
      seen += [float(metrics['loss key']), float(metrics['read key'])]
  # Two seeds of two steps with two keys each.
  assert len(set(seen)) == 8


def test_a_teacher_that_is_updated_after_the_step_includes_its_update():
  def after_update(state, batch):
    assert batch.rows.shape == (3,)
    teacher = 0.75 * state.memory + 0.25 * state.params['w']
    return state.replace(memory=teacher * state.step.astype(jnp.float32))

  memory = lambda key, params, stats, spec: params['w']
  stage = STAGE._replace(after_update=after_update)
  state, step = start(stage, memory=memory)
  w, teacher = 2.0, 2.0
  for count in (1, 2, 3):
    state, _ = step(state)
    w -= RATE * w
    # The counter is that of finished steps, this one included.
    teacher = (0.75 * teacher + 0.25 * w) * count
    np.testing.assert_allclose(state.memory, teacher, rtol=1e-6)


def averages(start, values, decay, warmup=10):
  """Averages after each of the values, by TensorFlow's formula."""
  average, found = start, []
  for t, value in enumerate(values):
    d = min(decay, (1 + t) / (warmup + t))
    average = d * average + (1 - d) * value
    found.append(average)
  return found


@pytest.mark.parametrize('statistics', [False, True])
@pytest.mark.parametrize('decay', [0.0, 0.15, 0.99])
def test_averages_follow_tensorflows_formula(decay, statistics):
  averaging = core.Averaging(decay, statistics)
  state, step = start(averaging=averaging)
  wanted = averages(2.0, [1.0, 0.5, 0.25], decay)  # w halves in each step
  of_stats = averages(5.0, [4.0, 3.0, 2.0], decay)
  for count, (w, mean) in enumerate(zip(wanted, of_stats, strict=True)):
    state, _ = step(state)
    np.testing.assert_allclose(state.average.params['w'], w, rtol=1e-6)
    assert int(state.average.count) == count + 1
    if statistics:
      np.testing.assert_allclose(state.average.stats['mean'], mean, rtol=1e-6)
    params, stats = core.evaluated_weights(state)
    assert params is state.average.params
    assert stats is (state.average.stats if statistics else state.stats)
  assert statistics or state.average.stats == ()


def test_the_warm_up_of_an_average_can_be_shorter():
  averaging = core.Averaging(0.6, warmup=2)  # 1/2, then 0.6 and not 2/3
  state, step = start(averaging=averaging)
  for w in averages(2.0, [1.0, 0.5, 0.25], 0.6, warmup=2):
    state, _ = step(state)
    np.testing.assert_allclose(state.average.params['w'], w, rtol=1e-6)


def test_without_an_average_the_trained_weights_are_evaluated():
  state, _ = start()
  assert core.evaluated_weights(state) == (state.params, state.stats)


def test_the_average_is_no_alias_of_the_weights():
  averaging = core.Averaging(DECAY, statistics=True)
  params, stats = init(None, None)
  make = jax.jit(lambda *weights: core.init_average(averaging, *weights))
  average = make(params, stats)
  pointer = lambda x: x.unsafe_buffer_pointer()
  assert pointer(average.params['w']) != pointer(params['w'])
  assert pointer(average.stats['mean']) != pointer(stats['mean'])


def test_a_loss_may_use_the_average_of_the_steps_before_as_its_teacher():
  def loss(params, state, batch, key):
    del batch, key
    teacher = state.average.params['w']
    half = jnp.square(params['w'] - teacher / 2) / 2
    return half, (state, {'teacher': teacher})

  state, step = start(STAGE._replace(loss=loss), core.Averaging(DECAY))
  w, teacher = 2.0, 2.0  # the first teacher is the untrained network
  for t in range(3):
    state, metrics = step(state)
    np.testing.assert_allclose(metrics['teacher'], teacher, rtol=1e-6)
    w -= RATE * (w - teacher / 2)
    d = (1 + t) / (10 + t)
    teacher = d * teacher + (1 - d) * w


def test_a_new_stage_starts_its_average_unless_it_continues_the_optimiser():
  averaging = core.Averaging(DECAY)
  state, step = start(averaging=averaging)
  state, _ = step(state)
  assert float(state.average.params['w']) != float(state.params['w'])
  fresh = core.init_stage(STAGE, state, averaging)
  assert int(fresh.average.count) == 0
  assert float(fresh.average.params['w']) == float(state.params['w'])
  kept = core.init_stage(STAGE._replace(keep_optimizer=True), state, averaging)
  assert kept is state


@pytest.mark.parametrize(
  ('views', 'message'),
  [
    ((core.View('a'), core.View('a')), 'views: a, a'),
    ((core.View('image', rows='labelled'),), 'image.*is the default one'),
    ((core.View('a', rows='unlabelled'),), 'has no unlabelled rows'),
  ],
)
def test_views_that_cannot_be_made_are_refused(views, message):
  stage = STAGE._replace(views=views, batch_spec=core.BatchSpec(2))
  with pytest.raises(InputError, match=message):
    core.all_views(stage)


def test_the_default_view_is_there_and_first():
  strong = core.View('strong')
  assert core.all_views(STAGE) == (core.View('image'),)
  assert core.all_views(STAGE._replace(views=(strong,)))[1] is strong
  own = core.View('image', augment=lambda key, image: image)
  stage = STAGE._replace(views=(strong, own))
  assert core.all_views(stage) == (own, strong)


LABELS = jnp.array([0, 1, 0, -1, 0, 3, -1])


def test_class_frequencies_count_labels_and_at_least_one_of_a_class():
  counts = [max(1, LABELS.tolist().count(c)) for c in range(4)]
  wanted = np.array(counts) / sum(counts)  # 3, 1, 1 and 1 of 6
  found = core.class_frequencies(LABELS, 4)
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_logit_adjustment_adds_the_logarithm_of_the_frequencies():
  found = core.prior_logits(core.LogitAdjustment(0.5, 4), LABELS)
  wanted = 0.5 * np.log(np.array([3, 1, 1, 1]) / 6)
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  batch = core.Batch(ROWS, None, None)
  logits = jnp.array([[1.0, 2.0, -3.0, 0.5]])
  assert batch.adjusted(logits) is logits  # bit for bit
  adjusted = batch._replace(prior_logits=found).adjusted(logits)
  np.testing.assert_allclose(adjusted[0], logits[0] + wanted, rtol=1e-6)


def test_a_step_adjusts_by_the_labels_of_the_state():
  def loss(params, state, batch, key):
    adjusted = batch.adjusted(jnp.zeros(2))
    return params['w'] * 0, (state, {'first': adjusted[0]})

  stage = STAGE._replace(loss=loss)
  stage = stage._replace(logit_adjustment=core.LogitAdjustment(2.0, 2))
  state, step = start(stage)
  state = state.replace(labels=state.labels.at[2].set(0))  # 0, 1, 0
  _, metrics = step(state)
  np.testing.assert_allclose(metrics['first'], 2 * np.log(2 / 3), rtol=1e-6)
