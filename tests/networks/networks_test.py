import itertools

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax.errors import InputError
from ssljax.networks import convlarge, elu, layers, network, small


def count(params):
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def shapes(net, side, channels, batch=2):
  image = jax.ShapeDtypeStruct((batch, side, side, channels), jnp.float32)
  params, stats = jax.eval_shape(net.init, jax.random.key(0), image)
  return params, stats, jax.eval_shape(net.infer, params, stats, image)


# The nine kernels of the docstring, k·k·c_in·c_out each: 3.1 million.
KERNELS = (
  9 * 3 * 128
  + 2 * 9 * 128 * 128
  + 9 * 128 * 256
  + 2 * 9 * 256 * 256
  + 9 * 256 * 512
  + 512 * 256
  + 256 * 128
)
NORMS = 3 * 128 + 3 * 256 + 512 + 256 + 128  # channels of the nine layers


@pytest.mark.parametrize(
  ('norm', 'parameters'),
  [
    # Two per channel; a classifier with bias.
    ('batch', KERNELS + 2 * NORMS + 128 * 10 + 10),
    # A scale and an offset per channel, the classifier's ten included.
    ('weight', KERNELS + 2 * NORMS + 128 * 10 + 2 * 10),
  ],
)
def test_convlarge_has_its_parameters_and_a_128_d_embedding(norm, parameters):
  params, _, outputs = shapes(convlarge.convlarge(10, norm=norm), 32, 3)
  assert count(params) == parameters
  assert outputs.logits.shape == (2, 10)
  assert outputs.embedding.shape == (2, 128)


@pytest.mark.parametrize(('side', 'channels'), [(9, 1), (28, 1), (48, 3)])
def test_convlarge_takes_any_size_from_its_smallest_on(side, channels):
  _, _, outputs = shapes(convlarge.convlarge(7), side, channels)
  assert outputs.logits.shape == (2, 7)


@pytest.mark.parametrize(
  ('net', 'smallest'),
  [
    (convlarge.convlarge(10), 9),
    (small.small(10), 9),
    (small.small(10, widths=(32,), embedding=64), 5),
    (elu.elu(10), 8),
    (elu.elu(10, widths=(32, 64)), 4),
    (elu.elu_stl10(10), 17),
  ],
)
def test_an_image_too_small_is_refused_by_flag(net, smallest):
  assert net.smallest == smallest
  shapes(net, smallest, 1)
  with pytest.raises(InputError, match=r'network.*image_size'):
    shapes(net, smallest - 1, 1)


def tiny_net(**more):
  return small.small(3, widths=(4,), embedding=6, **more)


def test_train_infer_and_sample_differ_as_they_should():
  net = tiny_net()
  image = jax.random.uniform(jax.random.key(0), [8, 6, 6, 1])
  params, stats = net.init(jax.random.key(1), image)
  keys = jax.random.split(jax.random.key(2))
  trained, after = jax.jit(net.train)(params, stats, image, keys[0])
  chex.assert_shape(trained.embedding, (8, 6))
  chex.assert_trees_all_equal_structs(stats, after)
  assert not np.allclose(after['ConvBlock_0']['BatchNorm_0']['mean'], 0)
  sample = jax.jit(net.sample)
  one, other = (sample(params, after, image, key) for key in keys)
  again = sample(params, after, image, keys[0])
  chex.assert_trees_all_equal(one, again)
  assert not np.allclose(one.logits, other.logits)
  # Inference drops nothing.
  without = jax.jit(tiny_net(dropout=0.0).infer)
  chex.assert_trees_all_equal(
    without(params, after, image), jax.jit(net.infer)(params, after, image)
  )
  # Inference does not look at the rest of the batch.
  infer = jax.jit(net.infer)
  chex.assert_trees_all_close(
    infer(params, after, image).logits[:1],
    infer(params, after, image[:1]).logits,
    rtol=1e-5,
    atol=1e-6,
  )


