"""Wide ResNets compared with a loop in NumPy, and ResNet-9."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from views import compiled

from ssljax import registry
from ssljax.errors import InputError
from ssljax.networks import resnet9, wide_resnet

EPSILON = {'wide': 1e-3, 'nine': 1e-5}


def shapes(net, side, channels=3):
  image = jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32)
  params, stats = jax.eval_shape(net.init, jax.random.key(0), image)
  return params, stats, jax.eval_shape(net.infer, params, stats, image)


def count(params):
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def size(widths, blocks=4, classes=10):
  """Parameters: of convolutions, two per channel of a batch norm, the head.

  A block of c to w channels has 9·c·w + 9·w·w weights, and normalises c and
  then w channels; the first block of a stage has a shortcut of c·w.
  """
  total, c = 9 * 3 * 16, 16
  for w in widths:
    for i in range(blocks):
      total += 9 * c * w + 9 * w * w + 2 * (c + w) + (c * w if i == 0 else 0)
      c = w
  return total + 2 * c + (c + 1) * classes


@pytest.mark.parametrize(
  ('name', 'classes', 'expected', 'embedding', 'side'),
  [
    ('wrn28_2', 10, 1_467_610, 128, 32),
    ('wrn28_8', 100, size((128, 256, 512), classes=100), 512, 32),
    ('wrn37_2', 10, size((32, 64, 128, 256)), 256, 96),
  ],
)
def test_the_papers_networks_have_their_parameters(
  name, classes, expected, embedding, side
):
  params, _, outputs = shapes(registry.NETWORKS[name](classes), side)
  assert count(params) == expected
  assert size((32, 64, 128)) == 1_467_610
  assert outputs.logits.shape == (2, classes)
  assert outputs.embedding.shape == (2, embedding)


def test_the_depth_counts_convolutions():
  # Two per block, a shortcut per stage, and the first.
  for name, depth in (('wrn28_2', 28), ('wrn28_8', 28), ('wrn37_2', 37)):
    params, *_ = shapes(registry.NETWORKS[name](10), 32)
    kernels = [leaf for leaf in jax.tree.leaves(params) if len(leaf.shape) == 4]
    assert len(kernels) == depth


def test_resnet9_has_pages_parameters():
  # 3×3 kernels, two per channel of a batch norm, no bias.
  w = 64
  kernels = 9 * (3 * w + 2 * w * w + 2 * (2 * w) ** 2)
  kernels += 9 * (8 * w * w + 32 * w * w + 2 * (8 * w) ** 2)
  channels = w + 3 * 2 * w + 4 * w + 3 * 8 * w
  params, _, outputs = shapes(registry.NETWORKS['resnet9_wide'](10), 32)
  assert kernels + 2 * channels + 8 * w * 10 == 6_573_120
  assert count(params) == 6_573_120
  assert outputs.embedding.shape == (2, 512)
  params, _, outputs = shapes(registry.NETWORKS['resnet9'](10), 32)
  assert outputs.embedding.shape == (2, 256)


def convolved(x, kernel, stride):
  """Convolve [B, H, W, c] with [k, k, c, w], ⌊k/2⌋ zeros on every side."""
  out = np.zeros((*x.shape[:3], kernel.shape[3]))
  for b in range(len(x)):
    for i in range(kernel.shape[2]):
      for o in range(kernel.shape[3]):
        out[b, :, :, o] += scipy.signal.correlate2d(
          x[b, :, :, i], kernel[:, :, i, o], 'same'
        )
  return out[:, ::stride, ::stride]


def leaky(x):
  return np.where(x > 0, x, 0.1 * x)


def normed(x, p, epsilon):
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  return (x - mean) / np.sqrt(var + epsilon) * p['scale'] + p['bias']


def wide_by_loop(params, x, stages, blocks):
  """Logits of a wide ResNet in training mode."""
  epsilon = EPSILON['wide']
  x = convolved(x, params['Conv_0']['kernel'], 1)
  act = lambda x, p: leaky(normed(x, p['BatchNorm_0'], epsilon))
  for n in range(stages * blocks):
    p = params[f'Block_{n}']
    stride = 2 if n > 0 and n % blocks == 0 else 1
    a = act(x, p['Activation_0'])
    y = convolved(a, p['Conv_0']['kernel'], stride)
    y = convolved(act(y, p['Activation_1']), p['Conv_1']['kernel'], 1)
    x = a if n == 0 else x
    if 'Conv_2' in p:
      x = convolved(x, p['Conv_2']['kernel'], stride)
    x = x + y
  pooled = act(x, params['Activation_0']).mean((1, 2))
  head = params['Dense_0']
  return pooled @ head['kernel'] + head['bias'], pooled


def nine_by_loop(params, x):
  """Logits of ResNet-9 in training mode."""
  layers = iter(params[f'Layer_{i}'] for i in range(8))

  def layer(x):
    p = next(layers)
    y = convolved(x, p['Conv_0']['kernel'], 1)
    return leaky(normed(y, p['BatchNorm_0'], EPSILON['nine']))

  x = layer(x)
  for residual in (True, False, True):
    x = layer(x)
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
    if residual:
      x = x + layer(layer(x))
  pooled = x.max((1, 2))
  return pooled @ params['Dense_0']['kernel'] / 8, pooled


@pytest.mark.parametrize('kind', ['wide', 'narrow', 'nine'])
def test_training_outputs_are_those_of_a_loop(kind):
  x = np.random.default_rng(0).normal(size=(3, 8, 8, 2)).astype(np.float32)
  if kind != 'nine':
    # From 16 to 16 channels the first block needs no convolution to its sum.
    widen = 2 if kind == 'wide' else 1
    net = wide_resnet.wide_resnet(3, widen=widen, stages=2, blocks=2)
    by_loop = functools.partial(wide_by_loop, stages=2, blocks=2)
  else:
    net, by_loop = resnet9.resnet9(3, width=2), nine_by_loop
  params, stats = compiled(net.init)(jax.random.key(0), x)
  # Scales and offsets start at 1 and 0, where an error might not show.
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda v: v + 0.2 * rng.normal(size=v.shape).astype(np.float32), params
  )
  outputs, after = compiled(net.train)(params, stats, x, jax.random.key(1))
  logits, embedding = by_loop(jax.tree.map(np.float64, params), x)
  np.testing.assert_allclose(outputs.logits, logits, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(outputs.embedding, embedding, rtol=1e-3, atol=1e-4)
  chex.assert_trees_all_equal_structs(stats, after)


def test_weights_start_as_in_fixmatch():
  net = wide_resnet.wide_resnet(10)
  image = jnp.zeros([1, 8, 8, 3])
  params, _ = jax.jit(net.init)(jax.random.key(0), image)
  block = params['Block_9']  # 128 to 128 channels
  # Deviation √(2 / (9·128)), of 147,456 weights: 0.2 percent is 1 deviation.
  np.testing.assert_allclose(
    block['Conv_1']['kernel'].std(), (2 / (9 * 128)) ** 0.5, rtol=0.01
  )
  # Glorot: √(2 / (128 + 10)), of 1,280 weights.
  np.testing.assert_allclose(
    params['Dense_0']['kernel'].std(), (2 / 138) ** 0.5, rtol=0.1
  )
  assert (params['Dense_0']['bias'] == 0).all()


@pytest.mark.parametrize('name', ['wrn28_2', 'wrn28_8', 'wrn37_2', 'resnet9'])
def test_the_settings_of_the_networks(name):
  net = registry.NETWORKS[name](10, momentum=0.9, dropout=0.5)
  with pytest.raises(InputError, match=r'network.*image_size'):
    shapes(net, net.smallest - 1)
  *_, outputs = shapes(net, net.smallest, 1)
  assert outputs.logits.shape == (2, 10)
  with pytest.raises(InputError, match='momentum=1'):
    registry.NETWORKS[name](10, momentum=1.0)


@pytest.mark.parametrize(
  'net',
  [
    wide_resnet.wide_resnet(3, widen=1, stages=1, blocks=1, dropout=0.5),
    resnet9.resnet9(3, width=2, dropout=0.5),
  ],
  ids=['wide', 'nine'],
)
def test_dropout_is_before_the_classifier(net):
  image = np.random.default_rng(0).normal(size=(2, 5, 5, 1)).astype(np.float32)
  params, stats = compiled(net.init)(jax.random.key(0), image)
  sample = compiled(net.sample)
  one, other = (
    sample(params, stats, image, jax.random.key(seed)) for seed in (0, 5)
  )
  np.testing.assert_array_equal(one.embedding, other.embedding)
  assert not np.allclose(one.logits, other.logits)


@pytest.mark.parametrize('name', ['widen', 'stages', 'blocks'])
def test_a_network_of_nothing_is_refused_by_name(name):
  with pytest.raises(InputError, match=name):
    wide_resnet.wide_resnet(10, **{name: 0})
  with pytest.raises(InputError, match='width'):
    resnet9.resnet9(10, width=0)
