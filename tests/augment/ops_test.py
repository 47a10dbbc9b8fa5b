"""The operations of RandAugment and CTAugment compared with Pillow's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
import pytest
from views import compiled

from ssljax.augment import ops
from ssljax.distributed import placement

# A grey level is 1/255: Pillow truncates or rounds after each operation, and
# rounds the mean luma and the luma of a pixel before it uses them.
LEVEL = 1 / 255


def picture(height=17, width=14, channels=3, seed=0):
  """Grey levels [H, W, c] uint8: noise of little contrast, some pixels black.

  The channels have different ranges.
  """
  rng = np.random.default_rng(seed)
  image = rng.integers(40, 200, (height, width, channels))
  image = image - 20 * np.arange(channels)
  return image.astype(np.uint8)


def pillow(image):
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


@functools.cache
def program():
  return compiled(ops.transform)


def transformed(image, name, value, **more):
  """The result of an operation on uint8 [H, W, c], as float grey levels."""
  result = program()(
    image.astype(np.float32) / 255,
    jnp.int32(ops.NUMBER[name]),
    jnp.float32(value),
    **more,
  )
  return np.asarray(result) * 255


def by_pillow(function, image):
  return np.asarray(function(pillow(image))).reshape(image.shape)


def affine(a, b, c, d, e, f):
  return lambda image: image.transform(
    image.size, Image.Transform.AFFINE, (a, b, c, d, e, f)
  )


def blended(function, share):
  return lambda image: Image.blend(image, function(image), share)


def enhanced(kind, factor):
  return lambda image: kind(image).enhance(factor)


# Name, value, Pillow's function for images of 14 by 17 pixels, tolerance in
# grey levels.
CASES = [
  ('autocontrast', 1.0, ImageOps.autocontrast, 1.0),
  ('autocontrast', 0.3, blended(ImageOps.autocontrast, 0.3), 1.5),
  ('brightness', 0.4, enhanced(ImageEnhance.Brightness, 0.4), 1.0),
  ('brightness', 1.7, enhanced(ImageEnhance.Brightness, 1.7), 1.0),
  ('color', 0.2, enhanced(ImageEnhance.Color, 0.2), 1.5),
  ('color', 1.8, enhanced(ImageEnhance.Color, 1.8), 1.5),
  ('contrast', 0.2, enhanced(ImageEnhance.Contrast, 0.2), 1.5),
  ('contrast', 1.8, enhanced(ImageEnhance.Contrast, 1.8), 1.5),
  ('sharpness', 0.1, enhanced(ImageEnhance.Sharpness, 0.1), 1.5),
  ('sharpness', 1.9, enhanced(ImageEnhance.Sharpness, 1.9), 1.5),
  ('smooth', 1.0, lambda image: image.filter(ImageFilter.SMOOTH), 1.0),
  ('identity', 0.0, lambda image: image, 0.0),
  ('invert', 1.0, ImageOps.invert, 0.0),
  ('invert', 0.25, blended(ImageOps.invert, 0.25), 1.0),
  *(
    ('posterize', bits, functools.partial(ImageOps.posterize, bits=bits), 0.0)
    for bits in (1, 4, 7, 8)
  ),
  ('posterize', 4.7, functools.partial(ImageOps.posterize, bits=4), 0.0),
  *(
    ('solarize', t, functools.partial(ImageOps.solarize, threshold=t), 0.0)
    for t in (0, 110, 256)
  ),
  *(
    ('rotate', degrees, lambda image, a=degrees: image.rotate(a), 0.0)
    for degrees in (-30.0, -7.5, 0.0, 3.0, 28.0)
  ),
  ('shear_x', 0.22, affine(1, 0.22, 0, 0, 1, 0), 0.0),
  ('shear_x', -0.3, affine(1, -0.3, 0, 0, 1, 0), 0.0),
  ('shear_y', 0.17, affine(1, 0, 0, 0.17, 1, 0), 0.0),
  ('translate_x', 0.21, affine(1, 0, 0.21 * 14, 0, 1, 0), 0.0),
  ('translate_x', -0.3, affine(1, 0, -0.3 * 14, 0, 1, 0), 0.0),
  ('translate_y', 0.28, affine(1, 0, 0, 0, 1, 0.28 * 17), 0.0),
  # The central 60 percent of both sides.
  ('rescale', 0.2, affine(0.6, 0, 0.2 * 14, 0, 0.6, 0.2 * 17), 0.0),
]


@pytest.mark.parametrize(
  ('name', 'value', 'function', 'tolerance'),
  CASES,
  ids=[f'{name}-{value}' for name, value, *_ in CASES],
)
@pytest.mark.parametrize('channels', [1, 3])
def test_an_operation_is_pillows(name, value, function, tolerance, channels):
  image = picture(channels=channels)
  expected = by_pillow(function, image).astype(float)
  if name == 'color' and channels == 1:
    expected = image  # its luma is the image
  got = transformed(image, name, value)
  np.testing.assert_allclose(got, expected, atol=tolerance + 1e-3)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('size', [(40, 30), (8, 8), (20, 20)])
def test_equalize_is_pillows(size, channels):
  # Images of 64 pixels do not change: a step of the table would be 0.
  image = picture(*size, channels) // 2 + 30
  expected = by_pillow(ImageOps.equalize, image).astype(float)
  got = transformed(image, 'equalize', 1.0)
  np.testing.assert_allclose(got, expected, atol=1e-3)
  assert (expected == image).all() == (size == (8, 8))
  half = transformed(image, 'equalize', 0.5)
  np.testing.assert_allclose(half, (image + expected) / 2, atol=1e-3)


def test_a_constant_channel_survives_autocontrast_and_equalize():
  image = picture(30, 30)
  image[..., 1] = 77
  for name in ('autocontrast', 'equalize'):
    got = transformed(image, name, 1.0)
    np.testing.assert_allclose(got[..., 1], 77, atol=1e-3)
    assert abs(got[..., 0] - image[..., 0]).max() > 5


def test_cutout_is_a_grey_square_around_its_centre():
  image = picture(12, 10)
  # Row ⌊0.5·12⌋ = 6 and column ⌊0.99·10⌋ = 9; the side is 0.4·10 = 4, and the
  # square reaches from 2 before the centre to 1 after it, within the image.
  position = jnp.array([0.5, 0.99])
  got = transformed(image, 'cutout', 0.4, position=position)
  expected = image.astype(float)
  expected[4:8, 7:10] = 127.5
  np.testing.assert_allclose(got, expected, atol=1e-3)
  # No other operation cuts.
  same = transformed(image, 'identity', 0.4, position=position)
  np.testing.assert_allclose(same, image, atol=1e-3)


@pytest.mark.parametrize('name', ops.OPS)
def test_values_stay_between_0_and_1_and_finite_at_both_ends(name):
  image = np.random.default_rng(0).random((9, 11, 3), np.float32)
  for value in (0.0, 0.05, 1.0, 2.0 if ops.NUMBER[name] < 14 else 0.5):
    got = program()(image, jnp.int32(ops.NUMBER[name]), jnp.float32(value))
    assert np.isfinite(got).all()
    if value <= 1 or name not in ('autocontrast', 'equalize', 'invert'):
      assert got.min() >= 0 and got.max() <= 1


def test_the_images_of_a_batch_do_not_depend_on_one_another():
  rng = np.random.default_rng(0)
  images = rng.random((36, 9, 8, 3), np.float32)
  op = np.arange(36, dtype=np.int32) % len(ops.OPS)
  value = rng.uniform(0.1, 0.4, 36).astype(np.float32)
  call = ops.batched(ops.transform)
  in_turn = compiled(jax.vmap(call))(images, op, value)
  together = compiled(jax.vmap(ops.transform))(images, op, value)
  each = [program()(*row) for row in zip(images, op, value, strict=True)]
  np.testing.assert_allclose(in_turn, np.stack(each), atol=1e-6)
  np.testing.assert_allclose(together, np.stack(each), atol=1e-6)
  # One value for all images, and another axis, of seeds.
  one = compiled(jax.vmap(call, (0, None, None)))(images, op[0], value[0])
  np.testing.assert_allclose(
    one,
    np.stack([program()(image, op[0], value[0]) for image in images]),
    atol=1e-6,
  )
  twice = compiled(jax.vmap(jax.vmap(call)))(
    images.reshape(4, 9, 9, 8, 3), op.reshape(4, 9), value.reshape(4, 9)
  )
  np.testing.assert_allclose(twice.reshape(images.shape), in_turn, atol=1e-6)


def test_a_sharded_batch_is_computed_by_all_devices():
  mesh = placement.make_mesh([16])
  assert mesh.size == 8
  images = np.random.default_rng(0).random((16, 9, 8, 3), np.float32)
  op = np.arange(16, dtype=np.int32)
  value = np.full(16, 0.3, np.float32)
  call = jax.vmap(ops.batched(ops.transform))
  whole = compiled(call)(images, op, value)
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  with jax.set_mesh(mesh):
    arrays = jax.device_put((images, op, value), rows)
    program = jax.jit(call).lower(*arrays).compile()
    sharded = program(*arrays)
  assert 'all-gather' not in program.as_text()
  np.testing.assert_allclose(sharded, whole, atol=1e-6)
