"""Features of a data set, written to a file that is a data set again."""

import json

import folders
import numpy as np
import pytest

from ssljax.data import arrays, backbones, datasets, embedding, folder
from ssljax.errors import InputError

HOW = backbones.Preprocessing(4, 1.0, (0.0,), (1.0,))


def means(images):
  """Features that are known without a network: the mean of each channel."""
  return images.reshape(len(images), -1, 3).mean(axis=1).astype(np.float32)


def backbone(apply=means, fingerprint='a'):
  return backbones.Backbone('means', fingerprint, HOW, 3, apply)


COLOURS = {'cat/a.png': 10, 'cat/b.png': 20, 'dog/c.png': 30}


@pytest.fixture
def photos(tmp_path):
  files = {
    f'train/{name}': folders.image((value, 0, 1), mode='RGB')
    for name, value in COLOURS.items()
  }
  files['unlabelled/u.png'] = folders.image((40, 0, 1), mode='RGB')
  files['test/dog/t.png'] = folders.image((50, 0, 1), mode='RGB')
  return folders.write(tmp_path / 'photos', files)


def opened(photos):
  return folder.load(photos, image_size=4, resident=False, strict=False)


def test_features_keep_labels_names_classes_and_splits(photos, tmp_path):
  out = tmp_path / 'f.npz'
  found = embedding.write(opened(photos), backbone(), out, batch=2)
  assert found == {'train': 4, 'test': 1, 'features': 3}
  data = datasets.load(str(out))
  assert data.classes == ('cat', 'dog')
  assert data.train.names.tolist() == [
    *('train/cat/a.png', 'train/cat/b.png', 'train/dog/c.png'),
    'unlabelled/u.png',
  ]
  assert data.train.labels.tolist() == [0, 0, 1, -1]
  rows = datasets.arrays(data.train).reshape(4, 3)
  expected = [[v, 0, 1] for v in (10, 20, 30, 40)]
  np.testing.assert_array_equal(rows, expected)
  assert data.test.names.tolist() == ['test/dog/t.png']
  assert data.test.labels.tolist() == [1]
  assert data.test.read([0]).ravel().tolist() == [50, 0, 1]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['f.npz', 'photos']


def test_copies_of_an_image_keep_one_hash_whatever_their_features(
  tmp_path, photos
):
  copy = tmp_path / 'photos/train/cat/again.png'
  copy.write_bytes((tmp_path / 'photos/train/cat/a.png').read_bytes())
  out, calls = tmp_path / 'f.npz', []

  def noisy(images):  # another last bit in every batch
    calls.append(len(images))
    return means(images) + np.float32(1e-6 * len(calls))

  embedding.write(opened(photos), backbone(noisy), out, batch=1)
  hashes = datasets.load(str(out)).train.digests()
  names = datasets.load(str(out)).train.names.tolist()
  first, second = (
    hashes[names.index(f'train/cat/{n}.png')] for n in ('a', 'again')
  )
  assert first == second and len(set(hashes.tolist())) == 4


def test_an_interrupted_call_continues_and_others_begin_anew(photos, tmp_path):
  out, seen = tmp_path / 'f.npz', []

  def failing(images):
    if len(seen) == 3:
      raise KeyboardInterrupt
    seen.append(images)
    return means(images)

  with pytest.raises(KeyboardInterrupt):
    embedding.write(opened(photos), backbone(failing), out, batch=1)
  assert not out.exists()
  with (tmp_path / 'f.npz.partial').open('ab') as file:
    file.write(b'torn')  # a batch of which the note does not know
  rest = []
  embedding.write(
    opened(photos), backbone(lambda x: rest.append(x) or means(x)), out, 1
  )
  assert len(rest) == 2
  assert datasets.arrays(datasets.load(str(out)).train)[
    :, 0, 0, 0
  ].tolist() == [*(10, 20, 30, 40)]
  # Features of another network are not continued.
  note = tmp_path / 'f.npz.partial.json'
  note.write_text(json.dumps({'key': 'other', 'rows': 2, 'width': 3}))
  (tmp_path / 'f.npz.partial').write_bytes(bytes(24))
  embedding.write(opened(photos), backbone(), out)
  assert datasets.load(str(out)).train.read([0]).ravel().tolist() == [10, 0, 1]


def test_features_that_are_nan_name_the_image(photos, tmp_path):
  def broken(images):
    found = means(images)
    found[found[:, 0] == 30] = np.nan
    return found

  with pytest.raises(InputError, match=r'train/dog/c.png are NaN or infinite'):
    embedding.write(opened(photos), backbone(broken), tmp_path / 'f.npz')


def test_features_are_not_embedded_again(tmp_path):
  data = arrays.from_arrays(np.zeros((2, 3)), [0, 1])
  with pytest.raises(InputError, match='features already'):
    embedding.write(data, backbone(), tmp_path / 'f.npz')


def test_images_without_labels_are_embedded_to_be_predicted(tmp_path):
  new = folders.write(
    tmp_path / 'new', {'a.png': folders.image((7, 7, 7), mode='RGB')}
  )
  out = tmp_path / 'f.npz'
  embedding.write(opened(new), backbone(), out)
  with pytest.raises(InputError, match='every label is -1'):
    datasets.load(str(out))
  data = datasets.load(str(out), strict=False)
  assert data.train.names.tolist() == ['a.png']
  assert data.train.labels.tolist() == [-1]


@pytest.mark.parametrize(
  ('name', 'array', 'said'),
  [
    ('train_files', np.array(['a', 'b']), r'is <U1 of shape \(2,\) for 3 rows'),
    ('train_files', np.arange(3), 'give one text for each'),
    ('train_digests', np.arange(2, dtype=np.uint64), 'one uint64 for each'),
    ('train_labels', np.array([0, 1]), 'has 2 labels for 3 rows'),
  ],
)
def test_a_file_whose_arrays_differ_in_number_is_refused(
  tmp_path, name, array, said
):
  path = tmp_path / 'f.npz'
  own = {'train': np.zeros((3, 2)), 'train_labels': [0, 1, 0]}
  np.savez(path, **(own | {name: array}))
  with pytest.raises(InputError, match=said):
    datasets.load(str(path))
