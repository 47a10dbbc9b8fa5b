"""Loads finished runs, for the programs that look at them."""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import pathlib
from typing import Any

from absl import flags
from ssljax.runs import build
from ssljax.cli import main as main_lib
from ssljax.cli import method_flags
import jax
import numpy as np
from ssljax.experiments.figures import style
from ssljax.cli import active_flags

from ssljax.analysis import embeddings
from ssljax.data import (datasets, feeds, sampling)
from ssljax.distributed import placement
from ssljax.training import (checkpoint, compiled, loop, metrics_writer)
from ssljax.core import (UNLABELLED, TrainState)
from ssljax.errors import (InputError, require)
from ssljax.networks.network import Outputs
from ssljax.data.splits import Split

FLAGS = flags.FLAGS
CHUNK = 2**16  # images whose outputs are on the devices at a time
PANELS = 5  # steps that a figure shows, unless it is told which


@dataclasses.dataclass(frozen=True)
class Finished:
  """A finished run under one of its splits."""

  folder: pathlib.Path
  dataset: datasets.Dataset
  split: Split
  program: compiled.Program  # of one seed
  kept: tuple[int, ...]  # steps whose checkpoints there are, in rising order
  after: Callable  # step -> its state, with an axis [1] of seeds, if kept
  per_example: Callable  # (state, image, key) -> Outputs; one, so compiled once
  settings: dict[str, Any]  # the method's hyper-parameters
  measured: list[dict]  # lines of metrics.jsonl, in order

  @property
  def steps(self) -> int:
    """The length of the run."""
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
    """The last step of each stage, by its name."""
    ends = loop.stage_ends(self.program.method)
    return ends | {list(ends)[-1]: self.steps}

  @property
  def known_rows(self) -> np.ndarray:
    """Training rows `[K]` of a known class that were not held out."""
    known = np.flatnonzero(self.dataset.train.labels != UNLABELLED)
    return np.setdiff1d(known, self.split.validation)

  @property
  def hidden(self) -> np.ndarray:
    """Rows seen without a label whose class the data set knows.

    Raises:
      InputError: there is none.
    """
    rows = style.hidden_rows(self.split)
    rows = rows[self.dataset.train.labels[rows] != UNLABELLED]
    require(
      len(rows) > 0,
      f'`run`={self.folder}: knows no class of an unlabelled image: give one '
      'of another data set',
    )
    return rows

  @functools.cached_property
  def state(self) -> TrainState:
    """At the end of the run."""
    return self.after(self.steps)

  def sweep(self, per_example, state: TrainState, feed: feeds.Feed, rows):
    """What `per_example` says of rows `[M]`, as NumPy arrays `[M, ...]`.

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
    """What the evaluated weights say of rows `[M]`; arguments of `sweep`."""
    return self.sweep(self.per_example, state, feed, rows)

  def embed(self, state: TrainState, feed: feeds.Feed, rows) -> np.ndarray:
    """Embeddings `[M, D]` of length 1; arguments of `sweep`."""
    return embeddings.unit(self.sweep(self._embedding, state, feed, rows))

  def features(self, state: TrainState, feed: feeds.Feed, rows) -> np.ndarray:
    """Features `[M, F]`; arguments of `sweep`."""
    return self.sweep(self._feature, state, feed, rows)

  def as_trained(self, state: TrainState, feed: feeds.Feed, rows):
    """Embeddings `[M, D]` by the weights as they are, not by their average.

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
    """The state after the first steps of the run, taken once more.

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


def observer(net, method) -> Callable:
  """`(state, image, key) -> Outputs` of the weights that are evaluated."""

  def per_example(state, image, key):
    del key
    return net.infer(*method.weights(state), image)

  return per_example


def finished_result(folder: pathlib.Path) -> dict:
  """The `result.json` of a run that is complete."""
  require(
    (folder / 'flags.txt').is_file(),
    f"`run`={folder}: holds no run: give a run's folder, the `workdir` of "
    'the command that trained it',
  )
  path = folder / 'result.json'
  result = json.loads(path.read_text()) if path.exists() else {}
  require(
    result.get('complete', False),
    f'`run`={folder}: is not finished: run its command again with '
    f'`workdir`={folder}, it goes on from the last checkpoint',
  )
  return result


@contextlib.contextmanager
def flags_of(folder: pathlib.Path, method: str, data_dir, corrupt: int):
  """Has FLAGS say what they said in a run, and yields the binary's arms.

  Args:
    folder: of the run.
    method: the binary that made it.
    data_dir: where its data set is now.
    corrupt: how many corrupt images it may have.
  """
  binary = importlib.import_module(method)
  names = main_lib.define(binary.ARMS, **getattr(binary, 'DEFAULTS', {}))
  lines = (folder / 'flags.txt').read_text().split('\n')
  try:
    FLAGS([method, *filter(None, lines)])
    FLAGS.data_dir, FLAGS.corrupt = data_dir, corrupt
    yield binary.ARMS
  except flags.Error as error:
    raise InputError(
      f'`run`={folder}: its flags.txt is of another version ({error}): run it '
      'again with this one'
    ) from error
  finally:
    for name in names:
      delattr(FLAGS, name)


def load(
  folder: pathlib.Path,
  seed: int | None = None,
  data_dir: str | None = None,
  corrupt: int = 0,
) -> Finished:
  """A finished run under one of its splits.

  Args:
    folder: of the run.
    seed: number of the split; the run's first if None.
    data_dir: where its data set is prepared.
    corrupt: how many corrupt images it may have.
  """
  result = finished_result(folder)
  seed = result['seeds'][0] if seed is None else seed
  require(
    seed in result['seeds'],
    f'`seed`={seed}: `run`={folder} has {result["seeds"]}: give one of them',
  )
  at = result['seeds'].index(seed)
  with flags_of(folder, result['method'], data_dir, corrupt) as arms:
    run = build.assemble(arms)
    settings = method_flags.given(arms[run.methods[-1].name])
    size, extra = FLAGS.seeds_at_once, active_flags.most(run.drawn[0])
  require(
    [split.digest for split in run.drawn] == result['splits'],
    f'`run`={folder}: its labelled images are others than its flags draw now: '
    'give the data set it was trained on, with `data_dir`',
  )
  method, group = run.methods[-1], run.drawn[at - at % size :][:size]
  make = functools.partial(
    compiled.Program, method, run.net, run.data, run.mesh, extra=extra
  )
  return Finished(
    folder,
    run.dataset,
    run.drawn[at],
    make(),
    kept_steps(build.checkpoint_folder(folder, method, group)),
    lambda step: restore(folder, make(seeds=len(group)), group, seed, step),
    observer(run.net, method),
    settings,
    [line for line in metrics_writer.read(folder, method.name) if line['seed'] == seed],
  )


def kept_steps(where: pathlib.Path) -> tuple[int, ...]:
  """The steps whose checkpoints are in a folder, in rising order."""
  if not where.is_dir():  # opening the checkpoints would make it
    return ()
  with contextlib.closing(checkpoint.Checkpoints(where)) as checkpoints:
    return checkpoints.steps()


def restore(folder: pathlib.Path, made, group, seed: int, step: int):
  """A `TrainState` of a run, of one seed and with an axis [1].

  Args:
    folder: of the run.
    made: the `Program` of the group.
    group: splits that were trained at once.
    seed: of one of them.
    step: after which the state was kept.
  """
  where = build.checkpoint_folder(folder, made.method, group)
  restored = None
  if step in kept_steps(where):
    with contextlib.closing(checkpoint.Checkpoints(where)) as checkpoints:
      job = loop.Job(made.method.name, made, group)
      restored = loop.restore(job, checkpoints, step)
  require(
    restored is not None,
    f'`run`={folder}: the checkpoint of step {step} is not in {where}: run '
    'its command again with `overwrite=True`, and with `keep_stages=True` or '
    '`keep_every` if it is not the last one',
  )
  at = [split.seed for split in group].index(seed)
  return jax.tree.map(lambda x: x[at : at + 1], restored)


def chosen_steps(finished, steps: Sequence[int]) -> list[int]:
  """The given steps, in order; of all that the run has kept if there are none.

  Args:
    finished: the run.
    steps: of those it has kept.
  """
  kept = finished.kept
  strange = [step for step in steps if step not in kept]
  require(
    not strange,
    f'`steps`={",".join(map(str, steps))}: the run has kept '
    f'{", ".join(map(str, kept))}: give some of them',
  )
  found = style.evenly(np.array(kept or [finished.steps]), PANELS)
  return sorted(set(steps)) or found.tolist()


def names_of(runs) -> list[str]:
  """What tells runs apart: the parts in which their folders' paths differ."""
  paths = [run.folder.parts for run in runs]
  names = [path[-1] for path in paths]
  if len(set(names)) == len(names):
    return names
  if len(set(paths)) < len(paths) or len(set(map(len, paths))) > 1:
    return [str(run.folder) for run in runs]
  differ = [len(set(part)) > 1 for part in zip(*paths, strict=True)]
  return ['/'.join(itertools.compress(path, differ)) for path in paths]


