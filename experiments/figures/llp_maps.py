"""Figures 2a and 2e to 2g of LLP: embeddings in two dimensions.

Zhuang, Ding, Murli, Yamins, 2019, section 5:
  2a    `evolution`   a few classes, over training
  2e-g  `categories`  one class at the end, and examples of it

Each takes a `loading.Finished`. Two dimensions are by metric MDS. The classes
are the true ones, whether or not the run knew an image's.

Letters: M drawn training images, C classes, D embedding, E examples.
"""

from collections.abc import Sequence
import itertools
import math

import numpy as np

from ssljax.core import UNLABELLED
from ssljax.data.splits import generator
from ssljax.errors import positive, require
from ssljax.experiments.figures import comparison, llp_norms, style

# Random streams above those of `splits` and `batches`.
_CLASSES, _IMAGES = 52, 53
PANELS = 5  # classes in 2a
EXAMPLES = 6  # images of a class in 2e-g


def scaled(v: np.ndarray) -> np.ndarray:
  """Metric MDS `[M, 2]` of embeddings `[M, D]`, by their distances.

  From the principal components on: a function of v alone, and centred.
  """
  from sklearn import decomposition, manifold, metrics  # slow to import

  start = decomposition.PCA(2, random_state=0).fit_transform(v)
  distances = metrics.euclidean_distances(v.astype(float))
  return manifold.smacof(distances, init=start, n_init=1, random_state=0)[0]


def turned(xy: np.ndarray, onto: np.ndarray) -> np.ndarray:
  """Points `[M, 2]` turned or mirrored as near as can be to others."""
  from scipy import linalg

  return xy @ linalg.orthogonal_procrustes(xy, onto)[0]


def named(classes: str, names: Sequence[str]) -> np.ndarray:
  """The numbers of the classes in 'name,name'."""
  given = classes.split(',')
  strange = [name for name in given if name not in names]
  some = ', '.join(names[: style.MANY_CLASSES])
  require(
    not strange and len(set(given)) == len(given),
    f'--classes={classes}: give different names, as of {some}'
    + (', ...' if len(names) > style.MANY_CLASSES else ''),
  )
  return np.array([names.index(name) for name in given])


