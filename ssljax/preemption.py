"""A run that is asked to go: it finishes its step, saves, and goes.

What schedules machines sends SIGTERM some time before it takes one away. The
second signal ends the process at once, as the first would have without this:
a checkpoint is whole or not there.
"""

from collections.abc import Iterator
import contextlib
import signal


class PreemptedError(Exception):
  """A run was asked to go and has saved where it was: one line says so."""


class Notice:
  """Whether this process has been asked to go."""

  def __init__(self):
    """Not yet."""
    self.given = False

  def __bool__(self) -> bool:
    """Whether it has."""
    return self.given

  @contextlib.contextmanager
  def awaited(self) -> Iterator['Notice']:
    """Listens to SIGTERM; the second one does what it did before."""
    before = signal.getsignal(signal.SIGTERM)

    def note(number, frame):
      del number, frame
      self.given = True
      signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)
    try:
      yield self
    finally:
      signal.signal(signal.SIGTERM, before)
