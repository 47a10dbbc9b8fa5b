"""The lock on a run's folder: one run at a time writes in it.

The lock is the file `run.lock`, with the host, process and start time of its
holder. Two mechanisms decide whether a lock that is found is in use:

- The holder has a `flock` on the file. The kernel releases it when the process
  ends in any way, so a lock of a dead process on the same host is recognised at
  once, and also on other hosts where the file system forwards it (NFS).
- Some shared file systems (gcsfuse, Lustre without `-o flock`) keep a `flock`
  to one host or refuse it. The holder therefore also updates the time of the
  file every `REFRESH_SECONDS`. A lock of another host is stale when it has not
  been updated for `STALE_SECONDS`. Both times are read from the same file
  system, so the clocks of the hosts do not matter.

A library such as `filelock` has only one of the two and does not name the
holder.
"""

import datetime
import errno
import json
import logging
import os
import pathlib
import socket
import threading
import time
from typing import Any
import uuid

from ssljax import files
from ssljax.errors import InputError, require

try:
  import fcntl
except ImportError:  # not on Windows
  fcntl = None  # type: ignore[assignment]  # a missing module

NAME = 'run.lock'
REFRESH_SECONDS = 15.0
STALE_SECONDS = 120.0
_SETTLE_SECONDS = 1.0  # between two hosts that find the same stale lock
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_LOG = logging.getLogger(__name__)


def host() -> str:
  """Return a name of this host that changes when it restarts."""
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text()[:8]
    space = os.readlink('/proc/self/ns/pid')  # of the container
  except OSError:
    boot = space = ''
  return f'{socket.gethostname()} {boot} {space}'.strip()


def described(token: str) -> str:
  """Return the content of a lock of this process."""
  now = datetime.datetime.now().astimezone()
  holder = {'pid': os.getpid(), 'host': host()}
  holder['started'] = now.isoformat(timespec='seconds')
  return json.dumps(holder | {'token': token})


def parsed(text: bytes) -> dict[str, Any]:
  """Return what a lock says of its holder; {} if it is damaged."""
  try:
    held = json.loads(text)
  except ValueError:
    return {}
  return held if isinstance(held, dict) else {}


def refusal(folder, held: dict[str, Any] | None) -> InputError:
  """Return the error of a folder whose lock another process holds."""
  held = held or {}
  where = str(held.get('host', '')).split(' ')[0] or 'an unknown host'
  return InputError(
    f'`workdir`={folder}: another process, {held.get("pid", "unknown")} on '
    f'{where}, is running in it since {held.get("started", "a moment")}: wait '
    'until it ends, or give another folder (the lock of a host that failed is '
    f'free after {STALE_SECONDS:.0f} s)'
  )


def loss(folder) -> str:
  """Return the message of a run that has lost its lock."""
  return (
    f'`workdir`={folder}: the lock {NAME} was removed or taken by another '
    'process: run the same command again'
  )


def take(folder):
  """Return the lock on a folder, of this disk or in a bucket.

  Raises:
    InputError: another process holds it.
  """
  if files.in_bucket(folder):
    from ssljax.runs import bucket_lock

    return bucket_lock.BucketLock(folder)
  return RunLock(folder)


