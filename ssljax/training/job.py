"""Data of a training job: what to train, how to run it, and its progress."""

from collections.abc import Callable, Mapping, Sequence
import itertools
import math
from typing import Any, NamedTuple

from ssljax.core import Stage
from ssljax.data.splits import Split
from ssljax.training.active_loop import ActiveLearning
from ssljax.training.compiled import Program
from ssljax.training.watch import Watch

# Parts of the time of a job, beside compiled steps and their compilation.
PARTS = ('input', 'update', 'evaluation', 'checkpoint')


class Options(NamedTuple):
  """Settings of a job that do not change what is learned."""

  evaluate_every: int  # steps
  record_every: int  # steps between lines of metrics
  checkpoint_seconds: float = 60.0  # between two checkpoints
  steps_per_call: int = 1  # steps in one call of the compiled function
  keep_every: int | None = None  # steps between permanent checkpoints
  # True once the run has to save and exit; called on all processes at the same
  # points of the program.
  preempted: Callable[[], bool] = lambda: False
  watch: Watch | None = None  # called around every call of the step
  progress: bool = True  # show a progress bar
  stop_early: bool = False  # leave out stages after a worse one, see `guard`
  following: str = ''  # text about the jobs after this one


class Job(NamedTuple):
  """One method, trained under the splits of one or more seeds."""

  name: str
  program: Program
  splits: Sequence[Split]  # one per seed of the program
  active_learning: ActiveLearning | None = None
  # JSON values by name that decide the result; a resumed job needs the same.
  settings: Mapping[str, Any] = {}


