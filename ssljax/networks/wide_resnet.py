"""Wide ResNets of MixMatch and FixMatch: WRN-28-2, WRN-28-8, WRN-37-2.

Zagoruyko and Komodakis 2016 (arXiv:1605.07146), as in the TensorFlow code of
FixMatch (and, before it, of Oliver et al. 2018). With a(x) = leaky ReLU of
batch norm, a block is

  y = s + conv a(conv a(x))    s = x, or conv1(x) where the number of channels
                               changes; in the first block s = conv1(a(x))

and a network is a 3×3 convolution to 16 channels, stages of 4 blocks, a, the
mean over pixels and a linear classifier. Stage i has 16 k 2^i channels; all
stages but the first halve the image. The depth counts the convolutions: two per
block, one shortcut per stage, and the first: 28 with 3 stages, 37 with 4.

Weights of convolutions start as N(0, 2 / (size² features)), the classifier's as
Glorot's normal distribution. Leaky ReLU has slope 0.1. Batch norm has momentum
0.999 and ε = 0.001.

Departures from the code: convolutions have no biases, as in Zagoruyko's code
(batch norm follows), which gives WRN-28-2 1,467,610 parameters for 10 classes.
At stride 2, too, convolutions are padded by 1 on every side. Running averages
are debiased (see `layers.BatchNorm`).
"""

from flax import linen as nn

from ssljax import errors
from ssljax.networks import layers, network

EPSILON = 1e-3  # of batch norm
FIRST = 16  # channels of the first convolution
KERNEL = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class Activation(nn.Module):
  """Batch norm and leaky ReLU."""

  momentum: float

  @nn.compact
  def __call__(self, x, *, train: bool):
    """Map `x [B, ..., c]` to an array of the same shape."""
    x = layers.BatchNorm(self.momentum, EPSILON)(x, train=train)
    return layers.leaky_relu(x)


class Block(nn.Module):
  """Two 3×3 convolutions and a shortcut."""

  features: int
  stride: int
  first: bool  # the first block of the network
  momentum: float

  @nn.compact
  def __call__(self, x, *, train: bool):
    """Map `x [B, H, W, c]` to `[B, ⌈H/stride⌉, ⌈W/stride⌉, features]`."""
    conv = lambda size, stride, x: layers.convolution(
      self.features, size, stride, KERNEL
    )(x)
    y = Activation(self.momentum)(x, train=train)
    shortcut = y if self.first else x
    y = conv(3, self.stride, y)
    y = Activation(self.momentum)(y, train=train)
    y = conv(3, 1, y)
    if x.shape[-1] != self.features or self.stride > 1:
      shortcut = conv(1, self.stride, shortcut)
    return shortcut + y


class WideResNet(nn.Module):
  """A convolution, stages of blocks, the mean and a classifier."""

  classes: int
  widen: int
  stages: int
  blocks: int  # per stage
  momentum: float
  dropout: float

  @nn.compact
  def __call__(self, image, *, train: bool, dropout: bool):
    """Map images `[B, H, W, c]` to `Outputs` with D = 16 k 2^(stages - 1)."""
    x = layers.convolution(FIRST, 3, 1, KERNEL)(image)
    for stage in range(self.stages):
      for i in range(self.blocks):
        x = Block(
          FIRST * self.widen * 2**stage,
          2 if stage > 0 and i == 0 else 1,
          stage == i == 0,
          self.momentum,
        )(x, train=train)
    x = Activation(self.momentum)(x, train=train)
    embedding = layers.pooled_mean(x)
    x = layers.dropout(embedding, self.dropout, train=train, active=dropout)
    init = nn.initializers.glorot_normal()
    return network.Outputs(
      nn.Dense(self.classes, kernel_init=init)(x), embedding
    )


def wide_resnet(
  classes: int,
  *,
  widen: int = 2,
  stages: int = 3,
  blocks: int = 4,
  momentum: float = 0.999,
  dropout: float = 0.0,
) -> network.Network:
  """Return a wide ResNet; by default WRN-28-2, for images of at least 3×3.

  FixMatch has WRN-28-2 for CIFAR-10 and SVHN, WRN-28-8 (`widen=8`) for
  CIFAR-100 and WRN-37-2 (`stages=4`, at least 5×5 pixels) for STL-10.

  Args:
    classes: C.
    widen: k, factor of the number of channels.
    stages: of blocks, each with twice the channels of the one before.
    blocks: per stage; the depth is stages (2 blocks + 1) + 1.
    momentum: of the running averages of batch norm.
    dropout: the rate before the classifier; 0 in FixMatch.
  """
  errors.positive(widen=widen, stages=stages, blocks=blocks)
  errors.fraction(momentum=momentum, dropout=dropout)
  module = WideResNet(classes, widen, stages, blocks, momentum, dropout)
  # The last halving needs 2 pixels: from 1, a 3×3 window would see one pixel
  # and eight zeros.
  return network.from_linen(module, 2 ** (stages - 1) // 2 + 1)
