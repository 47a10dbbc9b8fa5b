"""Measure how long a run takes to its first training step, cold and warm.

python experiments/benchmarks/start_speed.py --rounds=3

A cold start compiles everything; a warm one reads compiled programs from the
cache of the cold start before it. Seconds of the wall clock depend on what else
the machine does; those of the CPU do so less.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

_FLAGS = ('--steps=6', '--nobaseline', '--seeds=1')
_SCRIPT = pathlib.Path(__file__).parents[1] / 'madnn.py'


def start(cache: pathlib.Path, flags: list[str]) -> dict[str, float]:
  """Run a program once, and return seconds and the peak of its memory.

  Args:
    cache: the user's cache folder.
    flags: of the program.

  Returns:
    'first': seconds to the first training step; 'whole': to the end; 'cpu':
    seconds of the CPU to the end; 'mib': peak of the resident memory.
  """
  environment = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith('JAX_COMPILATION_CACHE')
  } | {'XDG_CACHE_HOME': str(cache)}
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, str(_SCRIPT), *flags, f'--workdir={folder}/run']
    began = time.time()
    process = subprocess.Popen(
      command, env=environment, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    whole = time.time() - began
    if process.returncode:
      raise subprocess.CalledProcessError(process.returncode, command)
    lines = (pathlib.Path(folder) / 'run' / 'metrics.jsonl').read_text()
    first = json.loads(lines.splitlines()[0])['time'] - began
  return {
    'first': first,
    'whole': whole,
    'cpu': usage.ru_utime + usage.ru_stime,
    'mib': usage.ru_maxrss / 1024,
  }


def main(rounds: int, flags: list[str]) -> None:
  """Print the measurements of some rounds, and their medians."""
  found = {'cold': [], 'warm': []}
  for _ in range(rounds):
    with tempfile.TemporaryDirectory() as cache:
      for kind, measured in found.items():
        measured.append(start(pathlib.Path(cache), flags))
        print(kind, {k: round(v, 1) for k, v in measured[-1].items()})
  for kind, measured in found.items():
    middle = {
      name: round(statistics.median(each[name] for each in measured), 1)
      for name in measured[0]
    }
    print('median', kind, middle)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=3)
  given, others = parser.parse_known_args()
  main(given.rounds, others or list(_FLAGS))
