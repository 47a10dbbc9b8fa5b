import contextlib
import math
import re
from typing import NamedTuple

import chex
import contract_test
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ssljax.augment import preprocess
from ssljax.core import (
  UNLABELLED,
  Batch,
  BatchSpec,
  MemorySpec,
  init_state,
  no_update,
)
from ssljax.data import feeds, sampling
from ssljax.data.splits import Split, draw_split
from ssljax.distributed import placement
from ssljax.errors import InputError
from ssljax.methods import llp as m
from ssljax.networks import network
from ssljax.runs import build
from ssljax.training import checkpoint, loop
from ssljax.training.compiled import Data, Program, compile_update
from ssljax.training.snapshots import Snapshots

N, D, TAU = 61, 5, 0.07
M = 0.3  # bank momentum; with 0.5 its two shares would be equal


def make(steps=1, **arguments):
  given = dict(warm=0, neighbours=3, density_neighbours=4, bank_momentum=M)
  given |= arguments
  return m.llp(
    tiny.NET, lambda *_: optax.sgd(0.1), BatchSpec(8, 16), steps, **given
  )


# Images of a run that leaves out some unlabelled ones; with all labelled ones
# and those of the batch below.
SOME = np.flatnonzero(np.arange(N) % 4 < 2)
each_admitted = pytest.mark.parametrize(
  'admitted', [np.arange(N), SOME], ids=['all', 'some']
)


def example(method, admitted, seed=0):
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
    admitted=None if len(admitted) == N else jnp.int32(admitted),
  )
  rng = np.random.default_rng(seed)
  size = len(state.memory.rows)
  bank = rng.normal(size=(size, D))
  bank /= np.linalg.norm(bank, axis=1, keepdims=True)
  labels, count = np.asarray(state.memory.labels).copy(), len(admitted)
  propagated = rng.random(count) < 0.7
  labels[:count][propagated] = rng.integers(0, 3, propagated.sum())
  known = np.searchsorted(admitted, np.asarray(state.memory.known_rows))
  memory = state.memory.replace(
    rows=jnp.float32(bank),
    labels=jnp.asarray(labels),
    confidence=jnp.float32(rng.random(size)),
    known=jnp.float32(bank[known]),
    log_density=jnp.float32(rng.normal(size=16)),
  )
  rows = np.array([0, 5, 9, 4, 5, 20, 60, 33], np.int32)
  batch = Batch(jnp.asarray(rows), jnp.asarray(image[rows]), jnp.zeros(8, bool))
  return state.replace(memory=memory), batch


def numpy_step(
  v,
  logits,
  state,
  admitted,
  rows,
  k,
  confidence=True,
  categorize=True,
  density=True,
  pseudo_labels='neighbours',
):
  """Loss, bank, labels, confidences of a step, in loops and in float64."""
  weigh, divide = confidence, density
  place = {image: i for i, image in enumerate(admitted)}
  bank = np.asarray(state.memory.rows, np.float64)
  labels = np.asarray(state.memory.labels).copy()
  sure = np.asarray(state.memory.confidence, np.float64).copy()
  table = np.asarray(state.labels)
  known = np.asarray(state.memory.known_rows)
  rho = np.exp(np.asarray(state.memory.log_density, np.float64))
  new_bank, new_labels, new_sure = bank.copy(), labels.copy(), sure.copy()
  loss, written = 0.0, set()
  for b, row in enumerate(rows):
    at = place[row]
    every = range(len(admitted))
    p = np.exp([bank[i] @ v[b] / TAU for i in every])
    p /= p.sum()
    a = sum(p[i] for i in every if labels[i] == labels[at])
    term = -np.log(a + 1e-7)
    q = np.exp(logits[b] - logits[b].max())
    q /= q.sum()
    if labels[at] < 3 and categorize:
      term -= np.log(q[labels[at]])
    loss += (sure[at] if weigh else 1.0) * term / len(rows)
    if row in written:
      continue
    written.add(row)
    moved = 0.3 * bank[at] + 0.7 * v[b]
    new_bank[at] = moved / np.sqrt(moved @ moved)
    votes = {
      i: np.exp(bank[place[i]] @ v[b] / TAU) / (rho[j] if divide else 1.0)
      for j, i in enumerate(known)
    }
    best = sorted(votes, key=votes.get)[-k:]
    shares = np.zeros(3)
    for i in best:
      shares[table[i]] += votes[i]
    shares /= shares.sum()
    if pseudo_labels == 'classifier':
      shares = q
    new_labels[at], new_sure[at] = shares.argmax(), shares.max()
    if table[row] != UNLABELLED:
      new_labels[at], new_sure[at] = table[row], 1.0
  return loss, new_bank, new_labels, new_sure


