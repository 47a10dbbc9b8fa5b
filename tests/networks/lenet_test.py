import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax import errors
from ssljax.networks import lenet


def shapes(net, side):
  image = jax.ShapeDtypeStruct((2, side, side, 1), jnp.float32)
  params, stats = jax.eval_shape(net.init, jax.random.key(0), image)
  return params, stats, jax.eval_shape(net.infer, params, stats, image)


def test_lenet_has_its_parameters_and_a_2_d_embedding():
  params, stats, outputs = shapes(lenet.lenet(10), 28)
  # 28 → 24 → 12 → 8 → 4 pixels; every layer has a bias.
  layers = (
    (5 * 5 * 1 + 1) * 20,
    (5 * 5 * 20 + 1) * 50,
    (4 * 4 * 50 + 1) * 500,
    (500 + 1) * 2,
    (2 + 1) * 10,
  )
  # 520 + 25,050 + 400,500 + 1,002 + 30.
  assert sum(layers) == 427_102
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 427_102
  assert stats == {}
  assert outputs.logits.shape == (2, 10)
  assert outputs.embedding.shape == (2, 2)


def test_the_least_image_is_16_pixels_wide():
  net = lenet.lenet(7, embedding=3)
  assert shapes(net, 16)[2].embedding.shape == (2, 3)
  with pytest.raises(errors.InputError, match=r'network.*16x16.*image_size'):
    shapes(net, 15)


def test_an_embedding_of_nothing_is_refused_by_name():
  with pytest.raises(errors.InputError, match='embedding'):
    lenet.lenet(10, embedding=0)


def convolve(x, part):
  """5×5, without padding: [B, H, W, c] -> [B, H − 4, W − 4, features]."""
  size = x.shape[1] - 4
  y = np.zeros((len(x), size, size, part['kernel'].shape[-1]))
  for i, j in np.ndindex(size, size):
    window = x[:, i : i + 5, j : j + 5]
    y[:, i, j] = np.tensordot(window, part['kernel'], 3)
  return y + part['bias']


def pool(x):
  """2×2: [B, H, W, c] -> [B, H/2, W/2, c], all even."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
  return x.max((2, 4))


def slow(image, params):
  """(logits, features) of [B, 16, 16, 1]."""
  dense = lambda x, name: x @ params[name]['kernel'] + params[name]['bias']
  x = image
  for name in ('Conv_0', 'Conv_1'):
    x = pool(convolve(x, params[name]))
  x = np.maximum(dense(x.reshape(len(x), -1), 'Dense_0'), 0)
  features = dense(x, 'Dense_1')
  return dense(features, 'Dense_2'), features


def test_it_is_slow_numpy_in_training_and_inference():
  net = lenet.lenet(3)
  image = np.random.default_rng(0).normal(size=(6, 16, 16, 1))
  image = image.astype(np.float32)

  @functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  def run(key):
    params, stats = net.init(key, image)
    # Biases of 0 would hide errors.
    params = jax.tree.map(lambda p: p + 0.1 if p.ndim == 1 else p, params)
    trained, _ = net.train(params, stats, image, key)
    return params, trained, net.infer(params, stats, image)

  params, trained, inferred = run(jax.random.key(1))
  expected = slow(image, jax.tree.map(np.asarray, params))
  for outputs in (trained, inferred):
    for value, same in zip(outputs[:2], expected, strict=True):
      np.testing.assert_allclose(value, same, rtol=1e-3, atol=1e-4)
  features = expected[1]
  assert features.min() < 0 < features.max()  # no ReLU