def by_flags(folders: Sequence[pathlib.Path]) -> list[list[pathlib.Path]]:
  """Folders of runs, those together that differ in their splits alone."""
  groups = {}
  for folder in folders:
    lines = (folder / 'flags.txt').read_text().splitlines()
    key = tuple(x for x in lines if not x.startswith(('--seed=', '--seeds=')))
    groups.setdefault(key, []).append(folder)
  return list(groups.values())


def alike(runs: Sequence[Finished]) -> list[list[Finished]]:
  """Runs, those together that differ in their splits alone."""
  by_folder = {run.folder: run for run in runs}
  return [[by_folder[f] for f in group] for group in by_flags(list(by_folder))]


# The programs that look at them.


def define_flags() -> None:
  """Defines the flags that all of them have: which split, where its data is."""
  flags.disclaim_key_flags()  # They are the calling program's.
  flags.DEFINE_integer('seed', None, "Number of the split; the run's first.")
  flags.DEFINE_string('data_dir', None, 'Where TFDS data sets are prepared.')
  flags.DEFINE_integer('corrupt', 0, 'How many corrupt images to tolerate.')


def main(name: str, define: Callable, act: Callable) -> None:
  """Runs a program that looks at finished runs, and exits.

  Args:
    name: of the program.
    define: defines its flags.
    act: gets their values, by name; `FLAGS` are a run's from here on.
  """
  placement.start()
  known = set(FLAGS)
  define()
  own = sorted(set(FLAGS) - known)

  def look():
    asked = {flag: FLAGS[flag].value for flag in own}
    for flag in own:  # `seed` and `data_dir` are flags of a run too
      delattr(FLAGS, flag)
    act(asked)

  main_lib.run(name, look)
