"""Data sets from arrays and .npz files, of images and of features."""

import io
import os
import pathlib
import subprocess
import tracemalloc
import zipfile

import numpy as np
import PIL.Image
import pytest

from ssljax.data import arrays, catalog, datasets, npz, splits
from ssljax.errors import InputError

FEATURES = np.random.default_rng(0).normal(size=(7, 3))  # float64
LABELS = np.array([0, 2, -1, 1, 0, -1, 2])
PIXELS = np.random.default_rng(1).integers(0, 256, (7, 4, 5, 3), np.uint8)


def error(function, *args, **kwargs):
  """The message of a refusal, which must be one line."""
  with pytest.raises(InputError) as raised:
    function(*args, **kwargs)
  assert '\n' not in str(raised.value)
  return str(raised.value)


# Rows of every accepted form.


def test_features_are_rows_of_the_shape_that_the_user_gave():
  data = arrays.from_arrays(FEATURES, LABELS, FEATURES[:2], [1, 0])
  assert not data.train.is_images and data.train.dtype == np.float32
  assert data.train.row_shape == data.test.row_shape == (3,)
  np.testing.assert_array_equal(data.train.labels, LABELS)
  assert data.train.labels.dtype == np.int32
  np.testing.assert_array_equal(data.test.labels, [1, 0])
  rows = data.train.read(np.array([6, 1, 6]))
  assert rows.shape == (3, *data.train.shape)
  expected = FEATURES.astype(np.float32)[[6, 1, 6]]
  np.testing.assert_array_equal(rows.reshape(3, 3), expected)
  assert data.classes == ('0', '1', '2')


def test_integer_features_are_features_too():
  data = arrays.from_arrays(np.arange(14, dtype=np.uint8).reshape(7, 2), LABELS)
  assert not data.train.is_images
  np.testing.assert_array_equal(data.train.read([3]).ravel(), [6, 7])


def test_uint8_images_are_kept_and_grey_ones_get_a_channel():
  data = arrays.from_arrays(PIXELS, LABELS)
  assert data.train.is_images and data.train.row_shape == (4, 5, 3)
  np.testing.assert_array_equal(datasets.arrays(data.train), PIXELS)
  grey = arrays.from_arrays(PIXELS[..., 0], LABELS)
  assert grey.train.row_shape == (4, 5, 1)
  np.testing.assert_array_equal(datasets.arrays(grey.train), PIXELS[..., :1])


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_float_images_are_rounded_to_bytes(dtype):
  values = np.array([0, 0.25, 0.5, 0.75, 1, 0.8], dtype)
  images = np.tile(values.reshape(1, 2, 3), (7, 1, 1))
  got = datasets.arrays(arrays.from_arrays(images, LABELS).train)
  # 63.75, 127.5 (a half rounds up), 191.25, 255, 204.
  expected = [0, 64, 128, 191, 255, 204]
  np.testing.assert_array_equal(got[3].ravel(), expected)
  wide = arrays.from_arrays(
    np.tile(np.float32([[0.4, 127.6, 255]]), (7, 2, 1)), LABELS
  )
  np.testing.assert_array_equal(
    datasets.arrays(wide.train)[5, 1].ravel(), [0, 128, 255]
  )


def test_images_divided_by_255_are_the_same_images():
  got = datasets.arrays(arrays.from_arrays(PIXELS / 255, LABELS).train)
  np.testing.assert_array_equal(got, PIXELS)


def test_images_of_other_integers_are_bytes():
  got = datasets.arrays(
    arrays.from_arrays(PIXELS.astype(np.int64), LABELS).train
  )
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got, PIXELS)


def test_lists_are_arrays():
  data = arrays.from_arrays([[1.5, 2], [3, 4]], [1, 0])
  np.testing.assert_array_equal(data.train.read([1]).ravel(), [3, 4])


def test_images_can_be_resized_and_features_cannot():
  data = arrays.from_arrays(PIXELS, LABELS, PIXELS[:2], [0, 1], image_size=2)
  assert data.train.shape == data.test.shape == (2, 2, 3)
  # A side of 4 becomes 2 and a side of 5 round(2.5) = 2, which is all kept.
  half = PIL.Image.fromarray(PIXELS[1]).resize((2, 2), PIL.Image.BILINEAR)
  np.testing.assert_array_equal(data.train.read([1])[0], half)
  np.testing.assert_array_equal(data.test.read([1])[0], half)
  grey = arrays.from_arrays(PIXELS[..., 0], LABELS, image_size=2)
  assert datasets.arrays(grey.train).shape == (7, 2, 2, 1)
  said = error(arrays.from_arrays, FEATURES, LABELS, image_size=2)
  assert said.startswith('image_size=2') and 'features' in said


