"""Compare methods on a data set, or finished runs, under the same label splits.

  python experiments/compare.py --methods=madnn,llp,fixmatch --dataset=mine.npz
  python experiments/compare.py --methods=r2d2 --seeds=5 --dataset=mnist \
      --image_size=14 --unlabelled=3000 --data_dir=DIR
  python experiments/compare.py runs/A runs/B [runs/C ...] --out=compare.html

The last form trains nothing: it compares the folders of finished runs with the
first of them, over the splits that they share. --out writes the table and the
errors over training to one HTML file, in either form.

All other flags go to the methods' programs; what they do not state suits the
data. Every method has the supervised baseline of its own network beside it. A
run has a folder of its own, METHOD/seed-K in --folder: finished runs
are not repeated, and interrupted ones are resumed.
"""

from collections.abc import Iterator, Sequence
import pathlib

from absl import flags

from ssljax import config as config_lib
from ssljax import registry
from ssljax.cli import main
from ssljax.errors import require
from ssljax.experiments.papers import claims, finished, paired
from ssljax.experiments.papers.paired import Outcome
from ssljax.runs import run_folder, summary

BASELINE = 'supervised'


def outcomes(
  methods: Sequence[str],
  folder: pathlib.Path,
  seeds: Sequence[range],
  given: Sequence[str],
) -> Iterator[tuple[Outcome, Outcome]]:
  """Yield each method's runs with those of the baseline of its network."""
  baselines = {}
  for method in methods:
    found = paired.outcome(method, folder / method, seeds, given)
    if found.network not in baselines:
      own = [flag for flag in given if _is_of_baseline(flag)]
      baselines[found.network] = paired.outcome(
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
VERDICTS = finished.VERDICTS
SAME_LABELS = (
  'all splits have the same labelled images: they differ in initial weights '
  'and in the order of the images alone'
)


def difference(found: Outcome, baseline: Outcome) -> tuple[str, str]:
  """Return the paired difference of two outcomes, and the verdict."""
  values = [list(one.errors.values()) for one in (found, baseline)]
  if len(values[0]) < 2:
    return f'{values[0][0] - values[1][0]:+.2f}', 'one split'
  effect = claims.effect(*values)
  interval = f'[{effect.low:+.2f}, {effect.high:+.2f}]'
  return f'{effect.value:+.2f} {interval}', VERDICTS[effect.verdict]


def markdown(pairs: Sequence[tuple[Outcome, Outcome]], title: str) -> str:
  """Return the table of methods and their baselines as Markdown."""
  lines = [HEADER, ['---'] * len(HEADER)]
  for found, baseline in pairs:
    errors = [
      summary.mean_std(list(one.errors.values())) for one in (found, baseline)
    ]
    cells = [found.method, found.network, *errors]
    cells += difference(found, baseline)
    lines.append([*cells, f'{found.seconds:,.0f}'])
  body = ''.join(f'| {" | ".join(line)} |\n' for line in lines)
  splits = len(pairs[0][0].errors)
  is_same = splits > 1 and all(
    one.labels == 1 for pair in pairs for one in pair
  )
  same = f'; {SAME_LABELS}' if is_same else ''
  return (
    f'{title}: test errors in % of the weights that a method evaluates, mean ± '
    f'standard deviation over the splits; the difference is paired{same}\n\n'
    f'{body}'
  )


class Command(paired.Command):
  """The command line."""

  def __init__(self):
    """Define the flags."""
    super().__init__('runs/compare/FLAGS', seeds=5)

  def define_flags(self) -> None:
    """Define the flags of the program itself."""
    flags.DEFINE_list(
      'methods', None, 'Methods to compare.', flag_values=self.values
    )
    flags.DEFINE_string(
      'out',
      None,
      'HTML file of the comparison, with the errors over training.',
      flag_values=self.values,
    )

  @property
  def runs(self) -> list[str]:
    """The folders of finished runs that the command names."""
    is_run = bool(self.given) and not self.given[0].startswith('-')
    return self.given if is_run else []

  def act(self) -> None:
    """Compare what the flags name, and print and write the table."""
    out = None
    if self.values.out is not None:
      out = main.as_output('out', self.values.out)
    sides = (
      self.compare_runs() if self.runs else self.train_missing(out is not None)
    )
    if out is not None:
      text = finished.as_page(sides, finished.kind_of(sides))
      with main.write_errors(out):
        run_folder.write_atomically(out, text)
      print(f'written to {out}')

  def compare_runs(self) -> list[finished.Side]:
    """Print the table of the runs that the command names."""
    others = [name for name in self.runs if name.startswith('-')]
    others += [
      f'--{name}'
      for name in ('methods', 'folder', 'seeds', 'seeds_per_run')
      if self.values[name].present
    ]
    require(
      not others,
      f'{others[0] if others else ""}: is for a comparison that trains: leave '
      'it out, or give `methods` and no runs',
    )
    sides = finished.read(self.runs)
    kind = finished.kind_of(sides)
    rows = summary.aligned(finished.rows(sides, kind))
    print('\n'.join([finished.title(sides, kind), *rows]))
    return sides

  def train_missing(self, reads: bool) -> list[finished.Side]:
    """Train what is missing, and print and write the table.

    Args:
      reads: return the runs, each baseline before the methods beside it.
    """
    methods, seeds = self.methods(), self.seed_blocks()
    paired.refuse_own(self.given, 'compare.py')
    folder = self.make_folder(f'runs/compare/{paired.as_name(self.given)}')
    note = paired.Note(folder, 'compare', self.given)
    note.refuse_other()
    try:
      pairs = list(outcomes(methods, folder, seeds, self.given))
    finally:
      note.write()
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
    if not reads:
      return []
    names = dict.fromkeys(
      name
      for found, _ in pairs
      for name in (f'{BASELINE}-{found.network}', found.method)
    )
    of_blocks = lambda name: [
      folder / name / paired.block_name(block) for block in seeds
    ]
    return [finished.side(name, of_blocks(name)) for name in names]

  def methods(self) -> list[str]:
    """Return the methods that the flags name, each once."""
    methods = list(dict.fromkeys(filter(None, self.values.methods or ())))
    others = [name for name in registry.METHODS if name != BASELINE]
    require(bool(methods), f'`methods`: give some of {", ".join(others)}')
    for method in methods:
      registry.choose('methods', method, registry.METHODS)
      require(
        method != BASELINE,
        f'`methods`={BASELINE}: is beside every method anyway: leave it out',
      )
    return methods


if __name__ == '__main__':
  paired.start('compare', Command)
