import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
from typing import Any, NamedTuple

import chex
from contract_test import OPTIONS, comparable, fit, fit_until, lines
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tiny

from ssljax.core import (
  Averaging,
  BatchSpec,
  Method,
  Readiness,
  Stage,
  TrainState,
)
from ssljax.data import feeds
from ssljax.distributed import preemption
from ssljax.distributed.placement import Placer
from ssljax.distributed.preemption import PreemptedError
from ssljax.errors import InputError
from ssljax.training import (
  checkpoint,
  evaluate,
  loop,
  metrics_writer,
  rounds,
)
from ssljax.training.compiled import Program


def test_stops_are_multiples_of_each_period_and_the_end():
  assert list(rounds.stops(0, 10, [4, 5])) == [4, 5, 8, 10]
  # The same stops follow when a run resumes.
  assert list(rounds.stops(5, 10, [4, 5])) == [8, 10]
  assert list(rounds.stops(0, 3, [10])) == [3]


def test_calls_cover_a_span_without_overlap():
  assert list(rounds.calls(3, 10, 3)) == [(3, 6), (6, 9), (9, 10)]
  assert list(rounds.calls(0, 2, 1)) == [(0, 1), (1, 2)]


def test_checkpoints_are_permanent_at_ends_of_stages_and_every_so_often():
  stages = [tiny.METHODS['supervised'](lambda *_: None, n) for n in (5, 4)]
  stages = [m.stages[0]._replace(name=str(m.stages[0].steps)) for m in stages]
  method = Method(name='two', stages=tuple(stages))
  assert loop.permanent(method, True, None) == [5, 9]
  # Every second step of a stage: 2 and 4, then 5 + 2 and 5 + 4.
  assert loop.permanent(method, False, 2) == [2, 4, 7, 9]
  assert loop.permanent(method, False, 6) == []


def test_a_permanent_checkpoint_is_saved_at_its_step(tmp_path):
  options = OPTIONS._replace(keep_every=1, record_every=6, evaluate_every=6)
  fit(tmp_path, 'supervised', steps=3, options=options)
  # `Checkpoints` itself keeps only the newest two.
  saved = {path.name for path in (tmp_path / 'checkpoints').iterdir()}
  assert {'2', '3'} <= saved and '1' not in saved


def test_every_term_of_the_loss_is_recorded_for_every_seed(tmp_path):
  fit(tmp_path, 'madnn', seeds=(3, 4))
  measured = [m for m in lines(tmp_path) if 'loss' in m]
  assert [(m['step'], m['seed']) for m in measured] == [
    (step, seed) for step in (2, 3, 4, 6) for seed in (3, 4)
  ]
  for m in measured:
    total = m['cross_entropy'] + m['model_entropy'] + m['divergence']
    assert m['loss'] == pytest.approx(total, rel=1e-5)
  tested = [m for m in lines(tmp_path) if 'test_error_last' in m]
  assert [m['step'] for m in tested] == [3, 3, 6, 6]
  assert list(tmp_path.glob('events/madnn/seed-3/*tfevents*'))


def diverging(after):
  """An optimiser whose update number `after` is infinite."""
  return optax.sgd(lambda count: jnp.where(count < after - 1, 0.1, jnp.inf))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
  # Stops are at 2, 3, 4, 6: the fifth loss is seen at the stop after it.
  options = OPTIONS._replace(checkpoint_seconds=0.0)
  with pytest.raises(loop.DivergedError, match=r'madnn is nan at step 6 '):
    fit(tmp_path, 'madnn', steps=12, tx=diverging(5), options=options)
  assert (tmp_path / 'checkpoints' / '4').is_dir()
  assert not (tmp_path / 'checkpoints' / '6').exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
  # The losses up to step 4 are finite, the weights after it are not.
  options = OPTIONS._replace(checkpoint_seconds=0.0)
  with pytest.raises(loop.DivergedError, match=r'weights .* after step 4:'):
    fit(tmp_path, 'madnn', steps=12, tx=diverging(4), options=options)
  assert (tmp_path / 'checkpoints' / '3').is_dir()
  assert not (tmp_path / 'checkpoints' / '4').exists()


