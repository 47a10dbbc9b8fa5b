import chex
from contract_test import OPTIONS, fit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ssljax.active import oracle
from ssljax.active.acquisition import Sampled
from ssljax.core import UNLABELLED, Batch, BatchSpec, TrainState, init_state
from ssljax.data import sampling
from ssljax.errors import InputError
from ssljax.methods import deepbass as m
from ssljax.networks import network
from ssljax.training import active_loop, loop
from ssljax.training.compiled import Program

N, C = tiny.ROWS, tiny.CLASSES


def make(steps=4, **arguments):
  tx = lambda _: optax.sgd(lambda count: 0.1)
  return m.deepbass(tiny.NET, tx, tiny.DRAW, steps, **arguments)


def bare_state(labels, memory):
  """A state with only labels and a memory, whose tables may be longer."""
  none, images = jnp.zeros([]), len(labels)
  table = np.full(len(memory.labels), UNLABELLED)
  table[:images] = labels
  return TrainState(
    step=none,
    key=none,
    params=(),
    stats=(),
    opt_state=(),
    labels=jnp.asarray(table),
    memory=memory,
    images=images,
  )


def sampled(p):
  """`Sampled` with p̃ `[N, C]`; its other fields must not be used."""
  p = jnp.asarray(p, jnp.float32)
  return Sampled(p, jnp.full(len(p), 0.5), p[:, ::-1], p[:, ::-1])


def slow_entropy(p):
  """Eq. 3 of one row."""
  return -sum(x * np.log(x) for x in p if x > 0) / np.log(len(p))


def draws(seed, rows=12, spread=0.5):
  return np.random.default_rng(seed).dirichlet(np.full(C, spread), rows)


def test_membership_and_threshold_are_a_simulation_of_algorithm_3_1():
  labels = np.full(8, UNLABELLED)
  labels[[1, 4, 6]] = [0, 2, 1]
  # Tables of twelve rows for eight images; the rest is padding.
  memory = m.PseudoLabels(
    jnp.zeros(12, int), jnp.zeros(12), jnp.zeros(12, bool), jnp.zeros([])
  )
  state, epoch_update = bare_state(labels, memory), m.update_with('stepwise')
  member, grew = set(), []
  for iteration in range(4):
    many, all_rows = draws(iteration, 12, 0.1), draws(100 + iteration)
    theta = np.mean([slow_entropy(many[j]) for j in (1, 4, 6)])  # Eq. 8
    member |= {j for j in range(8) if slow_entropy(all_rows[j]) < theta}
    grew.append(len(member))
    state = epoch_update(state, (sampled(all_rows), sampled(many)))
    assert float(state.memory.threshold) == pytest.approx(theta, abs=1e-6)
    found = np.flatnonzero(state.memory.member)
    assert set(found) == member  # once in D, always in D: Eq. 9
    for j in range(12):
      assert int(state.memory.labels[j]) == np.argmax(all_rows[j])  # Eq. 4
      want = slow_entropy(all_rows[j])
      assert float(state.memory.entropy[j]) == pytest.approx(want, abs=1e-5)
    # An epoch has a labelled row 20 times, and one of D once: Eq. 6.
    often = [20 if labels[j] >= 0 else int(j in member) for j in range(8)]
    np.testing.assert_array_equal(
      m.multiplicity(state, 20), [*often, 0, 0, 0, 0]
    )
  assert 0 < grew[0] < grew[-1] < 8  # D has grown, and is not everything


def test_all_data_are_learned_from_at_once_and_none_in_active_learning():
  labels = np.array([0, UNLABELLED, UNLABELLED])
  memory = m.PseudoLabels(
    jnp.zeros(4, int), jnp.zeros(4), jnp.zeros(4, bool), jnp.zeros([])
  )
  state = bare_state(labels, memory)
  np.testing.assert_array_equal(m.multiplicity(state, 5), [5, 0, 0, 0])
  state = m.update_with('all')(state, sampled(draws(0, 4)))
  np.testing.assert_array_equal(m.multiplicity(state, 5), [5, 1, 1, 0])
  alone = make(membership='none').stages[1]
  assert alone.per_example is None


