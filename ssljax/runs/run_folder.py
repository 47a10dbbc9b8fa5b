"""The run's folder: what it holds, and whether a command may go on in it.

flags.txt      the flags that decide the result; usable as a `flagfile`
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
import shutil
import subprocess
import sys

import jax

from ssljax.errors import (InputError, require)

# In the order in which a run is cleared: what says whose it is goes last.
CONTENT = (
  'result.json',
  'checkpoints',
  'events',
  'metrics.jsonl',
  'split.json',
  'flags.txt',
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
  """A fresh folder's name: runs/NAME-YYYYMMDD-HHMMSS."""
  now = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
  return pathlib.Path('runs') / f'{name}-{now}'


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all."""
  partial = path.with_suffix('.partial')
  partial.write_text(text)
  os.replace(partial, path)


def write_json(path: pathlib.Path, value) -> None:
  """Writes JSON, whole or not at all."""
  write_atomically(path, json.dumps(value, indent=1) + '\n')


def look(
  folder: pathlib.Path, flags: dict[str, str], overwrite: bool
) -> dict | None:
  """The result of this very run if the folder holds it, complete.

  Args:
    folder: may be absent.
    flags: name -> ``name`=value`, or '' where it is unset, of every flag that
      decides the result.
    overwrite: whether an earlier run in it may be started anew.

  Raises:
    InputError: the folder holds another run, or something else.
  """
  if not folder.exists():
    return None
  path = folder / 'flags.txt'
  if path.exists() and overwrite:
    return None
  if path.exists():
    refuse_other(folder, path.read_text(), flags)
  else:
    strange = [p.name for p in folder.iterdir() if p.suffix != '.partial']
    require(
      not strange,
      f'`workdir`={folder}: is not empty and holds no run; give another folder',
    )
  result = read_result(folder)
  return result if result and result['complete'] else None


def claim(folder: pathlib.Path, flags: dict[str, str], overwrite: bool) -> None:
  """Makes the folder this run's own.

  Args:
    folder: made if absent.
    flags: as in `look`.
    overwrite: removes what an earlier run left, and nothing else.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'flags.txt'
  if overwrite and path.exists():
    clear(folder)
  if not path.exists():
    lines = [line for line in flags.values() if line]
    write_atomically(path, '\n'.join(lines) + '\n')


def clear(folder: pathlib.Path) -> None:
  """Removes a run, leaving whatever else is in its folder."""
  for name in CONTENT:
    path = folder / name
    if path.is_dir():
      shutil.rmtree(path)
    else:
      path.unlink(missing_ok=True)


def refuse_other(folder: pathlib.Path, text: str, flags: dict[str, str]):
  """Raises `InputError` naming the flags in which two runs differ."""
  by_name = lambda lines: {
    line.split('=')[0].removeprefix('--no').removeprefix('--'): line
    for line in lines
    if line
  }
  there, here = by_name(text.splitlines()), by_name(flags.values())
  differ = [
    f'{there.get(name, "no --" + name)} there, '
    f'{here.get(name, "no --" + name)} here'
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]
  require(
    not differ,
    f'`workdir`={folder}: holds a run of other flags ({"; ".join(differ)}): '
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
