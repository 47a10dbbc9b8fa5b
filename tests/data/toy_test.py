import numpy as np

from ssljax.data import datasets, toy
from ssljax.data.splits import draw_split

# φ = π (1/2 + z/3): cos φ = −sin(πz/3), sin φ = cos(πz/3). With E cos(az) =
# exp(−a²/2), and E r = 1, E r² = 1 + 1/16, independent of φ:
COSINE = np.exp(-((np.pi / 3) ** 2) / 2)
TWICE = np.exp(-((2 * np.pi / 3) ** 2) / 2)  # of the doubled angle
VAR_X = 17 / 16 * (1 - TWICE) / 2
VAR_Y = 17 / 16 * (1 + TWICE) / 2 - COSINE**2
MANY = 200_000
REDRAWN = 'yin-yang-redrawn'


def test_the_normals_are_normal():
  z = toy.normals((MANY, 2), key=5)
  # Standard errors: of a mean 1/√n, of a variance √(2/n), of z⁴ √(96/n).
  n = z.size
  np.testing.assert_allclose(z.mean(), 0, atol=4 / np.sqrt(n))
  np.testing.assert_allclose((z**2).mean(), 1, atol=4 * np.sqrt(2 / n))
  np.testing.assert_allclose((z**4).mean(), 3, atol=4 * np.sqrt(96 / n))
  correlation = (z[:, 0] * z[:, 1]).mean()
  np.testing.assert_allclose(correlation, 0, atol=4 / np.sqrt(MANY))


def test_the_moments_of_both_classes_are_those_of_eqs_10_to_12():
  x, labels = toy.yin_yang(MANY, key=7)
  for label, centre, sign in (
    (0, (-1 / 3, 1 / 10), -1),
    (1, (1 / 3, -1 / 10), 1),
  ):
    mine = x[labels == label].astype(np.float64)
    assert len(mine) == MANY
    mean = centre[0], centre[1] + sign * COSINE
    error = 4 * np.sqrt(np.array([VAR_X, VAR_Y]) / MANY)
    np.testing.assert_array_less(np.abs(mine.mean(0) - mean), error)
    covariance = np.cov(mine.T)
    expected = np.diag([VAR_X, VAR_Y])
    np.testing.assert_allclose(covariance, expected, atol=0.01)
    # The radius about the centre: 1 and 1/4, less than 4 in 100,000 below 0.
    radius = np.hypot(*(mine - centre).T)
    np.testing.assert_allclose(radius.mean(), 1, atol=4 / 4 / np.sqrt(MANY))
    np.testing.assert_allclose(radius.std(), 1 / 4, atol=0.002)


def test_the_data_set_has_500_points_of_each_class_in_both_parts():
  data = datasets.load('yin-yang')
  assert data.classes == ('blue', 'red')
  for source in (data.train, data.test):
    np.testing.assert_array_equal(np.bincount(source.labels), [500, 500])
    assert source.labels.dtype == np.int32
    images = datasets.arrays(source)
    assert images.shape == (1000, *source.shape) == (1000, 1, 2, 1)
    assert images.dtype == source.dtype == np.float32
    rows = np.array([999, 3, 3])
    np.testing.assert_array_equal(source.read(rows), images[rows])
    # By Eqs. 11 and 12 the red ones lie above, but for a few.
    upper = images[:, 0, 1, 0] > 0
    assert 0.75 < (upper == (source.labels == 1)).mean() < 1


def test_the_points_are_the_same_every_time_and_no_test_point_is_trained_on():
  first, again = datasets.load('yin-yang'), datasets.load('yin-yang')
  for one, other in ((first.train, again.train), (first.test, again.test)):
    np.testing.assert_array_equal(datasets.arrays(one), datasets.arrays(other))
  both = np.concatenate([datasets.arrays(s) for s in (first.train, first.test)])
  assert len(np.unique(both.reshape(2000, 2), axis=0)) == 2000


def test_a_split_of_it_has_four_of_each_class():
  data = datasets.load('yin-yang')
  split = draw_split(data.train.labels, data.classes, per_class=4, seed=0)
  given = split.labels[split.labelled]
  np.testing.assert_array_equal(np.bincount(given), [4, 4])


def points_of(name, seed):
  data = datasets.load(name, seed=seed)
  return [datasets.arrays(source) for source in (data.train, data.test)]


def test_redrawn_points_depend_on_the_seed_and_the_split_alone():
  drawn = [part for seed in (0, 1) for part in points_of(REDRAWN, seed)]
  fixed = points_of('yin-yang', 0)
  every = np.concatenate([*drawn, *fixed]).reshape(6000, 2)
  assert len(np.unique(every, axis=0)) == 6000  # no point is in two of them
  for one, again in zip(drawn[2:], points_of(REDRAWN, 1), strict=True):
    np.testing.assert_array_equal(one, again)
  for one, other in zip(fixed, points_of('yin-yang', 1), strict=True):
    np.testing.assert_array_equal(one, other)
  labels = [datasets.load(REDRAWN, seed=seed).train.labels for seed in (0, 1)]
  np.testing.assert_array_equal(*labels)
