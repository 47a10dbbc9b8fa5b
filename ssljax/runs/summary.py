"""The record of a run: `result.json`, and the table at its end."""

from collections.abc import Mapping, Sequence
import math
import pathlib
import statistics
from typing import Any

import jax
import numpy as np

from ssljax.analysis import classification
from ssljax.core import UNLABELLED, Method
from ssljax.data import duplicates, splits
from ssljax.distributed import multihost, placement
from ssljax.runs import run_folder
from ssljax.training import evaluate, loop
from ssljax.training.job import Progress


def begin(run) -> dict[str, Any]:
  """Return the result of a `build.Run` before it is trained."""
  return {
    'method': run.methods[-1].name,
    'dataset': run.dataset.name,
    'data_variant': run.dataset.variant,
    'data_fingerprint': run.fingerprint,
    'labels': run.config.split.labels,
    'classes': list(run.dataset.classes),
    'seeds': [split.seed for split in run.drawn],
    'splits': [split.digest for split in run.drawn],
    'complete': False,
    'total_steps': _all_steps(run.methods),
    'test_images_in_training': run.copies,
    'arms': {},
  } | run_folder.provenance(run.mesh.size)


def _all_steps(methods: Sequence[Method]) -> int | None:
  """Return the steps of all methods under one split, if they are known."""
  steps = [loop.total_steps(method) for method in methods]
  known = [each for each in steps if each is not None]
  return sum(known) if len(known) == len(steps) else None


def add(
  result: dict[str, Any],
  method: Method,
  progress: Progress,
  minimum: bool,
  images: Mapping[str, int] | None = None,
) -> None:
  """Add the seeds of a finished job to the entry of its method, an arm.

  The errors are those of the last stage; the errors at the ends of the other
  stages are in `test_error_after`. The entry of the run's own method is copied
  to the top of the result.

  Args:
    result: is changed.
    method: that was trained.
    progress: of the job at its end.
    minimum: as in `evaluate.summarize`.
    images: number of different images that all seeds are evaluated on, by
      split, 'test' or 'validation'.
  """
  end = progress.delivered_step
  before = max([0, *(step for step in progress.ends if step < end)])
  evaluations = [e for e in progress.evaluations if e['step'] <= end]
  last_stage = [e for e in evaluations if e['step'] > before]
  names = [stage.name for stage in method.stages]
  reached = dict(zip(names, progress.ends, strict=False))
  # After the stages that a stopped job leaves out it is what it delivers.
  ends = {name: reached.get(name, end) for name in names}
  stages = evaluate.by_stage(progress.evaluations, ends)
  found = {
    'test_error': evaluate.summarize(last_stage, minimum=minimum),
    'test_error_after': stages if len(names) > 1 else {},
    'validation_error': evaluate.summarize(last_stage, prefix='validation_'),
  }
  empty = {'steps': progress.step, 'seconds': 0.0, 'test_error': {}}
  empty |= {kind: {} for kind, errors in found.items() if errors}
  entry = result['arms'].setdefault(method.name, empty)
  for name, values in _final_quality(evaluations).items():
    known = entry.setdefault('pseudo_labels', {}).setdefault(name, [])
    known.extend(values)
  entry['seconds'] = round(entry['seconds'] + progress.seconds, 1)
  _add_times(entry, progress)
  if progress.asked:
    entry.setdefault('asked', []).extend(_queried(progress))
  if progress.stopped:
    entry.setdefault('stopped_early', []).extend(_stops(progress.stopped))
  tables_by_split = progress.tables
  if progress.held_out:
    last = next(x for x in progress.held_out if x['step'] == end)
    tables_by_split = last['tables']
    entry.setdefault('held_out', []).extend(
      {'images': last['images'], 'wrong': wrong} for wrong in last['wrong']
    )
  if progress.warnings:
    entry.setdefault('warnings', []).extend(progress.warnings)
  for kind, errors in found.items():
    for name, values in errors.items():
      entry[kind].setdefault(name, []).extend(values)
  for split, of_split in tables_by_split.items():
    for weights, tables in of_split.items():
      _add_tables(entry, split, weights, tables, (images or {}).get(split))
  if method.name == result['method']:
    result.update(entry)


def _add_times(entry: dict[str, Any], progress: Progress) -> None:
  """Add the seconds of each part of a job, and the peak of device memory."""
  known = entry.setdefault('seconds_of', {})
  for part, seconds in progress.by_part().items():
    known[part] = round(known.get(part, 0.0) + seconds, 3)
  memory = placement.memory_in_use()
  if memory:
    entry['device_bytes'] = memory[1]