def test_pseudo_labels_take_t_prime_passes_and_the_threshold_takes_t():
  # The network is sure of class 1 in its first two passes, and then of class 0.
  image = jnp.zeros([4, 4, 4, 1])
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  keys = jax.random.key_data(fold(jax.random.key(0), np.arange(5)))

  def sample(params, stats, image, key):
    same = jnp.all(keys == jax.random.key_data(key)[None], axis=-1)
    sure = jnp.where(jnp.argmax(same) < 2, 9.0, -9.0)
    logits = jnp.tile(jnp.stack([-sure, sure])[None], (len(image), 1))
    return network.Outputs(logits, logits)

  net = tiny.NET._replace(sample=sample)
  method = m.deepbass(
    net,
    lambda _: optax.sgd(0.1),
    tiny.DRAW,
    4,
    membership='stepwise',
    passes=2,
    labelled_passes=5,
  )
  memory = m.PseudoLabels(*[jnp.zeros(4)] * 3, jnp.zeros([]))
  state, stage = bare_state(np.zeros(4), memory), method.stages[1]
  votes = lambda per_example: per_example(state, image, jax.random.key(0)).votes
  np.testing.assert_allclose(votes(stage.per_example)[0], [0, 1])
  of_labelled = votes(stage.per_labelled_example)[0]
  np.testing.assert_allclose(of_labelled, [0.6, 0.4], rtol=1e-6)


def test_the_loss_is_the_mean_over_truth_and_pseudo_labels():
  method, truth = make(), tiny.make_splits()[0].labels
  images = tiny.images()[0].astype(np.float32) / 255
  state = init_state(
    method, tiny.NET, jax.random.key(0), jnp.asarray(truth), images[:4]
  )
  guesses = (np.arange(N) % C).astype(np.int32)
  state = state.replace(memory=state.memory.replace(labels=guesses))
  rows = np.array([0, 1, 2, 3, 20, 21, 22, 60])
  assert 0 < (truth[rows] >= 0).sum() < len(rows)
  batch = Batch(jnp.asarray(rows), images[rows], jnp.zeros(8, bool))
  loss, (_, metrics) = method.stages[1].loss(
    state.params, state, batch, jax.random.key(5)
  )
  outputs, _ = tiny.NET.train(
    state.params, state.stats, batch.image, jax.random.key(5)
  )
  terms = []
  for row, logits in zip(rows, np.asarray(outputs.logits), strict=True):
    label = truth[row] if truth[row] >= 0 else guesses[row]  # Eq. 2 and 5
    terms.append(np.log(np.exp(logits).sum()) - logits[label])
  assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5)
  known = truth[rows] >= 0
  for name, of in (('of_labelled', known), ('of_pseudo_labelled', ~known)):
    want = np.mean(np.array(terms)[of])
    assert float(metrics[name]) == pytest.approx(want, rel=1e-5)


def test_an_epoch_has_every_copy_and_completes_its_last_step():
  split = tiny.make_splits()[0]
  multiplicity = np.where(split.labels >= 0, 3, 1)
  batch_spec = BatchSpec(0, 10, include_labelled=True)
  sampler = sampling.Sampler(
    batch_spec, split, multiplicity=multiplicity, start=7, epoch=2
  )
  # 24 labelled ones 3 times and 37 others: 109 rows, 11 steps of 10.
  assert sampler.epoch_steps == 11
  rows = np.concatenate([sampler.rows(7 + step) for step in range(11)])
  times = np.bincount(rows, minlength=N)
  assert (times >= multiplicity).all() and times.sum() == 110
  assert times[split.labels < 0].max() <= 2
  # Every epoch has its own shuffle, which is reproducible.
  again = sampling.Sampler(
    batch_spec, split, multiplicity=multiplicity, epoch=2
  )
  np.testing.assert_array_equal(again.rows(0), sampler.rows(7))
  other = sampling.Sampler(
    batch_spec, split, multiplicity=multiplicity, epoch=3
  )
  assert (other.rows(0) != sampler.rows(7)).any()


def test_rows_that_the_run_does_not_admit_are_in_no_epoch():
  split = tiny.make_splits(validation=9)[0]
  sampler = sampling.Sampler(
    BatchSpec(0, 8, include_labelled=True), split, multiplicity=np.ones(N, int)
  )
  seen = {
    row for step in range(sampler.epoch_steps) for row in sampler.rows(step)
  }
  assert seen == set(range(N)) - set(split.validation)


def job_of(**arguments):
  data, mesh = tiny.make_data()
  program = Program(make(**arguments), tiny.NET, data, mesh, batch=8)
  return loop.Job('deepbass', program, tiny.make_splits())


def test_the_optimiser_continues_through_both_stages(tmp_path):
  job = job_of(iterations=2, passes=2, upsample=2)
  state, progress = fit(tmp_path, 'deepbass', job=job)
  count = optax.tree_utils.tree_get(state.opt_state, 'count')
  # 4 steps; then 24 rows twice and 37 once, 85 rows in steps of 8, twice.
  assert progress.step == 4 + 2 * 11 == int(count[0]) == int(state.step[0])
  assert progress.ends == (4, 26)
  assert [e['step'] for e in progress.evaluations] == [3, 4, 15, 26]


