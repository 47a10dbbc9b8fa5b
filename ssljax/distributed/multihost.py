"""The processes of a run: one per host, each with devices of its own.

All of them run the same program over the same global arrays. What decides what
comes next is a function of the run alone, or the first process's word; the
first alone writes. With a single process everything here is trivial.
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

# One that has been silent for so long is dead, and the others end.
HEARTBEAT_SECONDS = 30
# What one writes the others see after so long, or never.
SHARED_SECONDS = 20
# One that ends waits so long for the others to end.
SHUTDOWN_SECONDS = 20


def join(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
) -> None:
  """Joins the other processes, before anything touches a device.

  What is None is asked of the surroundings: a TPU pod, Slurm, MPI, Kubernetes.
  JAX itself ends a process that waits for the others for five minutes.

  Args:
    coordinator: HOST:PORT of the first process.
    processes: how many there are.
    process: the number of this one, from 0.

  Raises:
    InputError: the surroundings do not say who they are.
  """
  # Of a CPU; other devices have their own.
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
      f'`multihost`: nothing here says which processes there are ({reason}): '
      'give `coordinator`=HOST:PORT of the first, `processes` and `process`'
    ) from error


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends the process, status 1, with one line if another one is gone."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not are_several() or 'RESOURCE_EXHAUSTED' in str(error):
      raise  # what is wrong is wrong here
    reason = str(error).split('\n')[0]
    print(
      f'process {jax.process_index()} of {jax.process_count()} has lost the '
      f'others ({reason}): the same command on all of them goes on from the '
      'last checkpoint',
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)  # there is nobody left to take leave of


def are_around() -> bool:
  """Whether the surroundings speak of several hosts, as those of a pod do."""
  workers = os.environ.get('TPU_WORKER_HOSTNAMES') or _workers_of_slice()
  return ',' in workers or 'JAX_COORDINATOR_ADDRESS' in os.environ


def _workers_of_slice() -> str:
  """The hosts of a Cloud TPU VM's slice, with commas; '' anywhere else."""
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


def are_several() -> bool:
  """Whether there is any other process."""
  return jax.process_count() > 1


def is_first() -> bool:
  """Whether this one writes and decides."""
  return jax.process_index() == 0


def fetch(tree: Any) -> Any:
  """Arrays as NumPy's, whole on every process, wherever they lie."""
  if not are_several():
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def agreed(value: bool) -> bool:
  """What the first process says."""
  if not are_several():
    return value
  return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def once(f: Callable[[], Any]) -> Any:
  """What `f` returns or raises on the first process, which alone calls it."""
  if not are_several():
    return f()
  share = multihost_utils.broadcast_one_to_all
  said = b''
  if is_first():
    try:
      said = pickle.dumps((f(), None))
    except Exception as error:  # for all of them, this one too
      said = _pickled(error)
  buffer = np.zeros(share(np.array(len(said))), np.uint8)
  buffer[: len(said)] = np.frombuffer(said, np.uint8)
  found, error = pickle.loads(share(buffer).tobytes())
  if error is not None:
    raise error
  return found


def _pickled(error: Exception) -> bytes:
  """An error for the other processes; of what cannot travel, its text."""
  try:
    said = pickle.dumps((None, error))
    pickle.loads(said)
  except Exception:
    return pickle.dumps((None, RuntimeError(repr(error))))
  return said


def refuse_unlike(what: str, value: Any, hint: str) -> None:
  """Refuses a run of which the processes do not have the same thing.

  Args:
    what: it is.
    value: this process's.
    hint: what to do about it.

  Raises:
    InputError: one of them has another one, on all of them.
  """
  require(
    everywhere(once(lambda: value) == value),
    f'`multihost`: {what} is not the same for all processes: {hint}',
  )


def refuse_other_folders(folder: pathlib.Path) -> None:
  """Refuses a folder that is another one on another host; it has to exist.

  Raises:
    InputError: a process does not see what the first one writes.
  """
  if not are_several():
    return
  mark = folder / once(lambda: f'{uuid.uuid4().hex}.partial')
  once(mark.touch)
  for _ in range(SHARED_SECONDS):  # a network's disk may take its time
    seen = everywhere(mark.exists())
    if seen:
      break
    time.sleep(1)
  once(mark.unlink)
  require(
    seen,
    f'`workdir`={folder}: is not one folder for all processes: give a disk '
    'that they share',
  )


def everywhere(value: bool) -> bool:
  """Whether it is so on every process."""
  if not are_several():
    return value
  return bool(np.all(multihost_utils.process_allgather(np.array([value]))))


def meet(where: str) -> None:
  """Waits until all processes are here.

  Args:
    where: the same name on each.
  """
  if are_several():
    multihost_utils.sync_global_devices(where)