@pytest.mark.parametrize('where', ['params', 'memory'])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_state_with_a_single_number_that_is_not_finite_is_noticed(
  where, value
):
  state, _ = tiny.initial(tiny.make_job('madnn'))
  assert checkpoint.examine(state)[0]
  leaves, tree = jax.tree.flatten(getattr(state, where))
  last = leaves[-1]
  leaves[-1] = last.at[(-1,) * last.ndim].set(value)
  changed = state.replace(**{where: jax.tree.unflatten(tree, leaves)})
  assert not checkpoint.examine(changed)[0]


def test_the_same_weights_give_the_error_counted_by_hand(tmp_path):
  state, progress = fit(tmp_path, 'supervised')
  weights = jax.tree.map(lambda x: x[0], (state.params, state.stats))
  assert progress.evaluations[-1]['last'] == [error_by_hand(*weights)]


def with_method(job, change):
  """A job of the changed method, on the tiny data."""
  data, mesh = tiny.make_data()
  old = job.program
  program = Program(
    change(old.method), tiny.NET, data, mesh, seeds=old.seeds, batch=8
  )
  return job._replace(program=program)


def averaging(decay, statistics=False):
  """Changes a method to one that averages its weights."""
  settings = Averaging(decay, statistics)
  return lambda method: method._replace(averaging=settings)


def test_averaged_weights_are_evaluated_beside_the_trained_ones(tmp_path):
  # Decay 0: the average is the last weights themselves.
  job = with_method(tiny.make_job('madnn', steps=30), averaging(0.0))
  _, progress = fit(tmp_path, 'madnn', job=job)
  final = progress.evaluations[-1]
  assert final['averaged'] == final['last']


def test_averaged_statistics_are_evaluated_where_they_are_averaged(tmp_path):
  job = with_method(tiny.make_job('madnn', steps=30), averaging(0.9, True))
  state, progress = fit(tmp_path, 'madnn', job=job)
  average = jax.tree.map(lambda x: x[0], state.average)
  last = jax.tree.map(lambda x: x[0], (state.params, state.stats))
  assert int(average.count) == 30
  for averaged, trained in zip(
    jax.tree.leaves((average.params, average.stats)),
    jax.tree.leaves(last),
    strict=True,
  ):
    assert not np.array_equal(averaged, trained)
  assert progress.evaluations[-1]['averaged'] == [
    error_by_hand(average.params, average.stats)
  ]


def test_averaged_and_trained_weights_each_give_their_own_predictions():
  job = with_method(tiny.make_job('supervised'), averaging(0.9))
  state, _ = tiny.initial(job)
  state = jax.tree.map(lambda x: x[0], state)

  def sure_of(label, params):
    bias = params['Dense_1']['bias'].at[label].set(1e6)
    return params | {'Dense_1': params['Dense_1'] | {'bias': bias}}

  average = state.average.replace(params=sure_of(2, state.average.params))
  state = state.replace(params=sure_of(1, state.params), average=average)
  predict = evaluate.predictor(tiny.NET, job.program.method)
  found = predict(state, jnp.ones([2, 4, 4, 1]), jax.random.key(0))
  assert found['last'].tolist() == [1, 1]
  assert found['averaged'].tolist() == [2, 2]


def error_by_hand(params, stats):
  """Error in percent on the test images."""
  test, truth = tiny.images(1, 20)
  logits = tiny.NET.infer(params, stats, test.astype(np.float32) / 255).logits
  wrong = sum(int(np.argmax(logits[i])) != truth[i] for i in range(20))
  return 100 * wrong / 20


def errors_of(program, state, split):
  return evaluate.errors(program.predictions(state, split))


def test_without_test_images_there_are_errors_on_validation_images_only():
  job = tiny.make_job('supervised', validation=9)
  data, mesh = tiny.make_data()
  none = feeds.resident(np.zeros([0, 4, 4, 1], np.uint8), Placer(mesh))
  data = data._replace(test=none, truth=np.zeros(0, np.int32))
  program = Program(job.program.method, tiny.NET, data, mesh, batch=8)
  state, _ = tiny.initial(job._replace(program=program))
  split = job.splits[0]
  assert set(errors_of(program, state, split)) == {'validation'}
  nothing = split.validation[:0]
  assert errors_of(program, state, split._replace(validation=nothing)) == {}


