"""Runs what a table of the five papers needs, and sets ours beside the paper's.

python experiments/reproduce.py --list
python experiments/reproduce.py --table=madnn/1 --budget=cpu --data_dir=DIR

A row is a preset with some flags under several label splits. What is not yet
run is run, what was interrupted goes on, nothing is run twice; more --seeds
run those that are new alone. A finished run's results are copied to
`results/RUN/`, and the table is made from those copies alone.
"""

from collections.abc import Iterator
import hashlib
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from absl import flags
import loading
import report
import tables

from ssljax import workdir
from ssljax.core import InputError, positive, require

HERE = pathlib.Path(__file__).parent
KEPT = ('result.json', 'metrics.jsonl', 'flags.txt')
EMBEDDED = ('digits', 'yin-yang')  # data sets that are never missing
LONGEST_NAME = 120
TIMED_STEPS = 4  # the first ones are slower
PAGES = (HERE.parent / 'README.md', HERE / 'README.md')
MARKS = re.compile(
  r'(?P<begin><!-- results: (?P<table>\S+) (?P<budget>\S+) -->)\n'
  r'.*?<!-- end -->',
  re.DOTALL,
)


class Run(NamedTuple):
  """What one or more rows are made from: a preset with flags."""

  preset: str
  flags: tuple[str, ...]  # after the preset

  @property
  def name(self) -> str:
    """Of its folder: the preset and the flags."""
    name = ','.join([self.preset, *(flag.lstrip('-') for flag in self.flags)])
    name = name.replace('/', '_')
    if len(name) > LONGEST_NAME:
      digest = hashlib.sha256(name.encode()).hexdigest()[:8]
      name = f'{name[: LONGEST_NAME - 9]}~{digest}'
    return name

  @property
  def lines(self) -> list[str]:
    """The flags it is defined by: those of its preset, then its own."""
    text = (HERE / f'presets/{self.preset}.flags').read_text().splitlines()
    return [x for x in text if x and not x.startswith('#')] + list(self.flags)

  def value(self, flag: str, default: str) -> str:
    """What it gives a flag: the last of its lines that does."""
    given = [x for x in self.lines if x.startswith(f'--{flag}=')]
    return given[-1].split('=', 1)[1] if given else default

  def command(self, first: int, count: int, folder, data_dir) -> list[str]:
    """Runs `count` splits from `first` on."""
    return [
      sys.executable,
      f'{self.preset.split(".")[0]}.py',
      f'--flagfile={HERE}/presets/{self.preset}.flags',
      *self.flags,
      f'--seed={first}',
      f'--seeds={count}',
      f'--workdir={folder}',
      *([f'--data_dir={data_dir}'] if data_dir else []),
    ]


def run_of(row: tables.Row, budget: str) -> Run | None:
  """The run that a row is made from under a budget, if there is one."""
  cut = row.cut(budget)
  if cut is None:
    return None
  return Run(cut.preset or row.preset, row.flags + cut.flags)


def seeds_of(row: tables.Row, budget: str, asked: int | None) -> int:
  """How many splits a row has under a budget."""
  cut = row.cut(budget)
  return asked or cut.seeds or int(run_of(row, budget).value('seeds', '1'))