# Table 6 and the authors' code: each changes the loss or the pseudo-labels.
SWITCHES = [
  {},
  dict(confidence=False),
  dict(categorize=False),
  dict(density=False),
  dict(pseudo_labels='classifier'),
]


@pytest.mark.parametrize(
  ('switch', 'admitted'),
  [*((switch, np.arange(N)) for switch in SWITCHES), ({}, SOME)],
  ids=[*map(str, SWITCHES), 'some'],
)
def test_a_step_equals_a_numpy_loop(switch, admitted):
  method = make(**switch)
  state, batch = example(method, admitted)
  key = jax.random.key(1)
  outputs, _ = tiny.NET.train(state.params, state.stats, batch.image, key)
  v = np.asarray(outputs.embedding, np.float64)
  v /= np.linalg.norm(v, axis=1, keepdims=True)
  logits = np.asarray(outputs.logits, np.float64)
  rows = np.asarray(batch.rows)
  want, bank, labels, sure = numpy_step(
    v, logits, state, admitted, rows, 3, **switch
  )
  loss, (after, _) = jax.jit(method.stages[0].loss)(
    state.params, state, batch, key
  )
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  np.testing.assert_allclose(after.memory.rows, bank, atol=1e-6)
  np.testing.assert_array_equal(after.memory.labels, labels)
  np.testing.assert_allclose(after.memory.confidence, sure, rtol=1e-4)
  # The copies of labelled rows are updated too.
  known = np.searchsorted(admitted, np.asarray(state.memory.known_rows))
  chex.assert_trees_all_equal(after.memory.known, after.memory.rows[known])


def numpy_contrast(v, own, others):
  """Wu et al. 2018, Eq. 7 and 8, of one image in float64.

  h = P / (P + R / N) for R rows of noise; the code's Z is 2876934.2 for
  1,281,167 images.
  """
  z = 2876934.2 / 1281167 * N
  h = lambda row: (p := np.exp(row @ v / TAU) / z) / (p + len(others) / N)
  return -np.log(h(own)) - sum(np.log(1 - h(row)) for row in others)


def unit(rng, *shape):
  x = rng.normal(size=shape)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_noise_contrastive_estimation_equals_a_numpy_loop():
  rng = np.random.default_rng(0)
  v, own, others = (unit(rng, rows, D) for rows in (3, 3, 7))
  with jax.enable_x64(True):
    got = m.contrast(*map(jnp.asarray, (v, own, others)), N, TAU)
  want = [numpy_contrast(*pair, others) for pair in zip(v, own, strict=True)]
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_warming_contrasts_an_image_with_rows_of_the_whole_bank():
  # All rows of the bank are equal, so the draw of the negatives is known; the
  # rows of padding are no numbers, so that one of them would be noticed.
  method = make(warm=1, negatives=500)
  state, batch = example(method, np.arange(N))
  row = unit(np.random.default_rng(1), D)
  rows = np.tile(np.float32(row), (64, 1))
  rows[N:] = np.nan
  memory = state.memory.replace(rows=jnp.asarray(rows))
  state, key = state.replace(memory=memory), jax.random.key(2)
  net_key, _ = jax.random.split(key)
  outputs, _ = tiny.NET.train(state.params, state.stats, batch.image, net_key)
  v = np.asarray(outputs.embedding, np.float64)
  v /= np.linalg.norm(v, axis=1, keepdims=True)
  warming = jax.jit(method.stages[0].loss)
  loss, (after, _) = warming(state.params, state, batch, key)
  want = np.mean([numpy_contrast(x, row, [row] * 500) for x in v])
  np.testing.assert_allclose(loss, want, rtol=1e-4)
  # v̄ moves; labels and confidences stay.
  moved = 0.3 * row + 0.7 * v[0]
  np.testing.assert_allclose(
    after.memory.rows[0], moved / np.linalg.norm(moved), atol=1e-6
  )
  chex.assert_trees_all_equal(after.memory.labels, memory.labels)
  chex.assert_trees_all_equal(after.memory.confidence, memory.confidence)


