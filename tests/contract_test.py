"""Requirements on every method: one table of tests."""

import contextlib
import functools
import json
import operator

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
import tiny

from ssljax.core import DEFAULT_VIEW, UNLABELLED, Batch
from ssljax.data import feeds
from ssljax.distributed import placement
from ssljax.training import (
  checkpoint,
  compiled,
  evaluate,
  loop,
  metrics_writer,
)

OPTIONS = loop.Options(evaluate_every=3, record_every=2)
FIRST = np.int32(0)  # step at which the stage begins
COMBINED = ['llp_fixmatch', 'r2d2_fixmatch']


def fit(folder, name, options=OPTIONS, job=None, **more):
  writer = metrics_writer.MetricsWriter(folder)
  checkpoints = checkpoint.Checkpoints(folder / 'checkpoints')
  job = job or tiny.make_job(name, **more)
  with contextlib.closing(checkpoints), contextlib.closing(writer):
    return loop.fit(job, options, writer, checkpoints)


@pytest.fixture(scope='module')
def whole(name, tmp_path_factory):
  """A run of a method on one device: its folder, state and progress."""
  folder = tmp_path_factory.mktemp('whole')
  return folder, *fit(folder, name)


def comparable(state):
  # The padding of sharded tables depends on the number of devices.
  some = lambda x: x[:, : tiny.ROWS] if x.ndim > 1 else x
  labels, memory = jax.tree.map(some, (state.labels, state.memory))
  key = jax.random.key_data(state.key)
  return state.replace(key=key, labels=labels, memory=memory)


def test_structure_shapes_and_dtypes_are_stable_and_finite(name):
  job = tiny.make_job(name)
  state, _ = tiny.initial(job)
  described = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
  for number, stage in enumerate(job.program.method.stages):
    state = job.program.init_stage[number](state)
    shapes = described(state)
    if stage.per_example:
      state, _ = job.program.epoch_update[number](state)
    of_stage = tiny.samplers(job, number)
    source, rows = next(tiny.sources(job, of_stage, [(0, 1)]))
    first = np.int32(number)
    state, metrics = job.program.steps[number](state, source, rows, first)
    chex.assert_trees_all_equal(shapes, described(state))
    chex.assert_tree_all_finite((state.params, state.memory, metrics))
    assert int(state.step[0]) == number + 1


def test_the_loss_touches_only_stats_and_memory(name):
  job = tiny.make_job(name)
  before, _ = tiny.initial(job)
  state = jax.tree.map(lambda x: x[0], before)

  def check(state, *args, stage):
    _, (after, metrics) = loss_of(stage, job, state, *args)
    for field in ('step', 'params', 'opt_state', 'average', 'labels', 'key'):
      leaves = lambda of: jax.tree.leaves(getattr(of, field))  # noqa: B023
      # The very same arrays: nothing has been computed.
      assert all(map(operator.is_, leaves(after), leaves(state))), field
      assert len(leaves(after)) == len(leaves(state))
    assert {x.shape for x in jax.tree.leaves(metrics)} <= {()}

  stages = job.program.method.stages
  for number in {s.loss: i for i, s in enumerate(stages)}.values():
    of_stage = tiny.samplers(job, number)
    source, rows = next(tiny.sources(job, of_stage, [(0, 1)]))
    traced = functools.partial(check, stage=stages[number])
    jax.eval_shape(traced, state, source, rows[0])  # traced, not compiled


def loss_of(stage, job, state, source, rows, batch=Batch):
  """The loss of a stage for one state and the rows of one seed."""
  read = compiled.read_views(stage, job.program.data, job.program.mesh)
  views = dict(read(source, rows, state.key, state.memory))
  given = jnp.arange(len(rows)) < stage.batch_spec.labelled
  seen = batch(rows, views.pop(DEFAULT_VIEW), given, views=views)
  return stage.loss(state.params, state, seen, state.key)


