"""The run's folder: what it holds, and whether a command may go on in it.

config.json    every setting, see `config.Config`
flags.txt      the settings that decide the result, as flags
split.json     labelled rows of every seed, with a hash
metrics.jsonl  one object per measurement
result.json    the outcome, `complete` once there is nothing left to do
checkpoints/   one folder per job
events/        TensorBoard
"""

import contextlib
import datetime
import errno
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax

from ssljax import config as config_lib
from ssljax.config import Config
from ssljax.errors import InputError, require

# In the order in which a run is cleared: what says whose it is goes last.
CONTENT = (
  'result.json',
  'checkpoints',
  'events',
  'metrics.jsonl',
  'split.json',
  'flags.txt',
  'config.json',
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (
  errno.EACCES,
  errno.EPERM,
  errno.EROFS,
  errno.ENOTDIR,
  errno.EEXIST,
)


@contextlib.contextmanager
def disk_errors(folder: pathlib.Path):
  """Turns a refusal to write in the run's folder into one clear line."""
  try:
    yield
  except OSError as error:
    where = str(error.filename or folder)
    if error.errno in _FULL:
      raise InputError(
        f'`workdir`={folder}: the disk is full; make room and run the same '
        'command again, it goes on from the last checkpoint'
      ) from error
    if error.errno in _REFUSED and where.startswith(str(folder)):
      raise InputError(
        f'`workdir`={folder}: cannot be written ({error.strerror}); give '
        'another folder'
      ) from error
    raise


def dated(name: str) -> pathlib.Path:
  """Return the name of a new folder: runs/NAME-YYYYMMDD-HHMMSS."""
  name = re.sub(r'[^\w.-]+', '_', name).strip('_')  # Data sets may be paths.
  now = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
  return pathlib.Path('runs') / f'{name}-{now}'


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all."""
  partial = path.with_suffix('.partial')
  partial.write_text(text)
  os.replace(partial, path)


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Write a binary file whole or not at all."""
  partial = path.with_suffix('.partial')
  partial.write_bytes(content)
  os.replace(partial, path)


def write_json(path: pathlib.Path, value) -> None:
  """Writes JSON, whole or not at all."""
  write_atomically(path, json.dumps(value, indent=1) + '\n')


def look(folder: pathlib.Path, config: Config, overwrite: bool) -> dict | None:
  """Return the result of this very run if the folder holds it, complete.

  Args:
    folder: may be absent.
    config: of the run.
    overwrite: an earlier run in the folder may be restarted.

  Raises:
    InputError: the folder holds another run, or something else.
  """
  if not folder.exists():
    return None
  if is_run(folder) and overwrite:
    return None
  if is_run(folder):
    refuse_other(folder, config)
  else:
    strange = [p.name for p in folder.iterdir() if p.suffix != '.partial']
    require(
      not strange,
      f'`workdir`={folder}: is not empty and holds no run; give another folder',
    )
  result = read_result(folder)
  return result if result and result['complete'] else None


def is_run(folder: pathlib.Path) -> bool:
  """True for the folder of a run, of this version or of version 0.1."""
  return any((folder / name).is_file() for name in ('config.json', 'flags.txt'))


def read_config(folder: pathlib.Path, method: str | None = None) -> Config:
  """Return the config of the run in a folder.

  Args:
    folder: of the run.
    method: name of its method. Runs of version 0.1 have a `flags.txt` alone,
      which does not say it; if None it is that of `result.json`.

  Raises:
    InputError: the record is damaged or of another version.
  """
  try:
    path = folder / 'config.json'
    if path.is_file():
      return config_lib.read(path.read_text())
    method = method or (read_result(folder) or {}).get('method')
    require(method is not None, 'result.json: names no method')
    lines = (folder / 'flags.txt').read_text().splitlines()
    return config_lib.from_flags(method, lines)
  except (InputError, UnicodeDecodeError) as error:
    said = getattr(error, 'marked', error)
    raise InputError(
      f'`run`={folder}: its settings cannot be read ({said}): run it again '
      'with this version'
    ) from error


def claim(folder: pathlib.Path, config: Config, overwrite: bool) -> None:
  """Make the folder this run's own.

  Args:
    folder: made if absent.
    config: of the run.
    overwrite: removes the files of an earlier run, and nothing else.
  """
  folder.mkdir(parents=True, exist_ok=True)
  if overwrite and is_run(folder):
    clear(folder)
  if not is_run(folder):
    write_json(folder / 'config.json', config_lib.to_json(config))
    text = '\n'.join(config_lib.to_flags(config)) + '\n'
    write_atomically(folder / 'flags.txt', text)


def clear(folder: pathlib.Path) -> None:
  """Removes a run, leaving whatever else is in its folder."""
  for name in CONTENT:
    path = folder / name
    if path.is_dir():
      shutil.rmtree(path)
    else:
      path.unlink(missing_ok=True)


def refuse_other(folder: pathlib.Path, config: Config) -> None:
  """Raise `InputError` naming the settings in which two runs differ."""
  there = read_config(folder, config.method)
  differ = config_lib.differences(there, config)
  require(
    not differ,
    f'`workdir`={folder}: holds a run of other settings ({"; ".join(differ)}): '
    'give another folder, or `overwrite=True` to start it anew',
  )


def read_result(folder: pathlib.Path) -> dict | None:
  """What `result.json` says, or None."""
  path = folder / 'result.json'
  return json.loads(path.read_text()) if path.exists() else None


def provenance(devices: int) -> dict:
  """Where a result comes from: command, commit, device, versions."""
  packages = ('jax', 'flax', 'optax', 'orbax.checkpoint', 'numpy')
  versions = {name: sys.modules[name].__version__ for name in packages}
  device = jax.devices()[0]
  return {
    'command': ' '.join(['python', *sys.argv]),
    'commit': commit(),
    'device': f'{devices} x {device.device_kind}',
    'versions': versions | {'python': sys.version.split()[0]},
  }


@functools.cache  # of the process: what is loaded does not change
def commit() -> str:
  """The commit of the source, '+' where it has been changed; or 'unknown'."""
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
