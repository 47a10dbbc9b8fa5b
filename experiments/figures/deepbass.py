"""Figures 1 to 3 of DeepBASS.

Rottmann, Kahl, Gottschalk, 2018:
  Figures 1 and 2  `maps`    what classes are predicted where, of points
  Figure 3         `curves`  accuracy over the iterations

Each takes `loading.Finished` runs. Figure 2 is Figure 1 of another --seed.

Letters: N training points, G×G places of a map, S seeds, I iterations.
"""

import textwrap

import numpy as np

from ssljax.core import UNLABELLED
from ssljax.data import feeds
from ssljax.errors import require
from ssljax.experiments.figures import comparison, style
from ssljax.training import metrics_writer

GRID = 121  # places of a map along each side
MARGIN = 0.15  # of a map, beyond its outermost points


# Figures 1 and 2.

# In the paper's order: whether a run goes on after its first stage without
# asking, asks alone, or does both.
PANELS = (
  'initial model',
  'semi-supervised',
  'active',
  'active semi-supervised',
)


def maps(*runs):
  """Figures 1 and 2: the class predicted at every place of the plane.

  Args:
    *runs: a panel each, in the paper's order; on the same points.
  """
  refuse_images(runs)
  runs = sorted(runs, key=lambda run: PANELS.index(kind(run)))
  dataset, axes = runs[0].dataset, axes_of(runs[0])
  places = np.stack(np.meshgrid(*axes), axis=-1)  # [G, G, 2], rows along y
  panels = [
    (title(run), probability(run, places), is_labelled(run)) for run in runs
  ]
  figure = draw_maps(panels, axes, points_of(runs[0]), dataset.train.labels)
  return figure, maps_tables(runs, panels, places)


def refuse_images(runs) -> None:
  """Refuses runs of which there is no such map, or no common one."""
  for run in runs:
    shape, classes = run.dataset.train.shape, len(run.dataset.classes)
    require(
      shape == (1, 2, 1) and classes == 2,
      f'--run={run.folder}: is not of two classes in the plane: train one '
      'with --dataset=yin-yang',
    )
    require(
      run.split.seed == runs[0].split.seed,
      f'--run={run.folder}: begins with seed {run.split.seed}, the first '
      f'--run with {runs[0].split.seed}: give --seed',
    )


def is_labelled(run) -> np.ndarray:
  """Points `[N]` bool whose class a run knew at its end."""
  state = run.state
  return np.asarray(state.labels)[0, : state.images] != UNLABELLED


def kind(run) -> str:
  """Which of the `PANELS` a run is."""
  asked = is_labelled(run).sum() > len(run.split.labelled)
  guessed = run.settings['iterations'] and run.settings['membership'] != 'none'
  return PANELS[2 * bool(asked) + bool(guessed)]


def points_of(run) -> np.ndarray:
  """The training points `[N, 2]` of a run."""
  train = run.dataset.train
  return train.read(np.arange(len(train.labels))).reshape(-1, 2)


def axes_of(run) -> tuple[np.ndarray, np.ndarray]:
  """The x `[G]` and the y `[G]` of a map of a run's points."""
  points = points_of(run)
  low, high = points.min(axis=0) - MARGIN, points.max(axis=0) + MARGIN
  return tuple(np.linspace(*ends, GRID) for ends in zip(low, high, strict=True))


def probability(run, places) -> np.ndarray:
  """Of the second class `[G, G]` at places `[G, G, 2]`, without dropout."""
  images = places.reshape(-1, 1, 2, 1).astype(np.float32)
  feed = feeds.resident(images, run.program.place)
  logits = run.infer(run.state, feed, np.arange(len(images))).logits
  first_less_second = (logits[:, 0] - logits[:, 1]).astype(float)
  return (1 / (1 + np.exp(first_less_second))).reshape(places.shape[:2])


def title(run) -> str:
  """What stands above a panel."""
  feed, truth = run.program.data.test, run.dataset.test.labels
  logits = run.infer(run.state, feed, np.arange(feed.size)).logits
  error = 100 * np.mean(logits.argmax(axis=-1) != truth)
  count = is_labelled(run).sum()
  return f'{kind(run)}\n{count} labels, test error {error:.1f} %'


def draw_maps(panels, axes, points, truth):
  """The panels side by side.

  Args:
    panels: of each its title, the probability `[G, G]` of the second class, and
      which points are labelled `[N]` bool.
    axes: x `[G]` and y `[G]` of a map.
    points: `[N, 2]`.
    truth: classes `[N]`.
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
      alpha=0.6,  # so that a point of the same colour is seen
    )
    for label, ink in enumerate(inks):
      mine = points[truth == label]
      part.scatter(*mine.T, s=2, color=ink, linewidths=0, rasterized=True)
    part.scatter(*points[labelled].T, s=9, c='k', marker='x', linewidths=0.7)
    part.set(title=name, xticks=[], yticks=[])
  return drawn


def maps_tables(runs, panels, places) -> dict:
  """The points of every panel, and the maps.

  Args:
    runs: in the order of the panels.
    panels: as of `draw_maps`.
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
  """Figure 3: accuracy on the test images over the iterations.

  Args:
    *runs: a line each, the mean over all its seeds; those that differ in their
      seeds alone share one.
  """
  groups = comparison.alike(runs)
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
      zip(line.mean(axis=0), spread(line), strict=True)
    )
  ]
  return draw_curves(lines), {'accuracy': table}


def accuracies(folder) -> np.ndarray:
  """Accuracy in percent `[S, I + 1]` of a run after its first stage, and on.

  Args:
    folder: of the run; all of its seeds are read.
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
      found[0] = line['test_error_last']  # the last of them stays
    else:
      found.append(line['test_error_last'])
  lengths = {len(found) for found in of_seed.values()}
  require(
    len(lengths) == 1 and lengths != {1},
    f'--run={folder}: its metrics.jsonl has no iterations: give one trained '
    'with --iterations above 0',
  )
  return 100 - np.array(list(of_seed.values()))


def spread(line: np.ndarray) -> np.ndarray:
  """Standard deviation `[I + 1]` over the seeds of a line `[S, I + 1]`."""
  return line.std(axis=0, ddof=1) if len(line) > 1 else np.zeros(line.shape[1])


def draw_curves(lines):
  """A line per run, in a band of one standard deviation.

  Args:
    lines: accuracy `[S, I + 1]` by name.
  """
  from matplotlib import figure

  drawn = figure.Figure(figsize=(3.4, 2.7), layout='constrained')
  axes = drawn.subplots()
  for number, (name, line) in enumerate(lines.items()):
    mean, deviation = line.mean(axis=0), spread(line)
    look = {'color': f'C{number}', 'linewidth': 1}
    axes.plot(mean, label=name, **look)
    ends = mean - deviation, mean + deviation
    axes.fill_between(
      np.arange(len(mean)), *ends, color=f'C{number}', alpha=0.2, linewidth=0
    )
  axes.margins(x=0.01)
  axes.set(xlabel='iteration', ylabel='test accuracy in %')
  # Names of folders may be long: below the picture, in lines of its width.
  wrapped = [textwrap.fill(name.replace(',', ', '), 48) for name in lines]
  drawn.legend(
    axes.lines, wrapped, frameon=False, loc='outside lower left', fontsize=6
  )
  return drawn
