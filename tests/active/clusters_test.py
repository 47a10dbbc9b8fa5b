import numpy as np
import pytest

from ssljax.active import clusters


def blobs(sizes, seed=0):
  """Points around directions of a circle, that many at each."""
  rng = np.random.default_rng(seed)
  angle = np.concatenate(
    [
      2 * np.pi * k / len(sizes) + 0.05 * rng.normal(size=n)
      for k, n in enumerate(sizes)
    ]
  )
  return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_the_typicality_is_that_of_scikit_learns_neighbours():
  from sklearn import neighbors

  points = np.random.default_rng(0).normal(size=(1100, 3))  # two blocks
  tree = neighbors.NearestNeighbors(n_neighbors=6).fit(points)
  distance = tree.kneighbors(points)[0][:, 1:]
  np.testing.assert_allclose(
    clusters.typicality(points, 5), 1 / distance.mean(axis=1), rtol=1e-4
  )
  assert clusters.typicality(points[:1], 5).tolist() == [1]


def test_the_density_is_the_mean_cosine_to_the_askable_images():
  embedding = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [-1.0, 0.0]])
  askable = np.array([True, True, False, True])
  score = np.array([1.0, 0.5, 2.0, 1.0])
  unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
  expected = [
    score[i] * np.mean([(1 + unit[i] @ unit[j]) / 2 for j in (0, 1, 3)])
    for i in range(4)
  ]
  found = clusters.density_weighted(score, embedding, askable)
  np.testing.assert_allclose(found, expected)


def test_a_cold_start_takes_one_image_of_each_cluster():
  sizes = [40, 30, 20, 10]
  points = blobs(sizes)
  nothing = np.zeros(100, bool)
  chosen = clusters.typiclust(points, nothing, ~nothing, 4)
  where = np.searchsorted(np.cumsum(sizes), chosen, side='right')
  assert sorted(where.tolist()) == [0, 1, 2, 3]
  # Each is more typical than most of its cluster.
  for row, blob in zip(chosen, where, strict=True):
    own = np.arange(sum(sizes[:blob]), sum(sizes[: blob + 1]))
    typical = clusters.typicality(points[own], clusters.NEIGHBOURS)
    assert typical[row - own[0]] == typical.max()


def test_clusters_with_labels_come_last():
  sizes = [40, 30, 20]
  points, labelled = blobs(sizes), np.zeros(90, bool)
  labelled[[3, 45]] = True  # in the two largest blobs
  chosen = clusters.typiclust(points, labelled, ~labelled, 1)
  assert 70 <= chosen[0] < 90


def test_only_askable_images_are_chosen_and_none_twice():
  points = blobs([6, 6])
  askable = np.zeros(12, bool)
  askable[[1, 2, 8]] = True
  chosen = clusters.typiclust(points, np.zeros(12, bool), askable, 3)
  assert sorted(chosen.tolist()) == [1, 2, 8]


@pytest.mark.parametrize('seed', [0, 1])
def test_the_same_seed_chooses_the_same(seed):
  points = np.random.default_rng(3).normal(size=(60, 4))
  nothing = np.zeros(60, bool)
  first, again = (
    clusters.typiclust(points, nothing, ~nothing, 7, seed) for _ in range(2)
  )
  np.testing.assert_array_equal(first, again)
