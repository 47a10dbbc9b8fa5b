"""A watchdog that exits a hanging process, with the stack of every thread.

Otherwise a device, a disk or another process that never answers would block all
hosts of a run. After the exit, a supervisor can start the run again; it resumes
from its checkpoint.
"""

from collections.abc import Iterator
import contextlib
import faulthandler
import sys

_limit = None  # seconds while the watchdog is active, else None


def reset() -> None:
  """Restart the countdown, because the program has made progress."""
  if _limit is not None:
    errors = sys.__stderr__ or sys.stderr
    faulthandler.dump_traceback_later(_limit, exit=True, file=errors)


@contextlib.contextmanager
def exit_if_idle(seconds: float) -> Iterator[None]:
  """Exit with status 1 if `reset` is not called for this many seconds."""
  global _limit
  _limit = seconds
  reset()
  try:
    yield
  finally:
    _limit = None
    faulthandler.cancel_dump_traceback_later()
