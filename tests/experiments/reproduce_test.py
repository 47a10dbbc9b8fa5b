"""`reproduce.py` from the command line, on a table of tiny runs."""

import csv
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from unittest import mock

from absl import flags
import binary
import PIL.Image
import pytest

from ssljax import experiments
from ssljax.distributed import preemption
from ssljax.errors import InputError, require
from ssljax.experiments import reproduce
from ssljax.experiments.papers import readme_tables, runs, tables
from ssljax.training import loop

ENVIRONMENT = os.environ | {
  'PYTHONPATH': os.pathsep.join([str(experiments.FOLDER), *sys.path])
}

TOML = """
paper = "a paper"

[[table]]
number = 1
title = "digits"
statistic = "mean (std) of 3 splits"

[[table.row]]
name = "one"
paper = 50.0
std = 2.0
n = 3
preset = "supervised.digits"
flags = ["--steps=2", "--network=digits"]
[table.row.cpu]
flags = ["--labels=1", "--batch_labelled=8"]
seeds = 2
smaller = "one label"

[[table.row]]
name = "its twin"
paper = 40.0
preset = "supervised.digits"
flags = ["--steps=2", "--network=digits"]
take = "median_last"
[table.row.cpu]
flags = ["--labels=1", "--batch_labelled=8"]
seeds = 2
smaller = "one label"

[[table.row]]
name = "far"
paper = 40.0
preset = "supervised.svhn-1000"
[table.row.cpu]
seeds = 1
flags = ["--steps=2"]
smaller = "2 steps"

[[table.row]]
name = "never"
paper = 30.0
missing = "no such method"

[[table.quoted]]
name = "theirs"
paper = 20.0

[[figure]]
number = 1
title = "curves"
[[figure.part]]
drawn = "deepbass/3"
runs = [["deepbass.yin-yang-8"]]
[figure.cpu]
seeds = 2
[[figure.cpu.part]]
drawn = "deepbass/3"
runs = [["deepbass.yin-yang-8", "--steps=2", "--iterations=1"]]
"""

TABLE = tables.Table(
  *('madnn/1', 'a paper', 'it', 'mean', 'test error in %', 'mean'),
  rows=(tables.Row('one', 2.0, preset='madnn.digits'),),
  quoted=(),
)

OWN = """
paper = "ssljax"

[[table]]
number = "mine"
title = "of no paper"

[[table.row]]
name = "the baseline"
preset = "supervised.digits"
flags = ["--steps=3"]
seeds = 2
"""

CLAIMS = """
seeds = 2

[[claim]]
paper = "a paper"
text = "more steps help"
with = { preset = "supervised.digits", flags = ["--steps=3"] }
without = { preset = "supervised.digits", flags = ["--steps=2"] }
"""


@pytest.fixture
def asked(tmp_path):
  """Run `reproduce.py` on the table; returns its exit status."""
  (tmp_path / 'supervised.toml').write_text(TOML)
  made = []

  def call(command):
    made.append(command)
    program = pathlib.Path(command[1]).stem
    status = binary.run(*command[2:], binary=program)
    require(not status, f'status {status}')

  (tmp_path / 'own.toml').write_text(OWN)
  (tmp_path / 'claims.toml').write_text(CLAIMS)

  def run(*more):
    where = f'--runs={tmp_path}/runs', f'--results={tmp_path}/results'
    with (
      mock.patch.object(tables, 'FOLDER', tmp_path),
      mock.patch.object(tables, 'PAPERS', ('supervised',)),
    ):
      # `binary.run` would run a copy of the module, whose `call` is real.
      others = '--list', '--pages', '--figure', '--table', '--claims'
      chosen = any(word.startswith(others) for word in more)
      table = () if chosen else ('--table=supervised/1',)
      budget = () if '--claims' in more else ('--budget=cpu',)
      return main(*table, *budget, *where, *more)

  def main(*args):
    values = flags.FlagValues()
    reproduce.define_flags(values)
    values(['reproduce', *args])
    with mock.patch.object(reproduce, 'call', call):
      reproduce.act(values.flag_values_dict())

  run.made, run.results = made, tmp_path / 'results'
  return run


def cells(asked, results=None):
  path = pathlib.Path(results or asked.results) / 'supervised-1.cpu.csv'
  with open(path, encoding='utf-8') as file:
    return {row['row']: row for row in csv.DictReader(file)}