def test_nothing_is_compiled_again_as_epochs_grow(tmp_path):
  job = job_of(iterations=4, passes=2, labelled_passes=3, membership='stepwise')
  _, progress = fit(tmp_path, 'deepbass', job=job)
  lengths = np.diff([e['step'] for e in progress.evaluations[1:]])
  assert len(set(lengths)) > 1
  first, second = job.program.steps
  assert first is second  # both stages share one step
  for compiled in (first, job.program.multiplicity[1]):
    assert compiled._cache_size() == 1


@pytest.mark.slow
def test_seeds_whose_epochs_differ_are_not_trained_at_once(tmp_path):
  data, mesh = tiny.make_data()
  method = make(iterations=4, passes=2, membership='stepwise')
  program = Program(method, tiny.NET, data, mesh, seeds=3, batch=8)
  job = loop.Job('deepbass', program, tiny.make_splits((0, 1, 2)))
  with pytest.raises(InputError, match='seeds_at_once=1'):
    fit(tmp_path, 'deepbass', job=job)


@pytest.mark.parametrize('membership', ['all', 'stepwise'])
def test_0_passes_predict_without_dropout(membership):
  stage = make(passes=0, membership=membership).stages[1]
  image = jnp.asarray(tiny.images()[0][:9] / np.float32(255))
  params, stats = tiny.NET.init(jax.random.key(1), image)
  state = bare_state(np.zeros(9, int), PADDED).replace(
    params=params, stats=stats
  )
  p = jax.nn.softmax(tiny.NET.infer(params, stats, image).logits)
  wanted = [stage.per_example]
  if membership == 'stepwise':
    wanted.append(stage.per_labelled_example)
  for per_example in wanted:
    found = per_example(state, image, jax.random.key(0))
    np.testing.assert_array_equal(found.mean, p)


PADDED = m.PseudoLabels(
  jnp.zeros(9, int), jnp.zeros(9), jnp.zeros(9, bool), jnp.zeros([])
)


def ask_job(passes, query_passes):
  """A job with a query before every iteration but the first."""
  data, mesh = tiny.make_data()
  method = make(4, iterations=3, passes=passes, upsample=2)
  program = Program(method, tiny.NET, data, mesh, batch=8, extra=8)
  active = active_loop.ActiveLearning(
    active_loop.Policy('entropy', 1, 4, None, query_passes),
    program,
    oracle.Simulation(tiny.truth()),
    np.ones(N, bool),
  )
  return loop.Job('deepbass', program, tiny.make_splits(), active)


def test_a_query_uses_the_passes_of_the_pseudo_labels(tmp_path, monkeypatch):
  calls, choose = [], active_loop.ActiveLearning.choose

  def note(self, state, splits, past, before=None, sampled=None):
    calls.append(sampled is not None)
    chosen = choose(self, state, splits, past, before, sampled)
    # Passes of its own choose the same images.
    assert chosen == choose(self, state, splits, past, before)
    return chosen

  monkeypatch.setattr(active_loop.ActiveLearning, 'choose', note)
  _, progress = fit(tmp_path / '1', 'deepbass', job=ask_job(2, 2))
  assert calls == [True] * 3 == [True] * len(progress.asked)
  calls.clear()
  fit(tmp_path / '2', 'deepbass', job=ask_job(2, 3))  # another number
  assert calls == [False] * 3


@pytest.mark.slow
def test_a_run_resumes_in_any_round_bit_for_bit(tmp_path, monkeypatch):
  often = OPTIONS._replace(checkpoint_seconds=0.0, record_every=3)
  job = job_of(iterations=3, passes=2, labelled_passes=3, membership='stepwise')
  whole, progress = fit(tmp_path / 'whole', 'deepbass', often, job)
  save = loop._Loop.save
  ends = [e['step'] for e in progress.evaluations]
  # In the first stage, at its end, within a round, and at a round's end.
  for at in (3, 4, 7, ends[3]):

    def stop(self, at=at):
      save(self)
      if self.progress.step == at:
        self.snapshots.checkpoints.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
      patch.setattr(loop._Loop, 'save', stop)
      with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / 'parts', 'deepbass', often, job)
  resumed, again = fit(tmp_path / 'parts', 'deepbass', often, job)
  assert list(again.evaluations) == list(progress.evaluations)
  plain = lambda s: s.replace(key=jax.random.key_data(s.key))
  chex.assert_trees_all_equal(plain(resumed), plain(whole))


@pytest.mark.parametrize(
  ('arguments', 'flag'),
  [
    (dict(steps=0), 'steps'),
    (dict(iterations=-1), 'iterations'),
    (dict(passes=-1), 'passes'),
    (dict(labelled_passes=0), 'labelled_passes'),
    (dict(upsample=0), 'upsample'),
  ],
)
def test_invalid_settings_are_refused_by_name(arguments, flag):
  with pytest.raises(InputError, match=flag):
    make(**arguments)
