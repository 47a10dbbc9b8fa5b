"""The random views of an image that ImageNet's networks are trained on.

Augmentations as in augment.py, which act on pixels in [0, 1] before any
preprocessing, and the one definition of a random window: `crop` cuts images of
one size inside the compiled step, `decode.crop` those that differ in size from
the original, on the host.

LLP      Zhuang, Ding, Murli, Yamins, 2019, released preprocessing:
           chain(crop(), grey(), jitter(), augment.flip)

Its windows come from a TensorFlow op that draws a height evenly where `window`
draws an area evenly, as Szegedy et al. 2015 (arXiv:1409.4842) describe it, and
it rounds to whole grey levels after every change of colour.
"""

from types import ModuleType

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ssljax import errors
from ssljax.augment import standard

AREA = (0.2, 1.0)  # share of the image that a window covers
ASPECT = (3 / 4, 4 / 3)  # its width over its height
TRIES = 10  # windows drawn, of which the first that fits is taken
FACTORS = (0.6, 1.4)  # of brightness, saturation and contrast
HUE = 0.4  # turns, at most
# What an order of `recolour` is an order of.
BRIGHTNESS, SATURATION, CONTRAST, CHANGE_OF_HUE = range(4)


def window(
  draws: chex.Array,
  height: int,
  width: int,
  area: tuple[float, float] = AREA,
  aspect: tuple[float, float] = ASPECT,
  xp: ModuleType = np,
) -> chex.Array:
  """A window of H x W pixels; area even, aspect even in its logarithm.

  Where none of the tries fits into a long image, it is the largest at the
  centre whose aspect is allowed.

  Args:
    draws: [TRIES, 4] in [0, 1): area, aspect, place down, place right.
    height: H.
    width: W.
    area: least and largest share of H W, before rounding to whole pixels.
    aspect: least and largest width over height, likewise.
    xp: NumPy on the host, jax.numpy in a compiled step.

  Returns:
    [4] whole numbers: top, left, height, width.
  """
  (least, most), (narrow, wide) = area, aspect
  size, shape, down, right = draws.T
  pixels = height * width * (least + (most - least) * size)
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
  """Cuts a random window and resizes it to the size of the image.

  Args:
    area: as in `window`, in (0, 1].
    aspect: as in `window`.
  """
  _ascending(area=area)
  _ascending(aspect=aspect)
  errors.require(area[1] <= 1, f'`area`={area[1]}: give a share of at most 1')

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    draws = jax.random.uniform(key, (TRIES, 4), image.dtype)
    return cut(image, window(draws, *image.shape[:2], area, aspect, jnp))

  return apply


def cut(image: chex.Array, box: chex.Array) -> chex.Array:
  """A window of [H, W, c], resized to [H, W, c] as Pillow's BILINEAR does it.

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
  """[c, H, W] -> [1, H, W], the grey of a colour; of one channel itself."""
  if len(image) != 3:
    return image[:1]
  return 0.299 * image[:1] + 0.587 * image[1:2] + 0.114 * image[2:]


def grey(probability: float = 0.2) -> standard.Augmentation:
  """Replaces all channels by the luma, with some probability."""
  errors.probability(probability=probability)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    shades = jnp.moveaxis(luma(jnp.moveaxis(image, -1, 0)), 0, -1)
    dyed = jax.random.bernoulli(key, float(probability))
    return jnp.where(dyed, shades, image)

  return apply


def jitter(
  factors: tuple[float, float] = FACTORS, hue: float = HUE
) -> standard.Augmentation:
  """Changes brightness, saturation, contrast and hue, in random order.

  Args:
    factors: the first three are each multiplied by U(least, most).
    hue: what is added to it is U(-hue, hue) turns.
  """
  _ascending(factors=factors)
  errors.non_negative(hue=hue)

  def apply(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
    return recolour(image, *draw_colours(key, factors, hue))

  return apply


def draw_colours(
  key: chex.PRNGKey, factors: tuple[float, float], hue: float
) -> tuple[chex.Array, chex.Array, chex.Array]:
  """Draws order [4], factors [3] and turns [], for `recolour`."""
  # One draw, as in `augment.draw_colours`; sorting evens is a fair shuffle.
  places, changes = jax.random.uniform(key, (2, 4))
  least, most = factors
  return (
    jnp.argsort(places),
    least + (most - least) * changes[:3],
    hue * (2 * changes[3] - 1),
  )


def recolour(
  image: chex.Array,
  order: chex.Array,
  factors: chex.Array,
  turns: chex.Numeric,
) -> chex.Array:
  """Changes the colours of [H, W, c] in a given order, always within [0, 1].

  The change of hue costs more than the others together, and vmap would compute
  every branch of a choice at every place. So it is computed once, with three
  places of a blend before it and three after; where an order has nothing to do
  the factor is 1, which changes nothing.

  Args:
    image: [H, W, c] in [0, 1]; where c is not 3 hue and saturation are not
      changed.
    order: [4] the numbers of BRIGHTNESS .. CHANGE_OF_HUE, first to last.
    factors: [3] of brightness, saturation, contrast.
    turns: [] added to the hue.
  """
  factors = jnp.append(factors, 1.0)[order]
  middle = jnp.argmax(order == CHANGE_OF_HUE)
  # Pixels along the last axes are twice as fast on a CPU.
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
  """Makes it f x + (1 - f) g, within [0, 1].

  Args:
    image: x [c, H, W].
    change: [] BRIGHTNESS, where g is black, SATURATION, where it is each
      pixel's luma, or CONTRAST, where it is the mean luma.
    factor: f [].
  """
  shades, rest = luma(image), 1 - factor
  of_pixel = jnp.where(change == SATURATION, rest, 0.0)
  of_mean = jnp.where(change == CONTRAST, rest, 0.0)
  base = of_pixel * shades + of_mean * jnp.mean(shades)
  return jnp.clip(factor * image + base, 0.0, 1.0)


def _ascending(**flags: tuple[float, float]) -> None:
  """Refuses, by name, two numbers that are not 0 < least ≤ most."""
  for name, (least, most) in flags.items():
    errors.positive(**{name: least})
    errors.positive(**{name: most})
    errors.require(
      least <= most, f'`{name}`={least},{most}: give the lower number first'
    )
