"""Compare methods on features of a pretrained network with scikit-learn's.

    python tools/features.py --features=cifar10.npz [--out=runs/features]
        [--methods=madnn,...] [--labels=4,10,25] [--seeds=5]
        [--page=docs/results.md]

`features` is a file of `ssljax embed` with test rows. Of a random order of its
training rows the first 4,000 are trained on, labelled or not, and the next
1,000 are validation rows, of which no method of ssljax sees anything. Errors
are those on all test rows, under the same label splits for all.

ssljax's methods are run with their defaults. The hyper-parameters of the others
are those of the smallest mean error over the splits on the validation rows,
from these grids; rows are scaled to length 1, or standardised:

  LogisticRegression    scaling, C in 0.01, 0.1, 1, 10, 100
  SelfTrainingClassifier  of it, with its best scaling and C, or C = 100;
                        threshold 0.75, 0.9, or k_best 100
  LabelSpreading        rbf with gamma 5, 20, or knn with 10, 30 neighbours;
                        alpha 0.2, 0.8, 0.99
  LP, LP_CMN            of ssljax.analysis.propagation; gamma 2, 5, 10, 20

LP and LP_CMN classify a test row by the scores of the training rows, weighted
by the kernel. Every result is stored in OUT, and the same command resumes. The
table goes between `<!-- features -->` and `<!-- end -->` of the page.
"""

import argparse
from collections.abc import Callable, Iterator
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any
import warnings

import numpy as np
from scipy import stats
from sklearn import linear_model, preprocessing, semi_supervised
from sklearn.metrics import pairwise

from ssljax.analysis import propagation
from ssljax.data import npz, splits
from ssljax.runs import summary

ROOT = pathlib.Path(__file__).resolve().parents[1]
POOL, VALIDATION, ORDER = 4_000, 1_000, 7
METHODS = (
  'supervised,laplacenet,association,llp,madnn,r2d2,pseudo_label,mean_teacher,'
  'ict,mixmatch,vat,deepbass'
)
OPPONENTS = 'LogisticRegression', 'LabelSpreading', 'SelfTrainingClassifier'
C = 0.01, 0.1, 1.0, 10.0, 100.0
SELECTIONS = {
  'threshold 0.75': {'threshold': 0.75},
  'threshold 0.9': {'threshold': 0.9},
  'k_best 100': {'criterion': 'k_best', 'k_best': 100},
}
ALPHAS = 0.2, 0.8, 0.99
KERNELS = ('rbf', 5.0), ('rbf', 20.0), ('knn', 10), ('knn', 30)
GAMMAS = 2.0, 5.0, 10.0, 20.0


PARTS = 'train', 'validation', 'test'


@dataclasses.dataclass(eq=False)
class Data:
  """Rows of three parts, by scaling, and their labels."""

  train: dict[str, np.ndarray]  # scaling -> [N, D]
  validation: dict[str, np.ndarray]
  test: dict[str, np.ndarray]
  labels: np.ndarray  # [N]
  validation_labels: np.ndarray
  test_labels: np.ndarray
  classes: int

  @functools.cached_property
  def distances(self) -> np.ndarray:
    """Squares `[all rows, N]` of distances to training rows, of length 1."""
    rows = [getattr(self, part)['length 1'] for part in PARTS]
    return np.concatenate(
      [pairwise.euclidean_distances(x, rows[0], squared=True) for x in rows]
    )

  def weights(self, kernel, first: np.ndarray, second: np.ndarray):
    """Return the kernel `[first, second]` of rows, the first of training."""
    key = (*kernel, int(second[0]))
    if key not in self._kernels:
      kind, size = kernel
      distances = self.distances[second][:, first]
      if kind == 'rbf':
        found = np.exp(-size * distances).T
      else:
        near = np.argpartition(distances, size, axis=1)[:, :size]
        found = np.zeros_like(distances)
        np.put_along_axis(found, near, 1.0, axis=1)
        # Of training rows scikit-learn has the neighbours of a row in its row.
        found = found if second[0] == 0 else found.T
      self._kernels[key] = found
    return self._kernels[key]

  _kernels: dict = dataclasses.field(default_factory=dict)


def as_column(data: Data, part: str) -> np.ndarray:
  """Return the numbers `[n, 1]` of the rows of a part."""
  sizes = [len(getattr(data, name)['length 1']) for name in PARTS]
  at = PARTS.index(part)
  return sum(sizes[:at]) + np.arange(sizes[at])[:, None]