class Progress(NamedTuple):
  """Position and results of a job; saved in every checkpoint beside the state.

  The names of the fields are part of the checkpoint format.
  """

  stage: int = 0  # number of the current stage
  step: int = 0  # over all stages
  # {'step', 'last': [S], ...}, on validation images 'validation_last' etc.;
  # 'pseudo_labels' is a dict of their quality, [S] by name.
  evaluations: tuple = ()
  seconds: float = 0.0  # in compiled steps, summed over interrupted runs
  compiling: float = 0.0  # part of `seconds` in first calls, which compile
  # Seconds by part of `PARTS`. 'input' is a part of `seconds`, too.
  spent: Mapping[str, float] = {}
  metrics_bytes: int = 0  # length of metrics.jsonl
  metrics_digest: str = ''  # SHA-256 of these bytes; '' if not known
  ends: tuple = ()  # last step of each finished stage, over all stages
  round: int = 0  # finished rounds of the stage
  begun: int = 0  # step, over all stages, at which the round began
  asked: tuple = ()  # {'step', 'rows': [S][Q], 'labels': [S][Q]} of the oracle
  # {'stage', 'step', 'images', 'wrong': [S][K] positions of held-out images,
  # 'tables'} at the end of each stage, with `Options.stop_early`.
  held_out: tuple = ()
  # {'stage', 'step', 'delivered', 'delivered_step', 'seeds': [S] dicts} if the
  # job leaves out its other stages, see `guard`.
  stopped: Mapping[str, Any] = {}
  measured: tuple = ()  # steps with metrics, as [first, last, stride]
  warnings: tuple = ()  # a text for each `Readiness` that was not met
  # Losses [steps][S] since the last stop, of a run that was interrupted there.
  pending: tuple = ()
  # `evaluate.tables` of the last evaluation.
  tables: Mapping[str, Any] = {}

  @property
  def stage_start(self) -> int:
    """The step, over all stages, at which the current stage began."""
    return self.ends[self.stage - 1] if self.stage else 0

  @property
  def delivered_step(self) -> int:
    """The step whose state the job delivers."""
    return self.stopped['delivered_step'] if self.stopped else self.step

  def is_over(self, stage: Stage) -> bool:
    """Return True if the current stage, which is given, has ended."""
    if stage.epochs:
      return self.round == stage.epochs
    return self.step - self.stage_start == stage.steps

  def problem(self, stages: Sequence[Stage]) -> str | None:
    """Return why this cannot be the progress of a job, or None.

    Args:
      stages: stages of the method.
    """
    counts = self.stage, self.step, self.round, self.begun, self.metrics_bytes
    if not all(type(n) is int and n >= 0 for n in counts):
      return 'a number of its progress is no count'
    if self.stage >= len(stages):
      return f'there is no stage {self.stage}'
    times = self.seconds, self.compiling, *self.spent.values()
    if not all(type(x) in (int, float) and math.isfinite(x) for x in times):
      return 'its seconds are no numbers'
    ends = [0, *self.ends][: self.stage + 1]
    if len(ends) <= self.stage or sorted(ends) != ends:
      return f'it is in stage {self.stage} before that has begun'
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    for stage, length in zip(stages, lengths, strict=False):
      if not stage.epochs and length != stage.steps:
        return f'stage {stage.name} had {length} steps'
    if not self.stage_start <= self.begun <= self.step:
      return f'step {self.step} lies before its stage or round'
    stage = stages[self.stage]
    is_late = self.step - self.stage_start > stage.steps
    if self.round > stage.epochs if stage.epochs else is_late:
      return f'stage {stage.name} ends before step {self.step}'
    if any(entry['step'] > self.step for entry in self.evaluations):
      return f'it has evaluations after step {self.step}'
    return None

  def in_stage(self, number: int) -> 'Progress':
    """Return the progress at the start of a stage."""
    return self._replace(stage=number, round=0, begun=self.step)

  def after_span(
    self, step: int, seconds: float, compiling: float, waiting: float
  ) -> 'Progress':
    """Return the progress after a span that ended at a step."""
    return self._replace(
      step=step,
      seconds=self.seconds + seconds,
      compiling=self.compiling + compiling,
    ).with_spent('input', waiting)

  def with_spent(self, part: str, seconds: float) -> 'Progress':
    """Return the progress with more seconds of a part of `PARTS`."""
    total = self.spent.get(part, 0.0) + seconds
    return self._replace(spent={**self.spent, part: total})

  def by_part(self) -> dict[str, float]:
    """Return the seconds of all parts: steps, compilation and `PARTS`."""
    spent = {part: self.spent.get(part, 0.0) for part in PARTS}
    steps = self.seconds - self.compiling - spent['input']
    return {'steps': max(0.0, steps), 'compilation': self.compiling} | spent

  def after_round(self) -> 'Progress':
    """Return the progress at the end of a round."""
    return self._replace(round=self.round + 1, begun=self.step)

  def after_stage(self) -> 'Progress':
    """Return the progress at the end of the current stage."""
    return self._replace(ends=(*self.ends[: self.stage], self.step))

  def with_errors(
    self,
    errors: dict[str, dict],
    quality: dict[str, list],
    tables: dict[str, dict],
  ) -> 'Progress':
    """Add an evaluation.

    Args:
      errors: as returned by `Program.evaluate`.
      quality: as returned by `Program.measure_quality`.
      tables: as returned by `evaluate.tables`.
    """
    validation = errors.get('validation', {})
    evaluation = (
      {'step': self.step}
      | errors.get('test', {})
      | {f'validation_{name}': validation[name] for name in validation}
      | ({'pseudo_labels': quality} if quality else {})
    )
    evaluations = (*self.evaluations, evaluation)
    return self._replace(evaluations=evaluations, tables=tables)

  def with_warning(self, text: str) -> 'Progress':
    """Add a warning about a stage that is not ready."""
    return self._replace(warnings=(*self.warnings, text))

  def with_measured(self) -> 'Progress':
    """Add the current step to those that have metrics."""
    if not self.measured:
      return self._replace(measured=((self.step, self.step, 0),))
    *before, (first, last, stride) = self.measured
    if last == self.step:
      return self
    if first == last or last + stride == self.step:
      grown = first, self.step, self.step - last
      return self._replace(measured=(*before, grown))
    alone = self.step, self.step, 0
    return self._replace(measured=(*self.measured, alone))

  def measured_steps(self) -> list[int]:
    """Return the steps that have metrics, in rising order."""
    return [
      step
      for first, last, stride in self.measured
      for step in range(first, last + 1, stride or 1)
    ]

  def with_answer(self, answer: dict) -> 'Progress':
    """Add an answer of the oracle, as returned by `ActiveLearning.query`."""
    return self._replace(asked=(*self.asked, {'step': self.step} | answer))
