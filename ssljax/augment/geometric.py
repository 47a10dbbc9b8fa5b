"""Random changes of where the pixels of one image are.

Augmentations as in augment.py: pure functions (key, image [H, W, c]) ->
[H, W, c] and factories of them. They all read the image at other places, in
pixels from the centre of its top left pixel; an x counts to the right and is
along W, a y counts down and is along H.

MA-DNN   Chen, Zhu, Gong, ECCV 2018, on SVHN:  rotate()
LbA      Haeusser, Mordvintsev, Cremers, CVPR 2017, released train.py at the
         commit bfe5398:
           SVHN    affine(), then augment.blur()
           STL-10  tilt(), zoom(), then the rest of augment.stl10()
DeepBASS Rottmann, Kahl, Gottschalk 2018, on MNIST:  turn_and_scale()
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ssljax import errors

Augmentation = Callable[[chex.PRNGKey, chex.Array], chex.Array]
# A border continues an image of `size` pixels along one axis: (index [...]
# int32 of a pixel that may lie outside, weight [...] of it, size) -> the index
# in 0 .. size - 1 of the pixel to read instead and the weight that is left.
Border = Callable[[chex.Array, chex.Array, int], tuple[chex.Array, chex.Array]]
# A 2x2 matrix of [] scalars; it acts on (x, y).
Matrix = tuple[
  tuple[chex.Numeric, chex.Numeric], tuple[chex.Numeric, chex.Numeric]
]

# Matrices whose determinant is closer to 0 are not inverted as they are: they
# would squeeze an image onto less than a thousandth of its area.
LEAST_DETERMINANT = 1e-3


def rotate(angle: float = 0.2) -> Augmentation:
  """Turns about the centre by U(-angle, angle) radians (MA-DNN on SVHN)."""
  errors.non_negative(angle=angle)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    drawn = jax.random.uniform(key, minval=-float(angle), maxval=float(angle))
    return turn(image, drawn)

  return apply


def turn(image: chex.Array, angle: chex.Numeric) -> chex.Array:
  """[H, W, c] turned counter-clockwise by `angle` [] radians.

  Bilinear; what lies outside the image is 0, as in tf.contrib.image.rotate.
  `pix.rotate` is not used: it interpolates between channels as well, which
  takes 20 times as long, and refuses strict dtype promotion.
  """
  height, width, _ = image.shape
  middle = (width - 1) / 2, (height - 1) / 2
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return _pull(image, ((cos, -sin), (sin, cos)), (0.0, 0.0), middle, zeros)


def turn_and_scale(degrees: float = 10.0, scale: float = 0.05) -> Augmentation:
  """Turns by U(-degrees, degrees) and scales each side (DeepBASS on MNIST).

  Height and width become U(1 - scale, 1 + scale) of themselves, each apart,
  about the centre; then it is turned. Bilinear, with zeros outside.

  Args:
    degrees: 10 in DeepBASS.
    scale: in [0, 1); 0.05 in DeepBASS.
  """
  errors.non_negative(degrees=degrees)
  errors.fraction(scale=scale)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    angle, wide, high = jax.random.uniform(key, (3,), minval=-1.0)
    angle = angle * float(degrees) * jnp.pi / 180
    width, height = 1 + float(scale) * wide, 1 + float(scale) * high
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # Where a pixel was: turned back, then scaled back.
    inverse = (cos / width, -sin / width), (sin / height, cos / height)
    middle = (image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2
    return _pull(image, inverse, (0.0, 0.0), middle, zeros)

  return apply


def affine(scale: float = 0.15, shift: float = 2.0) -> Augmentation:
  """LbA's random affine map (SVHN), wrapped or reflected at the border.

  The map is `warp`'s with the matrix I + scale N(0, 1), each of the four
  entries apart, and the shift N(0, shift²) px along each axis. One of the two
  borders is drawn for each image, with probability 1/2.

  Args:
    scale: deviation of an entry of the matrix; 0.15 in LbA.
    shift: deviation of the shift in pixels; 2 in LbA.
  """
  errors.non_negative(scale=scale, shift=shift)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    matrix, moved, wraps = draw_affine(key, float(scale), float(shift))
    return warp(image, matrix, moved, wrap_or_reflect(wraps))

  return apply


def draw_affine(
  key: chex.PRNGKey, scale: float, shift: float
) -> tuple[Matrix, tuple[chex.Array, chex.Array], chex.Array]:
  """Draws `affine`'s matrix, (right, down) [] px, and [] bool: does it wrap?"""
  # One draw, as each costs compile time; the sign of the last is a fair coin.
  a, b, c, d, right, down, coin = jax.random.normal(key, (7,))
  matrix = (1 + scale * a, scale * b), (scale * c, 1 + scale * d)
  return matrix, (shift * right, shift * down), coin > 0


def tilt(degrees: float = 10.0) -> Augmentation:
  """Turns by U(-degrees, degrees), with zeros outside (LbA on STL-10).

  `rotate` but for the centre, which is that of `warp`.
  """
  errors.non_negative(degrees=degrees)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    most = float(degrees) * jnp.pi / 180
    angle = jax.random.uniform(key, minval=-most, maxval=most)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return warp(image, ((cos, sin), (-sin, cos)), (0.0, 0.0), zeros)

  return apply


