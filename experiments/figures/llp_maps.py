"""Figures 2a and 2e to 2g of LLP: embeddings in two dimensions.

Zhuang, Ding, Murli, Yamins, 2019, section 5:
  2a    `over_training`  a few classes over training
  2e-g  `categories`     single classes at the end, with examples

Each function takes a `runs.load.Finished`. Embeddings are mapped to two
dimensions by metric multidimensional scaling (MDS). Classes are true labels,
including those of images whose label was hidden from the run.

Letters: M drawn training images, C classes, D numbers of an embedding, E
examples.
"""

from collections.abc import Sequence
import itertools
import math

import numpy as np

from ssljax.core import UNLABELLED
from ssljax.data.splits import generator
from ssljax.errors import positive, require
from ssljax.experiments.figures import comparison, llp_norms, style

# Random streams, above those of `splits` and `sampling`.
_CLASSES, _IMAGES = 52, 53
PANELS = 5  # classes in 2a
EXAMPLES = 6  # images of a class in 2e-g


def metric_mds(v: np.ndarray) -> np.ndarray:
  """Return the metric MDS `[M, 2]` of embeddings `[M, D]`, centred.

  It starts from the principal components, so the result depends on `v` alone.
  """
  from sklearn import decomposition, manifold, metrics  # Slow to import.

  start = decomposition.PCA(2, random_state=0).fit_transform(v)
  distances = metrics.euclidean_distances(v.astype(float))
  return manifold.smacof(distances, init=start, n_init=1, random_state=0)[0]


def align(xy: np.ndarray, onto: np.ndarray) -> np.ndarray:
  """Rotate or mirror points `[M, 2]` as close as possible to others."""
  from scipy import linalg

  return xy @ linalg.orthogonal_procrustes(xy, onto)[0]


def parse_classes(classes: str, names: Sequence[str]) -> np.ndarray:
  """Return the labels of the classes in 'name,name'.

  Raises:
    InputError: a name is unknown or occurs twice.
  """
  given = classes.split(',')
  unknown = [name for name in given if name not in names]
  some = ', '.join(names[: style.MANY_CLASSES])
  require(
    not unknown and len(set(given)) == len(given),
    f'`classes`={classes}: give different names of {some}'
    + (', ...' if len(names) > style.MANY_CLASSES else ''),
  )
  return np.array([names.index(name) for name in given])


