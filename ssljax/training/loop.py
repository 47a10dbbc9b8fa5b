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

from collections.abc import Iterator, Sequence
import contextlib
import itertools
import logging
import sys
import time
from typing import Any, NoReturn

import jax
import numpy as np
import tqdm

from ssljax.core import Method, Readiness, Stage, TrainState, no_update
from ssljax.distributed import multihost, placement
from ssljax.distributed.preemption import PreemptedError
from ssljax.errors import InputError
from ssljax.training import (
  checkpoint,
  evaluate,
  guard,
  metrics_writer,
  rounds,
  spans,
)
from ssljax.training.job import Job, Options, Progress
from ssljax.training.rounds import Call, Round
from ssljax.training.snapshots import Snapshots
from ssljax.training.watch import Watch

_LOG = logging.getLogger(__name__)
_SHORT = 30.0  # seconds; a shorter job needs no estimate
_WINDOW = 10.0  # seconds of steps over which the input wait is looked at
STARVED = 0.2  # share of input wait above which the run warns


class DivergedError(InputError):
  """The loss, the parameters or the memory are not finite.

  Attributes:
    record: what identifies the step, see `_Loop.failure`.
  """

  def __init__(self, message: str, record: dict[str, Any] | None = None):
    super().__init__(message)
    self.record = record or {}

  def __reduce__(self):
    return type(self), (self.marked, self.record)


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


def remaining_images(method: Method, progress: Progress, images: int) -> float:
  """Return about how many images the rest of a job trains on.

  Args:
    method: the method.
    progress: of the job.
    images: N, which an epoch of a stage of unknown length is taken to have.
  """
  stages = method.stages[progress.stage :]
  done = progress.step - progress.stage_start
  left = -done * stages[0].batch_spec.size
  for stage in stages:
    left += stage.epochs * images + stage.steps * stage.batch_spec.size
  return max(0, left)


