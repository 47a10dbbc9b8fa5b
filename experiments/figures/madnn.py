"""Figures 3 to 6 of MA-DNN.

Chen, Zhu, Gong, ECCV 2018, sections 4.2 and 4.3:
  3  `robustness`   test error by number of labelled images
  4  `keys`         features of images and key embeddings over training
  5  `values`       value embeddings over training
  6  `predictions`  the memory's predictions for a few unlabelled images over
                    training

`robustness` takes one or more `runs.load.Finished`, the others one, of a run
that kept checkpoints (`--keep_every`). Features are computed with the weights
as trained, not with averaged weights, because the keys are means of the former.
Step 0 is the initial state, where all keys are 0 and all values are uniform.

Letters: P steps, M images of a part, C classes, D numbers of a feature.
"""

from collections.abc import Sequence

import numpy as np

from ssljax.core import UNLABELLED
from ssljax.data.splits import generator
from ssljax.errors import positive
from ssljax.experiments.figures import comparison, style
from ssljax.methods import madnn
from ssljax.runs import load, summary

# Random streams, above those of the other figures.
_POINTS, _IMAGES = 54, 55
PARTS = ('labelled', 'unlabelled', 'test')
PERPLEXITY = 30.0  # of t-SNE (van der Maaten and Hinton), at most points / 3


# Figure 3.


def robustness(*runs):
  """Draw Figure 3: test error by number of labelled images.

  Args:
    *runs: finished runs with different numbers of labels or other label splits,
      of MA-DNN and of `supervised`, whose steps follow the number of labels.
      Every trained method is a line, the mean over all splits.

  Returns:
    The figure, and its data as a table.
  """
  found, table = {}, [('arm', 'labelled', 'seed', 'error')]
  for run in runs:
    count = len(run.split.labelled)
    result = load.finished_result(run.folder)
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
  """Draw a line per trained method, with bars of one standard deviation.

  Args:
    lines: by method, pairs of a number of labelled images and test errors.
  """
  from matplotlib import figure

  drawn = figure.Figure(figsize=(3.4, 2.5), layout='constrained')
  axes = drawn.subplots()
  looks = zip('os^v', ('-', '--', '-.', ':'), strict=True)
  for (arm, found), (marker, dashes) in zip(lines.items(), looks, strict=False):
    counts, errors = zip(*found, strict=True)
    means = [np.mean(of_seeds) for of_seeds in errors]
    deviations = [style.deviation(of_seeds) for of_seeds in errors]
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
  """Draw Figure 4: features of images of three parts, and the keys.

  Args:
    finished: the finished run.
    points: largest number of images of each part.
    steps: steps of kept checkpoints, 0 for the initial state; up to five of
      step 0 and all kept steps if empty.

  Returns:
    The figure, and its data as a table.
  """
  positive(points=points)
  steps = comparison.choose_steps(finished, steps, initial=True)
  parts, truth = sample_parts(finished, points)
  maps = [tsne(finished, step, parts) for step in steps]
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


def sample_parts(finished, points: int) -> tuple[list, list]:
  """Return rows `[M]` of each of `PARTS`, and their true labels `[M]`.

  The sample is a function of the split and of `points`.
  """
  split, dataset = finished.split, finished.dataset
  hidden = finished.hidden
  pools = split.labelled, hidden, np.arange(len(dataset.test.labels))
  parts = [
    np.sort(generator(split.seed, _POINTS, i).permutation(pool)[:points])
    for i, pool in enumerate(pools)
  ]
  truth = dataset.train.labels, dataset.train.labels, dataset.test.labels
  return parts, [of[rows] for of, rows in zip(truth, parts, strict=True)]


