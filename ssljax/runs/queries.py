"""Label queries of a run: the limits they have, and what answers them."""

import pathlib
from typing import Any

import numpy as np

from ssljax import files
from ssljax.active import oracle
from ssljax.config import Config
from ssljax.core import UNLABELLED
from ssljax.errors import require
from ssljax.training import active_loop

# Acquisition functions that do not need a network with dropout.
WITHOUT_DROPOUT = ('least_confidence', 'margin', 'k_centre', 'random')


def answerable(run) -> np.ndarray:
  """Return `[N]` bool: training rows for which the oracle has an answer."""
  truth = run.dataset.train.labels
  by_people = run.config.active.oracle == 'people'
  return (truth != UNLABELLED) | by_people


def most(config: Config, split) -> int:
  """Return the number of labels that may be queried under a split."""
  return most_of(config, int((split.labels == UNLABELLED).sum()))


def most_of(config: Config, unknown: int) -> int:
  """Return the number of labels that may be queried of unlabelled images."""
  if config.active.acquire == 'none':
    return 0
  return min(config.active.budget or unknown, unknown)


def refuse(run, dropout: float) -> None:
  """Raise `InputError` for queries that a run cannot make.

  Args:
    run: a `build.Run`.
    dropout: dropout rate of its network, 0 if it has none.
  """
  active = run.config.active
  if active.acquire == 'none':
    return
  require(
    dropout > 0 or active.acquire in WITHOUT_DROPOUT,
    f'`acquire`={active.acquire}: `network`={run.config.network.network} has '
    'no dropout, which this function needs: give `dropout` or another '
    f'network, or `acquire`={", ".join(WITHOUT_DROPOUT[:-1])} or '
    f'{WITHOUT_DROPOUT[-1]}',
  )
  left = [
    int((split.admitted & (split.labels == UNLABELLED) & answerable(run)).sum())
    for split in run.drawn
  ]
  remedy = 'give at most as many' if min(left) else 'give `acquire`=none'
  require(
    active.query_size <= min(left),
    f'`query_size`={active.query_size}: {min(left)} images can be asked about: '
    f'{remedy}',
  )
  if active.oracle == 'people':
    workdir = run.config.run.workdir or ''
    require(
      not files.in_bucket(workdir),
      f'`workdir`={workdir}: `oracle`=people: people open the questions and '
      'write their answers in its files, which a bucket does not have: give a '
      'folder on a disk',
    )
    require(
      len(run.drawn) == 1 and len(run.methods) == 1,
      '`oracle`=people: people answer for one run at a time: give `seeds`=1 '
      'and `baseline=False`',
    )
    oracle.check_classes(run.dataset.classes)


def make(run, program, folder: pathlib.Path | None):
  """Return the active learning of all jobs of a program, or None.

  Args:
    run: a `build.Run`.
    program: a `compiled.Program` of one of its methods.
    folder: of the run; people's questions are in it.
  """
  active = run.config.active
  if active.acquire == 'none':
    return None
  policy = active_loop.Policy(
    active.acquire,
    active.query_every,
    active.query_size,
    active.budget,
    active.query_passes,
  )
  train = run.dataset.train
  answers: Any = oracle.Simulation(train.labels)
  if active.oracle == 'people':
    assert folder is not None  # `execute.train` refuses it
    answers = oracle.Folder(
      folder / 'questions',
      train.read,
      run.dataset.classes,
      run.drawn[0].digest,  # People are asked about one split.
    )
  return active_loop.ActiveLearning(policy, program, answers, answerable(run))