def sample_images(finished, label: int, count: int) -> np.ndarray:
  """Return at most `count` random rows of a class, in order.

  A tenth of the rows are labelled, as in the paper. Without this rule a sample
  would hardly contain any of a few labelled images.

  Raises:
    InputError: fewer than 3 images would be drawn.
  """
  rows, labels = finished.known_rows, finished.split.labels
  mine = rows[finished.dataset.train.labels[rows] == label]
  require(
    len(mine) > 2 and count > 2,
    f'`classes`, `points`: class {finished.dataset.classes[label]} has '
    f'{len(mine)} images, of which at most {count} are drawn: give classes '
    'and points so that at least 3 are',
  )
  mine = generator(finished.split.seed, _IMAGES, label).permutation(mine)
  known = mine[labels[mine] != UNLABELLED][: max(1, count // 10)]
  others = np.setdiff1d(mine, known, assume_unique=True)
  return np.sort(np.concatenate([known, others[: count - len(known)]]))


def draw_points(axes, xy, truth, labelled, size: float) -> None:
  """Draw points in the colours of their classes.

  Args:
    axes: matplotlib axes.
    xy: points `[M, 2]`.
    truth: classes `[M]`.
    labelled: `[M]` bool, points drawn larger with a black edge.
    size: area of an unlabelled point.
  """
  colours = np.array([style.class_colour(c) for c in truth])
  hidden = {'s': size, 'c': colours[~labelled], 'linewidths': 0}
  known = {'s': 4 * size, 'c': colours[labelled], 'linewidths': 0.6}
  axes.scatter(*xy[~labelled].T, rasterized=True, **hidden)
  axes.scatter(*xy[labelled].T, edgecolors='k', zorder=3, **known)


# Figure 2a.


def over_training(
  finished, *, classes: str = '', points: int = 500, steps: Sequence[int] = ()
):
  """Draw Figure 2a: images of a few classes after several steps.

  Args:
    finished: the finished run.
    classes: names of the drawn classes, as a,b; random classes if empty.
    points: number of drawn images; the cost of MDS grows with its square.
    steps: steps of kept checkpoints; up to five of all kept steps if empty.

  Returns:
    The figure, and its data as a table.
  """
  positive(points=points)
  steps = comparison.choose_steps(finished, steps)
  names = finished.dataset.classes
  labels = (
    parse_classes(classes, names) if classes else random_classes(finished)
  )
  each = points // len(labels)
  parts = [sample_images(finished, label, each) for label in labels]
  rows = np.concatenate(parts)
  labelled = finished.split.labels[rows] != UNLABELLED
  maps = [
    metric_mds(llp_norms.embed_after(finished, step, rows)) for step in steps
  ]
  for before, now in itertools.pairwise(maps):
    now[:] = align(now, before)
  truth = np.repeat(np.arange(len(labels)), [len(part) for part in parts])
  shown = [names[label] for label in labels]
  titles = [step_title(finished, step) for step in steps]
  table = [('step', 'train_row', 'class', 'labelled', 'x', 'y')]
  table += [
    (step, row, shown[c], int(known), *point)
    for step, xy in zip(steps, maps, strict=True)
    for row, c, known, point in zip(rows, truth, labelled, xy, strict=True)
  ]
  figure = draw_classes(maps, truth, labelled, shown, titles)
  return figure, {'embeddings': table}


def step_title(finished, step: int) -> str:
  """Return 'step 100 (warm)': a step and its stage."""
  ends = finished.stage_ends.items()
  stage = next(name for name, end in ends if step <= end)
  return f'step {step:,} ({stage})'


def random_classes(finished) -> np.ndarray:
  """Return the labels of a few random classes, in order."""
  there = np.unique(finished.dataset.train.labels[finished.known_rows])
  draws = generator(finished.split.seed, _CLASSES)
  return np.sort(draws.permutation(there)[:PANELS])


def draw_classes(maps, truth, labelled, names, titles):
  """Draw panels in a row.

  Args:
    maps: points `[M, 2]` of each panel.
    truth: `[M]` indices into `names`.
    labelled: `[M]` bool.
    names: names of the drawn classes.
    titles: titles of the panels.
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
  """Draw Figures 2e to 2g: images of one class each, at the end.

  Args:
    finished: the finished run.
    classes: names of the drawn classes, as a,b; if empty, the classes with the
      largest, the smallest and the median aggregation.
    points: number of drawn images of a class; the cost of MDS grows with its
      square.

  Returns:
    The figure, and its data as a table.
  """
  positive(points=points)
  names = finished.dataset.classes
  norms = llp_norms.norms_after(finished, finished.steps)
  labels = parse_classes(classes, names) if classes else typical(norms)
  panels, table = [], []
  for label in labels:
    rows = sample_images(finished, label, points)
    xy = metric_mds(llp_norms.embed_after(finished, finished.steps, rows))
    labelled = finished.split.labels[rows] != UNLABELLED
    examples = central_points(xy, EXAMPLES)
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
  """Return the classes of the largest, smallest and median norm of `[C]`.

  Classes without images have the norm nan and are left out.
  """
  order = np.argsort(-norms)[: np.count_nonzero(~np.isnan(norms))]
  return order[list(dict.fromkeys([0, len(order) - 1, len(order) // 2]))]


def central_points(xy: np.ndarray, count: int) -> np.ndarray:
  """Return the indices of the points nearest to the centres of clusters.

  Args:
    xy: points `[M, 2]`.
    count: number of clusters.
  """
  from sklearn import cluster, metrics

  means = cluster.KMeans(min(count, len(xy)), n_init=4, random_state=0).fit(xy)
  nearest = metrics.pairwise_distances_argmin(means.cluster_centers_, xy)
  return np.unique(nearest)


# Inches: side of a map, gap between maps, and height of a title.
MAP, GAP, LINE = 2.2, 0.24, 0.25


def draw_categories(panels):
  """Draw a map per class, three in a row, with examples below each.

  Args:
    panels: for each class its title, points `[M, 2]`, `[M]` bool of labelled
      points, indices `[E]` of examples, and their images `[E, H, W, c]`.
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
