"""Draws a figure of a paper from the folder of a finished run.

python experiments/figures.py --list
python experiments/figures.py --figure=association/3 --run=runs/FOLDER

A figure is a function `(finished, *, options) -> Figure, tables`, whose options
are flags. It is written as PNG and as PDF, and the data behind it as CSV.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import importlib
import json
import pathlib
import sys
from typing import Any, NamedTuple

from absl import app, flags
import assembly
import association_figures
import association_graph
import common
import flagging
import jax
import numpy as np
import plotting
import r2d2_figures

from ssljax import (
  batches,
  checkpoint,
  datasets,
  parallel,
  program,
  record,
  train,
)
from ssljax.core import InputError, TrainState, require
from ssljax.networks.network import Outputs
from ssljax.splits import Split

FLAGS = flags.FLAGS


class Drawing(NamedTuple):
  """A figure that can be drawn."""

  draw: Callable  # (Finished, *, options) -> Figure, {table: rows}
  shows: str


# METHOD/NUMBER of the paper, or METHOD/WORD where it has no such figure.
FIGURES = {
  'association/2': Drawing(
    association_graph.evolution, 'associations early in a run and at its end'
  ),
  'association/3': Drawing(
    association_figures.mistakes, 'labelled images, confusions, mistakes'
  ),
  'association/4': Drawing(
    association_figures.neighbours, 'nearest neighbours of unlabelled images'
  ),
  'r2d2/2': Drawing(
    r2d2_figures.features, '2-d features before and after D2 (--keep_stages)'
  ),
  'r2d2/theorems': Drawing(
    r2d2_figures.theorems, 'theorems 1 and 2, Eq. 13: measured in training'
  ),
}


@dataclasses.dataclass(frozen=True)
class Finished:
  """A finished run under one of its splits, as figures look at it."""

  dataset: datasets.Dataset
  split: Split
  program: program.Program  # of one seed
  after: Callable  # step -> its state, with an axis [1] of seeds, if kept
  observe: Callable  # (state, image, key) -> Outputs; one, so compiled once
  settings: dict[str, Any]  # the method's hyper-parameters
  measured: list[dict]  # lines of metrics.jsonl, in order

  @property
  def steps(self) -> int:
    """The length of the run."""
    return train.total_steps(self.program.method)

  @property
  def stage_ends(self) -> dict[str, int]:
    """The last step of each stage, by its name."""
    return train.stage_ends(self.program.method)

  @functools.cached_property
  def state(self) -> TrainState:
    """At the end of the run."""
    return self.after(self.steps)

  def infer(self, state: TrainState, feed: batches.Feed, rows) -> Outputs:
    """What the evaluated weights say of rows `[M]`, as NumPy arrays.

    Args:
      state: `self.state`, or another one of the run.
      feed: `program.data.train` or `program.data.test`.
      rows: `[M]` of that feed.
    """
    swept = self.program.sweep(self.observe, feed)(state, np.asarray(rows))
    return jax.tree.map(lambda x: jax.device_get(x)[0, : len(rows)], swept)

  def replay(self, steps: int) -> TrainState:
    """The state after the first steps of the run, taken once more.

    Nothing but the seed is needed: the order of a run is arithmetic. Not for
    a stage that re-estimates something after an epoch.
    """
    made, stage = self.program, self.program.method.stages[0]
    order = batches.Order(stage.draw, self.split)
    rows_of = functools.partial(batches.rows_of_call, [order])
    calls = [(step, step + 1) for step in range(steps)]
    state = made.initial([self.split], rows_of((0, 1)))
    for pixels, rows in made.data.train.batches(rows_of, calls):
      state, _ = made.steps[0](state, (pixels, made.fitted), rows)
    return state


def observer(net, method) -> Callable:
  """`(state, image, key) -> Outputs` of the weights that are evaluated."""

  def observe(state, image, key):
    del key
    return net.infer(*method.weights(state), image)

  return observe


# Loading.


def finished_result(folder: pathlib.Path) -> dict:
  """The `result.json` of a run that is complete."""
  require(
    (folder / 'flags.txt').is_file(),
    f"--run={folder}: holds no run: give a run's folder, the --workdir of "
    'the command that trained it',
  )
  path = folder / 'result.json'
  result = json.loads(path.read_text()) if path.exists() else {}
  require(
    result.get('complete', False),
    f'--run={folder}: is not finished: run its command again with '
    f'--workdir={folder}, it goes on from the last checkpoint',
  )
  return result


def take_flags(folder: pathlib.Path, method: str, data_dir, corrupt: int):
  """Has FLAGS say what they said in a run.

  Args:
    folder: of the run.
    method: the binary that made it.
    data_dir: where its data set is now.
    corrupt: how many corrupt images it may have.

  Returns:
    The binary's arms.
  """
  binary = importlib.import_module(method)
  common.define(binary.ARMS, **getattr(binary, 'DEFAULTS', {}))
  lines = (folder / 'flags.txt').read_text().split('\n')
  try:
    FLAGS([method, *filter(None, lines)])
  except flags.Error as error:
    raise InputError(
      f'--run={folder}: its flags.txt is of another version ({error}): run it '
      'again with this one'
    ) from error
  FLAGS.data_dir, FLAGS.corrupt = data_dir, corrupt
  return binary.ARMS


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
    f'--seed={seed}: --run={folder} has {result["seeds"]}: give one of them',
  )
  arms = take_flags(folder, result['method'], data_dir, corrupt)
  run = assembly.assemble(arms)
  require(
    [split.digest for split in run.drawn] == result['splits'],
    f'--run={folder}: its labelled images are others than its flags draw now: '
    'give the data set it was trained on, with --data_dir',
  )
  method, at = run.methods[-1], result['seeds'].index(seed)
  size = FLAGS.seeds_at_once
  group = run.drawn[at - at % size :][:size]
  make = functools.partial(program.Program, method, run.net, run.data, run.mesh)
  return Finished(
    run.dataset,
    run.drawn[at],
    make(),
    lambda step: restore(folder, make(seeds=len(group)), group, seed, step),
    observer(run.net, method),
    flagging.given(arms[method.name]),
    [line for line in record.read(folder, method.name) if line['seed'] == seed],
  )


def restore(folder: pathlib.Path, made, group, seed: int, step: int):
  """A `TrainState` of a run, of one seed and with an axis [1].

  Args:
    folder: of the run.
    made: the `Program` of the group.
    group: splits that were trained at once.
    seed: of one of them.
    step: after which the state was kept.
  """
  where = assembly.checkpoint_folder(folder, made.method, group)
  # Opening the checkpoints would make the folder.
  restored = None
  if where.is_dir():
    with contextlib.closing(checkpoint.Checkpoints(where)) as checkpoints:
      job = train.Job(made.method.name, made, group)
      restored = train.restore(job, checkpoints, step)
  require(
    restored is not None,
    f'--run={folder}: the checkpoint of step {step} is not in {where}: run '
    'its command again with --overwrite'
    + ('' if step == train.total_steps(made.method) else ' --keep_stages'),
  )
  at = [split.seed for split in group].index(seed)
  return jax.tree.map(lambda x: x[at : at + 1], restored)


def make_folder(folder: pathlib.Path) -> pathlib.Path:
  """Makes the folder of the figures, before anything is computed."""
  with write_errors(folder):
    folder.mkdir(parents=True, exist_ok=True)
  return folder


@contextlib.contextmanager
def write_errors(folder: pathlib.Path):
  """Makes one line of a folder that cannot be written."""
  try:
    yield
  except OSError as error:
    raise InputError(
      f'--out={folder}: cannot be written ({error.strerror}): give another '
      'folder'
    ) from error


# The binary.


def define_flags() -> None:
  """Defines this program's flags; a figure's options are flags too."""
  flags.DEFINE_string('figure', None, f'One of {", ".join(FIGURES)}.')
  flags.DEFINE_string('run', None, 'Folder of the finished run to draw.')
  flags.DEFINE_string('out', None, 'RUN/figures if unset.')
  flags.DEFINE_integer('seed', None, "Number of the split; the run's first.")
  flags.DEFINE_string('data_dir', None, 'Where TFDS data sets are prepared.')
  flags.DEFINE_integer('corrupt', 0, 'How many corrupt images to tolerate.')
  flags.DEFINE_bool('list', False, 'List the figures.')
  flagging.define(*(drawing.draw for drawing in FIGURES.values()))


def listing() -> str:
  """The figures, one a line."""
  return '\n'.join(f'{name}  {kind.shows}' for name, kind in FIGURES.items())


def check(figure: str | None, folder: str | None) -> None:
  """Refuses what cannot be drawn, before anything is loaded."""
  require(
    figure in FIGURES,
    f'--figure={figure or ""}: give one of {", ".join(FIGURES)}',
  )
  plotting.check_matplotlib()
  require(folder is not None, '--run: give the folder of a finished run')
  made_by = finished_result(pathlib.Path(folder))['method']
  require(
    made_by == figure.split('/')[0],
    f'--figure={figure}: is not of {made_by}, the method of --run={folder}: '
    'give another figure, or another run',
  )


def draw(own: set[str]) -> None:
  """Draws what the flags name.

  Args:
    own: the names of this program's flags.
  """
  asked = {name: FLAGS[name].value for name in own}
  check(asked['figure'], asked['run'])
  make = FIGURES[asked['figure']].draw
  options = flagging.given(make)
  folder = pathlib.Path(asked['run'])
  out = make_folder(pathlib.Path(asked['out'] or folder / 'figures'))
  for name in own:  # `seed` and `data_dir` are the run's from here on
    delattr(FLAGS, name)

  finished = load(folder, asked['seed'], asked['data_dir'], asked['corrupt'])
  name = f'{asked["figure"].replace("/", "-")}.seed-{finished.split.seed}'
  with plotting.style():
    figure, tables = make(finished, **options)
    with write_errors(out):
      paths = plotting.save(out / name, figure, tables)
  print('\n'.join(map(str, paths)))


def main() -> None:
  """Draws a figure and exits."""
  parallel.keep_freed_memory()
  known = set(FLAGS)
  define_flags()
  own = set(FLAGS) - known

  def parse(argv):
    try:
      return FLAGS(argv)
    except flags.Error as error:
      common.fail('figures', f'{error} (--help lists the flags)')

  def run(argv):
    if not FLAGS['verbosity'].present:
      common.quieten_orbax()
    try:
      require(
        len(argv) == 1, f'"{argv[-1]}" is not a flag: flags begin with --'
      )
      if FLAGS['list'].value:
        print(listing())
        sys.exit()
      draw(own)
    except InputError as error:
      common.fail('figures', error)

  app.run(run, flags_parser=parse)


if __name__ == '__main__':
  main()
