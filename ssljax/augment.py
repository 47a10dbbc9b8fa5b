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
           SVHN   chain(rotate(), crop_or_resize(), distort)
TE, MT   Laine, Aila, ICLR 2017; Tarvainen, Valpola, NeurIPS 2017:
           CIFAR  chain(translate(2), flip, noise(0.15))
           SVHN   chain(translate(2), noise(0.15))
R2-D2    Wang, Wu, AAAI 2021:  chain(translate(4), flip)
"""

from collections.abc import Callable
import itertools
import operator

import chex
import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np

from ssljax import core

Augmentation = Callable[[chex.PRNGKey, chex.Array], chex.Array]

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


def to_float(image: chex.Array) -> chex.Array:
  """uint8 [...] -> float32 [...] in [0, 1]."""
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


def rotate(angle: float = 0.2) -> Augmentation:
  """Turns about the centre by U(-angle, angle) radians (MA-DNN on SVHN)."""
  core.non_negative(angle=angle)

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
  middle = (height - 1) / 2, (width - 1) / 2
  down = (jnp.arange(height, dtype=image.dtype) - middle[0])[:, None]
  right = (jnp.arange(width, dtype=image.dtype) - middle[1])[None, :]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  rows = cos * down + sin * right + middle[0]
  columns = cos * right - sin * down + middle[1]
  return jax.vmap(_sample, (2, None, None), 2)(image, rows, columns)


def _sample(plane: chex.Array, rows: chex.Array, columns: chex.Array):
  """Values of [H, W] at fractional `rows`, `columns` [H', W'] -> [H', W']."""
  return jax.scipy.ndimage.map_coordinates(
    plane, [rows, columns], order=1, mode='constant'
  )


def noise(sigma: float = 0.15) -> Augmentation:
  """Adds N(0, sigma²) to every value (TE, MT); leaves [0, 1]."""
  core.non_negative(sigma=sigma)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    return image + float(sigma) * jax.random.normal(
      key, image.shape, image.dtype
    )

  return apply


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
  core.non_negative(**flags)
  ((name, value),) = flags.items()
  core.require(
    isinstance(value, (int, np.integer)),
    f'--{name}={value}: give a whole number of pixels',
  )
  return operator.index(value)
