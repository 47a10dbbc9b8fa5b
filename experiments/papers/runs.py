"""Runs that the papers' tables are made from, and where their results lie.

RUNS/NAME/seed-K/      a run's folder under one split, as its program leaves it
RUNS/NAME/seed-K.flags the flags it was begun with
RESULTS/NAME/seed-K/   what stays of a finished one: run.flags, metrics.jsonl,
                       LOOK.json of what looked at it, result.json (the last)

NAME is the preset and the flags after it, `run.flags` what these stood for: a
result whose preset has changed since counts for nothing.
"""

import json
import pathlib
import shutil
import sys
from typing import NamedTuple

from ssljax.errors import require
from ssljax.experiments import FOLDER
from ssljax.experiments.papers import tables
from ssljax.runs import run_folder

EMBEDDED = ('digits', 'yin-yang')  # data sets that are never missing
LINES = 200  # of metrics.jsonl that stay, beside all evaluations


class Run(NamedTuple):
  """What one or more rows are made from: a preset with flags."""

  preset: str
  flags: tuple[str, ...]  # after the preset

  @property
  def name(self) -> str:
    """Of its folder: the preset and the flags."""
    name = ','.join([self.preset, *(flag.lstrip('-') for flag in self.flags)])
    return name.replace('/', '_')

  @property
  def lines(self) -> list[str]:
    """The flags it is defined by: all but how many splits there are."""
    return [line for line in self._all if not line.startswith('--seeds=')]

  @property
  def seeds(self) -> int:
    """How many splits it has."""
    given = [line for line in self._all if line.startswith('--seeds=')]
    return int(given[-1].split('=')[1]) if given else 1

  @property
  def data(self) -> list[str]:
    """Data sets that it is trained or tested on."""
    kinds = '--dataset=', '--source=', '--target='
    return [x.split('=')[1] for x in self._all if x.startswith(kinds)]

  @property
  def _all(self) -> list[str]:
    """The lines of its preset, then its own flags."""
    text = (FOLDER / f'presets/{self.preset}.flags').read_text().splitlines()
    return [x for x in text if x and not x.startswith('#')] + list(self.flags)

  def command(self, seed: int, folder, data_dir) -> list[str]:
    """Runs it under one split."""
    return [
      sys.executable,
      f'{FOLDER}/{self.preset.split(".")[0]}.py',
      f'--flagfile={FOLDER}/presets/{self.preset}.flags',
      *self.flags,
      f'--seed={seed}',
      '--seeds=1',
      f'--workdir={folder}',
      *data_flag(data_dir),
    ]


def data_flag(data_dir) -> list[str]:
  """`--data_dir`, if there is one."""
  return [f'--data_dir={data_dir}'] if data_dir else []


def run_of(row: tables.Row) -> Run:
  """The run that a row, as a budget has it, is made from."""
  return Run(row.preset, row.flags)


def runs_of(figure: tables.Figure) -> dict[Run, None]:
  """The runs that a figure, as a budget has it, shows, each once."""
  runs = [run for part in figure.parts for run in part.runs]
  return dict.fromkeys(Run(preset, tuple(flags)) for preset, *flags in runs)


def seeds_of(row: tables.Row, asked: int | None) -> range:
  """The splits of a row, if not as many as are asked for."""
  return range(asked or row.seeds or run_of(row).seeds)


def absent(run: Run, more, data_dir) -> list[str]:
  """Data sets of a run, and others, that are not under --data_dir."""
  there = lambda name: (
    name in EMBEDDED
    or (bool(data_dir) and (pathlib.Path(data_dir) / name).is_dir())
  )
  return sorted({name for name in (*run.data, *more) if not there(name)})


