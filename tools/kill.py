"""Kill runs at random moments, resume them, and compare with whole runs.

    python tools/kill.py [--kills=30] [--seed=0] [--method=llp] [--jobs=2]

Every method is first trained without interruption. Then runs with the same
settings are killed (SIGKILL) again and again, started anew by the same command
each time, and at last left to end. A third of the kills each are placed

  moment      at a random moment of the start or of the training
  checkpoint  up to 50 ms after a checkpoint has begun to be written
  result      while `result.json` is being written, by a process whose `fsync`
              takes 50 ms, as on a slow disk

The table shows how many kills left an unfinished checkpoint or an unfinished
file of the run's folder, thus came inside a write, and how many bits differ
from the whole run: in the lines of `metrics.jsonl` and in `result.json` (both
without times), in the progress and in every array of the last checkpoints.

The exit status is 1 if anything differs, fails, hangs or is left behind.
"""

import argparse
import collections
from concurrent import futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import random
import runpy
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEADLINE = 900.0  # seconds of a process
SLOW = 0.05  # seconds of an `fsync` of the kind 'result'
KINDS = 'moment', 'checkpoint', 'result'
COMMON = ['--seeds=1', '--record_every=5', '--checkpoint_seconds=0']
METHODS = {
  'supervised': ['--steps=60'],
  'madnn': ['--steps=60'],  # and its baseline: a second job
  'association': ['--steps=60', '--nobaseline'],
  'r2d2': [
    *('--pretrain=30', '--steps=30', '--repeat=20', '--interval=10'),
    '--finetune=10',
  ],
  'llp': ['--warm=20', '--steps=40', '--nobaseline'],
  'deepbass': ['--steps=20', '--iterations=4', '--nobaseline'],
}
# Fields that differ between equal runs: times, and what depends on them. The
# commit changes when somebody works on the code in the meantime.
TIMES = (  # and `metrics_writer.TIMING`
  *('started', 'goodput', 'compiling', 'command', 'commit'),
  *('metrics_bytes', 'metrics_digest', 'digest'),
  *('spent', 'seconds_of', 'goodput_parts'),
)
UNFINISHED = 'orbax-checkpoint-tmp', '.partial'


@dataclasses.dataclass
class Kill:
  """A kill and what it hit."""

  method: str
  kind: str
  inside: str = ''  # 'checkpoint' or the name of a file, if inside its write


# Processes.


def command(method: str, folder: pathlib.Path, slow: bool) -> list[str]:
  """Return the command that trains a run, or resumes it."""
  script = f'{ROOT}/experiments/{method}.py'
  begin = [__file__, '--child'] if slow else []
  settings = [*COMMON, *METHODS[method], f'--workdir={folder}']
  return [sys.executable, *begin, script, *settings]


def child(script: str, *arguments: str) -> None:
  """Run a program with a slow disk, in this process."""
  fsync = os.fsync

  def slow(descriptor):
    time.sleep(SLOW)
    fsync(descriptor)

  os.fsync, sys.argv = slow, [script, *arguments]
  sys.path[0] = os.path.dirname(script)
  runpy.run_path(script, run_name='__main__')


@contextlib.contextmanager
def started(method: str, folder: pathlib.Path, slow: bool = False):
  """Start a run, and kill it at the end of the block.

  Yields:
    The process; its output is in `folder.log`.
  """
  cache = folder.parent / f'{method}.cache'
  environment = {'JAX_COMPILATION_CACHE_DIR': str(cache)} | os.environ
  environment |= {
    'JAX_PLATFORMS': 'cpu',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path]),
  }
  with open(f'{folder}.log', 'a') as log:
    process = subprocess.Popen(
      command(method, folder, slow),
      stdout=log,
      stderr=log,
      stdin=subprocess.DEVNULL,
      cwd=folder.parent,
      env=environment,
    )
  try:
    yield process
  finally:
    process.kill()
    process.wait()


def finish(method: str, folder: pathlib.Path) -> str:
  """Train a run to its end, and return '' or the problem."""
  with started(method, folder) as process:
    try:
      status = process.wait(DEADLINE)
    except subprocess.TimeoutExpired:
      return 'a hang'
  log = pathlib.Path(f'{folder}.log').read_text()
  lines = [line for line in log.splitlines() if line.strip()]
  return '' if status == 0 else f'status {status}: {lines[-1][:300]}'