class Dropped(nn.Module):
  """Dropout of half of the values, and nothing else."""

  @nn.compact
  def __call__(self, x, *, train, active):
    return layers.dropout(x, 0.5, train=train, active=active)


def test_images_drop_by_themselves_in_training_and_together_in_a_pass():
  x = jnp.ones([6, 64])

  def drop(seed, **mode):
    key = jax.random.key(seed)
    return np.asarray(Dropped().apply({}, x, rngs={'dropout': key}, **mode))

  rows = lambda dropped: len({row.tobytes() for row in dropped})
  assert rows(drop(0, train=True, active=True)) == 6
  sampled = drop(0, train=False, active=True)
  assert rows(sampled) == 1
  assert set(sampled[0]) == {0, 2}  # divided by the share that is kept
  assert not np.array_equal(sampled, drop(1, train=False, active=True))
  for train in (False, True):
    np.testing.assert_array_equal(drop(0, train=train, active=False), x)


def test_running_statistics_are_useful_after_one_step():
  # Debiased: after a step on one batch they are exactly its statistics,
  # whatever the momentum.
  norm = layers.BatchNorm(momentum=0.9999)
  x = 3 + 2 * jax.random.normal(jax.random.key(0), [64, 5])
  variables = norm.init(jax.random.key(1), x, train=True)
  y, after = norm.apply(variables, x, train=True, mutable=['batch_stats'])
  variables = {'params': variables['params'], **after}
  chex.assert_trees_all_close(
    norm.apply(variables, x, train=False), y, rtol=1e-3, atol=1e-4
  )


def test_batch_norm_by_hand_over_two_steps():
  # Means 1 then 3 with momentum 0.9: sums 0.1 and 0.39, weights 0.1, 0.19.
  norm = layers.BatchNorm(momentum=0.9, epsilon=0.0)
  batches = [jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [5.0]])]
  variables = norm.init(jax.random.key(0), batches[0], train=True)
  stats = variables['batch_stats']
  for x in batches:
    y, after = norm.apply(
      {'params': variables['params'], 'batch_stats': stats},
      x,
      train=True,
      mutable=['batch_stats'],
    )
    stats = after['batch_stats']
    np.testing.assert_allclose(y, [[-1.0], [1.0]], rtol=1e-5)
  np.testing.assert_allclose(
    stats['mean'] / stats['weight'], [0.39 / 0.19], rtol=1e-5
  )
  # Variances 1 and 4: 0.9·0.1·1 + 0.1·4 = 0.49.
  np.testing.assert_allclose(
    stats['var'] / stats['weight'], [0.49 / 0.19], rtol=1e-5
  )


def test_mean_only_batch_norm_leaves_the_scale():
  norm = layers.BatchNorm(mean_only=True)
  x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
  variables = norm.init(jax.random.key(0), x, train=True)
  y, _ = norm.apply(variables, x, train=True, mutable=['batch_stats'])
  np.testing.assert_allclose(y, [[-1.0, -10.0], [1.0, 10.0]])
  assert set(variables['params']) == {'bias'}


def test_weight_norm_starts_with_unit_variance_on_its_data():
  layer = layers.WeightNorm(6, (3, 3), 'VALID')
  x = 5 * jax.random.normal(jax.random.key(0), [16, 7, 7, 2]) + 3
  variables = layer.init(jax.random.key(1), x)
  y = layer.apply(variables, x)
  np.testing.assert_allclose(jnp.std(y, (0, 1, 2)), np.ones(6), rtol=1e-4)
  # The length of the direction of each output has no effect.
  doubled = jax.tree.map(lambda w: w, variables['params'])
  lengths = jnp.arange(1.0, 7.0)[None, None, None]
  doubled['kernel'] = lengths * doubled['kernel']
  chex.assert_trees_all_close(
    layer.apply({'params': doubled}, x), y, rtol=1e-4, atol=1e-5
  )


