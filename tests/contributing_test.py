"""The recipes of CONTRIBUTING.md, followed literally in an empty folder."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import binary
import pytest

TEXT = (pathlib.Path(__file__).parents[1] / 'CONTRIBUTING.md').read_text()
RECIPES = re.findall(
  r'<!-- file: (\S+) -->\n```python\n(.*?)```\n\n<!-- run -->\n```\n(.*?)\n```',
  TEXT,
  re.DOTALL,
)


def test_there_is_a_recipe_of_each_kind():
  names = [name for name, _, _ in RECIPES]
  assert names == [
    'entropy_minimisation.py',
    'my_network.py',
    'my_augmentation.py',
  ]


@pytest.mark.parametrize(
  ('name', 'code', 'command'), RECIPES, ids=[name for name, *_ in RECIPES]
)
def test_a_recipe_trains_as_it_stands(name, code, command, tmp_path):
  (tmp_path / name).write_text(code)
  program, *arguments = shlex.split(command)
  assert program == 'python'
  done = subprocess.run(
    [sys.executable, *arguments],
    cwd=tmp_path,
    env=binary.environment(),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  (folder,) = (tmp_path / 'runs').iterdir()
  result = json.loads((folder / 'result.json').read_text())
  assert result['complete'] and result['steps'] == 20
  # Beside the baseline, as every method.
  assert set(result['arms']) == {'supervised', result['method']}
  lines = (folder / 'flags.txt').read_text().splitlines()
  assert all(argument in lines for argument in arguments[1:-1])


def test_the_method_recipe_takes_its_keyword_from_the_command_line(tmp_path):
  name, code, _ = RECIPES[0]
  (tmp_path / name).write_text(code)
  shown = subprocess.run(
    [sys.executable, name, '--help'],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=300,
  ).stdout
  assert 'Weight of the entropy.' in shown and "(default: '0.1')" in shown
