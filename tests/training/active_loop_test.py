"""Labels that come in the middle of a run, for every method."""

import copy
import functools

import chex
from conftest import forget_programs
from contract_test import OPTIONS, comparable, fit, lines
import numpy as np
import pytest
import tiny

from ssljax.active import oracle
from ssljax.core import UNLABELLED
from ssljax.distributed.preemption import PreemptedError
from ssljax.training import active_loop, rounds
from ssljax.training import loop as loop_lib

POLICY = active_loop.Policy('entropy', every=1, size=4, budget=10, passes=3)
OFTEN = OPTIONS._replace(checkpoint_seconds=0.0)


@pytest.fixture(scope='module', params=tiny.METHODS)
def name(request):
  """Every method in turn."""
  yield request.param
  forget_programs()


class Replaceable:
  """An oracle that can be replaced, so that compiled programs are shared."""

  other = oracle.Simulation(tiny.truth())

  def ask(self, *question):
    return self.other.ask(*question)


@functools.cache
def shared(name, seeds):
  """(program, active learning, oracle) of a method and a number of seeds."""
  program = tiny.make_program(name, 16, seeds, None, extra=10)
  answers, among = Replaceable(), np.ones(tiny.ROWS, bool)
  active = active_loop.ActiveLearning(POLICY, program, answers, among)
  return program, active, answers


@pytest.fixture(scope='module', autouse=True)
def unshared():
  yield
  shared.cache_clear()


def make_job(name, truth=None, seeds=(0,)):
  program, active, answers = shared(name, len(seeds))
  answers.other = oracle.Simulation(tiny.truth() if truth is None else truth)
  return loop_lib.Job(name, program, tiny.make_splits(seeds), active)


def asked_rows(progress, seed=0):
  return [row for asked in progress.asked for row in asked['rows'][seed]]


def test_labels_come_once_each_and_never_more_than_the_budget(name, tmp_path):
  job = make_job(name)
  state, progress = fit(tmp_path, name, job=job)
  rows = asked_rows(progress)
  # 4, 4, and the two that are left of ten.
  assert [len(asked['rows'][0]) for asked in progress.asked] == [4, 4, 2]
  assert len(set(rows)) == 10
  start = job.splits[0].labels
  assert (start[rows] == UNLABELLED).all()
  want = start.copy()
  want[rows] = tiny.truth()[rows]
  np.testing.assert_array_equal(state.labels[0, : len(want)], want)
  assert (state.labels[0, len(want) :] == UNLABELLED).all()
  counts = [m['asked'] for m in lines(tmp_path) if 'asked' in m]
  assert counts == [4, 8, 10]
  # No query before the first step: the network has learned nothing yet.
  assert progress.asked[0]['step'] > 0


def test_what_is_learned_is_a_function_of_what_was_asked_for(name, tmp_path):
  truth = tiny.truth()
  state, progress = fit(tmp_path / '1', name, job=make_job(name))
  rows = asked_rows(progress)
  known = tiny.make_splits()[0].labels >= 0
  known[rows] = True
  # Every other label is changed: the state must not depend on it.
  other = np.where(known, truth, (truth + 1) % tiny.CLASSES).astype(np.int32)
  job = make_job(name, other)
  again, _ = fit(tmp_path / '2', name, job=job)
  chex.assert_trees_all_equal(comparable(again), comparable(state))
  assert lines(tmp_path / '1') == lines(tmp_path / '2')
  # Nor are those labels in the table.
  table = np.asarray(state.labels[0])[: len(known)]
  assert (table[~known] == UNLABELLED).all()


def test_an_acquired_label_is_learned_from(name, tmp_path):
  # Two runs that get different answers diverge.
  truth = tiny.truth()
  state, _ = fit(tmp_path / '1', name, job=make_job(name))
  lies = ((truth + 1) % tiny.CLASSES).astype(np.int32)
  misled, _ = fit(tmp_path / '2', name, job=make_job(name, lies))
  with pytest.raises(AssertionError):
    chex.assert_trees_all_close(misled.params, state.params, rtol=1e-3)


def test_preempted_while_it_chooses_it_loses_no_step_and_ends_the_same(
  name, tmp_path, monkeypatch
):
  job, chooses = make_job(name), []
  whole, progress = fit(tmp_path / 'whole', name, OFTEN, job)
  rows = active_loop.ActiveLearning.choose

  def note(*args, **how):
    chooses.append(True)
    return rows(*args, **how)

  notice = OFTEN._replace(preempted=lambda: bool(chooses))
  with monkeypatch.context() as patch, pytest.raises(PreemptedError) as error:
    patch.setattr(active_loop.ActiveLearning, 'choose', note)
    fit(tmp_path / 'parts', name, notice, job)
  assert any(entry.name == 'map_rows' for entry in error.traceback)
  assert f'step {progress.asked[0]["step"]}:' in str(error.value)
  resumed, _ = fit(tmp_path / 'parts', name, OFTEN, job)
  chex.assert_trees_all_equal(comparable(resumed), comparable(whole))
  assert lines(tmp_path / 'parts') == lines(tmp_path / 'whole')


