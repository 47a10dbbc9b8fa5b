import csv
import json
import os
import re

import numpy as np
import PIL.Image
import pytest

from ssljax.active import oracle
from ssljax.core import UNLABELLED
from ssljax.data import datasets
from ssljax.errors import InputError

CLASSES = ('cat', 'Dog', 'skipper', 'Möwe')
ROWS = [7, 2, 40]
IMAGES = '001-row-7.png', '002-row-2.png', '003-row-40.png'
DIGEST = 'a1b2'


def read(rows):
  """uint8 [B, 5, 4, 1] whose first pixel is the row's number."""
  images = np.zeros((len(rows), 5, 4, 1), np.uint8)
  images[:, 0, 0, 0] = rows
  return images


def never(rows):
  raise AssertionError('images are read once')


@pytest.fixture
def path(tmp_path):
  """A folder with an open question about ROWS, batch 1 of seed 3."""
  waits(tmp_path)
  return tmp_path


def person(path, read=read, classes=CLASSES, digest=DIGEST):
  return oracle.Folder(path, read, classes, digest)


def waits(path, **changes):
  """The one-line message of the WaitingError."""
  with pytest.raises(oracle.WaitingError) as raised:
    person(path, **changes).ask(3, 1, ROWS)
  assert '\n' not in str(raised.value)
  return str(raised.value)


def refused(path, *question, **changes):
  """The one-line message of the InputError; checks that no file changes."""
  before = contents(path)
  with pytest.raises(InputError) as raised:
    person(path, never, **changes).ask(*(question or (3, 1, ROWS)))
  assert contents(path) == before
  assert '\n' not in str(raised.value)
  return str(raised.value)


def contents(path):
  return {p: p.read_bytes() for p in path.rglob('*') if p.is_file()}


def answers(path):
  return path / 'seed-3' / 'batch-0001' / 'answers.csv'


def fill(path, *labels, end='\n', delimiter=','):
  """Write labels into the answers."""
  lines = [['row', 'image', 'label']]
  lines += map(list, zip(map(str, ROWS), IMAGES, labels, strict=True))
  text = ''.join(delimiter.join(line) + end for line in lines)
  answers(path).write_bytes(text.encode())


# Hidden labels.


def test_a_simulation_knows_the_truth_and_counts_per_seed():
  simulation = oracle.Simulation(np.array([2, 0, UNLABELLED, 1, 1]))
  labels = simulation.ask(0, 1, np.array([4, 0], np.int32))
  np.testing.assert_array_equal(labels, [1, 2])
  assert labels.dtype == np.int32
  np.testing.assert_array_equal(simulation.ask(0, 2, [1]), [0])
  np.testing.assert_array_equal(simulation.ask(1, 1, [4]), [1])
  assert [simulation.count(seed) for seed in (0, 1, 2)] == [3, 1, 0]


def test_a_simulation_answers_the_same_question_again_without_counting():
  simulation = oracle.Simulation(np.arange(4))
  for _ in range(2):
    np.testing.assert_array_equal(simulation.ask(0, 1, [3, 1]), [3, 1])
  assert simulation.count(0) == 2


@pytest.mark.parametrize(
  ('number', 'rows', 'message'),
  [
    (2, [1, 3], 'row 3, batch 2: .* was asked about before'),
    (1, [1], 'row 1, batch 1: .* was asked about before'),
    (2, [1, 1], 'row 1: is in the batch twice'),
    (2, [2], 'row 2 has no true label'),
    (2, [5], 'row 5 has no true label'),
    (2, [-1], 'row -1 has no true label'),
  ],
)
def test_a_simulation_refuses_what_cannot_be_asked(number, rows, message):
  simulation = oracle.Simulation([2, 0, UNLABELLED, 1, 1])
  simulation.ask(0, 1, [3])
  with pytest.raises(InputError, match=message):
    simulation.ask(0, number, rows)
  assert simulation.count(0) == 1
  np.testing.assert_array_equal(simulation.ask(0, 2, [1]), [0])


# A person.


