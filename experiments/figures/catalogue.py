"""The figures that can be drawn, and the program that draws them.

A figure is a function `(*runs, **options) -> (Figure, tables)` of one or more
`runs.load.Finished`. Its options are keyword arguments and become flags.
"""

from collections.abc import Callable, Sequence
import pathlib
from typing import Any, NamedTuple

from absl import flags

from ssljax import files, registry, signatures
from ssljax.cli import config_flags, main, tool
from ssljax.errors import require
from ssljax.experiments.figures import association as association_figures
from ssljax.experiments.figures import (
  association_graph,
  comparison,
  llp_maps,
  llp_norms,
  style,
)
from ssljax.experiments.figures import deepbass as deepbass_figures
from ssljax.experiments.figures import madnn as madnn_figures
from ssljax.experiments.figures import r2d2 as r2d2_figures
from ssljax.runs import load


class Drawing(NamedTuple):
  """A figure that can be drawn."""

  draw: Callable  # (*runs, **options) -> Figure, {name of a table: rows}
  shows: str  # description
  needs: str = ''  # flags that the run must have been trained with
  runs: int = 1  # largest number of runs that it compares
  alone: bool = True  # it can show a single run
  merges: bool = False  # runs that differ in their splits alone count as one
  others: tuple[str, ...] = ()  # methods beside its own whose runs it shows


# Key: METHOD/NUMBER of the paper's figure; METHOD/WORD if the paper has none.
FIGURES = {
  'association/2': Drawing(
    association_graph.evolution, 'associations early in a run and at its end'
  ),
  'association/3': Drawing(
    association_figures.mistakes,
    'labelled images, confusion matrix, misclassified images',
  ),
  'association/4': Drawing(
    association_figures.neighbours, 'nearest neighbours of unlabelled images'
  ),
  'deepbass/1': Drawing(
    deepbass_figures.maps,
    'predicted classes over the plane; --run for each panel',
    needs='--dataset=yin-yang',
    runs=4,
  ),
  'deepbass/3': Drawing(
    deepbass_figures.curves,
    'test accuracy over the iterations; --run for each line',
    runs=6,
    merges=True,
  ),
  'llp/2a': Drawing(
    llp_maps.over_training,
    'embeddings of a few classes over training',
    needs='--keep_stages or --keep_every',
  ),
  'llp/2b': Drawing(
    llp_norms.trajectories,
    'mean aggregation over training; --run for each line',
    runs=6,
  ),
  'llp/2cd': Drawing(
    llp_norms.norms,
    'aggregation of each class, early and late in a run or of two runs',
    runs=2,
  ),
  'llp/2eg': Drawing(
    llp_maps.categories, 'embeddings of single classes, with examples'
  ),
  'madnn/3': Drawing(
    madnn_figures.robustness,
    'test error by number of labels; --run for each number and method',
    runs=9,
    alone=False,
    merges=True,
    others=('supervised',),
  ),
  'madnn/4': Drawing(
    madnn_figures.keys,
    'features and keys over training',
    needs='--keep_every',
  ),
  'madnn/5': Drawing(
    madnn_figures.values,
    'value embeddings over training',
    needs='--keep_every',
  ),
  'madnn/6': Drawing(
    madnn_figures.predictions,
    "the memory's predictions for a few images over training",
    needs='--keep_every',
  ),
  'r2d2/2': Drawing(
    r2d2_figures.features,
    '2-d features before and after D2',
    needs='--keep_stages',
  ),
  'r2d2/theorems': Drawing(
    r2d2_figures.theorems, 'theorems 1 and 2 and Eq. 13, measured in training'
  ),
}


def define_flags(values: flags.FlagValues) -> None:
  """Define the flags of the program, those of all figures among them."""
  flags.DEFINE_string(
    'figure',
    None,
    f'Figure to draw, one of {", ".join(FIGURES)}.',
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    'run',
    None,
    'Folder of a finished run; repeat it to compare runs.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'out',
    None,
    'Folder of the figures; RUN/figures if unset.',
    flag_values=values,
  )
  flags.DEFINE_bool('list', False, 'List the figures.', flag_values=values)
  tool.define_run_flags(values)
  config_flags.define_unset(
    values, {name: drawing.draw for name, drawing in FIGURES.items()}
  )


def listing() -> str:
  """Return a line for every figure: what it shows and needs."""
  return '\n'.join(
    f'{name}  {drawing.shows}'
    + (f' (needs a run with {drawing.needs})' if drawing.needs else '')
    for name, drawing in FIGURES.items()
  )


def check_flags(figure: str | None, folders: Sequence[pathlib.Path]) -> None:
  """Raise `InputError` for a figure that these runs cannot have."""
  require(figure is not None, f'`figure`: give one of {", ".join(FIGURES)}')
  registry.choose('figure', figure, FIGURES)
  style.check_matplotlib()
  require(bool(folders), '`run`: give the folder of a finished run')
  for folder in folders:
    method = load.finished_result(folder)['method']
    require(
      method in (figure.split('/')[0], *FIGURES[figure].others),
      f'`figure`={figure}: is not a figure of {method}, the method of '
      f'`run`={folder}: give another figure or another run',
    )
  most, count = FIGURES[figure].runs, len(folders)
  if FIGURES[figure].merges:
    count = len(comparison.group_by_settings(folders))
  require(
    count <= most,
    f'`run`: {count} runs are given, but `figure`={figure} shows at most '
    f'{most}: leave some out',
  )


def options_of(figure: str, asked: dict[str, Any]) -> dict[str, Any]:
  """Return the options that the flags give to a figure.

  Raises:
    InputError: a flag is an option of other figures alone.
  """
  owners = {}
  for name, drawing in FIGURES.items():
    for option in signatures.keywords(drawing.draw):
      owners.setdefault(option, []).append(name)
  given = {name: asked[name] for name in owners if asked.get(name) is not None}
  for name, value in given.items():
    require(
      figure in owners[name],
      f'`{name}`={value}: is an option of {", ".join(owners[name])}, not of '
      f'`figure`={figure}: leave it out',
    )
  return given


def act(asked: dict[str, Any]) -> None:
  """Draw the figure that the flags describe, and write it."""
  if asked['list']:
    print(listing())
    return
  folders = [files.as_place('run', run) for run in asked['run'] or ()]
  check_flags(asked['figure'], folders)
  draw = FIGURES[asked['figure']].draw
  options = options_of(asked['figure'], asked)
  wanted = folders[0] / 'figures' if asked['out'] is None else asked['out']
  make = files.as_place if files.in_bucket(wanted) else main.as_output_folder
  out = make('out', str(wanted))
  where = asked['seed'], asked['data_dir'], asked['corrupt']
  runs = [load.load(folder, *where) for folder in folders]
  name = f'{asked["figure"].replace("/", "-")}.seed-{runs[0].split.seed}'
  with style.style():
    figure, tables = draw(*runs, **options)
    with main.write_errors(out):
      paths = style.save(out / name, figure, tables)
  print('\n'.join(map(str, paths)))
