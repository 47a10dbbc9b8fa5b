"""A run of eight devices is loaded by a process that has one, without flags."""

import json
import subprocess
import sys

import binary
import pytest

FLAGS = (
  *('--network=mlp', '--steps=4', '--nobaseline', '--seeds=1', '--labels=2'),
  *('--batch_labelled=8', '--batch_unlabelled=8', '--pretrain=4'),
  *('--pretrain_batch=8', '--repeat=4', '--interval=4', '--finetune=4'),
)
LOAD = """
import json, sys
import jax, ssljax
model = ssljax.load(sys.argv[1])
images = ssljax.load_data('digits').test.read(range(100))
classes = model.predict(images).tolist()
print(json.dumps({'devices': jax.device_count(), 'classes': classes}))
"""


def ran(devices, *command):
  """Run Python in a process with so many devices; return what it prints."""
  return subprocess.run(
    [sys.executable, *map(str, command)],
    env=binary.environment(devices),
    stdout=subprocess.PIPE,
    text=True,
    check=True,
    timeout=300,
  ).stdout


@pytest.mark.slow
def test_one_device_loads_what_eight_have_written(tmp_path):
  folder = tmp_path / 'run'
  script = binary.EXPERIMENTS / 'r2d2.py'  # it has a memory with sharded rows
  ran(8, script, *FLAGS, f'--workdir={folder}')
  result = json.loads((folder / 'result.json').read_text())
  assert result['device'].startswith('8 x')
  one, eight = (json.loads(ran(n, '-c', LOAD, folder)) for n in (1, 8))
  assert (one['devices'], eight['devices']) == (1, 8)
  assert one['classes'] == eight['classes']
  assert len(set(one['classes'])) > 1
