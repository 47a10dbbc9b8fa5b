"""The pseudo-labels that every method reports are those that its loss uses."""

import jax
import jax.numpy as jnp
import logit_net
import numpy as np
import pytest

from ssljax.core import UNLABELLED
from ssljax.methods import deepbass, laplacenet, llp, madnn, r2d2
from ssljax.methods import temporal_ensembling as te
from ssljax.methods.fixmatch import fixmatch
from ssljax.methods.flexmatch import flexmatch
from ssljax.methods.freematch import freematch
from ssljax.methods.ict import ict
from ssljax.methods.mean_teacher import mean_teacher
from ssljax.methods.mixmatch import mixmatch
from ssljax.methods.pi_model import pi_model
from ssljax.methods.pseudo_label import pseudo_label
from ssljax.methods.softmatch import softmatch
from ssljax.methods.uda import uda
from ssljax.methods.vat import vat

LABELS = [1, -1, -1, 2, -1, -1, -1, -1]
ROWS = np.array([0, 3, 1, 2, 4, 5, 6, 7], np.int32)
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(8, 3)) * 2 + [0.7, 0, 0]
STRONG = RNG.normal(size=(6, 3))
UNSEEN = slice(2, None)  # unlabelled rows of the batch


def reported(method, state, logits=LOGITS):
  """(labels, weights) of the unlabelled rows."""
  used = method.quality(state, ROWS[UNSEEN], logit_net.as_images(logits)[2:])
  assert used.label.dtype == jnp.int32
  return np.asarray(used.label), np.asarray(used.weight)


# Method, settings, and whether the memory of a step is updated before use.
MASKED = {
  'pseudo_label': (pseudo_label, dict(threshold=0.7), False),
  'fixmatch': (fixmatch, dict(threshold=0.8), False),
  'uda': (uda, dict(threshold=0.8), False),
  'flexmatch': (flexmatch, dict(threshold=0.8, warmup=False), False),
  'freematch': (freematch, dict(threshold_ema=0.5), True),
  'softmatch': (softmatch, dict(moments_ema=0.5), True),
  'softmatch, not aligned': (
    softmatch,
    dict(moments_ema=0.5, uniform_alignment=False),
    True,
  ),
}


@pytest.mark.parametrize('name', MASKED)
def test_the_weights_are_those_of_the_step(name):
  factory, settings, is_after = MASKED[name]
  views = {} if factory is pseudo_label else dict(strong=STRONG)
  if views:
    settings = settings | dict(strong_augment=())
  method = logit_net.make_method(factory, 2, 6, **settings)
  state = logit_net.make_state(method, LABELS, 3)
  batch = lambda logits, step: logit_net.make_batch(
    logits, labelled=2, rows=ROWS, step=step, **views
  )
  # A first step with other predictions, so that there is a memory.
  _, state, _ = logit_net.call(method, state, batch(LOGITS[::-1], 0))
  before = state
  _, after, metrics = logit_net.call(method, state, batch(LOGITS, 1))
  labels, weights = reported(method, after if is_after else before)
  np.testing.assert_array_equal(labels, LOGITS[UNSEEN].argmax(axis=-1))
  np.testing.assert_allclose(weights.mean(), metrics['mask'], rtol=1e-5)
  assert 0 < weights.mean() < 1
  assert (name.startswith('softmatch')) == bool(set(weights) - {0.0, 1.0})


def test_the_most_confident_images_are_the_used_ones():
  method = logit_net.make_method(fixmatch, 2, 6, threshold=0.8)
  state = logit_net.make_state(method, LABELS, 3)
  _, weights = reported(method, state)
  p = logit_net.softmax(LOGITS[UNSEEN])
  np.testing.assert_array_equal(weights, p.max(axis=-1) >= 0.8)


@pytest.mark.parametrize('factory', [pi_model, vat, mixmatch])
def test_methods_without_a_threshold_use_every_prediction(factory):
  method = logit_net.make_method(factory, 2, 6)
  state = logit_net.make_state(method, LABELS, 3)
  labels, weights = reported(method, state)
  np.testing.assert_array_equal(labels, LOGITS[UNSEEN].argmax(axis=-1))
  assert (weights == 1).all()


@pytest.mark.parametrize('factory', [mean_teacher, ict])
def test_a_teacher_predicts_by_the_average(factory):
  method = logit_net.make_method(factory, 2, 6)
  state = logit_net.make_state(method, LABELS, 3)
  bias = jnp.array([0.0, 0.0, 50.0])
  params = state.average.params | {'bias': bias}
  state = state.replace(average=state.average.replace(params=params))
  labels, weights = reported(method, state)
  assert (labels == 2).all() and (weights == 1).all()


