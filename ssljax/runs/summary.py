"""What a run reports: `result.json` and the table at its end."""

import math
import pathlib
import statistics

import jax
import numpy as np

from ssljax.distributed import multihost
from ssljax.runs import run_folder
from ssljax.training import evaluate, loop
from ssljax.training.loop import Progress


def begin(run) -> dict:
  """Return the result of a `build.Run` before it is trained."""
  return {
    'method': run.methods[-1].name,
    'dataset': run.dataset.name,
    'labels': run.config.split.labels,
    'seeds': [split.seed for split in run.drawn],
    'splits': [split.digest for split in run.drawn],
    'complete': False,
    'total_steps': _all_steps(run.methods),
    'arms': {},
  } | run_folder.provenance(run.mesh.size)


def _all_steps(methods) -> int | None:
  """Steps of all arms under one split, if they are known."""
  steps = [loop.total_steps(method) for method in methods]
  return None if None in steps else sum(steps)


def add(result: dict, method, progress: Progress, minimum: bool) -> None:
  """Adds the seeds of a finished job to the arm of its method.

  The numbers of the binary's own method stand at the top of the result too.

  Args:
    result: gets them.
    method: the `Method` that was trained.
    progress: of the job at its end.
    minimum: as in `evaluate.summarize`.

  What is summarised is the last stage; the others' errors at their ends stand
  beside it.
  """
  arm = method.name
  before = (0, *progress.ends)[-2]
  of_last_stage = [e for e in progress.evaluations if e['step'] > before]
  errors = evaluate.summarize(of_last_stage, minimum=minimum)
  names = [stage.name for stage in method.stages]
  ends = dict(zip(names, progress.ends, strict=True))
  stages = evaluate.by_stage(progress.evaluations, ends)
  empty = {'steps': progress.step, 'seconds': 0.0, 'test_error': {}}
  if len(stages) > 1:
    empty['test_error_after'] = {}
  entry = result['arms'].setdefault(arm, empty)
  entry['seconds'] = round(entry['seconds'] + progress.seconds, 1)
  for i in range(len(errors['last']) if progress.asked else 0):
    found = {
      what: [x for question in progress.asked for x in question[what][i]]
      for what in ('rows', 'labels')
    }
    entry.setdefault('asked', []).append(found)
  for kept, found in (('test_error', errors), ('test_error_after', stages)):
    if kept in entry:
      for name, values in found.items():
        entry[kept].setdefault(name, []).extend(values)
  if arm == result['method']:
    result.update(entry)


def opening(run, folder: pathlib.Path) -> str:
  """What a `build.Run` says before it starts."""
  train, split = run.dataset.train, run.drawn[0]
  labelled, unlabelled = len(split.labelled), len(split.unlabelled)
  shared = bool(set(split.labelled) & set(split.unlabelled))
  there, used = jax.device_count(), run.mesh.size
  names = batch_settings(run.methods).replace('`', '')
  sizes = sorted({s.batch_spec.size for m in run.methods for s in m.stages})
  idle = (
    f' ({there - used} idle: batches of {sizes} images divide by no more; '
    f'change {names})'
    if used < there
    else ''
  )
  return (
    f'{run.dataset.name}: {len(train.labels)} training images '
    f'{"x".join(map(str, train.shape))}, {labelled} labelled, '
    f'{unlabelled} seen as unlabelled ({"with" if shared else "without"} the '
    f'labelled ones), {len(split.validation)} held out, '
    f'{len(run.dataset.test.labels)} to test on\n'
    f'seeds {split.seed}..{run.drawn[-1].seed}, {used} devices'
    f'{_processes()}{idle}, {_feed(run)}, run folder {folder}'
  )


def batch_settings(methods) -> str:
  """Return the names of the settings that decide the images of a step."""
  specs = [stage.batch_spec for method in methods for stage in method.stages]
  names = {
    'batch_per_class' if spec.classes else spec.flag
    for spec in specs
    if spec.labelled
  } | {'batch_unlabelled' for spec in specs if spec.unlabelled}
  return ', '.join(f'`{name}`' for name in sorted(names))


def _processes() -> str:
  """' of 4 processes', if there are several."""
  several = multihost.are_several()
  return f' of {jax.process_count()} processes' if several else ''


def _feed(run) -> str:
  """Where the images of a `build.Run` are."""
  if not run.data.train.pixels_are_shared:
    several = multihost.are_several()
    return f'images streamed{", by each process its own" if several else ""}'
  size = sum(
    len(source.labels)
    * math.prod(source.shape)
    * np.dtype(source.dtype).itemsize
    for source in (run.dataset.train, run.dataset.test)
  )
  return f'images resident, {size / 2**20:,.1f} MiB whole on each device'


def mean_std(values: list[float]) -> str:
  """'4.12 ± 0.30': mean and sample standard deviation."""
  mean = statistics.fmean(values)
  if len(values) == 1:
    return f'{mean:.2f}'
  return f'{mean:.2f} ± {statistics.stdev(values):.2f}'


def aligned(rows: list[list[str]]) -> list[str]:
  """A line per row, its cells under each other."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    '  '.join(
      cell.ljust(width) for cell, width in zip(row, widths, strict=True)
    ).rstrip()
    for row in rows
  ]


def errors_that_stand(errors: dict) -> list[float]:
  """Of a run's errors those that are reported: of the averaged weights, if any.

  Args:
    errors: per seed, by kind.
  """
  return errors.get('averaged', errors['last'])


def by_seed(errors: dict) -> str:
  """'4.12 3.90 (median 4.01)', of the weights that a method evaluates."""
  kind = next(k for k in ('minimum', 'averaged', 'last') if k in errors)
  values = ' '.join(f'{value:.2f}' for value in errors[kind])
  named = ', minimum over training' if kind == 'minimum' else ''
  return f'{values} (median {statistics.median(errors[kind]):.2f}{named})'


def table(result: dict, folder: pathlib.Path) -> str:
  """The arms side by side, test error in percent over the seeds."""
  columns = {
    'last': 'last step',
    'median_last': 'median of last',
    'averaged': 'averaged weights',
  }
  if 'minimum' in result['test_error']:
    columns['minimum'] = 'minimum over training'
  rows = [['method', *columns.values(), 'steps', 'seconds']]
  for arm, entry in result['arms'].items():
    errors = entry['test_error']
    cells = [mean_std(errors[c]) if c in errors else '-' for c in columns]
    rows.append([arm, *cells, str(entry['steps']), f'{entry["seconds"]:.0f}'])
  labels = result['labels']
  per_seed = [
    f'{arm} by seed: {by_seed(entry["test_error"])}'
    for arm, entry in result['arms'].items()
  ]
  by_stage = [
    f'{arm} after {stage}: {mean_std(values)}'
    for arm, entry in result['arms'].items()
    for stage, values in entry.get('test_error_after', {}).items()
  ]
  title = (
    f'test error in % on {result["dataset"]}, {labels} labels per class, '
    f'{len(result["seeds"])} seeds'
  )
  return '\n'.join(
    [title, *aligned(rows), *by_stage, *per_seed, f'run folder: {folder}']
  )
