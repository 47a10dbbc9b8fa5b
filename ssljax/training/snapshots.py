"""States of a job: initial ones, and those in its checkpoints."""

from collections.abc import Mapping
import functools
import json
from typing import Any

import jax
import numpy as np

from ssljax.core import UNLABELLED, TrainState
from ssljax.data import sampling
from ssljax.distributed import placement
from ssljax.errors import require
from ssljax.training import checkpoint, jax_settings
from ssljax.training.job import Job, Progress


class Snapshots:
  """Makes the initial state of a job, and saves and restores later ones."""

  def __init__(self, job: Job, checkpoints: checkpoint.Checkpoints | None):
    """Prepare; without checkpoints only initial states can be made."""
    self.job, self.program, self.checkpoints = job, job.program, checkpoints
    self.digests = [split.digest for split in job.splits]
    self.saved: int | None = None  # step of the newest checkpoint

  def initial(self, is_traced: bool = False) -> TrainState:
    """Return the state before the first step of the first stage.

    Args:
      is_traced: as in `Program.initial`.
    """
    batch_spec = self.program.method.stages[0].batch_spec
    samplers = [
      sampling.Sampler(batch_spec, split) for split in self.job.splits
    ]
    rows = sampling.rows_of_call(samplers, (0, 1))
    return self.program.initial(self.job.splits, rows, is_traced)

  def abstract(self, stage: int) -> TrainState:
    """Return shapes and shardings of a state in a stage.

    The optimiser of each stage may have a state of another shape.
    """
    shapes = jax.eval_shape(
      lambda: self.program.init_stage[stage](self.initial(is_traced=True))
    )
    return checkpoint.abstract(shapes, self.program.sharding)

  def save(self, state: TrainState, progress: Progress, checksum: int):
    """Write a checkpoint in the background.

    Args:
      state: state between two steps.
      progress: position of the job.
      checksum: checksum of the state, by `checkpoint.examine`.
    """
    more = {
      'splits': self.digests,
      'checksum': checksum,
      'jax': jax_settings.current(),
      'settings': dict(self.job.settings),
    }
    assert self.checkpoints is not None
    self.checkpoints.save(progress.step, state, progress._asdict() | more)
    self.saved = progress.step

  def restore(
    self, put_aside: bool = True, step: int | None = None
  ) -> tuple[TrainState, Progress] | None:
    """Return the newest checkpoint, or None if there is none.

    Args:
      put_aside: rename damaged checkpoints. False is for reading a state, which
        needs the settings of its arrays only.
      step: restore only the checkpoint of this step.

    Raises:
      InputError: the checkpoint belongs to another split or other settings.
    """
    abstract = functools.cache(self.abstract)
    names = None if put_aside else jax_settings.OF_ARRAYS

    def like(saved: dict) -> TrainState:
      self._refuse_other(saved, names)
      return abstract(self._progress(saved).stage)

    assert self.checkpoints is not None
    restored = self.checkpoints.restore(like, put_aside, step)
    if restored is None:
      return None
    state, saved = restored
    progress = self._progress(saved)
    self.saved = progress.step
    wanted = abstract(progress.stage)
    return self.repad(self._upgrade(state, wanted), wanted), progress

  def _upgrade(self, state: TrainState, like: TrainState) -> TrainState:
    """Return a state whose memory has the current layout, that of `like`."""
    # The stubs of JAX know no methods of this type.
    there: Any = jax.tree.structure(state.memory)
    here: Any = jax.tree.structure(like.memory)
    if there == here:
      return state
    program, convert = self.program, self.program.method.upgrade_memory
    assert convert is not None  # else memories have one layout
    over_seeds = placement.over_seeds(convert, program.seeds, (0, 0))
    upgrade = jax.jit(over_seeds, out_shardings=program.sharding.memory)
    return state.replace(memory=upgrade(state, self.initial().memory))

  def _refuse_other(self, saved: Mapping[str, Any], names) -> None:
    """Raise `InputError` if the checkpoint is of another split or settings.

    Args:
      saved: JSON values of the checkpoint. Those of version 0.1 have the
        splits alone.
      names: settings of JAX to compare; all if None.
    """
    assert self.checkpoints is not None
    where = f'`workdir`: the checkpoint in {self.checkpoints.folder} '
    begun = jax_settings.difference(saved.get('jax', {}), names)
    require(begun is None, f'{where}was {begun}, or give `overwrite=True`')
    require(
      saved['splits'] == self.digests,
      f'{where}is of another label split: give another `workdir`, or '
      '`overwrite=True`',
    )
    here = json.loads(json.dumps(dict(self.job.settings)))
    there = saved.get('settings', {})
    differ = [
      f'`{name}`={there[name]} there, `{name}`={here[name]} here'
      for name in sorted(there.keys() & here.keys())
      if json.dumps(there[name]) != json.dumps(here[name])  # NaN equals itself
    ]
    require(
      not differ,
      f'{where}is of other settings ({"; ".join(differ)}): give another '
      '`workdir`, or `overwrite=True`',
    )

  def _progress(self, saved: Mapping[str, Any]) -> Progress:
    """Return the progress among the JSON values of a checkpoint.

    Raises:
      DamagedError: these cannot be its values.
    """
    others = {'splits', 'checksum', 'jax', 'settings'}
    values = {k: v for k, v in saved.items() if k not in others}
    unknown = sorted(values.keys() - set(Progress._fields))
    if unknown:
      raise checkpoint.DamagedError(f'its progress has {unknown[0]!r}')
    if not {'stage', 'step'} <= values.keys():
      raise checkpoint.DamagedError('its progress has no stage or step')
    progress = Progress(**values)
    problem = progress.problem(self.program.method.stages)
    if problem:
      raise checkpoint.DamagedError(problem)
    return progress

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
