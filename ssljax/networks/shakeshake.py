"""Shake-Shake-26 2x96d: a residual network whose two branches mix at random.

Gastaldi 2017 (arXiv:1705.07485), as in Mean Teacher's PyTorch code and R2-D2's:
26.2 million parameters. Each image has its own gates that mix the branches of
every block, one in the forward pass and another in the backward pass:

  y     = x' + α a(x) + (1 − α) b(x)     α ~ U(0, 1);  1/2 at inference
  ∂L/∂a = β ∂L/∂y                        β ~ U(0, 1), independent of α
  ∂L/∂b = (1 − β) ∂L/∂y

Gastaldi's own Torch code has in addition: batch norm after the first
convolution, a ReLU before the mean over pixels (without it the features may be
negative), a ReLU before the first shortcut, no bias in the shortcuts, and a
shift of the shortcut's pixels by one in the other direction, to (2i − 1,
2j − 1).

Departures from PyTorch: running variances are those of the batch, not
n / (n − 1) times these, running averages are debiased (see `layers.BatchNorm`),
and the mean is over all pixels, 8×8 for CIFAR, so that images may have any
size.
"""

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp

from ssljax import errors
from ssljax.networks import layers, network
from ssljax.networks.cpu import conv

EPSILON = 1e-5  # of PyTorch's batch norm


@jax.custom_vjp
def shake(
  a: chex.Array, b: chex.Array, forward: chex.Array, backward: chex.Array
) -> chex.Array:
  """Return α a + (1 − α) b, with the gradient of β a + (1 − β) b.

  Args:
    a: `[B, ...]`, one branch.
    b: `[B, ...]`, the other branch.
    forward: `[B]`, α of each image.
    backward: `[B]`, β of each image.

  Returns:
    `[B, ...]`. The gates are random, not learned, and get no gradient.
  """
  chex.assert_equal_shape([a, b])
  chex.assert_shape([forward, backward], a.shape[:1])
  gate = _per_image(forward, a)
  return gate * a + (1 - gate) * b


def _shake_forward(a, b, forward, backward):
  return shake(a, b, forward, backward), backward


def _shake_backward(backward, g):
  gate, none = _per_image(backward, g), jnp.zeros_like(backward)
  return gate * g, (1 - gate) * g, none, none


shake.defvjp(_shake_forward, _shake_backward)


def _per_image(gate, x):
  """Reshape `gate [B]` to `[B, 1, ...]`, of the rank of `x`."""
  return jnp.expand_dims(gate, tuple(range(1, x.ndim)))


def draw_gates(key: chex.PRNGKey, batch: int, dtype=jnp.float32) -> chex.Array:
  """Return α and β of every image, `[2, B]` independent U(0, 1)."""
  return jax.random.uniform(key, (2, batch), dtype)


def convolution(features: int, size: int, stride: int = 1) -> nn.Conv:
  """Return a convolution with weights N(0, 2 / (size² features)), no bias.

  It is padded as in PyTorch, see `layers.convolution`.
  """
  init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
  return layers.convolution(features, size, stride, init)


def shifted_pixels(x: chex.Array) -> tuple[chex.Array, chex.Array]:
  """Return the pixels (2i, 2j) and (2i + 1, 2j + 1) of `x [B, H, W, c]`.

  Both are `[B, ⌈H/2⌉, ⌈W/2⌉, c]`. Images of odd height or width are padded by
  a row or column of zeros; Mean Teacher's code refuses them.
  """
  _, height, width, _ = x.shape
  x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
  return x[:, ::2, ::2], x[:, 1::2, 1::2]


class Branch(nn.Module):
  """ReLU, 3×3 convolution and batch norm, twice."""

  features: int
  stride: int
  momentum: float

  @nn.compact
  def __call__(self, x, *, train: bool):
    """Map `x [B, H, W, c]` to `[B, ⌈H/stride⌉, ⌈W/stride⌉, features]`."""
    for stride in (self.stride, 1):
      x = convolution(self.features, 3, stride)(nn.relu(x))
      x = layers.BatchNorm(self.momentum, EPSILON)(x, train=train)
    return x


