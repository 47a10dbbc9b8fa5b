"""Runs that the papers' tables are made from, and where their results lie.

RUNS/NAME/seeds-FIRST-LAST/      a run's folder, as its program leaves it
RESULTS/NAME/seeds-FIRST-LAST/   what stays of a finished one: result.json,
                                 metrics.jsonl, flags.txt, run.flags, look*/

NAME is the preset and the flags after it. `run.flags` holds what these were: a
result whose preset has changed since counts for nothing.
"""

from collections.abc import Iterator
import hashlib
import itertools
import json
import pathlib
import shutil
import sys
from typing import NamedTuple

import tables

from ssljax import workdir

HERE = pathlib.Path(__file__).parent
KEPT = ('result.json', 'metrics.jsonl', 'flags.txt')
EMBEDDED = ('digits', 'yin-yang')  # data sets that are never missing
LONGEST_NAME = 120


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
    """The flags it is defined by, but for how many splits there are."""
    return [line for line in self._all_lines if not line.startswith('--seeds=')]

  @property
  def seeds(self) -> int:
    """How many splits its preset or a flag gives it."""
    given = [x for x in ('--seeds=1', *self._all_lines) if '--seeds=' in x]
    return int(given[-1].split('=')[1])

  @property
  def data(self) -> list[str]:
    """Data sets that it is trained or tested on."""
    kinds = '--dataset=', '--source=', '--target='
    lines = [x for x in self._all_lines if x.startswith(kinds)]
    return [line.split('=')[1] for line in lines]

  @property
  def _all_lines(self) -> list[str]:
    """Those of its preset, then its own."""
    text = (HERE / f'presets/{self.preset}.flags').read_text().splitlines()
    return [x for x in text if x and not x.startswith('#')] + list(self.flags)

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


def run_of(row: tables.Row) -> Run:
  """The run that a row, as a budget has it, is made from."""
  return Run(row.preset, row.flags)


def runs_of(figure: tables.Figure) -> list[Run]:
  """The runs that a figure, as a budget has it, shows."""
  return [Run(preset, tuple(flags)) for preset, *flags in figure.runs]


def seeds_of(row: tables.Row, asked: int | None) -> int:
  """How many splits a row has, if not as many as are asked for."""
  return asked or row.seeds or run_of(row).seeds


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
      looks = [
        {path.stem: _read(path) for path in folder.glob('*.json')}
        for folder in (parts[splits] / row.look / f'seed-{i}' for i in splits)
        if row.look and folder.is_dir()  # they are made in the order of splits
      ]
      yield splits, result, tables.taken(result, looks, row.take)

  def folder(self, run: Run, splits: range) -> pathlib.Path:
    """Where some splits are run."""
    return self.runs / run.name / f'seeds-{splits.start}-{splits[-1]}'

  def pictures(self, figure: tables.Figure, budget: str) -> list[pathlib.Path]:
    """What has been drawn of a figure."""
    return sorted((self.results / 'figures').glob(_stem(figure, budget, '*')))

  def keep_picture(self, figure, budget: str, picture, number: int) -> None:
    """Copies the picture of a part of a figure."""
    kept = self.results / 'figures' / _stem(figure, budget, str(number))
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(picture, kept)

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


def _stem(figure: tables.Figure, budget: str, number: str) -> str:
  return f'{figure.name.replace("/", "-")}.{budget}.{number}.png'


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
  store: Store, row: tables.Row, budget: str, asked: int | None
) -> tables.Ours:
  """What there is of a row of a paper under a budget."""
  if row.missing:
    return tables.Ours(state=row.missing)
  row = row.at(budget)
  if row is None:
    return tables.Ours(state='not of this size')
  seeds, values, results, count = seeds_of(row, asked), [], [], 0
  for splits, result, taken in store.found(run_of(row), row):
    pairs = zip(splits, taken, strict=False)  # not all may be looked at yet
    of_asked = [mine for seed, mine in pairs if seed < seeds]
    values += itertools.chain(*of_asked)
    count += len(of_asked)
    results += [result] if of_asked else []
  if not values:
    return tables.Ours(state='not yet run')
  both = lambda key: ', '.join(sorted({result[key] for result in results}))
  return tables.Ours(
    tuple(values),
    max(result['steps'] for result in results),
    sum(result['seconds'] for result in results),
    both('device'),
    both('commit'),
    row.smaller,
    f'{count} of {seeds} splits' if count < seeds else '',
  )


def on_disk(dataset: str, data_dir) -> bool:
  """Whether a data set is embedded, or lies under --data_dir."""
  folder = pathlib.Path(data_dir or '~/tensorflow_datasets').expanduser()
  return dataset in EMBEDDED or (folder / dataset).is_dir()
