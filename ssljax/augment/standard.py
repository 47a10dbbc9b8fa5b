"""Random changes of one image that keep its class.

An augmentation is a pure function (key, image [H, W, c]) -> [H, W, c], float32
in and out, values in [0, 1] unless it says otherwise. A train step applies it
inside its compiled program, with one key per row of the batch:

  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
  jax.vmap(augmentation)(keys, images)

so a row's result depends on its own key and image only. Factories check their
numbers at once and return an augmentation.

MA-DNN   Chen, Zhu, Gong, ECCV 2018, released preprocessing:
           CIFAR  chain(flip, crop_or_resize(), distort)
           SVHN   chain(warp.rotate(), crop_or_resize(), distort)
TE, MT   Laine, Aila, ICLR 2017; Tarvainen, Valpola, NeurIPS 2017:
           CIFAR  chain(translate(2), flip, noise(0.15))
           SVHN   chain(translate(2), noise(0.15))
R2-D2    Wang, Wu, AAAI 2021, after preprocess.standardize:
           stages 1, 3  chain(translate(4), flip, cutout(16))
           stage 2      chain(translate(4), flip)
LbA      Haeusser, Mordvintsev, Cremers, CVPR 2017, released train.py at the
         commit bfe5398:
           SVHN    chain(warp.affine(), blur())
           STL-10  stl10()
"""

import itertools
import operator

import chex
import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np

from ssljax import errors
from ssljax.augment import geometric

Augmentation = geometric.Augmentation

# MA-DNN's colour distortion: an additive change in [-BRIGHTNESS, BRIGHTNESS)
# and a factor of contrast and of saturation in FACTORS, in any of the ORDERS.
BRIGHTNESS = 63 / 255
FACTORS = (0.2, 1.8)
ORDERS = tuple(itertools.permutations(('brightness', 'saturation', 'contrast')))
# [6, 2] of each order: do brightness and contrast precede saturation?
PRECEDES = np.array(
  [
    [
      order.index(name) < order.index('saturation')
      for name in ('brightness', 'contrast')
    ]
    for order in ORDERS
  ]
)
# OpenCV's kernels of sizes where no sigma is asked for; / their sums.
OPENCV_KERNELS = {
  1: (1,),
  3: (1, 2, 1),
  5: (1, 4, 6, 4, 1),
  7: (2, 7, 14, 18, 14, 7, 2),
  9: (4, 13, 30, 51, 60, 51, 30, 13, 4),
}


def to_float(image: chex.Array) -> chex.Array:
  """uint8 [...] -> float32 [...] in [0, 1]; float32, of no image, as it is."""
  if image.dtype == jnp.float32:
    return jnp.asarray(image)
  chex.assert_type(image, jnp.uint8)
  return jnp.asarray(image).astype(jnp.float32) / 255


def chain(*augmentations: Augmentation) -> Augmentation:
  """Applies them in turn, each with its own part of the key; none: identity."""

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    keys = jax.random.split(key, len(augmentations)) if augmentations else ()
    for augmentation, own_key in zip(augmentations, keys, strict=True):
      image = augmentation(own_key, image)
    return image

  return apply


