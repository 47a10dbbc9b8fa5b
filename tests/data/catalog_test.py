import pytest

from ssljax.data import catalog, datasets
from ssljax.errors import InputError


def described(dataset):
  """The properties that an outline shares with its data set."""
  parts = dataset.train, dataset.test
  return dataset.classes, [
    (len(part.labels), part.shape, part.dtype, part.crop is not None)
    for part in parts
  ]


@pytest.mark.parametrize(
  ('name', 'how'),
  [
    ('digits', {}),
    ('digits', dict(image_size=12)),
    ('yin-yang', {}),
    ('yin-yang-redrawn', {}),
    ('cifar10', {}),
    ('mnist', dict(image_size=14, train_split='test', test_split='train')),
    ('mnist', dict(train_split='test', with_test=False)),
    ('stl10', dict(train_split='train+unlabelled')),
    ('imagenet2012', dict(image_size=32)),
    ('imagenet2012', dict(image_size=32, crop=True)),
  ],
)
def test_an_outline_describes_the_data_set_on_disk(name, how, sets):
  got = catalog.outline(name, str(sets), **how)
  assert described(got) == described(datasets.load(name, str(sets), **how))


def test_sets_that_are_not_on_disk_have_the_sizes_of_tfds():
  got = catalog.outline('svhn_cropped:3.1.0', train_split='train+extra')
  # http://ufldl.stanford.edu/housenumbers
  assert len(got.train.labels) == 73257 + 531131
  assert len(got.test.labels) == 26032
  imagenet = catalog.outline('imagenet2012')
  assert imagenet.train.shape == (224, 224, 3)
  assert (len(imagenet.train.labels), len(imagenet.test.labels)) == (
    1281167,
    50000,
  )


@pytest.mark.parametrize('name', catalog.KNOWN)
def test_known_classes_and_images_are_those_of_tfds(name, tmp_path):
  import tensorflow_datasets as tfds

  features = tfds.builder(name, data_dir=str(tmp_path)).info.features
  classes, shape, _ = catalog.KNOWN[name]
  assert features['label'].num_classes == classes
  assert features['image'].shape == shape


def test_an_outline_prepares_nothing_in_an_empty_folder(tmp_path):
  got = catalog.outline('mnist', str(tmp_path))
  assert len(got.train.labels) == 60000
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('name', 'how', 'expected'),
  [
    ('food101', {}, 'dataset=food101: its size is not known'),
    ('mnist', dict(train_split='train[:9%]'), 'train_split=train'),
    ('mnist', dict(test_split='rest'), 'test_split=rest'),
    ('mnist', dict(image_size=0), 'image_size'),
    ('mnist', dict(train_split='train+train'), 'train_split=train+train'),
    ('mnist', dict(train_split='train+test'), 'train_split=train+test, test_'),
    ('stl10', dict(test_split='unlabelled+train'), 'train_split=train, test_'),
  ],
)
def test_an_unknown_size_is_refused(name, how, expected):
  with pytest.raises(InputError) as error:
    catalog.outline(name, **how)
  assert str(error.value).startswith(expected)


def test_an_outline_has_no_images():
  with pytest.raises(NotImplementedError):
    catalog.outline('mnist').train.read([0])


def test_two_are_joined_at_the_larger_image():
  digits, svhn = map(catalog.outline, ('digits', 'svhn_cropped'))
  both = catalog.joined(digits, svhn)
  assert both.train.shape == (32, 32, 3)
  assert len(both.train.labels) == 1297 + 73257
  assert both.unlabelled_from == 1297
  with pytest.raises(InputError, match='target=cifar100'):
    catalog.joined(digits, catalog.outline('cifar100'))
