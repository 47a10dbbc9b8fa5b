"""The lock on a run's folder in a bucket: one run at a time writes in it.

The lock is the object `run.lock`. It is created, refreshed and removed under a
precondition on its generation, which the bucket checks, so that of two
processes that want it one gets it. Its holder writes it again every
`REFRESH_SECONDS`.

A lock of another host is stale when it has not been written for
`STALE_SECONDS`, by the clock of the bucket; one of a process of this host, when
that process has ended.
"""

import logging
import os
import threading
import time
from typing import Any
import uuid

from ssljax.errors import require
from ssljax.runs import run_lock

_LOG = logging.getLogger(__name__)


_held: set[str] = set()  # tokens of the locks of this process


class BucketLock:
  """The lock on the folder of a run in a bucket, held by the main process."""

  def __init__(self, folder):
    """Take the lock.

    Args:
      folder: a `buckets.BucketPath`.

    Raises:
      InputError: another process holds it.
    """
    self.folder, self.path = folder, folder / run_lock.NAME
    self._token, self._lost = uuid.uuid4().hex, False
    self._generation = self._take()
    _held.add(self._token)
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._refresh, daemon=True)
    self._thread.start()

  def _take(self) -> int:
    """Write the lock, and return its generation."""
    found, held = self.path.read_with_generation(), None
    if found:
      held = run_lock.parsed(found[0])
      if self._is_in_use(held, found[2]):
        raise run_lock.refusal(self.folder, held)
      _LOG.warning(
        '%s is of process %s, which has ended: taken over',
        *(self.path, held.get('pid')),
      )
    try:
      return self._write(found[1] if found else 0)
    except FileExistsError as error:  # another process was faster
      now = self.path.read_with_generation()
      held = run_lock.parsed(now[0]) if now else held
      raise run_lock.refusal(self.folder, held) from error

  def _is_in_use(self, held: dict[str, Any], written: float) -> bool:
    if held.get('host') == run_lock.host():
      if held.get('pid') == os.getpid():  # it could not be removed
        return held.get('token') in _held
      return run_lock.is_alive(held.get('pid'))
    return self._now() - written < run_lock.STALE_SECONDS

  def _now(self) -> float:
    """Return the time by the clock of the bucket."""
    probe = self.folder / f'{self._token}.partial'
    probe.touch()
    try:
      found = probe.read_with_generation()
    finally:
      probe.unlink(missing_ok=True)
    return found[2] if found else time.time()

  def _write(self, generation: int) -> int:
    self._text = run_lock.described(self._token).encode()
    return self.path.write_if(self._text, generation)

  def _refresh(self) -> None:
    """Write the lock again and again until it is released."""
    while not self._stop.wait(run_lock.REFRESH_SECONDS):
      try:
        self._generation = self.path.write_if(self._text, self._generation)
      except FileExistsError:
        self._lost = True
        return
      except OSError as error:
        _LOG.warning('%s cannot be updated (%s)', self.path, error.strerror)

  def require_held(self) -> None:
    """Raise `InputError` if another process has taken or removed the lock."""
    require(not self._lost, run_lock.loss(self.folder))

  def release(self) -> None:
    """Remove the lock, unless another process has taken it."""
    self._stop.set()
    self._thread.join()
    _held.discard(self._token)
    if self._lost:
      return
    try:
      self.path.unlink(missing_ok=True, generation=self._generation)
    except OSError as error:
      _LOG.warning('%s cannot be removed (%s)', self.path, error.strerror)
