"""Measurements of embeddings, checked by hand."""

import numpy as np
import pytest

from ssljax.analysis import probing


def embedded(*labels):
  """Three training images in the plane, and two test images beside them."""
  return probing.Embedded(
    rows=np.array([4, 5, 9]),
    train=np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32),
    train_labels=np.array(labels),
    labelled=np.array([True, False, True]),
    test=np.array([[0.6, 0.8], [1, 0]], np.float32),
    test_labels=np.array([1, 1]),
  )


def test_the_errors_are_those_of_the_nearest_images_and_of_the_logits():
  logits = np.array([[0, 2, 1], [3, 1, 2]], np.float32)
  found = probing.measure(embedded(0, 1, 2), logits, ('a', 'b', 'c'))
  # Truth: 1 and 1. Nearest of all: 1 (0.96) and 0. Nearest of the labelled:
  # 2 (0.8) and 0. Largest logits: 1 and 0.
  assert found['test_error'] == {
    'nearest': 50.0,
    'nearest_labelled': 100.0,
    'softmax': 50.0,
  }
  assert found['train_images'] == 3 and found['labelled_images'] == 2


def test_the_aggregation_is_the_norm_of_the_mean_embedding():
  found = probing.measure(embedded(0, 1, 1), np.zeros((2, 3)), ('a', 'b', 'c'))
  # Class b: the mean (0.4, 0.8) of (0.8, 0.6) and (0, 1); c has no image.
  norm = np.hypot(0.4, 0.8)
  assert found['aggregation_by_class'] == pytest.approx({'a': 1, 'b': norm})
  assert found['aggregation'] == pytest.approx((1 + norm) / 2)


def test_the_top_5_error_is_reported_for_more_than_five_classes():
  truth = np.array([0, 5])
  logits = np.tile(np.arange(6.0), (2, 1))  # class 0 is the last choice
  assert probing.softmax_errors(logits, truth) == {
    'softmax': 50.0,
    'softmax_top5': 50.0,
  }
  assert set(probing.softmax_errors(logits[:, :5], truth)) == {'softmax'}
