"""Layers that more than one network is made of."""

from typing import Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

from ssljax.networks.cpu import conv

SLOPE = 0.1  # of every leaky ReLU in the five papers
Norm = Literal['batch', 'weight']


def leaky_relu(x: jax.Array) -> jax.Array:
  """max(x, 0.1 x) of any shape."""
  return jnp.maximum(x, SLOPE * x)


def dropout(x, rate: float, *, train: bool, active: bool) -> jax.Array:
  """Drops numbers of `x [B, ...]`, in a module's `@nn.compact`.

  In training every image has a mask of its own. In a sample all images share
  one, so that a pass is one function of them all (f^(t)(x, w) of Gal,
  Ghahramani 2016; consistent dropout of Kirsch et al., arXiv:1906.08158): what
  is said of an image has the same distribution, at the cost of inference.
  """
  shared = () if train else (0,)
  return nn.Dropout(rate, shared, deterministic=not active)(x)


def spread(fan_in: int) -> nn.initializers.Initializer:
  """U(−1, 1) / √fan_in: PyTorch's for biases and fully connected layers."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -1, 1) * fan_in**-0.5

  return init


def convolution(features: int, size: int, stride: int, kernel_init) -> nn.Conv:
  """A convolution without bias, padded by ⌊size / 2⌋ on every side."""
  # 'SAME' would pad an even image on one side only where it strides by 2.
  return nn.Conv(
    features,
    (size, size),
    stride,
    padding=size // 2,
    use_bias=False,
    kernel_init=kernel_init,
    conv_general_dilated=conv.conv_general_dilated,
  )


class BatchNorm(nn.Module):
  """Batch normalisation over all axes but the last, in float32.

  Running averages start at zero and are divided by the weight they have
  gathered (TF's `zero_debias` does so for the mean, here for both), so that a
  momentum of 0.9999 is of use after ten steps as after a million. `mean_only`
  subtracts the mean and learns an offset (Salimans & Kingma 2016, section 3):
  for weight-normalised layers. Without `scaled` no factor is learned.
  """

  momentum: float = 0.9999
  epsilon: float = 1e-3
  mean_only: bool = False
  scaled: bool = True

  @nn.compact
  def __call__(self, x, *, train: bool):
    """Normalises `x [..., C]`."""
    shape = x.shape[-1:]
    zeros = lambda: jnp.zeros(shape, jnp.float32)
    mean_sum = self.variable('batch_stats', 'mean', zeros)
    square_sum = self.variable('batch_stats', 'var', zeros)
    weight = self.variable(
      'batch_stats', 'weight', lambda: jnp.zeros([], jnp.float32)
    )
    axes = tuple(range(x.ndim - 1))
    if train:
      mean = jnp.mean(x, axes)
      var = zeros()
      if not self.mean_only:
        # E[x²] − E[x]² reads x once; rounding may leave it just below 0.
        square = jnp.mean(jnp.square(x), axes)
        var = jnp.maximum(0.0, square - jnp.square(mean))
      if not self.is_initializing():
        running = lambda old, new: old + (1 - self.momentum) * (new - old)
        mean_sum.value = running(mean_sum.value, mean)
        square_sum.value = running(square_sum.value, var)
        weight.value = running(weight.value, jnp.ones([], jnp.float32))
    else:
      # Before the first step nothing has been gathered: mean 0, variance 1.
      gathered = weight.value > 0
      divisor = jnp.where(gathered, weight.value, 1.0)
      mean = mean_sum.value / divisor
      var = jnp.where(gathered, square_sum.value / divisor, 1.0)
    bias = self.param('bias', nn.initializers.zeros, shape)
    if self.mean_only:
      return x + jnp.expand_dims(bias - mean, axes)
    scale = jax.lax.rsqrt(var + self.epsilon)
    if self.scaled:
      scale *= self.param('scale', nn.initializers.ones, shape)
    shift = bias - mean * scale
    return x * jnp.expand_dims(scale, axes) + jnp.expand_dims(shift, axes)


class WeightNorm(nn.Module):
  """A convolution or matrix of unit columns times a learned scale, no bias.

  The scale starts at 1/std of the layer's output on the batch that `init` is
  given: the data-dependent initialisation of Salimans & Kingma 2016.
  """

  features: int
  kernel: tuple[int, ...] = ()  # () is a matrix product
  padding: str = 'SAME'

  @nn.compact
  def __call__(self, x):
    """Maps `x [..., c]` to `[..., features]`."""
    shape = (*self.kernel, x.shape[-1], self.features)
    kernel = self.param('kernel', nn.initializers.normal(0.05), shape)
    axes = tuple(range(len(shape) - 1))
    norm = jnp.sqrt(jnp.sum(jnp.square(kernel), axes, keepdims=True))
    unit = kernel / norm

    if self.kernel:
      y = conv.conv_general_dilated(
        x,
        unit,
        (1, 1),
        self.padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      )
    else:
      y = x @ unit
    axes = tuple(range(x.ndim - 1))
    scale = self.param('scale', lambda key: 1.0 / (jnp.std(y, axes) + 1e-8))
    return y * jnp.expand_dims(scale, axes)


class ConvBlock(nn.Module):
  """Convolution, normalisation, leaky ReLU."""

  features: int
  kernel: int = 3
  padding: str = 'SAME'
  norm: Norm = 'batch'
  momentum: float = 0.9999

  @nn.compact
  def __call__(self, x, *, train: bool):
    """Maps `x [B, H, W, c]` to `[B, H', W', features]`."""
    size = (self.kernel, self.kernel)
    if self.norm == 'batch':
      x = nn.Conv(
        self.features,
        size,
        padding=self.padding,
        use_bias=False,
        kernel_init=nn.initializers.normal(0.05),
        conv_general_dilated=conv.conv_general_dilated,
      )(x)
    else:
      x = WeightNorm(self.features, size, self.padding)(x)
    mean_only = self.norm == 'weight'
    x = BatchNorm(self.momentum, mean_only=mean_only)(x, train=train)
    return leaky_relu(x)
