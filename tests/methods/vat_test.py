import jax
import jax.numpy as jnp
import logit_net
import numpy as np
import pytest

from ssljax.errors import InputError
from ssljax.methods import vat as m

LABELS = [1, -1, -1, 2]
ROWS = [0, 3, 1, 2]  # two labelled, two unlabelled
LOGITS = np.array(
  [[0.3, 1.0, -0.4], [0.9, 0.1, 0.2], [0, 1, 2], [0.5, 0.6, 0.4]]
)


def make(**settings):
  return logit_net.make_method(m.vat, 2, 2, **settings)


def batch():
  return logit_net.make_batch(LOGITS, labelled=2, rows=ROWS)


def kl(logits, other):
  p, q = logit_net.softmax(logits), logit_net.softmax(other)
  return sum(p[c] * (np.log(p[c]) - np.log(q[c])) for c in range(len(p)))


def numpy_direction(logits, d, xi, iterations):
  """Power iteration of one image, with the gradient of the KL by hand.

  The network is the identity: ∂KL/∂r = softmax(x + r) − softmax(x).
  """
  d = d / np.linalg.norm(d)
  for _ in range(iterations):
    g = logit_net.softmax(logits + xi * d) - logit_net.softmax(logits)
    d = g / np.linalg.norm(g)
  return d


@pytest.mark.parametrize('iterations', [1, 3])
def test_the_direction_equals_a_numpy_loop(iterations):
  key = jax.random.key(5)
  images = logit_net.as_images(LOGITS)
  as_logits = lambda images: images.reshape(len(images), -1)
  found = m.adversarial_direction(
    as_logits, images, as_logits(images), key, 0.01, iterations
  )
  first = np.asarray(jax.random.normal(key, images.shape)).reshape(4, 3)
  for b in range(4):
    want = numpy_direction(
      LOGITS[b], first[b].astype(np.float64), 0.01, iterations
    )
    np.testing.assert_allclose(found[b, 0, 0], want, rtol=2e-3, atol=1e-4)


def test_many_iterations_find_the_direction_of_the_largest_curvature():
  # The Hessian of the KL at 0 is diag(p) − p pᵀ.
  images = logit_net.as_images(LOGITS)
  as_logits = lambda images: images.reshape(len(images), -1)
  found = m.adversarial_direction(
    as_logits, images, as_logits(images), logit_net.KEY, 0.01, 30
  )
  for b in range(4):
    p = logit_net.softmax(LOGITS[b])
    _, vectors = np.linalg.eigh(np.diag(p) - np.outer(p, p))
    cosine = abs(np.dot(found[b, 0, 0], vectors[:, -1]))
    assert cosine > 0.99


def test_the_step_of_the_code_is_below_the_resolution_of_float32():
  # Logits of a size that trained networks have: 1e-6 is an ulp of 10.
  images = logit_net.as_images(LOGITS + 10)
  as_logits = lambda images: images.reshape(len(images), -1)
  of = lambda xi: m.adversarial_direction(
    as_logits, images, as_logits(images), jax.random.key(2), xi, 1
  )
  first = np.asarray(jax.random.normal(jax.random.key(2), images.shape))
  want = [
    numpy_direction(LOGITS[b], np.float64(first[b, 0, 0]), 1e-6, 1)
    for b in range(4)
  ]
  cosine = lambda xi: np.sum(np.asarray(of(xi))[:, 0, 0] * want, axis=1)
  assert cosine(0.01).min() > 0.999
  assert cosine(1e-6).min() < 0.99


def test_the_loss_equals_a_numpy_loop_for_its_own_direction():
  method = make(epsilon=1.5, weight=0.7, entropy_weight=0.3)
  state = logit_net.make_state(method, LABELS, 3)
  total, after, metrics = logit_net.call(method, state, batch())
  # The keys of `logit_net.call` and of the loss.
  key = jax.random.split(logit_net.KEY)[1]
  first = np.asarray(jax.random.normal(key, (4, 1, 1, 3))).reshape(4, 3)
  smoothness, entropy = [], []
  for b in range(4):
    d = numpy_direction(LOGITS[b], first[b].astype(np.float64), 0.01, 1)
    smoothness.append(kl(LOGITS[b], LOGITS[b] + 1.5 * d))
    p = logit_net.softmax(LOGITS[b])
    entropy.append(-sum(p * np.log(p)))
  labelled = np.mean(
    [logit_net.cross_entropy(LOGITS[b], LABELS[ROWS[b]]) for b in range(2)]
  )
  np.testing.assert_allclose(
    metrics['smoothness'], np.mean(smoothness), rtol=1e-3
  )
  np.testing.assert_allclose(metrics['entropy'], np.mean(entropy), rtol=1e-5)
  want = labelled + 0.7 * np.mean(smoothness) + 0.3 * np.mean(entropy)
  np.testing.assert_allclose(total, want, rtol=1e-3)
  # The statistics are of the clean pass, once.
  np.testing.assert_allclose(after.stats['mean'], LOGITS.mean(), rtol=1e-6)


def test_no_gradient_flows_through_the_clean_prediction_and_the_direction():
  # With the direction and p constant, ∂/∂bias of the KL is q − p, q at x + εd.
  method = make(epsilon=1.5, entropy_weight=0.0)
  state = logit_net.make_state(method, LABELS, 3)
  only = lambda params: method.stages[0].loss(
    params, state, batch(), logit_net.KEY
  )[1][1]['smoothness']
  found = jax.grad(only)(state.params)['bias']
  key = jax.random.split(logit_net.KEY)[1]
  first = np.asarray(jax.random.normal(key, (4, 1, 1, 3))).reshape(4, 3)
  want = np.zeros(3)
  for b in range(4):
    d = numpy_direction(LOGITS[b], first[b].astype(np.float64), 0.01, 1)
    q = logit_net.softmax(LOGITS[b] + 1.5 * d)
    want += (q - logit_net.softmax(LOGITS[b])) / 4
  np.testing.assert_allclose(found, want, rtol=1e-2, atol=1e-4)


def test_an_image_without_a_gradient_stays_where_it_is():
  flat = jnp.zeros([2, 1, 1, 3])
  assert (m.unit(flat) == 0).all()
  np.testing.assert_allclose(
    jnp.linalg.norm(m.unit(flat + 1e-25).reshape(2, -1), axis=1), 1, rtol=1e-5
  )


@pytest.mark.parametrize(
  'settings',
  [
    dict(epsilon=0.0),
    dict(xi=-1.0),
    dict(iterations=0),
    dict(weight=-1.0),
    dict(entropy_weight=-1.0),
  ],
)
def test_bad_settings_are_named(settings):
  ((name, value),) = settings.items()
  with pytest.raises(InputError, match=f'{name}={value}'):
    make(**settings)
