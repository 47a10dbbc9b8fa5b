"""Standard augmentations compared with loops in NumPy, SciPy and colorsys."""

import colorsys
import functools

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from views import compiled, many, picture, which

from ssljax.augment import geometric, standard
from ssljax.errors import InputError


def crops(image, pad):
  """All crops [(2 pad + 1)², H, W, c] of the image padded by reflection."""
  height, width, _ = image.shape
  padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode='reflect')
  return np.stack(
    [
      padded[i : i + height, j : j + width]
      for i in range(2 * pad + 1)
      for j in range(2 * pad + 1)
    ]
  )


def test_bytes_become_floats_between_0_and_1():
  given = np.array([[0, 51, 255]], np.uint8)
  np.testing.assert_allclose(standard.to_float(given), [[0, 0.2, 1]], rtol=1e-6)
  assert standard.to_float(given).dtype == jnp.float32


def test_floats_are_not_divided_again():
  given = np.array([[-1.5, 0, 300]], np.float32)
  np.testing.assert_array_equal(standard.to_float(given), given)
  for other in (np.float64, np.int32):
    with pytest.raises(AssertionError):
      standard.to_float(given.astype(other))


def test_flip_mirrors_half_of_the_images():
  image = picture(3, 4, 2)
  choice = which(
    many(standard.flip, image, 1000), np.stack([image, image[:, ::-1]])
  )
  assert (choice >= 0).all()
  # 1000 fair coins: the share is off by 4 √(.25 / 1000) = .063 with probability
  # 6e-5.
  assert abs(choice.mean() - 0.5) < 0.063


@pytest.mark.parametrize('amount', [0, 2, 4])
def test_translation_reaches_every_shift_equally_often(amount):
  image = picture(6, 7, 2)
  choice = which(
    many(standard.translate(amount), image, 4000), crops(image, amount)
  )
  assert (choice >= 0).all()
  cells = (2 * amount + 1) ** 2
  counts = np.bincount(choice, minlength=cells)
  # A count is binomial with deviation below √(n / cells); one of at most 81
  # counts is off by 5 deviations with probability 81 * 6e-7.
  assert abs(counts - 4000 / cells).max() <= 5 * (4000 / cells) ** 0.5


def bilinear(image, height, width):
  """Resize [H, W, c] pixel by pixel, with coordinates of pixel centres."""
  out = np.zeros((height, width, image.shape[2]))
  for i in range(height):
    for j in range(width):
      y = np.clip((i + 0.5) * image.shape[0] / height - 0.5, 0, None)
      x = np.clip((j + 0.5) * image.shape[1] / width - 0.5, 0, None)
      a, b = int(y), int(x)
      c, d = min(a + 1, image.shape[0] - 1), min(b + 1, image.shape[1] - 1)
      out[i, j] = (1 - y + a) * (
        (1 - x + b) * image[a, b] + (x - b) * image[a, d]
      ) + (y - a) * ((1 - x + b) * image[c, b] + (x - b) * image[c, d])
  return out


def test_half_of_the_images_are_cropped_and_half_are_zoomed():
  image = picture(6, 7, 3)
  results = many(standard.crop_or_resize(2), image, 1000)
  choice = which(results, crops(image, 2))
  padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode='reflect')
  zoomed = results[choice < 0]
  np.testing.assert_allclose(
    zoomed, np.broadcast_to(bilinear(padded, 6, 7), zoomed.shape), atol=1e-6
  )
  assert abs(len(zoomed) / 1000 - 0.5) < 0.063  # as for the flip
  # 25 crops in about 500 draws: one never occurs with probability
  # 25 (24/25)^500 = 3e-8.
  assert set(choice) == set(range(-1, 25))


def test_noise_has_the_given_deviation():
  image = picture(4, 4, 3)
  added = many(standard.noise(0.15), image, 1000) - image
  # n = 48,000 values: the mean has deviation σ/√n, the deviation σ/√(2n).
  n = added.size
  assert abs(added.mean()) < 4 * 0.15 / n**0.5
  assert abs(added.std() - 0.15) < 4 * 0.15 / (2 * n) ** 0.5


