"""Augmentations by name, with parameters."""

import jax
import numpy as np
import pytest
from views import compiled, picture

from ssljax import config, registry
from ssljax.augment import (
  geometric,
  imagenet,
  named,
  randaugment,
  standard,
)
from ssljax.errors import InputError
from ssljax.runs import build

IMAGE = picture(20, 18, 3)
KEY = jax.random.key(5)


def same(one, other):
  """True if two augmentations give the same bits."""
  return np.array_equal(*(compiled(f)(KEY, IMAGE) for f in (one, other)))


@pytest.mark.parametrize(
  ('name', 'augmentation'),
  [
    ('flip', standard.flip),
    ('translate', standard.translate(2)),
    ('translate:2', standard.translate(2)),
    ('translate:4', standard.translate(4)),
    ('translate4', standard.translate(4)),
    ('crop_or_resize:1', standard.crop_or_resize(1)),
    ('rotate:0.5', geometric.rotate(0.5)),
    ('turn_scale:20', geometric.turn_and_scale(20.0, 0.05)),
    ('turn_scale:20:0.2', geometric.turn_and_scale(20.0, 0.2)),
    ('noise', standard.noise(0.15)),
    ('noise:1e-1', standard.noise(0.1)),
    ('affine:0.1:1', geometric.affine(0.1, 1)),
    ('blur:5', standard.blur(5)),
    ('cutout:4', standard.cutout(4)),
    ('cutout:0.5', standard.cutout(9)),  # half of 18
    ('grey:1', imagenet.grey(1.0)),
    ('randaugment', randaugment.randaugment(2, 10)),
    ('randaugment:1', randaugment.randaugment(1, 10)),
    ('randaugment:3:4', randaugment.randaugment(3, 4)),
    ('randaugment_fixed:1:9', randaugment.randaugment(1, 9, fixed=True)),
  ],
)
def test_a_name_stands_for_an_augmentation(name, augmentation):
  assert same(named.chosen(name), augmentation)


def test_another_parameter_gives_another_image():
  assert not same(named.chosen('noise:0.1'), named.chosen('noise:0.2'))
  assert not same(named.chosen('noise'), named.chosen('noise:0.2'))


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('fliip', 'augment=fliip: there is no such augment; give flip'),
    ('randaugmnt:2', 'there is no such augment; give randaugment'),
    ('flip:2', 'augment=flip:2: too many parameters: give flip'),
    ('translate4:2', 'too many parameters: give translate4'),
    ('translate:', "augment=translate:: '' is not a number"),
    ('translate:a', "'a' is not a number: give translate:AMOUNT"),
    ('translate:1_0', "'1_0' is not a number"),
    ('translate:nan', "'nan' is not a number"),
    ('translate:-1', 'augment=translate:-1: amount=-1.0: give 0'),
    ('translate:1.5', r'amount=1\.5: give a whole number of pixels'),
    ('translate:1:2', 'too many parameters: give translate:AMOUNT'),
    ('cutout:1.5', r'augment=cutout:1.5: size=1\.5'),
    ('blur:4', 'size=4: give an odd number'),
    ('blur:1001', 'size=1001: give a size below 1000'),
    ('randaugment:2:11', 'magnitude=11: give a number from 0 to 10'),
    ('randaugment:0', 'ops=0'),
    ('randaugment:2:3:4', 'many parameters: give randaugment:OPS:MAGNITUDE'),
  ],
)
def test_a_name_that_stands_for_nothing_is_refused(name, message):
  with pytest.raises(InputError, match=message):
    named.chosen(name)
  with pytest.raises(InputError, match=message):
    config.from_values('supervised', {'augment': ('flip', name), 'steps': 1})


def test_the_message_names_no_parameter_as_a_setting():
  # `augment` becomes a flag on the command line; `amount` is none.
  with pytest.raises(InputError) as caught:
    named.chosen('translate:-1')
  assert '`augment`' in caught.value.marked
  assert '`amount`' not in caught.value.marked


@pytest.mark.parametrize(
  ('names', 'before', 'after'),
  [
    ((), None, None),
    (('flip', 'translate:4'), None, ('flip', 'translate:4')),
    (('crop', 'grey', 'flip'), ('crop', 'grey'), ('flip',)),
    (
      ('translate:4', 'randaugment:2:10', 'cutout:0.5'),
      ('translate:4', 'randaugment:2:10'),
      ('cutout:0.5',),
    ),
    (('flip', 'grey:0.5'), ('flip', 'grey:0.5'), None),
  ],
)
def test_a_chain_is_split_after_the_last_that_needs_pixels(
  names, before, after
):
  for got, expected in zip(
    named.split_chain(names), (before, after), strict=True
  ):
    if expected is None:
      assert got is None
    else:
      assert same(got, standard.chain(*map(named.chosen, expected)))


def test_every_name_is_listed_with_its_parameters_and_described():
  for name in named.AUGMENTATIONS:
    assert callable(named.chosen(name))
  for name, factory in named.FACTORIES.items():
    assert name in named.AUGMENTATIONS
    assert named.usage(name) in named.__doc__
    assert same(named.chosen(name), factory.make(**factory.defaults))


def test_a_users_augmentation_takes_its_place():
  dark = lambda key, image: 0 * image
  registry.register_augmentation('dark', dark)
  try:
    assert named.chosen('dark') is dark
    names = ('flip', 'dark')
    made = config.from_values('supervised', {'augment': names, 'steps': 1})
    assert made.augmentation.augment == names
    with pytest.raises(InputError, match='too many parameters: give dark'):
      named.chosen('dark:1')
    with pytest.raises(InputError, match='another augmentation'):
      registry.register_augmentation('translate', dark)
  finally:
    del named.AUGMENTATIONS['dark']


def test_a_chain_is_recorded_as_given():
  names = ('translate:4', 'randaugment:2:10', 'cutout:0.5')
  line = '--augment=translate:4,randaugment:2:10,cutout:0.5'
  made = config.from_flags('supervised', [line, '--steps=1'])
  assert made.augmentation.augment == names
  assert line in config.to_flags(made)
  assert config.from_json(config.to_json(made)) == made


def test_a_run_augments_before_and_after_its_preprocessing():
  names = ('translate:4', 'randaugment:1:5', 'cutout:0.5')
  before, after = build.make_augmentations(names, on_host=False)
  assert same(before, standard.chain(*map(named.chosen, names[:2])))
  assert same(after, standard.chain(standard.cutout(0.5)))
  # The feed has cropped already.
  before, after = build.make_augmentations(('crop', 'flip'), on_host=True)
  assert before is None
  assert same(after, standard.chain(standard.flip))


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('cutout:16', 'cutout: a square of 16 pixels can cover a whole image'),
    ('translate:8', '8 pixels are too many for images of 8x9 pixels: .* 7'),
    ('translate:999999999', '.* too many for images of 8x9 pixels'),
    ('crop_or_resize:8', '8 pixels are too many'),
  ],
)
def test_a_run_refuses_augmentations_of_larger_images(name, message):
  augmentations = filter(None, build.make_augmentations(('flip', name), False))
  with pytest.raises(InputError, match=f'augment=flip,{name}: {message}'):
    build.refuse_small_images(('flip', name), augmentations, (8, 9, 1))
