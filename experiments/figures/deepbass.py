"""Figures 1 to 3 of DeepBASS.

Rottmann, Kahl, Gottschalk, 2018:
  Figures 1 and 2  `maps`    predicted classes over the plane
  Figure 3         `curves`  accuracy over the iterations

Each function takes one or more `runs.load.Finished`. Figure 2 is Figure 1 for
another label split (--seed).

Letters: N training points, G x G points of a map's grid, S seeds, I iterations.
"""

import textwrap

import numpy as np

from ssljax.core import UNLABELLED
from ssljax.data import feeds
from ssljax.errors import require
from ssljax.experiments.figures import comparison, style
from ssljax.training import metrics_writer

GRID = 121  # G
MARGIN = 0.15  # distance from the outermost points to the edge of a map


# Figures 1 and 2.

# In the paper's order: the first stage alone; then pseudo-labels, acquired
# labels, or both.
PANELS = (
  'initial model',
  'semi-supervised',
  'active',
  'active semi-supervised',
)


def maps(*runs):
  """Draw Figures 1 and 2: the predicted class over the plane.

  Args:
    *runs: finished runs on the same points, a panel each; they are drawn in the
      paper's order.

  Returns:
    The figure, and its data as tables.

  Raises:
    InputError: a run has no map, or the label splits differ.
  """
  check_runs(runs)
  runs = sorted(runs, key=lambda run: PANELS.index(kind(run)))
  dataset, axes = runs[0].dataset, axes_of(runs[0])
  places = np.stack(np.meshgrid(*axes), axis=-1)  # [G, G, 2], rows along y
  panels = [
    (panel_title(run), class_probability(run, places), is_labelled(run))
    for run in runs
  ]
  figure = draw_maps(panels, axes, points_of(runs[0]), dataset.train.labels)
  return figure, maps_tables(runs, panels, places)


def check_runs(runs) -> None:
  """Raise `InputError` unless all runs are on the same points in the plane."""
  for run in runs:
    shape, classes = run.dataset.train.shape, len(run.dataset.classes)
    require(
      shape == (1, 2, 1) and classes == 2,
      f'`run`={run.folder}: is not on two classes of points in the plane: '
      'train one with `dataset`=yin-yang',
    )
    require(
      run.split.seed == runs[0].split.seed,
      f'`run`={run.folder}: its first seed is {run.split.seed}, but that of '
      f'`run`={runs[0].folder} is {runs[0].split.seed}: give `seed`',
    )


def is_labelled(run) -> np.ndarray:
  """Return `[N]` bool, the points whose label the run knew at its end."""
  state = run.state
  return np.asarray(state.labels)[0, : state.images] != UNLABELLED


def kind(run) -> str:
  """Return the one of `PANELS` that a run is."""
  acquired = is_labelled(run).sum() > len(run.split.labelled)
  pseudo = run.settings['iterations'] and run.settings['membership'] != 'none'
  return PANELS[2 * bool(acquired) + bool(pseudo)]


def points_of(run) -> np.ndarray:
  """Return the training points `[N, 2]` of a run."""
  train = run.dataset.train
  return train.read(np.arange(len(train.labels))).reshape(-1, 2)


def axes_of(run) -> tuple[np.ndarray, np.ndarray]:
  """Return the coordinates x `[G]` and y `[G]` of a map of a run's points."""
  points = points_of(run)
  low, high = points.min(axis=0) - MARGIN, points.max(axis=0) + MARGIN
  return tuple(np.linspace(*ends, GRID) for ends in zip(low, high, strict=True))


def class_probability(run, places) -> np.ndarray:
  """Return the probability of the second class, without dropout.

  Args:
    run: the finished run.
    places: `[G, G, 2]` points of the plane.

  Returns:
    `[G, G]` probabilities.
  """
  images = places.reshape(-1, 1, 2, 1).astype(np.float32)
  feed = feeds.resident(images, run.program.place)
  logits = run.infer(run.state, feed, np.arange(len(images))).logits
  difference = (logits[:, 0] - logits[:, 1]).astype(float)
  return (1 / (1 + np.exp(difference))).reshape(places.shape[:2])


def panel_title(run) -> str:
  """Return the kind of a run, its number of labels and its test error."""
  feed, truth = run.program.data.test, run.dataset.test.labels
  logits = run.infer(run.state, feed, np.arange(feed.size)).logits
  error = 100 * np.mean(logits.argmax(axis=-1) != truth)
  count = is_labelled(run).sum()
  return f'{kind(run)}\n{count} labels, test error {error:.1f} %'


