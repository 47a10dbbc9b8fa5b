"""Try every method's defaults on data sets that no default was chosen on.

    python tools/unseen.py --data_dir=DIR [--out=runs/unseen] [--only=SET,...]
        [--methods=madnn,...] [--seeds=5]

`data_dir` holds MNIST and CIFAR-10 in the TFDS layout. The training images are
the first of a random order of their training splits; defaults were chosen on
the last 12,000 and 8,000 of the same order. The test images are the first 5,000
of the test splits.

  mnist14    MNIST at 14x14, 1,000 images, 10 labels per class
  inverted   MNIST at 16x16, dark on light, 1,000 images, 5 labels per class
  cifar16    CIFAR-10 at 16x16, 1,000 images, 10 labels per class
  features   40 whitened principal components of MNIST, 4,000, 10 per class
  mnist16    MNIST at 16x16, 7,291 images, 10 labels per class
  large      MNIST at 14x14, 20,000 images, 10 labels per class

Each set is compared by `experiments/compare.py`, which resumes: the comparison
is written to OUT/SET/comparison.md.
"""

import argparse
import pathlib
import subprocess
import sys

import numpy as np
from sklearn.decomposition import PCA

from ssljax.data import datasets

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEST = 5_000
ORDER = 7  # seed of the order of the training images
# Name: (data set, side in pixels, first image, images, labels per class).
SETS = {
  'features': ('mnist', 28, 0, 4_000, 10),
  'mnist14': ('mnist', 14, 0, 1_000, 10),
  'inverted': ('mnist', 16, 3_000, 1_000, 5),
  'cifar16': ('cifar10', 16, 0, 1_000, 10),
  'mnist16': ('mnist', 16, 3_000, 7_291, 10),
  'large': ('mnist', 14, 0, 20_000, 10),
}
FIVE = 'madnn,association,r2d2,llp,deepbass'


def rows_of(source, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Return images `[n, H, W, c]` and labels `[n]` of some rows."""
  chosen = np.sort(rows)
  return source.read(chosen), source.labels[chosen]


def make(name: str, data_dir: str, path: pathlib.Path) -> None:
  """Write a data set to an .npz file."""
  origin, side, first, count, _ = SETS[name]
  data = datasets.load(origin, data_dir, image_size=side)
  order = np.random.default_rng(ORDER).permutation(len(data.train.labels))
  x, y = rows_of(data.train, order[first : first + count])
  test, truth = rows_of(data.test, np.arange(TEST))
  if name == 'inverted':
    x, test = 255 - x, 255 - test
  if name == 'features':
    x, test = (a.reshape(len(a), -1) / 255.0 for a in (x, test))
    pca = PCA(40, whiten=True, random_state=0).fit(x)
    x, test = (pca.transform(a).astype(np.float32) for a in (x, test))
  np.savez(path, train=x, train_labels=y, test=test, test_labels=truth)


def compare(name: str, path: pathlib.Path, methods: str, seeds: int) -> int:
  """Compare the methods on a set; return the exit status."""
  command = [
    *(sys.executable, str(ROOT / 'experiments/compare.py')),
    *(f'--methods={methods}', f'--seeds={seeds}', f'--dataset={path}'),
    *(f'--labels={SETS[name][-1]}', f'--folder={path.with_suffix("")}'),
  ]
  return subprocess.run(command, check=False).returncode


def main() -> int:
  """Make the sets that are missing, and compare the methods on each."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data_dir', required=True)
  parser.add_argument('--out', type=pathlib.Path, default='runs/unseen')
  parser.add_argument('--only', default='features,mnist14,inverted,cifar16')
  parser.add_argument('--methods', default=FIVE)
  parser.add_argument('--seeds', type=int, default=5)
  asked = parser.parse_args()
  asked.out.mkdir(parents=True, exist_ok=True)
  statuses = []
  for name in asked.only.split(','):
    path = asked.out / f'{name}.npz'
    if not path.exists():
      make(name, asked.data_dir, path)
    statuses.append(compare(name, path, asked.methods, asked.seeds))
  return max(statuses)


if __name__ == '__main__':
  sys.exit(main())
