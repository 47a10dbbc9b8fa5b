"""Label splits: which rows are labelled, and which may be used unlabelled.

A split is a function of (true labels, labels per class, seed) alone, drawn by a
counter-based generator. The labelled rows of a smaller number per class are a
subset of those of a larger one, also where a class has fewer than asked for.
"""

import hashlib
from typing import Literal, NamedTuple

import numpy as np

from ssljax.core import UNLABELLED
from ssljax.errors import InputError, require

Pool = Literal['rest', 'all']
_RAREST = 5  # classes that `describe_labels` names
# Random streams, the second word of their key.
_VALIDATION, _LABELLED, _UNLABELLED, SUBSAMPLE, QUALITY, _TEST = range(6)
FOLDS, FEW_LABELS = 5, 200  # see `hold_out`


_NO_ROWS = np.zeros(0, np.int32)


class Split(NamedTuple):
  """The use of N training rows under one seed."""

  seed: int
  labels: np.ndarray  # [N] int32, UNLABELLED where hidden from training
  admitted: np.ndarray  # [N] bool, rows the unlabelled part is drawn from
  validation: np.ndarray  # [V] int32, held-out rows, the same for every seed
  # [T] int32, rows held out to test on, of data without test images.
  test: np.ndarray = _NO_ROWS

  @property
  def labelled(self) -> np.ndarray:
    """The rows `[L]` that have a label."""
    return np.flatnonzero(self.labels != UNLABELLED)

  @property
  def unlabelled(self) -> np.ndarray:
    """The rows `[U]` that the unlabelled part is drawn from."""
    return np.flatnonzero(self.admitted)

  @property
  def trained(self) -> np.ndarray:
    """The rows `[A]` that a batch may contain: labelled or admitted."""
    return np.flatnonzero(self.admitted | (self.labels != UNLABELLED))

  def seen(self, unlabelled_from: int = 0) -> np.ndarray:
    """Return the mask `[N]` bool of the rows that a run may look at.

    Held-out rows and those that `unlabelled` leaves out are not among them. The
    images of a source of domain adaptation all are, also those whose labels are
    hidden.

    Args:
      unlabelled_from: as in `Dataset`.
    """
    seen = self.admitted | (self.labels != UNLABELLED)
    seen[:unlabelled_from] = True
    seen[self.validation] = False
    seen[self.test] = False
    return seen

  def grown(self, labels: np.ndarray) -> 'Split':
    """Return the split after labels were acquired.

    If the unlabelled part excludes the labelled rows, it excludes the new ones
    too.

    Args:
      labels: `[N]` int32, all labels known by now.
    """
    excludes = not self.admitted[self.labelled].any()
    known = excludes & (labels != UNLABELLED)
    return self._replace(labels=labels, admitted=self.admitted & ~known)

  @property
  def digest(self) -> str:
    """A hash of all fields."""
    content = hashlib.sha256(str(self.seed).encode())
    for part in (self.labels, self.admitted, self.validation):
      content.update(np.ascontiguousarray(part).tobytes())
    if len(self.test):
      content.update(np.ascontiguousarray(self.test).tobytes())
    return content.hexdigest()


def generator(*words: int) -> np.random.Generator:
  """Return a random generator that is a function of up to four words."""
  key = np.zeros(4, np.uint64)
  key[: len(words)] = words
  # The first two words are the key, the others the high half of the counter.
  counter = np.array([0, 0, key[2], key[3]], np.uint64)
  return np.random.Generator(np.random.Philox(counter=counter, key=key[:2]))


def check_truth(truth: np.ndarray, classes: int) -> None:
  """Refuse an empty data set and labels outside the classes.

  Args:
    truth: `[N]` int32, the true labels.
    classes: C.
  """
  require(
    len(truth) > 0,
    '`dataset`: the training set is empty; give one with images',
  )
  wrong = np.flatnonzero((truth < UNLABELLED) | (truth >= classes))
  if wrong.size:
    raise InputError(
      f'`dataset`: row {wrong[0]} has label {truth[wrong[0]]}, outside the '
      f'{classes} classes; correct the data set'
    )


