"""Active learning from the command line, with people as the oracle."""

import json
import shutil

import binary
import jax
import numpy as np
from people import answers, command, fill_in, read, start
import PIL.Image
import pytest

from ssljax.data import datasets
from ssljax.runs import load
from ssljax.training import active_loop


def content(folder):
  """The content of every file under a folder."""
  return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.slow
def test_a_person_is_asked_answers_and_the_run_goes_on_to_its_end(
  tmp_path, capsys
):
  folder = tmp_path / 'run'
  status, line = start(folder)
  assert status == 3
  first = answers(folder, 0)
  assert line.startswith(f'deepbass: {first}: ') and 'same command' in line
  images = [first.parent / row['image'] for row in read(first)]
  assert len(images) == 3
  for path in images:
    with PIL.Image.open(path) as image:
      assert min(image.size) >= 128
  assert (first.parent / 'classes.txt').read_text().split()[:4] == [*'0011']
  begun = json.loads((folder / 'result.json').read_text())
  assert not begun['complete'] and not begun['arms']

  # Nothing filled in: the same query, and no file has changed.
  before = first.read_bytes()
  line = binary_line(folder, capsys, 3)
  assert line.startswith(f'deepbass: {first}: ')
  assert first.read_bytes() == before and not answers(folder, 1).exists()

  asked = fill_in(first)
  line = binary_line(folder, capsys, 3)
  second = answers(folder, 1)
  assert line.startswith(f'deepbass: {second}: ')

  # An invalid answer is refused by line, and the file is not changed.
  fill_in(second, lambda place, label: 'eleven' if place == 1 else label)
  kept = content(folder / 'questions'), content(folder / 'checkpoints')
  line = binary_line(folder, capsys, 2)
  assert f'{second}, line 3: ' in line and "'eleven'" in line
  assert kept == (
    content(folder / 'questions'),
    content(folder / 'checkpoints'),
  )

  asked += fill_in(second)
  assert binary.run(*command(folder, '--oracle=people'), binary='deepbass') == 0
  truth = datasets.load('digits').train.labels
  result = json.loads((folder / 'result.json').read_text())
  assert result['complete'] and len(set(asked)) == 6
  told = {'rows': asked, 'labels': truth[asked].tolist()}
  assert result['asked'] == [told]
  with binary.small():
    labels = jax.device_get(load.load(folder).state.labels)[0]
  split = json.loads((folder / 'split.json').read_text())['splits'][0]
  known = {*asked, *map(int, split['labelled'])}
  assert set(np.flatnonzero(labels >= 0)) == known and len(known) == 16
  np.testing.assert_array_equal(labels[[*known]], truth[[*known]])


def binary_line(folder, capsys, expected):
  """Run in this process; the last line of the messages."""
  status = binary.run(*command(folder, '--oracle=people'), binary='deepbass')
  error = capsys.readouterr().err
  assert status == expected, error
  return error.replace('\r', '\n').strip().split('\n')[-1]


@pytest.mark.slow
def test_a_person_who_tells_the_truth_is_as_good_as_the_data_set(
  tmp_path, capsys
):
  folder = tmp_path / 'people'
  for number in (0, 1):
    binary_line(folder, capsys, 3)
    fill_in(answers(folder, number))
  assert binary.run(*command(folder, '--oracle=people'), binary='deepbass') == 0
  assert binary.run(*command(tmp_path / 'truth'), binary='deepbass') == 0
  people, truth = (
    json.loads((tmp_path / name / 'result.json').read_text())
    for name in ('people', 'truth')
  )
  for same in ('asked', 'test_error', 'test_error_after', 'steps'):
    assert people[same] == truth[same]


@pytest.mark.slow
def test_the_acquisition_is_compiled_once_for_all_seeds(tmp_path, monkeypatch):
  made, init = [], active_loop.ActiveLearning.__init__

  def count(self, *args):
    made.append(self)
    init(self, *args)

  monkeypatch.setattr(active_loop.ActiveLearning, '__init__', count)
  args = command(tmp_path / 'run', '--seeds=3')
  assert binary.run(*args, binary='deepbass') == 0
  assert len(made) == 1 and made[0]._choose._cache_size() == 1
  result = json.loads((tmp_path / 'run/result.json').read_text())
  assert [len(set(asked['rows'])) for asked in result['asked']] == [6, 6, 6]


