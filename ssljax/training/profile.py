"""A trace of some steps of a job, for TensorBoard or Perfetto."""

from collections.abc import Callable
import pathlib

import jax

from ssljax.errors import InputError
from ssljax.training.watch import Watch


class Profile(Watch):
  """Writes a trace of the calls that contain some steps."""

  def __init__(
    self,
    folder: pathlib.Path,
    steps: tuple[int, int],
    say: Callable[[str], None],
  ):
    """Prepare; nothing is written before the first of the steps.

    Args:
      folder: of the trace.
      steps: the first one, counted from 1 over all stages, and their number.
      say: gets one line about the trace.
    """
    self.folder, self.say = folder, say
    self.first, self.last = steps[0], sum(steps) - 1
    self.begun: int | None = None  # first step of the trace
    self.traced: tuple[int, int | None] | None = None  # its steps

  def before(self, stage, state, steps, *call) -> None:
    """Begin the trace before the first of the steps."""
    is_due = steps[0] < self.last and steps[1] >= self.first
    if not is_due or self.traced or self.begun is not None:
      return
    jax.block_until_ready(state)
    try:
      jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
    except (OSError, RuntimeError) as error:
      raise InputError(
        f'`profile`: the trace cannot be written to {self.folder} ({error}): '
        'leave it out'
      ) from error
    self.begun = steps[0] + 1

  def after(self, state, steps, metrics) -> None:
    """End the trace after the last of the steps."""
    if self.begun is not None and steps[1] >= self.last:
      jax.block_until_ready((state, metrics))
      self._stop(steps[1])

  def close(self) -> None:
    """End the trace with the job."""
    if self.begun is not None:
      self._stop(None)
    elif not self.traced:
      self.say(
        f'no trace: the steps {self.first} to {self.last} were trained before '
        'this start, or are not part of this job'
      )

  def _stop(self, last: int | None) -> None:
    jax.profiler.stop_trace()
    first = self.begun or self.first
    self.traced, self.begun = (first, last), None
    steps = f'{first} to {last or "the last one"}'
    self.say(
      f'wrote a trace of the steps {steps}. To look at it: pip install '
      f'tensorboard xprof; tensorboard --logdir={self.folder}. Or open '
      f'{self.folder}/plugins/profile/*/perfetto_trace.json.gz on '
      'https://ui.perfetto.dev'
    )
