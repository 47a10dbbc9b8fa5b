"""ImageNet's augmentations compared with NumPy loops, Pillow and colorsys."""

import colorsys
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from views import compiled, many, picture

from ssljax import errors
from ssljax.augment import imagenet, standard

BILINEAR = PIL.Image.Resampling.BILINEAR


def slow_window(draws, height, width, area=(0.2, 1), aspect=(3 / 4, 4 / 3)):
  """Choose a window by a loop over the candidates."""
  for size, shape, down, right in draws:
    pixels = height * width * (area[0] + size * (area[1] - area[0]))
    logarithm = math.log(aspect[0]) + shape * math.log(aspect[1] / aspect[0])
    h = max(1, round(math.sqrt(pixels / math.exp(logarithm))))
    w = max(1, round(math.sqrt(pixels * math.exp(logarithm))))
    if h <= height and w <= width:
      return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
  if width / height < aspect[0]:
    h, w = round(width / aspect[0]), width
  elif width / height > aspect[1]:
    h, w = height, round(height * aspect[1])
  else:
    h, w = height, width
  return (height - h) // 2, (width - w) // 2, h, w


SIZES = [(375, 500), (500, 375), (32, 32), (40, 400), (300, 20), (1, 1), (3, 2)]


@pytest.mark.parametrize('height, width', SIZES)
def test_a_window_is_the_first_try_that_fits(height, width):
  draws = np.random.default_rng(1).random((50, imagenet.TRIES, 4))
  windows = [imagenet.window(own, height, width) for own in draws]
  expected = [slow_window(own, height, width) for own in draws]
  np.testing.assert_array_equal(windows, expected)


@pytest.mark.parametrize('height, width', [(32, 32), (40, 400)])
def test_the_host_and_the_compiled_step_draw_the_same_windows(height, width):
  draws = np.random.default_rng(2).random((50, 10, 4), np.float32)
  on_device = compiled(
    jax.vmap(lambda own: imagenet.window(own, height, width, xp=jnp))
  )(draws)
  on_host = [imagenet.window(own.astype(float), height, width) for own in draws]
  # Near a half, float32 and float64 may round to different whole numbers.
  assert abs(np.array(on_host) - on_device).max() <= 1
  assert (np.array(on_host) == on_device).all(axis=1).mean() > 0.9


def test_windows_cover_all_allowed_areas_aspects_and_positions():
  draws = np.random.default_rng(3).random((4000, imagenet.TRIES, 4))
  top, left, height, width = np.transpose(
    [imagenet.window(own, 1200, 1200) for own in draws]
  )
  assert (top >= 0).all() and (top + height <= 1200).all()
  assert (left >= 0).all() and (left + width <= 1200).all()
  area, aspect = height * width / 1200**2, width / height
  # Sides are at least 1200 √(.2 · 3/4) = 465 and are rounded by at most a half:
  # aspect and area change by at most a factor of 1 ± 1/465.
  near = 1 / 465
  assert 0.2 * (1 - near) <= area.min() < 0.21 and 0.97 < area.max() <= 1
  assert 0.75 * (1 - near) <= aspect.min() < 0.76
  assert 1.32 < aspect.max() <= 4 / 3 * (1 + near)
  # Below an area of 3/4 every candidate fits. There the area is uniform with
  # deviation .55 / √12, and the logarithm of the aspect has mean 0 and
  # deviation log(16/9) / √12. These are at least 2000 of the 4000 windows.
  below = area < 0.75
  assert below.sum() > 2000
  assert abs(area[below].mean() - 0.475) < 4 * 0.55 / (12 * 2000) ** 0.5
  far = math.log(16 / 9) / 12**0.5
  assert abs(np.log(aspect[below]).mean()) < 4 * far / 2000**0.5
  # The position is uniform between the first and the last possible one.
  margin = 1200 - height
  share = (top / np.maximum(margin, 1))[margin > 200]
  assert abs(share.mean() - 0.5) < 4 * 12**-0.5 / len(share) ** 0.5


