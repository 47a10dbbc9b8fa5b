"""A comparison of all methods on equal terms: its plan, record and table.

`tables/benchmark.toml` states the settings that all methods share, and a small
grid for each. `experiments/benchmark.py` runs it.
"""

from collections.abc import Sequence
import pathlib
import statistics
import tomllib
from typing import Any, NamedTuple

from scipy import stats

from ssljax import registry
from ssljax.errors import InputError, require
from ssljax.experiments.papers import claims, runs, tables
from ssljax.runs import summary

FILE = 'benchmark.toml'
BASELINE = 'supervised'


class Entry(NamedTuple):
  """A method in a benchmark."""

  method: str
  title: str
  flags: tuple[str, ...]  # of all cells
  grid: str


class Benchmark(NamedTuple):
  """A comparison on a data set."""

  name: str
  title: str
  minutes: float  # expected, of one CPU core
  seeds: int  # label splits of the table
  tuning: int  # label splits of a cell
  validation: int  # images held out while tuning
  entries: tuple[Entry, ...]


class _Steps(int):
  """A number of steps; '{steps:40}' is 40 % of them."""

  def __format__(self, share: str) -> str:
    return str(self * int(share or 100) // 100)


def read() -> dict[str, Benchmark]:
  """Return all benchmarks by name."""
  content = tomllib.loads((tables.FOLDER / FILE).read_text())
  return {
    name: _benchmark(name, content, data)
    for name, data in content['data'].items()
  }


def _benchmark(name: str, content, data: dict[str, Any]) -> Benchmark:
  numbers = {k: v for k, v in data.items() if isinstance(v, int)}
  numbers |= {
    'steps': _Steps(data['steps']),
    'images': data['labelled'] + data['unlabelled'],
  }
  entries = []
  for method, found in content['methods'].items():
    strong = [f'--strong_augment={data["strong"]}'] if 'strong' in found else []
    texts = [*content['common']['flags'], *data['flags'], *strong]
    by_name = {}  # a method's flags replace those of all methods
    for text in (*texts, *found.get('flags', ())):
      flag = text.format(**numbers)
      by_name[flag.lstrip('-').split('=')[0]] = flag
    left_out = found.get('without', ())
    kept = [flag for key, flag in by_name.items() if key not in left_out]
    entries.append(Entry(method, found['name'], tuple(kept), found['grid']))
  return Benchmark(
    name,
    data['title'],
    data['minutes'],
    content['seeds'],
    content['tuning'],
    data['validation'],
    tuple(entries),
  )


# The record.


def record_path(results: pathlib.Path, name: str) -> pathlib.Path:
  """Return the file of the results of a benchmark."""
  return results / f'benchmark.{name}.json'


def read_record(results: pathlib.Path, name: str) -> dict[str, Any]:
  """Return the stored results by method, {} if there are none.

  Raises:
    InputError: the file is damaged.
  """
  path = record_path(results, name)
  found = runs.read_json(path)
  if found is None:
    return {}
  try:
    for method, entry in found['methods'].items():
      require(method in registry.METHODS, f'{path}: names no method {method}')
      for errors in (entry['test_error'], entry['cells'][0]['errors']):
        require(bool(errors), f'{path}: {method} has no errors')
        statistics.fmean(errors.values())
  except (KeyError, TypeError, AttributeError, IndexError) as error:
    raise InputError(
      f'{path} is damaged: restore it, or remove it and run the same command '
      'again'
    ) from error
  return found['methods']


# The table.


HEADER = (
  *('method', 'test error', 'difference [95 %]', 'rank', 'n', 'by split'),
  *('chosen settings', 'validation error', 'seconds per split'),
)


def markdown(found: Benchmark, methods: dict[str, dict[str, Any]]) -> str:
  """Return the table of the methods with results, the best one first.

  Args:
    found: the benchmark.
    methods: results by method, see `read_record`.
  """
  titles = {entry.method: entry.title for entry in found.entries}
  errors = {
    method: _by_seed(entry['test_error'])
    for method, entry in methods.items()
    if method in titles
  }
  ranks = mean_ranks(errors)
  mean = lambda method: statistics.fmean(errors[method].values())
  lines = [HEADER, ['---'] * len(HEADER)]
  for method in sorted(errors, key=mean):
    entry, values = methods[method], list(errors[method].values())
    chosen = entry['cells'][0]
    settings = ', '.join(f'{k} {v}' for k, v in chosen['settings'].items())
    lines.append(
      [
        titles[method],
        summary.mean_std(values),
        _difference(method, errors),
        f'{ranks[method]:.1f}',
        str(len(values)),
        ' '.join(f'{value:.1f}' for value in values),
        settings,
        f'{statistics.fmean(chosen["errors"].values()):.2f}',
        f'{entry["seconds"]:,.0f}',
      ]
    )
  body = ''.join(f'| {" | ".join(line)} |\n' for line in lines)
  joined = lambda key: ', '.join(sorted({e[key] for e in methods.values()}))
  notes = [
    f'`python experiments/benchmark.py --name={found.name}`',
    *([f'commits {joined("commit")}', joined('device')] if methods else []),
    'test error: mean ± standard deviation over n label splits; the difference '
    "to the labels alone is paired, with Student's interval, not adjusted for "
    'the number of methods; rank: mean over the splits; settings: the best of '
    f'{_cells(found)} cells by the error on {found.validation} validation '
    f'images, mean of {found.tuning} splits',
  ]
  body = body if errors else 'not yet run\n'
  heading = f'{found.title}; all methods on equal terms; test error in %'
  return f'{heading}\n\n{body}\n{"; ".join(notes)}\n'


def _cells(found: Benchmark) -> int:
  """Return the largest number of cells of a method's grid."""
  count = 0
  for entry in found.entries:
    axes = [word.split('=')[1].split(',') for word in entry.grid.split()]
    product = 1
    for axis in axes:
      product *= len(axis)
    count = max(count, product)
  return count


def _by_seed(errors: dict[str, float]) -> dict[int, float]:
  return {int(seed): error for seed, error in sorted(errors.items())}


def mean_ranks(errors: dict[str, dict[int, float]]) -> dict[str, float]:
  """Return the rank of each method, mean over the splits that all have.

  Equal errors share the mean of their ranks.

  Args:
    errors: method -> split -> error.
  """
  if not errors:
    return {}
  seeds = sorted(set.intersection(*(set(found) for found in errors.values())))
  if not seeds:
    return dict.fromkeys(errors, float('nan'))
  table = [[found[seed] for seed in seeds] for found in errors.values()]
  ranks = stats.rankdata(table, axis=0).mean(axis=1).tolist()
  return dict(zip(errors, ranks, strict=True))


def _difference(method: str, errors: dict[str, dict[int, float]]) -> str:
  """Return the paired difference to the labels alone, with its interval."""
  if method == BASELINE or BASELINE not in errors:
    return tables.NONE
  mine, base = errors[method], errors[BASELINE]
  seeds = sorted(mine.keys() & base.keys())
  if len(seeds) < 2:
    return tables.NONE
  effect = claims.effect([mine[s] for s in seeds], [base[s] for s in seeds])
  return f'{effect.value:+.2f} [{effect.low:+.2f}, {effect.high:+.2f}]'


def selected(found: Benchmark, methods: Sequence[str] | None) -> list[Entry]:
  """Return the entries of some methods, of all if None.

  Raises:
    InputError: the benchmark has no such method.
  """
  by_method = {entry.method: entry for entry in found.entries}
  return [
    by_method[registry.choose('methods', name, by_method)]
    for name in methods or by_method
  ]
