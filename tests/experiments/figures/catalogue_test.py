"""The program `figures`, and association's figures of a tiny run."""

import csv
import io
import json
import shutil
import sys
from unittest import mock

import binary
import chex
import jax
import numpy as np
import PIL.Image
import pytest

from ssljax.core import UNLABELLED
from ssljax.data import sampling
from ssljax.data.splits import Split
from ssljax.errors import InputError
from ssljax.experiments.figures import association as association_figures
from ssljax.experiments.figures import catalogue, style
from ssljax.runs import load

# 20 labelled images, all in every step; the second seed is drawn.
RUN = (
  '--network=digits',
  '--labels=2',
  '--batch_per_class=2',
  '--batch_unlabelled=20',
  '--steps=6',
  '--seeds=2',
  '--seeds_at_once=2',
  '--nobaseline',
)
SEED, STEPS, EARLY, NEAREST = 1, 6, 2, 5
OF_ASSOCIATION = [n for n in catalogue.FIGURES if n.startswith('association/')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A finished run."""
  base = tmp_path_factory.mktemp('figures')
  (base / 'none.flags').touch()
  status = binary.run(
    f'--flagfile={base}/none.flags',
    *RUN,
    f'--workdir={base}/run',
    binary='association',
  )
  assert status == 0
  return base / 'run'


@pytest.fixture(scope='module')
def out(folder):
  """The folder with all figures of the run."""
  for name in OF_ASSOCIATION:
    status = binary.run(
      f'--figure={name}',
      f'--run={folder}',
      f'--seed={SEED}',
      *([f'--early_steps={EARLY}'] if name == 'association/2' else []),
      binary='figures',
    )
    assert status == 0
  return folder / 'figures'


@pytest.fixture(scope='module')
def finished(folder):
  """The loaded run."""
  with binary.small():
    return load.load(folder, SEED)


def table(out, name):
  """A CSV as a list of dictionaries."""
  with open(out / f'{name}.csv', newline='', encoding='utf-8') as file:
    return list(csv.DictReader(file))


@pytest.mark.parametrize('name', OF_ASSOCIATION)
def test_a_figure_is_a_picture_of_two_kinds(name, out):
  stem = f'{name.replace("/", "-")}.seed-{SEED}'
  with PIL.Image.open(out / f'{stem}.png') as image:
    image.load()
    # Wider than 3 inches as printed, and not blank.
    assert image.format == 'PNG' and image.width > 400
    assert len(np.unique(np.asarray(image.convert('L')))) > 10
  assert (out / f'{stem}.png').stat().st_size < 400_000
  pdf = (out / f'{stem}.pdf').read_bytes()
  assert pdf.startswith(b'%PDF') and pdf.rstrip().endswith(b'%%EOF')


def test_the_confusions_are_of_the_reported_error(folder, out):
  rows = table(out, f'association-3.seed-{SEED}.confusion')
  counts = np.array([[int(row[str(c)]) for c in range(10)] for row in rows])
  assert counts.sum() == 500 and (counts.sum(axis=1) == 50).all()
  result = json.loads((folder / 'result.json').read_text())
  error = 100 * (1 - counts.trace() / 500)
  assert error == pytest.approx(result['test_error']['last'][SEED])
  # Every mistake is listed once.
  mistakes = table(out, f'association-3.seed-{SEED}.mistakes')
  assert len({row['test_row'] for row in mistakes}) == 500 - counts.trace()
  assert all(row['true'] != row['predicted'] for row in mistakes)
  # The labelled images are those of the run's split.
  labelled = table(out, f'association-3.seed-{SEED}.labelled')
  split = json.loads((folder / 'split.json').read_text())['splits'][SEED]
  assert {row['train_row']: int(row['class']) for row in labelled} == (
    split['labelled']
  )


def matrix(rows, steps, name):
  """(P, rows from, rows to) of a transition in a table."""
  mine = [
    row
    for row in rows
    if int(row['steps']) == steps and row['transition'] == name
  ]
  starts = list(dict.fromkeys(row['from_row'] for row in mine))
  ends = list(dict.fromkeys(row['to_row'] for row in mine))
  p = np.array([float(row['probability']) for row in mine])
  return p.reshape(len(starts), len(ends)), starts, ends


@pytest.mark.parametrize('steps', [EARLY, STEPS])
def test_transitions_are_distributions_that_walk_as_reported(
  steps, folder, out
):
  rows = table(out, f'association-2.seed-{SEED}.transitions')
  ab, labelled, others = matrix(rows, steps, 'ab')
  ba, others_too, labelled_too = matrix(rows, steps, 'ba')
  assert (labelled, others) == (labelled_too, others_too)
  assert ab.shape == (20, 28)
  np.testing.assert_allclose(ab.sum(axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(ba.sum(axis=1), 1, rtol=1e-5)

  visits = table(out, f'association-2.seed-{SEED}.visits')
  visits = [
    float(row['visit_probability'])
    for row in visits
    if int(row['steps']) == steps
  ]
  np.testing.assert_allclose(visits, ab.mean(axis=0), rtol=1e-5)

  # Eq. 4 with explicit sums.
  split = json.loads((folder / 'split.json').read_text())['splits'][SEED]
  assert set(labelled) == set(split['labelled'])
  assert not set(others) & set(labelled)
  label = [split['labelled'][row] for row in labelled]
  correct = sum(
    sum(ab[i, k] * ba[k, j] for k in range(28))
    for i in range(20)
    for j in range(20)
    if label[i] == label[j]
  )
  walks = table(out, f'association-2.seed-{SEED}.walks')
  reported = {
    int(row['steps']): float(row['correct_walk_probability']) for row in walks
  }
  assert reported[steps] == pytest.approx(correct / 20, rel=1e-4)


def test_neighbours_are_those_of_a_search_through_all_images(finished, out):
  rows = table(out, f'association-4.seed-{SEED}.neighbours')
  train, split = finished.program.data.train, finished.split
  hidden = np.flatnonzero(split.labels == UNLABELLED)
  embedding = finished.infer(finished.state, train, hidden).embedding
  embedding = dict(zip(hidden, embedding.astype(np.float64), strict=True))

  def cosine(i, j):
    a, b = embedding[i], embedding[j]
    return a @ b / np.sqrt((a @ a) * (b @ b))

  queries = list(dict.fromkeys(int(row['query_row']) for row in rows))
  assert len(queries) == 7
  for query in queries:
    mine = [row for row in rows if int(row['query_row']) == query]
    found = [int(row['row']) for row in mine]
    values = [float(row['cosine']) for row in mine]
    assert query not in found and len(set(found)) == NEAREST
    assert values == sorted(values, reverse=True)
    # Rows with equal similarities up to 1e-6 may be swapped.
    everywhere = sorted(
      (cosine(query, other) for other in hidden if other != query),
      reverse=True,
    )
    np.testing.assert_allclose(values, everywhere[:NEAREST], atol=1e-6)
    np.testing.assert_allclose(
      values, [cosine(query, row) for row in found], atol=1e-6
    )


def numbers(state):
  """The state with the random key as numbers."""
  return state.replace(key=jax.random.key_data(state.key))


def test_a_run_replayed_begins_and_ends_as_it_did(finished):
  batch_spec = finished.program.method.stages[0].batch_spec
  rows = sampling.Sampler(batch_spec, finished.split).rows(0)
  initial = finished.program.initial([finished.split], rows[None])
  chex.assert_trees_all_equal(numbers(finished.replay(0)), numbers(initial))
  # It was trained together with another seed, with different rounding.
  assert finished.steps == STEPS
  chex.assert_trees_all_close(
    numbers(finished.replay(STEPS)), numbers(finished.state), atol=1e-3
  )


def test_the_nearest_are_in_falling_order_without_the_query_itself():
  # Query 0 is position 1, query 1 position 3.
  cosines = np.array([[0.5, 1.0, 0.9, -0.2], [0.1, 0.3, 0.3, 1.0]])
  found, values = association_figures.nearest_of(cosines, np.array([1, 3]), 2)
  np.testing.assert_array_equal(found, [[2, 0], [1, 2]])  # ties by position
  np.testing.assert_array_equal(values, [[0.9, 0.5], [0.3, 0.3]])


def test_half_of_the_queries_are_of_unknown_class_if_possible():
  truth = np.array([0, 1, 2, 0, 1, 2] + [UNLABELLED] * 4)
  chosen = association_figures.choose_queries(truth, 6, seed=0)
  assert len(set(chosen.tolist())) == 6
  assert (truth[chosen] == UNLABELLED).sum() == 3
  # All of known class, or all of unknown class.
  assert len(association_figures.choose_queries(truth[:6], 5, 0)) == 5
  assert len(association_figures.choose_queries(truth[6:], 4, 0)) == 4


def test_chunks_change_no_cosine(monkeypatch):
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(20, 4))
  vectors[7] = 0  # similarity 0 to all
  embed = lambda rows: vectors[rows]
  rows, queries = np.arange(3, 20), np.array([5, 9])
  whole = association_figures.cosines_to(embed, rows, queries)
  monkeypatch.setattr(association_figures, 'CHUNK', 4)
  parts = association_figures.cosines_to(embed, rows, queries)
  np.testing.assert_allclose(parts, whole)
  assert (whole[:, 4] == 0).all()
  assert whole[0, 2] == pytest.approx(1)  # of row 5 to itself


def test_a_confusion_is_counted_in_the_row_of_the_truth():
  counts = association_figures.confusion(
    np.array([0, 0, 1, 2]), np.array([0, 2, 2, 2]), 3
  )
  np.testing.assert_array_equal(counts, [[1, 0, 1], [0, 0, 1], [0, 0, 1]])


def test_labelled_images_are_hidden_only_if_all_are_labelled():
  labels = np.array([0, UNLABELLED, 1, UNLABELLED], np.int32)
  admitted = np.array([True, True, True, False])
  some = Split(0, labels, admitted, np.array([], np.int32))
  assert load.hidden_rows(some).tolist() == [1]
  every = some._replace(labels=np.zeros(4, np.int32))
  assert load.hidden_rows(every).tolist() == [0, 1, 2]


def long_names(count):
  return tuple(f'a long name {i}' for i in range(count))


def drawn_to_the_end(figure):
  """True if the figure can be saved."""
  file = io.BytesIO()
  figure.savefig(file, format='svg')
  return b'</svg>' in file.getvalue()


def test_colour_images_of_many_classes_with_long_names_can_be_drawn():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (30, 8, 8, 3)).astype(np.uint8)
  with style.style():
    for classes in (3, 25):  # more than 20 are not annotated
      names, labels = long_names(classes), np.arange(6) % 3
      assert drawn_to_the_end(
        association_figures.draw_mistakes(
          (images[:6], labels, 100),
          rng.integers(0, 9, (classes, classes)),
          (images[6:12], labels, labels[::-1]),
          names,
        )
      )
    # Without known classes there is no legend of them.
    for labels in (np.full((2, 3), UNLABELLED), np.array([[0, 0, 1]] * 2)):
      figure = association_figures.draw_neighbours(
        images[:6].reshape(2, 3, 8, 8, 3), labels, np.ones((2, 2)), names, ''
      )
      assert bool(figure.legends) == (labels != UNLABELLED).any()
      assert drawn_to_the_end(figure)


BAD = {
  '': ('--figure', 'association/2'),
  '--figure=association/9': ('--figure=association/9', 'association/2'),
  '--figure=association/3': ('--run',),
  '--figure=association/3 --run=/nonexistent': ('--run', 'no folder'),
  '--figure=association/3 --run={unfinished}': ('--run', 'not finished'),
  '--figure=association/3 --run={madnn}': ('--figure', 'madnn'),
  '--figure=association/3 --run={run} --seed=7': ('--seed=7', '[0, 1]'),
  '--figure=association/3 --run={run} --out={file}': ('--out',),
  '--figure=association/3 --run={old}': ('--run', 'cannot be read', '--gone'),
  '--figure=association/3 --run={moved}': ('--run', '--data_dir'),
  '--figure=association/3 --run={bare}': ('--run', '--overwrite'),
  '--figure=association/2 --run={run} --early_steps=7': ('--early_steps=7',),
  '--figure=association/4 --run={run} --queries=0': ('--queries=0',),
  '--figure=association/4 --run={run} --nearest=9999': ('--nearest=9999',),
  'association/3': ('is not a flag',),
  '--figur=2': ('figur',),
}


@pytest.fixture(scope='module')
def folders(folder, tmp_path_factory):
  """Folders of invalid runs."""
  base = tmp_path_factory.mktemp('bad')
  result = json.loads((folder / 'result.json').read_text())
  changes = {
    'unfinished': {'complete': False},
    'madnn': {
      'method': 'madnn',
      'arms': result['arms'] | {'madnn': result['arms']['association']},
    },
    'moved': {'splits': ['of other images'] * 2},
    'old': {},
    'bare': {},
  }
  for name, change in changes.items():
    (base / name).mkdir()
    shutil.copy(folder / 'flags.txt', base / name)
    (base / name / 'result.json').write_text(json.dumps(result | change))
  with open(base / 'old/flags.txt', 'a') as file:
    file.write('--gone=1\n')
  (base / 'file').touch()
  return {path.name: path for path in base.iterdir()} | {'run': folder}


@pytest.mark.parametrize('arguments', BAD)
def test_bad_input_is_one_line_that_names_the_flag(arguments, folders, capsys):
  args = arguments.format(**folders).split()
  line = binary.refused(capsys, *args, binary='figures')
  assert all(part in line for part in BAD[arguments]), line
  assert not (folders['bare'] / 'checkpoints').exists()


def test_without_matplotlib_the_message_tells_what_to_install(folder, capsys):
  with mock.patch.dict(sys.modules, matplotlib=None):
    line = binary.refused(
      capsys, '--figure=association/3', f'--run={folder}', binary='figures'
    )
  assert "pip install 'ssljax[figures]'" in line


def test_the_list_names_every_figure(capsys):
  assert binary.run('--list', binary='figures') == 0
  listed = capsys.readouterr().out
  for name, drawing in catalogue.FIGURES.items():
    (line,) = [x for x in listed.splitlines() if x.startswith(f'{name}  ')]
    assert drawing.shows in line and drawing.needs in line


def test_options_of_other_figures_are_refused():
  asked = {'figure': 'madnn/4', 'points': 3, 'queries': None}
  assert catalogue.options_of('madnn/4', asked) == {'points': 3}
  with pytest.raises(InputError, match=r'queries=2: is an option of assoc'):
    catalogue.options_of('madnn/4', asked | {'queries': 2})


def test_a_class_name_with_dollars_is_drawn_as_it_is():
  from matplotlib import figure

  with style.style():
    axes = figure.Figure().subplots()
    for name in ('$5', '$x^{$', r'a$b\$'):
      text = axes.text(0, 0, name)
      assert not text.get_parse_math()
    axes.set_xticks([0, 1], ['$x^{$', '5'])
    axes.figure.savefig(io.BytesIO(), format='svg')
    assert axes.get_xticklabels()[0].get_text() == '$x^{$'
