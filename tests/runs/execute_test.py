"""A run in its folder: refused, killed, interrupted and resumed."""

import contextlib
import json

import numpy as np
import pytest

import ssljax
from ssljax import config
from ssljax.errors import InputError
from ssljax.runs import execute, run_folder


def refuse():
  """Make a run that is refused."""
  raise InputError('no such run')


@pytest.mark.parametrize('inside', ['', 'a', 'a/b'])
def test_a_refused_run_leaves_no_folder(tmp_path, inside):
  (tmp_path / 'own').mkdir()
  folder = tmp_path / 'own' / inside / 'run'
  settings = config.from_values(
    'supervised', {'steps': 1, 'workdir': str(folder)}
  )
  with pytest.raises(InputError, match='no such run'):
    execute.train_in_folder(refuse, settings, folder)
  assert [p.name for p in tmp_path.rglob('*')] == ['own']


@pytest.mark.parametrize('others', [False, True])
def test_a_refused_run_leaves_no_dated_folder(tmp_path, monkeypatch, others):
  monkeypatch.chdir(tmp_path)
  if others:
    (tmp_path / 'runs' / 'other').mkdir(parents=True)
  settings = config.from_values('supervised', {'steps': 1})
  with pytest.raises(InputError, match='no such run'):
    execute.train_in_folder(refuse, settings, run_folder.dated('x'))
  names = ['other', 'runs'] if others else []
  assert sorted(p.name for p in tmp_path.rglob('*')) == names


def test_files_of_a_killed_process_are_removed(tmp_path):
  for name in ('result.json.4711.partial', 'config.json.1.partial', 'mine'):
    (tmp_path / name).touch()
  settings = config.from_values('supervised', {'steps': 1})
  run_folder.claim(tmp_path, settings, overwrite=False)
  names = {p.name for p in tmp_path.iterdir()}
  assert names == {'config.json', 'flags.txt', 'mine'}


def fit(folder, stop=None):
  """Train two methods, or only to a step of the first; return the result."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 255, (40, 6, 6, 1), dtype=np.uint8)
  labels = np.arange(40) % 2

  def interrupt(measurement):
    if stop and measurement['step'] >= stop:
      raise KeyboardInterrupt

  model = ssljax.fit(
    images,
    labels,
    test=(images[:20], labels[:20]),
    method='madnn',
    network='deepbass_toy',
    batch_labelled=8,
    batch_unlabelled=8,
    steps=6,
    record_every=2,
    evaluate_every=4,
    checkpoint_seconds=0,
    workdir=folder,
    progress=False,
    callbacks=[interrupt],
  )
  return model.result


def test_the_result_names_the_steps_without_metrics(tmp_path):
  with contextlib.suppress(KeyboardInterrupt):
    fit(tmp_path / 'run', stop=6)
  path = tmp_path / 'run' / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join(line for line in lines if '"step": 2,' not in line))
  result = fit(tmp_path / 'run')
  assert result['complete'] and result['metrics_missing'] == {'madnn': [2]}
  stored = json.loads((tmp_path / 'run' / 'result.json').read_text())
  assert stored == result
  whole = fit(tmp_path / 'whole')
  assert 'metrics_missing' not in whole
  assert whole['test_error'] == result['test_error']
