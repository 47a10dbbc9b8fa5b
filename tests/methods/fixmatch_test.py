import logit_net
import numpy as np
import pytest

from ssljax.errors import InputError
from ssljax.methods.fixmatch import fixmatch

# Two labelled rows, three unlabelled ones: of these, the first is confident in
# class 2, the second is not confident, the third is confident in class 0.
LABELS = [1, -1, -1, 2, -1, -1]  # of six images
ROWS = [0, 3, 1, 4, 5]
WEAK = np.array(
  [[0.3, 1.0, -0.4], [0.9, 0.1, 0.2], [0, 1, 5], [0.5, 0.6, 0.4], [6, 0, 1.5]]
)
STRONG = np.array([[0.7, -0.2, 0.4], [1.1, 0.0, 0.3], [0.2, 0.8, 0.1]])


def make(**settings):
  settings = dict(strong_augment=()) | settings
  return logit_net.make_method(fixmatch, 2, 3, **settings)


def batch(weak=WEAK, strong=STRONG):
  return logit_net.make_batch(weak, labelled=2, rows=ROWS, strong=strong)


def numpy_loss(threshold, weight):
  """Eq. 3 and 4 as a loop over images: L_s, L_u, the mean mask."""
  labelled = np.mean(
    [logit_net.cross_entropy(WEAK[b], LABELS[ROWS[b]]) for b in range(2)]
  )
  terms, masks = [], []
  for b in range(3):
    q = logit_net.softmax(WEAK[2 + b])
    masks.append(float(q.max() >= threshold))
    terms.append(masks[-1] * logit_net.cross_entropy(STRONG[b], q.argmax()))
  unlabelled = np.mean(terms)
  return labelled + weight * unlabelled, labelled, unlabelled, np.mean(masks)


@pytest.mark.parametrize(
  ('threshold', 'masked'), [(0.95, 2), (0.97, 2), (0, 3)]
)
def test_the_loss_equals_a_numpy_loop(threshold, masked):
  method = make(threshold=threshold, weight=0.7)
  state = logit_net.make_state(method, LABELS, 3)
  total, _, metrics = logit_net.call(method, state, batch())
  want, labelled, unlabelled, mask = numpy_loss(threshold, 0.7)
  assert mask == pytest.approx(masked / 3)
  np.testing.assert_allclose(total, want, rtol=1e-5)
  np.testing.assert_allclose(metrics['cross_entropy'], labelled, rtol=1e-5)
  np.testing.assert_allclose(metrics['consistency'], unlabelled, rtol=1e-5)
  np.testing.assert_allclose(metrics['mask'], mask, rtol=1e-6)
  q = logit_net.softmax(WEAK[2:]).max(axis=-1)
  np.testing.assert_allclose(metrics['confidence'], q.mean(), rtol=1e-6)


def test_a_confidence_equal_to_the_threshold_is_learned():
  # Two equal logits: the confidence is 1/2 exactly.
  weak = np.zeros([5, 2])
  method = make(threshold=0.5)
  state = logit_net.make_state(method, [0, -1, -1, 1, -1, -1], 2)
  *_, metrics = logit_net.call(method, state, batch(weak, np.zeros([3, 2])))
  assert metrics['mask'] == 1.0


def test_gradients_flow_through_confident_strong_views_alone():
  method = make(threshold=0.95, weight=2.0)
  state = logit_net.make_state(method, LABELS, 3)
  slopes = logit_net.slopes(method, state, batch())
  # dCE/dlogits = p − onehot, over the 3 unlabelled rows, with weight 2.
  p = logit_net.softmax(STRONG)
  want = 2 / 3 * (p - np.eye(3)[[2, 1, 0]]) * [[1], [0], [1]]
  np.testing.assert_allclose(slopes['strong'], want, rtol=1e-5, atol=1e-7)
  assert (slopes['image'][2:] == 0).all()
  assert (slopes['image'][:2] != 0).all()


def test_all_views_are_one_batch_for_the_statistics():
  method = make()
  state = logit_net.make_state(method, LABELS, 3)
  _, after, _ = logit_net.call(method, state, batch())
  want = np.concatenate([WEAK, STRONG]).mean()
  np.testing.assert_allclose(after.stats['mean'], want, rtol=1e-6)


def test_the_evaluated_average_includes_the_statistics():
  averaging = make(ema=0.9).averaging
  assert averaging.decay == 0.9 and averaging.statistics
  assert make(ema=0.0).averaging is None  # the run's own


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(threshold=1.5), 'threshold=1.5'),
    (dict(weight=-1.0), 'weight=-1.0'),
    (dict(ema=1.0), 'ema=1.0'),
    (dict(steps=0), 'steps=0'),
  ],
)
def test_bad_settings_are_named(settings, message):
  with pytest.raises(InputError, match=message):
    make(**settings)


@pytest.mark.parametrize(
  ('labelled', 'unlabelled', 'name'),
  [(0, 3, 'batch_labelled'), (2, 0, 'batch_unlabelled')],
)
def test_a_batch_without_one_of_its_parts_is_refused(
  labelled, unlabelled, name
):
  with pytest.raises(InputError, match=f'{name}=0'):
    logit_net.make_method(fixmatch, labelled, unlabelled)
