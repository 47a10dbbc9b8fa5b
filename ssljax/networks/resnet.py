"""ResNets: R2-D2's ResNet-18, LLP's ResNet-18v2 and ResNet-50v2.

A block adds F to a shortcut s; BN is batch norm, conv1 a 1×1 convolution:

  v1   y = ReLU(s + F(x))    F = conv BN [ReLU conv BN]…
                             s = x, or BN conv1(x) where the shape changes
  v2   y = s + F(a)          F = conv [BN ReLU conv]…,  a = ReLU BN(x)
                             s = x, or conv1(a) in every stage's first block

v1 is He et al. 2016a (CVPR, arXiv:1512.03385) as in torchvision: [inferred]
from the size in R2-D2's Table 5, as its ImageNet code was not released. v2 is
He et al. 2016b (ECCV, arXiv:1603.05027) as in LLP's code, which is TF's
official model: only the convolution precedes the first pool, and BN and ReLU
precede the mean.

Convolutions are padded by ⌊k / 2⌋ on every side, in both codes; 'SAME' would
pad even images less at the top at stride 2. The pool is padded by 1 on every
side in v1; in v2 by TF's 'SAME', which pads even images at the end only.

Departures from both: running variances are those of the batch, not
n / (n − 1) times these, and running averages are debiased (see
`layers.BatchNorm`).
"""

from typing import Literal

from flax import linen as nn

from ssljax import errors
from ssljax.networks import layers, network
from ssljax.networks.cpu import conv

Version = Literal[1, 2]
Stem = Literal['imagenet', 'small']

EPSILON = 1e-5  # of batch norm, in both codes
KERNELS = {
  1: nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
  2: nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal'),
}
POOL_PADDING = {1: ((1, 1), (1, 1)), 2: 'SAME'}
# Depth -> blocks per stage, and whether they are bottlenecks.
DEPTHS = {18: ((2, 2, 2, 2), False), 50: ((3, 4, 6, 3), True)}
STEMS = {'imagenet': (7, 2), 'small': (3, 1)}  # size and stride


def convolution(features: int, size: int, stride: int, version: Version):
  """Return a convolution without bias, initialised as in the version."""
  return layers.convolution(features, size, stride, KERNELS[version])


def block_convolutions(features: int, stride: int, bottleneck: bool):
  """Return (features, size, stride) of every convolution of F.

  A bottleneck strides in its 3×3 convolution, as in LLP's code; in He et al.
  2016a it strides in the 1×1 convolution before.
  """
  if bottleneck:
    narrow = features // 4
    return (narrow, 1, 1), (narrow, 3, stride), (features, 1, 1)
  return (features, 3, stride), (features, 3, 1)


class Block(nn.Module):
  """A residual block: the sum of a shortcut and F."""

  features: int  # of the output
  stride: int
  first: bool  # the first block of a stage
  bottleneck: bool
  version: Version
  momentum: float

  @nn.compact
  def __call__(self, x, *, train: bool):
    """Map `x [B, H, W, c]` to `[B, ⌈H/stride⌉, ⌈W/stride⌉, features]`."""
    v1 = self.version == 1
    norm = lambda x: layers.BatchNorm(self.momentum, EPSILON)(x, train=train)
    active = x if v1 else nn.relu(norm(x))
    y = active
    plan = block_convolutions(self.features, self.stride, self.bottleneck)
    for i, (features, size, stride) in enumerate(plan):
      y = nn.relu(norm(y)) if i > 0 else y
      y = convolution(features, size, stride, self.version)(y)
    y = norm(y) if v1 else y
    changes = self.stride > 1 or x.shape[-1] != self.features
    if changes or (self.first and not v1):
      x = convolution(self.features, 1, self.stride, self.version)(active)
      x = norm(x) if v1 else x
    return nn.relu(x + y) if v1 else x + y


