"""Spans: the compiled steps between two stops of the training loop."""

from collections.abc import Callable, Sequence
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from ssljax.core import TrainState
from ssljax.distributed import watchdog
from ssljax.training.compiled import Program
from ssljax.training.rounds import Call


class Ran(NamedTuple):
  """Results of a span. Steps count from the start of the stage."""

  begin: int  # first step
  end: int  # step after the last one; earlier than planned if preempted
  losses: np.ndarray  # [steps, S]
  metrics: dict[str, np.ndarray]  # [S] of the last step, by name
  seconds: float
  compiling: float  # part of `seconds` in first calls, which compile


def run(
  program: Program,
  step: Callable,
  state: TrainState,
  span: Sequence[Call],
  fetched: Any,
  first: jax.Array,
  preempted: Callable[[], bool],
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
  """
  losses, compiling, began = [], 0.0, time.monotonic()
  with jax.transfer_guard('disallow'):
    for _ in span:
      watchdog.reset()
      called = time.monotonic()
      pixels, rows = next(fetched)
      state, metrics = step(state, (pixels, program.fitted), rows, first)
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
  )
