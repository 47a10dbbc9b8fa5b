"""Figure 2 and the theorems of R2-D2, from a tiny run."""

import csv
import json
import shutil
import types
from unittest import mock

import binary
import numpy as np
import optax
import PIL.Image
import pytest
import tiny

from ssljax import registry
from ssljax.experiments.figures import r2d2 as r2d2_figures
from ssljax.methods.r2d2 import r2d2
from ssljax.networks import network
from ssljax.training import metrics_writer
from ssljax.training.loop import stage_ends

RUN = (
  '--labels=2',
  '--augment=',
  '--cutout=0',
  '--batch_labelled=8',
  '--batch_unlabelled=24',
  '--pretrain=3',
  '--pretrain_batch=8',
  '--steps=4',
  '--repeat=2',
  '--interval=1',
  '--finetune=1',
  '--record_every=1',
)


def flat(classes):
  """A network with two features that compiles quickly."""
  return network.from_linen(binary.Flat(classes, embedding=2))


@pytest.fixture(scope='module', autouse=True)
def small_lenet():
  """`--network=lenet` is `flat` here."""
  with mock.patch.dict(registry.NETWORKS, lenet=flat):
    yield


def train(base, *more):
  """The folder of a finished run."""
  (base / 'none.flags').touch()
  where = f'--flagfile={base}/none.flags', f'--workdir={base}/run'
  assert binary.run(*where, *RUN, *more, binary='r2d2') == 0
  return base / 'run'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A finished run that has kept its stages, with its figures."""
  base = tmp_path_factory.mktemp('r2d2')
  run = train(base, '--network=lenet', '--keep_stages')
  for name, more in (('r2d2/2', ['--points=300']), ('r2d2/theorems', [])):
    asked = f'--figure={name}', f'--run={run}', *more
    assert binary.run(*asked, binary='figures') == 0
  return run


def table(folder, name):
  path = folder / f'figures/r2d2-{name}.csv'
  with open(path, newline='', encoding='utf-8') as file:
    return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['2', 'theorems'])
def test_a_figure_is_a_picture_of_two_kinds(name, folder):
  stem = folder / f'figures/r2d2-{name}.seed-0'
  with PIL.Image.open(f'{stem}.png') as image:
    image.load()
    assert image.width > 400
    assert len(np.unique(np.asarray(image.convert('L')))) > 10
  assert open(f'{stem}.pdf', 'rb').read().startswith(b'%PDF')


def test_the_features_are_of_all_labelled_and_some_of_all_images(folder):
  rows = table(folder, '2.seed-0.features')
  split = json.loads((folder / 'split.json').read_text())['splits'][0]
  labelled = {row['train_row'] for row in rows if row['labelled'] == '1'}
  assert labelled == set(split['labelled'])
  assert 300 <= len(rows) <= 320
  # Training has changed the features.
  moved = [abs(float(r['decipher_x']) - float(r['supervised_x'])) for r in rows]
  assert min(moved) > 0


def test_the_measurements_are_those_of_the_stages_with_pseudo_logits(folder):
  rows = table(folder, 'theorems.seed-0.theorems')
  stages = [row['stage'] for row in rows]
  assert stages == ['decipher'] * 4 + ['repeat 1', 'repeat 2']
  assert [int(row['step']) for row in rows] == [4, 5, 6, 7, 8, 9]
  written = {
    m['step']: m for m in metrics_writer.read(folder, 'r2d2') if 'loss' in m
  }
  for row in rows:
    for name in ('predicted_entropy', 'sum_drift', 'link_gap'):
      assert float(row[name]) == written[int(row['step'])][name]


@pytest.mark.parametrize(
  ('switches', 'expected'),
  [({}, [5, 9, 11]), ({'repredict': False}, [5])],
)
def test_dotted_lines_are_where_pseudo_logits_are_predicted(switches, expected):
  # Stages end after 5, 9, 11, 13 and 16 steps.
  lengths = dict(pretrain=5, repeat=4, interval=2, finetune=3, cutout=0)
  tx = lambda *_, **__: optax.sgd(0.1)
  method = r2d2(tiny.NET, tx, tiny.DRAW, 4, **lengths, **switches)
  stages = ['decipher', 'repeat 1', 'repeat 2']
  numbers = {name: 1.0 for _, panel in r2d2_figures.PANELS for name in panel}
  finished = types.SimpleNamespace(
    measured=[
      {'step': step, 'stage': stage} | numbers
      for step, stage in zip((8, 10, 12), stages, strict=True)
    ],
    stage_ends=stage_ends(method),
    program=types.SimpleNamespace(method=method),
  )
  drawn, _ = r2d2_figures.theorems(finished)
  for axes in drawn.axes:
    dotted = [line for line in axes.lines if line.get_linestyle() == ':']
    assert [line.get_xdata()[0] for line in dotted] == expected


@pytest.mark.slow
def test_what_cannot_be_drawn_is_one_line(folder, tmp_path, capsys):
  refused = lambda run, *more: binary.refused(
    capsys, f'--run={run}', '--figure=r2d2/2', *more, binary='figures'
  )
  line = refused(folder, '--stage=dechiper')
  assert '--stage=dechiper: the run has supervised, decipher, repeat 1' in line
  assert '--points=0' in refused(folder, '--points=0')
  run = train(tmp_path, '--network=digits', '--keep_stages')
  line = refused(run)
  assert 'has 8 features' in line and '--network=lenet' in line
  shutil.rmtree(run / 'checkpoints/r2d2/seed-0/3')  # as if not kept
  assert '--keep_stages' in refused(run)
