"""A round learns from the answers so far and publishes predictions."""

import json
import shutil
from unittest import mock

import binary
import numpy as np
import pages
import PIL.Image
import pytest

from ssljax import api
from ssljax.active import acquisition
from ssljax.active.page import (
  images,
  learner,
  service,
  store,
  suggestions,
)
from ssljax.active.page import rows as rows_lib
from ssljax.errors import InputError


def settings(page, **more):
  return learner.Settings(
    str(page.store.folder),
    str(page.images.root),
    method='supervised',
    network='linear',
    steps=20,
    **more,
  )


@pytest.fixture
def page(tmp_path):
  """Dark and bright images."""
  root = tmp_path / 'images'
  root.mkdir()
  rng = np.random.default_rng(0)
  for k in range(80):
    pixels = rng.integers(0, 60, (8, 8)) + 150 * (k % 2)
    name = f'{k:03d}-{"dark" if k % 2 == 0 else "bright"}.png'
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(root / name)
  (root / 'broken.png').write_bytes(b'no image')
  made = pages.open_page(tmp_path, classes=('dark', 'bright', 'never'))
  yield made
  made.store.close()


def truth(path):
  return path[4:].removesuffix('.png')


def answer(page, count, start=0):
  paths = [e.path for e in page.images.index.after(0, 1000)]
  good = [path for path in sorted(paths) if path != 'broken.png']
  page.answer(
    'ada',
    [{'file': p, 'label': truth(p)} for p in good[start : start + count]],
    '',
  )


def published(page):
  found = suggestions.Suggestions(page.store.folder)
  found.refresh()
  return found


@pytest.fixture
def small():
  """Trainings of a few steps."""
  with binary.small():
    yield


@pytest.mark.usefixtures('small')
def test_rounds_learn_and_publish_predictions_of_all_images(page):
  made = learner.Learner(settings(page))
  made._wait_for_images()
  made._begin()
  # Before any label: an order, a map, and no prediction.
  start = published(page)
  assert start.meta['round'] == 0 and len(start.points()) == 80
  assert start.of('001-bright.png').label is None
  assert len(set(start.by_score())) == 80
  made._read_store()
  assert not made._is_due()

  answer(page, 12)
  assert made._is_due()
  made.learn()
  first = published(page)
  paths = list(first.by_confidence())
  assert len(paths) == 80 and 'broken.png' not in paths
  assert first.classes == ['dark', 'bright']  # 'never' has no label
  assert np.mean([first.of(p).label == truth(p) for p in paths]) > 0.9
  labelled = set(page.store.state.labels())
  assert not labelled & set(list(first.by_score())[:68])
  assert not made._is_due()

  # From 50 labels on some are predicted by a model without them.
  answer(page, 48, start=12)
  assert made._is_due()
  made.learn()
  second = published(page)
  assert second.meta['round'] == 2 and second.meta['labels'] == 60
  unseen = list(second.unseen())
  assert 0 < len(unseen) < 20
  assert {path for path, *_ in unseen} <= set(page.store.state.labels())
  status = json.loads(service.status(page.store.folder).read_text())
  assert status['state'] == 'waiting' and status['round'] == 2

  # A renamed class keeps its weights; another order does, too.
  page.store.rename_class('dark', 'night')
  answer(page, 8, start=60)
  made._read_store()
  with mock.patch.object(api, 'fit', wraps=api.fit) as fit:
    made.learn()
  assert fit.call_args.kwargs['init_from']
  assert published(page).classes == ['night', 'bright']

  # A new process goes on from there.
  again = learner.Learner(settings(page))
  again._begin()
  assert again.round == 3 and again.model.classes == ('night', 'bright')
  assert not again._is_due()  # nothing is new
  assert again.unseen.keys() >= {path for path, *_ in unseen}

  begins_with_the_weights_of_another_store(page, paths)


def begins_with_the_weights_of_another_store(page, paths):
  """Begin a store with the weights of `page`; it waits for each class."""
  root = page.images.root
  answers = store.Store(root.parent / 'other', str(root), ['bright', 'night'])
  images.Images(root, answers.folder).scan()
  other = learner.Learner(
    settings(page, run=str(page.store.folder / 'model'))._replace(
      store=str(answers.folder)
    )
  )
  other._begin()
  found = suggestions.Suggestions(answers.folder)
  found.refresh()
  right = [
    found.of(p).label == truth(p).replace('dark', 'night') for p in paths
  ]
  assert found.meta['round'] == 0 and np.mean(right) > 0.9
  bright = [{'file': p, 'label': 'bright'} for p in paths if 'bright' in p]
  answers.answer('ada', bright[:20])
  other._read_store()
  assert other._missing() == ['night'] and not other._is_due()
  answers.close()


