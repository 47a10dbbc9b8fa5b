"""Writes of checkpoints that fail, and checkpoints that are kept."""

import re
import shutil
import time
import types

import jax
import pytest
import tiny

from ssljax.errors import InputError
from ssljax.training import checkpoint
from ssljax.training.job import Progress
from ssljax.training.snapshots import Snapshots


class Writer:
  """Saves states of a job in a folder."""

  def __init__(self, folder, **settings):
    self.checkpoints = checkpoint.Checkpoints(folder, **settings)
    self.snapshots = Snapshots(tiny.make_job('supervised'), self.checkpoints)
    self.state = self.snapshots.initial()

  def save(self, step):
    progress = Progress(step=step, seconds=0.5)
    checksum = checkpoint.examine(self.state)[1]
    self.snapshots.save(self.state, progress, checksum)

  def block(self):
    """Put a file in the place of the folder, so that every write fails."""
    folder = self.checkpoints.folder
    self.checkpoints.wait()
    folder.rename(f'{folder}-aside')
    folder.write_text('no folder')

  def repair(self):
    folder = self.checkpoints.folder
    folder.unlink()
    shutil.move(f'{folder}-aside', folder)


@pytest.fixture
def pauses(monkeypatch):
  """What is called with the seconds of each pause, in place of waiting."""
  found = types.SimpleNamespace(seconds=[], act=lambda: None)

  def sleep(seconds):
    found.seconds.append(seconds)
    found.act()

  monkeypatch.setattr(checkpoint, 'time', types.SimpleNamespace(sleep=sleep))
  return found


def test_a_write_that_fails_once_is_repeated(tmp_path, pauses, caplog):
  writer = Writer(tmp_path / 'checkpoints')
  writer.save(1)
  writer.block()
  pauses.act = writer.repair
  writer.save(2)
  writer.checkpoints.wait()
  assert pauses.seconds == [1.0]
  assert writer.checkpoints.steps() == (1, 2)
  state, progress = writer.snapshots.restore()
  assert progress.step == 2
  assert checkpoint.examine(state) == checkpoint.examine(writer.state)
  assert 'trying again in 1 s' in caplog.text
  writer.checkpoints.close()


def test_a_write_that_always_fails_names_the_last_good_checkpoint(
  tmp_path, pauses
):
  writer = Writer(tmp_path / 'checkpoints')
  writer.save(1)
  writer.save(2)
  writer.block()
  with pytest.raises(InputError, match='cannot be written') as raised:
    writer.save(3)
    writer.checkpoints.wait()
  assert pauses.seconds == [1.0, 4.0, 16.0]
  assert '\n' not in str(raised.value)
  assert 'workdir' in str(raised.value)
  writer.repair()
  pauses.seconds.clear()
  # With the folder in its place the checkpoints before it are good, and named.
  failed = writer.checkpoints._failed(OSError('broken'))
  assert 'that of step 2' in str(failed)


def test_a_state_that_is_gone_is_not_written_again(tmp_path, pauses):
  writer = Writer(tmp_path / 'checkpoints')
  writer.save(1)
  for array in jax.tree.leaves(writer.state.params):
    array.delete()  # as a step does that its buffers are donated to

  def fail():
    raise OSError('the write of step 1 has failed')

  with pytest.raises(InputError, match='the write of step 1 has failed'):
    writer.checkpoints._repeating(fail)
  assert pauses.seconds == []


def test_as_many_checkpoints_are_kept_as_are_asked_for(tmp_path):
  writer = Writer(tmp_path / 'checkpoints', keep=3)
  for step in range(1, 6):
    writer.save(step)
  writer.checkpoints.wait()
  assert writer.checkpoints.steps() == (3, 4, 5)
  writer.checkpoints.close()


def test_a_checkpoint_of_every_so_many_hours_is_kept(tmp_path):
  # One second, which passes between the second and the third checkpoint.
  writer = Writer(tmp_path / 'checkpoints', keep=1, keep_hours=1 / 3600)
  for step, pause in ((1, 0), (2, 1.1), (3, 0), (4, 0)):
    writer.save(step)
    writer.checkpoints.wait()
    time.sleep(pause)
  kept = writer.checkpoints.steps()
  assert {1, 3, 4} <= set(kept) and 2 not in kept
  writer.checkpoints.close()


@pytest.mark.parametrize('value', [0, -1])
def test_numbers_of_checkpoints_are_above_zero(value):
  from ssljax import config

  for name in ('keep_checkpoints', 'keep_hours'):
    with pytest.raises(InputError, match=re.escape(f'{name}={value}')):
      config.from_values('madnn', {'steps': 2, name: value})
