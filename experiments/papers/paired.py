"""Runs of several settings under the same label splits.

FOLDER/NAME/seed-K/  folder of a run under one split, seed-K-L of several
FOLDER/NAME/seed-K.log  its output, if it is not shown
FOLDER/PROGRAM.flags    flags that all runs in the folder share

Finished runs are not repeated, and interrupted ones are resumed.
"""

from collections.abc import Callable, Iterable, Sequence
import hashlib
import pathlib
import re
from typing import Any, NamedTuple

from absl import flags

from ssljax import config as config_lib
from ssljax import files
from ssljax.cli import config_flags, main
from ssljax.data import datasets
from ssljax.errors import InputError, positive, require
from ssljax.experiments.papers import runs
from ssljax.experiments.papers.runs import call
from ssljax.runs import build, defaults, run_folder, summary

# Settings that this module decides for every run.
OWN = ('workdir', 'seed', 'baseline', 'overwrite')
LONGEST = 100  # characters of a folder's name
# Program -> what it leaves in a folder.
KINDS = {
  'benchmark': 'benchmark',
  'compare': 'comparison',
  'sweep': 'sweep',
}


class Outcome(NamedTuple):
  """The runs of a method with the same settings under several splits."""

  method: str
  network: str
  errors: dict[int, float]  # error in percent by seed
  data: frozenset[str]  # fingerprints of the data sets of the runs
  seconds: float  # in compiled steps, mean over the splits
  labels: int = 0  # different sets of labelled images
  details: dict[str, str] = {}  # noqa: RUF012  commit and device


def blocks(seeds: int, per_run: int) -> list[range]:
  """Return the seeds 0 to `seeds` - 1, `per_run` of them together."""
  firsts = range(0, seeds, per_run)
  return [range(i, min(i + per_run, seeds)) for i in firsts]


def block_name(block: range) -> str:
  """Return 'seed-3' or 'seed-3-5'."""
  last = f'-{block[-1]}' if len(block) > 1 else ''
  return f'seed-{block[0]}{last}'


def train(
  method: str,
  folder: pathlib.Path,
  block: range,
  given: Sequence[str],
  log: bool = False,
) -> dict[str, Any]:
  """Train or resume a run; return the content of its `result.json`.

  Args:
    method: name of the method.
    folder: holds the runs' folders.
    block: seeds of its splits.
    given: flags of the method's program.
    log: write the program's output to a file instead of showing it.

  Raises:
    InputError: the program failed, or was interrupted.
  """
  where = folder / block_name(block)
  result = run_folder.read_result(where) or {}
  if not result.get('complete'):
    own = f'--workdir={where}', f'--seed={block[0]}', f'--seeds={len(block)}'
    command = [*runs.program(method), *given, *own, '--nobaseline']
    if log:
      folder.mkdir(parents=True, exist_ok=True)
      call(command, log=where.with_name(f'{where.name}.log'))
    else:
      call(command)
    result = run_folder.read_result(where) or {}
    require(
      result.get('complete') is True,
      f'{where}: was interrupted: run the same command to resume',
    )
  return result


def outcome(
  method: str,
  folder: pathlib.Path,
  seeds: Iterable[range],
  given: Sequence[str],
  *,
  kind: str = 'test_error',
  log: bool = False,
) -> Outcome:
  """Train a method under every split.

  Args:
    method: name of the method.
    folder: gets a folder for each block of seeds.
    seeds: blocks of seeds.
    given: flags of the method's program.
    kind: 'test_error' or 'validation_error'; the other one is not read.
    log: as in `train`.

  Raises:
    InputError: a program failed, or there are no images to measure errors on.
  """
  seeds = list(seeds)
  found = [train(method, folder, block, given, log) for block in seeds]
  where = f'`{"dataset" if kind == "test_error" else "validation"}`'
  errors = {}
  for block, result in zip(seeds, found, strict=True):
    images = kind.removesuffix('_error')
    require(
      bool(result.get(kind)),
      f'{where}: has no {images} images to compare on: give some',
    )
    standing = summary.errors_that_stand(result[kind])
    errors |= dict(zip(block, standing, strict=True))
  config = run_folder.read_config(folder / block_name(seeds[0]), method)
  joined = lambda key: ', '.join(sorted({result[key] for result in found}))
  return Outcome(
    method,
    config.network.network,
    errors,
    frozenset(result.get('data_fingerprint', '') for result in found),
    # Splits of one run share the time.
    sum(result['seconds'] for result in found) / len(errors),
    len({_labelled(folder / block_name(b), i) for b in seeds for i in b}),
    {key: joined(key) for key in ('commit', 'device')},
  )


def _labelled(folder: pathlib.Path, seed: int) -> str:
  """Return a text that is equal for splits with the same labelled images."""
  drawn = run_folder.read_json(folder / 'split.json').get('splits', [])
  found = [
    str(split.get('labelled')) for split in drawn if split['seed'] == seed
  ]
  return ''.join(found)


