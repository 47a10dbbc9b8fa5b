"""Figures 3 to 6 of MA-DNN.

Chen, Zhu, Gong, ECCV 2018, sections 4.2 and 4.3:
  3  `robustness`   the error by the number of labelled images
  4  `keys`         key embeddings among features of images, over training
  5  `values`       value embeddings, over training
  6  `predictions`  what the memory says of a few unlabelled images, likewise

Each takes a `loading.Finished` whose run has kept steps (`--keep_every`), the
first several runs. Features are those of the weights as trained, which the keys
are means of, not of their average.

Letters: P steps, M images of a part, C classes, D numbers of a feature.
"""

from collections.abc import Sequence
import json

import numpy as np

from ssljax.core import UNLABELLED
from ssljax.data.splits import generator
from ssljax.errors import positive
from ssljax.experiments.figures import comparison, style
from ssljax.methods import madnn
from ssljax.runs import summary

# Random streams above those of the other figures.
_POINTS, _IMAGES = 54, 55
PARTS = ('labelled', 'unlabelled', 'test')
PERPLEXITY = 30.0  # van der Maaten and Hinton's; at most a third of the points


# Figure 3.


def robustness(*runs):
  """Figure 3: the error of every arm by how many images are labelled.

  Args:
    *runs: of as many labels each, or of other splits; a line is an arm, the
      mean over all splits.
  """
  found, table = {}, [('arm', 'labelled', 'seed', 'error')]
  for run in runs:
    count = len(run.split.labelled)
    result = json.loads((run.folder / 'result.json').read_text())
    for arm, entry in result['arms'].items():
      errors = summary.errors_that_stand(entry['test_error'])
      found.setdefault(arm, {}).setdefault(count, []).extend(errors)
      table += [
        (arm, count, seed, error)
        for seed, error in zip(result['seeds'], errors, strict=True)
      ]
  lines = {arm: sorted(of_arm.items()) for arm, of_arm in found.items()}
  return draw_robustness(lines), {'errors': table}


def draw_robustness(lines):
  """A line per arm with a standard deviation up and down.

  Args:
    lines: by arm, of every run how many images are labelled, and its errors.
  """
  from matplotlib import figure

  drawn = figure.Figure(figsize=(3.4, 2.5), layout='constrained')
  axes = drawn.subplots()
  looks = zip('os^v', ('-', '--', '-.', ':'), strict=True)
  for (arm, found), (marker, dashes) in zip(lines.items(), looks, strict=False):
    counts, errors = zip(*found, strict=True)
    means = [np.mean(of_seeds) for of_seeds in errors]
    deviations = [
      np.std(of_seeds, ddof=1) if len(of_seeds) > 1 else 0
      for of_seeds in errors
    ]
    axes.errorbar(
      counts,
      means,
      deviations,
      label=arm,
      marker=marker,
      linestyle=dashes,
      markersize=4,
      linewidth=1,
      capsize=2,
    )
  counts = sorted({count for found in lines.values() for count, _ in found})
  axes.set(
    xscale='log',
    xlabel='labelled images',
    ylabel='test error in %',
    ylim=(0, None),
  )
  axes.set_xticks(counts, [f'{count:,}' for count in counts])
  axes.minorticks_off()
  axes.legend(frameon=False)
  return drawn


# Figure 4.


def keys(finished, *, points: int = 300, steps: Sequence[int] = ()):
  """Figure 4: features of three kinds of images, and the keys among them.

  Args:
    finished: the run.
    points: images of each kind, at most.
    steps: after which, of those the run has kept; up to five of them if empty.
  """
  positive(points=points)
  steps = comparison.chosen_steps(finished, steps)
  parts, truth = drawn_parts(finished, points)
  maps = [flat(finished, step, parts) for step in steps]
  names, classes = finished.dataset.classes, len(finished.dataset.classes)
  labels = [*truth, np.arange(classes)]
  table = [('step', 'part', 'row', 'class', 'x', 'y')]
  for step, xy in zip(steps, maps, strict=True):
    rows = [*parts, np.arange(classes)]
    for name, places, mine, where in zip(
      (*PARTS, 'key'), rows, labels, xy, strict=True
    ):
      table += [
        (step, name, row, names[c], *point)
        for row, c, point in zip(places, mine, where, strict=True)
      ]
  return draw_keys(maps, truth, steps, names), {'features': table}


