"""Runs behind the papers' tables, and the store of their results.

RUNS/NAME/seed-K/       folder of a run under one split
RUNS/NAME/seed-K.flags  flags that the run was started with
RESULTS/NAME/seed-K/    results of a finished run: run.flags, metrics.jsonl,
                        a JSON file for each measurement, and result.json,
                        which is written last

NAME is the preset and the flags after it. `run.flags` holds all flags, those of
the preset included. A result is ignored if the preset has changed since.
"""

from collections.abc import Iterator
import contextlib
import json
import pathlib
import re
import shutil
import signal
import stat
import statistics
import subprocess
import sys
from typing import NamedTuple

from ssljax.cli import main
from ssljax.errors import InputError, require
from ssljax.experiments import FOLDER
from ssljax.experiments.papers import tables
from ssljax.runs import run_folder

# Data sets that need no files.
EMBEDDED = ('digits', 'yin-yang', 'yin-yang-redrawn')
LINES = 200  # lines of metrics.jsonl that are kept, beside all evaluations


class PresetRun(NamedTuple):
  """A run of a table: a preset with flags."""

  preset: str
  flags: tuple[str, ...]  # flags after the preset

  @property
  def name(self) -> str:
    """Name of the folder: the preset and the flags."""
    name = ','.join([self.preset, *(flag.lstrip('-') for flag in self.flags)])
    return name.replace('/', '_')

  @property
  def lines(self) -> list[str]:
    """All flags but the number of splits."""
    return [line for line in self._all if not line.startswith('--seeds=')]

  @property
  def seeds(self) -> int:
    """Number of splits."""
    given = [line for line in self._all if line.startswith('--seeds=')]
    return int(given[-1].split('=')[1]) if given else 1

  @property
  def data(self) -> list[str]:
    """Names of the data sets to train and test on."""
    kinds = '--dataset=', '--source=', '--target='
    return [x.split('=')[1] for x in self._all if x.startswith(kinds)]

  @property
  def _all(self) -> list[str]:
    """Flags of the preset, then the run's own."""
    text = (FOLDER / f'presets/{self.preset}.flags').read_text().splitlines()
    return [x for x in text if x and not x.startswith('#')] + list(self.flags)

  def command(self, seed: int, folder, data_dir) -> list[str]:
    """Return the command that trains the run under one split."""
    return [
      *program(self.preset.split('.')[0]),
      f'--flagfile={FOLDER}/presets/{self.preset}.flags',
      *self.flags,
      f'--seed={seed}',
      '--seeds=1',
      f'--workdir={folder}',
      *data_flag(data_dir),
    ]


def program(name: str) -> list[str]:
  """Return the command of a program of this package."""
  return [sys.executable, f'{FOLDER}/{name}.py']


def data_flag(data_dir) -> list[str]:
  """Return the flag --data_dir, [] if `data_dir` is None."""
  return [f'--data_dir={data_dir}'] if data_dir else []


class Interrupted(SystemExit):
  """A signal has arrived; the exit status is 128 + its number."""


@contextlib.contextmanager
def interruptible(program: str) -> Iterator[None]:
  """End with one line after SIGTERM, SIGHUP and Ctrl-C.

  Args:
    program: its name.
  """

  def stop(number, frame):
    del frame
    raise Interrupted(128 + number)

  # A background job ignores Ctrl-C, nohup's SIGHUP.
  previous = {
    number: handler
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    if (handler := signal.getsignal(number)) is not signal.SIG_IGN
  }
  for number in previous:
    signal.signal(number, stop)
  try:
    yield
  except Interrupted as stopped:
    name = signal.Signals(stopped.code - 128).name
    print(
      f'{program}: interrupted ({name}): run the same command to resume',
      file=sys.stderr,
    )
    raise
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def call(
  command: list[str],
  folder: str | None = None,
  log: pathlib.Path | None = None,
) -> None:
  """Run a program, and end it if this process ends.

  The program has a process group of its own: of a signal to this process, such
  as Ctrl-C, it gets exactly one SIGTERM, after which it saves its state. A
  second one would end it at once.

  Args:
    command: of the program.
    folder: to run it in.
    log: file that gets its output.

  Raises:
    InputError: the program failed.
  """
  print(f'$ {" ".join(["python", *command[1:]])}', flush=True)
  with contextlib.ExitStack() as stack:
    output = stack.enter_context(open(log, 'a')) if log else None
    process = subprocess.Popen(
      command,
      close_fds=False,
      cwd=folder,
      process_group=0,
      stdout=output,
      stderr=output and subprocess.STDOUT,
    )
    _wait(process)
  status = process.returncode
  program = pathlib.Path(command[1]).name
  why = f': {last_line(log)} (see {log})' if log and status else ', see above'
  require(
    not status,
    f'{program} ended with status {status}{why}; run the same command to '
    'resume',
  )


