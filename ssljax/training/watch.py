"""Functions around the calls of the compiled step, to observe a run."""

from typing import Any

from ssljax.core import TrainState

Steps = tuple[int, int]  # first step of a call, and the step after its last


class Watch:
  """Observes every call of the compiled step; this one does nothing."""

  def before(self, stage: int, state: TrainState, steps: Steps, *call) -> None:
    """Observe a call of the step before it is made.

    Args:
      stage: number of the stage.
      state: before the call, which its buffers are donated to.
      steps: of the call, counted over all stages.
      *call: (pixels, fitted), rows, and the first step of the stage, as the
        compiled step takes them.
    """

  def after(self, state: TrainState, steps: Steps, metrics: Any) -> None:
    """Observe a call of the step after it was started.

    Args:
      state: after the call.
      steps: as in `before`.
      metrics: of the call, on the devices.
    """

  def close(self) -> None:
    """Observe the end of the job, also if it was interrupted."""
