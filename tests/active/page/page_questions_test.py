"""People answer the questions of a run on the page."""

import csv

import numpy as np
import pages
import pytest

from ssljax.active import oracle
from ssljax.active.page import images as images_lib
from ssljax.active.page import questions, service, store
from ssljax.core import UNLABELLED
from ssljax.errors import InputError

IMAGES = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(4, 1)


def ask(root, number=1, classes=('cat', 'dog')):
  """A question about three rows: raises until it is answered."""
  people = oracle.Folder(root, IMAGES.__getitem__, classes, 'digest')
  return people.ask(0, number, [7, 3, 11])


@pytest.mark.parametrize('classes', [('cat', 'dog'), ('0', '1'), ('1', '2')])
def test_answers_on_the_page_are_those_of_the_run(classes, tmp_path):
  root = tmp_path / 'questions'
  with pytest.raises(oracle.WaitingError):
    ask(root, classes=classes)
  assert questions.classes(root) == list(classes)
  answers = store.Store(root / questions.STORE, str(root), classes)
  found = images_lib.Images(root, root / questions.STORE)
  found.scan()
  page = service.Service(answers, found)
  items = sorted(page.next('random', 9, 'ada'), key=lambda i: i['file'])
  assert len(items) == 3  # the store is not one of the images

  page.answer('ada', [items[0] | {'label': classes[1]}], '')
  assert questions.fill_in(root, answers.state) == []
  page.answer('ada', [items[1] | {'answer': 'unsure'}], '')
  page.answer('ada', [items[2] | {'label': classes[0]}], '')
  page.answer('bob', [items[2] | {'label': classes[1]}], '')
  assert questions.fill_in(root, answers.state) == []  # a conflict
  page.answer('bob', [items[2] | {'label': classes[0], 'final': True}], '')
  assert questions.fill_in(root, answers.state) == ['seed-0/batch-0001']
  assert questions.fill_in(root, answers.state) == []
  np.testing.assert_array_equal(ask(root, classes=classes), [1, UNLABELLED, 0])
  answers.close()


def test_a_file_that_is_filled_in_by_hand_is_left_alone(tmp_path):
  root = tmp_path / 'questions'
  with pytest.raises(oracle.WaitingError):
    ask(root)
  (path,) = questions.batches(root)
  with path.open() as file:
    rows = list(csv.reader(file))
  rows[1][2] = 'cat'
  path.write_text(''.join(','.join(row) + '\n' for row in rows))
  before = path.read_text()
  answers = store.Store(root / questions.STORE, str(root), ['cat', 'dog'])
  given = [{'file': f'seed-0/batch-0001/{r[1]}', 'label': 'dog'} for r in rows]
  answers.answer('ada', given)
  assert questions.fill_in(root, answers.state) == []
  assert path.read_text() == before
  answers.close()


def test_a_folder_without_questions_is_refused(tmp_path):
  pages.draw(tmp_path / 'images', 2)
  with pytest.raises(InputError, match=r'has no seed-N'):
    questions.classes(tmp_path / 'images')
