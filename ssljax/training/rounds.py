"""Rounds: parts of a stage over which the rows of every step are fixed.

A stage of `Stage.epochs` has one round per epoch, because the multiplicity of
the rows may change between epochs. With active learning a round lasts until the
next query. Any other stage is one round.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
import itertools
from typing import Any, NamedTuple

from ssljax.core import Stage, TrainState, no_update
from ssljax.data import sampling
from ssljax.data.splits import Split
from ssljax.distributed import multihost
from ssljax.errors import require
from ssljax.training.job import Job, Options, Progress

Call = tuple[int, int]  # first step of a call, and the step after its last


class Round(NamedTuple):
  """The rest of a round. Steps count from the start of the stage."""

  stage: Stage
  stage_start: int  # step over all stages at which the stage began
  begin: int  # step at which the round began
  end: int  # step at which it ends
  update_every: int  # steps between calls of `epoch_update`
  spans: Sequence[Sequence[Call]]  # calls of the compiled step between stops
  fetched: Iterator[tuple[Any, Any]]  # (pixels, rows) of every call
  rows_of: Callable[[Call], Any]  # rows [S, B] of a call of one step

  def updates_before(self, span: Sequence[Call]) -> bool:
    """Return True if `epoch_update` is due before a span.

    The update at the start of the round is not counted.
    """
    done = span[0][0] - self.begin
    has_update = self.stage.epoch_update is not no_update
    return has_update and done > 0 and done % self.update_every == 0


def acquires(job: Job, progress: Progress) -> bool:
  """Return True if labels are acquired before the next round."""
  active = job.active_learning
  stage = job.program.method.stages[progress.stage]
  if not active or not stage.acquire_labels or not progress.step:
    return False
  return not stage.epochs or progress.round % active.every == 0


def stops(start: int, stop: int, periods: Sequence[int]) -> Iterator[int]:
  """Yield the multiples of each period in (start, stop], and `stop`."""
  while start < stop:
    start = min([(start // p + 1) * p for p in periods] + [stop])
    yield start


def calls(start: int, stop: int, most: int) -> Iterator[Call]:
  """Yield spans of `most` steps, then of one step, that cover start..stop."""
  while start < stop:
    size = most if start + most <= stop else 1
    yield start, start + size
    start += size


def samplers(
  job: Job, state: TrainState, progress: Progress
) -> list[sampling.Sampler]:
  """Return the samplers of the current round, one per seed."""
  number = progress.stage
  stage, splits = job.program.method.stages[number], job.splits
  of_images = lambda table: multihost.fetch(table)[:, : state.images]
  if job.active_learning:
    splits = list(map(Split.grown, splits, of_images(state.labels)))
  multiplicity: Sequence[Any] = [None] * job.program.seeds
  if measure := job.program.multiplicity[number]:
    multiplicity = of_images(measure(state))
  found = [
    sampling.Sampler(
      stage.batch_spec,
      split,
      number,
      start=progress.begun - progress.stage_start,
      epoch=progress.round * _epochs(job, stage),
      multiplicity=of_split,
    )
    for split, of_split in zip(splits, multiplicity, strict=True)
  ]
  require(
    len({sampler.epoch_steps for sampler in found}) == 1,
    '`seeds_at_once`: an epoch has more images under one split than under '
    'another: give `seeds_at_once`=1',
  )
  return found


def _epochs(job: Job, stage: Stage) -> int:
  """Return the epochs of a round, 0 if the stage has one round only."""
  if stage.epochs:
    return 1
  return job.active_learning.every if job.active_learning else 0


def rest_of_round(
  job: Job, options: Options, state: TrainState, progress: Progress
) -> Round:
  """Return what is left of the current round.

  Args:
    job: the job.
    options: periods of the stops.
    state: state at the step of `progress`.
    progress: position of the job.
  """
  stage = job.program.method.stages[progress.stage]
  of_seeds, start = samplers(job, state, progress), progress.stage_start
  epoch_steps = of_seeds[0].epoch_steps
  begin, done = progress.begun - start, progress.step - start
  end = _end(job, stage, begin, epoch_steps)
  update_every = epoch_steps * stage.every or end
  updates = range(begin, end, update_every)
  spans = _spans(stage, options, done, end, updates)
  rows_of = functools.partial(sampling.rows_of_call, of_seeds)
  fetched = job.program.data.train.batches(
    rows_of,
    list(itertools.chain(*spans)),
    functools.partial(sampling.rng_words_of_call, of_seeds),
  )
  return Round(stage, start, begin, end, update_every, spans, fetched, rows_of)


def _end(job: Job, stage: Stage, begin: int, epoch_steps: int) -> int:
  """Return the step of the stage at which a round ends."""
  if stage.epochs:
    return begin + epoch_steps
  if not job.active_learning or not stage.acquire_labels:
    return stage.steps
  return min(stage.steps, begin + epoch_steps * job.active_learning.every)


def _spans(stage, options, done: int, end: int, updates) -> list[list[Call]]:
  """Return the calls of each span between two stops."""
  periods = [options.record_every]
  periods += [] if stage.epochs else [options.evaluate_every]
  periods += [options.keep_every] if options.keep_every else []
  points = {done, *stops(done, end, periods)}
  if stage.epoch_update is not no_update:
    points |= {step for step in updates if step > done}
  return [
    list(calls(start, stop, options.steps_per_call))
    for start, stop in itertools.pairwise(sorted(points))
  ]
