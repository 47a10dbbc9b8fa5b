"""Runs what a table of the five papers needs, and sets ours beside the paper's.

python experiments/reproduce.py --list
python experiments/reproduce.py --table=madnn/1 --budget=cpu --data_dir=DIR

A row is a preset with some flags under several label splits. What is not yet
run is run, what was interrupted goes on, nothing is run twice; more --seeds
run those that are new alone. A finished run's results are copied to
`results/`, and the tables are made from those copies alone.
"""

import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags
import loading
import report
import runs
from runs import Run, Store
import tables

from ssljax import workdir
from ssljax.core import InputError, positive, require

HERE = pathlib.Path(__file__).parent
TIMED_STEPS = 4  # the first ones are slower
PAGES = (HERE.parent / 'README.md', HERE / 'README.md')
MARKS = re.compile(
  r'(?P<begin><!-- results: (?P<table>\S+) (?P<budget>\S+) -->)\n'
  r'.*?<!-- end -->',
  re.DOTALL,
)


def execute(store: Store, run: Run, splits: range, data_dir) -> None:
  """Runs or resumes some splits, and keeps the results.

  Raises:
    InputError: it failed; what it did so far stays.
  """
  folder = store.folder(run, splits)
  call(run.command(splits.start, len(splits), folder, data_dir))
  store.keep(run, folder)


def look_at(store: Store, run: Run, row: tables.Row, seed: int, data_dir):
  """Measures what a row takes from one split of a finished run.

  Raises:
    InputError: it failed, or the run's own folder is gone.
  """
  parts = store.parts(run)
  splits = next(splits for splits in parts if seed in splits)
  folder = store.runs / run.name / parts[splits].name
  data = [f'--data_dir={data_dir}'] if data_dir else []
  with tempfile.TemporaryDirectory() as out:
    command = f'probe.py --run={folder} --seed={seed} --out={out}/probe.npz'
    call([sys.executable, *command.split(), *row.probe, *data])
    if row.take.startswith('propagate'):
      command = f'propagate.py --embeddings={out}/probe.npz'
      command += f' --out={out}/propagate.json'
      call([sys.executable, *command.split(), *row.propagate])
    kept = parts[splits] / row.look / f'seed-{seed}'
    kept.parent.mkdir(exist_ok=True)
    (pathlib.Path(out) / 'probe.npz').unlink()
    shutil.copytree(out, kept.with_suffix('.partial'), dirs_exist_ok=True)
    kept.with_suffix('.partial').rename(kept)


