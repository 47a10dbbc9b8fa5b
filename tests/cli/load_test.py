"""Loading of finished runs: their data, their errors, and damaged files."""

import importlib.util
import json
import pathlib
import shutil

import binary
import fake_tfds
import numpy as np
import pytest

from ssljax.errors import InputError
from ssljax.runs import load

_PATH = pathlib.Path(__file__).parents[2] / 'tools/fuzz.py'
_SPEC = importlib.util.spec_from_file_location('fuzz', _PATH)
fuzz = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A folder with a prepared data set of 60 + 20 images."""
  folder = tmp_path_factory.mktemp('sets')
  labels = np.arange(80) % 4
  rng = np.random.default_rng(0)
  images = [
    rng.integers(0, 99, (8, 8, 1), np.uint8) + np.uint8(40 * label)
    for label in labels
  ]
  fake_tfds.write(
    *(folder, 'fours', images, labels, 4),
    splits={'train': list(range(60)), 'test': list(range(60, 80))},
  )
  return folder


@pytest.fixture(scope='module')
def run(prepared, tmp_path_factory):
  """A finished run with averaged weights and validation images."""
  folder = tmp_path_factory.mktemp('runs') / 'run'
  assert not binary.run(
    *('--dataset=fours', f'--data_dir={prepared}', '--labels=3', '--steps=6'),
    *('--batch_labelled=4', '--validation=7', '--average=0.9', '--seeds=2'),
    *('--network=digits', '--learning_rate=0.3', '--evaluate_every=3'),
    f'--workdir={folder}',
    binary='supervised',
  )
  return folder


def test_a_run_finds_its_data_without_a_flag(run):
  with binary.small():
    finished = load.load(run, 1)
  assert finished.dataset.name == 'fours' and finished.split.seed == 1


def test_a_run_whose_data_has_moved_says_so(run, prepared, tmp_path, capsys):
  elsewhere = tmp_path / 'run'
  shutil.copytree(run, elsewhere)
  path = elsewhere / 'config.json'
  path.write_text(path.read_text().replace(str(prepared), '/nowhere/sets'))
  line = binary.refused(capsys, f'--run={elsewhere}', binary='probe')
  assert '--data_dir=/nowhere/sets: ' in line
  with binary.small():
    assert load.load(elsewhere, data_dir=str(prepared)).split.seed == 0


@pytest.mark.parametrize('seed', [0, 1])
def test_the_errors_of_a_run_are_those_of_its_weights_and_rows(run, seed):
  result = json.loads((run / 'result.json').read_text())
  with binary.small():
    finished = load.load(run, seed)
    state, program = finished.state, finished.program
    train, test = program.data.train, program.data.test
    infer = program.net.infer
    raw = lambda state, image, _: infer(state.params, state.stats, image).logits
    averaged = lambda state, image, _: (
      infer(*program.method.weights(state), image).logits
    )
    held_out = finished.split.validation
    truth = {
      'test_error': finished.dataset.test.labels,
      'validation_error': finished.dataset.train.labels[held_out],
    }
    rows = {'test_error': np.arange(20), 'validation_error': held_out}
    feeds = {'test_error': test, 'validation_error': train}
    logits = {}
    for name, outputs in (('last', raw), ('averaged', averaged)):
      for kind in truth:
        logits[kind, name] = finished.sweep(
          outputs, state, feeds[kind], rows[kind]
        )
  assert len(held_out) == 7
  assert not np.allclose(
    logits['test_error', 'last'], logits['test_error', 'averaged']
  )
  for (kind, name), found in logits.items():
    error = 100 * np.mean(found.argmax(-1) != truth[kind])
    assert result[kind][name][seed] == pytest.approx(error), (kind, name)


# Damage that leaves a file as good as it was.
UNHARMED = {
  ('flags.txt', None),  # config.json has it all
  ('config.json', 'removed'),  # flags.txt has all that decides the result
  ('split.json', 'removed'),
  ('metrics.jsonl', 'removed'),
}


@pytest.mark.parametrize('name', fuzz.FILES)
def test_every_damage_of_a_file_is_one_line_that_names_it(run, tmp_path, name):
  for number, (kind, damage) in enumerate(fuzz.DAMAGES.items()):
    folder = tmp_path / str(number)
    shutil.copytree(run, folder, ignore=lambda *_: ['checkpoints', 'events'])
    damage(folder / name)

    def read(folder=folder):
      result = load.finished_result(folder)
      load.read_config(folder, result)
      load.check_splits(folder, result)
      if (folder / 'metrics.jsonl').exists() or name == 'metrics.jsonl':
        load.read_metrics(folder, 'supervised', result)

    harmless = {(name, kind), (name, None)} & UNHARMED
    if harmless and name != 'metrics.jsonl':
      read()
      continue
    with pytest.raises(InputError, match=r'^run=') as refused:
      read()
      pytest.fail(f'{kind} was read')
    assert '\n' not in str(refused.value), kind
    words = str(refused.value)
    assert name in words or 'is not finished' in words, (kind, words)


@pytest.mark.parametrize('program', ['html_report', 'probe', 'figures'])
def test_a_damaged_run_is_one_line_of_every_program(
  run, tmp_path, capsys, program
):
  folder = tmp_path / 'run'
  shutil.copytree(run, folder)
  figure = ['--figure=association/3'] if program == 'figures' else []
  fuzz.DAMAGES['half'](folder / 'result.json')
  line = binary.refused(capsys, f'--run={folder}', *figure, binary=program)
  assert f'--run={folder}: result.json cannot be read' in line
