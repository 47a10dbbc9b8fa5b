from folders import image, write
import numpy as np
import pytest

from ssljax.core import UNLABELLED
from ssljax.data import folder, splits
from ssljax.errors import InputError

CLASSES = {
  'cat/a.png': image(10),
  'cat/deep/b.png': image(20),
  'dog/c.png': image(30),
  'unlabelled/d.png': image(40),
}


def test_class_folders_give_labels_and_names(tmp_path):
  found = folder.load(write(tmp_path, CLASSES))
  assert found.classes == ('cat', 'dog')
  assert found.train.names.tolist() == sorted(CLASSES)
  assert found.train.labels.tolist() == [0, 0, 1, UNLABELLED]
  assert len(found.test.labels) == 0
  # The shorter side is 4; images are grey.
  assert found.train.shape == (4, 4, 1)
  assert found.train.read([2])[0, 0, 0, 0] == 30
  assert found.train.read([3, 0])[:, 1, 1, 0].tolist() == [40, 10]


@pytest.mark.parametrize('held_out', ['test', 'val', 'validation'])
def test_folders_of_splits_are_recognised(tmp_path, held_out):
  files = {f'train/{name}': pixels for name, pixels in CLASSES.items()}
  files |= {f'{held_out}/dog/e.png': image(50), 'unlabelled/f.png': image(60)}
  found = folder.load(write(tmp_path, files))
  assert found.test.labels.tolist() == [1]
  assert found.test.read([0])[0, 0, 0, 0] == 50
  assert found.train.labels.tolist() == [0, 0, 1, -1, -1]
  assert len(folder.load(str(tmp_path), with_test=False).test.labels) == 0


def test_a_class_may_be_called_train(tmp_path):
  files = {'train/a.png': image(1), 'bus/b.png': image(2)}
  assert folder.load(write(tmp_path, files)).classes == ('bus', 'train')


def labelled(tmp_path, text, name='labels.csv', encoding='utf-8'):
  root = write(tmp_path / 'images', {f'{x}.png': image(9) for x in 'abcd'})
  path = tmp_path / name
  path.write_bytes(text.encode(encoding))
  return lambda: folder.load(root, str(path))


@pytest.mark.parametrize(
  ('name', 'text'),
  [
    ('labels.csv', 'label,file\ndog,c.png\ncat,a.png\n,b.png\n'),
    ('labels.csv', '\ufeffFile , Label\r\na.png,cat\r\nc.png,"dog"\r\n'),
    ('labels.txt', 'a.png cat\n\nc.png\tdog\nb.png\n'),
  ],
)
def test_a_file_gives_labels_and_the_others_have_none(tmp_path, name, text):
  found = labelled(tmp_path, text, name)()
  assert found.classes == ('cat', 'dog')
  assert found.train.labels.tolist() == [0, -1, 1, -1]


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('file,label\nx.png,cat\n', r"line 2: 'x.png' is not an image in"),
    ('file,label\na.png,cat\na.png,dog\n', "line 3: .* 'dog', but 'cat'"),
    ('name,class\na.png,cat\n', r'lacks the column file, label \(it has name'),
    ('file,label\n', 'lists no file'),
    ('file,label\na.png,\n', 'no image has a label'),
    ('file,label\na.png,Cat\nb.png,cat\n', "'Cat' and 'cat' differ only in"),
    ('file,label\na.png,cat\nb.png,cat\n', "all labelled .* class 'cat'"),
  ],
)
def test_a_wrong_file_of_labels_is_named(tmp_path, text, message):
  with pytest.raises(InputError, match=message):
    labelled(tmp_path, text)()


def test_labels_of_another_encoding_are_refused(tmp_path):
  text = 'file,label\na.png,Fähre\nb.png,bus\n'
  with pytest.raises(InputError, match='is not UTF-8 text'):
    labelled(tmp_path, text, encoding='latin-1')()
  assert labelled(tmp_path, text)().classes == ('Fähre', 'bus')
  with pytest.raises(InputError, match=r'\(No such file or directory\): give'):
    folder.load(str(tmp_path / 'images'), str(tmp_path / 'none.csv'))


def test_unreadable_files_are_listed_once_and_left_out(tmp_path, caplog):
  whole = write(tmp_path, CLASSES | {'cat/.hidden.png': b'x'})
  content = (tmp_path / 'dog/c.png').read_bytes()
  write(
    tmp_path,
    {'dog/cut.png': content[:-30], 'cat/text.jpg': b'no', 'cat/note.txt': b''},
  )
  found = folder.load(whole)
  assert found.train.names.tolist() == sorted(CLASSES)
  said = [r.getMessage() for r in caplog.records if 'decoded' in r.getMessage()]
  assert len(said) == 1 and '2 images' in said[0]
  assert (
    'cat/text.jpg (no image that Pillow can read)' in said[0]
    and 'dog/cut.png' in said[0]
  )


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ({}, 'has no image files'),
    ({'a.png': image(1)}, 'no image lies in the folder of a class'),
    ({'cat/a.png': b'no', 'dog/b.png': b'no'}, 'none of its 2 images can be'),
    ({'cat/a.png': image(1), 'dog/b.png': b''}, "have the class 'cat'"),
    (
      {'train/cat/a.png': image(1), 'test/dog/b.png': image(2)},
      'no training image has the class dog',
    ),
  ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, files, message):
  with pytest.raises(InputError, match=message):
    folder.load(write(tmp_path, files))


