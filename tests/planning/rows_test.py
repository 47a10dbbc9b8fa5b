"""The rows that a plan counts, and the sizes it refuses, from outlines."""

import pytest

from ssljax import config as config_lib
from ssljax.errors import InputError
from ssljax.planning import plan


def count(**values):
  config = config_lib.from_values('llp', dict(steps=1) | values)
  return plan.count_rows(config, plan.outline_of(config))


@pytest.mark.parametrize(
  ('values', 'expected'),
  [
    # digits: 1,297 images, 10 classes.
    (dict(labels='10', unlabelled='rest'), (100, 1197)),
    (dict(labels='10', unlabelled='all'), (100, 1297)),
    (dict(labels='3', unlabelled='200', validation=7), (30, 200)),
    (dict(labels='3', unlabelled='all:1290', validation=7), (30, 1290)),
    (dict(labels='all', unlabelled='all', validation=7), (1290, 1290)),
    (dict(labels='up_to:10', unlabelled='rest'), (100, 1197)),
    (dict(labels='up_to:5000', unlabelled='all'), (1290, 1297)),
    # The source of an adaptation is labelled, and held out from.
    (
      dict(labels='5', source='digits', target='mnist', validation=7),
      (50, 60000),
    ),
    (dict(labels='all', source='digits', target='mnist'), (1297, 60000)),
  ],
)
def test_rows_are_counted_as_a_split_has_them(values, expected):
  assert count(**values) == expected


@pytest.mark.parametrize(
  ('values', 'expected'),
  [
    (
      dict(unlabelled='99999999', labels='10'),
      'unlabelled=99999999: 1197 images are available; give at most 1197',
    ),
    (
      dict(unlabelled='all:1298'),
      'unlabelled=all:1298: 1297 images are available; give at most all:1297',
    ),
    (
      dict(unlabelled='60001', source='digits', target='mnist'),
      'unlabelled=60001: 60000 images are available',
    ),
    (
      dict(labels='all', unlabelled='1'),
      'unlabelled=1: 0 images are available; give unlabelled=rest',
    ),
    (dict(labels='130'), 'labels=130: a class has about 129 labelled images'),
    (dict(labels='0'), 'labels=0: a class has about 129'),
    (dict(labels='up_to:0'), 'labels=up_to:0: a class has about 129'),
    (dict(validation=1297), 'validation=1297: 1297 images have a label'),
    (dict(validation=1290), 'dataset=digits: has 7 labelled training images'),
    (dict(image_size=100_000), 'image_size=100000: give a side of at most'),
    (dict(dataset='mnist', train_split='train+test'), 'train_split=train+test'),
  ],
)
def test_more_than_there_is_is_refused(values, expected):
  with pytest.raises(InputError) as raised:
    count(**values)
  assert str(raised.value).startswith(expected)
