"""Shake-Shake: its gates, its shortcuts, and all of it in NumPy."""

import functools

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax import errors
from ssljax.networks import shakeshake

# Nearly all of the time is compilation; unoptimised it takes a third.
compiled = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def noise(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def count(params):
  return sum(leaf.size for leaf in jax.tree.leaves(params))


@compiled
def mix(a, b, forward, backward, g):
  """The mixture, and the slopes of all four for a slope g of the mixture."""
  y, pull = jax.vjp(shakeshake.shake, a, b, forward, backward)
  return y, pull(g)


def test_gates_mix_one_way_forward_and_another_way_backward():
  # Two images of two values, α = 1, ¼ and β = 0, ½.
  a, b = np.float32([[[1, 2], [4, 8]], [[-4, -4], [-4, -4]]])
  forward, backward = np.float32([[1, 0.25], [0, 0.5]])
  y, slopes = mix(a, b, forward, backward, np.float32([[1, -1], [6, 8]]))
  # The second image: ¼ a − ¾ 4.
  np.testing.assert_allclose(y, [[1, 2], [1 - 3, 2 - 3]])
  np.testing.assert_allclose(slopes[0], [[0, 0], [3, 4]])
  np.testing.assert_allclose(slopes[1], [[1, -1], [3, 4]])
  np.testing.assert_array_equal(slopes[2:], np.zeros([2, 2]))


def test_equal_gates_have_the_true_gradient():
  a, b, g, change = noise(4, 2, 3, 2)
  gate = np.float32([0.3, 0.9])
  y, slopes = mix(a, b, gate, gate, g)
  # It is linear: a slope times a change is the change of the output.
  for i, (x, z) in enumerate(((a + change, b), (a, b + change))):
    moved = mix(x, z, gate, gate, g)[0] - y
    np.testing.assert_allclose(
      (slopes[i] * change).sum(), (moved * g).sum(), rtol=1e-3
    )


def test_a_gate_per_pixel_is_refused():
  a = np.ones([2, 3], np.float32)
  with pytest.raises(AssertionError):
    shakeshake.shake(a, a, a, a[:, 0])


IMAGES = 200
BLOCK = shakeshake.Block(features=2, stride=1, momentum=0.9)


@pytest.fixture(scope='module')
def shaken():
  """A block's inputs, branches, outputs and slopes under two keys.

  Statistics are the initial ones, so that an image's output is its own.
  """
  x = noise(IMAGES, 3, 3, 2)

  @compiled
  def look(keys):
    variables = BLOCK.init(jax.random.key(0), x, train=False, dropout=False)
    params = variables['params']

    def apply(params, **more):
      tree = {**variables, 'params': params}
      return BLOCK.apply(tree, x, train=False, **more)

    def branch(name):
      own = {kind: tree[name] for kind, tree in variables.items()}
      return shakeshake.Branch(2, 1, 0.9).apply(own, x, train=False)

    def shake(key):
      shaken = lambda params: apply(params, dropout=True, rngs={'dropout': key})
      # The slope of image i's sum with respect to an offset of all 9 pixels of
      # one branch is 9 times the branch's weight backward.
      slopes = jax.jacrev(lambda p: shaken(p).sum((1, 2, 3)))(params)
      weights = [
        slopes[name]['BatchNorm_1']['bias'].mean(1) / 9
        for name in ('Branch_0', 'Branch_1')
      ]
      return shaken(params), weights

    a, b = branch('Branch_0'), branch('Branch_1')
    looks = [shake(key) for key in keys]
    return x, a, b, apply(params, dropout=False), looks

  return jax.tree.map(np.asarray, look(jax.random.split(jax.random.key(1))))


def forward_gates(x, a, b, y):
  """α [B] of every image, found by projecting y − x − b on a − b."""
  far = (a - b).reshape(IMAGES, -1)
  return ((y - x - b).reshape(IMAGES, -1) * far).sum(1) / (far * far).sum(1)


def test_every_image_has_its_own_gate_for_all_its_values(shaken):
  x, a, b, _, looks = shaken
  for y, _ in looks:
    gates = forward_gates(x, a, b, y)
    each = gates[:, None, None, None]
    np.testing.assert_allclose(y, x + each * a + (1 - each) * b, atol=1e-4)
    assert len(set(gates.round(4))) > 0.9 * IMAGES
    assert_uniform(gates)


def assert_uniform(values):
  """In [0, 1] but for rounding, with U(0, 1)'s mean and deviation."""
  assert -1e-4 < values.min() and values.max() < 1 + 1e-4
  # Of n draws the mean deviates by 12^-½ / √n, the deviation by about .13 / √n.
  n = len(values)
  assert abs(values.mean() - 0.5) < 4 * 0.289 / n**0.5
  assert abs(values.std() - 0.289) < 4 * 0.13 / n**0.5


def test_the_slopes_have_gates_of_their_own(shaken):
  x, a, b, _, looks = shaken
  for y, (toward_a, toward_b) in looks:
    np.testing.assert_allclose(toward_a + toward_b, 1, rtol=1e-5)
    assert_uniform(toward_a)
    # Independent values correlate by 1/√n.
    both = np.corrcoef(toward_a, forward_gates(x, a, b, y))
    assert abs(both[0, 1]) < 4 / IMAGES**0.5


def test_gates_of_another_key_are_independent(shaken):
  x, a, b, _, ((y, (toward_a, _)), (other, (other_a, _))) = shaken
  gates = [forward_gates(x, a, b, y), forward_gates(x, a, b, other)]
  for pair in (gates, (toward_a, other_a)):
    assert abs(np.corrcoef(*pair)[0, 1]) < 4 / IMAGES**0.5


def test_inference_is_the_mean_of_both_branches(shaken):
  x, a, b, infer, _ = shaken
  np.testing.assert_allclose(infer, x + (a + b) / 2, atol=1e-5)


def test_only_dropout_needs_a_key():
  x = noise(2, 3, 3, 2)
  variables = jax.eval_shape(
    functools.partial(BLOCK.init, train=True, dropout=False),
    jax.random.key(0),
    x,
  )
  apply = functools.partial(BLOCK.apply, mutable=['batch_stats'])
  for train in (False, True):
    still = functools.partial(apply, train=train, dropout=False)
    jax.eval_shape(still, variables, x)
    with pytest.raises(flax.errors.InvalidRngError, match='dropout'):
      shaking = functools.partial(apply, train=train, dropout=True)
      jax.eval_shape(shaking, variables, x)


@pytest.mark.parametrize('side', [4, 5])
def test_the_second_half_of_a_shortcut_is_shifted_down_and_right(side):
  # Pixels are numbered from 1, by rows.
  x = np.arange(1.0, side * side + 1, dtype=np.float32).reshape(1, side, -1, 1)
  even, odd = shakeshake.shifted_pixels(x)
  if side == 4:
    expected = [[1, 3], [9, 11]], [[6, 8], [14, 16]]
  else:
    expected = (
      [[1, 3, 5], [11, 13, 15], [21, 23, 25]],
      [[7, 9, 0], [17, 19, 0], [0, 0, 0]],
    )
  np.testing.assert_array_equal(even[0, ..., 0], expected[0])
  np.testing.assert_array_equal(odd[0, ..., 0], expected[1])


def grouped(params, x):
  """A `Halving` before batch norm, as one convolution of two groups.

  As Mean Teacher's code has it: both sets of pixels side by side, ReLU, a 1×1
  convolution whose outputs' halves read one set each.
  """
  parts = [params[name] for name in ('Conv_0', 'Conv_1')]
  kernel, bias = (
    jnp.concatenate([part[name] for part in parts], axis=-1)
    for name in ('kernel', 'bias')
  )
  pixels = jnp.concatenate([x[:, ::2, ::2], x[:, 1::2, 1::2]], axis=-1)
  y = jax.lax.conv_general_dilated(
    jnp.maximum(pixels, 0),
    kernel,
    (1, 1),
    'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=2,
  )
  return y + bias[None, None, None]


def test_the_halving_shortcut_is_a_convolution_of_two_groups():
  x = noise(2, 4, 6, 3)
  module = shakeshake.Halving(features=8, momentum=0.9)

  @compiled
  def both(key):
    variables = module.init(key, x, train=False)
    ours = module.apply(variables, x, train=False)
    return ours, grouped(variables['params'], jnp.asarray(x))

  ours, theirs = both(jax.random.key(0))
  # Batch norm has seen nothing yet.
  np.testing.assert_allclose(ours, theirs / (1 + 1e-5) ** 0.5, atol=1e-5)


class Slow:
  """The network at inference in NumPy, from its parameters and averages."""

  def __init__(self, params, stats):
    self.params, self.stats = params, stats

  def convolve(self, x, part, stride=1):
    kernel = part['kernel']
    k, pad = len(kernel), len(kernel) // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = (
      range(0, size - k + 1, stride) for size in (x.shape[1], x.shape[2])
    )
    y = np.zeros((len(x), len(rows), len(columns), kernel.shape[-1]))
    for i, row in enumerate(rows):
      for j, column in enumerate(columns):
        window = x[:, row : row + k, column : column + k]
        y[:, i, j] = np.tensordot(window, kernel, 3)
    return y + part.get('bias', 0)

  def normalise(self, x, *path):
    learned, seen = self.params, self.stats
    for name in path:
      learned, seen = learned[name], seen[name]
    mean, var = (seen[name] / seen['weight'] for name in ('mean', 'var'))
    return learned['scale'] * (x - mean) / np.sqrt(var + 1e-5) + learned['bias']

  def branch(self, x, block, name, stride):
    part = self.params[block][name]
    y = self.convolve(np.maximum(x, 0), part['Conv_0'], stride)
    y = np.maximum(self.normalise(y, block, name, 'BatchNorm_0'), 0)
    y = self.convolve(y, part['Conv_1'])
    return self.normalise(y, block, name, 'BatchNorm_1')

  def halve(self, x, block):
    part = self.params[block]['Halving_0']
    x = np.maximum(x, 0)
    height, width = x.shape[1], x.shape[2]
    x = np.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    y = np.concatenate(
      [
        self.convolve(x[:, i::2, i::2], part[name])
        for i, name in enumerate(('Conv_0', 'Conv_1'))
      ],
      axis=-1,
    )
    return self.normalise(y, block, 'Halving_0', 'BatchNorm_0')

  def widen(self, x, block):
    y = self.convolve(x, self.params[block]['Widening_0']['Conv_0'])
    return self.normalise(y, block, 'Widening_0', 'BatchNorm_0')

  def __call__(self, image):
    x = self.convolve(image, self.params['Conv_0'])
    for number, shortcut in enumerate((self.widen, self.halve, self.halve)):
      block, stride = f'Block_{number}', 1 if number == 0 else 2
      branches = [
        self.branch(x, block, name, stride) for name in ('Branch_0', 'Branch_1')
      ]
      x = shortcut(x, block) + sum(branches) / 2
    features = x.mean((1, 2))
    dense = self.params['Dense_0']
    return features @ dense['kernel'] + dense['bias'], features