def test_a_person_gets_a_folder_and_the_run_waits(tmp_path):
  line = waits(tmp_path)
  assert str(answers(tmp_path)) in line and 'same command again' in line
  folder = answers(tmp_path).parent
  assert answers(tmp_path).read_text().splitlines() == [
    'row,image,label',
    '7,001-row-7.png,',
    '2,002-row-2.png,',
    '40,003-row-40.png,',
  ]
  assert {p.name for p in folder.iterdir()} == {
    'answers.csv',
    'batch.json',
    'classes.txt',
    *IMAGES,
  }
  names = (folder / 'classes.txt').read_text(encoding='utf-8').splitlines()
  assert names == ['0 cat', '1 Dog', '2 skipper', '3 Möwe']
  assert [p.name for p in folder.parent.iterdir()] == ['batch-0001']
  # The second time nothing is read or written and the run still waits.
  before = contents(tmp_path)
  assert waits(tmp_path, read=never) == line
  assert contents(tmp_path) == before


def test_pixels_of_a_small_image_become_squares(path):
  # The shorter side of 4 pixels becomes 128: 32 times.
  image = np.asarray(PIL.Image.open(answers(path).parent / IMAGES[2]))
  assert image.shape == (160, 128) and image.dtype == np.uint8
  np.testing.assert_array_equal(image[:32, :32], 40)
  assert image[32:].max() == image[:, 32:].max() == 0


def test_the_images_of_digits_are_enlarged_exactly(tmp_path):
  data = datasets.load('digits')
  with pytest.raises(oracle.WaitingError):
    person(tmp_path, data.train.read, data.classes).ask(0, 1, [5, 900])
  shown = PIL.Image.open(tmp_path / 'seed-0' / 'batch-0001' / '002-row-900.png')
  expected = data.train.read([900])[0, ..., 0]
  assert shown.size == (128, 128)
  np.testing.assert_array_equal(np.asarray(shown)[8::16, 8::16], expected)


def test_large_images_are_not_enlarged_and_keep_their_colours():
  image = np.random.default_rng(0).integers(0, 256, (128, 140, 3), np.uint8)
  np.testing.assert_array_equal(np.asarray(oracle.enlarge(image)), image)


GOOD = {
  'names': ('cat', 'skipper', 'Dog'),
  'numbers': ('0', '2', '1'),
  'both, in any case, with spaces': (' CAT', '2', 'dog  '),
}


@pytest.mark.parametrize('labels', GOOD.values(), ids=GOOD)
def test_the_filled_in_labels_are_returned_every_time(labels, path):
  fill(path, *labels)
  before = contents(path)
  for _ in range(2):
    given = person(path, never).ask(3, 1, np.array(ROWS))
    np.testing.assert_array_equal(given, [0, 2, 1])
    assert given.dtype == np.int32
  assert contents(path) == before


def test_skip_and_unsure_are_no_label(path):
  fill(path, 'skip', 'dog', 'Unsure')
  given = person(path).ask(3, 1, ROWS)
  np.testing.assert_array_equal(given, [UNLABELLED, 1, UNLABELLED])


@pytest.mark.parametrize('delimiter', [',', ';', '\t'])
@pytest.mark.parametrize('end', ['\n', '\r\n'])
@pytest.mark.parametrize('mark', [b'', b'\xef\xbb\xbf'])
def test_csv_files_saved_by_spreadsheets_are_read(delimiter, end, mark, path):
  fill(path, 'cat', '"möwe"', ' dog ', end=end, delimiter=delimiter)
  content = answers(path).read_bytes()
  blank = (end + 2 * delimiter + end + end).encode()
  answers(path).write_bytes(mark + content + blank)
  np.testing.assert_array_equal(person(path).ask(3, 1, ROWS), [0, 3, 1])


def test_other_orders_headers_repeats_and_columns_are_accepted(path):
  lines = [
    ' Row, IMAGE ,Label,,',
    f'40,{IMAGES[2]},dog,,',
    f'7,{IMAGES[0]},0',
    f'2,{IMAGES[1]},Mo\u0308we',  # 'ö' as two code points
    f'7,{IMAGES[0]},cat',
  ]
  answers(path).write_text('\n'.join(lines), encoding='utf-8')
  np.testing.assert_array_equal(person(path).ask(3, 1, ROWS), [0, 3, 1])


