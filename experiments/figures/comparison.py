"""Selection of the runs and steps of a figure, and names of runs."""

from collections.abc import Sequence
import itertools
import pathlib

import numpy as np

from ssljax import config
from ssljax.errors import require
from ssljax.experiments.figures import style
from ssljax.runs import run_folder
from ssljax.runs.load import Finished

PANELS = 5  # steps that a figure shows by default


def choose_steps(
  finished: Finished, steps: Sequence[int], *, initial: bool = False
) -> list[int]:
  """Return the given steps in order, or up to five of the kept steps if empty.

  Args:
    finished: the finished run.
    steps: steps of kept checkpoints, or 0, the initial state.
    initial: choose among step 0 and the kept steps if `steps` is empty.

  Raises:
    InputError: the run kept no checkpoint of a given step.
  """
  kept = finished.kept
  missing = [step for step in steps if step not in (0, *kept)]
  require(
    not missing,
    f'`steps`={",".join(map(str, steps))}: the run kept the checkpoints of '
    f'steps {", ".join(map(str, kept))}: give some of these, or 0 for the '
    'initial state',
  )
  pool = [0] * initial + list(kept or [finished.steps])
  return sorted(set(steps)) or style.evenly(np.array(pool), PANELS).tolist()


def names_of(runs: Sequence[Finished]) -> list[str]:
  """Return names of runs: the parts in which their folders' paths differ."""
  paths = [run.folder.parts for run in runs]
  names = [path[-1] for path in paths]
  if len(set(names)) == len(names):
    return names
  if len(set(paths)) < len(paths) or len(set(map(len, paths))) > 1:
    return [str(run.folder) for run in runs]
  differ = [len(set(part)) > 1 for part in zip(*paths, strict=True)]
  return ['/'.join(itertools.compress(path, differ)) for path in paths]


def group_by_settings(
  folders: Sequence[pathlib.Path],
) -> list[list[pathlib.Path]]:
  """Group the folders of runs that differ in their splits alone."""
  groups = {}
  for folder in folders:
    lines = config.to_flags(run_folder.read_config(folder))
    key = tuple(x for x in lines if not x.startswith(('--seed=', '--seeds=')))
    groups.setdefault(key, []).append(folder)
  return list(groups.values())


def group_runs(runs: Sequence[Finished]) -> list[list[Finished]]:
  """Group the runs that differ in their splits alone."""
  by_folder = {run.folder: run for run in runs}
  return [
    [by_folder[folder] for folder in group]
    for group in group_by_settings(list(by_folder))
  ]
