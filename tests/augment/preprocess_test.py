"""Preprocessing compared with its formulas in NumPy on a whole data set."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax import errors
from ssljax.augment import preprocess

SHAPE = (3, 4, 2)  # D = 24
PIXELS = 24

EVERY = {
  'identity': preprocess.identity(),
  'standardize': preprocess.standardize(),
  'gcn': preprocess.gcn(),
  'image_standardize': preprocess.image_standardize(),
  'zca': preprocess.zca(),
  'gcn_zca': preprocess.gcn_zca(),
}


def photographs(n, seed=0):
  """uint8 [n, 3, 4, 2] images whose neighbouring values are correlated."""
  rng = np.random.default_rng(seed)
  mixing = np.exp(-abs(np.subtract.outer(range(PIXELS), range(PIXELS))) / 4)
  values = 128 + 20 * rng.standard_normal((n, PIXELS)) @ mixing
  return values.clip(0, 255).astype(np.uint8).reshape(n, *SHAPE)


def processed(part, train, images):
  """Fit on `train`, then apply to all `images` in one compiled batch."""
  # With the default optimisation, since the order of a sum affects rounding.
  options = {
    'xla_backend_optimization_level': 3,
    'xla_llvm_disable_expensive_passes': False,
    'xla_cpu_use_fusion_emitters': True,
  }
  batch = jax.jit(jax.vmap(part.apply, (None, 0)), compiler_options=options)
  return np.asarray(batch(part.fit(train), preprocess.to_unit_interval(images)))


def flat(images):
  """Convert uint8 images to vectors [n, D] float64 of pixels / 255."""
  return images.reshape(len(images), -1).astype(np.float64) / 255


def slow_gcn(vectors, scale=55.0):
  """Compute scale (x - x̄) / ‖x - x̄‖ row by row."""
  return np.stack(
    [scale * (x - x.mean()) / np.linalg.norm(x - x.mean()) for x in vectors]
  )


def slow_zca(train, vectors, regularizer):
  """Whiten by the formula, with the singular values of the centred data.

  X = A diag(s) Vᵀ gives Σ = V diag(s² / N) Vᵀ. Directions orthogonal to V have
  variance 0.
  """
  _, s, v = np.linalg.svd(train - train.mean(axis=0), full_matrices=True)
  variance = np.zeros(train.shape[1])
  variance[: len(s)] = s**2 / len(train)
  return (
    (vectors - train.mean(axis=0)) @ v.T / np.sqrt(variance + regularizer)
  ) @ v


def test_identity_leaves_the_pixels():
  images = photographs(5)
  np.testing.assert_array_equal(
    processed(preprocess.identity(), images, images), images / np.float32(255)
  )


def test_standardized_channels_have_mean_0_and_deviation_1():
  images = photographs(50)
  images[..., 1] //= 3
  result = processed(preprocess.standardize(), images, images)
  np.testing.assert_allclose(result.mean(axis=(0, 1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(result.std(axis=(0, 1, 2)), 1, atol=1e-5)


def test_other_images_are_standardized_with_the_moments_of_the_training_set():
  train, other = photographs(50), photographs(5, seed=1)
  pixels = train / 255
  expected = (other / 255 - pixels.mean(axis=(0, 1, 2))) / pixels.std(
    axis=(0, 1, 2)
  )
  np.testing.assert_allclose(
    processed(preprocess.standardize(), train, other), expected, atol=1e-5
  )


def test_a_constant_channel_is_only_centred():
  images = photographs(9)
  images[..., 0] = 77
  result = processed(preprocess.standardize(), images, images)
  np.testing.assert_allclose(result[..., 0], 0, atol=1e-6)


def test_contrast_normalisation_is_its_formula():
  images = photographs(6)
  result = processed(preprocess.gcn(10.0), images, images)
  np.testing.assert_allclose(
    result.reshape(6, -1), slow_gcn(flat(images), 10.0), atol=1e-5
  )


def test_each_standardized_image_has_mean_0_and_root_mean_square_1():
  images = photographs(6)
  result = processed(preprocess.image_standardize(), images, images)
  np.testing.assert_allclose(result.mean(axis=(1, 2, 3)), 0, atol=1e-6)
  np.testing.assert_allclose((result**2).mean(axis=(1, 2, 3)), 1, atol=1e-5)


@pytest.mark.parametrize('part', ['gcn', 'image_standardize'])
def test_constant_images_become_0_but_a_single_odd_pixel_does_not(part):
  # In float32 the mean of some of the 256 grey levels is not exact.
  images = np.tile(np.arange(256, dtype=np.uint8), (32, 32, 3, 1))
  images = np.moveaxis(images, -1, 0)
  assert (processed(EVERY[part], images, images) == 0).all()
  images = images[:1].copy()
  images[0, 4, 5, 0] = 1
  result = processed(EVERY[part], images, images)
  # One of D values is one grey level higher: it is 1 - 1/D above the mean, and
  # the norm is √(1 - 1/D), so that value is nearly the whole norm.
  norm = {'gcn': 55.0, 'image_standardize': 3072**0.5}[part]
  np.testing.assert_allclose(result[0, 4, 5, 0], norm, rtol=1e-3)


def test_whitened_images_have_the_identity_as_covariance():
  images = photographs(2000)
  result = processed(preprocess.zca(1e-7), images, images).reshape(2000, -1)
  covariance = np.cov(result.T.astype(np.float64), bias=True)
  # W Σ W has eigenvalues λ / (λ + ε), and λ > 5e-5 here: 1 - .002 at least.
  assert np.linalg.eigvalsh(np.cov(flat(images).T)).min() > 5e-5
  np.testing.assert_allclose(covariance, np.eye(PIXELS), atol=2e-3)


@pytest.mark.parametrize('n', [10, 200])  # fewer and more images than D
@pytest.mark.parametrize('regularizer', [1e-5, 0.1])
def test_whitening_is_its_formula(n, regularizer):
  train, other = photographs(n), photographs(7, seed=1)
  result = processed(preprocess.zca(regularizer), train, other)
  expected = slow_zca(flat(train), flat(other), regularizer)
  # float32 pixels of size 1 are rounded by 6e-8, multiplied by up to 1/√1e-5.
  np.testing.assert_allclose(
    result.reshape(7, -1), expected, rtol=1e-4, atol=2e-4
  )


def test_the_whitening_matrix_is_symmetric():
  matrix = preprocess.zca().fit(photographs(100)).matrix
  np.testing.assert_allclose(matrix, matrix.T, atol=1e-4)


def test_whitening_after_normalisation_is_fitted_on_its_output():
  train, other = photographs(100), photographs(7, seed=1)
  result = processed(preprocess.gcn_zca(), train, other)
  expected = slow_zca(slow_gcn(flat(train)), slow_gcn(flat(other)), 0.1)
  np.testing.assert_allclose(
    result.reshape(7, -1), expected, rtol=1e-4, atol=2e-4
  )


def test_a_composition_of_three_fits_each_on_those_before():
  parts = (preprocess.gcn(), preprocess.zca(0.1), preprocess.standardize())
  images = photographs(100)
  result = processed(preprocess.compose(*parts), images, images)
  np.testing.assert_allclose(result.mean(axis=(0, 1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(result.std(axis=(0, 1, 2)), 1, atol=1e-5)


def test_an_empty_composition_is_the_identity():
  images = photographs(3)
  np.testing.assert_array_equal(
    processed(preprocess.compose(), images, images),
    preprocess.to_unit_interval(images),
  )


class SlicedImages:
  """Images that can only be read by slices; records the sizes read."""

  def __init__(self, images):
    self.images, self.sizes = images, []
    self.shape, self.ndim = images.shape, images.ndim
    self.dtype, self.size = images.dtype, images.size

  def __len__(self):
    return len(self.images)

  def __getitem__(self, rows):
    self.sizes.append(len(self.images[rows]))
    return self.images[rows]


@pytest.mark.parametrize('name', EVERY)
def test_fitting_reads_a_chunk_at_a_time_with_the_same_result(
  name, monkeypatch
):
  images = photographs(50)
  whole = EVERY[name].fit(images)
  monkeypatch.setattr(preprocess, 'CHUNK', 7 * PIXELS)
  sliced = SlicedImages(images)
  parts = EVERY[name].fit(sliced)
  assert max(sliced.sizes, default=0) <= 7
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', EVERY)
def test_fitted_arrays_are_float32_and_a_row_does_not_depend_on_others(name):
  part, images = EVERY[name], photographs(30)
  fitted = part.fit(images)
  for leaf in jax.tree.leaves(fitted):
    assert isinstance(leaf, np.ndarray) and leaf.dtype == np.float32
  together = processed(part, images, images[:3])
  for row in range(3):
    alone = part.apply(
      fitted, jnp.asarray(preprocess.to_unit_interval(images[row]))
    )
    assert alone.dtype == jnp.float32
    np.testing.assert_allclose(alone, together[row], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize(
  'images',
  [
    np.zeros((2, 3, 4, 1), np.float32),
    np.zeros((3, 4, 1), np.uint8),
    np.zeros((0, 3, 4, 1), np.uint8),
  ],
)
def test_only_uint8_images_are_fitted(name, images):
  with pytest.raises(errors.InputError, match='uint8 images'):
    EVERY[name].fit(images)


def test_whitening_of_large_images_is_refused_before_it_starts():
  images = np.zeros((1, 128, 128, 3), np.uint8)
  with pytest.raises(errors.InputError, match='49152'):
    preprocess.zca().fit(images)


@pytest.mark.parametrize('value', [-1.0, 0.0, float('nan'), float('inf')])
def test_an_invalid_number_is_refused_by_name(value):
  with pytest.raises(errors.InputError, match='scale'):
    preprocess.gcn(value)
  with pytest.raises(errors.InputError, match='regularizer'):
    preprocess.zca(value)


def test_imagenets_constants_make_its_mean_zero():
  # The mean of a channel becomes 0, the mean plus one deviation becomes 1.
  mean, std = (
    np.float32([0.485, 0.456, 0.406]),
    np.float32([0.229, 0.224, 0.225]),
  )
  image = np.stack([mean, mean + std])[None]
  result = preprocess.imagenet().apply((), image)
  np.testing.assert_allclose(result[0], [[0, 0, 0], [1, 1, 1]], atol=1e-6)


def test_imagenets_constants_need_colour_images():
  with pytest.raises(errors.InputError, match='preprocess=imagenet'):
    preprocess.imagenet().apply((), np.zeros((4, 4, 1), np.float32))


@pytest.mark.parametrize(
  'make',
  [
    preprocess.identity,
    preprocess.standardize,
    preprocess.gcn,
    preprocess.zca,
    preprocess.gcn_zca,
    preprocess.imagenet,
  ],
)
def test_fitted_arrays_have_the_announced_shapes(make):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (9, 4, 5, 3)).astype(np.uint8)
  part = make()
  told = part.shapes(images.shape[1:])
  chex.assert_trees_all_equal_shapes_and_dtypes(told, part.fit(images))