class ResNet(nn.Module):
  """A stem, stages of blocks, the mean, a classifier and maybe an embedding."""

  classes: int
  version: Version
  blocks: tuple[int, ...]  # per stage
  bottleneck: bool
  stem: Stem
  width: int
  embedding: int | None
  momentum: float

  @nn.compact
  def __call__(self, image, *, train: bool, dropout: bool):
    """Map images `[B, H, W, c]` to `Outputs`.

    D is `embedding`; if that is None, the embedding is the pooled feature.
    """
    del dropout  # the authors use none
    norm = lambda x: layers.BatchNorm(self.momentum, EPSILON)(x, train=train)
    x = convolution(self.width, *STEMS[self.stem], self.version)(image)
    x = nn.relu(norm(x)) if self.version == 1 else x
    if self.stem == 'imagenet':
      x = conv.max_pool(x, 3, 2, POOL_PADDING[self.version])
    for stage, blocks in enumerate(self.blocks):
      features = self.width * 2**stage * (4 if self.bottleneck else 1)
      for i in range(blocks):
        stride = 2 if stage > 0 and i == 0 else 1
        x = Block(
          features, stride, i == 0, self.bottleneck, self.version, self.momentum
        )(x, train=train)
    x = nn.relu(norm(x)) if self.version == 2 else x
    pooled = layers.pooled_mean(x)
    return heads(pooled, self.classes, self.embedding, self.version)


def heads(
  pooled, classes: int, embedding: int | None, version: Version
) -> network.Outputs:
  """Classify and embed `pooled [B, F]`, within a module's call."""
  if version == 1:
    init = layers.uniform_fan_in(pooled.shape[-1])
    classifier = nn.Dense(classes, kernel_init=init, bias_init=init)
  else:
    classifier = nn.Dense(classes, kernel_init=nn.initializers.he_normal())
  logits = classifier(pooled)
  if embedding is None:
    return network.Outputs(logits, pooled)
  dense = nn.Dense(embedding, kernel_init=nn.initializers.glorot_uniform())
  return network.Outputs(logits, dense(pooled), pooled)


def from_resnet(module: ResNet) -> network.Network:
  """Return the network of a ResNet, with the smallest useful image size."""
  errors.positive(width=module.width)
  if module.embedding is not None:
    errors.positive(embedding=module.embedding)
  # The last halving needs 2 pixels: with 1, a 3×3 window would see one pixel
  # and eight zeros.
  halvings = len(module.blocks) - 1 + 2 * (module.stem == 'imagenet')
  return network.from_linen(module, 2**halvings // 2 + 1)


def resnet18(
  classes: int,
  *,
  stem: Stem = 'imagenet',
  width: int = 64,
  momentum: float = 0.9,
) -> network.Network:
  """Return ResNet-18, of R2-D2 for ImageNet (Table 5): 11.69 M parameters.

  The embedding is the pooled feature, D = 8 width. Weights are initialised as
  in torchvision: N(0, 2 / (k² features)), the classifier U(−1, 1) / √D.

  Args:
    classes: C.
    stem: 'imagenet' is a 7×7 convolution and a 3×3 pool, both of stride 2, for
      images of at least 17×17 pixels; 'small' is a 3×3 convolution of stride 1,
      for at least 5×5 (32×32 in lemniscate's CIFAR-10 code).
    width: channels of the first stage, doubled in every further stage.
    momentum: of the running averages; PyTorch's 0.1 is 0.9 here.
  """
  return from_resnet(
    ResNet(classes, 1, *DEPTHS[18], stem, width, None, momentum)
  )


def resnet_v2(
  classes: int,
  *,
  depth: Literal[18, 50] = 18,
  stem: Stem = 'imagenet',
  width: int = 64,
  embedding: int | None = None,
  momentum: float = 0.997,
) -> network.Network:
  """Return ResNet-18v2 or -50v2, of LLP: 11.76 and 25.81 million parameters.

  Weights are initialised as in LLP's code: truncated normal with variance
  1 / fan_in, the classifier 2 / fan_in, the embedding Glorot-uniform; biases
  at 0.

  Args:
    classes: C.
    depth: 18 has blocks of two 3×3 convolutions, 50 has bottlenecks.
    stem: as in `resnet18`; 'imagenet' in LLP.
    width: channels of the 3×3 convolutions of the first stage; a bottleneck
      returns 4 times as many.
    embedding: D of a linear layer beside the classifier, both on the pooled
      feature: 128 in LLP (section 4, "Experimental settings"), whose loss
      normalises it to length 1. None takes the pooled feature, D = 8 width, or
      32 width with bottlenecks.
    momentum: of the running averages.
  """
  blocks, bottleneck = DEPTHS[depth]
  return from_resnet(
    ResNet(classes, 2, blocks, bottleneck, stem, width, embedding, momentum)
  )
