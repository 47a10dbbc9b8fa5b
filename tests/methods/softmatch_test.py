import logit_net
import numpy as np
import pytest

from ssljax.errors import InputError
from ssljax.methods.softmatch import softmatch

LABELS = [1, -1, -1, 2, -1, -1]
ROWS = [0, 3, 1, 4, 5]  # two labelled, three unlabelled


def make(**settings):
  settings = dict(strong_augment=()) | settings
  return logit_net.make_method(softmatch, 2, 3, **settings)


def steps(seed=0, count=8):
  """Weak and strong logits of some steps."""
  rng = np.random.default_rng(seed)
  for _ in range(count):
    yield rng.normal(size=(5, 3)) * 2 + [1, 0, 0], rng.normal(size=(3, 3))


def numpy_step(memory, weak, strong, m, k, uniform):
  """Loss on unlabelled images and mean weight; `memory` is updated."""
  q = [logit_net.softmax(weak[2 + b]) for b in range(3)]
  mean = sum(q) / 3
  memory['p'] = (
    mean if memory['p'] is None else m * memory['p'] + (1 - m) * mean
  )
  confidence = []
  for b in range(3):
    aligned = q[b]
    if uniform:
      aligned = q[b] * (1 / 3 + 1e-6) / (memory['p'] + 1e-6)
      aligned = aligned / aligned.sum()
    confidence.append(aligned.max())
  mu = sum(confidence) / 3
  variance = sum((c - mu) ** 2 for c in confidence) / 2
  memory['mean'] = m * memory['mean'] + (1 - m) * mu
  memory['variance'] = m * memory['variance'] + (1 - m) * variance
  terms, weights = [], []
  for b in range(3):
    below = min(confidence[b] - memory['mean'], 0)
    weights.append(np.exp(-(below**2) / (2 * memory['variance'] / k**2)))
    terms.append(
      weights[-1] * logit_net.cross_entropy(strong[b], q[b].argmax())
    )
  return np.mean(terms), np.mean(weights)


@pytest.mark.parametrize('uniform', [True, False])
def test_steps_equal_a_numpy_loop(uniform):
  m, k = 0.4, 1.5
  method = make(weight=0.6, moments_ema=m, sigmas=k, uniform_alignment=uniform)
  state = logit_net.make_state(method, LABELS, 3)
  memory, weights = {'p': None, 'mean': 1 / 3, 'variance': 1.0}, []
  for step, (weak, strong) in enumerate(steps()):
    batch = logit_net.make_batch(
      weak, labelled=2, rows=ROWS, step=step, strong=strong
    )
    want, weight = numpy_step(memory, weak, strong, m, k, uniform)
    total, state, metrics = logit_net.call(method, state, batch)
    np.testing.assert_allclose(metrics['consistency'], want, rtol=1e-4)
    np.testing.assert_allclose(metrics['mask'], weight, rtol=1e-4)
    np.testing.assert_allclose(
      total, metrics['cross_entropy'] + 0.6 * want, rtol=1e-4
    )
    for name in ('mean', 'variance'):
      np.testing.assert_allclose(
        getattr(state.memory, name), memory[name], rtol=1e-5
      )
    np.testing.assert_allclose(state.memory.classes, memory['p'], rtol=1e-5)
    weights.append(weight)
  assert 0 < min(weights) < 0.9


def test_an_image_as_confident_as_the_mean_has_the_whole_weight():
  # Three equal predictions: the mean rises towards them from below.
  weak = np.array([[1.0, 0, 0]] * 5)
  method = make(uniform_alignment=False)
  state = logit_net.make_state(method, LABELS, 3)
  batch = logit_net.make_batch(weak, labelled=2, rows=ROWS, strong=weak[2:])
  *_, metrics = logit_net.call(method, state, batch)
  assert metrics['mask'] == 1.0


def test_gradients_flow_through_strong_views_alone():
  method = make()
  state = logit_net.make_state(method, LABELS, 3)
  weak, strong = next(steps())
  batch = logit_net.make_batch(weak, labelled=2, rows=ROWS, strong=strong)
  slopes = logit_net.slopes(method, state, batch)
  assert (slopes['strong'] != 0).all() and (slopes['image'][2:] == 0).all()


@pytest.mark.parametrize(
  'settings', [dict(moments_ema=1.0), dict(weight=-1.0), dict(sigmas=0.0)]
)
def test_bad_settings_are_named(settings):
  ((name, value),) = settings.items()
  with pytest.raises(InputError, match=f'{name}={value}'):
    make(**settings)
