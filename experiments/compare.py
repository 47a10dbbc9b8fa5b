"""Compare methods on a data set by paired runs under the same label splits.

  python experiments/compare.py --methods=madnn,llp,fixmatch --dataset=mine.npz
  python experiments/compare.py --methods=r2d2 --seeds=5 --dataset=mnist \
      --image_size=14 --unlabelled=3000 --data_dir=DIR

All other flags go to the methods' programs; what they do not state suits the
data. Every method has the supervised baseline of its own network beside it. A
run has a folder of its own, METHOD/seed-K in --folder: finished runs
are not repeated, and interrupted ones are resumed.
"""

from collections.abc import Iterator, Sequence
import pathlib
import signal
import statistics
import sys
from typing import Any, NamedTuple

from absl import flags

from ssljax import config as config_lib
from ssljax import files, registry
from ssljax.cli import config_flags, main
from ssljax.errors import InputError, positive, require
from ssljax.experiments import FOLDER
from ssljax.experiments.papers import claims
from ssljax.experiments.papers.runs import call
from ssljax.runs import run_folder, summary

BASELINE = 'supervised'
# Decided here for every run.
OWN = ('workdir', 'seed', 'baseline', 'nobaseline', 'overwrite')
NOTE = 'compare.flags'  # the flags of the runs in a folder


class Outcome(NamedTuple):
  """The runs of a method."""

  method: str
  network: str
  errors: dict[int, float]  # test error in percent by seed
  data: frozenset[str]  # fingerprints of the data sets of the runs
  seconds: float  # in compiled steps, median over the seeds


def program(method: str) -> list[str]:
  """Return the command of a method's program."""
  return [sys.executable, str(FOLDER / f'{method}.py')]


def train(
  method: str, folder: pathlib.Path, seed: int, given: Sequence[str]
) -> dict[str, Any]:
  """Train or resume a run; return the content of its `result.json`.

  Args:
    method: name of the method.
    folder: of the run.
    seed: of its split.
    given: flags of the method's program.

  Raises:
    InputError: the program failed, or there are no test images.
  """
  result = run_folder.read_result(folder) or {}
  if not result.get('complete'):
    where = f'--workdir={folder}', f'--seed={seed}', '--seeds=1', '--nobaseline'
    call([*program(method), *given, *where])
    result = run_folder.read_result(folder) or {}
    require(
      result.get('complete') is True,
      f'{folder}: was interrupted: run the same command to resume',
    )
  require(
    bool(result['test_error']),
    '`dataset`: has no test images to compare on: give some',
  )
  return result


def fingerprint(result: dict[str, Any]) -> str:
  """Return the fingerprint of the images of a run."""
  return result.get('data_fingerprint', '')


def outcome(
  method: str,
  folder: pathlib.Path,
  seeds: int,
  given: Sequence[str],
) -> Outcome:
  """Train a method under every split.

  Args:
    method: name of the method.
    folder: gets a folder for each seed.
    seeds: number of splits.
    given: flags of the method's program.
  """
  results = {
    seed: train(method, folder / f'seed-{seed}', seed, given)
    for seed in range(seeds)
  }
  stands = lambda result: summary.errors_that_stand(result['test_error'])[0]
  config = run_folder.read_config(folder / 'seed-0', method)
  return Outcome(
    method,
    config.network.network,
    {seed: stands(result) for seed, result in results.items()},
    frozenset(
      result.get('data_fingerprint', '') for result in results.values()
    ),
    statistics.median(result['seconds'] for result in results.values()),
  )


def outcomes(
  methods: Sequence[str],
  folder: pathlib.Path,
  seeds: int,
  given: Sequence[str],
) -> Iterator[tuple[Outcome, Outcome]]:
  """Yield each method's runs with those of the baseline of its network."""
  baselines = {}
  for method in methods:
    found = outcome(method, folder / method, seeds, given)
    if found.network not in baselines:
      own = [flag for flag in given if _is_of_baseline(flag)]
      baselines[found.network] = outcome(
        BASELINE,
        folder / f'{BASELINE}-{found.network}',
        seeds,
        [*own, f'--network={found.network}'],
      )
    yield found, baselines[found.network]


def _is_of_baseline(flag: str) -> bool:
  """True for a flag that the baseline has; it gets a network of its own."""
  name = flag.lstrip('-').split('=')[0]
  known = {n for part in config_lib.schema(BASELINE).values() for n in part}
  return name != 'network' and bool(known & {name, name.removeprefix('no')})


