"""Geometric augmentations compared with SciPy, NumPy and cv2.warpAffine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from views import compiled, many, picture, which

from ssljax import errors
from ssljax.augment import geometric

# SciPy's names for the same borders. Its own 'wrap' has a period of size - 1.
SCIPY = {
  geometric.zeros: 'grid-constant',
  geometric.wrap: 'grid-wrap',
  geometric.reflect: 'reflect',
}
BORDERS = pytest.mark.parametrize(
  'border', SCIPY, ids=lambda border: border.__name__
)
moved = compiled(geometric.warp, static_argnums=3)
turned = compiled(geometric.turn)
sampled = compiled(geometric.sample, static_argnums=3)


def scipy_warp(image, matrix, shift, border):
  """`geometric.warp` in float64, by LbA's 2x3 matrix [M | s + m - M m]."""
  matrix, shift = np.float64(matrix), np.float64(shift)
  middle = np.array([image.shape[1], image.shape[0]]) / 2
  offset = shift + middle - matrix @ middle
  # SciPy reads at A (row, column) + b; OpenCV writes pixel p to M p + offset.
  inverse = np.linalg.inv(matrix)
  swap = slice(None, None, -1)
  return np.stack(
    [
      scipy.ndimage.affine_transform(
        image[..., channel].astype(np.float64),
        inverse[swap, swap],
        -(inverse @ offset)[swap],
        order=1,
        mode=SCIPY[border],
      )
      for channel in range(image.shape[-1])
    ],
    axis=-1,
  )


def test_a_turn_by_0_changes_nothing():
  image = picture(5, 8, 3)
  np.testing.assert_allclose(turned(image, 0.0), image, atol=1e-6)


@pytest.mark.parametrize('size', [5, 8])
def test_a_quarter_turn_is_rot90(size):
  image = picture(size, size, 3)
  np.testing.assert_allclose(
    turned(image, np.pi / 2), np.rot90(image), atol=1e-5
  )


@pytest.mark.parametrize('angle', [-0.2, 0.13])
def test_a_turn_is_scipys_with_zeros_outside(angle):
  image = picture(9, 12, 3)
  expected = scipy.ndimage.rotate(
    image, np.rad2deg(angle), reshape=False, order=1, mode='grid-constant'
  )
  np.testing.assert_allclose(turned(image, angle), expected, atol=1e-5)


@pytest.mark.parametrize(
  'factory, bound',
  [(geometric.rotate(0.2), 0.2), (geometric.tilt(10), np.pi / 18)],
)
def test_angles_are_uniform_within_the_bound(factory, bound):
  # Interpolation is exact on a ramp: x' = cos x - sin y about the centre, so
  # the differences to the right and down at the centre are cos and -sin.
  ramp = np.tile(np.arange(7, dtype=np.float32), (7, 1))[..., None]
  results = many(factory, ramp, 1000)[..., 0]
  angle = np.arctan2(
    results[:, 3, 3] - results[:, 4, 3], results[:, 3, 4] - results[:, 3, 3]
  )
  assert abs(angle).max() <= bound + 1e-5
  # U(-a, a) has deviation a / √3: the mean of 1000 leaves 4 * .0183 a with
  # probability 6e-5; none of 1000 is above .97 a with probability
  # .985^1000 = 3e-7 per side.
  assert abs(angle.mean()) < 0.073 * bound
  assert angle.max() > 0.97 * bound and angle.min() < -0.97 * bound


@BORDERS
def test_values_far_outside_follow_the_border(border):
  image = picture(5, 7, 2)
  rows = np.linspace(-13, 19, 96, dtype=np.float32).reshape(8, 12)
  columns = np.linspace(25, -17, 96, dtype=np.float32).reshape(8, 12)
  expected = [
    scipy.ndimage.map_coordinates(
      image[..., channel], [rows, columns], order=1, mode=SCIPY[border]
    )
    for channel in range(2)
  ]
  np.testing.assert_allclose(
    sampled(image, rows, columns, border),
    np.stack(expected, axis=-1),
    atol=1e-5,
  )


@BORDERS
@pytest.mark.parametrize(
  'matrix, shift',
  [
    (((1.1, -0.2), (0.3, 0.8)), (2.5, -1.25)),
    (((0.6, 0.1), (-0.2, 0.7)), (-3, 4)),  # shrinks: samples far outside
    (((-0.9, 0.4), (0.3, 1.2)), (0, 0)),  # mirrors
  ],
)
def test_a_warp_is_scipys(border, matrix, shift):
  image = picture(9, 12, 3)
  np.testing.assert_allclose(
    moved(image, matrix, shift, border),
    scipy_warp(image, matrix, shift, border),
    atol=1e-5,
  )


@BORDERS
def test_the_identity_changes_no_bit(border):
  image = picture(6, 7, 3)
  eye = ((1.0, 0.0), (0.0, 1.0))
  np.testing.assert_array_equal(moved(image, eye, (0.0, 0.0), border), image)


