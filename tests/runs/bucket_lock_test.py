"""One run at a time writes in a folder of a bucket."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ssljax.errors import InputError
from ssljax.runs import bucket_lock, run_lock

HOLD = """
import sys, time
from ssljax import buckets
from ssljax.runs import run_lock
lock = run_lock.take(buckets.BucketPath(sys.argv[1]))
print('held', flush=True)
time.sleep(60)
"""


def held_elsewhere(folder):
  """Start a process that holds the lock."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLD, folder], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == 'held\n'
  return process


def written(folder, **holder):
  """Write the lock of a process of another host."""
  holder = {'pid': 4711, 'host': 'far', 'started': 'noon'} | holder
  (folder / run_lock.NAME).write_text(json.dumps(holder | {'token': 'x'}))


def test_a_released_lock_leaves_nothing_and_can_be_taken_again(bucket):
  for _ in range(2):
    lock = run_lock.take(bucket.folder)
    assert isinstance(lock, bucket_lock.BucketLock)
    lock.require_held()
    lock.release()
    assert not bucket.folder.exists()


def test_a_process_is_refused_until_the_holder_is_killed(bucket, caplog):
  process = held_elsewhere(bucket.folder)
  try:
    with pytest.raises(InputError) as refused:
      run_lock.take(bucket.folder)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert f'another process, {process.pid} on ' in str(refused.value)
  with caplog.at_level(logging.WARNING):
    run_lock.take(bucket.folder).release()
  assert f'is of process {process.pid}, which has ended' in caplog.text


def test_a_lock_of_another_host_is_free_once_it_is_stale(bucket, monkeypatch):
  written(bucket.folder)
  with pytest.raises(
    InputError, match='4711 on far, is running in it since no'
  ):
    run_lock.take(bucket.folder)
  monkeypatch.setattr(run_lock, 'STALE_SECONDS', 0.2)
  time.sleep(0.3)
  run_lock.take(bucket.folder).release()


def test_of_many_that_find_a_stale_lock_one_gets_it(bucket, monkeypatch):
  written(bucket.folder)
  monkeypatch.setattr(bucket_lock.BucketLock, '_is_in_use', lambda *_: False)
  taken, refused = [], []
  together = threading.Barrier(4)

  def take():
    together.wait()
    try:
      taken.append(run_lock.take(bucket.folder))
    except InputError:
      refused.append(1)

  read = type(bucket.folder).read_with_generation

  def read_together(path):
    found = read(path)
    if found and b'far' in found[0]:
      together.wait()  # all have seen the stale lock
    return found

  monkeypatch.setattr(
    type(bucket.folder), 'read_with_generation', read_together
  )
  threads = [threading.Thread(target=take) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(taken), len(refused)) == (1, 3)
  taken[0].release()


@pytest.mark.parametrize('how', ['taken', 'removed'])
def test_a_lock_that_is_lost_stops_the_run(bucket, monkeypatch, how):
  monkeypatch.setattr(run_lock, 'REFRESH_SECONDS', 0.05)
  lock = run_lock.take(bucket.folder)
  time.sleep(0.5)  # it is written again meanwhile
  lock.require_held()
  if how == 'taken':
    written(bucket.folder)
  else:
    (bucket.folder / run_lock.NAME).unlink()
  deadline = time.monotonic() + 10
  while not lock._lost and time.monotonic() < deadline:
    time.sleep(0.05)
  with pytest.raises(InputError, match='was removed or taken by another'):
    lock.require_held()
  lock.release()
  # Another process's lock stays.
  assert (bucket.folder / run_lock.NAME).exists() == (how == 'taken')


def test_a_lock_survives_an_outage(bucket, monkeypatch, caplog):
  monkeypatch.setattr(run_lock, 'REFRESH_SECONDS', 0.05)
  lock = run_lock.take(bucket.folder)
  bucket.fault = lambda method, path: 403
  time.sleep(0.5)
  bucket.fault = lambda method, path: None
  lock.require_held()
  lock.release()
  assert 'cannot be updated' in caplog.text
  assert not bucket.folder.exists()


def test_a_damaged_lock_is_of_nobody_on_this_host(bucket, monkeypatch):
  (bucket.folder / run_lock.NAME).write_bytes(b'{')
  with pytest.raises(InputError, match='an unknown host'):
    run_lock.take(bucket.folder)
  written(bucket.folder, host=run_lock.host(), pid=os.getppid())
  with pytest.raises(InputError, match=f'{os.getppid()} on '):
    run_lock.take(bucket.folder)


def test_a_lock_that_could_not_be_removed_is_taken_again(bucket, caplog):
  lock = run_lock.take(bucket.folder)
  with pytest.raises(InputError, match=f'{os.getpid()} on '):
    run_lock.take(bucket.folder)
  bucket.fault = lambda method, path: 403
  lock.release()
  bucket.fault = lambda method, path: None
  assert 'cannot be removed' in caplog.text
  run_lock.take(bucket.folder).release()
  assert not bucket.folder.exists()
