"""Measurements of embeddings, checked by hand."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from ssljax.analysis import probing
from ssljax.core import UNLABELLED
from ssljax.methods import llp


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


def test_the_neighbour_of_table_6_is_looked_up_in_the_bank():
  # Averaged rows differ from the embeddings; an image that the run left out (2)
  # and one of unknown class (3) are not in the bank.
  memory = llp.Bank(
    rows=jnp.array([[[0.0, 2], [1, 0], [3, 4], [9, 9]]], jnp.bfloat16),
    labels=None,
    confidence=None,
    known=None,
    known_rows=None,
    log_density=None,
    admitted=jnp.array([[0, 1, 3]]),
  )
  truth = np.array([1, 0, 2, UNLABELLED])
  source = types.SimpleNamespace(labels=truth)
  finished = types.SimpleNamespace(dataset=types.SimpleNamespace(train=source))
  state = types.SimpleNamespace(memory=memory, images=4)
  bank = probing.bank_of(finished, state)
  np.testing.assert_array_equal(bank.rows, np.float32([[0, 1], [1, 0]]))
  np.testing.assert_array_equal(bank.labels, [1, 0])
  found = probing.measure(
    embedded(0, 1, 2), np.zeros((2, 3)), ('a', 'b', 'c'), bank
  )
  # Truth: 1 and 1. Nearest in the bank: 1 (0.8) and 0 (1).
  assert found['test_error']['nearest_in_bank'] == 50
  state.memory = ()
  assert probing.bank_of(finished, state) is None


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