def _stops(stopped: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Return why the seeds of a job were stopped, a dict for each."""
  shared = {k: v for k, v in stopped.items() if k != 'seeds'}
  return [each | shared for each in stopped['seeds']]


def _add_tables(
  entry: dict[str, Any], split: str, weights: str, tables: list, images
) -> None:
  """Add the counts of each class under some seeds to the entry of an arm.

  Args:
    entry: is changed.
    split: 'test' or 'validation'.
    weights: 'last' or 'averaged'.
    tables: `evaluate.table` of each seed.
    images: number of different images over all seeds.
  """
  known = entry.setdefault(f'{split}_classes', {}).setdefault(
    weights, {'counts': []}
  )
  known['counts'].extend(table['counts'] for table in tables)
  known['seeds'] = [classification.report(one) for one in known['counts']]
  total = np.sum(known['counts'], axis=0)
  known['pooled'] = classification.report(total, images)
  matrices = [table['confusion'] for table in tables if 'confusion' in table]
  if matrices:
    kept = entry.setdefault(f'{split}_confusion', {})
    kept.setdefault(weights, []).extend(matrices)


def evaluated_images(run) -> dict[str, int]:
  """Return how many images a `build.Run` is evaluated on, by split."""
  drawn, tests = run.drawn, len(run.dataset.test.labels)
  unique = lambda rows: len(np.unique(np.concatenate(rows)))
  return {
    'test': tests or unique([split.test for split in drawn]),
    'validation': unique([split.validation for split in drawn]),
  }


def _final_quality(evaluations) -> dict[str, list[float | None]]:
  """Return the quality of the pseudo-labels at the end, `[S]` by name."""
  return evaluations[-1].get('pseudo_labels', {})


def _queried(progress: Progress) -> list[dict[str, list[int]]]:
  """Return the queried rows and the answers, per seed."""
  seeds = len(progress.asked[0]['rows'])
  return [
    {
      kind: [x for query in progress.asked for x in query[kind][seed]]
      for kind in ('rows', 'labels')
    }
    for seed in range(seeds)
  ]


def opening(run, folder: pathlib.Path) -> str:
  """Return the lines that describe a `build.Run` before it starts."""
  train, split = run.dataset.train, run.drawn[0]
  labelled, unlabelled = len(split.labelled), len(split.unlabelled)
  shared = bool(set(split.labelled) & set(split.unlabelled))
  each = splits.describe_labels(split, run.dataset.classes)
  tests = len(run.dataset.test.labels) or len(split.test)
  copies = duplicates.describe(run.copies, tests)
  copies += '\n' if copies else ''
  return (
    f'{_data_name(run.dataset)}: {len(train.labels)} training images '
    f'{"x".join(map(str, train.shape))}, {labelled} labelled ({each}), '
    f'{unlabelled} seen as unlabelled ({"with" if shared else "without"} the '
    f'labelled ones), {len(split.validation)} held out, '
    f'{tests} to test on{_held_out(run)}\n{copies}'
    f'seeds {split.seed}..{run.drawn[-1].seed}, {run.mesh.size} devices'
    f'{_processes()}{_idle(run)}, {_feed(run)}, run folder {folder}'
  )


def _held_out(run) -> str:
  """Return how the test images were chosen, if they are training images."""
  tests = [split.test for split in run.drawn]
  if not len(tests[0]):
    return ''
  labelled = int((run.dataset.train.labels != UNLABELLED).sum())
  if labelled >= splits.FEW_LABELS:
    return ' (a fifth of the labelled ones, held out)'
  enough = len(tests) >= splits.FOLDS
  more = '' if enough else f'; {splits.FOLDS} seeds test on nearly all'
  return f' (a fold of the labelled ones for each seed{more})'


def _data_name(dataset) -> str:
  """Return 'cifar10', or 'cifar10 = CIFAR-10 (JPEG)' for such a copy."""
  variant = f' = {dataset.variant}' if dataset.variant else ''
  return f'{dataset.name}{variant}'


def _idle(run) -> str:
  """Return ' (2 idle: ...)' if the batches do not divide over all devices."""
  idle = jax.device_count() - run.mesh.size
  if not idle:
    return ''
  names = batch_settings(run.methods).replace('`', '')
  sizes = sorted({s.batch_spec.size for m in run.methods for s in m.stages})
  return (
    f' ({idle} idle: batches of {sizes} images divide by no more; change '
    f'{names})'
  )


def batch_settings(methods: Sequence[Method]) -> str:
  """Return the names of the settings that decide the images of a step."""
  specs = [stage.batch_spec for method in methods for stage in method.stages]
  names = {
    'batch_per_class' if spec.classes else spec.flag
    for spec in specs
    if spec.labelled
  } | {'batch_unlabelled' for spec in specs if spec.unlabelled}
  return ', '.join(f'`{name}`' for name in sorted(names))


def _processes() -> str:
  """Return ' of 4 processes', if there are several."""
  several = multihost.is_multiprocess()
  return f' of {jax.process_count()} processes' if several else ''


def _feed(run) -> str:
  """Return how the images of a `build.Run` reach the devices."""
  if not run.data.train.pixels_are_shared:
    several = multihost.is_multiprocess()
    return f'images streamed{", by each process its own" if several else ""}'
  size = sum(
    len(source.labels)
    * math.prod(source.shape)
    * np.dtype(source.dtype).itemsize
    for source in (run.dataset.train, run.dataset.test)
  )
  return f'images resident, {size / 2**20:,.1f} MiB whole on each device'


def mean_std(values: list[float]) -> str:
  """Return '4.12 ± 0.30': mean and sample standard deviation."""
  mean = statistics.fmean(values)
  if len(values) == 1:
    return f'{mean:.2f}'
  return f'{mean:.2f} ± {statistics.stdev(values):.2f}'


def aligned(rows: list[list[str]]) -> list[str]:
  """Return a line per row, with aligned columns."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    '  '.join(
      cell.ljust(width) for cell, width in zip(row, widths, strict=True)
    ).rstrip()
    for row in rows
  ]


