"""The choice of a method by held-out labels."""

import json

import numpy as np
import pytest

from ssljax.data import arrays
from ssljax.errors import InputError
from ssljax.runs import auto


def errors(method, wrong, images=20):
  return auto.Errors(
    method, {row: float(row in wrong) for row in range(images)}, 100, 1.0
  )


def test_the_least_error_wins_and_the_simplest_of_equal_ones():
  found = [errors('supervised', {1, 2}), errors('madnn', {3}), errors('b', {4})]
  record = auto.compare(found)
  assert record['chosen'] == 'madnn'
  first = record['compared'][0]
  assert first['error'] == pytest.approx(0.1) and first['images'] == 20
  # Two images are worse, one is better, and one of each is added.
  half = 1.959964 * np.sqrt((5 / 22 - (1 / 22) ** 2) / 22)
  assert first['difference_interval'] == pytest.approx(
    [1 / 22 - half, 1 / 22 + half]
  )
  # Wilson's interval of 2 of 20 by hand.
  z = 1.959964
  middle = (2 + z**2 / 2) / (20 + z**2)
  half = z / (20 + z**2) * np.sqrt(2 * 18 / 20 + z**2 / 4)
  assert first['interval'] == pytest.approx([middle - half, middle + half])
  rows = auto.table(record)
  assert [row[-1] for row in rows] == ['', '', 'chosen', '']


def test_methods_that_held_out_other_images_are_not_compared():
  with pytest.raises(InputError, match='held out other images'):
    auto.compare([errors('supervised', {1}), errors('madnn', {1}, 10)])


def test_the_budget_is_shared_out():
  names = auto._OF_IMAGES
  parts = [auto.minutes_of(name, names, 10) for name in names]
  assert parts == [2, 4, 4]


def test_embeddings_have_candidates_of_their_own():
  names = lambda width: auto.candidates_of(
    arrays.from_arrays(np.zeros((4, width), np.float32), [0, 1, -1, -1])
  )
  assert names(255) == ('supervised', 'association', 'r2d2')
  assert names(256) == ('supervised', 'laplacenet', 'llp')


def test_an_error_is_that_of_the_splits_that_hold_a_row_out(tmp_path):
  result = {'complete': False, 'method': 'm', 'arms': {}}
  held_out = [{'images': 2, 'wrong': [1]}, {'images': 2, 'wrong': []}]
  result['arms']['m'] = {'held_out': held_out, 'steps': 3, 'seconds': 1.0}
  described = {'splits': [{'test': [4, 7]}, {'test': [7, 9]}]}
  (tmp_path / 'result.json').write_text(json.dumps(result))
  (tmp_path / 'split.json').write_text(json.dumps(described))
  found = auto.errors_of(tmp_path)
  assert found.wrong == {4: 0, 7: 0.5, 9: 0} and found.steps == 3
  assert found.interval[0] < found.rate < found.interval[1]


def data(labelled, tests=0):
  images = np.zeros((labelled + 5, 6, 6, 1), np.uint8)
  labels = np.arange(labelled + 5) % 2
  labels[labelled:] = -1
  test = (images[:tests], labels[:tests]) if tests else (None, None)
  return arrays.from_arrays(images, labels, *test, classes=2)


def test_labelled_images_that_choose_are_of_the_given_ones():
  assert auto.hold_out(data(20), {})['seeds'] == 5
  assert auto.hold_out(data(200), {})['seeds'] == 1
  assert auto.hold_out(data(20), {})['hold_out'] == 'auto'
  found = auto.hold_out(data(20, tests=4), {})
  assert found['validation'] == 4 and found['labels'] == 'all'
  assert 'validation' not in auto.hold_out(data(20, tests=4), {'validation': 9})
  with pytest.raises(InputError, match=r'labels=2: .* as validation'):
    auto.hold_out(data(20, tests=4), {'labels': '2'})


def test_the_chosen_run_moves_to_the_folder_also_when_interrupted(tmp_path):
  where = tmp_path / 'candidates' / 'madnn'
  where.mkdir(parents=True)
  for name in ('config.json', 'split.json'):
    (where / name).write_text(name)
  (tmp_path / 'result.json').write_text('moved before')
  record = {'chosen': 'madnn', 'compared': []}
  auto.keep(tmp_path, record)
  assert auto.decided(tmp_path) == record
  assert (tmp_path / 'config.json').read_text() == 'config.json'
  assert (tmp_path / 'result.json').read_text() == 'moved before'
  assert not list(where.iterdir())
