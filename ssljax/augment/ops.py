"""The operations of RandAugment and CTAugment, with Pillow's definitions.

An operation maps (image [H, W, c] float32 in [0, 1], value []) to an image of
the same shape in [0, 1]. The value is in natural units:

  autocontrast, equalize, invert, smooth   share v of the result in a blend with
                                           the image: (1 - v) x + v f(x)
  brightness, color, contrast, sharpness   factor v: v x + (1 - v) g, where g is
                                           black, luma, mean luma, smoothed x
  posterize                                number of bits kept, ⌊v⌋ in 1 .. 8
  solarize                                 grey levels from v on are inverted
  rotate                                   degrees, counter-clockwise
  shear_x, shear_y                         shear about the top left corner
  translate_x, translate_y                 share of the side, to the left or up
  rescale                                  share of each border to crop before
                                           the image is enlarged again
  cutout                                   share of the shorter side; the square
                                           is mid-grey
  identity                                 unused

Six functions compute all of them, so that a conditional has few branches. Those
that move pixels are one affine warp by the nearest neighbour, with black
outside, Pillow's default. An image that does not have 3 channels does not
change by `color`.

Departures from Pillow: only posterize, solarize and equalize work on whole grey
levels; the others are not rounded after each operation.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ssljax.augment import standard

# The first 14 are RandAugment's in FixMatch, all are CTAugment's.
OPS = (
  *('autocontrast', 'brightness', 'color', 'contrast', 'equalize'),
  *('identity', 'posterize', 'rotate', 'sharpness', 'shear_x', 'shear_y'),
  *('solarize', 'translate_x', 'translate_y'),
  *('cutout', 'invert', 'rescale', 'smooth'),
)
NUMBER = {name: i for i, name in enumerate(OPS)}
LEVELS = 255  # the brightest grey level
GREY = 0.5  # of the square of cutout
_FIXED_POINT = 16  # bits after the point in the coordinates of a warp


def transform(
  image: chex.Array,
  op: chex.Array,
  value: chex.Array,
  position: chex.Array | None = None,
) -> chex.Array:
  """Apply one operation.

  Args:
    image: [H, W, c] in [0, 1].
    op: [] int32, index into OPS.
    value: [] float32.
    position: [2] in [0, 1), row and column of the centre of cutout as shares of
      the sides; None if the operation is never cutout.
  """
  bind = lambda function: lambda image: function(image, op, value)
  branches = [lambda image: image, *map(bind, BRANCHES)]
  image = jax.lax.switch(_branches()[op], branches, image)
  if position is None:
    return image
  return jnp.where(op == NUMBER['cutout'], cut(image, value, position), image)


def _branches() -> chex.Array:
  """Return the branch of every operation [K] int32; 0 changes nothing."""
  number = {name: 0 for name in OPS}
  for i, names in enumerate(BRANCHES.values()):
    number |= dict.fromkeys(names, i + 1)
  return jnp.asarray([number[name] for name in OPS], jnp.int32)


def batched(function: Callable) -> Callable:
  """Return a function of one image that is fast for the images of a batch.

  `jax.vmap` of a conditional computes all branches for all images. On a CPU a
  loop over the images, which computes one branch of each, is faster. The loop
  is compiled for CPUs only, and only where one device has all images.

  Args:
    function: `(image, ...) -> image` with array arguments.
  """
  call = jax.custom_batching.custom_vmap(function)

  @call.def_vmap
  def rule(size, is_batched, *arguments):
    spread = lambda x, batched: (
      x if batched else jnp.broadcast_to(x, (size, *x.shape))
    )
    arguments = jax.tree.map(spread, arguments, tuple(is_batched))
    together = jax.vmap(function)
    in_turn = lambda *rows: jax.lax.map(lambda row: function(*row), rows)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
      return together(*arguments), True
    images = jax.lax.platform_dependent(
      *arguments, cpu=in_turn, default=together
    )
    return images, True

  return call


def grey_levels(image: chex.Array) -> chex.Array:
  """Return the grey levels 0 .. 255 of [...] in [0, 1], as float32."""
  return jnp.round(jnp.clip(image, 0.0, 1.0) * LEVELS)


def luma(image: chex.Array) -> chex.Array:
  """Return Pillow's luma [H, W, 1] of [H, W, 3]; other images unchanged."""
  if image.shape[-1] != 3:
    return image
  red, green, blue = (image[..., i : i + 1] for i in range(3))
  return 0.299 * red + 0.587 * green + 0.114 * blue


