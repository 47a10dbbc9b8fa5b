import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ssljax.core import UNLABELLED, Batch, BatchSpec, init_state
from ssljax.errors import InputError
from ssljax.methods import llp as m
from ssljax.networks import network
from ssljax.training.compiled import compile_update

N, D, TAU = 61, 5, 0.07


def make(steps=1, **arguments):
  given = dict(warm=0, neighbours=3, density_neighbours=4) | arguments
  return m.llp(
    tiny.NET, lambda *_: optax.sgd(0.1), BatchSpec(8, 16), steps, **given
  )


def example(method, seed=0):
  """A state with a random bank, and a batch with a row twice."""
  images, truth = tiny.images()
  table = np.full(N, UNLABELLED, np.int32)
  table[::4] = truth[::4]
  image = images.astype(np.float32) / 255
  state = init_state(
    method,
    tiny.NET,
    jax.random.key(seed),
    jnp.asarray(table),
    image[:4],
    labelled=16,
    multiple=16,
  )
  rng = np.random.default_rng(seed)
  bank = rng.normal(size=(64, D))
  bank /= np.linalg.norm(bank, axis=1, keepdims=True)
  labels = np.asarray(state.memory.labels).copy()
  propagated = rng.random(64) < 0.7
  labels[:N][propagated[:N]] = rng.integers(0, 3, propagated[:N].sum())
  known = np.asarray(state.memory.known_rows)
  memory = state.memory.replace(
    rows=jnp.float32(bank),
    labels=jnp.asarray(labels),
    confidence=jnp.float32(rng.random(64)),
    known=jnp.float32(bank[known]),
    log_density=jnp.float32(rng.normal(size=16)),
  )
  rows = np.array([0, 5, 9, 4, 5, 20, 60, 33], np.int32)
  batch = Batch(jnp.asarray(rows), jnp.asarray(image[rows]), jnp.zeros(8, bool))
  return state.replace(memory=memory), batch


def numpy_step(v, logits, state, rows, k):
  """Loss, bank, labels, confidences of a step, in loops and in float64."""
  bank = np.asarray(state.memory.rows, np.float64)
  labels = np.asarray(state.memory.labels).copy()
  sure = np.asarray(state.memory.confidence, np.float64).copy()
  table = np.asarray(state.labels)
  known = np.asarray(state.memory.known_rows)
  density = np.exp(np.asarray(state.memory.log_density, np.float64))
  new_bank, new_labels, new_sure = bank.copy(), labels.copy(), sure.copy()
  loss, written = 0.0, set()
  for b, row in enumerate(rows):
    p = np.exp([bank[i] @ v[b] / TAU for i in range(N)])
    p /= p.sum()
    a = sum(p[i] for i in range(N) if labels[i] == labels[row])
    term = -np.log(a + 1e-7)
    if labels[row] < 3:
      q = np.exp(logits[b] - logits[b].max())
      term -= np.log(q[labels[row]] / q.sum())
    loss += sure[row] * term / len(rows)
    if row in written:
      continue
    written.add(row)
    moved = 0.5 * bank[row] + 0.5 * v[b]
    new_bank[row] = moved / np.sqrt(moved @ moved)
    votes = {
      i: np.exp(bank[i] @ v[b] / TAU) / density[j] for j, i in enumerate(known)
    }
    best = sorted(votes, key=votes.get)[-k:]
    shares = np.zeros(3)
    for i in best:
      shares[table[i]] += votes[i]
    shares /= shares.sum()
    new_labels[row], new_sure[row] = shares.argmax(), shares.max()
    if table[row] != UNLABELLED:
      new_labels[row], new_sure[row] = table[row], 1.0
  return loss, new_bank, new_labels, new_sure