def seeds_made(asked):
  return [
    int(word.split('=')[1])
    for command in asked.made
    for word in command
    if word.startswith('--seed=')
  ]


def test_a_table_is_run_once_and_extended_by_seeds(asked, capsys):
  asked()
  assert seeds_made(asked) == [0, 1]  # once for both rows
  found = cells(asked)
  assert found['one']['n'] == '2'
  assert found['one']['smaller'] == 'one label'
  # Stored results contain no local paths.
  kept = asked.results.glob('*/*/*')
  assert not any(str(asked.results.parent) in x.read_text() for x in kept)
  assert found['its twin']['n'] == '2'
  assert found['far']['state'] == 'not yet run'
  assert found['never']['state'] == 'no such method'
  assert found['theirs']['state'] == 'quoted by the paper'
  out = capsys.readouterr().out
  assert 'far: left out, svhn_cropped is not in --data_dir' in out
  assert '| one | 50.00 ± 2.00 |' in out

  asked('--rows=1')
  asked('--rows=1', '--seeds=1')
  assert len(asked.made) == 2
  asked('--seeds=3', '--rows=1')
  assert seeds_made(asked) == [0, 1, 2]
  now = cells(asked)
  assert now['one']['seeds'] == '0 1 2'
  assert now['one']['values'].startswith(found['one']['values'])


@pytest.mark.parametrize(
  'moment', ['in the run', 'before it is kept', 'while it is kept']
)
def test_killed_at_any_moment_it_ends_with_the_same_table(
  asked, moment, monkeypatch
):
  asked('--rows=1', f'--results={asked.results}.whole')
  whole = cells(asked, f'{asked.results}.whole')
  shutil.rmtree(asked.results.parent / 'runs')

  class Kill(BaseException):
    pass

  def kill(*args, **kwargs):
    raise Kill

  with monkeypatch.context() as patch, pytest.raises(Kill):
    if moment == 'in the run':
      patch.setattr(loop._Loop, 'evaluate', kill)
    elif moment == 'before it is kept':
      patch.setattr(runs.Store, 'keep', kill)
    else:
      patch.setattr(runs, 'thinned', kill)
    asked('--rows=1')
  assert not list(asked.results.glob('*/*/result.json'))
  asked('--rows=1')
  changing = ('seconds', 'commit')
  same = lambda found: [
    [value for key, value in row.items() if key not in changing]
    for row in found.values()
  ]
  assert same(cells(asked)) == same(whole)


