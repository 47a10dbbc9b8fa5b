"""Plants faults in a copy of the package and runs the tests that should fail.

    python tools/mutate.py [--only=WORD] [--list] [--jobs=1] [--unchecked]

`mutations.toml` beside this file is the table of faults. Each one is

  file   the file to change
  what   the fault in one line
  old    text that occurs exactly once in the file
  new    text that replaces it
  tests  the tests that should fail: files or nodes of pytest
  group  optional: a word by which `--only` can select faults

First all these tests run in an unchanged copy, where they must pass. Then each
fault is planted in the copy, never in the working tree, and its tests run until
one fails. The table shows for each fault

  noticed by TEST   a test failed, or hung for ten minutes
  SURVIVED          all tests passed: a test is missing
  INVALID           the changed file cannot be imported, or no test ran

and its last line the kill rate. The exit status is 1 if a fault survived or is
invalid, and 2 if the table does not fit the files any more.
"""

import argparse
import ast
import collections
from concurrent import futures
import itertools
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLE = pathlib.Path(__file__).with_name('mutations.toml')
LIMIT_SECONDS = 600
# A fault whose text is wrong Python proves nothing about the tests.
INVALID = {
  'ImportError',
  'ModuleNotFoundError',
  'NameError',
  'SyntaxError',
  'UnboundLocalError',
}
NOTICED, SURVIVED = 'noticed by', 'SURVIVED'
SKIPPED = 'INVALID'

# Imports everything that no fault changes, once; then forks a process per line
# of its input, [tests, first_only], which runs the tests and writes the status
# of pytest and the failures: tests and the types of their exceptions. The
# finder makes programs import `ssljax.experiments` of the copy, not that of an
# editable installation; `sitecustomize` does the same in their subprocesses.
SERVER = """
import json
import os
import sys

import sitecustomize

import chex
import dm_pix
import flax.linen
import flax.nnx
import jax
import optax
import orbax.checkpoint
import pytest
import scipy.special
import tensorboardX
import tqdm


class Report:

  def __init__(self):
    self.failures = []

  def pytest_exception_interact(self, node, call):
    self.failures.append([node.nodeid, call.excinfo.typename])


def run(tests, first_only):
  options = ['-n0', '-q', '--tb=no', '-p', 'no:cacheprovider', '-m', '']
  options += ['-x'] if first_only else []
  report = Report()
  status = int(pytest.main([*options, *tests], plugins=[report]))
  return [status, report.failures]


answers = os.dup(1)
os.dup2(2, 1)
sys.path.insert(0, os.getcwd())
for line in sys.stdin:
  child = os.fork()
  if not child:
    os.setpgid(0, 0)
    os.write(answers, (str(os.getpid()) + chr(10)).encode())
    found = run(*json.loads(line))
    os.write(answers, (json.dumps(found) + chr(10)).encode())
    os._exit(0)
  if os.waitpid(child, 0)[1]:
    os.write(answers, (json.dumps([-1, []]) + chr(10)).encode())
"""

SITE = """
import importlib.util
import os
import sys

HERE = os.environ['MUTATED_ROOT']


class Finder:

  @staticmethod
  def find_spec(name, path=None, target=None):
    if name in ('ssljax', 'ssljax.experiments'):
      folder = os.path.join(HERE, name.rpartition('.')[2])
      return importlib.util.spec_from_file_location(
        name,
        os.path.join(folder, '__init__.py'),
        submodule_search_locations=[folder],
      )


sys.meta_path.insert(0, Finder)
"""


class Fault(NamedTuple):
  """A row of the table."""

  file: str
  what: str
  old: str
  new: str
  tests: tuple[str, ...]
  group: str = ''

  def matches(self, word: str) -> bool:
    """True if the word occurs in the file, the description or the group."""
    return any(word in text for text in (self.file, self.what, self.group))


class Outcome(NamedTuple):
  """The result of the tests of a fault."""

  kind: str
  detail: str = ''

  def __str__(self):
    return f'{self.kind} {self.detail}'.strip()