def test_a_label_of_a_file_that_changed_is_not_learned_from(page):
  answer(page, 4)
  made = learner.Learner(settings(page))
  made._read_store()
  assert len(made._labels()) == 4
  PIL.Image.new('L', (8, 8)).save(page.images.root / '001-bright.png')
  (page.images.root / '002-dark.png').unlink()
  page.images.scan()
  assert set(made._labels()) == {'000-dark.png', '003-bright.png'}


def test_pixels_are_decoded_once_and_again_after_a_change(page, monkeypatch):
  entries = page.images.index.after(0, 1000)
  pixels = rows_lib.Pixels(page.store.folder, page.images.root, (8, 8, 1))
  first, good = pixels.read(entries)
  assert good.sum() == 80
  assert not good[[e.path for e in entries].index('broken.png')]
  decoded = []
  monkeypatch.setattr(pixels, '_decode', lambda e, out: decoded.append(e.path))
  second, again = pixels.read(entries)
  np.testing.assert_array_equal(first, second)
  np.testing.assert_array_equal(good, again)
  (page.images.root / '000-dark.png').write_bytes(b'x')
  page.images.scan()
  pixels.read(page.images.index.after(0, 1000))
  assert decoded == ['000-dark.png']


def test_the_shape_is_the_median_side_and_grey_stays_grey(tmp_path):
  root = pages.draw(tmp_path / 'images', 3, size=(20, 12))
  page = pages.open_page(tmp_path)
  entries = page.images.index.after(0, 10)
  assert rows_lib.shape_of(root, entries, None) == (12, 12, 1)
  assert rows_lib.shape_of(root, entries, 16) == (16, 16, 1)
  pages.noise(0, (100, 80)).save(root / 'colour.png')
  page.images.scan()
  entries = page.images.index.after(0, 10)
  assert rows_lib.shape_of(root, entries, None)[-1] == 3
  page.store.close()


@pytest.mark.parametrize('name', learner.BY_SCORE)
def test_scores_are_those_of_the_acquisition_functions(name):
  p = np.random.default_rng(0).dirichlet(np.ones(4), 9)
  sampled = acquisition.one_pass(np.log(p).astype(np.float32))
  wanted = getattr(acquisition, name)(sampled)
  np.testing.assert_allclose(learner._scores(name, p), wanted, atol=1e-5)


def test_random_scores_do_not_depend_on_the_predictions(page):
  made = learner.Learner(settings(page, acquire='random'))
  p = np.random.default_rng(0).dirichlet(np.ones(3), 500)
  scores = made._scores(None, p, p)
  assert len(set(scores)) == 500
  assert abs(np.corrcoef(scores, p.max(axis=-1))[0, 1]) < 0.2


def write_features(page, width=3):
  """Write features that tell the classes; the first image has none."""
  names = [e.path for e in page.images.index.after(0, 1000)]
  names = [name for name in sorted(names) if name != 'broken.png'][1:]
  values = np.random.default_rng(0).normal(size=(len(names), width))
  values[:, 1] += [9 * (truth(name) == 'dark') for name in names]
  path = page.store.folder.parent / 'features.npz'
  np.savez(path, train=values.astype(np.float32), train_files=names)
  return str(path), names


@pytest.mark.usefixtures('small')
def test_a_round_learns_from_features_by_file_name(page):
  path, names = write_features(page)
  made = learner.Learner(
    settings(page, features=path, acquire='bald')._replace(network=None)
  )
  made._begin()
  assert set(published(page).by_score()) == set(names)
  answer(page, 12)
  made._read_store()
  made.learn()
  assert made.model.config.network.network == 'mlp'  # it has dropout
  assert made.model.shape == (3,)
  found = published(page)
  assert set(found.by_confidence()) == set(names)  # not broken, nor the first
  right = [found.of(name).label == truth(name) for name in names]
  assert np.mean(right) > 0.9
  # Passes with dropout disagree about some images more than about others.
  values = made.rows.read(page.images.index.after(0, 1000))[0]
  sampled = made.model.sampled(values, passes=7, seed=1)
  spread = sampled.square - sampled.mean**2
  assert spread.max() > 10 * abs(spread.min())
  other = made.model.sampled(values, passes=7, seed=2)
  assert not np.allclose(sampled.mean, other.mean)


@pytest.mark.usefixtures('small')
def test_labels_without_features_wait(page):
  path, names = write_features(page)
  made = learner.Learner(settings(page, features=path))
  made._begin()
  entries = page.images.index.after(0, 1000)
  (lost,) = {e.path for e in entries} - {*names, 'broken.png'}

  def give(file, label):
    page.answer('ada', [{'file': file, 'label': label}], '')
    made._next = 0.0
    made._read_store()
    made.learn()

  give(lost, 'never')
  give(names[0], truth(names[0]))
  said = service.status(page.store.folder).read_text()
  assert made.round == 0 and 'two classes on images with features' in said
  give(names[1], truth(names[1]))
  assert set(made.model.classes) == {'dark', 'bright'}


