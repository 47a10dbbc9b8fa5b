"""Deterministic preprocessing of images, the same in training and in test.

A `Preprocess` is fitted once on the training images, in NumPy and float64. The
images are read in chunks, so that memory use does not grow with N. Its `apply`
is a pure JAX function of one image, meant for `vmap` inside a compiled step.
Random augmentations follow it.

MA-DNN   none                       R2-D2    standardize()
TE       CIFAR zca()                MT       CIFAR gcn_zca()
         SVHN image_standardize()            SVHN image_standardize()
LLP      imagenet()
"""

from collections.abc import Callable, Iterator
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ssljax import errors

# Number of values in a chunk: 64 MiB in float64.
CHUNK = 2**23
# Eigenvectors of a larger [D, D] than for 64x64x3 take hours and gigabytes.
MAX_VALUES = 64 * 64 * 3
# The Euclidean distance of a non-constant uint8 / 255 image from its mean is at
# least √(1 - 1/D) / 255. A smaller distance is a rounding error.
MIN_CONTRAST = 1e-3


class Preprocess(NamedTuple):
  """A deterministic map of images, fitted on the training set.

  `fit` has a second, optional argument that `compose` uses: a function from a
  chunk of uint8 images to the input [n, H, W, c] float32 of this part, by
  default pixels/255.
  """

  fit: Callable  # uint8 images [N, H, W, c] -> pytree of float32 numpy arrays
  apply: Callable  # (fitted, image [H, W, c] float32 in [0, 1]) -> [H, W, c]
  # (H, W, c) -> the `jax.ShapeDtypeStruct`s of the result of `fit`
  shapes: Callable = lambda shape: ()


class Standard(NamedTuple):
  """Moments fitted by `standardize`."""

  mean: np.ndarray  # [1, 1, c]
  std: np.ndarray  # [1, 1, c]


class Whitening(NamedTuple):
  """Parameters fitted by `zca`; D = H W c."""

  mean: np.ndarray  # [H, W, c]
  matrix: np.ndarray  # [D, D] symmetric


# The usual constants for ImageNet's training images.
IMAGENET = Standard(
  np.array([[[0.485, 0.456, 0.406]]], np.float32),
  np.array([[[0.229, 0.224, 0.225]]], np.float32),
)


def to_unit_interval(images: np.ndarray) -> np.ndarray:
  """Convert uint8 [n, H, W, c] to float32 in [0, 1], as a train step does."""
  return images.astype(np.float32) / np.float32(255)


def identity() -> Preprocess:
  """Leave images in [0, 1] unchanged (MA-DNN)."""
  return Preprocess(_fit_nothing, lambda fitted, image: image)


def standardize() -> Preprocess:
  """Compute (x - μ) / σ with the training set's moments of each channel.

  R2-D2 uses the constants of CIFAR-10, (.4914, .4822, .4465) and (.2470, .2435,
  .2616), which are the same quantities. A constant channel is only centred.
  """

  def fit(images: np.ndarray, view: Callable = to_unit_interval) -> Standard:
    mean = _mean(images, view).mean(axis=(0, 1), keepdims=True)
    chunks = _chunks(images, view)
    total = sum(((x - mean) ** 2).sum(axis=(0, 1, 2)) for x in chunks)
    std = np.sqrt(total / np.prod(images.shape[:3]))
    # If one pixel of N H W differs by 1/255, the deviation is still above this.
    std = np.where(std < 1e-7, 1.0, std)[None, None]
    return Standard(mean.astype(np.float32), std.astype(np.float32))

  def shapes(shape: tuple[int, int, int]) -> Standard:
    return Standard(*[_float32(1, 1, shape[-1])] * 2)

  return Preprocess(fit, _standardize, shapes)