def test_the_results_of_an_interrupted_run_are_not_stored(asked, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(preemption.Notice, '__call__', lambda self: True)
    with pytest.raises(SystemExit):
      asked('--rows=1')
  assert cells(asked)['one']['state'] == 'not yet run'
  asked('--rows=1')
  assert cells(asked)['one']['n'] == '2'


def test_results_of_a_changed_preset_are_ignored(asked, tmp_path):
  asked('--rows=1', '--seeds=1')
  text = tmp_path / 'supervised.toml'
  text.write_text(text.read_text().replace('--labels=1"', '--labels=2"'))
  asked('--rows=1', '--seeds=1')
  assert len(asked.made) == 2  # under another name
  flags = next(asked.results.glob('*labels=2*/seed-0/run.flags'))
  # As if the preset had been different at that time.
  lines = flags.read_text()
  flags.write_text(lines.replace('--steps=2', '--steps=3'))
  note = next((tmp_path / 'runs').glob('*labels=2*/seed-0.flags'))
  note.write_text(flags.read_text())
  asked('--rows=1', '--seeds=1')
  assert '--overwrite' in asked.made[2]
  assert flags.read_text() == lines


def test_a_failed_row_is_one_line_and_the_other_rows_are_kept(asked, capsys):
  # The run's folder holds other files.
  folder = asked.results.parent / 'runs/supervised.svhn-1000,steps=2/seed-0'
  (folder / 'mine').mkdir(parents=True)
  (asked.results.parent / 'data/svhn_cropped').mkdir(parents=True)
  data = f'--data_dir={asked.results.parent}/data'
  with pytest.raises(SystemExit) as stopped:
    asked(data, '--rows=1,3')
  assert stopped.value.code == 1
  assert 'supervised/1, far: status 2' in capsys.readouterr().err
  assert cells(asked)['one']['n'] == '2'


@pytest.mark.slow
def test_a_figure_is_drawn_from_runs_of_its_own_or_of_a_table(asked):
  asked('--figure=supervised/1')
  (picture,) = (asked.results / 'figures').glob('*')
  assert picture.name == 'supervised-1.cpu.0.png'
  with PIL.Image.open(picture) as image:
    assert image.width > 300
  programs = [pathlib.Path(command[1]).stem for command in asked.made]
  assert programs == ['deepbass'] * 2 + ['figures']
  # One line of two splits.
  shown = [word for word in asked.made[-1] if word.startswith('--run=')]
  assert len(shown) == 2
  asked('--figure=supervised/1')
  assert len(asked.made) == 4  # drawn once more, from the same runs


def test_the_list_shows_the_state_of_each_table_and_figure(asked, capsys):
  asked('--rows=1')
  capsys.readouterr()
  asked('--list', '--data_dir=.')
  lines = capsys.readouterr().out.splitlines()
  words = next(
    line for line in lines if line.startswith('supervised/1  digits')
  )
  assert '2 to run, 1 needs svhn_cropped, 1 not reproducible' in words
  assert words.endswith('2 done, 1 needs svhn_cropped, 1 not reproducible')
  assert any(re.search(r'curves  to draw +to draw$', line) for line in lines)


def made_anew(asked, tmp_path, text):
  """Return a page after `--pages`, with results of two splits of a row."""
  with (
    mock.patch.object(tables, 'FOLDER', tmp_path),
    mock.patch.object(tables, 'PAPERS', ('supervised',)),
  ):
    row = tables.all_tables()['supervised/1'].rows[0].at('cpu')
  run = runs.run_of(row)
  for seed, error in enumerate((40.0, 60.0)):
    errors = {'last': [error], 'median_last': [70.0]}
    entry = {'steps': 2, 'seconds': 3 + 4 * seed, 'test_error': errors}
    result = {'method': 'supervised', 'arms': {'supervised': entry}}
    result |= {'device': '1 x cpu', 'commit': 'abc'} | entry
    kept = asked.results / run.name / f'seed-{seed}'
    kept.mkdir(parents=True)
    (kept / 'run.flags').write_text('\n'.join(run.lines) + '\n')
    (kept / 'result.json').write_text(json.dumps(result))
  page = tmp_path / 'page.md'
  page.write_text(text)
  with mock.patch.object(readme_tables, 'PAGES', [page]):
    asked('--pages')
    once = page.read_text()
    asked('--pages')
  assert page.read_text() == once
  return once


def test_a_page_has_the_rows_with_stored_results(asked, tmp_path):
  begin = '<!-- results: supervised/1 cpu -->'
  text = made_anew(
    asked, tmp_path, f'before\n{begin}\nold\n<!-- end -->\nafter\n'
  )
  assert text.startswith(f'before\n{begin}\na paper, Table 1: digits;')
  assert text.endswith('<!-- end -->\nafter\n') and 'old' not in text
  assert '| one | 50.00 ± 2.00 | 50.00 ± 14.14 | 2 |' in text
  assert (
    'far' not in text
    and 'its twin' in text
    and '3 rows without our results are left out' in text
  )
  assert asked.made == []


def test_a_page_has_every_preset_with_the_papers_numbers_and_ours(
  asked, tmp_path
):
  text = made_anew(asked, tmp_path, '<!-- presets -->\n<!-- end -->\n')
  lines = [line.strip('| ').split(' | ') for line in text.splitlines()[3:-1]]
  by_preset = {line[0].strip('`'): line[1:] for line in lines}
  files = (experiments.FOLDER / 'presets').glob('*.flags')
  assert set(by_preset) == {path.stem for path in files}
  assert by_preset['madnn.digits'] == ['–', '–', 'not yet run', '–', '–']
  # A row in two budgets, its twin, and our own row.
  assert by_preset['supervised.digits'] == [
    'supervised/1, own/mine',
    '50.00 ± 2.00; 40.00',
    'one: 50.00 ± 14.14 (2); its twin: 70.00 ± 0.00 (2)',
    '1 x cpu',
    '5',
  ]


def test_rows_of_the_same_name_in_two_tables_keep_their_own_numbers():
  rows = readme_tables.rows_by_preset()['llp.imagenet-130-resnet50']
  store = runs.Store(pathlib.Path('none'), pathlib.Path('none'))
  named, papers, *_ = readme_tables.preset_cells(rows, store)
  assert named == 'llp/2, llp/4, llp/5'
  assert papers.startswith('11.47; 49.60; ')


def test_a_table_without_results_is_shown_as_not_yet_run():
  text = tables.markdown(TABLE, [tables.Ours()], 'paper', brief=True)
  assert '|' not in text and '\n\nnot yet run\n' in text


def test_our_own_table_has_no_columns_of_a_paper(asked, tmp_path):
  with mock.patch.object(tables, 'FOLDER', tmp_path):
    (table,) = tables.own_tables().values()
  mine = tables.Ours((4.0, 6.0), (0, 1), 2, 5.0, '1 x cpu', 'abc')
  assert tables.markdown(table, [mine], 'paper') == (
    'of no paper; test error in %\n\n'
    '| row | ours | n | steps | seconds per split | device |\n'
    '| --- | --- | --- | --- | --- | --- |\n'
    '| the baseline | 5.00 ± 1.41 | 2 | 2 | 5 | 1 x cpu |\n\n'
    '`python experiments/reproduce.py --table=own/mine`; commits abc; ours: '
    'mean ± standard deviation over n splits; seconds: median over the splits\n'
  )


def test_the_pages_are_up_to_date_with_the_stored_results():
  store = runs.Store(pathlib.Path('none'), experiments.FOLDER / 'results')
  for page in readme_tables.PAGES:
    assert (
      readme_tables.with_tables(page.read_text(), store) == page.read_text()
    )


def test_all_evaluations_and_some_other_metrics_are_stored():
  lines = [f'{{"step": {i}, "loss": 1.0}}' for i in range(1000)]
  lines.insert(7, '{"step": 7, "test_error_last": 5.0}')
  kept = runs.thinned(lines)
  assert kept[0] == lines[0] and lines[7] in kept
  assert len(kept) == 201
  assert runs.thinned(lines[:9]) == lines[:9]


def test_a_called_program_ends_with_its_caller(tmp_path):
  script = tmp_path / 'child.py'
  script.write_text(
    'import pathlib, time\n'
    f'pathlib.Path("{tmp_path}/began").touch()\n'
    'time.sleep(60)\n'
  )
  parent = (
    'import sys, reproduce\n'
    'from ssljax.experiments.papers import runs\n'
    f'lock = reproduce.lock(__import__("pathlib").Path("{tmp_path}/seed-0"))\n'
    'with runs.interruptible("me"), lock:\n'
    f'  reproduce.call([sys.executable, "{script}"])\n'
  )
  process = subprocess.Popen([sys.executable, '-c', parent], env=ENVIRONMENT)
  deadline = time.monotonic() + 60
  while not (tmp_path / 'began').exists():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.1)
  process.terminate()
  assert process.wait(timeout=30) == 143
  # The child has released the lock.
  with open(tmp_path / 'seed-0.lock') as file:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_reaches_a_called_program_once(tmp_path, number):
  # The child saves its state at the first signal; a second one would end it.
  script = tmp_path / 'child.py'
  script.write_text(
    'import pathlib, signal, sys, time\n'
    'def save(number, frame):\n'
    '  for n in (signal.SIGINT, signal.SIGTERM):\n'
    '    signal.signal(n, lambda *_: sys.exit(1))\n'
    '  time.sleep(1)\n'
    f'  pathlib.Path("{tmp_path}/saved").touch()\n'
    '  sys.exit(0)\n'
    'for n in (signal.SIGINT, signal.SIGTERM):\n'
    '  signal.signal(n, save)\n'
    f'pathlib.Path("{tmp_path}/began").touch()\n'
    'time.sleep(60)\n'
  )
  parent = (
    'import signal, sys, reproduce\n'
    # Processes in the background of a shell ignore it.
    'signal.signal(signal.SIGINT, signal.default_int_handler)\n'
    'from ssljax.experiments.papers import runs\n'
    'with runs.interruptible("me"):\n'
    f'  reproduce.call([sys.executable, "{script}"])\n'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', parent],
    env=ENVIRONMENT,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  deadline = time.monotonic() + 120
  while not (tmp_path / 'began').exists():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.1)
  os.killpg(process.pid, number)  # as a terminal sends Ctrl-C
  _, error = process.communicate(timeout=60)
  assert (tmp_path / 'saved').exists()
  assert process.returncode == 128 + number
  assert error == (
    f'me: interrupted ({number.name}): run the same command to resume\n'
  )


