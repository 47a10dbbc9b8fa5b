"""Attack the command-line programs, and print a table of what happened.

python tools/fuzz.py            invalid and extreme values of every flag
python tools/fuzz.py --damage   damaged files in the folder of a finished run
python tools/fuzz.py --program=madnn --program=figures
python tools/fuzz.py --thin=4   at most 4 values of a flag, or damages of a file
                                by a program, in rotation

Every value must be accepted as it is, or refused in one line with exit status
2. A traceback, another exit status, a hang, a crash and a value that the
program changes are faults; the exit status of this script is 1 if there are
any. Most cases run in worker processes that keep JAX loaded and stop where a
program would train or draw; `--fresh=N` starts a new process for every N-th.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import queue
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[1]
MEMORY = 6 * 2**30  # bytes that a worker may add to its address space
DEADLINE = 60.0  # seconds of a case
START = 600.0  # seconds in which a worker starts
TRAINS = 5.0  # seconds that a program may train
GOOD = 'accepted', 'refused', 'waiting'
FAULTS = (
  *('traceback', 'several lines', 'other status', 'hang', 'crash'),
  'silent change',
)

# Values by type of the flag. `{...}` stands for a path made for the case.
NUMBERS = ['', 'ten', '-1', '0', 'nan', 'inf', '2147483648', '9' * 30, '1e308']
TEXTS = [
  '',
  'no such',
  'Zürich\u202e€',
  'a\nb',
  '$x^{',
  'n' * 5000,
  '-1',
  '/proc/x',
  '.',
  '{folder}',
  '{fifo}',
  '{dangling}',
  '{binary}',
  '\udcff',
  '~',
]
VALUES = {
  'int': [*NUMBERS, '1.5', '0x10'],
  'float': [*NUMBERS, '-inf', '1e-320'],
  'bool': ['maybe', '', '2'],
  'enum': ['', 'no such', 'Zürich'],
  'list': ['', ',', 'no such', '1,,2', '-1', '9' * 30, 'nan', 'a\nb'],
  'string': TEXTS,
}
FLAGFILES = [
  *('/bin/ls', '/proc/x', '.', '', '{fifo}', '{dangling}', '{binary}'),
  *('n' * 5000, '/dev/null', '{loop}'),
]
BARE = [
  ['extra'],
  ['--no_such_flag=1'],
  ['--no_such_flag'],
  ['--undefok=x', '--x=1'],
  ['-'],
  ['--=1'],
  ['--'],
]


@dataclasses.dataclass
class Case:
  """A command of a program."""

  program: str
  arguments: list[str]
  what: str  # flag or damaged file
  damage: str = ''  # of that file, a name in `DAMAGES`
  fresh: bool = False  # in a process of its own


# The worker: runs cases in this process.


class Reached(BaseException):
  """A program has accepted its input and would start to work."""


def reach(*args, **kwargs):
  """Stop a program where its work would begin."""
  raise Reached


@contextlib.contextmanager
def stopped_before_work(seen: dict):
  """Stop every program before it trains, compiles, draws or calls another."""
  from ssljax.active import acquisition
  from ssljax.cli import tool, train_command
  from ssljax.experiments.papers import readme_tables
  from ssljax.planning import plan
  from ssljax.runs import execute, load

  start, run = tool.start, train_command.run

  def seen_start(name, define, act, **more):
    def seen_act(asked):
      seen.update(asked)
      act(asked)

    start(name, define, seen_act, **more)

  def seen_run(method, config):
    seen.update(config.values())
    run(method, config)

  with contextlib.ExitStack() as stack:
    for where, name, value in (
      (tool, 'start', seen_start),
      (train_command, 'run', seen_run),
      (execute, 'train', reach),
      (plan, 'make_plan', reach),
      (acquisition, 'sampler', reach),
      (load.Finished, 'sweep', reach),
      (readme_tables, 'PAGES', ()),
      (subprocess, 'Popen', _refuse_process),
    ):
      stack.enter_context(mock.patch.object(where, name, value))
    yield


class _refuse_process(subprocess.Popen):  # noqa: N801
  """Git may be asked for the commit; no program may be started."""

  def __init__(self, command, *args, **kwargs):
    if command[0] != 'git':
      raise Reached
    super().__init__(command, *args, **kwargs)


def run_here(case: Case, whole: bool) -> dict:
  """Run a case in this process and return its outcome.

  Args:
    case: the case.
    whole: let the program do its work.
  """
  seen, out, err = {}, io.StringIO(), io.StringIO()
  argv = [f'{case.program}.py', *case.arguments]
  status, stops = 0, contextlib.nullcontext() if whole else None
  began = time.time()
  try:
    with (
      mock.patch.object(sys, 'argv', argv),
      mock.patch.dict(os.environ),
      stops or stopped_before_work(seen),
      mock.patch.object(sys, 'stdout', out),
      mock.patch.object(sys, 'stderr', err),
    ):
      if case.program == 'load':
        load_model(*case.arguments)
      else:
        path = f'{ROOT}/experiments/{case.program}.py'
        runpy.run_path(path, run_name='__main__')
  except Reached:
    pass
  except SystemExit as stopped:
    status = stopped.code or 0
  except BaseException:
    err.write(traceback.format_exc())
    status = 1
  outcome = judge(case, status, err.getvalue())
  if outcome['kind'] == 'accepted' and (change := changed(case, seen)):
    outcome = {'kind': 'silent change', 'message': change}
  return outcome | {'seconds': time.time() - began}


def load_model(folder: str) -> None:
  """Load a run by the public API, and exit as a program would."""
  import ssljax
  from ssljax.errors import InputError

  try:
    ssljax.load(folder)
  except InputError as error:
    print(f'load: {error}', file=sys.stderr)
    sys.exit(2)


def judge(case: Case, status, error: str) -> dict:
  """Return the kind of an outcome, and the message."""
  lines = [line for line in error.replace('\r', '\n').splitlines() if line]
  last = lines[-1] if lines else ''
  if 'Traceback (most' in error:
    kind = 'traceback'
  elif status == 2:
    named = last.startswith((f'{case.program}: ', 'ssljax'))
    kind = 'refused' if named and len(lines) == 1 else 'several lines'
    last = last if named else '\n'.join(lines)
  else:
    kind = {0: 'accepted', 3: 'waiting'}.get(status, 'other status')
  return {'kind': kind, 'message': last[-400:], 'status': status}


def changed(case: Case, seen: dict) -> str:
  """Return a text if a program holds another value than it was given."""
  for argument in reversed(case.arguments):
    name, _, text = argument.lstrip('-').partition('=')
    if name == case.what and name in seen and '=' in argument:
      same_value = same(seen[name], text)
      return '' if same_value else f'{argument[:80]}: {seen[name]!r}'
  return ''


def same(value, text: str) -> bool:
  """Return True if a value is what a text stands for."""
  if isinstance(value, bool):
    return str(value).lower() == text.lower() or str(int(value)) == text
  if isinstance(value, int):
    return value == int(text, 0)
  if isinstance(value, float):
    number = float(text)
    return value == number or (math.isnan(value) and math.isnan(number))
  if isinstance(value, tuple | list):
    return (
      [str(x) for x in value] == text.split(',')
      or (not value and not text)
      or value == [text]
    )
  return value == text or value == os.path.expanduser(text)


def work(whole: bool) -> None:
  """Run the cases that come in on the standard input, one a line."""
  results = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  with stopped_before_work({}):  # Loads everything before the limit.
    pass
  with open('/proc/self/statm') as file:
    size = int(file.read().split()[0]) * os.sysconf('SC_PAGE_SIZE')
  resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, -1))
  print('ready', file=results, flush=True)
  for line in sys.stdin:
    outcome = run_here(Case(**json.loads(line)), whole)
    results.write(json.dumps(outcome) + '\n')
    results.flush()


# The parent.


class Worker:
  """A process that runs cases, replaced if it hangs or crashes."""

  def __init__(self, folder: pathlib.Path, whole: bool):
    self.folder, self.whole, self.process = folder, whole, None

  def run(self, case: Case, deadline: float) -> dict:
    """Return the outcome of a case."""
    if case.fresh:
      return run_fresh(case, self.folder, deadline)
    if self.process is None:
      self._start()
    try:
      self.process.stdin.write(json.dumps(dataclasses.asdict(case)) + '\n')
      self.process.stdin.flush()
      line = self.lines.get(timeout=deadline)
    except (queue.Empty, BrokenPipeError) as error:
      hangs = isinstance(error, queue.Empty)
      self.stop()
      return {'kind': 'hang' if hangs else 'crash', 'message': ''}
    if not line:
      status = self.process.wait()
      self.stop()
      return {'kind': 'crash', 'message': f'status {status}'}
    return json.loads(line)

  def _start(self) -> None:
    arguments = ['--worker', *(['--whole'] if self.whole else [])]
    self.process = subprocess.Popen(
      [sys.executable, __file__, *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      cwd=self.folder,
      env=environment(self.folder),
    )
    self.lines = queue.Queue()
    threading.Thread(
      target=_pump, args=(self.process.stdout, self.lines), daemon=True
    ).start()
    self.lines.get(timeout=START)

  def stop(self) -> None:
    """End the process."""
    if self.process:
      self.process.kill()
      self.process.wait()
    self.process = None


def _pump(stream, lines: queue.Queue) -> None:
  """Put the lines of a stream, and '' at its end, into a queue."""
  for line in stream:
    lines.put(line)
  lines.put('')


def environment(folder: pathlib.Path) -> dict[str, str]:
  """Return the environment of a program, with a home of its own."""
  return os.environ | {
    'HOME': str(folder / 'home'),
    'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path]),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
  }


def run_fresh(case: Case, folder: pathlib.Path, deadline: float) -> dict:
  """Run a case in a process of its own, which ends once it trains."""
  command = [f'{ROOT}/experiments/{case.program}.py', *case.arguments]
  began = time.time()
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    try:
      process = subprocess.Popen(
        [sys.executable, *map(os.fsencode, command)],
        cwd=folder,
        env=environment(folder) | {'PYTHONUNBUFFERED': '1'},
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
      )
    except (OSError, ValueError) as error:  # The system has no such command.
      return {'kind': 'refused', 'message': str(error)}
    status = _status(process, out, deadline)
    if status is None:
      return {'kind': 'hang', 'message': ''}
    err.seek(0)
    error = err.read().decode(errors='replace')
  return judge(case, status, error) | {'seconds': time.time() - began}


def _status(process, out, deadline: float) -> int | None:
  """Return the exit status, 0 for a program that trains, None for a hang."""
  end, trains = time.monotonic() + deadline, False
  try:
    while (now := time.monotonic()) < end:
      with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(0.1)
      if not trains and b', run folder ' in os.pread(out.fileno(), 2**20, 0):
        trains, end = True, min(end, now + TRAINS)
    return 0 if trains else None
  finally:
    process.kill()
    process.wait()


# The cases of flags.


def kind_of(flag) -> str:
  """Return the key of `VALUES` of an absl flag."""
  kind = flag.flag_type()
  if 'comma separated' in kind or 'list' in kind:
    return 'list'
  for name in ('bool', 'int', 'float', 'enum'):
    if name in kind.replace('string enum', 'enum'):
      return name
  return 'list' if type(flag.parser).__name__ == '_Items' else 'string'


def programs_of_flags() -> dict[str, dict[str, str]]:
  """Return program -> its flags -> their kinds."""
  from absl import flags

  from ssljax import experiments, registry
  from ssljax.cli import commands, main, selected

  found = {}
  for name in registry.METHODS:
    command = main.MethodCommand(name)
    found[name] = {n: kind_of(command.values[n]) for n in command.names}
  for name in commands.TOOLS:
    values = flags.FlagValues()
    module = runpy.run_path(f'{experiments.FOLDER}/{name}.py')
    if name == 'train':
      continue  # the flags are those of the methods
    if name == 'figures':
      from ssljax.experiments.figures import catalogue

      catalogue.define_flags(values)
    elif name == 'plan':
      selected.define_method(values)
      module['_define_flags'](values)
    else:
      module['define_flags'](values)
    found[name] = {n: kind_of(values[n]) for n in values}
  return found


BASES = {
  'compare': ['--methods=supervised', '--seeds=1', '--folder={new}'],
  'plan': ['--method=supervised', '--devices=1'],
  'figures': ['--figure=association/3', '--run={run}'],
  'html_report': ['--run={run}'],
  'label': ['--images={new}', '--export={new}/labels.csv'],
  'probe': ['--run={run}'],
  'propagate': ['--subsamples=1', '--images=6', '--labels=2', '--neighbours=2'],
  'speed': ['--part=mc', '--rounds=1'],
  'device_check': ['--part=bank', '--rows=1000', '--rounds=1'],
  'reproduce': [
    '--runs={new}/runs',
    '--results={new}/results',
    '--budget=cpu',
    '--table=association/1',
    '--rows=1',
  ],
}
# All values of the flags that programs of methods share are tried in this one;
# in the others, two values of each, in rotation; one with --thin.
COMMON = 'supervised'


def thinned(values: list, most: int, number: int) -> list:
  """Return at most so many values, others for every number."""
  if not most or len(values) <= most:
    return values
  first = number * most
  return [values[(first + i) % len(values)] for i in range(most)]


def flag_cases(chosen: list[str], fresh: int, thin: int = 0) -> list[Case]:
  """Return the cases of every flag of the chosen programs.

  Args:
    chosen: names of programs; all if there are none.
    fresh: run every so many-th case in a process of its own.
    thin: most values of a flag; 0 for all.
  """
  found, known, number = [], programs_of_flags(), 0
  common = set(known['supervised'])
  for program, kinds in known.items():
    if chosen and program not in chosen:
      continue
    base = BASES.get(program, ['--workdir={new}/run'])
    for name, kind in kinds.items():
      shared = name in common and program != COMMON and program not in BASES
      number += 1
      most = (1 if thin else 2) if shared else thin
      for value in thinned(VALUES[kind], most, number):
        found.append(Case(program, [*base, f'--{name}={value}'], name))
    for value in thinned(FLAGFILES, thin, number):
      found.append(Case(program, [*base, f'--flagfile={value}'], 'flagfile'))
    for more in thinned(BARE, thin, number):
      found.append(Case(program, [*base, *more], more[0]))
  for case in found[:: fresh or len(found) + 1][1:]:
    case.fresh = True
  for case in found:  # It sets a number of devices, once per process.
    case.fresh |= case.program == 'plan'
  return found


# The cases of damaged files.


def _half(path: pathlib.Path) -> None:
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])


def _replace_by(make):
  def damage(path):
    path.unlink()
    make(path)

  return damage


def _json(change):
  def damage(path):
    if path.suffix != '.json':
      path.write_text(json.dumps(change({'job': 'association'})) + '\n')
    else:
      path.write_text(json.dumps(change(json.loads(path.read_text()))))

  return damage


def _flip(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 3] ^= 0x80  # The text is no longer UTF-8.
  path.write_bytes(content)


DAMAGES = {
  'half': _half,
  'without its last bytes': lambda path: path.write_bytes(
    path.read_bytes()[:-7]
  ),
  'empty': lambda path: path.write_bytes(b''),
  'random bytes': lambda path: path.write_bytes(os.urandom(500)),
  'a flipped bit': _flip,
  'removed': pathlib.Path.unlink,
  'a folder': _replace_by(pathlib.Path.mkdir),
  'a FIFO': _replace_by(os.mkfifo),
  'a dangling link': _replace_by(lambda path: path.symlink_to('nowhere')),
  'a list': lambda path: path.write_text('[1, 2]\n'),
  'null': lambda path: path.write_text('null\n'),
  'nested deeply': lambda path: path.write_text('[' * 200_000),
  'values of another type': _json(lambda tree: dict.fromkeys(tree, 7)),
  'values that are null': _json(lambda tree: dict.fromkeys(tree)),
  'values that are lists': _json(lambda tree: {key: [[]] for key in tree}),
  'values that are objects': _json(
    lambda tree: {key: {'a': {}} for key in tree}
  ),
  'half of its keys': _json(lambda tree: dict(list(tree.items())[::2])),
}
FILES = 'config.json', 'flags.txt', 'split.json', 'metrics.jsonl', 'result.json'
READERS = {
  'figures': ['--figure=association/3', '--run={new}/run'],
  'html_report': ['--run={new}/run'],
  'probe': ['--run={new}/run'],
  'load': ['{new}/run'],
}
STORED = 'run.flags', 'metrics.jsonl', 'result.json'


def damage_cases(chosen: list[str], thin: int = 0) -> list[Case]:
  """Return every damage of every file, for every program that reads it.

  Args:
    chosen: names of programs; all if there are none.
    thin: most damages of a file by a program, others by each; 0 for all.
  """
  found, kinds = [], list(DAMAGES)
  for number, (program, arguments) in enumerate(READERS.items()):
    for name in FILES:
      for kind in thinned(kinds, thin, number):
        found.append(Case(program, arguments, f'run/{name}', kind))
  arguments = [*BASES['reproduce'], '--seeds=1']
  for number, more in enumerate((arguments[3:], ['--list'], ['--pages'])):
    for name in STORED:
      for kind in thinned(kinds, thin, number):
        given = [*arguments[:3], *more]
        found.append(Case('reproduce', given, f'stored/{name}', kind))
  return [case for case in found if not chosen or case.program in chosen]


def prepare_damage(case: Case, places: 'Places') -> None:
  """Make the folders of a case, and damage the file."""
  new = pathlib.Path(places.fill('{new}'))
  kind, name = case.what.split('/')
  if kind == 'run':
    shutil.copytree(places.folder / 'run', new / 'run')
    DAMAGES[case.damage](new / 'run' / name)
    return
  from ssljax.experiments.papers import runs, tables

  table = tables.find('association/1', tables.known_tables(), 'table')
  run = runs.run_of(table.rows[0].at('cpu'))
  kept = new / 'results' / run.name / 'seed-0'
  kept.mkdir(parents=True)
  (kept / 'run.flags').write_text('\n'.join(run.lines) + '\n')
  for copied in ('result.json', 'metrics.jsonl'):
    shutil.copy(places.folder / 'run' / copied, kept)
  DAMAGES[case.damage](kept / name)


class Places:
  """The paths that stand in the arguments of cases."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.count = folder, 0
    for name in ('home', 'folder/something'):
      (folder / name).mkdir(parents=True)
    (folder / 'home/file').touch()
    os.mkfifo(folder / 'fifo')
    (folder / 'dangling').symlink_to(folder / 'nowhere/at/all')
    (folder / 'binary').write_bytes(bytes(range(256)) * 20)
    (folder / 'loop').write_text(f'--flagfile={folder}/loop\n')

  def fill(self, text: str) -> str:
    """Return a text with the paths in the place of their names."""
    new = self.folder / f'new-{self.count}'
    for name in ('folder', 'fifo', 'dangling', 'binary', 'loop', 'run'):
      text = text.replace(f'{{{name}}}', str(self.folder / name))
    return text.replace('{new}', str(new))

  def next(self) -> None:
    """Remove what a case has left."""
    shutil.rmtree(self.folder / f'new-{self.count}', ignore_errors=True)
    self.count += 1


