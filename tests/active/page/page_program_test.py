"""`ssljax label` from the command line."""

import csv
import pathlib
import signal
import time

import binary
import numpy as np
import page_process
import pages
import pytest

from ssljax.active.page import store


@pytest.fixture
def start():
  with page_process.started() as program:
    yield program


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ((), '--images: give a folder'),
    (('--images={}/none',), '--images={}/none: is no folder'),
    (('--images={}/images', '--acquire=best'), '--acquire=best: give one of'),
    (('--images={}/images', '--port=70000'), '--port=70000: give 0 to'),
    (('--images={}/images', '--random=1'), '--random=1.0: give a number in'),
    (('--images={}/images', '--every=0'), '--every=0: give a number above 0'),
    (('--images={}/images', '--format=x'), '--format=x: give one of'),
    (('--images={}/images', '--classes=a,A'), '--classes: there is a class'),
    (('--images={}/images', '--run={}/none'), '--run={}/none: is no folder'),
    (('--images={}/images', '--features={}/x.npz'), '--features={}/x.npz'),
    (('--images={}/images', '--export={}/x.csv'), 'holds no labels.jsonl'),
    (('--images={}/images', '--labels_file={}/x'), 'cannot be read'),
    (('--images={}/images', '--questions={}/images'), '--questions={}/images'),
    (('--questions={}/images',), '--questions={}/images: has no seed-N'),
    (('--images={}/images', 'more'), '"more" is not a flag'),
  ],
)
def test_wrong_use_is_one_line(given, message, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pages.draw(tmp_path / 'images', 2)
  words = [word.format(tmp_path) for word in given]
  line = binary.refused(capsys, *words, binary='label')
  assert message.format(tmp_path) in line


def test_features_of_another_folder_leave_no_store(tmp_path, capsys):
  pages.draw(tmp_path / 'images', 2)
  path, where = tmp_path / 'x.npz', tmp_path / 'store'
  names = ['none.png', 'y' * 5000, '/etc/passwd', '../images/000.png']
  np.savez(path, train=np.zeros((4, 2)), train_files=names)
  args = f'--images={tmp_path}/images', f'--features={path}', f'--store={where}'
  assert 'names no image' in binary.refused(capsys, *args, binary='label')
  assert not where.exists()


def test_labels_are_imported_shown_and_exported(start, tmp_path, capsys):
  root = pages.draw(tmp_path / 'images', 4)
  given = tmp_path / 'given.csv'
  given.write_text('file,label\n000.png,cat\n001.png,dog\n')
  where = [f'--images={root}', f'--store={tmp_path / "store"}']
  program = start(*where, '--nolearn', '--port=0', f'--labels_file={given}')
  line = binary.refused(capsys, *where, binary='label')  # a second server
  assert f'--store={tmp_path / "store"}: another process' in line
  assert program.end() == 0
  out = tmp_path / 'out.csv'
  assert binary.run(*where, f'--export={out}', binary='label') == 0
  with out.open() as file:
    assert list(csv.reader(file))[1:] == [
      ['000.png', 'cat'],
      ['001.png', 'dog'],
    ]
  folders = [f'--export={tmp_path / "classes"}', '--format=folders']
  assert binary.run(*where, *folders, binary='label') == 0
  assert (tmp_path / 'classes' / 'cat' / '000.png').is_file()


def test_the_learner_ends_with_a_server_that_is_killed(start, tmp_path):
  root = pages.draw(tmp_path / 'images', 1)  # it waits for more images
  program = start(
    f'--images={root}', f'--store={tmp_path / "store"}', '--port=0'
  )
  learner = wait_for_child(program.pid)
  program.end(signal.SIGKILL)
  deadline = time.monotonic() + 60
  while pathlib.Path(f'/proc/{learner}').exists():
    assert time.monotonic() < deadline
    time.sleep(0.1)
  assert store.read(tmp_path / 'store').classes == []


def wait_for_child(pid):
  """The process that another one has started, once its program runs."""
  tasks = pathlib.Path(f'/proc/{pid}/task')
  deadline = time.monotonic() + 60
  while time.monotonic() < deadline:
    for path in tasks.glob('*/children'):
      if found := path.read_text().split():
        return int(found[0])
    time.sleep(0.1)
  raise AssertionError('there is no learner')