def test_without_test_images_the_test_split_is_empty():
  for rows in (FEATURES, PIXELS):
    data = arrays.from_arrays(rows, LABELS)
    assert data.test.labels.shape == (0,)
    assert data.test.labels.dtype == np.int32
    empty = datasets.arrays(data.test)
    assert empty.shape == (0, *data.train.shape)
    assert empty.dtype == data.train.dtype
    assert data.test.is_images == data.train.is_images


def test_classes_are_named_or_counted():
  assert arrays.from_arrays(FEATURES, LABELS, classes=5).classes == tuple(
    '01234'
  )
  named = arrays.from_arrays(FEATURES, LABELS, classes=['cat', 'dog', 'eel'])
  assert named.classes == ('cat', 'dog', 'eel')
  # The largest label may be in the test set alone.
  data = arrays.from_arrays(FEATURES, LABELS, FEATURES, [3] * 7)
  assert len(data.classes) == 4


def test_a_data_set_of_arrays_is_split_like_any_other():
  data = arrays.from_arrays(FEATURES, LABELS)
  split = splits.draw_split(
    data.train.labels, data.classes, per_class=1, seed=0
  )
  np.testing.assert_array_equal(
    split.labels[split.labelled], LABELS[split.labelled]
  )
  assert len(split.labelled) == 3
  assert {2, 5} <= set(split.unlabelled)  # rows without a label


# What is refused, by the name of the argument.


def with_value(array, row, value):
  changed = array.copy()
  changed[row] = value
  return changed


REFUSED = [
  (dict(images=FEATURES[0]), 'images: has shape (3,)'),
  (dict(images=PIXELS[None]), 'images: has shape (1, 7, 4, 5, 3)'),
  (dict(images=FEATURES.astype(object)), 'images: has dtype object'),
  (dict(images=FEATURES.astype(complex)), 'images: has dtype complex'),
  (dict(images=FEATURES > 0), 'images: has dtype bool'),
  (dict(images=FEATURES.astype(str)), 'images: has dtype <U'),
  (dict(images=[[1], [1, 2]]), 'images: cannot be made an array'),
  (dict(images=FEATURES[:0], labels=[]), 'images: has shape (0, 3)'),
  (dict(images=FEATURES[:, :0]), 'images: has shape (7, 0)'),
  (dict(images=with_value(FEATURES, 4, np.nan)), '1 rows hold NaN'),
  (dict(images=with_value(FEATURES, 4, -np.inf)), 'the first is row 4'),
  (dict(images=1e300 * FEATURES), 'images: 7 rows hold NaN or infinite'),
  (dict(images=PIXELS.transpose(0, 3, 1, 2)), 'c = 1 (grey) or 3 (colour)'),
  (dict(images=with_value(PIXELS / 255, 2, np.nan)), 'the first is row 2'),
  (dict(images=with_value(PIXELS / 255, 2, -0.1)), 'values from -0.1 to 1'),
  (dict(images=with_value(PIXELS / 1.0, 2, 256)), 'to 256; give'),
  (dict(images=PIXELS.astype(int) - 1), 'values from -1 to'),
  (dict(images=PIXELS / 16), 'neither in [0, 1] nor clearly in [0, 255]'),
  (dict(labels=LABELS[:6]), 'labels: has 6 labels for 7 rows'),
  (dict(labels=np.eye(7)), 'labels: has shape (7, 7)'),
  (dict(labels=LABELS * 1.0), 'labels: has dtype float64'),
  (dict(labels=LABELS > 0), 'labels: has dtype bool'),
  (dict(labels=list('abcabca')), 'labels: has dtype <U1'),
  (dict(labels=[-1] * 7), 'labels: every label is -1'),
  (dict(labels=[0] * 6 + [-1], classes=3), 'labels: only class 0 is labelled'),
  (dict(labels=LABELS * 3), 'labels: class 1 has no example, but class 6 has'),
  (dict(labels=with_value(LABELS, 1, -2)), 'the first is -2 in row 1'),
  (dict(classes=['a', 'b']), 'the first is 2 in row 1'),
  (dict(classes=2), 'labels: 2 labels lie outside the 2 classes'),
  (dict(classes=['a', 'b', 'b']), "classes: is ['a', 'b', 'b']"),
  (dict(classes='abc'), "classes: is 'abc'"),
  (dict(classes=3.0), 'classes: is 3.0'),
  (dict(test_images=FEATURES), 'test_labels: is missing'),
  (dict(test_labels=[0]), 'test_images: is missing'),
  (
    dict(test_images=FEATURES[:, 1:], test_labels=[0] * 7),
    'test_images: rows have shape (2,), training rows (3,)',
  ),
  (
    dict(test_images=PIXELS, test_labels=[0] * 7),
    'test_images: rows have shape (4, 5, 3), training rows (3,)',
  ),
  (
    dict(test_images=FEATURES, test_labels=LABELS),
    'test_labels: 2 test rows are unlabelled, the first is row 2',
  ),
  (
    dict(test_images=FEATURES, test_labels=[0, 3] * 3 + [1], classes=3),
    'test_labels: 3 labels lie outside the 3 classes, the first is 3 in row 1',
  ),
]


