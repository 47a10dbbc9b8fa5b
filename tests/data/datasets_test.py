"""Data sets: real digits, and tiny sets written in the TFDS layout."""

from concurrent import futures
import io
import os
import subprocess
import sys

import fake_tfds
import numpy as np
import PIL.Image
import pytest

from ssljax.core import UNLABELLED
from ssljax.data import (
  catalog,
  datasets,
  decode,
  duplicates,
  records,
  tfds_reader,
)
from ssljax.errors import InputError

GARBAGE = b'\xff\xd8 this is no image'


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
  # The errors must not depend on what is installed here.
  monkeypatch.setattr(tfds_reader, 'tensorflow_is_installed', lambda: False)


def flat(count, shape=(4, 4, 3)):
  """Images whose every pixel is their row number."""
  return [np.full(shape, row, np.uint8) for row in range(count)]


def error(name, data_dir, **kwargs):
  """The message of loading, which must be one line."""
  with pytest.raises(InputError) as raised:
    datasets.load(name, None if data_dir is None else str(data_dir), **kwargs)
  assert '\n' not in str(raised.value)
  return str(raised.value)


# The embedded digits.


def test_digits_are_the_real_ones_scaled_to_bytes():
  data = datasets.load('digits')
  assert data.train.shape == data.test.shape == (8, 8, 1)
  assert len(data.train.labels) == 1297 and len(data.test.labels) == 500
  assert data.train.labels.dtype == np.int32
  assert data.classes == tuple('0123456789')
  images = np.concatenate([datasets.arrays(s) for s in (data.train, data.test)])
  # 16 -> 255, 8 -> 127.5 -> 128, 1 -> 15.9 -> 16.
  assert images.dtype == np.uint8
  assert {0, 16, 128, 255} <= set(np.unique(images).tolist())
  assert len(np.unique(images)) == 17


def test_digits_are_split_into_disjoint_parts_with_fifty_tests_of_each():
  from sklearn.datasets import load_digits

  data = datasets.load('digits')
  assert (np.bincount(data.test.labels) == 50).all()
  counts = np.bincount(load_digits().target)
  np.testing.assert_array_equal(np.bincount(data.train.labels), counts - 50)
  # Every original image is in exactly one part, with its label.
  key = lambda images, labels: sorted(
    (image.tobytes(), int(label))
    for image, label in zip(images, labels, strict=True)
  )
  ours = []
  for source in (data.train, data.test):
    ours += key(
      np.round(datasets.arrays(source)[..., 0] * (16 / 255)), source.labels
    )
  assert sorted(ours) == key(load_digits().images, load_digits().target)


def test_digits_are_split_the_same_way_every_time():
  first, second = datasets.load('digits'), datasets.load('digits')
  np.testing.assert_array_equal(first.test.labels, second.test.labels)
  rows = np.array([3, 0, 3])
  np.testing.assert_array_equal(first.test.read(rows), second.test.read(rows))
  assert first.test.read(rows).shape == (3, 8, 8, 1)


def test_digits_can_be_resized():
  data = datasets.load('digits', image_size=12)
  assert data.train.shape == (12, 12, 1)
  assert datasets.arrays(data.test).shape == (500, 12, 12, 1)


def test_digits_name_the_splits_they_have():
  message = error('digits', None, train_split='all')
  assert 'train_split=all' in message and 'train, test' in message
  assert 'test_split=dev' in error('digits', None, test_split='dev')


# Sets in the TFDS layout.


def test_a_set_tfds_has_no_class_for_is_read_row_by_row(tmp_path):
  fake_tfds.write(
    tmp_path,
    'pets',
    flat(5),
    [0, 1, 2, 1, 0],
    ['a', 'b', 'c'],
    splits={'train': 3, 'test': 2},
  )
  data = datasets.load('pets', str(tmp_path))
  assert data.name == 'pets' and data.classes == ('a', 'b', 'c')
  np.testing.assert_array_equal(data.train.labels, [0, 1, 2])
  np.testing.assert_array_equal(data.test.labels, [1, 0])
  images = data.train.read(np.array([2, 0, 2]))
  assert images.shape == (3, 4, 4, 3) and images.dtype == np.uint8
  np.testing.assert_array_equal(images[:, 0, 0, 0], [2, 0, 2])
  assert data.train.read(np.array([], int)).shape == (0, 4, 4, 3)


def test_the_newest_version_on_disk_is_read(tmp_path):
  for version, label in (('1.9.0', 0), ('1.10.0', 1)):
    fake_tfds.write(tmp_path, 'pets', flat(2), [label] * 2, 2, version=version)
    # TFDS's class of mnist knows version 3.0.1 alone.
    fake_tfds.write(
      tmp_path, 'mnist', flat(2, (28, 28, 1)), [label] * 2, 10, version=version
    )
  for name in ('pets', 'mnist'):
    data = datasets.load(name, str(tmp_path))
    np.testing.assert_array_equal(data.train.labels, [1, 1])


def test_a_version_or_a_configuration_can_be_named(tmp_path):
  for version, label in (('1.0.0', 0), ('2.0.0', 1)):
    fake_tfds.write(tmp_path, 'pets', flat(2), [label] * 2, 2, version=version)
  fake_tfds.write(tmp_path, 'cars', flat(2), [1, 1], 2, config='small')
  assert datasets.load('pets:1.0.0', str(tmp_path)).train.labels[0] == 0
  assert datasets.load('cars/small', str(tmp_path)).train.labels[0] == 1
  assert 'dataset=pets:3.0.0' in error('pets:3.0.0', tmp_path)