MEANINGS = [
  # (names, label, class or None if the label is refused)
  (('7', '0', '1'), '0', 1),  # as a name, not as a number
  (('7', '0', '1'), '7', 0),
  (('7', '0', '1'), '2', None),  # a place, but numbers are names here
  (('1', '10', '2'), '0', None),
  (('1', '10', '2'), '1', 0),
  (('1', '10', '2'), '10', 1),
  (('1', '10', '2'), '01', 0),
  (('cat', '7'), '1', None),
  (('cat', '7'), 'cat', 0),
  (('cat', '1', 'dog'), '1', 1),  # a name and its place
  (('cat', '1', 'dog'), '2', 2),
  (('000', '001', '002'), '2', 2),  # spreadsheets drop the zeros
  (('010', '001', '2'), '1', 1),
  (('1', '01'), '1', 0),
  (('1', '01'), '001', None),  # ambiguous
  (('a', 'A'), 'A', 1),
  (('b', 'a', 'A'), ' a ', 1),
  (('ab', 'Ab'), 'AB', None),
  (('cat', 'dog'), 'SKIP', UNLABELLED),
  (('cat', 'dog'), '-1', None),
  (('cat', 'dog'), '1.0', None),
  (('cat', 'dog'), '²', None),  # '²'.isdigit() is true
  (('cat', 'dog'), '9' * 5000, None),
  (('cat', 'cat'), 'cat', None),
]


@pytest.mark.parametrize(('names', 'label', 'expected'), MEANINGS)
def test_a_label_is_a_name_before_it_is_a_number(
  names, label, expected, tmp_path
):
  waits(tmp_path, classes=names)
  fill(tmp_path, label, label, label)
  if expected is None:
    line = refused(tmp_path, classes=names)
    assert re.search('line 2: the label .* is unknown', line)
  else:
    given = person(tmp_path, classes=names).ask(3, 1, ROWS)
    np.testing.assert_array_equal(given, [expected] * 3)


def test_names_alone_count_where_they_are_other_numbers(tmp_path):
  names = sorted(map(str, range(1, 11)))  # 1, 10, 2, ...
  line = waits(tmp_path, classes=names)
  assert 'the name of a class as in classes.txt' in line
  listed = (answers(tmp_path).parent / 'classes.txt').read_text().splitlines()
  assert listed[0].startswith('# ') and listed[1:] == names
  fill(tmp_path, '10', '2', '0')
  line = refused(tmp_path, classes=names)
  assert "line 4: the label '0' is unknown" in line
  assert 'the name of a class as in classes.txt' in line
  fill(tmp_path, '10', '2', '1')
  given = person(tmp_path, classes=names).ask(3, 1, ROWS)
  np.testing.assert_array_equal(given, [1, 2, 0])


@pytest.mark.parametrize(
  ('names', 'expected'),
  [
    (('cat', 'skip'), "class 1 is named 'skip'"),
    (('Unsure ', 'cat'), "class 0 is named 'Unsure'"),
    # Numbers are names, and so no way around an ambiguous name.
    (('7', 'cat', 'cat '), "class 1 is named 'cat'"),
    (('7', ''), "class 1 is named ''"),
    (('7', 'a\nb'), r"class 1 is named 'a\nb'"),
  ],
)
def test_classes_that_cannot_be_named_are_refused(tmp_path, names, expected):
  with pytest.raises(InputError) as raised:
    person(tmp_path, classes=names)
  assert expected in str(raised.value) and '\n' not in str(raised.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'names', [('cat', 'cat'), ('', 'cat'), ('a\nb', 'cat')]
)
def test_ambiguous_names_have_numbers(tmp_path, names):
  assert 'number' in waits(tmp_path, classes=names)
  fill(tmp_path, '1', '0', '1')
  given = person(tmp_path, classes=names).ask(3, 1, ROWS)
  np.testing.assert_array_equal(given, [1, 0, 1])