def test_each_stage_compiles_once_for_all_seeds(name):
  job = tiny.make_job(name, shared=False)
  program = job.program
  for seed in (0, 1):
    job = job._replace(splits=tiny.make_splits((seed,)))
    state, _ = tiny.initial(job)
    for number, step in enumerate(program.steps):
      state = program.init_stage[number](state)
      # Over several epochs the rows change, but the shapes do not.
      calls = [(i, i + 1) for i in range(12)]
      for source, rows in tiny.sources(job, tiny.samplers(job, number), calls):
        state, _ = step(state, source, rows, FIRST)
      if update := program.epoch_update[number]:
        state, _ = update(state)
  assert [step._cache_size() for step in program.steps] == (
    [1] * len(program.method.stages)
  )
  (initial,) = program._initials.values()
  assert initial._cache_size() == 1


def test_the_truth_of_other_rows_changes_nothing(
  name, whole, tmp_path, monkeypatch
):
  folder, known, _ = whole
  truth = tiny.truth()
  given = tiny.make_splits()[0].labels >= 0
  assert given.sum() == 24
  hidden = np.where(given, truth, (truth + 1) % tiny.CLASSES).astype(np.int32)
  # The same split, drawn from a truth that differs wherever it is hidden.
  split = tiny.make_splits()[0]
  monkeypatch.setattr(tiny, 'make_splits', lambda *args, **kwargs: [split])
  monkeypatch.setattr(tiny, 'truth', lambda: hidden)
  unknown, _ = fit(tmp_path, name, shared=False)
  chex.assert_trees_all_equal(comparable(unknown), comparable(known))
  # They serve to measure the pseudo-labels, and for nothing else.
  apart = lambda folder: [
    {k: v for k, v in line.items() if k != 'pseudo_label_accuracy'}
    for line in lines(folder)
  ]
  assert apart(folder) == apart(tmp_path)


# Methods without a target of their own for an unlabelled image.
NO_QUALITY = {
  'supervised': 'uses no unlabelled images',
  'association': 'compares an unlabelled image with a batch of labelled ones',
  'adaptation': 'as association',
}


def test_the_quality_of_pseudo_labels_trains_nothing_or_there_is_a_reason(
  name, whole, tmp_path, monkeypatch
):
  job = tiny.make_job(name)
  folder, known, progress = whole
  quality = progress.evaluations[-1].get('pseudo_labels')
  has_quality = job.program.method.quality is not None
  assert has_quality == (quality is not None) == (name not in NO_QUALITY)
  if has_quality:
    assert set(quality) == {'coverage', 'accuracy', 'balance'}
    for values in quality.values():
      (value,) = values
      assert value is None or 0 <= value <= 1 + 1e-6
    assert quality['coverage'][0] >= 0
  data = job.program.data
  nothing = np.full_like(data.train_truth, UNLABELLED)
  data = data._replace(train_truth=nothing)
  monkeypatch.setattr(job.program, 'data', data)
  unknown, progress = fit(tmp_path, name, job=job)
  chex.assert_trees_all_equal(comparable(known), comparable(unknown))
  for evaluation in progress.evaluations:
    assert 'accuracy' not in evaluation.get('pseudo_labels', {})
  # The other measurements are the same.
  assert lines(tmp_path) == [
    {k: v for k, v in line.items() if k != 'pseudo_label_accuracy'}
    for line in lines(folder)
  ]


def test_seeds_vmapped_equal_seeds_apart(name, whole, tmp_path):
  together, progress = fit(tmp_path / 'both', name, seeds=(0, 1))
  apart = whole[1:], fit(tmp_path / '1', name, seeds=(1,))
  for i, (alone, single) in enumerate(apart):
    one = jax.tree.map(lambda x: x[i : i + 1], together)  # noqa: B023
    chex.assert_trees_all_close(
      comparable(one), comparable(alone), rtol=1e-4, atol=1e-5
    )
    for a, b in zip(progress.evaluations, single.evaluations, strict=True):
      assert a['last'][i] == b['last'][0]