def with_configurations(tmp_path):
  """Sets with two configurations, with one, and with two versions."""
  for config in ('big', 'small'):
    fake_tfds.write(tmp_path, 'pets', flat(2), [0, 1], config=config, **HALVES)
  fake_tfds.write(tmp_path, 'cars', flat(2), [0, 1], config='red', **HALVES)
  for version in ('9.0.0', '10.0.0'):
    fake_tfds.write(
      tmp_path, 'cats', flat(2), [0, 1], version=version, **HALVES
    )
  # TFDS's class of this set has these configurations and others.
  for config in ('16x16', '32x32'):
    fake_tfds.write(
      tmp_path, 'imagenet_resized', flat(2), [0, 1], config=config, **HALVES
    )
  for folder in ('photos/frogs', 'half/1.0.0', 'mnist/incomplete'):
    (tmp_path / folder).mkdir(parents=True)
  return tmp_path


HALVES = dict(splits=dict(train=1, test=1))
TWO = 'has the configurations big, small in data_dir='


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('pets', (TWO, 'give pets/big')),
    ('pets/medium', (TWO, 'give pets/big')),
    ('pets:1.0.0', (TWO, 'give pets/big')),
    ('pets/big:9.9.9', ('has the version 1.0.0', 'give pets/big:1.0.0')),
    ('cars', ('has the configuration red', 'give cars/red')),
    ('cars/blue', ('has the configuration red', 'give cars/red')),
    ('cats:3.0.0', ('has the versions 9.0.0, 10.0.0', 'give cats:10.0.0')),
    ('cats/x', ('has no configurations', 'give cats')),
    ('imagenet_resized', ('16x16, 32x32', 'give imagenet_resized/16x16')),
    ('imagenet_resized/8x8', ('16x16, 32x32', 'give imagenet_resized/16x16')),
    ('imagenet_resized/3x3', ('16x16, 32x32', 'give imagenet_resized/16x16')),
    ('imagenet_resized/16x16:7.0.0', ('has the version 1.0.0',)),
    ('photos', ('photos holds no data set in the TFDS layout',)),
    ('half', ('half holds no data set in the TFDS layout',)),
    ('phot', ('try digits, cars, cats, imagenet_resized, pets',)),
    ('mnist', ('is not prepared', 'pip install')),
  ],
)
def test_configurations_and_versions_that_are_there_are_listed(
  tmp_path, name, expected
):
  said = error(name, with_configurations(tmp_path))
  assert said.startswith(f'dataset={name}: ')
  for part in expected:
    assert part in said
  assert f'did you mean {name}' not in said


def test_a_configuration_to_prepare_has_to_be_named(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  def prepare(self, **kwargs):
    raise OSError(f'no network for {self.data_dir}')

  monkeypatch.setattr(tfds_reader, 'tensorflow_is_installed', lambda: True)
  monkeypatch.setattr(tfds.core.DatasetBuilder, 'download_and_prepare', prepare)
  with_configurations(tmp_path)
  assert 'configurations 16x16, 32x32' in error('imagenet_resized', tmp_path)
  said = error('imagenet_resized/8x8', tmp_path, image_size=8)
  assert 'no network' in said and 'imagenet_resized/8x8' in said
  assert 'no network' in error('mnist', tmp_path)


def test_a_default_configuration_is_said(tmp_path, caplog):
  folder = with_configurations(tmp_path) / 'pets' / '.config'
  folder.mkdir()
  (folder / 'metadata.json').write_text('{"default_config_name": "small"}')
  datasets.load('pets', str(tmp_path))
  (said,) = [r.getMessage() for r in caplog.records if 'pets' in r.getMessage()]
  assert 'configurations big, small' in said and 'small is used' in said


def test_several_files_make_one_split(tmp_path):
  labels = np.arange(11) % 3
  fake_tfds.write(tmp_path, 'pets', flat(11), labels, shards=3)
  data = datasets.load('pets', str(tmp_path))
  np.testing.assert_array_equal(data.train.labels, labels)
  images = datasets.arrays(data.train)
  np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(11))


def test_arrays_keep_the_order_over_many_chunks(tmp_path, monkeypatch):
  monkeypatch.setattr(records, '_CHUNK', 4)
  fake_tfds.write(tmp_path, 'pets', flat(30), np.arange(30) % 2)
  source = datasets.load('pets', str(tmp_path)).train
  np.testing.assert_array_equal(source.labels, np.arange(30) % 2)
  np.testing.assert_array_equal(
    datasets.arrays(source)[:, 3, 3, 2], np.arange(30)
  )


def test_many_threads_read_the_same_as_one(tmp_path):
  fake_tfds.write(tmp_path, 'pets', flat(64), [0] * 64, 1)
  read = datasets.load('pets', str(tmp_path)).train.read
  with futures.ThreadPoolExecutor(8) as pool:
    images = list(pool.map(lambda row: read([row])[0, 0, 0, 0], range(64)))
  np.testing.assert_array_equal(images, np.arange(64))


def test_grey_keeps_one_channel_and_colour_three(tmp_path):
  fake_tfds.write(tmp_path, 'grey', flat(2, (4, 5, 1)), [0, 0], 1)
  # A grey file in a colour set is grey in all three channels.
  mixed = [
    np.full((4, 4, 3), 9, np.uint8),
    fake_tfds.encode(np.full((4, 4, 1), 7, np.uint8)),
  ]
  fake_tfds.write(tmp_path, 'colour', mixed, [0, 0], 1)
  assert datasets.load('grey', str(tmp_path)).train.shape == (4, 5, 1)
  images = datasets.arrays(datasets.load('colour', str(tmp_path)).train)
  np.testing.assert_array_equal(images[:, 1, 1], [[9, 9, 9], [7, 7, 7]])


