"""A run that is killed several times ends like an uninterrupted one."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import binary
from contract_test import lines
import jax
import numpy as np
import orbax.checkpoint as ocp

# R2-D2 has stages, a memory, and repredictions after 40, 80 and 100 steps.
SCRIPT = binary.EXPERIMENTS / 'r2d2.py'
STEPS = 160
FLAGS = (
  '--network=mlp',
  '--batch_labelled=8',
  '--batch_unlabelled=24',
  '--pretrain=40',
  '--pretrain_batch=8',
  '--steps=40',
  '--repeat=40',
  '--interval=20',
  '--finetune=40',
  '--seeds=1',
  '--record_every=5',
  '--evaluate_every=20',
  '--checkpoint_seconds=0',
)
WAIT = 'SSLJAX_KILL_AFTER'  # seconds between a checkpoint and SIGKILL
CHECKPOINTS = pathlib.Path('checkpoints', 'r2d2', 'seed-0')


def start(folder):
  """Start the run as a process that writes a log beside its folder."""
  with open(f'{folder}.log', 'a') as log:
    return subprocess.Popen(
      [sys.executable, SCRIPT, *FLAGS, f'--workdir={folder}'],
      stdout=log,
      stderr=log,
      env=binary.environment(),
    )


def finish(folder):
  """Run to the end, and return the whole log."""
  status = start(folder).wait(timeout=300)
  said = pathlib.Path(f'{folder}.log').read_text()
  assert status == 0, said
  return said


def saved_steps(folder):
  where = folder / CHECKPOINTS
  return [int(p.name) for p in where.glob('*') if p.name.isdecimal()]


def kill_after_checkpoint(folder, step, wait):
  """Send SIGKILL some time after there is a checkpoint beyond a step."""
  process = start(folder)
  deadline = time.monotonic() + 120
  while max(saved_steps(folder), default=-1) <= step:
    if process.poll() is not None:
      break  # the run has ended
    assert time.monotonic() < deadline, 'no checkpoint within two minutes'
    time.sleep(0.01)
  time.sleep(wait)
  process.send_signal(signal.SIGKILL)
  return process.wait(timeout=60)


def preempt_after_checkpoint(folder, step):
  """Send SIGTERM once there is a checkpoint beyond a step, and wait."""
  process = start(folder)
  deadline = time.monotonic() + 120
  while max(saved_steps(folder), default=-1) <= step:
    assert process.poll() is None
    assert time.monotonic() < deadline, 'no checkpoint within two minutes'
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  return process.wait(timeout=120)


def arrays(folder):
  """Return every array of the last checkpoint on disk."""
  newest = folder / CHECKPOINTS / str(STEPS) / 'state'
  return ocp.StandardCheckpointer().restore(newest.absolute())


def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(tmp_path):
  whole, folder = tmp_path / 'whole', tmp_path / 'killed'
  finish(whole)
  # Another moment in every run; a failure prints it, and WAIT repeats it.
  wait = float(os.environ.get(WAIT) or random.uniform(0.0, 0.3))
  print(f'to repeat: {WAIT}={wait}')
  assert kill_after_checkpoint(folder, 48, wait) == -signal.SIGKILL
  # In another stage, by SIGTERM: the run saves, reports its step and exits.
  assert preempt_after_checkpoint(folder, 88) == 0
  said = pathlib.Path(f'{folder}.log').read_text()
  newest = max(saved_steps(folder))
  assert f'saved step {newest}: run the same command to resume' in said
  result = json.loads((folder / 'result.json').read_text())
  assert not result['complete']

  # With the newest checkpoint truncated, the one before it is restored.
  newest = max(saved_steps(folder))
  assert newest < STEPS and len(saved_steps(folder)) > 1
  where = folder / CHECKPOINTS
  for path in (where / str(newest) / 'state').rglob('d/*'):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  said = finish(folder)
  assert f'step {newest} cannot be read' in said
  assert (where / f'damaged-{newest}').is_dir()

  assert lines(folder) == lines(whole)
  jax.tree.map(np.testing.assert_array_equal, arrays(folder), arrays(whole))
  ours, theirs = (
    json.loads((f / 'result.json').read_text()) for f in (folder, whole)
  )
  assert ours['test_error'] == theirs['test_error']