def test_warming_draws_other_negatives_with_another_key():
  # As it infers, the network does not depend on the key.
  train = lambda params, stats, image, key: (
    tiny.NET.infer(params, stats, image),
    stats,
  )
  net, tx = tiny.NET._replace(train=train), lambda *_: optax.sgd(0.1)
  method = m.llp(
    net, tx, BatchSpec(8, 16), 1, warm=1, negatives=5, neighbours=3
  )
  state, batch = example(method, np.arange(N))
  warming = jax.jit(method.stages[0].loss)
  losses = [
    float(warming(state.params, state, batch, jax.random.key(seed))[0])
    for seed in (0, 0, 1)
  ]
  assert losses[0] == losses[1] != losses[2]


@each_admitted
def test_density_is_over_the_nearest_of_the_whole_bank(admitted):
  method = make()
  state, _ = example(method, admitted)
  after = method.stages[0].epoch_update(state, None)
  bank = np.asarray(state.memory.rows, np.float64)[: len(admitted)]
  known = np.searchsorted(admitted, np.asarray(state.memory.known_rows))
  for row, found in zip(known, after.memory.log_density, strict=True):
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
  assert (np.asarray(state.memory.known_classes)[N:] == UNLABELLED).all()


def run_on(images, labels, split, warm_loss):
  """Losses of every step and the last memory of a run without augmentation."""
  mesh = placement.make_mesh([1])
  feed = feeds.resident(images, placement.Placer(mesh))
  none = np.zeros(0, np.int32)
  data = Data(feed, feed, labels, none, preprocess.identity(), (), None)
  method = make(9, warm=9, warm_loss=warm_loss, negatives=7, temperature=0.5)
  program = Program(method, tiny.NET, data, mesh, batch=8)
  job, found = loop.Job('llp', program, [split]), []
  state = tiny.initial(job)[0]
  for number, stage in enumerate(method.stages):
    if stage.epoch_update is not no_update:
      state, _ = program.epoch_update[number](state)
    calls = [(i, i + 1) for i in range(stage.steps)]
    first = np.int32(9 * number)
    for source, rows in tiny.sources(job, tiny.samplers(job, number), calls):
      step = program.steps[number]
      state, metrics = step(state, source, rows, first)
      found.append(float(metrics['loss'][0]))
  return found, state.memory


@pytest.mark.parametrize('warm_loss', ['nce', 'softmax'])
def test_a_run_is_as_if_images_that_it_does_not_admit_were_absent(warm_loss):
  images, truth = tiny.images()
  labels = np.full(N, UNLABELLED, np.int32)
  labels[::4] = truth[::4]
  mask = np.isin(np.arange(N), SOME)
  part = Split(0, labels, mask, np.zeros(0, np.int32))
  losses, bank = run_on(images, truth, part, warm_loss)
  alone = part._replace(labels=labels[SOME], admitted=mask[SOME])
  want, other = run_on(images[SOME], truth[SOME], alone, warm_loss)
  assert losses == want
  assert bank.admitted is not None and other.admitted is None
  same = ('rows', 'labels', 'confidence', 'log_density', 'known_classes')
  for name in same:
    chex.assert_trees_all_equal(getattr(bank, name), getattr(other, name))


@pytest.mark.slow
def test_a_bank_of_some_images_is_sharded_and_has_an_axis_of_seeds(tmp_path):
  job = tiny.make_job('llp', seeds=(0, 1), validation=9)
  whole, _ = contract_test.fit(tmp_path / '1', 'llp', job=job)
  assert whole.memory.admitted.shape == (2, N - 9)
  for i, split in enumerate(job.splits):
    np.testing.assert_array_equal(whole.memory.admitted[i], split.trained)
  job = tiny.make_job('llp', seeds=(0, 1), validation=9, devices=8)
  split, _ = contract_test.fit(tmp_path / '8', 'llp', job=job)
  some = lambda state: jax.tree.map(
    lambda x: np.asarray(x)[:, : N - 9], (state.params, state.memory)
  )
  chex.assert_trees_all_close(some(split), some(whole), rtol=1e-4, atol=1e-5)


