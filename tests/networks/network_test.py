"""The networks of users' modules, in Flax linen and in Flax NNX."""

import contextlib
import functools
import json

import chex
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ssljax.errors import InputError
from ssljax.methods.madnn import madnn
from ssljax.methods.supervised import supervised
from ssljax.networks import network
from ssljax.training import checkpoint, compiled, loop, metrics_writer

IMAGE = np.random.default_rng(0).uniform(size=(6, 5, 4, 1)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(7))


def start(net):
  return jax.jit(net.init)(jax.random.key(1), IMAGE)


# Flax linen.


def flat(image):
  return image.reshape(len(image), -1)


class Logits(nn.Module):
  """Takes images alone, returns logits alone."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(flat(x))


class Pair(nn.Module):
  """Returns logits and an embedding."""

  @nn.compact
  def __call__(self, x):
    embedding = nn.Dense(4)(flat(x))
    return nn.Dense(3)(embedding), embedding


class Usual(nn.Module):
  """The form of Flax's own examples, with one argument `train`."""

  given_at_call: bool = False

  @nn.compact
  def __call__(self, x, train: bool):
    x = nn.Dense(8)(flat(x))
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    if self.given_at_call:
      x = nn.Dropout(0.5)(x, deterministic=not train)
    else:
      x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(3)(x)


def test_the_embedding_of_logits_alone_is_the_logits():
  net = network.from_linen(Logits())
  params, stats = start(net)
  outputs = net.infer(params, stats, IMAGE)
  weights = jax.tree.map(np.asarray, params['Dense_0'])
  np.testing.assert_allclose(
    outputs.logits,
    IMAGE.reshape(6, 20) @ weights['kernel'] + weights['bias'],
    rtol=1e-4,
    atol=1e-5,
  )
  np.testing.assert_array_equal(outputs.embedding, outputs.logits)
  assert outputs.feature is None and stats == {}


def test_a_pair_is_logits_and_embedding():
  net = network.from_linen(Pair())
  params, stats = start(net)
  for outputs in (
    net.infer(params, stats, IMAGE),
    net.train(params, stats, IMAGE, KEYS[0])[0],
    net.sample(params, stats, IMAGE, KEYS[0]),
  ):
    assert outputs.logits.shape == (6, 3) and outputs.embedding.shape == (6, 4)


@pytest.mark.parametrize('given_at_call', [False, True])
def test_a_module_with_train_alone_has_all_modes(given_at_call):
  net = network.from_linen(Usual(given_at_call))
  params, stats = start(net)
  trained, after = jax.jit(net.train)(params, stats, IMAGE, KEYS[0])
  other, _ = jax.jit(net.train)(params, stats, IMAGE, KEYS[1])
  assert not np.allclose(trained.logits, other.logits)
  # 0.9 of the initial mean 0 and 0.1 of the batch's.
  hidden = IMAGE.reshape(6, 20) @ np.asarray(params['Dense_0']['kernel'])
  np.testing.assert_allclose(
    after['BatchNorm_0']['mean'], 0.1 * hidden.mean(0), rtol=1e-3, atol=1e-5
  )
  infer, sample = jax.jit(net.infer), jax.jit(net.sample)
  one = infer(params, after, IMAGE)
  chex.assert_trees_all_equal(one, infer(params, after, IMAGE))
  # A sample drops, and normalises by the running averages: as inference, it
  # does not look at the other images.
  draws = [sample(params, after, IMAGE, key).logits for key in KEYS]
  assert not np.allclose(*draws)
  np.testing.assert_array_equal(
    draws[0], sample(params, after, IMAGE, KEYS[0]).logits
  )
  darker = IMAGE.copy()
  darker[1:] *= 0.1
  np.testing.assert_allclose(
    sample(params, after, darker, KEYS[0]).logits[0], draws[0][0], rtol=1e-5
  )


def test_samples_of_a_plain_module_have_the_mean_of_inference():
  # Dropout precedes a linear layer, so the mean over masks is inference.
  net = network.from_linen(Usual())
  params, stats = start(net)
  keys = jax.random.split(jax.random.key(3), 4000)
  draw = jax.jit(jax.vmap(net.sample, (None, None, None, 0)))
  draws = draw(params, stats, IMAGE[:2], keys).logits
  error = 4 * draws.std(0) / len(keys) ** 0.5
  expected = net.infer(params, stats, IMAGE[:2]).logits
  np.testing.assert_array_less(np.abs(draws.mean(0) - expected), error)


