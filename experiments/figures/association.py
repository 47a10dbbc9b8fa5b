"""Figures 3 and 4 of Learning by Association: mistakes and neighbours.

Haeusser, Mordvintsev, Cremers, CVPR 2017:
  Figure 3, section 4.1.2  `mistakes`    labelled images, confusions, mistakes
  Figure 4, section 4.2    `neighbours`  neighbours of unlabelled images

Each takes a `loading.Finished`, computes arrays from it, and hands these to a
function that draws. Sizes are in inches as printed.

Letters: N training images, M test images, C classes, Q queries, K neighbours, D
embedding, H x W x c an image.
"""

import numpy as np

from ssljax.analysis.embeddings import l2_normalize
from ssljax.core import UNLABELLED
from ssljax.data.splits import generator
from ssljax.errors import positive, require
from ssljax.experiments.figures import style
from ssljax.runs.load import hidden_rows

_QUERIES = 51  # a random stream above those of `splits` and `batches`
CHUNK = 2**16  # embeddings in memory at a time


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

  shown = style.some_of_each(
    split.labels, 10, min(len(classes), style.MANY_CLASSES)
  )
  wrong = np.flatnonzero(predicted != truth)
  wrong = wrong[np.lexsort((predicted[wrong], truth[wrong]))]
  few = style.evenly(wrong, most_mistakes(classes))
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
  axes = style.add_images(
    drawn, 0.25, 0.3, 2.5 / max(10, len(rows)), 10, len(rows)
  )
  for y, label in enumerate(rows):
    for x, image in enumerate(images[row == y]):
      style.place(axes, image, x, y)
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
  axes = style.add_images(drawn, 0.05, 3.15, pitch, columns, rows * step)
  for i, image in enumerate(images):
    x, y = i % columns, step * (i // columns)
    style.place(axes, image, x, y)
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
  if len(counts) <= style.MANY_CLASSES:
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


def cosines_to(embed, rows: np.ndarray, of: np.ndarray) -> np.ndarray:
  """Cosine similarities `[Q, U]` of the rows `of [Q]` to `rows [U]`.

  Args:
    embed: `rows [B] -> [B, D]`.
    rows: of the images, whose embeddings are not kept.
    of: rows of the queries.
  """
  queries = l2_normalize(embed(of))
  chunks = np.split(rows, range(CHUNK, len(rows), CHUNK))
  return np.concatenate(
    [queries @ l2_normalize(embed(c)).T for c in chunks], axis=1
  )


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
  axes = style.add_images(drawn, 0, 0.3, pitch, width, height)
  for (q, k), label in np.ndenumerate(labels):
    x, y = k + gap * (k > 0), step * q
    frame = agreement(label, labels[q, 0]) if k else None
    style.place(axes, images[q][k], x, y, frame=frame)
    name = name_of(label, classes)
    axes.text(x, y + 0.5, name, ha='center', va='top', size=size)
    if k:
      value = f'{cosines[q, k - 1]:.{digits}f}'
      style.outlined(
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
      (style.BLUE, 'of the same class as the left one'),
      (style.RED, 'of another'),
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
  return style.BLUE if label == query else style.RED