class Store(NamedTuple):
  """Where runs are made, and where their results stay."""

  runs: pathlib.Path
  results: pathlib.Path

  def folder(self, run: Run, seed: int) -> pathlib.Path:
    """Where a run is made under a split."""
    return self.runs / run.name / f'seed-{seed}'

  def kept(self, run: Run, seed: int) -> pathlib.Path:
    """Where its results stay."""
    return self.results / run.name / f'seed-{seed}'

  def result(self, run: Run, seed: int) -> dict | None:
    """What stays of a finished run under a split."""
    folder = self.kept(run, seed)
    lines = folder / 'run.flags'
    same = lines.exists() and lines.read_text().splitlines() == run.lines
    return run_folder.read_result(folder) if same else None

  def look(self, run: Run, seed: int, look: str) -> dict | None:
    """What looked at it wrote."""
    path = self.kept(run, seed) / f'{look}.json'
    there = look and self.result(run, seed) and path.exists()
    return json.loads(path.read_text()) if there else None

  def is_done(self, row: tables.Row, seed: int) -> bool:
    """Whether there is all that a row, as a budget has it, needs of a split."""
    run = run_of(row)
    if self.result(run, seed) is None:
      return False
    return not row.look or self.look(run, seed, row.look) is not None

  def is_finished(self, run: Run, seed: int) -> bool:
    """Whether its own folder is there, and finished."""
    folder = self.folder(run, seed)
    note = folder.with_suffix('.flags')
    result = run_folder.read_result(folder)
    same = note.exists() and note.read_text().splitlines() == run.lines
    return same and bool(result) and result['complete']

  def begin(self, run: Run, seed: int) -> bool:
    """Notes what a run is begun with; whether its folder was another one's."""
    note = self.folder(run, seed).with_suffix('.flags')
    note.parent.mkdir(parents=True, exist_ok=True)
    text = '\n'.join(run.lines) + '\n'
    other = note.exists() and note.read_text() != text
    run_folder.write_atomically(note, text)
    return other

  def keep(self, run: Run, seed: int) -> None:
    """Copies what stays of a finished run; until the end, there is none.

    Raises:
      InputError: it is not finished.
    """
    if self.result(run, seed):
      return
    folder, kept = self.folder(run, seed), self.kept(run, seed)
    result = run_folder.read_result(folder)
    require(
      self.is_finished(run, seed),
      f'{folder}: was stopped before its end: the same command goes on',
    )
    (kept / 'result.json').unlink(missing_ok=True)
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    (kept / 'run.flags').write_text('\n'.join(run.lines) + '\n')
    metrics = (folder / 'metrics.jsonl').read_text().splitlines()
    (kept / 'metrics.jsonl').write_text('\n'.join(thinned(metrics)) + '\n')
    run_folder.write_json(kept / 'result.json', without_command(result))

  def keep_look(self, run: Run, seed: int, look: str, found: dict) -> None:
    """Adds what looked at a finished run."""
    path = self.kept(run, seed) / f'{look}.json'
    run_folder.write_json(path, without_command(found))

  def picture(self, figure: tables.Figure, budget: str, part: int):
    """Where the picture of a figure's part stays."""
    name = f'{figure.name.replace("/", "-")}.{budget}.{part}.png'
    return self.results / 'figures' / name

  def measured(self) -> dict[str, dict]:
    """By run, what a step of it takes on this machine."""
    path = self.runs / 'steps.json'
    return json.loads(path.read_text()) if path.exists() else {}

  def remember(self, run: Run, step: dict) -> None:
    """Adds to what was measured."""
    self.runs.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(
      self.runs / 'steps.json', self.measured() | {run.name: step}
    )


def without_command(result: dict) -> dict:
  """A result but for its command, which names folders of its machine."""
  return {key: value for key, value in result.items() if key != 'command'}


def thinned(metrics: list[str]) -> list[str]:
  """All evaluations of metrics.jsonl, and some two hundred other lines."""
  others = [line for line in metrics if 'test_error' not in line]
  every = -(-len(others) // LINES) or 1
  stay = set(others[::every])
  return [line for line in metrics if 'test_error' in line or line in stay]


def ours(
  store: Store, row: tables.Row, budget: str, asked: int | None = None
) -> tables.Ours:
  """What there is of a row of a paper under a budget, of all splits."""
  if row.missing:
    return tables.Ours(state=row.missing)
  row = row.at(budget)
  if row is None:
    return tables.Ours(state='not of this size')
  wanted, run = seeds_of(row, asked), run_of(row)
  there = sorted(
    int(folder.name.split('-')[1])
    for folder in (store.results / run.name).glob('seed-*')
  )
  seeds = [seed for seed in there if store.is_done(row, seed)]
  if not seeds:
    return tables.Ours(state='not yet run')
  results = [store.result(run, seed) for seed in seeds]
  looks = [store.look(run, seed, row.look) for seed in seeds]
  taken = [
    tables.taken(result, look, row.take)
    for result, look in zip(results, looks, strict=True)
  ]
  entries = [result['arms'][row.arm or result['method']] for result in results]
  whole = not row.take.startswith('after:')  # to the end of its last stage
  left = len(set(wanted) - set(seeds))
  joined = lambda key: ', '.join(sorted({result[key] for result in results}))
  return tables.Ours(
    values=tuple(value for values in taken for value in values),
    seeds=tuple(seeds),
    steps=max(entry['steps'] for entry in entries) if whole else None,
    seconds=sum(e['seconds'] for e in entries) / len(seeds) if whole else None,
    device=joined('device'),
    commit=joined('commit'),
    smaller=row.smaller,
    state=f'{len(wanted) - left} of {len(wanted)} splits' if left else '',
  )
