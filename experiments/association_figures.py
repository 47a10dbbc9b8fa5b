"""The figures of Learning by Association.

Haeusser, Mordvintsev, Cremers, CVPR 2017:
  Figure 2, section 4.1.1  `evolution`   associations early and late
  Figure 3, section 4.1.2  `mistakes`    labelled images, confusions, mistakes
  Figure 4, section 4.2    `neighbours`  neighbours of unlabelled images

Each takes a `figures.Finished`, computes arrays from it, and hands these to a
function that draws. A figure's size is in inches as printed; in an axes of
images the unit is the distance of two images, and y points down.

Letters: Na labelled images, Nb others, N training images, M test images, C
classes, Q queries, K neighbours, D embedding, H x W x c an image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import plotting

from ssljax.core import UNLABELLED, non_negative, positive, require
from ssljax.methods import association
from ssljax.splits import Split, generator

# Random streams: above those of `splits` and `batches`.
_OTHERS, _QUERIES = 50, 51
MANY_CLASSES = 20  # of more, only the first are shown one by one
CHUNK = 2**16  # embeddings in memory at a time


# Which images.


def hidden_rows(split: Split) -> np.ndarray:
  """Rows `[U]` that a run saw without their label only."""
  rows = np.setdiff1d(split.unlabelled, split.labelled)
  # Where every image is labelled, each is seen in both ways.
  return rows if len(rows) else split.unlabelled


def some_of_each(labels: np.ndarray, each: int, classes: int) -> np.ndarray:
  """The first `each` rows of each of the first classes; `labels [N]`."""
  return np.concatenate(
    [np.flatnonzero(labels == c)[:each] for c in range(classes)]
  )


# Figure 2.


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
  return some_of_each(split.labels, each, min(classes, MANY_CLASSES))


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
    axes = plotting.add_images(
      drawn, 0, i * each + 0.4, pitch, width, A_BELOW + 1
    )
    draw_row(axes, a, x_a, A_ABOVE, plotting.GREEN)
    draw_row(axes, b, x_b, B_MIDDLE, plotting.RED)
    draw_row(axes, a, x_a, A_BELOW, plotting.GREEN)
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
    plotting.place(axes, image, x, y, ink=tint, frame=tint)


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
  axes.bar(centres, -heights, 0.6, bottom=floor, color=plotting.RED)
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
      color=plotting.RED,
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
      (plotting.GREEN, 'A, labelled'),
      (plotting.RED, f'B, unlabelled{without}; below it P(visit) in %'),
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


# Figure 3.


def mistakes(finished):
  """Figure 3: labelled images, confusion matrix, misclassified test images.

  Args:
    finished: the run.
  """
  split, dataset = finished.split, finished.dataset
  truth, classes = dataset.test.labels, dataset.classes
  test = finished.program.data.test
  outputs = finished.infer(finished.state, test, np.arange(test.size))
  predicted = outputs.logits.argmax(axis=-1)
  counts = confusion(truth, predicted, len(classes))

  shown = some_of_each(split.labels, 10, min(len(classes), MANY_CLASSES))
  wrong = np.flatnonzero(predicted != truth)
  wrong = wrong[np.lexsort((predicted[wrong], truth[wrong]))]
  few = plotting.evenly(wrong, most_mistakes(classes))
  name = lambda label: classes[label]
  figure = draw_mistakes(
    (dataset.train.read(shown), split.labels[shown], len(split.labelled)),
    counts,
    (dataset.test.read(few), truth[few], predicted[few]),
    classes,
  )
  tables = {
    'confusion': [
      ('true', *classes),
      *((name(c), *row) for c, row in enumerate(counts)),
    ],
    'mistakes': [
      ('test_row', 'true', 'predicted'),
      *((row, name(truth[row]), name(predicted[row])) for row in wrong),
    ],
    'labelled': [
      ('train_row', 'class'),
      *((row, name(split.labels[row])) for row in split.labelled),
    ],
  }
  return figure, tables


def confusion(truth, predicted, classes: int) -> np.ndarray:
  """How many `[C, C]` of each true class are taken for each; both `[M]`."""
  counts = np.zeros((classes, classes), int)
  np.add.at(counts, (truth, predicted), 1)
  return counts


def draw_mistakes(labelled, counts, wrong, classes: tuple[str, ...]):
  """The three parts of Figure 3.

  Args:
    labelled: images `[K, H, W, c]`, their classes `[K]`, and how many labelled
      images there are in all.
    counts: `[C, C]` of the test images.
    wrong: misclassified images `[K, H, W, c]`, true and predicted class `[K]`.
    classes: names.
  """
  from matplotlib import figure

  drawn = figure.Figure(figsize=(7.2, 5.8))
  draw_labelled(drawn, *labelled, classes)
  draw_wrong(drawn, *wrong, counts.sum() - counts.trace(), classes)
  draw_confusion(drawn, counts, classes)
  return drawn


def draw_labelled(drawn, images, labels, count: int, classes) -> None:
  """Labelled images, a row per class; `count` of them there are in all."""
  rows, row = np.unique(labels, return_inverse=True)
  axes = plotting.add_images(
    drawn, 0.25, 0.3, 2.5 / max(10, len(rows)), 10, len(rows)
  )
  for y, label in enumerate(rows):
    for x, image in enumerate(images[row == y]):
      plotting.place(axes, image, x, y)
    axes.text(-0.7, y, classes[label], ha='right', va='center', size='small')
  axes.set_title(f'{some_of(len(images), count)} labelled images')


def some_of(shown: int, count: int) -> str:
  """'all 7' or '7 of 20'."""
  return f'all {count:,}' if shown == count else f'{shown:,} of {count:,}'


# The inches that misclassified images have, and one line below them.
WRONG_WIDTH, WRONG_HEIGHT, LINE = 2.95, 2.65, 0.13


def mistakes_grid(count: int, classes) -> tuple[int, int, int]:
  """Columns, rows, and lines below each, for that many images if they fit."""
  short = max(map(len, classes)) <= 2
  lines = 1 if short else 2
  for columns in (6, 8, 10, 12) if short else (5,):
    pitch = WRONG_WIDTH / columns
    rows = int(WRONG_HEIGHT / (pitch + lines * LINE))
    if columns * rows >= count:
      break
  return columns, rows, lines


def most_mistakes(classes) -> int:
  """How many misclassified images fit."""
  columns, rows, _ = mistakes_grid(10**9, classes)
  return columns * rows


def draw_wrong(drawn, images, truth, predicted, count: int, classes) -> None:
  """Misclassified images, 'true→predicted' below; `count` there are in all."""
  columns, rows, lines = mistakes_grid(len(images), classes)
  pitch = WRONG_WIDTH / columns
  step = 1 + lines * LINE / pitch  # from row to row
  axes = plotting.add_images(drawn, 0.05, 3.15, pitch, columns, rows * step)
  for i, image in enumerate(images):
    x, y = i % columns, step * (i // columns)
    plotting.place(axes, image, x, y)
    arrow = '→' if lines == 1 else '\n→'
    text = f'{classes[truth[i]]}{arrow}{classes[predicted[i]]}'
    axes.text(x, y + 0.48, text, ha='center', va='top', size='x-small')
  axes.set_title(f'{some_of(len(images), count)} mistakes, true→predicted')


def draw_confusion(drawn, counts: np.ndarray, classes) -> None:
  """The confusion matrix `[C, C]`, coloured by the mistakes alone."""
  from matplotlib import colors

  axes = drawn.add_axes((0.55, 0.26, 0.45, 0.45 * 7.2 / 5.8))
  right = np.eye(len(counts), dtype=bool)
  wrong, total = np.ma.array(counts, mask=right), counts.sum()
  axes.set_facecolor('0.92')
  # A root, or one frequent confusion makes all others pale.
  most = max(1, wrong.filled(0).max())
  picture = axes.imshow(
    wrong, cmap='Blues', norm=colors.PowerNorm(0.5, vmin=0, vmax=most)
  )
  if len(counts) <= MANY_CLASSES:
    annotate(axes, counts, 0.35 * most)
    turned = 90 if max(map(len, classes)) > 2 else 0
    axes.set_xticks(range(len(counts)), classes, rotation=turned)
    axes.set_yticks(range(len(counts)), classes)
    axes.tick_params(length=0)
  else:
    drawn.colorbar(picture, ax=axes, location='right', shrink=0.6)
  axes.set(xlabel='predicted class', ylabel='true class')
  axes.set_title(
    f'test error {100 * wrong.sum() / total:.2f} % '
    f'({wrong.sum():,} of {total:,} images)'
  )


def annotate(axes, counts: np.ndarray, dark: float) -> None:
  """Writes the counts `[C, C]` into their cells.

  Args:
    axes: of the matrix.
    counts: those on the diagonal are written in grey.
    dark: cells of more mistakes than this are dark.
  """
  for (i, j), count in np.ndenumerate(counts):
    color = '0.55' if i == j else 'w' if count > dark else 'k'
    text = str(count) if count else ''
    axes.text(j, i, text, ha='center', va='center', color=color)


# Figure 4.


def neighbours(finished, *, queries: int = 7, nearest: int = 5):
  """Figure 4: the nearest unlabelled images of some, by cosine similarity.

  Args:
    finished: the run.
    queries: how many images; half of them without a known class, if there
      are such.
    nearest: how many neighbours of each.
  """
  dataset, rows = finished.dataset, hidden_rows(finished.split)
  positive(queries=queries, nearest=nearest)
  require(
    queries <= len(rows) and nearest < len(rows),
    f'--queries={queries}, --nearest={nearest}: there are {len(rows)} '
    'unlabelled images: give smaller numbers',
  )
  truth, feed = dataset.train.labels, finished.program.data.train
  own = choose_queries(truth[rows], queries, finished.split.seed)
  embed = lambda some: finished.infer(finished.state, feed, some).embedding
  found, cosines = nearest_of(cosines_to(embed, rows, rows[own]), own, nearest)

  shown = np.concatenate([own[:, None], found], axis=1)
  figure = draw_neighbours(
    [dataset.train.read(mine) for mine in rows[shown]],
    truth[rows[shown]],
    cosines,
    dataset.classes,
    f'nearest of {len(rows):,} unlabelled images, {finished.steps:,} steps',
  )
  name = lambda row: name_of(truth[row], dataset.classes)
  table = [('query_row', 'class', 'rank', 'row', 'row_class', 'cosine')]
  table += [
    (query, name(query), rank + 1, row, name(row), cosine)
    for query, mine, values in zip(rows[own], rows[found], cosines, strict=True)
    for rank, (row, cosine) in enumerate(zip(mine, values, strict=True))
  ]
  return figure, {'neighbours': table}


def name_of(label: int, classes: tuple[str, ...]) -> str:
  """A class's name, '?' where it is not known."""
  return '?' if label == UNLABELLED else classes[label]