def _wait(process: subprocess.Popen) -> None:
  """Wait for a program; end it if this process is interrupted."""
  try:
    process.wait()
  except BaseException:
    process.terminate()
    try:
      process.wait()
    except BaseException:  # interrupted again
      process.kill()
      raise
    raise


def last_line(log: pathlib.Path) -> str:
  """Return the last line of a log, without progress bars before it."""
  lines = re.split(r'[\r\n]+', log.read_text(errors='replace').strip())
  return main.one_line(lines[-1])


def run_of(row: tables.Row) -> PresetRun:
  """Return the run of a row; the row has the settings of a budget."""
  return PresetRun(row.preset, row.flags)


def runs_of(figure: tables.Figure) -> dict[PresetRun, None]:
  """Return the runs of a figure with the settings of a budget, each once."""
  runs = [run for part in figure.parts for run in part.runs]
  return dict.fromkeys(
    PresetRun(preset, tuple(flags)) for preset, *flags in runs
  )


def seeds_of(row: tables.Row, asked: int | None) -> range:
  """Return the splits of a row: the `asked` number, or the row's own."""
  return range(asked or row.seeds or run_of(row).seeds)


def missing_data(run: PresetRun, more, data_dir) -> list[str]:
  """Return the data sets that are not in `data_dir`.

  Args:
    run: the run, which needs its own data sets.
    more: names of other data sets.
    data_dir: folder of prepared data sets, or None.
  """
  there = lambda name: (
    name in EMBEDDED
    or (data_dir and (pathlib.Path(data_dir).expanduser() / name).is_dir())
  )
  return sorted({name for name in (*run.data, *more) if not there(name)})


def _read_text(path: pathlib.Path) -> str:
  """Return the text of a regular file; a FIFO would wait for a writer."""
  require(stat.S_ISREG(path.stat().st_mode), 'it is no regular file')
  return path.read_text(encoding='utf-8')


def read_json(path: pathlib.Path) -> dict | None:
  """Return the object in a JSON file, None if there is no such file.

  Raises:
    InputError: the file is damaged.
  """
  try:
    found = json.loads(_read_text(path))
    require(isinstance(found, dict), 'it is no JSON object')
    return found
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(
      f'{path} cannot be read ({getattr(error, "strerror", None) or error}): '
      'restore it, or remove its folder and run the same command again'
    ) from error


def read_lines(path: pathlib.Path) -> list[str] | None:
  """Return the lines of a text file, None if there is no such file.

  Raises:
    InputError: the file is damaged.
  """
  try:
    return _read_text(path).splitlines()
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError) as error:
    raise InputError(
      f'{path} cannot be read ({getattr(error, "strerror", None) or error}): '
      'restore it, or remove its folder and run the same command again'
    ) from error