def test_validation_images_are_evaluated_too(tmp_path):
  _, progress = fit(tmp_path, 'supervised', validation=9)
  tested = [m for m in lines(tmp_path) if 'test_error_last' in m]
  assert [e['validation_last'] for e in progress.evaluations] == [
    [m['validation_error_last']] for m in tested
  ]
  # The error on nine images is a multiple of 1/9.
  for m in tested:
    share = m['validation_error_last'] * 9 / 100
    assert share == pytest.approx(round(share), abs=1e-6)


@pytest.mark.parametrize('part', ['validation', 'test'])
def test_an_error_is_of_the_rows_that_are_held_out(part):
  job = tiny.make_job('supervised', validation=9)
  state, _ = tiny.initial(job)
  images, _ = tiny.images()
  rows = job.splits[0].validation
  split = job.splits[0]._replace(validation=rows[:0])._replace(**{part: rows})
  params, stats = jax.tree.map(lambda x: x[0], (state.params, state.stats))

  logits = tiny.NET.infer(params, stats, images / np.float32(255)).logits
  predicted = np.asarray(logits).argmax(-1).astype(np.int32)
  # By a truth made for this test the network is right about the rows that are
  # held out, except one of nine. That of the first nine rows would not do.
  truth = predicted.copy()
  assert (truth[rows] != predicted[:9]).any()
  truth[rows[4]] = (truth[rows[4]] + 1) % tiny.CLASSES
  program = job.program
  none = feeds.resident(np.zeros([0, 4, 4, 1], np.uint8), Placer(program.mesh))
  data = program.data._replace(train_truth=truth, test=none)
  program = Program(program.method, tiny.NET, data, program.mesh, batch=8)
  (found,) = errors_of(program, state, split)[part]['last']
  assert found == pytest.approx(100 / 9)


def test_a_summary_takes_the_last_step_and_the_median_of_five():
  errors = [9.0, 5.0, 1.0, 2.0, 8.0, 3.0]
  evaluations = [
    {'step': i, 'last': [e, 0.0], 'averaged': [e + 1, 1.0]}
    for i, e in enumerate(errors)
  ]
  assert evaluate.summarize(evaluations) == {
    'last': [3.0, 0.0],
    'median_last': [3.0, 0.0],  # of 5 1 2 8 3
    'averaged': [4.0, 1.0],
  }
  # The least error over training is a choice made on the test set: optional.
  summary = evaluate.summarize(evaluations, minimum=True)
  assert summary['minimum'] == [1.0, 0.0]


def test_a_summary_of_validation_images_is_empty_without_them():
  evaluations = [{'step': 1, 'last': [3.0], 'validation_last': [4.0]}]
  on_validation = evaluate.summarize(evaluations, prefix='validation_')
  assert on_validation == {'last': [4.0], 'median_last': [4.0]}
  assert evaluate.summarize([{'step': 1, 'validation_last': [4.0]}]) == {}


def test_the_error_after_each_stage_is_that_of_its_last_step():
  stage = tiny.make_job('supervised').program.method.stages[0]
  stages = (
    stage._replace(name='a', steps=2),
    stage._replace(name='b', steps=3),
  )
  evaluations = [{'step': i, 'last': [float(i)]} for i in (1, 2, 4, 5)]
  method = Method(name='two', stages=stages)
  assert evaluate.by_stage(evaluations, loop.stage_ends(method)) == {
    'a': [2.0],
    'b': [5.0],
  }


def with_update(**more):
  """Adds up in the memory what the updates between epochs have seen."""

  def per_example(state, image, key):
    return {'brightness': image.mean((1, 2, 3))}

  def epoch_update(state, mapped):
    return state.replace(memory=state.memory + mapped['brightness'])

  def change(method):
    stage = method.stages[0]._replace(
      per_example=per_example, epoch_update=epoch_update
    )
    return method._replace(
      stages=(stage, stage._replace(name='again', every=2)),
      init=lambda key, params, stats, spec: jnp.zeros(spec.rows),
    )

  return with_method(tiny.make_job('supervised', **more), change)