def errors_that_stand(errors: dict[str, list[float]]) -> list[float]:
  """Return the reported errors of a run: of averaged weights, if there are any.

  Args:
    errors: per seed, by kind.
  """
  return errors.get('averaged', errors['last'])


def by_seed(errors: dict[str, list[float]]) -> str:
  """Return '4.12 3.90 (median 4.01)' of the weights that a method evaluates."""
  kind = next(k for k in ('minimum', 'averaged', 'last') if k in errors)
  values = ' '.join(f'{value:.2f}' for value in errors[kind])
  named = ', minimum over training' if kind == 'minimum' else ''
  return f'{values} (median {statistics.median(errors[kind]):.2f}{named})'


def _described(quality: dict[str, list[float | None]]) -> str:
  """Return 'coverage 0.91, accuracy 0.97', means over the seeds."""
  known = {k: [x for x in v if x is not None] for k, v in quality.items()}
  return ', '.join(
    f'{name} {statistics.fmean(values):.2f}'
    for name, values in known.items()
    if values
  )


# Quality of each class.

_MOST_CLASSES, _WORST = 20, 10  # of the table of classes


def reports(
  entry: Mapping[str, Any], kind: str
) -> tuple[dict[str, Any], list[dict]] | None:
  """Return the reports of an arm, pooled and by seed; None of earlier records.

  Args:
    entry: of the arm.
    kind: 'test_error' or 'validation_error'.
  """
  found = entry.get(f'{kind.removesuffix("_error")}_classes')
  if not found:
    return None
  chosen = found.get('averaged', found['last'])
  return chosen['pooled'], chosen['seeds']


def percent(
  share: float | None, interval: Sequence[float] | None = None
) -> str:
  """Return '96.2 [94.1, 97.6]' of shares; '-' of None."""
  if share is None:
    return '-'
  if interval is None:
    return f'{100 * share:.1f}'
  low, high = (100 * x for x in interval)
  return f'{100 * share:.1f} [{low:.1f}, {high:.1f}]'


def accuracy_line(pooled: Mapping[str, Any], seeds: Sequence[Mapping]) -> str:
  """Return accuracy with its intervals, balanced accuracy and macro F1.

  Args:
    pooled: `classification.report` of all seeds.
    seeds: of each seed.
  """
  accuracy = percent(pooled['accuracy'], pooled['accuracy_interval'])
  spread = classification.over_seeds([each['accuracy'] for each in seeds])
  over = ''
  if spread is not None:
    low, high = (100 * x for x in spread)
    over = f', [{low:.1f}, {high:.1f}] over {len(seeds)} seeds'
  return (
    f'accuracy {accuracy} % over {pooled["images"]:,} images{over}; balanced '
    f'accuracy {percent(pooled["balanced_accuracy"])} %, macro F1 '
    f'{percent(pooled["macro_f1"])} %'
  )