@pytest.mark.parametrize(('arguments', 'expected'), REFUSED)
def test_unusable_arrays_are_refused_by_name(arguments, expected):
  arguments = dict(images=FEATURES, labels=LABELS) | arguments
  assert expected in error(arrays.from_arrays, **arguments)


def test_labels_of_any_integer_type_are_compared_as_integers():
  # Mixed with int64, uint64 would become float64.
  labels = np.array([0, 1, 1], np.uint64)
  data = arrays.from_arrays(FEATURES[:3], labels, FEATURES[:1], [0])
  np.testing.assert_array_equal(data.train.labels, [0, 1, 1])
  assert data.train.labels.dtype == np.int32


# Files.


def save(path: pathlib.Path, **changed):
  content = dict(
    train=FEATURES,
    train_labels=LABELS,
    test=FEATURES[:2],
    test_labels=np.array([1, 0]),
  )
  content |= changed
  np.savez(path, **{k: v for k, v in content.items() if v is not None})
  return str(path)


def test_a_file_of_features_is_loaded_by_its_path(tmp_path):
  path = save(tmp_path / 'f.npz', classes=np.array(['x', 'y', 'z']))
  data = datasets.load(path)
  assert data.name == path and data.classes == ('x', 'y', 'z')
  expected = FEATURES.astype(np.float32)
  np.testing.assert_array_equal(
    datasets.arrays(data.train).reshape(7, 3), expected
  )
  np.testing.assert_array_equal(
    datasets.arrays(data.test).reshape(2, 3), expected[:2]
  )
  np.testing.assert_array_equal(data.train.labels, LABELS)
  np.testing.assert_array_equal(data.test.labels, [1, 0])


def test_a_file_of_images_is_loaded_and_resized(tmp_path):
  path = save(tmp_path / 'i.npz', train=PIXELS, test=PIXELS[:2])
  assert datasets.load(path).test.row_shape == (4, 5, 3)
  assert datasets.load(path, image_size=9).train.row_shape == (9, 9, 3)


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  save(tmp_path / 'f.npz')
  assert datasets.load('~/f.npz').train.row_shape == (3,)


def test_a_file_may_lack_test_arrays(tmp_path):
  path = save(tmp_path / 'f.npz', test=None, test_labels=None)
  assert len(datasets.load(path).test.labels) == 0
  said = error(datasets.load, path, test_split='test')
  assert 'test_split=test' in said and 'train' in said


def test_either_split_of_a_file_can_be_trained_on(tmp_path):
  path = save(tmp_path / 'f.npz', train_labels=np.arange(7) % 3)
  data = datasets.load(path, train_split='test', test_split='train')
  np.testing.assert_array_equal(data.train.labels, [1, 0])
  np.testing.assert_array_equal(data.test.labels, np.arange(7) % 3)
  assert 'train_split=dev' in error(datasets.load, path, train_split='dev')


