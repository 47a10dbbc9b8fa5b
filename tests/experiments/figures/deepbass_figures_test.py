"""Figures 1 to 3 of DeepBASS, drawn from tiny runs."""

import csv
import json
import types

import binary
import jax
import numpy as np
import PIL.Image
import pytest

from ssljax.experiments.figures import deepbass as deepbass_figures
from ssljax.experiments.figures import style
from ssljax.runs import load
from ssljax.training import metrics_writer

RUN = (
  '--dataset=yin-yang',
  '--network=deepbass_toy',
  '--labels=4',
  '--steps=3',
  '--iterations=4',
  '--query_every=2',
  '--query_size=2',
  '--query_passes=2',
  '--passes=2',
  '--labelled_passes=2',
  '--seeds=2',
  '--evaluate_every=1',
)
# Not in the paper's order.
RUNS = {
  'both': ('--membership=all',),
  'first': ('--iterations=0', '--acquire=none'),
  'active': ('--membership=none', '--seeds_at_once=2'),
  'semi': ('--membership=stepwise', '--acquire=none'),
}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Finished runs: the four panels of Figure 1."""
  base = tmp_path_factory.mktemp('deepbass')
  (base / 'none.flags').touch()
  for name, more in RUNS.items():
    where = f'--flagfile={base}/none.flags', f'--workdir={base}/{name}'
    assert binary.run(*where, *RUN, *more, binary='deepbass') == 0
  return base


@pytest.fixture(scope='module')
def out(folders, tmp_path_factory):
  """The folder with both figures."""
  out = tmp_path_factory.mktemp('drawn')
  for figure, names in (('1', RUNS), ('3', ('both', 'active', 'semi'))):
    runs = [f'--run={folders}/{name}' for name in names]
    asked = f'--figure=deepbass/{figure}', f'--out={out}', '--seed=1'
    assert binary.run(*asked, *runs, binary='figures') == 0
  return out


def table(out, name):
  path = out / f'deepbass-{name}.csv'
  with open(path, newline='', encoding='utf-8') as file:
    return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['1', '3'])
def test_a_figure_is_a_picture_of_two_kinds(name, out):
  stem = out / f'deepbass-{name}.seed-1'
  with PIL.Image.open(f'{stem}.png') as image:
    image.load()
    assert image.width > 400
    assert len(np.unique(np.asarray(image.convert('L')))) > 10
  assert open(f'{stem}.pdf', 'rb').read().startswith(b'%PDF')


def test_the_panels_stand_in_the_papers_order(out):
  columns = list(table(out, '1.seed-1.maps')[0])
  assert columns[2:] == ['red first', 'red semi', 'red active', 'red both']


def test_initial_and_acquired_labels_are_marked(folders, out):
  rows = table(out, '1.seed-1.points')
  assert len(rows) == 1000
  for name in RUNS:
    split = json.loads((folders / name / 'split.json').read_text())['splits'][1]
    result = json.loads((folders / name / 'result.json').read_text())
    want = set(map(int, split['labelled']))
    assert len(want) == 8
    if name in ('active', 'both'):
      # Two in the first iteration and two in the third.
      assert len(result['asked'][1]['rows']) == 4
      want |= set(result['asked'][1]['rows'])
    crossed = {
      int(r['train_row']) for r in rows if r[f'labelled {name}'] == '1'
    }
    assert crossed == want


def test_a_map_is_the_networks_softmax_without_dropout(folders, out):
  rows = table(out, '1.seed-1.maps')
  assert len(rows) == deepbass_figures.GRID**2
  finished = load.load(folders / 'active', 1)
  layers = jax.device_get(finished.state.params)
  x = np.array([[float(row['x']), float(row['y'])] for row in rows])
  for layer in ('Dense_0', 'Dense_1', 'Dense_2', 'Dense_3'):
    x = x @ layers[layer]['kernel'][0] + layers[layer]['bias'][0]
    x = x if layer == 'Dense_3' else np.where(x > 0, x, 0.1 * x)
  exp = np.exp(x - x.max(axis=1, keepdims=True))
  second = exp[:, 1] / exp.sum(axis=1)
  found = [float(row['red active']) for row in rows]
  np.testing.assert_allclose(found, second, rtol=1e-4, atol=1e-5)


def test_the_title_has_the_error_that_the_run_reports(folders):
  finished = load.load(folders / 'both', 1)
  result = json.loads((folders / 'both/result.json').read_text())
  error = result['test_error']['last'][1]
  title = deepbass_figures.panel_title(finished)
  assert title == f'active semi-supervised\n12 labels, test error {error:.1f} %'


def test_a_stage_of_epochs_ends_at_its_last_checkpoint(folders):
  # 8 labels in 20 copies are fewer than 256: one step per epoch.
  finished = load.load(folders / 'active', 0)
  assert finished.stage_ends == {'labelled': 3, 'iterations': 7}
  assert finished.steps == 7 and int(finished.state.step[0]) == 7


def test_a_line_is_the_mean_over_all_seeds_and_begins_after_the_first_stage(
  folders, out
):
  rows = table(out, '3.seed-1.accuracy')
  assert {row['run'] for row in rows} == {'both', 'active', 'semi'}
  for name in ('both', 'active', 'semi'):
    mine = [row for row in rows if row['run'] == name]
    assert [int(row['iteration']) for row in mine] == [0, 1, 2, 3, 4]
    result = json.loads((folders / name / 'result.json').read_text())
    for row, errors in (
      (mine[0], result['test_error_after']['labelled']),
      (mine[-1], result['test_error']['last']),
    ):
      assert float(row['accuracy']) == pytest.approx(100 - np.mean(errors))
      assert float(row['deviation']) == pytest.approx(np.std(errors, ddof=1))
      assert row['seeds'] == '2'


def test_a_line_is_read_in_the_order_of_the_iterations(tmp_path):
  # Two seeds, three iterations. Of the first stage the last error counts; lines
  # without an error are skipped.
  errors = {0: [90, 40, 30, 20, 10], 1: [80, 60, 50, 40, 30]}
  with open(tmp_path / 'metrics.jsonl', 'w', encoding='utf-8') as file:
    for seed, found in errors.items():
      for step, error in enumerate(found):
        stage = 'iterations' if step > 1 else 'labelled'
        where = dict(job='deepbass', seed=seed, step=step, stage=stage)
        for values in ({'loss': 1.0}, {'test_error_last': error}):
          file.write(json.dumps(where | values) + '\n')
  line = deepbass_figures.accuracies(tmp_path)
  np.testing.assert_array_equal(line, [[60, 70, 80, 90], [40, 50, 60, 70]])
  # Two numbers that differ by 20: √(10² + 10²).
  np.testing.assert_allclose(style.deviation(line), [200**0.5] * 4)
  np.testing.assert_array_equal(style.deviation(line[:1]), [0] * 4)
  assert len(metrics_writer.read(tmp_path, 'deepbass')) == 20


def test_the_panel_of_a_run_follows_from_its_labels_and_settings():
  def run(known, **settings):
    labels = np.full((1, 20), -1)
    labels[0, :known] = 0
    return types.SimpleNamespace(
      state=types.SimpleNamespace(labels=labels, images=20),
      split=types.SimpleNamespace(labelled=np.arange(8)),
      settings=settings,
    )

  kinds = [
    deepbass_figures.kind(run(known, iterations=length, membership=membership))
    for known, length, membership in [
      (8, 0, 'all'),
      (8, 9, 'none'),
      (8, 9, 'stepwise'),
      (9, 9, 'none'),
      (9, 9, 'all'),
    ]
  ]
  first, *others = deepbass_figures.PANELS
  assert kinds == [first, first, *others]


@pytest.mark.slow
def test_what_cannot_be_drawn_is_one_line(folders, tmp_path, capsys):
  refused = lambda *args: binary.refused(capsys, *args, binary='figures')
  line = refused('--figure=deepbass/3', f'--run={folders}/first')
  assert '--iterations' in line and f'--run={folders}/first' in line
  five = [f'--run={folders}/{name}' for name in (*RUNS, 'semi')]
  assert 'at most 4' in refused('--figure=deepbass/1', *five)
  (tmp_path / 'none.flags').touch()
  where = f'--flagfile={tmp_path}/none.flags', f'--workdir={tmp_path}/run'
  digits = '--dataset=digits', '--network=digits', '--acquire=none'
  later = '--dataset=yin-yang', '--network=deepbass_toy', '--seed=1'
  for more, words in (
    (digits, '--dataset=yin-yang'),
    (later, '--seed'),
  ):
    short = '--iterations=0', '--acquire=none', '--seeds=1', '--overwrite'
    assert binary.run(*where, *RUN, *more, *short, binary='deepbass') == 0
    both = f'--run={folders}/first', f'--run={tmp_path}/run'
    assert words in refused('--figure=deepbass/1', *both)