def flip(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
  """Mirrors [H, W, c] left to right with probability 1/2."""
  return pix.random_flip_left_right(key, image)


def translate(amount: int) -> Augmentation:
  """Shifts by whole pixels U{-amount..amount} per axis, reflecting the border.

  Args:
    amount: the largest shift; 2 in TE and MT, 4 in R2-D2.
  """
  amount = _whole(amount=amount)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    return _crop(key, _reflect(image, amount), image.shape)

  return apply


def crop_or_resize(pad: int = 2) -> Augmentation:
  """MA-DNN's shift or zoom, with probability 1/2 each.

  The image is padded by reflection to [H + 2 pad, W + 2 pad, c]; then either a
  random crop or the whole, resized bilinearly, becomes [H, W, c] again. Pixels
  are points at their centres; TensorFlow 1 put them at their top left corners,
  which moves a zoomed 32x32 image by 1/16 of a pixel.
  """
  pad = _whole(pad=pad)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    key_which, key_crop = jax.random.split(key)
    padded = _reflect(image, pad)
    crop = _crop(key_crop, padded, image.shape)
    # Under vmap a branch costs as much as both of its sides.
    return jnp.where(
      jax.random.bernoulli(key_which), crop, resize(padded, image.shape)
    )

  return apply


def resize(image: chex.Array, shape: tuple[int, ...]) -> chex.Array:
  """Bilinear, as TensorFlow 1 does it: without smoothing when it shrinks."""
  return jax.image.resize(image, shape, 'bilinear', antialias=False)


def noise(sigma: float = 0.15) -> Augmentation:
  """Adds N(0, sigma²) to every value (TE, MT); leaves [0, 1]."""
  errors.non_negative(sigma=sigma)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    return image + float(sigma) * jax.random.normal(
      key, image.shape, image.dtype
    )

  return apply


def cutout(size: int = 16) -> Augmentation:
  """Zeroes one square, wherever its centre falls in the image.

  DeVries, Taylor 2017 (arXiv:1708.04552), section 3.2; R2-D2 has the default.
  Augmentations follow the preprocessing, as theirs does: after
  `preprocess.standardize` a zero is the training set's mean of its channel,
  without any preprocessing it is black.

  Args:
    size: of the square in pixels; what leaves the image is cut off.
  """
  size = _whole(size=size)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    errors.require(
      size < min(image.shape[:2]),
      f'`cutout`: a hole of {size} pixels hides images of '
      f'{image.shape[0]}x{image.shape[1]}: give a smaller one, or none',
    )
    centre = jax.random.randint(key, (2,), 0, np.array(image.shape[:2]))
    return jnp.where(square(image.shape, centre, size), 0.0, image)

  return apply


def square(
  shape: tuple[int, int, int], centre: chex.Array, size: int
) -> chex.Array:
  """Marks rows and columns c − ⌊size/2⌋ .. c − ⌊size/2⌋ + size − 1 of an image.

  An odd square of the authors' is a pixel smaller, an even one the same.

  Args:
    shape: (H, W, c).
    centre: [2] row and column c.
    size: in pixels.

  Returns:
    bool [H, W, 1].
  """
  down, right = (
    (jnp.arange(length) >= start) & (jnp.arange(length) < start + size)
    for length, start in zip(shape[:2], centre - size // 2, strict=True)
  )
  return down[:, None, None] & right[None, :, None]


def distort(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
  """MA-DNN's colour distortion of [H, W, c], clipped to [0, 1]."""
  return jnp.clip(recolour(image, *draw_colours(key)), 0.0, 1.0)


def draw_colours(key: chex.PRNGKey) -> tuple[chex.Array, ...]:
  """Draws order, brightness, saturation, contrast, each [], for `recolour`."""
  # One draw of four numbers in [0, 1): each generator costs compile time.
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
  """Changes the colours of [H, W, c] in the order ORDERS[order]; no clipping.

  Contrast about the mean of each channel commutes with a change of brightness:
  f (x + b - (m + b)) + m + b = f (x - m) + m + b. So all that matters of an
  order is which of the two precede the change of saturation: six branches,
  which vmap would all compute, become one saturation between two affine maps.

  Args:
    image: [H, W, c].
    order: [] a row of ORDERS.
    brightness: [] what is added.
    saturation: [] the factor of the HSV saturation, at least 0.
    contrast: [] the factor of the distance to the channel's mean.
  """
  lit, stretched = jnp.asarray(PRECEDES)[order]
  image = _affine(
    image, jnp.where(lit, brightness, 0.0), jnp.where(stretched, contrast, 1.0)
  )
  image = saturate(image, saturation)
  return _affine(
    image, jnp.where(lit, 0.0, brightness), jnp.where(stretched, 1.0, contrast)
  )


def _affine(
  image: chex.Array, brightness: chex.Numeric, contrast: chex.Numeric
) -> chex.Array:
  """[H, W, c] -> f (x - m) + m + b, with m the mean of each channel."""
  return pix.adjust_brightness(pix.adjust_contrast(image, contrast), brightness)


def saturate(image: chex.Array, factor: chex.Numeric) -> chex.Array:
  """Multiplies the HSV saturation of [H, W, c], cut off at 1; grey stays grey.

  With value v = max(r, g, b) and saturation s = (v - min(r, g, b)) / v, at a
  fixed hue every channel's distance v - x is proportional to s. The factor of s
  is therefore that of v - x, and hue is not needed. Where v ≤ 0, s is 0 and the
  pixel becomes (v, v, v), as in TensorFlow. One channel is left as it is.
  `pix.adjust_saturation` equals this but refuses strict dtype promotion.
  """
  value = jnp.max(image, axis=-1, keepdims=True)
  spread = value - jnp.min(image, axis=-1, keepdims=True)
  # s * factor ≤ 1 is factor ≤ 1 / s; a grey pixel has no distance to scale.
  most = jnp.maximum(value, 0.0) / jnp.where(spread > 0, spread, 1.0)
  return value - jnp.minimum(factor, most) * (value - image)


def blur(
  size: int = 7, sigma: float | None = None, probability: float = 0.5
) -> Augmentation:
  """Gaussian blur of some of the images (LbA on SVHN), as cv2.GaussianBlur.

  The border is reflected without repeating the edge, OpenCV's default.
  `pix.gaussian_blur` has zeros outside or a smaller result, and no kernel but
  the exact one.

  Args:
    size: of the kernel in pixels, odd; 7 in LbA.
    sigma: as in `gaussian`; LbA leaves it to OpenCV, whose kernel of 7 is
      close to that of sigma 1.4.
    probability: of a blur; 1/2 in LbA.
  """
  weights = gaussian(size, sigma)
  errors.probability(probability=probability)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    down, right = (_smoother(weights, size) for size in image.shape[:2])
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
  """[size] weights that sum to 1, as cv2.getGaussianKernel.

  Args:
    size: in pixels, odd.
    sigma: in pixels, above 0; None is OpenCV's own choice, fixed kernels up to
      size 9 and sigma 0.3 ((size - 1) / 2 - 1) + 0.8 above that.
  """
  errors.require(
    _whole(size=size) % 2 == 1, f'`size`={size}: give an odd number of pixels'
  )
  if sigma is not None:
    errors.positive(sigma=sigma)
  if sigma is None and size in OPENCV_KERNELS:
    weights = np.array(OPENCV_KERNELS[size], np.float64)
  else:
    deviation = sigma or 0.3 * ((size - 1) / 2 - 1) + 0.8
    far = np.arange(size) - (size - 1) / 2
    weights = np.exp(-(far**2) / (2 * deviation**2))
  return tuple((weights / weights.sum()).tolist())


def _smoother(weights: tuple[float, ...], size: int) -> chex.Array:
  """[size, size] the matrix of weighted sums of `size` reflected pixels.

  For a chain, a product is five times as fast on a CPU as sums of shifted
  images, into each of which XLA copies what comes before.
  """
  reads = np.pad(np.arange(size), len(weights) // 2, mode='reflect')
  matrix = np.zeros((size, size), np.float32)
  for first, weight in enumerate(weights):
    matrix[np.arange(size), reads[first : first + size]] += weight
  return jnp.asarray(matrix)


def stl10(
  degrees: float = 10.0,
  crop: float = 0.2,
  brightness: float = 1.3,
  saturation: tuple[float, float] = (0.5, 1.2),
  hue: float = 0.1,
  grey: float = 0.5,
) -> Augmentation:
  """LbA's augmentation of STL-10: turn, crop and enlarge, recolour, mirror.

  The order of these four, the bilinear turn with zeros outside and the nearest
  neighbours of the crop are the released code's. See `warp.tilt`, `warp.zoom`
  and `jitter` for the arguments.
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
  """The colour changes of LbA on STL-10, clipped to [0, 1].

  The released code gives their numbers; the functions that use them were never
  released. [inferred]: they are those of tf.image, in the order of the
  arguments, and end with clipping. An image that has not 3 channels only
  changes its brightness.

  Args:
    brightness: what is added is U(-brightness, brightness) grey levels of the
      256, as LbA's networks are given 0 .. 255 [inferred]; 1.3 is next to
      nothing.
    saturation: (low, high): the factor of the HSV saturation is U(low, high).
    hue: what is added is U(-hue, hue) turns.
    grey: probability that the luma replaces all channels.
  """
  errors.non_negative(brightness=brightness, hue=hue)
  low, high = map(float, saturation)
  errors.non_negative(saturation=low)
  errors.non_negative(saturation=high)
  errors.require(
    low <= high, f'`saturation`={low},{high}: give the lower number first'
  )
  errors.probability(grey=grey)
  most, turns = float(brightness) / 255, float(hue)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    # One draw, as in `draw_colours`.
    light, colour, angle, dye = jax.random.uniform(key, (4,))
    image = pix.adjust_brightness(image, most * (2 * light - 1))
    if image.shape[-1] == 3:
      image = saturate(image, low + (high - low) * colour)
      image = turn_hue(image, turns * (2 * angle - 1))
      luma = pix.rgb_to_grayscale(image, keep_dims=True)
      image = jnp.where(dye < float(grey), luma, image)
    return jnp.clip(image, 0.0, 1.0)

  return apply


def turn_hue(
  image: chex.Array, turns: chex.Numeric, channel_axis: int = -1
) -> chex.Array:
  """Adds [] turns to the HSV hue of [H, W, 3], or of another axis' channels."""
  # `pix` adds booleans to floats.
  with jax.numpy_dtype_promotion('standard'):
    return pix.adjust_hue(image, turns, channel_axis=channel_axis)


def _reflect(image: chex.Array, pad: int) -> chex.Array:
  """[H, W, c] -> [H + 2 pad, W + 2 pad, c], not repeating the edge."""
  return jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode='reflect')


def _crop(
  key: chex.PRNGKey, image: chex.Array, shape: tuple[int, int, int]
) -> chex.Array:
  """A window `shape` of the image, every place equally likely.

  As `pix.random_crop`, which draws a number from a key of its own for each
  axis, channels too, and so takes twice as long to compile.
  """
  room = np.subtract(image.shape[:2], shape[:2])
  top, left = jax.random.randint(key, (2,), 0, room + 1)
  return jax.lax.dynamic_slice(image, (top, left, 0), shape)


def _whole(**flags: int) -> int:
  """The one value given, refused by name unless 0, 1, 2, ..."""
  errors.non_negative(**flags)
  ((name, value),) = flags.items()
  errors.require(
    isinstance(value, (int, np.integer)),
    f'`{name}`={value}: give a whole number of pixels',
  )
  return operator.index(value)
