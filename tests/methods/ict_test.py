import jax
import jax.numpy as jnp
import logit_net
import numpy as np
import pytest

from ssljax.augment import mixup
from ssljax.errors import InputError
from ssljax.methods import mean_teacher
from ssljax.methods.ict import ict

LABELS = [1, -1, -1, 2, -1, -1]
ROWS = [0, 3, 1, 4, 5, 2]  # two labelled, four unlabelled
LOGITS = np.array(
  [
    *([0.3, 1.0, -0.4], [0.9, 0.1, 0.2], [0, 1, 5], [0.5, 0.6, 0.4]),
    *([3, 0, 1.5], [0.7, -0.2, 3.4]),
  ]
)
BIAS = np.array([0.1, -0.3, 0.2])


def make(**settings):
  return logit_net.make_method(ict, 2, 4, **settings)


def batch(step=0):
  return logit_net.make_batch(LOGITS, labelled=2, rows=ROWS, step=step)


def apart(state):
  """A state whose teacher differs from its student."""
  params = {'scale': jnp.float32(0.5), 'bias': jnp.float32(BIAS)}
  return state.replace(average=state.average.replace(params=params))


def draw(alpha):
  # The keys of `logit_net.call` and of the loss.
  key = jax.random.split(logit_net.KEY, 3)[2]
  return jax.tree.map(
    np.asarray,
    mixup.draw_mix(key, 4, alpha, dominant=False, per_row=False),
  )


@pytest.mark.parametrize(('alpha', 'step'), [(1.0, 0), (0.2, 10), (1.0, 90)])
def test_the_loss_equals_a_numpy_loop(alpha, step):
  method = make(weight=7.0, ramp=0.25, alpha=alpha)
  state = apart(logit_net.make_state(method, LABELS, 3))
  total, after, metrics = logit_net.call(method, state, batch(step))
  mix = draw(alpha)
  assert len(set(mix.weight)) == 1 and sorted(mix.partner) == [0, 1, 2, 3]
  u, lam = LOGITS[2:], mix.weight[0]
  distances, mixed = [], []
  for b in range(4):
    j = mix.partner[b]
    mixed.append(lam * u[b] + (1 - lam) * u[j])
    p = logit_net.softmax(mixed[-1])
    one, two = (logit_net.softmax(0.5 * u[i] + BIAS) for i in (b, j))
    target = lam * one + (1 - lam) * two
    distances.append(sum((p[c] - target[c]) ** 2 for c in range(3)) / 3)
  labelled = np.mean(
    [logit_net.cross_entropy(LOGITS[b], LABELS[ROWS[b]]) for b in range(2)]
  )
  ramp = np.exp(-5 * (1 - step / 25) ** 2) if step < 25 else 1.0
  np.testing.assert_allclose(metrics['cross_entropy'], labelled, rtol=1e-5)
  np.testing.assert_allclose(
    metrics['consistency'], np.mean(distances), rtol=1e-4
  )
  want = labelled + 7 * ramp * np.mean(distances)
  np.testing.assert_allclose(total, want, rtol=1e-4)
  # The student sees labelled and mixed images, and no others.
  want = np.concatenate([LOGITS[:2], mixed]).mean()
  np.testing.assert_allclose(after.stats['mean'], want, rtol=1e-4)


def test_no_gradient_flows_through_the_teacher():
  method = make(weight=7.0, ramp=0.0)
  state = apart(logit_net.make_state(method, LABELS, 3))

  def total(average):
    changed = state.replace(average=average)
    return logit_net.call(method, changed, batch())[0]

  slope = jax.grad(total, allow_int=True)(state.average)
  assert (slope.params['bias'] == 0).all() and slope.params['scale'] == 0
  student = lambda params: method.stages[0].loss(
    params, state, batch(), logit_net.KEY
  )[1][1]['consistency']
  assert (jax.grad(student)(state.params)['bias'] != 0).all()


def test_the_teacher_is_that_of_mean_teacher_and_is_evaluated():
  method = make(teacher_ema=0.9)
  assert method.averaging == mean_teacher.teacher(0.9)
  state = apart(logit_net.make_state(method, LABELS, 3))
  assert method.weights(state)[0] is state.average.params


@pytest.mark.parametrize(
  'settings',
  [dict(alpha=0.0), dict(weight=-1.0), dict(ramp=1.5), dict(teacher_ema=1.0)],
)
def test_bad_settings_are_named(settings):
  ((name, value),) = settings.items()
  with pytest.raises(InputError, match=f'{name}={value}'):
    make(**settings)