def test_an_update_sees_all_images_in_order_every_so_many_epochs(tmp_path):
  job = with_update(steps=12)  # epochs of 3 steps
  state, progress = fit(tmp_path, 'supervised', job=job)
  # An update before each of four epochs, then before every second of four.
  images, _ = tiny.images()
  brightness = images.mean((1, 2, 3)) / 255
  memory = state.memory[0, : tiny.ROWS]  # the rest is padding
  np.testing.assert_allclose(memory, 6 * brightness, rtol=1e-5)
  assert progress.step == 24 == int(state.step[0])


def test_optimiser_state_is_made_anew_on_entering_a_stage():
  job = with_update(tx=optax.sgd(lambda count: 0.1))
  state, (source, rows) = tiny.initial(job)
  state, _ = job.program.steps[0](state, source, rows, np.int32(0))
  get = optax.tree_utils.tree_get
  count = lambda state: int(get(state.opt_state, 'count')[0])
  assert count(state) == 1
  assert count(job.program.init_stage[1](state)) == 0


def two_stages(**more):
  """Stages whose optimisers carry different state, and an average."""

  def change(method):
    stage = method.stages[0]
    other = stage._replace(name='plain', tx=optax.sgd(lambda count: 0.05))
    return averaging(0.9, True)(method._replace(stages=(stage, other)))

  job = tiny.make_job('madnn', tx=optax.sgd(0.1, 0.9), **more)
  return with_method(job, change)


def counting(**more):
  """Three stages whose metrics have `batch.step`; the second has two epochs."""

  def count(params, state, batch, key):
    loss, (state, metrics) = plain(params, state, batch, key)
    at = jnp.asarray(batch.step, jnp.float32)
    return loss, (state, metrics | {'at': at})

  job = tiny.make_job('supervised', **more)
  plain = job.program.method.stages[0].loss

  def change(method):
    first = method.stages[0]._replace(loss=count)
    epochs = first._replace(
      name='epochs',
      steps=0,
      epochs=2,
      batch_spec=BatchSpec(0, 8, include_labelled=True),
      multiplicity=lambda state: (state.labels >= 0).astype(jnp.int32),
    )
    last = first._replace(name='last', keep_optimizer=True)
    return method._replace(stages=(first, epochs, last))

  return with_method(job, change)


@pytest.mark.parametrize('per_call', [1, 2])
def test_every_stage_counts_its_own_steps_also_when_it_resumes(
  tmp_path, monkeypatch, per_call
):
  job = counting(steps=4, seeds=(0, 1))
  options = loop.Options(
    evaluate_every=2,
    record_every=per_call,
    checkpoint_seconds=0.0,
    steps_per_call=per_call,
  )
  for at in (2, 7, 12):  # in each stage
    fit_until(at, monkeypatch, tmp_path, '', options, job)
  _, progress = fit(tmp_path, '', options, job)
  # 24 labelled rows are three steps of eight, twice; before and after: four.
  assert progress.ends == (4, 10, 14)
  starts = {'supervised': 0, 'epochs': 4, 'last': 10}
  found = [m for m in lines(tmp_path) if 'at' in m]
  assert len({m['step'] for m in found}) == (14 if per_call == 1 else 8)
  for m in found:
    assert m['at'] == m['step'] - 1 - starts[m['stage']]


# R2-D2's stages begin after 6, 12 and 14 steps; all but the first and the last
# begin with a prediction of the pseudo-logits.
@pytest.mark.parametrize(
  ('make', 'stops'),
  [
    (two_stages, (3, 6, 9)),
    (lambda: tiny.make_job('r2d2'), (6, 12, 14)),
    (lambda: tiny.make_job('r2d2'), (3, 9, 13, 15)),
  ],
)
def test_a_run_resumes_in_any_stage_bit_for_bit(
  tmp_path, monkeypatch, make, stops
):
  often = OPTIONS._replace(checkpoint_seconds=0.0, record_every=1)
  job = make()
  run = lambda folder: fit(tmp_path / folder, job.name, often, job)
  whole, _ = run('whole')
  save = loop._Loop.save

  for at in stops:

    def stop(self, at=at):
      save(self)
      if self.progress.step == at:
        self.snapshots.checkpoints.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
      patch.setattr(loop._Loop, 'save', stop)
      with pytest.raises(KeyboardInterrupt):
        run('parts')
  resumed, progress = run('parts')
  assert progress.step == loop.total_steps(job.program.method)
  assert not list((tmp_path / 'parts/checkpoints').glob('damaged-*'))
  chex.assert_trees_all_equal(comparable(resumed), comparable(whole))
  assert lines(tmp_path / 'parts') == lines(tmp_path / 'whole')


