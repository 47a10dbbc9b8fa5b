"""The training loop: `fit` trains a job to its end, from any checkpoint.

A job trains one method under the splits of one or more seeds. Its states:

  stage   A stage starts with a new optimiser, or continues the old one.
  round   A part of a stage over which the rows of every step are fixed, see
          `rounds`. Before its first step the stage's `epoch_update` is called
          and labels are acquired, where they are due.
  span    The steps between two stops. Only compiled steps run. Before a span
          that starts a later epoch, `epoch_update` is called.
  stop    Metrics come to the host. Then, where they are due: write metrics,
          evaluate, save a checkpoint.

A checkpoint is therefore taken at a stop, and what follows it does not depend
on whether the process is the same. A preempted run saves after the step it is
in and exits. When it resumes, it continues to the same next stop. A run that
is preempted during a pass over the data set gives the pass up and repeats it.
"""

from collections.abc import Sequence
import itertools
import time
from typing import Any, NoReturn

import jax
import numpy as np

from ssljax.core import Method, Stage, TrainState, no_update
from ssljax.distributed import multihost, watchdog
from ssljax.distributed.preemption import PreemptedError
from ssljax.errors import InputError
from ssljax.training import checkpoint, metrics_writer, rounds
from ssljax.training.job import Job, Options, Progress
from ssljax.training.rounds import Round
from ssljax.training.snapshots import Snapshots


class DivergedError(InputError):
  """The loss, the parameters or the memory are not finite."""


def stage_ends(method: Method) -> dict[str, int]:
  """Return the step over all stages at which each stage ends, by its name.

  A last stage of unknown length is listed with the step at which it begins.
  """
  names = [stage.name for stage in method.stages]
  lengths = [stage.steps for stage in method.stages]
  return dict(zip(names, itertools.accumulate(lengths), strict=True))


def permanent_every(stage: Stage, every: int | None) -> Sequence[int]:
  """Return the steps of a stage whose checkpoints are permanent."""
  return range(every, stage.steps + 1, every) if every else ()


def permanent(method: Method, ends: bool, every: int | None) -> list[int]:
  """Return the steps over all stages whose checkpoints are permanent.

  Args:
    method: the method.
    ends: keep the checkpoint at the end of each stage.
    every: keep a checkpoint every so many steps of a stage; None for none.
  """
  steps = list(stage_ends(method).values()) if ends else []
  first = 0
  for stage in method.stages:
    steps += [first + step for step in permanent_every(stage, every)]
    first += stage.steps
  return steps


def total_steps(method: Method) -> int | None:
  """Return the steps of all stages; None if a stage's length is not known."""
  if any(stage.epochs for stage in method.stages):
    return None
  return sum(stage.steps for stage in method.stages)


def fit(
  job: Job,
  options: Options,
  writer: metrics_writer.MetricsWriter,
  checkpoints: checkpoint.Checkpoints,
  metrics_start: int = 0,
) -> tuple[TrainState, Progress]:
  """Train a job to its end, from its newest checkpoint if there is one.

  Args:
    job: the job.
    options: how often to measure and to save.
    writer: receives the metrics.
    checkpoints: checkpoints of this job.
    metrics_start: bytes in metrics.jsonl that belong to earlier jobs.

  Returns:
    The last state, with a leading axis [S] of seeds, and the progress.

  Raises:
    DivergedError: a loss is not finite; the last checkpoint before it is kept.
    InputError: the checkpoint belongs to another split.
    PreemptedError: the run was interrupted and has saved its state.
  """
  loop = _Loop(job, options, writer, checkpoints)
  loop.begin(metrics_start)
  total = total_steps(job.program.method)
  with metrics_writer.progress_bar(
    job.name, loop.progress.step, total, options.progress
  ) as bar:
    for number in range(loop.progress.stage, len(loop.stages)):
      loop.run_stage(number, bar)
  checkpoints.wait()
  return loop.state, loop.progress


def restore(
  job: Job, checkpoints: checkpoint.Checkpoints, step: int
) -> TrainState | None:
  """Return the state of a job after a step, or None without a checkpoint."""
  restored = Snapshots(job, checkpoints).restore(put_aside=False, step=step)
  return restored and restored[0]


