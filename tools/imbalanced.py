"""Measure the options for rare classes on a long-tailed MNIST.

    python tools/imbalanced.py --data_dir=DIR [--out=runs/imbalanced]
        [--methods=supervised,madnn,...] [--seeds=5] [--docs=docs/results.md]

`data_dir` holds MNIST in the TFDS layout. A seed draws 1,240 training images at
14x14, whose most frequent class has 500 and whose rarest has 5, and labels a
tenth of each class, at least one image. Which class is how frequent is another
permutation for each seed. The test images are the first 2,000 of the test
split, where all classes are about equally frequent.

Results are appended to OUT/results.jsonl; a repeated command continues there.
The table is written to OUT/table.md, and with --docs between the marks
`<!-- imbalanced -->` and `<!-- end -->` of a file.
"""

import argparse
import json
import pathlib
import statistics
import sys

import numpy as np

import ssljax
from ssljax.analysis import classification
from ssljax.data import datasets
from ssljax.networks import small

SIDE, MOST, RATIO, TEST = 14, 500, 100, 2_000
STEPS = 300
BATCH = {'batch_labelled': 32, 'batch_unlabelled': 48}
STRONG = ('translate:2', 'cutout:0.5')
SUPERVISED = {
  'none': {},
  'logit adjustment': {'logit_adjustment': 1.0},
  'class-aware sampling': {'sampling': 'classes'},
  'both': {'logit_adjustment': 1.0, 'sampling': 'classes'},
}
ALIGNED = {'distribution_alignment': True}
PSEUDO = {
  **{k: v for k, v in SUPERVISED.items() if k != 'both'},
  'alignment': ALIGNED,
  'alignment, logit adjustment': ALIGNED | SUPERVISED['logit adjustment'],
  'alignment, class-aware sampling': ALIGNED
  | SUPERVISED['class-aware sampling'],
}
# Method: (its settings, its options).
METHODS = {
  'supervised': ({}, SUPERVISED),
  'madnn': ({}, SUPERVISED),
  'fixmatch': ({'strong_augment': STRONG}, PSEUDO),
  'uda': ({'strong_augment': STRONG}, PSEUDO),
}
MARK, END = '<!-- imbalanced -->', '<!-- end -->'


def counts(most: int) -> np.ndarray:
  """Return the images of the ten classes, most frequent first."""
  falling = most * RATIO ** (-np.arange(10) / 9)
  return np.maximum(1, np.round(falling)).astype(int)


