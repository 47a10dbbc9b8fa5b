"""Geometric augmentations: rotation, scaling, affine warps, zoom.

An augmentation is a pure function (key, image [H, W, c]) -> [H, W, c], as in
`standard`; most functions here are factories that return one. Each computes
every output pixel by sampling the input image at another position. Positions
are in pixels, relative to the centre of the top left pixel: x increases to the
right (along W), y increases downwards (along H).

MA-DNN   Chen, Zhu, Gong, ECCV 2018, on SVHN:  rotate()
LbA      Haeusser, Mordvintsev, Cremers, CVPR 2017, released train.py at the
         commit bfe5398:
           SVHN    affine(), then standard.blur()
           STL-10  tilt(), zoom(), then the rest of standard.stl10()
DeepBASS Rottmann, Kahl, Gottschalk 2018, on MNIST:  turn_and_scale()
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ssljax import errors

Augmentation = Callable[[chex.PRNGKey, chex.Array], chex.Array]
# A border extends an image of `size` pixels along one axis. It maps (index
# [...] int32 of a pixel that may lie outside, interpolation weight [...], size)
# to (index in 0 .. size - 1 of the pixel to read instead, adjusted weight).
Border = Callable[[chex.Array, chex.Array, int], tuple[chex.Array, chex.Array]]
# A 2x2 matrix of [] scalars that acts on (x, y).
Matrix = tuple[
  tuple[chex.Numeric, chex.Numeric], tuple[chex.Numeric, chex.Numeric]
]

# Determinants closer to 0 are replaced by this value before inversion: such a
# matrix would shrink an image to less than a thousandth of its area.
MIN_DETERMINANT = 1e-3


def rotate(angle: float = 0.2) -> Augmentation:
  """Rotate about the centre by U(-angle, angle) radians (MA-DNN on SVHN)."""
  errors.non_negative(angle=angle)
  limit = float(angle)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    return turn(image, jax.random.uniform(key, minval=-limit, maxval=limit))

  return apply


def turn(image: chex.Array, angle: chex.Numeric) -> chex.Array:
  """Rotate [H, W, c] counter-clockwise by `angle` [] radians.

  Bilinear interpolation with zeros outside the image, as in
  tf.contrib.image.rotate. `pix.rotate` is not used because it also interpolates
  between channels, which takes 20 times as long, and fails under strict dtype
  promotion.
  """
  height, width, _ = image.shape
  middle = (width - 1) / 2, (height - 1) / 2
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return _resample(image, ((cos, -sin), (sin, cos)), (0.0, 0.0), middle, zeros)


def turn_and_scale(degrees: float = 10.0, scale: float = 0.05) -> Augmentation:
  """Scale each side, then rotate by U(-degrees, degrees) (DeepBASS on MNIST).

  Height and width are multiplied by two independent draws from
  U(1 - scale, 1 + scale). Both changes are about the centre. Bilinear
  interpolation with zeros outside.

  Args:
    degrees: the largest angle; 10 in DeepBASS.
    scale: the largest relative change of a side, in [0, 1); 0.05 in DeepBASS.
  """
  errors.non_negative(degrees=degrees)
  errors.fraction(scale=scale)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    angle, wide, high = jax.random.uniform(key, (3,), minval=-1.0)
    angle = angle * float(degrees) * jnp.pi / 180
    width, height = 1 + float(scale) * wide, 1 + float(scale) * high
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # The inverse map: rotate back, then scale back.
    inverse = (cos / width, -sin / width), (sin / height, cos / height)
    middle = (image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2
    return _resample(image, inverse, (0.0, 0.0), middle, zeros)

  return apply


def affine(scale: float = 0.15, shift: float = 2.0) -> Augmentation:
  """Apply a random affine map with a wrapped or reflected border (LbA, SVHN).

  `warp` is called with the matrix I + scale N(0, 1), where the four entries are
  independent, and a shift of N(0, shift²) px along each axis. The border is
  `wrap` or `reflect`, with probability 1/2 for each image.

  Args:
    scale: standard deviation of a matrix entry; 0.15 in LbA.
    shift: standard deviation of the shift in pixels; 2 in LbA.
  """
  errors.non_negative(scale=scale, shift=shift)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    matrix, offset, wraps = draw_affine(key, float(scale), float(shift))
    return warp(image, matrix, offset, wrap_or_reflect(wraps))

  return apply


def draw_affine(
  key: chex.PRNGKey, scale: float, shift: float
) -> tuple[Matrix, tuple[chex.Array, chex.Array], chex.Array]:
  """Draw the parameters of `affine`.

  Returns:
    The matrix, the shift (right, down) [] px, and [] bool, true for a wrapped
    border.
  """
  # A single draw, because each generator costs compile time. The sign of the
  # last number is a fair coin.
  a, b, c, d, right, down, coin = jax.random.normal(key, (7,))
  matrix = (1 + scale * a, scale * b), (scale * c, 1 + scale * d)
  return matrix, (shift * right, shift * down), coin > 0


def tilt(degrees: float = 10.0) -> Augmentation:
  """Rotate by U(-degrees, degrees) with zeros outside (LbA on STL-10).

  It differs from `rotate` in the centre of rotation, which is that of `warp`.
  """
  errors.non_negative(degrees=degrees)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    limit = float(degrees) * jnp.pi / 180
    angle = jax.random.uniform(key, minval=-limit, maxval=limit)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return warp(image, ((cos, sin), (-sin, cos)), (0.0, 0.0), zeros)

  return apply


def warp(
  image: chex.Array,
  matrix: Matrix,
  shift: tuple[chex.Numeric, chex.Numeric],
  border: Border,
) -> chex.Array:
  """Move each pixel p of [H, W, c] to M (p - m) + m + shift, as LbA does.

  The middle m = (W/2, H/2) is LbA's; it lies half a pixel to the right of and
  below the centre of the image. Interpolation is bilinear, as in
  cv2.warpAffine: OpenCV 5.0 gives the same values, while 4.8 (and the versions
  of 2017) round sampling positions to 1/32 of a pixel.

  Args:
    image: [H, W, c].
    matrix: M. Its inverse is used, modified where M is close to singular.
    shift: (right, down), each [] px.
    border: extends the image beyond its edges.
  """
  height, width, _ = image.shape
  middle = width / 2, height / 2
  return _resample(image, _invert(matrix), shift, middle, border)


def _invert(matrix: Matrix) -> Matrix:
  """Return the inverse, or a finite matrix if it is close to singular."""
  (a, b), (c, d) = matrix
  determinant = a * d - b * c
  safe = jnp.where(
    jnp.abs(determinant) < MIN_DETERMINANT, MIN_DETERMINANT, determinant
  )
  return (d / safe, -b / safe), (-c / safe, a / safe)


def _resample(
  image: chex.Array,
  matrix: Matrix,
  shift: tuple[chex.Numeric, chex.Numeric],
  middle: tuple[float, float],
  border: Border,
) -> chex.Array:
  """Sample [H, W, c] at M (p - m - shift) + m for each output pixel p."""
  height, width, _ = image.shape
  x, y = middle
  right = (jnp.arange(width, dtype=image.dtype) - x - shift[0])[None, :]
  down = (jnp.arange(height, dtype=image.dtype) - y - shift[1])[:, None]
  (xx, xy), (yx, yy) = matrix
  rows = yy * down + yx * right + y
  columns = xx * right + xy * down + x
  return sample(image, rows, columns, border)


def sample(
  image: chex.Array, rows: chex.Array, columns: chex.Array, border: Border
) -> chex.Array:
  """Interpolate [H, W, c] bilinearly at fractional positions.

  All channels of a pixel are read together, which is faster on a CPU than one
  call of jax.scipy.ndimage.map_coordinates per channel.

  Args:
    image: [H, W, c].
    rows: [H', W'] vertical positions in pixels, any finite numbers.
    columns: [H', W'] horizontal positions in pixels, any finite numbers.
    border: extends the image beyond its edges.

  Returns:
    [H', W', c].
  """
  height, width, channels = image.shape
  pixels = image.reshape(height * width, channels)
  parts = [
    (down * right)[..., None]
    * jnp.take(pixels, row * width + column, axis=0, mode='clip')
    for row, down in _adjacent_pixels(rows, height, border)
    for column, right in _adjacent_pixels(columns, width, border)
  ]
  return sum(parts[1:], parts[0])


def _adjacent_pixels(
  positions: chex.Array, size: int, border: Border
) -> list[tuple[chex.Array, chex.Array]]:
  """Return index and weight [...] of the pixels on either side of [...]."""
  before = jnp.floor(positions)
  fraction = positions - before
  index = before.astype(jnp.int32)
  return [border(index, 1 - fraction, size), border(index + 1, fraction, size)]


def zeros(index: chex.Array, weight: chex.Array, size: int):
  """Pad with zeros: BORDER_CONSTANT in OpenCV, grid-constant in SciPy."""
  inside = (index >= 0) & (index < size)
  return jnp.clip(index, 0, size - 1), jnp.where(inside, weight, 0.0)


def wrap(index: chex.Array, weight: chex.Array, size: int):
  """Repeat abcd|abcd|abcd: BORDER_WRAP in OpenCV, grid-wrap in SciPy."""
  return index % size, weight


def reflect(index: chex.Array, weight: chex.Array, size: int):
  """Mirror dcba|abcd|dcba: BORDER_REFLECT in OpenCV, reflect in SciPy."""
  position = index % (2 * size)
  return jnp.minimum(position, 2 * size - 1 - position), weight


def wrap_or_reflect(wraps: chex.Array) -> Border:
  """Return the border `wrap` where `wraps` [] is true, else `reflect`."""

  def border(index: chex.Array, weight: chex.Array, size: int):
    wrapped, _ = wrap(index, weight, size)
    reflected, _ = reflect(index, weight, size)
    return jnp.where(wraps, wrapped, reflected), weight

  return border


def zoom(crop: float = 0.2) -> Augmentation:
  """Crop up to a share `crop` of each side and enlarge again (LbA, STL-10).

  The window is ⌊(1 - u) H⌋ by ⌊(1 - u) W⌋ pixels with one u ~ U(0, crop), and
  every position is equally likely. It is enlarged to [H, W, c] by TensorFlow
  1's nearest neighbour rule: row i of the result is row ⌊i h / H⌋ of the h rows
  of the window.

  Args:
    crop: the largest share, in [0, 1); 0.2 in LbA.
  """
  errors.fraction(crop=crop)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    key_size, key_row, key_column = jax.random.split(key, 3)
    share = 1 - float(crop) * jax.random.uniform(key_size)
    rows = _zoom_indices(key_row, image.shape[0], share)
    columns = _zoom_indices(key_column, image.shape[1], share)
    return image[rows[:, None], columns[None, :]]

  return apply


def _zoom_indices(
  key: chex.PRNGKey, size: int, share: chex.Array
) -> chex.Array:
  """Return indices [size] that enlarge a random window of `share * size`."""
  # Rounding must not add a pixel, and an empty window cannot be enlarged.
  length = jnp.clip(jnp.floor(share * size).astype(jnp.int32), 1, size)
  start = jax.random.randint(key, (), 0, size - length + 1)
  return start + jnp.arange(size) * length // size
