"""`fit`: the only training loop.

A job trains one method under the splits of one or more seeds. The loop runs
from stop to stop: between two stops only compiled steps run; at a stop the
metrics come to the host, and what is due is done in this order: record,
evaluate, checkpoint. What a stage redoes from time to time, it does before the
steps that follow. So a checkpoint is of a finished stop, and what comes after
it does not depend on whether the process is the same one. A run that is asked
to go saves after the step it is in, and goes on from there to the same stop; in
the middle of a sweep that redoes something it leaves that for when it goes on.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
import itertools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssljax.core import UNLABELLED, Method, Stage, TrainState, no_update
from ssljax.data import sampling
from ssljax.data.splits import Split
from ssljax.distributed import multihost, watchdog
from ssljax.distributed.preemption import PreemptedError
from ssljax.errors import InputError, require
from ssljax.training import checkpoint, metrics_writer
from ssljax.training.active_loop import Asking
from ssljax.training.compiled import Program


class Options(NamedTuple):
  """How a job is run; nothing here changes what is learned."""

  evaluate_every: int  # steps
  record_every: int  # steps
  checkpoint_seconds: float = 60.0
  steps_per_call: int = 1
  keep_every: int | None = None  # steps between checkpoints that stay, if any
  preempted: Callable = lambda: False  # whether the run is to save and go
  progress: bool = True  # show a progress bar


class Job(NamedTuple):
  """A compiled method, and the splits of the seeds it trains under."""

  name: str
  program: Program
  splits: Sequence[Split]  # as many as the program has seeds
  asking: Asking | None = None  # for more labels, if any are asked for


class DivergedError(InputError):
  """A loss that is not finite."""


class Progress(NamedTuple):
  """Where a job is, beside its state; goes into every checkpoint."""

  stage: int = 0
  step: int = 0  # over all stages
  evaluations: tuple = ()  # {'step', 'last': [S], ...} of the test images
  seconds: float = 0.0  # in compiled steps, interrupted runs together
  compiling: float = 0.0  # of these in first calls, which compile
  metrics_bytes: int = 0  # length of metrics.jsonl
  ends: tuple = ()  # the step after which each finished stage ended
  round: int = 0  # of its stage: epochs over which no label comes
  begun: int = 0  # the step, over all stages, after which the round began
  asked: tuple = ()  # {'step', 'rows': [S][Q], 'labels': [S][Q]} of the oracle


def stage_ends(method: Method) -> dict[str, int]:
  """Each stage's name, and the step over all stages at which it ends.

  Of a last one that lasts rounds, the step at which it begins.
  """
  names = [stage.name for stage in method.stages]
  lengths = [stage.steps for stage in method.stages]
  return dict(zip(names, itertools.accumulate(lengths), strict=True))


def permanent_every(stage: Stage, every: int | None) -> Sequence[int]:
  """Every so many steps of a stage, if any."""
  return range(every, stage.steps + 1, every) if every else ()


def permanent(method: Method, ends: bool, every: int | None) -> list[int]:
  """The steps, over all stages, whose checkpoints stay.

  Args:
    method: that is trained.
    ends: whether those at the end of each stage do.
    every: so many steps within a stage, if any.
  """
  steps = list(stage_ends(method).values()) if ends else []
  first = 0
  for stage in method.stages:
    steps += [first + step for step in permanent_every(stage, every)]
    first += stage.steps
  return steps


def total_steps(method: Method) -> int | None:
  """Steps of all stages, if they are known."""
  if any(stage.epochs for stage in method.stages):
    return None
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
  recorder: metrics_writer.Recorder,
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
    PreemptedError: it was asked to go; where it was is kept.
  """
  loop = _Loop(job, options, recorder, checkpoints)
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
  """The state of a job after a step, to be looked at, if it was kept."""
  loop = _Loop(job, None, None, checkpoints)
  return loop.state if loop.restore(put_aside=False, step=step) else None


