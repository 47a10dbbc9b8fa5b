"""Convolution and max-pooling that train fast on a CPU.

On a CPU, XLA computes the kernel gradient of a convolution as a convolution
whose window is a whole image, at a fifth of the speed of its matrix products,
and the gradient of max-pooling by select-and-scatter, which is slower still.
This module replaces both, and wide 3x3 layers altogether. The replacement is
made at lowering and for CPUs only, so that a program lowered for an accelerator
holds XLA's own operations:

  kernel gradient   ∂L/∂W = Σ_chunks P(x)ᵀ g,  P(x) [b·h·w, k·k·c] the patches
                    of a few images at a time, so that they stay in the cache
  wide 3x3 layers   forward and both gradients in `winograd.py`, with 2.25 times
                    fewer multiplications
  max-pooling       ∂L/∂x = g where x was the first maximum of its window

Give the convolution to linen: `nn.Conv(..., conv_general_dilated=
conv.conv_general_dilated)`. Both have reverse-mode derivatives only.
"""

import contextlib
import contextvars
import functools
import math
import os

import chex
import jax
from jax import lax
import jax.numpy as jnp

from ssljax.networks.cpu import winograd

_DIMENSIONS = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
_LAYOUT = ('NHWC', 'HWIO', 'NHWC')
# Size of the patches of one chunk. Larger chunks exceed the last-level cache,
# smaller ones spend their time in the loop; the speed is flat within a factor
# of two.
_CHUNK_BYTES = 4 << 20
_IS_NATIVE = contextvars.ContextVar('is_native', default=False)
_HAS_WINDOWS = contextvars.ContextVar('has_windows', default=True)


@contextlib.contextmanager
def native(windows: bool = True):
  """Make code traced in this context use XLA's own operations on CPUs too.

  Args:
    windows: False computes max-pooling as the maximum of slices, for compilers
      without a general reduction of windows.
  """
  before = _IS_NATIVE.set(True), _HAS_WINDOWS.set(windows)
  try:
    yield
  finally:
    _IS_NATIVE.reset(before[0])
    _HAS_WINDOWS.reset(before[1])


def conv_general_dilated(
  lhs,
  rhs,
  window_strides,
  padding,
  lhs_dilation=None,
  rhs_dilation=None,
  dimension_numbers=None,
  feature_group_count=1,
  batch_group_count=1,
  precision=None,
  preferred_element_type=None,
  out_sharding=None,
):
  """Compute `jax.lax.conv_general_dilated`, with fast gradients on a CPU.

  Only plain two-dimensional convolutions of floats are replaced: NHWC images,
  HWIO kernels, no dilation, no groups, no negative padding. All others are
  passed to lax unchanged.

  Args:
    lhs: images `[B, H, W, I]`.
    rhs: kernel `[k, l, I, O]`.
    window_strides: two integers.
    padding: 'SAME', 'SAME_LOWER', 'VALID', or two pairs (low, high).
    lhs_dilation: as in lax.
    rhs_dilation: as in lax.
    dimension_numbers: as in lax.
    feature_group_count: as in lax.
    batch_group_count: as in lax.
    precision: as in lax; used for the gradients too.
    preferred_element_type: as in lax.
    out_sharding: as in lax.

  Returns:
    Images `[B, H', W', O]`.
  """
  extras = dict(
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    feature_group_count=feature_group_count,
    batch_group_count=batch_group_count,
    preferred_element_type=preferred_element_type,
    out_sharding=out_sharding,
  )
  pads = _plain_padding(
    lhs, rhs, window_strides, padding, dimension_numbers, **extras
  )
  if pads is None or _IS_NATIVE.get():
    return lax.conv_general_dilated(
      lhs,
      rhs,
      window_strides,
      padding,
      dimension_numbers=dimension_numbers,
      precision=precision,
      **extras,
    )
  return _conv(lhs, rhs, tuple(window_strides), pads, precision)


