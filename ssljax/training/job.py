"""Data of a training job: what to train, how to run it, and its progress."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ssljax.core import Stage
from ssljax.data.splits import Split
from ssljax.training.active_loop import ActiveLearning
from ssljax.training.compiled import Program


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
  progress: bool = True  # show a progress bar


class Job(NamedTuple):
  """One method, trained under the splits of one or more seeds."""

  name: str
  program: Program
  splits: Sequence[Split]  # one per seed of the program
  active_learning: ActiveLearning | None = None


class Progress(NamedTuple):
  """Position and results of a job; saved in every checkpoint beside the state.

  The names of the fields are part of the checkpoint format.
  """

  stage: int = 0  # number of the current stage
  step: int = 0  # over all stages
  # {'step', 'last': [S], ...}, on validation images 'validation_last' etc.
  evaluations: tuple = ()
  seconds: float = 0.0  # in compiled steps, summed over interrupted runs
  compiling: float = 0.0  # part of `seconds` in first calls, which compile
  metrics_bytes: int = 0  # length of metrics.jsonl
  ends: tuple = ()  # last step of each finished stage, over all stages
  round: int = 0  # finished rounds of the stage
  begun: int = 0  # step, over all stages, at which the round began
  asked: tuple = ()  # {'step', 'rows': [S][Q], 'labels': [S][Q]} of the oracle

  @property
  def stage_start(self) -> int:
    """The step, over all stages, at which the current stage began."""
    return self.ends[self.stage - 1] if self.stage else 0

  def is_over(self, stage: Stage) -> bool:
    """Return True if the current stage, which is given, has ended."""
    if stage.epochs:
      return self.round == stage.epochs
    return self.step - self.stage_start == stage.steps

  def in_stage(self, number: int) -> 'Progress':
    """Return the progress at the start of a stage."""
    return self._replace(stage=number, round=0, begun=self.step)

  def after_span(
    self, step: int, seconds: float, compiling: float
  ) -> 'Progress':
    """Return the progress after a span that ended at a step."""
    return self._replace(
      step=step,
      seconds=self.seconds + seconds,
      compiling=self.compiling + compiling,
    )

  def after_round(self) -> 'Progress':
    """Return the progress at the end of a round."""
    return self._replace(round=self.round + 1, begun=self.step)

  def after_stage(self) -> 'Progress':
    """Return the progress at the end of the current stage."""
    return self._replace(ends=(*self.ends[: self.stage], self.step))

  def with_errors(self, errors: dict[str, dict]) -> 'Progress':
    """Add an evaluation, as returned by `Program.evaluate`."""
    validation = errors.get('validation', {})
    evaluation = (
      {'step': self.step}
      | errors.get('test', {})
      | {f'validation_{name}': validation[name] for name in validation}
    )
    return self._replace(evaluations=(*self.evaluations, evaluation))

  def with_answer(self, answer: dict) -> 'Progress':
    """Add an answer of the oracle, as returned by `ActiveLearning.query`."""
    return self._replace(asked=(*self.asked, {'step': self.step} | answer))
