"""Compares methods on held-out labels, and keeps the best run: `runs.auto`."""

from collections.abc import Mapping
import pathlib
import time
from typing import Any

from ssljax import files
from ssljax.cli import main, train_command
from ssljax.config import Config
from ssljax.data import datasets
from ssljax.distributed import multihost
from ssljax.errors import InputError, positive, require
from ssljax.runs import (
  auto,
  budget,
  build,
  choices,
  defaults,
  execute,
  run_folder,
  summary,
)


def run(given: Mapping[str, Any]) -> None:
  """Train the candidates, and print the comparison and the chosen run.

  Args:
    given: settings that the command line gives.
  """
  given = dict(given)
  require(
    not given.get('overwrite') and given.get('init_from') is None,
    '`method`=auto: takes neither `overwrite=True` nor `init_from`: give '
    'another `workdir`',
  )
  minutes = given.pop('minutes', None)
  minutes = auto.MINUTES if minutes is None else minutes
  positive(minutes=minutes)
  folder = _folder(given)
  record = auto.decided(folder)
  if record is None:
    record = _compare(given, folder, minutes)
  auto.keep(folder, record)
  images = record['compared'][0]['images']
  print(f'error on {images} held-out labelled images, by method')
  print('\n'.join(summary.aligned(auto.table(record))))
  result = run_folder.read_result(folder)
  assert result is not None  # of the run that was kept
  print(summary.table(result, folder))


def _folder(given: Mapping[str, Any]) -> pathlib.Path:
  """Return the folder of the run."""
  if given.get('workdir') is not None:
    return files.as_place('workdir', given['workdir'])
  name = given.get('images') or given.get('dataset')
  return run_folder.dated(f'auto-{name}')


def _compare(
  given: dict[str, Any], folder: pathlib.Path, minutes: float
) -> dict[str, Any]:
  """Train the candidates in their folders, and return the comparison."""
  opened: dict[str, Any] = {}

  def load(config: Config):
    if not opened:
      opened['dataset'] = build.load_dataset(train_command.started(config))
    split = build.draw_splits(config, opened['dataset'])[0]
    opened['facts'] = defaults.facts_of_split(opened['dataset'], split)
    return opened['dataset'], opened['facts']

  own = {'labels': 'all'} | given
  _, dataset, _ = defaults.for_data('supervised', own, load)
  require(
    not multihost.is_multiprocess(),
    '`method`=auto: chooses on one host: start one process, or give a method',
  )
  names = auto.candidates_of(dataset)
  own = auto.hold_out(dataset, given) | own
  configs, tables = {}, {}
  for name in names:
    where = folder / auto.CANDIDATES / name
    values = own | {'minutes': auto.minutes_of(name, names, minutes)}
    values['workdir'] = str(where)
    configs[name], _, _ = defaults.for_data(name, values, load)
    tables[name] = choices.table(configs[name], dataset, opened['facts'], given)
  print('\n'.join(summary.aligned(choices.lines(choices.merged(tables)))))
  print(f'comparing {", ".join(names)} for {minutes:g} minutes in all')
  began, found = main.STARTED, []
  for name, config in configs.items():
    where = folder / auto.CANDIDATES / name
    try:
      _train(train_command.with_paths(config), dataset, where, began)
    except budget.TooSmallError as error:
      raise _too_small(error, name, config.run.minutes, minutes) from error
    found.append(auto.errors_of(where))
    began = time.monotonic()
  return auto.compare(found)


def _too_small(
  error: budget.TooSmallError, name: str, part: float | None, minutes: float
) -> InputError:
  """Return the error for a budget of which a method gets too small a part."""
  assert part is not None  # every candidate has a budget
  needed = 1.1 * error.minutes * minutes / part
  return InputError(
    f'`minutes`={minutes:g}: {name} gets {part:g} of them, and needs '
    f'{error.minutes:.1f} here: give `minutes`={needed:.0f} or more'
  )


def _train(
  config: Config,
  dataset: datasets.Dataset,
  folder: pathlib.Path,
  began: float,
) -> None:
  """Train a candidate in its folder, for its part of the budget."""
  is_new = not run_folder.is_run(folder)
  config = budget.recorded(config, folder)

  def make() -> build.Run:
    made = build.build(config, dataset=dataset)
    if not is_new:
      return made
    say = lambda text: print(main.marked_as_flags(text))
    return budget.fit(made, began, say=say)

  execute.train_in_folder(make, config, folder)