def make(features: pathlib.Path, out: pathlib.Path) -> Data:
  """Write the file that ssljax's methods are run on, and return all rows."""
  wanted = 'train', 'train_labels', 'test', 'test_labels'
  with features.open('rb') as file:
    found, _ = npz.read(file, wanted)
  x, y, test, truth = (found[name] for name in wanted)
  order = np.random.default_rng(ORDER).permutation(len(y))
  pool, held = np.split(order[: POOL + VALIDATION], [POOL])
  path = out / 'pool.npz'
  if not path.exists():
    rows = {'train': x[pool], 'train_labels': y[pool]}
    partial = out / 'partial.npz'
    np.savez(partial, **rows, test=test, test_labels=truth)
    os.replace(partial, path)
  scaler = preprocessing.StandardScaler().fit(x[pool])
  scaled = lambda z: {
    'length 1': propagation.unit_rows(z).astype(np.float32),
    'standardised': scaler.transform(z),
  }
  parts = [scaled(z) for z in (x[pool], x[held], test)]
  return Data(*parts, y[pool], y[held], truth, int(truth.max()) + 1)


# ssljax's methods.


def train(method: str, labels: int, seeds: int, out: pathlib.Path) -> list:
  """Run a method, and return its test errors in percent."""
  folder = out / f'labels-{labels}' / method
  command = [
    *(sys.executable, str(ROOT / f'experiments/{method}.py')),
    *(f'--dataset={out / "pool.npz"}', f'--labels={labels}'),
    *(f'--seeds={seeds}', '--nobaseline', f'--workdir={folder}'),
  ]
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
  result = json.loads((folder / 'result.json').read_text())
  return summary.errors_that_stand(result['test_error'])


# Their opponents. Each yields (settings, validation error, test error), one for
# each cell of its grid.

Cells = Iterator[tuple[Any, float, float]]


def error(predicted: np.ndarray, truth: np.ndarray) -> float:
  """Return the error in percent."""
  return 100 * float(np.mean(predicted != truth))


def of_classifier(settings, model, scaling: str, data: Data):
  """Return the cell of a fitted classifier."""
  return (
    settings,
    error(model.predict(data.validation[scaling]), data.validation_labels),
    error(model.predict(data.test[scaling]), data.test_labels),
  )


def logistic_regression(data: Data, known: np.ndarray, best) -> Cells:
  """Fit to the labelled rows alone."""
  del best
  rows = known >= 0
  for scaling in data.train:
    for c in C:
      model = linear_model.LogisticRegression(C=c, max_iter=2_000)
      model.fit(data.train[scaling][rows], known[rows])
      yield of_classifier((scaling, c), model, scaling, data)


def self_training(data: Data, known: np.ndarray, best) -> Cells:
  """Train logistic regression on its own predictions."""
  scaling, c = best['LogisticRegression']
  for own in (c, 100.0):
    for name, how in SELECTIONS.items():
      model = semi_supervised.SelfTrainingClassifier(
        linear_model.LogisticRegression(C=own, max_iter=300), **how
      )
      with warnings.catch_warnings(action='ignore'):
        model.fit(data.train[scaling], known)
      yield of_classifier((own, name), model, scaling, data)


def label_spreading(data: Data, known: np.ndarray, best) -> Cells:
  """Spread labels over a graph of all rows; a row is given by its number."""
  del best
  numbers = {part: as_column(data, part) for part in PARTS}
  for kernel in KERNELS:
    weights = lambda a, b, k=kernel: data.weights(k, a[:, 0], b[:, 0])
    for alpha in ALPHAS:
      model = semi_supervised.LabelSpreading(weights, alpha=alpha, max_iter=100)
      with warnings.catch_warnings(action='ignore'):
        model.fit(numbers['train'], known)
      held, tested = (model.predict(numbers[part]) for part in PARTS[1:])
      yield (
        (*kernel, alpha),
        error(held, data.validation_labels),
        error(tested, data.test_labels),
      )


@functools.lru_cache(maxsize=64)
def scores(data: Data, known: bytes, gamma: float) -> np.ndarray:
  """Return the scores of label propagation for the training rows."""
  x = data.train['length 1']
  labels = np.frombuffer(known, np.int32)
  return propagation.harmonic(x, labels, data.classes, gamma)


def propagated(normalize: bool) -> Callable:
  """Return the function of LP, or LP_CMN."""

  def cells(data: Data, known: np.ndarray, best) -> Cells:
    del best
    rows = {part: as_column(data, part)[:, 0] for part in PARTS}
    for gamma in GAMMAS:
      f = scores(data, known.astype(np.int32).tobytes(), gamma)
      if normalize:
        f = propagation.normalize_mass(f, known)
      held, tested = (
        data.weights(('rbf', gamma), rows['train'], rows[part]).T @ f
        for part in PARTS[1:]
      )
      yield (
        gamma,
        error(held.argmax(axis=1), data.validation_labels),
        error(tested.argmax(axis=1), data.test_labels),
      )

  return cells


