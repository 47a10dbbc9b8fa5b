"""Spans: the compiled steps between two stops of the training loop."""

from collections.abc import Callable, Sequence
from concurrent import futures
import functools
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from ssljax.core import TrainState
from ssljax.distributed import watchdog
from ssljax.training.compiled import Program
from ssljax.training.rounds import Call
from ssljax.training.watch import Watch


class Ran(NamedTuple):
  """Results of a span. Steps count from the start of the stage."""

  begin: int  # first step
  end: int  # step after the last one; earlier than planned if preempted
  losses: np.ndarray  # [steps, S]
  metrics: dict[str, np.ndarray]  # [S] of the last step, by name
  seconds: float
  compiling: float  # part of `seconds` in first calls, which compile
  waiting: float = 0.0  # part of `seconds` in which devices waited for input


class _Devices:
  """The time since when the devices have nothing to do."""

  def __init__(self):
    self._last = None

  def start(self, output: jax.Array) -> None:
    """Remember the output of the call that was started last."""
    self._last = output

  def idle(self, fetch: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of `fetch`, and how long the devices were idle in it.

    The devices may still be busy with the last call while the host waits.
    """
    began, finished = time.monotonic(), None
    if self._last is not None and not self._last.is_ready():
      finished = _watcher().submit(_finish, self._last)
    result = fetch()
    ended = time.monotonic()
    if finished is None:
      return result, ended - began
    if not finished.done():
      return result, 0.0
    return result, max(0.0, ended - finished.result())


@functools.cache
def _watcher() -> futures.Executor:
  return futures.ThreadPoolExecutor(1)


def _finish(output: jax.Array) -> float:
  """Return the time at which an output is computed; its errors are ignored."""
  try:
    output.block_until_ready()
  except jax.errors.JaxRuntimeError:
    pass  # raised again where the output is read
  return time.monotonic()


def run(
  program: Program,
  step: Callable,
  state: TrainState,
  span: Sequence[Call],
  fetched: Any,
  first: jax.Array,
  preempted: Callable[[], bool],
  watch: Watch | None = None,
  place: tuple[int, int] = (0, 0),
) -> tuple[TrainState, Ran]:
  """Run the steps of a span, or fewer if the run is preempted.

  Args:
    program: the program.
    step: its compiled step of the current stage.
    state: state before the span; its buffers are donated.
    span: calls of the step.
    fetched: iterator of (pixels, rows), one per call.
    first: `[]` int32 on the devices, step over all stages at which the stage
      began.
    preempted: True ends the span after the current call.
    watch: is called around every call of the step.
    place: number of the stage and the step at which it began, for `watch`.
  """
  losses, compiling, waiting = [], 0.0, 0.0
  began, devices, watch = time.monotonic(), _Devices(), watch or Watch()
  with jax.transfer_guard('disallow'):
    for call in span:
      watchdog.reset()
      (pixels, rows), idle = devices.idle(functools.partial(next, fetched))
      waiting += idle
      called = time.monotonic()
      arguments = (pixels, program.fitted), rows, first
      over_all = place[1] + call[0], place[1] + call[1]
      watch.before(place[0], state, over_all, *arguments)
      state, metrics = step(state, *arguments)
      watch.after(state, over_all, metrics)
      devices.start(metrics['loss'])
      losses.append(metrics['loss'])
      if (step, rows.ndim) not in program.called:
        program.called.add((step, rows.ndim))
        jax.block_until_ready(metrics)
        compiling += time.monotonic() - called
      if preempted():
        break
  end = span[len(losses) - 1][1]
  losses, metrics = jax.device_get((losses, metrics))
  by_step = lambda x: np.reshape(x, [-1, program.seeds])
  return state, Ran(
    begin=span[0][0],
    end=end,
    losses=np.concatenate([by_step(x) for x in losses]),
    metrics={name: by_step(value)[-1] for name, value in metrics.items()},
    seconds=time.monotonic() - began,
    compiling=compiling,
    waiting=waiting,
  )
