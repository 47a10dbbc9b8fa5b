"""Reproduce tables and figures of the five papers.

python experiments/reproduce.py --list
python experiments/reproduce.py --table=madnn/1 --budget=cpu --data_dir=DIR
python experiments/reproduce.py --claims --data_dir=DIR

A row of a table is a preset with flags. It is trained under several label
splits, each in a run of its own. Finished runs are not repeated and interrupted
runs are resumed. The results of a finished run are copied to `results/`, and
the tables are made from these copies alone.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from ssljax.cli import main, tool
from ssljax.errors import InputError, positive, require
from ssljax.experiments import FOLDER
from ssljax.experiments.papers import claims, readme_tables, runs, tables
from ssljax.experiments.papers.runs import PresetRun, Store, call
from ssljax.runs import run_folder
from ssljax.runs import summary as summary_lib

MOST_SEEDS = 1000
TIMED = (2, 5)  # steps between which time is measured; the first are slower


# Training and measuring.


def train_run(store: Store, run: PresetRun, seed: int, data_dir) -> None:
  """Train or resume a run under one split, and store its results.

  Raises:
    InputError: the run failed; it can be resumed.
  """
  folder = store.folder(run, seed)
  with lock(folder):
    if not store.is_finished(run, seed):
      command = run.command(seed, folder, data_dir)
      # A run of an older version of the preset cannot be resumed.
      command += ['--overwrite'] if store.begin(run, seed) else []
      call(command)
    store.keep(run, seed)


@contextlib.contextmanager
def lock(folder: pathlib.Path):
  """Hold the lock of a run's folder; wait while another process holds it.

  Called programs inherit the lock, so it is held until they end.
  """
  path = folder.with_suffix('.lock')
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'{folder}: waiting for another process', flush=True)
      fcntl.flock(file, fcntl.LOCK_EX)
    os.set_inheritable(file.fileno(), True)
    yield


def measure_row(store: Store, row: tables.Row, seed: int, data_dir) -> None:
  """Run the measurement of a row on a finished run, and store it.

  Raises:
    InputError: a program failed.
  """
  run = runs.run_of(row)
  train_run(store, run, seed, data_dir)  # The run's folder may be missing.
  with tempfile.TemporaryDirectory() as out:
    probe = [*runs.program('probe'), f'--seed={seed}', *row.probe]
    where = f'--run={store.folder(run, seed)}', f'--out={out}/probe.npz'
    call([*probe, *where, *runs.data_flag(data_dir)])
    kind = row.measurement.split(',')[0]
    if kind == 'propagate':
      # Relative names keep local paths out of the stored result.
      files = '--embeddings=probe.npz', '--out=propagate.json'
      call([*runs.program('propagate'), *row.propagate, *files], folder=out)
    found = json.loads((pathlib.Path(out) / f'{kind}.json').read_text())
  store.keep_measurement(run, seed, row.measurement, found)


# Tables.


def selected_rows(table: tables.Table, rows: list[str] | None) -> list[int]:
  """Return the indices of the rows with the given numbers; all if None.

  Raises:
    InputError: the table has no such row.
  """
  count = len(table.rows)
  if not rows:
    return list(range(count))
  good = [row.isdecimal() and 1 <= int(row) <= count for row in rows]
  require(
    all(good),
    f'`rows`={",".join(rows)}: give numbers from 1 to {count}: '
    + ', '.join(f'{i} {row.name}' for i, row in enumerate(table.rows, 1)),
  )
  return [int(row) - 1 for row in rows]


def reproduce_table(asked: dict[str, Any]) -> int:
  """Run the selected rows of a table and write it; return the failed rows."""
  table = tables.find(asked['table'], tables.known_tables(), 'table')
  store, failed = store_of(asked), 0
  for index in selected_rows(table, asked['rows']):
    row = table.rows[index]
    try:
      run_row(store, row, asked)
    except InputError as error:  # The other rows are independent.
      message = main.as_flags(error)
      print(f'{table.name}, {row.name}: {message}', file=sys.stderr)
      failed += 1
  print(write_table(store, table, asked))
  return failed


def run_row(store: Store, row: tables.Row, asked: dict[str, Any]) -> None:
  """Run what is missing of a row."""
  row, data_dir = row.at(asked['budget']), asked['data_dir']
  if row is None:
    return
  run = runs.run_of(row)
  missing = runs.missing_data(run, row.data, data_dir)
  if missing:
    print(f'{row.name}: left out, {", ".join(missing)} is not in --data_dir')
    return
  for seed in runs.seeds_of(row, asked['seeds']):
    if not store.result(run, seed):
      train_run(store, run, seed, data_dir)
    if not store.is_done(row, seed):
      measure_row(store, row, seed, data_dir)


def write_table(
  store: Store, table: tables.Table, asked: dict[str, Any]
) -> str:
  """Write a table as Markdown and CSV; return a text to print."""
  budget = asked['budget']
  found = [runs.ours(store, row, budget, asked['seeds']) for row in table.rows]
  stem = f'{store.results}/{table.name.replace("/", "-")}.{budget}'
  store.results.mkdir(parents=True, exist_ok=True)
  text = tables.markdown(table, found, budget)
  run_folder.write_atomically(pathlib.Path(f'{stem}.md'), text)
  run_folder.write_atomically(
    pathlib.Path(f'{stem}.csv'), tables.as_csv(table, found)
  )
  return f'{text}written to {stem}.md, .csv'


def reproduce_claims(asked: dict[str, Any]) -> int:
  """Run what is missing of the claims, write their table; return failures."""
  store, failed = store_of(asked), 0
  for number, claim in enumerate(claims.read(), 1):
    for row in (claim.with_part, claim.without_part):
      try:
        run_row(store, row, asked | {'budget': 'paper'})
      except InputError as error:  # The other claims are independent.
        print(f'claim {number}: {main.as_flags(error)}', file=sys.stderr)
        failed += 1
  path = store.results / 'claims.md'
  store.results.mkdir(parents=True, exist_ok=True)
  text = claims.markdown(store)
  run_folder.write_atomically(path, text)
  print(f'{text}written to {path}')
  return failed


def store_of(asked: dict[str, Any]) -> Store:
  """Return the store in the folders that the flags name."""
  found = {}
  for name in ('runs', 'results'):
    path = found[name] = main.as_path(name, asked[name])
    require(
      path.is_dir() or not os.path.lexists(path),
      f'`{name}`={path}: is no folder: give a folder',
    )
  return Store(**found)


# Figures.


def reproduce_figure(asked: dict[str, Any]) -> None:
  """Run what is missing of a figure, draw it, and store the pictures.

  Raises:
    InputError: the budget has no such figure, or a program failed.
  """
  figure = tables.find(asked['figure'], tables.all_figures(), 'figure')
  sized, store = figure.at(asked['budget']), store_of(asked)
  require(
    sized is not None,
    f'`budget`={asked["budget"]}: has no {figure.name}: leave it out',
  )
  count, data_dir = asked['seeds'] or sized.seeds, asked['data_dir']
  seeds = range(sized.first, sized.first + count)
  for run in runs.runs_of(sized):
    for seed in seeds:
      train_run(store, run, seed, data_dir)
  for number, panel in enumerate(sized.parts):
    shown = [PresetRun(preset, tuple(flags)) for preset, *flags in panel.runs]
    folders = [store.folder(run, seed) for run in shown for seed in seeds]
    picture = store.picture(figure, asked['budget'], number)
    draw_panel(panel, folders, picture, data_dir)
    print(f'{picture}{sized.note}')


def draw_panel(
  panel: tables.Panel,
  folders: list[pathlib.Path],
  picture: pathlib.Path,
  data_dir,
) -> None:
  """Draw a panel of a figure.

  Args:
    panel: the panel.
    folders: folders of the runs.
    picture: PNG file to write.
    data_dir: folder of prepared data sets, or None.
  """
  with tempfile.TemporaryDirectory() as out:
    command = [*runs.program('figures'), f'--out={out}']
    command += [f'--figure={panel.drawn}', *panel.arguments]
    command += [f'--run={folder}' for folder in folders]
    call([*command, *runs.data_flag(data_dir)])
    (drawn,) = pathlib.Path(out).glob('*.png')
    picture.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(drawn, picture.with_suffix('.partial'))
    picture.with_suffix('.partial').rename(picture)


# The list of tables and figures.


def row_state(store: Store, row: tables.Row, asked: dict[str, Any]) -> str:
  """Return 'done', 'partly', 'to run' or 'needs DATA' for a row."""
  run, seeds = runs.run_of(row), runs.seeds_of(row, asked['seeds'])
  if all(store.is_done(row, seed) for seed in seeds):
    return 'done'
  missing = runs.missing_data(run, row.data, asked['data_dir'])
  if missing:
    return f'needs {", ".join(missing)}'
  begun = any(store.folder(run, seed).exists() for seed in seeds)
  some = any(store.result(run, seed) for seed in seeds)
  return 'partly' if begun or some else 'to run'


def table_state(store: Store, table: tables.Table, budget: str, asked) -> str:
  """Return the number of rows in each state, and the remaining hours."""
  rows = [row.at(budget) for row in table.rows if row.preset]
  states = [
    row_state(store, row, asked) if row else 'not in this budget'
    for row in rows
  ]
  if set(states) == {'not in this budget'}:
    return '-'
  counts = {state: states.count(state) for state in dict.fromkeys(states)}
  words = [f'{count} {state}' for state, count in counts.items()]
  if len(rows) < len(table.rows):
    words.append(f'{len(table.rows) - len(rows)} not reproducible')
  hours, unknown = hours_left(store, filter(None, rows), asked)
  if hours:
    words.append(f'at least {hours:,.1f} h on this machine')
  if unknown:
    words.append(f'{unknown} of unknown time')
  return ', '.join(words)


def hours_left(store: Store, rows, asked) -> tuple[float, int]:
  """Return the hours of all runs that can start, and the untimed runs.

  Args:
    store: has the time of a step, for runs that --measure has timed.
    rows: rows with the settings of a budget.
    asked: values of the flags.

  Returns:
    Hours on this machine, and the number of runs that were not timed.
  """
  timed, hours, unknown = store.step_times(), 0.0, 0
  for run, row in {runs.run_of(row): row for row in rows}.items():
    seeds = runs.seeds_of(row, asked['seeds'])
    left = [seed for seed in seeds if not store.result(run, seed)]
    if left and not runs.missing_data(run, row.data, asked['data_dir']):
      step = timed.get(run.name, {'seconds_per_step': 0, 'steps': 0})
      hours += step['seconds_per_step'] * step['steps'] * len(left) / 3600
      unknown += run.name not in timed
  return hours, unknown


def figure_state(
  store: Store, figure: tables.Figure, budget: str, asked
) -> str:
  """Return 'drawn', 'to draw', 'needs DATA', or '-' if not in the budget."""
  sized = figure.at(budget)
  if sized is None:
    return '-'
  parts = range(len(sized.parts))
  if all(store.picture(figure, budget, i).exists() for i in parts):
    return f'drawn{sized.note}'
  needed = {
    name
    for run in runs.runs_of(sized)
    for name in runs.missing_data(run, (), asked['data_dir'])
  }
  left = f'needs {", ".join(sorted(needed))}' if needed else 'to draw'
  return f'{left}{sized.note}'


def listing(store: Store, asked: dict[str, Any]) -> str:
  """Return all tables and figures with their states."""
  budgets = 'paper', 'cpu'
  heads = ['title', 'budget paper', 'budget cpu']
  rows = [['table', *heads]]
  rows += [
    [name, table.title]
    + [table_state(store, table, budget, asked) for budget in budgets]
    for name, table in tables.all_tables().items()
  ]
  own = [['own table', *heads]]
  own += [
    [name, table.title, table_state(store, table, 'paper', asked), '']
    for name, table in tables.own_tables().items()
  ]
  drawn = [['figure', *heads]]
  drawn += [
    [name, figure.title]
    + [figure_state(store, figure, budget, asked) for budget in budgets]
    for name, figure in tables.all_figures().items()
  ]
  parts = map(summary_lib.aligned, (rows, drawn, own))
  return '\n\n'.join('\n'.join(part) for part in parts)


# The time of a step.


def measure_steps(store: Store, asked: dict[str, Any]) -> None:
  """Time a few steps of every run that is not done yet."""
  for table in tables.all_tables().values():
    for row in filter(None, (row.at(asked['budget']) for row in table.rows)):
      run = runs.run_of(row)
      to_do = row_state(store, row, asked) in ('to run', 'partly')
      if to_do and run.name not in store.step_times():
        print(f'{table.name}, {row.name}', flush=True)
        step = time_steps(run, asked['data_dir'])
        if step:
          store.keep_step_time(run, step)


def time_steps(run: PresetRun, data_dir) -> dict[str, float] | None:
  """Start a run, time its first steps, and stop it.

  Work between steps, such as evaluations and passes over the data set, is not
  included.

  Returns:
    Seconds per step of the first stage, and the number of steps of all trained
    methods. None if the length depends on the training.
  """
  with tempfile.TemporaryDirectory() as out:
    folder = pathlib.Path(out) / 'run'
    command = [*run.command(0, folder, data_dir), '--record_every=1']
    process = subprocess.Popen(command)
    try:
      return _watch_steps(process, folder)
    finally:
      process.kill()
      process.wait()


def _watch_steps(process, folder: pathlib.Path) -> dict[str, float] | None:
  """Return the result of `time_steps` from a running process."""
  first, last = TIMED
  while process.poll() is None:
    time.sleep(1)
    path = folder / 'metrics.jsonl'
    lines = path.read_text().splitlines()[:-1] if path.exists() else []
    measured = [x for x in map(json.loads, lines) if 'seconds' in x]
    times = {x['step']: x['seconds'] for x in measured}
    if last in times:
      total = json.loads((folder / 'result.json').read_text())['total_steps']
      seconds = (times[last] - times[first]) / (last - first)
      return total and {'seconds_per_step': seconds, 'steps': total}
  return None


# The program.


def default_folders() -> dict[str, pathlib.Path]:
  """Return the default folders of runs and results.

  They are in the clone of the repository, or in the current folder if the
  package is installed without one.
  """
  root = FOLDER.parent
  if (root / 'pyproject.toml').is_file():
    return {'runs': root / 'runs/reproduce', 'results': FOLDER / 'results'}
  return {
    'runs': pathlib.Path('runs/reproduce'),
    'results': pathlib.Path('runs/results'),
  }


def define_flags(values: flags.FlagValues) -> None:
  """Define the flags of this program."""
  folders = default_folders()
  for name, default, text in (
    ('table', None, 'Table of a paper to reproduce, as madnn/1; see --list.'),
    ('figure', None, 'Figure of a paper to reproduce, as r2d2/2; see --list.'),
    ('data_dir', None, 'Folder of prepared TFDS data sets.'),
    ('runs', str(folders['runs']), 'Folder of the runs.'),
    ('results', str(folders['results']), 'Folder of the stored results.'),
  ):
    flags.DEFINE_string(name, default, text, flag_values=values)
  for name, text in {
    'claims': 'Test the central claims of the papers.',
    'list': 'List the tables and figures.',
    'measure': 'Time a few steps of every run that is not done yet.',
    'pages': 'Generate the tables of the README.md files.',
    'fewer': 'Let --pages remove results that are not in --results.',
  }.items():
    flags.DEFINE_bool(name, False, text, flag_values=values)
  flags.DEFINE_list(
    'rows',
    None,
    'Numbers of the rows to run, from 1; all if unset.',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'seeds',
    None,
    "Number of label splits; the row's own if unset.",
    flag_values=values,
  )
  flags.DEFINE_enum(
    'budget',
    'paper',
    [*tables.BUDGETS, 'paper'],
    "Size of the runs: the paper's, or reduced settings, listed in the table.",
    flag_values=values,
  )


def check_flags(asked: dict[str, Any]) -> None:
  """Raise `InputError` for flags that exclude each other or have no effect."""
  if asked['seeds'] is not None:
    positive(seeds=asked['seeds'])
    require(
      asked['seeds'] <= MOST_SEEDS,
      f'`seeds`={asked["seeds"]}: give at most {MOST_SEEDS}',
    )
  actions = {
    name: asked[name]
    for name in ('claims', 'list', 'pages', 'table', 'figure')
    if asked[name] not in (None, False)
  }
  shown = lambda name: (
    f'`{name}`' if asked[name] is True else f'`{name}`={asked[name]}'
  )
  require(
    len(actions) < 2,
    f'{", ".join(map(shown, actions))}: give one of these',
  )
  require(
    bool(actions) or asked['measure'],
    '`table`: give one, or `claims=True`; `list=True` lists the tables',
  )
  require(
    not asked['claims'] or asked['budget'] == 'paper',
    f'`budget`={asked["budget"]}: `claims=True` has one size: leave it out',
  )
  owners = {'rows': ('table',), 'seeds': ('claims', 'table', 'figure', 'list')}
  owners |= {'measure': ('table', 'figure', 'list'), 'fewer': ('pages',)}
  for name, needed in owners.items():
    unused = asked[name] and actions and not actions.keys() & set(needed)
    alone = name in ('rows', 'fewer') and asked[name] and not actions
    words = ' or '.join(f'`{other}`' for other in needed)
    require(
      not unused and not alone,
      f'`{name}`: has an effect with {words} alone: leave it out',
    )


@runs.interruptible('reproduce')
def act(asked: dict[str, Any]) -> None:
  """Do what the flags select; exit with status 1 if rows failed."""
  check_flags(asked)
  if asked['data_dir'] is not None:
    asked = asked | {'data_dir': main.as_path('data_dir', asked['data_dir'])}
  store = store_of(asked)
  if asked['pages']:
    readme_tables.write_pages(store, asked['fewer'])
    return
  if asked['measure']:
    measure_steps(store, asked)
  if asked['list']:
    print(listing(store, asked))
  elif asked['figure']:
    reproduce_figure(asked)
  elif asked['table'] or asked['claims']:
    reproduce = reproduce_table if asked['table'] else reproduce_claims
    failed = reproduce(asked)
    if failed:
      print(f'{failed} rows failed, see above', file=sys.stderr)
      sys.exit(1)


if __name__ == '__main__':
  tool.start('reproduce', define_flags, act, devices=False)