def stretch(image: chex.Array, op: chex.Array, value: chex.Array) -> chex.Array:
  """Apply autocontrast: map the range of each channel to 0 .. 1, and blend.

  A channel of one value does not change.

  Args:
    image: [H, W, c].
    op: unused.
    value: [] share of the result.
  """
  del op
  low, high = (_over_pixels(image, extreme) for extreme in (jnp.min, jnp.max))
  span = high - low
  stretched = (image - low) / jnp.where(span > 0, span, 1.0)
  stretched = jnp.where(span > 0, stretched, image)
  return (1 - value) * image + value * stretched


def _over_pixels(image: chex.Array, reduce: Callable) -> chex.Array:
  """Reduce [H, W, c] to [1, 1, c], with jnp.min or jnp.max.

  Two steps are three times as fast on a CPU as one, because the first has long
  rows; the barrier keeps XLA from merging them.
  """
  columns = jax.lax.optimization_barrier(reduce(image, 0, keepdims=True))
  return reduce(columns, 1, keepdims=True)


def enhance(image: chex.Array, op: chex.Array, value: chex.Array) -> chex.Array:
  """Apply brightness, color or contrast: blend with a darker image."""
  shades = luma(image)
  mean = jnp.where(op == NUMBER['contrast'], jnp.mean(shades), 0.0)
  base = jnp.where(op == NUMBER['color'], shades, mean)
  return jnp.clip(value * image + (1 - value) * base, 0.0, 1.0)


def map_levels(
  image: chex.Array, op: chex.Array, value: chex.Array
) -> chex.Array:
  """Apply posterize, solarize or invert, a function of each value."""
  levels = grey_levels(image)
  dropped = 8 - jnp.clip(jnp.floor(value), 1, 8).astype(jnp.int32)
  step = jnp.left_shift(1, dropped).astype(image.dtype)
  posterized = jnp.floor(levels / step) * step / LEVELS
  solarized = jnp.where(levels >= value, 1 - image, image)
  inverted = (1 - value) * image + value * (1 - image)
  return jnp.where(
    op == NUMBER['posterize'],
    posterized,
    jnp.where(op == NUMBER['solarize'], solarized, inverted),
  )


def sharpen(image: chex.Array, op: chex.Array, value: chex.Array) -> chex.Array:
  """Apply sharpness or smooth: blend with the smoothed image."""
  factor = jnp.where(op == NUMBER['smooth'], 1 - value, value)
  mixed = factor * image + (1 - factor) * smooth(image)
  return jnp.clip(mixed, 0.0, 1.0)


def smooth(image: chex.Array) -> chex.Array:
  """Smooth [H, W, c] as Pillow's ImageFilter.SMOOTH.

  The kernel is (1 1 1, 1 5 1, 1 1 1) / 13. Pixels at the border stay.
  """
  height, width, _ = image.shape
  if min(height, width) < 3:
    return image
  rows = image[:-2] + image[1:-1] + image[2:]
  box = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
  inner = (box + 4 * image[1:-1, 1:-1]) / 13
  return image.at[1:-1, 1:-1].set(inner)


