"""`ssljax label` as a process, for tests."""

import contextlib
import re
import signal
import subprocess
import sys

import binary

STARTED = []  # processes that tests have to end, see `started`


@contextlib.contextmanager
def started():
  """A context whose programs end with it, also when a test fails."""
  try:
    yield Program
  finally:
    while STARTED:
      process = STARTED.pop()
      process.kill()
      process.wait()


class Program:
  """The program as a process of its own, once it answers."""

  def __init__(self, *args):
    command = [sys.executable, binary.EXPERIMENTS / 'label.py', *args]
    self._process = subprocess.Popen(
      list(map(str, command)), stdout=subprocess.PIPE, text=True
    )
    STARTED.append(self._process)
    self.pid = self._process.pid
    for line in self._process.stdout:
      found = re.match(r'open (http://127.0.0.1:(\d+)/\S+)', line)
      if found:
        self.address, self.port = found[1], int(found[2])
        return
    raise AssertionError('the program ended')

  def end(self, number=signal.SIGTERM):
    """End it by a signal; its exit status."""
    self._process.send_signal(number)
    self._process.stdout.read()
    self._process.stdout.close()
    return self._process.wait(20)
