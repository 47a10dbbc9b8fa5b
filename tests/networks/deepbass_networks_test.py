import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax.errors import InputError
from ssljax.networks import deepbass


def shapes(net, *shape):
  image = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  params, stats = jax.eval_shape(net.init, jax.random.key(0), image)
  return params, stats, jax.eval_shape(net.infer, params, stats, image)


@pytest.mark.parametrize(
  ('net', 'shape', 'parameters', 'embedding'),
  [
    # Section 5: 160 + 3 · 2,320 + 7,850, of a 7×7×16 tensor.
    (deepbass.deepbass(10), (28, 28, 1), 14_970, 784),
    # Section 4, with biases: 3 · 50 + 51 · 50 + 51 · 50 + 51 · 2.
    (deepbass.mlp(2), (1, 2, 1), 5_352, 50),
  ],
)
def test_the_networks_have_their_parameters(net, shape, parameters, embedding):
  params, stats, outputs = shapes(net, *shape)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
  assert stats == {}
  assert outputs.embedding.shape == (2, embedding)
  assert outputs.feature is None


def test_the_least_image_is_4_pixels_wide():
  net = deepbass.deepbass(3)
  assert shapes(net, 4, 4, 1)[2].embedding.shape == (2, 16)
  with pytest.raises(InputError, match=r'network.*4x4.*image_size'):
    shapes(net, 3, 3, 1)


@pytest.mark.parametrize('make', [deepbass.deepbass, deepbass.mlp])
def test_a_dropout_of_everything_is_refused_by_name(make):
  with pytest.raises(InputError, match='dropout=1'):
    make(10, dropout=1)


def leaky(x):
  return np.where(x > 0, x, 0.1 * x)  # Eq. 13


def convolve(x, part):
  """3×3 with a border of zeros, [B, H, W, c] -> [B, H, W, features]."""
  height, width = x.shape[1:3]
  x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  y = np.zeros((len(x), height, width, part['kernel'].shape[-1]))
  for i, j in np.ndindex(height, width):
    y[:, i, j] = np.tensordot(x[:, i : i + 3, j : j + 3], part['kernel'], 3)
  return y + part['bias']


def pool(x):
  """2×2 of [B, H, W, c]; an odd last row or column is left out."""
  batch, height, width, channels = x.shape
  x = x[:, : height // 2 * 2, : width // 2 * 2]
  x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
  return x.max((2, 4))


def dense(x, part):
  return x @ part['kernel'] + part['bias']


def slow_deepbass(x, params):
  for first, second in (('Conv_0', 'Conv_1'), ('Conv_2', 'Conv_3')):
    x = leaky(convolve(x, params[first]))
    x = pool(leaky(convolve(x, params[second])))
  x = x.reshape(len(x), -1)
  return dense(x, params['Dense_0']), x


def slow_mlp(x, params):
  x = x.reshape(len(x), -1)
  for name in ('Dense_0', 'Dense_1', 'Dense_2'):
    x = leaky(dense(x, params[name]))
  return dense(x, params['Dense_3']), x


@pytest.mark.parametrize(
  ('net', 'shape', 'slow'),
  [
    (deepbass.deepbass(3, widths=(4, 5)), (7, 6, 2), slow_deepbass),
    (deepbass.mlp(2, widths=(6, 5, 4)), (1, 2, 1), slow_mlp),
  ],
)
def test_it_is_slow_numpy_without_dropout(net, shape, slow):
  image = np.random.default_rng(0).normal(size=(5, *shape)).astype(np.float32)
  params, stats = jax.jit(net.init)(jax.random.key(1), image)
  # Biases of 0 would hide errors.
  params = jax.tree.map(lambda p: p + 0.1 if p.ndim == 1 else p, params)
  outputs = jax.jit(net.infer)(params, stats, image)
  expected = slow(image, jax.tree.map(np.asarray, params))
  for ours, theirs in zip(outputs[:2], expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
  ('make', 'shape'),
  [(deepbass.deepbass, (28, 28, 1)), (deepbass.mlp, (1, 2, 1))],
)
def test_kernels_start_glorot_uniform_and_each_by_itself(make, shape):
  params, _ = jax.jit(make(10).init)(jax.random.key(0), jnp.ones([1, *shape]))
  kernels = [np.asarray(part['kernel']) for part in params.values()]
  for kernel in kernels:
    # U(−√(6 / (fan in + fan out)), the same above 0).
    pixels = np.prod(kernel.shape[:-2])
    bound = np.sqrt(6 / (pixels * (kernel.shape[-2] + kernel.shape[-1])))
    assert 0.9 * bound < np.abs(kernel).max() <= bound
  alike = [kernel for kernel in kernels if kernel.shape == kernels[1].shape]
  assert len(alike) > 1
  assert not np.allclose(alike[0], alike[1])
  for part in params.values():
    np.testing.assert_array_equal(part['bias'], 0)


@pytest.mark.parametrize(
  ('make', 'shape'),
  [(deepbass.deepbass, (8, 8, 1)), (deepbass.mlp, (1, 2, 1))],
)
def test_passes_with_dropout_differ_and_without_it_do_not(make, shape):
  net, image = make(3, dropout=0.5), jnp.ones([4, *shape])
  params, stats = jax.jit(net.init)(jax.random.key(0), image)
  one, other = (
    jax.jit(net.sample)(params, stats, image, jax.random.key(i)).logits
    for i in range(2)
  )
  assert not np.allclose(one, other)
  # A pass is one function of all images; in training they differ.
  np.testing.assert_allclose(one, np.tile(one[:1], (4, 1)), rtol=1e-5)
  trained, _ = jax.jit(net.train)(params, stats, image, jax.random.key(0))
  assert len(np.unique(np.asarray(trained.logits), axis=0)) == 4
  never = make(3, dropout=0)
  np.testing.assert_allclose(
    never.sample(params, stats, image, jax.random.key(0)).logits,
    net.infer(params, stats, image).logits,
    rtol=1e-5,
    atol=1e-6,
  )
