"""What is done to every image, in training and in test, before anything random.

A `Preprocess` is fitted once on the training images, in NumPy and float64, a
chunk at a time so that its memory does not grow with N; its `apply` is a pure
JAX function of one image, meant for `vmap` inside a compiled step.

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

# A chunk holds this many pixels: 64 MiB in float64.
CHUNK = 2**23
# The eigenvectors of [D, D] beyond 64x64x3 would need hours and gigabytes.
MOST_PIXELS = 64 * 64 * 3
# An image of uint8 / 255 that is not constant is at least √(1 - 1/D) / 255 from
# its mean; below this the distance is rounding, not contrast.
FLAT = 1e-3


class Preprocess(NamedTuple):
  """A deterministic map of images, fitted on the training set.

  `fit` has a second, optional argument used by `compose`: the view [n, H, W, c]
  float32 that this part has of a chunk of uint8 images, by default pixels/255.
  """

  fit: Callable  # uint8 images [N, H, W, c] -> pytree of float32 numpy arrays
  apply: Callable  # (fitted, image [H, W, c] float32 in [0, 1]) -> [H, W, c]
  # (H, W, c) -> what `fit` makes of such images, as `jax.ShapeDtypeStruct`
  shapes: Callable = lambda shape: ()


class Standard(NamedTuple):
  """What `standardize` has fitted."""

  mean: np.ndarray  # [1, 1, c]
  std: np.ndarray  # [1, 1, c]


class Whitening(NamedTuple):
  """What `zca` has fitted; D = H W c."""

  mean: np.ndarray  # [H, W, c]
  matrix: np.ndarray  # [D, D] symmetric


# Of ImageNet's training images, as every code that uses it has them.
IMAGENET = Standard(
  np.array([[[0.485, 0.456, 0.406]]], np.float32),
  np.array([[[0.229, 0.224, 0.225]]], np.float32),
)


def unit(images: np.ndarray) -> np.ndarray:
  """uint8 [n, H, W, c] -> float32 in [0, 1], as a compiled step sees them."""
  return images.astype(np.float32) / np.float32(255)


def identity() -> Preprocess:
  """Images stay in [0, 1] (MA-DNN)."""
  return Preprocess(_nothing, lambda fitted, image: image)


def standardize() -> Preprocess:
  """(x - μ) / σ with the training set's mean and deviation of each channel.

  R2-D2 uses the constants of CIFAR-10, (.4914, .4822, .4465) and (.2470, .2435,
  .2616): these are the same quantities. A constant channel is only centred.
  """

  def fit(images: np.ndarray, view: Callable = unit) -> Standard:
    mean = _mean(images, view).mean(axis=(0, 1), keepdims=True)
    chunks = _chunks(images, view)
    total = sum(((x - mean) ** 2).sum(axis=(0, 1, 2)) for x in chunks)
    std = np.sqrt(total / np.prod(images.shape[:3]))
    # One pixel of N H W that differs by 1/255 still has a deviation above this.
    std = np.where(std < 1e-7, 1.0, std)[None, None]
    return Standard(mean.astype(np.float32), std.astype(np.float32))

  def shapes(shape: tuple[int, int, int]) -> Standard:
    return Standard(*[_float32(1, 1, shape[-1])] * 2)

  return Preprocess(fit, _standardized, shapes)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, np.float32)


def imagenet() -> Preprocess:
  """`standardize` with the constants of ImageNet (LLP), of colour images."""

  def apply(fitted: tuple[()], image: chex.Array) -> chex.Array:
    del fitted
    errors.require(
      image.shape[-1] == 3,
      f'`preprocess`=imagenet: of colour images, not of {image.shape[-1]} '
      'channel: give another preprocessing, as standardize',
    )
    return _standardized(IMAGENET, image)

  return Preprocess(_nothing, apply)


def _standardized(fitted: Standard, image: chex.Array) -> chex.Array:
  """(x - μ) / σ of each channel of [H, W, c]."""
  return (image - fitted.mean) / fitted.std


def gcn(scale: float = 55.0) -> Preprocess:
  """Global contrast normalisation: scale (x - x̄) / ‖x - x̄‖, per image.

  x̄ and the norm are over H, W and c. Goodfellow's scale 55 makes the values of
  a 32x32x3 image about one: 55 / √3072 = 0.99 (MT on CIFAR-10, before `zca`).
  A constant image becomes 0.
  """
  errors.positive(scale=scale)
  return Preprocess(_nothing, lambda _, image: _with_norm(image, float(scale)))


def image_standardize() -> Preprocess:
  """(x - x̄) / √(mean (x - x̄)²): each image to zero mean and unit RMS.

  Over H, W and c (TE and MT on SVHN); `gcn` with scale √D. A constant image
  becomes 0.
  """
  return Preprocess(
    _nothing, lambda _, image: _with_norm(image, image.size**0.5)
  )


def zca(regularizer: float = 1e-5) -> Preprocess:
  """ZCA whitening: W (x - μ), W = U diag(1 / √(λ + ε)) Uᵀ.

  μ [D] and Σ = U diag(λ) Uᵀ are the mean and covariance (over N) of the
  training images as vectors of D = H W c numbers. Of all W with W Σ Wᵀ = I
  (ε = 0) it is the one that changes the images least.

  Args:
    regularizer: ε, above 0: 1e-5 in TE, on pixels in [0, 1]; 0.1 in MT, after
      `gcn(55)` (`gcn_zca`).
  """
  errors.positive(regularizer=regularizer)

  def fit(images: np.ndarray, view: Callable = unit) -> Whitening:
    _check_size(images)
    mean = _mean(images, view)
    root = _inverse_root(_covariance(images, view, mean), regularizer)
    return Whitening(mean.astype(np.float32), root.astype(np.float32))

  def apply(fitted: Whitening, image: chex.Array) -> chex.Array:
    flat = (image - fitted.mean).reshape(-1)
    # W multiplies by up to 1/√ε: a bfloat16 product would be mostly rounding.
    return jnp.dot(flat, fitted.matrix, precision='highest').reshape(
      image.shape
    )

  def shapes(shape: tuple[int, int, int]) -> Whitening:
    pixels = math.prod(shape)
    _check_pixels(pixels)
    return Whitening(_float32(*shape), _float32(pixels, pixels))

  return Preprocess(fit, apply, shapes)


def gcn_zca(scale: float = 55.0, regularizer: float = 0.1) -> Preprocess:
  """MT's CIFAR-10: contrast normalisation, then ZCA fitted on its output."""
  return compose(gcn(scale), zca(regularizer))


