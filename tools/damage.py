"""Damages every file of an interrupted run and resumes it, over and over.

    python tools/damage.py [--seed=0] [--only=WORD]

A small run is interrupted. Then, for every file of its folder and every kind of
damage, a copy with that damage is resumed. The table shows the outcomes:

  same      ended like the run that nothing happened to
  older     likewise, from an older checkpoint; the damaged one was kept
  metrics   likewise, and the missing measurements were reported
  refused   one line (`InputError`)
  error     any other exception: a fault
  changed   another result, or an unreported change: a fault
  hang      no end within five minutes: a fault

The exit status is 1 if there is a fault.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import select
import shutil
import subprocess
import sys
import tempfile
import warnings

LIMIT_SECONDS = 300
STEPS, STOP = 12, 9
RUN_FILES = (
  *('config.json', 'flags.txt', 'split.json', 'result.json'),
  'metrics.jsonl',
)
FAULTS = 'error', 'changed', 'hang'


def damages(rng):
  """Return the kinds of damage: name -> function of a path."""

  def to_length(length):
    def act(path):
      content = path.read_bytes()
      size = len(content)
      path.write_bytes(content[: length(size)])

    return act

  def flip(place):
    def act(path):
      content = bytearray(path.read_bytes())
      if content:
        at = min(int(place * len(content)), len(content) - 1)
        content[at] ^= 1 << rng.randrange(8)
      path.write_bytes(content)

    return act

  def replace(make):
    def act(path):
      path.unlink()
      make(path)

    return act

  kinds = {
    'emptied': to_length(lambda size: 0),
    'one byte': to_length(lambda size: 1),
    '100 bytes': to_length(lambda size: min(100, size - 1)),
    'half': to_length(lambda size: size // 2),
    'all but one': to_length(lambda size: size - 1),
    'random bytes': lambda path: path.write_bytes(
      rng.randbytes(path.stat().st_size)
    ),
    'bit at start': flip(0),
    'bit in middle': flip(0.5),
    'bit at end': flip(1),
    'removed': lambda path: path.unlink(),
    'folder': replace(lambda path: path.mkdir()),
    'fifo': replace(os.mkfifo),
    'dangling link': replace(lambda path: path.symlink_to('nowhere')),
  }
  if os.geteuid() != 0:  # root may read everything
    kinds['unreadable'] = lambda path: path.chmod(0)
  return kinds


# The worker: resumes runs in its own process, which may hang.


def fit(folder, stop=None):
  """Train the small run in a folder, or resume it; return its result."""
  import numpy as np

  import ssljax

  rng = np.random.default_rng(0)
  images = rng.integers(0, 255, (40, 6, 6, 1), dtype=np.uint8)
  labels = np.arange(40) % 2

  def interrupt(measurement):
    if stop and measurement['step'] >= stop:
      raise KeyboardInterrupt

  model = ssljax.fit(
    images,
    labels,
    test=(images[:20], labels[:20]),
    method='madnn',
    network='deepbass_toy',
    batch_labelled=8,
    batch_unlabelled=8,
    steps=STEPS,
    record_every=2,
    evaluate_every=4,
    checkpoint_seconds=0,
    workdir=folder,
    progress=False,
    callbacks=[interrupt],
  )
  return model.result


def work():
  """Resume every folder named on standard input; print outcomes as JSON."""
  warnings.simplefilter('ignore')
  out, sys.stdout = sys.stdout, sys.stderr
  for line in sys.stdin:
    folder = pathlib.Path(line.strip())
    print(json.dumps(resume(folder)), file=out, flush=True)


def resume(folder):
  """Return how a run ends: kind, last line, and what it has recorded."""
  import jax

  from ssljax.errors import InputError

  jax.clear_caches()  # hundreds of runs would fill the memory
  try:
    result = fit(folder)
  except InputError as error:
    kind = 'refused' if '\n' not in str(error) else 'error'
    return {'kind': kind, 'said': str(error)}
  # A worker reports every error, whatever it is.
  except Exception as error:
    return {'kind': 'error', 'said': f'{type(error).__name__}: {error}'}
  return {'kind': 'ended', 'result': result}


class Worker:
  """A process that resumes runs, and is replaced when it hangs."""

  def __init__(self, log):
    """Start nothing yet."""
    self.process, self.log = None, log

  def resume(self, folder):
    """Return the outcome of a folder."""
    if self.process is None:
      self.process = subprocess.Popen(
        [sys.executable, __file__, '--work'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=self.log,
        text=True,
      )
    self.process.stdin.write(f'{folder}\n')
    self.process.stdin.flush()
    ready, _, _ = select.select([self.process.stdout], [], [], LIMIT_SECONDS)
    line = self.process.stdout.readline() if ready else ''
    if line:
      return json.loads(line)
    self.close()
    return {'kind': 'error' if ready else 'hang', 'said': 'no answer'}

  def close(self):
    """End the process."""
    if self.process:
      self.process.kill()
      self.process.wait()
    self.process = None


# The matrix.


def measured(folder):
  """Return the measurements of a run without their times."""
  from ssljax.training.metrics_writer import TIMING

  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  values = map(json.loads, lines)
  return [{k: v for k, v in m.items() if k not in TIMING} for m in values]


def classify(outcome, folder, whole, whole_result):
  """Return one word for the outcome of a damaged run."""
  if outcome['kind'] != 'ended':
    return outcome['kind']
  result = outcome['result']
  if result['test_error'] != whole_result['test_error']:
    return 'changed'
  if measured(folder) != measured(whole):
    return 'metrics' if 'metrics_missing' in result else 'changed'
  return 'older' if list(folder.rglob('damaged-*')) else 'same'


def kind_of(path):
  """Return a short name of a file: names of data files are hashes."""
  parts = ['HASH' if len(p) == 32 else p for p in path.parts]
  return '/'.join(p for p in parts if p not in ('madnn', 'seed-0'))


def run_matrix(base, seed, only, log):
  """Yield (file, damage, outcome, message) of every combination."""
  worker = Worker(log)
  whole, begun = base / 'whole', base / 'begun'
  expected = worker.resume(whole)['result']
  worker.close()
  with contextlib.suppress(KeyboardInterrupt):
    fit(begun, STOP)
  steps = (begun / 'checkpoints' / 'madnn' / 'seed-0').iterdir()
  newest = max(steps, key=lambda p: int(p.name))
  paths = [begun / name for name in RUN_FILES]
  paths += sorted(p for p in newest.rglob('*') if p.is_file())
  for path in paths:
    inside = path.relative_to(begun)
    for name, act in damages(random.Random(seed)).items():
      if only not in f'{inside} {name}':
        continue
      copy = base / 'copy'
      shutil.rmtree(copy, ignore_errors=True)
      shutil.copytree(begun, copy)
      act(copy / inside)
      outcome = worker.resume(copy)
      found = classify(outcome, copy, whole, expected)
      yield kind_of(inside), name, found, outcome.get('said', '')
  worker.close()


def main():
  """Print the table, and every fault."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', default='', help='part of FILE DAMAGE')
  parser.add_argument('--work', action='store_true', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.work:
    return work()
  table, faults = collections.defaultdict(dict), []
  with tempfile.TemporaryDirectory() as name:
    base = pathlib.Path(name)
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(base / 'cache'))
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    with open(base / 'log', 'w') as log:
      for row in run_matrix(base, options.seed, options.only, log):
        file, damage, outcome, said = row
        print(f'{file}, {damage}: {outcome}', file=sys.stderr, flush=True)
        table[file].setdefault(damage, []).append(outcome)
        if outcome in FAULTS:
          faults.append(f'{outcome}: {file}, {damage}: {said[:200]}')
  kinds = list(damages(random.Random(0)))
  print('file', *kinds, sep=' | ')
  for file, by_damage in table.items():
    cells = [' '.join(sorted({*by_damage.get(k, ())})) for k in kinds]
    print(file, *cells, sep=' | ')
  count = sum(len(o) for row in table.values() for o in row.values())
  print(f'{count} damages, {len(faults)} faults', *faults, sep='\n')
  return 1 if faults else 0


if __name__ == '__main__':
  sys.exit(main())
