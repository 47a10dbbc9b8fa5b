"""Simulate how often the printed intervals contain the true value.

  python tools/intervals.py [--repeats=4000]

Wilson      95 % interval of an accuracy over n images
Student     95 % interval of a mean accuracy over seeds; the accuracies of the
            seeds differ by the label splits and by the n images of each
difference  95 % interval of the paired difference of two methods over n
            images, by which `--method=auto` compares them
sets        prediction sets that are fitted to n images and used on others
calibration the calibration error of n images before and after a temperature
            that was fitted to others of them (`prediction.measure`)
"""

import argparse

import numpy as np

from ssljax import intervals, prediction
from ssljax.analysis import calibration, classification

IMAGES, ACCURACIES = (20, 60, 500), (0.6, 0.85, 0.97)
SEEDS = 3, 5
ASKED = 0.9  # coverage of the prediction sets
_CLASSES, _SCALE, _SURE = 5, 2.0, 2.5  # overconfident by this factor


def wilson(n: int, accuracy: float, repeats: int, rng) -> float:
  """Return the share of intervals over n images that contain the accuracy."""
  ends = np.array([intervals.wilson(hits, n) for hits in range(n + 1)])
  low, high = ends[rng.binomial(n, accuracy, repeats)].T
  return float(np.mean((low <= accuracy) & (accuracy <= high)))


def student(seeds: int, accuracy: float, repeats: int, rng, n=100) -> float:
  """Return the share of intervals over seeds that contain the mean."""
  inside = []
  for _ in range(repeats):
    own = np.clip(rng.normal(accuracy, 0.02, seeds), 0, 1)
    low, high = classification.over_seeds(list(rng.binomial(n, own) / n))
    inside.append(low <= accuracy <= high)
  return float(np.mean(inside))


def difference(n: int, accuracy: float, repeats: int, rng) -> float:
  """Return the share of paired intervals that contain the difference.

  One method is wrong on a tenth of the images that the other one gets right,
  and right on a fifth of the others.
  """
  inside, lost, won = [], 0.1, 0.2
  true = accuracy * lost - (1 - accuracy) * won
  for _ in range(repeats):
    right = rng.random(n) < accuracy
    other = rng.random(n) < np.where(right, 1 - lost, won)
    low, high = intervals.paired(right.astype(float) - other)
    inside.append(low <= true <= high)
  return float(np.mean(inside))


def drawn(count: int, rng) -> tuple[np.ndarray, np.ndarray]:
  """Return logits of an overconfident network, and labels."""
  logits = _SCALE * _SURE * rng.normal(size=(count, _CLASSES))
  p = calibration.softmax(logits, _SURE)
  return logits, (p.cumsum(axis=1) < rng.random((count, 1))).sum(axis=1)


def sets(n: int, repeats: int, rng, others: int = 100) -> tuple[float, float]:
  """Return coverage and mean size of prediction sets on other images."""
  found = []
  for _ in range(repeats):
    logits, labels = drawn(n + others, rng)
    p = calibration.softmax(logits, _SURE)
    threshold = calibration.set_threshold(p[:n], labels[:n], ASKED)
    own = calibration.prediction_sets(p[n:], threshold)
    found.append(
      (own[np.arange(others), labels[n:]].mean(), own.sum() / others)
    )
  coverage, size = np.mean(found, axis=0)
  return float(coverage), float(size)


def errors(n: int, repeats: int, rng) -> tuple[float, float]:
  """Return the mean calibration error before and after a temperature."""
  measured = [prediction.measure(*drawn(n, rng), ASKED) for _ in range(repeats)]
  names = 'calibration_error_before', 'calibration_error_after'
  before, after = ([each[name] for each in measured] for name in names)
  return float(np.mean(before)), float(np.mean(after))


def rows(repeats: int) -> list[tuple[str, str, str, str]]:
  """Return the cells of the table: what, of what, says, measured."""
  rng = np.random.default_rng(0)
  percent = lambda share: f'{100 * share:.1f} %'
  found = []
  for name, of in (('Wilson', wilson), ('paired difference', difference)):
    for n in IMAGES:
      for accuracy in ACCURACIES:
        about = f'{n} images, accuracy {accuracy:.0%}'
        measured = of(n, accuracy, repeats, rng)
        found.append((name, about, '95 %', percent(measured)))
  for seeds in SEEDS:
    measured = student(seeds, 0.85, repeats, rng)
    about = f'{seeds} seeds, accuracy 85 %'
    found.append(('Student', about, '95 %', percent(measured)))
  for n in (60, 500):
    coverage, size = sets(n, repeats // 8, rng)
    about = f'{n} images, sets of {size:.1f} of {_CLASSES} classes'
    found.append(('prediction sets', about, '90 %', percent(coverage)))
  for n in (60, 500):
    before, after = errors(n, repeats // 80, rng)
    about = f'{n} images'
    found.append(('calibration error', about, f'{before:.3f}', f'{after:.3f}'))
  return found


def main() -> None:
  """Print the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--repeats', type=int, default=4000)
  asked = parser.parse_args()
  print('| interval | of | says, or before | measured, or after |')
  print('| --- | --- | --- | --- |')
  for row in rows(asked.repeats):
    print('| ' + ' | '.join(row) + ' |')


if __name__ == '__main__':
  main()
