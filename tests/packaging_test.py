"""The wheel holds everything that a program needs, and nothing else."""

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
