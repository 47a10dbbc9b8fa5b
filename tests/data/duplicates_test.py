"""Exact copies of training images among the test images."""

import numpy as np

from ssljax.data import duplicates


def test_test_images_are_counted_also_if_they_are_equal():
  # Training images 3 and 5 are there twice and once, test images 3 and 5 once
  # and three times.
  train = np.array([3, 1, 3, 5], np.uint64)
  test = np.array([5, 3, 7, 5, 5], np.uint64)
  assert duplicates.count(train, test) == 4


def test_equal_images_have_equal_digests_and_others_have_not():
  images = np.zeros((4, 3, 2, 1), np.uint8)
  images[1, 0, 1] = images[2, 1, 0] = images[3, 0, 1] = 1
  found = duplicates.digests(images)
  assert found.dtype == np.uint64
  assert found[1] == found[3] and len(set(found.tolist())) == 3
  # The order in memory does not matter.
  assert duplicates.digest(np.asfortranarray(images[1])) == found[1]


def test_copies_are_described_and_their_absence_is_not():
  said = duplicates.describe(3, 20)
  assert said.startswith('3 of 20 test images are exact copies')
  assert duplicates.describe(0, 20) == duplicates.describe(None, 20) == ''
