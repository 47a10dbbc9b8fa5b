"""The public Python API, by public names only."""

import gc
import json
import pickle
import subprocess
import sys
import types

from flax import linen as nn
import jax
import numpy as np
import optax
import pytest
from sklearn import metrics

import ssljax
from ssljax import api

CLASSES = 3


def make_images(rows=90, seed=0, side=9):
  """uint8 `[rows, side, side, 1]` of three classes of brightness."""
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.arange(rows) % CLASSES)
  noise = rng.integers(0, 80, (rows, side, side, 1))
  return (noise + 80 * labels[:, None, None, None]).astype(np.uint8), labels


def make_features(rows=90, seed=0):
  """Float `[rows, 4]` of three classes, on scales that differ a lot."""
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.arange(rows) % CLASSES)
  x = rng.normal(size=(rows, 4)) + 3 * np.eye(3)[labels] @ np.eye(3, 4)
  return (x * [1, 100, 0.01, 1]).astype(np.float32), labels


def few(labels, each=4):
  """The labels of the first few rows of each class; -1 elsewhere."""
  known = [np.flatnonzero(labels == c)[:each] for c in range(CLASSES)]
  known = np.concatenate(known)
  out = np.full(len(labels), -1)
  out[known] = labels[known]
  return out


class Tiny(nn.Module):
  """A linen module as a notebook's author writes it."""

  width: int = 8

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(self.width)(x.reshape(len(x), -1)))
    return nn.Dense(CLASSES)(x), x