class Store(NamedTuple):
  """The folder of the runs, and the folder of their results."""

  runs: pathlib.Path
  results: pathlib.Path

  def folder(self, run: PresetRun, seed: int) -> pathlib.Path:
    """Return the folder of a run under a split."""
    return self.runs / run.name / f'seed-{seed}'

  def result_folder(self, run: PresetRun, seed: int) -> pathlib.Path:
    """Return the folder of a run's results under a split."""
    return self.results / run.name / f'seed-{seed}'

  def result(self, run: PresetRun, seed: int) -> dict | None:
    """Return the stored `result.json`; None if missing or out of date."""
    folder = self.result_folder(run, seed)
    same = read_lines(folder / 'run.flags') == run.lines
    return read_json(folder / 'result.json') if same else None

  def measurement(self, run: PresetRun, seed: int, name: str) -> dict | None:
    """Return a stored measurement of a finished run, None if missing.

    Args:
      run: the run.
      seed: number of the split.
      name: name of the measurement, `Row.measurement`.
    """
    path = self.result_folder(run, seed) / f'{name}.json'
    return read_json(path) if name and self.result(run, seed) else None

  def is_done(self, row: tables.Row, seed: int) -> bool:
    """Return True if the results of a row under a split are complete."""
    run = run_of(row)
    if self.result(run, seed) is None:
      return False
    return (
      not row.measurement
      or self.measurement(run, seed, row.measurement) is not None
    )

  def is_finished(self, run: PresetRun, seed: int) -> bool:
    """Return True if the folder of the run holds this run, complete."""
    folder = self.folder(run, seed)
    result = read_json(folder / 'result.json') or {}
    same = read_lines(folder.with_suffix('.flags')) == run.lines
    return same and result.get('complete') is True

  def begin(self, run: PresetRun, seed: int) -> bool:
    """Write the flags of a run; return True if its folder has other flags."""
    note = self.folder(run, seed).with_suffix('.flags')
    note.parent.mkdir(parents=True, exist_ok=True)
    other = read_lines(note) not in (None, run.lines)
    run_folder.write_atomically(note, '\n'.join(run.lines) + '\n')
    return other

  def keep(self, run: PresetRun, seed: int) -> None:
    """Copy the results of a finished run; `result.json` is copied last.

    Raises:
      InputError: the run is not finished.
    """
    if self.result(run, seed):
      return
    folder, kept = self.folder(run, seed), self.result_folder(run, seed)
    result = read_json(folder / 'result.json')
    require(
      self.is_finished(run, seed),
      f'{folder}: the run is not finished: run the same command to resume',
    )
    (kept / 'result.json').unlink(missing_ok=True)
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    (kept / 'run.flags').write_text('\n'.join(run.lines) + '\n')
    metrics = read_lines(folder / 'metrics.jsonl')
    require(bool(metrics), f'{folder}: has no metrics.jsonl: restore it')
    (kept / 'metrics.jsonl').write_text('\n'.join(thinned(metrics)) + '\n')
    run_folder.write_json(kept / 'result.json', without_command(result))

  def keep_measurement(
    self, run: PresetRun, seed: int, name: str, found: dict
  ) -> None:
    """Store a measurement of a finished run."""
    path = self.result_folder(run, seed) / f'{name}.json'
    run_folder.write_json(path, without_command(found))

  def picture(self, figure: tables.Figure, budget: str, part: int):
    """Return the file of a part of a figure."""
    name = f'{figure.name.replace("/", "-")}.{budget}.{part}.png'
    return self.results / 'figures' / name

  def step_times(self) -> dict[str, dict]:
    """Return the time of a step and the number of steps by name of the run."""
    return read_json(self.runs / 'steps.json') or {}

  def keep_step_time(self, run: PresetRun, step: dict) -> None:
    """Store the measured time of a step of a run."""
    self.runs.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(
      self.runs / 'steps.json', self.step_times() | {run.name: step}
    )


def without_command(result: dict) -> dict:
  """Return a result without its command, which contains local paths."""
  return {key: value for key, value in result.items() if key != 'command'}