class PreemptedAfter:
  """A notice of preemption that comes after so many checks.

  The loop checks after every call, after every stop, and before every batch of
  a pass over the data set.
  """

  def __init__(self, checks):
    self.checks = checks

  def __call__(self):
    self.checks -= 1
    return self.checks < 0


@pytest.mark.parametrize(
  # `checks` are so many that the run is in its second pass over the data set,
  # which comes after step `second`.
  ('name', 'checks', 'second'),
  [('r2d2', 20, 12), ('deepbass', 28, 17)],
)
def test_a_preempted_run_loses_no_step_and_ends_the_same(
  tmp_path, name, checks, second
):
  job = tiny.make_job(name)
  run = lambda folder, options: fit(tmp_path / folder, name, options, job)
  whole, _ = run('whole', OPTIONS)
  steps, passes = [], set()
  for later in (0, 1, 2, 3, 5, checks):  # in steps, between them, in passes
    notice = OPTIONS._replace(preempted=PreemptedAfter(later))
    with pytest.raises(
      PreemptedError, match=f'{name}.*the same command to resume'
    ) as e:
      run('parts', notice)
    steps.append(int(re.search(r'saved step (\d+)', str(e.value))[1]))
    saved = {p.name for p in (tmp_path / 'parts/checkpoints').iterdir()}
    assert str(steps[-1]) in saved
    if any(entry.name == 'map_rows' for entry in e.traceback):
      passes.add(steps[-1])
  assert steps[0] == 1 and (np.diff(steps[:4]) > 0).all()
  assert steps == sorted(steps)
  assert passes == {6, second}
  resumed, _ = run('parts', OPTIONS)
  chex.assert_trees_all_equal(comparable(resumed), comparable(whole))
  assert lines(tmp_path / 'parts') == lines(tmp_path / 'whole')


def test_the_second_signal_does_what_it_did_before():
  got = []
  before = signal.signal(signal.SIGTERM, lambda *_: got.append('before'))
  try:
    with preemption.Notice().listen() as notice:
      assert not notice()
      os.kill(os.getpid(), signal.SIGTERM)
      assert notice() and not got
      os.kill(os.getpid(), signal.SIGTERM)
      assert got == ['before']
    os.kill(os.getpid(), signal.SIGTERM)
    assert got == ['before'] * 2
  finally:
    signal.signal(signal.SIGTERM, before)


def test_stopped_before_its_first_checkpoint_a_job_leaves_no_trace(
  tmp_path, monkeypatch
):
  fit(tmp_path / 'whole', 'madnn')

  def stop(self):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(loop._Loop, 'save', stop)
    with pytest.raises(KeyboardInterrupt):
      fit(tmp_path / 'parts', 'madnn')
  with open(tmp_path / 'parts/metrics.jsonl', 'a') as file:
    file.write('{"step": 7, "lo')
  fit(tmp_path / 'parts', 'madnn')
  assert lines(tmp_path / 'parts') == lines(tmp_path / 'whole')


def damage(path, how):
  content = path.read_bytes()
  if how == 'truncated':
    path.write_bytes(content[: len(content) // 2])
  elif how == 'flipped':
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 0xFF])
    path.write_bytes(content[:middle] + flipped + content[middle + 1 :])
  else:
    path.unlink()


@pytest.mark.parametrize('how', ['truncated', 'flipped', 'missing'])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, how, caplog):
  always = OPTIONS._replace(checkpoint_seconds=0.0)
  whole, _ = fit(tmp_path, 'madnn', options=always)
  metrics = lines(tmp_path)
  newest = tmp_path / 'checkpoints' / '6'
  for path in newest.rglob('d/*'):  # all files that hold arrays
    damage(path, how)
  again, progress = fit(tmp_path, 'madnn', options=always)
  assert 'step 6 cannot be read' in caplog.text
  assert newest.with_name('damaged-6').is_dir()
  assert progress.step == 6
  chex.assert_trees_all_equal(comparable(again), comparable(whole))
  assert lines(tmp_path) == metrics


