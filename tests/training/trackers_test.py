import sys
import types

import pytest

from ssljax.errors import InputError
from ssljax.training import metrics_writer, trackers


class Program(types.ModuleType):
  """A program with runs, as W&B and trackio have them."""

  def __init__(self, name):
    super().__init__(name)
    self.runs = []

  def init(self, **how):
    run = types.SimpleNamespace(how=how, logged=[], finished=0)
    run.log = lambda scalars, step: run.logged.append((step, scalars))
    run.finish = lambda: setattr(run, 'finished', run.finished + 1)
    self.runs.append(run)
    return run


def measured(folder, writers):
  writer = metrics_writer.MetricsWriter(folder, writers)
  for step, seed in ((1, 0), (1, 1), (2, 0)):
    line = {'step': step, 'seed': seed, 'loss': float(step), 'stage': 'a'}
    writer.write('madnn', line)
  writer.close()


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_each_split_is_a_run_that_a_resume_finds_again(
  tmp_path, monkeypatch, name
):
  program = Program(name)
  monkeypatch.setitem(sys.modules, name, program)
  measured(tmp_path, [name])
  first, second = program.runs
  assert first.logged == [(1, {'loss': 1.0}), (2, {'loss': 2.0})]
  assert second.logged == [(1, {'loss': 1.0})]
  assert [run.finished for run in program.runs] == [1, 1]
  assert first.how['name'].endswith('madnn/seed-0')
  assert first.how['resume'] == 'allow'
  measured(tmp_path, [name])
  again, other = program.runs[2:]
  assert again.how == first.how and other.how == second.how
  assert first.how != second.how
  # TensorBoard was not asked for; metrics.jsonl is always written.
  assert sorted(p.name for p in tmp_path.iterdir()) == ['metrics.jsonl']


def test_tensorboard_writes_beside_others(tmp_path, monkeypatch):
  program = Program('wandb')
  monkeypatch.setitem(sys.modules, 'wandb', program)
  measured(tmp_path, ['tensorboard', 'wandb'])
  assert list((tmp_path / 'events/madnn/seed-1').glob('events*'))
  assert len(program.runs) == 2


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_a_missing_package_is_named_with_its_command(
  tmp_path, monkeypatch, name
):
  monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(InputError, match=f'writers={name}: .*pip install {name}'):
    metrics_writer.MetricsWriter(tmp_path / 'run', [name])
  assert not (tmp_path / 'run').exists()


def test_an_unknown_writer_is_refused():
  with pytest.raises(InputError, match=r'writers=wandbb: .* give wandb'):
    trackers.find('wandbb')


def test_wandb_works_offline(tmp_path, monkeypatch):
  pytest.importorskip('wandb', reason='pip install wandb')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  measured(tmp_path, ['wandb'])
  runs = list((tmp_path / 'wandb').glob('offline-run-*/*.wandb'))
  assert len(runs) == 2 and all(run.stat().st_size for run in runs)
