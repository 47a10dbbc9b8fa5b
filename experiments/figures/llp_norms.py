"""Figures 2b to 2d of LLP: aggregation of the images of a class.

Zhuang, Ding, Murli, Yamins, 2019, section 5, "Emerging clusters":
  2b    `trajectories`  mean over classes, over training
  2c-d  `norms`         each class at the end

Each function takes one or more `runs.load.Finished`. The aggregation of a class
is the norm of its mean embedding; it is 1 if all embeddings are equal. Classes
are true labels, including those of images whose label was hidden from the run.

Letters: M training images, C classes, D numbers of an embedding.
"""

import numpy as np

from ssljax.analysis import embeddings
from ssljax.errors import require
from ssljax.experiments.figures import comparison, style

NORM = "norm of a class's mean embedding"


def embed_after(finished, step: int, rows) -> np.ndarray:
  """Return embeddings `[M, D]` of length 1 after a step.

  Args:
    finished: the finished run.
    step: step of a kept checkpoint.
    rows: `[M]` rows of training images.
  """
  state, feed = finished.after(step), finished.program.data.train
  return finished.embed(state, feed, rows)


def norms_after(finished, step: int) -> np.ndarray:
  """Return the aggregation `[C]` of every class after a step."""
  rows, dataset = finished.known_rows, finished.dataset
  v = embed_after(finished, step, rows)
  truth = dataset.train.labels[rows]
  return embeddings.class_norms(v, truth, len(dataset.classes))


# Figure 2b.


def trajectories(*runs):
  """Draw Figure 2b: mean aggregation over classes, over training.

  Args:
    *runs: finished runs, a line each.

  Returns:
    The figure, and its data as a table.
  """
  lines = {
    name: [
      (step, float(np.nanmean(norms_after(run, step)))) for step in run.kept
    ]
    for name, run in zip(comparison.names_of(runs), runs, strict=True)
  }
  table = [('run', 'step', 'aggregation')]
  table += [(name, *point) for name, line in lines.items() for point in line]
  starts = list(runs[0].stage_ends.values())[:-1]
  return draw_trajectories(lines, starts), {'aggregation': table}


def draw_trajectories(lines, starts):
  """Draw a line per run.

  Args:
    lines: (step, value) pairs by name of the run.
    starts: steps at which a later stage starts.
  """
  from matplotlib import figure

  drawn = figure.Figure(figsize=(3.4, 2.7), layout='constrained')
  axes = drawn.subplots()
  for step in starts:
    axes.axvline(step, color='0.7', linewidth=0.6, linestyle=':')
  for name, line in lines.items():
    axes.plot(*zip(*line, strict=True), marker='o', markersize=3, label=name)
  axes.set_xlabel('step' + (' (dotted: a stage ends)' if starts else ''))
  axes.set_ylabel(f'mean {NORM}')
  if len(lines) > 1:
    axes.legend(frameon=False)
  return drawn


# Figure 2c-d.


def norms(*runs):
  """Draw Figures 2c and 2d: the aggregation of each class.

  Args:
    *runs: two finished runs, compared at their ends, the first on the x axis
      (ResNet-18 in the paper); or one, compared at its first kept checkpoint
      and its end.

  Returns:
    The figure, and its data as a table.

  Raises:
    InputError: a single run kept one checkpoint, or the classes differ.
  """
  run, other = runs[0], runs[-1]
  if len(runs) == 1:
    require(
      len(run.kept) > 1,
      f'`run`={run.folder}: kept its last checkpoint alone: train it with '
      '`keep_stages=True`, or give a second `run` to compare with',
    )
    sides = {f'step {step:,}': (run, step) for step in (run.kept[0], run.steps)}
  else:
    ends = ((finished, finished.steps) for finished in runs)
    sides = dict(zip(comparison.names_of(runs), ends, strict=True))
  classes = run.dataset.classes
  require(
    classes == other.dataset.classes,
    '`run`: the two runs have different classes: give runs on one data set',
  )
  values = {name: norms_after(*side) for name, side in sides.items()}
  present = ~np.isnan(list(values.values())).any(axis=0)  # have images
  values = {name: value[present] for name, value in values.items()}
  classes = [name for name, has in zip(classes, present, strict=True) if has]
  table = [('class', *values)]
  table += zip(classes, *values.values(), strict=True)
  return draw_norms(values, classes), {'norms': table}


def draw_norms(values, classes):
  """Draw a histogram of both sides, and one side over the other.

  Args:
    values: norms `[C]` by the name of each side.
    classes: names of the classes.
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