def swap_rows(x):
  return x.at[0, :2].set(x[0, 1::-1])


@pytest.mark.parametrize(
  ('field', 'change'),
  [
    ('params', lambda x: x.at[(0,) * x.ndim].add(1e-30)),
    ('opt_state', lambda x: x.at[(0,) * x.ndim].add(1e-30)),
    ('memory', swap_rows),
    ('labels', swap_rows),
    ('step', lambda x: x + 1),
  ],
)
def test_arrays_that_are_not_those_of_the_checksum_are_damage(
  tmp_path, field, change
):
  state, _ = tiny.initial(tiny.make_job('madnn'))
  # The first two rows of the tables must differ to be swapped.
  keys = state.memory.keys.at[0, 0].set(1.0)
  labels = state.labels.at[0, :2].set(jnp.array([0, 1]))
  memory = state.memory.replace(keys=keys)
  state = state.replace(memory=memory, labels=labels)
  leaves, tree = jax.tree.flatten(getattr(state, field))
  leaves[0] = change(leaves[0])
  changed = state.replace(**{field: jax.tree.unflatten(tree, leaves)})
  like = checkpoint.abstract(state, state.step.sharding)
  progress = {'checksum': checkpoint.examine(state)[1]}
  saved = checkpoint.Checkpoints(tmp_path)
  with contextlib.closing(saved):
    saved.save(1, state, progress)
    saved.wait()
    restored, _ = saved.restore(lambda progress: like)
    chex.assert_trees_all_equal(comparable(restored), comparable(state))
    saved.save(2, changed, progress)
    saved.wait()
    _, failed = saved._attempt(2, lambda progress: like)
  assert isinstance(failed, checkpoint.DamagedError)
  assert 'does not match its checksum' in str(failed)


# TensorStore's background reads complain about what they could not read.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('how', ['truncated', 'flipped', 'missing'])
def test_no_damaged_file_goes_unnoticed(tmp_path, how):
  state, _ = fit(tmp_path / 'run', 'madnn')
  saved = tmp_path / 'run' / 'checkpoints'
  like = checkpoint.abstract(state, state.step.sharding)
  files = [p for p in saved.rglob('*') if p.is_file()]
  noticed = 0
  for number, path in enumerate(files):
    copy = tmp_path / f'{how}-{number}'
    shutil.copytree(saved, copy)
    damage(copy / path.relative_to(saved), how)
    try:
      with contextlib.closing(checkpoint.Checkpoints(copy)) as checkpoints:
        restored = checkpoints.restore(lambda progress: like)
    except InputError as error:
      assert 'workdir: no checkpoint' in str(error)
      noticed += 1
    else:  # Nothing that mattered was in that file.
      assert restored is not None
      chex.assert_trees_all_equal(comparable(restored[0]), comparable(state))
      assert restored[1]['step'] == 6
  assert noticed > 0


class AverageState(NamedTuple):
  """The average of version 0.1, the last element of the optimiser's state."""

  count: jax.Array
  average: Any


@struct.dataclass
class StateOf01:
  """The state of version 0.1."""

  step: jax.Array
  key: jax.Array
  params: Any
  stats: Any
  opt_state: Any
  labels: jax.Array
  memory: Any


def save_as_0_1(self, step, state, progress, damaged=False):
  """Stands in for `Checkpoints.save`: writes the layout of version 0.1."""
  opt_state = state.opt_state
  if state.average != ():
    last = AverageState(state.average.count, state.average.params)
    opt_state = (*opt_state, last)
  old = StateOf01(
    step=state.step,
    key=jax.random.key_data(state.key),
    params=state.params,
    stats=state.stats,
    opt_state=opt_state,
    labels=state.labels,
    memory=state.memory,
  )
  sums = [checkpoint._sum(x, i) for i, x in enumerate(jax.tree.leaves(old))]
  checksum = sum(map(int, sums)) % 2**32 + damaged
  self._manager.save(
    step,
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(old),
      progress=ocp.args.JsonSave(progress | {'checksum': checksum}),
    ),
  )


