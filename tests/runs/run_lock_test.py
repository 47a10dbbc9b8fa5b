"""One run at a time writes in a folder."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from ssljax.errors import InputError
from ssljax.runs import run_lock

RunLock = run_lock.RunLock
HOLD = """
import pathlib, sys, time
from ssljax.runs import run_lock
lock = run_lock.RunLock(pathlib.Path(sys.argv[1]))
print('held', flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(run_lock, '_SETTLE_SECONDS', 0.05)


@pytest.fixture
def no_flock(monkeypatch):
  """A file system that does not support `flock`."""

  def refuse(*args):
    raise OSError(errno.ENOSYS, 'not supported')

  monkeypatch.setattr(run_lock.fcntl, 'flock', refuse)


def held_elsewhere(folder, **more):
  """Start a process that holds the lock."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLD, folder], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == 'held\n'
  return process


def written(folder, **holder):
  """Write the lock of a process that does not hold it."""
  holder = {
    'pid': 4711,
    'host': 'far',
    'started': 'noon',
    'token': 'x',
  } | holder
  (folder / run_lock.NAME).write_text(json.dumps(holder))


def aged(folder, seconds):
  then = time.time() - seconds
  os.utime(folder / run_lock.NAME, (then, then))


def test_a_released_lock_leaves_nothing_and_can_be_taken_again(tmp_path):
  for _ in range(2):
    lock = RunLock(tmp_path)
    lock.require_held()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_second_process_is_refused_with_pid_host_and_time(tmp_path):
  process = held_elsewhere(tmp_path)
  try:
    with pytest.raises(InputError) as refused:
      RunLock(tmp_path)
  finally:
    process.kill()
    process.wait(timeout=60)
  host = os.uname().nodename
  said = str(refused.value)
  assert f'another process, {process.pid} on {host}, is running in it' in said
  assert f'since {time.strftime("%Y-")}' in said and '\n' not in said


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, caplog):
  process = held_elsewhere(tmp_path)
  process.send_signal(signal.SIGKILL)
  process.wait(timeout=60)
  assert (tmp_path / run_lock.NAME).exists()
  RunLock(tmp_path).release()
  assert f'process {process.pid}, which has ended' in caplog.text


@pytest.mark.usefixtures('no_flock')
def test_without_flock_the_process_number_decides_on_this_host(tmp_path):
  lock = RunLock(tmp_path)
  with pytest.raises(InputError, match=f'process, {os.getpid()} on'):
    RunLock(tmp_path)
  lock.release()
  ended = subprocess.Popen([sys.executable, '-c', ''])
  ended.wait(timeout=60)
  written(tmp_path, pid=ended.pid, host=run_lock.host())
  RunLock(tmp_path).release()


def test_a_lock_of_another_host_is_free_once_it_is_not_refreshed(tmp_path):
  written(tmp_path)
  aged(tmp_path, run_lock.STALE_SECONDS - 20)
  with pytest.raises(InputError, match=r'4711 on far, is .* since noon'):
    RunLock(tmp_path)
  aged(tmp_path, run_lock.STALE_SECONDS + 20)
  RunLock(tmp_path).release()


def test_of_two_hosts_that_find_a_stale_lock_one_gets_it(tmp_path, monkeypatch):
  written(tmp_path)
  aged(tmp_path, 1000)
  sleep = time.sleep

  def other_host_writes(seconds):
    sleep(seconds)
    written(tmp_path, host='third')

  monkeypatch.setattr(run_lock.time, 'sleep', other_host_writes)
  with pytest.raises(InputError, match='on third'):
    RunLock(tmp_path)


def test_a_lock_is_refreshed_while_it_is_held(tmp_path, monkeypatch):
  monkeypatch.setattr(run_lock, 'REFRESH_SECONDS', 0.02)
  lock = RunLock(tmp_path)
  aged(tmp_path, 1000)
  deadline = time.monotonic() + 10
  while time.time() - (tmp_path / run_lock.NAME).stat().st_mtime > 500:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  lock.require_held()
  lock.release()


@pytest.mark.parametrize('how', ['taken', 'removed'])
def test_a_lock_that_is_lost_stops_the_run(tmp_path, monkeypatch, how):
  monkeypatch.setattr(run_lock, 'REFRESH_SECONDS', 0.02)
  lock = RunLock(tmp_path)
  if how == 'taken':
    written(tmp_path)
  else:
    (tmp_path / run_lock.NAME).unlink()
  lock._thread.join(10)
  with pytest.raises(InputError, match='removed or taken by another process'):
    lock.require_held()
  lock.release()
  # The lock of the other process stays.
  assert (tmp_path / run_lock.NAME).exists() == (how == 'taken')


@pytest.mark.parametrize('text', ['', '{', '[]', '{"pid": "x"}'])
def test_a_damaged_lock_is_free_once_nobody_holds_it(tmp_path, text):
  (tmp_path / run_lock.NAME).write_text(text)
  aged(tmp_path, 1000)
  lock = RunLock(tmp_path)
  assert json.loads(lock.path.read_text())['pid'] == os.getpid()
  with pytest.raises(InputError, match=f'process, {os.getpid()} on'):
    RunLock(tmp_path)
  lock.release()
  assert not list(tmp_path.iterdir())


def test_a_lock_that_is_no_file_is_refused(tmp_path):
  os.mkfifo(tmp_path / run_lock.NAME)
  with pytest.raises(InputError, match=r'run\.lock is no regular file'):
    RunLock(pathlib.Path(tmp_path))
