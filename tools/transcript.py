"""Show the way from a folder of images to predictions and a model.

    python tools/transcript.py --data_dir=DIR [--out=runs/transcript]
        [--minutes=5] [--install]

`data_dir` holds MNIST in the TFDS layout. 600 digits are written as PNG files,
6 of each class in class folders and the others in `unlabelled/`, with what
users' folders contain mixed in: alpha, a palette, CMYK, 16 bits, EXIF
orientation, an exact and a near copy, a broken and a hidden file. Then the
commands of a first hour run there; each is printed with its output and its
time, and at the end the error of the predictions on the images without a label.
With `--install` the commands are those of a new environment.
"""

import argparse
import csv
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import PIL.Image

from ssljax.data import datasets

ROOT = pathlib.Path(__file__).resolve().parents[1]
IMAGES, LABELLED = 600, 6  # in all, and of each class
COMMANDS = (
  'ssljax train --method=auto --images=photos --minutes={minutes:g} '
  '--workdir=run',
  'ssljax predict --run=run --out=predictions.csv',
  'ssljax rank --run=run --count=20 --out=next.csv',
  'ssljax export --run=run --out=model',
  'python model/predict.py photos/unlabelled',
)
_ORIENTATION, _TURNED = 0x0112, 6  # EXIF: to be turned by 270 degrees
_SHOWN = 5  # last lines of a long output of predictions


def _sixteen_bits(image: PIL.Image.Image) -> PIL.Image.Image:
  return PIL.Image.fromarray(np.asarray(image).astype(np.uint16) * 257)


# Suffix and conversion of unusual files, whose pixels are those of the image.
TROUBLES = {
  'alpha.png': lambda image: image.convert('RGBA'),
  'palette.png': lambda image: image.convert('P'),
  'cmyk.tif': lambda image: image.convert('RGB').convert('CMYK'),
  '16bits.png': _sixteen_bits,
}


def write(folder: pathlib.Path, data_dir: str) -> dict[str, int]:
  """Write the images; return the true class of each without a label."""
  data = datasets.load('mnist', data_dir).train
  rows = np.sort(np.random.default_rng(0).choice(60_000, IMAGES, False))
  pixels, labels = data.read(rows)[..., 0], data.labels[rows]
  truth, seen = {}, np.zeros(10, int)
  for number, (own, label) in enumerate(zip(pixels, labels, strict=True)):
    is_labelled = seen[label] < LABELLED
    seen[label] += 1
    where = str(label) if is_labelled else 'unlabelled'
    (folder / where).mkdir(parents=True, exist_ok=True)
    path = folder / where / f'{number:03}.png'
    image = PIL.Image.fromarray(own)
    if number % 40 < len(TROUBLES):
      suffix = list(TROUBLES)[number % 40]
      path = path.with_name(f'{number:03}-{suffix}')
      image = TROUBLES[suffix](image)
    image.save(path)
    if not is_labelled:
      truth[path.relative_to(folder).as_posix()] = int(label)
  _write_extras(folder)
  return truth


def _write_extras(folder: pathlib.Path) -> None:
  """Write copies, a rotated image, and files that are no images."""
  some = sorted((folder / '3').glob('???.png'))
  shutil.copy(some[0], folder / '3/copy.png')
  image = PIL.Image.open(some[1])
  image.resize((56, 56)).save(folder / '3/larger.png')
  image = PIL.Image.open(some[2])
  exif = PIL.Image.Exif()
  exif[_ORIENTATION] = _TURNED
  turned = image.transpose(PIL.Image.Transpose.ROTATE_90)
  turned.save(folder / 'unlabelled/turned.jpg', quality=95, exif=exif)
  content = some[3].read_bytes()
  (folder / 'unlabelled/broken.png').write_bytes(content[: len(content) // 2])
  (folder / 'unlabelled/.hidden.png').write_bytes(content)


def show(command: str, folder: pathlib.Path, environment: pathlib.Path) -> None:
  """Run a command in a folder, and print it with its output and its time."""
  words = shlex.split(command)
  program = environment / 'bin' / words[0]
  print(f'$ {command}', flush=True)
  began = time.monotonic()
  found = subprocess.run(
    [program, *words[1:]],
    cwd=folder,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  lines = found.stdout.splitlines()
  if words[0] == 'python':
    lines = ['...', *lines[-_SHOWN:]]
  print('\n'.join(lines))
  seconds = time.monotonic() - began
  print(f'[{seconds:.0f} s, exit status {found.returncode}]\n', flush=True)
  if found.returncode:
    sys.exit(found.returncode)


def error(path: pathlib.Path, truth: dict[str, int]) -> str:
  """Return the error of a file of predictions where the truth is known."""
  with path.open(encoding='utf-8') as file:
    wrong = [
      int(row['label']) != truth[row['file']]
      for row in csv.DictReader(file)
      if row['file'] in truth
    ]
  return f'{100 * np.mean(wrong):.1f} % of {len(wrong)} images are wrong'


def main() -> None:
  """Write the images, run the commands, and compare with the truth."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data_dir', required=True)
  parser.add_argument('--out', type=pathlib.Path, default='runs/transcript')
  parser.add_argument('--minutes', type=float, default=5)
  parser.add_argument('--install', action='store_true')
  asked = parser.parse_args()
  asked.out.mkdir(parents=True)
  truth = write(asked.out / 'photos', asked.data_dir)
  environment = pathlib.Path(sys.prefix)
  if asked.install:
    environment = asked.out.resolve() / 'env'
    show(f'python -m venv {environment}', asked.out, pathlib.Path(sys.prefix))
    show(f"pip install -q '{ROOT}[export]'", asked.out, environment)
  for command in COMMANDS:
    text = command.format(minutes=asked.minutes)
    show(text, asked.out, environment)
  print(error(asked.out / 'predictions.csv', truth))


if __name__ == '__main__':
  main()