def draw_maps(panels, axes, points, truth):
  """Draw the panels side by side.

  Args:
    panels: for each panel its title, the probability `[G, G]` of the second
      class, and `[N]` bool, the labelled points.
    axes: coordinates x `[G]` and y `[G]` of a map.
    points: `[N, 2]`.
    truth: true labels `[N]`.
  """
  from matplotlib import colors, figure

  x, y = axes
  width, sides = 1.75, (y[-1] - y[0]) / (x[-1] - x[0])
  drawn = figure.Figure(
    figsize=(max(2, len(panels)) * width, width * sides + 0.45),
    layout='constrained',
  )
  inks = [f'#{style.COLOURS[0]}', f'#{style.COLOURS[1]}']
  tints = colors.LinearSegmentedColormap.from_list('', [inks[0], 'w', inks[1]])
  parts = drawn.subplots(1, len(panels), squeeze=False)[0]
  for part, (name, second, labelled) in zip(parts, panels, strict=True):
    part.imshow(
      second,
      extent=(x[0], x[-1], y[0], y[-1]),
      origin='lower',
      interpolation='bilinear',
      cmap=tints,
      vmin=0,
      vmax=1,
      alpha=0.6,  # Points of the same colour stay visible.
    )
    for label, ink in enumerate(inks):
      mine = points[truth == label]
      part.scatter(*mine.T, s=2, color=ink, linewidths=0, rasterized=True)
    part.scatter(*points[labelled].T, s=9, c='k', marker='x', linewidths=0.7)
    part.set(title=name, xticks=[], yticks=[])
  return drawn


def maps_tables(runs, panels, places) -> dict:
  """Return the points with their labelled marks, and the maps, as tables.

  Args:
    runs: finished runs in the order of the panels.
    panels: as in `draw_maps`.
    places: `[G, G, 2]`.
  """
  names = comparison.names_of(runs)
  points, truth = points_of(runs[0]), runs[0].dataset.train.labels
  known = np.stack([labelled for _, _, labelled in panels], axis=1)
  maps_of = np.stack([second.ravel() for _, second, _ in panels], axis=1)
  return {
    'points': [
      ('train_row', 'class', 'x', 'y', *(f'labelled {name}' for name in names)),
      *(
        (row, runs[0].dataset.classes[c], *xy, *map(int, some))
        for row, (c, xy, some) in enumerate(
          zip(truth, points, known, strict=True)
        )
      ),
    ],
    'maps': [
      ('x', 'y', *(f'{runs[0].dataset.classes[1]} {name}' for name in names)),
      *(
        (*xy, *some)
        for xy, some in zip(places.reshape(-1, 2), maps_of, strict=True)
      ),
    ],
  }


# Figure 3.


def curves(*runs):
  """Draw Figure 3: test accuracy over the iterations.

  Args:
    *runs: finished runs, a line each: the mean over all seeds. Runs that differ
      in their label splits alone share a line.

  Returns:
    The figure, and its data as a table.
  """
  groups = comparison.group_runs(runs)
  names = comparison.names_of([group[0] for group in groups])
  lines = {
    name: np.concatenate([accuracies(run.folder) for run in group])
    for name, group in zip(names, groups, strict=True)
  }
  table = [('run', 'iteration', 'seeds', 'accuracy', 'deviation')]
  table += [
    (name, iteration, len(line), mean, deviation)
    for name, line in lines.items()
    for iteration, (mean, deviation) in enumerate(
      zip(line.mean(axis=0), style.deviation(line), strict=True)
    )
  ]
  return draw_accuracies(lines), {'accuracy': table}


def accuracies(folder) -> np.ndarray:
  """Return the test accuracy in percent after the first stage and iterations.

  Args:
    folder: folder of the run; all its seeds are read.

  Returns:
    `[S, I + 1]` accuracies.

  Raises:
    InputError: the run has no iterations.
  """
  measured = [
    line
    for line in metrics_writer.read(folder, 'deepbass')
    if 'test_error_last' in line
  ]
  of_seed = {}
  for line in measured:
    found = of_seed.setdefault(line['seed'], [None])
    if line['stage'] == 'labelled':
      found[0] = line['test_error_last']  # The last evaluation counts.
    else:
      found.append(line['test_error_last'])
  lengths = {len(found) for found in of_seed.values()}
  require(
    len(lengths) == 1 and lengths != {1},
    f'`run`={folder}: its metrics.jsonl has no iterations: give a run with '
    '`iterations` above 0',
  )
  return 100 - np.array(list(of_seed.values()))


def draw_accuracies(lines):
  """Draw a line per run in a band of one standard deviation.

  Args:
    lines: accuracies `[S, I + 1]` by name of the run.
  """
  from matplotlib import figure

  drawn = figure.Figure(figsize=(3.4, 2.7), layout='constrained')
  axes = drawn.subplots()
  for number, (name, line) in enumerate(lines.items()):
    mean, deviation = line.mean(axis=0), style.deviation(line)
    iterations = np.arange(len(mean))
    style.plot_band(axes, iterations, mean, deviation, f'C{number}', label=name)
  axes.margins(x=0.01)
  axes.set(xlabel='iteration', ylabel='test accuracy in %')
  # Folder names may be long: put them below the axes and wrap them.
  wrapped = [textwrap.fill(name.replace(',', ', '), 48) for name in lines]
  drawn.legend(
    axes.lines, wrapped, frameon=False, loc='outside lower left', fontsize=6
  )
  return drawn