HEADER = b'row,image,label\n'
FIRST = b'7,001-row-7.png,cat\n'
SECOND = b'2,002-row-2.png,dog\n'
THIRD = b'40,003-row-40.png,1\n'
BAD = {
  'a label is missing': (
    HEADER + FIRST + b'2,002-row-2.png,\n' + THIRD,
    r'line 3: has no label \(002-row-2.png\): .* skip or unsure',
  ),
  'a label is unknown': (
    HEADER + FIRST + b'2,002-row-2.png,bird\n' + THIRD,
    "line 3: the label 'bird' is unknown .* name or number",
  ),
  'a number is too large': (
    HEADER + FIRST + SECOND + b'40,003-row-40.png,4\n',
    "line 4: the label '4' is unknown",
  ),
  'a row has two labels': (
    HEADER + FIRST + SECOND + THIRD + b'7,001-row-7.png,dog\n',
    'line 5: row 7 has another label in line 2: remove one',
  ),
  'a row was not asked about': (
    HEADER + FIRST + SECOND + b'\n' + b'8,001-row-8.png,cat\n' + THIRD,
    "line 5: row '8' is not in this batch: remove",
  ),
  'a row is no number': (
    HEADER + FIRST + b'two,002-row-2.png,dog\n' + THIRD,
    "line 3: row 'two' is not in this batch",
  ),
  'a row is missing': (
    HEADER + FIRST + THIRD,
    '1 of 3 rows are missing, the first is 2: put them back',
  ),
  'images were sorted apart from rows': (
    HEADER + b'2,001-row-7.png,cat\n' + b'7,002-row-2.png,dog\n' + THIRD,
    'line 2: row 2 is the image 002-row-2.png, not .*sorted separately',
  ),
  'a column is missing': (
    HEADER + FIRST + b'2,dog\n' + THIRD,
    'line 3: has 2 columns instead of 3',
  ),
  'a column too many': (
    HEADER + FIRST + b'2,002-row-2.png,dog,brown\n' + THIRD,
    'line 3: has 4 columns instead of 3',
  ),
  'a quote is not closed': (
    HEADER + FIRST + b'2,002-row-2.png,"dog\n' + THIRD,
    'line 3: a quotation mark is not closed',
  ),
  'the header is missing': (
    FIRST + SECOND + THIRD,
    'line 1: the header has to be row,image,label',
  ),
  'the header has other columns': (
    b'image,row,label\n' + FIRST,
    'line 1: the header has to be row,image,label',
  ),
  'nothing is there': (b'', 'line 1: the header has to be row,image,label'),
  'another encoding': (
    HEADER + FIRST + '2,002-row-2.png,Möwe\n'.encode('latin-1') + THIRD,
    'line 3: is not UTF-8: save',
  ),
  'UTF-16': ((HEADER + FIRST).decode().encode('utf-16'), 'line 1: .*UTF-8'),
  'a cell without end': (
    HEADER + FIRST + b'2,002-row-2.png,' + b'x' * 200_000,
    r'line 3: is not valid CSV \(.*\): save',
  ),
}


@pytest.mark.parametrize(('content', 'expected'), BAD.values(), ids=BAD)
def test_invalid_answers_are_refused_in_one_line_and_not_changed(
  content, expected, path
):
  answers(path).write_bytes(content)
  line = refused(path)
  assert line.startswith(str(answers(path)))
  assert re.search(expected, line), line


def test_answers_without_any_label_are_waited_for(path):
  fill(path, '', ' ', '')
  assert str(answers(path)) in waits(path, read=never)


def test_deleted_answers_are_not_created_again(path):
  answers(path).unlink()
  assert 'is missing: put it back' in refused(path)


@pytest.mark.parametrize(
  ('question', 'digest'),
  [
    ((3, 1, [7, 2, 41]), DIGEST),
    ((3, 1, [2, 7, 40]), DIGEST),
    ((3, 1, ROWS), 'c3d4'),
  ],
)
def test_a_folder_of_another_run_or_state_is_refused(question, digest, path):
  fill(path, 'cat', 'cat', 'dog')
  line = refused(path, *question, digest=digest)
  assert 'batch.json: the folder belongs to another run' in line


