"""The notebooks of the documentation run from start to end."""

import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / 'docs' / 'notebooks'
NOTEBOOKS = sorted(FOLDER.glob('*.py'))


def test_there_are_notebooks():
  assert len(NOTEBOOKS) >= 4


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
  # As a user runs it: without the flags of the tests.
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  done = subprocess.run(
    [sys.executable, path],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
    timeout=900,
  )
  assert done.returncode == 0, done.stderr