def standardize_features() -> Preprocess:
  """Compute (x - μ) / σ for each of the D features of a vector [1, D, 1].

  μ and σ are the moments of the training vectors. A constant feature is only
  centred.
  """

  def fit(vectors: np.ndarray, view: Callable | None = None) -> Standard:
    del view
    vectors = vectors.astype(np.float64)
    mean, std = vectors.mean(axis=0), vectors.std(axis=0)
    std = np.where(std < 1e-7, 1.0, std)
    return Standard(mean.astype(np.float32), std.astype(np.float32))

  def shapes(shape: tuple[int, int, int]) -> Standard:
    return Standard(*[_float32(*shape)] * 2)

  return Preprocess(fit, _standardize, shapes)


def _float32(*shape: int) -> Any:
  """Return the shape of an array, which stands for the array in a plan."""
  return jax.ShapeDtypeStruct(shape, np.float32)


def imagenet() -> Preprocess:
  """Standardize colour images with the constants of ImageNet (LLP)."""

  def apply(fitted: tuple[()], image: chex.Array) -> chex.Array:
    del fitted
    errors.require(
      image.shape[-1] == 3,
      '`preprocess`=imagenet: needs images with 3 channels, but these have '
      f'{image.shape[-1]}: give another preprocessing, such as standardize',
    )
    return _standardize(IMAGENET, image)

  return Preprocess(_fit_nothing, apply)


def _standardize(fitted: Standard, image: chex.Array) -> chex.Array:
  """Return (x - μ) / σ for each channel of [H, W, c]."""
  return (image - fitted.mean) / fitted.std


def gcn(scale: float = 55.0) -> Preprocess:
  """Global contrast normalisation: scale (x - x̄) / ‖x - x̄‖, per image.

  x̄ and the norm are over H, W and c. With Goodfellow's scale of 55 the values
  of a 32x32x3 image are about one: 55 / √3072 = 0.99 (MT on CIFAR-10, before
  `zca`). A constant image becomes 0.

  Args:
    scale: the Euclidean norm of a result, above 0.
  """
  errors.positive(scale=scale)
  return Preprocess(
    _fit_nothing, lambda _, image: _centre_and_scale(image, float(scale))
  )


def image_standardize() -> Preprocess:
  """Give each image zero mean and unit RMS: (x - x̄) / √(mean (x - x̄)²).

  Both are over H, W and c (TE and MT on SVHN); the same as `gcn` with scale √D.
  A constant image becomes 0.
  """
  return Preprocess(
    _fit_nothing, lambda _, image: _centre_and_scale(image, image.size**0.5)
  )


def zca(regularizer: float = 1e-5) -> Preprocess:
  """ZCA whitening: W (x - μ), W = U diag(1 / √(λ + ε)) Uᵀ.

  μ [D] and Σ = U diag(λ) Uᵀ are the mean and covariance (over N) of the
  training images as vectors of D = H W c numbers. Among all W with W Σ Wᵀ = I
  (ε = 0), this one changes the images least.

  Args:
    regularizer: ε, above 0: 1e-5 in TE, on pixels in [0, 1]; 0.1 in MT, after
      `gcn(55)` (`gcn_zca`).
  """
  errors.positive(regularizer=regularizer)

  def fit(images: np.ndarray, view: Callable = to_unit_interval) -> Whitening:
    _check_images(images)
    _check_values(math.prod(images.shape[1:]))
    mean = _mean(images, view)
    root = _inverse_root(_covariance(images, view, mean), regularizer)
    return Whitening(mean.astype(np.float32), root.astype(np.float32))

  def apply(fitted: Whitening, image: chex.Array) -> chex.Array:
    flat = (image - fitted.mean).reshape(-1)
    # W multiplies by up to 1/√ε: in bfloat16, rounding errors would dominate.
    return jnp.dot(flat, fitted.matrix, precision='highest').reshape(
      image.shape
    )

  def shapes(shape: tuple[int, int, int]) -> Whitening:
    values = math.prod(shape)
    _check_values(values)
    return Whitening(_float32(*shape), _float32(values, values))

  return Preprocess(fit, apply, shapes)


def gcn_zca(scale: float = 55.0, regularizer: float = 0.1) -> Preprocess:
  """Contrast normalisation, then ZCA fitted on its output (MT on CIFAR-10)."""
  return compose(gcn(scale), zca(regularizer))