def _plain_padding(
  lhs,
  rhs,
  strides,
  padding,
  dimension_numbers,
  *,
  lhs_dilation,
  rhs_dilation,
  feature_group_count,
  batch_group_count,
  preferred_element_type,
  out_sharding,
):
  """Return ((low, high), (low, high)) of a plain convolution, else None."""
  if lhs.ndim != 4 or rhs.ndim != 4 or lhs.dtype != rhs.dtype:
    return None
  plain = (
    lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    == _DIMENSIONS
    and jnp.issubdtype(lhs.dtype, jnp.floating)
    and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    and feature_group_count == batch_group_count == 1
    and preferred_element_type is None
    and out_sharding is None
  )
  if not plain:
    return None
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(
      lhs.shape[1:3], rhs.shape[:2], strides, padding
    )
  pads = tuple((int(low), int(high)) for low, high in padding)
  return pads if min(map(min, pads)) >= 0 and lhs.size else None


def _native_conv(x, w, strides, pads, precision):
  """Compute XLA's convolution of `[B, H, W, I]` with `[k, l, I, O]`."""
  return lax.conv_general_dilated(
    x, w, strides, pads, dimension_numbers=_LAYOUT, precision=precision
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x, w, strides, pads, precision):
  """Convolve images `[B, H, W, I]` with `[k, l, I, O]`: `[B, H', W', O]`."""
  native = functools.partial(
    _native_conv, strides=strides, pads=pads, precision=precision
  )
  if not winograd.suits(x, w, strides, pads):
    return native(x, w)
  ours = functools.partial(winograd.convolve, pads=pads, precision=precision)
  return lax.platform_dependent(x, w, cpu=ours, default=native)


def _conv_forward(x, w, strides, pads, precision):
  return _conv(x, w, strides, pads, precision), (x, w)


def _conv_backward(strides, pads, precision, saved, g):
  """Return both gradients, separately, so that an unused one is dropped."""
  x, w = saved
  options = dict(strides=strides, pads=pads, precision=precision)
  conv = functools.partial(_native_conv, **options)
  dw = lax.platform_dependent(
    x,
    g,
    cpu=functools.partial(_kernel_gradient, shape=w.shape, **options),
    default=lambda x, g: jax.linear_transpose(lambda w: conv(x, w), w)(g)[0],
  )
  return _input_gradient(w, g, x, **options), dw


_conv.defvjp(_conv_forward, _conv_backward)


def _input_gradient(w, g, like, *, strides, pads, precision):
  """Return the gradient of the images, `[B, H, W, I]`.

  With stride 1 it is a convolution too, of g with the rotated kernel, padded so
  that windows overlap the image by at least one row and column.

  Args:
    w: kernel `[k, l, I, O]`.
    g: gradient of the output `[B, H', W', O]`.
    like: an array of the shape of the images.
    strides: of the convolution.
    pads: of the convolution.
    precision: of the products.
  """
  native = lambda w, g: jax.linear_transpose(
    lambda x: _native_conv(x, w, strides, pads, precision), like
  )(g)[0]
  rotated = jax.eval_shape(_rotate, w)
  back = tuple(
    (k - 1 - low, k - 1 - high)
    for k, (low, high) in zip(w.shape[:2], pads, strict=True)
  )
  if not winograd.suits(g, rotated, strides, back):
    return native(w, g)
  ours = lambda w, g: winograd.convolve(
    g, _rotate(w), pads=back, precision=precision
  )
  return lax.platform_dependent(w, g, cpu=ours, default=native)


def _rotate(w):
  """Return a kernel `[k, l, I, O]` rotated by 180°, `[k, l, O, I]`."""
  return jnp.flip(w, (0, 1)).swapaxes(2, 3)