class Store(NamedTuple):
  """Where runs are made, and where their results stay."""

  runs: pathlib.Path
  results: pathlib.Path

  def parts(self, run: Run) -> dict[range, pathlib.Path]:
    """Results of a run, by the splits that each is of."""
    found = {}
    for folder in sorted((self.results / run.name).glob('seeds-*')):
      lines = folder / 'run.flags'
      if lines.exists() and lines.read_text().splitlines() == run.lines:
        found[_splits(folder)] = folder
    return found

  def seeds(self, run: Run) -> set[int]:
    """Splits that a run has been finished under."""
    return set(itertools.chain(*self.parts(run)))

  def begun(self, run: Run) -> list[range]:
    """Splits of each folder of a run that was interrupted."""
    folders = sorted((self.runs / run.name).glob('seeds-*'))
    done = self.parts(run)
    return [x for x in map(_splits, folders) if x not in done]

  def looked(self, run: Run, look: str) -> set[int]:
    """Splits whose finished run has been looked at; all if nothing looks."""
    return {
      seed
      for splits, folder in self.parts(run).items()
      for seed in splits
      if not look or (folder / look / f'seed-{seed}').is_dir()
    }

  def found(self, run: Run, row: tables.Row) -> Iterator[tuple]:
    """Splits, result, and our numbers of each split, part after part."""
    parts = self.parts(run)
    for splits in sorted(parts, key=lambda splits: splits.start):
      result = _read(parts[splits] / 'result.json')
      folders = [parts[splits] / row.look / f'seed-{seed}' for seed in splits]
      looks = [
        {path.stem: _read(path) for path in folder.glob('*.json')}
        for folder in folders
        if row.look and folder.is_dir()
      ]
      yield splits, result, tables.taken(result, looks, row.take)

  def pictures(self, figure: str) -> list[pathlib.Path]:
    """What has been drawn of a figure."""
    stem = figure.replace('/', '-')
    return sorted((self.results / 'figures').glob(f'{stem}.*png'))

  def measured(self) -> dict[str, dict]:
    """By run, what a step of it takes on this machine."""
    path = self.runs / 'steps.json'
    return json.loads(path.read_text()) if path.exists() else {}

  def remember(self, run: Run, step: dict | None) -> None:
    """Adds to what was measured."""
    if step:
      self.runs.mkdir(parents=True, exist_ok=True)
      workdir.write_json(
        self.runs / 'steps.json', self.measured() | {run.name: step}
      )

  def keep(self, run: Run, folder: pathlib.Path) -> None:
    """Copies the results of a finished run; `run.flags` last, it is whole."""
    kept = self.results / run.name / folder.name
    kept.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
      shutil.copyfile(folder / name, kept / name)
    workdir.write_atomically(kept / 'run.flags', '\n'.join(run.lines) + '\n')


def _read(path: pathlib.Path):
  return json.loads(path.read_text())


def _splits(folder: pathlib.Path) -> range:
  """The splits that a folder 'seeds-FIRST-LAST' is of."""
  first, last = map(int, folder.name.split('-')[1:])
  return range(first, last + 1)


def missing(store: Store, run: Run, seeds: int) -> list[range]:
  """Splits that have to be run: the interrupted ones first, then new ones."""
  done = store.seeds(run)
  begun = [splits for splits in store.begun(run) if splits.start < seeds]
  new = set(range(seeds)) - done - set(itertools.chain(*begun))
  return begun + list(_ranges(sorted(new)))


def _ranges(numbers: list[int]) -> Iterator[range]:
  """Runs of numbers that follow each other."""
  by_offset = itertools.groupby(enumerate(numbers), lambda x: x[1] - x[0])
  for _, run in by_offset:
    members = [number for _, number in run]
    yield range(members[0], members[-1] + 1)


def ours(
  store: Store, row: tables.Row, budget: str, asked: int | None, data_dir
) -> tables.Ours:
  """What there is of a row."""
  if row.missing:
    return tables.Ours(state=row.missing)
  run = run_of(row, budget)
  if run is None:
    return tables.Ours(state='not of this size')
  seeds, values, results, splits_of = seeds_of(row, budget, asked), [], [], 0
  for splits, result, taken in store.found(run, row):
    of_asked = [x for seed, x in zip(splits, taken) if seed < seeds]  # noqa: B905
    values += itertools.chain(*of_asked)
    splits_of += len(of_asked)
    results += [result] if of_asked else []
  if not values:
    absent = [name for name in row.data if not on_disk(name, data_dir)]
    state = f'needs {", ".join(absent)}' if absent else 'not yet run'
    return tables.Ours(state=state)
  both = lambda key: ', '.join(sorted({result[key] for result in results}))
  return tables.Ours(
    tuple(values),
    max(result['steps'] for result in results),
    sum(result['seconds'] for result in results),
    both('device'),
    both('commit'),
    row.cut(budget).says,
    f'{splits_of} of {seeds} splits' if splits_of < seeds else '',
  )


def on_disk(dataset: str, data_dir) -> bool:
  """Whether a data set is embedded, or lies under --data_dir."""
  if dataset in EMBEDDED:
    return True
  return bool(data_dir) and (pathlib.Path(data_dir) / dataset).is_dir()


def execute(store: Store, run: Run, splits: range, data_dir) -> None:
  """Runs or resumes some splits, and keeps the results.

  Raises:
    InputError: it failed; what it did so far stays.
  """
  folder = store.runs / run.name / f'seeds-{splits.start}-{splits[-1]}'
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
  """Runs what is missing of a row."""
  budget, data_dir = asked['budget'], asked['data_dir']
  run = run_of(row, budget)
  if run is None or not all(on_disk(name, data_dir) for name in row.data):
    return
  seeds = seeds_of(row, budget, asked['seeds'])
  for splits in missing(store, run, seeds):
    execute(store, run, splits, data_dir)
  for seed in sorted(set(range(seeds)) - store.looked(run, row.look)):
    look_at(store, run, row, seed, data_dir)