def test_noise_of_0_changes_nothing():
  image = picture(4, 4, 3)
  np.testing.assert_array_equal(
    standard.noise(0)(jax.random.key(0), image), image
  )


def with_square(image, row, column, size):
  """The image with a square of zeros around one pixel."""
  top, left = row - size // 2, column - size // 2
  out = image.copy()
  out[max(top, 0) : top + size, max(left, 0) : left + size] = 0
  return out


@pytest.mark.parametrize('size', [3, 4])
def test_every_pixel_is_equally_often_the_centre_of_a_square(size):
  image = picture(6, 7, 2) - 0.5
  expected = [with_square(image, *place, size) for place in np.ndindex(6, 7)]
  choice = which(many(standard.cutout(size), image, 4000), np.stack(expected))
  assert (choice >= 0).all()
  # As for translations: 42 cells of deviation √(4000 / 42).
  counts = np.bincount(choice, minlength=42)
  assert abs(counts - 4000 / 42).max() <= 5 * (4000 / 42) ** 0.5


@pytest.mark.parametrize(
  'centre, pixels',
  [
    # Of the rows c − 8 .. c + 7 those in the image: 0 .. 7, all, or 23 .. 31.
    ((0, 0), 8 * 8),
    ((0, 31), 8 * 9),
    ((31, 31), 9 * 9),
    ((16, 0), 16 * 8),
    ((31, 16), 9 * 16),
    # The outermost centres of whole squares, and one pixel beyond.
    ((8, 8), 16 * 16),
    ((24, 24), 16 * 16),
    ((7, 25), 15 * 15),
  ],
)
def test_a_square_is_clipped_at_the_border(centre, pixels):
  mask = standard.square_mask((32, 32, 3), np.array(centre), 16)
  assert mask.shape == (32, 32, 1) and mask.sum() == pixels


def test_a_square_of_size_0_changes_nothing_and_a_large_one_is_refused():
  image = picture(4, 5, 3)
  key = jax.random.key(0)
  np.testing.assert_array_equal(standard.cutout(0)(key, image), image)
  with pytest.raises(InputError, match='cutout: a square of 4 pixels'):
    standard.cutout(4)(key, image)


@pytest.mark.parametrize('size, sigma', [(7, 1.4), (5, 0.7), (11, None)])
def test_kernel_weights_are_gaussian(size, sigma):
  weights = standard.gaussian(size, sigma)
  # OpenCV's sigma of size 11: 0.3 (5 - 1) + 0.8.
  deviation = sigma or 2.0
  peak = size // 2
  for place, weight in enumerate(weights):
    expected = np.exp(-((place - peak) ** 2) / (2 * deviation**2))
    np.testing.assert_allclose(weight / weights[peak], expected, rtol=1e-12)
  assert abs(sum(weights) - 1) < 1e-12


@pytest.mark.parametrize('size', [1, 3, 5, 7, 9])
def test_small_kernels_are_close_to_gaussians_of_opencvs_sigma(size):
  weights = standard.gaussian(size)
  assert abs(sum(weights) - 1) < 1e-12 and weights == weights[::-1]
  sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8
  np.testing.assert_allclose(
    weights, standard.gaussian(size, sigma), atol=0.03 if size < 7 else 0.007
  )


@pytest.mark.parametrize('shape', [(8, 9, 3), (3, 2, 1)])
@pytest.mark.parametrize('sigma', [None, 1.4])
def test_a_blur_is_scipys_with_the_border_mirrored(shape, sigma):
  image, weights = picture(*shape), standard.gaussian(7, sigma)
  expected = image.astype(np.float64)
  for axis in (0, 1):
    expected = scipy.ndimage.correlate1d(expected, weights, axis, mode='mirror')
  blurred = many(standard.blur(7, sigma, 1), image, 2)
  np.testing.assert_allclose(
    blurred, np.broadcast_to(expected, blurred.shape), atol=1e-6
  )
  assert blurred.min() >= image.min() and blurred.max() <= image.max()