def test_the_weight_norm_variant_is_initialised_from_the_images():
  net = convlarge.convlarge(3, norm='weight')
  image = jax.random.uniform(jax.random.key(0), [4, 9, 9, 1])
  params, _ = jax.jit(net.init)(jax.random.key(1), image)
  other, _ = jax.jit(net.init)(jax.random.key(1), 10 * image)
  first = lambda p: p['ConvBlock_0']['WeightNorm_0']
  np.testing.assert_array_equal(first(params)['kernel'], first(other)['kernel'])
  np.testing.assert_allclose(
    first(params)['scale'], 10 * first(other)['scale'], rtol=1e-3
  )


def test_weight_norm_as_in_pytorch_begins_as_a_plain_layer():
  # g = ‖v‖ at the start, so the layer is x ↦ v * x + b.
  layer = layers.WeightNorm(6, (3, 3), 'VALID', from_kernel=True, bias=True)
  x = jax.random.normal(jax.random.key(0), [2, 5, 5, 4])
  params = layer.init(jax.random.key(1), x)['params']
  y = np.asarray(layer.apply({'params': params}, x))
  expected = np.zeros([2, 3, 3, 6]) + np.asarray(params['bias'])
  for i, j, a, b in itertools.product(range(3), range(3), range(3), range(3)):
    patch = np.asarray(x[:, i + a, j + b])
    expected[:, i, j] += patch @ np.asarray(params['kernel'][a, b])
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  # PyTorch's U(−1, 1) / √fan_in.
  largest = np.abs(params['kernel']).max()
  assert 0.9 / 6 < largest <= 1 / 6
  # Doubling g doubles the product, doubling v does nothing.
  bias = jnp.broadcast_to(params['bias'], y.shape)
  longer = params | {'kernel': 2 * params['kernel']}
  stronger = params | {'scale': 2 * params['scale']}
  at = lambda p: np.asarray(layer.apply({'params': p}, x) - bias)
  np.testing.assert_allclose(at(longer), at(params), rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(at(stronger), 2 * at(params), rtol=1e-3, atol=1e-5)


def test_the_convlarge_of_pytorch_has_both_norms_and_decays_their_scales():
  # The PyTorch versions have weight norm and ordinary batch norm on every
  # convolution, and a weight-normed classifier with a bias; SGD decays all.
  from ssljax import optimizers, registry

  net = registry.NETWORKS['convlarge_pytorch'](3)
  image = jax.random.uniform(jax.random.key(0), [4, 9, 9, 1])
  params, stats = jax.eval_shape(net.init, jax.random.key(1), image)
  blocks = [params[f'ConvBlock_{i}'] for i in range(9)]
  for block in blocks:
    assert set(block) == {'WeightNorm_0', 'BatchNorm_0'}
    assert set(block['WeightNorm_0']) == {'kernel', 'scale'}
    assert set(block['BatchNorm_0']) == {'bias', 'scale'}
  last = params['WeightNorm_0']
  assert last['kernel'].shape == (128, 3) and last['bias'].shape == (3,)
  assert set(params) == {f'ConvBlock_{i}' for i in range(9)} | {'WeightNorm_0'}
  # Batch norm has running variances, unlike the mean-only one's, in use.
  assert set(stats) == {f'ConvBlock_{i}' for i in range(9)}
  ones = jax.tree.map(lambda x: jnp.ones(x.shape), params)
  decays = optimizers.decayed(ones)
  kept = [path for path, d in jax.tree.leaves_with_path(decays) if not d]
  assert [jax.tree_util.keystr(path) for path in kept] == [
    "['WeightNorm_0']['bias']"
  ]


def test_batch_norm_with_decaying_parameters_computes_the_same():
  x = 3 + 2 * jax.random.normal(jax.random.key(0), [64, 5])
  outputs = []
  for decayed in (False, True):
    norm = layers.BatchNorm(momentum=0.9, epsilon=1e-5, decayed=decayed)
    variables = norm.init(jax.random.key(1), x, train=True)
    shapes = {p.shape for p in jax.tree.leaves(variables['params'])}
    assert shapes == {(1, 5) if decayed else (5,)}
    y, _ = norm.apply(variables, x, train=True, mutable=['batch_stats'])
    outputs.append(y)
  np.testing.assert_array_equal(*outputs)


def test_from_linen_hides_no_statistics_of_a_module_without_any():
  class Plain(nn.Module):
    @nn.compact
    def __call__(self, image, *, train, dropout):
      x = image.reshape(len(image), -1)
      return network.Outputs(nn.Dense(2)(x), x)

  net = network.from_linen(Plain())
  image = jnp.ones([3, 2, 2, 1])
  params, stats = net.init(jax.random.key(0), image)
  outputs, after = net.train(params, stats, image, jax.random.key(1))
  assert stats == after == {}
  chex.assert_trees_all_equal(outputs, net.infer(params, stats, image))


def convolutions(*channels):
  """Weights of 3×3 convolutions through these channels, without biases."""
  return sum(9 * a * b for a, b in itertools.pairwise(channels))


@pytest.mark.parametrize(
  ('net', 'side', 'channels', 'parameters'),
  [
    # Section 4: six convolutions with bias, 28 → 14 → 7 → 3 pixels.
    (
      elu.elu(10),
      28,
      1,
      convolutions(1, 32, 32, 64, 64, 128, 128)
      + 2 * (32 + 64 + 128)
      + (3 * 3 * 128 + 1) * 128
      + 129 * 10,
    ),
    # Section 4.3: nine, 32 → 16 → 8 → 4.
    (
      elu.elu(10, depth=3, normalize='variance'),
      32,
      3,
      convolutions(3, 32, 32, 32, 64, 64, 64, 128, 128, 128)
      + 3 * (32 + 64 + 128)
      + (4 * 4 * 128 + 1) * 128
      + 129 * 10,
    ),
    # Section 4.2 and a last C128: an offset of batch norm for each bias,
    # 96 → 48 → 23 → 11 → 5.
    (
      elu.elu_stl10(10),
      96,
      3,
      convolutions(3, 32, 64, 64, 128, 128, 256, 128)
      + (32 + 64 + 64 + 128 + 128 + 256 + 128)
      + (5 * 5 * 128 + 1) * 128
      + 129 * 10,
    ),
  ],
)
def test_the_elu_networks_have_their_parameters(
  net, side, channels, parameters
):
  params, _, outputs = shapes(net, side, channels)
  assert count(params) == parameters
  assert outputs.embedding.shape == (2, 128)


@pytest.mark.slow
def test_the_elu_embedding_lies_above_minus_1_and_stl10s_does_not():
  image = jax.random.uniform(jax.random.key(0), [6, 17, 17, 1])
  for net, bounded in (
    (elu.elu(3, widths=(2, 2)), True),
    (elu.elu_stl10(3), False),
  ):
    params, stats = net.init(jax.random.key(1), image)
    # Far from 0, so that the linear one shows.
    params['Dense_0']['bias'] -= 5.0
    lowest = net.infer(params, stats, image).embedding.min()
    assert (lowest >= -1) == bounded


def test_input_normalisations_by_hand():
  # Pixels 0, 2 of the first channel: mean 1, mean square 1. Second: 0, 4.
  image = jnp.array([[[[0.0, 0.0], [2.0, 4.0]]]]) / 255
  np.testing.assert_allclose(
    elu.normalize(image, 'variance'), [[[[-1, -0.5], [1, 0.5]]]], rtol=1e-4
  )
  np.testing.assert_allclose(
    elu.normalize(jnp.array([0.0, 128 / 255, 192 / 255]), 'centre'),
    [-1, 0, 0.5],
    atol=1e-6,
  )
  chex.assert_trees_all_equal(elu.normalize(image, 'none'), image)
  flat = elu.normalize(jnp.full([1, 2, 2, 1], 0.5), 'variance')
  np.testing.assert_allclose(flat, 0, atol=1e-6)
