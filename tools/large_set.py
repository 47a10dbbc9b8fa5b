"""Measure the first and the second start on a data set shaped like ImageNet.

    python tools/large_set.py [--rows=200000] [--classes=1000]

The set is generated: small JPEG files of mixed sizes in array_record files. The
first start reads all records for their labels, which it keeps beside the data;
the second one reads none of them. Both stream the images.
"""

import argparse
import io
import pathlib
import sys
import tempfile
import time

import numpy as np
import PIL.Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / 'tests')]

import fake_tfds  # noqa: E402

from ssljax.experiments.benchmarks import start_speed  # noqa: E402

FLAGS = (
  *('--dataset=pictures', '--image_size=32', '--augment=crop', '--labels=1'),
  *('--network=mlp', '--batch_labelled=8', '--batch_unlabelled=8'),
  *('--steps=3', '--nobaseline', '--seeds=1', '--evaluate_every=3'),
)


def jpegs(count: int) -> list[bytes]:
  """Return JPEG files of noise, of sizes from 24 to 40 pixels."""
  rng, found = np.random.default_rng(0), []
  for height, width in rng.integers(24, 41, (count, 2)):
    file = io.BytesIO()
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(file, 'jpeg', quality=50)
    found.append(file.getvalue())
  return found


def write(folder: pathlib.Path, rows: int, classes: int) -> None:
  """Write a data set `pictures` with so many training images.

  Args:
    folder: as `data_dir`.
    rows: number of training images; 1,000 more are to test on.
    classes: number of classes.
  """
  different, total = jpegs(1000), rows + 1000
  # Every file is another one: bytes after the end of a JPEG are not read.
  images = [
    different[row % len(different)] + row.to_bytes(4, 'big')
    for row in range(total)
  ]
  fake_tfds.write(
    folder,
    'pictures',
    images,
    np.arange(total) % classes,
    classes,
    splits={'train': rows, 'test': 1000},
    encoding='jpeg',
    shape=(None, None, 3),
    shards=16,
  )


def main(rows: int, classes: int) -> None:
  """Generate the set, start twice, and print what each start took."""
  with tempfile.TemporaryDirectory() as folder:
    data, cache = pathlib.Path(folder, 'data'), pathlib.Path(folder, 'cache')
    began = time.time()
    write(data, rows, classes)
    print(f'generated {rows} rows in {time.time() - began:.0f} s', flush=True)
    for name in ('first start', 'second start'):
      found = start_speed.start(cache, [f'--data_dir={data}', *FLAGS])
      print(name, {k: round(v, 1) for k, v in found.items()}, flush=True)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rows', type=int, default=200_000)
  parser.add_argument('--classes', type=int, default=1000)
  given = parser.parse_args()
  main(given.rows, given.classes)
