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
  p.mass_normalized,
  p.metric_transfer,
  p.deep_propagation,
  p.local_propagation,
]
OF_A_NEAREST_GRAPH = [p.metric_transfer, p.deep_propagation]
M, C = 120, 3


def example(seed=0):
  """Overlapping classes of different width, four labelled images each."""
  rng = np.random.default_rng(seed)
  truth = np.arange(M) % C
  width = np.array([0.5, 1.0, 2.0])[truth][:, None]
  v = rng.normal(size=(C, 5))[truth] + width * rng.normal(size=(M, 5))
  known = np.where(np.arange(M) < 4 * C, truth, UNLABELLED).astype(np.int32)
  return v / np.linalg.norm(v, axis=1, keepdims=True), known


def blobs():
  """Two classes in four distant blobs, one image of each blob labelled."""
  rng = np.random.default_rng(0)
  centre = np.concatenate([np.eye(2), -np.eye(2)])
  truth = np.repeat([0, 1, 1, 0], 10).astype(np.int32)
  x = centre.repeat(10, axis=0) + 0.05 * rng.normal(size=(40, 2))
  known = np.where(np.arange(40) % 10 == 0, truth, UNLABELLED).astype(np.int32)
  return x, truth, known


def one_hot(known):
  return np.array([[float(y == c) for c in range(C)] for y in known])


def normalized(w):
  """S = D^−½ W D^−½, as loops."""
  degree = w.sum(axis=1)
  s = np.zeros_like(w)
  for i in range(len(w)):
    for j in range(len(w)):
      s[i, j] = w[i, j] / np.sqrt(degree[i] * degree[j])
  return s


def nearest_graph(v, k, weight_of):
  """W = A + Aᵀ, as loops."""
  a = np.zeros((len(v), len(v)))
  for i in range(len(v)):
    others = sorted(
      (j for j in range(len(v)) if j != i), key=lambda j: -v[i] @ v[j]
    )
    for j in others[:k]:
      a[i, j] = weight_of(v[i] @ v[j])
  return a + a.T


# All methods.


@pytest.mark.parametrize('method', METHODS)
def test_separate_blobs_are_recovered(method):
  x, truth, known = blobs()
  few = {'density_neighbours': 8, 'neighbours': 3}
  own = {
    k: n for k, n in few.items() if k in inspect.signature(method).parameters
  }
  found = method(x, known, 2, **own)
  np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize('method', OF_A_NEAREST_GRAPH)
def test_blobs_are_recovered_if_each_is_a_component_of_the_graph(method):
  x, truth, known = blobs()
  # With 6 neighbours, all in the same blob, the graph has four components.
  found = method(x, known, 2, nearest=6)
  np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize('method', METHODS)
