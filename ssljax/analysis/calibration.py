"""Confidence: temperature, calibration error, prediction sets.

Letters: M images, C classes. Everything is NumPy on predictions of a trained
network; the images must be labelled and not trained on.
"""

import numpy as np

from ssljax.errors import fraction

_TEMPERATURES = 0.05, 20.0  # the range that is searched
BINS = 15  # of the calibration error, as in Guo et al. 2017


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
  """Return the probabilities `[M, C]` of logits divided by a temperature."""
  scaled = logits / temperature
  e = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def log_loss(
  logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0
) -> float:
  """Compute the mean cross-entropy in nats of softmax(logits / T).

  Args:
    logits: `[M, C]`.
    labels: `[M]` classes.
    temperature: T.
  """
  scaled = logits / temperature
  most = scaled.max(axis=-1, keepdims=True)
  normal = most[:, 0] + np.log(np.exp(scaled - most).sum(axis=-1))
  return float(np.mean(normal - scaled[np.arange(len(labels)), labels]))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
  """Return the temperature T of the least `log_loss`.

  Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, ICML
  2017. The loss is convex in 1/T.

  Args:
    logits: `[M, C]` of images that were not trained on.
    labels: `[M]` their classes.
  """
  from scipy import optimize  # slow to import

  low, high = np.log(_TEMPERATURES)
  found = optimize.minimize_scalar(
    lambda t: log_loss(logits, labels, float(np.exp(t))),
    bounds=(low, high),
    method='bounded',
  )
  return float(np.exp(found.x))


def calibration_error(
  p: np.ndarray, labels: np.ndarray, bins: int = BINS
) -> float:
  """Compute the expected calibration error, 0 to 1.

  The mean over images of |accuracy − mean confidence| in the image's bin, with
  bins of equal width in confidence (Naeini et al. 2015; Guo et al. 2017).

  Args:
    p: probabilities `[M, C]`.
    labels: `[M]` classes.
    bins: number of bins.
  """
  confidence, right = p.max(axis=-1), p.argmax(axis=-1) == labels
  at = np.minimum((confidence * bins).astype(int), bins - 1)
  excess = np.bincount(at, right - confidence, minlength=bins)
  return float(np.abs(excess).sum() / len(labels))


# Prediction sets.


def set_threshold(p: np.ndarray, labels: np.ndarray, coverage: float) -> float:
  """Return the least probability of a class in a prediction set.

  Split conformal prediction with the score 1 − p of the true class (Sadinle,
  Lei, Wasserman 2019): the sets of new images of the same distribution contain
  the true class with probability `coverage` or more.

  Args:
    p: probabilities `[M, C]` of images that were not trained on.
    labels: `[M]` their classes.
    coverage: 0 to 1.

  Returns:
    The threshold; 0, which puts every class into a set, if there are too few
    images for this coverage.
  """
  fraction(coverage=coverage)
  scores = np.sort(1 - p[np.arange(len(labels)), labels])
  rank = int(np.ceil((len(scores) + 1) * coverage))
  return float(1 - scores[rank - 1]) if 0 < rank <= len(scores) else 0.0


def prediction_sets(p: np.ndarray, threshold: float) -> np.ndarray:
  """Return the mask `[M, C]` of the classes in each set.

  A set has at least the most probable class.

  Args:
    p: probabilities `[M, C]`.
    threshold: of `set_threshold`.
  """
  sets = p >= threshold
  sets[np.arange(len(p)), p.argmax(axis=-1)] = True
  return sets