@pytest.mark.parametrize('averages', [False, True])
def test_a_checkpoint_of_version_0_1_is_restored(
  tmp_path, monkeypatch, averages
):
  always = OPTIONS._replace(checkpoint_seconds=0.0)
  job = tiny.make_job('madnn', tx=optax.chain(optax.sgd(0.1, 0.9)))
  job = with_method(job, averaging(0.9) if averages else lambda method: method)
  whole, _ = fit(tmp_path / 'whole', 'madnn', always, job)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, 'save', save_as_0_1)
    fit_until(6, patch, tmp_path / 'old', 'madnn', always, job)
  resumed, progress = fit(tmp_path / 'old', 'madnn', always, job)
  assert progress.evaluations[0]['step'] < 6 == progress.step
  assert not list((tmp_path / 'old/checkpoints').glob('damaged-*'))
  assert (resumed.average != ()) == averages
  chex.assert_trees_all_equal(comparable(resumed), comparable(whole))
  assert lines(tmp_path / 'old') == lines(tmp_path / 'whole')


def test_a_damaged_checkpoint_of_version_0_1_is_noticed(tmp_path, monkeypatch):
  always = OPTIONS._replace(checkpoint_seconds=0.0)
  job = tiny.make_job('madnn', tx=optax.chain(optax.sgd(0.1, 0.9)))
  job = with_method(job, averaging(0.9))
  save = functools.partialmethod(save_as_0_1, damaged=True)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, 'save', save)
    fit_until(6, patch, tmp_path, 'madnn', always, job)
  with pytest.raises(InputError, match=r'no checkpoint in .* can be read'):
    fit(tmp_path, 'madnn', always, job)


def test_a_checkpoint_of_another_split_is_refused(tmp_path):
  fit(tmp_path, 'madnn', seeds=(0,))
  with pytest.raises(InputError, match=r'workdir.*another label split'):
    fit(tmp_path, 'madnn', seeds=(1,))


def test_metrics_survive_a_write_that_was_cut_short(tmp_path):
  writer = metrics_writer.MetricsWriter(tmp_path)
  writer.write('job', {'step': 1, 'seed': 0, 'loss': 1.0})
  length = writer.flush()
  writer.write('job', {'step': 2, 'seed': 0, 'loss': 2.0})
  writer.close()
  with open(tmp_path / 'metrics.jsonl', 'ab') as file:
    file.write(b'{"step": 3, "lo')
  writer = metrics_writer.MetricsWriter(tmp_path)
  writer.rewind(length)
  writer.write('job', {'step': 2, 'seed': 0, 'loss': 5.0})
  writer.close()
  read = [
    json.loads(line)
    for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()
  ]
  assert [(m['step'], m['loss']) for m in read] == [(1, 1.0), (2, 5.0)]


def test_the_fields_of_the_state_keep_their_order():
  # It numbers the arrays in the checksum of a checkpoint.
  before, after = ('step', 'key', 'params', 'stats'), ('labels', 'memory')
  fields = *before, 'opt_state', 'average', *after, 'predicted'
  assert (*TrainState.__dataclass_fields__,) == (*fields, 'images')
  values = {name: number for number, name in enumerate(fields)}
  leaves = jax.tree.leaves(TrainState(**values, images=61))
  assert leaves == list(values.values())  # the number of images is no array
  assert Stage._field_defaults['every'] == 1


def watched(readiness, steps=4, **more):
  """A job whose only stage has a condition."""
  change = lambda method: method._replace(
    stages=(method.stages[0]._replace(readiness=readiness),)
  )
  return with_method(tiny.make_job('supervised', steps=steps, **more), change)


def test_a_stage_that_is_not_ready_warns_by_seed(tmp_path, monkeypatch):
  # The label tables of the two splits differ; that of seed 1 is condemned.
  job = tiny.make_job('supervised', steps=4, seeds=(0, 1))
  first = [int(split.labels[:20].sum()) for split in job.splits]
  assert first[0] != first[1]
  wrong = np.argmax(first)
  condition = Readiness(
    'first_labels',
    'raise `steps`',
    most=min(first) + 0.5,
    measure=lambda state: jnp.sum(state.labels[:20]),
  )
  job = watched(condition, seeds=(0, 1))
  often = OPTIONS._replace(checkpoint_seconds=0.0)
  fit_until(4, monkeypatch, tmp_path, '', often, job)
  _, progress = fit(tmp_path, '', often, job)  # resumes after the stage
  (text,) = progress.warnings
  assert text.startswith(f'seed {wrong}: stage supervised ends with first ')
  assert f'labels {first[wrong]}' in text and 'raise steps' in text
  found = {
    m['seed']: m['first_labels'] for m in lines(tmp_path) if 'first_labels' in m
  }
  assert found == {0: first[0], 1: first[1]}