def call(command: list[str]) -> None:
  """Runs a program of this folder; one line if it fails."""
  program = HERE / command[1]
  print(f'$ {" ".join(["python", *command[1:]])}', flush=True)
  words = [command[0], str(program), *command[2:]]
  status = subprocess.run(words, check=False).returncode
  require(
    not status,
    f'{program.name} ended with status {status}, see above; the same command '
    'goes on from where it was',
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


def reproduce(asked: dict[str, Any]) -> None:
  """Runs a table's rows and writes it."""
  table = tables.find(asked['table'], tables.all_tables(), 'table')
  store, failed = store_of(asked), 0
  for place in chosen(table, asked['rows']):
    try:
      run_row(store, table.rows[place], asked)
    except InputError as error:  # the other rows can be run all the same
      print(f'{table.name}, {table.rows[place].name}: {error}', file=sys.stderr)
      failed += 1
  print(written(store, table, asked))
  require(not failed, f'{failed} rows failed, see above; the others stand')


def run_row(store: Store, row: tables.Row, asked: dict[str, Any]) -> None:
  """Runs what is missing of a row of a paper."""
  row, data_dir = row.at(asked['budget']), asked['data_dir']
  if row is None:
    return
  absent = [name for name in row.data if not runs.on_disk(name, data_dir)]
  if absent:
    print(f'{row.name}: left out, {", ".join(absent)} is not in --data_dir')
    return
  run, seeds = runs.run_of(row), runs.seeds_of(row, asked['seeds'])
  for splits in runs.missing(store, run, seeds):
    execute(store, run, splits, data_dir)
  for seed in sorted(set(range(seeds)) - store.looked(run, row.look)):
    look_at(store, run, row, seed, data_dir)


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
  count = asked['seeds'] or sized.seeds
  folders = []
  for run in runs.runs_of(sized):
    execute(store, run, range(count), asked['data_dir'])
    folders.append(store.folder(run, range(count)))
  data = [f'--data_dir={asked["data_dir"]}'] if asked['data_dir'] else []
  groups = [[folder] for folder in folders] if sized.apart else [folders]
  for (part, group), number in zip(
    itertools.product(sized.drawn, groups), itertools.count()
  ):
    with tempfile.TemporaryDirectory() as out:
      command = ['figures.py', f'--figure={part}', f'--out={out}']
      command += [f'--run={folder}' for folder in group]
      call([sys.executable, *command, *sized.arguments, *data])
      for picture in pathlib.Path(out).glob('*.png'):
        store.keep_picture(figure, asked['budget'], picture, number)


def written(store: Store, table: tables.Table, asked: dict[str, Any]) -> str:
  """Writes a table as Markdown and CSV; what is printed of it."""
  how = asked['budget'], asked['seeds']
  found = [runs.ours(store, row, *how) for row in table.rows]
  stem = store.results / f'{table.name.replace("/", "-")}.{asked["budget"]}'
  store.results.mkdir(parents=True, exist_ok=True)
  text = tables.markdown(table, found)
  workdir.write_atomically(stem.with_name(f'{stem.name}.md'), text)
  workdir.write_atomically(
    stem.with_name(f'{stem.name}.csv'), tables.as_csv(table, found)
  )
  return (
    f'{table.name}: {table.title}; {table.measure}; the paper: '
    f'{table.statistic}\n{text}written to {stem}.md, .csv'
  )


def store_of(asked: dict[str, Any]) -> Store:
  """Where the flags say."""
  return Store(pathlib.Path(asked['runs']), pathlib.Path(asked['results']))


# What there is, and what is to be done.


def state_of(store: Store, row: tables.Row, asked: dict[str, Any]) -> str:
  """'done', 'partly', 'to run' or 'needs DATA', of a row as a budget has it."""
  run, seeds = runs.run_of(row), runs.seeds_of(row, asked['seeds'])
  if set(range(seeds)) <= store.looked(run, row.look):
    return 'done'
  absent = [x for x in row.data if not runs.on_disk(x, asked['data_dir'])]
  if absent:
    return f'needs {", ".join(absent)}'
  return 'partly' if store.seeds(run) or store.begun(run) else 'to run'


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
    words.append(f'about {hours:,.1f} h here')
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
    if state_of(store, row, asked) in ('to run', 'partly'):
      seeds = sum(
        map(len, runs.missing(store, run, runs.seeds_of(row, asked['seeds'])))
      )
      step = measured.get(run.name, {'seconds_per_step': 0, 'steps': 0})
      hours += step['seconds_per_step'] * step['steps'] * seeds / 3600
      unknown += run.name not in measured
  return hours, unknown


def listing(store: Store, asked: dict[str, Any]) -> str:
  """Every table and figure of the papers, and how far each is."""
  budgets = 'paper', 'cpu'
  rows = [['table', 'shows', 'of the paper', 'of two CPU cores']]
  rows += [
    [name, table.title]
    + [summary(store, table, budget, asked) for budget in budgets]
    for name, table in tables.all_tables().items()
  ]
  drawn = [['figure', 'shows', 'of the paper', 'of two CPU cores']]
  drawn += [
    [name, figure.title]
    + [figure_state(store, figure, budget, asked) for budget in budgets]
    for name, figure in tables.all_figures().items()
  ]
  return '\n'.join([*report.aligned(rows), '', *report.aligned(drawn)])


def figure_state(
  store: Store, figure: tables.Figure, budget: str, asked
) -> str:
  """'drawn', 'to draw', 'needs DATA', or '-' where there is none so small."""
  sized = figure.at(budget)
  if sized is None:
    return '-'
  if store.pictures(figure, budget):
    return 'drawn'
  needed = {name for run in runs.runs_of(sized) for name in run.data}
  absent = [x for x in sorted(needed) if not runs.on_disk(x, asked['data_dir'])]
  return f'needs {", ".join(absent)}' if absent else 'to draw'


def measure(store: Store, asked: dict[str, Any]) -> None:
  """Times a few steps of every run that is still to be done."""
  for table in tables.all_tables().values():
    for row in filter(None, (row.at(asked['budget']) for row in table.rows)):
      run = runs.run_of(row)
      to_do = state_of(store, row, asked) in ('to run', 'partly')
      if to_do and run.name not in store.measured():
        print(f'{table.name}, {row.name}', flush=True)
        store.remember(run, timed(run, asked['data_dir']))


def timed(run: Run, data_dir) -> dict[str, float] | None:
  """Seconds of a step and how many there are, from a run that is given up."""
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder) / 'run'
    command = run.command(0, 1, folder, data_dir)
    command += ['--record_every=1', '--nobaseline']
    command[1] = str(HERE / command[1])
    process = subprocess.Popen(command)
    try:
      return _watched(process, folder)
    finally:
      process.kill()
      process.wait()