class Returns(nn.Module):
  """Returns what it is told to."""

  value: str

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(3)(flat(x))
    return {
      'dictionary': {'logits': x},
      'triple': (x, x, x),
      'nothing': None,
      'vector': x[:, 0],
      'images': (x, x[:, None]),
      'half': (x, None),
    }[self.value]


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    ('dictionary', 'network: Returns returns a dict; return logits'),
    ('triple', 'returns a tuple of .*; return logits'),
    ('nothing', 'returns a NoneType'),
    ('half', 'returns a tuple of .*, NoneType'),
    ('vector', r'shapes \[\(6,\), \(6,\)\]; return logits \[B, C\]'),
    ('images', r'shapes \[\(6, 3\), \(6, 1, 3\)\]'),
  ],
)
def test_a_module_that_returns_anything_else_is_refused(value, message):
  net = network.from_linen(Returns(value))
  params, stats = start(net)
  with pytest.raises(InputError, match=message):
    net.infer(params, stats, IMAGE)


def test_running_averages_without_a_mode_are_refused():
  class Always(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3)(flat(nn.BatchNorm(use_running_average=False)(x)))

  with pytest.raises(InputError, match=r'Always has running averages.*`?train'):
    start(network.from_linen(Always()))


def test_other_variables_are_refused_by_name():
  class Counts(nn.Module):
    @nn.compact
    def __call__(self, x):
      self.variable('calls', 'count', lambda: jnp.zeros(()))
      return nn.Dense(3)(flat(x))

  with pytest.raises(InputError, match=r"Counts has variables in \['calls'\]"):
    start(network.from_linen(Counts()))


def test_a_class_in_place_of_a_module_is_refused():
  with pytest.raises(InputError, match=r'give an instance of flax\.linen'):
    network.from_linen(Logits)


# Flax NNX.


class Cnn(nnx.Module):
  """Convolution, batch norm, dropout, and a list of more than ten variables."""

  def __init__(self, classes: int = tiny.CLASSES, *, rngs: nnx.Rngs):
    self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(8, momentum=0.8, rngs=rngs)
    self.drop = nnx.Dropout(0.1, rngs=rngs)
    # Keys of checkpoints are strings, and '10' precedes '2'.
    self.shifts = nnx.List([nnx.Param(jnp.full(8, i / 100)) for i in range(12)])
    self.linear = nnx.Linear(8, classes, rngs=rngs)

  def __call__(self, x):
    x = jnp.mean(nnx.relu(self.norm(self.conv(x))), (1, 2))
    for number, shift in enumerate(self.shifts):
      x = x + 0.1 * number * shift[...][None]
    x = self.drop(x)
    return self.linear(x), x


def by_position(rngs):
  return Cnn(5, rngs=rngs)


@pytest.mark.parametrize(
  ('make', 'classes'),
  [(Cnn, 3), (functools.partial(Cnn, 4), 4), (by_position, 5)],
)
def test_an_nnx_module_is_made_for_each_seed(make, classes):
  net = network.from_nnx(make)
  params, _ = start(net)
  assert params['linear']['kernel'].shape == (8, classes)
  outputs = jax.eval_shape(net.infer, params, start(net)[1], IMAGE)
  assert outputs.logits.shape == (6, classes)
  other, _ = net.init(jax.random.key(2), IMAGE)
  for a, b in zip(*map(jax.tree.leaves, (params, other)), strict=True):
    assert a.ndim == 1 or not np.allclose(a, b)  # biases are constant


