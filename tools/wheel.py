"""Build the wheel and the source archive, and try the wheel elsewhere.

    python tools/wheel.py [--out=dist]

needs `pip install -e '.[release]'`. Both files are checked by twine. The wheel
is then installed with its extras `test` and `export` in a new environment
outside of the repository, where a run, a prediction, an export and a fit from
Python have to work with the installed files alone. The exit status is 1 if
anything fails.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import venv

ROOT = pathlib.Path(__file__).resolve().parents[1]
# A few steps of the digits preset, and what can be done with a finished run.
COMMANDS = (
  'ssljax --help',
  'ssljax madnn --steps=20 --seeds=1 --workdir=run',
  'ssljax predict --run=run --out=predictions.csv',
  'ssljax export --run=run --out=model',
)
PROGRAM = """
import pathlib
import numpy as np
import ssljax

assert 'site-packages' in ssljax.__file__, ssljax.__file__
data = ssljax.load_data('digits')
images, labels = data.train.read(np.arange(300)), data.train.labels[:300]
labels = np.where(np.arange(300) < 100, labels, -1)
model = ssljax.fit(images, labels, method='fixmatch', steps=10, network='mlp',
                   strong_augment=('randaugment',), progress=False)
model.save('saved')
again = ssljax.load('saved')
assert (again.predict(images) == model.predict(images)).all()
assert again.predict_proba(images[:3]).shape == (3, 10)
print(ssljax.__version__, ssljax.load('run').config.method)
"""


def build(out: pathlib.Path) -> list[pathlib.Path]:
  """Build and check both files; return the wheel, then the archive."""
  shutil.rmtree(ROOT / 'build' / 'lib', ignore_errors=True)  # of other builds
  with tempfile.TemporaryDirectory() as folder:
    run([sys.executable, '-m', 'build', '-o', folder, str(ROOT)])
    files = sorted(pathlib.Path(folder).iterdir(), key=lambda p: p.suffix)
    run([sys.executable, '-m', 'twine', 'check', '--strict', *map(str, files)])
    out.mkdir(parents=True, exist_ok=True)
    archive, wheel = (shutil.copy(path, out) for path in files)
  return [pathlib.Path(wheel), pathlib.Path(archive)]


def run(command: list[str], **options) -> None:
  """Run a command; end the program where it fails."""
  began = time.monotonic()
  done = subprocess.run(
    command,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
    **options,
  )
  seconds = time.monotonic() - began
  shown = ' '.join(command)
  name = shown if len(shown) < 200 else ' '.join(command[:2]) + ' PROGRAM'
  print(
    f'{"ok" if not done.returncode else "FAILED"} {seconds:5.0f} s  {name}',
    flush=True,
  )
  last = done.stdout.strip().splitlines()
  print('\n'.join(f'    {line}' for line in last[-3 if last else 0 :]))
  if done.returncode:
    print(done.stdout)
    sys.exit(1)


def try_elsewhere(wheel: pathlib.Path) -> None:
  """Install the wheel in an environment of its own, and use it."""
  with tempfile.TemporaryDirectory() as folder:
    where = pathlib.Path(folder)
    venv.create(where / 'env', with_pip=True)
    programs = where / 'env' / 'bin'
    environment = {
      **{k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
      'PATH': f'{programs}{os.pathsep}{os.environ["PATH"]}',
    }
    extras = f'{wheel.resolve()}[test,export]'
    run([str(programs / 'pip'), 'install', '-q', extras])
    here = where / 'work'
    here.mkdir()
    inside = {'cwd': here, 'env': environment}
    for command in COMMANDS:
      run(command.split(), **inside)
    run([str(programs / 'python'), '-c', PROGRAM], **inside)
    result = json.loads((here / 'run' / 'result.json').read_text())
    exported = {path.name for path in (here / 'model').iterdir()}
    assert result['complete'], result
    assert {'model.stablehlo', 'weights.safetensors'} <= exported
    assert (here / 'predictions.csv').read_text().startswith('file,label,')


def main() -> None:
  """Build the files and try the wheel."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, default=ROOT / 'dist')
  wheel, archive = build(parser.parse_args().out)
  try_elsewhere(wheel)
  for path in (wheel, archive):
    print(f'{path.stat().st_size / 1e6:.2f} MB  {path}')


if __name__ == '__main__':
  main()