def compose(*parts: Preprocess) -> Preprocess:
  """Applies the parts in turn, each fitted on the output of those before it."""

  def fit(images: np.ndarray, view: Callable = unit) -> tuple[Any, ...]:
    fitted = []
    for part in parts:
      fitted.append(part.fit(images, view))
      view = _then(view, part, fitted[-1])
    return tuple(fitted)

  def apply(fitted: tuple[Any, ...], image: chex.Array) -> chex.Array:
    for part, own in zip(parts, fitted, strict=True):
      image = part.apply(own, image)
    return image

  def shapes(shape: tuple[int, int, int]) -> tuple[Any, ...]:
    return tuple(part.shapes(shape) for part in parts)

  return Preprocess(fit, apply, shapes)


def _then(view: Callable, part: Preprocess, fitted: Any) -> Callable:
  """The view [n, H, W, c] of the part that follows `part`."""
  batch = jax.jit(jax.vmap(part.apply, in_axes=(None, 0)))
  return lambda images: np.asarray(batch(fitted, view(images)))


def _nothing(images: np.ndarray, view: Callable = unit) -> tuple[()]:
  """The fit of a part that learns nothing from the training set."""
  del view
  _check(images)
  return ()


def _with_norm(image: chex.Array, norm: float) -> chex.Array:
  """[H, W, c] centred and rescaled to a Euclidean norm; 0 if constant."""
  centred = image - jnp.mean(image)
  present = jnp.sqrt(jnp.sum(centred**2))
  factor = jnp.where(present < FLAT, 0.0, norm / jnp.maximum(present, FLAT))
  return factor * centred


def _chunks(images: np.ndarray, view: Callable) -> Iterator[np.ndarray]:
  """The view of all rows, [n, H, W, c] float64 at a time."""
  size = max(1, CHUNK // int(np.prod(images.shape[1:])))
  for start in range(0, len(images), size):
    yield view(np.asarray(images[start : start + size])).astype(np.float64)


def _mean(images: np.ndarray, view: Callable) -> np.ndarray:
  """The mean image [H, W, c] float64."""
  _check(images)
  return sum(x.sum(axis=0) for x in _chunks(images, view)) / len(images)


def _covariance(
  images: np.ndarray, view: Callable, mean: np.ndarray
) -> np.ndarray:
  """Σ = mean over rows of (x - μ)(x - μ)ᵀ, [D, D] float64."""
  covariance = np.zeros((mean.size, mean.size))
  for chunk in _chunks(images, view):
    flat = (chunk - mean).reshape(len(chunk), -1)
    covariance += flat.T @ flat
  return covariance / len(images)


def _inverse_root(covariance: np.ndarray, regularizer: float) -> np.ndarray:
  """U diag(1 / √(λ + ε)) Uᵀ of [D, D] = U diag(λ) Uᵀ."""
  values, vectors = np.linalg.eigh(covariance)
  # Rounding can leave an eigenvalue of a singular Σ below 0.
  return vectors / np.sqrt(np.maximum(values, 0) + regularizer) @ vectors.T


def _check(images: np.ndarray) -> None:
  """Refuses what is not a set of uint8 images [N, H, W, c]."""
  errors.require(
    images.ndim == 4 and images.dtype == np.uint8 and images.size > 0,
    'preprocessing is fitted on uint8 images [N, H, W, c], N ≥ 1, not on '
    f'{images.dtype} {list(images.shape)}',
  )


def _check_size(images: np.ndarray) -> None:
  """Refuses images too large for a [D, D] matrix."""
  _check(images)
  _check_pixels(math.prod(images.shape[1:]))


def _check_pixels(pixels: int) -> None:
  errors.require(
    pixels <= MOST_PIXELS,
    f'ZCA of images with {pixels} values needs a {pixels} x {pixels} matrix; '
    f'the most is {MOST_PIXELS}: use another preprocessing',
  )
