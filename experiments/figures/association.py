"""Figures 3 and 4 of Learning by Association: mistakes and neighbours.

Haeusser, Mordvintsev, Cremers, CVPR 2017:
  Figure 3, section 4.1.2  `mistakes`    labelled images, confusion matrix,
                                         misclassified images
  Figure 4, section 4.2    `neighbours`  neighbours of unlabelled images

Each function takes a `runs.load.Finished`, computes arrays and passes them to a
function that draws. Sizes are in inches as printed.

Letters: N training images, M test images, U unlabelled images, C classes, Q
queries, K neighbours, D numbers of an embedding, H x W x c an image.
"""

import numpy as np

from ssljax.analysis.embeddings import l2_normalize
from ssljax.core import UNLABELLED
from ssljax.data.splits import generator
from ssljax.errors import positive, require
from ssljax.experiments.figures import style
from ssljax.runs.load import hidden_rows

_QUERIES = 51  # random stream, above those of `splits` and `sampling`
CHUNK = 2**16  # embeddings in memory at a time


# Figure 3.


def mistakes(finished):
  """Draw Figure 3: labelled images, confusion matrix, misclassified images.

  Args:
    finished: the finished run.

  Returns:
    The figure, and its data as tables.
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
  few = style.evenly(wrong, mistakes_capacity(classes))
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
  """Count predictions by class: `[C, C]`, a row per true class.

  Args:
    truth: true labels `[M]`.
    predicted: predicted labels `[M]`.
    classes: C.
  """
  counts = np.zeros((classes, classes), int)
  np.add.at(counts, (truth, predicted), 1)
  return counts


def draw_mistakes(labelled, counts, wrong, classes: tuple[str, ...]):
  """Draw the three parts of Figure 3.

  Args:
    labelled: images `[K, H, W, c]`, their labels `[K]`, and the number of all
      labelled images.
    counts: confusion matrix `[C, C]` of the test images.
    wrong: misclassified images `[K, H, W, c]`, true and predicted labels `[K]`.
    classes: names of the classes.
  """
  from matplotlib import figure

  drawn = figure.Figure(figsize=(7.2, 5.8))
  draw_labelled(drawn, *labelled, classes)
  draw_wrong(drawn, *wrong, counts.sum() - counts.trace(), classes)
  draw_confusion(drawn, counts, classes)
  return drawn


def draw_labelled(drawn, images, labels, count: int, classes) -> None:
  """Draw some of `count` labelled images, a row per class."""
  rows, row = np.unique(labels, return_inverse=True)
  axes = style.add_images(
    drawn, 0.25, 0.3, 2.5 / max(10, len(rows)), 10, len(rows)
  )
  for y, label in enumerate(rows):
    for x, image in enumerate(images[row == y]):
      style.place(axes, image, x, y)
    axes.text(-0.7, y, classes[label], ha='right', va='center', size='small')
  axes.set_title(f'{share(len(images), count)} labelled images')


def share(shown: int, count: int) -> str:
  """Return 'all 7' or '7 of 20'."""
  return f'all {count:,}' if shown == count else f'{shown:,} of {count:,}'


# Inches for the misclassified images, and for a line of text below an image.
WRONG_WIDTH, WRONG_HEIGHT, LINE = 2.95, 2.65, 0.13


def mistakes_grid(count: int, classes) -> tuple[int, int, int]:
  """Return columns, rows, and lines of text below an image.

  Args:
    count: number of images; fewer are drawn if they do not fit.
    classes: names of the classes, which determine the lines of text.
  """
  short = max(map(len, classes)) <= 2
  lines = 1 if short else 2
  for columns in (6, 8, 10, 12) if short else (5,):
    pitch = WRONG_WIDTH / columns
    rows = int(WRONG_HEIGHT / (pitch + lines * LINE))
    if columns * rows >= count:
      break
  return columns, rows, lines


def mistakes_capacity(classes) -> int:
  """Return the number of misclassified images that fit."""
  columns, rows, _ = mistakes_grid(10**9, classes)
  return columns * rows


def draw_wrong(drawn, images, truth, predicted, count: int, classes) -> None:
  """Draw some of `count` misclassified images, 'true→predicted' below each."""
  columns, rows, lines = mistakes_grid(len(images), classes)
  pitch = WRONG_WIDTH / columns
  step = 1 + lines * LINE / pitch  # distance of two rows
  axes = style.add_images(drawn, 0.05, 3.15, pitch, columns, rows * step)
  for i, image in enumerate(images):
    x, y = i % columns, step * (i // columns)
    style.place(axes, image, x, y)
    arrow = '→' if lines == 1 else '\n→'
    text = f'{classes[truth[i]]}{arrow}{classes[predicted[i]]}'
    axes.text(x, y + 0.48, text, ha='center', va='top', size='x-small')
  axes.set_title(f'{share(len(images), count)} mistakes, true→predicted')


def draw_confusion(drawn, counts: np.ndarray, classes) -> None:
  """Draw the confusion matrix `[C, C]`, coloured by the mistakes alone."""
  from matplotlib import colors

  axes = drawn.add_axes((0.55, 0.26, 0.45, 0.45 * 7.2 / 5.8))
  right = np.eye(len(counts), dtype=bool)
  wrong, total = np.ma.array(counts, mask=right), counts.sum()
  axes.set_facecolor('0.92')
  # The square root keeps rare confusions visible beside a frequent one.
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
  """Write the counts into the cells of a matrix.

  Args:
    axes: axes of the matrix.
    counts: `[C, C]`; the diagonal is written in grey.
    dark: counts above this number are written in white.
  """
  for (i, j), count in np.ndenumerate(counts):
    color = '0.55' if i == j else 'w' if count > dark else 'k'
    text = str(count) if count else ''
    axes.text(j, i, text, ha='center', va='center', color=color)


# Figure 4.


def neighbours(finished, *, queries: int = 7, nearest: int = 5):
  """Draw Figure 4: nearest neighbours by cosine similarity.

  Args:
    finished: the finished run.
    queries: number of query images; half of them of unknown class, if the data
      set has such images.
    nearest: number of neighbours of each query.

  Returns:
    The figure, and its data as tables.

  Raises:
    InputError: the run has too few unlabelled images.
  """
  dataset, rows = finished.dataset, hidden_rows(finished.split)
  positive(queries=queries, nearest=nearest)
  require(
    queries <= len(rows) and nearest < len(rows),
    f'`queries`={queries}, `nearest`={nearest}: there are {len(rows)} '
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
    f'nearest of {len(rows):,} unlabelled images, step {finished.steps:,}',
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
  """Return the name of a class, '?' for UNLABELLED."""
  return '?' if label == UNLABELLED else classes[label]


def choose_queries(truth: np.ndarray, count: int, seed: int) -> np.ndarray:
  """Return random positions `[Q]`, images of known class first.

  The class is unknown for images without a true label (in STL-10).

  Args:
    truth: `[U]` true labels of the unlabelled images.
    count: Q.
    seed: number of the split.
  """
  order = generator(seed, _QUERIES).permutation(len(truth))
  known = truth[order] != UNLABELLED
  unknown = min(count // 2, np.count_nonzero(~known))
  of_known = order[known][: count - unknown]
  return np.concatenate([of_known, order[~known][: count - len(of_known)]])


def cosines_to(embed, rows: np.ndarray, of: np.ndarray) -> np.ndarray:
  """Return the cosine similarities `[Q, U]` of queries to all images.

  Args:
    embed: `rows [B] -> embeddings [B, D]`.
    rows: `[U]` rows of the images; CHUNK embeddings are in memory at a time.
    of: `[Q]` rows of the queries.
  """
  queries = l2_normalize(embed(of))
  chunks = np.split(rows, range(CHUNK, len(rows), CHUNK))
  return np.concatenate(
    [queries @ l2_normalize(embed(c)).T for c in chunks], axis=1
  )


def nearest_of(cosines: np.ndarray, own: np.ndarray, count: int):
  """Return the most similar images, without the query itself.

  Args:
    cosines: `[Q, U]` cosine similarities.
    own: `[Q]` positions of the queries.
    count: K.

  Returns:
    Positions `[Q, K]` and cosines `[Q, K]`, in falling order.
  """
  others = cosines.copy()
  others[np.arange(len(own)), own] = -np.inf
  found = np.argsort(-others, axis=1, kind='stable')[:, :count]
  return found, np.take_along_axis(others, found, axis=1)


def draw_neighbours(images, labels, cosines, classes, title: str):
  """Draw a row per query: the query, and its neighbours with similarities.

  Args:
    images: Q arrays `[1 + K, H, W, c]`, the query first.
    labels: `[Q, 1 + K]`, UNLABELLED where the class is unknown.
    cosines: `[Q, K]` similarities of the neighbours.
    classes: names of the classes.
    title: title of the figure.
  """
  from matplotlib import figure

  step, gap = 1.3, 0.4  # room for names below a row and beside the query
  height, width = step * len(images), labels.shape[1] + gap
  pitch = 3.4 / width
  size = 'small' if max(map(len, classes)) <= 7 else 'x-small'
  digits = 2 if cosines.max() < 0.995 else 3  # 1.00 tells little
  drawn = figure.Figure(figsize=(3.4, pitch * height + 0.6))
  axes = style.add_images(drawn, 0, 0.3, pitch, width, height)
  for (q, k), label in np.ndenumerate(labels):
    x, y = k + gap * (k > 0), step * q
    frame = frame_colour(label, labels[q, 0]) if k else None
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
    draw_frame_legend(drawn)
  return drawn


def draw_frame_legend(drawn) -> None:
  """Add a legend of the frames' colours."""
  from matplotlib import lines

  handles = [
    lines.Line2D([], [], color=color, label=label)
    for color, label in (
      (style.BLUE, 'same class as the left image'),
      (style.RED, 'another class'),
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


def frame_colour(label: int, query: int) -> str | None:
  """Return the colour of a neighbour's frame; None for an unknown class."""
  if UNLABELLED in (label, query):
    return None
  return style.BLUE if label == query else style.RED
