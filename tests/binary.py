"""Runs an experiment binary in this process, as its command line would."""

import contextlib
import functools
import os
import pathlib
import runpy
import sys
from unittest import mock

from flax import linen as nn
import pytest

from ssljax import config, registry
from ssljax.distributed import placement
from ssljax.networks import layers, network

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'


def environment(devices=1, **more):
  """Of a process with so many devices that compiles as quickly as a test."""
  flags = os.environ['XLA_FLAGS'].replace('count=8', f'count={devices}')
  return os.environ | {'XLA_FLAGS': flags} | more


class Flat(nn.Module):
  """Dense, batch norm, leaky ReLU, dropout, classifier: compiles quickly.

  It has the running averages and the random masks of the networks for digits.
  """

  classes: int
  embedding: int = 8
  dropout: float = 0.2
  momentum: float = 0.9

  @nn.compact
  def __call__(self, image, *, train, dropout):
    # A bias before batch norm has a slope of rounding errors alone.
    x = nn.Dense(self.embedding, use_bias=False)(
      image.reshape(image.shape[0], -1)
    )
    x = layers.leaky_relu(layers.BatchNorm(self.momentum)(x, train=train))
    x = layers.dropout(x, self.dropout, train=train, active=dropout)
    return network.Outputs(nn.Dense(self.classes)(x), x)


def flat(classes, *, dropout: float = 0.2, momentum: float = 0.9):
  """Return `Flat`, with the settings that presets change."""
  module = Flat(classes, dropout=dropout, momentum=momentum)
  return network.from_linen(module)


@contextlib.contextmanager
def small():
  """On one device, and with `Flat` as the networks for digits."""
  one_device = functools.partial(placement.make_mesh, [1])
  with (
    mock.patch.dict(registry.NETWORKS, digits=flat, digits_heads=flat),
    # Eight virtual devices on two cores take their time.
    mock.patch.object(placement, 'make_mesh', lambda *_, **__: one_device()),
  ):
    yield


def run(*args, binary='madnn'):
  """The exit status of `python experiments/BINARY.py *args`, run `small`."""
  argv = [f'{binary}.py', *map(str, args)]
  with (
    mock.patch.object(sys, 'argv', argv),
    small(),
    pytest.raises(SystemExit) as stopped,
  ):
    runpy.run_path(f'{EXPERIMENTS}/{binary}.py', run_name='__main__')
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


def flag_names(binary):
  """Names of the settings of a method's binary."""
  return frozenset(n for part in config.schema(binary).values() for n in part)