@pytest.mark.parametrize(
  'content', [None, b'{', b'\xff', b'[]', b'[' * 200_000, b'{"a":' * 200_000]
)
def test_a_folder_without_a_valid_batch_json_is_refused(content, path):
  identity = answers(path).parent / 'batch.json'
  identity.unlink()
  if content is not None:
    identity.write_bytes(content)
  assert 'belongs to another run' in refused(path)


@pytest.mark.parametrize('name', ['answers.csv', 'batch.json'])
@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_is_not_read(name, make, path):
  file = answers(path).with_name(name)
  file.unlink()
  make(file)
  assert f'{name}: is no regular file' in refused(path)


def test_an_endless_file_is_not_read(path, monkeypatch):
  monkeypatch.setattr(oracle, '_MAX_BYTES', 1000)
  answers(path).write_bytes(HEADER + b'x' * 1000)
  assert 'has more than 1000 bytes' in refused(path)
  answers(path).unlink()
  answers(path).symlink_to('/dev/zero')
  with pytest.raises(InputError, match='is no regular file'):
    person(path, never).ask(3, 1, ROWS)


def test_the_folder_may_begin_at_home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  with pytest.raises(oracle.WaitingError):
    person('~/questions').ask(3, 1, ROWS)
  assert (tmp_path / 'questions' / 'seed-3').is_dir()


def test_answers_of_another_batch_are_recognised(path):
  fill(path, 'cat', 'cat', 'dog')
  with pytest.raises(oracle.WaitingError):
    person(path).ask(3, 2, [1, 5, 6])
  other = answers(path).parent.with_name('batch-0002') / 'answers.csv'
  other.write_bytes(answers(path).read_bytes())
  assert "line 2: row '7' is not in this batch" in refused(
    path, 3, 2, [1, 5, 6]
  )


def test_batches_and_seeds_have_folders_of_their_own(path):
  for seed, number in ((3, 2), (4, 1)):
    with pytest.raises(oracle.WaitingError) as raised:
      person(path).ask(seed, number, [1])
    where = os.path.join(f'seed-{seed}', f'batch-{number:04d}', 'answers.csv')
    assert where in str(raised.value)
  fill(path, 'cat', 'dog', 'dog')
  np.testing.assert_array_equal(person(path).ask(3, 1, ROWS), [0, 1, 1])


def test_an_interrupted_folder_is_written_again(tmp_path, monkeypatch):
  def killed(path, lines):
    if path.name == 'batch.json':
      raise KeyboardInterrupt
    path.write_text('half')

  with monkeypatch.context() as patch:
    patch.setattr(oracle, '_write_lines', killed)
    with pytest.raises(KeyboardInterrupt):
      person(tmp_path).ask(3, 1, ROWS)
  assert not answers(tmp_path).parent.exists()
  waits(tmp_path)
  assert list(answers(tmp_path).parent.parent.iterdir()) == [
    answers(tmp_path).parent
  ]
  assert json.loads((answers(tmp_path).parent / 'batch.json').read_text()) == {
    'run': DIGEST,
    'seed': 3,
    'batch': 1,
    'rows': ROWS,
  }


def test_a_folder_that_cannot_be_created_is_refused_in_one_line(tmp_path):
  (tmp_path / 'file').write_text('in the way')
  with pytest.raises(InputError, match=r'file.*cannot be read or written'):
    person(tmp_path / 'file').ask(3, 1, ROWS)


def test_a_repeated_row_is_refused(tmp_path):
  assert 'row 2: is in the batch twice' in refused(tmp_path, 3, 1, [2, 7, 2])


def test_points_are_not_shown_to_a_person(tmp_path):
  data = datasets.load('yin-yang')
  with pytest.raises(InputError, match='no images that a person'):
    person(tmp_path, data.train.read, data.classes).ask(0, 1, [1])
  assert not list(tmp_path.iterdir())


def test_names_with_commas_are_read_in_quotes(tmp_path):
  names = ('dog, brown', 'dog, black')
  waits(tmp_path, classes=names)
  with answers(tmp_path).open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(oracle.COLUMNS)
    given = zip(ROWS, IMAGES, (names[1], names[0], names[1]), strict=True)
    writer.writerows(given)
  labels = person(tmp_path, classes=names).ask(3, 1, ROWS)
  np.testing.assert_array_equal(labels, [1, 0, 1])
