"""`probe.py` and LLP's figures on one tiny run."""

import csv
import json
import pathlib
import re
import shutil
from unittest import mock

import binary
from flax import linen as nn
import jax
import numpy as np
import PIL.Image
import pytest
from sklearn.neighbors import KNeighborsClassifier

from ssljax import config, registry
from ssljax.experiments.figures import comparison, llp_maps
from ssljax.networks import network
from ssljax.runs import load

RUN = (
  '--network=lenet',
  '--labels=2',
  '--validation=100',
  '--batch_labelled=8',
  '--batch_unlabelled=32',
  '--warm=2',
  '--warm_loss=softmax',
  '--steps=5',
  '--density_neighbours=4',
  '--nobaseline',
)
KEPT = [2, 4, 6, 7]  # the stages' ends, and every second step of each
FIGURES = {
  '2a': ('--points=100', '--classes=3,1,7', '--steps=7,2'),
  '2b': (),
  '2cd': (),
  '2eg': ('--points=40',),
}


class Headed(nn.Module):
  """A feature of 8 numbers, and an embedding of 4 beside the logits."""

  classes: int

  @nn.compact
  def __call__(self, image, *, train, dropout):
    x = nn.relu(nn.Dense(8)(image.reshape(image.shape[0], -1)))
    return network.Outputs(nn.Dense(self.classes)(x), nn.Dense(4)(x), x)


@pytest.fixture(scope='module', autouse=True)
def headed():
  """`--network=lenet` is `Headed` here."""
  make = lambda classes: network.from_linen(Headed(classes))
  with mock.patch.dict(registry.NETWORKS, lenet=make):
    yield