def thinned(metrics: list[str]) -> list[str]:
  """Return all evaluations of metrics.jsonl, and about LINES other lines."""
  others = [line for line in metrics if 'test_error' not in line]
  every = -(-len(others) // LINES) or 1
  chosen = set(others[::every])
  return [line for line in metrics if 'test_error' in line or line in chosen]


def with_minimum(store: Store, run: PresetRun, seed: int, result: dict) -> dict:
  """Return a result with the smallest test error over its last stage.

  A run without --report_minimum does not report it: it is a choice made on test
  images, for rows that are named after it. It is taken from the evaluations.

  Raises:
    InputError: the evaluations are damaged, or the last one is missing.
  """
  if 'minimum' in result['test_error']:
    return result
  folder = store.result_folder(run, seed)
  lines = read_lines(folder / 'metrics.jsonl') or []
  try:
    measured = [json.loads(line) for line in lines if 'test_error_last' in line]
    of_run = [x for x in measured if x['job'] == result['method']]
    stage = of_run[-1]['stage'] if of_run else None
    errors = [x['test_error_last'] for x in of_run if x['stage'] == stage]
  except (ValueError, KeyError, TypeError):
    errors = []
  require(
    bool(errors) and errors[-1] == result['test_error']['last'][0],
    f"{folder}: metrics.jsonl is damaged, or without the run's evaluations: "
    'restore it, or remove the folder and run the same command again',
  )
  minimum = {'minimum': [min(errors)]}
  return result | {'test_error': result['test_error'] | minimum}


def check_result(folder: pathlib.Path, result: dict, row: tables.Row) -> None:
  """Raise `InputError` for a stored result without what a table shows."""
  arms = result.get('arms')
  named = str(row.arm or result.get('method'))
  entry = isinstance(arms, dict) and arms.get(named)
  require(
    isinstance(entry, dict)
    and all(isinstance(entry.get(k), int | float) for k in ('steps', 'seconds'))
    and all(isinstance(result.get(k), str) for k in ('device', 'commit')),
    f'{folder}/result.json is damaged: restore it, or remove its folder and '
    'run the same command again',
  )


def ours(
  store: Store, row: tables.Row, budget: str, asked: int | None = None
) -> tables.Ours:
  """Return our stored results of a row.

  Args:
    store: the store of the results.
    row: a row of a table.
    budget: 'paper', or one of `tables.BUDGETS`.
    asked: number of splits, if not the row's own.
  """
  if row.missing:
    return tables.Ours(state=row.missing)
  row = row.at(budget)
  if row is None:
    return tables.Ours(state='not in this budget')
  wanted, run = seeds_of(row, asked), run_of(row)
  there = sorted(
    int(folder.name.split('-')[1])
    for folder in (store.results / run.name).glob('seed-*')
  )
  seeds = [seed for seed in there if store.is_done(row, seed)]
  if not seeds:
    return tables.Ours(state='not yet run')
  results = [store.result(run, seed) for seed in seeds]
  for seed, result in zip(seeds, results, strict=True):
    check_result(store.result_folder(run, seed), result, row)
  if row.take == 'minimum':
    results = [
      with_minimum(store, run, seed, result)
      for seed, result in zip(seeds, results, strict=True)
    ]
  measured = [store.measurement(run, seed, row.measurement) for seed in seeds]
  taken = [
    tables.our_values(result, measurement, row.take)
    for result, measurement in zip(results, measured, strict=True)
  ]
  entries = [result['arms'][row.arm or result['method']] for result in results]
  # Steps and seconds are those of the complete run.
  whole = not row.take.startswith('after:')
  left = len(set(wanted) - set(seeds))
  joined = lambda key: ', '.join(sorted({result[key] for result in results}))
  return tables.Ours(
    values=tuple(value for values in taken for value in values),
    seeds=tuple(seeds),
    steps=max(entry['steps'] for entry in entries) if whole else None,
    seconds=(
      statistics.median(entry['seconds'] for entry in entries)
      if whole
      else None
    ),
    device=joined('device'),
    commit=joined('commit'),
    smaller=row.smaller,
    state=f'{len(wanted) - left} of {len(wanted)} splits' if left else '',
    data=', '.join(
      sorted({result.get('data_variant') or '' for result in results} - {''})
    ),
  )
