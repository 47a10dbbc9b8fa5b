import csv
import types

import folders
import numpy as np
import pytest

import ssljax
from ssljax import prediction, ranking
from ssljax.analysis import calibration
from ssljax.config import from_values
from ssljax.errors import InputError
from ssljax.runs import build, execute


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run on a folder of two brightnesses with five folds."""
  root = tmp_path_factory.mktemp('images')
  rng = np.random.default_rng(0)
  files = {
    f'{name}/{i}.png': folders.image(int(base + rng.integers(40)), (6, 6))
    for name, base in (('dark', 20), ('light', 170))
    for i in range(6)
  }
  files['dark/5.png'] = folders.image(200, (6, 6))  # a wrong label
  files |= {f'unlabelled/{i}.png': folders.image(30 * i) for i in range(8)}
  folders.write(root, files)
  where = tmp_path_factory.mktemp('run') / 'run'
  train('supervised', root, where, steps=60, seeds=5, learning_rate=0.02)
  return where, root


def train(method, root, where, **settings):
  config = from_values(
    method,
    dict(
      images=str(root),
      labels='all',
      hold_out='auto',
      image_size=6,
      network='mlp',
      batch_labelled=8,
      batch_unlabelled=8,
      augment=(),
      workdir=str(where),
    )
    | settings,
  )
  execute.train_in_folder(
    lambda: build.build(config), config, where, say=lambda text: None
  )


def test_a_run_is_tested_on_the_labels_that_each_seed_holds_out(run):
  predictor = prediction.load(run[0])
  held_out = predictor.held_out
  # One of six images of a class in each fold of five.
  assert len(held_out.rows) == 10
  assert np.bincount(held_out.labels).tolist() == [5, 5]
  for seed in range(5):
    model = ssljax.load(run[0], seed=seed)
    split = build.draw_splits(model.config, predictor.dataset)[seed]
    logits = model.logits(predictor.dataset.train.read(split.test))
    at = np.searchsorted(held_out.rows, split.test)
    np.testing.assert_allclose(
      calibration.softmax(held_out.logits[at]),
      calibration.softmax(logits),
      rtol=1e-4,
    )
  assert predictor.measured['images'] == 10


def test_the_vote_is_the_mean_of_all_models(run):
  predictor = prediction.load(run[0])
  images = predictor.dataset.train.read([0, 7, 15])
  models = [ssljax.load(run[0], seed=seed) for seed in range(5)]
  mean = np.mean([model.predict_proba(images) for model in models], axis=0)
  expected = mean ** (1 / predictor.temperature)
  expected /= expected.sum(axis=1, keepdims=True)
  found = predictor.predict_proba(images)
  np.testing.assert_allclose(found, expected, rtol=1e-3)


def read(path):
  with path.open() as file:
    return list(csv.DictReader(file))


def test_every_image_has_a_line_and_wrong_labels_are_named(run, tmp_path):
  predictor = prediction.load(run[0])
  out = tmp_path / 'p.csv'
  images = prediction.training_images(predictor)
  assert prediction.write(predictor, images, out) == {}
  rows = read(out)
  assert [row['file'] for row in rows] == list(predictor.dataset.train.names)
  p = predictor.predict_proba(predictor.dataset.train.read(range(len(rows))))
  for row, own in zip(rows, p, strict=True):
    assert row['label'] == predictor.classes[int(own.argmax())]
    assert float(row['confidence']) == pytest.approx(own.max(), abs=1e-4)
    assert float(row['margin']) == pytest.approx(abs(own[0] - own[1]), abs=2e-4)
    assert row['label'] in row['set'].split('|')
    assert (row['given'] == '') == row['file'].startswith('unlabelled')
  wrong = [row['file'] for row in rows if row['disagrees'] == '1']
  assert 'dark/5.png' in wrong and len(wrong) < 4
  assert not out.with_name('p.csv.partial').exists()


def test_an_interrupted_file_is_continued(run, tmp_path, monkeypatch):
  monkeypatch.setattr(prediction, 'CHUNK', 4)
  predictor = prediction.load(run[0])
  images = prediction.training_images(predictor)
  whole, out = tmp_path / 'whole.csv', tmp_path / 'p.csv'
  prediction.write(predictor, images, whole)
  read_rows = []

  def failing(rows):
    read_rows.append(rows)
    if len(read_rows) > 2 and rows[0] >= 8:
      raise KeyboardInterrupt
    return images.read(rows)

  with pytest.raises(KeyboardInterrupt):
    prediction.write(predictor, images._replace(read=failing), out, key='a')
  assert not out.exists()
  partial = out.with_name('p.csv.partial')
  with partial.open('a') as file:  # a line that a kill cut short
    file.write('half,a li')
  seen = []
  noted = images._replace(
    read=lambda rows: seen.append(rows) or images.read(rows)
  )
  prediction.write(predictor, noted, out, key='a')
  assert out.read_bytes() == whole.read_bytes()
  assert min(rows[0] for rows in seen) == 8
  # Other settings begin anew.
  partial.write_text('x')
  prediction.write(predictor, images, out, key='b')
  assert out.read_bytes() == whole.read_bytes()


def test_unreadable_images_have_no_line(run, tmp_path):
  from ssljax.data import folder

  predictor = prediction.load(run[0])
  root = folders.write(
    tmp_path / 'new',
    {
      'a.png': folders.image(10),
      'b.png': b'no',
      'light/c.png': folders.image(220, (9, 5)),
    },
  )
  found = folder.to_predict(root, predictor.models[0].shape)
  images = found
  out = tmp_path / 'p.csv'
  reasons = prediction.write(predictor, images, str(out))
  assert reasons == {'b.png': 'no image that Pillow can read'}
  rows = read(out)
  assert [row['file'] for row in rows] == ['a.png', 'light/c.png']
  assert rows[1]['given'] == 'light' and rows[1]['disagrees'] == '0'


def test_data_of_another_shape_are_refused(run):
  predictor = prediction.load(run[0])
  digits = ssljax.load_data('digits').train
  with pytest.raises(InputError, match=r'have shape \(8, 8, 1\)'):
    prediction.of_source(predictor, digits)


def test_what_is_measured_was_not_fitted_to():
  """Labels of chance: fitting to them would lower the calibration error."""
  rng = np.random.default_rng(0)
  logits, labels = 4 * rng.normal(size=(300, 3)), rng.integers(3, size=300)
  found = prediction.measure(logits, labels, coverage=0.8)
  low, high = found['coverage_interval']
  assert low < 0.8 < high and found['images'] == 300
  assert found['calibration_error_before'] > 0.5
  assert found['calibration_error_after'] < 0.1
  assert found['accuracy'] == np.mean(logits.argmax(axis=1) == labels)
  assert found['calibrated']


def test_a_temperature_that_does_not_help_is_not_used():
  # One image of 25 is wrong and as sure as a right one. The temperature that
  # the other four fifths ask for is too low for its fifth, or too high for the
  # others.
  labels = np.zeros(25, int)
  logits = np.tile([2.0, 0.0], (25, 1))
  logits[0], logits[5] = (40.0, 0.0), (0.0, 40.0)
  fifth = np.arange(25) % 5
  loss = {'fitted': 0.0, 'one': 0.0}
  for k in range(5):
    fit, use = fifth != k, fifth == k
    t = calibration.fit_temperature(logits[fit], labels[fit])
    of_use = logits[use], labels[use]
    loss['fitted'] += calibration.log_loss(*of_use, t)
    loss['one'] += calibration.log_loss(*of_use)
  assert loss['fitted'] > loss['one']  # what the case is made for
  found = prediction.measure(logits, labels, coverage=0.8)
  assert not found['calibrated']
  before = found['calibration_error_before']
  assert found['calibration_error_after'] == before


def candidate(name, wrong, images=100):
  """A candidate that predicts class 1 instead of 0 for the first images."""
  logits = np.zeros((images, 2))
  logits[:, 0] = 1
  logits[:wrong] = 0, 1
  labels = np.zeros(images, int)
  held_out = prediction.HeldOut(np.arange(images), labels, logits)
  return prediction.Candidate(name, (), held_out)


def test_models_that_are_worse_than_the_baseline_are_not_delivered():
  own, base = candidate('own', 20), candidate('supervised', 5)
  # 15 of 100 images, and one of each: 15 / 102 against
  # 1.96 · sqrt((17 / 102 - (15 / 102)²) / 102) = 0.07.
  chosen, reason = prediction.choose([own, base])
  assert chosen is base
  assert 'own has an error of 20.0% on 100 held-out' in reason
  assert 'supervised 5.0%' in reason
  # 3 of 100 images: 3 / 102 = 0.029 against 0.043.
  close = candidate('close', 8)
  assert prediction.choose([close, base]) == (close, '')
  assert prediction.choose([base, own]) == (base, '')
  alone = own._replace(held_out=None)
  assert prediction.choose([alone, base]) == (alone, '')


@pytest.mark.slow
def test_ends_of_stages_and_baselines_are_candidates(run, tmp_path):
  settings = dict(pretrain=12, steps=4, repeat=4, interval=2, finetune=2)
  settings |= dict(keep_stages=True, seeds=1, cutout=0, pretrain_batch=4)
  train('r2d2', run[1], tmp_path / 'r2d2', **settings)
  found, *_ = prediction.candidates(tmp_path / 'r2d2')
  names = [each.name for each in found]
  assert names[:2] == ['r2d2', 'r2d2 after its stage supervised']
  assert len(names) == len(set(names)) > 2
  # The first stage's models are those of its checkpoint.
  model, late = found[1].models[0], found[0].models[0]
  from ssljax.runs import load

  state = load.load(tmp_path / 'r2d2').after(12)
  assert_same(model.weights[0], state.params)
  with pytest.raises(AssertionError):
    assert_same(late.weights[0], state.params)

  train('madnn', run[1], tmp_path / 'madnn', steps=4, seeds=1)
  found, *_ = prediction.candidates(tmp_path / 'madnn')
  assert [each.name for each in found] == ['madnn', 'supervised']


def assert_same(params, state):
  import jax

  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(a, np.asarray(b)[0])


# Which images to label next.


def test_the_statistics_of_votes_by_hand():
  p = np.array([[[0.5, 0.5]], [[1.0, 0.0]]])  # two models, one image
  found = ranking.sampled(p)
  np.testing.assert_allclose(found.mean, [[0.75, 0.25]])
  np.testing.assert_allclose(found.entropy, [np.log(2) / 2], rtol=1e-6)
  np.testing.assert_allclose(found.votes, [[1.0, 0.0]])
  np.testing.assert_allclose(found.square, [[0.625, 0.125]])


def test_the_most_uncertain_unlabelled_images_are_first(run):
  predictor = prediction.load(run[0])
  ranked = ranking.rank(predictor, 'least_confidence', 3)
  train = predictor.dataset.train
  p = np.mean(
    [model.predict_proba(train.read(range(20))) for model in predictor.models],
    axis=0,
  )
  unlabelled = np.flatnonzero(train.labels == -1)
  expected = unlabelled[np.argsort(p[unlabelled].max(axis=1))][:3]
  assert ranked.rows.tolist() == expected.tolist()
  assert ranked.names == [train.names[row] for row in expected]
  assert ranked.reason == 'high least confidence'


@pytest.mark.parametrize('strategy', ranking.strategies())
def test_every_strategy_ranks_images_without_a_label_once(run, strategy):
  predictor = prediction.load(run[0])
  ranked = ranking.rank(predictor, strategy, 5, seed=1)
  assert len(set(ranked.rows.tolist())) == 5
  assert (predictor.dataset.train.labels[ranked.rows] == -1).all()


def test_a_ranking_that_cannot_be_made_is_refused(run):
  import dataclasses

  predictor = prediction.load(run[0])
  with pytest.raises(InputError, match='8 training images have no label'):
    ranking.rank(predictor, 'entropy', 9)
  single = dataclasses.replace(predictor, models=predictor.models[:1])
  with pytest.raises(InputError, match='compares the models of several splits'):
    ranking.rank(single, 'bald', 2)


@pytest.mark.slow
def test_labels_that_a_run_did_not_get_are_not_given_ones(tmp_path):
  """Digits have all labels; the run gets two of each class."""
  config = from_values(
    'supervised',
    dict(
      dataset='digits',
      labels='2',
      steps=2,
      network='mlp',
      batch_labelled=10,
      workdir=str(tmp_path / 'run'),
    ),
  )
  execute.train_in_folder(
    lambda: build.build(config),
    config,
    tmp_path / 'run',
    say=lambda text: None,
  )
  predictor = prediction.load(tmp_path / 'run')
  images = prediction.training_images(predictor)
  assert sum(name is not None for name in images.given) == 20
  split = build.draw_splits(config, predictor.dataset)[0]
  ranked = ranking.rank(predictor, 'random', 100)
  assert not set(ranked.rows.tolist()) & set(split.labelled.tolist())
  # Nothing was held out: there are no prediction sets.
  (row,) = csv.reader(
    [prediction.lines(predictor, images, [0], np.eye(10)[:1])]
  )
  assert row[prediction.COLUMNS.index('set')] == ''


def test_rows_of_a_file_have_names_and_labels_of_the_run(tmp_path):
  """Features are predicted by the names of their files and of their classes."""
  model = types.SimpleNamespace(shape=(2,))
  predictor = types.SimpleNamespace(models=(model,), classes=('cat', 'dog'))
  rows = np.arange(8, dtype=np.float32).reshape(4, 2)
  own = {'train': rows, 'train_labels': [0, 1, -1, 2]}
  own['train_files'] = ['a.png', 'b.png', 'c.png', 'd.png']
  np.savez(tmp_path / 'f.npz', **own, classes=['dog', 'emu', 'cat'])
  data = ssljax.load_data(str(tmp_path / 'f.npz'))
  found = prediction.of_source(predictor, data.train, data.classes)
  assert found.names == own['train_files']
  # The run does not know emus.
  assert found.given == ['dog', None, None, 'cat']
  pixels, reasons = found.read([2])
  np.testing.assert_array_equal(pixels, rows[[2]])
  assert not reasons
  # Numbers are those of the run's classes.
  numbered = prediction.of_source(predictor, data.train, ('0', '1', '2'))
  assert numbered.given == ['cat', 'dog', None, None]
  with pytest.raises(InputError, match=r'shape \(2,\), the run .* \(3,\)'):
    model.shape = (3,)
    prediction.of_source(predictor, data.train)