@pytest.mark.slow
def test_an_image_that_is_skipped_stays_without_a_label(tmp_path, capsys):
  folder = tmp_path / 'run'
  binary_line(folder, capsys, 3)
  rows = fill_in(answers(folder, 0), lambda place, label: 'skip')
  binary_line(folder, capsys, 3)
  assert not set(rows) & {int(row['row']) for row in read(answers(folder, 1))}
  fill_in(answers(folder, 1))
  assert binary.run(*command(folder, '--oracle=people'), binary='deepbass') == 0
  result = json.loads((folder / 'result.json').read_text())
  assert result['asked'][0]['labels'][:3] == [-1] * 3
  with binary.small():
    labels = jax.device_get(load.load(folder).state.labels)[0]
  assert (labels >= 0).sum() == 13 and (labels[rows] == -1).all()


@pytest.mark.slow
def test_the_answers_of_another_run_are_refused_and_stay(tmp_path, capsys):
  one, other = tmp_path / 'one', tmp_path / 'other'
  for folder, seed in ((one, 0), (other, 1)):
    args = command(folder, '--oracle=people', f'--seed={seed}')
    assert binary.run(*args, binary='deepbass') == 3
  fill_in(answers(one, 0))
  there = other / 'questions/seed-1/batch-0000'
  shutil.rmtree(there)
  shutil.copytree(answers(one, 0).parent, there)
  kept = content(there)
  line = binary.refused(
    capsys, *command(other, '--oracle=people', '--seed=1'), binary='deepbass'
  )
  assert f'{there}/batch.json' in line and 'another run' in line
  assert content(there) == kept


BAD = {
  # 1,297 images, 10 of them labelled.
  '--query_size=1288': ('--query_size=1288', '1287 images'),
  '--query_size=0': ('query_size=0',),
  '--query_every=0': ('query_every=0',),
  '--query_passes=0': ('query_passes=0',),
  '--budget=0': ('budget=0',),
  '--dropout=0': ('--acquire=entropy', '--dropout', 'least_confidence'),
  '--network=linear': ('--network=linear', 'no dropout'),
  '--oracle=people --seeds=2': ('--oracle=people', '--seeds=1'),
  '--oracle=nobody': ('oracle', 'people'),
  '--acquire=luck': ('acquire', 'random'),
}


@pytest.mark.parametrize('arguments', BAD)
def test_impossible_queries_are_refused_by_name(arguments, tmp_path, capsys):
  folder = tmp_path / 'run'
  args = command(folder, *arguments.split())
  line = binary.refused(capsys, *args, binary='deepbass')
  assert all(part in line for part in BAD[arguments]), line
  assert not folder.exists()


def test_k_centre_needs_no_dropout(tmp_path):
  args = command(tmp_path / 'run', '--dropout=0', '--acquire=k_centre')
  assert binary.run(*args, binary='deepbass') == 0
  result = json.loads((tmp_path / 'run/result.json').read_text())
  assert len(set(result['asked'][0]['rows'])) == 6


@pytest.mark.slow
def test_answers_are_kept_when_a_run_is_restarted(tmp_path, capsys):
  folder = tmp_path / 'run'
  binary_line(folder, capsys, 3)
  fill_in(answers(folder, 0))
  args = command(folder, '--oracle=people', '--overwrite')
  assert binary.run(*args, binary='deepbass') == 3
  assert f'{answers(folder, 1)}: ' in capsys.readouterr().err


def test_a_person_is_asked_about_one_run_at_a_time(tmp_path, capsys):
  (tmp_path / 'none.flags').touch()
  args = (
    f'--flagfile={tmp_path}/none.flags',
    '--network=digits',
    '--batch_labelled=8',
    '--batch_unlabelled=8',
    '--steps=2',
    '--acquire=random',
    '--oracle=people',
    f'--workdir={tmp_path}/run',
  )
  line = binary.refused(capsys, *args)
  assert '--oracle=people' in line and '--nobaseline' in line


def test_no_one_is_asked_about_points(tmp_path, capsys):
  points = '--dataset=yin-yang', '--oracle=people'
  line = binary.refused(
    capsys, *command(tmp_path / 'run', *points), binary='deepbass'
  )
  assert 'no images' in line


def test_labels_are_asked_for_in_the_middle_of_another_method(tmp_path):
  # 64 of 1,287 images per step: an epoch has 20 steps.
  (tmp_path / 'none.flags').touch()
  args = (
    f'--flagfile={tmp_path}/none.flags',
    '--network=digits',
    '--labels=1',
    '--batch_labelled=8',
    '--batch_unlabelled=64',
    '--steps=50',
    '--acquire=margin',
    '--query_every=1',
    '--query_size=5',
    '--budget=8',
    '--nobaseline',
    f'--workdir={tmp_path}/run',
  )
  assert binary.run(*args) == 0
  (asked,) = json.loads((tmp_path / 'run/result.json').read_text())['asked']
  assert len(set(asked['rows'])) == 8
  truth = datasets.load('digits').train.labels
  assert asked['labels'] == truth[asked['rows']].tolist()