@pytest.mark.parametrize('box', [(1, 2, 5, 3), (0, 0, 8, 9), (7, 3, 1, 6)])
@pytest.mark.parametrize('channels', [1, 3])
def test_a_window_is_resized_as_pillow_does_it(box, channels):
  image = picture(8, 9, channels)
  top, left, height, width = box
  expected = [
    PIL.Image.fromarray(image[..., i]).resize(
      (9, 8), BILINEAR, (left, top, left + width, top + height)
    )
    for i in range(channels)
  ]
  got = compiled(imagenet.resize_window)(image, np.array(box, np.float32))
  np.testing.assert_allclose(got, np.stack(expected, axis=-1), atol=2e-6)


def test_a_crop_is_the_window_of_its_draws_and_a_function_of_the_key():
  image = picture(12, 10, 3)
  results = many(imagenet.crop(), image, 6)
  np.testing.assert_array_equal(results, many(imagenet.crop(), image, 6))
  assert abs(results[0] - results[1]).max() > 0.1
  keys = jax.random.split(jax.random.key(7), 6)
  draw = lambda key: jax.random.uniform(key, (imagenet.TRIES, 4))
  for result, draws in zip(results, jax.vmap(draw)(keys), strict=True):
    top, left, height, width = slow_window(np.asarray(draws, float), 12, 10)
    box = left, top, left + width, top + height
    expected = [
      PIL.Image.fromarray(image[..., i]).resize((10, 12), BILINEAR, box)
      for i in range(3)
    ]
    np.testing.assert_allclose(result, np.stack(expected, axis=-1), atol=2e-6)


def test_a_crop_of_everything_changes_nothing():
  image = picture(6, 6, 3)
  results = many(imagenet.crop((1, 1), (1, 1)), image, 3)
  np.testing.assert_allclose(
    results, np.broadcast_to(image, results.shape), atol=1e-6
  )


def slow_luma(image):
  return image @ [0.299, 0.587, 0.114]


def test_a_fifth_of_the_images_become_grey():
  image = picture(3, 2, 3)
  results = many(imagenet.grey(), image, 2000)
  grey = np.ptp(results, axis=-1).max(axis=(1, 2)) == 0
  # 2000 draws: the share has deviation √(.16 / 2000) = .009.
  assert abs(grey.mean() - 0.2) < 4 * 0.009
  expected = np.repeat(slow_luma(image)[..., None], 3, axis=-1)
  for result, is_grey in zip(results, grey, strict=True):
    np.testing.assert_allclose(
      result, expected if is_grey else image, atol=1e-6
    )


def test_grey_does_not_change_an_image_of_one_channel():
  image = picture(3, 2, 1)
  np.testing.assert_array_equal(many(imagenet.grey(1), image, 1)[0], image)


NAMES = ('brightness', 'saturation', 'contrast', 'hue')


def slow_recolour(image, order, brightness, saturation, contrast, hue):
  """Apply the changes one after the other, clipping each to [0, 1]."""
  image = image.astype(np.float64)
  for change in order:
    if change == 'brightness':
      image = brightness * image
    elif change == 'saturation':
      shades = slow_luma(image)[..., None]
      image = shades + saturation * (image - shades)
    elif change == 'contrast':
      mean = slow_luma(image).mean()
      image = mean + contrast * (image - mean)
    else:
      turned = np.empty_like(image)
      for place in np.ndindex(image.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*image[place])
        turned[place] = colorsys.hsv_to_rgb((h + hue) % 1, s, v)
      image = turned
    image = image.clip(0, 1)
  return image


recolour = compiled(imagenet.recolour)


def test_every_order_of_the_changes_gives_its_own_result():
  image, factors = picture(4, 5, 3), (1.4, 0.7, 1.35)
  seen = []
  for order in itertools.permutations(range(4)):
    expected = slow_recolour(image, [NAMES[i] for i in order], *factors, 0.3)
    got = recolour(image, np.array(order), np.float32(factors), np.float32(0.3))
    np.testing.assert_allclose(got, expected, atol=3e-6)
    # Because of the clipping in between, no two orders give the same result.
    assert all(abs(expected - other).max() > 1e-3 for other in seen)
    seen.append(expected)


