"""`fit`: the only training loop.

A job trains one method under the splits of one or more seeds. The loop runs
from stop to stop: between two stops only compiled steps run; at a stop the
metrics come to the host, and what is due is done in this order: record,
evaluate, checkpoint. What a stage redoes from time to time, it does before the
steps that follow. So a checkpoint is always of a finished stop, and what comes
after it does not depend on whether the process is the same one.
"""

from collections.abc import Iterator, Sequence
import functools
import itertools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssljax import batches, checkpoint, record
from ssljax.core import InputError, Method, Stage, TrainState, keep, require
from ssljax.program import Program
from ssljax.splits import Split


class Options(NamedTuple):
  """How a job is run; nothing here changes what is learned."""

  evaluate_every: int  # steps
  record_every: int  # steps
  checkpoint_seconds: float = 60.0
  steps_per_call: int = 1
  keep_every: int | None = None  # steps between checkpoints that stay, if any


class Job(NamedTuple):
  """A compiled method, and the splits of the seeds it trains under."""

  name: str
  program: Program
  splits: Sequence[Split]  # as many as the program has seeds


class DivergedError(InputError):
  """A loss that is not finite."""


class Progress(NamedTuple):
  """Where a job is, beside its state; goes into every checkpoint."""

  stage: int = 0
  step: int = 0  # over all stages
  evaluations: tuple = ()  # {'step', 'last': [S], ...} of the test images
  seconds: float = 0.0  # in compiled steps, interrupted runs together
  metrics_bytes: int = 0  # length of metrics.jsonl


def stage_ends(method: Method) -> dict[str, int]:
  """Each stage's name, and the step over all stages at which it ends."""
  names = [stage.name for stage in method.stages]
  lengths = [stage.steps for stage in method.stages]
  return dict(zip(names, itertools.accumulate(lengths), strict=True))


def kept_every(stage: Stage, every: int | None) -> Sequence[int]:
  """Every so many steps of a stage, if any."""
  return range(every, stage.steps + 1, every) if every else ()


def lasting(method: Method, ends: bool, every: int | None) -> list[int]:
  """The steps, over all stages, whose checkpoints stay.

  Args:
    method: that is trained.
    ends: whether those at the end of each stage do.
    every: so many steps within a stage, if any.
  """
  steps = list(stage_ends(method).values()) if ends else []
  first = 0
  for stage in method.stages:
    steps += [first + step for step in kept_every(stage, every)]
    first += stage.steps
  return steps


def total_steps(method: Method) -> int:
  """Steps of all stages."""
  return sum(stage.steps for stage in method.stages)


