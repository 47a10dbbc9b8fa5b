"""Runs what a table of the five papers needs, and sets ours beside the paper's.

python experiments/reproduce.py --list
python experiments/reproduce.py --table=madnn/1 --budget=cpu --data_dir=DIR

A row is a preset with some flags under several label splits, each a run of its
own. What is not yet run is run, what was interrupted goes on, what is done is
never run again. A finished run's results are copied to `results/`, and the
tables are made from those copies alone.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from ssljax.cli import tool
from ssljax.errors import InputError, positive, require
from ssljax.experiments.papers import readme_tables, runs, tables
from ssljax.experiments.papers.runs import Run, Store
from ssljax.runs import run_folder
from ssljax.runs import summary as summary_lib

HERE = pathlib.Path(__file__).parent
TIMED = (2, 5)  # steps between which the time is taken: the first are slower


# Running.


def train(store: Store, run: Run, seed: int, data_dir) -> None:
  """Runs or resumes a run under a split, and keeps its results.

  Raises:
    InputError: it failed; what it did so far stays.
  """
  folder = store.folder(run, seed)
  with alone(folder):
    if not store.is_finished(run, seed):
      command = run.command(seed, folder, data_dir)
      # Of a preset that has changed since, there is nothing to go on from.
      command += ['--overwrite'] if store.begin(run, seed) else []
      call(command)
    store.keep(run, seed)


@contextlib.contextmanager
def alone(folder: pathlib.Path):
  """Waits until no other process is in a run's folder, and keeps them out.

  A program that is called inherits the lock: it holds as long as that lives.
  """
  lock = folder.with_suffix('.lock')
  lock.parent.mkdir(parents=True, exist_ok=True)
  with open(lock, 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'{folder}: another process is at it, waiting', flush=True)
      fcntl.flock(file, fcntl.LOCK_EX)
    os.set_inheritable(file.fileno(), True)
    yield


def look_at(store: Store, row: tables.Row, seed: int, data_dir) -> None:
  """Measures what a row takes from one split of a finished run.

  Raises:
    InputError: it failed.
  """
  run = runs.run_of(row)
  train(store, run, seed, data_dir)  # its folder may be gone
  with tempfile.TemporaryDirectory() as out:
    probe = [sys.executable, f'{HERE}/probe.py', f'--seed={seed}', *row.probe]
    where = f'--run={store.folder(run, seed)}', f'--out={out}/probe.npz'
    call([*probe, *where, *runs.data_flag(data_dir)])
    kind = row.look.split(',')[0]
    if kind == 'propagate':
      # Named from there: what is kept is not to tell where it was made.
      files = '--embeddings=probe.npz', '--out=propagate.json'
      propagate = [sys.executable, f'{HERE}/propagate.py', *row.propagate]
      call([*propagate, *files], folder=out)
    found = json.loads((pathlib.Path(out) / f'{kind}.json').read_text())
  store.keep_look(run, seed, row.look, found)


def call(command: list[str], folder: str | None = None) -> None:
  """Runs a program, which ends with this one; one line if it fails."""
  print(f'$ {" ".join(["python", *command[1:]])}', flush=True)
  process = subprocess.Popen(command, close_fds=False, cwd=folder)
  try:
    status = process.wait()
  except BaseException:
    process.terminate()
    process.wait()
    raise
  require(
    not status,
    f'{pathlib.Path(command[1]).name} ended with status {status}, see above; '
    'the same command goes on from where it was',
  )


def chosen(table: tables.Table, rows: list[str] | None) -> list[int]:
  """Places of the rows that --rows asks for, by number; all if unset."""
  count = len(table.rows)
  if not rows:
    return list(range(count))
  good = [row.isdecimal() and 1 <= int(row) <= count for row in rows]
  require(
    all(good),
    f'--rows={",".join(rows)}: give numbers from 1 to {count}, of '
    + ', '.join(f'{i} {row.name}' for i, row in enumerate(table.rows, 1)),
  )
  return [int(row) - 1 for row in rows]


def reproduce(asked: dict[str, Any]) -> int:
  """Runs a table's rows and writes it; how many rows failed."""
  table = tables.find(asked['table'], tables.known_tables(), 'table')
  store, failed = store_of(asked), 0
  for number in chosen(table, asked['rows']):
    try:
      run_row(store, table.rows[number], asked)
    except InputError as error:  # the other rows can be run all the same
      name = table.rows[number].name
      print(f'{table.name}, {name}: {error}', file=sys.stderr)
      failed += 1
  print(written(store, table, asked))
  return failed


