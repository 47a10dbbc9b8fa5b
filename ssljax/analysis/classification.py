"""Accuracy, and precision, recall and F1 of each class, with intervals.

Everything is computed from the counts of one confusion matrix, see
`evaluate.counts_of`. Letter: C classes.
"""

from collections.abc import Sequence
import math
import statistics
from typing import Any

import numpy as np

from ssljax.intervals import Interval, wilson


def report(counts, images: int | None = None) -> dict[str, Any]:
  """Return the quality of predictions, as `result.json` holds it.

  Shares are from 0 to 1 and None where no image defines them. Balanced accuracy
  is the mean recall of the classes that have images, macro F1 the mean F1 of
  those that have images or predictions, as in scikit-learn. Intervals are
  Wilson's, of 95 %.

  Args:
    counts: `[3, C]` of `evaluate.counts_of`, or the sum of several.
    images: number of different images, if each is counted several times, as
      with the same test images under every seed: the intervals are those of so
      many.
  """
  right, support, predicted = np.asarray(counts, np.int64)
  total = int(support.sum())
  images = total if images is None else min(images, total)
  weight = images / total if total else 1.0
  f1 = _shares(2 * right, support + predicted)
  recall = _shares(right, support)
  interval = lambda hits, count: list(wilson(hits * weight, count * weight))
  intervals = lambda of: [
    interval(hits, count) if count else None
    for hits, count in zip(right.tolist(), of.tolist(), strict=True)
  ]
  return {
    'images': images,
    'accuracy': _share(int(right.sum()), total),
    'accuracy_interval': interval(int(right.sum()), total),
    'balanced_accuracy': _mean(recall),
    'macro_f1': _mean(f1),
    'support': [round(count * weight, 2) for count in support.tolist()],
    'recall': recall,
    'recall_interval': intervals(support),
    'precision': _shares(right, predicted),
    'precision_interval': intervals(predicted),
    'f1': f1,
  }


def _share(hits: int, count: int) -> float | None:
  return hits / count if count else None


def _shares(hits: np.ndarray, counts: np.ndarray) -> list[float | None]:
  pairs = zip(hits.tolist(), counts.tolist(), strict=True)
  return [_share(*pair) for pair in pairs]


def _mean(values: Sequence[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return statistics.fmean(known) if known else None


def student(values: Sequence[float]) -> Interval:
  """Return Student's 95 % interval of the mean of at least 2 values."""
  from scipy import special

  count = len(values)
  mean, error = statistics.fmean(values), statistics.stdev(values)
  half = float(special.stdtrit(count - 1, 0.975)) * error / math.sqrt(count)
  return Interval(mean - half, mean + half)


def over_seeds(values: Sequence[float]) -> Interval | None:
  """Return the interval of the mean of some shares, cut to 0..1.

  None for fewer than 2 shares.
  """
  if len(values) < 2:
    return None
  low, high = student(values)
  return Interval(max(low, 0.0), min(high, 1.0))


def worst(found: dict[str, Any], most: int) -> list[int]:
  """Return the classes of least F1, worst first; those without any come last.

  Args:
    found: a `report`.
    most: number of classes to return.
  """
  f1 = [math.inf if value is None else value for value in found['f1']]
  return np.argsort(f1, kind='stable')[:most].tolist()