def drawn_parts(finished, points: int) -> tuple[list, list]:
  """Rows `[M]` of each of `PARTS`, and their classes `[M]`; the same always."""
  split, dataset = finished.split, finished.dataset
  hidden = finished.hidden
  pools = split.labelled, hidden, np.arange(len(dataset.test.labels))
  parts = [
    np.sort(generator(split.seed, _POINTS, i).permutation(pool)[:points])
    for i, pool in enumerate(pools)
  ]
  truth = dataset.train.labels, dataset.train.labels, dataset.test.labels
  return parts, [of[rows] for of, rows in zip(truth, parts, strict=True)]


def flat(finished, step: int, parts) -> list[np.ndarray]:
  """t-SNE `[M, 2]` of each part and, last, `[C, 2]` of the keys, after a step.

  Args:
    finished: the run.
    step: that it has kept.
    parts: rows of each of `PARTS`.
  """
  from sklearn import manifold  # slow to import

  state, data = finished.after(step), finished.program.data
  feeds = data.train, data.train, data.test
  found = [
    finished.as_trained(state, feed, rows)
    for feed, rows in zip(feeds, parts, strict=True)
  ]
  found.append(np.asarray(state.memory.keys[0]))
  together = np.concatenate(found)
  xy = manifold.TSNE(
    init='pca',
    perplexity=min(PERPLEXITY, (len(together) - 1) / 3),
    random_state=0,
  ).fit_transform(together)
  return np.split(xy, np.cumsum([len(x) for x in found])[:-1])


def draw_keys(maps, truth, steps, names):
  """A row of panels per part, a column per step.

  Args:
    maps: of every step points of `PARTS` and of the keys.
    truth: classes of the parts.
    steps: of the columns.
    names: of the classes.
  """
  from matplotlib import figure, lines

  side = min(1.6, 7.0 / len(maps))
  drawn = figure.Figure(
    figsize=(max(3.4, side * len(maps)), 3 * side + 0.6), layout='constrained'
  )
  panels = drawn.subplots(len(PARTS), len(maps), squeeze=False)
  for column, (*parts, slots) in enumerate(maps):
    across, up = limits_of(np.concatenate([*parts, slots]))
    for place, (xy, mine) in enumerate(zip(parts, truth, strict=True)):
      axes = panels[place, column]
      colours = [style.class_colour(c) for c in mine]
      axes.scatter(*xy.T, s=4, c=colours, linewidths=0, rasterized=True)
      axes.scatter(
        *slots.T,
        s=30,
        c='k',
        marker='X',
        edgecolors='w',
        linewidths=0.5,
        zorder=3,
      )
      axes.set(xticks=[], yticks=[], xlim=across, ylim=up)
    panels[0, column].set_title(f'step {steps[column]:,}')
  for axes, part in zip(panels[:, 0], PARTS, strict=True):
    axes.set_ylabel(part)
  dot = {'marker': 'o', 'linestyle': ''}
  shown = names[: style.MANY_CLASSES]
  handles = [
    lines.Line2D([], [], color=style.class_colour(c), label=name, **dot)
    for c, name in enumerate(shown)
  ]
  handles.append(
    lines.Line2D([], [], color='k', label='key', **dot | {'marker': 'X'})
  )
  style.legend_below(drawn, handles)
  return drawn


def limits_of(xy: np.ndarray) -> list[tuple[float, float]]:
  """Limits of both axes that leave room about points `[M, 2]`."""
  low, high = xy.min(axis=0), xy.max(axis=0)
  room = 0.05 * (high - low)
  return list(zip(low - room, high + room, strict=True))


# Figure 5.


def values(finished, *, steps: Sequence[int] = ()):
  """Figure 5: the value embedding of every class.

  Args:
    finished: the run.
    steps: after which, of those the run has kept; up to five of them if empty.
  """
  steps = comparison.chosen_steps(finished, steps)
  names = finished.dataset.classes
  found = [np.asarray(finished.after(step).memory.values[0]) for step in steps]
  table = [('step', 'class', *names)]
  table += [
    (step, name, *row)
    for step, slots in zip(steps, found, strict=True)
    for name, row in zip(names, slots, strict=True)
  ]
  return draw_values(found, steps, names), {'values': table}


