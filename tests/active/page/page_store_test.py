"""Answers are append-only lines that a kill or a full disk does not damage."""

import json
import subprocess
import sys

import pytest
from sklearn import metrics

from ssljax.active.page import store
from ssljax.errors import InputError


def open_store(tmp_path, classes=('cat', 'dog'), images='/photos', **more):
  return store.Store(tmp_path / 'store', images, classes, **more)


def label(file, name, **more):
  return {'file': file, 'label': name} | more


def reopened(made, tmp_path):
  made.close()
  return open_store(tmp_path)


def test_answers_are_there_after_a_restart(tmp_path):
  made = open_store(tmp_path)
  made.answer('ada', [label('a.png', 'cat'), {'file': 'b', 'answer': 'skip'}])
  again = reopened(made, tmp_path)
  assert again.state.labels() == {'a.png': 'cat'}
  assert again.state.resolved['b'].label is None
  assert again.state.classes == ['cat', 'dog']
  again.close()


def test_a_line_says_who_answered_what_and_what_was_shown(tmp_path):
  made = open_store(tmp_path)
  shown = {'queue': 'random', 'suggestion': 'dog', 'confidence': 0.7}
  made.answer('ada', [label('a', 'cat', shown=shown | {'strange': [1]})])
  line = json.loads((made.folder / store.NAME).read_text().splitlines()[-1])
  assert line['annotator'] == 'ada' and line['time'] and line['shown'] == shown
  made.close()


def test_undo_takes_back_what_was_answered_together(tmp_path):
  made = open_store(tmp_path)
  made.answer('ada', [label('a', 'cat')])
  made.answer('ada', [label('b', 'cat'), label('c', 'cat')])
  made.answer('bob', [label('d', 'dog')])
  assert [a.file for a in made.undo('ada')] == ['b', 'c']
  assert made.state.labels() == {'a': 'cat', 'd': 'dog'}
  again = reopened(made, tmp_path)
  assert again.state.labels() == {'a': 'cat', 'd': 'dog'}
  assert [a.file for a in again.undo('ada')] == ['a']
  assert again.undo('ada') == [] and again.state.labels() == {'d': 'dog'}
  again.close()


def test_undo_brings_the_earlier_answer_back(tmp_path):
  made = open_store(tmp_path)
  made.answer('ada', [label('a', 'cat')])
  made.answer('ada', [label('a', 'dog')])
  made.undo('ada')
  assert made.state.labels() == {'a': 'cat'}
  made.close()


def test_a_repeated_request_is_saved_once(tmp_path):
  made = open_store(tmp_path)
  assert made.answer('ada', [label('a', 'cat', key='k')]) == 1
  assert made.answer('ada', [label('a', 'cat', key='k')]) == 0
  again = reopened(made, tmp_path)
  assert again.answer('ada', [label('a', 'cat', key='k')]) == 0
  again.close()


@pytest.mark.parametrize('left', range(1, 40, 6))
def test_a_last_line_that_a_kill_has_cut_is_dropped(left, tmp_path):
  made = open_store(tmp_path)
  made.answer('ada', [label('a', 'cat')])
  made.answer('ada', [label('b', 'dog')])
  made.close()
  path = tmp_path / 'store' / store.NAME
  content = path.read_bytes()
  last = content.rstrip(b'\n').rindex(b'\n') + 1
  path.write_bytes(content[: last + left])
  assert store.read(tmp_path / 'store').labels() == {'a': 'cat'}  # a reader
  again = open_store(tmp_path)
  again.answer('ada', [label('c', 'dog')])
  again = reopened(again, tmp_path)
  assert again.state.labels() == {'a': 'cat', 'c': 'dog'}
  again.close()


@pytest.mark.parametrize(
  'line',
  [
    '{',
    '[]',
    '{}',
    '{"kind": "answer"}',
    '{"kind": "class", "op": "rename", "name": "x", "to": "y"}',
    '[' * 100_000,
  ],
)
def test_a_damaged_line_is_named(line, tmp_path):
  open_store(tmp_path).close()
  path = tmp_path / 'store' / store.NAME
  lines = path.read_text().splitlines()
  path.write_text('\n'.join([*lines, line, lines[-1], '']))
  with pytest.raises(InputError, match=f'line {len(lines) + 1} is damaged'):
    open_store(tmp_path)


def test_a_second_process_is_refused(tmp_path):
  made = open_store(tmp_path)
  with pytest.raises(InputError, match=r'store=.*another process, \d+'):
    open_store(tmp_path)
  made.close()
  open_store(tmp_path).close()


def test_labels_of_another_folder_are_not_taken_for_this_one(tmp_path):
  open_store(tmp_path).close()
  with pytest.raises(InputError, match=r'has labels of the folder /photos'):
    open_store(tmp_path, images='/others')
  open_store(tmp_path, images='/moved', moved=True).close()
  open_store(tmp_path, images='/moved').close()


# Saves until a limit of the file's size, then with room again.
FULL_DISK = """
import json, os, pathlib, resource, sys
from ssljax.active.page import store
folder = pathlib.Path(sys.argv[1])
made = store.Store(folder, '/photos', ['cat'])
size = os.path.getsize(folder / store.NAME)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))
try:
  made.answer('ada', [{'file': 'a', 'label': 'cat'}])
  found = ['saved']
except store.SaveError as error:
  found = [str(error)]
found += [os.path.getsize(folder / store.NAME) == size, made.state.labels()]
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
made.answer('ada', [{'file': 'a', 'label': 'cat'}])
made.close()
print(json.dumps([*found, store.read(folder).labels()]))
"""


