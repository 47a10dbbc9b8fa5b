"""Content of the page: the next images, the progress, lists to review.

The error is estimated from images that were drawn at random and shown without a
suggestion: the prediction of the model at that time, which had not seen the
label, is compared with the answer.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
import itertools
import json
import pathlib
import random
import time
from typing import Any

from ssljax import intervals
from ssljax.active.page import images as images_lib
from ssljax.active.page import store as store_lib
from ssljax.active.page import suggestions as suggestions_lib
from ssljax.errors import require

STATUS = 'learner.json'
QUEUES = 'acquisition', 'uncertainty', 'class', 'random', 'others', 'unsure'
MAX_ITEMS = 200  # of a request
_BLOCK = 20  # random answers of a point of the curve
_WINDOW = 100  # random answers of the estimate
_FLAT = 0.02  # change of the lower bound that counts as none
_RESERVED = 60.0  # seconds for which an image is shown to one annotator
_TRIES = 200  # draws of a random file before all files are listed


class Service:
  """The state of the page; every method may be called from any thread."""

  def __init__(
    self,
    store: store_lib.Store,
    images: images_lib.Images,
    *,
    random_share: float = 0.2,
    seed: int | None = None,
  ):
    """Join the answers, the images and the predictions.

    Args:
      store: of the answers.
      images: of the folder.
      random_share: share of random images in the other queues.
      seed: of the random images; None for an unpredictable one.
    """
    self.store, self.images = store, images
    self._share, self._random = random_share, random.Random(seed)
    self._suggestions = suggestions_lib.Suggestions(store.folder)
    self._mutex = store.mutex
    self._kept: tuple[int, list[tuple[int, bool]], list[str]] = -1, [], []
    self._reserved: dict[str, tuple[str, float]] = {}
    self.learner_problem = ''

  # The next images.

  def next(
    self,
    queue: str,
    count: int,
    annotator: str,
    exclude: Collection[int] = (),
    of: str = '',
  ) -> list[dict[str, Any]]:
    """Return the images to label next.

    Args:
      queue: one of `QUEUES`.
      count: number of images, at most `MAX_ITEMS`.
      annotator: name.
      exclude: numbers of files that the page has already.
      of: name of the class, for the queue 'class'.

    Raises:
      InputError: there is no such queue.
    """
    require(
      queue in QUEUES, f'`queue`={queue:.50}: give one of {", ".join(QUEUES)}'
    )
    with self._mutex:
      self._suggestions.refresh()
      self._forget_reserved()
      taken = set(exclude)
      found: list[Any] = []
      ordered = self._ordered(queue, annotator, of)
      at_random = self._at_random()
      is_mixed = queue in ('acquisition', 'uncertainty', 'class')
      while len(found) < min(count, MAX_ITEMS):
        drawn = queue == 'random' or (
          is_mixed and self._random.random() < self._share
        )
        item = (
          self._first(at_random, 'random', annotator, taken)
          if drawn
          else (self._first(ordered, queue, annotator, taken))
        )
        if item is None and is_mixed:  # the predictions are used up
          item = self._first(at_random, 'random', annotator, taken)
        if item is None:
          break
        taken.add(item['id'])
        found.append(item)
      return found

  def _first(
    self, paths: Iterator[str], queue: str, annotator: str, taken: set[int]
  ) -> dict[str, Any] | None:
    """Return the first file that may be shown, and reserve it."""
    for path in paths:
      if queue not in ('others', 'unsure') and not self._is_free(
        path, annotator
      ):
        continue
      entry = self.images.index.find(path)
      if entry is None or entry.id in taken:
        continue
      self._reserved[path] = annotator, time.monotonic()
      return self._item(entry, queue)
    return None

  def _is_free(self, path: str, annotator: str) -> bool:
    """Return True for a file without answers that nobody else is shown."""
    if path in self.store.state.resolved:
      return False
    holder, _ = self._reserved.get(path, (annotator, 0))
    return holder == annotator

  def _forget_reserved(self) -> None:
    limit = time.monotonic() - _RESERVED
    self._reserved = {k: v for k, v in self._reserved.items() if v[1] > limit}

  def _item(
    self, entry: images_lib.Entry, queue: str, **more
  ) -> dict[str, Any]:
    """Return a file as the page gets it."""
    label, confidence = self._suggestions.of(entry.path)
    label = self._current(label)
    # Before all files are listed a random one is not drawn from all.
    is_blind = queue == 'random' and self.images.complete
    return {
      'id': entry.id,
      'file': entry.path,
      'stamp': entry.stamp,
      'shown': {
        'queue': queue if is_blind or queue != 'random' else 'start',
        'suggestion': label,
        'confidence': None if label is None else round(confidence or 0, 4),
        'round': self._suggestions.meta.get('round'),
        'blind': is_blind,
      },
    } | more

  def _current(self, label: str | None) -> str | None:
    return None if label is None else self.store.state.current_name(label)

  def _ordered(self, queue: str, annotator: str, of: str) -> Iterator[str]:
    """Yield the paths of a queue."""
    state, found = self.store.state, self._suggestions
    if queue == 'acquisition':
      return found.by_score()
    if queue == 'uncertainty':
      return found.by_confidence()
    if queue == 'class':
      return found.of_class(self._published(of), 'asc')
    if queue == 'others':
      return (
        path
        for path in list(state.resolved)
        if annotator not in state.latest(path)
      )
    if queue == 'unsure':
      return (
        path
        for path, r in list(state.resolved.items())
        if r.label is None and not r.is_conflict
      )
    return iter(())

  def _published(self, name: str) -> str:
    """Return the name that a class has in the predictions."""
    for old in self._suggestions.classes:
      if self._current(old) == name:
        return old
    return name

  def _at_random(self) -> Iterator[str]:
    """Yield files drawn uniformly, with repetitions; then all, in any order."""
    index = self.images.index
    largest = index.largest()
    for _ in range(_TRIES if largest else 0):
      entry = index.entry(self._random.randint(1, largest))
      if entry is not None:
        yield entry.path
    # Nearly all files have an answer: a uniform sample of the others.
    last, seen = 0, 0
    free: list[str] = []
    while entries := index.after(last, 1000):
      last = entries[-1].id
      for entry in entries:
        if entry.path in self.store.state.resolved:
          continue
        seen += 1
        place = self._random.randrange(seen)
        if len(free) < MAX_ITEMS:
          free.append(entry.path)
        elif place < MAX_ITEMS:
          free[place] = entry.path
    self._random.shuffle(free)
    yield from free

  def grid(
    self, of: str, order: str, count: int, annotator: str, skip: int = 0
  ) -> list[dict[str, Any]]:
    """Return files of a predicted class, to be confirmed together.

    Args:
      of: name of the class; all classes if it is empty.
      order: 'asc' or 'desc', of the confidence.
      count: number of files.
      annotator: name.
      skip: files to leave out at the start.
    """
    with self._mutex:
      self._suggestions.refresh()
      self._forget_reserved()
      name = self._published(of)
      paths = (
        self._suggestions.of_class(name, order)
        if of
        else self._suggestions.by_class()
      )
      free = (path for path in paths if self._is_free(path, annotator))
      chosen = itertools.islice(free, skip, skip + min(count, MAX_ITEMS))
      found = (self.images.index.find(path) for path in chosen)
      return [self._item(entry, 'grid') for entry in found if entry]

  # Answers.

  def answer(self, annotator: str, answers: Sequence, batch: str) -> int:
    """Save answers whose files are given by number; see `Store.answer`."""
    require(
      isinstance(answers, list) and 0 < len(answers) <= MAX_ITEMS,
      f'`answers`: give a list of 1 to {MAX_ITEMS}',
    )
    checked = []
    for given in answers:
      require(isinstance(given, Mapping), '`answers`: give objects')
      entry = self._entry(given)
      checked.append({**given, 'file': entry.path, 'stamp': entry.stamp})
    return self.store.answer(annotator, checked, batch)

  def _entry(self, given: Mapping[str, Any]) -> images_lib.Entry:
    """Return the file of an answer, which may be gone by now."""
    number, path = given.get('id'), given.get('file')
    # The answer of a page that was open while the index was made again has
    # another number, but the same path.
    entry = None
    if isinstance(path, str):
      entry = self.images.index.find(path)
    elif isinstance(number, int) and 0 < number < 2**63:
      entry = self.images.index.entry(number)
    require(
      entry is not None,
      f'`file`={path!r:.200}: is not in the folder any more',
    )
    assert entry is not None
    stamp = given.get('stamp')
    require(
      stamp in (None, entry.stamp),
      f'`file`={path!r:.200}: has changed since it was shown; look at it again',
    )
    return entry

  def undo(self, annotator: str) -> list[dict[str, Any]]:
    """Take back the last answers of an annotator; return their files."""
    with self._mutex:
      taken = self.store.undo(annotator)
      found = []
      for answer in taken:
        entry = self.images.index.find(answer.file)
        if entry is not None:
          item = self._item(entry, answer.shown.get('queue', 'undo'))
          # A repeated answer is no longer one without knowledge.
          item['shown'] |= {'queue': 'undo', 'blind': False}
          found.append(item | {'was': answer.label or answer.answer})
      return found

  # Progress.

  def progress(self) -> dict[str, Any]:
    """Return the state of the page."""
    with self._mutex:
      self._suggestions.refresh()
      state, meta = self.store.state, self._suggestions.meta
      points = self._curve()
      return {
        'classes': [
          {
            'name': name,
            'count': state.counts.get(name, 0),
            'guideline': state.guidelines.get(name, ''),
          }
          for name in state.classes
        ],
        'store': state.id,
        'images': self.images.index.count(),
        'complete': self.images.complete,
        'links': self.images.links,
        'problem': self.images.problem,
        'labelled': state.labelled,
        'answered': len(state.resolved),
        'conflicts': len(state.conflicts),
        'annotators': self._of_version()[1],
        'round': meta.get('round'),
        'method': meta.get('method', ''),
        'trained_on': meta.get('labels', 0),
        'curve': points,
        'error': self._estimate(),
        'hint': stopping_hint(points),
        'learner': self._learner(),
      }

  def _of_version(self) -> tuple[list[tuple[int, bool]], list[str]]:
    """Return the random answers and the annotators, computed once."""
    if self._kept[0] != self.store.version:
      names = sorted({a.annotator for a in self.store.state.answers})
      self._kept = self.store.version, self._honest(), names
    return self._kept[1:]

  def _honest(self) -> list[tuple[int, bool]]:
    """Return (labels, wrong) of the random answers, in order."""
    found, seen = [], set()
    for a in self.store.state.answers:
      if a.file in seen:
        continue
      seen.add(a.file)
      if a.undone or a.label is None or not a.shown.get('blind'):
        continue
      if a.shown.get('queue') == 'random' and a.shown.get('suggestion'):
        wrong = a.shown['suggestion'] != a.label
        found.append((a.labelled_before, wrong))
    return found

  def _estimate(self) -> dict[str, Any] | None:
    """Return the error of the last random answers, with its interval."""
    last = self._of_version()[0][-_WINDOW:]
    if not last:
      return None
    wrong = sum(w for _, w in last)
    low, high = intervals.wilson(wrong, len(last))
    return {
      'error': wrong / len(last),
      'low': low,
      'high': high,
      'images': len(last),
    }

  def _curve(self) -> list[dict[str, Any]]:
    """Return the error of each block of random answers."""
    answers, points = self._of_version()[0], []
    for start in range(0, len(answers) - _BLOCK + 1, _BLOCK):
      block = answers[start : start + _BLOCK]
      wrong = sum(w for _, w in block)
      low, high = intervals.wilson(wrong, _BLOCK)
      labels = sum(n for n, _ in block) // _BLOCK
      points.append(
        {'labels': labels, 'error': wrong / _BLOCK, 'low': low, 'high': high}
      )
    return points

  def _learner(self) -> dict[str, Any]:
    """Return what the learner says of itself."""
    try:
      found = json.loads((self.store.folder / STATUS).read_text())
    except (OSError, ValueError):
      found = {}
    found = found if isinstance(found, dict) else {}
    if self.learner_problem:
      return {'state': 'failed', 'message': self.learner_problem}
    return found

  # Lists to review.

  def points(self) -> list[list[Any]]:
    """Return the files on the map.

    Each is [number, file, x, y, prediction, label, stamp].
    """
    with self._mutex:
      self._suggestions.refresh()
      resolved, found = self.store.state.resolved, []
      for path, x, y, label in self._suggestions.points():
        entry = self.images.index.find(path)
        given = resolved.get(path)
        if entry is not None:
          own = given.label if given else None
          row = [entry.id, path, round(x, 4), round(y, 4)]
          found.append([*row, self._current(label), own, entry.stamp])
      return found

  def disagreements(self, count: int = 100) -> list[dict[str, Any]]:
    """Return labelled files that models without their label predict otherwise.

    The most confident predictions come first.
    """
    with self._mutex:
      self._suggestions.refresh()
      state, found = self.store.state, []
      for path, label, confidence in self._suggestions.unseen():
        given, now = state.resolved.get(path), self._current(label)
        if given is None or given.is_final or given.label is None:
          continue
        if now in (None, given.label):
          continue
        entry = self.images.index.find(path)
        if entry is None:
          continue
        item = self._item(entry, 'disagreements', given=given.label)
        item['shown'] |= {'suggestion': now, 'confidence': round(confidence, 4)}
        found.append(item)
        if len(found) >= count:
          break
      return found

  def conflicts(self, count: int = 100) -> dict[str, Any]:
    """Return the files with several labels, and the agreement."""
    with self._mutex:
      state, found = self.store.state, []
      for path in itertools.islice(sorted(state.conflicts), count):
        entry = self.images.index.find(path)
        if entry is not None:
          given = {k: a.label for k, a in state.latest(path).items() if a.label}
          found.append(self._item(entry, 'conflicts', answers=given))
      return {'files': found, 'agreement': state.agreement()}

  def changed(self, count: int = 100) -> list[str]:
    """Return labelled files that have changed, or are gone."""
    with self._mutex:
      changed = (
        path
        for path, r in self.store.state.resolved.items()
        if r.label is not None and r.stamp and not self._is_same(path, r.stamp)
      )
      return list(itertools.islice(changed, count))

  def _is_same(self, path: str, stamp: str) -> bool:
    entry = self.images.index.find(path)
    return entry is not None and entry.stamp == stamp


def stopping_hint(points: Iterable[Mapping[str, float]]) -> str:
  """Return advice to stop, once more labels have not lowered the error."""
  last = [point['low'] for point in points][-3:]
  if len(last) < 3 or max(last) - min(last) > _FLAT:
    return ''
  return (
    'The lower bound of the error has not moved over the last '
    f'{3 * _BLOCK} random images: more labels may not help much.'
  )


def status(folder: pathlib.Path) -> pathlib.Path:
  """Return the path of the learner's status."""
  return folder / STATUS