def test_half_of_the_images_are_blurred():
  image = picture(8, 9, 3)
  sharp = (many(standard.blur(), image, 1000) == image).all(axis=(1, 2, 3))
  assert abs(sharp.mean() - 0.5) < 0.063  # as for the flip
  for augmentation in (standard.blur(probability=0), standard.blur(1, None, 1)):
    np.testing.assert_array_equal(many(augmentation, image, 1)[0], image)


def slow_saturation(image, factor):
  """Scale the saturation in HSV, pixel by pixel; a value ≤ 0 becomes grey."""
  out = np.empty(image.shape)
  for place in np.ndindex(image.shape[:2]):
    pixel = image[place]
    if pixel.max() <= 0:
      out[place] = pixel.max()
      continue
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    out[place] = colorsys.hsv_to_rgb(hue, min(1, saturation * factor), value)
  return out


def slow_recolour(image, order, brightness, saturation, contrast):
  """Apply the changes of an order one after the other."""
  image = image.astype(np.float64)
  for step in order:
    if step == 'brightness':
      image = image + brightness
    elif step == 'saturation':
      image = slow_saturation(image, saturation)
    else:
      mean = image.mean(axis=(0, 1))
      image = contrast * (image - mean) + mean
  return image


recolour = compiled(standard.recolour)


@pytest.mark.parametrize('order', range(6))
@pytest.mark.parametrize(
  'factors',
  [
    (-0.24, 1.7, 1.6),  # exceeds [0, 1] at both ends before saturation
    (0.2, 0.3, 1.8),
    (-0.1, 1.8, 0.3),
  ],
)
def test_every_order_of_the_colour_changes(order, factors):
  image = picture(4, 5, 3)
  expected = slow_recolour(image, standard.ORDERS[order], *factors)
  np.testing.assert_allclose(
    recolour(image, order, *factors), expected, atol=2e-6
  )


def test_the_orders_are_all_different():
  assert len(set(standard.ORDERS)) == 6


def test_saturation_agrees_with_pix():
  image = picture(8, 8, 3)
  with jax.numpy_dtype_promotion('standard'):
    expected = pix.adjust_saturation(image, 1.5)
  np.testing.assert_allclose(standard.saturate(image, 1.5), expected, atol=1e-6)


def test_a_grey_image_has_no_saturation_to_change():
  image = picture(4, 5, 1)
  np.testing.assert_array_equal(standard.saturate(image, 0.3), image)
  mean = image.mean()
  for order in range(6):
    np.testing.assert_allclose(
      recolour(image, order, 0.1, 0.2, 1.5),
      1.5 * (image - mean) + mean + 0.1,
      atol=1e-6,
    )


def test_colours_stay_between_0_and_1_and_follow_the_drawn_factors():
  image = picture(4, 5, 3)
  results = many(standard.distort, image, 40)
  assert results.min() >= 0 and results.max() <= 1
  keys = jax.random.split(jax.random.key(7), 40)
  drawn = compiled(jax.vmap(standard.draw_colours))(keys)
  for result, order, *factors in zip(
    results, *map(np.asarray, drawn), strict=True
  ):
    expected = slow_recolour(image, standard.ORDERS[order], *factors)
    np.testing.assert_allclose(result, expected.clip(0, 1), atol=2e-6)