def make_run(folder: pathlib.Path) -> pathlib.Path:
  """Train a tiny run and return its folder."""
  command = [f'{ROOT}/experiments/association.py', f'--workdir={folder}/run']
  command += ['--network=deepbass_toy', '--steps=4', '--labels=5']
  command += ['--batch_per_class=2', '--batch_unlabelled=20', '--seeds=1']
  command += ['--nobaseline', '--keep_every=2']
  subprocess.run(
    [sys.executable, *command],
    check=True,
    capture_output=True,
    env=environment(folder),
    cwd=folder,
  )
  return folder / 'run'


# Reports.


def report(outcomes: list[tuple[Case, dict]], every: bool) -> int:
  """Print the table and the faults; return the number of faults."""
  kinds = (*GOOD, *FAULTS)
  table = collections.defaultdict(collections.Counter)
  for case, outcome in outcomes:
    table[case.program][outcome['kind']] += 1
    table['all'][outcome['kind']] += 1
  heads = ['program', 'tries', *kinds]
  rows = [
    [program, str(sum(counts.values())), *(str(counts[k]) for k in kinds)]
    for program, counts in table.items()
  ]
  widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
  for row in (heads, *sorted(rows, key=lambda row: row[0] == 'all')):
    print('  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)))
  bad = [(c, o) for c, o in outcomes if o['kind'] in FAULTS]
  for case, outcome in outcomes if every else bad:
    print(f'\n{described(case, outcome)}')
  return len(bad)


def described(case: Case, outcome: dict) -> str:
  """Return the command of a case, and its message."""
  words = ' '.join(ascii(x)[:120] for x in case.arguments)
  what = f'[{case.what} {case.damage}]'
  message = f'{outcome["message"]!a}'
  return f'{outcome["kind"]}: {case.program} {words} {what}\n  {message}'


def attack(cases: list[Case], places: Places, whole: bool, deadline: float):
  """Run all cases and return them with their outcomes."""
  outcomes, worker = [], Worker(places.folder, whole)
  for number, case in enumerate(cases):
    case.arguments = [places.fill(text) for text in case.arguments]
    if case.damage:
      prepare_damage(case, places)
    outcome = worker.run(case, deadline)
    outcomes.append((case, outcome))
    places.next()
    if outcome['kind'] in FAULTS:
      print(described(case, outcome), file=sys.stderr, flush=True)
    if sys.stderr.isatty() or number % 100 == 99:
      print(f'{number + 1} of {len(cases)}', file=sys.stderr, flush=True)
  worker.stop()
  return outcomes


def main() -> int:
  """Run the attack that the arguments select; return 1 if it found faults."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--damage', action='store_true')
  parser.add_argument('--program', action='append', default=[])
  parser.add_argument('--only', action='append', default=[])
  parser.add_argument('--fresh', type=int, default=0)
  parser.add_argument('--thin', type=int, default=0)
  parser.add_argument('--deadline', type=float, default=DEADLINE)
  parser.add_argument('--every', action='store_true')
  parser.add_argument('--worker', action='store_true')
  parser.add_argument('--whole', action='store_true')
  asked = parser.parse_args()
  if asked.worker:
    work(asked.whole)
    return 0
  with tempfile.TemporaryDirectory() as made:
    places = Places(pathlib.Path(made))
    make_run(places.folder)
    if asked.damage:
      cases = damage_cases(asked.program, asked.thin)
    else:
      cases = flag_cases(asked.program, asked.fresh, asked.thin)
    if asked.only:
      cases = [case for case in cases if case.what in asked.only]
    outcomes = attack(cases, places, asked.whole, asked.deadline)
    return int(report(outcomes, asked.every) > 0)


if __name__ == '__main__':
  sys.exit(main())
