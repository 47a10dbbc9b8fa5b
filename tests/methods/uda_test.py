import logit_net
import numpy as np
import pytest

from ssljax.errors import InputError
from ssljax.methods import uda as m

LABELS = [1, -1, -1, 2, -1, -1]
ROWS = [0, 3, 1, 4, 5]  # two labelled, three unlabelled
WEAK = np.array(
  [[0.3, 1.0, -0.4], [0.2, 0.1, 2.9], [0, 1, 3], [0.5, 0.6, 0.4], [3, 0, 1.5]]
)
STRONG = np.array([[0.7, -0.2, 0.4], [1.1, 0.0, 0.3], [0.2, 0.8, 0.1]])


def make(**settings):
  settings = dict(strong_augment=()) | settings
  return logit_net.make_method(m.uda, 2, 3, **settings)


def batch(step=0):
  return logit_net.make_batch(
    WEAK, labelled=2, rows=ROWS, step=step, strong=STRONG
  )


ALPHA = {
  'none': lambda t: 1.0,
  'linear': lambda t: t,
  'log': lambda t: 1 - np.exp(-5 * t),
  'exp': lambda t: np.exp(5 * (t - 1)),
}


@pytest.mark.parametrize('annealing', ALPHA)
@pytest.mark.parametrize('step', [0, 30, 70, 99])
def test_the_loss_equals_a_numpy_loop(annealing, step):
  method = make(annealing=annealing, temperature=0.4, threshold=0.8, weight=0.7)
  state = logit_net.make_state(method, LABELS, 3)
  total, _, metrics = logit_net.call(method, state, batch(step))
  limit = ALPHA[annealing](step / 100) * (1 - 1 / 3) + 1 / 3
  kept = []
  for b in range(2):
    term = logit_net.cross_entropy(WEAK[b], LABELS[ROWS[b]])
    if np.exp(-term) <= limit:
      kept.append(term)
  labelled = sum(kept) / max(len(kept), 1)
  terms, mask = [], []
  for b in range(3):
    mask.append(float(logit_net.softmax(WEAK[2 + b]).max() > 0.8))
    p = logit_net.softmax(WEAK[2 + b] / 0.4)
    q = logit_net.softmax(STRONG[b])
    kl = sum(p[c] * (np.log(p[c]) - np.log(q[c])) for c in range(3))
    terms.append(mask[-1] * kl)
  assert 0 < np.mean(mask) < 1
  np.testing.assert_allclose(metrics['cross_entropy'], labelled, rtol=1e-5)
  np.testing.assert_allclose(metrics['labelled_kept'], len(kept) / 2)
  np.testing.assert_allclose(metrics['consistency'], np.mean(terms), rtol=1e-4)
  np.testing.assert_allclose(metrics['mask'], np.mean(mask), rtol=1e-6)
  np.testing.assert_allclose(total, labelled + 0.7 * np.mean(terms), rtol=1e-4)


def test_annealing_keeps_well_predicted_images_only_at_the_end():
  # p(y) of the two labelled images: 0.57 and 0.89.
  shares = []
  for step in (0, 50, 95):
    method = make(annealing='linear')
    state = logit_net.make_state(method, LABELS, 3)
    *_, metrics = logit_net.call(method, state, batch(step))
    shares.append(float(metrics['labelled_kept']))
  assert shares == [0.0, 0.5, 1.0]


def test_gradients_flow_through_confident_strong_views_alone():
  method = make(threshold=0.8, weight=2.0)
  state = logit_net.make_state(method, LABELS, 3)
  slopes = logit_net.slopes(method, state, batch())
  p = logit_net.softmax(WEAK[2:] / 0.4)
  q = logit_net.softmax(STRONG)
  mask = (logit_net.softmax(WEAK[2:]).max(axis=1) > 0.8)[:, None]
  want = 2 / 3 * (q - p) * mask
  np.testing.assert_allclose(slopes['strong'], want, rtol=1e-4, atol=1e-6)
  assert (slopes['image'][2:] == 0).all() and (slopes['image'][:2] != 0).all()


@pytest.mark.parametrize(
  'settings', [dict(threshold=1.1), dict(temperature=0.0), dict(weight=-1.0)]
)
def test_bad_settings_are_named(settings):
  ((name, value),) = settings.items()
  with pytest.raises(InputError, match=f'{name}={value}'):
    make(**settings)
