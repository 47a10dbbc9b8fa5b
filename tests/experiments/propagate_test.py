"""`propagate.py` from the command line, on tiny files."""

import json

import binary
import numpy as np
import pytest

from ssljax.analysis import propagation
from ssljax.core import UNLABELLED

SMALL = (
  '--classes=3',
  '--images=8',
  '--labels=3',
  '--subsamples=2',
  '--neighbours=5',
  '--density_neighbours=6',
)
COUNT = 60  # images of five classes


def arrays():
  """A test part whose classes are narrow cones, and an array to ignore."""
  rng = np.random.default_rng(0)
  labels = np.arange(COUNT) % 5
  cones = 2 * np.eye(5)[labels] + 0.2 * rng.normal(size=(COUNT, 5))
  return {
    'test': cones.astype(np.float32),
    'test_labels': labels.astype(np.int64),
    'step': np.int32(7),
  }


def save(folder, **changes):
  """Write `arrays` with some changed, or left out where None."""
  path = folder / 'embeddings.npz'
  kept = {k: v for k, v in (arrays() | changes).items() if v is not None}
  np.savez(path, **kept)
  return path


def run(*args):
  return binary.run(*args, binary='propagate')


def test_every_method_is_compared_on_a_file(tmp_path, capsys):
  path, out = save(tmp_path), tmp_path / 'new/table.json'
  assert run(f'--embeddings={path}', f'--out={out}', *SMALL) == 0
  printed = capsys.readouterr().out
  result = json.loads(out.read_text())
  methods = ['LS', 'LP', 'LP_CMN', 'LP_DMT', 'LP_DLP', 'LLP']
  # Every method separates the cones.
  assert result['accuracy'] == {name: [100.0, 100.0] for name in methods}
  for name in methods:
    assert f'{name:6}  100.00 ± 0.00' in printed
  assert f'{path}, part test' in printed
  assert 'mean ± std (n=2)' in printed and 'paper, on' not in printed
  assert result['flags']['images'] == 8
  assert result['flags']['temperature'] == 0.07
  assert {'scipy', 'scikit-learn', 'jax'} <= set(result['versions'])


def test_the_numbers_are_accuracies_on_the_images_without_a_label(tmp_path):
  rng = np.random.default_rng(1)
  x = arrays()['test'] + rng.normal(size=(COUNT, 5)).astype(np.float32)
  path, out = save(tmp_path, test=x), tmp_path / 'table.json'
  assert run(f'--embeddings={path}', f'--out={out}', '--seed=4', *SMALL) == 0
  accuracy = json.loads(out.read_text())['accuracy']
  for number in range(2):
    some = propagation.draw_subsample(
      arrays()['test_labels'], 3, 8, 3, seed=4, number=number
    )
    found = propagation.local_propagation(
      x[some.rows], some.known, 3, neighbours=5, density_neighbours=6
    )
    hidden = [i for i in range(24) if some.known[i] == UNLABELLED]
    right = sum(found[i] == some.truth[i] for i in hidden)
    assert accuracy['LLP'][number] == pytest.approx(100 * right / 15)
  assert len({tuple(numbers) for numbers in accuracy.values()}) > 1


def test_without_a_file_it_compares_on_digits_and_says_so(capsys):
  assert run('--subsamples=1') == 0
  printed = capsys.readouterr().out
  assert "pixels of scikit-learn's digits" in printed
  assert '1 subsamples of 10 classes, 50 images each, 5 of them' in printed
  numbers = [float(line.split()[1]) for line in printed.splitlines()[3:]]
  assert len(numbers) == 6 and min(numbers) > 40  # 10 by chance


