"""The rows of every step: a pure function of (split, batch, stage, step).

A resumed run needs only a step number, and a process only its own share.
"""

from collections.abc import Callable, Sequence
import functools

import numpy as np

from ssljax.core import UNLABELLED, BatchSpec
from ssljax.data.splits import Split, generator
from ssljax.errors import require

_LABELLED, _OTHER, _CROP = 10, 11, 12


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


def check_labelled(batch_spec: BatchSpec, labelled: int) -> None:
  """Refuses a draw that so many labelled images cannot serve."""
  require(
    batch_spec.labelled % max(1, batch_spec.classes) == 0,
    f'`batch_labelled`={batch_spec.labelled} is not as many of each of '
    f'{batch_spec.classes} classes: give `batch_per_class`',
  )
  require(
    batch_spec.classes or batch_spec.labelled <= labelled,
    f'--{batch_spec.flag}={batch_spec.labelled} is larger than the {labelled} '
    'labelled images: give a smaller one, or more `labels`',
  )


def epoch_steps(batch_spec: BatchSpec, labelled: int, other: int) -> int:
  """Steps of an epoch.

  Args:
    batch_spec: what a step sees.
    labelled: rows that have a label.
    other: rows that the other part is drawn from, each once.

  Raises:
    InputError: they are too few.
  """
  check_labelled(batch_spec, labelled)
  too_many = (
    f'`batch_labelled`, `batch_unlabelled`: {batch_spec.unlabelled} images a step are '
    f'more than the {other} there are: give smaller ones'
    if batch_spec.include_labelled
    else f'`batch_unlabelled`={batch_spec.unlabelled} is larger than the {other} '
    'unlabelled images: give a smaller one, or `unlabelled`=all; '
    'experiments/supervised.py trains on the labelled images alone'
  )
  require(batch_spec.unlabelled <= other, too_many)
  if batch_spec.unlabelled:
    return other // batch_spec.unlabelled
  return max(1, labelled // batch_spec.labelled)


class Sampler:
  """The rows of each step of a stage under one split."""

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
    """Checks that the split can serve the draw.

    Args:
      batch_spec: what a step sees.
      split: the rows there are.
      stage: number of the stage, so that no two stages share an order.
      start: step of the stage from which on this is its order.
      epoch: number of the epoch that begins there.
      multiplicity: `[N]` how often an epoch has a row in its other part, if the
        run admits it.
    """
    self.batch_spec, self.split = batch_spec, split
    self._stream, self._start, self._first = 100 * stage, start, epoch
    self._others = split.unlabelled
    if batch_spec.include_labelled:
      self._others = np.union1d(split.labelled, split.unlabelled)
    if multiplicity is not None:
      admitted = split.admitted | (split.labels != UNLABELLED)
      self._others = np.repeat(
        np.arange(len(multiplicity)), multiplicity * admitted
      )
    labelled, other = len(split.labelled), len(self._others)
    self._pools = [
      np.flatnonzero(split.labels == label)
      for label in range(batch_spec.classes)
    ]
    for label, pool in enumerate(self._pools):
      require(
        len(pool) > 0,
        f'`batch_per_class`: class {label} has no labelled image: label at '
        'least one of each class',
      )
    if multiplicity is None:
      self.epoch_steps = epoch_steps(batch_spec, labelled, other)
    else:
      check_labelled(batch_spec, labelled)
      self.epoch_steps = -(-other // batch_spec.unlabelled)
    self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

  def _make_epoch(self, epoch: int) -> np.ndarray:
    """Rows `[epoch_steps, B]`.

    The other part (or the labelled one, where it is alone) is one shuffle,
    each row at most once: what is left over at the end is less than a batch.
    Of copies nothing is left over: another shuffle fills up the last step. Of a
    balanced draw the labelled part is a queue per class instead, which an
    epoch's end does not interrupt.
    """
    steps, (labelled, other, classes, *_) = self.epoch_steps, self.batch_spec
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

  def rng_words(self, step: int) -> tuple[int, int, int]:
    """What a step's draws on the host are a function of, beside a row."""
    return self.split.seed, _CROP + self._stream, step


def rows_of_call(
  samplers: Sequence[Sampler], call: tuple[int, int]
) -> np.ndarray:
  """Rows of the steps of a call: `[S, B]`, or `[K, S, B]` for K > 1 steps.

  Args:
    samplers: one per seed.
    call: first step and the one after the last, counted from the stage's first.
  """
  return _of_call(Sampler.rows, samplers, call)


def rng_words_of_call(
  samplers: Sequence[Sampler], call: tuple[int, int]
) -> np.ndarray:
  """Likewise the words `[S, 3]` or `[K, S, 3]` of its draws on the host."""
  return _of_call(Sampler.rng_words, samplers, call)


def _of_call(what: Callable, samplers, call: tuple[int, int]) -> np.ndarray:
  """`what(order, step)` of each, `[S, ...]`, or `[K, S, ...]` for K > 1."""
  found = np.stack(
    [[what(sampler, step) for sampler in samplers] for step in range(*call)]
  )
  return found if len(found) > 1 else found[0]