def compose(*parts: Preprocess) -> Preprocess:
  """Apply parts in turn, each fitted on the output of the parts before it."""

  def fit(
    images: np.ndarray, view: Callable = to_unit_interval
  ) -> tuple[Any, ...]:
    fitted = []
    for part in parts:
      fitted.append(part.fit(images, view))
      view = _view_after(view, part, fitted[-1])
    return tuple(fitted)

  def apply(fitted: tuple[Any, ...], image: chex.Array) -> chex.Array:
    for part, fitted_part in zip(parts, fitted, strict=True):
      image = part.apply(fitted_part, image)
    return image

  def shapes(shape: tuple[int, int, int]) -> tuple[Any, ...]:
    return tuple(part.shapes(shape) for part in parts)

  return Preprocess(fit, apply, shapes)


def _view_after(view: Callable, part: Preprocess, fitted: Any) -> Callable:
  """Return the view, as in `Preprocess`, of the part that follows `part`."""
  batch = jax.jit(jax.vmap(part.apply, in_axes=(None, 0)))
  return lambda images: np.asarray(batch(fitted, view(images)))


def _fit_nothing(
  images: np.ndarray, view: Callable = to_unit_interval
) -> tuple[()]:
  """Fit a part that depends on no statistics; only validate the images."""
  del view
  _check_images(images)
  return ()


def _centre_and_scale(image: chex.Array, norm: float) -> chex.Array:
  """Centre [H, W, c] and scale it to a Euclidean norm; 0 if constant."""
  centred = image - jnp.mean(image)
  length = jnp.sqrt(jnp.sum(centred**2))
  factor = jnp.where(
    length < MIN_CONTRAST, 0.0, norm / jnp.maximum(length, MIN_CONTRAST)
  )
  return factor * centred


def _chunks(images: np.ndarray, view: Callable) -> Iterator[np.ndarray]:
  """Yield the view of all rows in chunks [n, H, W, c] float64."""
  size = max(1, CHUNK // int(np.prod(images.shape[1:])))
  for start in range(0, len(images), size):
    yield view(np.asarray(images[start : start + size])).astype(np.float64)


def _mean(images: np.ndarray, view: Callable) -> np.ndarray:
  """Return the mean image [H, W, c] float64."""
  _check_images(images)
  total = sum(x.sum(axis=0) for x in _chunks(images, view))
  return np.asarray(total / len(images))


def _covariance(
  images: np.ndarray, view: Callable, mean: np.ndarray
) -> np.ndarray:
  """Return Σ = mean over rows of (x - μ)(x - μ)ᵀ, [D, D] float64."""
  covariance = np.zeros((mean.size, mean.size))
  for chunk in _chunks(images, view):
    flat = (chunk - mean).reshape(len(chunk), -1)
    covariance += flat.T @ flat
  return covariance / len(images)


def _inverse_root(covariance: np.ndarray, regularizer: float) -> np.ndarray:
  """Return U diag(1 / √(λ + ε)) Uᵀ for a matrix [D, D] = U diag(λ) Uᵀ."""
  values, vectors = np.linalg.eigh(covariance)
  # Rounding can make an eigenvalue of a singular Σ negative.
  return vectors / np.sqrt(np.maximum(values, 0) + regularizer) @ vectors.T


def _check_images(images: np.ndarray) -> None:
  """Raise InputError unless `images` are uint8 [N, H, W, c] with N ≥ 1."""
  errors.require(
    images.ndim == 4 and images.dtype == np.uint8 and images.size > 0,
    '`preprocess`: needs uint8 images [N, H, W, c] with N ≥ 1, but these '
    f'are {images.dtype} {list(images.shape)}: convert them first',
  )


def _check_values(values: int) -> None:
  """Raise InputError if a [D, D] matrix is too large for D = `values`."""
  errors.require(
    values <= MAX_VALUES,
    f'`preprocess`: ZCA of images with {values} values needs a matrix of '
    f'{values} x {values}, the limit is {MAX_VALUES}: give another '
    'preprocessing or smaller images',
  )