class Wide(nn.Module):
  """A network with more outputs than there are classes."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(CLASSES + 1)(x.reshape(len(x), -1))


QUICK = dict(network=Tiny(), steps=80, progress=False, batch_unlabelled=16)
X, Y = make_images()


@pytest.fixture(scope='module')
def model():
  return ssljax.fit(X, few(Y), method='madnn', seed=0, **QUICK)


def test_a_model_predicts_and_evaluates(model):
  new, truth = make_images(40, seed=1)
  p = model.predict_proba(new)
  assert p.shape == (40, CLASSES)
  np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
  np.testing.assert_array_equal(p.argmax(axis=1), model.predict(new))
  found = model.evaluate(new, truth)
  right = np.mean(model.predict(new) == truth)
  assert found.accuracy == right and found.images == 40
  assert found.error == pytest.approx(100 * (1 - right))
  of_truth = p[np.arange(40), truth]
  assert found.loss == pytest.approx(-np.log(of_truth).mean(), rel=1e-5)
  assert right > 0.8  # brightness is easy
  # Of labels that are wrong the loss is that of their own probabilities.
  wrong = (truth + 1 + np.arange(40) % 2) % CLASSES
  of_wrong = np.maximum(p[np.arange(40), wrong], 1e-12)
  loss = model.evaluate(new, wrong).loss
  assert loss == pytest.approx(-np.log(of_wrong).mean(), rel=1e-4)
  assert loss > found.loss
  assert model.embed(new).shape == (40, 8)
  assert model.classes == ('0', '1', '2') and model.shape == (9, 9, 1)


def test_unlabelled_rows_are_left_out_of_an_evaluation(model):
  # Every third row has a label, right or wrong.
  labels = (Y + np.arange(len(Y)) // 3 % 2) % CLASSES
  known = np.arange(len(Y)) % 3 == 2
  found = model.evaluate(X, np.where(known, labels, -1))
  assert found.images == 30 and 0 < found.accuracy < 1
  accuracy, error, _, images = found  # the tuple of earlier versions
  assert (accuracy, error, images) == (found.accuracy, found.error, 30)
  predicted = model.predict(X[known])
  matrix = metrics.confusion_matrix(labels[known], predicted)
  np.testing.assert_array_equal(found.confusion, matrix)
  wanted = metrics.balanced_accuracy_score(labels[known], predicted)
  assert found.balanced_accuracy == pytest.approx(wanted)
  f1 = metrics.f1_score(labels[known], predicted, average='macro')
  assert found.macro_f1 == pytest.approx(f1)
  copy = pickle.loads(pickle.dumps(found))
  assert copy == found and copy.report == found.report
  assert found == model.evaluate(X[known], labels[known])


def test_a_prediction_does_not_depend_on_the_other_images(model):
  new, _ = make_images(300, seed=2)  # more than one compiled call
  np.testing.assert_allclose(
    model.predict_proba(new)[[0, 280]],
    model.predict_proba(new[[0, 280]]),
    rtol=1e-5,
  )


def test_floats_in_0_to_1_are_the_same_images(model):
  p = model.predict_proba(X[:9])
  np.testing.assert_array_equal(model.predict_proba(X[:9] / 255.0), p)
  np.testing.assert_array_equal(model.predict_proba(X[:9, ..., 0]), p)


def test_the_seed_matters_and_decides():
  first = ssljax.fit(X, few(Y), seed=1, **QUICK).predict_proba(X)
  again = ssljax.fit(X, few(Y), seed=1, **QUICK).predict_proba(X)
  other = ssljax.fit(X, few(Y), seed=2, **QUICK).predict_proba(X)
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-3


def test_a_model_is_saved_loaded_and_pickled(model, tmp_path):
  model.save(tmp_path / 'model')
  loaded = ssljax.load(tmp_path / 'model', network=Tiny())
  p = model.predict_proba(X)
  np.testing.assert_array_equal(loaded.predict_proba(X), p)
  assert loaded.classes == model.classes and loaded.config == model.config
  with pytest.raises(ssljax.InputError, match=r'network: .*Python object'):
    ssljax.load(tmp_path / 'model')


@pytest.mark.parametrize(
  'damage',
  [
    lambda f: (f / 'weights.msgpack').unlink(),
    lambda f: (f / 'weights.msgpack').write_bytes(b''),
    lambda f: (f / 'model.json').write_text('{'),
    lambda f: (f / 'model.json').write_text('{"format": 1}'),
    lambda f: (f / 'weights.msgpack').write_bytes(
      (f / 'weights.msgpack').read_bytes()[:-9]
    ),
  ],
)
def test_an_incomplete_model_is_one_line(model, damage, tmp_path):
  model.save(tmp_path)
  damage(tmp_path)
  with pytest.raises(ssljax.InputError, match=f'folder={tmp_path}') as error:
    ssljax.load(tmp_path, network=Tiny())
  assert '\n' not in str(error.value)


def test_a_folder_without_a_model_is_refused(tmp_path):
  with pytest.raises(ssljax.InputError, match='holds no model and no run'):
    ssljax.load(tmp_path)


METHODS = (
  *('supervised', 'madnn', 'association', 'r2d2', 'llp', 'deepbass'),
  *('pseudo_label', 'temporal_ensembling', 'vat', 'ict', 'mixmatch'),
)
# So that every stage of every method takes a few steps.
SHORT = {
  'r2d2': dict(pretrain=20, repeat=4, interval=2, finetune=2),
  'llp': dict(warm=5),
  'deepbass': dict(iterations=2, passes=2, dropout=0.1),
  'vat': dict(epsilon=0.5),
  'mixmatch': dict(weight=1.0),
}


@pytest.mark.parametrize('method', METHODS)
def test_every_method_learns_from_features(method):
  x, y = make_features()
  model = ssljax.fit(
    x,
    few(y, 6),
    method=method,
    steps=60,
    progress=False,
    **SHORT.get(method, {}),
  )
  assert model.shape == (4,)
  new, truth = make_features(60, seed=1)
  # Two of the four features are useless unless they are brought to one scale.
  assert model.evaluate(new, truth).accuracy > 0.7


def test_a_strong_view_of_features_is_refused_with_the_ways_out():
  x, y = make_features()
  run = dict(method='fixmatch', steps=20, progress=False)
  with pytest.raises(ssljax.InputError, match='holds features') as error:
    ssljax.fit(x, few(y, 6), **run)
  message = str(error.value)
  assert '\n' not in message and 'strong_augment= for none' in message
  with pytest.raises(ssljax.InputError, match='holds features'):
    ssljax.fit(x, few(y, 6), strong_augment=('ctaugment',), **run)
  assert 'pseudo_label, pi_model' in message and 'flexmatch' not in message
  model = ssljax.fit(x, few(y, 6), strong_augment=(), **run)
  assert model.shape == (4,)


def test_features_with_a_test_set_report_its_error():
  x, y = make_features()
  new, truth = make_features(60, seed=1)
  model = ssljax.fit(
    x, few(y), test=(new, truth), steps=20, progress=False, validation=3
  )
  kept = model.result['test_error']['averaged'][0]
  assert kept == pytest.approx(model.evaluate(new, truth).error)
  assert len(model.result['validation_error']['last']) == 1


def test_validation_images_are_held_out():
  result = ssljax.fit(X, Y, validation=0.2, **QUICK).result
  # 18 of 90 images: errors are multiples of 1/18.
  error = result['validation_error']['last'][0]
  assert error * 18 / 100 == pytest.approx(round(error * 18 / 100))
  assert result['test_error'] == {}


def test_callbacks_get_every_measurement(capsys):
  seen = []
  model = ssljax.fit(
    X, few(Y), callbacks=[seen.append], record_every=80, **QUICK
  )
  losses = [m for m in seen if 'loss' in m]
  assert [m['step'] for m in losses] == list(range(8, 81, 8))
  assert seen == model.history
  assert {'step', 'stage', 'seed', 'loss', 'divergence'} <= set(losses[0])
  out = capsys.readouterr()
  assert out.out == '' and out.err == ''  # progress=False


def test_a_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  ssljax.fit(X, few(Y), **QUICK)
  assert not list(tmp_path.iterdir())


def test_a_workdir_records_the_run_and_returns_it(tmp_path):
  folder = tmp_path / 'run'
  model = ssljax.fit(X, few(Y), workdir=folder, **QUICK)
  assert json.loads((folder / 'result.json').read_text())['complete']
  before = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
  again = ssljax.fit(X, few(Y), workdir=folder, **QUICK)
  np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
  assert before == {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
  loaded = ssljax.load(folder, network=Tiny())
  np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))


def test_a_workdir_of_other_settings_or_images_is_refused(tmp_path):
  folder = tmp_path / 'run'
  ssljax.fit(X, few(Y), workdir=folder, **QUICK)
  with pytest.raises(ssljax.InputError, match=r'eta=0.5 there, eta=0.3 here'):
    ssljax.fit(X, few(Y), workdir=folder, eta=0.3, **QUICK)
  with pytest.raises(ssljax.InputError, match=r'dataset=arrays-'):
    ssljax.fit(X[::-1], few(Y), workdir=folder, **QUICK)


@pytest.mark.slow
def test_an_optimiser_of_optax_trains():
  calls = []

  def tx(steps, scale=1.0, **changes):
    calls.append((steps, scale, changes))
    return optax.adam(1e-2 * scale)

  with jax.numpy_dtype_promotion('standard'):  # as users have it
    ssljax.fit(X, few(Y), optimizer=tx, **QUICK)
  assert calls[0][0] == 80
  with jax.numpy_dtype_promotion('standard'):  # as users have it
    plain = ssljax.fit(X, few(Y), optimizer=optax.adam(1e-2), **QUICK)
  named = ssljax.fit(X, few(Y), optimizer={'learning_rate': 1e-5}, **QUICK)
  assert plain.evaluate(X, Y).accuracy > named.evaluate(X, Y).accuracy


def test_augmentations_by_name_and_by_function():
  by_name = ssljax.fit(X, few(Y), augment='flip,noise', **QUICK)
  assert by_name.config.augmentation.augment == ('flip', 'noise')
  dark = ssljax.fit(X, few(Y), augment=lambda key, image: 0 * image, **QUICK)
  # It has never seen a bright image.
  assert dark.evaluate(X, Y).accuracy < by_name.evaluate(X, Y).accuracy


def entropy_minimisation(net, tx, batch_spec, steps, *, strength: float = 0.1):
  """A method of a notebook: cross-entropy, and the unlabelled rows' entropy.

  Args:
    net: the network.
    tx: the optimiser of a stage.
    batch_spec: rows of a step.
    steps: length of the stage.
    strength: weight of the entropy.
  """
  core, losses = ssljax.core, ssljax.losses

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    labels = core.visible_labels(state, batch)
    known = labels != core.UNLABELLED
    cross = losses.mean_where(
      losses.cross_entropy(outputs.logits, labels), known
    )
    entropies = losses.entropy(jax.nn.softmax(outputs.logits))
    entropy = losses.mean_where(entropies, ~known)
    metrics = {'cross_entropy': cross, 'entropy': entropy}
    return cross + strength * entropy, (state.replace(stats=stats), metrics)

  stage = core.Stage(
    name='train', steps=steps, tx=tx(steps), batch_spec=batch_spec, loss=loss
  )
  return core.Method(name='entropy_minimisation', stages=(stage,))


def test_a_folder_of_an_unknown_method_is_refused_as_another_run(tmp_path):
  folder = tmp_path / 'run'
  ssljax.fit(X, few(Y), workdir=folder, **QUICK)
  record = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(record | {'method': 'gone'}))
  with pytest.raises(ssljax.InputError, match='method=gone there'):
    ssljax.fit(X, few(Y), workdir=folder, **QUICK)


def test_fits_leave_no_arrays_behind():
  gc.collect()
  before = len(jax.live_arrays())
  for seed in range(2):
    ssljax.fit(X, few(Y), seed=seed, **QUICK)
  gc.collect()
  assert len(jax.live_arrays()) <= before


def test_float_images_keep_the_scale_of_the_training():
  model = ssljax.fit(X.astype(np.float32), few(Y), **QUICK)
  dark, white = np.ones((1, 9, 9, 1)), np.full((1, 9, 9, 1), 255.0)
  alone = model.predict_proba(dark)
  together = model.predict_proba(np.concatenate([dark, white]))
  np.testing.assert_allclose(together[:1], alone, rtol=1e-5)


def test_epochs_replace_the_suggested_steps():
  arguments = {k: v for k, v in QUICK.items() if k != 'steps'}
  # 78 unlabelled images in batches of 16 are 4 steps an epoch.
  model = ssljax.fit(X, few(Y), epochs=2.0, **arguments)
  assert model.result['steps'] == 8


def test_a_factory_of_the_library_keeps_its_entry():
  entry = ssljax.registry.METHODS['association']
  model = ssljax.fit(X, few(Y), method=entry.factory, network=Tiny(), steps=2)
  assert model.config.method == 'association'
  assert ssljax.registry.METHODS['association'] is entry


def test_a_run_with_another_test_set_or_network_is_another_run(tmp_path):
  folder = tmp_path / 'run'
  new, truth = make_images(30, seed=1)
  ssljax.fit(X, few(Y), test=(new, truth), workdir=folder, **QUICK)
  for more in (dict(test=(new, 2 - truth)), dict(network=Tiny(width=9))):
    with pytest.raises(ssljax.InputError, match='there, '):
      arguments = QUICK | dict(test=(new, truth)) | more
      ssljax.fit(X, few(Y), workdir=folder, **arguments)


def test_a_method_of_a_notebook_trains():
  ends = []
  for strength in (0.0, 5.0):
    model = ssljax.fit(
      X, few(Y), method=entropy_minimisation, strength=strength, **QUICK
    )
    assert model.config.method == 'entropy_minimisation'
    assert model.config.parameters['strength'] == strength
    ends.append([m['entropy'] for m in model.history if 'entropy' in m][-1])
  assert ends[1] < ends[0]  # its constant matters


BAD = {
  'images: has shape': dict(images=np.zeros((4,))),
  'images: has dtype': dict(images=np.zeros((90, 9, 9, 1), complex)),
  'images: 1 rows hold NaN': dict(
    images=np.where(np.arange(90)[:, None] == 7, np.nan, np.ones((90, 4)))
  ),
  'images: has values from': dict(images=X.astype(float) - 300),
  'images: has floats up to 14.9': dict(images=X / 255.0 * 16),
  'labels: has 89 labels for 90 rows': dict(labels=Y[1:]),
  'labels: has dtype': dict(labels=Y + 0.5),
  'labels: 4 labels lie outside the 2 classes': dict(classes=2),
  'labels': dict(labels=np.full(90, -1)),
  'class': dict(labels=np.zeros(90, int)),
  'method=madnnn: .*madnn': dict(method='madnnn'),
  'network=convlrge: .*convlarge': dict(network='convlrge'),
  'augment=fliip: there is no such augment; give flip': dict(augment='fliip'),
  'eat: madnn has no such setting': dict(eat=3),
  'dataset: is no setting': dict(dataset='mnist'),
  'replay: is no setting': dict(replay=True),
  'compile_cache: is no setting': dict(compile_cache='off'),
  'validation=90': dict(validation=90),
  'optimizer=3': dict(optimizer=3),
  "optimizer='sgdd'": dict(optimizer='sgdd'),
  r'optax optimiser such as optax\.adam\(1e-3\)': dict(optimizer=optax.adam),
  'optimizer=validation': dict(optimizer={'validation': 2}),
  r'callbacks=\[3\]': dict(callbacks=[3]),
  'test: give a pair': dict(test=X),
  'network: its logits have shape': dict(network=Wide()),
  'is a class of linen': dict(network=Tiny),
  'steps=0': dict(steps=0),
  'test_images: rows have shape': dict(test=(X[:, 1:], Y)),
}


@pytest.mark.parametrize('expected', BAD)
def test_bad_input_is_one_line_that_names_the_parameter(expected):
  arguments = dict(images=X, labels=few(Y)) | QUICK | BAD[expected]
  with pytest.raises(ssljax.InputError, match=expected) as error:
    ssljax.fit(arguments.pop('images'), arguments.pop('labels'), **arguments)
  assert isinstance(error.value, ValueError)
  assert '\n' not in str(error.value) and '`' not in str(error.value)


@pytest.mark.parametrize(
  ('call', 'expected'),
  [
    (lambda m: m.predict(X[:, 1:]), 'images: rows have shape'),
    (lambda m: m.predict(np.zeros((3, 4))), 'images: rows have shape'),
    (lambda m: m.evaluate(X, Y[1:]), 'labels: has 89 rows'),
    (lambda m: m.evaluate(X, Y + 1), 'labels: 1 to 3'),
    (lambda m: m.evaluate(X, np.full(90, -1)), 'labels: no image'),
  ],
)
def test_bad_input_of_a_model_is_refused(model, call, expected):
  with pytest.raises(ssljax.InputError, match=expected):
    call(model)


@pytest.mark.slow
def test_a_fit_in_another_thread_trains():
  """Signals can be listened to in the main thread alone."""
  code = (
    'import threading, numpy as np, ssljax\n'
    'x = np.random.default_rng(0).normal(size=(40, 3))\n'
    'y = np.where(np.arange(40) < 20, np.arange(40) % 2, -1)\n'
    'out = []\n'
    'fit = lambda: out.append(ssljax.fit(x, y, steps=2, progress=False))\n'
    'thread = threading.Thread(target=fit)\n'
    'thread.start(); thread.join(); print(out)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, timeout=300
  )
  assert 'Model(' in done.stdout, done.stderr


def test_data_sets_and_splits_are_public():
  data = ssljax.load_data('digits')
  split = ssljax.draw_split(
    data.train.labels, data.classes, per_class=3, seed=1
  )
  assert len(split.labelled) == 30


def test_held_out_images_that_the_first_run_was_trained_on_are_reported(
  tmp_path, caplog
):
  record = {'dataset': 'mine', 'images': 9}
  record['splits'] = [{'labelled': {'0': 1, '3': 0, '7': 1}}]
  (tmp_path / 'split.json').write_text(json.dumps(record))
  namespace = types.SimpleNamespace
  split = lambda seed, test: namespace(
    seed=seed, test=np.array(test), validation=np.array([], int)
  )

  def run(name, *tests):
    return namespace(
      config=namespace(run=namespace(init_from=str(tmp_path))),
      dataset=namespace(name=name, train=namespace(labels=np.zeros(9))),
      drawn=[split(seed, test) for seed, test in enumerate(tests)],
    )

  api.warn_of_seen(run('mine', [1, 2, 4]))
  api.warn_of_seen(run('other', [0, 3, 7]))
  assert not caplog.records
  api.warn_of_seen(run('mine', [1, 2, 4], [3, 5, 7, 8]))
  (one,) = caplog.records
  assert '2 of 4 images held out under seed 1 have a label' in one.message
  caplog.clear()
  record['splits'] = [{'labelled': 'all'}]
  (tmp_path / 'split.json').write_text(json.dumps(record))
  api.warn_of_seen(run('mine', [5, 6]))
  assert '2 of 2 images held out under seed 0' in caplog.records[0].message