def test_an_nnx_network_is_the_module_itself():
  module = Cnn(rngs=nnx.Rngs(3))
  net = network.from_nnx(module)
  params, stats = start(net)
  # A module in place of a function: its own weights, whatever the seed.
  np.testing.assert_array_equal(params['conv']['kernel'], module.conv.kernel)
  trained, after = net.train(params, stats, IMAGE, KEYS[0])
  outputs = net.infer(params, after, IMAGE)
  module.set_attributes(deterministic=True, use_running_average=False)
  module(IMAGE)  # updates the running averages as training does
  np.testing.assert_allclose(
    after['norm']['mean'], module.norm.mean[...], rtol=1e-4, atol=1e-6
  )
  assert not np.allclose(stats['norm']['mean'], after['norm']['mean'])
  module.eval()
  logits, embedding = module(IMAGE)
  np.testing.assert_allclose(outputs.logits, logits, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(outputs.embedding, embedding, rtol=1e-4, atol=1e-5)
  assert not np.allclose(trained.logits, outputs.logits)


def test_nnx_modes_differ_as_they_should():
  net = network.from_nnx(Cnn)
  params, stats = start(net)
  train, sample, infer = map(jax.jit, (net.train, net.sample, net.infer))
  for mode in (
    lambda key: train(params, stats, IMAGE, key)[0],
    lambda key: sample(params, stats, IMAGE, key),
  ):
    one, other = mode(KEYS[0]), mode(KEYS[1])
    chex.assert_trees_all_equal(one, mode(KEYS[0]))
    assert not np.allclose(one.logits, other.logits)
  chex.assert_trees_all_equal(
    infer(params, stats, IMAGE), infer(params, stats, IMAGE)
  )
  # Neither inference nor a sample looks at the other images.
  darker = IMAGE.copy()
  darker[1:] *= 0.1
  for mode in (infer, lambda *args: sample(*args, KEYS[0])):
    np.testing.assert_allclose(
      mode(params, stats, darker).logits[0],
      mode(params, stats, IMAGE).logits[0],
      rtol=1e-5,
    )


def test_each_nnx_layer_drops_by_itself():
  class Twice(nnx.Module):
    def __init__(self, rngs):
      self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
      return self.drops[0](flat(x)), self.drops[1](flat(x))

  net = network.from_nnx(Twice)
  outputs, _ = net.train(*start(net), IMAGE + 1, KEYS[0])
  first, second = outputs.logits != 0, outputs.embedding != 0
  # Independent masks agree in half of 120 places, ± 4 · √30.
  assert abs((first == second).sum() - 60) < 22


def test_nnx_modules_may_be_given_streams_and_mode_at_the_call():
  class Called(nnx.Module):
    def __init__(self, rngs):
      self.linear = nnx.Linear(20, 3, rngs=rngs)
      self.drop = nnx.Dropout(0.5)

    def __call__(self, x, train: bool, rngs: nnx.Rngs):
      x = self.drop(flat(x), rngs=rngs, deterministic=not train)
      return self.linear(x)

  net = network.from_nnx(Called)
  params, stats = start(net)
  one, other = (net.train(params, stats, IMAGE, k)[0].logits for k in KEYS)
  assert not np.allclose(one, other)
  expected = IMAGE.reshape(6, 20) @ params['linear']['kernel']
  np.testing.assert_allclose(
    net.infer(params, stats, IMAGE).logits, expected, rtol=1e-4, atol=1e-5
  )
  assert stats == {}


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda rngs: 3, 'returns a .*; return an instance of flax.nnx.Module'),
    (5, 'was given 5; give a function'),
  ],
)
def test_anything_but_an_nnx_module_is_refused(make, message):
  with pytest.raises(InputError, match=message):
    network.from_nnx(make)


@pytest.mark.parametrize('make', [network.from_linen, network.from_nnx])
def test_an_image_too_small_is_refused_by_name(make):
  module = Logits() if make is network.from_linen else Cnn
  net = make(module, smallest=5)
  with pytest.raises(InputError, match=r'network: (Logits|Cnn) .* 5x5'):
    start(net)


def train_tiny(folder, net, method, seeds):
  """The state, progress and recorded lines of a run on the tiny problem."""
  data, mesh = tiny.make_data()
  program = compiled.Program(method, net, data, mesh, seeds=len(seeds), batch=8)
  job = loop.Job('nnx', program, tiny.make_splits(seeds))
  recorder = metrics_writer.MetricsWriter(folder)
  checkpoints = checkpoint.Checkpoints(folder / 'checkpoints')
  with contextlib.closing(checkpoints), contextlib.closing(recorder):
    options = loop.Options(evaluate_every=20, record_every=2)
    state, progress = loop.fit(job, options, recorder, checkpoints)
  text = (folder / 'metrics.jsonl').read_text()
  return state, progress, [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize('make_method', [supervised, madnn])
def test_an_nnx_network_trains_several_seeds_and_is_restored(
  make_method, tmp_path
):
  net = network.from_nnx(Cnn)
  tx = lambda *_, **__: optax.sgd(0.03, 0.9)
  method = make_method(net, tx, tiny.DRAW, 60)
  state, progress, lines = train_tiny(tmp_path, net, method, (0, 1))
  for seed in (0, 1):
    losses = [
      line['cross_entropy']
      for line in lines
      if line.get('seed') == seed and 'cross_entropy' in line
    ]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert progress.evaluations[-1]['last'][seed] < 20  # chance is 67 %
  kernels = state.params['conv']['kernel']
  assert kernels.shape == (2, 3, 3, 1, 8)
  assert not np.allclose(kernels[0], kernels[1])
  assert np.all(np.abs(state.stats['norm']['mean']) > 0)
  # The same folder again: everything is restored, nothing is trained.
  restored, again, _ = train_tiny(tmp_path, net, method, (0, 1))
  chex.assert_trees_all_equal(restored.params, state.params)
  chex.assert_trees_all_equal(restored.stats, state.stats)
  assert list(again.evaluations) == list(progress.evaluations)


def test_a_checkpoint_keeps_the_tree_of_an_nnx_network():
  # Strings alone: with numbers for keys, restored trees would differ.
  params, stats = start(network.from_nnx(Cnn))
  for tree in (params, stats):
    for path, _ in jax.tree.leaves_with_path(tree):
      assert all(isinstance(key.key, str) for key in path)
  assert set(params['shifts']) == {str(i) for i in range(12)}