def minutes(seconds: float) -> str:
  """Return 'a minute' or '7 minutes'."""
  whole = max(1, round(seconds / 60))
  return 'a minute' if whole == 1 else f'{whole} minutes'


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
    The state to deliver, with a leading axis [S] of seeds, and the progress. It
    is the last one, or that of an earlier stage, see `guard`.

  Raises:
    DivergedError: a loss is not finite; the last checkpoint before it is kept.
    InputError: the checkpoint belongs to another split.
    PreemptedError: the run was interrupted and has saved its state.
  """
  snapshots = Snapshots(job, checkpoints)
  start = _begin(snapshots, writer, metrics_start)
  loop = _Loop(job, options, writer, snapshots, *start)
  total = total_steps(job.program.method)
  with (
    metrics_writer.progress_bar(
      job.name, loop.progress.step, total, options.progress
    ) as bar,
    contextlib.closing(options.watch or Watch()),
  ):
    for number in range(loop.progress.stage, len(loop.stages)):
      if not loop.progress.stopped:
        loop.run_stage(number, bar)
  with loop.spending('checkpoint'):
    checkpoints.wait()
  if loop.progress.stopped:
    step = loop.progress.delivered_step
    delivered = restore(job, checkpoints, step)
    assert delivered is not None  # the guard keeps the checkpoints of stages
    return delivered, loop.progress
  return loop.state, loop.progress


def restore(
  job: Job, checkpoints: checkpoint.Checkpoints, step: int
) -> TrainState | None:
  """Return the state of a job after a step, or None without a checkpoint."""
  restored = Snapshots(job, checkpoints).restore(put_aside=False, step=step)
  return restored and restored[0]


def _begin(
  snapshots: Snapshots,
  writer: metrics_writer.MetricsWriter,
  metrics_start: int,
) -> tuple[TrainState, Progress]:
  """Restore the newest checkpoint, or make an initial state."""
  restored, job = snapshots.restore(), snapshots.job
  seeds = [split.seed for split in job.splits]
  name = job.program.method.name
  if restored is None:
    start = writer.start_job(name, seeds, metrics_start)
    return snapshots.initial(), Progress(metrics_bytes=start)
  state, progress = restored
  stages = snapshots.program.method.stages
  is_last = progress.stage == len(stages) - 1
  is_over = is_last and progress.is_over(stages[-1])
  is_over = is_over or bool(progress.stopped)
  writer.resume_job(name, seeds, progress, is_over)
  return state, progress


def _described(errors: dict[str, dict[str, list[float]]]) -> str:
  """Return 'test error 4.20 % (averaged 4.00 %)' for an evaluation."""
  shown = lambda values: f'{" ".join(f"{value:.2f}" for value in values)} %'
  found = []
  for name, weights in errors.items():
    averaged = weights.get('averaged')
    more = f' (averaged {shown(averaged)})' if averaged else ''
    found.append(f'{name} error {shown(weights["last"])}{more}')
  return ', '.join(found) or 'no images to test on'


class _Loop:
  """Runs the stages of a job, see the states above."""

  def __init__(self, job, options, writer, snapshots, state, progress):
    self.job, self.program, self.options = job, job.program, options
    self.stages = job.program.method.stages
    self.snapshots, self.report = snapshots, _Report(job, writer)
    self.state: TrainState = state
    self.progress: Progress = progress
    self.saved_at = 0.0  # time of the last checkpoint, on the monotonic clock
    self.is_estimated = False  # the time of the job was said
    self.window = (0.0, 0.0)  # seconds of steps, and of input wait in them
    self.has_starved = False
    self.rest: Round | None = None  # the current round

  @property
  def stage(self) -> Stage:
    """The current stage."""
    return self.stages[self.progress.stage]

  @property
  def is_over(self) -> bool:
    """True if the current stage has ended."""
    return self.progress.is_over(self.stage)

  @contextlib.contextmanager
  def spending(self, part: str) -> Iterator[None]:
    """Count the seconds of a part of `job.PARTS`."""
    began = time.monotonic()
    yield
    self.progress = self.progress.with_spent(part, time.monotonic() - began)

  # Stages.

  def run_stage(self, number: int, bar):
    """Run the rest of a stage."""
    if self.progress.stage < number:
      self.state = self.program.init_stage[number](self.state)
      self.progress = self.progress.in_stage(number)
    while not self.is_over:
      if self.progress.step == self.progress.begun:
        self.open_round()
      self.run_round(bar)
    self.progress = self.progress.after_stage()

  # Rounds.

  def open_round(self):
    """Do the work before the first step of a round."""
    is_first, mapped = self.progress.round == 0, None
    has_update = self.stage.epoch_update is not no_update
    if has_update and (self.stage.every or is_first):
      mapped = self.epoch_update()
    if rounds.acquires(self.job, self.progress):
      self.acquire(mapped)

  def epoch_update(self):
    """Call the stage's `epoch_update`, or exit with the state before it.

    Returns:
      The outputs of the stage's `per_example` for all images, or None.
    """
    update = self.program.epoch_update[self.progress.stage]
    with self.spending('update'):
      self.state, mapped = update(self.state, before=self.exit_if_preempted)
    return mapped

  def acquire(self, mapped):
    """Query the oracle, and pass its answers to the method.

    Args:
      mapped: as `epoch_update` returns it.
    """
    past, active = self.progress.asked, self.job.active_learning
    with self.spending('update'):
      self.state, answer = active.query(
        self.state,
        self.job.splits,
        past,
        before=self.exit_if_preempted,
        sampled=mapped if active.can_use(self.stage) else None,
      )
    if answer:
      self.progress = self.progress.with_answer(answer)
      self.report.write_asked(self.stage, self.progress)

  def run_round(self, bar):
    """Run the rest of a round."""
    rest = rounds.rest_of_round(
      self.job, self.options, self.state, self.progress
    )
    self.rest = rest
    # On the devices, because the steps allow no implicit transfer.
    first = self.program.place(np.asarray(rest.stage_start, np.int32), None)
    self.saved_at = time.monotonic()
    for span in rest.spans:
      if rest.updates_before(span):
        self.epoch_update()
      ran = self.run_span(span, rest, first)
      losses = self.losses_since_stop(ran)
      if ran.end < span[-1][1]:
        self.progress = self.progress._replace(pending=losses.tolist())
        self.save_and_exit()
      self.progress = self.progress._replace(pending=())
      self.stop(rest, ran._replace(losses=losses))
      self.say_estimate(ran)
      bar.update(ran.end - ran.begin)
      bar.set_postfix(loss=f'{np.mean(ran.metrics["loss"]):.4f}')
      self.exit_if_preempted()

  def run_span(self, span: Sequence[Call], rest: Round, first) -> spans.Ran:
    """Run the steps of a span, or fewer if the run is preempted."""
    self.state, ran = spans.run(
      self.program,
      self.program.steps[self.progress.stage],
      self.state,
      span,
      rest.fetched,
      first,
      self.options.preempted,
      self.options.watch,
      (self.progress.stage, rest.stage_start),
    )
    self.refuse_infinite(ran, rest)
    self.progress = self.progress.after_span(
      rest.stage_start + ran.end, ran.seconds, ran.compiling, ran.waiting
    )
    self.warn_of_starving(ran)
    return ran

  def say(self, text: str):
    """Print a line about the job, if the run shows its progress."""
    if self.options.progress and multihost.is_main_process():
      tqdm.tqdm.write(f'{self.job.name}: {text}', file=sys.stderr)

  def refuse_infinite(self, ran: spans.Ran, rest: Round):
    """Raise at the first loss of a span that is not finite."""
    bad = np.argwhere(~np.isfinite(ran.losses))
    if not len(bad):
      return
    step, seed = (int(x) for x in bad[0])
    loss, number = ran.losses[step, seed], self.job.splits[seed].seed
    at = ran.begin + step
    _diverged(
      f'the loss of {self.job.name} is {loss} at step '
      f'{rest.stage_start + at + 1} (seed {number})',
      self.failure(rest, at, seed, f'the loss is {loss}'),
    )

  def failure(
    self, rest: Round, step: int, seed: int, problem: str
  ) -> dict[str, Any]:
    """Return what identifies a step that failed, as JSON values.

    Args:
      rest: the current round.
      step: from the start of the stage.
      seed: its position among the seeds of the job; -1 for all.
      problem: what happened.
    """
    rows, over_all = rest.rows_of((step, step + 1)), rest.stage_start + step
    keys = jax.vmap(jax.random.fold_in, (0, None))(self.state.key, over_all)
    some = slice(None) if seed < 0 else slice(seed, seed + 1)
    return {
      'method': self.program.method.name,
      'seeds': [split.seed for split in self.job.splits],
      'stage': rest.stage.name,
      'step': over_all + 1,
      'problem': problem,
      'failed_seeds': [split.seed for split in self.job.splits[some]],
      'rows': np.asarray(rows)[some].tolist(),
      'labelled': rest.stage.batch_spec.labelled,
      'keys': jax.random.key_data(keys)[some].tolist(),
    }

  def warn_of_starving(self, ran: spans.Ran):
    """Warn once if the devices wait for images for a large part of the time."""
    stepping, waiting = self.window
    stepping += ran.seconds - ran.compiling
    self.window = stepping, waiting + ran.waiting
    if stepping < _WINDOW:
      return
    share, self.window = self.window[1] / stepping, (0.0, 0.0)
    if share > STARVED and not self.has_starved:
      self.has_starved = True
      _LOG.warning('%s: %s', self.job.name, starving(share))

  def say_estimate(self, ran: spans.Ran):
    """Say once, after some compiled steps, how long the job will take."""
    trained = (ran.end - ran.begin) * self.stage.batch_spec.size
    seconds = ran.seconds - ran.compiling
    if self.is_estimated or ran.compiling:
      return
    self.is_estimated = True
    images = self.state.images
    left = remaining_images(self.program.method, self.progress, images)
    left *= seconds / trained
    if left > _SHORT:
      self.say(f'about {minutes(left)} to train{self.options.following}')

  def losses_since_stop(self, ran: spans.Ran) -> np.ndarray:
    """Return the losses `[steps, S]` since the last stop."""
    seeds = ran.losses.shape[1]
    before = np.asarray(self.progress.pending, ran.losses.dtype)
    return np.concatenate([before.reshape(-1, seeds), ran.losses])

  # Stops.

  def stop(self, rest: Round, ran: spans.Ran):
    """Write metrics, evaluate and save at the end of a span."""
    stage, is_end = rest.stage, ran.end == rest.end
    if is_end:
      self.progress = self.progress.after_round()
    self.report.write_metrics(stage, self.progress, ran)
    self.progress = self.progress.with_measured()
    if is_end and self.is_over and stage.readiness:
      self.require_ready(stage, ran)
    is_due = not stage.epochs and ran.end % self.options.evaluate_every == 0
    if is_end or is_due:
      with self.spending('evaluation'):
        self.evaluate(stage)
    since = time.monotonic() - self.saved_at
    is_late = multihost.broadcast_bool(since > self.options.checkpoint_seconds)
    is_permanent = ran.end in permanent_every(stage, self.options.keep_every)
    acquires = rounds.acquires(self.job, self.progress)
    if is_late or is_permanent or (is_end and (self.is_over or acquires)):
      with self.spending('checkpoint'):
        self.save()
      self.saved_at = time.monotonic()

  def require_ready(self, stage: Stage, ran: spans.Ran):
    """Measure whether the next stages can rely on this one, or warn."""
    readiness, found = stage.readiness, ran.losses.mean(axis=0)
    assert readiness is not None
    if measure := self.program.readiness[self.progress.stage]:
      found = multihost.fetch(measure(self.state))
    self.report.write_readiness(stage, self.progress, found)
    for split, value in zip(self.job.splits, found, strict=True):
      if not readiness.is_met(value):
        said = _not_ready(stage.name, readiness, float(value))
        text = f'seed {split.seed}: {said}'
        _LOG.warning('%s %s', self.job.program.method.name, text)
        self.progress = self.progress.with_warning(text)

  def evaluate(self, stage: Stage):
    """Measure errors and pseudo-labels, and write, keep and say them."""
    splits = self.job.splits
    found = self.program.predictions(self.state, splits[0])
    errors = evaluate.errors(found)
    quality = self.program.measure_quality(self.state, splits)
    self.report.write_evaluation(stage, self.progress, errors, quality)
    tables = evaluate.tables(found, self.program.data.classes)
    self.progress = self.progress.with_errors(errors, quality, tables)
    total = total_steps(self.program.method)
    of_all = '' if total is None else f' of {total:,}'
    stages = f', {stage.name}' if len(self.stages) > 1 else ''
    self.say(
      f'step {self.progress.step:,}{of_all}{stages}: {_described(errors)}'
    )
    self.warn_of_collapse(stage, found)
    if self.is_over and self.options.stop_early:
      self.compare_stages(stage, found)

  def warn_of_collapse(self, stage: Stage, predicted):
    """Warn once if nearly all predictions are of one class.

    A network has no opinion in the first half of its first stage.
    """
    done = self.progress.step - self.progress.stage_start
    if self.progress.stage == 0 and 2 * done < stage.steps:
      return
    classes = self.program.data.classes
    for text in guard.collapses(predicted, self.job.splits, classes):
      seed, _, said = text.partition(': ')
      begin = f'{seed}: at step '
      if not any(w.startswith(begin) for w in self.progress.warnings):
        text = f'{begin}{self.progress.step} ({stage.name}) {said}'
        _LOG.warning('%s %s', self.job.program.method.name, text)
        self.progress = self.progress.with_warning(text)

  def compare_stages(self, stage: Stage, predicted):
    """Stop the job after this stage if an earlier one was better."""
    found = guard.held_out(predicted, self.job.splits[0])
    if found is None:
      return
    self.progress = guard.at_end(self.progress, stage.name, found)
    if self.progress.stage == len(self.stages) - 1:
      return
    seeds = [split.seed for split in self.job.splits]
    self.progress = self.progress._replace(
      stopped=guard.stopped(self.progress, seeds)
    )
    for seed in seeds if self.progress.stopped else ():
      text = guard.described(self.progress.stopped, seed)
      _LOG.warning('%s %s', self.job.program.method.name, text)
      self.progress = self.progress.with_warning(text)

  def save(self):
    """Write a checkpoint in the background."""
    is_finite, checksum = checkpoint.examine(self.state)
    if not is_finite:
      step = self.progress.step - self.progress.stage_start - 1
      problem = 'weights or memory are not finite'
      _diverged(
        f'weights or memory of {self.job.name} are not finite after step '
        f'{self.progress.step}',
        self.rest and self.failure(self.rest, step, -1, problem),
      )
    writer = self.report.writer
    self.progress = self.progress._replace(
      metrics_bytes=writer.flush(), metrics_digest=writer.digest()
    )
    self.snapshots.save(self.state, self.progress, checksum)

  def exit_if_preempted(self):
    """Save and exit if the run is preempted, between two steps."""
    if self.options.preempted():
      self.save_and_exit()

  def save_and_exit(self):
    """Save, unless this step is saved already, and raise `PreemptedError`."""
    if self.snapshots.saved != self.progress.step:
      with self.spending('checkpoint'):
        self.save()
    self.snapshots.checkpoints.wait()
    name = getattr(self.options.preempted, 'signal', 'SIGTERM')
    raise PreemptedError(
      f'{self.job.name}: interrupted ({name}), saved step '
      f'{self.progress.step}: run the same command to resume',
      name,
    )


def starving(share: float) -> str:
  """Return the text about devices that wait for images.

  Args:
    share: of the time of the steps.
  """
  return (
    f'the devices waited for images for {share:.0%} of the time of the steps '
    f'(more than {STARVED:.0%}): give feed=resident if the images fit on the '
    'devices, a smaller image_size, or more CPU cores for decoding'
  )


def _not_ready(stage: str, check: Readiness, value: float) -> str:
  """Return the text of the warning that a stage is not ready."""
  bound = (
    f'at most {check.most}' if value > check.most else f'at least {check.least}'
  )
  return (
    f'stage {stage} ends with {check.name.replace("_", " ")} '
    f'{value:.3g}, but needs {bound}: {check.advice}'
  ).replace('`', '')


def _diverged(problem: str, record: dict[str, Any] | None) -> NoReturn:
  raise DivergedError(
    f'`learning_rate`: {problem}: stopped without saving it, the last '
    'checkpoint is good; lower the learning rate',
    record,
  )


def _timing(progress: Progress, ran: spans.Ran) -> dict[str, float]:
  """Return the measurements of time and memory at the end of a span."""
  stepping = ran.seconds - ran.compiling - ran.waiting
  found = {'step_time': max(0.0, stepping) / (ran.end - ran.begin)}
  found |= {f'seconds_{k}': v for k, v in progress.by_part().items()}
  memory = placement.memory_in_use()
  return found | ({'device_bytes': float(memory[0])} if memory else {})


class _Report:
  """Writes the measurements of a job, one line per seed."""

  def __init__(self, job: Job, writer: metrics_writer.MetricsWriter):
    self.job, self.writer = job, writer

  def write_metrics(self, stage, progress: Progress, ran: spans.Ran):
    """Write every term of the loss of the last step of a span."""
    images = stage.batch_spec.size * self.job.program.seeds
    speed = {
      'images_per_second': images * (ran.end - ran.begin) / ran.seconds,
      'seconds': progress.seconds,
    } | _timing(progress, ran)
    for i, split in enumerate(self.job.splits):
      terms = {name: float(value[i]) for name, value in ran.metrics.items()}
      self._write(stage, progress, split, terms | speed)

  def write_readiness(self, stage, progress: Progress, values: np.ndarray):
    """Write the measurement `[S]` of a stage's `Readiness`."""
    name = stage.readiness.name
    for split, value in zip(self.job.splits, values, strict=True):
      if np.isfinite(value):
        self._write(stage, progress, split, {name: float(value)})

  def write_evaluation(
    self,
    stage,
    progress: Progress,
    errors: dict[str, Any],
    quality: dict[str, list],
  ):
    """Write an evaluation.

    Args:
      stage: the stage.
      progress: progress of the job.
      errors: errors `[S]` by data set and weights.
      quality: quality of the pseudo-labels, `[S]` by name.
    """
    for i, split in enumerate(self.job.splits):
      by_name = {
        f'{images}_error_{weights}': values[i]
        for images, by_weights in errors.items()
        for weights, values in by_weights.items()
      } | {
        f'pseudo_label_{name}': values[i]
        for name, values in quality.items()
        if values[i] is not None
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
