"""ResNet-9, a small residual network that trains fast.

It is the network of Page 2018 ("How to train your ResNet", DAWNBench's entry
for CIFAR-10) with leaky ReLU. With w the width, and a layer being a 3×3
convolution, batch norm and leaky ReLU:

  layer w, layer 2w, pool, + two layers of 2w
           layer 4w, pool
           layer 8w, pool, + two layers of 8w
  the maximum over pixels, a linear classifier without bias, times 1/8

A pool halves the image by the maximum of 2×2 pixels; "+" adds the two layers to
their input. Page's width is 64: 6,573,120 parameters for 10 classes and colour
images. Width 32 has a quarter of its parameters and operations, and half the
operations of WRN-28-2.
"""

from flax import linen as nn
import jax.numpy as jnp

from ssljax import errors
from ssljax.networks import layers, network
from ssljax.networks.cpu import conv

SCALE = 0.125  # of the logits
EPSILON = 1e-5  # of PyTorch's batch norm
KERNEL = nn.initializers.he_uniform()


class Layer(nn.Module):
  """A 3×3 convolution, batch norm and leaky ReLU."""

  features: int
  momentum: float

  @nn.compact
  def __call__(self, x, *, train: bool):
    """Map `x [B, H, W, c]` to `[B, H, W, features]`."""
    x = layers.convolution(self.features, 3, 1, KERNEL)(x)
    x = layers.BatchNorm(self.momentum, EPSILON)(x, train=train)
    return layers.leaky_relu(x)


class ResNet9(nn.Module):
  """Eight convolutions, two of whose pairs are residual, and a classifier."""

  classes: int
  width: int
  momentum: float
  dropout: float

  @nn.compact
  def __call__(self, image, *, train: bool, dropout: bool):
    """Map images `[B, H, W, c]` to `Outputs` with D = 8 width."""
    layer = lambda features, x: Layer(features, self.momentum)(x, train=train)
    x = layer(self.width, image)
    for factor, residual in ((2, True), (4, False), (8, True)):
      features = factor * self.width
      x = conv.max_pool(layer(features, x), 2, 2, 'SAME')
      if residual:
        x = x + layer(features, layer(features, x))
    embedding = layers.widened(jnp.max(x, (1, 2)))
    x = layers.dropout(embedding, self.dropout, train=train, active=dropout)
    logits = nn.Dense(self.classes, use_bias=False)(x)
    return network.Outputs(SCALE * logits, embedding)


def resnet9(
  classes: int,
  *,
  width: int = 32,
  momentum: float = 0.9,
  dropout: float = 0.0,
) -> network.Network:
  """Return ResNet-9, for images of at least 5×5 pixels.

  Args:
    classes: C.
    width: channels of the first layer; 64 in Page's network.
    momentum: of the running averages; PyTorch's 0.1 is 0.9 here.
    dropout: the rate before the classifier; 0 in Page's network.
  """
  errors.positive(width=width)
  errors.fraction(momentum=momentum, dropout=dropout)
  return network.from_linen(ResNet9(classes, width, momentum, dropout), 5)