def run_row(store: Store, row: tables.Row, asked: dict[str, Any]) -> None:
  """Runs what is missing of a row of a paper."""
  row, data_dir = row.at(asked['budget']), asked['data_dir']
  if row is None:
    return
  run = runs.run_of(row)
  absent = runs.absent(run, row.data, data_dir)
  if absent:
    print(f'{row.name}: left out, {", ".join(absent)} is not in --data_dir')
    return
  for seed in runs.seeds_of(row, asked['seeds']):
    if not store.result(run, seed):
      train(store, run, seed, data_dir)
    if not store.is_done(row, seed):
      look_at(store, row, seed, data_dir)


def draw(asked: dict[str, Any]) -> None:
  """Runs what a figure shows, draws it, and keeps the pictures.

  Raises:
    InputError: it has no such size, or something failed.
  """
  figure = tables.find(asked['figure'], tables.all_figures(), 'figure')
  sized, store = figure.at(asked['budget']), store_of(asked)
  require(
    sized is not None,
    f'--budget={asked["budget"]}: {figure.name} has no such size: leave it out',
  )
  count, data_dir = asked['seeds'] or sized.seeds, asked['data_dir']
  seeds = range(sized.first, sized.first + count)
  for run in runs.runs_of(sized):
    for seed in seeds:
      train(store, run, seed, data_dir)
  for number, part in enumerate(sized.parts):
    shown = [Run(preset, tuple(flags)) for preset, *flags in part.runs]
    folders = [store.folder(run, seed) for run in shown for seed in seeds]
    picture = store.picture(figure, asked['budget'], number)
    with tempfile.TemporaryDirectory() as out:
      command = [sys.executable, f'{HERE}/figures.py', f'--out={out}']
      command += [f'--figure={part.drawn}', *part.arguments]
      command += [f'--run={folder}' for folder in folders]
      call([*command, *runs.data_flag(data_dir)])
      (drawn,) = pathlib.Path(out).glob('*.png')
      picture.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(drawn, picture.with_suffix('.partial'))
      picture.with_suffix('.partial').rename(picture)
    print(f'{picture}{sized.note}')


def written(store: Store, table: tables.Table, asked: dict[str, Any]) -> str:
  """Writes a table as Markdown and CSV; what is printed of it."""
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


def store_of(asked: dict[str, Any]) -> Store:
  """Where the flags say."""
  return Store(pathlib.Path(asked['runs']), pathlib.Path(asked['results']))


# What there is, and what is to be done.


def state_of(store: Store, row: tables.Row, asked: dict[str, Any]) -> str:
  """'done', 'partly', 'to run' or 'needs DATA', of a row as a budget has it."""
  run, seeds = runs.run_of(row), runs.seeds_of(row, asked['seeds'])
  if all(store.is_done(row, seed) for seed in seeds):
    return 'done'
  absent = runs.absent(run, row.data, asked['data_dir'])
  if absent:
    return f'needs {", ".join(absent)}'
  begun = any(store.folder(run, seed).exists() for seed in seeds)
  some = any(store.result(run, seed) for seed in seeds)
  return 'partly' if begun or some else 'to run'


def summary(store: Store, table: tables.Table, budget: str, asked) -> str:
  """How far a table is under a budget, and the hours that are left."""
  rows = [row.at(budget) for row in table.rows if row.preset]
  states = [state_of(store, row, asked) if row else 'no size' for row in rows]
  if set(states) == {'no size'}:
    return '-'
  counts = {state: states.count(state) for state in dict.fromkeys(states)}
  words = [f'{count} {state}' for state, count in counts.items()]
  if len(rows) < len(table.rows):
    words.append(f'{len(table.rows) - len(rows)} no program')
  hours, unknown = hours_left(store, filter(None, rows), asked)
  if hours:
    words.append(f'at least {hours:,.1f} h here')
  if unknown:
    words.append(f'{unknown} not measured')
  return ', '.join(words)


def hours_left(store: Store, rows, asked) -> tuple[float, int]:
  """Hours on this machine of what can be run, and how many runs are unknown.

  Args:
    store: has the seconds of a step, of runs that `--measure` has timed.
    rows: as a budget has them.
    asked: the flags' values by name.
  """
  measured, hours, unknown = store.measured(), 0.0, 0
  for run, row in {runs.run_of(row): row for row in rows}.items():
    seeds = runs.seeds_of(row, asked['seeds'])
    left = [seed for seed in seeds if not store.result(run, seed)]
    if left and not runs.absent(run, row.data, asked['data_dir']):
      step = measured.get(run.name, {'seconds_per_step': 0, 'steps': 0})
      hours += step['seconds_per_step'] * step['steps'] * len(left) / 3600
      unknown += run.name not in measured
  return hours, unknown


