"""Standard augmentations: flip, translation, cutout, noise, blur, colours.

The module also has `to_float`, which converts uint8 pixels, and `chain`, which
composes augmentations.

An augmentation is a pure function (key, image [H, W, c]) -> [H, W, c], float32
in and out, values in [0, 1] unless stated otherwise. A train step applies it
inside its compiled program, with one key per row of the batch:

  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
  jax.vmap(augmentation)(keys, images)

A row's result therefore depends only on its own key and image. Factories
validate their arguments immediately and return an augmentation.

MA-DNN   Chen, Zhu, Gong, ECCV 2018, released preprocessing:
           CIFAR  chain(flip, crop_or_resize(), distort)
           SVHN   chain(geometric.rotate(), crop_or_resize(), distort)
TE, MT   Laine, Aila, ICLR 2017; Tarvainen, Valpola, NeurIPS 2017:
           CIFAR  chain(translate(2), flip, noise(0.15))
           SVHN   chain(translate(2), noise(0.15))
R2-D2    Wang, Wu, AAAI 2021, after preprocess.standardize:
           stages 1, 3  chain(translate(4), flip, cutout(16))
           stage 2      chain(translate(4), flip)
LbA      Haeusser, Mordvintsev, Cremers, CVPR 2017, released train.py at the
         commit bfe5398:
           SVHN    chain(geometric.affine(), blur())
           STL-10  stl10()
"""

import itertools
import operator
from typing import cast

import chex
import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np

from ssljax import errors
from ssljax.augment import geometric

Augmentation = geometric.Augmentation

# MA-DNN's colour distortion: a brightness change in [-BRIGHTNESS, BRIGHTNESS)
# and factors in FACTORS for contrast and saturation, in one of the ORDERS.
BRIGHTNESS = 63 / 255
FACTORS = (0.2, 1.8)
ORDERS = tuple(itertools.permutations(('brightness', 'saturation', 'contrast')))
# [6, 2] bool: for each order, whether brightness and contrast come before
# saturation.
PRECEDES = np.array(
  [
    [
      order.index(name) < order.index('saturation')
      for name in ('brightness', 'contrast')
    ]
    for order in ORDERS
  ]
)
# OpenCV's kernels for a size without sigma, before division by their sums.
OPENCV_KERNELS = {
  1: (1,),
  3: (1, 2, 1),
  5: (1, 4, 6, 4, 1),
  7: (2, 7, 14, 18, 14, 7, 2),
  9: (4, 13, 30, 51, 60, 51, 30, 13, 4),
}


def to_float(image: chex.Array) -> chex.Array:
  """Convert uint8 [...] to float32 in [0, 1]; return float32 unchanged."""
  if image.dtype == jnp.float32:
    return jnp.asarray(image)
  chex.assert_type(image, jnp.uint8)
  return jnp.asarray(image).astype(jnp.float32) / 255


def chain(*augmentations: Augmentation) -> Augmentation:
  """Apply augmentations in turn, each with its own key; identity if none."""

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    keys = jax.random.split(key, len(augmentations)) if augmentations else ()
    for augmentation, subkey in zip(augmentations, keys, strict=True):
      image = augmentation(subkey, image)
    return image

  return apply


