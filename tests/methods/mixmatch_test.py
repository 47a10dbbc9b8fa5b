import jax
import logit_net
import numpy as np
import pytest

from ssljax.augment import mixup
from ssljax.errors import InputError
from ssljax.methods import mixmatch as m

LABELS = [1, -1, -1, 2, -1, -1]
ROWS = [0, 3, 1, 4, 5]  # two labelled, three unlabelled
ONE = np.array(
  [[0.3, 1.0, -0.4], [0.9, 0.1, 0.2], [0, 1, 5], [0.5, 0.6, 0.4], [6, 0, 1.5]]
)
TWO = np.array([[0.7, -0.2, 3.4], [1.1, 0.0, 0.3], [2.2, 0.8, 0.1]])


def make(**settings):
  return logit_net.make_method(m.mixmatch, 2, 3, **settings)


def batch(step=0):
  return logit_net.make_batch(ONE, labelled=2, rows=ROWS, step=step, second=TWO)


def numpy_loss(partner, weight, temperature):
  """Both terms as a loop over images, for given partners and λ'."""
  guesses = []
  for b in range(3):
    mean = (logit_net.softmax(ONE[2 + b]) + logit_net.softmax(TWO[b])) / 2
    power = mean ** (1 / temperature)
    guesses.append(power / power.sum())
  images = [*ONE[:2], *ONE[2:], *TWO]
  targets = [*np.eye(3)[[1, 2]], *guesses, *guesses]
  cross, square = [], []
  for i in range(8):
    j, lam = partner[i], weight[i]
    x = lam * images[i] + (1 - lam) * images[j]
    t = lam * targets[i] + (1 - lam) * targets[j]
    p = logit_net.softmax(x)
    if i < 2:
      cross.append(-sum(t[c] * np.log(p[c]) for c in range(3)))
    else:
      square.append(sum((t[c] - p[c]) ** 2 for c in range(3)) / 3)
  return np.mean(cross), np.mean(square), np.mean(np.max(guesses, axis=1))


@pytest.mark.parametrize(('step', 'ramp'), [(0, 0.0), (10, 0.5), (90, 1.0)])
def test_the_loss_equals_a_numpy_loop(step, ramp):
  method = make(weight=9.0, ramp=0.2, temperature=0.6, alpha=0.75)
  state = logit_net.make_state(method, LABELS, 3)
  total, after, metrics = logit_net.call(method, state, batch(step))
  # The keys of `logit_net.call` and of the loss.
  key = jax.random.split(logit_net.KEY, 3)[1]
  mix = jax.tree.map(np.asarray, mixup.draw_mix(key, 8, 0.75))
  assert (mix.weight >= 0.5).all() and len(set(mix.partner)) == 8
  cross, square, confidence = numpy_loss(mix.partner, mix.weight, 0.6)
  np.testing.assert_allclose(metrics['cross_entropy'], cross, rtol=1e-4)
  np.testing.assert_allclose(metrics['consistency'], square, rtol=1e-4)
  np.testing.assert_allclose(metrics['confidence'], confidence, rtol=1e-5)
  np.testing.assert_allclose(total, cross + 9 * ramp * square, rtol=1e-4)
  # The statistics are those of the mixed images alone, of equal mean where all
  # λ' are.
  images = np.concatenate([ONE, TWO])
  partners = images[mix.partner]
  lam = mix.weight[:, None]
  want = (lam * images + (1 - lam) * partners).mean()
  np.testing.assert_allclose(after.stats['mean'], want, rtol=1e-4)


def test_without_mixing_the_labelled_rows_keep_their_label():
  method = make(alpha=0.0, weight=9.0, ramp=0.0)
  state = logit_net.make_state(method, LABELS, 3)
  _, _, metrics = logit_net.call(method, state, batch())
  cross, square, _ = numpy_loss(range(8), np.ones(8), 0.5)
  np.testing.assert_allclose(metrics['cross_entropy'], cross, rtol=1e-5)
  np.testing.assert_allclose(metrics['consistency'], square, rtol=1e-4)


def test_guesses_are_constants_of_the_gradient():
  method = make(alpha=0.0, weight=9.0, ramp=0.0)
  state = logit_net.make_state(method, LABELS, 3)
  slopes = logit_net.slopes(method, state, batch())
  for b in range(3):
    mean = (logit_net.softmax(ONE[2 + b]) + logit_net.softmax(TWO[b])) / 2
    target = mean**2 / (mean**2).sum()
    for view, logits in (('image', ONE[2 + b]), ('second', TWO[b])):
      p = logit_net.softmax(logits)
      outer = 9 * 2 / (3 * 6) * (p - target)
      want = p * (outer - (outer * p).sum())
      found = slopes[view][2 + b if view == 'image' else b]
      np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
  'settings',
  [
    dict(temperature=0.0),
    dict(alpha=-1.0),
    dict(weight=-1.0),
    dict(ramp=1.5),
    dict(ema=1.0),
  ],
)
def test_bad_settings_are_named(settings):
  ((name, value),) = settings.items()
  with pytest.raises(InputError, match=f'{name}={value}'):
    make(**settings)
