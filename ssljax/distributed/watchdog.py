"""Ends a process that stands still, with the stack of every thread.

A device, a disk or another process that never answers would hold a whole pod
for ever: what started it starts it again, and it goes on from its checkpoint.
"""

from collections.abc import Iterator
import contextlib
import faulthandler
import sys

_limit = None  # seconds, while there is any


def alive() -> None:
  """Says that something has happened."""
  if _limit is not None:
    faulthandler.dump_traceback_later(_limit, exit=True, file=sys.__stderr__)


@contextlib.contextmanager
def awake(seconds: float) -> Iterator[None]:
  """Ends the process, status 1, once nothing has happened for so long."""
  global _limit
  _limit = seconds
  alive()
  try:
    yield
  finally:
    _limit = None
    faulthandler.cancel_dump_traceback_later()