def test_rows_to_train_on_are_not_tested_on(tmp_path):
  path = save(tmp_path / 'f.npz')
  for load in (datasets.load, catalog.outline):
    said = error(load, path, train_split='test')
    assert said.startswith('train_split=test, test_split=test: the test images')
    assert 'give test_split=train' in said
    said = error(load, path, test_split='train')
    assert 'give test_split=test' in said
    assert 'would be trained on' in error(load, 'digits', train_split='test')
  # Without test rows there is nothing to overlap.
  data = datasets.load(path, train_split='test', with_test=False)
  assert len(data.train.labels) == 2 and len(data.test.labels) == 0
  assert data.test.shape == data.train.shape


def test_rows_without_a_label_are_not_tested_on(tmp_path):
  path = save(tmp_path / 'f.npz')
  how = dict(train_split='test', test_split='train')
  assert 'test_split=train: some of its rows' in error(
    datasets.load, path, **how
  )


def test_the_outline_of_a_file_is_that_of_its_data_set(tmp_path):
  path = save(tmp_path / 'f.npz')
  outline = catalog.outline(path)
  assert len(outline.train.labels) == 7 and len(outline.test.labels) == 2
  assert outline.train.row_shape == (3,) and outline.train.dtype == np.float32


def truncate(path):
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])


def damage(path):
  """Overwrites bytes of an array, which leaves the archive's index intact."""
  content = bytearray(path.read_bytes())
  content[200:240] = bytes(40)
  path.write_bytes(content)


def as_npy(path):
  with path.open('wb') as file:
    np.save(file, FEATURES)


def as_text(path):
  path.write_text('1,2,3\n')


def as_folder(path):
  path.unlink()
  path.mkdir()


