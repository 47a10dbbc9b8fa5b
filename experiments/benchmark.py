"""Compare all methods on equal terms, each with settings chosen on validation.

  python experiments/benchmark.py --list
  python experiments/benchmark.py --name=digits-10
  python experiments/benchmark.py --name=mnist14-10 --data_dir=DIR

`tables/benchmark.toml` states what all methods share, and a small grid for
each. The cells of a grid are ranked by validation errors, as in sweep.py; the
best one is trained again without held-out images, and tested under paired label
splits. Finished runs are not repeated, and interrupted ones are resumed. The
results are kept in --results after each method, and the table is made from
them.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from ssljax.cli import main, tool
from ssljax.errors import InputError, require
from ssljax.experiments import reproduce, sweep
from ssljax.experiments.papers import benchmark, paired, runs, tables
from ssljax.runs import run_folder, summary

# Without a preset: the table's file and the method's own defaults decide.
NO_PRESET = '--flagfile=/dev/null'


def measure(
  found: benchmark.Benchmark,
  entry: benchmark.Entry,
  folder: pathlib.Path,
  more: list[str],
) -> dict[str, Any]:
  """Tune a method, train it under every split, and return its record.

  Args:
    found: the benchmark.
    entry: the method.
    folder: of its runs.
    more: flags of all programs.
  """
  given = [NO_PRESET, *entry.flags, *more]
  note = paired.Note(folder, 'benchmark', given)
  note.refuse_other()
  try:
    ranked = sweep.search(
      entry.method,
      sweep.parse_grid(entry.grid, entry.method),
      folder / 'tuning',
      [range(found.tuning)],
      [*given, f'--validation={found.validation}'],
    )
    best = sweep.as_flags(ranked[0].cell)
    tested = paired.outcome(
      entry.method,
      folder / 'chosen' / paired.as_name(best),
      [range(found.seeds)],
      [*given, *best],
      log=True,
    )
  finally:
    note.write()
  by_seed = lambda errors: {str(seed): e for seed, e in errors.items()}
  return {
    'flags': list(entry.flags),
    'cells': [
      {'settings': one.cell, 'errors': by_seed(one.found.errors)}
      for one in ranked
    ],
    'test_error': by_seed(tested.errors),
    'seconds': round(tested.seconds, 1),
    **tested.details,
  }


def run(asked: dict[str, Any]) -> None:
  """Run what is missing of a benchmark, and print its table.

  Raises:
    InputError: a method failed; the others are run all the same.
  """
  known = benchmark.read()
  found = tables.find(asked['name'], known, 'name')
  entries = benchmark.selected(found, asked['methods'])
  store, failed = reproduce.store_of(asked), []
  where = asked['data_dir']
  more = runs.data_flag(where and main.as_path('data_dir', where))
  for entry in entries:
    folder = store.runs / found.name / entry.method
    try:
      record = measure(found, entry, folder, more)
    except InputError as error:  # The other methods are independent.
      print(f'{entry.title}: {main.as_flags(error)}', file=sys.stderr)
      failed.append(entry.method)
      continue
    methods = benchmark.read_record(store.results, found.name)
    methods[entry.method] = record
    store.results.mkdir(parents=True, exist_ok=True)
    path = benchmark.record_path(store.results, found.name)
    run_folder.write_json(path, {'title': found.title, 'methods': methods})
  methods = benchmark.read_record(store.results, found.name)
  print(benchmark.markdown(found, methods))
  require(
    not failed,
    f'{", ".join(failed)}: failed, see above; run the same command to resume',
  )


def listing() -> str:
  """Return the benchmarks, with the expected CPU minutes of each."""
  rows = [['name', 'title', 'methods', 'CPU minutes']]
  for found in benchmark.read().values():
    count = str(len(found.entries))
    rows.append([found.name, found.title, count, f'{found.minutes:,.0f}'])
  return '\n'.join(summary.aligned(rows))


def define_flags(values: flags.FlagValues) -> None:
  """Define the flags of this program."""
  folders = reproduce.default_folders()
  for name, default, text in (
    ('name', None, 'Benchmark to run; see --list.'),
    ('data_dir', None, 'Folder of prepared TFDS data sets.'),
    (
      'runs',
      str(folders['runs'].with_name('benchmark')),
      'Folder of the runs.',
    ),
    ('results', str(folders['results']), 'Folder of the stored results.'),
  ):
    flags.DEFINE_string(name, default, text, flag_values=values)
  flags.DEFINE_list(
    'methods', None, 'Methods to run; all if unset.', flag_values=values
  )
  flags.DEFINE_bool('list', False, 'List the benchmarks.', flag_values=values)


@runs.interruptible('benchmark')
def act(asked: dict[str, Any]) -> None:
  """Do what the flags select."""
  if asked['list']:
    print(listing())
    return
  require(
    asked['name'] is not None,
    f'`name`: give one of {", ".join(benchmark.read())}',
  )
  run(asked)


if __name__ == '__main__':
  tool.start('benchmark', define_flags, act, devices=False)
