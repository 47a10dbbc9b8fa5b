"""Every program starts as a file, as a module and by the console script."""

import pathlib
import runpy
import subprocess
import sys
from unittest import mock

import binary
import pytest

from ssljax.cli import commands, tool

PROGRAMS = commands.programs()


def test_every_program_of_the_folder_has_a_command():
  files = {path.stem for path in binary.EXPERIMENTS.glob('*.py')}
  assert files - {'__init__'} == set(PROGRAMS)


def as_file(name):
  return lambda: runpy.run_path(
    str(binary.EXPERIMENTS / f'{name}.py'), run_name='__main__'
  )


def as_module(name):
  module = f'ssljax.experiments.{name}'
  return lambda: runpy.run_module(module, run_name='__main__', alter_sys=True)


def by_console_script(name):
  del name
  return commands.main


STARTS = {
  as_file: ('{name}.py',),
  as_module: ('{name}.py',),
  by_console_script: ('ssljax', '{name}'),
}


# Other tests import some of the programs.
@pytest.mark.filterwarnings('ignore:.*found in sys.modules')
@pytest.mark.parametrize('name', PROGRAMS)
def test_a_program_describes_itself_however_it_is_started(name, capsys):
  shown = []
  for start, words in STARTS.items():
    argv = [word.format(name=name) for word in words]
    with (
      mock.patch.object(sys, 'argv', [*argv, '--help']),
      pytest.raises(SystemExit) as stopped,
    ):
      start(name)()
    assert stopped.value.code in (None, 0)
    shown.append(capsys.readouterr().out)
  assert shown[0] == shown[1] == shown[2]
  # The docstring names the command, the flags follow.
  assert f'python experiments/{name}.py' in shown[0]
  assert '\nflags:\n' in shown[0] and '  --' in shown[0]


def test_a_program_that_does_not_exist_is_refused_by_name(capsys):
  with (
    mock.patch.object(sys, 'argv', ['ssljax', 'madn']),
    pytest.raises(SystemExit) as stopped,
  ):
    commands.main()
  assert stopped.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith('ssljax: madn: ') and 'madnn' in error


@pytest.mark.slow
@pytest.mark.parametrize(
  'words',
  [
    ('-m', 'ssljax.experiments.figures', '--list'),
    ('-m', 'ssljax.experiments.reproduce', '--list'),
    (str(binary.EXPERIMENTS / 'figures.py'), '--list'),
  ],
)
def test_a_program_runs_in_any_folder(words, tmp_path):
  done = subprocess.run(
    [sys.executable, *words],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    env=binary.environment(),
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  assert 'association/3' in done.stdout
  assert not list(pathlib.Path(tmp_path).iterdir())


def test_ctrl_c_is_one_line(capsys, monkeypatch):
  def interrupted(folder):
    raise KeyboardInterrupt

  monkeypatch.setattr(tool, 'finished_run', interrupted)
  assert binary.run('--run=x', binary='predict') == 130
  said = 'predict: interrupted (SIGINT): run the same command again\n'
  assert capsys.readouterr().err == said
