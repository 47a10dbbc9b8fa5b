"""The rows of every step, and the two feeds that bring their images.

Order is arithmetic: the rows of step t are a pure function of (split, draw,
stage, t), so a resume needs a number and a process its own share. `resident`
keeps uint8 images on the devices and gathers inside the compiled step;
`stream` decodes them on the host, ahead of the step, where it may cut random
windows from originals that differ in size. Same rows, same keys.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from ssljax import augment, imagenet, parallel
from ssljax.core import UNLABELLED, Draw, require
from ssljax.splits import Split, generator

# Random streams of `epoch_rows`: above those of `splits`.
_LABELLED, _OTHER, _CROP = 10, 11, 12
_ON_PIXELS = 0x70697865  # 'pixe', in the keys of what precedes preprocessing
_AHEAD_BYTES = 2**29  # of images that `stream` decodes ahead of the step


def endless(rows, size, *words: int) -> np.ndarray:
  """The first `size` of shuffle after shuffle of `rows [M]`."""
  shuffles = -(-size // len(rows))
  draws = generator(*words)
  return np.concatenate([draws.permutation(rows) for _ in range(shuffles)])[
    :size
  ]


def queue(rows, start, size, *words: int) -> np.ndarray:
  """Places `start` to `start + size` of shuffle after shuffle of `rows [M]`.

  Unlike `endless` it goes on across epochs; at most three words.
  """
  first, last = start // len(rows), (start + size - 1) // len(rows)
  shuffles = [
    generator(*words, number).permutation(rows)
    for number in range(first, last + 1)
  ]
  return np.concatenate(shuffles)[start - first * len(rows) :][:size]


def check_labelled(draw: Draw, labelled: int) -> None:
  """Refuses a draw that so many labelled images cannot serve."""
  require(
    draw.labelled % max(1, draw.classes) == 0,
    f'--batch_labelled={draw.labelled} is not as many of each of '
    f'{draw.classes} classes: give --batch_per_class',
  )
  require(
    draw.classes or draw.labelled <= labelled,
    f'--{draw.flag}={draw.labelled} is larger than the {labelled} '
    'labelled images: give a smaller one, or more --labels',
  )


def epoch_steps(draw: Draw, labelled: int, other: int) -> int:
  """Steps of an epoch.

  Args:
    draw: what a step sees.
    labelled: rows that have a label.
    other: rows that the other part is drawn from, each once.

  Raises:
    InputError: they are too few.
  """
  check_labelled(draw, labelled)
  too_many = (
    f'--batch_labelled, --batch_unlabelled: {draw.other} images a step are '
    f'more than the {other} there are: give smaller ones'
    if draw.everything
    else f'--batch_unlabelled={draw.other} is larger than the {other} '
    'unlabelled images: give a smaller one, or --unlabelled=all; '
    'experiments/supervised.py trains on the labelled images alone'
  )
  require(draw.other <= other, too_many)
  if draw.other:
    return other // draw.other
  return max(1, labelled // draw.labelled)


class Order:
  """The rows of each step of a stage under one split."""

  def __init__(
    self,
    draw: Draw,
    split: Split,
    stage: int = 0,
    *,
    start: int = 0,
    epoch: int = 0,
    copies: np.ndarray | None = None,
  ):
    """Checks that the split can serve the draw.

    Args:
      draw: what a step sees.
      split: the rows there are.
      stage: number of the stage, so that no two stages share an order.
      start: step of the stage from which on this is its order.
      epoch: number of the epoch that begins there.
      copies: `[N]` how often an epoch has a row in its other part, if the
        run admits it.
    """
    self.draw, self.split = draw, split
    self._stream, self._start, self._first = 100 * stage, start, epoch
    self._others = split.unlabelled
    if draw.everything:
      self._others = np.union1d(split.labelled, split.unlabelled)
    if copies is not None:
      admitted = split.admitted | (split.labels != UNLABELLED)
      self._others = np.repeat(np.arange(len(copies)), copies * admitted)
    labelled, other = len(split.labelled), len(self._others)
    self._pools = [
      np.flatnonzero(split.labels == label) for label in range(draw.classes)
    ]
    for label, pool in enumerate(self._pools):
      require(
        len(pool) > 0,
        f'--batch_per_class: class {label} has no labelled image: label at '
        'least one of each class',
      )
    if copies is None:
      self.epoch_steps = epoch_steps(draw, labelled, other)
    else:
      check_labelled(draw, labelled)
      self.epoch_steps = -(-other // draw.other)
    self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

  def _make_epoch(self, epoch: int) -> np.ndarray:
    """Rows `[epoch_steps, B]`.

    The other part (or the labelled one, where it is alone) is one shuffle,
    each row at most once: what is left over at the end is less than a batch.
    Of copies nothing is left over: another shuffle fills up the last step. Of a
    balanced draw the labelled part is a queue per class instead, which an
    epoch's end does not interrupt.
    """
    steps, (labelled, other, classes, *_) = self.epoch_steps, self.draw
    seed, parts = self.split.seed, []
    for label, pool in enumerate(self._pools):
      size = steps * (labelled // classes)
      words = seed, _LABELLED + self._stream, label
      parts.append(queue(pool, epoch * size, size, *words))
    if labelled and not classes:
      words = seed, _LABELLED + self._stream, epoch
      parts.append(endless(self.split.labelled, steps * labelled, *words))
    if other:
      words = seed, _OTHER + self._stream, epoch
      parts.append(endless(self._others, steps * other, *words))
    parts = [part.reshape(steps, -1) for part in parts]
    return np.concatenate(parts, axis=1).astype(np.int32)

  def rows(self, step: int) -> np.ndarray:
    """Rows `[B]` of a step, counted from the stage's first."""
    epoch, position = divmod(step - self._start, self.epoch_steps)
    return self._epoch(self._first + epoch)[position]

  def words(self, step: int) -> tuple[int, int, int]:
    """What a step's draws on the host are a function of, beside a row."""
    return self.split.seed, _CROP + self._stream, step


