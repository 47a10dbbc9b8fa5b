"""95 % intervals of shares of images, and of differences of two models."""

import math
import statistics
from typing import NamedTuple

import numpy as np

from ssljax.errors import require

_Z = statistics.NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
  """A 95 % interval of a share."""

  low: float
  high: float


def wilson(hits: float, count: float) -> Interval:
  """Return Wilson's 95 % interval of a share of `hits` in `count` images.

  (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), p = hits/n; scipy.stats has
  it too, but takes longer to import than a short run's evaluations.

  Args:
    hits: number of images, or a mean number over several counts.
    count: n.

  Examples:
    >>> low, high = wilson(5, 100)
    >>> f'{low:.3f} to {high:.3f}'
    '0.022 to 0.112'
  """
  require(0 <= hits <= count, f'{hits} of {count}: give a share')
  if not count:
    return Interval(0.0, 1.0)
  p, over = hits / count, _Z**2 / count
  half = math.sqrt(p * (1 - p) * over + over**2 / 4)
  low, high = ((p + over / 2 + sign * half) / (1 + over) for sign in (-1, 1))
  return Interval(max(low, 0.0), min(high, 1.0))


def paired(differences: np.ndarray) -> Interval:
  """Return the 95 % interval of a mean difference of two models' errors.

  Bonett and Price, Adjusted Wald Confidence Interval for a Difference of
  Binomial Proportions Based on Paired Data, 2012: one image on which each model
  alone is wrong is added. Without these, it contains the difference in 80 to 90
  % of cases of 20 images.

  Args:
    differences: `[M]` in [-1, 1]: errors of the first model on each image less
      those of the second.
  """
  values = np.append(differences, [1.0, -1.0])
  half = _Z * float(values.std()) / math.sqrt(len(values))
  mean = float(values.mean())
  return Interval(mean - half, mean + half)