@pytest.mark.parametrize(
  ('spoil', 'reason'),
  [
    (pathlib.Path.unlink, 'No such file'),
    (truncate, 'truncated'),
    (damage, ''),
    (as_npy, 'no zip archive'),
    (as_text, 'no zip archive'),
    (as_folder, ''),
  ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, spoil, reason):
  path = tmp_path / 'f.npz'
  save(path)
  spoil(path)
  said = error(datasets.load, str(path))
  assert said.startswith(f'dataset={path}: cannot be read')
  assert reason in said and 'np.savez' in said


def test_python_objects_are_not_unpickled(tmp_path):
  class Bomb:
    def __reduce__(self):
      return subprocess.check_call, (['touch', str(tmp_path / 'exploded')],)

  path = save(tmp_path / 'f.npz', train=np.array([Bomb()] * 7, object))
  assert 'allow_pickle=False' in error(datasets.load, path)
  assert not (tmp_path / 'exploded').exists()


@pytest.mark.parametrize(
  ('changed', 'expected'),
  [
    (
      dict(train=None, x=FEATURES),
      'lacks the array train (it has train_labels',
    ),
    (dict(train_labels=None), 'lacks the array train_labels'),
    (dict(test_labels=None), 'array test_labels: is missing'),
    (
      dict(train_labels=LABELS[:3]),
      'array train_labels: has 3 labels for 7 rows',
    ),
    (dict(test=FEATURES[:2, 1:]), 'array test: rows have shape (2,)'),
    (dict(classes=np.array(['a', 'b'])), 'outside the 2 classes'),
    (dict(classes=np.array(['a', 'a', 'b'])), 'array classes: is'),
  ],
)
def test_unusable_arrays_of_a_file_are_refused_by_name(
  tmp_path, changed, expected
):
  path = save(tmp_path / 'f.npz', **changed)
  said = error(datasets.load, path)
  assert said.startswith(f'dataset={path}') and expected in said


# Files that nobody vouches for.


def member(array, shape=None, **more):
  """The bytes of an .npy member, with another shape in its header."""
  file = io.BytesIO()
  np.lib.format.write_array(file, np.asarray(array), **more)
  content = file.getvalue()
  if shape is not None:
    header = io.BytesIO()
    told = dict(
      descr=np.asarray(array).dtype.str, fortran_order=False, shape=shape
    )
    np.lib.format.write_array_header_1_0(header, told)
    content = header.getvalue() + np.asarray(array).tobytes()
  return content


def with_header(text, version=1):
  """An .npy member whose header is this text."""
  text = text.encode()
  length = len(text).to_bytes(2 * version, 'little')
  return b'\x93NUMPY' + bytes([version, 0]) + length + text


def archive(path, members, method=zipfile.ZIP_STORED):
  """Write members by name; the labels are good unless they are given."""
  good = {'train_labels.npy': member(LABELS)}
  with zipfile.ZipFile(path, 'w', method) as file:
    for name, content in (good | members).items():
      file.writestr(name, content)
  return str(path)


def patched(path, old, new):
  """Replace bytes in a file, as often as they occur."""
  content = path.read_bytes()
  assert old in content and len(old) == len(new)
  path.write_bytes(content.replace(old, new))
  return str(path)


NESTED = "{'descr': '<f8', 'fortran_order': False, 'shape': (%s1,)}\n"
HOSTILE = {
  'no .npy': ({'train': member(FEATURES)}, 'has train_labels, train (not .npy'),
  'empty': ({'train.npy': b''}, 'the array train is empty'),
  'magic only': ({'train.npy': b'\x93NUMPY'}, 'cannot be read'),
  'no numpy': ({'train.npy': b'1,2,3,4,5,6,7,8,9'}, 'cannot be read'),
  'huge': (
    {'train.npy': member(FEATURES, (2**40, 2**10))},
    '168 bytes of data',
  ),
  'overflow': ({'train.npy': member(FEATURES, (2**32, 2**32))}, '168 bytes'),
  'no rows': ({'train.npy': member(FEATURES, (0, 10**30))}, '168 bytes'),
  'negative': ({'train.npy': member(FEATURES, (-7, -3))}, '168 bytes'),
  'too short': ({'train.npy': member(FEATURES, (8, 3))}, '168 bytes'),
  'too long': ({'train.npy': member(FEATURES, (6, 3))}, '168 bytes'),
  'endless names': (
    {
      'train.npy': member(FEATURES),
      'classes.npy': with_header(
        "{'descr': '<U0', 'fortran_order': False, 'shape': (10000000000,)}\n"
      ),
    },
    'the array classes has dtype <U0',
  ),
  'nested minus': ({'train.npy': with_header(NESTED % ('-' * 9000))}, 'train'),
  'nested brackets': (
    {'train.npy': with_header(NESTED % ('(' * 4000))},
    'cannot be read',
  ),
  'a long header': (
    {'train.npy': with_header('x' * 2_000_000, version=2)},
    'the header of the array train has 2000000 bytes',
  ),
  'another format': (
    {'train.npy': b'\x93NUMPY\x09\x00' + bytes(99)},
    'unknown format (9, 0)',
  ),
  'a structure': (
    {'train.npy': member(np.zeros(7, [('a', 'f4'), ('b', 'i4')]))},
    'the array train has dtype [',
  ),
  'names of no text': (
    {'train.npy': member(FEATURES), 'classes.npy': member([b'a', b'\xff'])},
    r"array classes: the name b'\xff' is not UTF-8",
  ),
  'one name': (
    {'train.npy': member(FEATURES), 'classes.npy': member('abc')},
    "array classes: is 'abc'",
  ),
}


@pytest.mark.parametrize(
  ('members', 'expected'), HOSTILE.values(), ids=HOSTILE.keys()
)
@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_hostile_array_is_refused_before_memory_is_taken(
  tmp_path, members, expected, method
):
  path = archive(tmp_path / 'f.npz', members, method)
  tracemalloc.start()
  said = error(datasets.load, path)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert expected in said and said.startswith(f'dataset={path}')
  assert peak < 2**25 and len(said) < 1000


def test_sizes_that_the_file_cannot_hold_are_refused(tmp_path):
  # 10⁹ doubles said in the header and in both directories of the archive.
  head = member(FEATURES, (10**9,))[:128]
  path = tmp_path / 'f.npz'
  archive(path, {'train.npy': head + bytes(80)})
  sizes = 2 * (208).to_bytes(4, 'little')
  claimed = 2 * (8 * 10**9 % 2**32).to_bytes(4, 'little')
  said = error(datasets.load, patched(path, sizes, claimed))
  assert 'which cannot be in a file of' in said


def test_other_compressions_and_encryption_are_named(tmp_path):
  path = tmp_path / 'f.npz'
  archive(path, {'train.npy': member(FEATURES)}, zipfile.ZIP_BZIP2)
  assert 'unknown compression 12' in error(datasets.load, str(path))
  archive(path, {'train.npy': member(FEATURES)})
  with zipfile.ZipFile(path) as file:
    flags = file.infolist()[0].flag_bits
  assert flags == 0
  content = bytearray(path.read_bytes())
  for signature, offset in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
    start = 0
    while (start := content.find(signature, start)) >= 0:
      content[start + offset] |= 1
      start += 4
  path.write_bytes(content)
  assert 'is encrypted' in error(datasets.load, str(path))


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_two_arrays_of_one_name_are_refused(tmp_path):
  path = tmp_path / 'f.npz'
  archive(path, {'train.npy': member(FEATURES)})
  with zipfile.ZipFile(path, 'a') as file:
    file.writestr('train.npy', member(FEATURES))
  assert 'it has 2 arrays named train' in error(datasets.load, str(path))


def test_more_data_than_memory_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(npz, '_physical_memory', lambda: 100)
  assert '168 bytes, this machine 100' in error(
    datasets.load, save(tmp_path / 'f.npz')
  )


def test_a_changed_byte_of_an_array_is_noticed(tmp_path):
  path = tmp_path / 'f.npz'
  save(path)
  raw = FEATURES.tobytes()
  said = error(datasets.load, patched(path, raw, raw[:-1] + b'\x00'))
  assert 'CRC' in said


def test_a_pipe_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / 'f.npz')
  assert 'no regular file' in error(datasets.load, str(tmp_path / 'f.npz'))