def read_table(path: pathlib.Path) -> list[Fault]:
  """Return the faults of a table; exit if one does not fit its file."""
  rows = tomllib.loads(path.read_text())['fault']
  faults = [Fault(**row | {'tests': tuple(row['tests'])}) for row in rows]
  problems = [p for fault in faults for p in problems_of(fault)]
  names = collections.Counter((fault.file, fault.what) for fault in faults)
  for (file, what), count in names.items():
    if count > 1:
      problems.append(f'{file}: {what}: described {count} times')
  if problems:
    print(*problems, sep='\n', file=sys.stderr)
    sys.exit(2)
  return faults


def problems_of(fault: Fault) -> list[str]:
  """Return the reasons why a fault cannot be planted."""
  where = f'{fault.file}: {fault.what}'
  try:
    text = (ROOT / fault.file).read_text()
  except OSError as error:
    return [f'{where}: {error.strerror}']
  problems = []
  count = text.count(fault.old)
  if count != 1:
    problems.append(f'{where}: the old text occurs {count} times, not once')
  try:
    ast.parse(text.replace(fault.old, fault.new))
  except SyntaxError as error:
    problems.append(f'{where}: the new text is wrong Python ({error.msg})')
  if fault.old == fault.new:
    problems.append(f'{where}: the new text is the old one')
  for test in fault.tests:
    name = test.partition('::')
    if not (ROOT / name[0]).is_file():
      problems.append(f'{where}: there is no {name[0]}')
    elif f'def {name[2].partition("[")[0]}' not in (ROOT / name[0]).read_text():
      problems.append(f'{where}: {name[0]} has no {name[2]}')
  if not fault.tests:
    problems.append(f'{where}: no test is named')
  return problems


class Copy:
  """A copy of the working tree in which faults are planted."""

  def __init__(self, folder: pathlib.Path):
    """Copy all files that git does not ignore."""
    self.root, self._site = folder / 'tree', folder / 'site'
    listed = subprocess.run(
      ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
      cwd=ROOT,
      check=True,
      capture_output=True,
      text=True,
    ).stdout
    for name in filter(None, listed.split('\0')):
      source, target = ROOT / name, self.root / name
      if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    self._site.mkdir()
    (self._site / 'sitecustomize.py').write_text(SITE)
    self._server = None

  def close(self) -> None:
    """End the server."""
    if self._server:
      self._server.stdin.close()
      self._server.wait()

  def run(self, tests, first_only: bool = True) -> tuple[int, list]:
    """Run tests.

    Returns:
      The status of pytest, and [test, exception] for each failure.

    Raises:
      TimeoutError: they took too long.
    """
    server = self._server = self._server or self._start()
    server.stdin.write(json.dumps([tests, first_only]) + '\n')
    server.stdin.flush()
    child = int(server.stdout.readline())
    limit = threading.Timer(
      LIMIT_SECONDS if first_only else 10 * LIMIT_SECONDS,
      os.killpg,
      (child, signal.SIGKILL),
    )
    limit.start()
    status, failed = json.loads(server.stdout.readline())
    limit.cancel()
    if status == -1:
      raise TimeoutError
    return status, failed

  def _start(self) -> subprocess.Popen:
    path = filter(None, [str(self._site), os.environ.get('PYTHONPATH')])
    environment = {
      'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.jax_cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PLATFORMS': 'cpu',
    } | os.environ
    environment |= {
      'PYTHONPATH': os.pathsep.join(path),
      'MUTATED_ROOT': str(self.root),
    }
    return subprocess.Popen(
      [sys.executable, '-c', SERVER],
      cwd=self.root,
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )

  def try_fault(self, fault: Fault) -> Outcome:
    """Plant a fault, run its tests, and remove it."""
    path = self.root / fault.file
    text = path.read_text()
    try:
      self._write(path, text.replace(fault.old, fault.new))
      return outcome(*self.run(fault.tests))
    except TimeoutError:
      return Outcome(NOTICED, 'a crash or the time limit')
    finally:
      self._write(path, text)

  def _write(self, path: pathlib.Path, text: str) -> None:
    """Write a file, and remove its compiled form, which would look current."""
    path.write_text(text)
    for compiled in path.parent.glob(f'__pycache__/{path.stem}.*.pyc'):
      compiled.unlink()