def written(store: Store, table: tables.Table, asked: dict[str, Any]) -> str:
  """Writes a table as Markdown and CSV; what is printed of it."""
  how = asked['budget'], asked['seeds'], asked['data_dir']
  found = [ours(store, row, *how) for row in table.rows]
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


def state_of(
  store: Store, row: tables.Row, budget: str, asked: int | None, data_dir
) -> str:
  """'done', 'partly', 'to run', 'needs DATA', 'no program' or 'no size'."""
  if row.missing:
    return 'no program'
  run = run_of(row, budget)
  if run is None:
    return 'no size'
  seeds = seeds_of(row, budget, asked)
  if set(range(seeds)) <= store.looked(run, row.look):
    return 'done'
  absent = [name for name in row.data if not on_disk(name, data_dir)]
  if absent:
    return f'needs {", ".join(absent)}'
  return 'partly' if store.seeds(run) or store.begun(run) else 'to run'


def summary(store: Store, table: tables.Table, budget: str, asked) -> str:
  """How far a table is under a budget, and the hours that are left."""
  how = budget, asked['seeds'], asked['data_dir']
  states = [state_of(store, row, *how) for row in table.rows]
  if set(states) == {'no size'}:
    return '-'
  counts = {state: states.count(state) for state in dict.fromkeys(states)}
  words = [f'{count} {state}' for state, count in counts.items()]
  hours, unknown = hours_left(store, table, budget, asked)
  if hours:
    words.append(f'about {hours:,.1f} h here')
  if unknown:
    words.append(f'{unknown} not measured')
  return ', '.join(words)


def hours_left(store, table, budget: str, asked) -> tuple[float, int]:
  """Hours on this machine of what can be run, and how many rows have none.

  From the seconds of a step that `--measure` found.
  """
  measured, hours, unknown = store.measured(), 0.0, 0
  for run, rows in runs_of(table, budget).items():
    how = budget, asked['seeds'], asked['data_dir']
    if state_of(store, rows[0], *how) not in ('to run', 'partly'):
      continue
    seeds = sum(map(len, missing(store, run, seeds_of(rows[0], *how[:2]))))
    if run.name in measured:
      step = measured[run.name]
      hours += step['seconds_per_step'] * step['steps'] * seeds / 3600
    else:
      unknown += 1
  return hours, unknown


def runs_of(table: tables.Table, budget: str) -> dict[Run, list[tables.Row]]:
  """The runs of a table, each with the rows that are made from it."""
  found = {}
  for row in table.rows:
    run = run_of(row, budget)
    if run:
      found.setdefault(run, []).append(row)
  return found


def listing(store: Store, asked: dict[str, Any]) -> str:
  """Every table and figure of the papers, and how far each is."""
  rows = [['table', 'shows', 'of the paper', 'of two CPU cores']]
  rows += [
    [name, table.title]
    + [summary(store, table, budget, asked) for budget in ('paper', 'cpu')]
    for name, table in tables.all_tables().items()
  ]
  drawn = [['figure', 'shows', 'drawn']]
  for name, figure in tables.all_figures().items():
    parts = [part for part in figure.drawn if store.pictures(part)]
    drawn.append(
      [name, figure.title, f'{len(parts)} of {len(figure.drawn)} parts']
    )
  return '\n'.join([*report.aligned(rows), '', *report.aligned(drawn)])


def measure(store: Store, asked: dict[str, Any]) -> None:
  """Times a few steps of every run that is still to be done."""
  for table in tables.all_tables().values():
    for run, rows in runs_of(table, asked['budget']).items():
      how = asked['budget'], asked['seeds'], asked['data_dir']
      if state_of(store, rows[0], *how) not in ('to run', 'partly'):
        continue
      if run.name not in store.measured():
        print(f'{table.name}, {rows[0].name}', flush=True)
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
    found = [
      ours(store, row, match['budget'], None, None) for row in table.rows
    ]
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
  elif not asked['measure']:
    reproduce(asked)


if __name__ == '__main__':
  loading.main('reproduce', define_flags, act)