def test_arrays_of_either_order_and_compression_are_read(tmp_path):
  fortran = np.asfortranarray(FEATURES)
  np.savez_compressed(tmp_path / 'f.npz', train=fortran, train_labels=LABELS)
  data = datasets.load(str(tmp_path / 'f.npz'))
  expected = FEATURES.astype(np.float32)
  np.testing.assert_array_equal(
    datasets.arrays(data.train).reshape(7, 3), expected
  )


def test_a_path_begins_at_home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  save(tmp_path / 'f.npz')
  assert len(datasets.load('~/f.npz').train.labels) == 7
  assert 'cannot be read' in error(datasets.load, '~nobody-here/f.npz')


@pytest.mark.parametrize('dtype', [np.int64, np.uint64])
def test_labels_that_do_not_fit_in_32_bits_are_refused(tmp_path, dtype):
  labels = np.where(LABELS < 0, 0, LABELS).astype(dtype)
  for value in (2**32, 2**40, np.iinfo(dtype).max):
    labels[3] = value  # as int32: 0, 0 and -1
    for more in (dict(), dict(classes=np.array(['a', 'b', 'c']))):
      path = save(tmp_path / 'f.npz', train_labels=labels, **more)
      assert str(value) in error(datasets.load, path)
      path = save(tmp_path / 'f.npz', test_labels=labels[[2, 3]], **more)
      assert str(value) in error(datasets.load, path)


def test_a_number_of_classes_has_a_limit():
  said = error(arrays.from_arrays, FEATURES, LABELS, classes=10**9)
  assert said.startswith('classes: 1000000000 classes are more than')


def test_a_side_has_a_limit():
  for load in (datasets.load, catalog.outline):
    said = error(load, 'digits', image_size=100_000)
    assert said == 'image_size=100000: give a side of at most 4096 pixels'


def test_many_large_images_are_resized_when_they_are_read(monkeypatch):
  once = arrays.from_arrays(PIXELS, LABELS, image_size=3).train
  monkeypatch.setattr(arrays, '_RESIZED_ONCE', 0)
  later = arrays.from_arrays(PIXELS, LABELS, image_size=3).train
  np.testing.assert_array_equal(later.read([4, 2]), once.read([4, 2]))
  # 1,297 digits of 4,096 x 4,096 pixels would be 20 GiB.
  monkeypatch.undo()
  assert datasets.load('digits', image_size=4096).train.shape[0] == 4096


def test_large_arrays_are_converted_in_parts(monkeypatch):
  whole = datasets.arrays(arrays.from_arrays(PIXELS / 255, LABELS).train)
  monkeypatch.setattr(arrays, '_CHUNK', 100)  # an image has 60 values
  parts = datasets.arrays(arrays.from_arrays(PIXELS / 255, LABELS).train)
  np.testing.assert_array_equal(whole, parts)
  infinite = with_value(PIXELS / 255, 6, np.inf)
  assert 'the first is row 6' in error(arrays.from_arrays, infinite, LABELS)
