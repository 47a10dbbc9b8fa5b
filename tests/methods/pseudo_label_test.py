import logit_net
import numpy as np
import pytest

from ssljax.errors import InputError
from ssljax.methods.pseudo_label import alpha, pseudo_label

LABELS = [1, -1, -1, 2, -1, -1]
ROWS = [0, 3, 1, 4, 5]  # two labelled, three unlabelled
LOGITS = np.array(
  [[0.3, 1.0, -0.4], [0.9, 0.1, 0.2], [0, 1, 5], [0.5, 0.6, 0.4], [6, 0, 1.5]]
)


def make(**settings):
  return logit_net.make_method(pseudo_label, 2, 3, **settings)


def batch(step):
  return logit_net.make_batch(LOGITS, labelled=2, rows=ROWS, step=step)


def test_the_weight_rises_from_t1_to_t2_by_hand():
  # T1 = 10, T2 = 60, α_f = 3: a fiftieth of 3 more per step between them.
  steps = [0, 9, 10, 11, 35, 59, 60, 99]
  want = [0, 0, 0, 0.06, 1.5, 2.94, 3, 3]
  found = [float(alpha(step, 10.0, 60.0, 3.0)) for step in steps]
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('threshold', [0.0, 0.5, 0.98])
@pytest.mark.parametrize('step', [0, 30, 80])
def test_the_loss_equals_a_numpy_loop(step, threshold):
  method = make(weight=3.0, threshold=threshold)
  state = logit_net.make_state(method, LABELS, 3)
  total, _, metrics = logit_net.call(method, state, batch(step))
  labelled = np.mean(
    [logit_net.cross_entropy(LOGITS[b], LABELS[ROWS[b]]) for b in range(2)]
  )
  terms, masks = [], []
  for b in (2, 3, 4):
    p = logit_net.softmax(LOGITS[b])
    masks.append(float(p.max() >= threshold))
    terms.append(masks[-1] * logit_net.cross_entropy(LOGITS[b], p.argmax()))
  weight = 3 * min(max((step - 10) / 50, 0), 1)
  np.testing.assert_allclose(
    metrics['pseudo_cross_entropy'], np.mean(terms), rtol=1e-5
  )
  np.testing.assert_allclose(metrics['mask'], np.mean(masks), rtol=1e-6)
  want = labelled + weight * np.mean(terms)
  np.testing.assert_allclose(total, want, rtol=1e-5)


def test_pseudo_labels_are_constants_of_the_gradient():
  method = make(weight=3.0)
  state = logit_net.make_state(method, LABELS, 3)
  found = logit_net.slopes(method, state, batch(99))['image'][2:]
  p = logit_net.softmax(LOGITS[2:])
  want = 3 / 3 * (p - np.eye(3)[[2, 1, 0]])
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(threshold=1.1), 'threshold=1.1'),
    (dict(weight=-1.0), 'weight=-1.0'),
    (dict(ramp_from=0.7, ramp_to=0.2), 'ramp_from=0.7, ramp_to=0.2'),
    (dict(ramp_to=2.0), 'ramp_to=2.0'),
  ],
)
def test_bad_settings_are_named(settings, message):
  with pytest.raises(InputError, match=message):
    make(**settings)
