"""Guards on held-out labelled images."""

import numpy as np
import pytest

from ssljax.data.splits import Split
from ssljax.training import guard
from ssljax.training.evaluate import Predicted
from ssljax.training.job import Progress


def ended(*wrong, images=20):
  """Progress of one seed after stages 'a', 'b', ... with so many errors."""
  progress = Progress()
  for number, count in enumerate(wrong):
    truth = np.zeros(images, int)
    classes = {'last': (np.arange(images) < count)[None].astype(int)}
    progress = progress._replace(step=10 * (number + 1))
    found = Predicted(truth, classes)
    progress = guard.at_end(progress, 'abcd'[number], found)
  return progress


def test_a_comparison_by_hand():
  # 5 images are wrong in the first alone, 1 in the second alone, of 10.
  first = np.array([1, 1, 1, 1, 1, 0, 1, 0, 0, 0], bool)
  other = np.array([0, 0, 0, 0, 0, 1, 1, 0, 0, 0], bool)
  found = guard.compare(first, other)
  assert found.error == 60 and found.other == 20
  # 2 (C(6,5) + C(6,6)) / 2^6 = 14 / 64
  assert found.p == pytest.approx(14 / 64)
  # Differences: five times 1, once -1, four times 0; and one of each.
  each = np.array([1] * 6 + [-1] * 2 + [0] * 4)
  half = 1.959964 * each.std() / np.sqrt(12)
  assert found.low == pytest.approx(100 * (4 / 12 - half))
  assert found.high == pytest.approx(100 * (4 / 12 + half))
  assert guard.compare(first, first).p == 1


def test_a_job_stops_after_a_stage_that_is_clearly_worse():
  assert guard.stopped(ended(1), [3]) == {}
  # Six more errors and no fewer: p = 2 / 2^6 = 0.031; five more: 0.063.
  assert guard.stopped(ended(1, 6), [3]) == {}
  found = guard.stopped(ended(1, 7), [3])
  assert found['delivered'] == 'a' and found['delivered_step'] == 10
  assert found['stage'] == 'b' and found['step'] == 20
  assert found['seeds'][0]['p'] == pytest.approx(2 / 64, rel=1e-2)
  # It is compared with the best of the earlier ones.
  assert guard.stopped(ended(9, 1, 8), [3])['delivered'] == 'b'
  assert 'after stage b 5.0 %' in guard.described(
    guard.stopped(ended(9, 1, 8), [3]), 3
  )


def test_images_of_a_test_set_choose_nothing():
  nothing, some = np.zeros(0, np.int32), np.arange(2)
  split = Split(0, np.zeros(3, int), np.ones(3, bool), nothing, nothing)
  found = {'test': 1, 'validation': 2}
  assert guard.held_out(found, split) is None
  assert guard.held_out(found, split._replace(validation=some)) == 2
  assert guard.held_out(found, split._replace(test=some)) == 1


@pytest.mark.parametrize(
  ('predicted', 'labels', 'warns'),
  [
    ([2] * 19 + [0], [0, 1, 2], True),
    ([2] * 18 + [0] * 2, [0, 1, 2], False),
    ([2] * 20, [2] * 3 + [0], False),  # most labels are of that class
    ([2] * 20, [2, 0], True),
  ],
)
def test_predictions_of_one_class_are_noticed(predicted, labels, warns):
  rows = np.zeros(0, np.int32)
  labels = np.array([*labels, -1])
  split = Split(7, labels, np.ones(len(labels), bool), rows, rows)
  classes = {'last': np.array([predicted])}
  found = {'test': Predicted(np.zeros(20, int), classes)}
  texts = guard.collapses(found, [split], 3)
  assert bool(texts) == warns
  if warns:
    assert texts[0].startswith('seed 7: ') and 'class 2' in texts[0]
