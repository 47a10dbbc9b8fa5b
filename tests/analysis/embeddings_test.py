import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from ssljax.analysis import embeddings


def units(rng, *shape):
  v = rng.normal(size=shape).astype(np.float32)
  return v / np.linalg.norm(v, axis=-1, keepdims=True)


def test_vectors_are_scaled_to_length_1_and_zero_stays_zero():
  v = embeddings.l2_normalize(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
  np.testing.assert_allclose(v, [[0.6, 0.8], [0, 0]], rtol=1e-6)
  assert v.dtype == np.float32


@pytest.mark.parametrize('batch', [7, 64])
def test_the_nearest_label_agrees_with_scikit_learn(batch):
  rng = np.random.default_rng(0)
  v, bank = units(rng, 30, 5), units(rng, 50, 5)
  truth, labels = rng.integers(0, 4, 30), rng.integers(0, 4, 50)
  oracle = KNeighborsClassifier(1).fit(bank, labels)
  found = labels[embeddings.nearest_rows(v, bank, batch)]
  np.testing.assert_array_equal(found, oracle.predict(v))
  error = 100 * (1 - oracle.score(v, truth))
  assert embeddings.nearest_error(v, truth, bank, labels) == (
    pytest.approx(error)
  )


def test_a_class_is_wrong_if_k_others_have_better_scores():
  scores = np.array([[3.0, 2, 1], [1, 2, 3], [2, 3, 1], [5, 4, 9]])
  truth = np.array([0, 0, 0, 1])
  # Ranks of the true class: 1, 3, 2, 3.
  assert embeddings.top_error(scores, truth, 1) == 75
  assert embeddings.top_error(scores, truth, 2) == 50
  assert embeddings.top_error(scores, truth, 3) == 0


def test_norms_of_equal_opposite_and_orthogonal_embeddings():
  v = np.array([[1, 0], [1, 0], [1, 0], [-1, 0], [1, 0], [0, 1]], np.float32)
  norms = embeddings.class_norms(v, np.array([0, 0, 1, 1, 3, 3]), 4)
  # Class 2 has no image; the mean of the last two is (1/2, 1/2).
  np.testing.assert_allclose(norms, [1, 0, np.nan, 0.5**0.5])


def test_an_epoch_has_every_row_at_most_once():
  batches = embeddings.shuffled_batches(7, 3, seed=0)
  first, second = (list(itertools.islice(batches, 2)) for _ in range(2))
  for epoch in (first, second):  # 7 rows are two batches; one row is dropped
    assert len(set(np.concatenate(epoch))) == 6
  assert np.concatenate(first).tolist() != np.concatenate(second).tolist()


def toy(rng):
  """Three overlapping clusters `[90, 4]` float32 and their labels."""
  labels = np.repeat(np.arange(3), 30).astype(np.int32)
  features = rng.normal(size=(90, 4)) + 1.5 * np.eye(4)[labels]
  return features.astype(np.float32), labels


def decayed(rate, decay):
  mask = {'kernel': True, 'bias': False}
  return optax.chain(
    optax.add_decayed_weights(decay, mask), optax.sgd(rate, 0.9)
  )


def test_a_readout_converges_to_scikit_learns_logistic_regression():
  features, labels = toy(np.random.default_rng(0))
  # All images in each step. Mean CE + λ/2 ‖kernel‖² is scikit-learn's objective
  # with C = 1 / (N λ), which does not penalise the intercept either.
  layer = embeddings.fit_readout(
    features, labels, 3, decayed(0.3, 0.1), 300, batch=90
  )
  oracle = LogisticRegression(C=1 / (90 * 0.1), tol=1e-8)
  oracle.fit(features.astype(float), labels)
  np.testing.assert_allclose(layer['kernel'], oracle.coef_.T, atol=1e-4)
  ours, theirs = layer['bias'], oracle.intercept_
  np.testing.assert_allclose(ours - ours.mean(), theirs, atol=1e-4)
  scores = embeddings.apply_readout(layer, jnp.asarray(features))
  np.testing.assert_array_equal(scores.argmax(axis=1), oracle.predict(features))


def test_a_readout_equals_a_loop_in_numpy():
  features, labels = toy(np.random.default_rng(1))
  steps = embeddings.STEPS_PER_CALL + 3  # a full call and a shorter one
  layer = embeddings.fit_readout(
    features, labels, 3, optax.sgd(0.1), steps, batch=16, seed=5
  )
  w, b = np.zeros((4, 3)), np.zeros(3)
  for rows in itertools.islice(embeddings.shuffled_batches(90, 16, 5), steps):
    x = features[rows].astype(float)
    p = np.exp(x @ w + b)
    p /= p.sum(axis=1, keepdims=True)
    gradient = (p - np.eye(3)[labels[rows]]) / 16  # of the logits
    w, b = w - 0.1 * x.T @ gradient, b - 0.1 * gradient.sum(axis=0)
  np.testing.assert_allclose(layer['kernel'], w, atol=1e-5)
  np.testing.assert_allclose(layer['bias'], b, atol=1e-5)
