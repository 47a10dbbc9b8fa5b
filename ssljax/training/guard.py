"""Guards of a run on labelled images that it does not train on.

A later stage of a method learns from what an earlier one predicts, and can be
worse. At the end of each stage the predictions of held-out labelled images are
compared with those after the best earlier stage, image by image.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from ssljax import intervals
from ssljax.core import UNLABELLED
from ssljax.data.splits import Split
from ssljax.training.evaluate import Predicted
from ssljax.training.job import Progress

SIGNIFICANT = 0.05
_NEARLY_ALL = 0.95  # share of predictions in one class
_FAR = 0.3  # a collapsed class exceeds its share of the labels by this


class Comparison(NamedTuple):
  """Errors of two models on the same images."""

  error: float  # percent, of the first
  other: float  # percent, of the second
  low: float  # 95 % interval of error - other, in percent
  high: float
  p: float  # exact two-sided McNemar test


def compare(wrong: np.ndarray, other: np.ndarray) -> Comparison:
  """Compare two models image by image.

  Args:
    wrong: `[M]` bool, images that the first model gets wrong.
    other: `[M]` bool, those of the second.
  """
  worse = int((wrong & ~other).sum())
  better = int((other & ~wrong).sum())
  both = worse + better
  tail = sum(math.comb(both, k) for k in range(max(worse, better), both + 1))
  low, high = intervals.paired(wrong.astype(float) - other)
  return Comparison(
    100 * float(wrong.mean()),
    100 * float(other.mean()),
    100 * low,
    100 * high,
    min(1.0, 2 * tail / 2**both),
  )


def evaluated(found: Predicted) -> np.ndarray:
  """Return the classes `[S, M]` by the weights that the method evaluates."""
  return found.classes.get('averaged', found.classes['last'])


def held_out(
  predicted: Mapping[str, Predicted], split: Split
) -> Predicted | None:
  """Return the predictions of labelled rows that a split holds out.

  Args:
    predicted: of `Program.predictions`.
    split: of any seed of the job.

  Returns:
    None if the split holds none out: a test set of its own chooses nothing.
  """
  if len(split.test):
    return predicted['test']
  return predicted['validation'] if len(split.validation) else None


def at_end(progress: Progress, stage: str, found: Predicted) -> Progress:
  """Return the progress with the predictions at the end of a stage."""
  wrong = evaluated(found) != found.truth
  entry = {
    'stage': stage,
    'step': progress.step,
    'images': wrong.shape[1],
    'wrong': [np.flatnonzero(of_seed).tolist() for of_seed in wrong],
    'tables': progress.tables,
  }
  return progress._replace(held_out=(*progress.held_out, entry))


def stopped(progress: Progress, seeds: Sequence[int]) -> dict[str, Any]:
  """Return why a job stops after the stage that has just ended; {} if not.

  It stops if the error is higher than after the best earlier stage under every
  split of the job, with p < 0.05 in an exact McNemar test.

  Args:
    progress: with an entry of the stage in `held_out`.
    seeds: `[S]` numbers of the splits.
  """
  *earlier, now = progress.held_out
  if not earlier:
    return {}
  count = lambda entry: sum(map(len, entry['wrong']))
  best = min(earlier, key=count)
  compared = [
    compare(*each) for each in zip(_masks(now), _masks(best), strict=True)
  ]
  if not all(c.error > c.other and c.p < SIGNIFICANT for c in compared):
    return {}
  return {
    'stage': now['stage'],
    'step': now['step'],
    'delivered': best['stage'],
    'delivered_step': best['step'],
    'images': now['images'],
    'seeds': [
      {
        'seed': seed,
        'error': round(c.error, 4),
        'delivered_error': round(c.other, 4),
        'difference_interval': [round(c.low, 4), round(c.high, 4)],
        'p': float(f'{c.p:.3g}'),
      }
      for seed, c in zip(seeds, compared, strict=True)
    ],
  }


def _masks(entry: Mapping[str, Any]) -> np.ndarray:
  """Return `[S, M]` bool of an entry of `Progress.held_out`."""
  found = np.zeros((len(entry['wrong']), entry['images']), bool)
  for of_seed, wrong in zip(found, entry['wrong'], strict=True):
    of_seed[wrong] = True
  return found


def described(found: Mapping[str, Any], seed: int) -> str:
  """Return the line about a seed of a job that stops."""
  own = next(each for each in found['seeds'] if each['seed'] == seed)
  low, high = own['difference_interval']
  return (
    f'seed {seed}: stopped after stage {found["stage"]}: its error on '
    f'{found["images"]} held-out labelled images is {own["error"]:.1f} %, '
    f'after stage {found["delivered"]} {own["delivered_error"]:.1f} % '
    f'(difference [{low:+.1f}, {high:+.1f}], p = {own["p"]:.2g}): the model '
    f'of stage {found["delivered"]} is delivered'
  )


def collapses(
  predicted: Mapping[str, Predicted], splits: Sequence[Split], classes: int
) -> list[str]:
  """Return a text for every seed that predicts one class nearly always.

  Args:
    predicted: of `Program.predictions`.
    splits: `[S]`.
    classes: C.
  """
  found = next(iter(predicted.values()), None)
  texts: list[str] = []
  if found is None:
    return texts
  for split, own in zip(splits, evaluated(found), strict=True):
    known = split.labels[split.labels != UNLABELLED]
    given = np.bincount(known, minlength=classes) / max(1, len(known))
    share = np.bincount(own, minlength=classes) / max(1, len(own))
    top = int(np.argmax(share))
    if share[top] >= _NEARLY_ALL and share[top] - np.max(given) >= _FAR:
      texts.append(
        f'seed {split.seed}: {share[top]:.0%} of {len(own)} images are '
        f'predicted as class {top}, which has {given[top]:.0%} of the labels: '
        'train the supervised stage longer, lower the weight of the unlabelled '
        'images, or lower learning_rate'
      )
  return texts
