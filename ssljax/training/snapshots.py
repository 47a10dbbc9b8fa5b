"""States of a job: initial ones, and those in its checkpoints."""

import functools

import jax
import numpy as np

from ssljax.core import UNLABELLED, TrainState
from ssljax.data import sampling
from ssljax.errors import require
from ssljax.training import checkpoint
from ssljax.training.job import Job, Progress


class Snapshots:
  """Makes the initial state of a job, and saves and restores later ones."""

  def __init__(self, job: Job, checkpoints: checkpoint.Checkpoints | None):
    """Prepare; without checkpoints only initial states can be made."""
    self.job, self.program, self.checkpoints = job, job.program, checkpoints
    self.digests = [split.digest for split in job.splits]
    self.saved = None  # step of the newest checkpoint

  def initial(self) -> TrainState:
    """Return the state before the first step of the first stage."""
    batch_spec = self.program.method.stages[0].batch_spec
    samplers = [
      sampling.Sampler(batch_spec, split) for split in self.job.splits
    ]
    rows = sampling.rows_of_call(samplers, (0, 1))
    return self.program.initial(self.job.splits, rows)

  def abstract(self, stage: int) -> TrainState:
    """Return shapes and shardings of a state in a stage.

    The optimiser of each stage may have a state of another shape.
    """
    shapes = jax.eval_shape(
      lambda: self.program.init_stage[stage](self.initial())
    )
    return checkpoint.abstract(shapes, self.program.sharding)

  def save(self, state: TrainState, progress: Progress, checksum: int):
    """Write a checkpoint in the background.

    Args:
      state: state between two steps.
      progress: position of the job.
      checksum: checksum of the state, by `checkpoint.examine`.
    """
    more = {'splits': self.digests, 'checksum': checksum}
    self.checkpoints.save(progress.step, state, progress._asdict() | more)
    self.saved = progress.step

  def restore(
    self, put_aside: bool = True, step: int | None = None
  ) -> tuple[TrainState, Progress] | None:
    """Return the newest checkpoint, or None if there is none.

    Args:
      put_aside: rename damaged checkpoints.
      step: restore only the checkpoint of this step.

    Raises:
      InputError: the checkpoint belongs to another split.
    """
    abstract = functools.cache(self.abstract)
    restored = self.checkpoints.restore(
      lambda saved: abstract(saved['stage']), put_aside, step
    )
    if restored is None:
      return None
    state, saved = restored
    require(
      saved.pop('splits') == self.digests,
      f'`workdir`: the checkpoint in {self.checkpoints.folder} is of another '
      'label split: give another `workdir`, or `overwrite=True`',
    )
    progress = Progress(**saved)
    self.saved = progress.step
    return self.repad(state, abstract(progress.stage)), progress

  def repad(self, state: TrainState, like: TrainState) -> TrainState:
    """Return a state whose tables have the padded lengths of `like`.

    The number of devices decides the padding, and may have changed. Padding has
    its initial values.
    """

    def put(saved, fresh):
      count = tuple(map(min, zip(saved.shape, fresh.shape, strict=True)))
      used = tuple(map(slice, count))
      return fresh.at[used].set(saved[used])

    def fitted(saved, fresh, sharding):
      put_all = lambda saved, fresh: jax.tree.map(put, saved, fresh)
      return jax.jit(put_all, out_shardings=sharding)(saved, fresh)

    sharding, labels = self.program.sharding, like.labels
    if state.labels.shape != labels.shape:
      fresh = np.full(labels.shape, UNLABELLED, labels.dtype)
      labels = fitted(state.labels, fresh, sharding.labels)
      state = state.replace(labels=labels)
    shapes = functools.partial(jax.tree.map, np.shape)
    if shapes(state.memory) != shapes(like.memory):
      fresh = self.initial().memory
      memory = fitted(state.memory, fresh, sharding.memory)
      state = state.replace(memory=memory)
    return state
