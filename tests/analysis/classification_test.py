"""Quality of classes, against scikit-learn and independent loops."""

import math
import statistics

import numpy as np
import pytest
from sklearn import metrics

from ssljax import intervals
from ssljax.analysis import classification
from ssljax.training import evaluate

RNG = np.random.default_rng(0)
TRUTH = np.repeat([0, 1, 3], [50, 7, 3])  # class 2 has no image
PREDICTED = np.where(RNG.random(60) < 0.7, TRUTH, RNG.integers(0, 3, 60))
COUNTS = evaluate.counts_of(evaluate.confusion(TRUTH, PREDICTED, 5))


def test_the_confusion_matrix_has_a_row_for_each_true_class():
  matrix = evaluate.confusion(TRUTH, PREDICTED, 5)
  wanted = metrics.confusion_matrix(TRUTH, PREDICTED, labels=range(5))
  np.testing.assert_array_equal(matrix, wanted)
  assert (matrix != matrix.T).any()


def test_precision_recall_and_f1_are_those_of_scikit_learn():
  found = classification.report(COUNTS)
  wanted = metrics.precision_recall_fscore_support(
    TRUTH, PREDICTED, labels=range(5), zero_division=np.nan
  )
  for name, values in zip(('precision', 'recall', 'f1'), wanted, strict=False):
    known = [math.nan if x is None else x for x in found[name]]
    np.testing.assert_allclose(known, values, err_msg=name)
  assert found['support'] == [50, 7, 0, 3, 0]
  accuracy = metrics.accuracy_score(TRUTH, PREDICTED)
  assert found['accuracy'] == pytest.approx(accuracy)
  with pytest.warns(UserWarning, match='y_pred contains classes'):
    balanced = metrics.balanced_accuracy_score(TRUTH, PREDICTED)
  assert found['balanced_accuracy'] == pytest.approx(balanced)
  f1 = metrics.f1_score(TRUTH, PREDICTED, average='macro')
  assert found['macro_f1'] == pytest.approx(f1)


def test_intervals_are_wilsons_and_absent_where_no_image_is():
  found = classification.report(COUNTS)
  right, support, predicted = COUNTS
  for name, counts in (('recall', support), ('precision', predicted)):
    for c in range(5):
      interval = found[f'{name}_interval'][c]
      if not counts[c]:
        assert interval is None and found[name][c] is None
      else:
        assert interval == list(intervals.wilson(right[c], counts[c]))
  assert COUNTS[1, 2] == 0 < COUNTS[2, 2]  # has predictions and no image
  assert found['precision'][2] == 0


def test_images_that_several_seeds_share_count_once_in_an_interval():
  once = classification.report(COUNTS)
  shared = classification.report(3 * COUNTS, images=60)
  assert shared == once
  apart = classification.report(3 * COUNTS)
  width = lambda one: np.diff(one['recall_interval'][1])[0]
  assert width(apart) < width(once)
  assert apart['support'] == [150, 21, 0, 9, 0]
  # Seeds whose folds do not cover what all seeds will have.
  assert classification.report(COUNTS, images=300) == once


def test_the_interval_over_seeds_is_students():
  values = [0.5, 0.55, 0.3]
  low, high = classification.over_seeds(values)
  half = 4.302653 * statistics.stdev(values) / math.sqrt(3)  # t, 2 degrees
  assert (low, high) == pytest.approx((0.45 - half, 0.45 + half))
  low, high = classification.over_seeds([0.9, 0.99])
  assert low > 0 and high == 1
  assert classification.over_seeds([0.9]) is None


def test_the_worst_classes_come_first_and_empty_ones_last():
  found = {'f1': [0.9, None, 0.2, 0.5]}
  assert classification.worst(found, 3) == [2, 3, 0]
  assert classification.worst(found, 9) == [2, 3, 0, 1]


def test_a_large_confusion_matrix_is_not_kept():
  many = evaluate.MOST_CLASSES + 1
  assert set(evaluate.table([0], [1], many)) == {'counts'}
  found = evaluate.table(TRUTH, PREDICTED, 5)
  np.testing.assert_array_equal(found['counts'], COUNTS)
  assert np.sum(found['confusion']) == 60
