"""Invalid flags, flag files, paths and devices are refused in one line."""

import errno
import os
import pathlib
import subprocess
import sys
from unittest import mock

import binary
import jax
import pytest

from ssljax import config
from ssljax.cli import commands, main, train_command
from ssljax.errors import InputError
from ssljax.runs import execute


@pytest.fixture
def places(tmp_path):
  """Paths that cannot be read as a text file, by name."""
  (tmp_path / 'folder').mkdir()
  os.mkfifo(tmp_path / 'fifo')
  (tmp_path / 'binary').write_bytes(bytes(range(256)))
  (tmp_path / 'loop').write_text(f'--flagfile={tmp_path}/loop\n')
  (tmp_path / 'nested').write_text(f'# a comment\n-flagfile {tmp_path}/fifo\n')
  (tmp_path / 'dangling').symlink_to(tmp_path / 'nowhere')
  names = 'folder', 'fifo', 'binary', 'loop', 'dangling', 'missing'
  return {name: str(tmp_path / name) for name in names} | {
    'long': 'n' * 5000,
    'empty': '',
  }


@pytest.mark.parametrize('program', ['supervised', 'figures', 'plan'])
@pytest.mark.parametrize(
  'name',
  [
    *('folder', 'fifo', 'binary', 'loop', 'dangling', 'missing', 'long'),
    'empty',
  ],
)
def test_a_flag_file_that_is_no_text_is_refused(places, name, program, capsys):
  line = binary.refused(capsys, f'--flagfile={places[name]}', binary=program)
  assert line.startswith(f'{program}: --flagfile={places[name]}')


def test_a_flag_file_is_found_in_every_form(places):
  for arguments in (
    ['-flagfile=' + places['fifo']],
    ['--flagfile', places['fifo']],
  ):
    with pytest.raises(InputError, match=r'^flagfile=.*fifo: is no file'):
      main.check_flagfiles(arguments)
  main.check_flagfiles([f'--flagfile={os.devnull}', 'flagfile', '--flag=x'])


def test_a_line_break_in_a_value_is_shown_escaped(capsys):
  line = binary.refused(capsys, '--network=a\nb\x1b[31m')
  assert r'--network=a\nb\x1b[31m' in line


def test_text_that_is_not_utf8_is_refused(capsys):
  assert r"\xff' is not UTF-8" in binary.refused(capsys, '--workdir=\udcff')


@pytest.mark.parametrize(
  'program, flag',
  [
    ('madnn', 'images'),
    ('label', 'images'),
    ('label', 'questions'),
    ('device_check', 'out'),
  ],
)
def test_what_is_only_on_disks_names_the_way_to_mount_a_bucket(
  program, flag, capsys
):
  line = binary.refused(capsys, f'--{flag}=gs://bucket/x', binary=program)
  assert f'--{flag}=gs://bucket/x: ' in line
  assert 'mount the bucket (gcsfuse)' in line


RUN_FLAGS = {
  'figures': ('--figure=association/3', '--run={}'),
  'html_report': ('--run={}',),
  'probe': ('--run={}',),
  'propagate': ('--embeddings={}',),
  'reproduce': ('--list', '--results={}'),
}


@pytest.mark.parametrize('program', RUN_FLAGS)
def test_every_program_expands_the_home_folder(
  program, tmp_path, capsys, monkeypatch
):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'file').touch()
  given = [word.format('~/file') for word in RUN_FLAGS[program]]
  line = binary.refused(capsys, *given, binary=program)
  assert f'={tmp_path}/file: ' in line


def test_a_run_is_made_in_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  made = []

  def train(make, settings, folder, **_):
    made.append((settings.data.data_dir, folder))

  asked = config.from_values(
    'supervised',
    {'steps': 2, 'workdir': '~/run', 'data_dir': 'sets'},
  )
  with mock.patch.object(execute, 'train_in_folder', train):
    train_command.run('supervised', asked)
  # The record of a run names its data wherever it is read.
  assert made == [(str(tmp_path / 'sets'), tmp_path / 'run')]
  assert not (tmp_path / '~').exists()


