"""The run's folder: its files, and whether a command may resume in it.

config.json    every setting, see `config.Config`
flags.txt      the settings that decide the result, as flags
split.json     labelled rows of every seed, with a hash
metrics.jsonl  one object per measurement; in a bucket a folder of parts
result.json    the outcome, `complete` once there is nothing left to do
checkpoints/   one folder per job
events/        TensorBoard
profile/       a trace of some steps, with `profile`
failure.json   the step that failed, if one did, for `replay`
run.lock       only while a process is running in it, see `run_lock`
"""

import contextlib
import dataclasses
import datetime
import errno
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax

from ssljax import config as config_lib
from ssljax import files, registry
from ssljax.config import Config
from ssljax.errors import InputError, require
from ssljax.runs import run_lock

# In the order of removal: the files that identify the run go last.
CONTENT = (
  'model',
  'result.json',
  'checkpoints',
  'events',
  'profile',
  'failure.json',
  'metrics.jsonl',
  'split.json',
  'flags.txt',
  'config.json',
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

write_atomically = files.write_atomically
write_bytes = files.write_atomically


@contextlib.contextmanager
def disk_errors(folder: pathlib.Path):
  """Turn an error of a file in the run's folder into one line."""
  try:
    yield
  except OSError as error:
    if error.errno in _FULL:
      raise InputError(
        f'`workdir`={folder}: the disk is full; make room and run the same '
        'command again, it goes on from the last checkpoint'
      ) from error
    if _concerns(folder, error):
      raise InputError(
        f'`workdir`={folder}: cannot be used ({_reason(error, folder)}): give '
        'another folder'
      ) from error
    raise


def _concerns(folder: pathlib.Path, error: OSError) -> bool:
  """Return True for an error of the folder, a parent, or a file in it."""
  if not isinstance(error.filename, str | os.PathLike):
    return False
  folder = pathlib.Path(files.absolute(folder))
  where = pathlib.Path(files.absolute(error.filename))
  return where.is_relative_to(folder) or folder.is_relative_to(where)


def _reason(error: OSError, folder: pathlib.Path) -> str:
  """Return what went wrong, and where if that is not the folder itself."""
  where = str(error.filename)
  said = error.strerror or str(error)
  return said + ('' if where == str(folder) else f': {where}'[:200])


def dated(name: str) -> pathlib.Path:
  """Make and return a new folder: runs/NAME-YYYYMMDD-HHMMSS.

  A second one of the same second ends in -2.

  Raises:
    InputError: the folder cannot be made.
  """
  name = re.sub(r'[^\w.-]+', '_', name).strip('_')  # Data sets may be paths.
  now = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
  first = pathlib.Path('runs') / f'{name[-200:]}-{now}'
  with disk_errors(first):
    first.parent.mkdir(exist_ok=True)
    for number in itertools.count(1):
      folder = first if number == 1 else pathlib.Path(f'{first}-{number}')
      try:
        folder.mkdir()
        return folder
      except FileExistsError:
        continue
  raise AssertionError('unreachable')


def write_json(path: pathlib.Path, value) -> None:
  """Write JSON, as a whole or not at all."""
  files.write_atomically(path, json.dumps(value, indent=1) + '\n')


def look(folder: pathlib.Path, config: Config, overwrite: bool) -> dict | None:
  """Return the result if the folder holds this same run, complete.

  A complete run of fewer splits is not: the others are still to be trained.

  Args:
    folder: may be absent.
    config: of the run.
    overwrite: an earlier run in the folder may be restarted.

  Raises:
    InputError: the folder holds another run, or something else.
  """
  if not files.exists(folder):
    return None
  require(
    folder.is_dir(),
    f'`workdir`={folder}: is no folder: give another place',
  )
  if is_run(folder) and overwrite:
    return None
  if is_run(folder):
    refuse_other(folder, config)
  else:
    own = lambda p: p.suffix == '.partial' or p.name == run_lock.NAME
    strange = [p.name for p in folder.iterdir() if not own(p)]
    require(
      not strange,
      f'`workdir`={folder}: is not empty and holds no run; give another folder',
    )
  result = read_result(folder)
  if not result or not result.get('complete'):
    return None
  return result if len(result['seeds']) >= config.split.seeds else None


def is_run(folder: pathlib.Path) -> bool:
  """True for the folder of a run, of this version or of version 0.1."""
  names = 'config.json', 'flags.txt'
  return any(files.is_regular(folder / name) for name in names)


def read_config(folder: pathlib.Path, method: str | None = None) -> Config:
  """Return the config of the run in a folder.

  Args:
    folder: of the run.
    method: name of its method. Runs of version 0.1 have a `flags.txt` alone,
      which lacks it; if None, the method of `result.json` is taken.

  Raises:
    InputError: the record is damaged or of another version.
  """
  try:
    path = folder / 'config.json'
    if files.exists(path):
      return config_lib.read(files.read_text(path))
    method = method or (read_result(folder) or {}).get('method')
    if method is None:
      raise InputError('result.json names no method')
    lines = files.read_text(folder / 'flags.txt').splitlines()
    return config_lib.from_flags(method, lines, recorded=True)
  # Values of a wrong type make the checks of the settings raise other types,
  # and JSON that is nested too deep makes the parser raise.
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    said = getattr(error, 'marked', error)
    raise InputError(
      f'`run`={folder}: its settings cannot be read ({said}): restore '
      'config.json, or run it again with this version'
    ) from error


def _recorded_method(folder: pathlib.Path) -> str | None:
  """Return the name of the method in `config.json`, if it can be read."""
  try:
    tree = json.loads(files.read_text(folder / 'config.json'))
    return tree['method'] if isinstance(tree['method'], str) else None
  except (ValueError, TypeError, KeyError, RecursionError, OSError):
    return None  # `read_config` reports it.


def claim(folder: pathlib.Path, config: Config, overwrite: bool) -> None:
  """Make the folder the run's own: remove an earlier run, write the config.

  The lock on the folder must be held.

  Args:
    folder: made if absent.
    config: of the run.
    overwrite: removes the files of an earlier run, and nothing else.
  """
  folder.mkdir(parents=True, exist_ok=True)
  if not files.in_bucket(folder):  # there every write is whole
    for name in CONTENT:  # of a process that was killed while it wrote
      for partial in folder.glob(f'{name}.*.partial'):
        partial.unlink()
  if overwrite and is_run(folder):
    clear(folder)
  if not is_run(folder) or _has_fewer_splits(folder, config):
    write_json(folder / 'config.json', config_lib.to_json(config))
    text = '\n'.join(config_lib.to_flags(config)) + '\n'
    files.write_atomically(folder / 'flags.txt', text)


def _has_fewer_splits(folder: pathlib.Path, config: Config) -> bool:
  """Return True if the run in a folder has fewer splits than a config."""
  return read_config(folder, config.method).split.seeds < config.split.seeds


def clear(folder: pathlib.Path) -> None:
  """Remove a run, and leave whatever else is in its folder.

  A symbolic link is removed, and what it leads to is left.
  """
  for name in CONTENT:
    path = folder / name
    if files.in_bucket(path):
      path.rmtree()
      path.unlink(missing_ok=True)
    elif path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    else:
      path.unlink(missing_ok=True)


def refuse_other(folder: pathlib.Path, config: Config) -> None:
  """Raise `InputError` naming the settings in which two runs differ."""
  method = _recorded_method(folder) or config.method
  remedy = 'give another folder, or `overwrite=True` to start it anew'
  if method in registry.METHODS:
    there = read_config(folder, config.method)
    differ = config_lib.differences(_with_splits(there, config), config)
    longer = _only_lengths(there, config)
    _refuse_fewer_splits(folder, there, config, alone=len(differ) == 1)
  else:  # A user's, which this program does not know.
    differ = [f'`method`={method} there, `method`={config.method} here']
    longer = False
  if longer:
    remedy = (
      'schedules and averages of a longer run differ from the first step on: '
      f'give another folder and `init_from`={folder} to train its weights '
      'further'
    )
  require(
    not differ,
    f'`workdir`={folder}: holds a run of other settings ({"; ".join(differ)}): '
    f'{remedy}',
  )


def _with_splits(there: Config, here: Config) -> Config:
  """Return the config of a run with as many splits as another, if it may.

  Splits may be added, and not removed. Those that are trained at once have to
  be whole groups in both runs.

  Args:
    there: of the run in a folder.
    here: of the run to be trained in it.

  Raises:
    InputError: the last splits were trained at once with fewer than others.
  """
  before, now = there.split.seeds, here.split.seeds
  if before >= now:
    return there
  size = there.run.seeds_at_once
  require(
    before % size == 0,
    f'`seeds`={now}: the run has {before} splits in groups of {size}, the last '
    f'of which is not whole: train the others in another folder with `seed`='
    f'{there.split.seed + before}, `seeds`={now - before}',
  )
  split = dataclasses.replace(there.split, seeds=now)
  return dataclasses.replace(there, split=split)


def _refuse_fewer_splits(
  folder: pathlib.Path, there: Config, here: Config, alone: bool
) -> None:
  """Raise `InputError` if a run has more splits than a config asks for.

  Args:
    folder: of the run.
    there: its config.
    here: of the run to be trained in it.
    alone: they differ in nothing else.
  """
  before, now = there.split.seeds, here.split.seeds
  require(
    before <= now or not alone,
    f'`seeds`={now}: the run in `workdir`={folder} has {before} splits, and '
    f'none is taken away: give `seeds`={before} for its result, more to add '
    'splits, or another folder',
  )


def _only_lengths(there: Config, here: Config) -> bool:
  """Return True if runs differ in their lengths alone, and one is longer."""
  values = there.values(), here.values()
  names = {n for n in values[1] if values[0].get(n) != values[1][n]}
  names -= {*config_lib.FREE, 'bn_momentum', 'seeds'}
  if here.network.compute_dtype == 'auto':  # the run is not built yet
    names.discard('compute_dtype')
  before, now = there.run.steps, here.run.steps
  if before is None or now is None:
    return False
  return names == {'steps'} and now > before


# Types of the values of a result, and of those that come at its end.
_TYPES = {
  'complete': bool,
  'method': str,
  'dataset': str,
  'labels': str,
  'seeds': list,
  'splits': list,
  'arms': dict,
}
_OF_COMPLETE = {'test_error': dict, 'steps': int, 'seconds': int | float}


def read_result(folder: pathlib.Path) -> dict | None:
  """Return the content of `result.json`, or None without one.

  Raises:
    InputError: it is damaged.
  """
  path = folder / 'result.json'
  if not files.exists(path):
    return None
  result = read_json(path)
  types = _TYPES | _OF_COMPLETE
  needed = types if result.get('complete') else {'method'}
  for name, kind in types.items():
    is_there = name in result or name in needed
    if is_there and not isinstance(result.get(name), kind):
      raise _damaged(path, f'it has no valid {name!r}')
  if not all(isinstance(arm, dict) for arm in result.get('arms', {}).values()):
    raise _damaged(path, "it has no valid 'arms'")
  return result


def read_json(path: pathlib.Path) -> dict:
  """Return the JSON object in a file of a run's folder.

  Raises:
    InputError: it is damaged, or no regular file.
  """
  try:
    found = json.loads(files.read_text(path))
  except InputError as error:
    raise _damaged(path, str(error)) from error
  except (ValueError, RecursionError) as error:
    raise _damaged(path, str(error)) from error
  if not isinstance(found, dict):
    raise _damaged(path, 'it is no JSON object')
  return found


def _damaged(path: pathlib.Path, reason: str) -> InputError:
  return InputError(
    f'`workdir`={path.parent}: {path.name} is damaged ({reason}): remove that '
    'file and run the same command again, it is written anew'
  )


def provenance(devices: int) -> dict:
  """Return the origin of a result: command, commit, device, versions."""
  packages = ('jax', 'flax', 'optax', 'orbax.checkpoint', 'numpy')
  versions = {  # without an import
    name: importlib.metadata.version(name.replace('.', '-'))
    for name in packages
  }
  device = jax.devices()[0]
  return {
    'command': ' '.join(['python', *sys.argv]),
    'commit': commit(),
    'device': f'{devices} x {device.device_kind}',
    'versions': versions | {'python': sys.version.split()[0]},
  }


@functools.cache  # of the process: what is loaded does not change
def commit() -> str:
  """Return the commit of the source, with '+' if changed, or 'unknown'."""
  source = pathlib.Path(__file__).parent
  git = lambda *words: subprocess.run(
    ['git', '-C', str(source), *words], capture_output=True, text=True
  )
  try:
    head = git('rev-parse', '--short=12', 'HEAD')
    changed = git('status', '--porcelain', '--untracked-files=no')
  except FileNotFoundError:
    return 'unknown'
  if head.returncode:
    return 'unknown'
  return head.stdout.strip() + ('+' if changed.stdout else '')