def test_transparency_and_palettes_become_plain_colour(tmp_path):
  def png(mode, colour):
    file = io.BytesIO()
    PIL.Image.new('RGB', (4, 4), colour).convert(mode).save(file, 'png')
    return file.getvalue()

  files = [png('RGBA', (1, 2, 3)), png('P', (255, 0, 0))]
  fake_tfds.write(tmp_path, 'pets', files, [0, 0], 1, shape=(4, 4, 3))
  images = datasets.arrays(datasets.load('pets', str(tmp_path)).train)
  np.testing.assert_array_equal(images[:, 0, 0], [[1, 2, 3], [255, 0, 0]])


# The four official sets whose structure differs, and mnist.


def test_svhn_trains_on_train_and_extra(tmp_path):
  import tensorflow_datasets as tfds

  fake_tfds.write(
    tmp_path,
    'svhn_cropped',
    flat(7, (32, 32, 3)),
    [0, 9, 2, 3, 4, 5, 6],
    10,
    splits={'train': 2, 'test': 2, 'extra': 3},
    version='3.1.0',
    features={'id': (tfds.features.Text(), list('abcdefg'))},
  )
  data = datasets.load('svhn_cropped', str(tmp_path), train_split='train+extra')
  np.testing.assert_array_equal(data.train.labels, [0, 9, 4, 5, 6])
  images = datasets.arrays(data.train)
  np.testing.assert_array_equal(images[:, 0, 0, 0], [0, 1, 4, 5, 6])


def test_cifar100_is_labelled_finely(tmp_path):
  import tensorflow_datasets as tfds

  coarse = tfds.features.ClassLabel(num_classes=20), [1, 2]
  fake_tfds.write(
    tmp_path,
    'cifar100',
    flat(2, (32, 32, 3)),
    [99, 7],
    100,
    version='3.0.2',
    features={'coarse_label': coarse},
  )
  data = datasets.load('cifar100', str(tmp_path))
  np.testing.assert_array_equal(data.train.labels, [99, 7])
  assert len(data.classes) == 100


def test_stl10_has_unlabelled_images_to_train_on(tmp_path):
  fake_tfds.write(
    tmp_path,
    'stl10',
    flat(6, (96, 96, 3)),
    [0, 9, 3, 4, -1, -1],
    10,
    splits={'train': 2, 'test': 2, 'unlabelled': 2},
  )
  data = datasets.load('stl10', str(tmp_path), train_split='train+unlabelled')
  np.testing.assert_array_equal(
    data.train.labels, [0, 9, UNLABELLED, UNLABELLED]
  )
  assert data.train.read([3])[0, 0, 0, 0] == 5


def imagenet(tmp_path, **kwargs):
  """Five JPEG images of mixed sizes; the two of `test` have no labels."""
  shapes = [(60, 40), (30, 50), (400, 640), (33, 33), (32, 64)]
  rng = np.random.default_rng(0)
  images = [
    np.broadcast_to(rng.integers(256, size=3, dtype=np.uint8), (*s, 3))
    for s in shapes
  ]
  fake_tfds.write(
    tmp_path,
    'imagenet2012',
    images,
    [0, 999, 5, -1, -1],
    1000,
    splits={'train': 2, 'validation': 1, 'test': 2},
    version='5.1.0',
    encoding='jpeg',
    file_names=[f'n0{i}.JPEG' for i in range(5)],
    **kwargs,
  )
  return images


def test_imagenet_is_tested_on_validation_and_cropped_to_a_square(tmp_path):
  images = imagenet(tmp_path)
  data = datasets.load('imagenet2012', str(tmp_path), image_size=32)
  np.testing.assert_array_equal(data.train.labels, [0, 999])
  np.testing.assert_array_equal(data.test.labels, [5])
  assert data.train.shape == data.test.shape == (32, 32, 3)
  # One colour stays that colour, up to what JPEG loses.
  for source, mine in ((data.train, images[:2]), (data.test, images[2:3])):
    for got, image in zip(datasets.arrays(source), mine, strict=True):
      np.testing.assert_allclose(
        got.astype(int), np.broadcast_to(image[0, 0], (32, 32, 3)), atol=4
      )


def test_images_of_mixed_sizes_need_image_size(tmp_path):
  imagenet(tmp_path)
  assert 'image_size' in error('imagenet2012', tmp_path)


def test_images_of_mixed_sizes_can_be_cropped_at_random(tmp_path):
  images = imagenet(tmp_path)
  how = dict(data_dir=str(tmp_path), image_size=28)
  assert datasets.load('imagenet2012', **how).train.crop is None
  data = datasets.load('imagenet2012', crop=True, **how)
  draws = np.random.default_rng(0).random((3, 10, 4))
  crops = data.train.crop([1, 0, 1], draws)
  assert crops.shape == (3, 28, 28, 3)
  # One colour stays that colour, whichever part is seen.
  for crop, row in zip(crops, [1, 0, 1], strict=True):
    np.testing.assert_allclose(
      crop.astype(int), np.broadcast_to(images[row][0, 0], crop.shape), atol=4
    )


