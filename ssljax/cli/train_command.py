"""Trains the run of a config from the command line, on one host or several."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import os
import re
from typing import Any

from ssljax import api, files
from ssljax.cli import compile_cache, main
from ssljax.config import Config, to_flags
from ssljax.data import datasets
from ssljax.distributed import multihost, placement, watchdog
from ssljax.errors import require
from ssljax.runs import (
  budget,
  build,
  choices,
  defaults,
  execute,
  run_folder,
  summary,
)


def run(method: str, config: Config) -> None:
  """Train the run of a config, and print its table.

  Args:
    method: name of the program; a dated folder's name begins with it.
    config: of the run.
  """
  _train(method, started(config))


def run_on_data(method: str, given: Mapping[str, Any]) -> None:
  """Train a run whose other settings suit its data, and print its table.

  Args:
    method: name of the method.
    given: settings that the command line gives.
  """
  facts = []

  def load(opened):
    dataset, of_data = defaults.load(started(opened))
    facts.append(of_data)
    return dataset, of_data

  config, dataset, names = defaults.for_data(method, given, load)
  rows = choices.lines(choices.table(config, dataset, facts[0], given))
  said = '\n'.join(summary.aligned(rows))
  names = names | ({'augment'} - given.keys())
  said += f'\nsettings for this data: {" ".join(to_flags(config, names))}'
  _train(method, with_paths(config), dataset, said)


def started(config: Config) -> Config:
  """Return a config with absolute folders, and start the devices for it."""
  placement.configure_cpu()
  config = with_paths(config)
  compile_cache.use(config.run.compile_cache)
  join_others(config)
  main.require_devices()
  return config


def _train(
  method: str,
  config: Config,
  dataset: datasets.Dataset | None = None,
  said: str = '',
) -> None:
  """Train a run on the devices, which are started.

  Args:
    method: name of the program.
    config: of the run.
    dataset: of the config, if it is open.
    said: a line to print before the run starts.
  """
  awake = watchdog.exit_if_idle(config.hosts.hang_minutes * 60)
  with multihost.exit_if_peer_fails(), awake:
    if config.run.workdir is not None:
      folder = files.as_place('workdir', config.run.workdir)
    else:
      folder = run_folder.dated(f'{method}-{config.data_name}')
    multihost.require_same(
      'what decides the result',
      (
        to_flags(config),
        str(folder),
        config.run.overwrite,
        run_folder.commit(),
      ),
      'start the same command from the same commit on all hosts',
    )
    say = print if multihost.is_main_process() else lambda text: None
    if said:
      say(said)
    config = budget.recorded(config, folder)
    is_new = config.run.overwrite or not run_folder.is_run(folder)
    make = functools.partial(
      _make_run, config, dataset, say if is_new else None
    )
    execute.train_in_folder(make, config, folder, say=say)


def _make_run(
  config: Config,
  dataset: datasets.Dataset | None = None,
  say: Callable[[str], None] | None = None,
) -> build.Run:
  """Make the run of a config.

  Args:
    config: of the run.
    dataset: of the config, if it is open.
    say: gets what was measured for a time budget; None if the lengths of the
      config are to be taken.
  """
  budget.check(config)
  net = None
  if config.run.init_from is not None:
    dataset = dataset or build.load_dataset(config)
    net = api.warm_network(config, dataset)
  run = build.build(config, dataset=dataset, net=net)
  api.warn_of_seen(run)
  if config.run.minutes is None or say is None:
    return run
  return budget.fit(
    run,
    main.STARTED,
    net=net,
    say=lambda text: say(main.marked_as_flags(text)),
  )


def with_paths(config: Config) -> Config:
  """Return a config whose folders are absolute, for its record.

  Raises:
    InputError: a folder is none.
  """
  workdir, data_dir = config.run.workdir, config.data.data_dir
  if workdir is not None:
    files.as_place('workdir', workdir)
  if data_dir is not None:
    data_dir = files.absolute(files.as_place('data_dir', data_dir))
  own: dict[str, Any] = {
    name: os.path.abspath(files.as_path(name, value))
    for name in ('images', 'labels_file')
    if (value := getattr(config.data, name)) is not None
  }
  data = dataclasses.replace(config.data, data_dir=data_dir, **own)
  run = config.run
  if run.init_from is not None:
    source = files.absolute(files.as_place('init_from', run.init_from))
    run = dataclasses.replace(run, init_from=source)
  return dataclasses.replace(config, data=data, run=run)


def join_others(config: Config) -> None:
  """Join the other processes of a run, if there are any."""
  hosts = config.hosts
  given: dict[str, Any] = dict(
    coordinator=hosts.coordinator,
    processes=hosts.processes,
    process=hosts.process,
  )
  several = hosts.multihost
  if several is None:
    named = any(value is not None for value in given.values())
    several = multihost.in_cluster() or named
  if several:
    require(
      config.run.workdir is not None,
      '`workdir`: several processes need one folder that all of them see',
    )
    require(
      re.fullmatch(r'.+:\d+', hosts.coordinator or 'a:1'),
      f'`coordinator`={hosts.coordinator}: give HOST:PORT',
    )
    placement.serialize_cpu_collectives(multiprocess=True)
    multihost.join(**given)