@pytest.mark.parametrize('place', ['long', '/proc/x', 'folder/../fifo/x'])
def test_a_place_for_a_run_that_cannot_be_is_refused(
  place, places, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  where = places.get(place, place)
  line = binary.refused(capsys, f'--workdir={where}', '--steps=1')
  assert where in line


@pytest.mark.parametrize('place', ['.', '/proc/x/y', '', 'long', 'fifo'])
def test_a_place_for_a_file_that_cannot_be_is_refused(
  place, places, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  where = places.get(place, place)
  small = '--images=3', '--labels=1', '--neighbours=1', '--subsamples=1'
  small += ('--density_neighbours=2',)
  line = binary.refused(capsys, f'--out={where}', *small, binary='propagate')
  assert line.startswith(f'propagate: --out={where}: ')


def test_a_platform_without_devices_is_refused(capsys):
  for error in (AssertionError(), RuntimeError('no CUDA\nmore')):
    with mock.patch.object(jax, 'devices', side_effect=error):
      for program in ('supervised', 'propagate'):
        line = binary.refused(capsys, binary=program)
        assert 'JAX_PLATFORMS=' in line and 'more' not in line


@pytest.mark.parametrize('name', [None, '/elsewhere/file', '.'])
def test_a_failure_of_the_program_itself_is_not_hidden(name, tmp_path):
  def fail():
    raise OSError(errno.EACCES, 'of no named file', name)

  with (
    mock.patch.object(main.sys, 'argv', ['p', f'--out={tmp_path}', '--n=3']),
    pytest.raises(OSError, match='of no named file'),
  ):
    main.run('p', fail, lambda argv: argv[:1], str)


@pytest.mark.parametrize('how', ['equals', 'apart', 'listed', 'in a file'])
@pytest.mark.parametrize('place', ['', 'below', '..'])
def test_a_failure_of_a_named_path_is_one_line(how, place, tmp_path, capsys):
  named = tmp_path / 'folder' / 'out'
  (tmp_path / 'flags').write_text(f'# a comment\n--out={named}\n')

  def fail():
    where = os.path.normpath(named / place)
    raise PermissionError(errno.EACCES, 'Permission denied', where)

  argv = {
    'equals': ['p', f'--out={named}'],
    'apart': ['p', '--out', str(named)],
    'listed': ['p', f'--out=a,{named}'],
    'in a file': ['p', f'--flagfile={tmp_path}/flags'],
  }[how]
  with (
    mock.patch.object(main.sys, 'argv', argv),
    pytest.raises(SystemExit) as ended,
  ):
    main.run('p', fail, lambda argv: argv[:1], str)
  assert ended.value.code == 2
  assert 'Permission denied: give another place' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('arguments', 'program', 'near'),
  [
    (['--network=convlarg'], 'madnn', 'convlarge'),
    (['--augment=flip,nois'], 'madnn', 'noise'),
    (['--steps_per_cal=3'], 'madnn', 'steps_per_call'),
    (['--figure=madnn/33'], 'figures', 'madnn/3'),
    (['--table=madn/2'], 'reproduce', 'madnn/2'),
    (['--figure=r2d/2'], 'reproduce', 'r2d2/2'),
    (['--method=madn'], 'plan', 'madnn'),
    (['--dataset=digts'], 'madnn', 'digits'),
  ],
)
def test_a_misspelt_name_is_answered_with_near_ones(
  arguments, program, near, capsys
):
  assert near in binary.refused(capsys, *arguments, binary=program)


def test_a_misspelt_program_is_answered_with_near_ones(capsys):
  with (
    mock.patch.object(commands.sys, 'argv', ['ssljax', 'figure']),
    pytest.raises(SystemExit) as stopped,
  ):
    commands.main()
  assert stopped.value.code == 2
  assert capsys.readouterr().err.strip().endswith('; give figures')


def test_empty_items_of_a_list_are_refused(capsys):
  assert '--decay_at=1,,2' in binary.refused(capsys, '--decay_at=1,,2')


@pytest.mark.parametrize('count', ['0', '1025', '9' * 30, '1,,2', ''])
def test_a_number_of_devices_that_cannot_be_is_refused(count, capsys):
  line = binary.refused(
    capsys, '--method=madnn', f'--devices={count}', binary='plan'
  )
  assert f'--devices={count}: ' in line


def test_a_default_run_in_a_folder_that_cannot_be_written_is_one_line(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'runs').touch()  # Also root cannot make a folder here.
  line = binary.refused(capsys, '--steps=1')
  assert str(pathlib.Path('runs')) in line


def test_a_warning_is_printed_once_without_time_and_place(tmp_path):
  program = """
import logging, sys
from ssljax.cli import main
def act():
  for text in ('a', 'a', 'b'):
    logging.getLogger('ssljax.data').warning('%s is odd', text)
main.run('x', act, lambda argv: argv[:1], str)
"""
  found = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert found.stderr == 'warning: a is odd\nwarning: b is odd\n'