HEADER = (
  *('method', 'network', 'test error', 'labels alone'),
  *('difference [95 %]', 'verdict', 'seconds'),
)
VERDICTS = {
  claims.HOLDS: 'better',
  claims.OPEN: 'no difference shown',
  claims.REVERSED: 'worse',
}


def markdown(pairs: Sequence[tuple[Outcome, Outcome]], title: str) -> str:
  """Return the table of methods and their baselines as Markdown."""
  lines = [HEADER, ['---'] * len(HEADER)]
  for found, baseline in pairs:
    values = [list(one.errors.values()) for one in (found, baseline)]
    cells = [found.method, found.network, *map(summary.mean_std, values)]
    if len(values[0]) > 1:
      effect = claims.effect(*values)
      interval = f'[{effect.low:+.2f}, {effect.high:+.2f}]'
      cells += [f'{effect.value:+.2f} {interval}', VERDICTS[effect.verdict]]
    else:
      cells += [f'{values[0][0] - values[1][0]:+.2f}', 'one split']
    lines.append([*cells, f'{found.seconds:,.0f}'])
  body = ''.join(f'| {" | ".join(line)} |\n' for line in lines)
  return (
    f'{title}: test errors in % of the weights that a method evaluates, mean ± '
    f'standard deviation over the splits; the difference is paired\n\n{body}'
  )


def define_flags(values: flags.FlagValues) -> None:
  """Define the flags of this program."""
  flags.DEFINE_list('methods', None, 'Methods to compare.', flag_values=values)
  flags.DEFINE_integer(
    'seeds', 5, 'Number of label splits.', flag_values=values
  )
  flags.DEFINE_string(
    'folder',
    'runs/compare',
    'Folder of the runs; one for each data set.',
    flag_values=values,
  )


class Command:
  """The command line: own flags, and those of the methods' programs."""

  def __init__(self):
    """Define the flags."""
    self.values = config_flags.new_values()
    known = set(self.values)
    define_flags(self.values)
    self.own = [name for name in self.values if name not in known]
    self.given = []

  def parse(self, argv: Sequence[str]) -> list[str]:
    """Parse own arguments; the others are for the methods' programs."""
    rest = self.values(list(argv), known_only=True)
    self.given = rest[1:]
    return rest[:1]

  def help(self) -> str:
    """Return the help of the own flags."""
    return '\n'.join(
      line for name in self.own for line in main.help_lines(self.values[name])
    )

  def act(self) -> None:
    """Train what is missing, and print and write the table."""
    methods = list(dict.fromkeys(filter(None, self.values.methods or ())))
    seeds = self.values.seeds
    others = [name for name in registry.METHODS if name != BASELINE]
    require(bool(methods), f'`methods`: give some of {", ".join(others)}')
    for method in methods:
      registry.choose('methods', method, registry.METHODS)
      require(
        method != BASELINE,
        f'`methods`={BASELINE}: is beside every method anyway: leave it out',
      )
    positive(seeds=seeds)
    for name in OWN:
      require(
        not config_flags.is_given(name, self.given),
        f'`{name}`: compare.py decides it for every run: leave it out',
      )
    folder = main.as_output_folder(
      'folder', pathlib.Path(self.values.folder).expanduser()
    )
    self.refuse_other(folder)
    try:
      pairs = list(outcomes(methods, folder, seeds, self.given))
    finally:
      if any(folder.glob('*/seed-*/config.json')):
        note = ''.join(f'{flag}\n' for flag in sorted(self.given))
        run_folder.write_atomically(folder / NOTE, note)
    require(
      len(frozenset().union(*(one.data for pair in pairs for one in pair)))
      == 1,
      f'`folder`={folder}: its runs are of different images, because the data '
      'set has changed: give another folder',
    )
    data = ' '.join(x.lstrip('-') for x in self.given) or 'digits'
    text = markdown(pairs, data)
    run_folder.write_atomically(folder / 'comparison.md', text)
    print(f'{text}\nwritten to {folder}/comparison.md')

  def refuse_other(self, folder: pathlib.Path) -> None:
    """Raise `InputError` if the folder holds a comparison with other flags."""
    note = folder / NOTE
    if not files.exists(note):
      return
    try:
      there = note.read_text(encoding='utf-8').split()
    except (OSError, ValueError) as error:
      raise InputError(f'{note} is damaged: remove it') from error
    require(
      there == sorted(self.given),
      f'`folder`={folder}: holds a comparison with '
      f'{" ".join(there) or "no flags"}: give another folder',
    )


if __name__ == '__main__':
  # Exit normally on SIGTERM, so that called programs are ended too.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  command = Command()
  main.run('compare', command.act, command.parse, command.help)