def test_splits_of_different_sizes_are_not_trained_at_once():
  # `unlabelled`=all:20 draws 20 of all images; the labelled ones come on top.
  draw = lambda seed: draw_split(
    tiny.truth(), 3, per_class=4, seed=seed, unlabelled='all', count=20
  )
  drawn = [draw(seed) for seed in range(4)]
  sizes = [len(split.trained) for split in drawn]
  assert len(set(sizes)) > 1 and max(sizes) <= 32
  build.refuse_unequal(drawn, 1, make())
  with pytest.raises(InputError, match=r'seeds_at_once=4: llp .*give'):
    build.refuse_unequal(drawn, 4, make())


def test_acquired_labels_vote_with_their_classes():
  method = make(density=False)
  state, _ = example(method, SOME)
  state = state.replace(
    memory=state.memory.replace(
      known=jnp.zeros([32, D]),
      known_rows=jnp.full(32, 64, jnp.int32),
      log_density=jnp.zeros(32),
      known_classes=jnp.full(32, UNLABELLED, jnp.int32),
    )
  )
  after = method.add_labels(state, jnp.int32([5, 64]), jnp.int32([2, 0]))
  known = np.asarray(after.memory.known_rows)
  np.testing.assert_array_equal(known[:17], sorted([*range(0, N, 4), 5]))
  places = np.searchsorted(SOME, known[:17])
  np.testing.assert_array_equal(
    after.memory.known[:17], np.asarray(after.memory.rows)[places]
  )
  np.testing.assert_array_equal(
    after.memory.known_classes[:17], np.asarray(after.labels)[known[:17]]
  )
  assert (np.asarray(after.memory.known_classes)[17:] == UNLABELLED).all()


class OldBank(NamedTuple):
  """The fields of the bank of version 0.1."""

  rows: jax.Array
  labels: jax.Array
  confidence: jax.Array
  known: jax.Array
  known_rows: jax.Array
  log_density: jax.Array


@each_admitted
def test_a_checkpoint_of_version_0_1_is_converted(admitted, tmp_path):
  job = tiny.make_job('llp')
  split = job.splits[0]
  labelled = split.labels != UNLABELLED
  mask = np.isin(np.arange(N), admitted)
  job = job._replace(splits=[split._replace(admitted=mask & ~labelled)])
  state, _ = tiny.initial(job)
  kept = np.flatnonzero(mask | labelled)
  # A bank as of version 0.1: a row per image; some have a class.
  bank = {
    name: np.asarray(getattr(state.memory, name)).copy()
    for name in OldBank._fields
  }
  size = 256
  rng = np.random.default_rng(0)
  bank['rows'] = rng.normal(size=(1, size, D)).astype(np.float32)
  bank['confidence'] = rng.random((1, size)).astype(np.float32)
  labels = np.where(np.arange(size) < N, 3 + np.arange(size), m.ABSENT)
  labels[kept[::3]] = 1
  bank['labels'] = labels[None].astype(np.int32)
  bank['known'] = bank['rows'][:, np.minimum(bank['known_rows'][0], size - 1)]
  old = state.replace(memory=OldBank(**jax.tree.map(jnp.asarray, bank)))
  checkpoints = checkpoint.Checkpoints(tmp_path)
  with contextlib.closing(checkpoints):
    snapshots = Snapshots(job, checkpoints)
    progress = loop.Progress()._replace(step=0)
    snapshots.save(old, progress, checkpoint.examine(old)[1])
    checkpoints.wait()
    after = snapshots.restore()[0].memory
  count = len(kept)
  for name in ('rows', 'confidence'):
    got = getattr(after, name)
    np.testing.assert_array_equal(got[0, :count], bank[name][0, kept])
  want = 3 + np.arange(count)
  want[::3] = 1
  np.testing.assert_array_equal(after.labels[0, :count], want)
  assert (np.asarray(after.labels)[0, count:] == m.ABSENT).all()
  for name in ('known', 'known_rows', 'log_density'):
    np.testing.assert_array_equal(getattr(after, name), bank[name])
  chex.assert_trees_all_equal(after.known_classes, state.memory.known_classes)
  chex.assert_trees_all_equal(after.admitted, state.memory.admitted)