def stops(start: int, stop: int, periods: Sequence[int]) -> Iterator[int]:
  """The multiples of each period in (start, stop], and `stop`."""
  while start < stop:
    start = min([(start // p + 1) * p for p in periods] + [stop])
    yield start


def calls(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
  """Spans of `most` steps, then of one, that cover start..stop."""
  while start < stop:
    size = most if start + most <= stop else 1
    yield start, start + size
    start += size


def fit(
  job: Job,
  options: Options,
  recorder: record.Recorder,
  checkpoints: checkpoint.Checkpoints,
  metrics_start: int = 0,
) -> tuple[TrainState, Progress]:
  """Trains a job to its end, from its newest checkpoint if there is one.

  Args:
    job: what is trained.
    options: how often to look at it.
    recorder: gets the measurements.
    checkpoints: of this job.
    metrics_start: bytes of metrics.jsonl that are of the jobs before this one.

  Returns:
    The last state, with a leading axis [S] of seeds, and the progress.

  Raises:
    DivergedError: a loss is not finite; the last good checkpoint is kept.
    InputError: the checkpoint is of other splits.
  """
  loop = _Loop(job, options, recorder, checkpoints)
  loop.begin(metrics_start)
  total = total_steps(job.program.method)
  with record.progress_bar(job.name, loop.progress.step, total) as bar:
    for number in range(loop.progress.stage, len(loop.stages)):
      loop.run_stage(number, bar)
  checkpoints.wait()
  return loop.state, loop.progress


def restore(
  job: Job, checkpoints: checkpoint.Checkpoints, step: int
) -> TrainState | None:
  """The state of a job after a step, to be looked at, if it was kept."""
  loop = _Loop(job, None, None, checkpoints)
  return loop.state if loop.take_up(put_aside=False, step=step) else None


@jax.jit
def _all_finite(tree) -> jax.Array:
  """Whether every number `[]` of a tree is finite."""
  leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(leaves))


class _Loop:
  """The state of a job, and what is done to it."""

  state: TrainState
  progress: Progress

  def __init__(self, job, options, recorder, checkpoints):
    self.job, self.program, self.options = job, job.program, options
    self.recorder, self.checkpoints = recorder, checkpoints
    self.stages = job.program.method.stages
    self.orders = [
      [batches.Order(stage.draw, split, i) for split in job.splits]
      for i, stage in enumerate(self.stages)
    ]
    self.digests = [split.digest for split in job.splits]

  def begin(self, metrics_start: int):
    """Takes up the newest checkpoint, or a fresh state."""
    if not self.take_up():
      self.recorder.rewind(metrics_start)
      self.progress = Progress(metrics_bytes=metrics_start)
      self.state = self.initial()
    elif self.progress.step < total_steps(self.program.method):
      self.recorder.rewind(self.progress.metrics_bytes)

  def take_up(self, put_aside: bool = True, step: int | None = None) -> bool:
    """Takes up the newest checkpoint, or that of a step, if there is one."""
    restored = self.checkpoints.restore(
      lambda saved: self.abstract(saved['stage']), put_aside, step
    )
    if restored is None:
      return False
    self.state, saved = restored
    require(
      saved.pop('splits') == self.digests,
      f'--workdir: the checkpoint in {self.checkpoints.folder} is of another '
      'label split: give another --workdir, or --overwrite',
    )
    self.progress = Progress(**saved)
    return True

  def initial(self) -> TrainState:
    """The state before the first step of the first stage."""
    rows = batches.rows_of_call(self.orders[0], (0, 1))
    return self.program.initial(self.job.splits, rows)

  def abstract(self, stage: int) -> TrainState:
    """Shapes and shardings of a state in a stage: each has its optimiser."""
    shapes = jax.eval_shape(lambda: self.program.enter[stage](self.initial()))
    return checkpoint.abstract(shapes, self.program.sharding)

  def run_stage(self, number: int, bar):
    """Runs what is left of a stage."""
    stage = self.stages[number]
    first = sum(s.steps for s in self.stages[:number])
    if self.progress.stage < number:
      self.state = self.program.enter[number](self.state)
      self.progress = self.progress._replace(stage=number)
    redo = self.orders[number][0].epoch_steps * stage.every or stage.steps
    done = self.progress.step - first
    spans, fetched = self.fetch(number, done, redo)

    stays = kept_every(stage, self.options.keep_every)
    saved = time.monotonic()
    for span in spans:
      start, here = span[0][0], span[-1][1]
      if stage.refresh is not keep and start % redo == 0:
        self.state = self.program.refresh[number](self.state)
      metrics, seconds = self.advance(number, span, fetched, first)
      self.progress = self.progress._replace(
        step=first + here, seconds=self.progress.seconds + seconds
      )
      self.record(stage, metrics, (here - start) * stage.draw.size / seconds)
      if here % self.options.evaluate_every == 0 or here == stage.steps:
        self.evaluate(stage)
      due = time.monotonic() - saved > self.options.checkpoint_seconds
      if due or here in stays or here == stage.steps:
        self.save()
        saved = time.monotonic()
      bar.update(here - start)
      bar.set_postfix(loss=f'{np.mean(metrics["loss"]):.4f}')

  def fetch(self, number: int, done: int, redo: int):
    """The calls of each span between stops, and the feed of all of them."""
    stage, options = self.stages[number], self.options
    periods = [options.record_every, options.evaluate_every]
    periods += [options.keep_every] if options.keep_every else []
    if stage.refresh is not keep:
      periods.append(redo)
    points = [done, *stops(done, stage.steps, periods)]
    spans = [
      list(calls(start, stop, options.steps_per_call))
      for start, stop in itertools.pairwise(points)
    ]
    orders = self.orders[number]
    fetched = self.program.data.train.batches(
      functools.partial(batches.rows_of_call, orders),
      list(itertools.chain(*spans)),
      functools.partial(batches.words_of_call, orders),
    )
    return spans, fetched

  def advance(self, number: int, span, fetched, first: int):
    """Steps through a span: metrics `[S]` of its last step, and seconds."""
    program, losses = self.program, []
    began = time.monotonic()
    with jax.transfer_guard('disallow'):
      for _ in span:
        pixels, rows = next(fetched)
        self.state, metrics = program.steps[number](
          self.state, (pixels, program.fitted), rows
        )
        losses.append(metrics['loss'])
    losses, metrics = jax.device_get((losses, metrics))
    by_step = lambda x: np.reshape(x, [-1, program.seeds])
    self.refuse_infinite(
      np.concatenate([by_step(x) for x in losses]), first + span[0][0]
    )
    last = {name: by_step(value)[-1] for name, value in metrics.items()}
    return last, time.monotonic() - began

  def refuse_infinite(self, losses: np.ndarray, before: int):
    """Raises at the first loss of `[steps, S]` that is not finite."""
    bad = np.argwhere(~np.isfinite(losses))
    if len(bad):
      step, seed = bad[0]
      self.diverged(
        f'the loss of {self.job.name} is {losses[step, seed]} at step '
        f'{before + step + 1} (seed {self.job.splits[seed].seed})'
      )

  def diverged(self, what: str):
    """Stops the run; what is on disk is good."""
    raise DivergedError(
      f'--learning_rate: {what}: stopped without saving it, the last '
      'checkpoint is good; lower the learning rate'
    )

  def record(self, stage, metrics, rate: float):
    """One line per seed: every term of the loss at this step."""
    speed = {
      'images_per_second': rate * self.program.seeds,
      'seconds': self.progress.seconds,
    }
    for i, split in enumerate(self.job.splits):
      terms = {name: float(value[i]) for name, value in metrics.items()}
      self.write(stage, split, terms | speed)

  def write(self, stage, split, values: dict):
    """One measurement of one seed."""
    where = {'step': self.progress.step, 'stage': stage.name}
    self.recorder.write(
      self.program.method.name, where | {'seed': split.seed} | values
    )

  def evaluate(self, stage):
    """Measures the errors, writes them, and adds them to the progress."""
    held_out = self.job.splits[0].validation
    errors = self.program.evaluate(self.state, held_out)
    for i, split in enumerate(self.job.splits):
      by_name = {
        f'{images}_error_{weights}': values[i]
        for images, by_weights in errors.items()
        for weights, values in by_weights.items()
      }
      self.write(stage, split, by_name)
    evaluation = {'step': self.progress.step} | errors['test']
    self.progress = self.progress._replace(
      evaluations=(*self.progress.evaluations, evaluation)
    )

  def save(self):
    """Writes a checkpoint of everything up to here, in the background."""
    if not _all_finite((self.state.params, self.state.memory)):
      self.diverged(
        f'weights or memory of {self.job.name} are not finite after step '
        f'{self.progress.step}'
      )
    self.progress = self.progress._replace(metrics_bytes=self.recorder.flush())
    saved = self.progress._asdict() | {'splits': self.digests}
    self.checkpoints.save(self.progress.step, self.state, saved)
