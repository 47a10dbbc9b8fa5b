"""Comparison of finished runs under the label splits that they share."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any, NamedTuple

from ssljax import files
from ssljax.errors import InputError, require
from ssljax.experiments.figures import page
from ssljax.experiments.papers import claims
from ssljax.runs import load, summary

HEADER = (
  *('run', 'method', 'network', 'seeds', 'error', 'balanced accuracy'),
  *('difference [95 %]', 'verdict', 'steps', 'seconds'),
)
VERDICTS = {
  claims.HOLDS: 'better',
  claims.OPEN: 'no difference shown',
  claims.REVERSED: 'worse',
}
MOST_LINES = 6  # of a chart


class Side(NamedTuple):
  """A finished run, or several with the same settings under other splits."""

  name: str
  folders: tuple[pathlib.Path, ...]
  results: tuple[dict[str, Any], ...]  # `result.json` of each folder
  network: str

  @property
  def method(self) -> str:
    """Name of the method."""
    return self.results[0]['method']

  def by_seed(self, of) -> dict[int, Any]:
    """Return `of(result)[i]` for each seed i, by its number."""
    return {
      seed: value
      for result in self.results
      for seed, value in zip(result['seeds'], of(result), strict=True)
    }

  def errors(self, kind: str) -> dict[int, float]:
    """Return the reported error in percent by seed."""
    return self.by_seed(lambda r: summary.errors_that_stand(r[kind]))

  def balanced(self, kind: str) -> dict[int, float | None]:
    """Return the balanced accuracy in percent by seed; {} of earlier runs."""
    name = f'{kind.removesuffix("_error")}_classes'
    if not all(result.get(name) for result in self.results):
      return {}
    chosen = lambda result: result[name].get('averaged', result[name]['last'])
    return self.by_seed(
      lambda r: [100 * x['balanced_accuracy'] for x in chosen(r)['seeds']]
    )


def side(name: str, folders: Sequence[pathlib.Path]) -> Side:
  """Read finished runs.

  Args:
    name: of the line in the table.
    folders: of runs with the same settings under different splits.

  Raises:
    InputError: a folder holds no finished run.
  """
  try:
    results = tuple(load.finished_result(folder) for folder in folders)
    config = load.read_config(folders[0], results[0])
  except InputError as error:
    raise InputError(error.marked.replace('`run`=', '')) from error
  return Side(name, tuple(folders), results, config.network.network)


def read(runs: Sequence[str]) -> list[Side]:
  """Read the runs that a command names, which must be comparable.

  Raises:
    InputError: there are fewer than two, or two cannot be compared.
  """
  require(
    len(runs) > 1,
    f'{" ".join(runs)}: is one run: give the folders of at least two',
  )
  paths = [files.as_place('run', run) for run in runs]
  require(
    len(set(paths)) == len(paths),
    f'{" ".join(runs)}: names a run twice: give each once',
  )
  found = [
    side(name, [path]) for name, path in zip(_names(paths), paths, strict=True)
  ]
  for other in found[1:]:
    refuse_different(found[0], other)
  return found


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
  """Return the last parts of paths, as many as tell them apart."""
  for parts in range(1, max(len(path.parts) for path in paths)):
    names = ['/'.join(path.parts[-parts:]) for path in paths]
    if len(set(names)) == len(names):
      return names
  return list(map(str, paths))


def refuse_different(a: Side, b: Side) -> None:
  """Raise `InputError` for runs of different data or label splits."""
  one, other = a.results[0], b.results[0]
  prints = [x.get('data_fingerprint', '') for x in (one, other)]
  names = [_data_of(x) for x in (one, other)]
  same = prints[0] == prints[1] if all(prints) else names[0] == names[1]
  unlike = '' if names[0] != names[1] else ', with other images'
  require(
    same,
    f'{b.folders[0]}: is of {names[1]}, {a.folders[0]} of {names[0]}{unlike}: '
    'give runs on the same data set',
  )
  digests = [x.by_seed(lambda result: result['splits']) for x in (a, b)]
  common = sorted(digests[0].keys() & digests[1].keys())
  shown = [','.join(map(str, sorted(found))) for found in digests]
  require(
    bool(common),
    f'{b.folders[0]}: has the seeds {shown[1]}, {a.folders[0]} {shown[0]}: '
    'give runs with seeds in common',
  )
  for seed in common:
    require(
      digests[0][seed] == digests[1][seed],
      f'{b.folders[0]}: its label split of seed {seed} (`labels`='
      f'{other["labels"]}) is another than that of {a.folders[0]} (`labels`='
      f'{one["labels"]}): give runs with the same labels, unlabelled and '
      'held-out images',
    )


def _data_of(result: Mapping[str, Any]) -> str:
  return result.get('data_variant') or result['dataset']


def kind_of(sides: Sequence[Side]) -> str:
  """Return the kind of error that all runs have.

  Raises:
    InputError: there is none.
  """
  for kind in ('test_error', 'validation_error'):
    if all(result.get(kind) for one in sides for result in one.results):
      return kind
  raise InputError(
    f'{", ".join(one.name for one in sides)}: have no images in common to '
    'compare errors on: give runs with test images, `validation` or '
    '`hold_out`=auto'
  )


def rows(sides: Sequence[Side], kind: str) -> list[list[str]]:
  """Return the cells of the table; differences are to the first run."""
  found = [list(HEADER)]
  for one in sides:
    errors, balanced = one.errors(kind), one.balanced(kind)
    seconds = sum(result['seconds'] for result in one.results) / len(errors)
    found.append(
      [
        *(one.name, one.method, one.network, str(len(errors))),
        summary.mean_std(list(errors.values())),
        summary.mean_std(list(balanced.values())) if balanced else '-',
        *_difference(one, sides[0], kind),
        f'{one.results[0]["steps"]:,}',
        f'{seconds:,.0f}',
      ]
    )
  return found


def _difference(one: Side, first: Side, kind: str) -> tuple[str, str]:
  """Return the paired difference of errors to the first run, and a verdict."""
  if one is first:
    return '-', '-'
  own, other = one.errors(kind), first.errors(kind)
  common = sorted(own.keys() & other.keys())
  if len(common) < 2:
    value = own[common[0]] - other[common[0]]
    return f'{value:+.2f}', 'one split in common'
  effect = claims.effect([own[s] for s in common], [other[s] for s in common])
  few = f', {len(common)} splits' if len(common) < len(own) else ''
  return (
    f'{effect.value:+.2f} [{effect.low:+.2f}, {effect.high:+.2f}]{few}',
    VERDICTS[effect.verdict],
  )


def title(sides: Sequence[Side], kind: str) -> str:
  """Return the line above the table."""
  result = sides[0].results[0]
  return (
    f'{kind.replace("_", " ")} in % on {_data_of(result)}, {result["labels"]} '
    f'labels per class; differences to {sides[0].name} are paired over the '
    "splits in common, with Student's interval; seconds are per split"
  )


def as_page(sides: Sequence[Side], kind: str) -> str:
  """Return the comparison as an HTML page."""
  parts = [
    page.note(title(sides, kind)),
    page.as_table(rows(sides, kind)),
    *_charts(sides),
    page.section(
      'Runs',
      page.as_table(_where(sides)),
    ),
  ]
  names = ', '.join(one.name for one in sides)
  return page.document(f'Comparison of {names}', parts)


def _where(sides: Sequence[Side]) -> list[list[str]]:
  return [['run', 'folder', 'commit', 'device']] + [
    [one.name, str(folder), result['commit'], result['device']]
    for one in sides
    for folder, result in zip(one.folders, one.results, strict=True)
  ]


def _charts(sides: Sequence[Side]):
  """Yield a section with the errors over the steps, of test and validation."""
  for kind in ('test_error', 'validation_error'):
    lines = [page.Line(one.name, _curve(one, kind)) for one in sides]
    lines = [line for line in lines if line.points]
    if lines:
      shown = lines[:MOST_LINES]
      left_out = [line.name for line in lines[MOST_LINES:]]
      more = f' Not drawn: {", ".join(left_out)}.' if left_out else ''
      name = kind.replace('_', ' ')
      yield page.section(
        f'{name.capitalize()} over training',
        page.chart(shown, f'{name} in %'),
        page.note(
          'Averaged weights where a method has them; mean over the splits, '
          f'with a band of one standard deviation.{more}'
        ),
      )


def _curve(one: Side, kind: str) -> dict[int, list[float]]:
  """Return the errors of the splits by step."""
  found = {}
  for folder, result in zip(one.folders, one.results, strict=True):
    for line in load.read_metrics(folder, one.method, result):
      value = line.get(f'{kind}_averaged', line.get(f'{kind}_last'))
      if value is not None:
        found.setdefault(line['step'], []).append(value)
  return found
