"""The wheel holds everything that a program needs, and nothing else."""

import importlib.util
import subprocess
import sys
import zipfile

import binary
import pytest

PAGE = '.html', '.css', '.js', '.svg'
ROOT = binary.EXPERIMENTS.parent


@pytest.mark.slow
def test_the_wheel_holds_programs_and_presets(tmp_path):
  # Build isolation fetches setuptools.
  build = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps']
  subprocess.run([*build, ROOT, '-w', tmp_path], check=True, timeout=300)
  (wheel,) = tmp_path.glob('*.whl')
  names = set(zipfile.ZipFile(wheel).namelist())
  sources = {
    str(path.relative_to(ROOT))
    for folder in ('ssljax', 'experiments')
    for path in (ROOT / folder).rglob('*')
    if path.suffix in ('.py', '.pyi', '.typed', '.flags', '.toml', *PAGE)
    and 'results' not in path.parts
  }
  installed = {
    f'ssljax/{name}' if name.startswith('experiments') else name
    for name in sources
  }
  assert {n for n in names if '.dist-info' not in n} == installed
  kinds = {n.split('/')[-1] for n in names if '.dist-info' in n}
  assert {'METADATA', 'entry_points.txt', 'LICENSE'} <= kinds


def test_every_planted_fault_is_of_the_code_as_it_is():
  # The tool refuses texts that are not in the code, and tests that are not.
  tool = [sys.executable, ROOT / 'tools/mutate.py', '--list']
  listed = subprocess.run(tool, capture_output=True, text=True, timeout=120)
  assert listed.returncode == 0, listed.stderr
  assert int(listed.stdout.split()[-2]) > 100


def test_the_oldest_versions_are_the_bounds_of_the_project():
  spec = importlib.util.spec_from_file_location(
    'oldest', ROOT / 'tools/oldest.py'
  )
  oldest = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(oldest)
  assert oldest.PATH.read_text() == oldest.constraints(), (
    'run `python tools/oldest.py`'
  )


@pytest.mark.slow
def test_the_wheel_works_outside_of_the_repository(tmp_path):
  # Both installations fetch packages.
  if not all(map(importlib.util.find_spec, ('build', 'twine'))):
    pytest.skip("needs pip install 'ssljax[release]'")
  tool = [sys.executable, ROOT / 'tools/wheel.py', f'--out={tmp_path}']
  done = subprocess.run(tool, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  assert len(list(tmp_path.iterdir())) == 2
