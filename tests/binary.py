"""Runs an experiment binary in this process, as its command line would."""

import functools
import importlib
import sys
from unittest import mock

from absl import flags
import array_record.python.array_record_data_source  # noqa: F401 (has flags)
import common
import grain  # noqa: F401 (has flags)
import pytest

from ssljax import parallel
from ssljax.methods.madnn import madnn
from ssljax.methods.supervised import supervised

ARMS = {
  'madnn': {'supervised': supervised, 'madnn': madnn},
  'supervised': {'supervised': supervised},
}


def run(*args, binary='madnn'):
  """The exit status of `python experiments/BINARY.py *args`."""
  known = set(flags.FLAGS)
  one_device = functools.partial(parallel.make_mesh, [1])
  argv = [f'{binary}.py', *map(str, args)]
  try:
    with (
      mock.patch.object(sys, 'argv', argv),
      # Eight virtual devices on two cores take their time.
      mock.patch.object(parallel, 'make_mesh', lambda _: one_device()),
      pytest.raises(SystemExit) as stopped,
    ):
      common.main(binary, ARMS[binary])
  finally:
    for name in set(flags.FLAGS) - known:
      delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
  return stopped.value.code or 0


def refused(capsys, *args, binary='madnn'):
  """The one line with which a binary refuses its input."""
  status = run(*args, binary=binary)
  error = capsys.readouterr().err.strip()
  # A progress bar may stand before it.
  line = error.replace('\r', '\n').split('\n')[-1]
  assert status == 2, error
  assert 'Traceback' not in error
  assert line.startswith(f'{binary}: '), error
  return line


def script_arms(binary):
  """What the script itself hands to `common.main`."""
  with mock.patch.object(common, 'main') as main:
    importlib.import_module('runpy').run_path(
      f'{common.__file__.rsplit("/", 1)[0]}/{binary}.py', run_name='__main__'
    )
  return main.call_args.args
