"""Layers shared by several networks."""

import math
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

from ssljax.networks.cpu import conv

SLOPE = 0.1  # of every leaky ReLU, as in the five papers
TORCH_EPSILON = 1e-5  # of batch norm in PyTorch
Norm = Literal['batch', 'weight', 'weight_batch']


# The default momentum averages the statistics of batch norm over 1 / SHARE of
# the steps. Chosen on 300 validation images of the digits (3 splits, MA-DNN and
# its baseline, 300 and 600 steps): from 6 to 30 the mean errors differ by 0.34
# at most, and below 6 they rise. With 0.9999 after 600 steps the baseline has
# 6.2 % instead of 4.9 %, MA-DNN 5.0 % instead of 2.7 %.
SHARE = 6


def momentum_for(steps: int, most: float) -> float:
  """Return the momentum of batch norm's running averages for a run.

  A momentum m averages about the last 1 / (1 − m) steps. In a short run a large
  one would average over weights that are long outdated.

  Args:
    steps: steps of the run.
    most: upper bound, the network's own momentum.
  """
  return min(most, max(0.5, 1 - SHARE / steps))


def leaky_relu(x: jax.Array) -> jax.Array:
  """Return max(x, 0.1 x), of any shape."""
  return jnp.maximum(x, SLOPE * x)


def as_input(
  *args: jax.Array | None, dtype: Any = None, inexact: bool = True
) -> list[jax.Array | None]:
  """Cast a layer's parameters to the dtype of its input, the first argument.

  The `promote_dtype` of linen's layers: they then compute in the dtype of the
  images, see `network.computing_in`, and their parameters stay float32.
  """
  del dtype, inexact
  x, *parameters = args
  assert x is not None
  cast = lambda a: None if a is None else jnp.asarray(a, x.dtype)
  return [x, *map(cast, parameters)]


def widened(x: jax.Array) -> jax.Array:
  """Return `x`, of any shape, in float32 if its dtype is narrower."""
  return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def pooled_mean(x: jax.Array) -> jax.Array:
  """Return the mean over the pixels of `x [B, H, W, c]`, float32 `[B, c]`."""
  return jnp.mean(widened(x), (1, 2))


def dropout(x, rate: float, *, train: bool, active: bool) -> jax.Array:
  """Apply dropout to `x [B, ...]`, within a module's compact call.

  In training each image has its own mask. In Monte-Carlo dropout all images
  share one, so that a pass evaluates one function on all of them (f^(t)(x, w)
  of Gal, Ghahramani 2016; consistent dropout of Kirsch et al.,
  arXiv:1906.08158). The outputs for a single image have the same distribution
  either way, and with one mask a pass costs no more than inference.

  Args:
    x: `[B, ...]`.
    rate: the probability of dropping a value.
    train: training mode.
    active: whether to drop at all.
  """
  shared = () if train else (0,)
  # The same random bits, in loops of two axes, which LLVM compiles faster.
  rows = x.reshape(x.shape[0], -1)  # the batch may be symbolic
  drop = nn.Dropout(rate, shared, deterministic=not active)
  return drop(rows).reshape(x.shape)


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
  """Return the initialiser U(−1, 1) / √fan_in.

  It is PyTorch's default for biases and fully connected layers.
  """

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -1, 1) * fan_in**-0.5

  return init


def convolution(features: int, size: int, stride: int, kernel_init) -> nn.Conv:
  """Return a convolution without bias, padded by ⌊size / 2⌋ on every side."""
  # 'SAME' would pad even images on one side only at stride 2.
  return nn.Conv(
    features,
    (size, size),
    stride,
    padding=size // 2,
    use_bias=False,
    kernel_init=kernel_init,
    promote_dtype=as_input,
    conv_general_dilated=conv.conv_general_dilated,
  )