def figure_state(
  store: Store, figure: tables.Figure, budget: str, asked
) -> str:
  """'drawn', 'to draw', 'needs DATA', or '-' where there is none so small."""
  sized = figure.at(budget)
  if sized is None:
    return '-'
  places = range(len(sized.parts))
  if all(store.picture(figure, budget, i).exists() for i in places):
    return f'drawn{sized.note}'
  needed = {
    name
    for run in runs.runs_of(sized)
    for name in runs.absent(run, (), asked['data_dir'])
  }
  left = f'needs {", ".join(sorted(needed))}' if needed else 'to draw'
  return f'{left}{sized.note}'


def listing(store: Store, asked: dict[str, Any]) -> str:
  """Every table and figure of the papers, and how far each is."""
  budgets = 'paper', 'cpu'
  rows = [['table', 'shows', 'of the paper', 'of two CPU cores']]
  rows += [
    [name, table.title]
    + [summary(store, table, budget, asked) for budget in budgets]
    for name, table in tables.all_tables().items()
  ]
  own = [['of no paper', 'shows', 'here', '']]
  own += [
    [name, table.title, summary(store, table, 'paper', asked), '']
    for name, table in tables.own_tables().items()
  ]
  drawn = [['figure', 'shows', 'of the paper', 'of two CPU cores']]
  drawn += [
    [name, figure.title]
    + [figure_state(store, figure, budget, asked) for budget in budgets]
    for name, figure in tables.all_figures().items()
  ]
  parts = map(summary_lib.aligned, (rows, drawn, own))
  return '\n\n'.join('\n'.join(part) for part in parts)


def measure(store: Store, asked: dict[str, Any]) -> None:
  """Times a few steps of every run that is still to be done."""
  for table in tables.all_tables().values():
    for row in filter(None, (row.at(asked['budget']) for row in table.rows)):
      run = runs.run_of(row)
      to_do = state_of(store, row, asked) in ('to run', 'partly')
      if to_do and run.name not in store.measured():
        print(f'{table.name}, {row.name}', flush=True)
        step = timed(run, asked['data_dir'])
        if step:
          store.remember(run, step)


def timed(run: Run, data_dir) -> dict[str, float] | None:
  """Seconds of a step of its first stage, and how many steps all arms have.

  Of a run that is given up; None if its length follows from what it learns.
  What comes between steps (evaluations, sweeps) is not in it.
  """
  with tempfile.TemporaryDirectory() as out:
    folder = pathlib.Path(out) / 'run'
    command = [*run.command(0, folder, data_dir), '--record_every=1']
    process = subprocess.Popen(command)
    try:
      return _watched(process, folder)
    finally:
      process.kill()
      process.wait()


def _watched(process, folder: pathlib.Path) -> dict[str, float] | None:
  """What `timed` returns, from a run that goes on."""
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


# The command line.


def define_flags(values: flags.FlagValues) -> None:
  """Defines this program's flags."""
  flags.DEFINE_string(
    'table', None, 'Of a paper, as madnn/1; see --list.', flag_values=values
  )
  flags.DEFINE_string(
    'figure', None, 'Of a paper, as r2d2/2; see --list.', flag_values=values
  )
  flags.DEFINE_list(
    'rows',
    None,
    'Numbers of its rows, from 1; all if unset.',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'seeds', None, "Label splits; the row's own if unset.", flag_values=values
  )
  flags.DEFINE_enum(
    'budget',
    'paper',
    [*tables.BUDGETS, 'paper'],
    "What a row may cost: the paper's size, or a smaller one, named so.",
    flag_values=values,
  )
  flags.DEFINE_bool(
    'list', False, 'List the tables and figures, and go.', flag_values=values
  )
  flags.DEFINE_bool(
    'measure',
    False,
    'Time a few steps of what is to be run.',
    flag_values=values,
  )
  flags.DEFINE_bool(
    'pages', False, 'Make the tables of README.md anew.', flag_values=values
  )
  flags.DEFINE_string(
    'data_dir', None, 'Where TFDS data sets are prepared.', flag_values=values
  )
  flags.DEFINE_string(
    'runs',
    str(HERE.parent / 'runs/reproduce'),
    'Where the runs are made.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'results',
    str(HERE / 'results'),
    'Where their results stay.',
    flag_values=values,
  )


def act(asked: dict[str, Any]) -> None:
  """Does what the flags, by name, ask for; exit status 1 if rows failed."""
  if asked['seeds'] is not None:
    positive(seeds=asked['seeds'])
  if asked['pages']:
    readme_tables.write(store_of(asked))
    return
  if asked['measure']:
    measure(store_of(asked), asked)
  if asked['list']:
    print(listing(store_of(asked), asked))
  elif asked['figure']:
    draw(asked)
  elif asked['table'] or not asked['measure']:
    require(asked['table'] is not None, '--table: give one; --list has them')
    failed = reproduce(asked)
    if failed:
      print(f'{failed} rows failed, see above', file=sys.stderr)
      sys.exit(1)


if __name__ == '__main__':
  # So that what was called is ended too.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  tool.start('reproduce', define_flags, act)