def test_images_cropped_at_random_are_tested_on_their_centre(tmp_path):
  # A frame of 4 pixels above and below a black image of 128 x 56: the shorter
  # side of 64 becomes 32, of which the centre crop keeps 28.
  wide = np.zeros((64, 128, 3), np.uint8)
  wide[:4] = wide[-4:] = 255
  small = np.zeros((9, 9, 3), np.uint8)
  fake_tfds.write(tmp_path, 'mixed', [wide, small], [0, 1])
  load = lambda crop: datasets.load(
    'mixed', str(tmp_path), image_size=28, crop=crop
  )
  for source in load(True)[1:3]:
    # Rows 2 to 29 of 32; the frame is rows 0 and 1, partly blurred into 2.
    seen = source.read([0])[0]
    assert seen.shape == (28, 28, 3) and not seen[1:-1].any()
    assert seen[0].max() < 64
  # Not cropped at random, the whole height is squeezed to 28.
  assert load(False).test.read([0])[0, 0].min() == 255


def test_images_of_one_size_have_no_crop_of_their_own(tmp_path):
  fake_tfds.write(tmp_path, 'pets', flat(2, (8, 8, 3)), [0, 0], 1)
  data = datasets.load('pets', str(tmp_path), image_size=4, crop=True)
  assert data.train.crop is None
  assert datasets.load('digits', crop=True).train.crop is None


def test_a_corrupt_image_has_no_window_either(tmp_path):
  images = [GARBAGE, *flat(2)]
  fake_tfds.write(
    tmp_path,
    'pets',
    images,
    [0, 0, 0],
    1,
    shape=(None, None, 3),
    splits=dict(train=[0, 1], test=[2]),
  )
  how = dict(data_dir=str(tmp_path), image_size=2, crop=True)
  draws = np.zeros((1, 10, 4))
  with pytest.raises(InputError, match=r'row 0: .*corrupt=1'):
    datasets.load('pets', **how).train.crop([0], draws)
  train = datasets.load('pets', corrupt=1, **how).train
  assert len(train.labels) == 1
  np.testing.assert_array_equal(train.crop([0], draws)[0], np.zeros((2, 2, 3)))


def test_a_test_split_without_labels_is_refused(tmp_path):
  imagenet(tmp_path)
  message = error('imagenet2012', tmp_path, image_size=8, test_split='test')
  assert 'test_split=test' in message and 'validation' in message
  message = error('imagenet2012', tmp_path, image_size=8, train_split='test')
  assert 'train_split=test' in message


def test_mock_data_can_stand_in_for_an_official_set(tmp_path):
  # TFDS's own random examples need TensorFlow to encode an image, so the mock
  # is given examples; the class, features, splits and paths are TFDS's.
  import tensorflow_datasets as tfds

  class Examples(list):
    def __getitems__(self, rows):
      return [self[row] for row in rows]

  def source(self, split, **kwargs):
    del kwargs
    start = {'train': 0, 'test': 2, 'train+extra': 4}[split]
    return Examples(
      fake_tfds.serialize(
        self.info.features,
        {
          'image': fake_tfds.encode(np.full((32, 32, 3), i, np.uint8)),
          'label': i,
          'id': str(i),
        },
      )
      for i in (start, start + 1)
    )

  fake_tfds.write(
    tmp_path,
    'svhn_cropped',
    flat(3, (32, 32, 3)),
    [0, 1, 2],
    10,
    splits={'train': 1, 'test': 1, 'extra': 1},
    version='3.1.0',
  )
  with tfds.testing.mock_data(
    data_dir=str(tmp_path),
    as_data_source_fn=source,
    policy=tfds.testing.MockPolicy.USE_FILES,
  ):
    data = datasets.load(
      'svhn_cropped', str(tmp_path), train_split='train+extra'
    )
    np.testing.assert_array_equal(data.train.labels, [4, 5])
    np.testing.assert_array_equal(data.test.read([1])[0, 0, 0], [3, 3, 3])


def test_real_sets_are_read_whole():
  data_dir = os.environ.get('SSLJAX_DATA_DIR')
  if not data_dir or not os.path.isdir(os.path.join(data_dir, 'mnist')):
    pytest.skip('SSLJAX_DATA_DIR names no folder with mnist in it')
  data = datasets.load('mnist', data_dir, train_split='train[:100]')
  assert data.test.labels.shape == (10_000,) and data.train.shape == (28, 28, 1)
  images = datasets.arrays(data.train)
  assert images.shape == (100, 28, 28, 1) and images.max() == 255
  # Every digit has ink in the middle and an empty corner.
  assert (images[:, 0, 0] == 0).all() and (images[:, 10:18] > 0).any(
    (1, 2)
  ).all()


# Resizing.


def test_the_shorter_side_is_resized_and_the_centre_cropped(tmp_path):
  # Thirds of 12 columns are 0, 100, 200: the central square of a 4 x 12 image
  # is the middle third, at any size.
  wide = np.repeat(np.array([0, 100, 200], np.uint8), 4)
  wide = np.tile(wide[None, :, None], (4, 1, 1))
  images = [wide, np.transpose(wide, (1, 0, 2))]
  fake_tfds.write(tmp_path, 'pets', images, [0, 0], 1)
  crops = datasets.arrays(
    datasets.load('pets', str(tmp_path), image_size=4).train
  )
  np.testing.assert_array_equal(crops, np.full((2, 4, 4, 1), 100))
  crops = datasets.arrays(
    datasets.load('pets', str(tmp_path), image_size=2).train
  )
  assert crops.shape == (2, 2, 2, 1)