def test_a_wrapped_shift_by_whole_pixels_is_a_roll():
  image = picture(6, 7, 3)
  eye = ((1.0, 0.0), (0.0, 1.0))
  # 2 to the right and 3 up; 15 to the right is twice the width and 1.
  for shift in [(2, -3), (15, 0)]:
    np.testing.assert_allclose(
      moved(image, eye, tuple(map(float, shift)), geometric.wrap),
      np.roll(image, shift, (1, 0)),
      atol=1e-6,
    )


def test_a_reflected_shift_by_the_whole_size_is_a_mirror():
  image = picture(6, 7, 3)
  eye = ((1.0, 0.0), (0.0, 1.0))
  # ..gfedcba|abcdefg: 7 px to the right, the window is gfedcba.
  np.testing.assert_allclose(
    moved(image, eye, (7.0, 0.0), geometric.reflect), image[:, ::-1], atol=1e-6
  )


def test_the_drawn_border_is_one_of_the_two():
  index, weight = jnp.arange(-9, 14), jnp.ones(23)
  for wraps, border in [(True, geometric.wrap), (False, geometric.reflect)]:
    either = geometric.wrap_or_reflect(jnp.bool_(wraps))
    np.testing.assert_array_equal(
      either(index, weight, 5), border(index, weight, 5)
    )


def draws(n, scale, shift):
  """Matrices [n, 2, 2], shifts [n, 2] and wraps [n] for the keys of `many`."""
  keys = jax.random.split(jax.random.key(7), n)
  matrix, moves, wraps = compiled(
    jax.vmap(functools.partial(geometric.draw_affine, scale=scale, shift=shift))
  )(keys)
  matrix = np.moveaxis(np.asarray(matrix), -1, 0)
  return matrix, np.asarray(moves).T, np.asarray(wraps)


def test_the_drawn_map_has_the_distribution_of_the_paper():
  n = 4000
  matrix, moves, wraps = draws(n, 0.15, 2.0)
  drawn = np.concatenate([matrix.reshape(n, 4), moves], axis=1)
  mean, deviation = [1, 0, 0, 1, 0, 0], np.array([0.15] * 4 + [2.0] * 2)
  # Standard errors for n normals: σ / √n of the mean, σ / √(2 n) of the
  # deviation, 1 / √n of a correlation. The 6 means, 6 deviations and 21
  # correlations (the coin included) all stay within 4.5 standard errors, except
  # with probability 33 * 7e-6.
  assert (abs(drawn.mean(0) - mean) < 4.5 * deviation / n**0.5).all()
  ratio = drawn.std(0) / deviation
  assert (abs(ratio - 1) < 4.5 / (2 * n) ** 0.5).all()
  correlation = np.corrcoef(drawn.T, wraps) - np.eye(7)
  assert abs(correlation).max() < 4.5 / n**0.5
  assert abs(wraps.mean() - 0.5) < 4.5 * 0.5 / n**0.5


def test_affine_applies_the_warp_that_it_draws():
  image = picture(8, 9, 3)
  results = many(geometric.affine(0.3, 3), image, 20)
  matrix, moves, wraps = draws(20, 0.3, 3.0)
  assert 0 < wraps.sum() < 20
  for row in range(20):
    border = geometric.wrap if wraps[row] else geometric.reflect
    expected = scipy_warp(image, matrix[row], moves[row], border)
    # The error of a sampling position is rounding times the inverse matrix.
    atol = 1e-5 * np.linalg.norm(np.linalg.inv(matrix[row]), 2)
    np.testing.assert_allclose(results[row], expected, atol=atol)


def test_affine_of_0_changes_no_bit():
  image = picture(5, 6, 1)
  results = many(geometric.affine(0, 0), image, 8)
  np.testing.assert_array_equal(results, np.broadcast_to(image, results.shape))


def test_affine_stays_within_the_values_of_the_image():
  image = 0.25 + picture(8, 9, 3) / 2
  # With deviation 1 many matrices are close to singular.
  results = many(geometric.affine(1, 5), image, 300)
  assert np.isfinite(results).all()
  assert results.min() >= image.min() - 1e-6
  assert results.max() <= image.max() + 1e-6


@BORDERS
@pytest.mark.parametrize('matrix', [np.zeros((2, 2)), np.ones((2, 2))])
def test_a_singular_matrix_gives_finite_values(border, matrix):
  image = picture(8, 9, 1)
  result = moved(image, tuple(map(tuple, matrix)), (2.0, -1.0), border)
  assert np.isfinite(result).all()
  assert np.min(result) >= 0 and np.max(result) <= 1


def test_a_tilt_is_scipys_with_zeros_outside():
  image = picture(12, 10, 3)
  results = many(geometric.tilt(10), image, 50)
  # Every result is close to a rotation by a multiple of 0.05 degrees: the error
  # is at most 0.025 degrees, or 4.4e-4 of at most 8 px.
  tried = [
    scipy_warp(image, ((cos, sin), (-sin, cos)), (0, 0), geometric.zeros)
    for angle in np.linspace(-np.pi / 18, np.pi / 18, 401)
    for cos, sin in [(np.cos(angle), np.sin(angle))]
  ]
  for result in results:
    assert abs(tried - result).max(axis=(1, 2, 3)).min() < 0.01


