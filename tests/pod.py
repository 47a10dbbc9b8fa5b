"""One of several processes that train tiny jobs over all their devices.

`multihost_test.py` starts it as `pod.py FOLDER METHODS PORT PROCESSES PROCESS
[STOP]`. For each method, FOLDER/METHOD then has the files of `fit`, `rows.npz`
(the rows of every step) and `state.npz` (the last weights and memory). With
STOP every job is preempted after this many steps, or earlier because of dataset
passes, which check the preemption notice too.
"""

import contextlib
import pathlib
import sys

import jax

sys.path[:0] = [str(pathlib.Path(__file__).parent)]

import numpy as np  # noqa: E402
import optax  # noqa: E402
import tiny  # noqa: E402

from ssljax.active import oracle  # noqa: E402
from ssljax.distributed import multihost  # noqa: E402
from ssljax.distributed.preemption import PreemptedError  # noqa: E402
from ssljax.training import (  # noqa: E402
  active_loop,
  checkpoint,
  loop,
  metrics_writer,
)

STEPS = 6
OPTIONS = loop.Options(evaluate_every=3, record_every=1)
POLICY = active_loop.Policy('entropy', every=1, size=4, budget=8, passes=2)


def make_job(name: str, devices: int) -> loop.Job:
  """Make a job over the given number of devices.

  Args:
    name: a method of `tiny`; `asking` for a job with active learning, `stream`
      for two seeds at once whose images each process decodes itself.
    devices: number of devices of all processes.
  """
  tx = optax.sgd(0.1, 0.9)
  if name == 'stream':
    where = {'devices': devices, 'make_feed': tiny.streamed, 'shared': False}
    return tiny.make_job('madnn', STEPS, (0, 1), tx, **where)
  if name != 'asking':
    return tiny.make_job(name, STEPS, tx=tx, devices=devices, shared=False)
  program = tiny.make_program('llp', STEPS, 1, tx, extra=8, devices=devices)
  among, answers = np.ones(tiny.ROWS, bool), oracle.Simulation(tiny.truth())
  asks = active_loop.ActiveLearning(POLICY, program, answers, among)
  return loop.Job(name, program, tiny.make_splits(), asks)


def run(folder: pathlib.Path, name: str, devices: int, stop: int | None = None):
  """Train a job in its own folder, or resume it."""
  folder = folder / name
  job, seen = make_job(name, devices), []
  feed = job.program.data.train

  def batches(*args):
    for pixels, rows in feed.batches(*args):
      # While shapes are traced there are no concrete rows.
      with contextlib.suppress(jax.errors.ConcretizationTypeError):
        if not isinstance(rows, jax.core.Tracer):
          seen.append(multihost.fetch(rows).ravel())
      yield pixels, rows

  data = job.program.data._replace(train=feed._replace(batches=batches))
  job.program.data = data
  # The loop checks twice per step; the last check of step `stop` returns True.
  checks = iter(range(2 * (stop or 10**6) - 1))
  options = OPTIONS._replace(preempted=lambda: next(checks, None) is None)
  writer = (
    metrics_writer.MetricsWriter(folder)
    if multihost.is_main_process()
    else metrics_writer.NoMetrics()
  )
  checkpoints = checkpoint.Checkpoints(folder / 'checkpoints')
  try:
    state, _ = loop.fit(job, options, writer, checkpoints)
  except PreemptedError:
    return
  finally:
    writer.close()
    checkpoints.close()
  final = multihost.fetch((state.params, state.memory, state.labels))
  if multihost.is_main_process():
    np.savez(folder / 'rows.npz', *seen)
    np.savez(folder / 'state.npz', *jax.tree.leaves(final))


if __name__ == '__main__':
  where, names, port, processes, process, *rest = sys.argv[1:]
  if int(processes) > 1:
    multihost.join(f'127.0.0.1:{port}', int(processes), int(process))
  for each in names.split(','):
    run(pathlib.Path(where), each, jax.device_count(), *map(int, rest))