def choose_queries(truth: np.ndarray, count: int, seed: int) -> np.ndarray:
  """Random positions `[Q]`: of a known class, then of an unknown one.

  Images of classes that a run was not told of (STL-10) have no known one.

  Args:
    truth: `[U]` of the unlabelled images.
    count: Q.
    seed: of the split.
  """
  order = generator(seed, _QUERIES).permutation(len(truth))
  known = truth[order] != UNLABELLED
  strange = min(count // 2, np.count_nonzero(~known))
  of_known = order[known][: count - strange]
  return np.concatenate([of_known, order[~known][: count - len(of_known)]])


def unit(vectors: np.ndarray) -> np.ndarray:
  """Vectors `[B, D]` of length 1; of one that is 0, 0."""
  lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
  return vectors / np.maximum(lengths, np.finfo(vectors.dtype).tiny)


def cosines_to(embed, rows: np.ndarray, of: np.ndarray) -> np.ndarray:
  """Cosine similarities `[Q, U]` of the rows `of [Q]` to `rows [U]`.

  Args:
    embed: `rows [B] -> [B, D]`.
    rows: of the images, whose embeddings are not kept.
    of: rows of the queries.
  """
  queries = unit(embed(of))
  chunks = np.split(rows, range(CHUNK, len(rows), CHUNK))
  return np.concatenate([queries @ unit(embed(c)).T for c in chunks], axis=1)


def nearest_of(cosines: np.ndarray, own: np.ndarray, count: int):
  """The most similar ones, each query itself left out.

  Args:
    cosines: `[Q, U]`.
    own: positions `[Q]` of the queries themselves.
    count: K.

  Returns:
    Positions `[Q, K]` and cosines `[Q, K]`, in falling order.
  """
  others = cosines.copy()
  others[np.arange(len(own)), own] = -np.inf
  found = np.argsort(-others, axis=1, kind='stable')[:, :count]
  return found, np.take_along_axis(others, found, axis=1)


def draw_neighbours(images, labels, cosines, classes, title: str):
  """A row per query: it, and its neighbours with their similarities.

  Args:
    images: Q times `[1 + K, H, W, c]`, a query first.
    labels: `[Q, 1 + K]`, UNLABELLED where the class is not known.
    cosines: `[Q, K]` of the neighbours.
    classes: names.
    title: of the figure.
  """
  from matplotlib import figure

  step, gap = 1.3, 0.4  # rows have names below, queries stand apart
  height, width = step * len(images), labels.shape[1] + gap
  pitch = 3.4 / width
  size = 'small' if max(map(len, classes)) <= 7 else 'x-small'
  digits = 2 if cosines.max() < 0.995 else 3  # 1.00 says little
  drawn = figure.Figure(figsize=(3.4, pitch * height + 0.6))
  axes = plotting.add_images(drawn, 0, 0.3, pitch, width, height)
  for (q, k), label in np.ndenumerate(labels):
    x, y = k + gap * (k > 0), step * q
    frame = agreement(label, labels[q, 0]) if k else None
    plotting.place(axes, images[q][k], x, y, frame=frame)
    name = name_of(label, classes)
    axes.text(x, y + 0.5, name, ha='center', va='top', size=size)
    if k:
      value = f'{cosines[q, k - 1]:.{digits}f}'
      plotting.outlined(
        axes, x - 0.43, y - 0.43, value, ha='left', va='top', size=size
      )
  axes.set_title(title)
  if (labels != UNLABELLED).any():
    draw_agreement(drawn)
  return drawn


def draw_agreement(drawn) -> None:
  """What the frames mean."""
  from matplotlib import lines

  handles = [
    lines.Line2D([], [], color=color, label=label)
    for color, label in (
      (plotting.BLUE, 'of the same class as the left one'),
      (plotting.RED, 'of another'),
    )
  ]
  drawn.legend(
    handles=handles,
    loc='lower center',
    ncols=2,
    frameon=False,
    fontsize='small',
    handlelength=1.5,
  )


def agreement(label: int, query: int) -> str | None:
  """The colour of a neighbour's frame, none where a class is not known."""
  if UNLABELLED in (label, query):
    return None
  return plotting.BLUE if label == query else plotting.RED