def as_name(given: Sequence[str]) -> str:
  """Return a folder's name for the runs of some flags."""
  words = [flag.lstrip('-') for flag in deciding(given)]
  name = re.sub(r'[^\w.,=+-]+', '_', ','.join(words)) or 'digits'
  if len(name) > LONGEST:
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    name = f'{name[:LONGEST]}-{digest}'
  return name


def deciding(given: Sequence[str]) -> list[str]:
  """Return the flags that decide results, in alphabetical order."""
  is_free = lambda flag: flag.lstrip('-').split('=')[0] in config_lib.FREE
  return sorted(flag for flag in given if not ('=' in flag and is_free(flag)))


class Note:
  """The record of the flags that all runs in a folder share."""

  def __init__(self, folder: pathlib.Path, program: str, given: Sequence[str]):
    self.folder, self.given = folder, deciding(given)
    self.path, self.program = folder / f'{program}.flags', program

  def refuse_other(self) -> None:
    """Raise `InputError` if the folder holds runs with other flags."""
    if not files.exists(self.path):
      return
    try:
      there = self.path.read_text(encoding='utf-8').split()
    except (OSError, ValueError) as error:
      raise InputError(f'{self.path} is damaged: remove it') from error
    require(
      deciding(there) == self.given,
      f'`folder`={self.folder}: holds a {KINDS[self.program]} with '
      f'{" ".join(there) or "no flags"}: give another folder',
    )

  def write(self) -> None:
    """Write the flags once a run has begun; a refused command has none."""
    if any(self.folder.glob('**/seed-*/config.json')):
      text = ''.join(f'{flag}\n' for flag in self.given)
      run_folder.write_atomically(self.path, text)


def refuse_own(given: Sequence[str], program: str, *more: str) -> None:
  """Raise `InputError` for flags that the program decides for every run."""
  for name in (*OWN, *more):
    for shown in (name, f'no{name}'):
      require(
        not config_flags.is_given(shown, given),
        f'`{shown}`: {program} decides it for every run: leave it out',
      )


def settings_of(
  method: str, given: Sequence[str]
) -> tuple[config_lib.Config, datasets.Dataset]:
  """Return the config that a program would train with flags, and its data.

  Raises:
    flags.Error: a flag is unknown or its value does not parse.
    InputError: the flags cannot work.
  """
  command = main.MethodCommand(method)
  rest = command.parse([method, *given])
  require(len(rest) == 1, f'"{rest[-1]}" is not a flag: flags begin with --')
  if command.fits_data:
    config, dataset, _ = defaults.for_data(
      method, command.given(), defaults.load
    )
    return config, dataset
  config = command.config()
  return config, build.load_dataset(config)


class Command:
  """A command line of own flags, and of others for the methods' programs."""

  def __init__(self, default_folder: str, seeds: int):
    """Define the flags.

    Args:
      default_folder: folder of the runs, in words.
      seeds: default number of label splits.
    """
    self.values = config_flags.new_values()
    known = set(self.values)
    self.define_flags()
    add = {'flag_values': self.values}
    flags.DEFINE_integer('seeds', seeds, 'Number of label splits.', **add)
    flags.DEFINE_integer(
      'seeds_per_run',
      1,
      'Splits of one run: more of them share its start and its compilation, '
      'and are repeated if --seeds grows.',
      **add,
    )
    flags.DEFINE_string(
      'folder', None, f'Folder of the runs; {default_folder} if unset.', **add
    )
    self.own = [name for name in self.values if name not in known]
    self.given = []

  def define_flags(self) -> None:
    """Define the flags of the program itself in `values`."""

  def parse(self, argv: Sequence[str]) -> list[str]:
    """Parse own arguments; the others are for the methods' programs."""
    rest = self.values(list(argv), known_only=True)
    self.given = rest[1:]
    return rest[:1]

  def help(self) -> str:
    """Return the help of the own flags."""
    return '\n'.join(
      line for name in self.own for line in main.help_lines(self.values[name])
    )

  def seed_blocks(self) -> list[range]:
    """Return the blocks of seeds that the flags name."""
    seeds, per_run = self.values.seeds, self.values.seeds_per_run
    positive(seeds=seeds, seeds_per_run=per_run)
    return blocks(seeds, per_run)

  def make_folder(self, default: str) -> pathlib.Path:
    """Return the folder of the runs, which is made.

    Args:
      default: its path if the flag is unset.
    """
    return main.as_output_folder('folder', self.values.folder or default)

  def act(self) -> None:
    """Do what the flags say."""
    raise NotImplementedError


def start(name: str, make: Callable[[], Command]) -> None:
  """Run a program, and exit."""
  command = make()

  def act():
    with runs.interruptible(name):
      command.act()

  main.run(name, act, command.parse, command.help)
