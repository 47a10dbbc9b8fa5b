import inspect
import re

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ssljax import losses
from ssljax.core import (
  UNLABELLED,
  Batch,
  BatchSpec,
  init_stage,
  init_state,
  make_step,
)
from ssljax.errors import InputError
from ssljax.methods import r2d2 as m
from ssljax.networks import network
from ssljax.training import map_dataset
from ssljax.training.compiled import compile_update

KINDS = ('kl_reverse', 'kl', 'mse')


def softmax(y):
  e = np.exp(y - y.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def numpy_loss(y_hat, y_tilde, alpha, beta, kind):
  """Eq. 2 of one image, in loops."""
  p, q = softmax(y_hat), softmax(y_tilde)
  loss = 0.0
  for j in range(len(p)):
    if kind == 'kl_reverse':
      loss += alpha * p[j] * (np.log(p[j]) - np.log(q[j]))
    elif kind == 'kl':
      loss += alpha * q[j] * (np.log(q[j]) - np.log(p[j]))
    else:
      loss += alpha * (q[j] - p[j]) ** 2
    loss -= beta * p[j] * np.log(p[j])
  return loss


def closed_form(y_hat, y_tilde, alpha, kind):
  """∂L/∂ỹ of one image as the paper prints it: Eq. 6, 14 and 15."""
  p, q = softmax(y_hat), softmax(y_tilde)
  if kind == 'kl_reverse':
    return -alpha * p + alpha * q
  if kind == 'kl':
    ratio = np.log(q) - np.log(p)
    return alpha * q * (ratio - (q * ratio).sum())
  return 2 * alpha * q * (q - p - (q * (q - p)).sum())


def sample(seed=0, rows=4, classes=3, scale=2.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=(rows, classes)) for _ in range(2))


@pytest.mark.parametrize('kind', KINDS)
def test_the_loss_equals_a_numpy_loop(kind):
  y_hat, y_tilde = sample()
  with jax.enable_x64(True):
    got = m.decipher_loss(
      jnp.asarray(y_hat), jnp.asarray(y_tilde), 0.1, 0.03, kind
    )
  want = [
    numpy_loss(*pair, 0.1, 0.03, kind)
    for pair in zip(y_hat, y_tilde, strict=True)
  ]
  np.testing.assert_allclose(got, want, rtol=1e-10)


@pytest.mark.parametrize('kind', KINDS)
def test_the_papers_slopes_of_pseudo_logits_are_the_automatic_ones(kind):
  y_hat, y_tilde = sample(1)
  with jax.enable_x64(True):
    total = lambda y: m.decipher_loss(
      jnp.asarray(y_hat), y, 0.1, 0.03, kind
    ).sum()
    got = jax.grad(total)(jnp.asarray(y_tilde))
  want = [
    closed_form(*pair, 0.1, kind) for pair in zip(y_hat, y_tilde, strict=True)
  ]
  np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-14)


def test_equation_5_is_the_automatic_slope_of_the_last_layer():
  # ∂L/∂w_n = [(α − β) log p̂_n − α log p̃_n − L] p̂_n f, for one image.
  rng = np.random.default_rng(0)
  w, f = rng.normal(size=(5, 3)), rng.normal(size=5)
  y_tilde = rng.normal(size=(1, 3))
  alpha, beta = 0.1, 0.03
  with jax.enable_x64(True):
    loss = lambda w: m.decipher_loss(
      (f @ w)[None], jnp.asarray(y_tilde), alpha, beta
    )[0]
    value, got = jax.value_and_grad(loss)(jnp.asarray(w))
  p, q = softmax(f @ w), softmax(y_tilde[0])
  own = (alpha - beta) * np.log(p) - alpha * np.log(q) - float(value)
  np.testing.assert_allclose(got, np.outer(f, own * p), rtol=1e-9)


def test_losses_by_hand():
  # p̂ = (¾, ¼), p̃ = (½, ½): KL(p̂‖p̃) = ¾ ln 3/2 + ¼ ln ½.
  y_hat = jnp.log(jnp.array([[3.0, 1.0]]))
  y_tilde = jnp.zeros([1, 2])
  loss = lambda kind: float(m.classification_loss(y_hat, y_tilde, kind)[0])
  ln = np.log
  assert loss('kl_reverse') == pytest.approx(0.75 * ln(1.5) + 0.25 * ln(0.5))
  assert loss('kl') == pytest.approx(0.5 * ln(2 / 3) + 0.5 * ln(2))
  assert loss('mse') == pytest.approx(1 / 8)
  assert float(losses.logit_entropy(y_tilde)[0]) == pytest.approx(ln(2))


