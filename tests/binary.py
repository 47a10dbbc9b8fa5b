"""Runs an experiment binary in this process, as its command line would."""

import contextlib
import functools
import importlib
import os
import pathlib
import runpy
import sys
from unittest import mock

from absl import flags
import array_record.python.array_record_data_source  # noqa: F401 (has flags)
from flax import linen as nn
import grain  # noqa: F401 (has flags)
import pytest

from ssljax.cli import main
from ssljax.distributed import placement
from ssljax.networks import layers, network
from ssljax.runs import build

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'


def environment(devices=1, **more):
  """Of a process with so many devices that compiles as quickly as a test."""
  flags = os.environ['XLA_FLAGS'].replace('count=8', f'count={devices}')
  return os.environ | {'XLA_FLAGS': flags} | more


class Flat(nn.Module):
  """Dense, leaky ReLU, classifier: compiles in a moment."""

  classes: int
  embedding: int = 8

  @nn.compact
  def __call__(self, image, *, train, dropout):
    x = nn.Dense(self.embedding)(image.reshape(image.shape[0], -1))
    x = layers.leaky_relu(x)
    return network.Outputs(nn.Dense(self.classes)(x), x)


@contextlib.contextmanager
def small():
  """On one device, and with `Flat` as the networks for digits."""
  # A preset may say how much is dropped, where there is something to drop.
  flat = lambda classes, *, dropout=0.0: network.from_linen(Flat(classes))
  one_device = functools.partial(placement.make_mesh, [1])
  with (
    mock.patch.dict(build.NETWORKS, digits=flat, digits_heads=flat),
    # Eight virtual devices on two cores take their time.
    mock.patch.object(placement, 'make_mesh', lambda *_, **__: one_device()),
  ):
    yield


def run(*args, binary='madnn'):
  """The exit status of `python experiments/BINARY.py *args`, run `small`."""
  known = set(flags.FLAGS)
  argv = [f'{binary}.py', *map(str, args)]
  try:
    with (
      mock.patch.object(sys, 'argv', argv),
      small(),
      pytest.raises(SystemExit) as stopped,
    ):
      runpy.run_path(f'{EXPERIMENTS}/{binary}.py', run_name='__main__')
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


@functools.cache
def flag_names(binary):
  """Names of the flags that an experiment binary has of its own."""
  module = importlib.import_module(binary)
  names = main.define(module.ARMS, **getattr(module, 'DEFAULTS', {}))
  for name in names:
    delattr(flags.FLAGS, name)
  return frozenset(names)
