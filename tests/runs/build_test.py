"""Runs made of configs: what a preprocessing is fitted to, labels, copies."""

import pathlib

import jax
import numpy as np
import pytest

from ssljax import config as config_lib
from ssljax.augment import preprocess
from ssljax.core import UNLABELLED
from ssljax.data import arrays, datasets, splits
from ssljax.errors import InputError
from ssljax.runs import build, execute, load, summary

ROWS, TESTS = 60, 20
TRUTH = np.arange(ROWS) % 3


def dataset(seed=0, copies=0):
  """Images whose mean tells which of them are taken, and brighter test images.

  Image i has 2^(i mod 6) + i in every pixel.
  """
  i = np.arange(ROWS)
  values = (2 ** (i % 6) + i).astype(np.uint8)
  images = np.tile(values[:, None, None, None], (1, 8, 8, 1))
  tests = np.full((TESTS, 8, 8, 1), 250, np.uint8)
  tests[:, 0, 0, 0] = np.arange(TESTS)
  tests[:copies] = images[:copies]
  return arrays.from_arrays(images, TRUTH, tests, np.arange(TESTS) % 3)


def config(**values):
  small = dict(
    network='digits',
    batch_labelled=3,
    batch_unlabelled=6,
    steps=2,
    labels='4',
    preprocess='standardize',
  )
  return config_lib.from_values('madnn', small | values)


def fitted_to(data, mask):
  """The standardization of the images of a mask."""
  images = datasets.arrays(data.train)[mask]
  return preprocess.standardize().fit(images)


def made(data=None, **values):
  return build.build(config(**values), dataset=data or dataset())


def mean_of(fitted):
  return float(np.ravel(fitted.mean)[0])


@pytest.mark.parametrize('feed', ['resident', 'stream'])
def test_a_preprocessing_is_fitted_to_all_training_images_and_no_test_image(
  feed,
):
  data = dataset()
  for values in (dict(), dict(unlabelled='all'), dict(seeds=2)):
    run = made(data, feed=feed, **values)
    expected = fitted_to(data, np.ones(ROWS, bool))
    jax.tree.map(np.testing.assert_array_equal, run.data.fitted, expected)
    assert run.data.fitted_by_seed is None


@pytest.mark.parametrize(
  'values',
  [
    dict(validation=9),
    dict(validation=9, seeds=3),
    dict(unlabelled='7'),
    dict(unlabelled='all:7'),
    dict(unlabelled='7', validation=9),
  ],
)
def test_a_preprocessing_is_not_fitted_to_images_the_run_must_not_see(values):
  data = dataset()
  run = made(data, **values)
  split = run.drawn[0]
  seen = np.zeros(ROWS, bool)
  seen[split.labelled] = seen[split.unlabelled] = True
  assert not seen[split.validation].any() and seen.sum() < ROWS
  jax.tree.map(
    np.testing.assert_array_equal, run.data.fitted, fitted_to(data, seen)
  )
  everything = fitted_to(data, np.ones(ROWS, bool))
  assert mean_of(run.data.fitted) != mean_of(everything)


@pytest.mark.parametrize('name', ['zca', 'gcn_zca'])
def test_other_fitted_preprocessings_see_no_held_out_image_either(name):
  rng = np.random.default_rng(0)
  # Contrast normalisation makes all images of one value equal.
  pixels = rng.integers(0, 256, (ROWS, 8, 8, 1)).astype(np.uint8)
  of = lambda pixels: dataset()._replace(train=arrays.in_memory(pixels, TRUTH))
  run = made(of(pixels), validation=9, preprocess=name)
  # The same with other held-out images.
  held_out = run.drawn[0].validation
  changed = pixels.copy()
  changed[held_out] //= 2
  other = made(of(changed), validation=9, preprocess=name)
  for one, same in pairs(run, other):
    np.testing.assert_array_equal(one, same)
  # Where no image is held out the changed ones count.
  for one, differs in pairs(
    made(of(pixels), preprocess=name), made(of(changed), preprocess=name)
  ):
    assert np.any(one != differs)


def pairs(run, other):
  """Pair the arrays of the fitted preprocessings of two runs."""
  each = [jax.tree.leaves(r.data.fitted) for r in (run, other)]
  assert each[0]
  return zip(*each, strict=True)


def test_seeds_that_see_other_images_have_a_preprocessing_each():
  data = dataset()
  both = made(data, unlabelled='7', seeds=2, seed=3)
  assert both.data.fitted == () and set(both.data.fitted_by_seed) == {3, 4}
  for seed, fitted in both.data.fitted_by_seed.items():
    alone = made(data, unlabelled='7', seed=seed)
    jax.tree.map(np.testing.assert_array_equal, fitted, alone.data.fitted)
  means = {mean_of(f) for f in both.data.fitted_by_seed.values()}
  assert len(means) == 2


def test_the_images_of_a_source_may_be_seen():
  split = splits.draw_split(
    np.where(np.arange(ROWS) < 40, TRUTH, UNLABELLED).astype(np.int32),
    3,
    per_class=2,
    seed=0,
    among=np.arange(ROWS) >= 40,
    validation=5,
    count=10,
  )
  seen = split.seen(unlabelled_from=40)
  # 40 of the source but 5 held out, and 10 of the target.
  assert seen[:40].sum() == 35 and seen[40:].sum() == 10
  assert not seen[split.validation].any()
  assert split.seen().sum() == 6 + 10