def test_image_size_resizes_images_of_one_size_too(tmp_path):
  fake_tfds.write(tmp_path, 'pets', flat(2, (8, 8, 3)), [0, 0], 1)
  data = datasets.load('pets', str(tmp_path), image_size=5)
  images = datasets.arrays(data.train)
  assert images.shape == (2, 5, 5, 3)
  np.testing.assert_array_equal(images[1], np.ones((5, 5, 3)))


def test_shrinking_averages_instead_of_picking_pixels(tmp_path):
  # A chessboard of 0 and 200 shrinks to its mean.
  board = (np.indices((16, 16)).sum(0) % 2 * 200).astype(np.uint8)[..., None]
  fake_tfds.write(tmp_path, 'pets', [board], [0], 1)
  small = datasets.load('pets', str(tmp_path), image_size=4).train.read([0])
  np.testing.assert_allclose(small, 100, atol=15)


@pytest.mark.parametrize('size', [0, -3])
def test_image_size_must_be_positive(size):
  assert f'image_size={size}' in error('digits', None, image_size=size)


# Corrupt images.


def corrupt_set(tmp_path, **kwargs):
  """Corrupt are rows 1 and 3 of five training and row 1 of two test images."""
  images = flat(7)
  images[1] = images[6] = GARBAGE
  images[3] = fake_tfds.encode(images[3])[:40]  # cut short
  fake_tfds.write(
    tmp_path,
    'pets',
    images,
    [0, 1, 0, 1, 0, 1, 0],
    2,
    splits={'train': 5, 'test': 2},
    shape=(4, 4, 3),
    **kwargs,
  )
  return str(tmp_path)


def test_labels_are_read_without_decoding_the_images(tmp_path):
  data = datasets.load('pets', corrupt_set(tmp_path))
  np.testing.assert_array_equal(data.train.labels, [0, 1, 0, 1, 0])
  assert data.train.read([0, 2, 4]).shape == (3, 4, 4, 3)


def test_all_corrupt_images_are_listed_when_one_is_read(tmp_path):
  data = datasets.load(
    'pets', corrupt_set(tmp_path, file_names=[f'{i}.png' for i in range(7)])
  )
  for read in (
    lambda: data.train.read([0, 3]),
    lambda: data.test.read([1]),
    lambda: datasets.arrays(data.train),
  ):
    with pytest.raises(InputError) as raised:
      read()
    said = str(raised.value)
    assert said.startswith('dataset=pets: 3 images cannot be decoded: ')
    for part in (
      'train row 1 (1.png): cannot identify',
      'train row 3 (3.png): ',
      'test row 1 (6.png): cannot identify',
      'corrupt=3',
    ):
      assert part in said
    assert '\n' not in said


def test_tolerated_corrupt_images_are_left_out_and_reported(tmp_path, caplog):
  data = datasets.load('pets', corrupt_set(tmp_path), corrupt=3)
  np.testing.assert_array_equal(data.train.labels, [0, 0, 0])
  np.testing.assert_array_equal(data.test.labels, [1])
  # Rows are numbered without them.
  images = datasets.arrays(data.train)
  np.testing.assert_array_equal(images[:, 0, 0, 0], [0, 2, 4])
  np.testing.assert_array_equal(data.train.read([2, 1])[:, 0, 0, 0], [4, 2])
  assert datasets.arrays(data.test)[0, 0, 0, 0] == 5
  assert len(data.train.digests()) == 3 and len(data.test.digests()) == 1
  (said,) = [record.getMessage() for record in caplog.records]
  assert 'train row 1: ' in said and 'test row 1: ' in said
  assert '3 images' in said and 'left out (corrupt=3)' in said


def test_more_corrupt_images_than_tolerated_are_refused_at_once(tmp_path):
  said = error('pets', corrupt_set(tmp_path), corrupt=2)
  assert '3 images cannot be decoded' in said and 'corrupt=3' in said


def test_many_corrupt_images_are_counted_and_some_listed(tmp_path):
  images = [GARBAGE] * 40 + flat(1)
  fake_tfds.write(
    tmp_path,
    'pets',
    images,
    [0] * 41,
    1,
    shape=(4, 4, 3),
    splits=dict(train=40, test=1),
  )
  said = error('pets', tmp_path, corrupt=7)
  assert '40 images cannot be decoded' in said and 'and 30 more' in said
  assert said.count('row ') == 10 and len(said) < 1000


def test_threads_share_one_search_for_corrupt_images(tmp_path, monkeypatch):
  read = datasets.load('pets', corrupt_set(tmp_path)).train.read
  searched, search = [], records.Reader.undecodable

  def counted(reader):
    searched.append(reader.split.name)
    return search(reader)

  monkeypatch.setattr(records.Reader, 'undecodable', counted)

  def message(row):
    with pytest.raises(InputError) as raised:
      read([row])
    return str(raised.value)

  with futures.ThreadPoolExecutor(8) as pool:
    said = set(pool.map(message, [1, 3] * 8))
  assert len(said) == 1 and searched == ['train', 'test']


def test_an_image_of_another_size_than_stated_is_corrupt(tmp_path):
  images = [*flat(1), fake_tfds.encode(np.zeros((1, 1, 3), np.uint8))]
  fake_tfds.write(tmp_path, 'pets', images, [0, 0], 1)
  with pytest.raises(InputError, match=r'train row 1: .* expected'):
    datasets.arrays(datasets.load('pets', str(tmp_path)).train)


