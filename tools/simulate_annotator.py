"""Label digits over HTTP as a person with some mistakes would.

python tools/simulate_annotator.py --acquire=random,entropy --labels=160

Starts `ssljax label` on scikit-learn's digits for each acquisition function and
seed, and prints the true error of the published predictions against the number
of labels, the page's own estimate, and the seconds of a round.
"""

import argparse
import pathlib
import random
import tempfile
import time

import numpy as np
from page_speed import Program
import PIL.Image

from ssljax.active.page import suggestions


def draw(root: pathlib.Path) -> dict[str, str]:
  """Write the images; return the class of each file."""
  from sklearn import datasets

  digits, truth = datasets.load_digits(), {}
  root.mkdir()
  for k, image in enumerate(digits.images):
    pixels = (image * 255 / 16).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(root / f'{k:04d}.png')
    truth[f'{k:04d}.png'] = str(digits.target[k])
  return truth


def true_error(store: pathlib.Path, truth: dict[str, str], labelled) -> float:
  """Return the error of the predictions of images without a label."""
  found = suggestions.Suggestions(store)
  found.refresh()
  wrong = [
    found.of(path).label != truth[path]
    for path in found.by_confidence()
    if path not in labelled
  ]
  return float(np.mean(wrong))


def simulate(folder, images, truth, acquire, seed, asked):
  """Return rows (labels, true error, estimate, seconds)."""
  rng, store = random.Random(seed), folder / f'{acquire}-{seed}'
  program = Program(
    f'--images={images}',
    f'--store={store}',
    f'--acquire={acquire}',
    f'--seed={seed}',
    f'--every={asked.every}',
    f'--steps={asked.steps}',
    f'--method={asked.method}',
    f'--network={asked.network}',
    '--classes=' + ','.join('0123456789'),
  )

  def state():
    return program.ask('/api/state')[1]

  while 'two classes' not in state()['learner'].get('message', ''):
    time.sleep(0.2)
  labelled, rows, rounds = set(), [], 0
  while len(labelled) < asked.labels:
    for _ in range(asked.every):
      (item,) = program.ask('/api/next?who=simulated&count=1')[1]
      label = truth[item['file']]
      if rng.random() < asked.mistakes:
        label = rng.choice([c for c in '0123456789' if c != label])
      answer = item | {'label': label, 'key': item['file']}
      body = {'who': 'simulated', 'answers': [answer]}
      status, said = program.ask('/api/answers', body)
      assert status == 200, said
      labelled.add(item['file'])
    rounds += 1
    while True:
      now = state()
      learner = now['learner']
      if now['round'] == rounds and learner.get('state') == 'waiting':
        break
      assert learner.get('state') != 'failed', learner
      time.sleep(0.2)
    rows.append(
      (
        len(labelled),
        true_error(store, truth, labelled),
        now['error'],
        learner['seconds'],
      )
    )
  program.end()
  return rows


def main() -> None:
  """Print a table for each acquisition function."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--acquire', default='random,entropy,margin,typiclust')
  parser.add_argument('--labels', type=int, default=160)
  parser.add_argument('--every', type=int, default=20)
  parser.add_argument('--seeds', type=int, default=1)
  parser.add_argument('--mistakes', type=float, default=0.02)
  parser.add_argument('--steps', type=int, default=100)
  parser.add_argument('--method', default='supervised')
  parser.add_argument('--network', default='mlp')
  asked = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    truth = draw(folder / 'images')
    for acquire in asked.acquire.split(','):
      for seed in range(asked.seeds):
        rows = simulate(folder, folder / 'images', truth, acquire, seed, asked)
        for labels, error, estimate, seconds in rows:
          own = '-'
          if estimate:
            low, high = (100 * estimate[k] for k in ('low', 'high'))
            own = f'{100 * estimate["error"]:.1f} [{low:.1f}, {high:.1f}]'
          print(
            f'{acquire:10} seed {seed}: {labels:4} labels, true error '
            f'{100 * error:5.1f} %, estimated {own} %, round {seconds:.1f} s',
            flush=True,
          )


if __name__ == '__main__':
  main()
