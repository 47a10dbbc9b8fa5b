"""Label over HTTP as a person with some mistakes would.

    python tools/simulate_annotator.py --set=digits --acquire=random,entropy
    python tools/simulate_annotator.py --set=mnist --data_dir=DIR --seeds=5
    python tools/simulate_annotator.py --set=cifar10 --data_dir=DIR \
        --features=cifar10.npz --seeds=5 --figure=curves.png

Starts `ssljax label` on a folder of images for each acquisition function and
seed, answers its questions with the true class (or, with the probability
`mistakes`, another one), and stores for each round the number of labels, the
error of the round's model on test images, the page's own estimate of the error,
and the seconds of the round. The same command resumes after the last finished
simulation; other settings need another `--out`.

  digits    scikit-learn's digits, the last 497 as test images
  mnist     MNIST at 14x14, 2,000 training images, 2,000 test images
  cifar10   CIFAR-10, 4,000 training images, all test images, learned from
            `features`, a file of `ssljax embed` for the whole data set

`--figure` draws the curves of all that is stored.
"""

import argparse
import json
import pathlib
import random
import shutil
import sys
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np
from page_speed import Program
import PIL.Image

import ssljax
from ssljax import files
from ssljax.data import datasets, npz

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1])]
from experiments.figures import style  # noqa: E402

COUNTS = {'digits': 1_300, 'mnist': 2_000, 'cifar10': 4_000}
TITLES = {
  'digits': "scikit-learn's digits",
  'mnist': 'MNIST at 14x14',
  'cifar10': 'CIFAR-10 (JPEG), features of MobileNetV2',
}
ORDER = 7  # seed of the order of the training images


class Task(NamedTuple):
  """A folder of images, the truth, and rows to test."""

  images: pathlib.Path
  truth: dict[str, str]  # file -> class
  test: np.ndarray  # [M, ...]
  test_labels: np.ndarray  # [M] int
  flags: list[str]  # of `ssljax label`


def draw(folder: pathlib.Path, asked) -> Task:
  """Write the images of a set."""
  side = 14 if asked.set == 'mnist' else None
  data = datasets.load(asked.set, asked.data_dir, image_size=side)
  order = np.random.default_rng(ORDER).permutation(len(data.train.labels))
  rows = np.sort(order[: COUNTS[asked.set]])
  pixels, labels = data.train.read(rows), data.train.labels[rows]
  names = [f'{row:05d}.png' for row in rows]
  root = folder / 'images'
  root.mkdir()
  for name, image in zip(names, pixels, strict=True):
    shown = image[..., 0] if image.shape[-1] == 1 else image
    PIL.Image.fromarray(shown).save(root / name)
  truth = {n: str(c) for n, c in zip(names, labels, strict=True)}
  count = 2_000 if asked.set == 'mnist' else len(data.test.labels)
  test, flags = data.test.read(np.arange(count)), []
  if asked.features:
    with open(asked.features, 'rb') as file:
      found, _ = npz.read(file, ('train', 'test'))
    kept = folder / 'features.npz'
    np.savez(kept, train=found['train'][rows], train_files=names)
    test, flags = found['test'][:count], [f'--features={kept}']
  return Task(root, truth, test, data.test.labels[:count], flags)


def error_of(store: pathlib.Path, task: Task) -> float:
  """Return the error in % of the model of the last round on the test rows."""
  model = ssljax.load(store / 'model')
  named = np.array(model.classes)[model.predict(task.test)]
  return 100 * float(np.mean(named != task.test_labels.astype(str)))


def answer(program: Program, task: Task, rng: random.Random, mistakes: float):
  """Answer one question; return the file."""
  (item,) = program.ask('/api/next?who=simulated&count=1')[1]
  label = task.truth[item['file']]
  if rng.random() < mistakes:
    label = rng.choice(sorted(set(task.truth.values()) - {label}))
  body = {
    'who': 'simulated',
    'answers': [item | {'label': label, 'key': item['file']}],
  }
  status, said = program.ask('/api/answers', body)
  assert status == 200, said
  return item['file']


def simulate(folder, task: Task, acquire: str, seed: int, asked) -> list[dict]:
  """Return a row for each round."""
  rng, store = random.Random(seed), folder / f'{acquire}-{seed}'
  compiled = folder / 'compiled'  # programs of an earlier simulation
  if compiled.is_dir():
    shutil.copytree(compiled, store / 'compiled')
  own = {'method': asked.method, 'network': asked.network}
  program = Program(
    *(f'--images={task.images}', f'--store={store}', f'--acquire={acquire}'),
    *(f'--seed={seed}', f'--every={asked.every}', f'--steps={asked.steps}'),
    *(f'--{name}={value}' for name, value in own.items() if value),
    '--classes=' + ','.join(sorted(set(task.truth.values()))),
    *task.flags,
  )

  def state():
    return program.ask('/api/state')[1]

  while 'two classes' not in state()['learner'].get('message', ''):
    time.sleep(0.2)
  labelled, rows = set(), []
  while len(labelled) < asked.labels:
    for _ in range(asked.every):
      labelled.add(answer(program, task, rng, asked.mistakes))
    while True:
      now = state()
      learner = now['learner']
      if now['round'] == len(rows) + 1 and learner.get('state') == 'waiting':
        break
      assert learner.get('state') != 'failed', learner
      time.sleep(0.2)
    rows.append(
      {
        'labels': len(labelled),
        'error': error_of(store, task),
        'estimate': now['error'],
        'seconds': learner['seconds'],
      }
    )
  program.end()
  shutil.copytree(store / 'compiled', compiled, dirs_exist_ok=True)
  shutil.rmtree(store)
  return rows


