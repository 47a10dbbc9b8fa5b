"""Choose settings of a method on validation images.

  python experiments/sweep.py --method=madnn --grid "eta=0.1,0.3 weight=0.5,1"
  python experiments/sweep.py --method=fixmatch --dataset=mine.npz \
      --grid "learning_rate=0.03,0.1 augment=translate:1|translate:1,noise"

Every cell of the grid is trained under every seed, with a part of the training
images held out for validation (--validation=N). The cells are ranked by their
mean validation error, never by test errors, which are not read. All other flags
go to the method's program. The values of a setting that is itself a list are
separated by |. Finished runs are not repeated, and interrupted ones are
resumed. The table is in sweep.md and sweep.json of --folder.
"""

from collections.abc import Sequence
import itertools
import math
import pathlib
import shlex
import statistics
from typing import Any, NamedTuple

from absl import flags
import numpy as np

from ssljax import config as config_lib
from ssljax import registry, signatures
from ssljax.cli import config_flags
from ssljax.core import UNLABELLED
from ssljax.data import datasets
from ssljax.errors import InputError, require
from ssljax.experiments.papers import paired
from ssljax.runs import run_folder

# Parts of a config that decide the images, which all cells share.
SHARED_PARTS = 'data', 'split', 'hosts'
MOST_CELLS = 1000
MOST_VALIDATION = 5000  # images held out unless --validation says otherwise

Cell = dict[str, str]  # value of each setting, as in a flag


class Ranked(NamedTuple):
  """A cell of the grid, and its validation errors."""

  cell: Cell
  found: paired.Outcome

  @property
  def values(self) -> list[float]:
    """Validation errors in percent, in the order of the seeds."""
    return list(self.found.errors.values())

  @property
  def mean(self) -> float:
    """Mean validation error over the seeds."""
    return statistics.fmean(self.values)


def standard_error(values: Sequence[float]) -> float | None:
  """Return the standard error of a mean, None of a single value."""
  if len(values) < 2:
    return None
  return statistics.stdev(values) / math.sqrt(len(values))


# The grid.


def parse_grid(text: str, method: str) -> list[Cell]:
  """Return the cells of a grid such as "eta=0.1,0.3 weight=0.5,1".

  Args:
    text: settings of the method's program with their values.
    method: name of the method.

  Raises:
    InputError: a setting is unknown or decided elsewhere, a value does not
      parse, or something is given twice.
  """
  words = (text or '').split()
  require(
    bool(words), '`grid`: give settings with values, as "eta=0.1,0.3 weight=1"'
  )
  parts = config_lib.schema(method)
  known = {name: s for found in parts.values() for name, s in found.items()}
  axes: dict[str, list[str]] = {}
  for word in words:
    name, equals, values = word.lstrip('-').partition('=')
    require(
      bool(name and equals and values),
      f'`grid`: "{word}": give SETTING=VALUE,VALUE',
    )
    _refuse_name(name, method, parts, known, axes)
    axes[name] = _values(known[name], values)
  count = math.prod(map(len, axes.values()))
  require(
    count <= MOST_CELLS,
    f'`grid`: has {count:,} cells: give at most {MOST_CELLS:,}',
  )
  rows = itertools.product(*axes.values())
  return [dict(zip(axes, row, strict=True)) for row in rows]


def _refuse_name(name: str, method: str, parts, known, axes) -> None:
  """Raise `InputError` for a setting that a grid cannot have."""
  own = (*paired.OWN, 'seeds', 'folder', 'grid', 'method', 'seeds_per_run')
  require(
    name not in own,
    f'`grid`: {name} is decided by sweep.py for every run: leave it out',
  )
  try:
    config_lib.require_known(name, method, known)
  except InputError as error:
    raise InputError(f'`grid`: {error}') from error
  shared = {n for part in SHARED_PARTS for n in parts[part]}
  require(
    name not in shared,
    f'`grid`: {name} is the same in all cells, whose errors are on the same '
    f'images: give `{name}` as a flag',
  )
  require(name not in axes, f'`grid`: gives {name} twice: give it once')