class _Loop:
  """Runs the stages of a job, see the states above."""

  state: TrainState
  progress: Progress

  def __init__(self, job, options, writer, checkpoints):
    self.job, self.program, self.options = job, job.program, options
    self.stages = job.program.method.stages
    self.checkpoints = checkpoints
    self.snapshots = Snapshots(job, checkpoints)
    self.report = _Report(job, writer)
    self.saved_at = 0.0  # time of the last checkpoint, on the monotonic clock

  def begin(self, metrics_start: int):
    """Restore the newest checkpoint, or make an initial state."""
    restored = self.snapshots.restore()
    if restored is None:
      self.report.writer.rewind(metrics_start)
      self.progress = Progress(metrics_bytes=metrics_start)
      self.state = self.snapshots.initial()
      return
    self.state, self.progress = restored
    last = len(self.stages) - 1
    is_complete = self.progress.stage == last and self.is_over
    if not is_complete:
      self.report.writer.rewind(self.progress.metrics_bytes)

  @property
  def stage(self) -> Stage:
    """The current stage."""
    return self.stages[self.progress.stage]

  @property
  def is_over(self) -> bool:
    """True if the current stage has ended."""
    return self.progress.is_over(self.stage)

  # Stages.

  def run_stage(self, number: int, bar):
    """Run the rest of a stage."""
    if self.progress.stage < number:
      self.state = self.program.init_stage[number](self.state)
      self.progress = self.progress._replace(
        stage=number, round=0, begun=self.progress.step
      )
    while not self.is_over:
      if self.progress.step == self.progress.begun:
        self.open_round()
      self.run_round(bar)
    ends = *self.progress.ends[:number], self.progress.step
    self.progress = self.progress._replace(ends=ends)

  # Rounds.

  def open_round(self):
    """Do the work before the first step of a round."""
    is_first = self.progress.round == 0
    has_update = self.stage.epoch_update is not no_update
    if has_update and (self.stage.every or is_first):
      self.epoch_update()
    if self.acquires():
      self.acquire()

  def epoch_update(self):
    """Call the stage's `epoch_update`, or exit with the state before it."""
    update = self.program.epoch_update[self.progress.stage]
    self.state = update(self.state, before=self.exit_if_preempted)

  def acquires(self) -> bool:
    """Return True if labels are acquired before the next round."""
    active, stage = self.job.active_learning, self.stage
    if not active or not stage.acquire_labels or not self.progress.step:
      return False
    return not stage.epochs or self.progress.round % active.every == 0

  def acquire(self):
    """Query the oracle, and pass its answers to the method."""
    past = self.progress.asked
    self.state, answer = self.job.active_learning.query(
      self.state, self.job.splits, past, before=self.exit_if_preempted
    )
    if answer:
      asked = *past, {'step': self.progress.step} | answer
      self.progress = self.progress._replace(asked=asked)
      self.report.write_asked(self.stage, self.progress)

  def run_round(self, bar):
    """Run the rest of a round."""
    rest = rounds.rest_of_round(
      self.job, self.options, self.state, self.progress
    )
    # On the devices, because the steps allow no implicit transfer.
    first = self.program.place(np.asarray(rest.stage_start, np.int32), None)
    self.saved_at = time.monotonic()
    for span in rest.spans:
      if rest.updates_before(span):
        self.epoch_update()
      metrics, seconds, here = self.run_span(span, rest, first)
      self.progress = self.progress._replace(
        step=rest.stage_start + here, seconds=self.progress.seconds + seconds
      )
      if here < span[-1][1]:
        self.save_and_exit()
      self.stop(rest, metrics, here, (here - span[0][0]) / seconds)
      bar.update(here - span[0][0])
      bar.set_postfix(loss=f'{np.mean(metrics["loss"]):.4f}')
      self.exit_if_preempted()

  # Spans.

  def run_span(self, span, rest: Round, first):
    """Run the steps of a span, or fewer if the run is preempted.

    Returns:
      Metrics `[S]` of the last step, seconds, and the step of the stage.
    """
    program, losses = self.program, []
    began = time.monotonic()
    step = program.steps[self.progress.stage]
    with jax.transfer_guard('disallow'):
      for _ in span:
        watchdog.alive()
        pixels, rows = next(rest.fetched)
        source = pixels, program.fitted
        self.state, metrics = step(self.state, source, rows, first)
        losses.append(metrics['loss'])
        if (step, rows.ndim) not in program.called:
          program.called.add((step, rows.ndim))
          jax.block_until_ready(metrics)
          spent = self.progress.compiling + time.monotonic() - began
          self.progress = self.progress._replace(compiling=spent)
        if self.options.preempted():
          break
    done = len(losses)  # calls
    losses, metrics = jax.device_get((losses, metrics))
    by_step = lambda x: np.reshape(x, [-1, program.seeds])
    losses = np.concatenate([by_step(x) for x in losses])
    self.refuse_infinite(losses, rest.stage_start + span[0][0])
    last = {name: by_step(value)[-1] for name, value in metrics.items()}
    return last, time.monotonic() - began, span[done - 1][1]

  # Stops.

  def stop(self, rest: Round, metrics, here: int, rate: float):
    """Write metrics, evaluate and save at the end of a span.

    Args:
      rest: the round.
      metrics: metrics `[S]` of the last step.
      here: step of the stage.
      rate: steps per second.
    """
    stage, is_end = rest.stage, here == rest.end
    if is_end:
      self.progress = self.progress._replace(
        round=self.progress.round + 1, begun=self.progress.step
      )
    self.report.write_metrics(stage, self.progress, metrics, rate)
    is_due = not stage.epochs and here % self.options.evaluate_every == 0
    if is_end or is_due:
      self.evaluate(stage)
    since = time.monotonic() - self.saved_at
    is_late = multihost.agreed(since > self.options.checkpoint_seconds)
    is_permanent = here in permanent_every(stage, self.options.keep_every)
    if (
      is_late or is_permanent or (is_end and (self.is_over or self.acquires()))
    ):
      self.save()
      self.saved_at = time.monotonic()

  def evaluate(self, stage: Stage):
    """Measure the errors, write them, and add them to the progress."""
    held_out = self.job.splits[0].validation
    errors = self.program.evaluate(self.state, held_out)
    self.report.write_errors(stage, self.progress, errors)
    validation = errors.get('validation', {})
    evaluation = (
      {'step': self.progress.step}
      | errors.get('test', {})
      | {f'validation_{name}': validation[name] for name in validation}
    )
    self.progress = self.progress._replace(
      evaluations=(*self.progress.evaluations, evaluation)
    )

  def save(self):
    """Write a checkpoint in the background."""
    is_finite, checksum = checkpoint.examine(self.state)
    if not is_finite:
      _diverged(
        f'weights or memory of {self.job.name} are not finite after step '
        f'{self.progress.step}'
      )
    metrics_bytes = self.report.writer.flush()
    self.progress = self.progress._replace(metrics_bytes=metrics_bytes)
    self.snapshots.save(self.state, self.progress, checksum)

  def exit_if_preempted(self):
    """Save and exit if the run is preempted, between two steps."""
    if self.options.preempted():
      self.save_and_exit()

  def save_and_exit(self):
    """Save, unless this step is saved already, and raise `PreemptedError`."""
    if self.snapshots.saved != self.progress.step:
      self.save()
    self.checkpoints.wait()
    raise PreemptedError(
      f'{self.job.name}: interrupted (SIGTERM), saved step '
      f'{self.progress.step}: run the same command to resume'
    )

  def refuse_infinite(self, losses: np.ndarray, before: int):
    """Raise at the first loss of `[steps, S]` that is not finite."""
    bad = np.argwhere(~np.isfinite(losses))
    if len(bad):
      step, seed = bad[0]
      _diverged(
        f'the loss of {self.job.name} is {losses[step, seed]} at step '
        f'{before + step + 1} (seed {self.job.splits[seed].seed})'
      )


