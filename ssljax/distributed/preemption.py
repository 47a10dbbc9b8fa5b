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
  """A run was interrupted by a signal. The message says what it has saved.

  Attributes:
    signal: name of the signal.
  """

  def __init__(self, message: str, signal: str = 'SIGTERM'):
    super().__init__(message)
    self.signal = signal


class Notice:
  """A function that returns whether SIGTERM or SIGINT has arrived.

  Attributes:
    signal: name of the signal that has arrived.
  """

  signal = 'SIGTERM'

  def __init__(self):
    """Start without a signal; see `listen`."""
    self._given, self._calls = False, 0

  def __call__(self) -> bool:
    """Return True once a signal has arrived. All processes call it each step.

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
    """Handle the first SIGTERM or SIGINT; the second has its previous effect.

    With several processes JAX listens to SIGTERM from `multihost.join` on.
    Outside the main thread Python cannot handle signals; there they keep their
    effect.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if multihost.is_multiprocess() or not in_main_thread:
      yield self
      return
    previous = {signal.SIGTERM: signal.getsignal(signal.SIGTERM)}
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is not signal.SIG_IGN:  # as in a shell's background
      previous[signal.SIGINT] = interrupt

    def restore():
      for number, handler in previous.items():
        signal.signal(number, handler)

    def handle(number, frame):
      del frame
      self._given, self.signal = True, signal.Signals(number).name
      restore()

    for number in previous:
      signal.signal(number, handle)
    try:
      yield self
    finally:
      restore()