def _values(setting: signatures.Setting, text: str) -> list[str]:
  """Return the values of a setting as texts, each checked."""
  is_list = signatures.item_type(signatures.plain_type(setting.hint))
  texts, parsed = text.split('|' if is_list else ','), []
  for one in texts:
    try:
      value = signatures.parse(setting, one)
      require(value == value, f'`{setting.name}`={one}: give a number')
    except InputError as error:
      raise InputError(f'`grid`: {error}') from error
    require(
      value not in parsed,
      f'`grid`: {setting.name}={text} has the value {one} twice: give it once',
    )
    parsed.append(value)
  return texts


def as_flags(cell: Cell) -> list[str]:
  """Return the flags of a cell."""
  return [f'--{name}={value}' for name, value in cell.items()]


# Validation images.


def suitable_validation(
  config: config_lib.Config, dataset: datasets.Dataset
) -> int:
  """Return the number of images to hold out.

  It is a fifth of the images with a label, but at most half of those that the
  label splits leave over, where they leave any.

  Args:
    config: of a run.
    dataset: of the run.

  Raises:
    InputError: too few images have a label.
  """
  labels = dataset.train.labels
  known = labels[labels != UNLABELLED]
  count = min(len(known) // 5, MOST_VALIDATION)
  asked = config.split.labels
  if asked.isdecimal():
    spare = np.bincount(known, minlength=len(dataset.classes)) - int(asked)
    left = int(spare.sum())
    count = min(count, left // 2) if left > 0 else count
  require(
    count >= 1,
    f'`validation`: {len(known)} training images have a label, too few to hold '
    'some out: label more images',
  )
  return count


# Training and ranking.


def search(
  method: str,
  cells: Sequence[Cell],
  folder: pathlib.Path,
  seeds: Sequence[range],
  given: Sequence[str],
) -> list[Ranked]:
  """Train every cell under every seed; return the cells, the best one first.

  Args:
    method: name of the method.
    cells: of the grid.
    folder: gets a folder for each cell.
    seeds: blocks of seeds.
    given: flags of all cells, with --validation.

  Raises:
    InputError: a program failed, or the cells saw different images.
  """
  ranked = []
  for number, cell in enumerate(cells, 1):
    name = paired.as_name(as_flags(cell))
    print(f'{method}, cell {number} of {len(cells)}: {name}', flush=True)
    found = paired.outcome(
      method,
      folder / name,
      seeds,
      [*given, *as_flags(cell)],
      kind='validation_error',
      log=True,
    )
    ranked.append(Ranked(cell, found))
    print(f'  validation error {mean_and_error(ranked[-1].values)}', flush=True)
  require(
    len(frozenset().union(*(one.found.data for one in ranked))) == 1,
    f'`folder`={folder}: its runs are of different images, because the data '
    'set has changed: give another folder',
  )
  return sorted(ranked, key=lambda one: one.mean)


def mean_and_error(values: Sequence[float]) -> str:
  """Return '4.12 ± 0.30': mean and standard error."""
  error = standard_error(values)
  spread = '' if error is None else f' ± {error:.2f}'
  return f'{statistics.fmean(values):.2f}{spread}'


def markdown(ranked: Sequence[Ranked], title: str) -> str:
  """Return the table of the cells as Markdown.

  Args:
    ranked: cells, the best one first.
    title: describes what they share.
  """
  best, names = ranked[0], list(ranked[0].cell)
  header = ['rank', *names, 'validation error', 'behind the best', 'seconds']
  lines = [header, ['---'] * len(header)]
  for rank, one in enumerate(ranked, 1):
    pairs = zip(one.values, best.values, strict=True)
    behind = mean_and_error([a - b for a, b in pairs]) if rank > 1 else '–'
    cells = [str(rank), *one.cell.values(), mean_and_error(one.values), behind]
    lines.append([*cells, f'{one.found.seconds:,.0f}'])
  body = ''.join(
    f'| {" | ".join(cell.replace("|", "/") for cell in line)} |\n'
    for line in lines
  )
  return (
    f'{title}: validation errors in % of the weights that the method '
    f'evaluates, mean ± standard error over {len(best.values)} seeds; behind '
    f'the best: the paired difference; all on the same images\n\n{body}'
  )


def as_record(
  method: str, ranked: Sequence[Ranked], given: Sequence[str], command: str
) -> dict[str, Any]:
  """Return the content of sweep.json.

  Args:
    method: name of the method.
    ranked: cells, the best one first.
    given: flags of all cells.
    command: trains the best cell.
  """
  return {
    'method': method,
    'flags': list(given),
    'cells': [
      {
        'settings': one.cell,
        'validation_error': {str(s): e for s, e in one.found.errors.items()},
        'mean': one.mean,
        'standard_error': standard_error(one.values),
        'seconds': one.found.seconds,
      }
      for one in ranked
    ],
    'best': ranked[0].cell,
    'command': command,
  }


# The program.


class Command(paired.Command):
  """The command line."""

  def __init__(self):
    """Define the flags."""
    super().__init__('runs/sweep/METHOD,FLAGS', seeds=3)

  def define_flags(self) -> None:
    """Define the flags of the program itself."""
    for name, text in (
      ('method', f'The method, one of {", ".join(registry.METHODS)}.'),
      ('grid', 'Settings with their values, as "eta=0.1,0.3 weight=0.5,1".'),
    ):
      flags.DEFINE_string(name, None, text, flag_values=self.values)

  def act(self) -> None:
    """Train what is missing, and print and write the table."""
    method, given = self.values.method, list(self.given)
    known = ', '.join(registry.METHODS)
    require(method is not None, f'`method`: give one of {known}')
    registry.method(method)
    cells, seeds = parse_grid(self.values.grid, method), self.seed_blocks()
    paired.refuse_own(given, 'sweep.py')
    for name in cells[0]:
      require(
        not any(config_flags.is_given(n, given) for n in (name, f'no{name}')),
        f'`{name}`: is in `grid` too: give it once',
      )
    shared = self.with_validation(method, cells, given)
    default = f'runs/sweep/{method},{paired.as_name(given)}'
    folder = self.make_folder(default)
    note = paired.Note(folder, 'sweep', [f'--method={method}', *shared])
    note.refuse_other()
    try:
      ranked = search(method, cells, folder, seeds, shared)
    finally:
      note.write()
    self.report(method, ranked, folder, shared)

  def with_validation(
    self, method: str, cells: Sequence[Cell], given: list[str]
  ) -> list[str]:
    """Return the flags of all cells, with a number of validation images.

    Raises:
      flags.Error: a flag is unknown, or has no such value.
      InputError: the flags cannot work, or hold out no images.
    """
    config, dataset = paired.settings_of(method, [*given, *as_flags(cells[0])])
    if not config_flags.is_given('validation', given):
      count = suitable_validation(config, dataset)
      print(f'--validation={count}: images of validation, the same for all')
      return [*given, f'--validation={count}']
    require(
      config.split.validation > 0,
      '`validation`=0: the cells are ranked by validation errors: give 1 or '
      'more, or leave it out',
    )
    return given

  def report(
    self, method: str, ranked: list[Ranked], folder: pathlib.Path, shared
  ) -> None:
    """Print and write the table, and the command of the best setting."""
    held_out = 'validation'
    own = [x for x in shared if not config_flags.is_given(held_out, [x])]
    words = ['ssljax', method, *own, *as_flags(ranked[0].cell)]
    command = shlex.join(words)
    shown = ' '.join(x.lstrip('-') for x in shared)
    text = markdown(ranked, f'{method}, {shown}')
    record = as_record(method, ranked, shared, command)
    run_folder.write_atomically(folder / 'sweep.md', text)
    run_folder.write_json(folder / 'sweep.json', record)
    print(
      f'{text}\nwritten to {folder}/sweep.md, .json\n'
      f'the best setting, trained without holding images out:\n  {command}'
    )


if __name__ == '__main__':
  paired.start('sweep', Command)
