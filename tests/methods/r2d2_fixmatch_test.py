import jax
import jax.numpy as jnp
import logit_net
import numpy as np
import pytest

from ssljax.core import UNLABELLED
from ssljax.errors import InputError
from ssljax.methods.r2d2_fixmatch import r2d2_fixmatch
from ssljax.methods.supervised import supervised

C, L, U = 3, 2, 4
LABELS = [1, -1, -1, 2, -1, -1, 0]
# Two labelled rows; image 6, among the unlabelled ones, has a label, and image
# 4 occurs twice.
ROWS = [0, 3, 1, 4, 6, 4]
RNG = np.random.default_rng(1)
WEAK = 2 * RNG.normal(size=(L + U, C))
STRONG = 2 * RNG.normal(size=(U, C))
KINDS = ('kl_reverse', 'kl', 'mse')


def make(**settings):
  settings = dict(strong_augment=()) | settings
  return logit_net.make_method(r2d2_fixmatch, L, U, **settings)


def batch():
  return logit_net.make_batch(WEAK, labelled=L, rows=ROWS, strong=STRONG)


def example(method):
  """The state with pseudo-logits: those of a label, confident, and not."""
  state = logit_net.make_state(method, LABELS, C)
  logits = np.random.default_rng(3).normal(size=(len(LABELS), C))
  logits[1] = [4.0, 0.0, 0.5]
  logits[[0, 3, 6]] = 10 * np.eye(C)[[1, 2, 0]]
  memory = state.memory.replace(logits=jnp.float32(logits))
  return state.replace(memory=memory)


def divergence(q, p, kind):
  """L_c of one image: q of the network, p of the pseudo-logits."""
  if kind == 'kl_reverse':
    return sum(q[c] * np.log(q[c] / p[c]) for c in range(C))
  if kind == 'kl':
    return sum(p[c] * np.log(p[c] / q[c]) for c in range(C))
  return sum((p[c] - q[c]) ** 2 for c in range(C))


def slope_of_pseudo_logits(q, p, kind):
  """∂L_c/∂ỹ of one image as R2-D2 prints it: Eq. 6, 14 and 15, with α = 1."""
  if kind == 'kl_reverse':
    return p - q
  if kind == 'kl':
    ratio = np.log(p / q)
    return p * (ratio - (p * ratio).sum())
  return 2 * p * (p - q - (p * (p - q)).sum())