def test_the_lengths_of_embeddings_have_no_effect(method):
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
  density = {  # Eq. 7; the nearest neighbour of an image is itself
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


def test_the_defaults_equal_those_of_training():
  trained, alone = (
    inspect.signature(f).parameters for f in (llp, p.local_propagation)
  )
  settings = [n for n, x in alone.items() if x.kind is x.KEYWORD_ONLY]
  assert 'temperature' in settings
  for name in settings:
    assert alone[name].default == trained[name].default, name


# Label propagation and spreading.


def test_label_propagation_is_the_limit_of_scikit_learns_iteration():
  for seed in range(3):
    v, known = example(seed)
    method = semi_supervised.LabelPropagation(
      gamma=3.0, tol=1e-9, max_iter=100_000
    )
    np.testing.assert_array_equal(
      p.label_propagation(v, known, C, gamma=3.0),
      method.fit(v, known).transduction_,
    )


def test_class_masses_are_those_of_the_labels_after_normalization():
  v, known = example()
  known = known.copy()
  known[:2] = UNLABELLED  # classes 0 and 1 keep three labels, class 2 four
  w = np.exp(-3.0 * np.sum((v[:, None] - v[None]) ** 2, axis=-1))
  f = one_hot(known)
  for _ in range(5_000):  # Zhu, Ghahramani's iteration
    f = w / w.sum(axis=1, keepdims=True) @ f
    f[known != UNLABELLED] = one_hot(known)[known != UNLABELLED]
  expected = known.copy()
  for i in range(M):
    if known[i] == UNLABELLED:
      mass = f[known == UNLABELLED].sum(axis=0)
      expected[i] = np.argmax(np.array([3, 3, 4]) * f[i] / mass)
  np.testing.assert_array_equal(
    p.mass_normalized(v, known, C, gamma=3.0), expected
  )


def hubs():
  """Two classes in 100 dimensions, one labelled image each.

  The labelled image of class 1 is nearer to everything than that of class 0.
  """
  rng = np.random.default_rng(0)
  truth = np.arange(200) % 2
  side = 0.5 * np.where(truth, 1, -1)
  x = rng.normal(size=(200, 100)) / 10
  x[:, 0] += side
  x[1] *= [1, *[0.3] * 99]  # less noise of its own: cosines with all are larger
  known = np.full(200, UNLABELLED, np.int32)
  known[:2] = 0, 1
  return x, truth, known


def test_a_hub_takes_all_images_from_label_propagation_unless_it_is_divided():
  x, truth, known = hubs()
  plain, normalized_ = (
    np.mean(f(x, known, 2, gamma=2.0) == truth)
    for f in (p.label_propagation, p.mass_normalized)
  )
  assert plain < 0.6 and normalized_ > 0.95


def test_a_gamma_that_cuts_images_off_is_refused():
  x, _, known = hubs()
  with pytest.raises(InputError, match=r'gamma=10000: .* a smaller one'):
    p.label_propagation(x, known, 2, gamma=1e4)


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
  # Two arcs of a circle. The first is labelled at the end that is close to the
  # second; the second is labelled at its far end. For the close end of the
  # second arc, the nearest label is wrong but the neighbours are right.
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
  weight_of = lambda cosine: np.maximum(0, cosine) ** 3
  np.testing.assert_allclose(
    p.affinity(v, k, weight_of).toarray(),
    nearest_graph(v, k, weight_of),
    atol=1e-12,
  )


def test_diffusion_is_the_dense_inverse():
  v, known = example()
  w = nearest_graph(v, 5, np.exp)
  start = one_hot(known)
  expected = np.linalg.inv(np.eye(M) - 0.99 * normalized(w)) @ start
  found = p.diffuse(sparse.csr_matrix(w), start, 0.99, iterations=1000)
  # The tolerance 1e-6 is relative to Y; α = 0.99 increases the error of Z by up
  # to 1 / (1 − α).
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_deep_propagation_is_equations_5_9_and_10():
  v, known = example()
  w = nearest_graph(v, 6, lambda cosine: max(0, cosine) ** 3)
  start = one_hot(known) / 4  # four labelled images of a class
  expected = np.linalg.inv(np.eye(M) - 0.9 * normalized(w)) @ start
  found = p.deep_propagation(v, known, C, nearest=6, alpha=0.9, iterations=1000)
  np.testing.assert_array_equal(found, expected.argmax(axis=1))


def test_twenty_iterations_suffice_for_digits():
  images, truth = datasets.load_digits(return_X_y=True)
  images, truth = images[:300], truth[:300]
  known = np.where(np.arange(300) < 60, truth, UNLABELLED).astype(np.int32)
  few = p.deep_propagation(images, known, 10)
  np.testing.assert_array_equal(
    few, p.deep_propagation(images, known, 10, iterations=10_000)
  )


def test_a_biased_cut_with_all_eigenvectors_is_a_pseudo_inverse():
  # Σ u uᵀ/λ over λ > 0 is the pseudo-inverse, and s is orthogonal to the
  # eigenvector of λ = 0.
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
  cut = p.biased_cut(sparse.csr_matrix(w), known, C, eigenvectors=10)
  found = p.metric_transfer(v, known, C, nearest=7, eigenvectors=10)
  np.testing.assert_array_equal(found, cut.argmax(axis=1))


# Subsamples.


def subsample(labels, seed=0, number=0, **sizes):
  given = dict(classes=3, images=6, labelled=2) | sizes
  return p.draw_subsample(
    labels, given['classes'], given['images'], given['labelled'], seed, number
  )


LABELS = np.repeat([0, 2, 3, 7, UNLABELLED], 8).astype(np.int32)


def test_a_subsample_has_equally_many_images_of_every_class():
  some = subsample(LABELS)
  assert len(set(some.rows)) == 18
  # The eight rows of a class are contiguous; every class has its own draws.
  assert len({tuple(rows % 8) for rows in some.rows.reshape(3, 6)}) == 3
  # Every class of the subsample is exactly one class of the data set.
  pairs = set(zip(some.truth, LABELS[some.rows], strict=True))
  assert len(pairs) == 3 and UNLABELLED not in LABELS[some.rows]
  assert sorted({c for c, _ in pairs}) == [0, 1, 2]
  for c in range(3):
    assert (some.truth == c).sum() == 6 and (some.known == c).sum() == 2
  labelled = some.known != UNLABELLED
  np.testing.assert_array_equal(some.known[labelled], some.truth[labelled])


def test_a_subsample_is_a_function_of_seed_and_number():
  same = lambda a, b: all(map(np.array_equal, a, b))
  assert same(subsample(LABELS, 1, 2), subsample(LABELS, 1, 2))
  assert not same(subsample(LABELS, 1, 2), subsample(LABELS, 1, 3))
  assert not same(subsample(LABELS, 1, 2), subsample(LABELS, 2, 2))


def test_a_larger_subsample_contains_a_smaller_one():
  few, many = subsample(LABELS), subsample(LABELS, images=8, labelled=5)
  labelled = lambda some: set(some.rows[some.known != UNLABELLED])
  assert set(few.rows) < set(many.rows) and labelled(few) < labelled(many)


def test_an_impossible_subsample_is_refused_by_name():
  with pytest.raises(InputError, match=r'classes=5: .* 4 classes'):
    subsample(LABELS, classes=5)
  with pytest.raises(InputError, match='images=8: class 3 has 7 images'):
    subsample(np.delete(LABELS, np.flatnonzero(LABELS == 3)[0]), images=8)