class RunLock:
  """The lock on the folder of a run, held by the main process."""

  def __init__(self, folder: pathlib.Path):
    """Take the lock; the folder must exist.

    Raises:
      InputError: another process holds it.
    """
    self.folder, self.path = folder, folder / NAME
    self._token, self._lost = uuid.uuid4().hex, False
    self._stop = threading.Event()
    require(
      files.is_regular(self.path) or not files.exists(self.path),
      f'`workdir`={folder}: its {NAME} is no regular file: remove it',
    )
    self._descriptor = self._open()
    try:
      self._take()
    except BaseException:
      os.close(self._descriptor)
      raise
    self._thread = threading.Thread(target=self._refresh, daemon=True)
    self._thread.start()

  def _open(self) -> int:
    """Open the file and lock it for the processes of this host.

    Between the two calls a holder may have removed the file: then again.
    """
    while True:
      descriptor = self._create()
      try:
        self._flock(descriptor)
        if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
          return descriptor
      except FileNotFoundError:
        pass
      except BaseException:
        os.close(descriptor)
        raise
      os.close(descriptor)

  def _create(self) -> int:
    """Open the file; `_created` is True if no other process has made it."""
    self._created = False
    try:
      flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
      descriptor = os.open(self.path, flags, 0o644)
    except FileExistsError:
      return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
    self._created = True
    return descriptor

  def _flock(self, descriptor: int) -> None:
    self._has_flock = fcntl is not None
    if fcntl is None:
      return
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      # The holder may be about to write who it is.
      deadline = time.monotonic() + _SETTLE_SECONDS
      while not (held := self._holder()) and time.monotonic() < deadline:
        time.sleep(0.05)
      raise refusal(self.folder, held) from error
    except OSError as error:
      if error.errno not in _UNSUPPORTED:
        raise
      self._has_flock = False

  def _take(self) -> None:
    held = self._holder()
    if not held and not self._created:
      time.sleep(_SETTLE_SECONDS)  # another host may be about to write
      held = self._holder()
    if held and self._is_in_use(held):
      raise refusal(self.folder, held)
    self._write()
    if self._created:
      return
    if held and held.get('host') == host():
      _LOG.warning(
        '%s is of process %s, which has ended: taken over',
        self.path,
        held.get('pid'),
      )
      return
    # Processes on two hosts may have found the same file.
    time.sleep(_SETTLE_SECONDS)
    now = self._holder() or {}
    if now.get('token') != self._token:
      raise refusal(self.folder, now)

  def _is_in_use(self, held: dict[str, Any]) -> bool:
    if held.get('host') == host():
      return not self._has_flock and is_alive(held.get('pid'))
    return self._age() < STALE_SECONDS

  def _holder(self) -> dict[str, Any] | None:
    """Return what the file says of its holder; {} if it is damaged."""
    try:
      text = self.path.read_bytes()
    except OSError:
      return {}
    return parsed(text) if text else None

  def _age(self) -> float:
    """Return the seconds since the last update, by the file system's clock."""
    probe = self.folder / f'{self._token}.partial'
    probe.touch()
    try:
      return probe.stat().st_mtime - self.path.stat().st_mtime
    finally:
      probe.unlink(missing_ok=True)

  def _write(self) -> None:
    text = described(self._token)
    os.ftruncate(self._descriptor, 0)
    os.pwrite(self._descriptor, text.encode(), 0)
    os.fsync(self._descriptor)

  def _refresh(self) -> None:
    """Update the time of the file until the lock is released."""
    while not self._stop.wait(REFRESH_SECONDS):
      try:
        held = json.loads(self.path.read_text())
        if held['token'] != self._token:
          self._lost = True
          return
        os.utime(self.path)
      except FileNotFoundError:
        self._lost = True
        return
      except (OSError, ValueError, KeyError, TypeError) as error:
        _LOG.warning('%s cannot be updated (%s)', self.path, error)

  def require_held(self) -> None:
    """Raise `InputError` if another host has taken the lock.

    It may do so if this process was suspended for `STALE_SECONDS`.
    """
    require(not self._lost, loss(self.folder))

  def release(self) -> None:
    """Remove the lock, unless another process has taken it."""
    self._stop.set()
    self._thread.join()
    held = self._holder() or {}
    if held.get('token') == self._token:
      self.path.unlink(missing_ok=True)
    os.close(self._descriptor)


def is_alive(pid: Any) -> bool:
  """Return True if a process of this host is running."""
  try:
    os.kill(int(pid), 0)
  except ProcessLookupError:
    return False
  except (PermissionError, OverflowError, TypeError, ValueError):
    pass
  return True
