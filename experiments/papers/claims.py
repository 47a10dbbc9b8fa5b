"""The central claims of the papers, each as a paired comparison of two errors.

`tables/claims.toml` names, for each claim, a run with the claimed part and one
without it. Both are trained under the same label splits. The effect is the mean
difference of their errors, and its 95 % interval is Student's over the splits.
"""

import math
import statistics
import tomllib
from typing import NamedTuple

from scipy import stats

from ssljax.errors import require
from ssljax.experiments.papers import runs, tables

FILE = 'claims.toml'
HOLDS, OPEN, REVERSED = 'holds', 'does not show', 'reversed'


class Claim(NamedTuple):
  """A claim of a paper, and the two runs that test it."""

  paper: str
  text: str
  with_part: tables.Row
  without_part: tables.Row


class Effect(NamedTuple):
  """The difference of two errors under the same splits, in percent."""

  value: float  # mean of: error with the part minus error without it
  low: float  # bounds of the 95 % interval
  high: float
  splits: int

  @property
  def verdict(self) -> str:
    """Whether the interval lies below 0, around it, or above.

    Equal differences have no spread, which is no evidence.
    """
    if self.low == self.high:
      return OPEN
    if self.high < 0:
      return HOLDS
    return REVERSED if self.low > 0 else OPEN


def read() -> list[Claim]:
  """Return all claims."""
  content = tomllib.loads((tables.FOLDER / FILE).read_text())
  row = lambda name, entry: tables.Row(
    name,
    preset=entry['preset'],
    flags=tuple(entry.get('flags', ())),
    take=entry.get('take', 'last'),
    propagate=tuple(entry.get('propagate', ())),
    seeds=entry.get('seeds', content['seeds']),
  )
  return [
    Claim(
      claim['paper'],
      claim['text'],
      row('with', claim['with']),
      row('without', claim['without']),
    )
    for claim in content['claim']
  ]


def effect(with_part, without_part) -> Effect:
  """Compute the effect of a part from errors under the same splits.

  Args:
    with_part: errors in percent, one per split.
    without_part: likewise, in the same order.
  """
  pairs = zip(with_part, without_part, strict=True)
  differences = [a - b for a, b in pairs]
  count = len(differences)
  require(count > 1, f'{count} splits have no interval: run at least 2')
  value = statistics.fmean(differences)
  error = statistics.stdev(differences) / math.sqrt(count)
  half = float(stats.t.ppf(0.975, count - 1)) * error
  return Effect(value, value - half, value + half, count)


def measured(store: runs.Store, claim: Claim) -> Effect | None:
  """Return the effect from stored results; None if there are too few."""
  both = [
    runs.ours(store, row, 'paper')
    for row in (claim.with_part, claim.without_part)
  ]
  errors = [_by_sample(mine) for mine in both]
  samples = sorted(errors[0].keys() & errors[1].keys())
  if len(samples) < 2:
    return None
  return effect(*([each[sample] for sample in samples] for each in errors))


def _by_sample(mine: tables.Ours) -> dict[tuple[int, int], float]:
  """Return errors by split and subsample; of a run, subsample 0 alone."""
  each = len(mine.values) // max(1, len(mine.seeds))
  names = [(seed, k) for seed in mine.seeds for k in range(each)]
  return dict(zip(names, mine.values, strict=True))


def markdown(store: runs.Store) -> str:
  """Return the table of all claims as Markdown."""
  lines = [
    '| paper | claim | with | without | effect [95 %] | splits | verdict |',
    '| --- | --- | --- | --- | --- | --- | --- |',
  ]
  for claim in read():
    rows = claim.with_part, claim.without_part
    both = [runs.ours(store, row, 'paper').values for row in rows]
    means = [f'{statistics.fmean(v):.2f}' if v else tables.NONE for v in both]
    found = measured(store, claim)
    cells = [claim.paper, claim.text, *means, *_cells(found)]
    lines.append(f'| {" | ".join(cells)} |')
  note = (
    'Test errors in %, and the mean difference under the same label splits, '
    "with Student's interval: below 0 the part helps; "
    '`python experiments/reproduce.py --claims`'
  )
  return '\n'.join(lines) + f'\n\n{note}\n'


def _cells(found: Effect | None) -> list[str]:
  if found is None:
    return [tables.NONE, '0', 'not yet run']
  interval = f'{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]'
  return [interval, str(found.splits), found.verdict]