def numpy_step(state, threshold, beta, rate, kind):
  """Both steps of the docstring: loops over images, float64."""
  pseudo = np.asarray(state.memory.logits, np.float64)
  new, masks, divergences, entropies = pseudo.copy(), [], [], []
  for b, image in enumerate(ROWS[L:]):
    p = logit_net.softmax(pseudo[image])
    q = logit_net.softmax(STRONG[b])
    masks.append(float(p.max() >= threshold))
    divergences.append(masks[-1] * divergence(q, p, kind))
    entropies.append(-masks[-1] * (q * np.log(q)).sum())
    if LABELS[image] == UNLABELLED:
      weak = logit_net.softmax(WEAK[L + b])
      new[image] -= rate * slope_of_pseudo_logits(weak, p, kind)
  cross = [logit_net.cross_entropy(WEAK[b], LABELS[ROWS[b]]) for b in range(L)]
  terms = np.mean(cross), np.mean(divergences), np.mean(entropies)
  return terms, masks, new


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('threshold', [0.0, 0.9])
def test_a_step_equals_a_numpy_loop(threshold, kind):
  settings = dict(threshold=threshold, weight=0.7, beta=0.2)
  method = make(**settings, pseudo_rate=1.5, divergence=kind)
  state = example(method)
  total, after, metrics = logit_net.call(method, state, batch())
  terms, masks, pseudo = numpy_step(state, threshold, 0.2, 1.5, kind)
  # Above 0.9 are the image of pseudo-logits (4, 0, ½) and the labelled one.
  assert np.mean(masks) == (0.5 if threshold else 1.0)
  got = [metrics[k] for k in ('cross_entropy', 'divergence', 'entropy')]
  np.testing.assert_allclose(got, terms, rtol=1e-5)
  want = np.dot([1, 0.7, 0.7 * 0.2], terms)
  np.testing.assert_allclose(total, want, rtol=1e-5)
  np.testing.assert_allclose(after.memory.logits, pseudo, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(metrics['mask'], np.mean(masks), rtol=1e-6)
  known = np.array([LABELS[i] for i in ROWS[L:]]) >= 0
  sure = logit_net.softmax(np.asarray(state.memory.logits))[ROWS[L:]].max(-1)
  np.testing.assert_allclose(
    metrics['confidence'], sure[~known].mean(), rtol=1e-5
  )


def test_pseudo_logits_move_towards_the_prediction_of_the_weak_view():
  method = make(pseudo_rate=0.5)
  state = example(method)
  _, after, _ = logit_net.call(method, state, batch())
  before = np.asarray(state.memory.logits, np.float64)
  p, q = logit_net.softmax(before[1]), logit_net.softmax(WEAK[2])
  np.testing.assert_allclose(
    after.memory.logits[1], before[1] + 0.5 * (q - p), rtol=1e-5
  )
  # The sum of an image's pseudo-logits stays (R2-D2, Eq. 13).
  np.testing.assert_allclose(
    after.memory.logits.sum(-1), before.sum(-1), rtol=1e-5, atol=1e-5
  )
  for image in (0, 3, 6, 2, 5):  # labelled, or not in the batch
    assert (after.memory.logits[image] == state.memory.logits[image]).all()


def test_gradients_flow_through_confident_strong_views_alone():
  method = make(threshold=0.9, weight=2.0, beta=0.2)
  state = example(method)
  slopes = logit_net.slopes(method, state, batch())
  p = logit_net.softmax(np.asarray(state.memory.logits, np.float64)[ROWS[L:]])
  q = logit_net.softmax(STRONG)
  # d KL(Q‖p̃)/dz = Q (log Q/p̃ − KL), d H(Q)/dz = −Q (log Q + H).
  ratio, log_q = np.log(q / p), np.log(q)
  mean = lambda x: (q * x).sum(-1, keepdims=True)
  each = q * (ratio - mean(ratio)) - 0.2 * q * (log_q - mean(log_q))
  want = 2 / U * (p.max(-1, keepdims=True) >= 0.9) * each
  np.testing.assert_allclose(slopes['strong'], want, rtol=1e-4, atol=1e-6)
  assert (slopes['image'][L:] == 0).all()
  assert (slopes['image'][:L] != 0).all()


def test_without_unlabelled_weight_the_loss_is_the_supervised_one():
  method = make(weight=0.0)
  total, _, metrics = logit_net.call(method, example(method), batch())
  alone = logit_net.make_method(supervised, L, 0)
  few = logit_net.make_batch(WEAK[:L], labelled=L, rows=ROWS[:L])
  state = logit_net.make_state(alone, LABELS, C)
  want, _, _ = logit_net.call(alone, state, few)
  assert total == want == metrics['cross_entropy']  # the same bits


def test_pseudo_logits_are_predicted_from_images_without_augmentation():
  (stage,) = make(repredict_every=7).stages
  assert stage.every == 7
  state = example(make())
  images = np.random.default_rng(5).normal(size=(len(LABELS), C))
  mapped = stage.per_example(
    state, logit_net.as_images(images), jax.random.key(0)
  )
  after = stage.epoch_update(state, mapped)
  # The logits of the network are its images; labelled rows are 10·onehot.
  want = images.astype(np.float32)
  want[[0, 3, 6]] = 10 * np.eye(C)[[1, 2, 0]]
  np.testing.assert_allclose(after.memory.logits, want, rtol=1e-6)


def test_acquired_labels_are_learned():
  method = make()
  after = method.add_labels(example(method), jnp.int32([5]), jnp.int32([2]))
  np.testing.assert_array_equal(after.memory.logits[5], [0, 0, 10])
  assert after.labels[5] == 2


def test_all_views_are_one_batch_for_the_statistics():
  method = make()
  _, after, _ = logit_net.call(method, example(method), batch())
  want = np.concatenate([WEAK, STRONG]).mean()
  np.testing.assert_allclose(after.stats['mean'], want, rtol=1e-6)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(threshold=1.5), 'threshold=1.5'),
    (dict(weight=-1.0), 'weight=-1.0'),
    (dict(beta=-0.1), 'beta=-0.1'),
    (dict(pseudo_rate=0.0), 'pseudo_rate=0.0'),
    (dict(repredict_every=-1), 'repredict_every=-1'),
    (dict(steps=0), 'steps=0'),
  ],
)
def test_bad_settings_are_named(settings, message):
  with pytest.raises(InputError, match=message):
    make(**settings)