def test_copies_of_training_images_are_counted_and_said():
  for feed in ('resident', 'stream'):
    assert made(feed=feed).copies == 0
    run = made(dataset(copies=3), feed=feed)
    assert run.copies == 3
    said = summary.opening(run, pathlib.Path('x'))
    assert '3 of 20 test images are exact copies of training images' in said
  assert 'copies' not in summary.opening(made(), pathlib.Path('x'))
  unknown = dataset()
  unknown = unknown._replace(train=unknown.train._replace(digests=None))
  assert made(unknown, feed='stream').copies is None


def test_the_labels_of_rarer_classes_are_said_at_the_start():
  truth = np.repeat([0, 1, 2], [30, 27, 3])
  data = arrays.from_arrays(datasets.arrays(dataset().train), truth)
  run = made(data, labels='up_to:4')
  said = summary.opening(run, pathlib.Path('x'))
  assert '11 labelled (up to 4 of each class, fewer of 2 (3))' in said
  with pytest.raises(InputError, match="labels=4: class '2' has 3 labelled"):
    made(data, labels='4')
  assert '12 labelled (4 of each class)' in summary.opening(
    made(), pathlib.Path('x')
  )


def losses(folder=None, **values):
  """{(seed, step): loss} of a run of digits that sees few images."""
  how = dict(
    network='deepbass_toy',
    batch_labelled=4,
    steps=2,
    record_every=1,
    labels='1',
    unlabelled='all:5',
    preprocess='standardize',
  )
  run_config = config_lib.from_values('supervised', how | values)
  found = {}

  def note(measurement):
    if 'loss' in measurement:
      place = measurement['seed'], measurement['step']
      found[place] = measurement['loss']

  how = dict(on_measurement=note, progress=False)
  if folder is None:
    execute.train(build.build(run_config), **how)
  else:
    execute.train_in_folder(
      lambda: build.build(run_config), run_config, folder, say=str, **how
    )
  return found


def test_a_seed_is_trained_alike_alone_and_beside_others(tmp_path):
  in_turn = losses(tmp_path / 'run', seeds=2)
  at_once = losses(seeds=2, seeds_at_once=2)
  alone = losses(seed=1)
  assert set(in_turn) == {(seed, step) for seed in (0, 1) for step in (1, 2)}
  assert {place: in_turn[place] for place in alone} == alone
  np.testing.assert_allclose(
    *([by[place] for place in sorted(in_turn)] for by in (in_turn, at_once)),
    rtol=1e-5,
  )
  # A finished run is loaded with the preprocessing of its seed.
  means = [
    np.asarray(load.load(tmp_path / 'run', seed).program.fitted.mean)
    for seed in (0, 1)
  ]
  data = datasets.load('digits')
  for seed, mean in enumerate(means):
    split = splits.draw_split(
      data.train.labels,
      10,
      per_class=1,
      seed=seed,
      unlabelled='all',
      count=5,
    )
    np.testing.assert_array_equal(mean, fitted_to(data, split.seen()).mean)
  assert means[0] != means[1]


def test_a_result_names_the_copy_of_the_data_set():
  jpeg = dataset()._replace(name='cifar10', variant='CIFAR-10 (JPEG)')
  run = made(jpeg)
  result = summary.begin(run)
  assert result['dataset'] == 'cifar10'
  assert result['data_variant'] == 'CIFAR-10 (JPEG)'
  # The same images by either feed, and other ones.
  assert len(result['data_fingerprint']) == 16
  streamed = made(jpeg, feed='stream')
  assert streamed.fingerprint == run.fingerprint
  assert made(dataset(copies=1)).fingerprint != run.fingerprint
  assert made().dataset.variant == ''
  folder = pathlib.Path('anywhere')
  assert 'cifar10 = CIFAR-10 (JPEG): 60' in summary.opening(run, folder)
  result |= {'test_error': {'last': [1.0]}}
  result['arms'] = {
    'madnn': {'steps': 1, 'seconds': 1.0, 'test_error': {'last': [1.0]}}
  }
  assert 'in % on CIFAR-10 (JPEG), 4 labels' in summary.table(result, folder)


def test_the_network_of_a_run_has_the_recorded_momentum():
  # 60 images, 48 of them unlabelled: 8 steps of 6 are an epoch.
  run = made(steps=None, epochs=2.0)
  assert run.config.network.bn_momentum == 1 - 6 / 16
  image = np.zeros([3, 8, 8, 1], np.float32)
  params, stats = run.net.init(jax.random.key(0), image)
  _, after = run.net.train(params, stats, image, jax.random.key(1))
  # The weight of one step is 1 − m.
  weights = {float(b['BatchNorm_0']['weight']) for b in after.values()}
  assert weights == {6 / 16}


def test_the_settings_of_rare_classes_reach_every_stage_that_draws_labels():
  values = dict(logit_adjustment=0.5, sampling='classes')
  for method in made(**values).methods:
    for stage in method.stages:
      assert stage.batch_spec.class_aware
      assert stage.logit_adjustment == (0.5, 3)
  for method in made().methods:
    for stage in method.stages:
      assert not stage.batch_spec.class_aware and not stage.logit_adjustment
  # All images of a step of LLP are drawn as one.
  small = dict(network='digits', batch_labelled=3, batch_unlabelled=6)
  small |= dict(steps=2, labels='4')
  other = config_lib.from_values('llp', small | {'sampling': 'classes'})
  with pytest.raises(InputError, match='sampling=classes: llp draws'):
    build.build(other, dataset=dataset())