def _diverged(problem: str) -> NoReturn:
  raise DivergedError(
    f'`learning_rate`: {problem}: stopped without saving it, the last '
    'checkpoint is good; lower the learning rate'
  )


class _Report:
  """Writes the measurements of a job, one line per seed."""

  def __init__(self, job: Job, writer: metrics_writer.MetricsWriter):
    self.job, self.writer = job, writer

  def write_metrics(self, stage, progress: Progress, metrics, rate: float):
    """Write every term of the loss of a step.

    Args:
      stage: the current stage.
      progress: position of the job.
      metrics: `[S]` by name.
      rate: steps per second.
    """
    images = rate * stage.batch_spec.size * self.job.program.seeds
    speed = {'images_per_second': images, 'seconds': progress.seconds}
    for i, split in enumerate(self.job.splits):
      terms = {name: float(value[i]) for name, value in metrics.items()}
      self._write(stage, progress, split, terms | speed)

  def write_errors(self, stage, progress: Progress, errors: dict[str, Any]):
    """Write errors, `[S]` by data set and weights."""
    for i, split in enumerate(self.job.splits):
      by_name = {
        f'{images}_error_{weights}': values[i]
        for images, by_weights in errors.items()
        for weights, values in by_weights.items()
      }
      self._write(stage, progress, split, by_name)

  def write_asked(self, stage, progress: Progress):
    """Write the number of labels that were acquired so far."""
    for i, split in enumerate(self.job.splits):
      count = sum(len(asked['rows'][i]) for asked in progress.asked)
      self._write(stage, progress, split, {'asked': count})

  def _write(self, stage, progress: Progress, split, values: dict):
    where = {'step': progress.step, 'stage': stage.name, 'seed': split.seed}
    self.writer.write(self.job.program.method.name, where | values)