def test_killed_about_an_acquisition_it_ends_the_same(
  name, tmp_path, monkeypatch
):
  job = make_job(name)
  whole, progress = fit(tmp_path / 'whole', name, OFTEN, job)
  at = progress.asked[1]['step']
  save, ask = loop_lib._Loop.save, active_loop.ActiveLearning.query

  def stop_at(step):
    def stop(self):
      save(self)
      if self.progress.step == step:
        self.snapshots.checkpoints.wait()
        raise KeyboardInterrupt

    return loop_lib._Loop, 'save', stop

  def stop_within(*args, **how):
    ask(*args, **how)
    raise KeyboardInterrupt

  parts = tmp_path / 'parts'
  # When the query is due; with the answer there, but nothing saved; and later.
  for patched in (
    stop_at(at),
    (active_loop.ActiveLearning, 'query', stop_within),
    stop_at(at + 1),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(*patched)
      with pytest.raises(KeyboardInterrupt):
        fit(parts, name, OFTEN._replace(record_every=1), make_job(name))
  resumed, again = fit(parts, name, OFTEN, make_job(name))
  assert [*again.asked] == [*progress.asked]
  chex.assert_trees_all_equal(comparable(resumed), comparable(whole))


def test_only_rows_of_the_pool_are_asked_about_once_each():
  program, *_ = shared('supervised', 1)
  split = tiny.make_splits()[0]
  among = np.arange(tiny.ROWS) % 3 == 1
  policy = POLICY._replace(budget=None, size=6)
  active = active_loop.ActiveLearning(
    policy, program, oracle.Simulation(tiny.truth()), among
  )
  state, _ = tiny.initial(make_job('supervised'))
  pool = set(np.flatnonzero(among & (split.labels == UNLABELLED)))
  past = []
  while True:
    state, answers = active.query(state, [split], past)
    if answers is None:
      break
    past.append(answers)
  rows = [row for answers in past for row in answers['rows'][0]]
  assert sorted(rows) == sorted(pool) and len(pool) > 6


@pytest.mark.parametrize('every', [1, 2, 3])
def test_labels_are_asked_for_every_so_many_epochs(every, tmp_path):
  program, active, answers = shared('supervised', 1)
  answers.other = oracle.Simulation(tiny.truth())
  active = copy.copy(active)
  active.every = every
  active.policy = POLICY._replace(every=every)
  job = loop_lib.Job('', program, tiny.make_splits(), active)
  _, progress = fit(tmp_path, '', job=job)
  # An epoch of 24, and then of 28 labelled rows in batches of 8 has 3 steps,
  # one of 32 rows has 4. There are 16 steps, and at most three queries.
  asked = {1: [3, 6, 10], 2: [6, 12], 3: [9]}[every]
  assert [answer['step'] for answer in progress.asked] == asked


@pytest.mark.parametrize('every', [1, 2])
def test_labels_are_asked_for_every_so_many_rounds_of_a_stage(every, tmp_path):
  program, active, answers = shared('deepbass', 1)
  answers.other = oracle.Simulation(tiny.truth())
  active = copy.copy(active)
  active.every = every
  job = loop_lib.Job('', program, tiny.make_splits(), active)
  _, progress = fit(tmp_path, '', job=job)
  # The second stage has three epochs, which begin at these evaluations.
  begun = [e['step'] for e in progress.evaluations if e['step'] >= 16][:3]
  assert begun[0] == 16
  expected = begun[::every]
  assert [answer['step'] for answer in progress.asked] == expected


@pytest.mark.slow
def test_seeds_at_once_ask_for_what_seeds_apart_ask_for(tmp_path):
  _, both = fit(tmp_path / 'both', '', job=make_job('madnn', seeds=(0, 1)))
  for i in (0, 1):
    job = make_job('madnn', seeds=(i,))
    _, alone = fit(tmp_path / str(i), '', job=job)
    assert asked_rows(alone) == asked_rows(both, i)


def test_the_labelled_part_of_a_step_draws_from_new_labels_too(tmp_path):
  job = make_job('supervised')
  state, progress = fit(tmp_path, '', job=job)
  (sampler,) = rounds.samplers(job, state, progress)
  seen = {row for step in range(16, 80) for row in sampler.rows(step)}
  assert set(asked_rows(progress)) < seen


def test_the_unlabelled_part_leaves_out_images_that_have_got_a_label(tmp_path):
  split = tiny.make_splits()[0]
  labels = split.labels.copy()
  row = int(np.flatnonzero(labels < 0)[0])
  labels[row] = 1
  assert not split.grown(labels).admitted[row] and split.admitted[row]
  # Where labelled rows were among the unlabelled ones, they stay there.
  include_labelled = split._replace(admitted=np.ones(tiny.ROWS, bool))
  assert include_labelled.grown(labels).admitted.all()