def draw(truth: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Return the rows of a long-tailed subset, and their labels, -1 if hidden.

  Args:
    truth: `[N]` classes.
    seed: of the subset.
  """
  rng = np.random.default_rng((seed, 11))
  order, rows, labels = rng.permutation(10), [], []
  sizes = zip(counts(MOST), counts(MOST // 10), strict=True)
  for label, (size, known) in zip(order.tolist(), sizes, strict=True):
    chosen = rng.permutation(np.flatnonzero(truth == label))[:size]
    rows.append(chosen)
    labels.append(np.where(np.arange(size) < known, label, -1))
  mixed = rng.permutation(sum(map(len, rows)))
  return np.concatenate(rows)[mixed], np.concatenate(labels)[mixed]


def measure(method: str, option: str, seed: int, data, test) -> dict:
  """Train under one seed; return the line of `results.jsonl`.

  Args:
    method: name of the method.
    option: name of its option.
    seed: of the subset, the weights and the order.
    data: the training images.
    test: test images and classes.
  """
  own, options = METHODS[method]
  rows, labels = draw(data.labels, seed)
  at = np.argsort(rows)  # they are read in rising order
  model = ssljax.fit(
    data.read(rows[at]),
    labels[at],
    method=method,
    seed=seed,
    test=test,
    network=small.small(10, widths=(8, 16), embedding=32, momentum=0.98),
    steps=STEPS,
    progress=False,
    evaluate_every=STEPS,
    **(BATCH | own | options[option]),
  )
  found = model.result['test_classes']
  report = found.get('averaged', found['last'])['seeds'][0]
  frequent = np.bincount(labels[labels >= 0], minlength=10)
  rare = np.argsort(frequent, kind='stable')[:3]
  return {
    **{'method': method, 'option': option, 'seed': seed},
    'accuracy': report['accuracy'],
    'balanced_accuracy': report['balanced_accuracy'],
    'rare_recall': statistics.fmean(report['recall'][c] for c in rare),
    'seconds': model.result['seconds'],
  }


def table(lines: list[dict]) -> str:
  """Return the results as a Markdown table."""
  head = (
    *('method', 'option', 'balanced accuracy', 'difference [95 %]'),
    *('three rarest classes', 'seeds'),
  )
  body = [head, ['---'] * len(head)]
  for method, (_, options) in METHODS.items():
    of = {
      option: {
        x['seed']: x
        for x in lines
        if (x['method'], x['option']) == (method, option)
      }
      for option in options
    }
    for option, found in of.items():
      if found:
        body.append([method, option, *cells(found, of['none'])])
  return ''.join(f'| {" | ".join(line)} |\n' for line in body)


def cells(found: dict[int, dict], plain: dict[int, dict]) -> list[str]:
  """Return the cells of an option.

  Args:
    found: its results by seed.
    plain: those without any option.
  """
  of = lambda name: [100 * x[name] for x in found.values()]
  common = sorted(found.keys() & plain.keys())
  key = 'balanced_accuracy'
  differences = [100 * (found[s][key] - plain[s][key]) for s in common]
  shown = '–'
  if found is not plain and len(common) > 1:
    low, high = classification.student(differences)
    shown = f'{statistics.fmean(differences):+.1f} [{low:+.1f}, {high:+.1f}]'
  return [spread(of(key)), shown, spread(of('rare_recall')), str(len(found))]


def spread(values: list[float]) -> str:
  """Return '81.2 ± 3.0': mean and standard deviation."""
  if len(values) < 2:
    return f'{values[0]:.1f}'
  return f'{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}'


def read(path: pathlib.Path) -> list[dict]:
  """Return the results of a file, which may end within a line."""
  text = path.read_text() if path.exists() else ''
  return [
    json.loads(x) for x in text.splitlines(keepends=True) if x[-1] == '\n'
  ]


def write_docs(path: pathlib.Path, text: str) -> None:
  """Replace the table between the marks of a file."""
  before, rest = path.read_text().split(MARK, 1)
  after = rest.split(END, 1)[1]
  path.write_text(f'{before}{MARK}\n{text}{END}{after}')


def main() -> int:
  """Train what is missing, and write the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data_dir', required=True)
  parser.add_argument('--out', type=pathlib.Path, default='runs/imbalanced')
  parser.add_argument('--methods', default=','.join(METHODS))
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--docs', type=pathlib.Path)
  asked = parser.parse_args()
  asked.out.mkdir(parents=True, exist_ok=True)
  path = asked.out / 'results.jsonl'
  lines = read(path)
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  key = lambda line: (line['method'], line['option'], line['seed'])
  there = {key(line) for line in lines}
  wanted = [
    (method, option, seed)
    for seed in range(asked.seeds)
    for method in asked.methods.split(',')
    for option in METHODS[method][1]
  ]
  missing = [one for one in wanted if one not in there]
  if missing:
    data = datasets.load('mnist', asked.data_dir, image_size=SIDE)
    test = data.test.read(np.arange(TEST)), data.test.labels[:TEST]
    for one in missing:
      lines.append(measure(*one, data.train, test))
      with path.open('a') as file:
        file.write(json.dumps(lines[-1]) + '\n')
      print(lines[-1], flush=True)
  text = table(lines)
  (asked.out / 'table.md').write_text(text)
  if asked.docs:
    write_docs(asked.docs, text)
  print(text)
  return 0


if __name__ == '__main__':
  sys.exit(main())