def _kernel_gradient(x, g, *, shape, strides, pads, precision):
  """Return the kernel gradient, Σ over chunks of P(x)ᵀ g, or Winograd's.

  Args:
    x: images `[B, H, W, I]`.
    g: gradient of the output `[B, H', W', O]`.
    shape: of the kernel, (k, l, I, O).
    strides: of the convolution.
    pads: of the convolution.
    precision: of the products.

  Returns:
    `[k, l, I, O]`.
  """
  w = jax.ShapeDtypeStruct(shape, x.dtype)
  if winograd.suits(x, w, strides, pads):
    return winograd.kernel_gradient(x, g, pads=pads, precision=precision)
  total = jnp.float32 if x.dtype.itemsize < 4 else x.dtype
  devices = winograd.devices_of(x.shape[0])
  images = _images_per_chunk(g, math.prod(shape[:3]) * x.dtype.itemsize)
  # Chunks are axis 1, so that axis 0 stays sharded like the batch.
  x = x.reshape(images, -1, *x.shape[1:])
  g = g.reshape(images, -1, *g.shape[1:])

  def add_chunk(i, dw):
    xi, gi = (lax.dynamic_index_in_dim(a, i, 1, keepdims=False) for a in (x, g))
    p = _patches(xi, shape[:2], strides, pads, gi.shape[1:3])
    return dw + lax.dot_general(
      p.reshape(devices, -1, p.shape[-1]),
      gi.reshape(devices, -1, gi.shape[-1]),
      (((1,), (1,)), ((0,), (0,))),
      precision=precision,
      preferred_element_type=total,
    )

  # A loop is twice as fast as the same chunks unrolled: each iteration reuses
  # memory that is still in the cache. Each device sums its own chunks, and the
  # devices exchange their sums once.
  flat = jnp.zeros((devices, math.prod(shape[:3]), shape[3]), total)
  dw = lax.fori_loop(0, x.shape[1], add_chunk, flat)
  return dw.sum(0).reshape(shape).astype(x.dtype)


def _images_per_chunk(g, patch_bytes):
  """Return the images per chunk over all devices, so that patches fit.

  Args:
    g: gradient of the output `[B, H', W', O]`.
    patch_bytes: the size of the patch of one pixel.
  """
  batch, height, width, _ = g.shape
  most = _CHUNK_BYTES // (height * width * patch_bytes)
  return winograd.images_of_chunk(batch, most)


def _patches(x, window, strides, pads, size):
  """Return the pixels under each position of a window, concatenated.

  Args:
    x: images `[B, H, W, I]`.
    window: (k, l).
    strides: of the window.
    pads: zeros around the image.
    size: number of positions (H', W').

  Returns:
    `[B, H', W', k·l·I]`.
  """
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  (s, t), (height, width) = strides, size
  return jnp.concatenate(
    [
      x[:, i : i + s * (height - 1) + 1 : s, j : j + t * (width - 1) + 1 : t]
      for i in range(window[0])
      for j in range(window[1])
    ],
    axis=-1,
  )


def compiler_options() -> dict[str, str]:
  """Return options for `jax.jit` of programs with convolutions on a CPU.

  By default XLA gives float convolutions to YNNPACK, which runs those of fewer
  than 128 channels on one core. With these options Eigen runs them on all
  cores; products and sums stay with YNNPACK. On other devices, or if this XLA
  does not know the option, there are none.
  """
  if jax.default_backend() != 'cpu' or _IS_NATIVE.get():
    return {}
  return _cpu_options()


def run_once_options() -> dict[str, str]:
  """Return options for `jax.jit` of a program that a CPU runs once.

  They make the compiler's own work a third of that of the default options, and
  change no bit of the result. On other devices, and where `XLA_FLAGS` states
  the level, there are none.
  """
  name = 'xla_backend_optimization_level'
  if jax.default_backend() != 'cpu' or name in os.environ.get('XLA_FLAGS', ''):
    return {}
  return {name: '1'}


@functools.cache
def _cpu_options() -> dict[str, str]:
  """Return the options for a CPU, if this XLA knows them."""
  fused = 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE'
  options = {'xla_cpu_experimental_ynn_fusion_type': fused}
  try:
    jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return {}
  return options