@pytest.mark.parametrize('kind', KINDS)
def test_equal_distributions_have_no_divergence_and_no_slope(kind):
  y, _ = (jnp.float32(x) for x in sample())
  value, slope = jax.value_and_grad(
    lambda z: m.classification_loss(y, z, kind).sum()
  )(y + 3)
  np.testing.assert_allclose(value, 0, atol=1e-6)
  np.testing.assert_allclose(slope, 0, atol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_extreme_logits_stay_finite(kind):
  y = jnp.array([[1e4, -1e4, 0.0]])
  total = lambda a, b: m.decipher_loss(a, b, 0.1, 0.03, kind).sum()
  chex.assert_tree_all_finite(jax.value_and_grad(total, (0, 1))(y, -y))


def test_the_link_of_theorem_1():
  y_hat, y_tilde = sample(2)
  with jax.enable_x64(True):
    got = m.link(jnp.asarray(y_hat), jnp.asarray(y_tilde), 0.1, 0.03)
  for i, (a, b) in enumerate(zip(y_hat, y_tilde, strict=True)):
    loss = numpy_loss(a, b, 0.1, 0.03, 'kl_reverse')
    want = np.exp(-loss / 0.1) * softmax(a).max() ** (1 - 0.03 / 0.1)
    assert float(got[i]) == pytest.approx(want, rel=1e-9)


def test_each_instrument_is_of_its_own_logits():
  y_hat, y_tilde = sample(4)
  sums = np.arange(4.0)
  with jax.enable_x64(True):
    got = m.instruments(*map(jnp.asarray, (y_hat, y_tilde, sums)), 0.1, 0.03)
  for i, (a, b) in enumerate(zip(y_hat, y_tilde, strict=True)):
    p, q, n = softmax(a), softmax(b), a.argmax()
    loss = numpy_loss(a, b, 0.1, 0.03, 'kl_reverse')
    want = {
      'predicted_entropy': -(p * np.log(p)).sum(),
      'pseudo_entropy': -(q * np.log(q)).sum(),
      'logit_sum': a.sum(),
      'sum_drift': abs(b.sum() - sums[i]),
      # p̃ of the class that is predicted, and Theorem 1.
      'link_gap': abs(q[n] - np.exp(-loss / 0.1) * p[n] ** 0.7),
    }
    assert set(want) == set(got)
    for name, value in want.items():
      np.testing.assert_allclose(got[name][i], value, rtol=1e-9, err_msg=name)


def test_on_the_link_a_pseudo_label_is_flatter_than_its_prediction():
  # Theorem 2: L ≥ −β log p̂_n, so that the link is at most p̂_n.
  y_hat, y_tilde = (jnp.float32(x) for x in sample(3, rows=500, classes=7))
  links = m.link(y_hat, y_tilde, 0.1, 0.03)
  assert (links <= jnp.max(jax.nn.softmax(y_hat), axis=-1) + 1e-6).all()


# The method.


def make(batch_spec=tiny.DRAW, steps=1, net=tiny.NET, **arguments):
  given = (
    dict(pretrain=1, pretrain_batch=8, repeat=0, finetune=1, cutout=0)
    | arguments
  )
  tx = lambda steps, scale=1.0, **_: optax.sgd(0.1 * scale)
  return m.r2d2(net, tx, batch_spec, steps, **given)


def stage_of(method, name):
  (found,) = [s for s in method.stages if s.name == name]
  return found


def example(method, seed=0, net=tiny.NET):
  """A state with random pseudo-logits, and a batch of 4 given, 4 other rows."""
  images, labels = tiny.images()
  rows = np.arange(8, dtype=np.int32)
  table = np.full(len(labels), UNLABELLED, np.int32)
  table[:4] = labels[:4]
  image = images.astype(np.float32) / 255
  state = init_state(
    method,
    net,
    jax.random.key(seed),
    jnp.asarray(table),
    image[:4],
  )
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(len(labels), tiny.CLASSES)).astype(np.float32)
  logits[:4] = 10 * np.eye(tiny.CLASSES)[labels[:4]]
  batch = Batch(jnp.asarray(rows), jnp.asarray(image[rows]), jnp.arange(8) < 4)
  memory = m.PseudoLabels(jnp.asarray(logits), jnp.sum(logits, axis=-1))
  return state.replace(memory=memory), batch


class Linear(nn.Module):
  """Eq. 1 itself: ŷ = Wᵀ f, f the pixels."""

  @nn.compact
  def __call__(self, image, *, train, dropout):
    x = image.reshape(image.shape[0], -1)
    return network.Outputs(nn.Dense(tiny.CLASSES, use_bias=False)(x), x)


