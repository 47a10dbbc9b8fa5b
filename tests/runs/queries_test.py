"""How many labels a run may ask for, and about which images."""

import types

import numpy as np
import pytest
import tiny

from ssljax import config as config_lib
from ssljax.core import UNLABELLED
from ssljax.data import arrays
from ssljax.errors import InputError
from ssljax.runs import queries


def config(**values):
  return config_lib.from_values('madnn', {'steps': 9} | values)


@pytest.mark.parametrize(
  ('values', 'expected'),
  [
    (dict(acquire='none'), 0),
    (dict(acquire='entropy'), 37),
    (dict(acquire='entropy', budget=10), 10),
    (dict(acquire='entropy', budget=99), 37),
  ],
)
def test_no_more_labels_are_asked_for_than_the_budget_and_the_images(
  values, expected
):
  # 24 of 61 rows have a label.
  assert queries.most(config(**values), tiny.make_splits()[0]) == expected


def run(size=1, oracle='truth', truth=None):
  """A run of which the queries look at the data, the split and the config."""
  images, labels = tiny.images()
  truth = labels if truth is None else truth
  test = images[:6], labels[:6]
  return types.SimpleNamespace(
    config=config(acquire='random', query_size=size, oracle=oracle),
    dataset=arrays.from_arrays(images, truth, *test, classes=tiny.CLASSES),
    drawn=tiny.make_splits(),
    methods=[None],
  )


def test_a_person_can_label_images_without_a_known_label():
  truth = tiny.truth().copy()
  truth[[3, 8]] = UNLABELLED
  known = np.ones(tiny.ROWS, bool)
  known[[3, 8]] = False
  np.testing.assert_array_equal(queries.answerable(run(truth=truth)), known)
  by_people = queries.answerable(run(truth=truth, oracle='people'))
  assert by_people.all()


def test_a_query_has_at_most_as_many_images_as_can_be_asked_about():
  queries.refuse(run(37), 0.0)
  with pytest.raises(InputError, match='query_size=38: 37 images can be asked'):
    queries.refuse(run(38), 0.0)
