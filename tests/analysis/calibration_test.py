import numpy as np
import pytest

from ssljax.analysis import calibration


def drawn(count, classes=4, scale=1.0, seed=0):
  """Returns logits, and labels drawn from softmax(logits / scale)."""
  rng = np.random.default_rng(seed)
  logits = 2.0 * rng.normal(size=(count, classes))
  p = calibration.softmax(logits, scale)
  labels = (p.cumsum(axis=1) < rng.random((count, 1))).sum(axis=1)
  return logits, labels


@pytest.mark.parametrize('true', [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(true):
  logits, labels = drawn(40_000, scale=true)
  assert calibration.fit_temperature(logits, labels) == pytest.approx(
    true, rel=0.05
  )


def test_the_loss_is_that_of_scikit_learn():
  from sklearn import metrics

  logits, labels = drawn(50)
  p = calibration.softmax(logits, 2.0)
  assert calibration.log_loss(logits, labels, 2.0) == pytest.approx(
    metrics.log_loss(labels, p, labels=range(4))
  )
  # Logits of thousands do not overflow.
  assert calibration.log_loss(np.array([[4000.0, 0.0]]), np.array([1])) == 4000


def test_the_calibration_error_by_hand():
  # Two bins. Confidences 0.9, 0.7 are in the upper one: accuracy 1/2, mean
  # confidence 0.8, so 0.3. Confidence 0.4 (three classes): right, so 0.6.
  p = np.array([[0.9, 0.1, 0.0], [0.7, 0.2, 0.1], [0.4, 0.3, 0.3]])
  labels = np.array([0, 1, 0])
  found = calibration.calibration_error(p, labels, bins=2)
  assert found == pytest.approx((2 * 0.3 + 1 * 0.6) / 3)
  # A confidence of exactly 1 is in the last bin.
  sure = np.eye(3)
  assert calibration.calibration_error(sure, np.array([0, 1, 2])) == 0
  assert calibration.calibration_error(sure, np.array([1, 1, 2])) == (
    pytest.approx(1 / 3)
  )


def test_the_right_temperature_calibrates():
  logits, labels = drawn(40_000, scale=3.0)
  error = lambda t: calibration.calibration_error(
    calibration.softmax(logits, t), labels
  )
  assert error(1.0) > 0.2 and error(3.0) < 0.02


@pytest.mark.parametrize('coverage', [0.5, 0.9])
def test_sets_contain_the_true_class_as_often_as_asked(coverage):
  covered = []
  for seed in range(200):
    logits, labels = drawn(160, scale=1.5, seed=seed)
    p = calibration.softmax(logits)
    threshold = calibration.set_threshold(p[:60], labels[:60], coverage)
    sets = calibration.prediction_sets(p[60:], threshold)
    covered.append(sets[np.arange(100), labels[60:]].mean())
  # The mean over 200 calibrations has a standard error of about 0.005. The most
  # probable class is always in a set, so that the coverage may be larger.
  assert np.mean(covered) > coverage - 0.015
  if coverage == 0.9:
    assert np.mean(covered) < coverage + 0.03


def test_too_few_images_give_the_set_of_all_classes():
  p = np.full((4, 3), 1 / 3)
  # ceil(5 · 0.9) = 5 of 4 scores.
  assert calibration.set_threshold(p, np.zeros(4, int), 0.9) == 0
  assert calibration.prediction_sets(p, 0.0).all()


def test_a_set_has_at_least_one_class():
  sets = calibration.prediction_sets(np.array([[0.4, 0.6]]), 0.9)
  assert sets.tolist() == [[False, True]]
