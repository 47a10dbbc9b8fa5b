"""What every method must do: one table."""

import contextlib
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ssljax import batches, checkpoint, datasets, record, train
from ssljax.core import Batch
from ssljax.program import Program

OPTIONS = train.Options(evaluate_every=3, record_every=2, batch=8)
methods = pytest.mark.parametrize('name', tiny.METHODS)


def fit(folder, name, seeds=(0,), devices=1, steps=6, options=OPTIONS, **more):
  data, mesh = tiny.make_data(devices)
  recorder = record.Recorder(folder)
  checkpoints = checkpoint.Checkpoints(folder / 'checkpoints')
  job = tiny.make_job(name, steps, seeds, **more)
  with contextlib.closing(checkpoints), contextlib.closing(recorder):
    return train.fit(job, data, options, recorder, checkpoints, mesh)


def comparable(state):
  return state.replace(key=jax.random.key_data(state.key))


def step_once(name):
  data, mesh = tiny.make_data()
  program = Program(tiny.make_job(name), data, mesh, 8)
  before = program.initial()
  rows = program.rows(0, (0, 1))
  pixels, rows = next(iter(data.train.batches(lambda _: rows, [0])))
  return program, before, (pixels, program.fitted), rows


@methods
def test_structure_shapes_and_dtypes_are_stable_and_finite(name):
  program, before, source, rows = step_once(name)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), before)
  after, metrics = program.steps[0](before, source, rows)
  chex.assert_trees_all_equal(
    shapes, jax.tree.map(lambda x: (x.shape, x.dtype), after)
  )
  chex.assert_tree_all_finite((after.params, after.memory, metrics))
  assert int(after.step[0]) == 1


@methods
def test_the_loss_touches_only_stats_and_memory(name):
  program, before, source, rows = step_once(name)
  state = jax.tree.map(lambda x: x[0], before)
  image = program.plain(source, rows[0], state.key)
  batch = jax.tree.map(
    jnp.asarray, (rows[0], image, jnp.arange(rows.shape[1]) < 8)
  )
  batch = Batch(*batch)
  loss = program.job.method.stages[0].loss
  _, (after, metrics) = jax.jit(loss)(state.params, state, batch, state.key)
  for field in ('step', 'params', 'opt_state', 'labels'):
    chex.assert_trees_all_equal(getattr(after, field), getattr(state, field))
  assert jnp.array_equal(
    jax.random.key_data(after.key), jax.random.key_data(state.key)
  )
  chex.assert_tree_shape_prefix(metrics, ())


@methods
def test_each_stage_compiles_once(name, tmp_path):
  data, mesh = tiny.make_data()
  program = Program(tiny.make_job(name, 40), data, mesh, 8)
  state = program.initial()
  # Ten epochs: rows change, shapes do not.
  calls = [(i, i + 1) for i in range(40)]
  fetched = data.train.batches(lambda call: program.rows(0, call), calls)
  for pixels, rows in fetched:
    state, _ = program.steps[0](state, (pixels, program.fitted), rows)
  assert program.steps[0]._cache_size() == 1


@methods
def test_hidden_truth_is_nowhere_in_the_state(name):
  _, state, _, _ = step_once(name)
  _, truth = tiny.images()
  given = state.labels[0] >= 0
  np.testing.assert_array_equal(state.labels[0][given], truth[given])
  assert given.sum() == 24
  for leaf in jax.tree.leaves(comparable(state)):
    assert not np.array_equal(np.ravel(leaf), truth)


@methods
def test_seeds_vmapped_equal_seeds_apart(name, tmp_path):
  together, progress = fit(tmp_path / 'both', name, seeds=(0, 1))
  for i, seed in enumerate((0, 1)):
    alone, single = fit(tmp_path / str(seed), name, seeds=(seed,))
    one = jax.tree.map(lambda x: x[i : i + 1], together)  # noqa: B023
    chex.assert_trees_all_close(
      comparable(one), comparable(alone), rtol=1e-4, atol=1e-5
    )
    for a, b in zip(progress.evaluations, single.evaluations, strict=True):
      assert a['last'][i] == b['last'][0]


@methods
def test_split_over_eight_devices_equals_whole(name, tmp_path):
  whole, _ = fit(tmp_path / '1', name)
  split, _ = fit(tmp_path / '8', name, devices=8)
  assert len(split.params['Dense_0']['kernel'].sharding.device_set) == 8
  chex.assert_trees_all_close(
    comparable(split), comparable(whole), rtol=1e-4, atol=1e-5
  )


@methods
def test_many_steps_per_call_equal_one(name, tmp_path):
  one, _ = fit(tmp_path / '1', name, steps=7)
  options = OPTIONS._replace(steps_per_call=2)
  many, _ = fit(tmp_path / '2', name, steps=7, options=options)
  chex.assert_trees_all_close(
    comparable(one), comparable(many), rtol=1e-5, atol=1e-6
  )


class StoppedError(Exception):
  """Stands in for whatever ends a process."""


@methods
def test_interrupted_and_resumed_equals_uninterrupted(
  name, tmp_path, monkeypatch
):
  always = OPTIONS._replace(checkpoint_seconds=0.0)
  whole, progress = fit(tmp_path / 'whole', name, options=always)

  real = train._Loop.evaluate

  def evaluate(self, stage):
    if self.progress.step == 6 and not (tmp_path / 'stopped').exists():
      (tmp_path / 'stopped').touch()
      self.checkpoints.wait()
      raise StoppedError
    real(self, stage)

  monkeypatch.setattr(train._Loop, 'evaluate', evaluate)
  with pytest.raises(StoppedError):
    fit(tmp_path / 'parts', name, options=always)
  resumed, again = fit(tmp_path / 'parts', name, options=always)
  chex.assert_trees_all_equal(comparable(resumed), comparable(whole))
  assert list(again.evaluations) == list(progress.evaluations)
  assert lines(tmp_path / 'parts') == lines(tmp_path / 'whole')


def lines(folder):
  found = []
  for line in (folder / 'metrics.jsonl').read_text().splitlines():
    values = json.loads(line)
    found.append({k: v for k, v in values.items() if k not in record.TIMING})
  return found


@methods
def test_the_stream_feed_trains_like_the_resident_one(name, tmp_path):
  def streamed(images, place):
    source = datasets.Source(
      np.zeros(len(images), np.int32),
      images.shape[1:],
      lambda rows: images[rows],
    )
    return batches.stream(source, place, threads=2)

  states = []
  for make_feed in (batches.resident, streamed):
    data, mesh = tiny.make_data(1, make_feed)
    program = Program(tiny.make_job(name, seeds=(0, 1)), data, mesh, 8)
    state = program.initial()
    calls = [(i, i + 1) for i in range(4)]
    rows_of = lambda call: program.rows(0, call)  # noqa: B023
    for pixels, rows in data.train.batches(rows_of, calls):
      state, _ = program.steps[0](state, (pixels, program.fitted), rows)
    errors = program.evaluate(state)
    states.append((comparable(state), errors['test']))
  chex.assert_trees_all_close(states[0][0], states[1][0], rtol=1e-5, atol=1e-6)
  assert states[0][1] == states[1][1]


@methods
def test_training_learns(name, tmp_path):
  # Three brightnesses with 8 labels each: chance is 67 % error.
  tx = optax.sgd(0.1, 0.9)
  options = OPTIONS._replace(evaluate_every=150, record_every=150)
  _, progress = fit(tmp_path, name, steps=150, tx=tx, options=options)
  assert progress.evaluations[-1]['last'][0] <= 15
