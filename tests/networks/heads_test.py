"""Networks for features, against NumPy, and their embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssljax.core import UNLABELLED, Batch, BatchSpec, init_state
from ssljax.data import arrays
from ssljax.errors import InputError
from ssljax.methods.association import association
from ssljax.networks import heads

# Columns of three scales, far from 0.
RNG = np.random.default_rng(0)
FEATURES = RNG.normal([5, -2, 300], [1e-2, 3, 70], (40, 3)).astype(np.float32)
IMAGE = FEATURES.reshape(40, 1, 3, 1)
LINEAR = heads.linear(3, embedding=4)
PROBE = heads.linear_probe(3, embedding=4)
MLP = heads.mlp(3, widths=(6, 5), embedding=4, dropout=0.5)


def trained(net, steps=3):
  """Parameters that hide nothing, and statistics of several steps."""
  params, stats = jax.jit(net.init)(jax.random.key(0), IMAGE)
  params = jax.tree.map(lambda p: p + 0.1 if p.ndim == 1 else p, params)
  train = jax.jit(net.train)
  for step in range(steps):
    _, stats = train(params, stats, IMAGE, jax.random.key(step))
  return params, stats


def batch_norm(x, params, stats):
  mean, var = (stats[name] / stats['weight'] for name in ('mean', 'var'))
  normal = (x - mean) / np.sqrt(var + 1e-5)
  return normal * params.get('scale', 1) + params['bias']


def slow(x, params, stats):
  """(logits, embedding, feature) of features [B, 3], in NumPy."""
  x = batch_norm(x, params['BatchNorm_0'], stats['BatchNorm_0'])
  hidden = [name for name in params if name.startswith('BatchNorm')][1:]
  for number, name in enumerate(sorted(hidden)):
    x = x @ params[f'Dense_{number}']['kernel']
    x = batch_norm(x, params[name], stats[name])
    x = np.where(x > 0, x, 0.1 * x)
  dense = lambda x, part: x @ part['kernel'] + part['bias']
  embedding = dense(x, params[f'Dense_{len(hidden)}'])
  return dense(embedding, params[f'Dense_{len(hidden) + 1}']), embedding, x


@pytest.mark.parametrize('net', [LINEAR, MLP])
def test_inference_is_that_of_numpy(net):
  params, stats = trained(net)
  outputs = jax.jit(net.infer)(params, stats, IMAGE)
  as_double = lambda tree: jax.tree.map(lambda x: np.asarray(x, float), tree)
  expected = slow(FEATURES.astype(float), *map(as_double, (params, stats)))
  for got, same in zip(outputs, expected, strict=True):
    np.testing.assert_allclose(got, same, rtol=1e-3, atol=1e-3)


def test_the_linear_network_is_an_affine_function():
  params, stats = trained(LINEAR)
  infer = lambda x: LINEAR.infer(params, stats, x.reshape(-1, 1, 3, 1)).logits
  a, b = FEATURES[:5], FEATURES[5:10]
  np.testing.assert_allclose(
    infer(0.25 * a + 0.75 * b), 0.25 * infer(a) + 0.75 * infer(b), atol=1e-3
  )


def test_a_linear_probe_sees_the_direction_of_a_row_alone():
  params, stats = jax.device_get(trained(PROBE))
  infer = jax.jit(PROBE.infer)
  outputs = infer(params, stats, IMAGE)
  rows = FEATURES.astype(float)
  unit = rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))
  dense = lambda x, part: x @ part['kernel'] + part['bias']
  embedding = dense(unit, params['Dense_0'])
  np.testing.assert_allclose(outputs.feature, unit, rtol=1e-5)
  np.testing.assert_allclose(outputs.embedding, embedding, atol=1e-5)
  logits = dense(embedding, params['Dense_1'])
  np.testing.assert_allclose(outputs.logits, logits, atol=1e-5)
  longer = IMAGE * np.linspace(0.5, 9, 40, dtype=np.float32).reshape(
    40, 1, 1, 1
  )
  same = infer(params, stats, longer)
  np.testing.assert_allclose(same.logits, outputs.logits, atol=1e-5)
  nothing = infer(params, stats, np.zeros_like(IMAGE[:1]))
  np.testing.assert_allclose(nothing.embedding[0], params['Dense_0']['bias'])


def test_the_units_of_a_column_do_not_matter():
  # For example lengths in metres or in millimetres.
  scaled = IMAGE * np.float32([1e3, 1, 1e-2])[:, None]
  outputs = []
  for image in (IMAGE, scaled):
    params, stats = jax.jit(MLP.init)(jax.random.key(0), image)
    outputs.append(MLP.train(params, stats, image, jax.random.key(1))[0])
  # But for the epsilon beside a variance of 1e-4.
  np.testing.assert_allclose(*(o.logits for o in outputs), rtol=0.2, atol=0.02)


def test_two_columns_keep_more_than_their_order():
  # Layer normalisation would map every row to (1, -1) or (-1, 1).
  rows = np.float32([[2, 1], [4, 1], [9, 1], [9, 8]]).reshape(4, 1, 2, 1)
  net = heads.linear(2, embedding=3)
  params, stats = net.init(jax.random.key(0), rows)
  _, stats = net.train(params, stats, rows, jax.random.key(0))
  embedding = np.asarray(net.infer(params, stats, rows).embedding)
  assert len(np.unique(embedding.round(3), axis=0)) == 4


def test_images_are_flattened():
  images = np.random.default_rng(1).uniform(size=(8, 5, 4, 3))
  params, stats = MLP.init(jax.random.key(0), images.astype(np.float32))
  assert params['Dense_0']['kernel'].shape == (60, 6)
  outputs = jax.eval_shape(MLP.infer, params, stats, images.astype(np.float32))
  assert outputs.logits.shape == (8, 3) and outputs.embedding.shape == (8, 4)


@pytest.mark.parametrize('make', [heads.linear, heads.mlp])
def test_embeddings_start_with_length_1_in_all_directions(make):
  x = np.random.default_rng(2).normal(size=(400, 1, 50, 1)).astype(np.float32)
  net = make(3, embedding=64)
  params, stats = jax.jit(net.init)(jax.random.key(0), x)
  # The mean over 400 images of what has a relative deviation of √(2/64).
  outputs, _ = jax.jit(net.train)(params, stats, x, jax.random.key(1))
  e = np.asarray(outputs.embedding)
  squares = np.square(e).sum(1) / np.square(outputs.feature).mean(1)
  np.testing.assert_allclose(squares.mean(), 1, rtol=0.15)
  # Each number of the embedding is below 0 for a good part of the images, and
  # some pairs of images point in opposite directions.
  assert (np.mean(e < 0, 0) > 0.05).mean() > 0.9
  assert np.corrcoef(e).min() < -0.2


def test_only_the_perceptron_drops():
  for net, drops in ((LINEAR, False), (MLP, True)):
    params, stats = trained(net)
    one, other = (
      net.sample(params, stats, IMAGE, jax.random.key(i)).logits for i in (0, 1)
    )
    assert np.allclose(one, other) != drops


@pytest.mark.parametrize('net', [LINEAR, MLP])
def test_a_loss_on_embeddings_trains_what_the_classifier_reads(net):
  labels = np.where(np.arange(40) < 12, np.arange(40) % 3, UNLABELLED)
  method = association(
    net, lambda *_, **__: optax.sgd(0.1), BatchSpec(12, 8, classes=3), 5
  )
  state = init_state(
    method, net, jax.random.key(0), jnp.asarray(labels, jnp.int32), IMAGE
  )
  rows = jnp.arange(20)
  batch = Batch(rows, IMAGE[:20], rows < 12)

  def unsupervised(params):
    _, (_, metrics) = method.stages[-1].loss(
      params, state, batch, jax.random.key(1)
    )
    return metrics['walker']

  slopes = jax.jit(jax.grad(unsupervised))(state.params)
  last = max(name for name in slopes if name.startswith('Dense'))
  embed = f'Dense_{int(last[-1]) - 1}'
  assert np.abs(slopes[embed]['kernel']).max() > 1e-6
  np.testing.assert_array_equal(slopes[last]['kernel'], 0)  # the classifier


@pytest.mark.parametrize(
  ('make', 'how', 'message'),
  [
    (heads.linear, dict(embedding=0), 'embedding=0'),
    (heads.linear_probe, dict(embedding=-1), 'embedding=-1'),
    (heads.mlp, dict(embedding=-1), 'embedding=-1'),
    (heads.mlp, dict(widths=(4, 0)), 'widths=0'),
    (heads.mlp, dict(dropout=1), 'dropout=1'),
  ],
)
def test_sizes_that_cannot_be_are_refused_by_name(make, how, message):
  with pytest.raises(InputError, match=message):
    make(3, **how)


def test_features_of_arrays_fit():
  data = arrays.from_arrays(FEATURES, np.arange(40) % 3)
  image = jnp.asarray(data.train.read(np.arange(7)))
  params, stats = MLP.init(jax.random.key(0), image)
  assert MLP.infer(params, stats, image).logits.shape == (7, 3)
