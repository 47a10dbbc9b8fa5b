"""What a damaged or foreign checkpoint, and lost metrics, lead to."""

import hashlib
import json
import os
import shutil

import chex
from contract_test import OPTIONS, comparable, fit, fit_until, lines
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ssljax import core
from ssljax.errors import InputError
from ssljax.training import checkpoint, job, loop, metrics_writer

ALWAYS = OPTIONS._replace(checkpoint_seconds=0.0)
pytestmark = pytest.mark.filterwarnings(
  # TensorStore's background reads complain about what they could not read.
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
  """A run with checkpoints at steps 4 and 6, its end, and its metrics."""
  folder = tmp_path_factory.mktemp('begun') / 'run'
  state, _ = fit(folder, 'madnn', ALWAYS)
  return folder, comparable(state), lines(folder)


@pytest.fixture
def run(begun, tmp_path):
  shutil.copytree(begun[0], tmp_path / 'run')
  return tmp_path / 'run'


def progress_file(folder, step):
  return folder / 'checkpoints' / str(step) / 'progress' / 'metadata'


def edit(path, change, sign=False):
  """Change the JSON values of a checkpoint."""
  saved = json.loads(path.read_text())
  change(saved)
  if sign:
    del saved['digest']
    text = json.dumps(saved, sort_keys=True)
    saved['digest'] = hashlib.sha256(text.encode()).hexdigest()
  path.write_text(json.dumps(saved))


def largest(folder):
  files = [p for p in folder.rglob('*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def noise(count):
  """Return random bytes, the same in every run."""
  return np.random.default_rng(0).bytes(count)


def replace(path, make):
  path.unlink()
  make(path)


DAMAGES = {
  'cut to 100 bytes': lambda p: p.write_bytes(p.read_bytes()[:100]),
  'emptied': lambda p: p.write_bytes(b''),
  'random': lambda p: p.write_bytes(noise(p.stat().st_size)),
  'a folder': lambda p: replace(p, lambda p: p.mkdir()),
  'a fifo': lambda p: replace(p, os.mkfifo),
  'a dangling link': lambda p: replace(p, lambda p: p.symlink_to('none')),
}


@pytest.mark.parametrize('how', DAMAGES)
@pytest.mark.parametrize('where', ['arrays', 'progress', 'mark'])
def test_a_damaged_file_leads_to_the_older_checkpoint(
  run, begun, how, where, caplog
):
  newest = run / 'checkpoints' / '6'
  path = {
    'arrays': largest(newest / 'state'),
    'progress': progress_file(run, 6),
    'mark': newest / '_CHECKPOINT_METADATA',
  }[where]
  DAMAGES[how](path)
  state, _ = fit(run, 'madnn', ALWAYS)
  chex.assert_trees_all_equal(comparable(state), begun[1])
  assert lines(run) == begun[2]
  # Orbax does not need the mark: damage of its content may go unnoticed.
  if where != 'mark' or how in ('a fifo', 'a dangling link'):
    assert newest.with_name('damaged-6').is_dir()
    said = [r.message for r in caplog.records if 'step' in r.message]
    assert 'step 6 cannot be read' in said[0] and 'damaged-6' in said[0]
    assert 'Resuming from the checkpoint of step 4' in said[1]
    assert not any('\n' in message for message in said)


def test_an_error_of_any_type_leads_to_the_older_checkpoint(
  run, begun, monkeypatch
):
  read = checkpoint.Checkpoints._read

  def fail(self, step, like):
    if step == 6 and not (run / 'checkpoints/damaged-6').exists():
      raise Exception('wrapped by JAX')
    return read(self, step, like)

  monkeypatch.setattr(checkpoint.Checkpoints, '_read', fail)
  state, _ = fit(run, 'madnn', ALWAYS)
  chex.assert_trees_all_equal(comparable(state), begun[1])


def test_a_full_device_memory_is_no_damage(run, monkeypatch):
  def fail(self, step, like):
    raise RuntimeError('RESOURCE_EXHAUSTED: out of memory')

  monkeypatch.setattr(checkpoint.Checkpoints, '_read', fail)
  with pytest.raises(RuntimeError, match='RESOURCE_EXHAUSTED'):
    fit(run, 'madnn', ALWAYS)
  assert not list(run.rglob('damaged-*'))


CHANGES = {
  'evaluations': lambda saved: saved['evaluations'][0].update(last=[0.01]),
  'a setting': lambda saved: saved['jax'].update(JAX_ENABLE_X64=True),
  'a stage': lambda saved: saved.update(stage=7),
  'the checksum': lambda saved: saved.update(checksum=1),
}


@pytest.mark.parametrize('what', CHANGES)
def test_edited_progress_is_damage(run, begun, what, caplog):
  edit(progress_file(run, 6), CHANGES[what])
  _, progress = fit(run, 'madnn', ALWAYS)
  assert 'does not match its digest' in caplog.text
  assert progress.evaluations[0]['last'] != [0.01]
  assert (run / 'checkpoints/damaged-6').is_dir()


IMPOSSIBLE = {
  'no stage 1': lambda saved: saved.update(stage=1, ends=[6]),
  "has 'surprise'": lambda saved: saved.update(surprise=1),
  'ends before step 9': lambda saved: saved.update(step=9),
  'is no count': lambda saved: saved.update(step='6'),
  'evaluations after': lambda saved: saved['evaluations'][0].update(step=8),
  'no stage or step': lambda saved: saved.pop('stage'),
}


@pytest.mark.parametrize('said', IMPOSSIBLE)
def test_impossible_progress_is_damage_also_without_a_digest(
  run, begun, said, caplog
):
  def change(saved):
    del saved['digest']  # as in version 0.1
    IMPOSSIBLE[said](saved)

  edit(progress_file(run, 6), change)
  state, _ = fit(run, 'madnn', ALWAYS)
  assert said in caplog.text
  chex.assert_trees_all_equal(comparable(state), begun[1])


def test_a_checkpoint_without_digest_settings_and_types_is_restored(run):
  def change(saved):
    news = 'digest', 'arrays', 'jax', 'settings', 'metrics_digest', 'measured'
    for name in news:
      del saved[name]

  edit(progress_file(run, 6), change)
  _, progress = fit(run, 'madnn', ALWAYS)
  assert progress.step == 6
  assert not list(run.rglob('damaged-*'))


def test_other_settings_of_jax_are_refused_by_name(run):
  edit(
    progress_file(run, 6),
    lambda saved: saved['jax'].update(JAX_ENABLE_X64=True),
    sign=True,
  )
  said = 'begun with JAX_ENABLE_X64=1: set it again, or give `?overwrite=True'
  with pytest.raises(InputError, match=said):
    fit(run, 'madnn', ALWAYS)
  assert not list(run.rglob('damaged-*'))


def test_a_run_begun_with_another_generator_is_refused(run):
  with (
    jax.default_prng_impl('rbg'),
    pytest.raises(InputError, match='JAX_DEFAULT_PRNG_IMPL=threefry2x32'),
  ):
    fit(run, 'madnn', ALWAYS, shared=False)
  assert not list(run.rglob('damaged-*'))


def test_other_settings_of_the_run_are_refused_by_name(tmp_path):
  a_job = tiny.make_job('madnn')
  fit(tmp_path, 'madnn', ALWAYS, a_job._replace(settings={'eta': 0.1}))
  with pytest.raises(InputError, match=r'eta=0.1 there, eta=0.2 here'):
    fit(tmp_path, 'madnn', ALWAYS, a_job._replace(settings={'eta': 0.2}))
  # A setting that only one version knows does not matter, and NaN is NaN.
  nan = a_job._replace(settings={'new': float('nan')})
  fit(tmp_path, 'madnn', ALWAYS, nan)
  assert not list(tmp_path.rglob('damaged-*'))


def with_types(like, dtype):
  cast = lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
  return like.replace(params=jax.tree.map(cast, like.params))


@pytest.mark.parametrize('old', [False, True])
def test_arrays_of_another_type_are_refused_and_not_renamed(run, begun, old):
  if old:
    for step in (4, 6):
      edit(
        progress_file(run, step),
        lambda saved: [saved.pop('digest'), saved.pop('arrays')],
      )
  state, _ = fit(begun[0], 'madnn', ALWAYS)
  like = checkpoint.abstract(state, state.step.sharding)
  checkpoints = checkpoint.Checkpoints(run / 'checkpoints')
  with pytest.raises(InputError, match=r'float32\[.*bfloat16\[.* here'):
    checkpoints.restore(lambda progress: with_types(like, jnp.bfloat16))
  checkpoints.close()
  assert not list(run.rglob('damaged-*'))


# Metrics.


def half(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_step_4(path):
  kept = [t for t in path.read_text().splitlines() if '"step": 4' not in t]
  path.write_text(''.join(f'{line}\n' for line in kept))


# Lines are of steps 2, 3, 3 (tested), 4, 6, 6 (tested); the run is at step 4.
LOST = {
  'emptied': (lambda p: p.write_bytes(b''), [2, 3, 4]),
  'removed': (lambda p: p.unlink(), [2, 3, 4]),
  'half': (half, [3, 4]),
  'edited': (without_step_4, [4]),
  'replaced': (lambda p: p.write_bytes(noise(9999)), [2, 3, 4]),
}


@pytest.mark.parametrize('how', LOST)
def test_lost_metrics_are_reported_and_the_rest_is_kept(
  begun, tmp_path, monkeypatch, how, caplog
):
  act, missing = LOST[how]
  fit_until(6, monkeypatch, tmp_path, 'madnn', ALWAYS)
  shutil.rmtree(tmp_path / 'checkpoints' / '6', ignore_errors=True)
  act(tmp_path / 'metrics.jsonl')
  left = (tmp_path / 'metrics.jsonl').exists()
  before = (tmp_path / 'metrics.jsonl').read_bytes() if left else b''
  writer = metrics_writer.MetricsWriter(tmp_path)
  checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  state, _ = loop.fit(tiny.make_job('madnn'), ALWAYS, writer, checkpoints)
  writer.close()
  checkpoints.close()
  assert writer.missing == {'madnn': missing}
  assert f'missing at steps {", ".join(map(str, missing))}' in caplog.text
  chex.assert_trees_all_equal(comparable(state), begun[1])
  kept = [m for m in lines(tmp_path) if m['step'] <= 4]
  assert kept == [m for m in begun[2] if m['step'] <= 4 and m in kept]
  assert {m['step'] for m in lines(tmp_path)} >= {6}
  copies = list(tmp_path.glob('metrics-damaged*'))
  if how in ('half', 'replaced'):  # with bytes that are no line
    assert copies[0].read_bytes() == before
  else:
    assert not copies


def test_missing_steps_are_reported_at_every_later_resume(run):
  without_step_4(run / 'metrics.jsonl')
  for _ in range(2):
    writer = metrics_writer.MetricsWriter(run)
    checkpoints = checkpoint.Checkpoints(run / 'checkpoints')
    loop.fit(tiny.make_job('madnn'), ALWAYS, writer, checkpoints)
    writer.close()
    checkpoints.close()
    assert writer.missing == {'madnn': [4]}


def test_metrics_of_a_later_job_survive_an_older_checkpoint(run, begun):
  other = {'job': 'later', 'step': 1, 'seed': 0, 'loss': 1.0}
  with open(run / 'metrics.jsonl', 'a') as file:
    file.write(json.dumps(other) + '\n')
  DAMAGES['emptied'](progress_file(run, 6))
  fit(run, 'madnn', ALWAYS)
  assert other in lines(run)
  ours = [m for m in lines(run) if m['job'] == 'madnn']
  assert ours == begun[2]


@pytest.mark.parametrize('make', [os.mkdir, os.mkfifo])
def test_metrics_that_are_no_file_are_refused(tmp_path, make):
  make(tmp_path / 'metrics.jsonl')
  with pytest.raises(InputError, match=r'metrics.jsonl is no regular file'):
    metrics_writer.MetricsWriter(tmp_path)
  with pytest.raises(InputError, match=r'metrics.jsonl: is no regular file'):
    metrics_writer.read(tmp_path, 'madnn')


@pytest.mark.parametrize('line', [b'{"step": 1, "lo', b'[]\n', b'\xff\n'])
def test_damaged_metrics_are_one_line_for_reports(tmp_path, line):
  (tmp_path / 'metrics.jsonl').write_bytes(line)
  with pytest.raises(InputError, match=r'metrics\.jsonl'):
    metrics_writer.read(tmp_path, 'madnn')


def test_measured_steps_are_kept_as_ranges():
  progress = job.Progress()
  steps = [2, 4, 6, 7, 8, 10, 20, 30]
  for step in steps:
    progress = progress._replace(step=step).with_measured().with_measured()
  assert progress.measured_steps() == steps
  assert progress.measured == ((2, 6, 2), (7, 8, 1), (10, 30, 10))
  every = job.Progress()
  for step in np.arange(100, 100_000, 100).tolist():
    every = every._replace(step=step).with_measured()
  assert every.measured == ((100, 99_900, 100),)


def test_stages_that_have_ended_had_their_lengths():
  stage = tiny.make_job('supervised').program.method.stages[0]
  assert isinstance(stage, core.Stage) and stage.steps == 6
  stages = stage, stage
  good = job.Progress(stage=1, step=8, ends=(6,), begun=6)
  assert good.problem(stages) is None
  assert 'had 5 steps' in good._replace(ends=(5,)).problem(stages)
  assert 'before' in good._replace(ends=()).problem(stages)
  assert 'step 5 lies' in good._replace(step=5).problem(stages)


@pytest.mark.parametrize('clean_up', [False, True])
def test_an_unfinished_checkpoint_is_removed_by_the_run_alone(run, clean_up):
  unfinished = run / 'checkpoints' / '9.orbax-checkpoint-tmp'
  shutil.copytree(run / 'checkpoints' / '4', unfinished)
  (unfinished / 'commit_success.txt').unlink(missing_ok=True)
  checkpoints = checkpoint.Checkpoints(run / 'checkpoints', clean_up=clean_up)
  assert checkpoints.steps() == (4, 6)
  checkpoints.close()
  assert unfinished.exists() == (not clean_up)


def test_numpy_and_the_compiler_find_the_same_checksum():
  """Arrays of one CPU are examined by NumPy, others by a compiled program."""
  rng = np.random.default_rng(0)
  arrays = {
    'float32': jnp.asarray(rng.normal(size=(3, 70_000)), jnp.float32),
    'bfloat16': jnp.asarray(rng.normal(size=(5, 7)), jnp.bfloat16),
    'bool': jnp.asarray(rng.integers(0, 2, 9), bool),
    'uint8': jnp.asarray(rng.integers(0, 256, (2, 3, 4)), jnp.uint8),
    'int32': jnp.asarray(-7, jnp.int32),
    'none': jnp.zeros((0, 4)),
  }
  state = core.TrainState(
    step=jnp.asarray(5, jnp.int32),
    key=jax.random.key(3),
    params=arrays,
    stats=(),
    opt_state=(),
    labels=jnp.arange(11, dtype=jnp.int32),
    memory=(),
    images=11,
  )
  on_one = jax.device_put(state, jax.devices()[0])
  mesh = jax.make_mesh((8,), ('data',))
  on_all = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
  assert checkpoint.examine(on_one) == checkpoint.examine(on_all)
  assert checkpoint.examine(on_one)[0]
  infinite = arrays | {'bfloat16': arrays['bfloat16'].at[2, 3].set(jnp.inf)}
  for given in (on_one, on_all):
    assert not checkpoint.examine(given.replace(params=infinite))[0]
