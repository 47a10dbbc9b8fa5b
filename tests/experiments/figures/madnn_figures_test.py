"""Figures 3 to 6 of MA-DNN and the HTML report, from a tiny run."""

import base64
import csv
import html.parser
import json
import re
import shutil
import subprocess
from unittest import mock

import binary
import chex
import jax
import numpy as np
import PIL.Image
import pytest
from sklearn import manifold
import threadpoolctl

from ssljax.core import UNLABELLED
from ssljax.data import sampling
from ssljax.experiments import html_report
from ssljax.experiments.figures import catalogue, madnn, style
from ssljax.runs import load

RUN = (
  '--network=digits',
  '--labels=2',
  '--augment=',
  '--batch_labelled=8',
  '--batch_unlabelled=24',
  '--steps=6',
  '--keep_every=2',
  '--record_every=1',
  '--seeds=2',
)
STEPS = [0, 2, 4, 6]  # of the figures: the initial state and the kept ones
CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A finished run with its baseline and its report."""
  base = tmp_path_factory.mktemp('madnn')
  (base / 'none.flags').touch()
  run = base / 'run'
  where = f'--flagfile={base}/none.flags', f'--workdir={run}'
  assert binary.run(*where, *RUN) == 0
  # t-SNE of fewer images than by default, which is most of a report's time.
  with mock.patch.dict(madnn.keys.__kwdefaults__, points=40):
    assert binary.run(f'--run={run}', binary='html_report') == 0
  return run


@pytest.fixture(scope='module')
def finished(folder):
  with binary.small():
    yield load.load(folder)


@pytest.fixture(scope='module')
def drawn(folder, finished):
  """The folder with its figures."""
  out = folder / 'figures'
  out.mkdir()
  with style.style():
    for number in '3456':
      options = {'points': 12} if number == '4' else {}
      make = catalogue.FIGURES[f'madnn/{number}'].draw
      stem = out / f'madnn-{number}.seed-0'
      style.save(stem, *make(finished, **options))
  return out


def table(drawn, name):
  path = drawn / f'madnn-{name}.csv'
  with open(path, newline='', encoding='utf-8') as file:
    return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_threads_of_the_map_do_not_wait_for_each_other(finished):
  seen = []

  class Observed(manifold.TSNE):
    def fit_transform(self, x):
      found = threadpoolctl.threadpool_info()
      seen.extend(n['num_threads'] for n in found if n['user_api'] == 'openmp')
      return super().fit_transform(x)

  parts, _ = madnn.sample_parts(finished, 5)
  with (
    threadpoolctl.threadpool_limits(2, 'openmp'),
    mock.patch.object(manifold, 'TSNE', Observed),
  ):
    assert len(madnn.tsne(finished, 6, parts)) == 4
  assert set(seen) == {1}


@pytest.mark.slow
@pytest.mark.parametrize('number', '3456')
def test_a_figure_is_a_picture_of_two_kinds(number, drawn):
  stem = drawn / f'madnn-{number}.seed-0'
  with PIL.Image.open(f'{stem}.png') as image:
    image.load()
    assert image.width > 400
    assert len(np.unique(np.asarray(image.convert('L')))) > 10
  assert stem.with_name(f'{stem.name}.pdf').read_bytes()[:5] == b'%PDF-'


def test_figure_3_has_the_errors_of_every_arm_and_split(folder, drawn):
  result = json.loads((folder / 'result.json').read_text())
  rows = table(drawn, '3.seed-0.errors')
  assert {row['labelled'] for row in rows} == {'20'}
  for arm, entry in result['arms'].items():
    mine = [float(row['error']) for row in rows if row['arm'] == arm]
    assert mine == entry['test_error']['averaged']


def test_figure_4_has_points_of_each_kind_and_a_key_per_class(drawn, finished):
  rows = table(drawn, '4.seed-0.features')
  split, dataset = finished.split, finished.dataset
  for step in STEPS:
    mine = [row for row in rows if row['step'] == str(step)]
    part = lambda name, of=mine: [
      (int(row['row']), row['class']) for row in of if row['part'] == name
    ]
    assert part('key') == list(enumerate(CLASSES))
    truth = dataset.train.labels
    for name, pool, labels in (
      ('labelled', split.labelled, truth),
      ('unlabelled', split.unlabelled, truth),
      ('test', np.arange(500), dataset.test.labels),
    ):
      assert len(part(name)) == 12
      assert all(row in pool for row, _ in part(name))
      assert all(CLASSES[labels[row]] == c for row, c in part(name))


def test_figure_5_is_the_memory(drawn, finished):
  rows = table(drawn, '5.seed-0.values')
  for step in STEPS:
    mine = [row for row in rows if row['step'] == str(step)]
    values = [[float(row[c]) for c in CLASSES] for row in mine]
    memory = finished.after(step).memory.values[0]
    np.testing.assert_allclose(values, memory, rtol=1e-5)
    np.testing.assert_allclose(np.sum(values, axis=1), 1, rtol=1e-5)


def test_figure_5_begins_with_a_memory_that_knows_nothing(drawn, finished):
  rows = [r for r in table(drawn, '5.seed-0.values') if r['step'] == '0']
  assert [[float(row[c]) for c in CLASSES] for row in rows] == pytest.approx(
    np.full([10, 10], 0.1), rel=1e-6
  )
  # The initial state is that of the run: its keys are 0, and its weights are
  # those that a new program of the same split starts from.
  state = finished.after(0)
  assert int(state.step[0]) == 0
  assert not np.any(state.memory.keys)
  first = sampling.Sampler(
    finished.program.method.stages[0].batch_spec, finished.split
  ).rows(0)
  again = finished.program.initial([finished.split], first[None])
  chex.assert_trees_all_equal(state.params, again.params)


def test_figure_3_shows_supervised_runs_of_their_own_length(
  folder, tmp_path, drawn
):
  (tmp_path / 'none.flags').touch()
  alone = tmp_path / 'alone'
  status = binary.run(
    f'--flagfile={tmp_path}/none.flags',
    *('--network=digits', '--labels=2', '--batch_labelled=8', '--steps=2'),
    f'--workdir={alone}',
    binary='supervised',
  )
  assert status == 0
  figure = '--figure=madnn/3', f'--out={tmp_path}/out'
  runs = f'--run={folder}', f'--run={alone}'
  assert binary.run(*figure, *runs, binary='figures') == 0
  with open(tmp_path / 'out/madnn-3.seed-0.errors.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  errors = json.loads((alone / 'result.json').read_text())['test_error']
  mine = [row for row in rows if row['arm'] == 'supervised']
  # The last row is that of the run of two steps.
  assert float(mine[-1]['error']) == errors['averaged'][0]


def test_figure_6_is_equations_4_and_6_of_images_without_a_label(
  drawn, finished
):
  rows = table(drawn, '6.seed-0.predictions')
  assert len(rows) == 5 * len(STEPS)
  for row in rows:
    number = int(row['train_row'])
    assert finished.split.labels[number] == UNLABELLED
    assert row['class'] == CLASSES[finished.dataset.train.labels[number]]
    state = finished.after(int(row['step']))
    x = finished.as_trained(state, finished.program.data.train, [number])[0]
    keys, values = (
      np.asarray(part[0], np.float64)
      for part in (state.memory.keys, state.memory.values)
    )
    # w = softmax(−‖x − k_j‖), p̂ = Σ_j w_j v_j.
    w = np.exp(-np.sqrt(((x - keys) ** 2).sum(axis=1)))
    p_hat = w @ values / w.sum()
    drawn = [float(row[c]) for c in CLASSES]
    np.testing.assert_allclose(drawn, p_hat, rtol=1e-4, atol=1e-6)


# The report.


class Page(html.parser.HTMLParser):
  """Headings, cells of tables, and sources of pictures and links."""

  def __init__(self, text):
    super().__init__()
    self.headings, self.cells, self.sources, self._in = [], [], [], None
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self._in = tag
    self.sources += [v for k, v in attrs if k in ('src', 'href')]

  def handle_endtag(self, tag):
    self._in = None

  def handle_data(self, data):
    if self._in in ('h1', 'h2'):
      self.headings.append(data.strip())
    if self._in in ('td', 'th'):
      self.cells.append(data.strip())


@pytest.fixture(scope='module')
def page(folder):
  return Page((folder / 'report.html').read_text())


def test_a_report_is_one_self_contained_file(page, folder):
  assert len(page.sources) > 4
  for source in page.sources:
    kind, data = source.split(',', 1)
    begin = {
      'data:image/svg+xml;base64': b'<?xml',
      'data:image/png;base64': b'\x89PNG',
    }[kind]
    assert base64.b64decode(data).startswith(begin)
  text = (folder / 'report.html').read_text()
  assert not re.search(r'<(script|link|iframe)', text)


def test_a_report_has_the_settings_and_errors(page, folder):
  result = json.loads((folder / 'result.json').read_text())
  for value in (result['commit'], result['device'], 'supervised', 'madnn'):
    assert value in page.cells
  last = result['test_error']['last']
  assert ' '.join(f'{error:.2f}' for error in last) in page.cells
  assert [h for h in page.headings if h.startswith('madnn/')] == [
    'madnn/4: features and keys over training',
    'madnn/5: value embeddings over training',
    "madnn/6: the memory's predictions for a few images over training",
  ]


def test_a_report_has_the_errors_of_predicted_labels(page, finished):
  at = page.cells.index('classifier')
  assert page.cells[at - 1 : at + 4] == [
    *('step', 'classifier', 'images', 'pseudo-labels', 'images')
  ]
  rows = np.setdiff1d(finished.split.unlabelled, finished.split.labelled)
  truth = finished.dataset.train.labels[rows]
  for i, step in enumerate(STEPS[1:]):
    shown = page.cells[at + 4 + 5 * i :][:5]
    state, data = finished.after(step), finished.program.data
    net = finished.program.net
    image = finished.dataset.train.read(rows)
    # Computed directly: the network with averaged weights, and the memory.
    weights = finished.program.method.weights(jax.tree.map(first, state))
    logits = net.infer(*weights, image / np.float32(255)).logits
    error = 100 * np.mean(np.argmax(logits, axis=-1) != truth)
    x = finished.as_trained(state, data.train, rows)
    keys, values = np.asarray(state.memory.keys[0]), state.memory.values[0]
    distance = np.sqrt(((x[:, None] - keys) ** 2).sum(axis=-1))
    p_hat = np.exp(-distance) @ np.asarray(values)
    of_memory = 100 * np.mean(p_hat.argmax(axis=-1) != truth)
    count = f'{len(rows):,}'
    expected = [str(step), f'{error:.2f}', count, f'{of_memory:.2f}', count]
    assert shown == expected


def test_a_report_draws_the_quality_of_pseudo_labels_over_training(folder):
  result = json.loads((folder / 'result.json').read_text())
  found = html_report.read_metrics(folder, result)
  charts = html_report.charts(found)
  for name in ('coverage', 'accuracy', 'balance'):
    ((arm, by_step),) = found[f'pseudo_label_{name}'].items()
    assert arm == 'madnn' and len(by_step) > 1
    assert f'pseudo label {name}' in charts[f'pseudo_label_{name}']


def first(x):
  return x[0]


def test_a_report_is_drawn_by_a_browser(folder, tmp_path):
  browser = shutil.which('chromium') or shutil.which('google-chrome')
  if not browser:
    pytest.skip('there is no Chromium here')
  options = ('--headless', '--no-sandbox', '--disable-gpu')
  command = [browser, *options, '--window-size=1000,3000']
  picture = tmp_path / 'report.png'
  subprocess.run(
    [*command, f'--screenshot={picture}', f'file://{folder}/report.html'],
    check=True,
    capture_output=True,
    timeout=120,
  )
  with PIL.Image.open(picture) as image:
    pixels = np.asarray(image.convert('L'))
  # There is content in all parts of the page.
  filled = (pixels < 200).any(axis=1)
  assert all(part.any() for part in np.split(filled, 10))


def test_a_report_of_no_run_is_one_line(tmp_path, capsys):
  line = binary.refused(capsys, f'--run={tmp_path}', binary='html_report')
  assert '--workdir' in line
  line = binary.refused(capsys, binary='html_report')
  assert '--run' in line