def equalize(
  image: chex.Array, op: chex.Array, value: chex.Array
) -> chex.Array:
  """Equalise the histogram of each channel, and blend with the image.

  It is Pillow's ImageOps.equalize: with h_v pixels of grey level v, P in all
  and m the highest level, step = ⌊(P - h_m) / 255⌋, and level v becomes
  ⌊(⌊step / 2⌋ + Σ_{u<v} h_u) / step⌋. A channel with step 0, as in every image
  of fewer than 255 pixels, does not change.

  Args:
    image: [H, W, c].
    op: unused.
    value: [] share of the result.
  """
  del op
  channels = image.shape[-1]
  levels = grey_levels(image).astype(jnp.int32)
  # One table of 256 entries for each channel, one after another.
  first = (LEVELS + 1) * jnp.arange(channels, dtype=jnp.int32)
  cells = levels + first[None, None, :]
  counts = jnp.zeros([channels * (LEVELS + 1)], jnp.int32).at[cells].add(1)
  counts = counts.reshape(channels, LEVELS + 1)
  below = jnp.cumsum(counts, axis=1) - counts
  # The pixels of all levels but the highest are those below it.
  others = jnp.max(jnp.where(counts > 0, below, 0), axis=1, keepdims=True)
  step = others // LEVELS
  table = (step // 2 + below) // jnp.maximum(step, 1)
  table = jnp.minimum(table, LEVELS).astype(image.dtype) / LEVELS
  result = jnp.take(table.reshape(-1), cells, mode='clip')
  result = jnp.where(step[None, None, :, 0] > 0, result, image)
  return (1 - value) * image + value * result


def move(image: chex.Array, op: chex.Array, value: chex.Array) -> chex.Array:
  """Apply rotate, shear, translate or rescale: an affine warp."""
  height, width, _ = image.shape
  is_op = lambda name: op == NUMBER[name]
  pick = lambda name, v, other: jnp.where(is_op(name), v, other)
  angle = pick('rotate', value, 0.0) * jnp.pi / 180
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  keep = 1 - 2 * pick('rescale', value, 0.0)
  # (column, row) = M (x, y) + shift, relative to the image's top left corner.
  xx, xy = cos * keep, pick('shear_x', value, -sin)
  yx, yy = pick('shear_y', value, sin), cos * keep
  # A rotation and a change of scale leave the centre where it is.
  centred = is_op('rotate') | is_op('rescale')
  x, y = width / 2, height / 2
  right = pick('translate_x', value * width, 0.0)
  down = pick('translate_y', value * height, 0.0)
  right = jnp.where(centred, x - xx * x - xy * y, right)
  down = jnp.where(centred, y - yx * x - yy * y, down)
  return warp(image, (xx, xy, right), (yx, yy, down))


def warp(
  image: chex.Array,
  column_row: tuple[chex.Numeric, chex.Numeric, chex.Numeric],
  row_row: tuple[chex.Numeric, chex.Numeric, chex.Numeric],
) -> chex.Array:
  """Warp [H, W, c] by the nearest neighbour, as Image.transform of Pillow.

  The pixel with centre (x, y) takes the value at column a x + b y + c and row
  d x + e y + f, or 0 outside the image. Coordinates are whole numbers with 16
  bits after the point, as in Pillow, so that every compiler rounds alike.

  Args:
    image: [H, W, c].
    column_row: a, b, c, each [].
    row_row: d, e, f, each [].
  """
  height, width, channels = image.shape
  x = jnp.arange(width, dtype=jnp.int32)[None, :]
  y = jnp.arange(height, dtype=jnp.int32)[:, None]

  def source(coefficients):
    a, b, c = map(jnp.asarray, coefficients)
    first = c + a * 0.5 + b * 0.5
    return (_fixed(a) * x + _fixed(b) * y + _fixed(first)) >> _FIXED_POINT

  column, row = source(column_row), source(row_row)
  inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
  pixels = image.reshape(height * width, channels)
  index = jnp.where(inside, row * width + column, 0)
  moved = jnp.take(pixels, index, axis=0, mode='clip')
  return jnp.where(inside[..., None], moved, 0.0)


def _fixed(number: chex.Array) -> chex.Array:
  """Return a number as int32 with 16 bits after the point."""
  return jnp.floor(number * 2**_FIXED_POINT + 0.5).astype(jnp.int32)


def cut(
  image: chex.Array, value: chex.Array, position: chex.Array
) -> chex.Array:
  """Set a square to grey, with a share `value` of the shorter side."""
  sides = jnp.asarray(image.shape[:2], image.dtype)
  side = jnp.round(value * min(image.shape[:2])).astype(jnp.int32)
  centre = jnp.floor(position * sides).astype(jnp.int32)
  hole = standard.square_mask(image.shape, centre, side)
  return jnp.where(hole, GREY, image)


# Function: the operations that it computes. Cutout follows them.
BRANCHES = {
  stretch: ('autocontrast',),
  enhance: ('brightness', 'color', 'contrast'),
  map_levels: ('posterize', 'solarize', 'invert'),
  equalize: ('equalize',),
  sharpen: ('sharpness', 'smooth'),
  move: (
    'rotate',
    'shear_x',
    'shear_y',
    'translate_x',
    'translate_y',
    'rescale',
  ),
}
