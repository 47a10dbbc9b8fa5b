"""Parquet files as Hugging Face writes them."""

import io
import json
import sys

from folders import image
import numpy as np
import pytest

from ssljax.data import catalog, datasets
from ssljax.errors import InputError
from ssljax.runs import defaults

pa = pytest.importorskip('pyarrow', reason="pip install 'ssljax[parquet]'")
pq = pytest.importorskip('pyarrow.parquet')


def encoded(value, size=(4, 4), kind='PNG', **how):
  file = io.BytesIO()
  image(value, size, **how).save(file, kind)
  return file.getvalue()


def write(path, values, labels, names=None, column='label', **rows):
  """Write a file whose images have one value each."""
  images = [
    {'bytes': encoded(v) if isinstance(v, int) else v, 'path': None}
    for v in values
  ]
  for row, name in rows.get('paths', {}).items():
    images[row]['path'] = name
  kind = pa.struct({'bytes': pa.binary(), 'path': pa.string()})
  table = pa.table({column: labels, 'image': pa.array(images, kind)})
  features = {'image': {'_type': 'Image'}}
  if names:
    features[column] = {'_type': 'ClassLabel', 'names': list(names)}
  text = json.dumps({'info': {'features': features}})
  path.parent.mkdir(parents=True, exist_ok=True)
  table = table.replace_schema_metadata({'huggingface': text})
  pq.write_table(table, path)
  return str(path)


def values(source):
  return datasets.arrays(source)[:, 0, 0, 0].tolist()


def message(name, **how):
  with pytest.raises(InputError) as raised:
    datasets.load(name, **how)
  assert '\n' not in str(raised.value)
  return str(raised.value)


def test_a_file_has_images_labels_and_class_names(tmp_path):
  path = write(
    tmp_path / 'mine.parquet',
    [10, 20, 30, 40],
    [1, 0, None, -1],
    ['cat', 'dog'],
    paths={0: 'a.png'},
  )
  data = datasets.load(path)
  assert data.classes == ('cat', 'dog')
  assert data.train.labels.tolist() == [1, 0, -1, -1]
  assert values(data.train) == [10, 20, 30, 40]
  assert data.train.shape == (4, 4, 1) and len(data.test.labels) == 0
  assert data.train.names.tolist() == [
    *('mine.parquet:0:a.png', 'mine.parquet:1', 'mine.parquet:2'),
    'mine.parquet:3',
  ]
  outlined = catalog.outline(path)
  assert outlined.classes == data.classes and len(outlined.train.labels) == 4


def test_a_folder_has_shards_of_splits(tmp_path):
  root = tmp_path / 'set/data'
  for name, pixels in (
    ('train-00001-of-00002', [30]),
    ('train-00000-of-00002', [10, 20]),
    ('test-00000-of-00001', [40]),
  ):
    write(root / f'{name}.parquet', pixels, [n // 10 % 2 for n in pixels], 'ab')
  data = datasets.load(str(tmp_path / 'set'))
  assert values(data.train) == [10, 20, 30] and values(data.test) == [40]
  assert data.train.labels.tolist() == [1, 0, 1]
  assert data.test.labels.tolist() == [0]
  assert (
    len(datasets.load(str(tmp_path / 'set'), with_test=False).test.labels) == 0
  )
  assert 'would be trained on' in message(
    str(tmp_path / 'set'), train_split='test', test_split='test'
  )


def test_folders_name_splits_and_texts_are_classes(tmp_path):
  write(tmp_path / 'train/0000.parquet', [10, 20], ['dog', 'cat'])
  write(tmp_path / 'validation/0000.parquet', [30], ['dog'])
  data = datasets.load(str(tmp_path))
  assert data.classes == ('cat', 'dog')
  assert data.train.labels.tolist() == [1, 0]
  assert values(data.test) == [30] and data.test.labels.tolist() == [1]


def test_images_of_several_sizes_and_kinds_have_one_shape(tmp_path):
  colour = encoded((9, 0, 0), (8, 6), mode='RGB')
  jpeg = encoded(200, (16, 16), 'JPEG')
  path = write(tmp_path / 'x.parquet', [10, colour, jpeg], [0, 1, 0])
  data = datasets.load(path, image_size=5)
  assert data.train.shape == (5, 5, 3)
  np.testing.assert_array_equal(
    datasets.arrays(data.train)[:, 2, 2],
    [[10, 10, 10], [9, 0, 0], [200, 200, 200]],
  )


def test_images_that_cannot_be_decoded_are_left_out(tmp_path, caplog):
  path = write(
    tmp_path / 'x.parquet', [10, b'no image', None, 20], [0, 1, 1, 1]
  )
  data = datasets.load(path)
  assert values(data.train) == [10, 20]
  assert data.train.labels.tolist() == [0, 1]
  assert '2 images cannot be decoded' in caplog.text
  assert 'x.parquet:2 (its bytes are missing)' in caplog.text


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, monkeypatch):
  text = tmp_path / 't.parquet'
  text.write_text('no table')
  assert 'cannot be read as a Parquet file' in message(str(text))
  missing = str(tmp_path / 'none.parquet')
  assert 'there is no such file' in message(missing)
  pq.write_table(pa.table({'x': [1]}), tmp_path / 'n.parquet')
  said = message(str(tmp_path / 'n.parquet'))
  assert 'no column of images (it has x)' in said
  of = lambda *rest: message(write(tmp_path / 'm.parquet', *rest))
  assert 'no image of train_split=train has a label' in of([1], [-1])
  assert 'has the label 5, but 2 class names' in of([1, 2], [0, 5], 'ab')
  assert 'has the label 0.5; give class numbers' in of([1, 2], [0.5, 1.5])
  assert 'has no rows' in of([], pa.array([], pa.int64()))
  assert 'no such split in dataset' in message(
    write(tmp_path / 'm.parquet', [1, 2], [0, 1]), train_split='extra'
  )
  monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
  said = message(str(tmp_path / 'm.parquet'))
  assert "pip install 'ssljax[parquet]'" in said


def test_a_file_without_labels_can_only_be_predicted(tmp_path):
  path = write(tmp_path / 'new.parquet', [10, 20], [None, -1])
  assert 'no image of train_split=train has a label' in message(path)
  data = datasets.load(path, strict=False)
  assert values(data.train) == [10, 20] and (data.train.labels == -1).all()


def test_all_labels_of_a_file_are_used_if_no_number_is_given(tmp_path):
  labels = [0, 0, 1, 1, *[None] * 8]
  path = write(tmp_path / 'x.parquet', [20 * n for n in range(12)], labels)
  made = lambda **given: defaults.for_data(
    'supervised', {'dataset': path} | given, defaults.load
  )
  assert made().config.split.labels == 'all'
  assert made(labels='1', hold_out='none').config.split.labels == '1'
  with pytest.raises(InputError, match='or labels=all to use every label'):
    made(labels='3')
