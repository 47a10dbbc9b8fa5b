"""A run in its folder: refused, killed, interrupted and resumed."""

import contextlib
import json

import numpy as np
import pytest

import ssljax
from ssljax import config
from ssljax.errors import InputError
from ssljax.runs import build, execute, load, run_folder
from ssljax.training import metrics_writer


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


@pytest.mark.slow
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


def train(folder, **values):
  """Train two methods on digits under some splits; return the result."""
  settings = config.from_values(
    'madnn',
    {'network': 'linear', 'batch_labelled': 8, 'batch_unlabelled': 8}
    | {'steps': 2, 'labels': '2', 'average': 0.0}
    | values,
  )
  result, _ = execute.train_in_folder(
    lambda: build.build(settings), settings, folder, say=str, progress=False
  )
  return result


def measured(folder):
  """Lines of metrics.jsonl without times, in the order of job and step."""
  lines = map(json.loads, (folder / 'metrics.jsonl').open())
  timing = metrics_writer.TIMING
  found = [{k: v for k, v in x.items() if k not in timing} for x in lines]
  return sorted(found, key=lambda x: (x['job'], x['seed'], x['step'], len(x)))


def test_splits_are_added_to_a_finished_run(tmp_path):
  whole = train(tmp_path / 'whole', seeds=2)
  first = train(tmp_path / 'run', seeds=1)
  before = (tmp_path / 'run/metrics.jsonl').read_bytes()
  grown = train(tmp_path / 'run', seeds=2)
  # What was trained before is kept byte for byte, and comes first.
  assert (tmp_path / 'run/metrics.jsonl').read_bytes().startswith(before)
  assert measured(tmp_path / 'run') == measured(tmp_path / 'whole')
  assert grown['seeds'] == [0, 1] and grown['complete']
  assert grown['splits'] == whole['splits']
  for arm in ('supervised', 'madnn'):
    errors = [r['arms'][arm]['test_error'] for r in (first, grown, whole)]
    assert errors[1] == errors[2]
    assert errors[1]['last'][:1] == errors[0]['last']
  assert load.load(tmp_path / 'run', 1).split.seed == 1
  split = json.loads((tmp_path / 'run/split.json').read_text())
  assert split['parts'] == [1]
  with pytest.raises(InputError, match=r'seeds=1: the run in .* has 2 splits'):
    train(tmp_path / 'run', seeds=1)
  with pytest.raises(InputError, match=r'init_from=.* to train its weights'):
    train(tmp_path / 'run', seeds=2, steps=9)


def test_jobs_of_added_splits_come_after_all_others():
  digits = config.from_values(
    'madnn', {'steps': 1, 'seeds': 4, 'network': 'linear'}
  )
  run = build.build(digits)
  shown = [
    (method.name, group[0].seed) for method, group in execute.jobs_of(run, [1])
  ]
  assert shown == [
    *(('supervised', 0), ('madnn', 0)),
    *(('supervised', seed) for seed in (1, 2, 3)),
    *(('madnn', seed) for seed in (1, 2, 3)),
  ]


def test_a_group_of_splits_that_is_not_whole_cannot_grow(tmp_path):
  at_once = {'steps': 1, 'seeds_at_once': 2}
  before = config.from_values('supervised', {'seeds': 3} | at_once)
  run_folder.claim(tmp_path, before, overwrite=False)
  now = config.from_values('supervised', {'seeds': 5} | at_once)
  with pytest.raises(InputError, match='with seed=3, seeds=2'):
    run_folder.refuse_other(tmp_path, now)