def rows_of_call(orders: Sequence[Order], call: tuple[int, int]) -> np.ndarray:
  """Rows of the steps of a call: `[S, B]`, or `[K, S, B]` for K > 1 steps.

  Args:
    orders: one per seed.
    call: first step and the one after the last, counted from the stage's first.
  """
  return _of_call(Order.rows, orders, call)


def words_of_call(orders: Sequence[Order], call: tuple[int, int]) -> np.ndarray:
  """Likewise the words `[S, 3]` or `[K, S, 3]` of its draws on the host."""
  return _of_call(Order.words, orders, call)


def _of_call(what: Callable, orders, call: tuple[int, int]) -> np.ndarray:
  """`what(order, step)` of each, `[S, ...]`, or `[K, S, ...]` for K > 1."""
  found = np.stack(
    [[what(order, step) for order in orders] for step in range(*call)]
  )
  return found if len(found) > 1 else found[0]


def window_draws(rows, words) -> np.ndarray:
  """Draws for the window that an image is cropped to, alike in any batch.

  Args:
    rows: `[..., B]`.
    words: `[..., 3]` of `Order.words`.

  Returns:
    `[..., B, T, 4]` in [0, 1), as `imagenet.window` takes them.
  """
  draws = [
    [generator(*own, row).random((imagenet.TRIES, 4)) for row in some]
    for some, own in zip(
      rows.reshape(-1, rows.shape[-1]), words.reshape(-1, 3), strict=True
    )
  ]
  return np.reshape(draws, (*rows.shape, imagenet.TRIES, 4))


class Feed(NamedTuple):
  """Images of one data set, on their way to the compiled step."""

  size: int  # N
  # (pixels, rows [B]) -> uint8, or float32 that is fed as it is, [B, H, W, c];
  # traced
  gather: Callable
  pixels_are_shared: bool  # one array for all seeds, or one per batch
  # (rows of a call, calls, words of a call or None) -> iterator of (pixels,
  # rows); with words, images that the source can crop are cropped at random.
  batches: Callable


def resident(images: np.ndarray, place: parallel.Placer) -> Feed:
  """All images `[N, H, W, c]` on the devices, whole on each.

  Args:
    images: uint8 of the whole data set, or float32 that is fed as it is.
    place: puts them on the devices.
  """
  pixels = place(images, None)

  def batches(rows_of: Callable, calls: Iterable, words_of=None) -> Iterator:
    del words_of  # what is resident is cropped inside the compiled step
    for call in calls:
      rows = rows_of(call)
      yield pixels, place(rows, rows.ndim - 1)

  return Feed(
    len(images),
    lambda pixels, rows: pixels[rows],
    True,
    batches,
  )


def stream(source, place: parallel.Placer, *, threads: int = 16) -> Feed:
  """Images decoded on the host while the devices work, by Grain.

  Every process decodes those of its own devices.

  Args:
    source: a `datasets.Source`.
    place: puts them on the devices.
    threads: that read and decode ahead.
  """
  import grain  # Slow to import, and the resident feed has no need of it.

  def load(rows, words, mine):  # [..., B], [..., 3] or None, places of own rows
    own = rows[..., mine]
    flat = own.reshape(-1)
    if words is None or source.crop is None:
      pixels = source.read(flat)
    else:
      draws = window_draws(own, words)
      pixels = source.crop(flat, draws.reshape(len(flat), *draws.shape[-2:]))
    return pixels.reshape(*own.shape, *source.shape), rows

  def batches(rows_of: Callable, calls: Iterable, words_of=None) -> Iterator:
    calls = list(calls)
    if not calls:
      return
    first = rows_of(calls[0])
    mine = place.share(first.shape[-1])
    size = first[..., mine].size * math.prod(source.shape)
    ahead = max(2, min(2 * threads, _AHEAD_BYTES // size))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    loaded = (
      grain.MapDataset.source(calls)
      .map(lambda call: load(rows_of(call), words_of and words_of(call), mine))
      .to_iter_dataset(options)
    )
    for pixels, rows in loaded:
      axis = rows.ndim - 1
      yield place.own(pixels, axis, rows.shape[axis]), place(rows, axis)

  return Feed(
    len(source.labels),
    lambda pixels, rows: pixels,
    False,
    batches,
  )


def reader(
  feed: Feed,
  preprocess,
  augmentation: Callable | None,
  on_pixels: Callable | None = None,
) -> Callable:
  """What the compiled step calls for its images.

  Every row is augmented under its own key, folded from the step's key and the
  row's number, so that a row looks the same in any batch layout.

  Args:
    feed: brings the pixels.
    preprocess: a `Preprocess`, applied before the augmentation.
    augmentation: `(key, image) -> image`, or None.
    on_pixels: another one, applied before the preprocessing, or None.

  Returns:
    `((pixels, fitted), rows [B], key) -> [B, H, W, c] float32`.
  """

  def read(source: tuple[Any, Any], rows, key):
    pixels, fitted = source
    image = augment.to_float(feed.gather(pixels, rows))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    if on_pixels is not None:
      own = jax.vmap(jax.random.fold_in, (0, None))(keys, _ON_PIXELS)
      image = jax.vmap(on_pixels)(own, image)
    image = jax.vmap(preprocess.apply, (None, 0))(fitted, image)
    if augmentation is None:
      return image
    return jax.vmap(augmentation)(keys, image)

  return read
