"""A run that is asked to go: it ends its step or its sweep, saves, and goes.

What schedules machines sends SIGTERM some time before it takes one away. The
second signal ends the process at once, as the first would have without this:
a checkpoint is whole or not there.
"""

from collections.abc import Iterator
import contextlib
import signal
import threading

from jax.experimental import multihost_utils

from ssljax.distributed import multihost


class PreemptedError(Exception):
  """A run was asked to go and has saved where it was: one line says so."""


class Notice:
  """Whether this run has been asked to go."""

  def __init__(self):
    """Not yet."""
    self._given, self._looks = False, 0

  def __call__(self) -> bool:
    """Whether it has; every process has to look at the same moments.

    Of several processes one that is asked is enough, and all of them hear of it
    at the same look: the latest that one of them had reached, or the next.
    """
    if multihost.are_several() and not self._given:
      self._looks += 1
      reached = multihost_utils.reached_preemption_sync_point
      if reached(self._looks):
        self._given = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return self._given

  @contextlib.contextmanager
  def awaited(self) -> Iterator['Notice']:
    """Listens to SIGTERM; the second one does what it did before.

    Several processes do so since they joined: JAX listens.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if multihost.are_several() or not in_main:  # Python's rule for signals.
      yield self
      return
    before = signal.getsignal(signal.SIGTERM)

    def note(number, frame):
      del number, frame
      self._given = True
      signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)
    try:
      yield self
    finally:
      signal.signal(signal.SIGTERM, before)