class _Loop:
  """The state of a job, and what is done to it."""

  state: TrainState
  progress: Progress

  def __init__(self, job, options, recorder, checkpoints):
    self.job, self.program, self.options = job, job.program, options
    self.recorder, self.checkpoints = recorder, checkpoints
    self.stages = job.program.method.stages
    self.asking = job.asking
    self.saved = None  # step of the newest checkpoint
    self.digests = [split.digest for split in job.splits]

  def begin(self, metrics_start: int):
    """Takes up the newest checkpoint, or a fresh state."""
    if not self.restore():
      self.recorder.rewind(metrics_start)
      self.progress = Progress(metrics_bytes=metrics_start)
      self.state = self.initial()
    elif not self.is_complete():
      self.recorder.rewind(self.progress.metrics_bytes)

  def restore(self, put_aside: bool = True, step: int | None = None) -> bool:
    """Takes up the newest checkpoint, or that of a step, if there is one."""
    abstract = functools.cache(self.abstract)
    restored = self.checkpoints.restore(
      lambda saved: abstract(saved['stage']), put_aside, step
    )
    if restored is None:
      return False
    state, saved = restored
    require(
      saved.pop('splits') == self.digests,
      f'`workdir`: the checkpoint in {self.checkpoints.folder} is of another '
      'label split: give another `workdir`, or `overwrite=True`',
    )
    saved.pop('shapes', None)  # of an older version
    self.progress = Progress(**saved)
    self.saved = self.progress.step
    self.state = self.repad(state, abstract(self.progress.stage))
    return True

  def repad(self, state: TrainState, like: TrainState) -> TrainState:
    """A state whose tables have the lengths of these devices, as `like`'s."""

    def put(saved, fresh):  # what fills up is no one's, and as it was at first
      count = tuple(map(min, zip(saved.shape, fresh.shape, strict=True)))
      some = tuple(map(slice, count))
      return fresh.at[some].set(saved[some])

    def fitted(saved, fresh, where):
      put_all = lambda saved, fresh: jax.tree.map(put, saved, fresh)
      return jax.jit(put_all, out_shardings=where)(saved, fresh)

    sharding, labels = self.program.sharding, like.labels
    if state.labels.shape != labels.shape:
      fresh = np.full(labels.shape, UNLABELLED, labels.dtype)
      labels = fitted(state.labels, fresh, sharding.labels)
      state = state.replace(labels=labels)
    shapes = functools.partial(jax.tree.map, jnp.shape)
    if shapes(state.memory) != shapes(like.memory):
      fresh = self.initial().memory
      memory = fitted(state.memory, fresh, sharding.memory)
      state = state.replace(memory=memory)
    return state

  def initial(self) -> TrainState:
    """The state before the first step of the first stage."""
    batch_spec = self.stages[0].batch_spec
    samplers = [
      sampling.Sampler(batch_spec, split) for split in self.job.splits
    ]
    rows = sampling.rows_of_call(samplers, (0, 1))
    return self.program.initial(self.job.splits, rows)

  def abstract(self, stage: int) -> TrainState:
    """Shapes and shardings of a state in a stage: each has its optimiser."""
    shapes = jax.eval_shape(
      lambda: self.program.init_stage[stage](self.initial())
    )
    return checkpoint.abstract(shapes, self.program.sharding)

  def is_over(self, stage: Stage) -> bool:
    """Whether the stage that the progress is in has ended."""
    if stage.epochs:
      return self.progress.round == stage.epochs
    return self.progress.step - self.first == stage.steps

  def is_complete(self) -> bool:
    """Whether the last stage has ended."""
    last = len(self.stages) - 1
    return self.progress.stage == last and self.is_over(self.stages[last])

  @property
  def first(self) -> int:
    """The step after which the stage began."""
    number = self.progress.stage
    return self.progress.ends[number - 1] if number else 0

  def run_stage(self, number: int, bar):
    """Runs what is left of a stage."""
    stage, step = self.stages[number], self.progress.step
    if self.progress.stage < number:
      self.state = self.program.init_stage[number](self.state)
      self.progress = self.progress._replace(stage=number, round=0, begun=step)
    while not self.is_over(stage):
      if step == self.progress.begun:
        self.open_round(number)
      self.run_round(number, bar)
      step = self.progress.step
    self.progress = self.progress._replace(
      ends=(*self.progress.ends[:number], step)
    )

  def open_round(self, number: int):
    """What comes before the first step of a round."""
    stage, begins = self.stages[number], self.progress.round == 0
    if stage.epoch_update is not no_update and (stage.every or begins):
      self.epoch_update(number)
    if self.is_asking(number):
      self.ask(number)

  def epoch_update(self, number: int):
    """What a stage redoes; the state is the one before it, or that after."""
    redo = self.program.epoch_update[number]
    self.state = redo(self.state, before=self.exit_if_preempted)

  def is_asking(self, number: int) -> bool:
    """Whether the oracle is asked as the round begins."""
    stage, asking, step = self.stages[number], self.asking, self.progress.step
    if not asking or not stage.asks or not step:
      return False
    return not stage.epochs or self.progress.round % asking.every == 0

  def ask(self, number: int):
    """Asks the oracle, and gives the method what it says."""
    past = self.progress.asked
    self.state, answer = self.asking.ask(
      self.state, self.job.splits, past, before=self.exit_if_preempted
    )
    if answer:
      step = {'step': self.progress.step}
      self.progress = self.progress._replace(asked=(*past, step | answer))
      for i, split in enumerate(self.job.splits):
        count = sum(len(asked['rows'][i]) for asked in self.progress.asked)
        self.write(self.stages[number], split, {'asked': count})

  def samplers(self, number: int) -> list[sampling.Sampler]:
    """The order of the round, one per seed."""
    stage, splits = self.stages[number], self.job.splits
    of_images = lambda table: multihost.fetch(table)[:, : self.state.images]
    if self.asking:
      splits = map(Split.grown, splits, of_images(self.state.labels))
    multiplicity = [None] * self.program.seeds
    if stage.multiplicity:
      multiplicity = of_images(self.program.multiplicity[number](self.state))
    epochs = 1 if stage.epochs else self.asking.every if self.asking else 0
    samplers = [
      sampling.Sampler(
        stage.batch_spec,
        split,
        number,
        start=self.progress.begun - self.first,
        epoch=self.progress.round * epochs,
        multiplicity=copy,
      )
      for split, copy in zip(splits, multiplicity, strict=True)
    ]
    require(
      len({sampler.epoch_steps for sampler in samplers}) == 1,
      '`seeds_at_once`: an epoch has more images under one split than under '
      'another: give `seeds_at_once`=1',
    )
    return samplers

  def round_end(self, stage: Stage, epoch_steps: int) -> int:
    """The step of the stage after which the round ends."""
    begin = self.progress.begun - self.first
    if stage.epochs:
      return begin + epoch_steps
    if not self.asking or not stage.asks:
      return stage.steps
    return min(stage.steps, begin + epoch_steps * self.asking.every)

  def run_round(self, number: int, bar):
    """Runs what is left of a round."""
    stage, first = self.stages[number], self.first
    samplers = self.samplers(number)
    begin, done = (
      at - first for at in (self.progress.begun, self.progress.step)
    )
    end = self.round_end(stage, samplers[0].epoch_steps)
    redo = samplers[0].epoch_steps * stage.every or end
    spans, fetched = self.fetch(stage, samplers, done, begin, end, redo)

    stays = permanent_every(stage, self.options.keep_every)
    saved = time.monotonic()
    for span in spans:
      start = span[0][0]
      again = start > begin and (start - begin) % redo == 0
      if stage.epoch_update is not no_update and again:
        self.epoch_update(number)
      metrics, seconds, here = self.advance(number, span, fetched, first)
      self.progress = self.progress._replace(
        step=first + here, seconds=self.progress.seconds + seconds
      )
      if here < span[-1][1]:
        self.leave()
      if here == end:
        self.progress = self.progress._replace(
          round=self.progress.round + 1, begun=first + here
        )
      self.record(
        stage, metrics, (here - start) * stage.batch_spec.size / seconds
      )
      due = not stage.epochs and here % self.options.evaluate_every == 0
      if here == end or due:
        self.evaluate(stage)
      late = time.monotonic() - saved > self.options.checkpoint_seconds
      due = multihost.broadcast_bool(late)
      last = here == end and (self.is_over(stage) or self.is_asking(number))
      if due or here in stays or last:
        self.save()
        saved = time.monotonic()
      bar.update(here - start)
      bar.set_postfix(loss=f'{np.mean(metrics["loss"]):.4f}')
      self.exit_if_preempted()

  def fetch(self, stage, samplers, done: int, begin: int, end: int, redo: int):
    """The calls of each span between stops, and the feed of all of them."""
    options = self.options
    periods = [options.record_every]
    periods += [] if stage.epochs else [options.evaluate_every]
    periods += [options.keep_every] if options.keep_every else []
    points = {done, *stops(done, end, periods)}
    if stage.epoch_update is not no_update:
      points |= {p for p in range(begin, end, redo) if p > done}
    spans = [
      list(calls(start, stop, options.steps_per_call))
      for start, stop in itertools.pairwise(sorted(points))
    ]
    fetched = self.program.data.train.batches(
      functools.partial(sampling.rows_of_call, samplers),
      list(itertools.chain(*spans)),
      functools.partial(sampling.rng_words_of_call, samplers),
    )
    return spans, fetched

  def advance(self, number: int, span, fetched, first: int):
    """Steps through a span, or as far as it may.

    Returns:
      Metrics `[S]` of the last step, seconds, and the step of the stage.
    """
    program, losses = self.program, []
    began = time.monotonic()
    step = program.steps[number]
    with jax.transfer_guard('disallow'):
      for _ in span:
        watchdog.reset()
        pixels, rows = next(fetched)
        source = pixels, program.fitted
        self.state, metrics = step(self.state, source, rows)
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
    self.refuse_infinite(
      np.concatenate([by_step(x) for x in losses]), first + span[0][0]
    )
    last = {name: by_step(value)[-1] for name, value in metrics.items()}
    return last, time.monotonic() - began, span[done - 1][1]

  def exit_if_preempted(self):
    """Saves and goes, if that is asked for, with a state between two steps."""
    if self.options.preempted():
      self.leave()

  def leave(self):
    """Saves, unless that is done, and goes."""
    if self.saved != self.progress.step:
      self.save()
    self.checkpoints.wait()
    raise PreemptedError(
      f'{self.job.name} was asked to go and has saved step '
      f'{self.progress.step}: the same command goes on from there'
    )

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
      f'`learning_rate`: {what}: stopped without saving it, the last '
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
    held_out = errors.get('validation', {})
    evaluation = (
      {'step': self.progress.step}
      | errors.get('test', {})
      | {f'validation_{weights}': held_out[weights] for weights in held_out}
    )
    self.progress = self.progress._replace(
      evaluations=(*self.progress.evaluations, evaluation)
    )

  def save(self):
    """Writes a checkpoint of everything up to here, in the background."""
    good, checksum = checkpoint.examine(self.state)
    if not good:
      self.diverged(
        f'weights or memory of {self.job.name} are not finite after step '
        f'{self.progress.step}'
      )
    self.progress = self.progress._replace(metrics_bytes=self.recorder.flush())
    saved = self.progress._asdict() | {'splits': self.digests}
    saved |= {'checksum': checksum}
    self.checkpoints.save(self.progress.step, self.state, saved)
    self.saved = self.progress.step