@pytest.mark.parametrize('rows', ['0', '5', 'one'])
def test_an_unknown_row_is_refused_by_number(asked, rows):
  with pytest.raises(InputError, match=rf'^rows={rows}: .*1 one'):
    asked(f'--rows={rows}')


def test_stored_results_contain_no_local_paths():
  stored = list((experiments.FOLDER / 'results').rglob('*.json'))
  assert stored
  for path in stored:
    assert not re.search(r'["\s=]/\w', path.read_text()), path


@pytest.mark.parametrize('results', ['missing', 'empty', 'file'])
def test_pages_are_kept_if_there_are_no_results(asked, tmp_path, results):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'file').touch()
  page = tmp_path / 'page.md'
  page.write_text('<!-- presets -->\nnumbers\n<!-- end -->\n')
  with (
    mock.patch.object(readme_tables, 'PAGES', [page]),
    pytest.raises(InputError, match=rf'results=.*{results}: (holds|is) no'),
  ):
    asked('--pages', f'--results={tmp_path}/{results}')
  assert 'numbers' in page.read_text()


@pytest.mark.parametrize('mark', ['results: supervised/1 cpu', 'presets'])
def test_pages_are_kept_if_results_would_be_lost(asked, tmp_path, mark):
  begin, end = f'<!-- {mark} -->\n', '<!-- end -->\n'
  text = made_anew(asked, tmp_path, begin + end)
  page = tmp_path / 'page.md'
  (gone,) = asked.results.glob('*/seed-1')
  shutil.rmtree(gone)
  with mock.patch.object(readme_tables, 'PAGES', [page]):
    with pytest.raises(InputError, match=r'has fewer results .*page\.md'):
      asked('--pages')
    assert page.read_text() == text
    asked('--pages', '--fewer')
  assert page.read_text() != text


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    (('--pages', '--table=supervised/1'), 'give one of these'),
    (('--list', '--fewer'), 'fewer: has an effect with pages alone'),
    (('--fewer',), 'fewer: has an effect'),
    (('--table=supervised/1', '--figure=supervised/1'), 'give one of these'),
    (('--list', '--pages'), 'give one of these'),
    (('--figure=supervised/1', '--rows=1'), 'rows: has an effect with table'),
    (('--list', '--rows=1'), 'rows: has an effect with table alone'),
    (('--pages', '--seeds=2'), 'seeds: has an effect'),
    (('--pages', '--measure'), 'measure: has an effect'),
    (('--seeds=2147483648',), 'seeds=2147483648: give at most 1000'),
    (('--results=',), 'results=: give a path'),
  ],
)
def test_flags_without_effect_are_refused(asked, given, expected):
  with pytest.raises(InputError, match=expected):
    asked(*given)
  assert asked.made == []