def test_factors_of_1_and_no_change_of_hue_change_nothing():
  image = picture(4, 5, 3)
  for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
    got = recolour(
      image, np.array(order), np.ones(3, np.float32), np.float32(0)
    )
    np.testing.assert_allclose(got, image, atol=1e-6)


def test_brightness_and_contrast_of_a_grey_image_change():
  image = picture(4, 5, 1)
  # The luma of grey is the value itself: saturation has no effect.
  order = np.array([1, 2, 3, 0])
  got = recolour(image, order, np.float32([0.9, 0.2, 1.3]), np.float32(0.3))
  mean = image.mean()
  expected = 0.9 * (mean + 1.3 * (image - mean)).clip(0, 1)
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_jitter_draws_orders_and_factors_uniformly():
  keys = jax.random.split(jax.random.key(3), 3000)
  draw = lambda key: imagenet.draw_colours(key, imagenet.FACTORS, imagenet.HUE)
  order, factors, turns = map(np.asarray, compiled(jax.vmap(draw))(keys))
  counts = np.unique(order, axis=0, return_counts=True)[1]
  # 3000 draws of 24 orders: a count has deviation √(3000 · 23) / 24 = 10.9.
  assert len(counts) == 24 and abs(counts - 125).max() < 5 * 10.9
  for values, middle, far in (
    *((column, 1.0, 0.4) for column in factors.T),
    (turns, 0.0, 0.4),
  ):
    # U(middle ± far) has deviation far / √3. With 3000 draws some come within
    # 1 % of an end.
    assert abs(values - middle).max() <= far * (1 + 1e-6)
    assert abs(values - middle).max() > 0.99 * far
    assert abs(values.mean() - middle) < 4 * far / 9000**0.5
  assert abs(np.corrcoef(np.c_[factors, turns].T) - np.eye(4)).max() < 0.09


def test_jitter_recolours_as_drawn():
  image = picture(4, 5, 3)
  results = many(imagenet.jitter(), image, 8)
  draw = lambda key: imagenet.draw_colours(key, imagenet.FACTORS, imagenet.HUE)
  for result, key in zip(
    results, jax.random.split(jax.random.key(7), 8), strict=True
  ):
    order, factors, turns = map(np.asarray, draw(key))
    expected = slow_recolour(image, [NAMES[i] for i in order], *factors, turns)
    np.testing.assert_allclose(result, expected, atol=3e-6)


@pytest.mark.parametrize('channels', [1, 3])
def test_shape_and_dtype_do_not_change(channels):
  views = standard.chain(imagenet.crop(), imagenet.grey(), imagenet.jitter())
  image = jax.ShapeDtypeStruct((28, 30, channels), jnp.float32)
  result = jax.eval_shape(views, jax.random.key(0), image)
  assert (result.shape, result.dtype) == (image.shape, image.dtype)


@pytest.mark.parametrize(
  'factory, message',
  [
    (lambda: imagenet.crop((0.5, 0.2)), 'area=0.5,0.2: give the lower'),
    (lambda: imagenet.crop((0.0, 0.2)), 'area=0.0'),
    (lambda: imagenet.crop((0.5, 1.5)), 'area=1.5'),
    (lambda: imagenet.crop(aspect=(2, 1)), 'aspect=2,1'),
    (lambda: imagenet.grey(1.1), 'probability=1.1'),
    (lambda: imagenet.jitter((1, -1)), 'factors=-1'),
    (lambda: imagenet.jitter(hue=float('nan')), 'hue=nan'),
  ],
)
def test_invalid_numbers_are_refused_by_name(factory, message):
  with pytest.raises(errors.InputError, match=message):
    factory()
