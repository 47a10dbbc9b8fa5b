import jax
import jax.numpy as jnp
import logit_net
import numpy as np
import pytest

from ssljax.errors import InputError
from ssljax.methods import freematch as m

LABELS = [1, -1, -1, 2, -1, -1, -1]
ROWS = [0, 3, 1, 4, 5, 6]  # two labelled, four unlabelled


def make(**settings):
  settings = dict(strong_augment=()) | settings
  return logit_net.make_method(m.freematch, 2, 4, **settings)


def steps(seed=0, count=6):
  """Weak and strong logits of some steps."""
  rng = np.random.default_rng(seed)
  for _ in range(count):
    yield rng.normal(size=(6, 3)) * 2 + [1, 0, 0], rng.normal(size=(4, 3))


def sum_norm(p, h):
  ratio = [a / b if b > 0 else 0.0 for a, b in zip(p, h, strict=True)]
  return [r / sum(ratio) for r in ratio]


def numpy_step(memory, weak, strong, decay):
  """L_u, L_f, the mean mask; `memory` is updated."""
  q = [logit_net.softmax(weak[2 + b]) for b in range(4)]
  histogram = np.zeros(3)
  for p in q:
    histogram[p.argmax()] += 1 / 4
  mean = lambda old, new: decay * old + (1 - decay) * new
  memory['tau'] = mean(memory['tau'], sum(p.max() for p in q) / 4)
  memory['p'] = mean(memory['p'], sum(q) / 4)
  memory['h'] = mean(memory['h'], histogram)
  limits = memory['p'] / memory['p'].max() * memory['tau']
  terms, mask = [], []
  for b in range(4):
    c = q[b].argmax()
    mask.append(q[b][c] >= limits[c])
    terms.append(mask[-1] * logit_net.cross_entropy(strong[b], c))
  selected = [logit_net.softmax(strong[b]) for b in range(4) if mask[b]]
  if not selected:
    return np.mean(terms), 0.0, 0.0
  h = np.zeros(3)
  for p in selected:
    h[p.argmax()] += 1 / len(selected)
  target = sum_norm(memory['p'], memory['h'])
  ours = sum_norm(sum(selected) / len(selected), h)
  fair = sum(t * np.log(o + 1e-12) for t, o in zip(target, ours, strict=True))
  return np.mean(terms), fair, np.mean(mask)


def test_steps_equal_a_numpy_loop():
  decay = 0.6
  method = make(weight=0.7, fairness_weight=0.2, threshold_ema=decay)
  state = logit_net.make_state(method, LABELS, 3)
  memory = {'tau': 1 / 3, 'p': np.full(3, 1 / 3), 'h': np.full(3, 1 / 3)}
  masks = []
  for weak, strong in steps():
    batch = logit_net.make_batch(weak, labelled=2, rows=ROWS, strong=strong)
    want, fair, mask = numpy_step(memory, weak, strong, decay)
    total, state, metrics = logit_net.call(method, state, batch)
    np.testing.assert_allclose(metrics['consistency'], want, rtol=1e-4)
    np.testing.assert_allclose(metrics['fairness'], fair, rtol=1e-4)
    np.testing.assert_allclose(metrics['mask'], mask, rtol=1e-6)
    np.testing.assert_allclose(
      total, metrics['cross_entropy'] + 0.7 * want + 0.2 * fair, rtol=1e-4
    )
    np.testing.assert_allclose(state.memory.threshold, memory['tau'], rtol=1e-5)
    np.testing.assert_allclose(state.memory.classes, memory['p'], rtol=1e-5)
    np.testing.assert_allclose(state.memory.histogram, memory['h'], rtol=1e-5)
    masks.append(mask)
  assert min(masks) < 1


def test_fairness_is_zero_and_has_no_gradient_without_a_selected_image():
  method = make()
  averages = logit_net.make_state(method, LABELS, 3).memory
  strong = jnp.array([[1.0, 0.2, 0.1]] * 4)
  of = lambda strong, mask: m.fairness(averages, strong, mask)
  value, slope = jax.value_and_grad(of)(strong, jnp.zeros(4, bool))
  assert value == 0 and (slope == 0).all()
  value, slope = jax.value_and_grad(of)(strong, jnp.arange(4) < 2)
  # The gradient flows through the strong views that are selected. Only one
  # class is predicted, which alone has a ratio: 1, whatever the views.
  assert value != 0 and jnp.isfinite(slope).all()


def test_gradients_flow_through_strong_views_alone():
  method = make(fairness_weight=0.5)
  state = logit_net.make_state(method, LABELS, 3)
  for weak, strong in steps():
    batch = logit_net.make_batch(weak, labelled=2, rows=ROWS, strong=strong)
    slopes = logit_net.slopes(method, state, batch)
    assert (slopes['image'][2:] == 0).all()
    assert (slopes['strong'] != 0).any()


@pytest.mark.parametrize(
  'settings',
  [dict(threshold_ema=1.0), dict(weight=-1.0), dict(fairness_weight=-0.1)],
)
def test_bad_settings_are_named(settings):
  ((name, value),) = settings.items()
  with pytest.raises(InputError, match=f'{name}={value}'):
    make(**settings)
