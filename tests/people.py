"""A run with `--oracle=people`, and functions that answer its questions."""

import csv
import subprocess
import sys

import binary

from ssljax.data import datasets

# The run asks at the beginning of the first and of the third iteration.
RUN = (
  '--dataset=digits',
  '--network=deepbass_toy',  # compiles quickly, for images too
  '--labels=1',
  '--seeds=1',
  '--steps=2',
  '--iterations=3',
  '--passes=2',
  '--upsample=2',
  '--query_every=2',
  '--query_size=3',
  '--query_passes=2',
)


def command(folder, *more):
  """Arguments of the run, with an empty flag file instead of a preset."""
  none = folder.parent / 'none.flags'
  none.touch()
  return f'--flagfile={none}', *RUN, *more, f'--workdir={folder}'


def start(folder, *more):
  """Run `experiments/deepbass.py`; return its exit status and last line."""
  done = subprocess.run(
    [
      sys.executable,
      binary.EXPERIMENTS / 'deepbass.py',
      *command(folder, '--oracle=people', *more),
    ],
    capture_output=True,
    text=True,
    env=binary.environment(),
    timeout=300,
  )
  assert 'Traceback' not in done.stderr, done.stderr
  lines = done.stderr.replace('\r', '\n').strip().split('\n')
  return done.returncode, lines[-1]


def answers(folder, number):
  """The CSV file to fill in for a question."""
  return folder / f'questions/seed-0/batch-{number:04d}/answers.csv'


def read(path):
  with open(path, newline='', encoding='utf-8') as file:
    return list(csv.DictReader(file))


def fill_in(path, change=lambda place, label: label):
  """Write the true labels, changed by a function, into a CSV file."""
  truth = datasets.load('digits').train.labels
  rows = read(path)
  with open(path, 'w', newline='', encoding='utf-8') as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    for place, row in enumerate(rows):
      label = str(truth[int(row['row'])])
      writer.writerow(row | {'label': change(place, label)})
  return [int(row['row']) for row in rows]
