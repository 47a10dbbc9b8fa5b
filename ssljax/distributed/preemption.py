"""Preemption: save and exit after SIGTERM.

A scheduler sends SIGTERM some time before it takes a machine away. After the
signal a run finishes its step or aborts its dataset pass, saves a checkpoint
and exits. A second SIGTERM ends the process immediately, as the first would
without this module. Checkpoints are written atomically, so that they stay valid
in either case.
"""

from collections.abc import Iterator
import contextlib
import signal
import threading

from jax.experimental import multihost_utils

from ssljax.distributed import multihost


class PreemptedError(Exception):
  """A run was interrupted by SIGTERM. The message says what it has saved."""


class Notice:
  """A function that returns whether SIGTERM has arrived."""

  def __init__(self):
    """Start without a signal; see `listen`."""
    self._given, self._calls = False, 0

  def __call__(self) -> bool:
    """Return True once SIGTERM has arrived. Call on all processes at each step.

    With several processes, a signal to one of them suffices. All processes get
    True at the same call: the latest call that any of them had reached when
    the signal arrived, or the next.
    """
    if multihost.is_multiprocess() and not self._given:
      self._calls += 1
      reached = multihost_utils.reached_preemption_sync_point
      if reached(self._calls):
        self._given = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return self._given

  @contextlib.contextmanager
  def listen(self) -> Iterator['Notice']:
    """Handle the first SIGTERM; the second has its previous effect.

    With several processes JAX listens from `multihost.join` on. Outside the
    main thread Python cannot handle signals; there SIGTERM keeps its effect.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if multihost.is_multiprocess() or not in_main_thread:
      yield self
      return
    previous = signal.getsignal(signal.SIGTERM)

    def handle(number, frame):
      del number, frame
      self._given = True
      signal.signal(signal.SIGTERM, previous)

    signal.signal(signal.SIGTERM, handle)
    try:
      yield self
    finally:
      signal.signal(signal.SIGTERM, previous)
