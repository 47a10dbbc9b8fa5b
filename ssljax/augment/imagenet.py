"""Augmentations for training on ImageNet: random crop, grey, colour jitter.

An augmentation is a function (key, image [H, W, c]) -> [H, W, c], as in
`standard`. Those of this module act on pixels in [0, 1], before any
preprocessing. `window` is the only definition of a random crop window: `crop`
uses it inside the compiled step for images of one size, and `decode.crop` uses
it on the host for original images of different sizes.

LLP      Zhuang, Ding, Murli, Yamins, 2019, released preprocessing:
           chain(crop(), grey(), jitter(), standard.flip)

Departures: LLP's released code takes windows from a TensorFlow op that draws
the height uniformly, while `window` draws the area uniformly as Szegedy et al.
2015 (arXiv:1409.4842) describe it. It also rounds to whole grey levels after
every change of colour.
"""

from types import ModuleType

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ssljax import errors
from ssljax.augment import standard

AREA = (0.2, 1.0)  # share of the image that a window covers
ASPECT = (3 / 4, 4 / 3)  # width of a window over its height
TRIES = 10  # candidate windows; the first that fits is used
FACTORS = (0.6, 1.4)  # range for brightness, saturation and contrast
HUE = 0.4  # largest change of hue, in turns
# Numbers of the colour changes in the argument `order` of `recolour`.
BRIGHTNESS, SATURATION, CONTRAST, CHANGE_OF_HUE = range(4)


def window(
  draws: chex.Array,
  height: int,
  width: int,
  area: tuple[float, float] = AREA,
  aspect: tuple[float, float] = ASPECT,
  xp: ModuleType = np,
) -> chex.Array:
  """Choose a random window of an image of H x W pixels.

  The area is uniform and the aspect ratio is uniform in its logarithm. If none
  of the candidates fits (into a very long image), the result is the largest
  central window with an allowed aspect ratio.

  Args:
    draws: [TRIES, 4] in [0, 1): area, aspect, vertical and horizontal position.
    height: H.
    width: W.
    area: smallest and largest share of H W, before rounding to whole pixels.
    aspect: smallest and largest width over height, before rounding.
    xp: NumPy on the host, jax.numpy in a compiled step.

  Returns:
    [4] whole numbers: top, left, height, width.
  """
  (smallest, largest), (narrow, wide) = area, aspect
  size, shape, down, right = draws.T
  pixels = height * width * (smallest + (largest - smallest) * size)
  ratio = narrow * (wide / narrow) ** shape
  heights = xp.maximum(xp.rint(xp.sqrt(pixels / ratio)), 1)
  widths = xp.maximum(xp.rint(xp.sqrt(pixels * ratio)), 1)
  tops = xp.floor(down * (height - heights + 1))
  lefts = xp.floor(right * (width - widths + 1))
  fits = (heights <= height) & (widths <= width)
  drawn = xp.stack([tops, lefts, heights, widths])[:, xp.argmax(fits)]
  tall = min(height, round(width / narrow))
  broad = min(width, round(height * wide))
  central = (height - tall) // 2, (width - broad) // 2, tall, broad
  return xp.where(xp.any(fits), drawn, xp.asarray(central, draws.dtype))


def crop(
  area: tuple[float, float] = AREA, aspect: tuple[float, float] = ASPECT
) -> standard.Augmentation:
  """Crop a random window and resize it to the size of the image.

  Args:
    area: as in `window`, in (0, 1].
    aspect: as in `window`.
  """
  _check_positive_range(area=area)
  _check_positive_range(aspect=aspect)
  errors.require(area[1] <= 1, f'`area`={area[1]}: give a share of at most 1')

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    draws = jax.random.uniform(key, (TRIES, 4), image.dtype)
    height, width = image.shape[:2]
    box = window(draws, height, width, area, aspect, jnp)
    return resize_window(image, box)

  return apply


def resize_window(image: chex.Array, box: chex.Array) -> chex.Array:
  """Resize a window of [H, W, c] to [H, W, c], like Pillow's BILINEAR.

  Args:
    image: [H, W, c].
    box: [4] top, left, height, width in pixels.
  """
  scale = np.array(image.shape[:2], image.dtype) / box[2:]
  return jax.image.scale_and_translate(
    image,
    image.shape,
    (0, 1),
    scale,
    -box[:2] * scale,
    'linear',
    precision=jax.lax.Precision.HIGHEST,  # not TF32
  )