def describe(name: str, row: dict) -> str:
  """Return a line about a round."""
  own = '-'
  if row['estimate']:
    error, low, high = (100 * row['estimate'][k] for k in _ESTIMATE)
    own = f'{error:.1f} [{low:.1f}, {high:.1f}]'
  return (
    f'{name}: {row["labels"]:4} labels, test error {row["error"]:5.1f} %, '
    f'estimated {own} %, round {row["seconds"]:.1f} s'
  )


_ESTIMATE = 'error', 'low', 'high'


SETTINGS = 'every', 'labels', 'mistakes', 'steps', 'method', 'network'


def stored_in(record: pathlib.Path, asked) -> dict[str, list[dict]]:
  """Return the finished simulations; end if their settings were others."""
  if not record.exists():
    return {}
  found = json.loads(record.read_text())
  for name, value in settings_of(asked).items():
    if found['settings'][name] != value:
      sys.exit(
        f'{record}: simulated with {name}={found["settings"][name]}, not '
        f'{value}: give another --out'
      )
  return found['simulations']


def settings_of(asked) -> dict[str, Any]:
  """Return what all simulations of a record have in common."""
  own = {name: getattr(asked, name) for name in SETTINGS}
  return own | {'features': asked.features is not None}


def keep(record: pathlib.Path, stored: dict[str, list[dict]], asked) -> None:
  """Write the finished simulations."""
  found = {'settings': settings_of(asked), 'simulations': stored}
  files.write_atomically(record, json.dumps(found, indent=1))


def by_function(stored: dict[str, list[dict]]) -> dict[str, list[list[dict]]]:
  """Return the simulations of each acquisition function."""
  found: dict[str, list[list[dict]]] = {}
  for key, rows in stored.items():
    found.setdefault(key.split()[0], []).append(rows)
  return found


def table(stored: dict[str, list[dict]]) -> str:
  """Return mean errors by acquisition function and number of labels."""
  counts = [row['labels'] for row in next(iter(stored.values()))]
  shown = counts[1::2] if len(counts) > 6 else counts
  head = ['acquisition', *(f'{n} labels' for n in shown), 'seconds per round']
  lines = [head, ['---'] * len(head)]
  for name, runs in by_function(stored).items():
    errors = np.array([[row['error'] for row in rows] for rows in runs])
    seconds = np.median([row['seconds'] for rows in runs for row in rows])
    cells = [f'{name} ({len(runs)})']
    for n in shown:
      column = errors[:, counts.index(n)]
      spread = f' ± {column.std(ddof=1):.1f}' if len(column) > 1 else ''
      cells.append(f'{column.mean():.1f}{spread}')
    lines.append([*cells, f'{seconds:.1f}'])
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def plot(stored: dict[str, list[dict]], title: str, path: pathlib.Path) -> None:
  """Draw mean and deviation of the error against the number of labels."""
  style.check_matplotlib()
  from matplotlib import pyplot

  with style.style():
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout='constrained')
    for number, (name, runs) in enumerate(by_function(stored).items()):
      errors = np.array([[row['error'] for row in rows] for rows in runs])
      counts, mean = [row['labels'] for row in runs[0]], errors.mean(axis=0)
      colour = style.class_colour(number)
      axes.errorbar(
        np.array(counts) + number - 2.5,  # beside one another
        mean,
        style.deviation(errors),
        color=colour,
        label=name,
        linewidth=1,
        elinewidth=0.8,
        capsize=2,
      )
    axes.set(xlabel='labels', ylabel='test error in %', title=title)
    axes.set_xticks(counts)
    axes.legend(frameon=False)
    path.write_bytes(style.as_png(figure))


def main() -> None:
  """Simulate what is missing, and print a table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--set', choices=COUNTS, default='digits')
  parser.add_argument('--data_dir')
  parser.add_argument('--features')
  parser.add_argument(
    '--acquire', default='random,entropy,bald,margin,k_centre,typiclust'
  )
  parser.add_argument('--labels', type=int, default=200)
  parser.add_argument('--every', type=int, default=20)
  parser.add_argument('--seeds', type=int, default=1)
  parser.add_argument('--mistakes', type=float, default=0.02)
  parser.add_argument('--steps', type=int, default=100)
  parser.add_argument('--method', help="the page's default if unset")
  parser.add_argument('--network', help="the page's default if unset")
  parser.add_argument('--out', type=pathlib.Path, default='runs/annotator')
  parser.add_argument('--figure', type=pathlib.Path)
  asked = parser.parse_args()
  if asked.every < 2:
    parser.error(f'--every={asked.every}: a round needs two classes, give 2')
  asked.out.mkdir(parents=True, exist_ok=True)
  record = asked.out / f'{asked.set}.json'
  stored = stored_in(record, asked)
  with tempfile.TemporaryDirectory() as name:
    folder, task = pathlib.Path(name), None
    for seed in range(asked.seeds):
      for acquire in asked.acquire.split(','):
        key = f'{acquire} seed {seed}'
        if key in stored:
          continue
        task = task or draw(folder, asked)
        stored[key] = simulate(folder, task, acquire, seed, asked)
        for row in stored[key]:
          print(describe(key, row), flush=True)
        keep(record, stored, asked)
  print(table(stored))
  if asked.figure:
    plot(stored, TITLES[asked.set], asked.figure)


if __name__ == '__main__':
  main()