def outcome(status: int, failed: list) -> Outcome:
  """Return the outcome of pytest's status and the failed tests."""
  if status == 0:
    return Outcome(SURVIVED)
  if not failed:
    return Outcome(SKIPPED, f'(no test ran: pytest ended with {status})')
  test, exception = failed[0]
  if exception in INVALID or '::' not in test:
    return Outcome(SKIPPED, f'({exception} in {test})')
  return Outcome(NOTICED, test.removeprefix('tests/'))


def check_unchanged(copy: Copy, faults: list[Fault]) -> None:
  """Exit if a test of a fault fails without any fault."""
  tests = sorted({test for fault in faults for test in fault.tests})
  start = time.monotonic()
  status, failed = copy.run(tests, first_only=False)
  if status:
    for test, exception in failed:
      print(f'{test}: fails without a fault ({exception})', file=sys.stderr)
    print(f'pytest ended with {status}', file=sys.stderr)
    sys.exit(2)
  seconds = time.monotonic() - start
  print(f'{len(tests)} tests or files pass without a fault ({seconds:.0f} s)')


def show(fault: Fault, found: Outcome) -> None:
  """Print a row of the table of outcomes."""
  print(f'{fault.file:34} {fault.what}\n{"":34} {found}', flush=True)


def run_all(
  faults: list[Fault], jobs: int, unchecked: bool
) -> dict[Fault, Outcome]:
  """Try all faults and return their outcomes."""
  with tempfile.TemporaryDirectory(prefix='mutate-') as folder:
    free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    copies = []
    for number in range(jobs):
      (pathlib.Path(folder) / str(number)).mkdir()
      copies.append(Copy(pathlib.Path(folder) / str(number)))
    if not unchecked:
      check_unchanged(copies[0], faults)
    for copy in copies:
      free.put(copy)

    def attempt(fault):
      copy = free.get()
      try:
        return copy.try_fault(fault)
      finally:
        free.put(copy)

    found = {}
    with futures.ThreadPoolExecutor(jobs) as pool:
      for fault, result in zip(faults, pool.map(attempt, faults), strict=True):
        show(fault, result)
        found[fault] = result
    for copy in copies:
      copy.close()
  return found


def summary(found: dict[Fault, Outcome]) -> str:
  """Return the number of faults and of those noticed, by package and in all."""

  def of(name, kinds):
    noticed = kinds.count(NOTICED)
    share = f'{100 * noticed / len(kinds):5.1f} %'
    return f'{name:28} {noticed:4} of {len(kinds):3} noticed {share}'

  package = lambda fault: str(pathlib.PurePath(fault.file).parent)
  faults = sorted(found, key=package)
  lines = [
    of(name, [found[fault].kind for fault in group])
    for name, group in itertools.groupby(faults, package)
  ]
  return '\n'.join([*lines, of('all', [o.kind for o in found.values()])])


def main() -> int:
  """Run the program and return its exit status."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--only',
    default='',
    help='part of the file, the description or the group of the faults to try',
  )
  parser.add_argument('--list', action='store_true', help='list the faults')
  parser.add_argument(
    '--jobs', type=int, default=1, help='faults to try at once'
  )
  parser.add_argument(
    '--unchecked',
    action='store_true',
    help='do not run the tests without a fault, because they just passed',
  )
  asked = parser.parse_args()
  faults = [f for f in read_table(TABLE) if f.matches(asked.only)]
  if not faults:
    parser.error(f'--only={asked.only}: there is no such fault')
  if asked.list:
    for fault in faults:
      print(f'{fault.file:34} {fault.what}')
    print(len(faults), 'faults')
    return 0
  found = run_all(faults, max(1, asked.jobs), asked.unchecked)
  print(summary(found))
  return int(any(o.kind != NOTICED for o in found.values()))


if __name__ == '__main__':
  sys.exit(main())