def test_temporal_ensembling_reports_the_ensembled_class():
  method = logit_net.make_method(te.temporal_ensembling, 2, 6)
  state = logit_net.make_state(method, LABELS, 3)
  z = np.zeros((8, 3), np.float32)
  z[2], z[4] = [0.1, 0.2, 0.1], [0.0, 0.0, 0.4]  # the others: not visited
  labels, weights = reported(method, state.replace(memory=jnp.array(z)))
  visited = np.isin(ROWS[UNSEEN], [2, 4])
  np.testing.assert_array_equal(weights, visited)
  np.testing.assert_array_equal(labels[visited], [1, 2])


def test_laplacenet_reports_the_images_that_a_label_reaches():
  method = logit_net.make_method(laplacenet.laplacenet, 2, 6, neighbours=3)
  state = logit_net.make_state(method, LABELS, 3)
  assert (reported(method, state)[1] == 0).all()  # in the first stage
  memory = state.memory.replace(
    label=jnp.array([1, 0, 2, 2, 1, 1, 0, 0], jnp.int32),
    weight=jnp.array([1, 0.5, 0, 1, 3.0, 0, 0, 1]),
  )
  labels, weights = reported(method, state.replace(memory=memory))
  np.testing.assert_array_equal(labels, [0, 2, 1, 1, 0, 0])
  np.testing.assert_array_equal(weights, [1, 0, 1, 0, 0, 1])


def test_deepbass_reports_the_members():
  make = lambda **more: logit_net.make_method(deepbass.deepbass, 0, 6, **more)
  method = make()
  state = logit_net.make_state(method, LABELS, 3)
  assert (reported(method, state)[1] == 0).all()  # in the first stage
  memory = state.memory.replace(
    labels=jnp.array([9, 1, 2, 9, 0, 1, 2, 0], jnp.int32),
    member=jnp.array([0, 1, 0, 0, 1, 1, 0, 0], bool),
  )
  labels, weights = reported(method, state.replace(memory=memory))
  np.testing.assert_array_equal(labels, [1, 2, 0, 1, 2, 0])
  np.testing.assert_array_equal(weights, [1, 0, 1, 1, 0, 0])
  assert make(membership='none').quality is None


def test_r2d2_reports_its_pseudo_logits_once_they_are_predicted():
  method = logit_net.make_method(r2d2.r2d2, 2, 6)
  state = logit_net.make_state(method, LABELS, 3)
  assert (reported(method, state)[1] == 0).all()  # in the first stage
  logits = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
  memory = state.memory.replace(logits=logits)
  labels, weights = reported(method, state.replace(memory=memory))
  np.testing.assert_array_equal(
    labels, np.argmax(logits, axis=-1)[ROWS[UNSEEN]]
  )
  assert (weights == 1).all()


def test_madnn_reports_the_memorys_prediction():
  method = logit_net.make_method(madnn.madnn, 2, 6)
  state = logit_net.make_state(method, LABELS, 3)
  keys = np.array([[2, 0, 0], [0, 2, 0], [0, 0, 2.0]])
  values = np.array([[0.1, 0.7, 0.2], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8]])
  memory = madnn.Slots(jnp.float32(keys), jnp.float32(values))
  labels, weights = reported(method, state.replace(memory=memory))
  for b, x in enumerate(LOGITS[UNSEEN]):
    w = np.exp([-np.sqrt(((x - k) ** 2).sum()) for k in keys])
    p_hat = w / w.sum() @ values
    assert labels[b] == p_hat.argmax()
    assert weights[b] == pytest.approx(p_hat.max(), rel=1e-4)


@pytest.mark.parametrize('confidence', [True, False])
@pytest.mark.parametrize('admitted', [None, [0, 1, 3, 4, 6]])
def test_llp_reports_the_labels_of_its_bank(confidence, admitted):
  method = logit_net.make_method(
    llp.llp,
    0,
    6,
    neighbours=2,
    density_neighbours=3,
    confidence=confidence,
  )
  state = logit_net.make_state(method, LABELS, 3)
  rows = np.arange(8) if admitted is None else np.array(admitted)
  # An image after its first propagation has a class below 3.
  label = np.array([1, 3 + 1, 0, 2, 2, 3 + 5, 0, 1], np.int32)
  sure = np.array([1, 0.9, 0.8, 1, 0.6, 1, 0.5, 0.4], np.float32)
  memory = state.memory.replace(
    rows=state.memory.rows[rows],
    labels=jnp.array(label[rows]),
    confidence=jnp.array(sure[rows]),
    admitted=None if admitted is None else jnp.array(rows, jnp.int32),
  )
  unseen = np.array([r for r in rows if LABELS[r] == UNLABELLED], np.int32)
  images = jnp.zeros([len(unseen), 1, 1, 3])
  used = jax.jit(method.quality)(
    state.replace(memory=memory), jnp.array(unseen), images
  )
  has_class = label[unseen] < 3
  np.testing.assert_array_equal(
    np.asarray(used.label)[has_class], label[unseen][has_class]
  )
  wanted = np.where(has_class, sure[unseen] if confidence else 1, 0)
  np.testing.assert_allclose(used.weight, wanted)