NET = shakeshake.shakeshake(3, width=8, blocks=1)


@pytest.fixture(scope='module')
def started():
  """The initial parameters and averages of a tiny network."""
  image = jnp.zeros([1, 3, 3, 1])
  return compiled(NET.init)(jax.random.key(0), image)


@pytest.fixture(scope='module')
def trained(started):
  """Three steps later, so that no average is trivial; the last slopes."""
  image = noise(4, 6, 5, 1)

  def loss(params, stats, key):
    outputs, stats = NET.train(params, stats, image, key)
    return (outputs.logits**2).sum() + outputs.embedding.sum(), stats

  @compiled
  def step(params, stats, key):
    slopes, stats = jax.grad(loss, has_aux=True)(params, stats, key)
    return (
      jax.tree.map(lambda p, s: p - 0.01 * s, params, slopes),
      stats,
      slopes,
    )

  params, stats = started
  for seed in range(3):
    params, stats, slopes = step(params, stats, jax.random.key(seed))
  return params, stats, jax.tree.map(np.asarray, slopes)


def test_weights_start_as_the_authors_do(started):
  params = jax.tree.map(np.asarray, started[0])
  first, last, dense = (
    params[name] for name in ('Block_0', 'Block_2', 'Dense_0')
  )
  joined = lambda name: np.concatenate(
    [last['Halving_0'][part][name] for part in ('Conv_0', 'Conv_1')], axis=-1
  )
  # Normal, of variance 2 / (k² c_out); c_out of a shortcut is that of its two
  # halves. The deviation of n values deviates by 1 / √(2 n) of itself.
  for kernel, outputs in (
    (params['Conv_0']['kernel'], 9 * 16),
    (first['Widening_0']['Conv_0']['kernel'], 8),
    (last['Branch_1']['Conv_0']['kernel'], 9 * 32),
    (joined('kernel'), 32),
  ):
    ratio = kernel.std() / (2 / outputs) ** 0.5
    assert abs(ratio - 1) < 4 / (2 * kernel.size) ** 0.5
  # Uniform up to ± 1/√fan_in: 16 channels, and 4·8 features; of 32 values or
  # more the largest is below .7 with chance .7^32 = 1e-5.
  for values, fan_in in ((joined('bias'), 16), (dense['kernel'], 32)):
    assert 0.7 < abs(values).max() * fan_in**0.5 <= 1
  assert abs(dense['bias']).max() <= 32**-0.5