def test_an_answer_that_does_not_fit_on_the_disk_is_not_acknowledged(tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', FULL_DISK, tmp_path / 'store'],
    capture_output=True,
    text=True,
    check=True,
    timeout=100,
  )
  found = json.loads(done.stdout)
  assert found == ['File too large', True, {}, {'a': 'cat'}]


def test_the_same_command_does_not_bring_a_renamed_class_back(tmp_path):
  given = ['cat', 'dog', 'car', 'auto']
  answers = store.Store(tmp_path / 'store', '/images', given)
  answers.rename_class('cat', 'lion')
  answers.merge_class('auto', 'car')
  answers.close()
  again = store.Store(tmp_path / 'store', '/images', [*given, 'cow'])
  assert again.state.classes == ['lion', 'dog', 'car', 'cow']
  again.add_class('cat')  # on the page it can be added
  again.close()


def test_classes_are_renamed_and_merged_in_all_answers(tmp_path):
  made = open_store(tmp_path)
  made.set_guideline('cat', 'has whiskers')
  made.answer('ada', [label('a', 'cat', shown={'suggestion': 'cat'})])
  made.rename_class('cat', 'tiger')
  assert made.state.labels() == {'a': 'tiger'}
  assert made.state.answers[0].shown['suggestion'] == 'tiger'
  assert made.state.guidelines == {'tiger': 'has whiskers'}
  # The page may have been loaded before.
  made.answer('ada', [label('b', 'cat')])
  made.add_class('cat')
  made.answer('ada', [label('c', 'cat')])
  made.merge_class('tiger', 'dog')
  wanted = {'a': 'dog', 'b': 'dog', 'c': 'cat'}
  assert made.state.labels() == wanted and made.state.labelled == 3
  made.undo('ada')
  again = reopened(made, tmp_path)
  assert again.state.labels() == {'a': 'dog', 'b': 'dog'}
  assert again.state.classes == ['dog', 'cat']
  assert dict(+again.state.counts) == {'dog': 2}
  again.close()


@pytest.mark.parametrize(
  'name', ['', ' cat', 'x' * 101, 'a\nb', 'CAT', None, 5, '\u202ecat']
)
def test_a_class_that_cannot_be_named_so_is_refused(name, tmp_path):
  made = open_store(tmp_path)
  with pytest.raises(InputError, match='classes'):
    made.add_class(name)
  made.close()


def test_markup_is_a_name_like_any_other(tmp_path):
  name = '<img src=x onerror=alert(1)>'
  made = open_store(tmp_path, classes=('cat', name))
  made.answer('ada', [label('a', name)])
  assert reopened(made, tmp_path).state.labels() == {'a': name}


@pytest.mark.parametrize(
  'given',
  [
    {'file': 'a', 'label': 'bird'},
    {'file': 'a', 'label': None},
    {'file': 'a', 'answer': 'maybe'},
    {'file': 'a', 'label': 'cat', 'key': 'k' * 65},
    {'file': 'a', 'label': 'cat', 'shown': {'queue': ['x']}},
    {'file': 'a', 'label': 'cat', 'shown': {'queue': 'x' * 2000}},
  ],
)
def test_an_invalid_answer_is_refused_and_none_is_saved(given, tmp_path):
  made = open_store(tmp_path)
  with pytest.raises(InputError):
    made.answer('ada', [label('b', 'cat'), given])
  assert not made.state.answers
  made.close()


# Several annotators.


def test_the_majority_decides_and_a_tie_decides_nothing(tmp_path):
  made = open_store(tmp_path)
  made.answer('ada', [label('a', 'cat'), label('b', 'cat')])
  made.answer('bob', [label('a', 'dog'), label('b', 'cat')])
  assert made.state.labels() == {'b': 'cat'} and made.state.conflicts == {'a'}
  made.answer('eve', [label('a', 'dog')])
  assert made.state.labels() == {'a': 'dog', 'b': 'cat'}
  assert made.state.conflicts == {'a'}
  made.answer('ada', [label('a', 'cat', final=True)])
  assert made.state.labels() == {'a': 'cat', 'b': 'cat'}
  assert not made.state.conflicts
  again = reopened(made, tmp_path)
  assert again.state.labels()['a'] == 'cat' and not again.state.conflicts
  again.close()


def test_agreement_is_cohens_kappa(tmp_path):
  made = open_store(tmp_path)
  first = ['cat', 'cat', 'dog', 'dog', 'cat', 'dog', 'cat']
  second = ['cat', 'dog', 'dog', 'dog', 'cat', 'cat', 'cat']
  for name, given in (('ada', first), ('bob', second)):
    made.answer(name, [label(str(k), y) for k, y in enumerate(given)])
  made.answer('ada', [label('alone', 'cat')])
  found = made.state.agreement()
  assert found['files'] == 7 and found['agreed'] == pytest.approx(5 / 7)
  ((one, other, count, share, kappa),) = found['pairs']
  assert (one, other, count) == ('ada', 'bob', 7)
  assert share == pytest.approx(5 / 7)
  assert kappa == pytest.approx(metrics.cohen_kappa_score(first, second))
  made.close()