def class_table(result: Mapping[str, Any], kind: str) -> list[str]:
  """Return the lines of a table of the classes of a run's own method.

  Of more than 20 classes it has the 10 of least F1.

  Args:
    result: `result.json`.
    kind: 'test_error' or 'validation_error'.
  """
  rows = class_rows(result, kind)
  if not rows:
    return []
  names = result['classes']
  some = f', the {_WORST} of least F1' if len(names) > _MOST_CLASSES else ''
  title = f'classes of {result["method"]}{some}, in % with 95 % intervals'
  return [title, *aligned(rows)]


def class_rows(result: Mapping[str, Any], kind: str) -> list[list[str]]:
  """Return the cells of `class_table`, its header first; [] without any."""
  found, names = reports(result, kind), result.get('classes')
  if not found or not names:
    return []
  pooled, shown = found[0], list(range(len(names)))
  if len(names) > _MOST_CLASSES:
    shown = classification.worst(pooled, _WORST)
  rows = [['class', 'images', 'recall', 'precision', 'F1']]
  for c in shown:
    cells = [
      percent(pooled[name][c], pooled[f'{name}_interval'][c])
      for name in ('recall', 'precision')
    ]
    rows.append(
      [names[c], f'{pooled["support"][c]:g}', *cells, percent(pooled['f1'][c])]
    )
  return rows


def times(result: Mapping[str, Any]) -> list[str]:
  """Return the lines about the time and memory of a run; [] if not known."""
  shares = result.get('goodput_parts')
  if not shares:
    return []
  named = {'steps': 'compiled steps', 'input': 'input wait'}
  found = ', '.join(
    f'{named.get(part, part)} {share:.0%}'
    for part, share in shares.items()
    if share >= 0.005 or part == 'steps'
  )
  memory = [arm.get('device_bytes', 0) for arm in result['arms'].values()]
  peak = f'; device memory at most {max(memory) / 2**20:,.0f} MiB'
  lines = [f'time: {found}{peak if max(memory) else ""}']
  stepping = shares['steps'] + shares['input']
  if stepping and shares['input'] / stepping > loop.STARVED:
    share = shares['input'] / stepping
    lines.append(f'warning: {loop.starving(share)}')
  return lines


_COLUMNS = {
  'last': 'last step',
  'median_last': 'median of last',
  'averaged': 'averaged weights',
  'minimum': 'minimum over training',
}


def table(result: dict[str, Any], folder: pathlib.Path) -> str:
  """Return the errors of all arms in percent, mean over the seeds."""
  kind = 'test_error' if result['test_error'] else 'validation_error'
  columns = dict(_COLUMNS)
  if 'minimum' not in result.get(kind, {}):
    del columns['minimum']
  rows = [['method', *columns.values(), 'steps', 'seconds']]
  for arm, entry in result['arms'].items():
    errors = entry.get(kind, {})
    cells = [mean_std(errors[c]) if c in errors else '-' for c in columns]
    rows.append([arm, *cells, str(entry['steps']), f'{entry["seconds"]:.0f}'])
  per_seed = [
    f'{arm} by seed: {by_seed(entry[kind])}'
    for arm, entry in result['arms'].items()
    if entry.get(kind)
  ]
  qualities = [
    f'{arm} pseudo-labels: {_described(entry["pseudo_labels"])}'
    for arm, entry in result['arms'].items()
    if entry.get('pseudo_labels')
  ]
  by_stage = [
    f'{arm} after {stage}: {mean_std(values)}'
    for arm, entry in result['arms'].items()
    for stage, values in entry.get('test_error_after', {}).items()
  ]
  accuracies = [
    f'{arm}: {accuracy_line(*found)}'
    for arm, entry in result['arms'].items()
    if (found := reports(entry, kind))
  ]
  warnings = [
    f'warning: {arm} {text}'
    for arm, entry in result['arms'].items()
    for text in entry.get('warnings', [])
  ]
  title = (
    f'{kind.replace("_", " ")} in % on '
    f'{result.get("data_variant") or result["dataset"]}, '
    f'{result["labels"]} labels per class, {len(result["seeds"])} seeds'
  )
  return '\n'.join(
    [
      *(title, *aligned(rows), *by_stage, *per_seed, *qualities),
      *accuracies,
      *class_table(result, kind),
      *warnings,
      *times(result),
      f'run folder: {folder}',
    ]
  )
