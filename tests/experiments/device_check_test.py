"""The check of an accelerator, with parts that are replaced by short ones."""

import json
import re

import jax
import pytest

from ssljax import config as config_lib
from ssljax.errors import InputError
from ssljax.experiments import device_check
from ssljax.experiments.benchmarks import device_parts, torch_steps
from ssljax.networks import small


def asked(tmp_path, **changes):
  given = {
    'part': ['bank'],
    'rounds': 1,
    'batch': None,
    'networks': ['MNIST network'],
    'methods': ['madnn'],
    'rows': 1000,
    'minutes': 2.0,
    'data_dir': None,
    'out': str(tmp_path / 'out'),
  }
  return given | changes


def test_rows_are_kept_when_the_machine_is_taken_away(
  tmp_path, monkeypatch, capsys
):
  calls = []

  def part(asked):
    calls.append(asked.rows)
    yield {'rows': asked.rows, 'rate': 0.75}
    if len(calls) == 1:
      raise KeyboardInterrupt
    yield {'rows': 7, 'rate': None}

  monkeypatch.setitem(device_parts.PARTS, 'bank', part)
  with pytest.raises(KeyboardInterrupt):
    device_check.act(asked(tmp_path))
  path = tmp_path / 'out' / 'bank.json'
  record = json.loads(path.read_text())
  assert not record['complete'] and record['rows'] == [
    {'rows': 1000, 'rate': 0.75}
  ]
  assert record['device'] == f'{jax.device_count()} x cpu'
  device_check.act(asked(tmp_path))  # measures the part again
  device_check.act(asked(tmp_path))  # and not a complete one
  assert calls == [1000, 1000]
  shown = capsys.readouterr().out
  assert 'bank: complete in' in shown
  text = (tmp_path / 'out' / 'table.txt').read_text()
  assert text.startswith('bank: 8 x cpu, jax')
  assert re.search(r'rows +rate\n1000 +0.75\n7 +-\n', text)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'part': ['bank', 'speed']}, r'part=speed.*tests, throughput'),
    ({'networks': ['VGG']}, r'networks=VGG.*ConvLarge'),
  ],
)
def test_unknown_names_are_refused(tmp_path, changes, message):
  with pytest.raises(InputError, match=message):
    device_check.act(asked(tmp_path, **changes))
  assert not (tmp_path / 'out').exists()


def test_operations_are_those_of_convolutions_and_products():
  # Two 3x3 convolutions of 8x8 pixels with 2 channels; a pool; one of 2x2
  # positions with 5 channels; a classifier of 3 classes.
  net = small.small(3, widths=(2,), embedding=5)
  each = 64 * 9 * 1 * 2 + 64 * 9 * 2 * 2 + 4 * 9 * 2 * 5 + 5 * 3
  assert device_parts.forward_flops(net, (6, 8, 8, 1)) == 2 * 6 * each


@pytest.mark.parametrize('method', ['madnn', 'r2d2', 'supervised', 'fixmatch'])
def test_the_trainings_are_valid_commands(method, tmp_path):
  wanted = device_parts.Asked(1, minutes=3.0, data_dir='sets', runs=tmp_path)
  command = device_parts.training_flags(method, wanted)
  assert command[1].endswith(f'{method}.py')
  assert {'--minutes=3.0', '--data_dir=sets'} <= set(command)
  lines = []
  for flag in command[2:]:
    if flag.startswith('--flagfile='):
      with open(flag.removeprefix('--flagfile=')) as file:
        lines += file.read().splitlines()
    else:
      lines.append(flag)
  known = {n for part in config_lib.schema(method).values() for n in part}
  names = {
    line.lstrip('-').split('=')[0]
    for line in lines
    if line.startswith('--') and '=' in line
  }
  assert names <= known, names - known


def test_every_network_beside_pytorch_is_one_of_ours():
  assert set(torch_steps.NETWORKS) <= set(device_parts.CASES)