def some_images(finished, label: int, count: int) -> np.ndarray:
  """Random rows of a class, at most `count`, in order.

  A tenth of them are labelled, as of the paper's: of few labels none would be
  among them by chance.
  """
  rows, labels = finished.known_rows, finished.split.labels
  mine = rows[finished.dataset.train.labels[rows] == label]
  require(
    len(mine) > 2 and count > 2,
    f'--classes, --points: class {finished.dataset.classes[label]} has '
    f'{len(mine)} images, {count} may be drawn: at least 3 are needed',
  )
  mine = generator(finished.split.seed, _IMAGES, label).permutation(mine)
  known = mine[labels[mine] != UNLABELLED][: max(1, count // 10)]
  others = np.setdiff1d(mine, known, assume_unique=True)
  return np.sort(np.concatenate([known, others[: count - len(known)]]))


def draw_points(axes, xy, truth, labelled, size: float) -> None:
  """Points `[M, 2]` of classes `[M]`, the `labelled [M]` with a black edge."""
  colours = np.array([style.class_colour(c) for c in truth])
  hidden = {'s': size, 'c': colours[~labelled], 'linewidths': 0}
  known = {'s': 4 * size, 'c': colours[labelled], 'linewidths': 0.6}
  axes.scatter(*xy[~labelled].T, rasterized=True, **hidden)
  axes.scatter(*xy[labelled].T, edgecolors='k', zorder=3, **known)


# Figure 2a.


def evolution(
  finished, *, classes: str = '', points: int = 500, steps: Sequence[int] = ()
):
  """Figure 2a: images of a few classes after several steps.

  Args:
    finished: the run.
    classes: names of those that are drawn, as a,b; random ones if empty.
    points: images that are drawn; MDS takes their square.
    steps: after which, of those the run has kept; up to five of them if empty.
  """
  positive(points=points)
  steps = comparison.chosen_steps(finished, steps)
  names = finished.dataset.classes
  labels = named(classes, names) if classes else random_classes(finished)
  each = points // len(labels)
  parts = [some_images(finished, label, each) for label in labels]
  rows = np.concatenate(parts)
  labelled = finished.split.labels[rows] != UNLABELLED
  maps = [scaled(llp_norms.embeddings(finished, step, rows)) for step in steps]
  for before, now in itertools.pairwise(maps):
    now[:] = turned(now, before)
  truth = np.repeat(np.arange(len(labels)), [len(part) for part in parts])
  shown = [names[label] for label in labels]
  titles = [title_of(finished, step) for step in steps]
  table = [('step', 'train_row', 'class', 'labelled', 'x', 'y')]
  table += [
    (step, row, shown[c], int(known), *point)
    for step, xy in zip(steps, maps, strict=True)
    for row, c, known, point in zip(rows, truth, labelled, xy, strict=True)
  ]
  figure = draw_evolution(maps, truth, labelled, shown, titles)
  return figure, {'embeddings': table}


def title_of(finished, step: int) -> str:
  """'step 100 (warm)': a step and the stage it belongs to."""
  ends = finished.stage_ends.items()
  stage = next(name for name, end in ends if step <= end)
  return f'step {step:,} ({stage})'


def random_classes(finished) -> np.ndarray:
  """A few classes, in order."""
  there = np.unique(finished.dataset.train.labels[finished.known_rows])
  draws = generator(finished.split.seed, _CLASSES)
  return np.sort(draws.permutation(there)[:PANELS])


def draw_evolution(maps, truth, labelled, names, titles):
  """Panels in a row.

  Args:
    maps: points `[M, 2]` of each panel.
    truth: `[M]`, places among the names.
    labelled: `[M]` bool.
    names: of the classes that are drawn.
    titles: of the panels.
  """
  from matplotlib import figure, lines

  width = min(2.4, 7.2 / len(maps))
  size = max(width * len(maps), 4.0), width + 0.55
  drawn = figure.Figure(figsize=size, layout='constrained')
  panels = drawn.subplots(1, len(maps), sharex=True, sharey=True, squeeze=False)
  for axes, xy, title in zip(panels[0], maps, titles, strict=True):
    draw_points(axes, xy, truth, labelled, 4)
    axes.set(title=title, xticks=[], yticks=[], aspect='equal')
  dot = {'marker': 'o', 'linestyle': ''}
  handles = [
    lines.Line2D([], [], color=style.class_colour(c), label=name, **dot)
    for c, name in enumerate(names)
  ]
  edge = {'markeredgecolor': 'k', 'markerfacecolor': 'w', 'label': 'labelled'}
  handles.append(lines.Line2D([], [], **edge, **dot))
  style.legend_below(drawn, handles)
  return drawn


# Figure 2e-g.


def categories(finished, *, classes: str = '', points: int = 700):
  """Figures 2e to 2g: images of one class each, at the end.

  Args:
    finished: the run.
    classes: names of those that are drawn, as a,b; if empty those that lie
      together the most closely, the least, and in the middle.
    points: images of a class that are drawn; MDS takes their square.
  """
  positive(points=points)
  names = finished.dataset.classes
  norms = llp_norms.norms_after(finished, finished.steps)
  labels = named(classes, names) if classes else typical(norms)
  panels, table = [], []
  for label in labels:
    rows = some_images(finished, label, points)
    xy = scaled(llp_norms.embeddings(finished, finished.steps, rows))
    labelled = finished.split.labels[rows] != UNLABELLED
    examples = spread(xy, EXAMPLES)
    images = finished.dataset.train.read(rows[examples])
    counts = f'{len(rows)} images, {labelled.sum()} labelled'
    title = f'{names[label]}: norm {norms[label]:.2f}, {counts}'
    panels.append((title, xy, labelled, examples, images))
    number = dict(zip(examples, range(1, 1 + len(examples)), strict=True))
    table += [
      (names[label], norms[label], row, int(known), number.get(i, ''), *point)
      for i, (row, known, point) in enumerate(
        zip(rows, labelled, xy, strict=True)
      )
    ]
  header = 'class', 'norm', 'train_row', 'labelled', 'example', 'x', 'y'
  return draw_categories(panels), {'embeddings': [header, *table]}


def typical(norms: np.ndarray) -> np.ndarray:
  """The classes of the largest, the least and the median norm of `[C]`."""
  order = np.argsort(-norms)[: np.count_nonzero(~np.isnan(norms))]
  return order[list(dict.fromkeys([0, len(order) - 1, len(order) // 2]))]


def spread(xy: np.ndarray, count: int) -> np.ndarray:
  """Points of `[M, 2]`, each the nearest to the centre of a cluster of them."""
  from sklearn import cluster, metrics

  means = cluster.KMeans(min(count, len(xy)), n_init=4, random_state=0).fit(xy)
  nearest = metrics.pairwise_distances_argmin(means.cluster_centers_, xy)
  return np.unique(nearest)


# Inches: of a map, about it, and of the line above.
MAP, GAP, LINE = 2.2, 0.24, 0.25


def draw_categories(panels):
  """A map per class, three in a row, with its examples below.

  Args:
    panels: of each its title, points `[M, 2]`, which are labelled `[M]`, which
      are examples `[E]`, and images `[E, H, W, c]` of these.
  """
  from matplotlib import figure

  pitch = MAP / EXAMPLES
  height, columns = LINE + MAP + pitch + GAP, min(3, len(panels))
  size = columns * (MAP + GAP), math.ceil(len(panels) / columns) * height
  drawn = figure.Figure(figsize=size)
  for i, (title, xy, labelled, examples, images) in enumerate(panels):
    left, top = (i % columns) * (MAP + GAP), (i // columns) * height + LINE
    box = left, size[1] - top - MAP, MAP, MAP
    axes = drawn.add_axes(np.array(box) / np.array([*size, *size]))
    draw_points(axes, xy, np.full(len(xy), i), labelled, 5)
    axes.set(title=title, xticks=[], yticks=[], aspect='equal')
    axes.set_adjustable('datalim')
    strip = style.add_images(
      drawn, left, top + MAP + GAP / 4, pitch, EXAMPLES, 1
    )
    look = {'size': 'small', 'weight': 'bold'}
    for x, (point, image) in enumerate(zip(xy[examples], images, strict=True)):
      number = str(x + 1)
      axes.plot(*point, 'k+', markersize=4, zorder=5)
      style.outlined(axes, *point, f' {number}', va='bottom', **look)
      style.place(strip, image, x, 0)
      strip.text(x, 0.5, number, ha='center', va='top', **look)
  return drawn