def train(base, *more):
  """The folder of a finished run."""
  (base / 'none.flags').touch()
  where = f'--flagfile={base}/none.flags', f'--workdir={base}/run'
  assert binary.run(*where, *RUN, *more, binary='llp') == 0
  return base / 'run'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A finished run with several kept checkpoints."""
  base = tmp_path_factory.mktemp('llp')
  return train(base, '--keep_stages', '--keep_every=2')


@pytest.fixture(scope='module')
def bare(tmp_path_factory):
  """A finished run with its last checkpoint alone."""
  run = train(tmp_path_factory.mktemp('bare'), '--seed=1')
  shutil.rmtree(run / 'checkpoints/llp/seed-1/2')
  return run


@pytest.fixture(scope='module')
def probed(folder, tmp_path_factory):
  """Its `probe.json` and its embeddings."""
  out = tmp_path_factory.mktemp('probed') / 'new/embeddings.npz'
  assert binary.run(f'--run={folder}', f'--out={out}', binary='probe') == 0
  with np.load(out) as arrays:
    return json.loads((out.parent / 'probe.json').read_text()), dict(arrays)


@pytest.fixture(scope='module')
def finished(folder):
  with binary.small():
    return load.load(folder)


@pytest.mark.slow
def test_a_run_keeps_the_checkpoints_it_is_asked_to(finished):
  assert list(finished.kept) == KEPT


@pytest.mark.slow
def test_the_embeddings_are_of_all_images_but_those_held_out(probed, folder):
  result, arrays = probed
  split = json.loads((folder / 'split.json').read_text())['splits'][0]
  count, labelled = 1297 - 100, {int(row) for row in split['labelled']}
  assert arrays['train'].shape == (count, 4)
  assert arrays['test'].shape == (500, 4)
  for name in ('train', 'test'):
    assert arrays[name].dtype == np.float32
    np.testing.assert_allclose(np.sum(arrays[name] ** 2, axis=1), 1, rtol=1e-5)
  assert set(arrays['rows'][arrays['labelled']]) == labelled
  assert result['train_images'] == count and result['labelled_images'] == 20
  assert result['step'] == 7 and result['seed'] == 0


@pytest.mark.slow
def test_labels_acquired_during_training_count_as_labelled(tmp_path):
  # More labels than 256: tables are padded to a multiple of it.
  asks = '--acquire=random', '--query_size=300', '--budget=300'
  run = train(tmp_path, *asks)
  assert binary.run(f'--run={run}', binary='probe') == 0
  result = json.loads((run / 'probe.json').read_text())
  of_run = json.loads((run / 'result.json').read_text())
  assert len(of_run['asked'][0]['rows']) == 300
  assert result['labelled_images'] == 20 + 300
  assert result['test_error']['softmax'] == pytest.approx(
    of_run['test_error']['last'][0]
  )


def test_the_nearest_neighbours_are_scikit_learns(probed):
  result, arrays = probed
  known = arrays['labelled']
  for name, rows in (('nearest', known | True), ('nearest_labelled', known)):
    oracle, labels = KNeighborsClassifier(1), arrays['train_labels'][rows]
    oracle.fit(arrays['train'][rows], labels)
    share = oracle.score(arrays['test'], arrays['test_labels'])
    # With two equally near neighbours up to rounding, either may be found.
    (apart, near) = oracle.kneighbors(arrays['test'], 2)
    ties = (np.diff(apart)[:, 0] < 1e-5) & (np.diff(labels[near])[:, 0] != 0)
    assert ties.sum() < 5
    assert result['test_error'][name] == pytest.approx(
      100 * (1 - share), abs=100 * ties.mean() + 1e-4
    )


def test_the_classifiers_error_is_that_of_the_run(probed, folder):
  of_run = json.loads((folder / 'result.json').read_text())['test_error']
  error = probed[0]['test_error']
  assert error['softmax'] == pytest.approx(of_run['last'][0])
  assert error['softmax_top5'] < error['softmax']


def test_the_aggregation_is_the_mean_norm_of_the_classes_means(probed):
  result, arrays = probed
  norms = []
  for c in range(10):
    mine = [
      v
      for v, label in zip(arrays['train'], arrays['train_labels'], strict=True)
      if label == c
    ]
    norms.append(np.linalg.norm(sum(mine) / len(mine)))
    assert result['aggregation_by_class'][str(c)] == pytest.approx(
      norms[-1], rel=1e-5
    )
  assert result['aggregation'] == pytest.approx(np.mean(norms), rel=1e-5)


def test_an_earlier_step_has_other_embeddings(folder, probed):
  assert binary.run(f'--run={folder}', '--step=2', binary='probe') == 0
  early = json.loads((folder / 'probe.json').read_text())
  assert early['step'] == 2
  assert early['aggregation'] != probed[0]['aggregation']


def test_a_readout_learns_from_the_features(folder, capsys):
  of_run = '--run=' + str(folder), '--readout', '--readout_rate=0.1'
  assert binary.run(*of_run, '--readout_steps=400', binary='probe') == 0
  read = json.loads((folder / 'probe.json').read_text())['readout']
  assert read['feature'] == 8 and read['dataset'] == 'digits'
  assert read['train_images'] == 1197 and read['test_images'] == 500
  # A linear layer on all labels, against 7 steps on 20 labels.
  written = json.loads((folder / 'probe.json').read_text())['test_error']
  error = read['test_error']['softmax']
  assert error < written['softmax'] - 10
  line = re.search(
    r'^readout on digits +([\d.]+)$', capsys.readouterr().out, re.M
  )
  assert float(line[1]) == pytest.approx(error, abs=0.005)


def test_another_data_set_is_read_out_at_the_runs_size(folder, sets):
  other = '--readout', '--dataset=mnist', f'--data_dir={sets}'
  status = binary.run(
    f'--run={folder}', *other, '--readout_steps=3', binary='probe'
  )
  assert status == 0
  read = json.loads((folder / 'probe.json').read_text())['readout']
  assert read['dataset'] == 'mnist' and read['feature'] == 8


def test_features_are_the_inputs_of_the_heads(finished):
  feed, rows = finished.program.data.train, np.arange(5)
  outputs = finished.infer(finished.state, feed, rows)
  features = finished.features(finished.state, feed, rows)
  np.testing.assert_array_equal(features, outputs.feature)
  head = jax.device_get(finished.state.params['Dense_2'])
  embedded = features @ head['kernel'][0] + head['bias'][0]
  np.testing.assert_allclose(embedded, outputs.embedding, 1e-4, 1e-5)


def test_chunks_change_nothing(finished, monkeypatch):
  feed, rows = finished.program.data.train, np.arange(20, 45)
  whole = finished.infer(finished.state, feed, rows)
  monkeypatch.setattr(load, 'CHUNK', 10)
  parts = finished.infer(finished.state, feed, rows)
  for one, other in zip(whole, parts, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5)


# Figure 2.


@pytest.fixture(scope='module')
def drawn(folder, tmp_path_factory):
  """The folder with all figures."""
  out = tmp_path_factory.mktemp('drawn')
  for name, more in FIGURES.items():
    asked = f'--figure=llp/{name}', f'--run={folder}', f'--out={out}', *more
    assert binary.run(*asked, binary='figures') == 0
  return out


def table(folder: pathlib.Path, name):
  with open(folder / f'llp-{name}.csv', newline='', encoding='utf-8') as file:
    return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize('name', FIGURES)
def test_a_figure_is_a_picture_of_two_kinds(name, drawn):
  stem = drawn / f'llp-{name}.seed-0'
  with PIL.Image.open(f'{stem}.png') as image:
    image.load()
    assert image.width > 400
    assert len(np.unique(np.asarray(image.convert('L')))) > 10
  assert open(f'{stem}.pdf', 'rb').read().startswith(b'%PDF')


def test_the_maps_over_training_are_of_the_same_images(drawn, finished):
  rows = table(drawn, '2a.seed-0.embeddings')
  assert list(rows[0]) == ['step', 'train_row', 'class', 'labelled', 'x', 'y']
  steps = {step: [r for r in rows if r['step'] == step] for step in ('2', '7')}
  images = {step: [r['train_row'] for r in of] for step, of in steps.items()}
  assert images['2'] == images['7'] and len(set(images['2'])) == len(rows) // 2
  truth, labels = finished.dataset.train.labels, finished.split.labels
  for row in rows:
    assert truth[int(row['train_row'])] == int(row['class'])
    assert (labels[int(row['train_row'])] >= 0) == (row['labelled'] == '1')
  # 33 of each class, its 2 labelled images among them.
  assert sum(row['labelled'] == '1' for row in steps['2']) == 6
  assert len(steps['2']) == 99


def test_the_aggregation_over_training_ends_as_probed(drawn, probed):
  rows = table(drawn, '2b.seed-0.aggregation')
  assert [int(row['step']) for row in rows] == KEPT
  assert {row['run'] for row in rows} == {'run'}
  last = float(rows[-1]['aggregation'])
  assert last == pytest.approx(probed[0]['aggregation'], rel=1e-6)


def test_the_norms_are_of_the_first_checkpoint_and_the_last(drawn, probed):
  rows = table(drawn, '2cd.seed-0.norms')
  assert list(rows[0]) == ['class', 'step 2', 'step 7']
  norms = {row['class']: float(row['step 7']) for row in rows}
  assert norms == pytest.approx(probed[0]['aggregation_by_class'], rel=1e-6)


@pytest.mark.slow
def test_two_runs_are_compared_at_their_ends(folder, bare, tmp_path, drawn):
  both = f'--run={folder}', f'--run={bare}', f'--out={tmp_path}'
  for name in ('2b', '2cd'):
    status = binary.run(f'--figure=llp/{name}', *both, binary='figures')
    assert status == 0
  # Both folders are called 'run'; the names of their parents differ.
  one, other = folder.parent.name, bare.parent.name
  rows = table(tmp_path, '2cd.seed-0.norms')
  assert list(rows[0]) == ['class', one, other]
  alone = table(drawn, '2cd.seed-0.norms')
  assert [r[one] for r in rows] == [r['step 7'] for r in alone]
  lines = table(tmp_path, '2b.seed-0.aggregation')
  assert [row['step'] for row in lines if row['run'] == other] == ['7']


def test_the_classes_drawn_are_the_closest_the_widest_and_one_between(
  drawn, probed
):
  norms = probed[0]['aggregation_by_class']
  sampler = sorted(norms, key=norms.get, reverse=True)
  rows = table(drawn, '2eg.seed-0.embeddings')
  classes = list(dict.fromkeys(row['class'] for row in rows))
  assert classes == [sampler[0], sampler[9], sampler[5]]
  for name in classes:
    mine = [row for row in rows if row['class'] == name]
    assert len(mine) == 40
    assert float(mine[0]['norm']) == pytest.approx(norms[name], rel=1e-6)
    numbers = sorted(row['example'] for row in mine if row['example'])
    assert numbers == list('123456')


def test_scaling_keeps_the_distances_that_two_dimensions_can_hold():
  rng = np.random.default_rng(0)
  flat = rng.normal(size=(12, 2))
  basis, _ = np.linalg.qr(rng.normal(size=(5, 2)))
  xy = llp_maps.metric_mds(flat @ basis.T)  # in five dimensions, on a plane
  between = lambda p: np.linalg.norm(p[:, None] - p[None], axis=-1)
  np.testing.assert_allclose(between(xy), between(flat), atol=1e-2)
  # Rotated back, the points equal the original ones around their mean.
  centred = flat - flat.mean(axis=0)
  np.testing.assert_allclose(llp_maps.align(xy, centred), centred, atol=1e-2)


def test_typical_classes_leave_out_those_without_images():
  norms = np.array([0.5, np.nan, 0.9, 0.7, 0.1])
  # In falling order: 2, 3, 0, 4.
  assert llp_maps.typical(norms).tolist() == [2, 4, 0]
  assert llp_maps.typical(np.array([np.nan, 0.3])).tolist() == [1]


def test_runs_are_named_by_the_differing_parts_of_their_folders():
  run = lambda path: mock.Mock(folder=pathlib.Path(path))
  names_of = comparison.names_of
  assert names_of([run('a/x'), run('a/y')]) == ['x', 'y']
  assert names_of([run('r/a/x'), run('r/b/x')]) == ['a', 'b']
  assert names_of([run('a/x'), run('x')]) == ['a/x', 'x']


def test_runs_that_differ_in_their_splits_alone_are_one_group(
  tmp_path,
):
  # Folders of version 0.1: their method is in result.json alone.
  settings = {
    'a': {'steps': 1, 'seed': 0},
    'b': {'steps': 2, 'seed': 0},
    'c': {'steps': 1, 'seed': 3},
  }
  folders = [tmp_path / name for name in settings]
  for folder, values in zip(folders, settings.values(), strict=True):
    folder.mkdir()
    lines = config.to_flags(config.from_values('madnn', values))
    (folder / 'flags.txt').write_text('\n'.join(lines) + '\n')
    result = {'method': 'madnn', 'complete': False}
    (folder / 'result.json').write_text(json.dumps(result))
  a, b, c = folders
  assert comparison.group_by_settings(folders) == [[a, c], [b]]


BAD = {
  '': ('--run: ',),
  '--run=/nonexistent': ('--run', 'no folder'),
  '--run={run} --step=3': ('--step=3', '2, 4, 6, 7'),
  '--run={run} --seed=3': ('--seed=3',),
  '--run={run} --dataset=mnist': ('--dataset=mnist', '--readout'),
  '--run={run} --readout_steps=0': ('--readout_steps=0',),
  '--run={run} --readout_rate=nan': ('--readout_rate=nan',),
  '--run={run} --readout --dataset=svhn_cropped --data_dir={sets}': (
    '--dataset=svhn_cropped',
    '8x8x3',
    '8x8x1',
  ),
  '--run={run} --out=embeddings.txt': ('--out=embeddings.txt', '.npz'),
  '--run={run} --out={file}/new.npz': ('--out=', 'cannot be written'),
}


@pytest.mark.parametrize('arguments', BAD)
def test_bad_input_is_one_line_that_names_the_flag(
  arguments, folder, sets, tmp_path, capsys
):
  file = tmp_path / 'file'
  file.touch()
  args = arguments.format(run=folder, sets=sets, file=file).split()
  line = binary.refused(capsys, *args, binary='probe')
  assert all(part in line for part in BAD[arguments]), line


BAD_FIGURES = {
  '2a --run={run} --run={bare}': ('--run', 'at most 1'),
  '2a --run={run} --classes=1,x': ('--classes=1,x', '0, 1, 2'),
  '2a --run={run} --classes=1,1': ('--classes=1,1',),
  '2a --run={run} --steps=3': ('--steps=3', '2, 4, 6, 7'),
  '2a --run={run} --points=4': ('--points',),
  '2eg --run={run} --points=0': ('--points=0',),
  '2cd --run={bare}': ('--run', '--keep_stages'),
}


@pytest.mark.parametrize('arguments', BAD_FIGURES)
def test_what_cannot_be_drawn_is_one_line(arguments, folder, bare, capsys):
  args = arguments.format(run=folder, bare=bare)
  line = binary.refused(
    capsys, *f'--figure=llp/{args}'.split(), binary='figures'
  )
  assert all(part in line for part in BAD_FIGURES[arguments]), line
