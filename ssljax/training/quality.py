"""Quality of the pseudo-labels of a method: coverage, accuracy, balance.

With pseudo-labels ŷ_i and weights w_i in [0, 1] of M unlabelled images, as the
loss of the method uses them (`core.UsedLabels`), and their true labels y_i:

  coverage = 1/M Σ_i w_i
  accuracy = Σ_i w_i 1[ŷ_i = y_i] / Σ_i w_i
  balance  = H(r) / log C,  r_c = Σ_i w_i 1[ŷ_i = c] / Σ_i w_i

Coverage and accuracy are the quantity and the quality of pseudo-labels of Chen
et al. (SoftMatch, ICLR 2023, section 2); where a weight is 0 or 1 they are the
share of images that are used, and the share of these that are right. The
balance is 1 if all classes are pseudo-labelled equally often, and 0 if one is
alone. A weight does not contain the weight of the whole term of the loss, which
may rise from 0.

Images that are pseudo-labelled by the network are not augmented, and it is in
inference mode: the numbers describe the model and not the noise of a step.

The truth is the data set's. No state contains it, and it stays on the host.
"""

import math

import numpy as np

from ssljax.core import UNLABELLED, UsedLabels
from ssljax.data import splits

# At most so many images per seed: a share has a standard error of 1.1 %.
IMAGES = 2048


def sample(hidden: np.ndarray, count: int = IMAGES) -> np.ndarray:
  """Choose the images of each seed that are measured.

  They are the first ones in a fixed random order. So they do not depend on the
  other seeds, nor on the step unless labels are acquired.

  Args:
    hidden: `[S, N]` bool, images that are seen without a label.
    count: at most so many images.

  Returns:
    `[S, N]` bool.
  """
  order = splits.generator(0, splits.QUALITY).permutation(hidden.shape[1])
  chosen = np.zeros_like(hidden)
  for own, found in zip(chosen, hidden, strict=True):
    own[order[found[order]][:count]] = True
  return chosen


def measure(
  used: UsedLabels, chosen: np.ndarray, truth: np.ndarray | None, classes: int
) -> dict[str, list[float | None]]:
  """Return coverage, accuracy and balance of each seed, `[S]` by name.

  Args:
    used: `[S, M]`.
    chosen: `[S, M]` bool, images of the seed.
    truth: `[M]` int32; images whose label is unknown do not enter the accuracy.
    classes: C.

  Returns:
    Values in [0, 1], None where no pseudo-label is used. There is no accuracy
    if the label of no image is known.
  """
  weight = np.where(chosen, used.weight, 0.0).astype(np.float64)
  labels = np.where(weight > 0, used.label, 0)  # unused ones may be no class
  found = {
    'coverage': [
      _ratio(own.sum(), count)
      for own, count in zip(weight, chosen.sum(axis=1), strict=True)
    ],
    'balance': [
      _balance(np.bincount(label, own, classes))
      for label, own in zip(labels, weight, strict=True)
    ],
  }
  if truth is None:
    return found
  known = truth != UNLABELLED
  if (chosen & known[None]).any():
    right = labels == truth[None]
    found['accuracy'] = [
      _ratio((own * hit)[known].sum(), own[known].sum())
      for own, hit in zip(weight, right, strict=True)
    ]
  return found


def _ratio(part: float, whole: float) -> float | None:
  """Return part / whole, None if that is 0 / 0."""
  return float(part / whole) if whole > 0 else None


def _balance(counts: np.ndarray) -> float | None:
  """Return the entropy of `counts [C]` over log C; None if all are 0."""
  if not counts.sum():
    return None
  shares = counts[counts > 0] / counts.sum()
  entropy = -float(np.sum(shares * np.log(shares)))
  return max(0.0, entropy) / math.log(max(2, len(counts)))