@pytest.mark.usefixtures('small')
def test_another_network_begins_from_new_weights(page):
  path, _ = write_features(page)
  asked = settings(page, features=path)
  answer(page, 12)
  for network, acquire, used in (
    ('linear', 'entropy', 'linear'),
    (None, 'bald', 'mlp'),
    (None, 'entropy', 'mlp'),
  ):
    made = learner.Learner(asked._replace(network=network, acquire=acquire))
    made._begin()
    made.learn()
    assert made.model.config.network.network == used


@pytest.mark.usefixtures('small')
def test_bald_needs_dropout(page):
  made = learner.Learner(settings(page, acquire='bald'))
  made._begin()
  answer(page, 12)
  made._read_store()
  with pytest.raises(InputError, match='linear has no dropout'):
    made.learn()


@pytest.mark.parametrize(
  'content',
  [
    *(b'', b'PK', {'train': np.zeros((2, 3)), 'train_labels': [0, 1]}),
    {'train': np.zeros((2, 3)), 'train_files': ['a.png']},
    {'train': np.full((1, 3), np.nan), 'train_files': ['a.png']},
    {'train': np.zeros((2, 3)), 'train_files': ['a.png', 'a.png']},
    {'train': np.array([['x']]), 'train_files': ['a.png']},
    {'train': np.zeros((1, 3)), 'train_files': 'a.png'},
    {'train': np.zeros((1, 3)), 'train_files': [b'a.png']},
    {'train': np.zeros((1, 0)), 'train_files': ['a.png']},
    {'train': np.full((1, 3), 1e300), 'train_files': ['a.png']},
    {
      **{'train': np.zeros((1, 3)), 'train_files': ['a.png']},
      **{'test': np.zeros((1, 4)), 'test_files': ['b.png']},
    },
  ],
)
def test_a_file_without_features_is_named(content, tmp_path):
  path = tmp_path / 'bad.npz'
  if isinstance(content, dict):
    np.savez(path, **content)
  else:
    path.write_bytes(content)
  with pytest.raises(InputError, match=r'features=.*bad\.npz: .*ssljax embed'):
    rows_lib.Features(str(path))


@pytest.mark.parametrize('name', learner.BY_COMPARISON)
def test_comparisons_choose_images_without_labels(name):
  rng = np.random.default_rng(0)
  sample = learner._Sample(50, rng)
  p = rng.dirichlet(np.ones(3), 40).astype(np.float32)
  sample.add(list(map(str, range(40))), p, rng.normal(size=(40, 5)))
  labelled = np.arange(40) < 10
  rows = learner._compared(name, sample, labelled, 8, 0)
  assert len(set(map(int, rows))) == 8 and min(rows) >= 10


def test_a_sample_is_uniform_and_of_its_size():
  rng, counts = np.random.default_rng(0), np.zeros(20)
  for _ in range(500):
    sample = learner._Sample(5, rng)
    for start in (0, 7, 14):
      part = np.arange(start, min(20, start + 7))
      sample.add(list(part), part[:, None], part[:, None])
    assert len(set(sample.paths)) == 5
    assert [row[0] for row in sample.p] == sample.paths
    counts[np.array(sample.paths)] += 1
  # 125 each; four standard deviations are 39.
  assert abs(counts - 125).max() < 39


def test_the_map_shows_the_two_principal_components():
  rng = np.random.default_rng(0)
  values = rng.normal(size=(100, 4)) * [1, 9, 0.1, 3]
  found = learner.principal(values, 2)
  centred = values - values.mean(axis=0)
  vectors = np.linalg.svd(centred)[2]
  wanted = centred @ vectors[:2].T
  np.testing.assert_allclose(abs(found), abs(wanted), atol=1e-8)
  assert learner.principal(np.ones((3, 1)), 2).shape == (3, 2)
  # More columns than rows: the same by a smaller matrix.
  wide = np.concatenate([values[:20], np.zeros((20, 30))], axis=1)
  narrow = learner.principal(values[:20], 2)
  np.testing.assert_allclose(
    abs(learner.principal(wide, 2)), abs(narrow), atol=1e-6
  )


def test_a_store_that_vanishes_does_not_look_like_new_answers(page):
  made = learner.Learner(settings(page))
  made._read_store()
  shutil.move(page.store.folder / 'labels.jsonl', page.store.folder / 'x')
  assert not made._is_due()
