"""The files of a run: written as a whole, read with care."""

import dataclasses
import json
import os
import pathlib

import pytest

import ssljax
from ssljax import config, files
from ssljax.errors import InputError
from ssljax.runs import run_folder

CONFIG = config.from_values('madnn', {'steps': 5})
RESULT = {
  'complete': False,
  'method': 'madnn',
  'dataset': 'digits',
  'labels': '10',
  'seeds': [0],
  'splits': ['x'],
  'arms': {},
}


@pytest.fixture
def run(tmp_path):
  """The folder of a run that was interrupted."""
  folder = tmp_path / 'run'
  run_folder.claim(folder, CONFIG, overwrite=False)
  run_folder.write_json(folder / 'result.json', RESULT)
  return folder


def replace(path, make):
  path.unlink()
  make(path)


NO_FILES = {
  'folder': os.mkdir,
  'fifo': os.mkfifo,
  'dangling link': lambda path: os.symlink('nowhere', path),
}


def test_a_file_is_replaced_as_a_whole_and_synced(tmp_path, monkeypatch):
  synced = []
  sync = os.fsync
  monkeypatch.setattr(os, 'fsync', lambda d: (synced.append(d), sync(d)))
  path = tmp_path / 'result.json'
  files.write_atomically(path, 'one')
  assert len(synced) == 2  # the file and its folder
  monkeypatch.setattr(os, 'replace', lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    files.write_atomically(path, b'two')
  assert path.read_text() == 'one' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('make', NO_FILES.values(), ids=NO_FILES)
def test_only_a_regular_file_is_replaced(tmp_path, make):
  path = tmp_path / 'result.json'
  make(path)
  before = os.lstat(path)
  with pytest.raises(OSError, match='no regular file'):
    files.write_atomically(path, 'text')
  assert os.lstat(path) == before and list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_file_stays_a_link(tmp_path):
  (tmp_path / 'file').write_text('old')
  (tmp_path / 'link').symlink_to('file')
  files.write_atomically(tmp_path / 'link', 'new')
  assert (tmp_path / 'link').is_symlink()
  assert (tmp_path / 'file').read_text() == 'new'


DAMAGES = {
  'emptied': lambda p: p.write_bytes(b''),
  'cut': lambda p: p.write_bytes(p.read_bytes()[:20]),
  'random': lambda p: p.write_bytes(b'\xff\xfe\x00' * 9),
  'list': lambda p: p.write_text('[]'),
  'empty object': lambda p: p.write_text('{}'),
  'deep': lambda p: p.write_text('[' * 200_000),
} | {
  name: lambda p, make=make: replace(p, make) for name, make in NO_FILES.items()
}


@pytest.mark.parametrize('how', DAMAGES)
@pytest.mark.parametrize('name', ['config.json', 'result.json'])
def test_a_damaged_record_is_one_line(run, name, how):
  DAMAGES[how](run / name)
  with pytest.raises(InputError, match=name) as refused:
    run_folder.look(run, CONFIG, overwrite=False)
  assert '\n' not in str(refused.value)


@pytest.mark.parametrize('how', DAMAGES)
def test_damaged_flags_of_version_0_1_are_one_line(run, how):
  (run / 'config.json').unlink()
  DAMAGES[how](run / 'flags.txt')
  with pytest.raises(InputError) as refused:
    run_folder.look(run, CONFIG, overwrite=False)
  assert str(run) in str(refused.value) and '\n' not in str(refused.value)


@pytest.mark.parametrize(
  'change',
  [{'complete': 'yes'}, {'seeds': 3}, {'arms': {'madnn': 1}}, {'method': None}],
)
def test_a_result_of_other_types_is_damaged(run, change):
  run_folder.write_json(run / 'result.json', RESULT | change)
  with pytest.raises(InputError, match=r'result\.json is damaged'):
    run_folder.read_result(run)


def test_a_config_whose_values_have_other_types_is_one_line(run):
  tree = json.loads((run / 'config.json').read_text())
  tree['method'] = ['madnn']
  run_folder.write_json(run / 'config.json', tree)
  with pytest.raises(InputError, match='settings cannot be read'):
    run_folder.read_config(run)


def test_overwriting_removes_links_and_not_what_they_lead_to(run, tmp_path):
  scratch = tmp_path / 'scratch'
  scratch.mkdir()
  (scratch / 'precious').touch()
  (run / 'checkpoints').symlink_to(scratch)
  (run / 'notes.txt').touch()
  run_folder.claim(run, CONFIG, overwrite=True)
  assert (scratch / 'precious').exists()
  assert not (run / 'checkpoints').exists() and (run / 'notes.txt').exists()


def test_dated_folders_of_one_second_differ(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  made = [run_folder.dated('madnn-a/b') for _ in range(4)]
  assert len({*made}) == 4 and all(folder.is_dir() for folder in made)
  assert all(str(f).startswith('runs/madnn-a_b-2') for f in made)


def test_a_dated_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'runs').touch()
  with pytest.raises(InputError, match=r'workdir=runs/.*cannot be used'):
    run_folder.dated('madnn')


def test_home_is_expanded_and_impossible_names_are_one_line(monkeypatch):
  monkeypatch.setenv('HOME', '/elsewhere')
  assert files.as_path('workdir', '~/x') == pathlib.Path('/elsewhere/x')
  for text in ('~no-such-user/x', 'a\0b', ''):
    with pytest.raises(InputError, match='workdir'):
      files.as_path('workdir', text)


PLACES = {
  'a name that is too long': lambda folder: folder / ('x' * 300),
  'a path that is too long': lambda folder: folder / ('x/' * 3000),
  'below a file': lambda folder: folder / 'file' / 'run',
  'a file': lambda folder: folder / 'file',
  'a fifo': lambda folder: folder / 'fifo',
  'a dangling link': lambda folder: folder / 'link',
  'below a dangling link': lambda folder: folder / 'link' / 'run',
  'a link to itself': lambda folder: folder / 'loop',
  'a place for processes': lambda folder: pathlib.Path('/proc/x'),
  'below it': lambda folder: pathlib.Path('/proc/x/y'),
}


@pytest.mark.parametrize('place', PLACES)
def test_a_place_that_cannot_be_used_is_one_line(place, tmp_path):
  (tmp_path / 'file').touch()
  os.mkfifo(tmp_path / 'fifo')
  (tmp_path / 'link').symlink_to('nowhere')
  (tmp_path / 'loop').symlink_to('loop')
  before = sorted(tmp_path.iterdir())
  with pytest.raises(InputError, match='workdir') as refused:
    ssljax.fit(
      [[0.0], [1.0]],
      [0, 1],
      workdir=PLACES[place](tmp_path),
      network='mlp',
      batch_labelled=2,
      batch_unlabelled=2,
      steps=1,
    )
  assert '\n' not in str(refused.value)
  assert sorted(tmp_path.iterdir()) == before


def test_fewer_splits_than_a_run_has_are_refused_with_their_number(run):
  more = dataclasses.replace(CONFIG.split, seeds=5)
  there = dataclasses.replace(CONFIG, split=more)
  run_folder.write_json(run / 'config.json', config.to_json(there))
  fewer = dataclasses.replace(more, seeds=3)
  here = dataclasses.replace(CONFIG, split=fewer)
  with pytest.raises(InputError, match=r'has 5 splits.* give seeds=5 for its'):
    run_folder.refuse_other(run, here)
