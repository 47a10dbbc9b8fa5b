import inspect

import numpy as np
import pytest
from scipy import sparse
from sklearn import datasets, semi_supervised

from ssljax.analysis import propagation as p
from ssljax.core import UNLABELLED
from ssljax.errors import InputError
from ssljax.methods.llp import llp

METHODS = [
  p.label_spreading,
  p.label_propagation,
  p.metric_transfer,
  p.deep_propagation,
  p.local_propagation,
]
M, C = 120, 3


def example(seed=0):
  """Overlapping classes on a sphere, some wider, four of each labelled."""
  rng = np.random.default_rng(seed)
  truth = np.arange(M) % C
  width = np.array([0.5, 1.0, 2.0])[truth][:, None]
  v = rng.normal(size=(C, 5))[truth] + width * rng.normal(size=(M, 5))
  known = np.where(np.arange(M) < 4 * C, truth, UNLABELLED).astype(np.int32)
  return v / np.linalg.norm(v, axis=1, keepdims=True), known


def blobs():
  """Two classes in four far blobs, one image of each blob labelled."""
  rng = np.random.default_rng(0)
  centre = np.concatenate([np.eye(2), -np.eye(2)])
  truth = np.repeat([0, 1, 1, 0], 10).astype(np.int32)
  x = centre.repeat(10, axis=0) + 0.05 * rng.normal(size=(40, 2))
  known = np.where(np.arange(40) % 10 == 0, truth, UNLABELLED).astype(np.int32)
  return x, truth, known


def one_hot(known):
  return np.array([[float(y == c) for c in range(C)] for y in known])


def normalized(w):
  """S = D^−½ W D^−½ in loops."""
  degree = w.sum(axis=1)
  s = np.zeros_like(w)
  for i in range(len(w)):
    for j in range(len(w)):
      s[i, j] = w[i, j] / np.sqrt(degree[i] * degree[j])
  return s


def nearest_graph(v, k, weigh):
  """W = A + Aᵀ in loops."""
  a = np.zeros((len(v), len(v)))
  for i in range(len(v)):
    others = sorted(
      (j for j in range(len(v)) if j != i), key=lambda j: -v[i] @ v[j]
    )
    for j in others[:k]:
      a[i, j] = weigh(v[i] @ v[j])
  return a + a.T


# Every method.


@pytest.mark.parametrize('method', METHODS)
def test_separate_blobs_are_recovered(method):
  x, truth, known = blobs()
  few = {'density_neighbours': 8, 'neighbours': 3}
  own = {
    k: n for k, n in few.items() if k in inspect.signature(method).parameters
  }
  for nearest in ({}, {'nearest': 6}):  # of its blob alone: four pieces
    if nearest and 'nearest' not in inspect.signature(method).parameters:
      continue
    found = method(x, known, 2, **own, **nearest)
    np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize('method', METHODS)
def test_lengths_do_not_matter(method):
  v, known = example()
  lengths = np.random.default_rng(1).uniform(0.1, 10, size=(M, 1))
  np.testing.assert_array_equal(
    method(lengths * v, known, C), method(v, known, C)
  )


# LLP.


@pytest.mark.parametrize('nearest', [1, 2, 6])
def test_local_propagation_is_a_loop_over_equations_5_to_8(nearest):
  v, known = example()
  k, tau = 4, 0.3
  labelled = [i for i in range(M) if known[i] != UNLABELLED]
  similar = lambda i, j: np.exp(v[i] @ v[j] / tau)
  density = {  # Eq. 7, an image being its own nearest
    i: sum(sorted(similar(i, j) for j in range(M))[-nearest:]) for i in labelled
  }
  expected = []
  for image in range(M):
    vote = {i: similar(i, image) / density[i] for i in labelled}
    weights = np.zeros(C)  # Eq. 8
    for i in sorted(labelled, key=vote.get)[-k:]:
      weights[known[i]] += vote[i]
    expected.append(np.argmax(weights))  # Eq. 6
  found = p.local_propagation(
    v, known, C, neighbours=k, density_neighbours=nearest, temperature=tau
  )
  np.testing.assert_array_equal(found, expected)