def draw_values(found, steps, names):
  """A panel of `[C, C]` probabilities per step."""
  from matplotlib import figure

  side = min(1.6, 7.0 / len(found))
  size = max(3.4, side * len(found) + 0.9), side + 0.65
  drawn = figure.Figure(figsize=size, layout='constrained')
  panels = drawn.subplots(1, len(found), squeeze=False)[0]
  for axes, slots, step in zip(panels, found, steps, strict=True):
    image = axes.imshow(slots, cmap='Blues', vmin=0, vmax=1)
    axes.set(title=f'step {step:,}', xticks=[], yticks=[], xlabel='prediction')
  if len(names) <= style.MANY_CLASSES:
    panels[0].set_yticks(range(len(names)), names, fontsize=5)
  panels[0].set_ylabel('class of the slot')
  drawn.colorbar(image, ax=panels, label='probability', shrink=0.9)
  return drawn


# Figure 6.


def predictions(finished, *, images: int = 5, steps: Sequence[int] = ()):
  """Figure 6: what the memory says of a few images whose class is hidden.

  Args:
    finished: the run.
    images: how many are drawn, at random.
    steps: after which, of those the run has kept; up to five of them if empty.
  """
  positive(images=images)
  steps = comparison.chosen_steps(finished, steps)
  split, dataset = finished.split, finished.dataset
  hidden = finished.hidden
  rows = np.sort(generator(split.seed, _IMAGES).permutation(hidden)[:images])
  truth = dataset.train.labels[rows]
  found = [predicted(finished, finished.after(step), rows) for step in steps]
  table = [('train_row', 'class', 'step', *dataset.classes)]
  table += [
    (row, dataset.classes[c], step, *of_step[i])
    for i, (row, c) in enumerate(zip(rows, truth, strict=True))
    for step, of_step in zip(steps, found, strict=True)
  ]
  shown = dataset.train.read(rows)
  figure = draw_predictions(shown, truth, found, steps, dataset.classes)
  return figure, {'predictions': table}


def predicted(finished, state, rows) -> np.ndarray:
  """p̂ `[M, C]` of training rows `[M]` by a state of the run, Eq. 4 and 6."""
  x = finished.as_trained(state, finished.program.data.train, rows)
  slots = madnn.Slots(state.memory.keys[0], state.memory.values[0])
  unlabelled = np.full(len(rows), UNLABELLED)
  asked = finished.settings
  return np.asarray(
    madnn.assimilate(
      slots, x, unlabelled, kind=asked['distance'], values=asked['values']
    )
  )


def draw_predictions(images, truth, found, steps, names):
  """An image a line, and beside it the bars of every step.

  Args:
    images: `[M, H, W, c]`.
    truth: classes `[M]`, whose bars stand out.
    found: p̂ `[M, C]` of every step.
    steps: of the columns.
    names: of the classes.
  """
  from matplotlib import figure

  width = min(1.3, 6.4 / len(steps))
  drawn = figure.Figure(
    figsize=(0.8 + width * len(steps), 0.3 + 0.62 * len(images)),
    layout='constrained',
  )
  panels = drawn.subplots(
    len(images),
    1 + len(steps),
    squeeze=False,
    width_ratios=[0.55] + [width] * len(steps),
  )
  for line, image, label in zip(panels, images, truth, strict=True):
    line[0].axis('off')
    line[0].imshow(
      image.squeeze(-1) if image.shape[-1] == 1 else image, cmap='Greys'
    )
    line[0].set_title(names[label], fontsize=6, pad=1)
  for column, (step, p_hat) in enumerate(zip(steps, found, strict=True), 1):
    panels[0, column].set_title(f'step {step:,}')
    for axes, p, label in zip(panels[:, column], p_hat, truth, strict=True):
      colours = ['C1' if c == label else 'C0' for c in range(len(p))]
      axes.bar(range(len(p)), p, color=colours)
      axes.set(ylim=(0, 1), xticks=[], yticks=[0, 1])
      if column > 1:
        axes.set_yticklabels([])
      else:
        axes.tick_params(labelsize=5)
  return drawn