def luma(image: chex.Array) -> chex.Array:
  """Return the luma [1, H, W] of [c, H, W]: the first channel unless c is 3."""
  if len(image) != 3:
    return image[:1]
  return 0.299 * image[:1] + 0.587 * image[1:2] + 0.114 * image[2:]


def grey(probability: float = 0.2) -> standard.Augmentation:
  """Replace all channels by the luma, with the given probability."""
  errors.probability(probability=probability)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    shades = jnp.moveaxis(luma(jnp.moveaxis(image, -1, 0)), 0, -1)
    is_grey = jax.random.bernoulli(key, float(probability))
    return jnp.where(is_grey, shades, image)

  return apply


def jitter(
  factors: tuple[float, float] = FACTORS, hue: float = HUE
) -> standard.Augmentation:
  """Change brightness, saturation, contrast and hue, in random order.

  Args:
    factors: (low, high). Brightness, saturation and contrast are each
      multiplied by a draw from U(low, high).
    hue: the hue is shifted by U(-hue, hue) turns.
  """
  _check_positive_range(factors=factors)
  errors.non_negative(hue=hue)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    return recolour(image, *draw_colours(key, factors, hue))

  return apply


def draw_colours(
  key: chex.PRNGKey, factors: tuple[float, float], hue: float
) -> tuple[chex.Array, chex.Array, chex.Array]:
  """Draw the arguments order [4], factors [3] and turns [] of `recolour`."""
  # A single draw, as in `standard.draw_colours`. Sorting uniform numbers gives
  # a uniform permutation.
  ranks, changes = jax.random.uniform(key, (2, 4))
  low, high = factors
  return (
    jnp.argsort(ranks),
    low + (high - low) * changes[:3],
    hue * (2 * changes[3] - 1),
  )


def recolour(
  image: chex.Array,
  order: chex.Array,
  factors: chex.Array,
  turns: chex.Numeric,
) -> chex.Array:
  """Change the colours of [H, W, c] in a given order, clipping to [0, 1].

  The change of hue costs more than the other three together, and vmap would
  compute every branch of a conditional at each of the four positions. The hue
  is therefore changed once, between three blends before it and three after it.
  A blend that the order does not need has factor 1, which changes nothing.

  Args:
    image: [H, W, c] in [0, 1]. If c is not 3, hue and saturation do not change.
    order: [4] the numbers BRIGHTNESS .. CHANGE_OF_HUE, first to last.
    factors: [3] for brightness, saturation, contrast.
    turns: [] added to the hue.
  """
  factors = jnp.append(factors, 1.0)[order]
  middle = jnp.argmax(order == CHANGE_OF_HUE)
  # With pixels along the last axes this is twice as fast on a CPU.
  image = jnp.moveaxis(image, -1, 0)
  for i in range(3):
    image = blend(image, order[i], jnp.where(i < middle, factors[i], 1.0))
  if len(image) == 3:
    image = standard.turn_hue(image, turns, channel_axis=0)
  for i in range(1, 4):
    image = blend(image, order[i], jnp.where(i > middle, factors[i], 1.0))
  return jnp.moveaxis(image, 0, -1)


def blend(
  image: chex.Array, change: chex.Array, factor: chex.Numeric
) -> chex.Array:
  """Return f x + (1 - f) g, clipped to [0, 1].

  Args:
    image: x [c, H, W].
    change: [] chooses g: black for BRIGHTNESS, the luma of each pixel for
      SATURATION, the mean luma for CONTRAST.
    factor: f [].
  """
  shades, rest = luma(image), 1 - factor
  of_pixel = jnp.where(change == SATURATION, rest, 0.0)
  of_mean = jnp.where(change == CONTRAST, rest, 0.0)
  base = of_pixel * shades + of_mean * jnp.mean(shades)
  return jnp.clip(factor * image + base, 0.0, 1.0)


def _check_positive_range(**ranges: tuple[float, float]) -> None:
  """Raise InputError, naming the parameter, unless 0 < low ≤ high."""
  for name, (low, high) in ranges.items():
    errors.positive(**{name: low})
    errors.positive(**{name: high})
    standard.check_order(**{name: (low, high)})
