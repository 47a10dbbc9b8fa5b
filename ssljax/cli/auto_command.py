"""Compares methods on held-out labels, and keeps the best run: `runs.auto`."""

from collections.abc import Mapping
import math
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

_MARGIN = 1.1  # a budget is this times what was measured to be needed


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
    require(
      not run_folder.is_run(folder),
      f'`workdir`={folder}: holds a run that `method`=auto has not made: give '
      'another `workdir`',
    )
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
  return auto.compare(_trained(configs, dataset, minutes))


def _trained(
  configs: dict[str, Config], dataset: datasets.Dataset, minutes: float
) -> list[auto.Errors]:
  """Train the candidates; return their errors.

  The first one, the baseline, gets more than its part if it needs more, at most
  half of the budget. Others that do not fit into their part are left out.

  Args:
    configs: of the candidates by name, each with its part of the budget.
    dataset: of all.
    minutes: the budget.
  """
  began, found = main.STARTED, list[auto.Errors]()
  first, *others = configs
  for name in configs:
    try:
      _train(configs[name], dataset, began)
    except budget.TooSmallError as error:
      if name != first:
        enough = _MARGIN * error.minutes * minutes / _part(configs[name])
        print(
          f'{name} is left out: it gets {_part(configs[name]):.2g} of '
          f'{minutes:g} minutes, and needs {error.minutes:.1f} here; '
          f'--minutes={math.ceil(enough)} would do'
        )
        continue
      more = round(_MARGIN * error.minutes, 2)
      if more > minutes / 2:
        raise _too_small(error, configs[name], minutes) from error
      print(
        f'{name} gets {more:.2g} of {minutes:g} minutes, since it needs them'
      )
      configs[name] = configs[name].replace(minutes=more)
      _train(configs[name], dataset, time.monotonic())
    if name == first:  # the others share the rest
      rest = (minutes - _part(_recorded(configs[name]))) / len(others)
      for other in others:
        part = min(rest, _part(configs[other]))
        configs[other] = configs[other].replace(minutes=part)
    found.append(auto.errors_of(_folder_of(configs[name])))
    began = time.monotonic()
  return found


def _folder_of(config: Config) -> pathlib.Path:
  assert config.run.workdir is not None  # every candidate has a folder
  return files.as_place('workdir', config.run.workdir)


def _part(config: Config) -> float:
  assert config.run.minutes is not None  # every candidate has a budget
  return config.run.minutes


def _recorded(config: Config) -> Config:
  """Return the config of a candidate that has been trained."""
  return run_folder.read_config(_folder_of(config), config.method)


def _too_small(
  error: budget.TooSmallError, config: Config, minutes: float
) -> InputError:
  """Return the error for a budget that is too small for the baseline."""
  needed = 2 * _MARGIN * error.minutes
  return InputError(
    f'`minutes`={minutes:g}: {config.method} gets at most half of them, and '
    f'needs {error.minutes:.1f} here: give `minutes`={math.ceil(needed)} or '
    'more, or a method'
  )


def _train(config: Config, dataset: datasets.Dataset, began: float) -> None:
  """Train a candidate in its folder, for its part of the budget."""
  config, folder = train_command.with_paths(config), _folder_of(config)
  is_new = not run_folder.is_run(folder)
  if not is_new:  # it may have got more than its part
    config = config.replace(minutes=_part(_recorded(config)))
  config = budget.recorded(config, folder)

  def make() -> build.Run:
    made = build.build(config, dataset=dataset)
    if not is_new:
      return made
    say = lambda text: print(main.marked_as_flags(text))
    return budget.fit(made, began, say=say)

  execute.train_in_folder(make, config, folder)