def tsne(finished, step: int, parts) -> list[np.ndarray]:
  """Return the t-SNE map of the features and keys after a step.

  Args:
    finished: the finished run.
    step: step of a kept checkpoint.
    parts: rows of each of `PARTS`.

  Returns:
    Points `[M, 2]` of each part and, last, `[C, 2]` of the keys.
  """
  from sklearn import manifold  # Slow to import.
  import threadpoolctl

  state, data = finished.after(step), finished.program.data
  feeds = data.train, data.train, data.test
  found = [
    finished.as_trained(state, feed, rows)
    for feed, rows in zip(feeds, parts, strict=True)
  ]
  found.append(np.asarray(state.memory.keys[0]))
  together = np.concatenate(found)
  # The threads of OpenMP would wait for each other, at work, in each of 1,000
  # short iterations, and the map would depend on their number.
  with threadpoolctl.threadpool_limits(1, 'openmp'):
    xy = manifold.TSNE(
      init='pca',
      perplexity=min(PERPLEXITY, (len(together) - 1) / 3),
      random_state=0,
    ).fit_transform(together)
  return np.split(xy, np.cumsum([len(x) for x in found])[:-1])


def draw_keys(maps, truth, steps, names):
  """Draw a row of panels per part and a column per step.

  Args:
    maps: for every step the points of `PARTS` and of the keys.
    truth: true labels of the parts.
    steps: steps of the columns.
    names: names of the classes.
  """
  from matplotlib import figure, lines

  side = min(1.6, 7.0 / len(maps))
  drawn = figure.Figure(
    figsize=(max(3.4, side * len(maps)), 3 * side + 0.6), layout='constrained'
  )
  panels = drawn.subplots(len(PARTS), len(maps), squeeze=False)
  cross = {'s': 30, 'marker': 'X', 'linewidths': 0.5, 'zorder': 3}
  for column, (*parts, slots) in enumerate(maps):
    across, up = limits_of(np.concatenate([*parts, slots]))
    for place, (xy, mine) in enumerate(zip(parts, truth, strict=True)):
      axes = panels[place, column]
      colours = [style.class_colour(c) for c in mine]
      axes.scatter(*xy.T, s=4, c=colours, linewidths=0, rasterized=True)
      axes.scatter(*slots.T, c='k', edgecolors='w', **cross)
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
  """Return limits of both axes that leave a margin around points `[M, 2]`."""
  low, high = xy.min(axis=0), xy.max(axis=0)
  room = 0.05 * (high - low)
  return list(zip(low - room, high + room, strict=True))


# Figure 5.


def values(finished, *, steps: Sequence[int] = ()):
  """Draw Figure 5: the value embedding of every class.

  Args:
    finished: the finished run.
    steps: steps of kept checkpoints, 0 for the initial state; up to five of
      step 0 and all kept steps if empty.

  Returns:
    The figure, and its data as a table.
  """
  steps = comparison.choose_steps(finished, steps, initial=True)
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
  """Draw a panel of `[C, C]` probabilities per step."""
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
  """Draw Figure 6: the memory's predictions for images with hidden labels.

  Args:
    finished: the finished run.
    images: number of images, chosen at random.
    steps: steps of kept checkpoints, 0 for the initial state; up to five of
      step 0 and all kept steps if empty.

  Returns:
    The figure, and its data as a table.
  """
  positive(images=images)
  steps = comparison.choose_steps(finished, steps, initial=True)
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
  """Return p̂ `[M, C]` of training rows `[M]`, Eq. 4 and 6.

  Args:
    finished: the finished run.
    state: a state of the run.
    rows: `[M]` rows of training images.
  """
  x = finished.as_trained(state, finished.program.data.train, rows)
  slots = madnn.Slots(state.memory.keys[0], state.memory.values[0])
  unlabelled = np.full(len(rows), UNLABELLED)
  settings = finished.settings
  return np.asarray(
    madnn.assimilate(
      slots,
      x,
      unlabelled,
      kind=settings['distance'],
      values=settings['values'],
    )
  )


def draw_predictions(images, truth, found, steps, names):
  """Draw a row per image: the image, and a bar chart per step.

  Args:
    images: `[M, H, W, c]`.
    truth: true labels `[M]`, whose bars are highlighted.
    found: p̂ `[M, C]` of every step.
    steps: steps of the columns.
    names: names of the classes.
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
