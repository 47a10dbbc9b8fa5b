"""Figure 2 of Learning by Association: associations early and late.

Haeusser, Mordvintsev, Cremers, CVPR 2017, section 4.1.1. `evolution` takes a
`runs.load.Finished`, computes arrays and passes them to a function that draws.
Sizes are in inches as printed.

Letters: A the labelled images, Na of them; B the unlabelled images, Nb of them;
N training images, C classes, H x W x c an image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ssljax.core import UNLABELLED
from ssljax.data.splits import Split, generator
from ssljax.errors import non_negative, positive, require
from ssljax.experiments.figures import style
from ssljax.methods import association
from ssljax.runs.load import hidden_rows

_OTHERS = 50  # random stream, above those of `splits` and `sampling`


class Walks(NamedTuple):
  """Round trips from labelled to unlabelled images and back."""

  steps: int  # of training
  p_ab: np.ndarray  # [Na, Nb] Eq. 2
  p_ba: np.ndarray  # [Nb, Na]
  visits: np.ndarray  # [Nb] Eq. 9
  correct: float  # Eq. 4, probability of returning to the same class


def walk(a, b, labels, steps: int, kind: association.Similarity) -> Walks:
  """Compute Eq. 1-4 and 9.

  Args:
    a: `[Na, D]` embeddings of labelled images.
    b: `[Nb, D]` embeddings of unlabelled images.
    labels: `[Na]` labels of the labelled images.
    steps: training steps after which the embeddings were computed.
    kind: similarity of Eq. 1.
  """
  a, b, labels = map(jnp.asarray, (a, b, labels))
  p_ab, p_ba = association.transitions(association.similarities(a, b, kind))
  correct = float(association.associate(a, b, labels, kind).correct)
  visits = jnp.mean(p_ab, axis=0)
  return Walks(steps, *map(np.asarray, (p_ab, p_ba, visits)), correct)


def evolution(finished, *, early_steps: int = 10, others: int = 28):
  """Draw Figure 2: associations after a few steps and at the end.

  Args:
    finished: the finished run.
    early_steps: number of training steps before the upper graph.
    others: number of unlabelled images, chosen at random.

  Returns:
    The figure, and its data as tables.
  """
  split, dataset = finished.split, finished.dataset
  first = finished.program.method.stages[0]
  non_negative(early_steps=early_steps)
  require(
    early_steps <= first.steps,
    f'`early_steps`={early_steps}: the first stage of this run has only '
    f'{first.steps} steps: give at most that many',
  )
  positive(others=others)
  rows_a = choose_labelled(split, len(dataset.classes))
  rows_b = choose_others(split, dataset.train.labels, others)

  def walk_after(state) -> Walks:
    rows = np.concatenate([rows_a, rows_b])
    outputs = finished.infer(state, finished.program.data.train, rows)
    a, b = np.split(outputs.embedding, [len(rows_a)])
    kind = finished.settings['similarity']
    return walk(a, b, split.labels[rows_a], int(state.step[0]), kind)

  both = [walk_after(finished.replay(early_steps)), walk_after(finished.state)]
  names = [dataset.classes[label] for label in split.labels[rows_a]]
  images = map(dataset.train.read, (rows_a, rows_b))
  truth = dataset.train.labels[rows_b]
  absent = [
    dataset.classes[label]
    for label in absent_classes(truth, split.labels[rows_a])
  ]
  figure = draw_evolution(*images, names, both, absent)
  return figure, evolution_tables(rows_a, rows_b, both)


def absent_classes(truth: np.ndarray, labels: np.ndarray) -> list[int]:
  """Return the classes of A that no image of B has; [] if some are unknown.

  Args:
    truth: `[Nb]` true labels of B.
    labels: `[Na]` labels of A.
  """
  if UNLABELLED in truth:
    return []
  return np.setdiff1d(labels, truth).tolist()


def choose_labelled(split: Split, classes: int) -> np.ndarray:
  """Return rows `[Na]` by class: all labelled ones up to 20, else 2 of each.

  Args:
    split: the label split.
    classes: C.
  """
  few = len(split.labelled) <= 20
  each = len(split.labels) if few else 2
  return style.some_of_each(
    split.labels, each, min(classes, style.MANY_CLASSES)
  )


def choose_others(split: Split, truth, count: int) -> np.ndarray:
  """Return random unlabelled rows `[Nb]`, sorted by class where it is known.

  In this order correct walks run about straight down.

  Args:
    split: the label split.
    truth: `[N]` true labels.
    count: Nb.
  """
  rows = generator(split.seed, _OTHERS).permutation(hidden_rows(split))[:count]
  known = truth[rows] != UNLABELLED
  return rows[np.lexsort((rows, truth[rows], ~known))]


def evolution_tables(rows_a, rows_b, both: Sequence[Walks]) -> dict:
  """Return the numbers of Figure 2 by row of the training images."""
  transitions = [('steps', 'transition', 'from_row', 'to_row', 'probability')]
  visits = [('steps', 'row', 'visit_probability')]
  correct = [('steps', 'correct_walk_probability')]
  for graph in both:
    for name, starts, ends, p in (
      ('ab', rows_a, rows_b, graph.p_ab),
      ('ba', rows_b, rows_a, graph.p_ba),
    ):
      transitions += [
        (graph.steps, name, start, end, p[i, j])
        for i, start in enumerate(starts)
        for j, end in enumerate(ends)
      ]
    of_rows = zip(rows_b, graph.visits, strict=True)
    visits += [(graph.steps, *pair) for pair in of_rows]
    correct.append((graph.steps, graph.correct))
  return {'transitions': transitions, 'visits': visits, 'walks': correct}


# Vertical positions of the parts of a graph.
A_ABOVE, B_MIDDLE, BARS, A_BELOW = 0.0, 4.5, 6.8, 11.3


def draw_evolution(a, b, names: Sequence[str], both: Sequence[Walks], absent):
  """Draw the association graphs, one below the other.

  Args:
    a: `[Na, H, W, c]` labelled images by class.
    b: `[Nb, H, W, c]` unlabelled images.
    names: `[Na]` class names of the labelled images.
    both: walks between these images.
    absent: names of classes that no unlabelled image has.
  """
  from matplotlib import figure

  width = max(len(a), len(b))
  pitch = 7.0 / width
  each = (A_BELOW + 1) * pitch + 0.5  # inches of a graph with its title
  x_a, x_b = centres_of(len(a), width), centres_of(len(b), width)
  # Both graphs share one scale; early in training few images are visited.
  most = max(graph.visits.max() for graph in both)
  drawn = figure.Figure(figsize=(7.0, each * len(both) + 0.3))
  for i, graph in enumerate(both):
    axes = style.add_images(drawn, 0, i * each + 0.4, pitch, width, A_BELOW + 1)
    draw_row(axes, a, x_a, A_ABOVE, style.GREEN)
    draw_row(axes, b, x_b, B_MIDDLE, style.RED)
    draw_row(axes, a, x_a, A_BELOW, style.GREEN)
    draw_lines(axes, (x_a, A_ABOVE + 0.5), (x_b, B_MIDDLE - 0.5), graph.p_ab)
    draw_lines(axes, (x_b, BARS + 0.1), (x_a, A_BELOW - 0.5), graph.p_ba)
    draw_visits(axes, x_b, graph.visits, most)
    draw_names(axes, x_a, names)
    axes.set_title(
      f'after {graph.steps:,} steps: P(correct walk) = {graph.correct:.2f}',
      pad=12,
    )
  draw_legend(drawn, absent)
  return drawn


def centres_of(count: int, width: int) -> np.ndarray:
  """Return the evenly spaced centres `[count]` of images in a width."""
  return (np.arange(count) + 0.5) * width / count - 0.5


def draw_row(axes, images, centres, y: float, tint: str) -> None:
  """Draw a row of images `[K, H, W, c]`."""
  for image, x in zip(images, centres, strict=True):
    style.place(axes, image, x, y, ink=tint, frame=tint)


def shade(p: np.ndarray) -> np.ndarray:
  """Return black `[..., 4]`, opaque where the probability is 1/2 or more."""
  colours = np.zeros((*p.shape, 4))
  colours[..., 3] = np.minimum(2 * p, 1)
  return colours


def draw_lines(axes, above, below, p: np.ndarray) -> None:
  """Draw lines from a row of images to the next, darker for larger `p`.

  Args:
    axes: an axes of images.
    above: x `[F]` and y of the lines' starts.
    below: x `[T]` and y of the lines' ends.
    p: `[F, T]` probabilities.
  """
  from matplotlib import collections

  (x_from, y_from), (x_to, y_to) = above, below
  ends = np.empty((*p.shape, 2, 2))
  ends[:, :, 0, 0], ends[:, :, 0, 1] = x_from[:, None], y_from
  ends[:, :, 1, 0], ends[:, :, 1, 1] = x_to[None], y_to
  seen = p > 0.01  # Hundreds of fainter lines are invisible.
  order = np.argsort(p[seen])  # Dark lines are drawn last, on top.
  lines = collections.LineCollection(
    ends[seen][order], colors=shade(p[seen][order]), linewidths=0.9
  )
  axes.add_collection(lines, autolim=False)


def draw_visits(axes, centres, visits: np.ndarray, most: float) -> None:
  """Draw bars of P^visit `[Nb]` below the images, with numbers in percent."""
  top, floor = B_MIDDLE + 0.6, BARS - 0.7
  heights = visits / most * (floor - top)
  axes.bar(centres, -heights, 0.6, bottom=floor, color=style.RED)
  uniform = floor - (floor - top) / len(visits) / most  # V of Eq. 10
  axes.axhline(uniform, color='0.6', linewidth=0.6, linestyle=':')
  for x, share in zip(centres, visits, strict=True):
    axes.text(
      x,
      BARS - 0.3,
      f'{100 * share:.0f}' if share >= 0.01 else '<1',
      ha='center',
      va='center',
      fontsize='x-small',
      color=style.RED,
    )


def draw_names(axes, centres, names: Sequence[str]) -> None:
  """Write the name of each class above the middle of its images."""
  for name in dict.fromkeys(names):
    mine = [x for x, other in zip(centres, names, strict=True) if other == name]
    axes.text(
      np.mean(mine), -0.6, name, ha='center', va='bottom', fontsize='small'
    )


def draw_legend(drawn, absent: Sequence[str]) -> None:
  """Add a legend of colours and darkness, and the classes that B lacks."""
  from matplotlib import lines

  named = ', '.join(absent) if len(absent) <= 3 else f'{len(absent)} classes'
  without = f' (without {named})' if absent else ''

  handles = [
    lines.Line2D([], [], color=color, marker='s', linestyle='', label=label)
    for color, label in (
      (style.GREEN, 'A, labelled'),
      (style.RED, f'B, unlabelled{without}; below: P(visit) in %'),
    )
  ]
  handles += [
    lines.Line2D([], [], color=shade(np.array(p)), label=label)
    for p, label in ((0.05, 'P = 0.05'), (0.2, '0.2'), (0.5, '0.5 or more'))
  ]
  drawn.legend(
    handles=handles,
    loc='lower center',
    ncols=5,
    frameon=False,
    handlelength=1.5,
  )