def draw_labels(
  truth,
  classes,
  per_class: int | None,
  seed: int,
  *,
  at_most: bool = False,
  held_out: int = 0,
) -> np.ndarray:
  """Draw a class-balanced label table.

  Args:
    truth: `[N]` int32, UNLABELLED for rows that must not be drawn.
    classes: C, or the names of the C classes, for error messages.
    per_class: labelled rows per class; None labels every row.
    seed: of the split.
    at_most: label all rows of a class that has fewer than `per_class`.
    held_out: the number of labelled rows that `truth` hides, for messages.

  Returns:
    `[N]` int32, UNLABELLED except for `per_class` rows of each class.

  Raises:
    InputError: a class has too few labelled rows, or none.
  """
  names = range(classes) if isinstance(classes, int) else classes
  counts = np.bincount(truth[truth != UNLABELLED], minlength=len(names))
  asked = f'`labels`={_asked(per_class, at_most)}'
  _refuse_few(asked, names, counts, per_class, at_most, held_out)
  if per_class is None:
    return truth.copy()
  labels = np.full(len(truth), UNLABELLED, np.int32)
  for label in range(len(names)):
    rows = np.flatnonzero(truth == label)
    chosen = generator(seed, _LABELLED, label).permutation(rows)[:per_class]
    labels[chosen] = label
  return labels


def _asked(per_class: int | None, at_most: bool) -> str:
  """Return the value of `labels`."""
  if per_class is None:
    return 'all'
  return f'up_to:{per_class}' if at_most else str(per_class)


def _refuse_few(
  asked: str, names, counts: np.ndarray, per_class, at_most, held_out: int
) -> None:
  """Raise `InputError` for a class that has fewer labels than asked for."""
  require(
    per_class is None or per_class > 0,
    f'{asked}: give at least 1 label per class',
  )
  rarest = int(np.argmin(counts))
  least, beside = int(counts[rarest]), ''
  if held_out:
    beside = f' beside the {held_out} labelled images that are held out'
  require(
    least > 0,
    f"{asked}: class '{names[rarest]}' has no labelled image{beside}; label at "
    'least one image of each class, or give another `train_split`',
  )
  require(
    per_class is None or at_most or least >= per_class,
    f"{asked}: class '{names[rarest]}' has {least} labelled images{beside}; "
    f'give at most {least}, `labels`=up_to:{per_class} to take fewer of rarer '
    'classes, or `labels`=all to use every label',
  )


def admit(
  labels, candidates, unlabelled: Pool, count: int | None, seed
) -> np.ndarray:
  """Return the mask of rows that the unlabelled part is drawn from.

  Args:
    labels: `[N]` label table.
    candidates: `[N]` bool, rows that may be drawn.
    unlabelled: 'rest' excludes the labelled rows, 'all' includes them.
    count: the number of rows, chosen at random; None takes all of them.
    seed: of the split.

  Returns:
    `[N]` bool.
  """
  admitted = candidates & ((labels == UNLABELLED) | (unlabelled == 'all'))
  if count is None:
    return admitted
  rows = np.flatnonzero(admitted)
  refuse_count(unlabelled, count, len(rows))
  admitted = np.zeros_like(admitted)
  admitted[generator(seed, _UNLABELLED).permutation(rows)[:count]] = True
  return admitted


def refuse_count(unlabelled: Pool, count: int, available: int) -> None:
  """Raise `InputError` for more unlabelled images than are available.

  Args:
    unlabelled: as in `admit`.
    count: as in `admit`.
    available: the number of rows to choose from.
  """
  prefix = 'all:' if unlabelled == 'all' else ''
  most = f'at most {prefix}{available}, or ' if available else ''
  require(
    count <= available,
    f'`unlabelled`={prefix}{count}: {available} images are available; give '
    f'{most}`unlabelled`={unlabelled} for all there are',
  )


def refuse_validation(validation: int, labelled: int) -> None:
  """Raise `InputError` for a number of images that cannot be held out.

  Args:
    validation: the number of images to hold out.
    labelled: the number of images that have a label.
  """
  most = f'give 0 to {labelled - 1}' if labelled > 1 else 'give 0'
  require(
    validation == 0 or 0 < validation < labelled,
    f'`validation`={validation}: {labelled} images have a label; {most}',
  )