def test_a_rotated_and_scaled_image_is_sampled_at_the_mapped_positions():
  # Interpolation is exact on ramps, whose values are the sampling positions:
  # x = (cos a (x' - m) - sin a (y' - m)) / w + m and y likewise with h.
  height, width = 9, 13
  y, x = np.mgrid[:height, :width].astype(np.float32)
  ramps = np.stack([x, y], axis=-1)
  results = many(geometric.turn_and_scale(10, 0.05), ramps, 1000)
  # At the centre, where no sampling position is outside the image.
  at = lambda down, right: results[:, 4 + down, 6 + right]
  np.testing.assert_allclose(at(0, 0), [[6, 4]] * 1000, atol=1e-5)
  across, along = at(0, 1) - at(0, 0), at(1, 0) - at(0, 0)
  np.testing.assert_allclose(at(1, 1), at(0, 0) + across + along, atol=1e-5)
  wide = 1 / np.hypot(across[:, 0], along[:, 0])
  high = 1 / np.hypot(across[:, 1], along[:, 1])
  angle = np.arctan2(-along[:, 0], across[:, 0])
  # No shear: both rows of the matrix are rotated by the same angle.
  turned_back = np.arctan2(across[:, 1], along[:, 1])
  np.testing.assert_allclose(turned_back, angle, atol=1e-4)
  drawn = np.stack([angle / (np.pi / 18), (wide - 1) / 0.05, (high - 1) / 0.05])
  # As in `test_angles_are_uniform_within_the_bound`, for three draws from
  # U(-1, 1). A correlation of 1000 draws has deviation 1 / √1000 = .0316.
  assert abs(drawn).max() < 1 + 1e-3
  assert (abs(drawn.mean(axis=1)) < 0.073).all()
  assert (drawn.max(axis=1) > 0.97).all() and (drawn.min(axis=1) < -0.97).all()
  assert abs(np.corrcoef(drawn) - np.eye(3)).max() < 4.5 * 0.0316


def test_turn_and_scale_by_0_changes_nothing():
  image = picture(5, 8, 3)
  results = many(geometric.turn_and_scale(0, 0), image, 4)
  expected = np.broadcast_to(image, results.shape)
  np.testing.assert_allclose(results, expected, atol=1e-6)


def enlarged(image, height, width):
  """Every window [height, width] of [6, 4, c], enlarged to [6, 4, c]."""
  rows = [i * height // 6 for i in range(6)]
  columns = [j * width // 4 for j in range(4)]
  return [
    image[top : top + height, left : left + width][rows][:, columns]
    for top in range(7 - height)
    for left in range(5 - width)
  ]


def test_zooms_are_enlarged_windows_each_equally_often():
  image = picture(6, 4, 2)
  results = many(geometric.zoom(0.5), image, 4000)
  # u ~ U(0, .5): the sides ⌊6 - 6 u⌋, ⌊4 - 4 u⌋ change at 1/6, 1/4 and 1/3.
  sides = {(5, 3): 1 / 3, (4, 3): 1 / 6, (4, 2): 1 / 6, (3, 2): 1 / 3}
  windows = [enlarged(image, *side) for side in sides]
  choice = which(results, np.concatenate(windows))
  assert (choice >= 0).all()
  positions = [len(some) for some in windows]
  assert positions == [4, 6, 9, 12]
  shares = np.array([*sides.values()]) / positions
  expected = 4000 * np.repeat(shares, positions)
  # A count is binomial with deviation below √expected; one of 31 counts is off
  # by 5 deviations with probability 31 * 6e-7.
  counts = np.bincount(choice, minlength=31)
  assert (abs(counts - expected) < 5 * expected**0.5).all()


def test_a_zoom_of_0_changes_nothing():
  image = picture(5, 7, 3)
  results = many(geometric.zoom(0), image, 4)
  np.testing.assert_array_equal(results, np.broadcast_to(image, results.shape))


@pytest.mark.parametrize(
  'augmentation',
  [geometric.affine(), geometric.zoom(), geometric.turn_and_scale()],
)
def test_the_result_depends_on_the_key(augmentation):
  image = picture(8, 8, 1)
  results = many(augmentation, image, 10)
  np.testing.assert_array_equal(results, many(augmentation, image, 10))
  assert len(np.unique(results, axis=0)) > 5


@pytest.mark.parametrize(
  'factory, name',
  [
    (geometric.rotate, 'angle'),
    (geometric.affine, 'scale'),
    (geometric.affine, 'shift'),
    (geometric.tilt, 'degrees'),
    (geometric.zoom, 'crop'),
    (geometric.turn_and_scale, 'degrees'),
    (geometric.turn_and_scale, 'scale'),
  ],
)
@pytest.mark.parametrize('value', [-1, float('nan'), float('inf')])
def test_an_invalid_number_is_refused_by_name(factory, name, value):
  with pytest.raises(errors.InputError, match=name):
    factory(**{name: value})