def numpy_slope(y_hat, y_tilde, alpha, beta, kind):
  """∂L/∂ŷ of one image by central differences of Eq. 2."""
  ways = 1e-6 * np.eye(len(y_hat))
  loss = lambda y: numpy_loss(y, y_tilde, alpha, beta, kind)
  return np.array([(loss(y_hat + w) - loss(y_hat - w)) / 2e-6 for w in ways])


@pytest.mark.parametrize('kind', KINDS)
def test_three_steps_equal_a_numpy_loop(kind):
  net = network.from_linen(Linear())
  method = make(net=net, divergence=kind, pseudo_rate=5.0, alpha=0.2, beta=0.05)
  stage = stage_of(method, 'decipher')
  state, batch = example(method, net=net)
  state = init_stage(stage, state, None)
  f = np.asarray(batch.image, np.float64).reshape(8, -1)
  w = np.asarray(state.params['Dense_0']['kernel'], np.float64)
  y_tilde = np.asarray(state.memory.logits, np.float64)
  step = jax.jit(
    make_step(stage, lambda images, rows, key: {'image': images}, None)
  )
  for _ in range(3):
    y_hat = f @ w
    of_all = lambda g, y, t: [g(y[i], t[i], 0.2, 0.05, kind) for i in range(8)]
    want = np.mean(of_all(numpy_loss, y_hat, y_tilde))
    # The network descends the mean with rate 0.1, an unlabelled ỹ its own loss.
    slopes = np.array(of_all(numpy_slope, y_hat, y_tilde))
    w = w - 0.1 * f.T @ slopes / 8
    for i in range(4, 8):  # 0..3 are labelled
      moved = closed_form(y_hat[i], y_tilde[i], 0.2, kind)
      y_tilde[i] = y_tilde[i] - 5.0 * moved
    state, metrics = step(state, batch.image, batch.rows, 0)
    np.testing.assert_allclose(metrics['loss'], want, rtol=1e-5)
    parts = 0.2 * metrics['classification'] + 0.05 * metrics['entropy']
    np.testing.assert_allclose(parts, want, rtol=1e-5)
    np.testing.assert_allclose(state.memory.logits, y_tilde, rtol=1e-4)
    np.testing.assert_allclose(
      state.params['Dense_0']['kernel'], w, rtol=1e-4, atol=1e-6
    )


def test_other_rows_and_labelled_rows_are_untouched_bit_for_bit():
  method = make()
  state, batch = example(method)
  _, (after, _) = stage_of(method, 'decipher').loss(
    state.params, state, batch, jax.random.key(0)
  )
  before, after = state.memory.logits, after.memory.logits
  chex.assert_trees_all_equal(after[:4], before[:4])
  chex.assert_trees_all_equal(after[8:], before[8:])
  assert (np.asarray(after[4:8]) != before[4:8]).any(axis=1).all()


def test_a_labelled_row_in_the_other_part_is_not_moved_either():
  method = make()
  state, batch = example(method)
  batch = batch._replace(label_mask=jnp.zeros(8, bool))
  _, (after, _) = stage_of(method, 'decipher').loss(
    state.params, state, batch, jax.random.key(0)
  )
  chex.assert_trees_all_equal(after.memory.logits[:4], state.memory.logits[:4])


def test_the_sum_of_a_rows_pseudo_logits_stays():
  # Eq. 12–13.
  method = make()
  state, batch = example(method)
  loss = jax.jit(stage_of(method, 'decipher').loss)
  before = np.asarray(state.memory.logits).sum(-1)
  for step in range(200):
    _, (state, metrics) = loss(state.params, state, batch, jax.random.key(step))
    assert float(metrics['sum_drift']) < 1e-4
  start = example(method)[0].memory.logits
  assert not np.allclose(state.memory.logits[4:8], start[4:8])
  np.testing.assert_allclose(
    np.asarray(state.memory.logits).sum(-1), before, atol=1e-4
  )


def test_the_step_of_an_image_does_not_depend_on_the_batch_size():
  # Predicting as it infers, an image does not see the rest of its batch.
  train = lambda params, stats, image, key: (
    tiny.NET.infer(params, stats, image),
    stats,
  )
  method = make(net=tiny.NET._replace(train=train))
  state, batch = example(method)
  loss = stage_of(method, 'decipher').loss
  moved = lambda b: loss(state.params, state, b, jax.random.key(0))[1][0]
  of = lambda b: moved(b).memory.logits
  half = Batch(batch.rows[4:], batch.image[4:], batch.label_mask[4:])
  np.testing.assert_allclose(of(half)[4:8], of(batch)[4:8], rtol=1e-6)
  assert (np.asarray(of(half)[4:8]) != state.memory.logits[4:8]).all()


