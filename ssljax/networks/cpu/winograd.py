"""3x3 convolutions of stride 1 with 2.25 times fewer multiplications.

Winograd, "Arithmetic complexity of computations" (1980), applied to
convolutions by Lavin & Gray, "Fast algorithms for convolutional neural
networks" (2016, arXiv:1509.09308): F(2x2, 3x3) computes a tile Y of 2x2 outputs
from a tile d of 4x4 inputs and a kernel w with 16 multiplications instead of
36. Neighbouring tiles d are 2 apart:

  outputs           Y = Aᵀ [U ⊙ V] A        U = G w Gᵀ, V = Bᵀ d B
  kernel gradient   ∂L/∂w = Gᵀ [Σ_tiles V ⊙ (A ∂L/∂Y Aᵀ)] G

Each of the 16 products ⊙ is a matrix product over the channels. B and A hold
only 0, 1 and -1, and G also 1/2, so the errors are rounding errors, two to
three times those of a direct convolution; larger tiles would save more and be
less accurate. A few images are computed at a time, so that their tiles, which
take four times the space, stay in the cache.
"""

import math

import jax
from jax import lax
import jax.numpy as jnp

# Size of the transformed tiles of one chunk, images and outputs together.
# Larger chunks exceed the last-level cache, smaller ones read the transformed
# kernel too often; the speed is flat within a factor of two.
_CHUNK_BYTES = 16 << 20


def suits(x, w, strides, pads) -> bool:
  """Return True where this was measured to be faster than direct convolution.

  Narrow layers spend their time in the transforms of images, few tiles in that
  of the kernel. Tiles that extend far beyond small images save too little.

  Args:
    x: images `[B, H, W, I]`.
    w: kernel `[k, l, I, O]`.
    strides: of the convolution.
    pads: of the convolution.
  """
  if x.dtype != jnp.float32 or w.shape[:2] != (3, 3) or strides != (1, 1):
    return False
  if min(w.shape[2:]) < 128 or not 0 <= min(map(min, pads)):
    return False
  size, tiles = _sizes(x, pads)
  saved = 9 * math.prod(size) / (16 * math.prod(tiles))
  return saved > 1.6 and x.shape[0] * math.prod(tiles) >= 128


