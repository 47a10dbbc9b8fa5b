"""Compiled programs that are kept on disk for the next start."""

import hashlib
import logging
import os
import pathlib
import platform

import jax

from ssljax import files
from ssljax.errors import InputError

_LOG = logging.getLogger(__name__)
# Variables of JAX that decide by themselves.
_VARIABLES = ('JAX_COMPILATION_CACHE_DIR', 'JAX_ENABLE_COMPILATION_CACHE')


def use(setting: str) -> None:
  """Choose the folder of JAX's persistent compilation cache.

  Args:
    setting: 'off', a folder, or 'auto': the user's cache folder, unless a
      variable of JAX decides.

  Raises:
    InputError: nothing can be written to the folder that was named.
  """
  if setting == 'off':
    jax.config.update('jax_enable_compilation_cache', False)
    return
  if setting == 'auto':
    if any(name in os.environ for name in _VARIABLES):
      return
    folder = files.user_cache() / 'compiled'
  else:
    folder = files.as_path('compile_cache', setting)
  folder = folder.absolute() / _machine()
  problem = files.folder_problem(folder)
  if problem and setting != 'auto':
    raise InputError(
      f'`compile_cache`={setting}: cannot be written ({problem}): give another '
      'folder, or off'
    )
  if problem:
    _LOG.warning(
      'compiled programs are not kept: %s cannot be written (%s): set '
      'XDG_CACHE_HOME or give compile_cache=FOLDER',
      folder,
      problem,
    )
    return
  jax.config.update('jax_enable_compilation_cache', True)
  jax.config.update('jax_compilation_cache_dir', str(folder))
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def _machine() -> str:
  """Return a name for the instructions that this CPU knows.

  A home folder may be shared by machines, and a program that was compiled for
  one may not run on the other.
  """
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = [platform.processor()]
  known = [
    x for x in lines if x.startswith(('flags', 'Features', 'model name'))
  ]
  digest = hashlib.sha256('\n'.join(sorted(set(known or lines))).encode())
  return f'{platform.machine()}-{digest.hexdigest()[:12]}'