def test_prediction_gives_logits_or_ten_where_the_label_is_given():
  method = make()
  state, _ = example(method)
  logits = jax.random.normal(jax.random.key(0), [64, 3])  # 61 rounded up
  labels = jnp.pad(state.labels, (0, 3), constant_values=UNLABELLED)
  state = state.replace(labels=labels)
  after = m.predict_pseudo(state, {'logits': logits})
  _, labels = tiny.images()
  predicted = after.memory.logits
  np.testing.assert_array_equal(predicted[:4], 10 * np.eye(3)[labels[:4]])
  chex.assert_trees_all_equal(predicted[4:], logits[4:])
  chex.assert_trees_all_close(after.memory.sums, predicted.sum(-1))


def test_an_acquired_label_fixes_its_pseudo_logits():
  method = make()
  state, _ = example(method)
  # Class 2 for row 5, no answer for row 6, and a row of padding.
  rows, labels = np.array([5, 6, 64]), np.array([2, UNLABELLED, 1])
  after = method.add_labels(state, jnp.asarray(rows), jnp.asarray(labels))
  want = np.asarray(state.memory.logits).copy()
  want[5] = [0, 0, 10]
  np.testing.assert_array_equal(after.memory.logits, want)
  sums = np.asarray(state.memory.sums).copy()
  sums[5] = 10
  np.testing.assert_array_equal(after.memory.sums, sums)
  table = np.asarray(state.labels).copy()
  table[5] = 2
  np.testing.assert_array_equal(after.labels, table)


def test_finetuning_descends_the_cross_entropy_of_the_hard_labels():
  method = make()
  state, batch = example(method)
  key = jax.random.key(1)
  got, (after, _) = stage_of(method, 'finetune').loss(
    state.params, state, batch, key
  )
  outputs, _ = tiny.NET.train(state.params, state.stats, batch.image, key)
  p = softmax(np.asarray(outputs.logits, np.float64))
  hard = np.asarray(state.memory.logits)[:8].argmax(-1)
  want = -np.mean([np.log(p[i, hard[i]]) for i in range(8)])
  np.testing.assert_allclose(got, want, rtol=1e-5)
  chex.assert_trees_all_equal(after.memory, state.memory)


def test_the_stages_of_table_1_are_switches():
  names = lambda **k: [s.name for s in make(**k).stages]
  parts = dict(repeat=8, interval=2)
  assert names() == ['supervised', 'decipher', 'finetune']  # a
  method = make(**parts)  # e
  repeated = [s for s in method.stages if s.name.startswith('repeat')]
  assert [s.steps for s in repeated] == [2, 2, 2, 2]
  assert all(s.per_example and s.every == 0 for s in repeated)
  rates = []
  for stage in repeated:
    update, _ = stage.tx.update(jnp.ones([]), stage.tx.init(jnp.ones([])))
    rates.append(-float(update) / 0.1)
  np.testing.assert_allclose(rates, [1, 2 / 3, 1 / 3, 1 / 30], rtol=1e-5)
  for switches, lengths in (
    (dict(repredict=False, lower=False), [8]),  # b
    (dict(lower=False), [2] * 4),  # c
    (dict(repredict=False), [2] * 4),  # d
  ):
    stages = make(**switches, **parts).stages[2:-1]
    assert [s.steps for s in stages] == lengths
    predicts = switches.get('repredict', True)
    assert [s.per_example is not None for s in stages] == [predicts] * len(
      stages
    )
  assert stage_of(make(), 'finetune').per_example is None
  again = make(finetune_labels='repredicted')
  assert stage_of(again, 'finetune').per_example is not None
  assert stage_of(make(), 'finetune').batch_spec == BatchSpec(
    0, 16, include_labelled=True
  )


