"""The processes of a run: one per host, each with devices of its own.

All of them run the same program over the same global arrays. What decides what
comes next is a function of the run alone, or the first process's word; the
first alone writes. With a single process everything here is trivial.
"""

from collections.abc import Iterator
import contextlib
import os
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from ssljax.core import InputError

# One that has been silent for so long is dead, and the others end.
HEARTBEAT_SECONDS = 30
# One that ends waits so long for the others to end.
SHUTDOWN_SECONDS = 20


def join(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
) -> None:
  """Joins the other processes, before anything touches a device.

  What is None is asked of the surroundings: a TPU pod, Slurm, MPI, Kubernetes.

  Args:
    coordinator: HOST:PORT of the first process.
    processes: how many there are.
    process: the number of this one, from 0.

  Raises:
    InputError: the others are not found.
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
  except (ValueError, RuntimeError) as error:
    reason = str(error).split('\n')[0]
    raise InputError(
      f'--multihost: the other processes are not found ({reason}): give '
      '--coordinator=HOST:PORT of the first, --processes and --process, and '
      'start all of them'
    ) from error


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends the process, status 1, with one line if another one is gone."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not are_several():
      raise
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
  workers = os.environ.get('TPU_WORKER_HOSTNAMES', '')
  return ',' in workers or 'JAX_COORDINATOR_ADDRESS' in os.environ


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