def test_rows_of_the_bank_start_with_length_1_on_average():
  # U(−s, s) has variance s² / 3 = 1 / D.
  spec = MemorySpec(
    images=500,
    labels=jnp.zeros(512, int),
    labelled=500,
    classes=3,
    embedding=20,
    multiple=8,
  )
  settings = m.Settings(3, 4, TAU, M, True, True, True, 'neighbours', 'float32')
  bank = m.init_bank(settings, jax.random.key(0), None, None, spec)
  rows = np.asarray(bank.rows, np.float64)
  assert (rows[500:] == 0).all()
  square = np.square(rows[:500])
  assert square.sum(1).mean() == pytest.approx(1, abs=0.02)
  assert 0.99 * np.sqrt(3 / 20) < np.sqrt(square.max()) <= np.sqrt(3 / 20)


def test_an_acquired_label_has_a_vote_and_a_density():
  method = make()
  state, _ = example(method, np.arange(N))
  # There is room for sixteen labelled rows, which are all used: row 20 loses
  # its label first, so that there is room for another one.
  table = np.asarray(state.labels).copy()
  table[20] = UNLABELLED
  state = state.replace(labels=jnp.asarray(table))
  after = method.add_labels(state, jnp.array([7, 64]), jnp.array([2, 1]))
  known = np.asarray(after.memory.known_rows)
  np.testing.assert_array_equal(known, [0, 4, 7, 8, 12, 16, *range(24, 61, 4)])
  bank = np.asarray(after.memory.rows, np.float64)
  np.testing.assert_array_equal(after.memory.known, after.memory.rows[known])
  assert int(after.memory.known_classes[2]) == 2
  near = np.sort(bank[:N] @ bank[7])[-4:]
  want = np.log(np.exp(near / TAU).sum())
  assert float(after.memory.log_density[2]) == pytest.approx(want, rel=1e-5)


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
    (dict(labelled_per_step=-1), 'labelled_per_step'),
  ],
)
def test_invalid_settings_are_refused_by_name(arguments, flag):
  with pytest.raises(InputError, match=flag):
    make(**arguments)


def test_labelled_images_may_be_added_to_every_step_of_propagation():
  warm, plain = make(warm=3).stages
  more_warm, more = make(warm=3, labelled_per_step=5).stages
  alone = BatchSpec(0, 16, include_labelled=True)
  assert more_warm.batch_spec == warm.batch_spec == alone
  assert plain.batch_spec._replace(flag=alone.flag) == alone
  assert more.batch_spec._replace(labelled=0, flag=alone.flag) == alone
  split = draw_split(np.arange(61) % 3, 3, per_class=4, seed=1)
  sampler = sampling.Sampler(more.batch_spec, split)
  rows = np.stack([sampler.rows(step) for step in range(30)])
  is_labelled = split.labels != UNLABELLED
  assert rows.shape == (30, 21) and is_labelled[rows[:, :5]].all()
  # The others are drawn from all images, a fifth of which have a label.
  share = is_labelled[rows[:, 5:]].mean()
  assert 0.1 < share < 0.3 and 12 / 61 == is_labelled.mean()


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


def test_the_agreement_of_neighbours_equals_a_numpy_loop():
  method = make(warm=1, neighbours=3)
  state, _ = example(method, SOME)
  # Two labels are missing: their places are padding.
  known = np.asarray(state.memory.known, np.float64)
  classes = np.asarray(state.memory.known_classes).copy()
  classes[-2:] = UNLABELLED
  memory = state.memory.replace(known_classes=jnp.asarray(classes))
  (first, _) = method.stages
  measure = first.readiness.measure
  got = measure(state.replace(memory=memory))
  count, shares, expected = len(classes) - 2, [], []
  for i in range(count):
    votes = {
      j: np.exp(known[i] @ known[j] / TAU) for j in range(count) if j != i
    }
    best = sorted(votes, key=votes.get)[-3:]
    own = sum(votes[j] for j in best if classes[j] == classes[i])
    shares.append(own / sum(votes[j] for j in best))
    expected.append((np.sum(classes[:count] == classes[i]) - 1) / (count - 1))
  chance = np.mean(expected)
  want = (np.mean(shares) - chance) / (1 - chance)
  assert float(got) == pytest.approx(want, rel=1e-4)
  # Images of a class in one place agree; noise does not.
  apart = jnp.eye(D)[jnp.asarray(classes)]
  perfect = measure(state.replace(memory=memory.replace(known=apart)))
  assert float(perfect) == pytest.approx(1, abs=1e-4)
  assert first.readiness.is_met(float(perfect))
  assert not first.readiness.is_met(0.05)