def draw_split(
  truth: np.ndarray,
  classes,
  *,
  per_class: int | None,
  seed: int,
  at_most: bool = False,
  unlabelled: Pool = 'rest',
  count: int | None = None,
  among: np.ndarray | None = None,
  validation: int = 0,
  test_on: np.ndarray | None = None,
) -> Split:
  """Draw the split of one seed.

  Args:
    truth: `[N]` int32, as in `draw_labels`.
    classes: as in `draw_labels`.
    per_class: as in `draw_labels`.
    seed: as in `draw_labels`.
    at_most: as in `draw_labels`.
    unlabelled: as in `admit`.
    count: as in `admit`.
    among: `[N]` bool, rows the unlabelled part may be drawn from; None for all.
    validation: the number of rows held out.
    test_on: `[N]` uint64 hashes, equal for equal images, to hold out rows to
      test on, see `hold_out`; None holds out none.

  Raises:
    InputError: the data set cannot serve these arguments.

  Examples:
    >>> truth = np.array([0, 1] * 50, np.int32)
    >>> split = draw_split(truth, ('cat', 'dog'), per_class=3, seed=0)
    >>> len(split.labelled), (split.labels == UNLABELLED).sum().item()
    (6, 94)
  """
  check_truth(truth, classes if isinstance(classes, int) else len(classes))
  known = np.flatnonzero(truth != UNLABELLED)
  refuse_validation(validation, len(known))
  held = generator(0, _VALIDATION).permutation(known)[:validation]
  held_out = np.zeros(len(truth), bool)
  held_out[held] = True
  tested = _NO_ROWS
  if test_on is not None:
    rest = np.where(held_out, UNLABELLED, truth)
    tested = hold_out(rest, test_on, seed)
    # Copies of test images are not trained on, either.
    held_out |= np.isin(test_on, test_on[tested])
  available = np.where(held_out, UNLABELLED, truth).astype(np.int32)
  labels = draw_labels(
    available,
    classes,
    per_class,
    seed,
    at_most=at_most,
    held_out=validation + len(tested),
  )
  candidates = ~held_out if among is None else among & ~held_out
  admitted = admit(labels, candidates, unlabelled, count, seed)
  held = np.sort(held).astype(np.int32)
  return Split(seed, labels, admitted, held, tested)


def hold_out(labels: np.ndarray, digests: np.ndarray, seed: int) -> np.ndarray:
  """Choose labelled rows to test on.

  Of 200 labels or more a fifth of each class is chosen, the same for every
  seed. Of fewer, seed k tests on fold k mod 5, so that five seeds together test
  on nearly every labelled image. All folds have equally many rows of a class. A
  class with one image is only trained on.

  Args:
    labels: `[N]` int32, UNLABELLED where unknown.
    digests: `[N]` uint64, equal for equal images, of which one is chosen.
    seed: chooses the fold.

  Returns:
    Sorted rows `[T]` int32.
  """
  known = np.flatnonzero(labels != UNLABELLED)
  fold = seed % FOLDS if len(known) < FEW_LABELS else 0
  chosen = []
  for label in np.unique(labels[known]):
    rows = known[labels[known] == label]
    rows = rows[np.sort(np.unique(digests[rows], return_index=True)[1])]
    if len(rows) > 1:
      order = generator(0, _TEST, int(label)).permutation(rows)
      size = max(1, len(order) // FOLDS)
      fold_rows = range(fold * size, (fold + 1) * size)
      chosen.append(np.take(order, fold_rows, mode='wrap'))
  return np.sort(np.concatenate([*chosen, _NO_ROWS])).astype(np.int32)


def describe_labels(split: Split, classes) -> str:
  """Return how many labels of each class a split has, in a few words.

  Args:
    split: of any seed; the numbers are the same for all.
    classes: names `[C]`.
  """
  known = split.labels[split.labelled]
  counts = np.bincount(known, minlength=len(classes))
  most = np.max(counts)
  rarer = [i for i in np.argsort(counts, kind='stable') if counts[i] < most]
  if not rarer:
    return f'{most} of each class'
  named = [f'{classes[i]} ({counts[i]})' for i in rarer[:_RAREST]]
  more = len(rarer) - len(named)
  return (
    f'up to {most} of each class, fewer of {", ".join(named)}'
    f'{f" and {more} more classes" if more else ""}'
  )


def describe(split: Split) -> dict:
  """Return the entry of one split in `split.json`."""
  rows = split.labelled
  found = {
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
  return found | ({'test': split.test.tolist()} if len(split.test) else {})
