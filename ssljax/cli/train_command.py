"""Trains the run of a config from the command line, on one host or several."""

import functools
import re

from ssljax.config import Config, to_flags
from ssljax.distributed import multihost, placement, watchdog
from ssljax.errors import require
from ssljax.runs import build, execute, run_folder


def run(method: str, config: Config) -> None:
  """Train the run of a config, and print its table.

  Args:
    method: name of the program; a dated folder's name begins with it.
    config: of the run.
  """
  placement.configure_cpu()
  _check_folder(config)
  join_others(config)
  awake = watchdog.exit_if_idle(config.hosts.hang_minutes * 60)
  with multihost.exit_if_peer_fails(), awake:
    if config.run.workdir is not None:
      folder = run_folder.path_of(config.run.workdir)
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
    make = functools.partial(build.build, config)
    execute.train_in_folder(make, config, folder, say=say)


def _check_folder(config: Config) -> None:
  """Raise `InputError` for a folder that is none."""
  require(
    '://' not in (config.run.workdir or ''),
    f'`workdir`={config.run.workdir}: is no folder: mount the bucket '
    '(gcsfuse), or give a disk that all hosts share',
  )


def join_others(config: Config) -> None:
  """Join the other processes of a run, if there are any."""
  hosts = config.hosts
  given = dict(
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