def test_colour_changes_are_drawn_uniformly():
  keys = jax.random.split(jax.random.key(3), 3000)
  order, *drawn = map(
    np.asarray, compiled(jax.vmap(standard.draw_colours))(keys)
  )
  # 3000 draws of 6 orders: a count has deviation √(3000 * 5/36) = 20.4.
  assert abs(np.bincount(order, minlength=6) - 500).max() < 4.5 * 20.4
  for values, low, high in zip(
    drawn, (-63 / 255, 0.2, 0.2), (63 / 255, 1.8, 1.8), strict=True
  ):
    assert low <= values.min() and values.max() <= high
    deviation = (high - low) / 12**0.5
    assert abs(values.mean() - (low + high) / 2) < 4 * deviation / 3000**0.5
    # The relative standard error of the deviation of a uniform sample is about
    # .45 / √n.
    assert abs(values.std() / deviation - 1) < 4 * 0.45 / 3000**0.5


def slow_jitter(image, light, colour, turns):
  """LbA's colour changes for STL-10, pixel by pixel, without the grey."""
  out = np.empty(image.shape)
  for place in np.ndindex(image.shape[:2]):
    hue, saturation, value = colorsys.rgb_to_hsv(*(image[place] + light))
    saturation = min(1, saturation * colour)
    out[place] = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
  return out


def test_jitter_changes_hue_and_saturation_as_colorsys_does():
  image = 0.3 + picture(4, 5, 3) / 2
  jitter = standard.jitter(50, (0.5, 1.2), 0.1, 0.5)
  results = many(jitter, image, 12)
  keys = jax.random.split(jax.random.key(7), 12)
  drawn = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (4,)))(keys))
  assert 0 < (drawn[:, 3] < 0.5).sum() < 12
  for result, (light, colour, turns, shade) in zip(results, drawn, strict=True):
    expected = slow_jitter(
      image, 50 / 255 * (2 * light - 1), 0.5 + 0.7 * colour, 0.2 * turns - 0.1
    )
    if shade < 0.5:
      luma = expected @ [0.2989, 0.587, 0.114]
      expected = np.repeat(luma[..., None], 3, axis=-1)
    np.testing.assert_allclose(result, expected.clip(0, 1), atol=2e-6)


def test_jitter_of_nothing_changes_nothing():
  image = picture(4, 5, 3)
  results = many(standard.jitter(0, (1, 1), 0, 0), image, 4)
  np.testing.assert_allclose(
    results, np.broadcast_to(image, results.shape), atol=1e-6
  )


def test_half_of_the_images_become_grey():
  image = picture(2, 2, 3)
  results = many(standard.jitter(), image, 1000)
  grey = np.ptp(results, axis=-1).max(axis=(1, 2)) == 0
  assert abs(grey.mean() - 0.5) < 0.063  # as for the flip
  assert results.min() >= 0 and results.max() <= 1


def test_jitter_changes_only_the_brightness_of_a_grey_image():
  image = 0.2 + picture(3, 4, 1) / 2
  added = many(standard.jitter(25.5), image, 1000) - image
  np.testing.assert_allclose(np.ptp(added, axis=(1, 2, 3)), 0, atol=1e-6)
  added = added[:, 0, 0, 0]
  # U(-a, a) with a = 25.5 / 255 has deviation a / √3, as for rotation angles.
  assert abs(added).max() <= 0.1 + 1e-6
  assert abs(added.mean()) < 4 * 0.1 / 3000**0.5
  assert added.max() > 0.097 and added.min() < -0.097


def test_stl10_without_changes_is_a_flip():
  image = picture(6, 6, 3)
  still = standard.stl10(0, 0, 0, (1, 1), 0, 0)
  results = many(still, image, 40)
  for result in results:
    errors = [abs(result - one).max() for one in (image, image[:, ::-1])]
    assert min(errors) < 1e-6
  assert 0 < (abs(results - image).max(axis=(1, 2, 3)) < 1e-6).sum() < 40


def test_an_empty_chain_is_the_identity():
  image = picture(4, 4, 3)
  assert standard.chain()(jax.random.key(0), image) is image


