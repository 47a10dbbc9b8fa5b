"""Draws a figure of a paper from the folder of a finished run.

python experiments/figures.py --list
python experiments/figures.py --figure=association/3 --run=runs/FOLDER

A figure is a function `(finished, *, options) -> Figure, tables`, whose options
are flags; one that compares runs takes several. It is written as PNG and as
PDF, and the data behind it as CSV.
"""

from collections.abc import Callable
import pathlib
from typing import Any, NamedTuple

from absl import flags

from ssljax import signatures
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

  draw: Callable  # (*runs, options) -> Figure, {table: rows}
  shows: str
  runs: int = 1  # that it can compare; each is a `loading.Finished`
  alone: bool = True  # whether a single one says something
  merges: bool = False  # runs of other splits into one; they count as one


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
  'deepbass/1': Drawing(
    deepbass_figures.maps, 'classes over the plane; a --run each (yin-yang)', 4
  ),
  'deepbass/3': Drawing(
    deepbass_figures.curves,
    'accuracy over the iterations; a --run each',
    6,
    merges=True,
  ),
  'llp/2a': Drawing(
    llp_maps.evolution, 'classes over training (--keep_stages, --keep_every)'
  ),
  'llp/2b': Drawing(
    llp_norms.trajectories, 'mean aggregation over training; a --run each', 6
  ),
  'llp/2cd': Drawing(
    llp_norms.norms, 'aggregation of each class, early and late or of two', 2
  ),
  'llp/2eg': Drawing(
    llp_maps.categories, 'one class in two dimensions, with examples'
  ),
  'madnn/3': Drawing(
    madnn_figures.robustness,
    'the error by how many labels; a --run each',
    9,
    alone=False,
    merges=True,
  ),
  'madnn/4': Drawing(
    madnn_figures.keys, 'keys among features over training (--keep_every)'
  ),
  'madnn/5': Drawing(
    madnn_figures.values, 'value embeddings over training (--keep_every)'
  ),
  'madnn/6': Drawing(
    madnn_figures.predictions,
    'what the memory says of a few images over training (--keep_every)',
  ),
  'r2d2/2': Drawing(
    r2d2_figures.features, '2-d features before and after D2 (--keep_stages)'
  ),
  'r2d2/theorems': Drawing(
    r2d2_figures.theorems, 'theorems 1 and 2, Eq. 13: measured in training'
  ),
}


def define_flags(values: flags.FlagValues) -> None:
  """Defines this program's flags; a figure's options are flags too."""
  flags.DEFINE_string(
    'figure', None, f'One of {", ".join(FIGURES)}.', flag_values=values
  )
  flags.DEFINE_multi_string(
    'run',
    None,
    'Folder of a finished run; repeated where runs are compared.',
    flag_values=values,
  )
  flags.DEFINE_string('out', None, 'RUN/figures if unset.', flag_values=values)
  flags.DEFINE_bool('list', False, 'List the figures.', flag_values=values)
  tool.define_run_flags(values)
  config_flags.define_unset(
    values, {name: kind.draw for name, kind in FIGURES.items()}
  )


def listing() -> str:
  """The figures, one a line."""
  return '\n'.join(f'{name}  {kind.shows}' for name, kind in FIGURES.items())


def check(figure: str | None, folders: list[str] | None) -> None:
  """Refuses what cannot be drawn, before anything is loaded."""
  require(
    figure in FIGURES,
    f'--figure={figure or ""}: give one of {", ".join(FIGURES)}',
  )
  style.check_matplotlib()
  require(bool(folders), '--run: give the folder of a finished run')
  for folder in folders:
    made_by = load.finished_result(pathlib.Path(folder))['method']
    require(
      made_by == figure.split('/')[0],
      f'--figure={figure}: is not of {made_by}, the method of --run={folder}: '
      'give another figure, or another run',
    )
  most, count = FIGURES[figure].runs, len(folders)
  if FIGURES[figure].merges:
    count = len(comparison.by_settings(list(map(pathlib.Path, folders))))
  require(
    count <= most,
    f'--run: {count} are given, --figure={figure} shows at most {most}: '
    'leave some out',
  )


def make_folder(folder: pathlib.Path) -> pathlib.Path:
  """Makes the folder of the figures, before anything is computed."""
  with main.write_errors(folder):
    folder.mkdir(parents=True, exist_ok=True)
  return folder


def draw(asked: dict[str, Any]) -> None:
  """Draws what the flags, by name, ask for."""
  if asked['list']:
    print(listing())
    return
  check(asked['figure'], asked['run'])
  make = FIGURES[asked['figure']].draw
  given = {name: asked[name] for name in signatures.keywords(make)}
  options = {name: x for name, x in given.items() if x is not None}
  folders = [pathlib.Path(folder) for folder in asked['run']]
  out = make_folder(pathlib.Path(asked['out'] or folders[0] / 'figures'))

  how = asked['seed'], asked['data_dir'], asked['corrupt']
  runs = [load.load(folder, *how) for folder in folders]
  name = f'{asked["figure"].replace("/", "-")}.seed-{runs[0].split.seed}'
  with style.style():
    figure, tables = make(*runs, **options)
    with main.write_errors(out):
      paths = style.save(out / name, figure, tables)
  print('\n'.join(map(str, paths)))
