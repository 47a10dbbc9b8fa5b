"""Figure 2 of Learning by Association: associations early and late.

Haeusser, Mordvintsev, Cremers, CVPR 2017, section 4.1.1. `evolution` takes a
`loading.Finished`, computes arrays from it, and hands these to a function that
draws. Sizes are in inches as printed.

Letters: Na labelled images, Nb others, N training images, C classes, H x W x c
an image.
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

_OTHERS = 50  # a random stream above those of `splits` and `batches`


class Walks(NamedTuple):
  """Round trips from labelled images to others, after some steps."""

  steps: int
  p_ab: np.ndarray  # [Na, Nb] Eq. 2
  p_ba: np.ndarray  # [Nb, Na]
  visits: np.ndarray  # [Nb] Eq. 9
  correct: float  # Eq. 4


def walk(a, b, labels, steps: int, kind: association.Similarity) -> Walks:
  """Eq. 1–4 and 9.

  Args:
    a: `[Na, D]` embeddings of labelled images.
    b: `[Nb, D]` of others.
    labels: `[Na]` of the labelled ones.
    steps: after which the embeddings are such.
    kind: the similarity of Eq. 1.
  """
  a, b, labels = map(jnp.asarray, (a, b, labels))
  p_ab, p_ba = association.transitions(association.similarities(a, b, kind))
  correct = float(association.associate(a, b, labels, kind).correct)
  visits = jnp.mean(p_ab, axis=0)
  return Walks(steps, *map(np.asarray, (p_ab, p_ba, visits)), correct)


def evolution(finished, *, early_steps: int = 10, others: int = 28):
  """Figure 2: associations after a few steps, and at the end.

  Args:
    finished: the run.
    early_steps: after which the upper graph is drawn.
    others: how many unlabelled images are drawn, at random.
  """
  split, dataset = finished.split, finished.dataset
  first = finished.program.method.stages[0]
  non_negative(early_steps=early_steps)
  require(
    early_steps <= first.steps,
    f'--early_steps={early_steps}: the first stage of this run has only '
    f'{first.steps}: give at most that many',
  )
  positive(others=others)
  rows_a = labelled_of_evolution(split, len(dataset.classes))
  rows_b = others_of_evolution(split, dataset.train.labels, others)

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
    dataset.classes[label] for label in absent_from(truth, split.labels[rows_a])
  ]
  figure = draw_evolution(*images, names, both, absent)
  return figure, evolution_tables(rows_a, rows_b, both)


def absent_from(truth: np.ndarray, labels: np.ndarray) -> list[int]:
  """Classes of A, `labels [Na]`, that no image of B has, `truth [Nb]`."""
  if UNLABELLED in truth:
    return []
  return np.setdiff1d(labels, truth).tolist()


def labelled_of_evolution(split: Split, classes: int) -> np.ndarray:
  """Rows `[Na]`, by class: all labelled ones if at most 20, else 2 of each."""
  few = len(split.labelled) <= 20
  each = len(split.labels) if few else 2
  return style.some_of_each(
    split.labels, each, min(classes, style.MANY_CLASSES)
  )


def others_of_evolution(split: Split, truth, count: int) -> np.ndarray:
  """Random rows `[Nb]`, by class where it is known: so walks run downwards."""
  rows = generator(split.seed, _OTHERS).permutation(hidden_rows(split))[:count]
  known = truth[rows] != UNLABELLED
  return rows[np.lexsort((rows, truth[rows], ~known))]


def evolution_tables(rows_a, rows_b, both: Sequence[Walks]) -> dict:
  """The numbers of Figure 2, by row of the training images."""
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


# Where the parts of a graph of Figure 2 lie.
A_ABOVE, B_MIDDLE, BARS, A_BELOW = 0.0, 4.5, 6.8, 11.3


def draw_evolution(a, b, names: Sequence[str], both: Sequence[Walks], absent):
  """The association graphs, one below the other.

  Args:
    a: `[Na, H, W, c]` labelled images, by class.
    b: `[Nb, H, W, c]` others.
    names: `[Na]` classes of the labelled ones.
    both: graphs of these images.
    absent: names of classes that are not among the others.
  """
  from matplotlib import figure

  width = max(len(a), len(b))
  pitch = 7.0 / width
  each = (A_BELOW + 1) * pitch + 0.5  # inches, with its title
  x_a, x_b = spread(len(a), width), spread(len(b), width)
  # Bars of one scale: at first few of the images are visited.
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
  draw_key(drawn, absent)
  return drawn


def spread(count: int, width: int) -> np.ndarray:
  """Centres `[count]` of images that fill a width."""
  return (np.arange(count) + 0.5) * width / count - 0.5


def draw_row(axes, images, centres, y: float, tint: str) -> None:
  """A row of images `[K, H, W, c]`."""
  for image, x in zip(images, centres, strict=True):
    style.place(axes, image, x, y, ink=tint, frame=tint)


def shade(p: np.ndarray) -> np.ndarray:
  """Black `[..., 4]` that is opaque from a probability `[...]` of 1/2 on."""
  colours = np.zeros((*p.shape, 4))
  colours[..., 3] = np.minimum(2 * p, 1)
  return colours


def draw_lines(axes, above, below, p: np.ndarray) -> None:
  """Lines from one row of images to the next, darker the more probable.

  Args:
    axes: of images.
    above: centres `[F]` where lines begin, and y.
    below: centres `[T]` where they end, and y.
    p: `[F, T]` probabilities.
  """
  from matplotlib import collections

  (x_from, y_from), (x_to, y_to) = above, below
  ends = np.empty((*p.shape, 2, 2))
  ends[:, :, 0, 0], ends[:, :, 0, 1] = x_from[:, None], y_from
  ends[:, :, 1, 0], ends[:, :, 1, 1] = x_to[None], y_to
  seen = p > 0.01  # hundreds of others cannot be seen
  order = np.argsort(p[seen])  # dark ones on top
  lines = collections.LineCollection(
    ends[seen][order], colors=shade(p[seen][order]), linewidths=0.9
  )
  axes.add_collection(lines, autolim=False)


def draw_visits(axes, centres, visits: np.ndarray, most: float) -> None:
  """Bars of P^visit `[Nb]` and their numbers in percent, below the images."""
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
  """The name of a class above the middle of its images."""
  for name in dict.fromkeys(names):
    mine = [x for x, other in zip(centres, names, strict=True) if other == name]
    axes.text(
      np.mean(mine), -0.6, name, ha='center', va='bottom', fontsize='small'
    )


def draw_key(drawn, absent: Sequence[str]) -> None:
  """What the colours and the darkness mean, and what B is without."""
  from matplotlib import lines

  named = ', '.join(absent) if len(absent) <= 3 else f'{len(absent)} classes'
  without = f' (without {named})' if absent else ''

  handles = [
    lines.Line2D([], [], color=color, marker='s', linestyle='', label=label)
    for color, label in (
      (style.GREEN, 'A, labelled'),
      (style.RED, f'B, unlabelled{without}; below it P(visit) in %'),
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
