"""Measure how long the parts of a job take, without keeping what it trains.

The stages are trained for a few steps twice with one `compiled.Program`: the
first time compiles, the second time gives the seconds of a step, of an epoch
update and of an evaluation.
"""

from collections.abc import Sequence
import contextlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from ssljax.core import Method, Stage
from ssljax.data import sampling
from ssljax.data.splits import Split
from ssljax.training import checkpoint, loop, metrics_writer
from ssljax.training.compiled import Program
from ssljax.training.job import Job, Options, Progress
from ssljax.training.snapshots import Snapshots


class StageCost(NamedTuple):
  """Seconds that the parts of a stage take."""

  compiling: float  # of first calls, once
  step: float
  update: float  # of an epoch update, 0 without one
  evaluation: float
  stop: float  # of writing metrics and all else between two spans
  epoch_steps: int


class JobCost(NamedTuple):
  """Seconds that the parts of a job take."""

  compiling: float  # of the initial state, once
  start: float  # of the initial state
  stages: tuple[StageCost, ...]  # one for each stage of the method


def kinds(method: Method) -> list[int]:
  """Return for each stage the first one that takes the same time per step."""
  first: dict[Any, int] = {}
  found: list[int] = []
  for number, stage in enumerate(method.stages):
    key = (
      *(stage.loss, stage.batch_spec, stage.views, stage.after_update),
      *(stage.epoch_update, stage.per_example, stage.every),
      bool(stage.epochs),
    )
    found.append(first.setdefault(key, number))
  return found


class _Timed(loop._Loop):
  """A loop that says nothing and counts the seconds of its parts."""

  def __init__(self, *args):
    super().__init__(*args)
    self.spent = {}

  @contextlib.contextmanager
  def _timing(self, part: str):
    began = time.monotonic()
    yield
    jax.block_until_ready(self.state)
    passed = time.monotonic() - began
    times, total = self.spent.get(part, (0, 0.0))
    self.spent[part] = times + 1, total + passed

  def epoch_update(self):
    """Update, and count the seconds."""
    with self._timing('update'):
      return super().epoch_update()

  def evaluate(self, stage: Stage):
    """Evaluate, and count the seconds."""
    with self._timing('evaluation'):
      super().evaluate(stage)

  def run_span(self, *args):
    """Run a span, and count the stops."""
    with self._timing('span'):
      return super().run_span(*args)

  def say(self, text: str):
    """Say nothing."""

  def require_ready(self, *args):
    """Measure nothing: the stages are too short to be ready."""

  def warn_of_collapse(self, *args):
    """Say nothing: after a few steps a network has no opinion."""

  def save(self):
    """Save nothing, but examine the state as a saved one."""
    checkpoint.examine(self.state)


class _Nothing:
  """Checkpoints and metrics that are not kept."""

  folder = None
  save = wait = write = lambda self, *args: None
  flush = lambda self: 0
  digest = lambda self: ''


class _Ran(NamedTuple):
  """Measurements of a stage that was trained for a few steps."""

  seconds: float
  stepping: float  # in compiled steps
  compiling: float  # part of it in first calls
  steps: int
  spent: dict[str, tuple[int, float]]  # times and seconds of the parts

  def mean(self, part: str) -> float:
    """Return the mean seconds of a part; 0 if it did not happen."""
    times, seconds = self.spent.get(part, (0, 0.0))
    return seconds / max(1, times)


def measure(
  program: Program,
  splits: Sequence[Split],
  options: Options,
  seconds: float = 1.0,
) -> JobCost:
  """Measure the parts of a job of a program.

  Args:
    program: its stages of equal cost are measured once, see `kinds`. It is
      changed: train with another one.
    splits: of the job.
    options: of the job.
    seconds: to train each stage for, about.
  """
  method, groups = program.method, kinds(program.method)
  chosen = sorted(set(groups))
  stages = [method.stages[number] for number in chosen]
  program.method = method._replace(stages=tuple(stages))
  _ = program.steps  # compiled functions do not depend on the lengths below
  call = options.steps_per_call
  few = [2 * call + 1 if call > 1 else 3] * len(stages)
  job = Job(method.name, program, splits)
  compiling, first = _run(job, options, few)
  more = [
    int(np.clip(seconds * (ran.steps - 1) / max(1e-9, _warm(ran)), 8, 2000))
    for ran in first
  ]
  start, second = _run(job, options, [call * -(-n // call) for n in more])
  epochs = [
    _epoch_steps(program, number, splits) for number in range(len(stages))
  ]
  costs = {
    number: _cost(short, long, epoch)
    for number, short, long, epoch in zip(
      chosen, first, second, epochs, strict=True
    )
  }
  steps_alone = {n: ran.compiling for n, ran in zip(chosen, first, strict=True)}
  return JobCost(
    max(0.0, compiling - start),
    start,
    tuple(
      costs[kind]
      if kind == number
      else costs[kind]._replace(compiling=steps_alone[kind])
      for number, kind in enumerate(groups)
    ),
  )


def _warm(ran: _Ran) -> float:
  """Return the seconds of the steps that did not compile."""
  return ran.stepping - ran.compiling


def _epoch_steps(program: Program, number: int, splits) -> int:
  """Return the steps of an epoch of a stage."""
  spec = program.method.stages[number].batch_spec
  return sampling.Sampler(spec, splits[0], number).epoch_steps


def _cost(first: _Ran, second: _Ran, epoch_steps: int) -> StageCost:
  """Return the cost of a stage from its first and its second run."""
  step = second.stepping / second.steps
  update, evaluation = second.mean('update'), second.mean('evaluation')
  spans = second.spent['span'][0]
  parts = sum(seconds for _, seconds in second.spent.values())
  stop = max(0.0, second.seconds - parts) / spans
  warm = first.steps * step + first.spent['span'][0] * stop
  warm += update * first.spent.get('update', (0,))[0]
  warm += evaluation * first.spent.get('evaluation', (0,))[0]
  return StageCost(
    max(first.compiling, first.seconds - warm),
    *(step, update, evaluation, stop, epoch_steps),
  )


def _shortened(stage: Stage, steps: int) -> Stage:
  """Return a stage of so many steps, or of one epoch."""
  return (
    stage._replace(epochs=1) if stage.epochs else stage._replace(steps=steps)
  )


def _run(
  job: Job, options: Options, steps: Sequence[int]
) -> tuple[float, list[_Ran]]:
  """Train the stages of a job for so many steps.

  Returns:
    Seconds until the first stage, and a measurement for each stage.
  """
  nothing: Any = _Nothing()
  program, found = job.program, []
  method = program.method
  stages = map(_shortened, method.stages, steps)
  program.method = method._replace(stages=tuple(stages))
  began = time.monotonic()
  snapshots = Snapshots(job, nothing)
  state = snapshots.initial()
  jax.block_until_ready(state)
  start = time.monotonic() - began
  timed = _Timed(job, options, nothing, snapshots, state, Progress())
  with metrics_writer.progress_bar(job.name, 0, None, False) as bar:
    for number, count in enumerate(steps):
      timed.spent, before = {}, timed.progress
      timed.options = options._replace(
        record_every=max(1, count // 4), evaluate_every=2**30, keep_every=None
      )
      began = time.monotonic()
      timed.run_stage(number, bar)
      jax.block_until_ready(timed.state)
      passed, now = time.monotonic() - began, timed.progress
      found.append(
        _Ran(
          passed,
          now.seconds - before.seconds,
          now.compiling - before.compiling,
          now.step - before.step,
          timed.spent,
        )
      )
  return start, found
