import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from unittest import mock

import binary
import numpy as np
import pytest

from ssljax import config
from ssljax.errors import InputError, require
from ssljax.experiments import sweep
from ssljax.experiments.papers import paired
from ssljax.runs import run_folder

SHORT = '--labels=4', '--steps=3', '--batch_unlabelled=8'


def write_data(path, last=30):
  """Write a data set of noise; returns its path."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (60, 8, 8, 1), np.uint8)
  labels = np.arange(60) % 3
  np.savez(
    path,
    **dict(train=pixels, train_labels=labels),
    **dict(test=pixels[:last] // 2, test_labels=labels[:last]),
  )
  return path


@pytest.fixture
def asked(tmp_path):
  """Run sweep.py in this process; returns the commands that it called."""
  data, called = write_data(tmp_path / 'mine.npz'), []

  def call(command, log):
    called.append(command)
    log.write_text('of the program\nmadnn: its last line\n')
    program = pathlib.Path(command[1]).stem
    status = binary.run(*command[2:], binary=program)
    require(not status, f'{program}.py ended with status {status}')

  def ask(*more):
    command = sweep.Command()
    flags = f'--folder={tmp_path}/runs', '--seeds=2', '--method=madnn'
    assert command.parse(['sweep.py', *flags, *more]) == ['sweep.py']
    with mock.patch.object(paired, 'call', call):
      command.act()
    return called

  ask.folder, ask.data = tmp_path / 'runs', f'--dataset={data}'
  return ask


def test_the_cells_are_ranked_by_validation_errors_alone(asked, monkeypatch):
  # Reading a test error fails.
  read = run_folder.read_result

  def without_test_errors(folder):
    found = read(folder)
    if found:
      del found['test_error']
    return found

  monkeypatch.setattr(run_folder, 'read_result', without_test_errors)
  given = asked.data, *SHORT
  called = asked(*given, '--grid', 'eta=0.1,0.3 weight=0.5,1')
  assert len(called) == 4 * 2
  # A fifth of 60 images, at most half of the 60 - 12 that have no label.
  assert all('--validation=12' in command for command in called)
  record = json.loads((asked.folder / 'sweep.json').read_text())
  assert len(record['cells']) == 4
  means = []
  for cell in record['cells']:
    name = ','.join(f'{k}={v}' for k, v in sorted(cell['settings'].items()))
    errors = [
      read(asked.folder / name / f'seed-{seed}')['validation_error']['averaged']
      for seed in (0, 1)
    ]
    assert [[e] for e in cell['validation_error'].values()] == errors
    ((a,), (b,)) = errors
    means.append((a + b) / 2)
    # Two values: their standard deviation is |a - b| / sqrt(2).
    assert cell['standard_error'] == pytest.approx(abs(a - b) / 2)
  assert means == sorted(means)
  # The command of the best setting holds nothing out.
  best = record['cells'][0]['settings']
  flags = [f'--{name}={value}' for name, value in best.items()]
  assert shlex.split(record['command']) == ['ssljax', 'madnn', *given, *flags]
  # The same command trains nothing, and a larger grid only what is new.
  asked(*given, '--grid', 'eta=0.1,0.3 weight=0.5,1')
  assert len(called) == 8
  asked(*given, '--grid', 'weight=0.5,1 eta=0.1,0.3,0.4')
  assert len(called) == 12


def outcome(*errors):
  return paired.Outcome(
    'madnn', 'mlp', dict(enumerate(errors)), frozenset(['a']), 12.0
  )


def test_the_table_shows_standard_errors_and_paired_differences():
  ranked = [
    sweep.Ranked({'eta': '0.3', 'augment': 'a|b'}, outcome(2.0, 4.0, 3.0)),
    sweep.Ranked({'eta': '0.1', 'augment': 'c'}, outcome(4.0, 5.0, 6.0)),
  ]
  text = sweep.markdown(ranked, 'madnn')
  # Errors 2, 4, 3: standard deviation 1, divided by sqrt(3); the differences
  # 2, 1, 3 have mean 2 and the same spread.
  assert '| 1 | 0.3 | a/b | 3.00 ± 0.58 | – | 12 |' in text
  assert '| 2 | 0.1 | c | 5.00 ± 0.58 | 2.00 ± 0.58 | 12 |' in text
  assert 'test' not in text


def test_values_of_a_list_are_separated_by_bars():
  cells = sweep.parse_grid(
    'augment=translate:1|translate:1,noise divergence=true,false', 'madnn'
  )
  assert [sweep.as_flags(cell) for cell in cells] == [
    ['--augment=translate:1', '--divergence=true'],
    ['--augment=translate:1', '--divergence=false'],
    ['--augment=translate:1,noise', '--divergence=true'],
    ['--augment=translate:1,noise', '--divergence=false'],
  ]


@pytest.mark.parametrize(
  ('grid', 'words'),
  [
    (None, r'^grid: give settings'),
    (' ', r'^grid: give settings'),
    ('eta', r'^grid: "eta": give SETTING=VALUE'),
    ('eta=', r'^grid: "eta=": give SETTING=VALUE'),
    ('wieght=1', r'^grid: wieght: .*did you mean weight'),  # codespell:ignore
    ('eta=0.1,x', r'^grid: eta=x: give a number'),
    ('eta=0.1,', r'^grid: eta=: give a number'),
    ('eta=nan', r'^grid: eta=nan: give a number'),
    ('divergence=maybe', r'^grid: divergence=maybe: give True or False'),
    ('eta=0.1 eta=0.3', r'^grid: gives eta twice'),
    ('eta=0.1,0.10', r'^grid: eta=0.1,0.10 has the value 0.10 twice'),
    ('seed=1,2', r'^grid: seed is decided by sweep.py'),
    ('workdir=a', r'^grid: workdir is decided by sweep.py'),
    ('validation=5,9', r'^grid: validation is the same in all cells'),
    ('dataset=mnist', r'^grid: dataset is the same in all cells'),
    (
      f'steps={",".join(map(str, range(1, 1003)))}',
      r'^grid: has 1,002 cells: give at most 1,000',
    ),
  ],
)
def test_a_grid_that_cannot_work_is_refused_in_one_line(grid, words):
  with pytest.raises(InputError, match=words) as refused:
    sweep.parse_grid(grid, 'madnn')
  assert '\n' not in str(refused.value)


@pytest.mark.parametrize(
  ('given', 'words'),
  [
    (['--method=madn'], 'madnn'),
    (['--seeds=0'], 'seeds'),
    (['--seeds_per_run=0'], 'seeds_per_run'),
    (['--workdir=x'], 'workdir.*leave it out'),
    (['--nobaseline'], 'nobaseline.*leave it out'),
    (['--eta=0.3'], 'eta: is in grid too'),
    (['--validation=0'], 'validation=0.*leave it out'),
    (['--validation=60'], 'validation=60'),
    (['--labels=30'], 'labels=30'),
    (['word'], 'word.*is not a flag'),
  ],
)
def test_a_sweep_that_cannot_work_trains_nothing(asked, given, words):
  with pytest.raises(InputError, match=words):
    asked('--grid=eta=0.1', asked.data, '--steps=3', *given)
  assert not list(asked.folder.glob('**/seed-*'))


def test_a_sweep_of_other_flags_needs_another_folder(asked):
  asked('--grid=eta=0.1', asked.data, *SHORT, '--seeds=1')
  with pytest.raises(InputError, match='holds a sweep with'):
    asked('--grid=eta=0.1', asked.data, *SHORT[:2])


@pytest.mark.parametrize(
  ('labels', 'images', 'held_out'),
  [
    ('all', 100, 20),  # a fifth
    ('10', 100, 20),
    ('24', 100, 14),  # half of the 100 - 72 that are left
    ('10', 100_000, 5000),
  ],
)
def test_the_number_of_validation_images_suits_the_data(
  labels, images, held_out
):
  train = mock.Mock(labels=np.arange(images, dtype=np.int32) % 3)
  dataset = mock.Mock(train=train, classes=('a', 'b', 'c'))
  split = config.Split(labels=labels)
  chosen = mock.Mock(split=split)
  assert sweep.suitable_validation(chosen, dataset) == held_out
  train.labels = np.where(np.arange(images) < 4, train.labels, -1)
  with pytest.raises(InputError, match='4 training images have a label'):
    sweep.suitable_validation(
      mock.Mock(split=config.Split(labels='all')), dataset
    )


@pytest.mark.slow
@pytest.mark.parametrize('program', ['sweep', 'compare'])
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_program_ends_with_one_line_and_resumes(
  tmp_path, program, number
):
  data = write_data(tmp_path / 'mine.npz')
  own = {
    'sweep': ['--method=madnn', '--grid=eta=0.1'],
    'compare': ['--methods=madnn'],
  }[program]
  command = [
    *(sys.executable, str(binary.EXPERIMENTS / f'{program}.py'), *own),
    *(f'--folder={tmp_path}/runs', '--seeds=1', f'--dataset={data}'),
    *('--labels=4', '--batch_unlabelled=8', '--network=mlp'),
    *('--steps=1000', '--record_every=10', '--evaluate_every=1000'),
  ]
  options = dict(env=binary.environment(), text=True, stdout=subprocess.PIPE)
  process = subprocess.Popen(
    command, stderr=subprocess.PIPE, start_new_session=True, **options
  )
  deadline = time.monotonic() + 300
  while not list(tmp_path.glob('runs/**/metrics.jsonl')):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.1)
  process.send_signal(number)
  _, error = process.communicate(timeout=120)
  assert process.returncode == 128 + number
  assert 'Traceback' not in error
  lines = re.split(r'[\r\n]+', error.strip())
  assert lines[-1] == (
    f'{program}: interrupted ({number.name}): run the same command to resume'
  )
  # The called program has saved its state, and is resumed.
  (path,) = tmp_path.glob('runs/**/result.json')
  folder = path.parent
  done = run_folder.read_result(folder)
  assert done['complete'] is False
  assert list(folder.glob('checkpoints/madnn/seed-0/*'))
  again = subprocess.run(
    command, stderr=subprocess.STDOUT, timeout=600, **options
  )
  assert again.returncode == 0, again.stdout
  result = run_folder.read_result(folder)
  assert result['complete'] is True and result['started'] == done['started']