def test_the_defaults_are_those_that_llp_trains_with():
  trained = inspect.signature(llp).parameters
  for name, alone in inspect.signature(p.local_propagation).parameters.items():
    if alone.kind is alone.KEYWORD_ONLY:
      assert alone.default == trained[name].default, name


# Label propagation and spreading.


def test_label_propagation_is_where_scikit_learns_iteration_ends():
  for seed in range(3):
    v, known = example(seed)
    method = semi_supervised.LabelPropagation(
      gamma=3.0, tol=1e-9, max_iter=100_000
    )
    np.testing.assert_array_equal(
      p.label_propagation(v, known, C, gamma=3.0),
      method.fit(v, known).transduction_,
    )


def test_label_spreading_is_the_limit_of_its_paper():
  # F* = (1 − α)(I − αS)⁻¹ Y of Zhou et al., up to a factor.
  for seed in range(3):
    v, known = example(seed)
    w = np.exp(-3.0 * np.sum((v[:, None] - v[None]) ** 2, axis=-1))
    s = normalized(w - np.eye(M))
    limit = np.linalg.inv(np.eye(M) - 0.5 * s) @ one_hot(known)
    np.testing.assert_array_equal(
      p.label_spreading(v, known, C, gamma=3.0, alpha=0.5),
      limit.argmax(axis=1),
    )


@pytest.mark.parametrize('method', [p.label_spreading, p.label_propagation])
def test_two_arcs_are_followed_beyond_the_nearest_label(method):
  # Of two arcs of a circle one is labelled at its end that is near the other,
  # the other at its far end: from there on neighbours know better than the
  # nearest label does.
  angle = np.concatenate([np.linspace(0, 1, 60), np.linspace(1.5, 2.5, 60)])
  truth = np.repeat([0, 1], 60)
  v = np.stack([np.cos(angle), np.sin(angle)], axis=1)
  known = np.full(120, UNLABELLED, np.int32)
  known[[59, 119]] = 0, 1
  nearest = np.argmax(v @ v[[59, 119]].T, axis=1)
  assert (nearest != truth).sum() > 10
  found = method(
    v,
    known,
    2,
    gamma=200.0,
    **({'alpha': 0.99} if method is p.label_spreading else {}),
  )
  np.testing.assert_array_equal(found, truth)


# Graphs.


@pytest.mark.parametrize('k', [3, M])
def test_a_graph_links_the_nearest_others_both_ways(k):
  v, _ = example()
  weigh = lambda cosine: np.maximum(0, cosine) ** 3
  np.testing.assert_allclose(
    p.affinity(v, k, weigh).toarray(), nearest_graph(v, k, weigh), atol=1e-12
  )


def test_diffusion_is_the_dense_inverse():
  v, known = example()
  w = nearest_graph(v, 5, np.exp)
  start = one_hot(known)
  expected = np.linalg.inv(np.eye(M) - 0.99 * normalized(w)) @ start
  found = p.diffuse(sparse.csr_matrix(w), start, 0.99, iterations=1000)
  # 1e-6 is of the right side; α = 0.99 leaves it 1 / (1 − α) times as much.
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_deep_propagation_is_equations_5_9_and_10():
  v, known = example()
  w = nearest_graph(v, 6, lambda cosine: max(0, cosine) ** 3)
  start = one_hot(known) / 4  # four labelled images of a class
  expected = np.linalg.inv(np.eye(M) - 0.9 * normalized(w)) @ start
  found = p.deep_propagation(v, known, C, nearest=6, alpha=0.9, iterations=1000)
  np.testing.assert_array_equal(found, expected.argmax(axis=1))


def test_twenty_iterations_tell_the_classes_of_digits():
  images, truth = datasets.load_digits(return_X_y=True)
  images, truth = images[:300], truth[:300]
  known = np.where(np.arange(300) < 60, truth, UNLABELLED).astype(np.int32)
  few = p.deep_propagation(images, known, 10)
  np.testing.assert_array_equal(
    few, p.deep_propagation(images, known, 10, iterations=10_000)
  )