def test_modes_and_sizes_become_images_of_one_shape(tmp_path):
  files = {
    'cat/grey.png': image(200, (8, 8)),
    'cat/alpha.png': image((0, 0, 0, 0), (30, 9), 'RGBA'),  # white
    'dog/ink.tif': image((0, 0, 0, 255), (9, 30), 'CMYK'),  # black
    'dog/red.bmp': image((255, 0, 0), (8, 8), 'RGB'),
  }
  found = folder.load(write(tmp_path, files)).train
  # Sorted: alpha, grey, ink, red; the median of the sides 9, 8, 9, 8 is 8.
  assert found.shape == (8, 8, 3)
  expected = [[255] * 3, [200] * 3, [0] * 3, [255, 0, 0]]
  assert found.read(range(4))[:, 4, 4].tolist() == expected
  assert folder.load(str(tmp_path), image_size=5).train.shape == (5, 5, 3)


def test_grey_images_stored_in_colour_have_one_channel(tmp_path):
  files = {'cat/a.png': image((9, 9, 9), mode='RGB'), 'dog/b.png': image(7)}
  assert folder.load(write(tmp_path, files)).train.shape == (4, 4, 1)


def test_large_folders_are_decoded_whenever_they_are_read(
  tmp_path, monkeypatch
):
  root = write(tmp_path, CLASSES)
  resident = folder.load(root).train.read(range(4))
  monkeypatch.setattr(folder, 'RESIDENT_BYTES', 63)  # of 64 pixels
  streamed = folder.load(root).train
  np.testing.assert_array_equal(streamed.read(range(4)), resident)
  (tmp_path / 'dog/c.png').write_bytes(b'')
  with pytest.raises(
    InputError, match=r'dog/c\.png cannot be decoded any more'
  ):
    streamed.read([1, 2])


# Rows to test on.


def test_five_seeds_test_on_every_label_and_train_on_the_others():
  labels = np.array([0] * 10 + [1] * 5 + [UNLABELLED] * 4)
  tests = [splits.hold_out(labels, np.arange(19), seed) for seed in range(5)]
  assert sorted(np.concatenate(tests).tolist()) == list(range(15))
  for rows in tests:  # 2 of 10 and 1 of 5
    assert np.bincount(labels[rows]).tolist() == [2, 1]
  np.testing.assert_array_equal(
    tests[1], splits.hold_out(labels, np.arange(19), 6)
  )


def test_of_many_labels_a_fifth_is_held_out_for_all_seeds():
  labels = np.repeat([0, 1], [150, 50])
  first, second = (
    splits.hold_out(labels, np.arange(200), seed) for seed in (0, 3)
  )
  np.testing.assert_array_equal(first, second)
  assert np.bincount(labels[first]).tolist() == [30, 10]


def test_the_only_image_of_a_class_is_trained_on():
  labels = np.array([0, 0, 1])
  for seed in range(5):
    assert 2 not in splits.hold_out(labels, np.arange(3), seed)


def test_copies_of_test_images_are_not_trained_on():
  truth = np.array([0, 0, 1, 1, UNLABELLED, UNLABELLED])
  copies = np.array([7, 8, 9, 10, 7, 8], np.uint64)  # rows 4, 5 are 0, 1
  for seed in range(5):
    split = splits.draw_split(
      truth, 2, per_class=None, seed=seed, test_on=copies
    )
    zero = 0 if 0 in split.test else 1
    assert len(split.test) == 2 and zero in split.test
    np.testing.assert_array_equal(split.labels[split.test], UNLABELLED)
    assert split.unlabelled.tolist() == [5 - zero]
    assert not split.seen()[split.test].any()
    assert not split.seen()[4 + zero]


def test_the_digest_and_the_record_of_a_split_know_its_test_rows():
  truth, copies = np.repeat([0, 1], 4), np.arange(8).astype(np.uint64)
  draw = lambda **how: splits.draw_split(
    truth, 2, per_class=None, seed=0, **how
  )
  split = draw(test_on=copies)
  assert splits.describe(split)['test'] == split.test.tolist()
  assert 'test' not in splits.describe(draw())
  assert split.digest != split._replace(test=split.test[:0]).digest