def _watched(process, folder: pathlib.Path) -> dict[str, float] | None:
  """The time between steps 2 and 4 of a run that goes on."""
  while process.poll() is None:
    time.sleep(1)
    path = folder / 'metrics.jsonl'
    lines = path.read_text().splitlines()[:-1] if path.exists() else []
    times = [x['seconds'] for x in map(json.loads, lines) if 'seconds' in x]
    if len(times) > TIMED_STEPS:
      total = json.loads((folder / 'result.json').read_text())['total_steps']
      seconds = (times[TIMED_STEPS] - times[1]) / (TIMED_STEPS - 1)
      return total and {'seconds_per_step': seconds, 'steps': total}
  return None


# README.


def written_into(text: str, asked: dict[str, Any]) -> str:
  """A page with its tables made anew.

  A table stands between `<!-- results: TABLE BUDGET -->` and `<!-- end -->`.
  """
  known, store = tables.all_tables(), store_of(asked)

  def made(match) -> str:
    table = tables.find(match['table'], known, 'table')
    # Not whether data is on this machine's disk: a page is the same everywhere.
    found = [runs.ours(store, row, match['budget'], None) for row in table.rows]
    body = tables.markdown(table, found)
    return f'{match["begin"]}\n{body}<!-- end -->'

  return MARKS.sub(made, text)


def write_pages(asked: dict[str, Any]) -> None:
  """Makes the tables of both pages anew."""
  for page in PAGES:
    workdir.write_atomically(page, written_into(page.read_text(), asked))


def define_flags() -> None:
  """Defines this program's flags."""
  flags.DEFINE_string('table', None, 'Of a paper, as madnn/1; see --list.')
  flags.DEFINE_string('figure', None, 'Of a paper, as r2d2/2; see --list.')
  flags.DEFINE_list('rows', None, 'Numbers of its rows, from 1; all if unset.')
  flags.DEFINE_integer('seeds', None, "Label splits; the row's own if unset.")
  flags.DEFINE_enum(
    'budget',
    'paper',
    [*tables.BUDGETS, 'paper'],
    "What a row may cost: the paper's size, or a smaller one, named so.",
  )
  flags.DEFINE_bool('list', False, 'List the tables and figures, and go.')
  flags.DEFINE_bool('measure', False, 'Time a few steps of what is to be run.')
  flags.DEFINE_bool('pages', False, 'Make the tables of README.md anew.')
  flags.DEFINE_string('data_dir', None, 'Where TFDS data sets are prepared.')
  flags.DEFINE_string('runs', 'runs/reproduce', 'Where the runs are made.')
  flags.DEFINE_string(
    'results', str(HERE / 'results'), 'Where their results stay.'
  )


def act(asked: dict[str, Any]) -> None:
  """Does what the flags, by name, ask for."""
  if asked['seeds'] is not None:
    positive(seeds=asked['seeds'])
  if asked['pages']:
    write_pages(asked)
    return
  if asked['measure']:
    measure(store_of(asked), asked)
  if asked['list']:
    print(listing(store_of(asked), asked))
  elif asked['figure']:
    draw(asked)
  elif not asked['measure']:
    reproduce(asked)


if __name__ == '__main__':
  loading.main('reproduce', define_flags, act)