@pytest.mark.slow
def test_the_papers_numbers_stand_beside_its_protocol(
  tmp_path, capsys, monkeypatch
):
  labels = np.arange(2500) % 50
  path = save(
    tmp_path, train=np.eye(50, dtype=np.float32)[labels], train_labels=labels
  )
  # The compared methods do not matter here, and the global ones are slow.
  first = lambda embeddings, known, count: np.zeros(len(known))
  for name in ('spreading', 'propagation'):
    monkeypatch.setattr(propagation, f'label_{name}', first)
  monkeypatch.setattr(propagation, 'metric_transfer', first)
  monkeypatch.setattr(propagation, 'deep_propagation', first)
  of_train = f'--embeddings={path}', '--part=train'
  assert run(*of_train) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[2].endswith('paper, on ImageNet')
  assert lines[-1].split() == 'LLP 100.00 ± 0.00 88.1 ± 2.3'.split()
  # 45 of 2,250 images are of the first class.
  assert lines[3].split() == 'LS 2.00 ± 0.00 84.6 ± 3.4'.split()
  assert run(*of_train, '--labels=4') == 0
  assert 'paper, on' not in capsys.readouterr().out


@pytest.mark.parametrize(
  ('args', 'named'),
  [
    (['--neighbours=10'], '--neighbours=10: a subsample has 9 labelled'),
    (
      ['--density_neighbours=25'],
      '--density_neighbours=25: a subsample has 24',
    ),
    (['--temperature=0'], '--temperature=0.0: give a number above 0'),
    (['--temperature=-1'], '--temperature=-1.0'),
    (['--labels=8'], '--labels=8: --images=8'),
    (['--labels=0'], '--labels=0'),
    (['--images=13'], '--images=13: class 0 has 12'),
    (['--classes=6'], '--classes=6: the embeddings are of 5 classes'),
    (['--classes=1'], '--classes=1'),
    (['--subsamples=0'], '--subsamples=0'),
    (['--seed=-1'], '--seed=-1'),
    (['--part=train'], 'has test, test_labels, step, not both train and train'),
    (['--part=valid'], '--part'),
    (['--temperature=warm'], '--temperature'),
    (['table.json'], '"table.json" is not a flag'),
  ],
)
def test_bad_flags_are_one_line(args, named, tmp_path, capsys):
  path = save(tmp_path)
  line = binary.refused(
    capsys, f'--embeddings={path}', *SMALL, *args, binary='propagate'
  )
  assert named in line


X, Y = arrays()['test'], arrays()['test_labels']


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'test_labels': None}, 'not both test and test_labels'),
    ({'test_labels': Y[:-1]}, 'test is [60, 5], test_labels [59]'),
    ({'test': X[0]}, 'test is [5]'),
    ({'test_labels': Y.astype(float)}, 'test_labels of float64'),
    ({'test_labels': Y - 2}, 'test_labels has -2'),
    ({'test': np.where(np.arange(COUNT)[:, None] == 7, np.nan, X)}, 'row 7'),
    ({'test': X.astype(object)}, 'cannot be read'),
  ],
)
def test_bad_arrays_are_one_line(changes, named, tmp_path, capsys):
  path = save(tmp_path, **changes)
  line = binary.refused(
    capsys, f'--embeddings={path}', *SMALL, binary='propagate'
  )
  assert f'--embeddings={path}' in line and named in line


def test_bad_files_are_one_line(tmp_path, capsys):
  refused = lambda *args: binary.refused(
    capsys, *args, *SMALL, binary='propagate'
  )
  assert 'no such file' in refused(f'--embeddings={tmp_path}/none.npz')
  text = tmp_path / 'text.npz'
  text.write_text('no embeddings')
  assert 'not an .npz file' in refused(f'--embeddings={text}')
  path = save(tmp_path)
  whole = path.read_bytes()
  path.write_bytes(whole[:200] + bytes(100) + whole[300:])
  assert 'cannot be read' in refused(f'--embeddings={path}')
  path.write_bytes(whole)
  embeddings = f'--embeddings={path}'
  assert 'is a folder' in refused(embeddings, f'--out={tmp_path}')
  inside = f'--out={text}/table.json'
  assert f'{inside}: cannot be written' in refused(embeddings, inside)


def test_digits_have_no_more_classes_than_ten(capsys):
  line = binary.refused(capsys, '--classes=20', binary='propagate')
  assert '--classes=20: the embeddings are of 10 classes' in line
