"""Which rows are labelled, and which a run may look at without a label.

Drawn once, by a counter-based generator, as a function of (truth, per class,
seed) alone. The first k labelled rows of a class are those of every larger k.
"""

import hashlib
from typing import Literal, NamedTuple

import numpy as np

from ssljax.core import UNLABELLED
from ssljax.errors import require

Pool = Literal['rest', 'all']
# What a random stream is for: the second word of its key.
_VALIDATION, _LABELLED, _UNLABELLED, SUBSAMPLE = range(4)


class Split(NamedTuple):
  """One seed's view of N training rows."""

  seed: int
  labels: np.ndarray  # [N] int32, UNLABELLED where the run must not know
  admitted: np.ndarray  # [N] bool, rows the unlabelled part is drawn from
  validation: np.ndarray  # [V] int32, rows held out, the same for every seed

  @property
  def labelled(self) -> np.ndarray:
    """Rows `[L]` that have a label."""
    return np.flatnonzero(self.labels != UNLABELLED)

  @property
  def unlabelled(self) -> np.ndarray:
    """Rows `[U]` that the unlabelled part is drawn from."""
    return np.flatnonzero(self.admitted)

  def grown(self, labels: np.ndarray) -> 'Split':
    """The split with more labels `[N]`.

    Where the unlabelled part left out the labelled rows, it goes on doing so.
    """
    left_out = not self.admitted[self.labelled].any()
    known = left_out & (labels != UNLABELLED)
    return self._replace(labels=labels, admitted=self.admitted & ~known)

  @property
  def digest(self) -> str:
    """A hash of everything above."""
    content = hashlib.sha256(str(self.seed).encode())
    for part in (self.labels, self.admitted, self.validation):
      content.update(np.ascontiguousarray(part).tobytes())
    return content.hexdigest()


def generator(*words: int) -> np.random.Generator:
  """A generator that is a function of up to four words."""
  key = np.zeros(4, np.uint64)
  key[: len(words)] = words
  # Two words are the key, two the high half of the counter.
  counter = np.array([0, 0, key[2], key[3]], np.uint64)
  return np.random.Generator(np.random.Philox(counter=counter, key=key[:2]))


def check_truth(truth: np.ndarray, classes: int) -> None:
  """Refuses an empty data set and labels outside the classes."""
  require(len(truth) > 0, '`dataset`: the training set is empty')
  strange = np.flatnonzero((truth < UNLABELLED) | (truth >= classes))
  require(
    not len(strange),
    f'`dataset`: row {strange[0] if len(strange) else 0} has label '
    f'{truth[strange[0]] if len(strange) else 0}, outside the {classes} '
    'classes: mend the data set',
  )


def draw_labels(truth, classes, per_class, seed) -> np.ndarray:
  """A class-balanced label table.

  Args:
    truth: `[N]` int32, UNLABELLED for rows that must not be drawn.
    classes: C, or the names of the C classes for the error message.
    per_class: labelled rows per class; None labels every row.
    seed: of this split.

  Returns:
    `[N]` int32, UNLABELLED except for `per_class` rows of each class.
  """
  names = range(classes) if isinstance(classes, int) else classes
  counts = np.bincount(truth[truth != UNLABELLED], minlength=len(names))
  least = int(np.argmin(counts))
  need = 1 if per_class is None else per_class
  require(need > 0, f'`labels`={per_class}: give at least 1 label per class')
  require(
    counts[least] >= need,
    f'`labels`={"all" if per_class is None else per_class}: class '
    f'"{names[least]}" has {counts[least]} training images: give at most '
    f'that many labels per class, or more images',
  )
  if per_class is None:
    return truth.copy()
  labels = np.full(len(truth), UNLABELLED, np.int32)
  for label in range(len(names)):
    rows = np.flatnonzero(truth == label)
    chosen = generator(seed, _LABELLED, label).permutation(rows)[:per_class]
    labels[chosen] = label
  return labels


def admit(
  labels, candidates, unlabelled: Pool, count: int | None, seed
) -> np.ndarray:
  """Rows `[N]` bool that the unlabelled part of a batch is drawn from.

  Args:
    labels: `[N]` label table.
    candidates: `[N]` bool, rows that may be drawn.
    unlabelled: 'rest' excludes the labelled rows, 'all' includes them.
    count: that many of these at random; None admits them all.
    seed: of this split.
  """
  admitted = candidates & ((labels == UNLABELLED) | (unlabelled == 'all'))
  if count is None:
    return admitted
  rows = np.flatnonzero(admitted)
  require(
    count <= len(rows),
    f'`unlabelled`={"all:" if unlabelled == "all" else ""}{count}: only '
    f'{len(rows)} images are there: give at most that many, or '
    f'"{unlabelled}"',
  )
  admitted = np.zeros_like(admitted)
  admitted[generator(seed, _UNLABELLED).permutation(rows)[:count]] = True
  return admitted


def draw_split(
  truth: np.ndarray,
  classes,
  *,
  per_class: int | None,
  seed: int,
  unlabelled: Pool = 'rest',
  count: int | None = None,
  among: np.ndarray | None = None,
  validation: int = 0,
) -> Split:
  """The split of one seed.

  Args:
    truth: as in `draw_labels`, and so are `classes`, `per_class` and `seed`.
    classes: see there.
    per_class: see there.
    seed: see there.
    unlabelled: as in `admit`, and so is `count`.
    count: see there.
    among: `[N]` bool, rows the unlabelled part may be drawn from; all if None.
    validation: how many rows are held out.
  """
  check_truth(truth, classes if isinstance(classes, int) else len(classes))
  known = np.flatnonzero(truth != UNLABELLED)
  require(
    0 <= validation < len(known),
    f'`validation`={validation}: give 0 to {len(known) - 1} images',
  )
  held = generator(0, _VALIDATION).permutation(known)[:validation]
  held_out = np.zeros(len(truth), bool)
  held_out[held] = True
  available = np.where(held_out, UNLABELLED, truth).astype(np.int32)
  labels = draw_labels(available, classes, per_class, seed)
  candidates = ~held_out if among is None else among & ~held_out
  admitted = admit(labels, candidates, unlabelled, count, seed)
  return Split(seed, labels, admitted, np.sort(held).astype(np.int32))


def describe(split: Split) -> dict:
  """What `split.json` says of one split."""
  rows = split.labelled
  return {
    'seed': split.seed,
    'hash': split.digest,
    'labelled': dict(
      zip(map(str, rows.tolist()), split.labels[rows].tolist(), strict=True)
    )
    if len(rows) < len(split.labels)
    else 'all',
    'unlabelled': int(split.admitted.sum()),
    'validation': split.validation.tolist(),
  }
