"""One process of several: trains tiny jobs with all devices there are.

Started by `hosts_test.py`, as `pod.py FOLDER METHODS PORT PROCESSES PROCESS
[STOP]`: of each method FOLDER/METHOD then has what `fit` leaves, `rows.npz`,
the rows of every step, and `state.npz`, its last weights and memory. With STOP
it is asked to go after so many looks, as many as steps where nothing is swept.
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
from ssljax.training import active_loop, checkpoint, loop, metrics_writer  # noqa: E402

STEPS = 6
OPTIONS = loop.Options(evaluate_every=3, record_every=1)
POLICY = active_loop.Policy('entropy', every=1, size=4, budget=8, passes=2)


def make_job(name: str, devices: int) -> loop.Job:
  """A job over so many devices.

  Args:
    name: of the method; `asking` asks for labels meanwhile, `stream` has each
      process decode its own images, for two seeds at once.
    devices: of all processes.
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
  """Trains a job in a folder of its own, or goes on with it."""
  folder = folder / name
  job, seen = make_job(name, devices), []
  feed = job.program.data.train

  def batches(*args):
    for pixels, rows in feed.batches(*args):
      # Of shapes alone there are no rows, or none that can be fetched.
      with contextlib.suppress(jax.errors.ConcretizationTypeError):
        if not isinstance(rows, jax.core.Tracer):
          seen.append(multihost.fetch(rows).ravel())
      yield pixels, rows

  data = job.program.data._replace(train=feed._replace(batches=batches))
  job.program.data = data
  looks = iter(range(2 * (stop or 10**6)))
  options = OPTIONS._replace(preempted=lambda: next(looks, None) is None)
  writer = (
    metrics_writer.MetricsWriter(folder)
    if multihost.is_first()
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
  kept = multihost.fetch((state.params, state.memory, state.labels))
  if multihost.is_first():
    np.savez(folder / 'rows.npz', *seen)
    np.savez(folder / 'state.npz', *jax.tree.leaves(kept))


if __name__ == '__main__':
  where, names, port, processes, process, *rest = sys.argv[1:]
  if int(processes) > 1:
    multihost.join(f'127.0.0.1:{port}', int(processes), int(process))
  for each in names.split(','):
    run(pathlib.Path(where), each, jax.device_count(), *map(int, rest))
