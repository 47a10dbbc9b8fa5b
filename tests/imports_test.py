"""The packages import downwards only."""

import ast
import pathlib
import subprocess
import sys

import pytest

import ssljax

ROOT = pathlib.Path(ssljax.__file__).parent
GROUND = {
  *('core', 'errors', 'files', 'losses', 'optimizers', 'neighbours'),
  *('buckets', 'intervals', 'lazy', 'progress', 'signatures'),
}
REGISTRY = {'registry', 'config'}
TRAINING = {'training', 'active', 'data', 'distributed', 'networks', 'augment'}
RUNS = {'runs', 'analysis', 'methods'} | REGISTRY | TRAINING
# Package or module of ssljax -> what it may import besides itself.
MAY_IMPORT = {
  **dict.fromkeys(sorted(GROUND), GROUND),
  'augment': GROUND,
  'distributed': GROUND,
  'networks': GROUND,
  'active': GROUND,
  # The labelling page learns by the API; nothing of the library imports it.
  'active/page': GROUND | RUNS | {'api', 'ranking'},
  'methods': GROUND | {'active', 'augment'},
  'data': GROUND | {'augment', 'distributed'},
  'training': GROUND | TRAINING,
  'registry': GROUND | {'methods', 'networks', 'augment', 'active'},
  'config': GROUND | {'registry'},
  'analysis': GROUND | TRAINING | {'methods'},
  'runs': GROUND | RUNS,
  'model': GROUND | RUNS,
  'api': GROUND | RUNS | {'automatic', 'model'},
  'automatic': GROUND | RUNS | {'model'},
  'estimator': GROUND | {'api'},
  'prediction': GROUND | RUNS | {'api'},
  'export': GROUND | RUNS | {'prediction'},
  'ranking': GROUND | RUNS | {'prediction'},
  'planning': GROUND | RUNS,
  'cli': GROUND
  | RUNS
  | {'api', 'estimator', 'planning', 'prediction', 'export', 'ranking'},
}
BELOW_CLI = sorted(set(MAY_IMPORT) - {'cli'})


def modules_of(unit):
  """The Python files of a package, or of a module."""
  folder = ROOT / unit
  found = sorted(folder.rglob('*.py')) or [ROOT / f'{unit}.py']
  parts = [ROOT / u for u in MAY_IMPORT if u.startswith(f'{unit}/')]
  return [p for p in found if not any(map(p.is_relative_to, parts))]


def imported(path):
  """Dotted names that a file imports, at any depth."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: a relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def test_every_package_is_in_the_table():
  units = {p.name.removesuffix('.py') for p in ROOT.iterdir()}
  units -= {'__init__', '__pycache__', 'py.typed', '__init__.pyi'}
  assert units == {unit for unit in MAY_IMPORT if '/' not in unit}


@pytest.mark.parametrize('unit', MAY_IMPORT)
def test_imports_run_downwards_only(unit):
  for path in modules_of(unit):
    used = {
      name.split('.')[1]
      for name in imported(path)
      if name.startswith('ssljax.')
    }
    strange = used - MAY_IMPORT[unit] - {unit.split('/')[0]}
    assert not strange, f'{path.relative_to(ROOT)} imports {strange}'


@pytest.mark.parametrize('unit', BELOW_CLI)
def test_nothing_below_the_command_line_knows_of_absl(unit):
  for path in modules_of(unit):
    strange = [n for n in imported(path) if n.split('.')[0] == 'absl']
    assert not strange, f'{path.relative_to(ROOT)} imports {strange}'


def test_methods_see_acquisition_functions_and_nothing_else_of_active():
  for path in modules_of('methods'):
    used = [n for n in imported(path) if n.startswith('ssljax.active')]
    assert set(used) <= {'ssljax.active.acquisition'}, path


def test_only_programs_import_the_labelling_page():
  for path in sorted(ROOT.rglob('*.py')):
    if not path.is_relative_to(ROOT / 'active/page'):
      strange = [n for n in imported(path) if 'active.page' in n]
      assert not strange, f'{path.relative_to(ROOT)} imports {strange}'


def printed(code: str) -> str:
  """Return what a new process prints that runs some code."""
  return subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=True,
    timeout=300,
  ).stdout


def test_the_labelling_page_starts_without_jax():
  code = (
    'import sys, ssljax.experiments.label; from ssljax.active.page import '
    'exchange, images, program, questions, store; '
    "print('jax' in sys.modules)"
  )
  assert printed(code).strip() == 'False'


def test_importing_the_package_imports_nothing_heavy():
  heavy = 'jax', 'flax', 'sklearn', 'scipy', 'grain', 'orbax', 'matplotlib'
  code = (
    'import sys, ssljax; '
    f'print([n for n in {heavy} if n in sys.modules], dir(ssljax))'
  )
  shown = printed(code)
  assert shown.startswith('[]') and "'fit'" in shown


@pytest.mark.parametrize('name', ssljax.__all__)
def test_every_public_name_is_there_and_documented(name):
  assert getattr(ssljax, name).__doc__


def test_type_checkers_see_every_public_name():
  names = set()
  for node in ast.parse((ROOT / '__init__.pyi').read_text()).body:
    if isinstance(node, ast.ImportFrom):  # exports only `name as name`
      names |= {each.name for each in node.names if each.name == each.asname}
    if isinstance(node, ast.Assign):
      names |= {target.id for target in node.targets}
  assert names == {*ssljax.__all__, *ssljax._MODULES}