@pytest.mark.slow
def test_inference_is_that_of_slow_numpy(trained):
  params, stats, _ = trained
  image = noise(3, 6, 5, 1, seed=1)
  logits, features = Slow(*jax.tree.map(np.asarray, (params, stats)))(image)
  outputs = compiled(NET.infer)(params, stats, image)
  np.testing.assert_allclose(outputs.embedding, features, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(outputs.logits, logits, rtol=1e-3, atol=1e-4)
  assert features.min() < 0  # no ReLU before the mean


def test_samples_differ_by_key_and_images_do_not_share_gates(trained):
  params, stats, _ = trained
  image = np.tile(noise(1, 6, 5, 1), (3, 1, 1, 1))
  sample = compiled(NET.sample)
  one, other = (
    sample(params, stats, image, jax.random.key(seed)) for seed in (0, 1)
  )
  again = sample(params, stats, image, jax.random.key(0))
  chex.assert_trees_all_equal(one, again)
  assert abs(one.logits - other.logits).max() > 1e-4
  assert abs(one.logits[1:] - one.logits[:1]).max(1).min() > 1e-4
  # Without gates, equal images are equal.
  logits = compiled(NET.infer)(params, stats, image).logits
  np.testing.assert_allclose(logits, np.tile(logits[:1], (3, 1)), rtol=1e-5)


def test_training_reaches_every_parameter_but_biases_before_batch_norm(trained):
  *_, slopes = trained
  for path, slope in jax.tree.leaves_with_path(slopes):
    name = jax.tree_util.keystr(path)
    assert np.isfinite(slope).all()
    if 'Halving' in name and 'Conv' in name and 'bias' in name:
      np.testing.assert_allclose(slope, 0, atol=1e-4)
    else:
      assert abs(slope).max() > 1e-4, name


def test_shake_shake_26_2x96d_has_26_million_parameters():
  image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  net = shakeshake.shakeshake(10)
  params, stats = jax.eval_shape(net.init, jax.random.key(0), image)
  # A branch from c to w channels: two 3×3 convolutions and two batch norms of a
  # scale and an offset per channel.
  branch = lambda c, w: 9 * c * w + 9 * w * w + 2 * 2 * w
  first = 9 * 3 * 16
  # Three stages of four blocks of two branches.
  branches = sum(
    2 * (branch(c, w) + 3 * branch(w, w))
    for c, w in ((16, 96), (96, 192), (192, 384))
  )
  # 1×1 without bias; two of half the channels with one; a batch norm each.
  halving = lambda c, w: 2 * (c * w // 2 + w // 2) + 2 * w
  shortcuts = 16 * 96 + 2 * 96 + halving(96, 192) + halving(192, 384)
  classifier = 384 * 10 + 10
  # 432 + 26,093,568 + 95,616 + 3,850.
  assert first + branches + shortcuts + classifier == 26_193_466
  assert count(params) == 26_193_466
  outputs = jax.eval_shape(net.infer, params, stats, image)
  assert outputs.logits.shape == (2, 10)
  assert outputs.embedding.shape == (2, 384)


@pytest.mark.parametrize('height, width', [(3, 3), (5, 4), (7, 9), (32, 33)])
def test_images_may_have_any_size_from_3_on(height, width):
  net = shakeshake.shakeshake(7, width=2, blocks=2)
  image = jax.ShapeDtypeStruct((4, height, width, 1), jnp.float32)
  params, stats = jax.eval_shape(net.init, jax.random.key(0), image)
  outputs = jax.eval_shape(net.infer, params, stats, image)
  assert outputs.logits.shape == (4, 7)
  assert outputs.embedding.shape == (4, 8)


def test_smaller_images_are_refused_by_flag():
  net = shakeshake.shakeshake(7, width=2, blocks=1)
  image = jax.ShapeDtypeStruct((4, 2, 3, 1), jnp.float32)
  with pytest.raises(errors.InputError, match=r'network.*3x3.*image_size'):
    jax.eval_shape(net.init, jax.random.key(0), image)


@pytest.mark.parametrize('name', ['width', 'blocks'])
def test_a_network_of_nothing_is_refused_by_name(name):
  with pytest.raises(errors.InputError, match=name):
    shakeshake.shakeshake(10, **{name: 0})


def test_a_shortcut_of_the_same_shape_is_the_image_itself():
  # 16 channels enter the first stage.
  net = shakeshake.shakeshake(3, width=16, blocks=1)
  image = jax.ShapeDtypeStruct((2, 3, 3, 1), jnp.float32)
  params, _ = jax.eval_shape(net.init, jax.random.key(0), image)
  assert set(params['Block_0']) == {'Branch_0', 'Branch_1'}