def test_split_over_eight_devices_equals_whole(name, whole, tmp_path):
  split, _ = fit(tmp_path, name, devices=8)
  assert len(split.params['Dense_0']['kernel'].sharding.device_set) == 8
  chex.assert_trees_all_close(
    comparable(split), comparable(whole[1]), rtol=1e-4, atol=1e-5
  )


def test_many_steps_per_call_equal_one(name, whole, tmp_path):
  # Stops after 2, 3, 4 and 6 steps: calls of two steps, and of one.
  options = OPTIONS._replace(steps_per_call=2)
  many, _ = fit(tmp_path, name, options=options)
  chex.assert_trees_all_close(
    comparable(whole[1]), comparable(many), rtol=1e-5, atol=1e-6
  )


class StoppedError(Exception):
  """Simulates the end of a process."""


def test_interrupted_and_resumed_equals_uninterrupted(
  name, whole, tmp_path, monkeypatch
):
  folder, state, progress = whole
  always = OPTIONS._replace(checkpoint_seconds=0.0)
  fit_until(6, monkeypatch, tmp_path, name, options=always)
  resumed, again = fit(tmp_path, name, options=always)
  chex.assert_trees_all_equal(comparable(resumed), comparable(state))
  assert list(again.evaluations) == list(progress.evaluations)
  assert lines(tmp_path) == lines(folder)


def fit_until(step, monkeypatch, *args, **options):
  real = loop._Loop.evaluate

  def evaluate(self, stage):
    if self.progress.step == step:
      self.snapshots.checkpoints.wait()
      raise StoppedError
    real(self, stage)

  with monkeypatch.context() as patched, pytest.raises(StoppedError):
    patched.setattr(loop._Loop, 'evaluate', evaluate)
    fit(*args, **options)


ONE_STAGE = 'temporal_ensembling', 'flexmatch', *COMBINED


def longer_than_six(name):
  """Arguments of `fit` with which a run takes more than six steps."""
  return {'steps': 9} if name in ONE_STAGE else {}


@pytest.mark.parametrize('name', ['flexmatch', 'laplacenet'])
def test_held_out_images_are_not_in_the_memory(name, tmp_path):
  job = tiny.make_job(name, seeds=(0, 1), validation=9)
  state, _ = fit(tmp_path, name, job=job)
  held_out = job.splits[0].validation
  kept = getattr(state.memory, 'weight', state.memory.label)
  nothing = 0 if name == 'laplacenet' else -2
  assert (kept[:, held_out] == nothing).all()
  assert (kept[:, job.splits[0].unlabelled] != nothing).any()