def test_a_biased_cut_with_all_eigenvectors_is_a_pseudo_inverse():
  # Σ u uᵀ/λ over λ > 0 is the pseudo-inverse, and s has no share of λ = 0.
  v, known = example()
  w = nearest_graph(v, 8, np.exp)
  degree = w.sum(axis=1)
  bias = np.zeros((M, C))
  for c in range(C):
    volume = sum(degree[known == c])
    rest = sum(degree[(known != c) & (known != UNLABELLED)])
    for i in range(M):
      if known[i] != UNLABELLED:
        share = 1 / volume if known[i] == c else -1 / rest
        bias[i, c] = np.sqrt(degree[i]) * share
  expected = np.linalg.pinv(np.eye(M) - normalized(w)) @ bias
  expected /= np.linalg.norm(expected, axis=0)
  found = p.biased_cut(sparse.csr_matrix(w), known, C, eigenvectors=M)
  np.testing.assert_allclose(found, expected, atol=1e-9)
  np.testing.assert_allclose(np.sqrt(degree) @ bias, 0, atol=1e-12)


def test_metric_transfer_is_the_cut_of_its_graph():
  v, known = example()
  w = nearest_graph(v, 7, lambda cosine: np.exp((cosine - 1) / 0.2))
  repad = p.biased_cut(sparse.csr_matrix(w), known, C, eigenvectors=10)
  found = p.metric_transfer(v, known, C, nearest=7, eigenvectors=10)
  np.testing.assert_array_equal(found, repad.argmax(axis=1))


# Subsamples.


def batch_spec(labels, seed=0, number=0, **sizes):
  given = dict(classes=3, images=6, labelled=2) | sizes
  return p.draw_subsample(
    labels, given['classes'], given['images'], given['labelled'], seed, number
  )


LABELS = np.repeat([0, 2, 3, 7, UNLABELLED], 8).astype(np.int32)


def test_a_subsample_has_as_many_images_of_every_class():
  some = batch_spec(LABELS)
  assert len(set(some.rows)) == 18
  # Eight rows of a class are beside each other: no class is drawn like another.
  assert len({tuple(rows % 8) for rows in some.rows.reshape(3, 6)}) == 3
  # A class is one of the data set's, and none of theirs is two.
  pairs = set(zip(some.truth, LABELS[some.rows], strict=True))
  assert len(pairs) == 3 and UNLABELLED not in LABELS[some.rows]
  assert sorted({c for c, _ in pairs}) == [0, 1, 2]
  for c in range(3):
    assert (some.truth == c).sum() == 6 and (some.known == c).sum() == 2
  told = some.known != UNLABELLED
  np.testing.assert_array_equal(some.known[told], some.truth[told])


def test_a_subsample_is_a_function_of_seed_and_number():
  same = lambda a, b: all(map(np.array_equal, a, b))
  assert same(batch_spec(LABELS, 1, 2), batch_spec(LABELS, 1, 2))
  assert not same(batch_spec(LABELS, 1, 2), batch_spec(LABELS, 1, 3))
  assert not same(batch_spec(LABELS, 1, 2), batch_spec(LABELS, 2, 2))


def test_more_images_and_labels_include_fewer():
  few, many = batch_spec(LABELS), batch_spec(LABELS, images=8, labelled=5)
  told = lambda some: set(some.rows[some.known != UNLABELLED])
  assert set(few.rows) < set(many.rows) and told(few) < told(many)


def test_what_cannot_be_drawn_names_its_flag():
  with pytest.raises(InputError, match=r'classes=5: .* 4 classes'):
    batch_spec(LABELS, classes=5)
  with pytest.raises(InputError, match='images=8: class 3 has 7'):
    batch_spec(np.delete(LABELS, np.flatnonzero(LABELS == 3)[0]), images=8)