def test_rows_need_a_table(asked):
  values = flags.FlagValues()
  reproduce.define_flags(values)
  for given in (['--rows=1', '--measure'], ['--rows=1']):
    values(['reproduce', *given])
    with pytest.raises(InputError, match='table'):
      reproduce.act(values.flag_values_dict())


@pytest.mark.parametrize(
  'content',
  [
    '{"arms": {}',
    '[]',
    '\udc80',
    '{"arms": 3}',
    '{}',
    '{"method": {}, "arms": {}}',
  ],
)
def test_a_damaged_stored_result_is_named(asked, tmp_path, content):
  made_anew(asked, tmp_path, '<!-- presets -->\n<!-- end -->\n')
  path = next(asked.results.glob('*/seed-1/result.json'))
  path.write_bytes(content.encode(errors='surrogateescape'))
  with (
    mock.patch.object(readme_tables, 'PAGES', [tmp_path / 'page.md']),
    pytest.raises(InputError, match=rf'{path}.*restore it, or remove'),
  ):
    asked('--pages')


def test_the_hours_left_are_those_of_the_splits_that_are_not_stored(tmp_path):
  store = runs.Store(tmp_path / 'runs', tmp_path / 'results')
  row = tables.Row('one', 2.0, preset='madnn.digits', seeds=3)
  other = tables.Row('two', 2.0, preset='llp.digits', seeds=4)
  asked = {'seeds': None, 'data_dir': None}
  store.keep_step_time(
    runs.run_of(row), {'seconds_per_step': 0.5, 'steps': 7200}
  )
  # 7,200 steps of 0.5 s are an hour; three splits; the other is not timed.
  assert reproduce.hours_left(store, [row, other], asked) == (3.0, 1)
  assert reproduce.hours_left(store, [row, row], asked) == (3.0, 0)
  assert reproduce.hours_left(store, [row], asked | {'seeds': 5}) == (5.0, 0)
  kept = store.result_folder(runs.run_of(row), 1)
  kept.mkdir(parents=True)
  (kept / 'run.flags').write_text('\n'.join(runs.run_of(row).lines) + '\n')
  (kept / 'result.json').write_text('{"complete": true}')
  assert reproduce.hours_left(store, [row, other], asked) == (2.0, 1)
  # A run whose data is not there cannot start.
  svhn = tables.Row('three', 2.0, preset='supervised.svhn-1000', seeds=1)
  assert reproduce.hours_left(store, [svhn], asked) == (0.0, 0)