# Kills.


def unfinished(folder: pathlib.Path) -> set[pathlib.Path]:
  """Return the files and checkpoints whose writing was not finished."""
  return {
    path
    for pattern in ('*', 'checkpoints/*/*/*')
    for path in folder.glob(pattern)
    if any(mark in path.name for mark in UNFINISHED)
  }


def size(folder: pathlib.Path) -> int:
  """Return the bytes of the measurements of a run."""
  with contextlib.suppress(FileNotFoundError):
    return (folder / 'metrics.jsonl').stat().st_size
  return 0


def is_writing(kind: str, folder: pathlib.Path) -> bool:
  """Return True while a process writes a checkpoint, or the result."""
  if kind == 'result':
    return any(n.startswith('result.json.') for n in _names(folder))
  return any(
    UNFINISHED[0] in name
    for job in _names(folder / 'checkpoints')
    for seed in _names(folder / 'checkpoints' / job)
    for name in _names(folder / 'checkpoints' / job / seed)
  )


def _names(folder: pathlib.Path) -> list[str]:
  with contextlib.suppress(OSError):
    return os.listdir(folder)
  return []


def kill(kind: str, method, folder, whole: int, rng) -> str | None:
  """Start a run and kill it; return what was being written.

  Args:
    kind: of `KINDS`.
    method: its name.
    folder: of the run.
    whole: bytes of the measurements of the whole run.
    rng: random numbers.

  Returns:
    '' outside a write, None if the run ended before the kill.
  """
  before = unfinished(folder)
  for path in before:  # Or they would be taken for those of this process.
    if path.name.startswith('result.json.'):
      path.unlink()
  done = size(folder)
  target = rng.uniform(done, whole)
  if kind == 'result':  # at the start of the run, or at its end
    target = rng.choice([0, 0.97 * whole])
  at_start = kind == 'moment' and rng.random() < 0.2
  delay = {'moment': 0.5, 'checkpoint': 0.05, 'result': SLOW / 2}[kind]
  delay = rng.uniform(0, 10 if at_start else delay)
  deadline = time.monotonic() + DEADLINE
  with started(method, folder, kind == 'result') as process:
    while not at_start and process.poll() is None:
      if size(folder) >= target and (
        kind == 'moment' or is_writing(kind, folder)
      ):
        break
      if time.monotonic() > deadline:
        raise TimeoutError(f'{method}: no {kind} to kill it in')
      time.sleep(0.004)
    time.sleep(delay)
    if process.poll() is not None:
      return None
  left = unfinished(folder) - before
  names = {
    'checkpoint' if UNFINISHED[0] in path.name else path.name.split('.json')[0]
    for path in left
  }
  return ' '.join(sorted(names))


# Comparison.


def without_times(tree):
  """Return JSON values without those that differ between equal runs."""
  from ssljax.training.metrics_writer import TIMING

  if isinstance(tree, dict):
    left_out = {*TIMES, *TIMING}
    return {k: without_times(v) for k, v in tree.items() if k not in left_out}
  return [without_times(v) for v in tree] if isinstance(tree, list) else tree


def content(folder: pathlib.Path) -> dict[str, str]:
  """Return everything that equal runs have in common, by name."""
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  found = {
    f'metrics line {number}': json.dumps(without_times(json.loads(line)))
    for number, line in enumerate(lines, 1)
  }
  for name in ('result.json', 'split.json'):
    tree = without_times(json.loads((folder / name).read_text()))
    found |= {f'{name} {k}': json.dumps(v) for k, v in tree.items()}
  for checkpoints in sorted(folder.glob('checkpoints/*/*')):
    steps = [p for p in checkpoints.iterdir() if p.name.isdigit()]
    newest = max(steps, key=lambda p: int(p.name))
    name = str(newest.relative_to(folder))
    found |= {f'{name} {k}': v for k, v in arrays(newest).items()}
    text = (newest / 'progress/metadata').read_text()
    found[f'{name} progress'] = json.dumps(without_times(json.loads(text)))
  return found


