"""Finished runs: their records, states and outputs."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import json
import pathlib
import stat
from typing import Any

import jax
import numpy as np

from ssljax import files
from ssljax.analysis import embeddings
from ssljax.config import Config
from ssljax.core import UNLABELLED, TrainState
from ssljax.data import datasets, feeds, sampling
from ssljax.data.splits import Split
from ssljax.errors import InputError, require
from ssljax.networks.network import Outputs
from ssljax.runs import build, execute, queries, run_folder
from ssljax.training import (
  checkpoint,
  compiled,
  loop,
  metrics_writer,
  snapshots,
)
from ssljax.training import job as job_lib

CHUNK = 2**16  # images whose outputs are on the devices at a time


@dataclasses.dataclass(frozen=True)
class Finished:
  """A finished run under one of its splits."""

  folder: pathlib.Path
  config: Config
  dataset: datasets.Dataset
  split: Split
  program: compiled.Program  # of one seed
  kept: tuple[int, ...]  # steps whose checkpoints there are, in rising order
  # step -> its state, with an axis [1] of seeds, if it is 0 or was kept
  after: Callable
  per_example: Callable  # (state, image, key) -> Outputs; one, so compiled once
  settings: dict[str, Any]  # the method's hyper-parameters
  measured: list[dict]  # lines of metrics.jsonl, in order
  # The entry of `stopped_early` in result.json, {} if all stages were trained.
  stopped: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def steps(self) -> int:
    """Steps of the delivered model, over all stages."""
    if self.stopped:
      return self.stopped['delivered_step']
    total = loop.total_steps(self.program.method)
    if total is not None:
      return total
    require(
      bool(self.kept),
      f'`run`={self.folder}: has no checkpoint left, which alone knows how '
      'long the run was: run its command again with `overwrite=True`',
    )
    return self.kept[-1]

  @property
  def stage_ends(self) -> dict[str, int]:
    """Last step of each stage, by its name."""
    ends = loop.stage_ends(self.program.method)
    if self.stopped:  # Stages that were left out end with what is delivered.
      last = self.stopped['step']
      return {k: v if v <= last else self.steps for k, v in ends.items()}
    return ends | {list(ends)[-1]: self.steps}

  @property
  def known_rows(self) -> np.ndarray:
    """Training rows `[K]` of a known class that were not held out."""
    known = np.flatnonzero(self.dataset.train.labels != UNLABELLED)
    held_out = np.union1d(self.split.validation, self.split.test)
    return np.setdiff1d(known, held_out)

  @property
  def hidden(self) -> np.ndarray:
    """Rows seen without a label, whose true class is known.

    Raises:
      InputError: there is none.
    """
    rows = hidden_rows(self.split)
    rows = rows[self.dataset.train.labels[rows] != UNLABELLED]
    require(
      len(rows) > 0,
      f'`run`={self.folder}: knows no class of an unlabelled image: give one '
      'of another data set',
    )
    return rows

  @functools.cached_property
  def state(self) -> TrainState:
    """State at the end of the run."""
    return self.after(self.steps)

  def sweep(self, per_example, state: TrainState, feed: feeds.Feed, rows):
    """Map a function over rows `[M]`; return NumPy arrays `[M, ...]`.

    Args:
      per_example: `(state, image [B, H, W, c], key) -> pytree of [B, ...]`, the
        same one every time, so that it is compiled once.
      state: `self.state`, or another one of the run.
      feed: `program.data.train`, `program.data.test`, or another one.
      rows: `[M]` of that feed.
    """
    sweep, rows = self.program.map_dataset(per_example, feed), np.asarray(rows)
    chunks = np.split(rows, range(CHUNK, len(rows), CHUNK))
    first = lambda x, chunk: jax.device_get(x)[0, : len(chunk)]
    swept = [
      jax.tree.map(lambda x, c=chunk: first(x, c), sweep(state, chunk))
      for chunk in chunks
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *swept)

  def infer(self, state: TrainState, feed: feeds.Feed, rows) -> Outputs:
    """Return the outputs of the evaluated weights; arguments of `sweep`."""
    return self.sweep(self.per_example, state, feed, rows)

  def embed(self, state: TrainState, feed: feeds.Feed, rows) -> np.ndarray:
    """Return embeddings `[M, D]` of length 1; arguments of `sweep`."""
    return embeddings.l2_normalize(
      self.sweep(self._embedding, state, feed, rows)
    )

  def features(self, state: TrainState, feed: feeds.Feed, rows) -> np.ndarray:
    """Return features `[M, F]`; arguments of `sweep`."""
    return self.sweep(self._feature, state, feed, rows)

  def as_trained(self, state: TrainState, feed: feeds.Feed, rows):
    """Return embeddings `[M, D]` by the trained weights, not their average.

    Unlike those of `embed` they are as long as the network makes them.
    """
    return self.sweep(self._as_trained, state, feed, rows)

  @functools.cached_property
  def _as_trained(self) -> Callable:
    infer = self.program.net.infer
    return lambda state, image, _: (
      infer(state.params, state.stats, image).embedding
    )

  @functools.cached_property
  def _embedding(self) -> Callable:
    return lambda *args: self.per_example(*args).embedding

  @functools.cached_property
  def _feature(self) -> Callable:
    def feature(*args):
      outputs = self.per_example(*args)
      return outputs.embedding if outputs.feature is None else outputs.feature

    return feature

  def replay(self, steps: int) -> TrainState:
    """Repeat the first steps of the run; return the state after them.

    Nothing but the seed is needed: the order of a run is arithmetic. Not for
    a stage that re-estimates something after an epoch.
    """
    made, stage = self.program, self.program.method.stages[0]
    sampler = sampling.Sampler(stage.batch_spec, self.split)
    rows_of = functools.partial(sampling.rows_of_call, [sampler])
    calls = [(step, step + 1) for step in range(steps)]
    state = made.initial([self.split], rows_of((0, 1)))
    for pixels, rows in made.data.train.batches(rows_of, calls):
      state, _ = made.steps[0](state, (pixels, made.fitted), rows, np.int32(0))
    return state


def hidden_rows(split: Split) -> np.ndarray:
  """Return the rows `[U]` that a run saw only without their label."""
  rows = np.setdiff1d(split.unlabelled, split.labelled)
  # Where every image is labelled, each is seen in both ways.
  return rows if len(rows) else split.unlabelled


def observer(net, method) -> Callable:
  """Return `(state, image, key) -> Outputs` by the evaluated weights."""

  def per_example(state, image, key):
    del key
    return net.infer(*method.weights(state), image)

  return per_example


@contextlib.contextmanager
def damage(folder: pathlib.Path, name: str):
  """Turn a failure to read a file of a run into one line that names it.

  Args:
    folder: of the run.
    name: of the file.

  Raises:
    InputError: the file is missing, damaged or no regular file.
  """
  path = folder / name
  try:
    if not files.in_bucket(path):
      require(stat.S_ISREG(path.stat().st_mode), 'it is no regular file')
    yield
  except (
    *(OSError, ValueError, KeyError, TypeError, AttributeError),
    *(IndexError, RecursionError, OverflowError),
  ) as error:
    said = getattr(error, 'marked', getattr(error, 'strerror', None) or error)
    if isinstance(error, KeyError):
      said = f'it has no {error}'
    said = str(said).removeprefix(f'`run`={folder}: ')
    raise InputError(
      f'`run`={folder}: {name} cannot be read ({said}): restore it from a '
      "copy, or run the run's command again with `overwrite=True`"
    ) from error


def finished_result(folder: pathlib.Path) -> dict:
  """Return the `result.json` of a run that is complete.

  Raises:
    InputError: the folder holds no run, one that is not finished, or damaged
      files.
  """
  where = f'`run`={folder}: '
  try:
    names = {path.name for path in folder.iterdir()}
  except OSError as error:
    raise InputError(
      f'{where}no folder to read ({error.strerror}): give the folder of a '
      'finished run'
    ) from error
  require(
    bool(names & {'config.json', 'flags.txt'}),
    f"{where}holds no run: give a run's folder, the `workdir` of the command "
    'that trained it',
  )
  result = {}
  if 'result.json' in names:
    with damage(folder, 'result.json'):
      text = (folder / 'result.json').read_text(encoding='utf-8')
      result = json.loads(text)
      require(isinstance(result, dict), 'it is no JSON object')
      if result.get('complete', False):
        _check_result(result)
  require(
    result.get('complete', False),
    f'{where}is not finished: run its command again with `workdir`={folder}, '
    'it goes on from the last checkpoint',
  )
  return result


def _check_result(result: dict) -> None:
  """Raise `InputError` unless a complete result has what a run writes."""
  kinds: dict[str, Any] = {
    **dict.fromkeys(('method', 'dataset', 'labels', 'device', 'commit'), str),
    **dict.fromkeys(('command',), str),
    **dict.fromkeys(('seeds', 'splits'), list),
    **dict.fromkeys(('arms', 'test_error', 'versions'), dict),
    **dict.fromkeys(('steps', 'seconds'), (int, float)),
    'complete': bool,
  }
  for name, kind in kinds.items():
    require(isinstance(result[name], kind), f'its {name} is damaged')
  seeds, arms = result['seeds'], result['arms']
  require(
    len(seeds) > 0
    and all(type(seed) is int for seed in seeds)
    and len(seeds) == len(result['splits'])
    and result['method'] in arms,
    'its seeds, splits or arms are damaged',
  )
  for entry in (result, *arms.values()):
    for kind in ('test_error', 'test_error_after', 'validation_error'):
      for values in entry.get(kind, {}).values():
        require(
          isinstance(values, list)
          and len(values) == len(seeds)
          and all(isinstance(value, int | float) for value in values),
          f'its {kind} is damaged',
        )
    require(
      all(isinstance(entry[name], int | float) for name in ('steps', 'seconds'))
      and 'last' in (entry['test_error'] or ('last',)),
      'its steps, seconds or test_error are damaged',
    )


def read_config(folder: pathlib.Path, result: dict) -> Config:
  """Return the config of a finished run.

  Args:
    folder: of the run.
    result: its `result.json`.

  Raises:
    InputError: its record is damaged, or is of another method than its result.
  """
  newer = files.exists(folder / 'config.json')
  name = 'config.json' if newer else 'flags.txt'
  with damage(folder, name):
    config = run_folder.read_config(folder, result['method'])
    require(
      config.method == result['method'],
      f'it is of {config.method}, but result.json of {result["method"]}',
    )
    given = config.split
    require(
      [given.seed + i for i in range(given.seeds)] == result['seeds'],
      f'it has other seeds than result.json, {result["seeds"]}',
    )
    return config


def check_splits(folder: pathlib.Path, result: dict) -> None:
  """Raise `InputError` for a `split.json` that is damaged or of other splits.

  Args:
    folder: of the run.
    result: its `result.json`.
  """
  if not files.exists(folder / 'split.json'):
    return
  with damage(folder, 'split.json'):
    record = json.loads((folder / 'split.json').read_text(encoding='utf-8'))
    require(
      [split['hash'] for split in record['splits']] == result['splits'],
      'it has other splits than result.json',
    )


def read_metrics(folder: pathlib.Path, method: str, result: dict) -> list[dict]:
  """Return the lines of `metrics.jsonl` of a method, in order.

  Args:
    folder: of the run.
    method: name of the trained method.
    result: the run's `result.json`.

  Raises:
    InputError: the file is missing or damaged.
  """
  with damage(folder, 'metrics.jsonl'):
    lines = metrics_writer.read(folder, method)
    for line in lines:
      good = all(type(line[name]) is int for name in ('step', 'seed')) and all(
        isinstance(value, int | float | str) for value in line.values()
      )
      require(good, f'a line is damaged: {str(line)[:80]}')
    first = [x['step'] for x in lines if x['seed'] == result['seeds'][0]]
    steps = result['arms'][method]['steps']
    require(
      max(first, default=0) == steps,
      f'it ends at step {max(first, default=0)} of {steps} of {method}',
    )
    return lines


def load(
  folder: str | pathlib.Path,
  seed: int | None = None,
  data_dir: str | None = None,
  corrupt: int | None = None,
  arm: str | None = None,
  **parts,
) -> Finished:
  """Load a finished run under one of its splits.

  Args:
    folder: of the run.
    seed: number of the split; the run's first if None.
    data_dir: folder of prepared data sets; the run's own if None.
    corrupt: number of corrupt images to leave out, at least the run's own.
    arm: name of a method that the run trained; its own if None.
    **parts: as `build.build` takes them, for a run that was trained with parts
      that no setting names.
  """
  folder = files.as_place('run', str(folder))
  result = finished_result(folder)
  seed = result['seeds'][0] if seed is None else seed
  require(
    seed in result['seeds'],
    f'`seed`={seed}: `run`={folder} has {result["seeds"]}: give one of them',
  )
  at = result['seeds'].index(seed)
  config = read_config(folder, result)
  check_splits(folder, result)
  there = files.exists(folder / 'metrics.jsonl')
  measured = read_metrics(folder, config.method, result) if there else []
  data = config.data
  config = config.replace(
    data_dir=data.data_dir if data_dir is None else data_dir,
    # Images that the run left out have to be left out again.
    corrupt=max(data.corrupt, corrupt or 0),
  )
  run = build.build(config, **parts)
  require(
    [split.digest for split in run.drawn] == result['splits'],
    f'`run`={folder}: its labelled images are others than its settings draw '
    'now: give the data set it was trained on, with `data_dir`',
  )
  trained = {method.name: method for method in run.methods}
  arm = config.method if arm is None else arm
  require(
    arm in trained,
    f'`arm`={arm}: `run`={folder} trained {", ".join(trained)}: give one',
  )
  method, size = trained[arm], run.group_size
  group = run.drawn[at - at % size :][:size]
  make = functools.partial(
    compiled.Program,
    method,
    run.net,
    run.data_of(group),
    run.mesh,
    extra=queries.most(config, run.drawn[0]),
  )

  def program_of(splits) -> compiled.Program:
    made = make(seeds=len(splits))
    made.use_splits(splits)
    return made

  return Finished(
    folder,
    config,
    run.dataset_of(seed),
    run.drawn[at],
    program_of([run.drawn[at]]),
    kept_steps(execute.checkpoint_folder(folder, method, group)),
    lambda step: restore(folder, program_of(group), group, seed, step),
    observer(run.net, method),
    dict(build.settings_of(config, config.factories[arm])),
    [line for line in measured if line['seed'] == seed],
    stop_of(result, arm, seed),
  )


def stop_of(result: dict, arm: str, seed: int) -> Mapping[str, Any]:
  """Return why a seed of an arm left out its last stages; {} if it did not."""
  stops = result['arms'][arm].get('stopped_early', [])
  return next((stop for stop in stops if stop['seed'] == seed), {})


def kept_steps(where: pathlib.Path) -> tuple[int, ...]:
  """Return the steps whose checkpoints are in a folder, in rising order."""
  if not where.is_dir():  # opening the checkpoints would make it
    return ()
  with contextlib.closing(checkpoint.Checkpoints(where)) as checkpoints:
    return checkpoints.steps()


def restore(folder: pathlib.Path, made, group, seed: int, step: int):
  """Restore the `TrainState` of one seed of a run, with an axis [1].

  Args:
    folder: of the run.
    made: the `Program` of the group.
    group: splits that were trained at once.
    seed: of one of them.
    step: after which the state was kept, or 0: the initial state is computed.
  """
  where = execute.checkpoint_folder(folder, made.method, group)
  restored, job = None, job_lib.Job(made.method.name, made, group)
  if step == 0:
    restored = snapshots.Snapshots(job, None).initial()
  elif step in kept_steps(where):
    with contextlib.closing(checkpoint.Checkpoints(where)) as checkpoints:
      restored = loop.restore(job, checkpoints, step)
  require(
    restored is not None,
    f'`run`={folder}: the checkpoint of step {step} is not in {where}: run '
    'its command again with `overwrite=True`, and with `keep_stages=True` or '
    '`keep_every` if it is not the last one',
  )
  at = [split.seed for split in group].index(seed)
  return jax.tree.map(lambda x: x[at : at + 1], restored)