def test_the_time_of_a_step_is_a_mean_without_the_first_steps(
  tmp_path, monkeypatch
):
  waits = []

  def wait(seconds):
    # Measurements appear one by one; the last line is half written.
    waits.append(seconds)
    ends = 40.0, 41.0, 43.0, 44.0, 50.0, 60.0
    lines = [
      json.dumps({'step': step, 'seconds': end})
      for step, end in enumerate(ends[: len(waits)], 1)
    ]
    lines.insert(0, '{"step": 5, "test_error_last": 3.0}')
    text = '\n'.join(lines) + '\n{"step": 9, "sec'
    (tmp_path / 'metrics.jsonl').write_text(text)

  (tmp_path / 'result.json').write_text('{"total_steps": 77}')
  monkeypatch.setattr(reproduce.time, 'sleep', wait)
  process = mock.Mock(poll=lambda: None if len(waits) < 9 else 0)
  found = reproduce._watch_steps(process, tmp_path)
  # Steps 3, 4 and 5 end at 43, 44 and 50 s, step 2 at 41 s.
  assert found == {'seconds_per_step': 3.0, 'steps': 77}
  assert len(waits) == 5
  # A length that depends on the training, and a run that ends too early.
  (tmp_path / 'result.json').write_text('{"total_steps": null}')
  assert reproduce._watch_steps(process, tmp_path) is None
  ended = mock.Mock(poll=lambda: 1)
  assert reproduce._watch_steps(ended, tmp_path) is None


@pytest.mark.parametrize('name', ['run.flags', 'result.json'])
def test_a_fifo_among_the_stored_results_is_refused(asked, tmp_path, name):
  made_anew(asked, tmp_path, '<!-- presets -->\n<!-- end -->\n')
  path = next(asked.results.glob(f'*/seed-1/{name}'))
  path.unlink()
  os.mkfifo(path)
  with (
    mock.patch.object(readme_tables, 'PAGES', [tmp_path / 'page.md']),
    pytest.raises(InputError, match='it is no regular file'),
  ):
    asked('--pages')


@pytest.mark.slow
def test_a_claim_is_tested_by_paired_runs(asked, capsys):
  asked('--claims')
  out = capsys.readouterr().out
  assert len(asked.made) == 4  # two runs under two splits
  folders = sorted(asked.results.glob('*/seed-*/result.json'))
  errors = {}
  for path in folders:
    found = json.loads(path.read_text())
    errors[found['steps'], found['seeds'][0]] = found['test_error']['last'][0]
  differences = [errors[3, seed] - errors[2, seed] for seed in (0, 1)]
  assert f'| {statistics.fmean(differences):+.2f} [' in out
  assert out.count('| a paper | more steps help |') == 1
  assert (asked.results / 'claims.md').read_text() in out
  asked('--claims')  # finished runs are not repeated
  assert len(asked.made) == 4


def test_a_page_has_the_claims(asked, tmp_path):
  text = made_anew(asked, tmp_path, '<!-- claims -->\nold\n<!-- end -->\n')
  assert text.startswith('<!-- claims -->\n| paper | claim |')
  assert '| a paper | more steps help | – | – | – | 0 | not yet run |' in text
