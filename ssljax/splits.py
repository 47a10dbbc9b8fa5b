"""Which rows are labelled, and which a run may look at without a label.

Drawn once, by a counter-based generator, as a function of (truth, per class,
seed) alone. The first k labelled rows of a class are those of every larger k.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from ssljax.core import UNLABELLED, require

# What a random stream is for: the second word of its key.
_VALIDATION, _LABELLED, _UNLABELLED = range(3)


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
  require(len(truth) > 0, '--dataset: the training set is empty')
  strange = np.flatnonzero((truth < UNLABELLED) | (truth >= classes))
  require(
    not len(strange),
    f'--dataset: row {strange[0] if len(strange) else 0} has label '
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
  require(need > 0, f'--labels={per_class}: give at least 1 label per class')
  require(
    counts[least] >= need,
    f'--labels={"all" if per_class is None else per_class}: class '
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


def admit(labels, held_out, unlabelled: str | int, seed) -> np.ndarray:
  """Rows `[N]` bool that the unlabelled part of a batch is drawn from.

  Args:
    labels: `[N]` label table.
    held_out: `[N]` bool, rows of the validation set.
    unlabelled: 'rest' excludes the labelled rows, 'all' includes them, a
      number takes that many at random from the rest.
    seed: of this split.
  """
  if unlabelled == 'all':
    return ~held_out
  rest = (labels == UNLABELLED) & ~held_out
  if unlabelled == 'rest':
    return rest
  rows = np.flatnonzero(rest)
  require(
    unlabelled <= len(rows),
    f'--unlabelled={unlabelled}: only {len(rows)} images are left unlabelled:'
    ' give at most that many, or "rest"',
  )
  admitted = np.zeros_like(rest)
  admitted[generator(seed, _UNLABELLED).permutation(rows)[:unlabelled]] = True
  return admitted


def draw_split(
  truth: np.ndarray,
  classes,
  *,
  per_class: int | None,
  seed: int,
  unlabelled: str | int = 'rest',
  validation: int = 0,
) -> Split:
  """The split of one seed; see `draw_labels` and `admit` for the arguments."""
  check_truth(truth, classes if isinstance(classes, int) else len(classes))
  known = np.flatnonzero(truth != UNLABELLED)
  require(
    0 <= validation < len(known),
    f'--validation={validation}: give 0 to {len(known) - 1} images',
  )
  held = generator(0, _VALIDATION).permutation(known)[:validation]
  held_out = np.zeros(len(truth), bool)
  held_out[held] = True
  available = np.where(held_out, UNLABELLED, truth).astype(np.int32)
  labels = draw_labels(available, classes, per_class, seed)
  admitted = admit(labels, held_out, unlabelled, seed)
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
