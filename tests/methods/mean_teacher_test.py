import jax
import jax.numpy as jnp
import logit_net
import numpy as np
import optax
import pytest

from ssljax.core import BatchSpec, init_average, make_step, update_average
from ssljax.errors import InputError
from ssljax.methods import mean_teacher as m

LABELS = [1, -1, -1, 2]
ROWS = [0, 3, 1, 2]  # two labelled, two unlabelled
STUDENT = np.array(
  [[0.3, 1.0, -0.4], [0.9, 0.1, 0.2], [0, 1, 5], [0.5, 0.6, 0.4]]
)
TEACHER = np.array(
  [[0.1, 0.7, 0.2], [1.2, 0.0, 0.3], [1, 0, 3], [-0.5, 0.2, 0.9]]
)


def make(**settings):
  return logit_net.make_method(m.mean_teacher, 2, 2, **settings)


def batch(step=0):
  return logit_net.make_batch(
    STUDENT, labelled=2, rows=ROWS, step=step, teacher=TEACHER
  )


def apart(state):
  """A state whose teacher differs from its student."""
  params = {'scale': jnp.float32(0.5), 'bias': jnp.array([0.1, -0.3, 0.2])}
  return state.replace(average=state.average.replace(params=params))


@pytest.mark.parametrize('step', [0, 10, 40, 90])
def test_the_loss_equals_a_numpy_loop(step):
  method = make(weight=3.0, ramp=0.4, steps=100)
  state = apart(logit_net.make_state(method, LABELS, 3))
  total, _, metrics = logit_net.call(method, state, batch(step))
  labelled = np.mean(
    [logit_net.cross_entropy(STUDENT[b], LABELS[ROWS[b]]) for b in range(2)]
  )
  distances = []
  for b in range(4):
    p = logit_net.softmax(STUDENT[b])
    q = logit_net.softmax(0.5 * TEACHER[b] + np.array([0.1, -0.3, 0.2]))
    distances.append(sum((p[c] - q[c]) ** 2 for c in range(3)) / 3)
  ramp = np.exp(-5 * (1 - step / 40) ** 2) if step < 40 else 1.0
  np.testing.assert_allclose(metrics['weight'], 3 * ramp, rtol=1e-5)
  np.testing.assert_allclose(
    metrics['consistency'], np.mean(distances), rtol=1e-5
  )
  want = labelled + 3 * ramp * np.mean(distances)
  np.testing.assert_allclose(total, want, rtol=1e-5)


def test_gradients_flow_through_the_student_alone():
  method = make(weight=3.0, ramp=0.0)
  state = apart(logit_net.make_state(method, LABELS, 3))
  slopes = logit_net.slopes(method, state, batch())
  assert (slopes['teacher'] == 0).all()
  # Labelled rows too: they have a consistency loss beside their label.
  assert (slopes['image'] != 0).all()


def test_the_teacher_is_the_average_of_the_students_after_every_update():
  # α = min(0.6, 1 − 1/(t+1)): 1/2, 0.6, 0.6.
  averaging = make(teacher_ema=0.6).averaging
  params = lambda x: {'scale': jnp.float32(x), 'bias': jnp.full(3, -x)}
  average = init_average(averaging, params(1.0), {'mean': jnp.zeros([])})
  teacher, mean = 1.0, 0.0
  for alpha, student, statistic in ((0.5, 3.0, 8.0), (0.6, -1.0, 2.0)):
    stats = {'mean': jnp.float32(statistic)}
    average = update_average(averaging, average, params(student), stats)
    teacher = alpha * teacher + (1 - alpha) * student
    mean = alpha * mean + (1 - alpha) * statistic
    np.testing.assert_allclose(average.params['scale'], teacher, rtol=1e-6)
    np.testing.assert_allclose(average.stats['mean'], mean, rtol=1e-6)


def test_the_teacher_includes_the_update_of_the_step_and_is_evaluated():
  spec = BatchSpec(2, 2)
  method = m.mean_teacher(logit_net.NET, lambda steps: optax.sgd(0.5), spec, 10)
  (stage,) = method.stages
  state = logit_net.make_state(method, LABELS, 3)
  state = state.replace(opt_state=stage.tx.init(state.params))
  before = state.params
  images = {'image': batch().image, 'teacher': batch().views['teacher']}
  step = jax.jit(make_step(stage, lambda *_: images, method.averaging))
  state, _ = step(state, (), jnp.array(ROWS, jnp.int32), jnp.int32(0))
  assert (state.params['bias'] != before['bias']).all()
  params, stats = method.weights(state)
  # The first decay is 1/2.
  want = 0.5 * before['bias'] + 0.5 * state.params['bias']
  np.testing.assert_allclose(params['bias'], want, rtol=1e-6)
  # The statistics too: those of the student's images.
  want = 0.5 * STUDENT.mean()
  np.testing.assert_allclose(stats['mean'], want, rtol=1e-5)


@pytest.mark.parametrize(
  'settings', [dict(teacher_ema=1.0), dict(weight=-1.0), dict(ramp=1.5)]
)
def test_bad_settings_are_named(settings):
  ((name, value),) = settings.items()
  with pytest.raises(InputError, match=f'{name}={value}'):
    make(**settings)