def test_an_image_that_decodes_to_gigabytes_is_corrupt(tmp_path, monkeypatch):
  monkeypatch.setattr(decode, 'MAX_PIXELS', 20)
  fake_tfds.write(tmp_path, 'pets', flat(2, (5, 5, 3)), [0, 0], 1)
  data = datasets.load('pets', str(tmp_path), image_size=4)
  with pytest.raises(InputError, match='train row 0: 5 x 5 pixels are more'):
    datasets.arrays(data.train)


def test_damage_after_opening_is_one_line(tmp_path):
  folder = fake_tfds.write(tmp_path, 'pets', flat(2), [0, 0], 1)
  data = datasets.load('pets', str(tmp_path))
  data.train.read.records.data_source.__exit__(None, None, None)
  (folder / 'pets-train.array_record-00000-of-00001').unlink()
  with pytest.raises(InputError, match='split train are missing or damaged'):
    data.train.read([0])


def test_a_negative_tolerance_is_refused():
  assert 'corrupt=-1' in error('digits', None, corrupt=-1)


# Sets that cannot be read.


def test_a_misspelt_name_gets_near_matches(tmp_path):
  fake_tfds.write(tmp_path, 'pets', flat(1), [0], 1)
  assert 'cifar10' in error('cifr10', tmp_path)
  assert 'pets' in error('petts', tmp_path)
  assert 'digits' in error('digit', None)
  for name in ('zzzzzz', '../pets', '', 'a b', 'kaggle:pets', 'pets/none'):
    assert f'dataset={name}' in error(name, tmp_path)


def test_a_set_that_is_not_prepared_says_how_without_tensorflow(tmp_path):
  message = error('svhn_cropped', tmp_path)  # the folder is empty
  for part in (
    'svhn_cropped',
    f'data_dir={tmp_path}',
    'nothing',
    "pip install 'ssljax[prepare]'",
  ):
    assert part in message
  fake_tfds.write(tmp_path, 'pets', flat(1), [0], 1)
  assert 'pets' in error('svhn_cropped', tmp_path)


def test_a_data_dir_must_be_given_and_be_there(tmp_path):
  assert 'data_dir' in error('cifar10', None)
  assert 'data_dir' in error('cifar10', '')
  missing = tmp_path / 'missing'
  assert f'data_dir={missing}' in error('cifar10', missing)
  missing.write_text('a file')
  assert f'data_dir={missing}' in error('cifar10', missing)