def convolve(x, w, *, pads, precision):
  """Convolve with stride 1.

  Args:
    x: images `[B, H, W, I]`.
    w: kernel `[3, 3, I, O]`.
    pads: ((low, high), (low, high)) zeros around the image.
    precision: of the products.

  Returns:
    Images `[B, H', W', O]`.
  """
  size, tiles = _sizes(x, pads)
  u = _both_sides(_g, [[w[i, j] for j in range(3)] for i in range(3)])
  images = _images_at_once(x.shape[0], tiles, w.shape[2:])

  def set_chunk(i, y):
    v = _image_tiles(_chunk(x, i, images), tiles, size, pads)
    m = [
      [jnp.dot(a, b, precision=precision) for a, b in zip(*rows, strict=True)]
      for rows in zip(v, u, strict=True)
    ]
    yi = _both_sides(_a_transposed, m)
    yi = jnp.stack([jnp.stack(row, axis=3) for row in yi], axis=2)
    yi = yi.reshape(images, 2 * tiles[0], 2 * tiles[1], -1)
    yi = yi[:, : size[0], : size[1]]
    return lax.dynamic_update_index_in_dim(y, yi, i, 1)

  y = jnp.zeros((images, x.shape[0] // images, *size, w.shape[3]), x.dtype)
  y = lax.fori_loop(0, y.shape[1], set_chunk, y)
  return y.reshape(x.shape[0], *y.shape[2:])


def kernel_gradient(x, g, *, pads, precision):
  """Return the kernel gradient of `convolve`.

  Args:
    x: images `[B, H, W, I]`.
    g: gradient of the outputs `[B, H', W', O]`.
    pads: of the convolution.
    precision: of the products.

  Returns:
    `[3, 3, I, O]`.
  """
  size, tiles = _sizes(x, pads)
  channels = (x.shape[-1], g.shape[-1])
  images = _images_at_once(x.shape[0], tiles, channels)
  devices = devices_of(x.shape[0])
  by_device = lambda a: a.reshape(devices, -1, a.shape[-1])

  def add_chunk(i, du):
    v = _image_tiles(_chunk(x, i, images), tiles, size, pads)
    q = _output_tiles(_chunk(g, i, images), tiles)
    return [
      [
        total
        + jnp.einsum(
          'dni,dno->dio', by_device(a), by_device(b), precision=precision
        )
        for total, a, b in zip(*rows, strict=True)
      ]
      for rows in zip(du, v, q, strict=True)
    ]

  # Each device sums its own chunks, and the devices exchange their sums once.
  du = [[jnp.zeros((devices, *channels), x.dtype)] * 4] * 4
  du = lax.fori_loop(0, x.shape[0] // images, add_chunk, du)
  du = [[some.sum(0) for some in row] for row in du]
  return jnp.stack([jnp.stack(row) for row in _both_sides(_g_transposed, du)])


def _sizes(x, pads):
  """Return the numbers of outputs (H', W') and of tiles (⌈H'/2⌉, ⌈W'/2⌉)."""
  size = tuple(n + sum(p) - 2 for n, p in zip(x.shape[1:3], pads, strict=True))
  return size, tuple(-(-n // 2) for n in size)


def _images_at_once(batch, tiles, channels):
  """Return the images per chunk over all devices, so that tiles fit."""
  image_bytes = 16 * math.prod(tiles) * sum(channels) * 4
  return images_of_chunk(batch, _CHUNK_BYTES // image_bytes)


def devices_of(batch: int) -> int:
  """Return the number of devices of the current mesh that share a batch."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty or batch % mesh.size else mesh.size


def images_of_chunk(batch: int, most: int) -> int:
  """Return the largest possible number of images per chunk, over all devices.

  It divides the batch.

  Args:
    batch: images of all devices.
    most: the most images of a chunk on one device; at least 1 is used.
  """
  devices = devices_of(batch)
  own = batch // devices
  fits = [n for n in range(1, own + 1) if own % n == 0 and n <= max(most, 1)]
  return devices * fits[-1]


def _chunk(x, i, images):
  """Return chunk i, `[images, H, W, C]`, of `x [B, H, W, C]`.

  Chunks are axis 1, so that axis 0 stays sharded like the batch.
  """
  x = x.reshape(images, -1, *x.shape[1:])
  return lax.dynamic_index_in_dim(x, i, 1, keepdims=False)


def _image_tiles(x, tiles, size, pads):
  """Return Bᵀ d B of every tile.

  Args:
    x: images `[b, H, W, I]`.
    tiles: their number (S, T).
    size: of the outputs (H', W').
    pads: of the convolution.

  Returns:
    4 lists of 4 arrays `[b, S, T, I]`.
  """
  (s, t), extra = tiles, [2 * n - m for n, m in zip(tiles, size, strict=True)]
  even = [(low, high + e) for (low, high), e in zip(pads, extra, strict=True)]
  x = jnp.pad(x, ((0, 0), *even, (0, 0)))
  d = [
    [x[:, i : i + 2 * s - 1 : 2, j : j + 2 * t - 1 : 2] for j in range(4)]
    for i in range(4)
  ]
  return _both_sides(_b_transposed, d)


def _output_tiles(g, tiles):
  """Return A ∂L/∂Y Aᵀ of every tile, 4 x 4 arrays `[b, S, T, O]`.

  Args:
    g: gradient of the outputs `[b, H', W', O]`.
    tiles: their number (S, T).
  """
  even = [(0, 2 * n - m) for n, m in zip(tiles, g.shape[1:3], strict=True)]
  g = jnp.pad(g, ((0, 0), *even, (0, 0)))
  return _both_sides(_a, [[g[:, i::2, j::2] for j in (0, 1)] for i in (0, 1)])


def _both_sides(matrix, d):
  """Return M d Mᵀ of a matrix d of arrays, as lists of rows."""
  transposed = lambda rows: zip(*rows, strict=True)
  by_rows = [matrix(*row) for row in d]
  by_columns = [matrix(*column) for column in transposed(by_rows)]
  return [list(row) for row in transposed(by_columns)]


def _g(a, b, c):
  return a, (a + b + c) * 0.5, (a - b + c) * 0.5, c


def _g_transposed(a, b, c, d):
  return a + (b + c) * 0.5, (b - c) * 0.5, (b + c) * 0.5 + d


def _b_transposed(a, b, c, d):
  return a - c, b + c, c - b, b - d


def _a(a, b):
  return a, a + b, a - b, -b


def _a_transposed(a, b, c, d):
  return a + b + c, b - c - d
