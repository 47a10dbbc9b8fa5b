"""Figures 2b to 2d of LLP: how closely the images of a class lie together.

Zhuang, Ding, Murli, Yamins, 2019, section 5, "Emerging clusters":
  2b    `trajectories`  the mean over classes, over training
  2c-d  `norms`         each class, at the end

Each takes `loading.Finished` runs. A class is measured by the norm of its mean
embedding, 1 where all are the same. The classes are the true ones, whether or
not the run knew an image's.

Letters: M training images, C classes, D embedding.
"""

import numpy as np

from ssljax.analysis import embeddings as embeddings_lib
from ssljax.errors import require
from ssljax.experiments.figures import comparison, style

NORM = "norm of a class's mean embedding"


def embeddings(finished, step: int, rows) -> np.ndarray:
  """Embeddings `[M, D]` of length 1 of training rows `[M]` after a step."""
  state, feed = finished.after(step), finished.program.data.train
  return finished.embed(state, feed, rows)


def norms_after(finished, step: int) -> np.ndarray:
  """Norms `[C]` of the mean embedding of every class after a step."""
  rows, dataset = finished.known_rows, finished.dataset
  v = embeddings(finished, step, rows)
  truth = dataset.train.labels[rows]
  return embeddings_lib.class_norms(v, truth, len(dataset.classes))


# Figure 2b.


def trajectories(*runs):
  """Figure 2b: the mean over classes of the norm of their mean embedding.

  Args:
    *runs: a line each.
  """
  lines = {
    name: [
      (step, float(np.nanmean(norms_after(run, step)))) for step in run.kept
    ]
    for name, run in zip(comparison.names_of(runs), runs, strict=True)
  }
  table = [('run', 'step', 'aggregation')]
  table += [(name, *point) for name, line in lines.items() for point in line]
  begins = list(runs[0].stage_ends.values())[:-1]
  return draw_trajectories(lines, begins), {'aggregation': table}


def draw_trajectories(lines, begins):
  """A line per run.

  Args:
    lines: (step, value) pairs by name.
    begins: steps at which another stage begins.
  """
  from matplotlib import figure

  drawn = figure.Figure(figsize=(3.4, 2.7), layout='constrained')
  axes = drawn.subplots()
  for step in begins:
    axes.axvline(step, color='0.7', linewidth=0.6, linestyle=':')
  for name, line in lines.items():
    axes.plot(*zip(*line, strict=True), marker='o', markersize=3, label=name)
  axes.set_xlabel('step' + (' (dotted: a stage ends)' if begins else ''))
  axes.set_ylabel(f'mean {NORM}')
  if len(lines) > 1:
    axes.legend(frameon=False)
  return drawn


# Figure 2c-d.


def norms(*runs):
  """Figures 2c and 2d: the norm of each class's mean embedding.

  Args:
    *runs: two, at their ends; or one, at its first kept checkpoint and its end.
  """
  run, other = runs[0], runs[-1]
  if len(runs) == 1:
    require(
      len(run.kept) > 1,
      '--run: it has kept its last checkpoint alone: train one with '
      '--keep_stages, or give a second --run to compare it with',
    )
    sides = {f'step {step:,}': (run, step) for step in (run.kept[0], run.steps)}
  else:
    ends = ((finished, finished.steps) for finished in runs)
    sides = dict(zip(comparison.names_of(runs), ends, strict=True))
  classes = run.dataset.classes
  require(
    classes == other.dataset.classes,
    '--run: the two runs have different classes: give runs on one data set',
  )
  values = {name: norms_after(*side) for name, side in sides.items()}
  there = ~np.isnan(list(values.values())).any(axis=0)  # classes with images
  values = {name: value[there] for name, value in values.items()}
  classes = [name for name, some in zip(classes, there, strict=True) if some]
  table = [('class', *values)]
  table += zip(classes, *values.values(), strict=True)
  return draw_norms(values, classes), {'norms': table}


def draw_norms(values, classes):
  """A histogram, and one of two against the other.

  Args:
    values: norms `[C]` by the name of each of the two.
    classes: names.
  """
  from matplotlib import figure

  drawn = figure.Figure(figsize=(6.0, 2.7), layout='constrained')
  left, right = drawn.subplots(1, 2)
  (x_name, x), (y_name, y) = values.items()
  least = np.floor(20 * min(x.min(), y.min())) / 20
  bins = np.linspace(least, 1, 1 + max(10, round((1 - least) * 40)))
  for name, value in values.items():
    left.hist(value, bins, alpha=0.6, label=name)
  left.set(title='(c)', xlabel=NORM, ylabel='classes', xlim=(least, 1))
  left.yaxis.get_major_locator().set_params(integer=True)
  left.legend(frameon=False)
  right.plot([least, 1], [least, 1], color='0.7', linewidth=0.6, zorder=0)
  few = len(classes) <= style.MANY_CLASSES
  right.scatter(x, y, s=14 if few else 5, linewidths=0)
  if few:
    for point in zip(x, y, classes, strict=True):
      right.annotate(point[2], point[:2], (3, 2), textcoords='offset points')
  right.set(title='(d)', xlabel=x_name, ylabel=y_name, aspect='equal')
  right.set(xlim=(least, 1), ylim=(least, 1))
  right.locator_params(nbins=5)
  return drawn