def test_tensorflow_prepares_a_missing_set(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  formats = []

  def prepare(self, *, file_format):
    formats.append(file_format)
    fake_tfds.write(
      tmp_path, 'mnist', flat(3, (28, 28, 1)), [0, 1, 2], 10, version='3.0.1'
    )
    # As the original method ends.
    self.info.set_file_format(file_format, override=True)
    self.info.read_from_directory(self.data_dir)

  monkeypatch.setattr(tfds_reader, 'tensorflow_is_installed', lambda: True)
  monkeypatch.setattr(tfds.core.DatasetBuilder, 'download_and_prepare', prepare)
  for _ in range(2):
    data = datasets.load('mnist', str(tmp_path))
    np.testing.assert_array_equal(data.train.labels, [0, 1, 2])
  assert formats == ['array_record']  # once


def test_a_failed_preparation_is_one_line_with_the_catalogue(
  tmp_path, monkeypatch
):
  import tensorflow_datasets as tfds

  def fail(self, **kwargs):
    raise AssertionError('put the file\n in manual_dir')

  monkeypatch.setattr(tfds_reader, 'tensorflow_is_installed', lambda: True)
  monkeypatch.setattr(tfds.core.DatasetBuilder, 'download_and_prepare', fail)
  message = error('imagenet2012', tmp_path, image_size=8)
  assert 'put the file in manual_dir' in message and 'catalog' in message


def test_an_unknown_split_names_those_there(tmp_path):
  fake_tfds.write(tmp_path, 'pets', flat(2), [0, 0], 1)
  for flag in ('train_split', 'test_split'):
    for split in ('dev', 'train+dev', 'train[', 'train[7:]'):
      message = error('pets', tmp_path, **{flag: split})
      assert f'{flag}={split}' in message and 'train, test' in message


def test_slices_split_a_set_without_a_test_split(tmp_path):
  fake_tfds.write(tmp_path, 'pets', flat(4), [0, 1, 0, 1], splits={'train': 4})
  message = error('pets', tmp_path)
  assert 'test_split' in message and 'train[90%:]' in message
  data = datasets.load(
    'pets', str(tmp_path), train_split='train[:75%]', test_split='train[75%:]'
  )
  assert len(data.train.labels) == 3 and data.test.read([0])[0, 0, 0, 0] == 3


def overlapping(tmp_path):
  """30 training and 10 test images in two files each."""
  fake_tfds.write(
    tmp_path,
    'pets',
    flat(40),
    np.arange(40) % 2,
    splits=dict(train=30, test=10),
    shards=2,
  )
  return tmp_path


@pytest.mark.parametrize(
  ('train', 'test', 'count'),
  [
    ('train+test', None, 10),
    ('all', None, 10),
    ('train', 'train[:20%]', 6),
    ('train', 'train', 30),
    ('train[:20]', 'train[10:]', 10),
    ('train[10:]+test[:1]', 'test', 1),
    ('test', None, 10),
  ],
)
def test_splits_with_common_images_are_refused(tmp_path, train, test, count):
  overlapping(tmp_path)
  how = dict(train_split=train, test_split=test)
  said = error('pets', tmp_path, **how)
  assert f'train_split={train}, test_split={test or "test"}' in said
  assert f': {count} images of dataset=pets are in both' in said
  with pytest.raises(InputError, match=f'{count} images'):
    catalog.outline('pets', str(tmp_path), **how)


def test_neighbouring_slices_have_no_common_images(tmp_path):
  overlapping(tmp_path)
  data = datasets.load(
    'pets', str(tmp_path), train_split='train[:70%]', test_split='train[70%:]'
  )
  assert len(data.train.labels) == 21 and len(data.test.labels) == 9
  data = datasets.load('pets', str(tmp_path), train_split='train[5:]+train[:5]')
  assert len(data.train.labels) == 30


@pytest.mark.parametrize(
  ('split', 'count'),
  [('train+train', 30), ('train+train[:4]', 4), ('train[:20]+train[10:]', 10)],
)
def test_a_split_that_repeats_images_is_refused(tmp_path, split, count):
  overlapping(tmp_path)
  said = error('pets', tmp_path, train_split=split)
  assert f'train_split={split}: has {count} images' in said


def test_test_images_need_not_be_opened(tmp_path):
  overlapping(tmp_path)
  data = datasets.load(
    'pets', str(tmp_path), train_split='test', with_test=False
  )
  assert len(data.train.labels) == 10 and len(data.test.labels) == 0


def test_copies_of_training_images_are_found(tmp_path):
  images = flat(6)
  images[4] = images[1]  # a copy
  other = io.BytesIO()
  PIL.Image.fromarray(images[2]).save(other, 'png', compress_level=0)
  images[5] = other.getvalue()  # the same pixels in another file
  fake_tfds.write(
    tmp_path,
    'pets',
    images,
    [0, 1] * 3,
    splits=dict(train=3, test=3),
    shape=(4, 4, 3),
  )
  data = datasets.load('pets', str(tmp_path))
  encoded = [source.digests() for source in (data.train, data.test)]
  assert [len(x) for x in encoded] == [3, 3]
  assert duplicates.count(*encoded) == 1
  pixels = [duplicates.digests(datasets.arrays(s)) for s in data[1:3]]
  assert duplicates.count(*pixels) == 2


@pytest.mark.parametrize(
  ('name', 'encoding', 'variant'),
  [
    ('cifar10', 'jpeg', 'CIFAR-10 (JPEG)'),
    ('cifar10', 'png', ''),
    ('mnist', 'jpeg', 'MNIST (JPEG)'),
    ('pets', 'jpeg', ''),  # the original may be JPEG too
  ],
)
def test_a_lossy_copy_of_a_lossless_set_is_named(
  tmp_path, name, encoding, variant
):
  side, channels = (28, 1) if name == 'mnist' else (32, 3)
  images = [np.full((side, side, channels), i, np.uint8) for i in range(4)]
  labels = [0, 1, 0, 1]
  splits = dict(train=2, test=2)
  fake_tfds.write(
    tmp_path, name, images, labels, splits=splits, encoding=encoding
  )
  assert datasets.load(name, str(tmp_path)).variant == variant


def test_a_fingerprint_tells_copies_of_a_data_set_apart():
  train, test = (np.arange(n, dtype=np.uint64) for n in (5, 3))
  found = duplicates.fingerprint(train, test)
  assert len(found) == 16 and int(found, 16) >= 0
  assert found == duplicates.fingerprint(train.copy(), test.copy())
  assert found != duplicates.fingerprint(train, test[::-1])
  assert found != duplicates.fingerprint(train[1:], test)


def test_labels_beyond_32_bits_are_refused(tmp_path):
  for name, label in (('even', 2**40), ('max', 2**32 + 1)):
    fake_tfds.write(tmp_path, name, flat(3), [0, label, 1], 2)
    said = error(name, tmp_path)
    assert f'the first is {label} in row 1' in said


@pytest.mark.parametrize('said', [3, 9])
def test_files_of_another_length_than_said_are_refused(tmp_path, said):
  folder = fake_tfds.write(tmp_path, 'pets', flat(5), [0] * 5, 1)
  info = folder / 'dataset_info.json'
  text = info.read_text()
  assert text.count('"5"') == 2
  info.write_text(text.replace('"5"', f'"{said}"'))
  line = error('pets', tmp_path)
  assert 'split test are missing or damaged' in line
  assert f'-00001 has 5 records, dataset_info.json says {said}' in line


def test_a_number_of_classes_that_cannot_be_is_refused(tmp_path):
  folder = fake_tfds.write(tmp_path, 'pets', flat(2), [0, 0], 17)
  features = folder / 'features.json'
  text = features.read_text()
  assert '"numClasses": "17"' in text
  features.write_text(text.replace('"17"', '"1000000000"'))
  assert 'has 1000000000 classes' in error('pets', tmp_path)
  with pytest.raises(InputError, match='1000000000 classes'):
    catalog.outline('pets', str(tmp_path))


def test_images_of_a_stated_size_that_cannot_be_are_refused(tmp_path):
  fake_tfds.write(
    tmp_path,
    'pets',
    [fake_tfds.encode(flat(1)[0])],
    [0],
    shape=(10**5, 10**5, 3),
  )
  said = error('pets', tmp_path)
  assert 'its images have 100000 x 100000 pixels' in said
  # With another size they are decoded, and the one there is small.
  data = datasets.load('pets', str(tmp_path), image_size=4)
  assert data.train.read([0]).shape == (1, 4, 4, 3)


def test_more_images_than_memory_are_refused():
  huge = datasets.Source(
    np.broadcast_to(np.int32(0), 2**40), (2**10, 2**10, 3), None
  )
  with pytest.raises(InputError, match=r'feed=resident: .* give feed=stream'):
    datasets.arrays(huge)


def test_large_images_are_read_in_smaller_chunks(monkeypatch):
  monkeypatch.setattr(records, '_CHUNK_BYTES', 100)
  monkeypatch.setattr(os, 'cpu_count', lambda: 1)  # a thread has 4 slices
  chunks = []
  records.by_chunk(lambda rows: chunks.append(rows), 7, 'rows', size=40)
  assert sorted((c.start, c.stop) for c in chunks) == [
    *((0, 2), (2, 4), (4, 6), (6, 7))
  ]


def test_a_label_outside_the_classes_is_refused(tmp_path):
  for name, labels in (('high', [0, 1, 2]), ('low', [0, 1, -2])):
    fake_tfds.write(tmp_path, name, flat(3), labels, 2)
    message = error(name, tmp_path)
    assert 'outside its 2 classes' in message and 'row 2' in message


def test_an_empty_data_set_is_refused(tmp_path):
  fake_tfds.write(
    tmp_path, 'pets', flat(2), [0, 0], 1, splits={'train': 0, 'test': 2}
  )
  assert 'no images' in error('pets', tmp_path)
  assert 'no images' in error('pets', tmp_path, train_split='test[:0]')


def test_a_set_without_images_or_labels_is_refused(tmp_path):
  import tensorflow_datasets as tfds

  text = tfds.features.Text(), ['a', 'b']
  fake_tfds.write(
    tmp_path,
    'texts',
    flat(2),
    [0, 0],
    1,
    supervised_keys=None,
    features={'image': None, 'text': text},
  )
  fake_tfds.write(
    tmp_path,
    'blank',
    flat(2),
    [0, 0],
    1,
    supervised_keys=None,
    features={'label': None},
  )
  assert 'no image feature' in error('texts', tmp_path)
  assert 'no label feature' in error('blank', tmp_path)


def test_several_labels_need_supervised_keys(tmp_path):
  import tensorflow_datasets as tfds

  other = {'other': (tfds.features.ClassLabel(num_classes=3), [2, 1])}
  for name, keys in (('none', None), ('second', ('image', 'other'))):
    fake_tfds.write(
      tmp_path, name, flat(2), [0, 0], 1, features=other, supervised_keys=keys
    )
  assert '(label, other)' in error('none', tmp_path)
  data = datasets.load('second', str(tmp_path))
  np.testing.assert_array_equal(data.train.labels, [2, 1])


def test_images_that_are_not_bytes_are_refused(tmp_path):
  import tensorflow_datasets as tfds

  deep = tfds.features.Image(shape=(4, 4, 1), dtype=np.uint16)
  fake_tfds.write(
    tmp_path, 'deep', flat(1), [0], 1, features={'image': (deep, [GARBAGE])}
  )
  assert 'uint16' in error('deep', tmp_path)


def test_a_set_prepared_as_tfrecord_says_how_to_convert_it(tmp_path):
  folder = fake_tfds.write(tmp_path, 'pets', flat(1), [0], 1)
  info = folder / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  message = error('pets', tmp_path)
  for part in ('tfrecord', 'array_record', 'tfds convert_format', str(folder)):
    assert part in message


def test_missing_and_damaged_files_are_one_line(tmp_path):
  folder = fake_tfds.write(tmp_path, 'pets', flat(5), [0] * 5, 1)
  file = folder / 'pets-train.array_record-00000-of-00001'
  file.write_bytes(file.read_bytes()[:30])
  assert 'split train are missing or damaged' in error('pets', tmp_path)
  file.unlink()
  assert 'split train are missing or damaged' in error('pets', tmp_path)


@pytest.mark.parametrize('config', [None, 'big'])
@pytest.mark.parametrize(
  'name',
  ['dataset_info.json', 'features.json', 'pets-train.array_record-00000-of-*'],
)
def test_a_fifo_in_a_data_set_is_refused(tmp_path, name, config):
  folder = fake_tfds.write(tmp_path, 'pets', flat(2), [0, 1], 2, config=config)
  (file,) = folder.glob(name)
  file.unlink()
  os.mkfifo(file)
  assert f'{file} is no regular file: remove it' in error('pets', tmp_path)


def test_a_class_that_cannot_be_made_here_is_read_from_its_folder(tmp_path):
  # TFDS's class of coco needs TensorFlow to be made; its data do not.
  assert 'dataset=coco' in error('coco', tmp_path)
  fake_tfds.write(tmp_path, 'coco', flat(2), [1, 0], 2)
  data = datasets.load('coco', str(tmp_path))
  np.testing.assert_array_equal(data.train.labels, [1, 0])


def test_damaged_metadata_are_one_line(tmp_path):
  for name, version in (('pets', '1.0.0'), ('mnist', '3.0.1')):
    folder = fake_tfds.write(
      tmp_path, name, flat(1, (28, 28, 1)), [0], 10, version=version
    )
    (folder / 'dataset_info.json').write_text('{')
    assert f'dataset={name}' in error(name, tmp_path)


def test_importing_is_light_and_reading_needs_no_tensorflow(tmp_path):
  fake_tfds.write(tmp_path, 'pets', flat(2), [0, 0], 1)
  script = f"""
import sys
from ssljax.data import (
  catalog,
  datasets,
  decode,
  duplicates,
  records,
  tfds_reader,
)
assert not {{'tensorflow_datasets', 'sklearn'}} & set(sys.modules)
datasets.arrays(datasets.load('pets', {str(tmp_path)!r}).train)
assert 'tensorflow' not in sys.modules
"""
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