def test_the_default_condition_is_on_the_mean_loss_since_the_last_stop(
  tmp_path,
):
  never = watched(Readiness('mean_loss', 'no', most=0.01), steps=6)
  _, progress = fit(tmp_path / 'a', '', OPTIONS, never)
  losses = [m['loss'] for m in lines(tmp_path / 'a') if 'loss' in m]
  (mean,) = [m['mean_loss'] for m in lines(tmp_path / 'a') if 'mean_loss' in m]
  # Steps 5 and 6 are one span, whose line has the loss of step 6.
  assert len(progress.warnings) == 1 and mean != losses[-1]
  each = OPTIONS._replace(record_every=1)
  fit(tmp_path / 'b', '', each, never)
  losses = [m['loss'] for m in lines(tmp_path / 'b') if 'loss' in m]
  assert mean == pytest.approx(np.mean(losses[4:]), rel=1e-5)
  always = watched(Readiness('mean_loss', 'no', least=0.0), steps=6)
  _, progress = fit(tmp_path / 'c', '', OPTIONS, always)
  assert progress.warnings == ()
  assert Readiness('x', 'no', least=1.0).is_met(math.nan)


def test_an_interruption_does_not_change_the_mean_loss(tmp_path):
  # Steps 5 and 6 are the last span; the run is interrupted between them.
  job = watched(Readiness('mean_loss', 'no', most=0.01), steps=6, seeds=(0, 1))
  _, whole = fit(tmp_path / 'whole', '', OPTIONS, job)
  for checks in range(20):
    notice = OPTIONS._replace(preempted=PreemptedAfter(checks))
    with pytest.raises(PreemptedError, match='saved step') as stopped:
      fit(tmp_path / f'{checks}', '', notice, job)
    if 'saved step 5' in str(stopped.value):
      break
  _, progress = fit(tmp_path / f'{checks}', '', OPTIONS, job)
  means = lambda folder: [m for m in lines(folder) if 'mean_loss' in m]
  assert means(tmp_path / f'{checks}') == means(tmp_path / 'whole')
  assert progress.warnings == whole.warnings and len(whole.warnings) == 2


@pytest.mark.parametrize(
  ('stage', 'step', 'left'),
  [(0, 0, 3 * 16 + 2 * 61 + 5 * 16), (0, 2, 16 + 202), (2, 13, 3 * 16)],
)
def test_the_remaining_images_of_a_job_count_steps_and_epochs(
  stage, step, left
):
  of = lambda **length: Stage(
    name='s', tx=None, batch_spec=BatchSpec(6, 10), loss=None, **length
  )
  method = Method(name='m', stages=(of(steps=3), of(epochs=2), of(steps=5)))
  # The second stage took 8 steps, so that the third began at 11.
  progress = loop.Progress(stage=stage, step=step, ends=(3, 11)[:stage])
  assert loop.remaining_images(method, progress, images=61) == left
  assert loop.minutes(40) == 'a minute' and loop.minutes(400) == '7 minutes'


@pytest.mark.parametrize('shown', [True, False])
def test_a_log_has_a_line_for_each_evaluation_and_no_bar(
  tmp_path, capfd, shown
):
  job = tiny.make_job('supervised', validation=9)
  _, progress = fit(
    tmp_path, 'supervised', OPTIONS._replace(progress=shown), job
  )
  said = capfd.readouterr().err.splitlines()
  assert not any('step/s' in line for line in said)
  lines_of = [line for line in said if 'test error' in line]
  assert len(lines_of) == (len(progress.evaluations) if shown else 0)
  if shown:
    last = progress.evaluations[-1]
    assert f'step {last["step"]} of ' in lines_of[-1]
    assert f'test error {last["last"][0]:.2f} %' in lines_of[-1]
    assert (
      f'validation error {last["validation_last"][0]:.2f} %' in (lines_of[-1])
    )
