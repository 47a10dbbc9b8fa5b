"""Settings that are suggested for data that no preset knows."""

import numpy as np
import pytest

from ssljax import registry
from ssljax.core import UNLABELLED
from ssljax.data import arrays
from ssljax.runs import defaults


def dataset(labelled=(20, 8, 12), unlabelled=60, side=8):
  labels = np.repeat([0, 1, 2, UNLABELLED], [*labelled, unlabelled])
  images = np.zeros((len(labels), side, side, 1), np.uint8)
  return arrays.from_arrays(images, labels)


def test_facts_are_counted_without_the_held_out_images():
  facts = defaults.facts_of(dataset())
  assert (facts.images, facts.labelled, facts.unlabelled) == (100, 40, 60)
  assert (facts.least, facts.classes) == (8, 3)
  # A quarter of the labelled images is held out: 6 of the rarest are left.
  held_out = defaults.facts_of(dataset(), 10)
  assert (held_out.images, held_out.labelled) == (90, 30)
  assert held_out.unlabelled == 60 and held_out.least == 6


@pytest.mark.parametrize('method', sorted(registry.METHODS))
@pytest.mark.parametrize('held_out', [0, 31])
def test_no_batch_is_larger_than_its_images(method, held_out):
  facts = defaults.facts_of(dataset(), held_out)
  found = defaults.suggest(method, facts)
  if found.get('batch_labelled'):
    assert 0 < found['batch_labelled'] <= facts.labelled
  all_images = found['unlabelled'] == 'all'
  pool = facts.images if all_images else facts.unlabelled
  assert 0 < found['batch_unlabelled'] <= pool
  assert found['labels'] == 'all'


def test_lengths_are_a_number_of_passes_within_bounds():
  # 25 passes over 6,000 images, 50 a step, are 3,000 steps: 2,000 at most; over
  # 60 images in one step each they are 25: 300 at least; over 2,000 they are
  # 1,000.
  steps = lambda count: defaults.suggest(
    'madnn', defaults.facts_of(dataset(unlabelled=count))
  )['steps']
  assert [steps(60), steps(2000), steps(6000)] == [300, 1000, 2000]
