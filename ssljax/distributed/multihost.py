"""Coordination of the processes of a run: one per host, each with own devices.

All processes run the same program on the same global arrays. Their control flow
must be identical: every decision is either a function of the configuration and
the step, or made by the main process (number 0) and broadcast. Only the main
process writes files, apart from checkpoints. With a single process all
functions of this module are trivial.
"""

from collections.abc import Callable, Iterator
import contextlib
import importlib.util
import os
import pathlib
import pickle
import sys
import time
from typing import Any
import urllib.request
import uuid

import jax
from jax.experimental import multihost_utils
import numpy as np

from ssljax.errors import InputError, require

# A process without a heartbeat for this long counts as dead; the others exit.
HEARTBEAT_SECONDS = 30
# A new file has to be visible to all processes within this time.
SHARED_SECONDS = 20
# At exit, a process waits this long for the others to exit too.
SHUTDOWN_SECONDS = 20


def join(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
) -> None:
  """Connect to the other processes. Call before anything uses a device.

  Arguments that are None are taken from the environment: a TPU pod, Slurm, MPI
  or Kubernetes. JAX aborts a process that has waited five minutes for the
  others.

  Args:
    coordinator: HOST:PORT of process 0.
    processes: number of processes.
    process: number of this process, from 0.

  Raises:
    InputError: the environment does not describe the processes.
  """
  # For CPUs only; other devices have their own collectives.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(
      coordinator,
      processes,
      process,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
  except (ValueError, RuntimeError, OSError) as error:
    reason = str(error).split('\n')[0]
    raise InputError(
      f'`multihost`: the environment does not describe the processes '
      f'({reason}): give `coordinator`=HOST:PORT of process 0, `processes` and '
      '`process`'
    ) from error


@contextlib.contextmanager
def exit_if_peer_fails() -> Iterator[None]:
  """Exit with status 1 and one line if another process has failed."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not is_multiprocess() or 'RESOURCE_EXHAUSTED' in str(error):
      raise  # the error is this process's own
    reason = str(error).split('\n')[0]
    print(
      f'process {jax.process_index()} of {jax.process_count()} lost contact '
      f'with the others ({reason}): run the same command on all hosts to '
      'resume from the last checkpoint',
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)  # a normal exit would wait for the other processes


def in_cluster() -> bool:
  """Return whether the environment, such as a TPU pod, has several hosts."""
  workers = os.environ.get('TPU_WORKER_HOSTNAMES') or _slice_workers()
  return ',' in workers or 'JAX_COORDINATOR_ADDRESS' in os.environ


def _slice_workers() -> str:
  """Return the hosts of a Cloud TPU slice, comma-separated; '' elsewhere."""
  if importlib.util.find_spec('libtpu') is None:
    return ''
  server = os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')
  request = urllib.request.Request(
    f'http://{server}/computeMetadata/v1/instance/attributes/'
    'worker-network-endpoints',
    headers={'Metadata-Flavor': 'Google'},
  )
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except OSError:
    return ''


def is_multiprocess() -> bool:
  """Return whether the run has more than one process."""
  return jax.process_count() > 1


def is_main_process() -> bool:
  """Return whether this is process 0, which writes files and decides."""
  return jax.process_index() == 0


def fetch(tree: Any) -> Any:
  """Return the full arrays of a tree as NumPy arrays, on every process."""
  if not is_multiprocess():
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def broadcast_bool(value: bool) -> bool:
  """Return the value of the main process."""
  if not is_multiprocess():
    return value
  return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def on_main_process(f: Callable[[], Any]) -> Any:
  """Call `f` on the main process; return or raise its result on all."""
  if not is_multiprocess():
    return f()
  broadcast = multihost_utils.broadcast_one_to_all
  message = b''
  if is_main_process():
    try:
      message = pickle.dumps((f(), None))
    except Exception as error:  # any error of `f` is raised on all processes
      message = _pickle_error(error)
  buffer = np.zeros(broadcast(np.array(len(message))), np.uint8)
  buffer[: len(message)] = np.frombuffer(message, np.uint8)
  result, raised = pickle.loads(broadcast(buffer).tobytes())
  if raised is not None:
    raise raised
  return result


def _pickle_error(error: Exception) -> bytes:
  """Pickle an error, or a RuntimeError with its text if that is impossible."""
  try:
    message = pickle.dumps((None, error))
    pickle.loads(message)
  except Exception:  # pickling calls methods of foreign classes
    return pickle.dumps((None, RuntimeError(repr(error))))
  return message


def require_same(what: str, value: Any, hint: str) -> None:
  """Raise InputError on all processes unless they have the same value.

  Args:
    what: description of the value.
    value: the value of this process.
    hint: the remedy.
  """
  require(
    all_true(on_main_process(lambda: value) == value),
    f'`multihost`: the processes differ in {what}: {hint}',
  )


def require_shared_folder(folder: pathlib.Path) -> None:
  """Raise InputError unless all processes see the same existing folder."""
  if not is_multiprocess():
    return
  marker = folder / on_main_process(lambda: f'{uuid.uuid4().hex}.partial')
  on_main_process(marker.touch)
  for _ in range(SHARED_SECONDS):  # network disks have a delay
    seen = all_true(marker.exists())
    if seen:
      break
    time.sleep(1)
  on_main_process(marker.unlink)
  require(
    seen,
    f'`workdir`={folder}: is not the same folder on all hosts: give a folder '
    'on a shared disk',
  )


def all_true(value: bool) -> bool:
  """Return whether the value is true on every process."""
  if not is_multiprocess():
    return value
  return bool(np.all(multihost_utils.process_allgather(np.array([value]))))


def share(count: int, process: int | None = None) -> range:
  """Return the rows of 0, 1, ..., count - 1 that are a process's own.

  Args:
    count: number of all rows.
    process: its number; this process if None.
  """
  number = jax.process_index() if process is None else process
  processes = jax.process_count()
  return range(number * count // processes, (number + 1) * count // processes)


def gather_shares(part: np.ndarray, count: int) -> np.ndarray:
  """Return the rows of all processes, in order.

  Args:
    part: `[n]` of the rows of `share(count)`, of 8 bytes each.
    count: number of all rows.
  """
  if not is_multiprocess():
    return part
  longest = -(-count // jax.process_count())
  words = np.zeros((longest, 2), np.uint32)  # JAX may have no 64 bits
  words[: len(part)] = part.view(np.uint32).reshape(-1, 2)
  of_all = multihost_utils.process_allgather(words)
  rows = [own[: len(share(count, p))] for p, own in enumerate(of_all)]
  return np.ascontiguousarray(np.concatenate(rows)).view(part.dtype)[:, 0]


@contextlib.contextmanager
def failing_together(what: str) -> Iterator[None]:
  """Raise `InputError` on all processes if a block raises it on one.

  Args:
    what: the block makes.
  """
  failed = None
  try:
    yield
  except InputError as error:
    failed = error
  if all_true(failed is None):
    return
  raise failed or InputError(
    f'`multihost`: another process cannot read its share of {what}: see what '
    'it prints'
  )


def barrier(name: str) -> None:
  """Wait until all processes have called this with the same name."""
  if is_multiprocess():
    multihost_utils.sync_global_devices(name)