@pytest.mark.parametrize('devices', [1, 4])
@pytest.mark.parametrize(  # with memories that are split over devices
  'name',
  ['llp', 'r2d2', 'temporal_ensembling', 'flexmatch', 'laplacenet', *COMBINED],
)
def test_a_checkpoint_of_eight_devices_resumes_on_fewer(
  name, devices, tmp_path, monkeypatch
):
  always = OPTIONS._replace(checkpoint_seconds=0.0)
  how = dict(options=always) | longer_than_six(name)
  whole, _ = fit(tmp_path / 'whole', name, **how)
  folder = tmp_path / 'parts'
  fit_until(6, monkeypatch, folder, name, devices=8, **how)
  resumed, progress = fit(folder, name, devices=devices, **how)
  assert progress.evaluations[0]['step'] < 6 < progress.step
  chex.assert_trees_all_close(
    comparable(resumed), comparable(whole), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize(
  'name',
  [
    'llp',
    'r2d2',
    'deepbass',
    'temporal_ensembling',
    'flexmatch',
    'laplacenet',
    *COMBINED,
  ],
)
@pytest.mark.parametrize('multiple', [64, 320])  # rows: 61 of 256
def test_a_checkpoint_of_longer_or_shorter_tables_resumes(
  name, multiple, tmp_path, monkeypatch
):
  always = OPTIONS._replace(checkpoint_seconds=0.0)
  how = dict(options=always) | longer_than_six(name)
  whole, _ = fit(tmp_path / 'whole', name, **how)
  folder = tmp_path / 'parts'
  fit_until(6, monkeypatch, folder, name, **how)
  monkeypatch.setattr(placement, 'row_multiple', lambda mesh: multiple)
  resumed, progress = fit(folder, name, shared=False, **how)
  assert progress.evaluations[0]['step'] < 6 < progress.step
  assert not list((folder / 'checkpoints').glob('damaged*'))
  lengths = {x.shape[1] for x in jax.tree.leaves(resumed.memory) if x.ndim > 1}
  assert multiple in lengths and 256 not in lengths
  assert resumed.labels.shape == (1, multiple)
  assert (resumed.labels[:, tiny.ROWS :] == UNLABELLED).all()
  chex.assert_trees_all_close(
    comparable(resumed), comparable(whole), rtol=1e-4, atol=1e-5
  )


def test_images_of_a_step_are_sharded_whatever_the_compiler_would_do():
  mesh = placement.make_mesh([8], 4)
  rows = jax.device_put(np.arange(8), NamedSharding(mesh, P()))  # on each
  read = lambda rows: jnp.arange(16.0)[rows]
  images = jax.jit(placement.on_mesh(placement.split_images(read), mesh))(rows)
  assert images.sharding.spec == P('data')
  np.testing.assert_array_equal(images, np.arange(8))
  np.testing.assert_array_equal(placement.split_images(read)(rows), images)


def lines(folder):
  found = []
  for line in (folder / 'metrics.jsonl').read_text().splitlines():
    values = json.loads(line)
    found.append(
      {k: v for k, v in values.items() if k not in metrics_writer.TIMING}
    )
  return found


def test_the_stream_feed_trains_like_the_resident_one(name, tmp_path):
  states = []
  for make_feed in (feeds.resident, tiny.streamed):
    job = tiny.make_job(name, seeds=(0, 1), make_feed=make_feed)
    state, _ = tiny.initial(job)
    calls = [(i, i + 1) for i in range(4)]
    for source, rows in tiny.sources(job, tiny.samplers(job), calls):
      state, _ = job.program.steps[0](state, source, rows, FIRST)
    for update in filter(None, job.program.epoch_update[:2]):
      state, _ = update(state)
    found = job.program.predictions(state, job.splits[0])
    states.append((comparable(state), evaluate.errors(found)['test']))
  chex.assert_trees_all_close(states[0][0], states[1][0], rtol=1e-5, atol=1e-6)
  assert states[0][1] == states[1][1]


def test_training_learns(name, tmp_path):
  # Three brightnesses with 8 labels each: chance is 67 % error.
  fall = lambda step: jnp.maximum(0.01, 0.1 - jnp.float32(step) * 0.1 / 150)
  tx = optax.sgd(fall, 0.9)
  options = OPTIONS._replace(evaluate_every=150, record_every=150)
  _, progress = fit(tmp_path, name, steps=150, tx=tx, options=options)
  assert progress.evaluations[-1]['last'][0] <= 15


class Adjusting(Batch):
  """A batch that counts how often its logits are adjusted."""

  calls = 0

  def adjusted(self, logits):
    """Count, and change nothing."""
    type(self).calls += 1
    return logits


def test_the_supervised_loss_of_every_method_can_be_adjusted(name, monkeypatch):
  monkeypatch.setattr(Adjusting, 'calls', 0)
  job = tiny.make_job(name)
  state, _ = tiny.initial(job)
  state = jax.tree.map(lambda x: x[0], state)
  for number, stage in enumerate(job.program.method.stages):
    source, rows = next(tiny.sources(job, tiny.samplers(job, number), [(0, 1)]))
    loss = functools.partial(loss_of, stage, job, batch=Adjusting)
    jax.eval_shape(loss, state, source, rows[0])  # traced, not compiled
  assert Adjusting.calls
