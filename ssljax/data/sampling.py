"""The rows of every step, a pure function of (split, batch, stage, step).

So a resumed run needs only the step number, and each process can compute the
whole batch and take its own share.
"""

from collections.abc import Callable, Sequence
import functools

import numpy as np

from ssljax.core import UNLABELLED, BatchSpec
from ssljax.data.splits import Split, generator
from ssljax.errors import require

# Random streams, the second word of their key: above those of `splits`. Stage s
# adds 100 s.
_LABELLED, _UNLABELLED, _CROP, _CLASSES = 10, 11, 12, 13


def repeated_shuffles(rows, size: int, *words: int) -> np.ndarray:
  """Return the first `size` entries of concatenated shuffles of `rows`.

  Args:
    rows: `[M]`.
    size: the length of the result.
    words: the key of the generator, at most four.
  """
  shuffles = -(-size // len(rows))
  rng = generator(*words)
  repeated = [rng.permutation(rows) for _ in range(shuffles)]
  return np.concatenate(repeated)[:size]


def queue(rows, start: int, size: int, *words: int) -> np.ndarray:
  """Return entries `start` to `start + size` of concatenated shuffles.

  Each shuffle has a generator of its own, so that any part can be computed, and
  a queue continues across epochs.

  Args:
    rows: `[M]`.
    start: the first entry.
    size: the length of the result.
    words: the key of the generator, at most three.
  """
  first, last = start // len(rows), (start + size - 1) // len(rows)
  shuffles = [
    generator(*words, number).permutation(rows)
    for number in range(first, last + 1)
  ]
  return np.concatenate(shuffles)[start - first * len(rows) :][:size]


def class_aware_queue(
  pools: Sequence[np.ndarray], start: int, size: int, seed: int, stream: int
) -> np.ndarray:
  """Return entries `start` to `start + size` of a queue of all classes.

  The queue is a sequence of shuffles of the classes, and each class is replaced
  by the next row of its own `queue`, so that all classes are drawn equally
  often, and all rows of a class.

  Args:
    pools: rows of each class, none empty.
    start: the first entry.
    size: the length of the result.
    seed: of the split.
    stream: of the stage.
  """
  classes = len(pools)
  first, last = start // classes, (start + size - 1) // classes
  count = last - first + 1
  rows = [
    queue(pool, first, count, seed, _LABELLED + stream, label)
    for label, pool in enumerate(pools)
  ]
  order = queue(
    *(np.arange(classes), first * classes, count * classes),
    *(seed, _CLASSES + stream),
  ).reshape(count, classes)
  found = np.take_along_axis(np.stack(rows, axis=1), order, axis=1)
  return found.ravel()[start - first * classes :][:size]


def check_labelled(batch_spec: BatchSpec, labelled: int) -> None:
  """Refuse a labelled part that `labelled` images cannot fill."""
  size, classes = batch_spec.labelled, batch_spec.classes
  require(
    size % max(1, classes) == 0,
    f'`batch_labelled`={size}: is no multiple of the {classes} classes; give '
    '`batch_per_class`',
  )
  require(
    classes or size <= labelled,
    f'`{batch_spec.flag}`={size} is larger than the {labelled} labelled '
    'images; give a smaller one, or more `labels`',
  )


def epoch_steps(batch_spec: BatchSpec, labelled: int, unlabelled: int) -> int:
  """Return the number of steps of an epoch.

  Args:
    batch_spec: the composition of a batch.
    labelled: the number of rows that have a label.
    unlabelled: the number of rows that the unlabelled part is drawn from, each
      once per epoch.

  Raises:
    InputError: the rows cannot fill a batch.
  """
  check_labelled(batch_spec, labelled)
  size = batch_spec.unlabelled
  require(
    size <= unlabelled,
    f'`batch_labelled`, `batch_unlabelled`: {size} images a step are more than '
    f'the {unlabelled} training images; give smaller ones'
    if batch_spec.include_labelled
    else f'`batch_unlabelled`={size} is larger than the {unlabelled} '
    'labelled images; give a smaller one, or more `labels`'
    if batch_spec.from_labelled
    else f'`batch_unlabelled`={size} is larger than the {unlabelled} '
    'unlabelled images; give a smaller one, or `unlabelled`=all, or train on '
    'the labelled images alone (supervised.py)',
  )
  if size:
    return unlabelled // size
  return max(1, labelled // batch_spec.labelled)


class Sampler:
  """The rows of each step of a stage under one split.

  Attributes:
    batch_spec: the composition of a batch.
    split: the labelled and the unlabelled rows.
    epoch_steps: the number of steps of an epoch.
  """

  def __init__(
    self,
    batch_spec: BatchSpec,
    split: Split,
    stage: int = 0,
    *,
    start: int = 0,
    epoch: int = 0,
    multiplicity: np.ndarray | None = None,
  ):
    """Check that the split can fill a batch.

    Args:
      batch_spec: the composition of a batch.
      split: the labelled and the unlabelled rows.
      stage: the number of the stage; no two stages share an order.
      start: the step of the stage from which this sampler is used.
      epoch: the number of the epoch that begins at `start`.
      multiplicity: `[N]` int, how often each row occurs in the unlabelled part
        of an epoch; rows outside the split's `admitted` and labelled ones are
        left out.
    """
    self.batch_spec, self.split = batch_spec, split
    self._stream, self._start, self._first = 100 * stage, start, epoch
    self._unlabelled = split.unlabelled
    if batch_spec.include_labelled:
      self._unlabelled = np.union1d(split.labelled, split.unlabelled)
    if batch_spec.from_labelled:
      self._unlabelled = split.labelled
    if multiplicity is not None:
      admitted = split.admitted | (split.labels != UNLABELLED)
      self._unlabelled = np.repeat(
        np.arange(len(multiplicity)), multiplicity * admitted
      )
    labelled, unlabelled = len(split.labelled), len(self._unlabelled)
    self._pools = [
      np.flatnonzero(split.labels == label)
      for label in range(batch_spec.classes)
    ]
    for label, pool in enumerate(self._pools):
      require(
        len(pool) > 0,
        f'`batch_per_class`: class {label} has no labelled image; label at '
        'least one image of each class',
      )
    self._by_class = [
      np.flatnonzero(split.labels == label)
      for label in np.unique(split.labels[split.labelled])
    ]
    if multiplicity is None:
      self.epoch_steps = epoch_steps(batch_spec, labelled, unlabelled)
    else:
      check_labelled(batch_spec, labelled)
      self.epoch_steps = -(-unlabelled // batch_spec.unlabelled)
    self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

  def _make_epoch(self, epoch: int) -> np.ndarray:
    """Return the rows of an epoch, `[epoch_steps, B]`.

    The unlabelled part is one shuffle of its rows, each at most once; the
    remainder that does not fill a batch is dropped. With `multiplicity` nothing
    is dropped: a second shuffle completes the last batch. The labelled part
    repeats shuffles of its rows until the epoch is full, so that alone it too
    is one shuffle. In class-balanced batches it is instead one queue per class,
    which continues across epochs, and with class-aware sampling one queue of
    all classes.
    """
    steps, (labelled, unlabelled, classes, *_) = (
      self.epoch_steps,
      self.batch_spec,
    )
    seed, parts = self.split.seed, []
    for label, pool in enumerate(self._pools):
      size = steps * (labelled // classes)
      words = seed, _LABELLED + self._stream, label
      parts.append(queue(pool, epoch * size, size, *words))
    if labelled and self.batch_spec.class_aware:
      size = steps * labelled
      start = epoch * size
      parts.append(
        class_aware_queue(self._by_class, start, size, seed, self._stream)
      )
    elif labelled and not classes:
      words = seed, _LABELLED + self._stream, epoch
      labelled_rows = self.split.labelled
      parts.append(repeated_shuffles(labelled_rows, steps * labelled, *words))
    if unlabelled:
      words = seed, _UNLABELLED + self._stream, epoch
      size = steps * unlabelled
      parts.append(repeated_shuffles(self._unlabelled, size, *words))
    parts = [part.reshape(steps, -1) for part in parts]
    return np.concatenate(parts, axis=1).astype(np.int32)

  def rows(self, step: int) -> np.ndarray:
    """Return the rows `[B]` int32 of a step, counted from the stage's first."""
    epoch, position = divmod(step - self._start, self.epoch_steps)
    return self._epoch(self._first + epoch)[position]

  def rng_words(self, step: int) -> tuple[int, int, int]:
    """Return the key of the step's random draws on the host.

    The draws of a row add its number, see `feeds.window_draws`.
    """
    return self.split.seed, _CROP + self._stream, step


def rows_of_call(
  samplers: Sequence[Sampler], call: tuple[int, int]
) -> np.ndarray:
  """Return the rows of the K steps of one call of the compiled step.

  Args:
    samplers: S of them, one per seed.
    call: the first step and the one after the last, counted from the stage's
      first step.

  Returns:
    `[S, B]`, or `[K, S, B]` if K > 1.
  """
  return _of_call(Sampler.rows, samplers, call)


def rng_words_of_call(
  samplers: Sequence[Sampler], call: tuple[int, int]
) -> np.ndarray:
  """Return `Sampler.rng_words` of the steps of a call.

  Args:
    samplers: as in `rows_of_call`.
    call: as in `rows_of_call`.

  Returns:
    `[S, 3]`, or `[K, S, 3]` if K > 1.
  """
  return _of_call(Sampler.rng_words, samplers, call)


def _of_call(get: Callable, samplers, call: tuple[int, int]) -> np.ndarray:
  """Return `get(sampler, step)`, `[S, ...]`, or `[K, S, ...]` if K > 1."""
  values = np.stack(
    [[get(sampler, step) for sampler in samplers] for step in range(*call)]
  )
  return values if len(values) > 1 else values[0]