def flip(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
  """Mirror [H, W, c] left to right with probability 1/2."""
  return pix.random_flip_left_right(key, image)


def translate(amount: int) -> Augmentation:
  """Shift by U{-amount..amount} whole pixels per axis, reflecting the border.

  Args:
    amount: the largest shift; 2 in TE and MT, 4 in R2-D2.
  """
  amount = _check_whole_number(amount=amount)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    return _crop(key, _reflect(image, amount), image.shape)

  return apply


def crop_or_resize(pad: int = 2) -> Augmentation:
  """Shift or zoom, with probability 1/2 each (MA-DNN).

  The image is padded by reflection to [H + 2 pad, W + 2 pad, c]. The result
  [H, W, c] is either a random crop of the padded image or the whole padded
  image resized bilinearly. Here the coordinates of a pixel are those of its
  centre; TensorFlow 1 used the top left corner, which moves a zoomed 32x32
  image by 1/16 of a pixel.

  Args:
    pad: pixels of padding on each side; 2 in MA-DNN.
  """
  pad = _check_whole_number(pad=pad)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    key_which, key_crop = jax.random.split(key)
    padded = _reflect(image, pad)
    crop = _crop(key_crop, padded, image.shape)
    # Under vmap a conditional computes both branches anyway.
    return jnp.where(
      jax.random.bernoulli(key_which), crop, resize(padded, image.shape)
    )

  return apply


def resize(image: chex.Array, shape: tuple[int, ...]) -> chex.Array:
  """Resize bilinearly without antialiasing when shrinking, as TensorFlow 1."""
  return jax.image.resize(image, shape, 'bilinear', antialias=False)


def noise(sigma: float = 0.15) -> Augmentation:
  """Add N(0, sigma²) to every value (TE, MT); results may leave [0, 1]."""
  errors.non_negative(sigma=sigma)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    return image + float(sigma) * jax.random.normal(
      key, image.shape, image.dtype
    )

  return apply


def cutout(size: int | float = 16) -> Augmentation:
  """Set one square with a random centre in the image to zero.

  DeVries, Taylor 2017 (arXiv:1708.04552), section 3.2; R2-D2 uses the default.
  As in their code, cutout follows the preprocessing: after
  `preprocess.standardize` a zero is the training set's mean of the channel,
  without preprocessing it is black. FixMatch's square has half the side of the
  image: 0.5.

  Args:
    size: side of the square, a whole number of pixels, or a number in (0, 1),
      the share of the image's shorter side, rounded to pixels; the square is
      clipped at the border.
  """
  if not 0 < size < 1:
    size = _check_whole_number(size=cast(int, size))

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    shorter = min(image.shape[:2])
    side = size if isinstance(size, int) else round(size * shorter)
    errors.require(
      side < shorter,
      f'`cutout`: a square of {side} pixels can cover a whole image of '
      f'{image.shape[0]}x{image.shape[1]} pixels: give a smaller one, or 0 for '
      'no cutout',
    )
    centre = jax.random.randint(key, (2,), 0, np.array(image.shape[:2]))
    return jnp.where(square_mask(image.shape, centre, side), 0.0, image)

  return apply


def square_mask(
  shape: tuple[int, int, int], centre: chex.Array, size: chex.Numeric
) -> chex.Array:
  """Return a mask of rows and columns c − ⌊size/2⌋ .. c − ⌊size/2⌋ + size − 1.

  The authors' squares of odd size are one pixel smaller; even sizes agree.

  Args:
    shape: (H, W, c) of the image.
    centre: [2] row and column c.
    size: side of the square in pixels.

  Returns:
    bool [H, W, 1].
  """
  down, right = (
    (jnp.arange(length) >= start) & (jnp.arange(length) < start + size)
    for length, start in zip(shape[:2], centre - size // 2, strict=True)
  )
  return down[:, None, None] & right[None, :, None]


def distort(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
  """Apply MA-DNN's colour distortion to [H, W, c] and clip to [0, 1]."""
  return jnp.clip(recolour(image, *draw_colours(key)), 0.0, 1.0)


def draw_colours(key: chex.PRNGKey) -> tuple[chex.Array, ...]:
  """Draw order, brightness, saturation, contrast, each [], for `recolour`."""
  # A single draw of four numbers, because each generator costs compile time.
  order, brightness, saturation, contrast = jax.random.uniform(key, (4,))
  low, high = FACTORS
  return (
    jnp.floor(order * len(ORDERS)).astype(jnp.int32),
    BRIGHTNESS * (2 * brightness - 1),
    low + (high - low) * saturation,
    low + (high - low) * contrast,
  )


def recolour(
  image: chex.Array,
  order: chex.Numeric,
  brightness: chex.Numeric,
  saturation: chex.Numeric,
  contrast: chex.Numeric,
) -> chex.Array:
  """Change the colours of [H, W, c] in the order ORDERS[order], unclipped.

  A change of contrast about the mean of each channel commutes with a change of
  brightness: f (x + b - (m + b)) + m + b = f (x - m) + m + b. An order
  therefore only determines which of the two precede the change of saturation.
  One change of saturation between two affine maps replaces six branches, all of
  which vmap would compute.

  Args:
    image: [H, W, c].
    order: [] int32, index into ORDERS.
    brightness: [] number added to every value.
    saturation: [] factor for the HSV saturation, at least 0.
    contrast: [] factor for the distance from the channel's mean.
  """
  bright_first, contrast_first = jnp.asarray(PRECEDES)[order]
  image = _adjust(
    image,
    jnp.where(bright_first, brightness, 0.0),
    jnp.where(contrast_first, contrast, 1.0),
  )
  image = saturate(image, saturation)
  return _adjust(
    image,
    jnp.where(bright_first, 0.0, brightness),
    jnp.where(contrast_first, 1.0, contrast),
  )


def _adjust(
  image: chex.Array, brightness: chex.Numeric, contrast: chex.Numeric
) -> chex.Array:
  """Return f (x - m) + m + b for x [H, W, c] with channel means m."""
  return pix.adjust_brightness(pix.adjust_contrast(image, contrast), brightness)


def saturate(image: chex.Array, factor: chex.Numeric) -> chex.Array:
  """Multiply the HSV saturation of [H, W, c], limited to 1; grey stays grey.

  With value v = max(r, g, b) and saturation s = (v - min(r, g, b)) / v, every
  channel's distance v - x is proportional to s at a fixed hue. Multiplying
  v - x by the factor therefore multiplies s by it, without computing the hue.
  Where v ≤ 0, s is 0 and the pixel becomes (v, v, v), as in TensorFlow. An
  image of one channel does not change. `pix.adjust_saturation` gives the same
  values but fails under strict dtype promotion.
  """
  value = jnp.max(image, axis=-1, keepdims=True)
  chroma = value - jnp.min(image, axis=-1, keepdims=True)
  # s * factor ≤ 1 means factor ≤ 1 / s. A grey pixel has chroma 0.
  limit = jnp.maximum(value, 0.0) / jnp.where(chroma > 0, chroma, 1.0)
  return value - jnp.minimum(factor, limit) * (value - image)


def blur(
  size: int = 7, sigma: float | None = None, probability: float = 0.5
) -> Augmentation:
  """Blur an image with some probability, as cv2.GaussianBlur (LbA on SVHN).

  The border is reflected without repeating the edge, which is OpenCV's default.
  `pix.gaussian_blur` is not used: it pads with zeros or returns a smaller
  image, and only offers the exact Gaussian kernel.

  Args:
    size: of the kernel in pixels, odd; 7 in LbA.
    sigma: as in `gaussian`. LbA leaves it to OpenCV, whose kernel of size 7 is
      close to a Gaussian of sigma 1.4.
    probability: of a blur; 1/2 in LbA.
  """
  weights = gaussian(size, sigma)
  errors.probability(probability=probability)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    down, right = (_blur_matrix(weights, size) for size in image.shape[:2])
    blurred = jnp.einsum(
      'ih,hwc,jw->ijc',
      down,
      image,
      right,
      precision=jax.lax.Precision.HIGHEST,  # not TF32
    )
    return jnp.where(
      jax.random.bernoulli(key, float(probability)), blurred, image
    )

  return apply


def gaussian(size: int, sigma: float | None = None) -> tuple[float, ...]:
  """Return kernel weights [size] that sum to 1, as cv2.getGaussianKernel.

  Args:
    size: in pixels, odd, below 1000.
    sigma: in pixels, above 0. None selects OpenCV's own choice: fixed kernels
      up to size 9 and sigma 0.3 ((size - 1) / 2 - 1) + 0.8 for larger sizes.
  """
  errors.require(
    _check_whole_number(size=size) % 2 == 1,
    f'`size`={size}: give an odd number of pixels',
  )
  errors.require(size < 1000, f'`size`={size}: give a size below 1000 pixels')
  if sigma is not None:
    errors.positive(sigma=sigma)
  if sigma is None and size in OPENCV_KERNELS:
    weights = np.array(OPENCV_KERNELS[size], np.float64)
  else:
    deviation = sigma or 0.3 * ((size - 1) / 2 - 1) + 0.8
    distance = np.arange(size) - (size - 1) / 2
    weights = np.exp(-(distance**2) / (2 * deviation**2))
  return tuple((weights / weights.sum()).tolist())


def _blur_matrix(weights: tuple[float, ...], size: int) -> chex.Array:
  """Return the matrix [size, size] that blurs `size` reflected pixels.

  Within a chain, a matrix product is five times as fast on a CPU as a sum of
  shifted images: XLA copies the computation that precedes the blur into every
  term of such a sum.
  """
  sources = np.pad(np.arange(size), len(weights) // 2, mode='reflect')
  matrix = np.zeros((size, size), np.float32)
  for first, weight in enumerate(weights):
    matrix[np.arange(size), sources[first : first + size]] += weight
  return jnp.asarray(matrix)


def stl10(
  degrees: float = 10.0,
  crop: float = 0.2,
  brightness: float = 1.3,
  saturation: tuple[float, float] = (0.5, 1.2),
  hue: float = 0.1,
  grey: float = 0.5,
) -> Augmentation:
  """Rotate, crop and enlarge, change colours, mirror (LbA on STL-10).

  The order of the four, the bilinear rotation with zeros outside, and the
  nearest neighbour interpolation of the crop follow the released code. For the
  arguments see `geometric.tilt`, `geometric.zoom` and `jitter`.
  """
  return chain(
    geometric.tilt(degrees),
    geometric.zoom(crop),
    jitter(brightness, saturation, hue, grey),
    flip,
  )


def jitter(
  brightness: float = 1.3,
  saturation: tuple[float, float] = (0.5, 1.2),
  hue: float = 0.1,
  grey: float = 0.5,
) -> Augmentation:
  """Change brightness, saturation, hue and grey; clip to [0, 1] (LbA, STL-10).

  The released code gives the numbers, but the functions that use them were not
  released. [inferred]: they are those of tf.image, applied in the order of the
  arguments, followed by clipping. If the image does not have 3 channels, only
  the brightness changes.

  Args:
    brightness: U(-brightness, brightness) of 256 grey levels is added, because
      LbA's networks take pixels in 0 .. 255 [inferred]. The effect of 1.3 is
      hardly visible.
    saturation: (low, high). The HSV saturation is multiplied by U(low, high).
    hue: the hue is shifted by U(-hue, hue) turns.
    grey: probability that the luma replaces all channels.
  """
  errors.non_negative(brightness=brightness, hue=hue)
  low, high = map(float, saturation)
  errors.non_negative(saturation=low)
  errors.non_negative(saturation=high)
  check_order(saturation=(low, high))
  errors.probability(grey=grey)
  max_change, max_turns = float(brightness) / 255, float(hue)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    # A single draw, as in `draw_colours`.
    light, colour, turn, shade = jax.random.uniform(key, (4,))
    image = pix.adjust_brightness(image, max_change * (2 * light - 1))
    if image.shape[-1] == 3:
      image = saturate(image, low + (high - low) * colour)
      image = turn_hue(image, max_turns * (2 * turn - 1))
      luma = pix.rgb_to_grayscale(image, keep_dims=True)
      image = jnp.where(shade < float(grey), luma, image)
    return jnp.clip(image, 0.0, 1.0)

  return apply


def check_order(**ranges: tuple[float, float]) -> None:
  """Raise InputError, naming the parameter, unless low ≤ high."""
  for name, (low, high) in ranges.items():
    errors.require(
      low <= high, f'`{name}`={low},{high}: give the lower number first'
    )


def turn_hue(
  image: chex.Array, turns: chex.Numeric, channel_axis: int = -1
) -> chex.Array:
  """Add [] turns to the HSV hue of an image with 3 channels.

  Args:
    image: [H, W, 3], or with its channels along another axis.
    turns: [] 1 is the full circle of hues.
    channel_axis: the axis of the channels.
  """
  # `pix` adds booleans to floats, which strict dtype promotion forbids.
  with jax.numpy_dtype_promotion('standard'):
    return pix.adjust_hue(image, turns, channel_axis=channel_axis)


def _reflect(image: chex.Array, pad: int) -> chex.Array:
  """Pad [H, W, c] to [H + 2 pad, W + 2 pad, c], not repeating the edge."""
  height, width, _ = image.shape
  # Tracing takes a step for each reflection, of which more than one makes no
  # sense; only the smallest images may have several, as in version 0.1.
  most = max(4, min(height, width) - 1)
  errors.require(
    pad <= most,
    f'{pad} pixels are too many for images of {height}x{width} pixels: give at '
    f'most {most}',
  )
  return jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode='reflect')


def _crop(
  key: chex.PRNGKey, image: chex.Array, shape: tuple[int, int, int]
) -> chex.Array:
  """Return a crop `shape` of the image, every position equally likely.

  `pix.random_crop` does the same but draws from one key per axis, including the
  channels, and takes twice as long to compile.
  """
  margin = np.subtract(image.shape[:2], shape[:2])
  top, left = jax.random.randint(key, (2,), 0, margin + 1)
  return jax.lax.dynamic_slice(image, (top, left, 0), shape)


def _check_whole_number(**parameters: int) -> int:
  """Return the one value given; raise InputError unless it is 0, 1, 2, ..."""
  errors.non_negative(**parameters)
  ((name, value),) = parameters.items()
  errors.require(
    isinstance(value, (int, np.integer)),
    f'`{name}`={value}: give a whole number of pixels',
  )
  return operator.index(value)