class Widening(nn.Module):
  """The shortcut to another width at the same size: 1×1 and batch norm."""

  features: int
  momentum: float

  @nn.compact
  def __call__(self, x, *, train: bool):
    """Map `x [B, H, W, c]` to `[B, H, W, features]`."""
    x = convolution(self.features, 1)(x)
    return layers.BatchNorm(self.momentum, EPSILON)(x, train=train)


class Halving(nn.Module):
  """The shortcut to half the size, whose two halves see different pixels.

  ReLU, a 1×1 convolution with bias of each part of `shifted_pixels`, their
  concatenation, batch norm. PyTorch's code has one convolution of 2 groups,
  which is the same, but which `cpu.conv` does not speed up.
  """

  features: int
  momentum: float

  @nn.compact
  def __call__(self, x, *, train: bool):
    """Map `x [B, H, W, c]` to `[B, ⌈H/2⌉, ⌈W/2⌉, features]`."""
    # N(0, 2 / features), as for one convolution of all features: each of the
    # two has half the fan-out, so the factor is 1 instead of 2.
    mix = lambda pixels: nn.Conv(
      self.features // 2,
      (1, 1),
      kernel_init=nn.initializers.variance_scaling(1.0, 'fan_out', 'normal'),
      bias_init=layers.uniform_fan_in(x.shape[-1]),
      promote_dtype=layers.as_input,
      conv_general_dilated=conv.conv_general_dilated,
    )(pixels)
    halves = [mix(pixels) for pixels in shifted_pixels(nn.relu(x))]
    x = jnp.concatenate(halves, axis=-1)
    return layers.BatchNorm(self.momentum, EPSILON)(x, train=train)


class Block(nn.Module):
  """A residual block of two branches, mixed by each image's gates."""

  features: int
  stride: int  # 1 or 2
  momentum: float

  @nn.compact
  def __call__(self, x, *, train: bool, dropout: bool):
    """Map `x [B, H, W, c]` to `[B, ⌈H/stride⌉, ⌈W/stride⌉, features]`."""
    a, b = (
      Branch(self.features, self.stride, self.momentum)(x, train=train)
      for _ in range(2)
    )
    gates = jnp.full((2, x.shape[0]), 0.5, x.dtype)
    if dropout:
      gates = draw_gates(self.make_rng('dropout'), len(x)).astype(x.dtype)
    mixed = shake(a, b, *gates)
    if self.stride == 2:
      x = Halving(self.features, self.momentum)(x, train=train)
    elif self.features != x.shape[-1]:
      x = Widening(self.features, self.momentum)(x, train=train)
    return x + mixed


class ShakeShake(nn.Module):
  """A 3×3 convolution of 16, three stages of blocks, mean, classifier."""

  classes: int
  width: int
  blocks: int  # per stage
  momentum: float

  @nn.compact
  def __call__(self, image, *, train: bool, dropout: bool):
    """Map images `[B, H, W, c]` to `Outputs` with D = 4 width."""
    x = convolution(16, 3)(image)
    for stage in range(3):
      for i in range(self.blocks):
        stride = 2 if stage > 0 and i == 0 else 1
        block = Block(self.width * 2**stage, stride, self.momentum)
        x = block(x, train=train, dropout=dropout)
    embedding = layers.pooled_mean(x)
    init = layers.uniform_fan_in(embedding.shape[-1])
    logits = nn.Dense(self.classes, kernel_init=init, bias_init=init)(embedding)
    return network.Outputs(logits, embedding)


def shakeshake(
  classes: int, *, width: int = 96, blocks: int = 4, momentum: float = 0.9
) -> network.Network:
  """Return Shake-Shake, for images of at least 3×3; by default 26 2x96d.

  The default is R2-D2's. Random gates take the place of dropout: they are
  active in `Network.train` and `Network.sample`.

  Args:
    classes: C.
    width: channels of the first stage, doubled in the second and the third.
    blocks: per stage; the depth is 6 blocks + 2.
    momentum: of the running averages; PyTorch's 0.1 is 0.9 here.
  """
  errors.positive(width=width, blocks=blocks)
  # 3 pixels become 2 and then 1. From 2 pixels the last shortcut would see one
  # pixel, and only zeros in its second half.
  return network.from_linen(ShakeShake(classes, width, blocks, momentum), 3)