def test_a_step_equals_a_numpy_loop():
  method = make()
  state, batch = example(method)
  key = jax.random.key(1)
  outputs, _ = tiny.NET.train(state.params, state.stats, batch.image, key)
  v = np.asarray(outputs.embedding, np.float64)
  v /= np.linalg.norm(v, axis=1, keepdims=True)
  logits = np.asarray(outputs.logits, np.float64)
  rows = np.asarray(batch.rows)
  want, bank, labels, sure = numpy_step(v, logits, state, rows, 3)
  loss, (after, _) = jax.jit(method.stages[0].loss)(
    state.params, state, batch, key
  )
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  np.testing.assert_allclose(after.memory.rows, bank, atol=1e-6)
  np.testing.assert_array_equal(after.memory.labels, labels)
  np.testing.assert_allclose(after.memory.confidence, sure, rtol=1e-4)
  # The copies of labelled rows are updated too.
  known = np.asarray(state.memory.known_rows)
  chex.assert_trees_all_equal(after.memory.known, after.memory.rows[known])


def test_density_is_over_the_nearest_of_the_whole_bank():
  method = make()
  state, _ = example(method)
  after = method.stages[0].epoch_update(state, None)
  bank = np.asarray(state.memory.rows, np.float64)[:N]
  for row, found in zip(
    state.memory.known_rows, after.memory.log_density, strict=True
  ):
    near = np.sort(bank @ bank[int(row)])[-4:]  # itself among them
    want = np.log(np.exp(near / TAU).sum())
    assert float(found) == pytest.approx(want, rel=1e-5)


def test_until_something_is_propagated_every_image_is_its_own_class():
  method = make()
  images, truth = tiny.images()
  state = init_state(
    method,
    tiny.NET,
    jax.random.key(0),
    jnp.asarray(truth),
    images[:4] / np.float32(255),
    labelled=61,
    multiple=16,
  )
  labels = np.asarray(state.memory.labels)
  np.testing.assert_array_equal(labels[:N], 3 + np.arange(N))
  assert (labels[N:] == m.ABSENT).all()
  # Padding follows the labelled rows and has no vote.
  known = np.asarray(state.memory.known_rows)
  np.testing.assert_array_equal(known, [*range(N), 64, 64, 64])
  assert (np.asarray(m.known_classes(state))[N:] == UNLABELLED).all()


@pytest.mark.parametrize(
  ('arguments', 'flag'),
  [
    (dict(temperature=0.0), 'temperature'),
    (dict(neighbours=0), 'neighbours'),
    (dict(density_neighbours=0), 'density_neighbours'),
    (dict(bank_momentum=1.0), 'bank_momentum'),
    (dict(steps=0), 'steps'),
    (dict(warm=-1), 'warm'),
    (dict(negatives=0), 'negatives'),
  ],
)
def test_invalid_settings_are_refused_by_name(arguments, flag):
  with pytest.raises(InputError, match=flag):
    make(**arguments)


# As many images and classes as ImageNet has, over eight devices.


@pytest.fixture(scope='module')
def imagenet():
  net = network.from_linen(tiny.Wide(128))
  tx = lambda *_: optax.sgd(0.1)
  return tiny.imagenet_snapshots(
    m.llp(net, tx, BatchSpec(0, 128), 1, warm=0), net
  )


def check_no_bank_is_gathered(compiled, banks):
  """Check a compiled program whose input and output contain the bank."""
  rows = re.findall(r'f32\[(?:1,)?(\d+),(?:1,)?128\]', compiled.as_text())
  # Nothing with a column per number of an embedding has more rows than a
  # device's eighth of the bank.
  assert max(map(int, rows)) == 1_281_280 // 8
  sizes = compiled.memory_analysis()
  assert sizes.alias_size_in_bytes >= banks
  assert sizes.temp_size_in_bytes < banks / 5


def test_the_compiled_step_never_gathers_the_bank(imagenet):
  program, state = imagenet.program, imagenet.abstract(0)
  bank = state.memory.rows
  assert bank.shape == (1, 1_281_280, 128)
  eighth = bank.sharding.shard_shape(bank.shape)
  assert eighth == (1, 160_160, 128)
  batch = np.zeros([1, 128], np.int32)
  pixels, rows = next(program.data.train.batches(lambda _: batch, [0]))
  step = program.steps[0].lower(state, (pixels, ()), rows, np.int32(0))
  check_no_bank_is_gathered(step.compile(), 4 * math.prod(eighth))
  update = compile_update(program, program.method.stages[0])
  update = update.lower(state, None)
  check_no_bank_is_gathered(update.compile(), 4 * math.prod(eighth))