def arrays(step: pathlib.Path) -> dict[str, str]:
  """Return the SHA-256 of every array of a checkpoint by name."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  tree = ocp.StandardCheckpointer().restore(step / 'state')
  found = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    x = np.asarray(x)
    text = f'{x.dtype}{x.shape}'.encode() + x.tobytes()
    found[jax.tree_util.keystr(path)] = hashlib.sha256(text).hexdigest()
  return found


def differences(whole: dict[str, str], folder: pathlib.Path) -> list[str]:
  """Return the names of what differs in a run from the whole one."""
  here = content(folder)
  names = [n for n in whole | here if whole.get(n) != here.get(n)]
  damaged = folder.rglob('damaged-*')
  return [*names, *map(str, [*damaged, *unfinished(folder)])]


# The attack.


def attack(method: str, kinds: list[str], base: pathlib.Path, seed: int):
  """Kill the runs of a method.

  Args:
    method: its name.
    kinds: a kill of each of them.
    base: folder for the runs.
    seed: of the random moments.

  Returns:
    The kills, the faults, and the number of values compared.
  """
  rng, kills, faults, compared = random.Random(f'{seed} {method}'), [], [], 0
  whole = base / f'{method}-whole'
  began = time.time()
  if problem := finish(method, whole):
    return [], [f'{method}, not killed: {problem}'], 0
  expected, length = content(whole), size(whole)
  print(f'{method} whole, {time.time() - began:.0f} s', file=sys.stderr)
  waiting, number = list(kinds), 0
  while waiting:
    number += 1
    folder, chain = base / f'{method}-{number}', rng.randint(2, 4)
    while waiting and chain:
      try:
        inside = kill(waiting[0], method, folder, length, rng)
      except TimeoutError as error:
        return kills, [*faults, str(error)], compared
      if inside is None:
        break  # It ended: the kill comes into another run.
      kills.append(Kill(method, waiting.pop(0), inside))
      print(f'{kills[-1]}', file=sys.stderr, flush=True)
      chain -= 1
    if problem := finish(method, folder):
      faults.append(f'{method} run {number}: {problem}')
      continue
    differ = differences(expected, folder)
    faults += [f'{method} run {number}: {name} differs' for name in differ]
    compared += len(expected)
  return kills, faults, compared


def plan(count: int, methods: list[str], seed: int) -> dict[str, list[str]]:
  """Return the kinds of kills of every method."""
  kinds = [KINDS[(i + seed) % len(KINDS)] for i in range(count)]
  found = collections.defaultdict(list)
  for i, kind in enumerate(kinds):
    found[methods[(i // len(KINDS)) % len(methods)]].append(kind)
  for each in found.values():
    random.Random(seed).shuffle(each)
  return found


def report(kills: list[Kill], faults: list[str], compared: int) -> None:
  """Print the table and the faults."""
  print('method | kills | placed in | inside a write | of')
  for method in [*dict.fromkeys(k.method for k in kills), '']:
    here = [k for k in kills if method in ('', k.method)]
    placed = collections.Counter(k.kind for k in here)
    inside = collections.Counter(k.inside for k in here if k.inside)
    print(
      method or 'all',
      len(here),
      ', '.join(f'{n} {k}' for k, n in sorted(placed.items())),
      sum(inside.values()),
      ', '.join(f'{n} {k}' for k, n in sorted(inside.items())),
      sep=' | ',
    )
  print(f'{compared} values compared, {len(faults)} faults', *faults, sep='\n')


def main() -> int:
  """Kill as the arguments say; return 1 if there is a fault."""
  if sys.argv[1:2] == ['--child']:
    child(*sys.argv[2:])
    return 0
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=30)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--method', action='append', choices=METHODS)
  parser.add_argument('--jobs', type=int, default=2, help='methods at a time')
  asked = parser.parse_args()
  began = time.time()
  kinds = plan(asked.kills, asked.method or list(METHODS), asked.seed)
  with (
    tempfile.TemporaryDirectory() as made,
    futures.ThreadPoolExecutor(asked.jobs) as pool,
  ):
    base = pathlib.Path(made)
    ends = pool.map(lambda item: attack(*item, base, asked.seed), kinds.items())
    kills, faults, compared = zip(*ends, strict=True)
  kills = list(itertools.chain(*kills))
  faults = list(itertools.chain(*faults))
  report(kills, faults, sum(compared))
  print(f'seed {asked.seed}, {time.time() - began:.0f} s')
  return int(bool(faults) or len(kills) < asked.kills)


if __name__ == '__main__':
  sys.exit(main())
