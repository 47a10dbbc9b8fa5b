"""The flags that ask for labels in the middle of a run, and what they make."""

import pathlib

from absl import flags
import numpy as np

from ssljax.active import acquisition, oracle
from ssljax.core import UNLABELLED
from ssljax.errors import positive, require
from ssljax.training import active_loop

FLAGS = flags.FLAGS
# They say something of a network that is always sure of itself.
WITHOUT_DROPOUT = ('least_confidence', 'margin', 'k_centre', 'random')


def define() -> None:
  """Defines them."""
  flags.disclaim_key_flags()  # They are the calling program's.
  flags.DEFINE_enum(
    'acquire',
    'none',
    ['none', *acquisition.ACQUISITIONS],
    'Which images to ask about, if any, while training.',
  )
  flags.DEFINE_integer('query_every', 10, 'Epochs from question to question.')
  flags.DEFINE_integer('query_size', 10, 'Images of a question.')
  flags.DEFINE_integer(
    'query_passes', 10, 'Passes with dropout over all images before each.'
  )
  flags.DEFINE_integer(
    'budget', None, 'Labels to ask for in all; any if unset.'
  )
  flags.DEFINE_enum(
    'oracle',
    'truth',
    ['truth', 'people'],
    'Who answers: the labels of the data set, or you, in files.',
  )


def check() -> None:
  """Refuses values that no run can have, by name."""
  for name in ('query_every', 'query_size', 'query_passes', 'budget'):
    if FLAGS[name].value is not None:
      positive(**{name: FLAGS[name].value})


def answerable(run) -> np.ndarray:
  """Training rows `[N]` bool that the oracle has an answer for."""
  truth = run.dataset.train.labels
  return (truth != UNLABELLED) | (FLAGS.oracle == 'people')


def most(split) -> int:
  """Labels that may be asked for under a split."""
  return most_of(int((split.labels == UNLABELLED).sum()))


def most_of(unknown: int) -> int:
  """Labels that may be asked for of so many images without one."""
  if FLAGS.acquire == 'none':
    return 0
  return min(FLAGS.budget or unknown, unknown)


def refuse(run, dropout: float) -> None:
  """Refuses questions that a run cannot ask, before it begins.

  Args:
    run: an `assembly.Run`.
    dropout: the rate of its network, 0 if it has none.
  """
  if FLAGS.acquire == 'none':
    return
  require(
    dropout > 0 or FLAGS.acquire in WITHOUT_DROPOUT,
    f'--acquire={FLAGS.acquire}: --network={FLAGS.network} has no dropout to '
    'be unsure with: give --dropout or another network, or '
    f'--acquire={", ".join(WITHOUT_DROPOUT[:-1])} or {WITHOUT_DROPOUT[-1]}',
  )
  left = [
    int((split.admitted & (split.labels == UNLABELLED) & answerable(run)).sum())
    for split in run.drawn
  ]
  require(
    FLAGS.query_size <= min(left),
    f'--query_size={FLAGS.query_size}: {min(left)} images have no label yet: '
    'give at most as many',
  )
  if FLAGS.oracle == 'people':
    require(
      FLAGS.seeds == 1 and len(run.methods) == 1,
      '--oracle=people: one run at a time is asked about: give --seeds=1 and '
      '--nobaseline',
    )


def make(run, made, folder: pathlib.Path):
  """The `active_loop.ActiveLearning` of all jobs of a program, if any.

  Args:
    run: an `assembly.Run` that they are of.
    made: the `Program`.
    folder: of the run.
  """
  if FLAGS.acquire == 'none':
    return None
  policy = active_loop.Policy(
    FLAGS.acquire,
    FLAGS.query_every,
    FLAGS.query_size,
    FLAGS.budget,
    FLAGS.query_passes,
  )
  train = run.dataset.train
  answers = (
    oracle.Folder(
      # People are asked about one split.
      folder / 'questions',
      train.read,
      run.dataset.classes,
      run.drawn[0].digest,
    )
    if FLAGS.oracle == 'people'
    else oracle.Simulation(train.labels)
  )
  return active_loop.ActiveLearning(policy, made, answers, answerable(run))