def test_a_chain_gives_each_part_its_own_key():
  image, key = picture(4, 4, 3), jax.random.key(5)
  noise = standard.noise(0.3)
  chained = standard.chain(noise, standard.flip, noise)(key, image)
  first, second, third = jax.random.split(key, 3)
  np.testing.assert_array_equal(
    chained, noise(third, standard.flip(second, noise(first, image)))
  )
  # The two parts draw different numbers.
  assert abs(noise(first, image) - noise(third, image)).max() > 0.1


PIPELINES = {
  'te': standard.chain(standard.translate(1), standard.flip, standard.noise()),
  'madnn': standard.chain(
    geometric.rotate(), standard.crop_or_resize(1), standard.distort
  ),
  'r2d2': standard.chain(
    standard.translate(1), standard.flip, standard.cutout(3)
  ),
  'lba_svhn': standard.chain(geometric.affine(), standard.blur()),
  'lba_stl10': standard.stl10(),
}


@pytest.mark.parametrize('name', PIPELINES)
def test_a_row_does_not_depend_on_the_batch_it_is_in(name):
  images = picture(6, 5, 5, 3)
  keys = jax.random.split(jax.random.key(1), 6)
  batched = jax.vmap(PIPELINES[name])
  whole = compiled(batched)(keys, images)
  alone = compiled(PIPELINES[name])
  for row in range(6):
    np.testing.assert_allclose(
      alone(keys[row], images[row]), whole[row], atol=1e-6
    )
  split = compiled(jax.vmap(batched))(
    keys.reshape(2, 3), images.reshape(2, 3, 5, 5, 3)
  )
  np.testing.assert_allclose(split.reshape(whole.shape), whole, atol=1e-6)
  turned = compiled(batched)(keys[::-1], images[::-1])[::-1]
  np.testing.assert_array_equal(turned, whole)


@pytest.mark.parametrize('name', PIPELINES)
@pytest.mark.parametrize('channels', [1, 3])
def test_shape_and_dtype_do_not_change(name, channels):
  image = jax.ShapeDtypeStruct((28, 30, channels), jnp.float32)
  result = jax.eval_shape(PIPELINES[name], jax.random.key(0), image)
  assert (result.shape, result.dtype) == (image.shape, image.dtype)


def test_both_kinds_of_random_keys_work():
  image = picture(4, 4, 3)
  np.testing.assert_array_equal(
    standard.noise()(jax.random.PRNGKey(0), image),
    standard.noise()(jax.random.key(0), image),
  )


@pytest.mark.parametrize(
  'factory, name',
  [
    (standard.translate, 'amount'),
    (standard.crop_or_resize, 'pad'),
    (standard.noise, 'sigma'),
    (standard.cutout, 'size'),
    (standard.blur, 'size'),
    (functools.partial(standard.blur, 7), 'sigma'),
    (functools.partial(standard.blur, 7, None), 'probability'),
    (standard.stl10, 'degrees'),
    (functools.partial(standard.stl10, 10), 'crop'),
    (standard.jitter, 'brightness'),
    (lambda value: standard.jitter(saturation=(value, 1)), 'saturation'),
    (lambda value: standard.jitter(saturation=(0, value)), 'saturation'),
    (lambda value: standard.jitter(hue=value), 'hue'),
    (lambda value: standard.jitter(grey=value), 'grey'),
  ],
)
@pytest.mark.parametrize('value', [-1, float('nan'), float('inf')])
def test_an_invalid_number_is_refused_by_name(factory, name, value):
  with pytest.raises(InputError, match=name):
    factory(value)


@pytest.mark.parametrize(
  'factory',
  [standard.translate, standard.crop_or_resize, standard.cutout, standard.blur],
)
def test_a_fraction_of_a_pixel_is_refused(factory):
  with pytest.raises(InputError, match='whole number'):
    factory(1.5)


def test_a_blur_of_an_even_size_is_refused():
  with pytest.raises(InputError, match='odd'):
    standard.blur(4)


def test_factors_in_the_wrong_order_are_refused():
  with pytest.raises(InputError, match='lower number first'):
    standard.jitter(saturation=(1.2, 0.5))
