import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax.errors import InputError
from ssljax.networks import resnet


def shapes(net, side):
  image = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
  params, stats = jax.eval_shape(net.init, jax.random.key(0), image)
  return params, stats, jax.eval_shape(net.infer, params, stats, image)


def count(params):
  return sum(leaf.size for leaf in jax.tree.leaves(params))


# ResNet-18 without batch norms, heads and the shortcuts of v2's first stage:
# 7·7·3·64 of the stem, then per width w the 3×3 convolutions and the 1×1
# shortcut. The first stage has four w → w, the others one w/2 → w and three.
STEM, SMALL_STEM = 49 * 3 * 64, 9 * 3 * 64
BASIC = 4 * 9 * 64**2 + sum(
  9 * (w // 2) * w + 3 * 9 * w**2 + (w // 2) * w for w in (128, 256, 512)
)
# Channels normalised. v1: the stem's, four convolutions' per width and three
# shortcuts' = 4800, two parameters each: 11,689,512 with 1,000 classes.
NORMS_V1 = 64 + 4 * (64 + 128 + 256 + 512) + 128 + 256 + 512
# v2: what the four convolutions of a width read, w/2 once in all but the first,
# and the last 512 = 3904. The first stage's shortcut, 64², is v2's alone.
NORMS_V2 = 64 * 4 + sum(w // 2 + 3 * w for w in (128, 256, 512)) + 512

# ResNet-50v2. Per stage of width w reading c channels: shortcut c → 4w,
# convolutions c → w, 9·w → w, w → 4w; then blocks − 1 that read 4w.
STAGES = ((64, 64, 3), (128, 256, 4), (256, 512, 6), (512, 1024, 3))
BOTTLENECK = sum(
  c * 4 * w + c * w + 9 * w**2 + 4 * w**2 + (n - 1) * (4 + 9 + 4) * w**2
  for w, c, n in STAGES
)
# Per block: what it reads and its two narrow ones; at the end 2048.
NORMS_50 = sum(c + (n - 1) * 4 * w + n * 2 * w for w, c, n in STAGES) + 2048


def head(features, outputs):
  return (features + 1) * outputs


@pytest.mark.parametrize(
  ('net', 'parameters', 'embedding'),
  [
    (resnet.resnet18(1000), 11_689_512, 512),
    (
      resnet.resnet18(10, stem='small'),
      SMALL_STEM + BASIC + 2 * NORMS_V1 + head(512, 10),
      512,
    ),
    (
      resnet.resnet_v2(1000),
      STEM + BASIC + 64**2 + 2 * NORMS_V2 + head(512, 1000),
      512,
    ),
    (
      resnet.resnet_v2(1000, embedding=128),
      STEM + BASIC + 64**2 + 2 * NORMS_V2 + head(512, 1128),
      128,
    ),
    (
      resnet.resnet_v2(1000, depth=50),
      STEM + BOTTLENECK + 2 * NORMS_50 + head(2048, 1000),
      2048,
    ),
    (
      resnet.resnet_v2(7, depth=50, stem='small', embedding=128),
      SMALL_STEM + BOTTLENECK + 2 * NORMS_50 + head(2048, 135),
      128,
    ),
  ],
)
def test_the_networks_have_their_parameters_and_embedding(
  net, parameters, embedding
):
  params, _, outputs = shapes(net, 32)
  assert count(params) == parameters
  assert outputs.embedding.shape == (2, embedding)


def test_the_parameters_of_resnet_18_add_up_to_the_published_number():
  assert STEM + BASIC + 2 * NORMS_V1 + head(512, 1000) == 11_689_512


@pytest.mark.parametrize('stem', ['imagenet', 'small'])
@pytest.mark.parametrize(
  ('make', 'pooled'),
  [
    (resnet.resnet18, 8 * 4),
    (resnet.resnet_v2, 8 * 4),
    (functools.partial(resnet.resnet_v2, depth=50), 4 * 8 * 4),
  ],
)
def test_the_same_weights_fit_images_of_any_size(make, pooled, stem):
  net = make(7, stem=stem, width=4)
  params, stats, large = shapes(net, 224)
  image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  for outputs in (large, jax.eval_shape(net.infer, params, stats, image)):
    assert outputs.logits.shape == (2, 7)
    assert outputs.embedding.shape == (2, pooled)


@pytest.mark.parametrize(
  ('net', 'smallest'),
  [
    # 17 pixels become 9, 5, 3, 2, 1; 5 become 3, 2, 1.
    (resnet.resnet18(3, width=4), 17),
    (resnet.resnet18(3, width=4, stem='small'), 5),
    (resnet.resnet_v2(3, width=4), 17),
    (resnet.resnet_v2(3, depth=50, width=4, stem='small'), 5),
  ],
)
def test_an_image_too_small_is_refused_by_flag(net, smallest):
  assert net.smallest == smallest
  shapes(net, smallest)
  with pytest.raises(InputError, match=r'network.*image_size'):
    shapes(net, smallest - 1)


@pytest.mark.parametrize('more', [{'width': 0}, {'embedding': -1}])
def test_sizes_below_1_are_refused_by_name(more):
  with pytest.raises(InputError, match=f'{next(iter(more))}'):
    resnet.resnet_v2(3, **more)


def tiny(
  version, blocks=(1, 2), bottleneck=False, stem='imagenet', embedding=None
):
  """Two stages; by default of one block and of two."""
  return resnet.from_resnet(
    resnet.ResNet(3, version, blocks, bottleneck, stem, 2, embedding, 0.9)
  )


def draw_variables(net, image):
  """Random parameters and statistics, so that an error in any layer shows."""
  rng = np.random.default_rng(0)
  params, stats = jax.eval_shape(net.init, jax.random.key(0), image)
  normal = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)
  uniform = lambda leaf: rng.uniform(0.5, 2, leaf.shape).astype(np.float32)
  return jax.tree.map(normal, params), jax.tree.map(uniform, stats)


def convolve(x, kernel, stride=1):
  """[B, H, W, c] padded by half the kernel, one output pixel at a time."""
  k = len(kernel)
  pad = (k // 2, k // 2)
  x = np.pad(x, ((0, 0), pad, pad, (0, 0)))
  rows, columns = (range(0, n - k + 1, stride) for n in x.shape[1:3])
  pixel = lambda i, j: np.tensordot(x[:, i : i + k, j : j + k], kernel, 3)
  return np.stack(
    [np.stack([pixel(i, j) for j in columns], 1) for i in rows], 1
  )


def pool(x, before):
  """The largest of 3×3 pixels, two apart, from `before` pixels outside on."""
  starts = range(-before, x.shape[1] - before, 2)
  part = lambda i: slice(max(i, 0), i + 3)
  pixel = lambda i, j: x[:, part(i), part(j)].max((1, 2))
  return np.stack(
    [np.stack([pixel(i, j) for j in starts], 1) for i in starts], 1
  )


class ByHand:
  """The layers of a module in NumPy, in float64, as inference has them."""

  def __init__(self, params, stats):
    self.params, self.stats = params, stats

  def conv(self, x, i, stride=1):
    kernel = self.params[f'Conv_{i}']['kernel']
    return convolve(x, kernel.astype(np.float64), stride)

  def norm(self, x, i):
    p, s = (tree[f'BatchNorm_{i}'] for tree in (self.params, self.stats))
    mean, var = s['mean'] / s['weight'], s['var'] / s['weight']
    return (x - mean) / np.sqrt(var + 1e-5) * p['scale'] + p['bias']

  def active(self, x, i):
    return np.maximum(self.norm(x, i), 0)

  def block(self, i):
    return ByHand(self.params[f'Block_{i}'], self.stats[f'Block_{i}'])

  def dense(self, x, i):
    p = self.params[f'Dense_{i}']
    return x @ p['kernel'] + p['bias']


def v1_block(b, x, stride):
  y = b.norm(b.conv(b.active(b.conv(x, 0, stride), 0), 1), 1)
  if 'Conv_2' in b.params:
    x = b.norm(b.conv(x, 2, stride), 2)
  return np.maximum(x + y, 0)


def v2_block(b, x, stride):
  a = b.active(x, 0)
  y = b.conv(b.active(b.conv(a, 0, stride), 1), 1)
  return (b.conv(a, 2, stride) if 'Conv_2' in b.params else x) + y


def v2_bottleneck(b, x, stride):
  a = b.active(x, 0)
  y = b.conv(b.active(b.conv(a, 0), 1), 1, stride)
  y = b.conv(b.active(y, 2), 2)
  return (b.conv(a, 3, stride) if 'Conv_3' in b.params else x) + y


def v1_by_hand(net, x):
  x = pool(net.active(net.conv(x, 0, 2), 0), before=1)
  for i, stride in enumerate((1, 2, 1)):
    x = v1_block(net.block(i), x, stride)
  return x.mean((1, 2))


def v2_by_hand(net, x):
  x = pool(net.conv(x, 0, 2), before=0)
  for i, stride in enumerate((1, 2, 1)):
    x = v2_block(net.block(i), x, stride)
  return net.active(x, 0).mean((1, 2))


def small_50v2_by_hand(net, x):
  x = net.conv(x, 0)
  for i, stride in enumerate((1, 2, 1)):
    x = v2_bottleneck(net.block(i), x, stride)
  return net.active(x, 0).mean((1, 2))


@pytest.mark.parametrize(
  ('net', 'by_hand', 'side'),
  [
    # 20 pixels: the first convolution leaves 10, an even number to pool.
    (tiny(1), v1_by_hand, 20),
    (tiny(2, embedding=5), v2_by_hand, 20),
    (tiny(2, bottleneck=True, stem='small'), small_50v2_by_hand, 6),
  ],
)
def test_inference_is_that_of_a_network_written_in_numpy(net, by_hand, side):
  image = np.random.default_rng(1).normal(size=(2, side, side, 3))
  image = image.astype(np.float32)
  params, stats = draw_variables(net, image)
  outputs = jax.jit(net.infer)(params, stats, image)
  slow = ByHand(params, stats)
  pooled = by_hand(slow, image.astype(np.float64))
  embedded = slow.dense(pooled, 1) if 'Dense_1' in params else pooled
  np.testing.assert_allclose(outputs.logits, slow.dense(pooled, 0), 1e-4, 1e-4)
  np.testing.assert_allclose(outputs.embedding, embedded, 1e-4, 1e-4)
  if 'Dense_1' in params:
    np.testing.assert_allclose(outputs.feature, pooled, 1e-4, 1e-4)
  else:
    assert outputs.feature is None


@pytest.mark.oracle
def test_training_is_that_of_pytorchs_layers(import_oracle):
  torch = import_oracle('torch')
  net = tiny(1)
  image = np.random.default_rng(1).normal(size=(4, 20, 20, 3))
  image = image.astype(np.float32)
  params, stats = draw_variables(net, image)

  def conv(params, i, stride=1):
    kernel = torch.tensor(params[f'Conv_{i}']['kernel']).permute(3, 2, 0, 1)
    out, c, k, _ = kernel.shape
    layer = torch.nn.Conv2d(c, out, k, stride, k // 2, bias=False)
    layer.weight.data = kernel
    return layer

  def norm(params, i):
    layer = torch.nn.BatchNorm2d(params[f'BatchNorm_{i}']['scale'].size)
    layer.weight.data = torch.tensor(params[f'BatchNorm_{i}']['scale'])
    layer.bias.data = torch.tensor(params[f'BatchNorm_{i}']['bias'])
    return layer

  def block(params, x, stride):
    branch = torch.nn.Sequential(
      conv(params, 0, stride),
      norm(params, 0),
      torch.nn.ReLU(),
      conv(params, 1),
      norm(params, 1),
    )
    shortcut = torch.nn.Identity()
    if 'Conv_2' in params:
      shortcut = torch.nn.Sequential(conv(params, 2, stride), norm(params, 2))
    return torch.relu(branch(x) + shortcut(x))

  stem = torch.nn.Sequential(
    conv(params, 0, 2),
    norm(params, 0),
    torch.nn.ReLU(),
    torch.nn.MaxPool2d(3, 2, 1),
  )
  with torch.no_grad():
    x = stem(torch.tensor(image).permute(0, 3, 1, 2))
    for i, stride in enumerate((1, 2, 1)):
      x = block(params[f'Block_{i}'], x, stride)
  outputs, _ = jax.jit(net.train)(params, stats, image, jax.random.key(0))
  np.testing.assert_allclose(outputs.embedding, x.mean((2, 3)), 1e-3, 1e-4)


@pytest.mark.parametrize(
  'net', [tiny(1, (1, 1)), tiny(2, (1, 1), stem='small', embedding=5)]
)
def test_a_step_has_finite_slopes_and_statistics_fit_for_inference(net):
  image = jax.random.normal(jax.random.key(0), [4, 10, 10, 1])
  params, stats = draw_variables(net, image)
  stats = jax.tree.map(np.zeros_like, stats)

  def loss(params):
    outputs, after = net.train(params, stats, image, jax.random.key(2))
    total = jnp.sum(jnp.square(outputs.logits)) + jnp.sum(outputs.embedding)
    return total, (outputs, after)

  slopes, (trained, after) = jax.jit(jax.grad(loss, has_aux=True))(params)
  chex.assert_tree_all_finite(slopes)
  assert all(np.any(slope != 0) for slope in jax.tree.leaves(slopes))
  for path, leaf in jax.tree.leaves_with_path(after):
    if path[-1].key == 'weight':
      np.testing.assert_allclose(leaf, 1 - 0.9, rtol=1e-6)
  # Before a step inference has nothing to normalise by; after one, on the same
  # batch, exactly what training had (running averages are debiased).
  infer = jax.jit(net.infer)
  assert not np.allclose(infer(params, stats, image).logits, trained.logits)
  chex.assert_trees_all_close(
    infer(params, after, image), trained, rtol=1e-3, atol=1e-3
  )


def test_weights_start_as_in_the_two_codes():
  # One stage, no wider than its 64: many weights, little to compile.
  def start(version):
    module = resnet.ResNet(1000, version, (1,), False, 'small', 64, 128, 0.9)
    net = resnet.from_resnet(module)

    @jax.jit  # of what is returned; the rest is not even drawn
    def parts(key):
      params, _ = net.init(key, jnp.ones([1, 1, 1, 3]))
      return params['Conv_0']['kernel'], params['Dense_0'], params['Dense_1']

    return parts(jax.random.key(0))

  std = lambda *weights: [np.std(w) for w in weights]
  kernel, classifier, _ = start(1)
  # Fan-out 9·64; U(−b, b) has b / √3, b = 1 / √64.
  expected = [(2 / 576) ** 0.5, 1 / 192**0.5, 1 / 192**0.5]
  weights = kernel, classifier['kernel'], classifier['bias']
  np.testing.assert_allclose(std(*weights), expected, rtol=0.1)
  assert max(np.abs(w).max() for w in classifier.values()) <= 1 / 8
  kernel, classifier, embedding = start(2)
  # Fan-in 9·3, cut at 2 of the 1 / 0.88 times larger normal's; He; Glorot.
  expected = [27**-0.5, (2 / 64) ** 0.5, (2 / (64 + 128)) ** 0.5]
  weights = kernel, classifier['kernel'], embedding['kernel']
  np.testing.assert_allclose(std(*weights), expected, rtol=0.1)
  assert np.abs(kernel).max() <= 2 / 0.879 * 27**-0.5
  assert not classifier['bias'].any()
  assert not embedding['bias'].any()