def max_pool(x, window, strides, padding='VALID'):
  """Return the largest value in each window, as `flax.linen.max_pool`.

  The gradient is fast on a CPU if strides = window; other windows use XLA's own
  gradient. In both cases the first of several equal maxima (row by row) gets
  the gradient.

  Args:
    x: images `[B, H, W, C]`, float.
    window: (k, l), or one integer for both.
    strides: (s, t), or one integer for both.
    padding: 'SAME', 'VALID', or two pairs (low, high), filled with -∞.

  Returns:
    Images `[B, H', W', C]`.
  """
  chex.assert_rank(x, 4)
  chex.assert_type(x, float)
  window, strides = _pair(window), _pair(strides)
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
  pads = tuple((int(low), int(high)) for low, high in padding)
  if not _HAS_WINDOWS.get():
    return _sliced_pool(x, window, strides, pads)
  if window == strides and not _IS_NATIVE.get():
    return _pool(x, window, pads)
  return _native_pool(x, window, strides, pads)


def _pair(n):
  return (n, n) if isinstance(n, int) else tuple(n)


def _native_pool(x, window, strides, pads):
  """Compute XLA's max-pooling of `[B, H, W, C]`."""
  return lax.reduce_window(
    x,
    -jnp.inf,
    lax.max,
    (1, *window, 1),
    (1, *strides, 1),
    ((0, 0), *pads, (0, 0)),
  )


def _sliced_pool(x, window, strides, pads):
  """Compute max-pooling of `[B, H, W, C]` as the maximum of strided slices."""
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
  ends = [side - size for side, size in zip(x.shape[1:3], window, strict=True)]
  slices = [
    x[:, i : ends[0] + i + 1 : strides[0], j : ends[1] + j + 1 : strides[1]]
    for i in range(window[0])
    for j in range(window[1])
  ]
  return functools.reduce(jnp.maximum, slices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _pool(x, window, pads):
  """Pool `[B, H, W, C]` in windows without overlap, `[B, H', W', C]`."""
  return _native_pool(x, window, window, pads)


def _pool_forward(x, window, pads):
  y = _pool(x, window, pads)
  return y, (x, y)


def _pool_backward(window, pads, saved, g):
  x, y = saved

  def native(x, y, g):
    del y
    return jax.vjp(lambda x: _native_pool(x, window, window, pads), x)[1](g)[0]

  masked = functools.partial(_pool_gradient, window=window, pads=pads)
  return (lax.platform_dependent(x, y, g, cpu=masked, default=native),)


_pool.defvjp(_pool_forward, _pool_backward)


def _pool_gradient(x, y, g, *, window, pads):
  """Return the gradient: g at the first maximum of each window, 0 elsewhere.

  Args:
    x: images `[B, H, W, C]`.
    y: their maxima `[B, H', W', C]`.
    g: gradient of the maxima `[B, H', W', C]`.
    window: (m, n).
    pads: of the pooling.

  Returns:
    Gradient of the images `[B, H, W, C]`.
  """
  (m, n), (batch, height, width, channels) = window, y.shape
  # Pad or crop the images to the area that the windows cover.
  cover = (
    (0, 0, 0),
    (pads[0][0], height * m - x.shape[1] - pads[0][0], 0),
    (pads[1][0], width * n - x.shape[2] - pads[1][0], 0),
    (0, 0, 0),
  )
  x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), cover)
  x = x.reshape(batch, height, m, width, n, channels)
  free = jnp.ones(y.shape, bool)
  rows = []
  for i in range(m):
    row = []
    for j in range(n):
      hit = free & (x[:, :, i, :, j] == y)
      free &= ~hit
      row.append(jnp.where(hit, g, jnp.zeros_like(g)))
    rows.append(jnp.stack(row, axis=3))
  dx = jnp.stack(rows, axis=2).reshape(batch, height * m, width * n, channels)
  back = tuple((-low, -high, 0) for low, high, _ in cover)
  return lax.pad(dx, jnp.zeros((), dx.dtype), back)