class BatchNorm(nn.Module):
  """Batch normalisation over all axes but the last, in float32.

  The output has the dtype of the input.

  The running averages are debiased: they start at zero and are divided by their
  accumulated weight (as TF's `zero_debias` for the mean, here for the variance
  too), so that with a momentum of 0.9999 they are useful from the first step.

  Attributes:
    momentum: of the running averages.
    epsilon: added to the variance.
    mean_only: subtract the mean and add a learned offset, without scaling
      (Salimans & Kingma 2016, section 3), for weight-normalised layers.
    scaled: whether a factor is learned.
    decayed: give the parameters the shape [1, C], so that weight decay applies
      to them, see `optimizers.decayed`.
  """

  momentum: float = 0.9999
  epsilon: float = 1e-3
  mean_only: bool = False
  scaled: bool = True
  decayed: bool = False

  @nn.compact
  def __call__(self, x, *, train: bool):
    """Normalise `x [..., C]`."""
    dtype, shape = x.dtype, x.shape[-1:]
    x = widened(x)
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
        # E[x²] − E[x]² reads x once; rounding may make it negative.
        square = jnp.mean(jnp.square(x), axes)
        var = jnp.maximum(0.0, square - jnp.square(mean))
      if not self.is_initializing():
        running = lambda old, new: old + (1 - self.momentum) * (new - old)
        mean_sum.value = running(mean_sum.value, mean)
        square_sum.value = running(square_sum.value, var)
        weight.value = running(weight.value, jnp.ones([], jnp.float32))
    else:
      # Before the first step the weight is 0: use mean 0 and variance 1.
      is_trained = weight.value > 0
      divisor = jnp.where(is_trained, weight.value, 1.0)
      mean = mean_sum.value / divisor
      var = jnp.where(is_trained, square_sum.value / divisor, 1.0)
    bias = self._parameter('bias', nn.initializers.zeros, shape)
    if self.mean_only:
      return (x + jnp.expand_dims(bias - mean, axes)).astype(dtype)
    scale = jax.lax.rsqrt(var + self.epsilon)
    if self.scaled:
      scale *= self._parameter('scale', nn.initializers.ones, shape)
    shift = bias - mean * scale
    y = x * jnp.expand_dims(scale, axes) + jnp.expand_dims(shift, axes)
    return y.astype(dtype)

  def _parameter(self, name: str, init, shape) -> jax.Array:
    """Return a parameter of `shape` [C]."""
    stored = (1, *shape) if self.decayed else shape
    return self.param(name, init, stored).reshape(shape)


class WeightNorm(nn.Module):
  """A convolution or matrix product with normalised columns.

  Each output's weights have length 1 times a learned scale. By default the
  scale starts at 1/std of the output on the batch given to `init`: the
  data-dependent initialisation of Salimans & Kingma 2016.

  Attributes:
    features: number of outputs.
    kernel: size of the convolution; () for a matrix.
    padding: of the convolution.
    from_kernel: start as in PyTorch: kernels are U(−1, 1) / √fan_in and the
      scale is their length, so that the layer begins as one without weight
      norm. The scale has the rank of the kernel, so that weight decay applies
      to it, see `optimizers.decayed`.
    bias: whether a bias is added; it starts as in PyTorch.
  """

  features: int
  kernel: tuple[int, ...] = ()
  padding: str = 'SAME'
  from_kernel: bool = False
  bias: bool = False

  @nn.compact
  def __call__(self, x):
    """Map `x [..., c]` to `[..., features]`."""
    shape = (*self.kernel, x.shape[-1], self.features)
    axes = tuple(range(len(shape) - 1))
    uniform = uniform_fan_in(math.prod(shape[:-1]))
    normal = nn.initializers.normal(0.05)
    init = uniform if self.from_kernel else normal
    kernel = self.param('kernel', init, shape)
    norm = jnp.sqrt(jnp.sum(jnp.square(kernel), axes, keepdims=True))
    unit = (kernel / norm).astype(x.dtype)

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
    y = widened(y)
    axes = tuple(range(x.ndim - 1))
    if self.from_kernel:
      scale = self.param('scale', lambda key: norm).reshape(-1)
    else:
      scale = self.param('scale', lambda key: 1.0 / (jnp.std(y, axes) + 1e-8))
    y *= jnp.expand_dims(scale, axes)
    if self.bias:
      y += jnp.expand_dims(self.param('bias', uniform, (self.features,)), axes)
    return y.astype(x.dtype)


class ConvBlock(nn.Module):
  """A convolution, normalisation and leaky ReLU."""

  features: int
  kernel: int = 3
  padding: str = 'SAME'
  norm: Norm = 'batch'
  momentum: float = 0.9999

  @nn.compact
  def __call__(self, x, *, train: bool):
    """Map `x [B, H, W, c]` to `[B, H', W', features]`."""
    size = (self.kernel, self.kernel)
    if self.norm == 'batch':
      x = nn.Conv(
        self.features,
        size,
        padding=self.padding,
        use_bias=False,
        kernel_init=nn.initializers.normal(0.05),
        promote_dtype=as_input,
        conv_general_dilated=conv.conv_general_dilated,
      )(x)
    else:
      from_kernel = self.norm == 'weight_batch'
      x = WeightNorm(self.features, size, self.padding, from_kernel)(x)
    if self.norm == 'weight_batch':
      normalize = BatchNorm(self.momentum, TORCH_EPSILON, decayed=True)
    else:
      mean_only = self.norm == 'weight'
      normalize = BatchNorm(self.momentum, mean_only=mean_only)
    return leaky_relu(normalize(x, train=train))
