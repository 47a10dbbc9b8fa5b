"""Which runs and steps a figure shows, and how runs are told apart."""

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


def chosen_steps(finished, steps: Sequence[int]) -> list[int]:
  """The given steps, in order; of all that the run has kept if there are none.

  Args:
    finished: the run.
    steps: of those it has kept.
  """
  kept = finished.kept
  strange = [step for step in steps if step not in kept]
  require(
    not strange,
    f'`steps`={",".join(map(str, steps))}: the run has kept '
    f'{", ".join(map(str, kept))}: give some of them',
  )
  found = style.evenly(np.array(kept or [finished.steps]), PANELS)
  return sorted(set(steps)) or found.tolist()


def names_of(runs) -> list[str]:
  """What tells runs apart: the parts in which their folders' paths differ."""
  paths = [run.folder.parts for run in runs]
  names = [path[-1] for path in paths]
  if len(set(names)) == len(names):
    return names
  if len(set(paths)) < len(paths) or len(set(map(len, paths))) > 1:
    return [str(run.folder) for run in runs]
  differ = [len(set(part)) > 1 for part in zip(*paths, strict=True)]
  return ['/'.join(itertools.compress(path, differ)) for path in paths]


def by_settings(folders: Sequence[pathlib.Path]) -> list[list[pathlib.Path]]:
  """Folders of runs, those together that differ in their splits alone."""
  groups = {}
  for folder in folders:
    lines = config.to_flags(run_folder.read_config(folder))
    key = tuple(x for x in lines if not x.startswith(('--seed=', '--seeds=')))
    groups.setdefault(key, []).append(folder)
  return list(groups.values())


def alike(runs: Sequence[Finished]) -> list[list[Finished]]:
  """Runs, those together that differ in their splits alone."""
  by_folder = {run.folder: run for run in runs}
  return [
    [by_folder[f] for f in group] for group in by_settings(list(by_folder))
  ]