def test_the_authors_schedule():
  # implementations.md 3.3, in steps: 300 epochs of 100, 300 of 119, four times
  # 75 of 119, 50 of 97 = ⌊50,000 / 512⌋; λ = 4000 at a batch of 512.
  asked = []

  def tx(*lengths, **changes):
    asked.append((*lengths, changes))
    return optax.sgd(0.1)

  method = m.r2d2(tiny.NET, tx, BatchSpec(128, 384), 35_700)
  cosine = dict(decay='cosine', decay_at=())
  part = lambda share: (8925, share, {})
  expected = [
    (35_000, dict(learning_rate=0.05) | cosine),  # of which 30,000 are taken
    (35_700, 1.0, {}),
    *(part(share) for share in (0.12 / 0.12, 0.08 / 0.12, 0.04 / 0.12)),
    part(0.004 / 0.12),
    (4900, dict(learning_rate=0.01) | cosine),
  ]
  for want in expected:
    (found,) = [
      a
      for a in asked
      if a[0] == want[0]
      and a[-1] == want[-1]
      and a[1:-1] == pytest.approx(want[1:-1])
    ]
    asked.remove(found)
  assert not asked
  steps = [stage.steps for stage in method.stages]
  assert steps == [30_000, 35_700, 8925, 8925, 8925, 8925, 4900]
  draws = [stage.batch_spec[:2] for stage in method.stages]
  assert draws == [(40, 0), *[(128, 384)] * 5, (0, 512)]
  rate = inspect.signature(m.r2d2).parameters['pseudo_rate'].default
  assert rate == 4000 / 512


def test_cutout_is_in_the_first_and_the_last_stage_alone():
  holes = [bool(s.views) for s in make(cutout=2).stages]
  assert holes == [True, False, True]
  assert not any(s.views for s in make(cutout=0).stages)


@pytest.mark.parametrize(
  ('arguments', 'flag'),
  [
    (dict(alpha=0.03), 'alpha=0.03.*beta=0.03.*force=True'),
    (dict(alpha=0.0), 'alpha'),
    (dict(beta=-1.0), 'beta'),
    (dict(pseudo_rate=0.0), 'pseudo_rate'),
    (dict(pretrain=0), 'pretrain'),
    (dict(finetune=0), 'finetune'),
    (dict(steps=0), 'steps'),
    (dict(repeat=4, interval=5), 'interval=5'),
    (dict(repeat=4, interval=0), 'interval=0'),
    (dict(repeat=4, interval=3), 'interval=3'),
    (dict(batch_spec=BatchSpec(0, 4)), 'batch_labelled'),
    (dict(batch_spec=BatchSpec(4, 0)), 'batch_unlabelled'),
  ],
)
def test_invalid_settings_are_refused_by_name(arguments, flag):
  with pytest.raises(InputError, match=flag):
    make(**arguments)


def test_force_allows_a_small_alpha():
  assert make(alpha=0.01, force=True).name == 'r2d2'


# As many images and classes as ImageNet has, over eight devices.


@pytest.fixture(scope='module')
def imagenet():
  net = network.from_linen(tiny.Wide(2))
  return tiny.imagenet_snapshots(
    make(BatchSpec(128, 384), net=net, repeat=1, interval=1, pretrain_batch=8),
    net,
  )


def test_each_of_eight_devices_holds_an_eighth_of_the_pseudo_logits(imagenet):
  memory = imagenet.abstract(1).memory.logits
  assert memory.shape == (1, 1_281_280, 1000)
  assert memory.sharding.shard_shape(memory.shape) == (1, 160_160, 1000)


EIGHTH = 160_160 * 1000 * 4  # bytes of the pseudo-logits on a device


def check_nothing_whole_is_made(compiled):
  """Check a compiled program with pseudo-logits as input and output."""
  # Whatever has a column per class has an eighth of the memory's rows, or no
  # more rows than the batch.
  columns = re.findall(r'f32\[(?:1,)?(\d+),(?:1,)?1000\]', compiled.as_text())
  rows = set(map(int, columns))
  assert 160_160 in rows and max(rows - {160_160}, default=0) <= 512
  # The new ones lie where the old ones did, and little is made beside them.
  sizes = compiled.memory_analysis()
  assert sizes.alias_size_in_bytes >= EIGHTH
  assert sizes.temp_size_in_bytes < EIGHTH / 20


def test_the_compiled_step_gathers_only_rows_of_the_batch(imagenet):
  program = imagenet.program
  batch = np.zeros([1, 512], np.int32)
  pixels, rows = next(program.data.train.batches(lambda _: batch, [0]))
  step = program.steps[1].lower(
    imagenet.abstract(1), (pixels, ()), rows, np.int32(0)
  )
  check_nothing_whole_is_made(step.compile())


def test_a_prediction_of_all_pseudo_logits_makes_no_whole_copy(imagenet):
  program, state = imagenet.program, imagenet.abstract(1)
  whole = state.memory.logits
  _, write = map_dataset.row_writer(program.mesh)
  part = jax.ShapeDtypeStruct((1, 512, 1000), np.float32)
  places = jax.ShapeDtypeStruct((512,), np.int32)
  check_nothing_whole_is_made(write.lower(whole, part, places).compile())
  update = compile_update(program, program.method.stages[1])
  check_nothing_whole_is_made(update.lower(state, {'logits': whole}).compile())
