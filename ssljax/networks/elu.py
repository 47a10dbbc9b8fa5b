"""The networks of Learning by Association: ELU and a 128-d embedding.

Haeusser, Mordvintsev, Cremers, CVPR 2017, sections 4, 4.2 and 4.3. Taken from
their code: pools of stride 2 (the paper's "stride 1" is a misprint), Glorot
initialisation, one more convolution for STL-10. The input is normalised by the
network, not by the preprocessing, because it follows the augmentation.
"""

from typing import Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

from ssljax.networks import layers, network
from ssljax.networks.cpu import conv

Normalize = Literal['none', 'variance', 'centre']


def normalize(image: jax.Array, kind: Normalize) -> jax.Array:
  """Normalise images `[B, H, W, c]` in [0, 1], as the network's first layer.

  Args:
    image: `[B, H, W, c]` in [0, 1]; x = 255 image.
    kind: 'variance' is (x − mean) / (variance + 1e-5) per image and channel;
      the authors divide by the variance, not by its root. 'centre' is
      (x − 128) / 128.
  """
  if kind == 'none':
    return image
  x = 255 * image
  if kind == 'centre':
    return (x - 128) / 128
  x -= jnp.mean(x, (1, 2), keepdims=True)
  return x / (jnp.mean(jnp.square(x), (1, 2), keepdims=True) + 1e-5)


class Convolution(nn.Module):
  """A 3×3 convolution, a bias or batch norm without scale, and ELU."""

  features: int
  stride: int = 1
  momentum: float | None = None  # of batch norm; None has a bias instead

  @nn.compact
  def __call__(self, x, *, train: bool):
    """Map `x [B, H, W, c]` to `[B, H/stride, W/stride, features]`."""
    x = nn.Conv(
      self.features,
      (3, 3),
      self.stride,
      use_bias=self.momentum is None,
      kernel_init=nn.initializers.glorot_uniform(),
      promote_dtype=layers.as_input,
      conv_general_dilated=conv.conv_general_dilated,
    )(x)
    if self.momentum is not None:
      x = layers.BatchNorm(self.momentum, scaled=False)(x, train=train)
    return nn.elu(x)


class Elu(nn.Module):
  """Convolutions and a pool for each width; then an ELU embedding."""

  classes: int
  widths: tuple[int, ...]
  depth: int  # convolutions per width
  embedding: int
  normalize: Normalize

  @nn.compact
  def __call__(self, image, *, train: bool, dropout: bool):
    """Map images `[B, H, W, c]` to `Outputs` with D = embedding."""
    del dropout  # the authors use none
    x = normalize(image, self.normalize)
    for width in self.widths:
      for _ in range(self.depth):
        x = Convolution(width)(x, train=train)
      x = conv.max_pool(x, 2, 2)
    return head(x, self.classes, self.embedding, nn.elu)


class EluStl10(nn.Module):
  """C32 C64/2 P3 C64 C128 P2 C128 C256 P2 C128, and a linear embedding.

  Cn is a 3×3 convolution of n channels, /2 its stride, Pk a pool of k×k.
  """

  classes: int
  embedding: int
  momentum: float

  @nn.compact
  def __call__(self, image, *, train: bool, dropout: bool):
    """Map images `[B, H, W, c]` to `Outputs` with D = embedding."""
    del dropout
    block = lambda width, stride=1: Convolution(width, stride, self.momentum)
    x = normalize(image, 'centre')
    x = block(64, 2)(block(32)(x, train=train), train=train)
    x = conv.max_pool(x, 3, 2)
    for first, second in ((64, 128), (128, 256)):
      x = block(second)(block(first)(x, train=train), train=train)
      x = conv.max_pool(x, 2, 2)
    x = block(128)(x, train=train)
    return head(x, self.classes, self.embedding, lambda x: x)


def head(x, classes: int, embedding: int, activation) -> network.Outputs:
  """Flatten, embed and classify `x [B, H, W, c]`, within a module's call."""
  dense = lambda features: nn.Dense(
    features, kernel_init=nn.initializers.glorot_uniform()
  )
  flat = layers.widened(x).reshape(x.shape[0], -1)
  embedded = activation(dense(embedding)(flat))
  return network.Outputs(dense(classes)(embedded), embedded)


def elu(
  classes: int,
  *,
  widths: tuple[int, ...] = (32, 64, 128),
  depth: int = 2,
  embedding: int = 128,
  normalize: Normalize = 'none',
) -> network.Network:
  """Return the paper's network, without batch norm and dropout.

  The defaults are the paper's for MNIST; for SVHN it has `depth=3,
  normalize='variance'`.

  Args:
    classes: C.
    widths: channels; the image is halved after each.
    depth: convolutions per width.
    embedding: D.
    normalize: the `kind` of `normalize`.
  """
  module = Elu(classes, widths, depth, embedding, normalize)
  return network.from_linen(module, 2 ** len(widths))


def elu_stl10(
  classes: int, *, embedding: int = 128, momentum: float = 0.99
) -> network.Network:
  """Return the paper's network for 96×96 images, with batch norm.

  Args:
    classes: C.
    embedding: D.
    momentum: of the running averages.
  """
  # 17 pixels become 9 by the stride, 4 by the pool of 3, 2 and 1 by the others.
  return network.from_linen(EluStl10(classes, embedding, momentum), 17)
