import jax
import jax.numpy as jnp
import logit_net
import numpy as np
import pytest
import tiny
from views import picture

from ssljax.augment import ctaugment, ops
from ssljax.core import Recorded
from ssljax.errors import InputError
from ssljax.methods import fixmatch as m
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


# CTAugment.


def make_cta(**settings):
  return make(strong_augment=('ctaugment',), **settings)


def probed(seed, count=2, depth=2):
  """Logits `[count, 3]` of probes, their operations and bins."""
  rng = np.random.default_rng(seed)
  op = rng.integers(3, 6, (count, depth)).astype(np.int32)
  bins = rng.integers(0, 2, (count, depth)).astype(np.int32)
  return rng.normal(size=(count, 3)), op, bins


def cta_batch(seed):
  """A batch as the step gets it, with records of the views."""
  logits, op, bins = probed(seed)
  views = {
    'strong': Recorded(logit_net.as_images(STRONG), ()),
    'probe': Recorded(logit_net.as_images(logits), (op, bins)),
  }
  return batch()._replace(views=views)


def test_rates_of_ctaugment_equal_a_numpy_loop_over_steps():
  method = make_cta()
  state = logit_net.make_state(method, LABELS, 3)
  # The evaluated weights predict the probes, not the trained ones.
  average = {'scale': jnp.float32(2.0), 'bias': jnp.zeros(3)}
  state = state.replace(average=state.average.replace(params=average))
  rates = np.ones((len(ops.OPS), ctaugment.BINS))
  for step in range(4):
    _, state, metrics = logit_net.call(method, state, cta_batch(step))
    logits, op, bins = probed(step)
    matches = []
    for b in range(2):
      p = logit_net.softmax(2 * logits[b])
      y = np.eye(3)[LABELS[ROWS[b]]]
      matches.append(1 - 0.5 * np.abs(p - y).sum())
      for cell in zip(op[b], bins[b], strict=True):
        rates[cell] = 0.99 * rates[cell] + 0.01 * matches[-1]
    np.testing.assert_allclose(state.memory, rates, rtol=1e-5)
    np.testing.assert_allclose(metrics['match'], np.mean(matches), rtol=1e-5)
  assert (rates != 1).sum() > 3


def test_ctaugment_changes_the_loss_by_its_views_alone():
  cta, plain = make_cta(threshold=0.95), make(threshold=0.95)
  state = logit_net.make_state(plain, LABELS, 3)
  want, after, _ = logit_net.call(plain, state, batch())
  state = logit_net.make_state(cta, LABELS, 3)
  got, after_cta, _ = logit_net.call(cta, state, cta_batch(0))
  assert float(got) == float(want)
  assert float(after.stats['mean']) == float(after_cta.stats['mean'])
  assert plain.init(None, None, None, None) == ()


def test_no_gradient_flows_through_the_probes():
  method = make_cta(threshold=0.0)
  state = logit_net.make_state(method, LABELS, 3)
  given = cta_batch(0)

  def total(probe, strong):
    views = {
      'probe': given.views['probe']._replace(image=probe),
      'strong': given.views['strong']._replace(image=strong),
    }
    return logit_net.call(method, state, given._replace(views=views))[0]

  probe, strong = (given.views[name].image for name in ('probe', 'strong'))
  of_probe, of_strong = jax.grad(total, (0, 1))(probe, strong)
  assert (of_probe == 0).all() and (of_strong != 0).any()


def test_views_of_ctaugment_are_drawn_from_the_rates():
  strong, probe = m.adaptive_views(('translate:1', 'ctaugment', 'cutout:2'))
  assert (strong.rows, probe.rows) == ('unlabelled', 'labelled')
  assert strong.on_pixels is not None and strong.augment is not None
  # Bins of less than 0.8 of the best are not drawn: here all but the last.
  rates = np.full((len(ops.OPS), ctaugment.BINS), 0.5, np.float32)
  last = ctaugment.bin_counts() - 1
  rates[np.arange(len(ops.OPS)), last] = 1.0
  image, key = picture(8, 8, 1), jax.random.key(5)
  changed, record = jax.jit(strong.adaptive)(key, image, rates)
  policy = ctaugment.draw(key, jnp.asarray(rates), threshold=0.8)
  np.testing.assert_array_equal(policy.bins, last[policy.ops])
  want = jax.jit(ctaugment.transform)(image, policy)
  np.testing.assert_allclose(changed, want, atol=1e-6)
  assert record == ()
  changed, (op, bins) = jax.jit(probe.adaptive)(key, image, rates)
  policy = ctaugment.draw(key, None)
  np.testing.assert_array_equal(op, policy.ops)
  np.testing.assert_array_equal(bins, policy.bins)
  want = jax.jit(ctaugment.transform)(image, policy)
  np.testing.assert_allclose(changed, want, atol=1e-6)


def test_the_threshold_of_ctaugment_is_that_of_fixmatch():
  strong, _ = m.adaptive_views(('ctaugment',))
  rates = np.ones((len(ops.OPS), ctaugment.BINS), np.float32)
  rates[:, ::2] = 0.82  # a share above 0.8, below ReMixMatch's 0.85
  image, keys = picture(6, 6, 1), jax.random.split(jax.random.key(0), 40)
  of = lambda rates: jax.jit(
    jax.vmap(lambda key: strong.adaptive(key, image, rates)[0])
  )(keys)
  assert np.abs(of(rates) - of(np.where(rates < 1, 0.5, rates))).max() > 0.1


@pytest.mark.parametrize(
  'names',
  [
    ('ctaugment', 'randaugment:2:10'),
    ('ctaugment', 'ctaugment'),
    ('ctaugment', 'grey'),
  ],
)
def test_nothing_on_pixels_may_follow_ctaugment(names):
  with pytest.raises(InputError, match=r'strong_augment=ctaugment,.*last'):
    make(strong_augment=names)


def test_other_methods_name_the_one_that_learns_ctaugments_rates():
  for name in ('uda', 'flexmatch', 'freematch', 'softmatch', 'laplacenet'):
    factory = getattr(tiny, name)
    with pytest.raises(InputError, match=r'ctaugment: .* method=fixmatch'):
      logit_net.make_method(factory, 2, 3, strong_augment=('ctaugment',))