OTHERS = {
  'LogisticRegression': logistic_regression,
  'SelfTrainingClassifier': self_training,
  'LabelSpreading': label_spreading,
  'LP': propagated(False),
  'LP_CMN': propagated(True),
}


def measure(
  name: str, data: Data, labels: int, seeds: int, best: dict[str, Any]
) -> dict[str, Any]:
  """Return the chosen settings, and their test errors under each split."""
  started, validation, test, settings = time.process_time(), [], [], []
  for seed in range(seeds):
    known = splits.draw_split(
      data.labels, data.classes, per_class=labels, seed=seed
    ).labels
    settings, held, tested = zip(*OTHERS[name](data, known, best), strict=True)
    validation.append(held)
    test.append(tested)
  chosen = int(np.argmin(np.mean(validation, axis=0)))
  return {
    'settings': settings[chosen],
    'validation': float(np.mean(validation, axis=0)[chosen]),
    'errors': [row[chosen] for row in test],
    'seconds': time.process_time() - started,
  }


# The table.


def interval(difference: np.ndarray) -> str:
  """Return a mean with its 95 % interval (Student)."""
  n = len(difference)
  half = stats.t.ppf(0.975, n - 1) * difference.std(ddof=1) / np.sqrt(n)
  mean = difference.mean()
  return f'{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]'


def table(results: dict[str, dict[str, Any]], labels, classes: int) -> str:
  """Return the rows; the last column of each number of labels is paired."""
  best = {
    n: min(
      (name for name in OPPONENTS if name in results[n]),
      key=lambda name, n=n: np.mean(results[n][name]['errors']),
    )
    for n in labels
  }
  head = ['method']
  for n in labels:
    head += [f'{n * classes} labels', f'to {best[n]}']
  lines = [head, ['---'] * len(head)]
  names = list(dict.fromkeys(name for n in labels for name in results[n]))
  for name in names:
    cells = [name]
    for n in labels:
      if name not in results[n]:
        cells += ['', '']
        continue
      own = np.array(results[n][name]['errors'])
      other = np.array(results[n][best[n]]['errors'])
      cells.append(f'{own.mean():.2f} ± {own.std(ddof=1):.2f}')
      cells.append('' if name == best[n] else interval(own - other))
    lines.append(cells)
  chosen = '; '.join(
    f'{name} at {n * classes} labels '
    + ', '.join(map(str, np.ravel(results[n][name]['settings'])))
    for name in OTHERS
    for n in labels
    if name in results[n]
  )
  text = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
  return (
    f'{text}\n\nTest error in %, mean ± standard deviation over the label '
    "splits, and the paired difference to the best of scikit-learn's three "
    f'classifiers with its 95 % interval (Student). Chosen: {chosen}.\n'
  )


def put(page: pathlib.Path, text: str) -> None:
  """Replace the table of a page."""
  old = page.read_text(encoding='utf-8')
  marks = re.compile(r'(<!-- features -->\n).*?(<!-- end -->)', re.DOTALL)
  new, count = marks.subn(lambda m: m[1] + text + m[2], old)
  if not count:
    sys.exit(f'{page}: has no <!-- features -->')
  page.write_text(new, encoding='utf-8')


def main() -> None:
  """Measure what is missing, and print the table after each result."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--features', type=pathlib.Path, required=True)
  parser.add_argument('--out', type=pathlib.Path, default='runs/features')
  parser.add_argument('--methods', default=METHODS)
  parser.add_argument('--labels', default='4,10,25')
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--page', type=pathlib.Path)
  parser.add_argument(
    '--show', action='store_true', help='print what is stored; measure nothing'
  )
  asked = parser.parse_args()
  asked.out.mkdir(parents=True, exist_ok=True)
  labels = [int(n) for n in asked.labels.split(',')]
  data, store = make(asked.features, asked.out), asked.out / 'results.json'
  stored = json.loads(store.read_text()) if store.exists() else {}
  results = {n: stored.get(str(n), {}) for n in labels}
  methods = asked.methods.split(',') if asked.methods else []
  for name in [*OTHERS, *methods]:
    for n in labels:
      done = len(results[n].get(name, {}).get('errors', ())) == asked.seeds
      if done or asked.show:
        continue
      best = {k: v['settings'] for k, v in results[n].items() if k in OTHERS}
      found = (
        measure(name, data, n, asked.seeds, best)
        if name in OTHERS
        else {'errors': train(name, n, asked.seeds, asked.out)}
      )
      results[n][name] = found
      partial = store.with_suffix('.partial')
      all_results = stored | {str(n): of_n for n, of_n in results.items()}
      partial.write_text(json.dumps(all_results, indent=1))
      os.replace(partial, store)
      print(n, name, found, flush=True)
  text = table(results, labels, data.classes)
  print(text)
  if asked.page:
    put(asked.page, text)


if __name__ == '__main__':
  main()