def warp(
  image: chex.Array,
  matrix: Matrix,
  shift: tuple[chex.Numeric, chex.Numeric],
  border: Border,
) -> chex.Array:
  """[H, W, c] moved, pixel p to M (p - m) + m + shift, as LbA moves it.

  The middle m = (W/2, H/2) is LbA's, half a pixel to the right of and below the
  centre of the image. Bilinear, as cv2.warpAffine: OpenCV 5.0 gives the same,
  while 4.8 (and those of 2017) round the places they read to 1/32 of a pixel.

  Args:
    image: [H, W, c].
    matrix: M; its inverse is read, changed where M is close to singular.
    shift: (right, down), each [] px.
    border: what lies outside.
  """
  height, width, _ = image.shape
  middle = width / 2, height / 2
  return _pull(image, _invert(matrix), shift, middle, border)


def _invert(matrix: Matrix) -> Matrix:
  """The inverse; a finite matrix where there is none."""
  (a, b), (c, d) = matrix
  determinant = a * d - b * c
  safe = jnp.where(
    jnp.abs(determinant) < LEAST_DETERMINANT, LEAST_DETERMINANT, determinant
  )
  return (d / safe, -b / safe), (-c / safe, a / safe)


def _pull(
  image: chex.Array,
  matrix: Matrix,
  shift: tuple[chex.Numeric, chex.Numeric],
  middle: tuple[float, float],
  border: Border,
) -> chex.Array:
  """[H, W, c] whose pixel p is the image's at M (p - m - shift) + m."""
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
  """Bilinear values of [H, W, c] at fractional places.

  Reads the channels of a pixel together, which is faster on a CPU than
  jax.scipy.ndimage.map_coordinates for each of them.

  Args:
    image: [H, W, c].
    rows: [H', W'] in pixels, any finite number.
    columns: [H', W'] likewise.
    border: what lies outside.

  Returns:
    [H', W', c].
  """
  height, width, channels = image.shape
  pixels = image.reshape(height * width, channels)
  parts = [
    (down * right)[..., None]
    * jnp.take(pixels, row * width + column, axis=0, mode='clip')
    for row, down in _neighbours(rows, height, border)
    for column, right in _neighbours(columns, width, border)
  ]
  return sum(parts[1:], parts[0])


def _neighbours(
  places: chex.Array, size: int, border: Border
) -> list[tuple[chex.Array, chex.Array]]:
  """Index and weight [...] of the pixels before and after each place [...]."""
  before = jnp.floor(places)
  past = places - before
  index = before.astype(jnp.int32)
  return [border(index, 1 - past, size), border(index + 1, past, size)]


def zeros(index: chex.Array, weight: chex.Array, size: int):
  """Black outside: OpenCV's BORDER_CONSTANT, SciPy's grid-constant."""
  inside = (index >= 0) & (index < size)
  return jnp.clip(index, 0, size - 1), jnp.where(inside, weight, 0.0)


def wrap(index: chex.Array, weight: chex.Array, size: int):
  """abcd|abcd|abcd: OpenCV's BORDER_WRAP, SciPy's grid-wrap."""
  return index % size, weight


def reflect(index: chex.Array, weight: chex.Array, size: int):
  """dcba|abcd|dcba: OpenCV's BORDER_REFLECT, SciPy's reflect."""
  place = index % (2 * size)
  return jnp.minimum(place, 2 * size - 1 - place), weight


def wrap_or_reflect(wraps: chex.Array) -> Border:
  """`wrap` where `wraps` [] bool, else `reflect`."""

  def border(index: chex.Array, weight: chex.Array, size: int):
    wrapped, _ = wrap(index, weight, size)
    reflected, _ = reflect(index, weight, size)
    return jnp.where(wraps, wrapped, reflected), weight

  return border


def zoom(crop: float = 0.2) -> Augmentation:
  """Crops up to a share `crop` of each side and enlarges again (LbA, STL-10).

  With one u ~ U(0, crop) the window is ⌊(1 - u) H⌋ by ⌊(1 - u) W⌋, every place
  of it equally likely. It becomes [H, W, c] by TensorFlow 1's nearest
  neighbours: of h rows the row ⌊i h / H⌋ is the i-th.

  Args:
    crop: in [0, 1); 0.2 in LbA.
  """
  errors.fraction(crop=crop)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    key_size, key_row, key_column = jax.random.split(key, 3)
    left = 1 - float(crop) * jax.random.uniform(key_size)
    rows = _window(key_row, image.shape[0], left)
    columns = _window(key_column, image.shape[1], left)
    return image[rows[:, None], columns[None, :]]

  return apply


def _window(key: chex.PRNGKey, size: int, share: chex.Array) -> chex.Array:
  """[size] the pixels that a random window of this share is enlarged from."""
  # Rounding must not add a pixel; a window of none could not be enlarged.
  length = jnp.clip(jnp.floor(share * size).astype(jnp.int32), 1, size)
  start = jax.random.randint(key, (), 0, size - length + 1)
  return start + jnp.arange(size) * length // size
