"""The process that learns from the answers and publishes predictions.

It reads the store, trains from the weights of the last round, predicts all
images in chunks, scores them by an acquisition function, and publishes one
file. It talks to the server by files alone, so either may end at any time; it
ends when the server does.

From 50 labels on, each round leaves out a tenth of them, another one each time:
their predictions come from a model that has not seen the label, and tell labels
that are probably wrong.

Memory does not depend on the number of images: pixels are on disk, a round
trains on at most `POOL` images, and the map and the acquisition functions that
compare images see a sample of `SAMPLE`.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
import hashlib
import json
import os
import pathlib
import shutil
import sys
import threading
import time
from typing import Any, NamedTuple
import warnings

import numpy as np

from ssljax import files
from ssljax.active.page import images as images_lib
from ssljax.active.page import rows as rows_lib
from ssljax.active.page import service, store, suggestions
from ssljax.core import UNLABELLED
from ssljax.errors import InputError, require

POOL = 20_000  # images of a training
SAMPLE = 5_000  # images that are compared with each other
SCORED = 500  # images that such a comparison chooses
MAP = 3_000
_CHUNK = 512  # images that are read and predicted at once
_HELD_FROM, _PARTS = 50, 10
_COMPILED = 2**29  # bytes of compiled programs that are kept at a start
_DECODED_FIRST = 20_000  # images that the first round waits for
_FLAT = 1024  # values of an image before the first round
BY_SCORE = 'entropy', 'margin', 'least_confidence'  # of probabilities
BY_COMPARISON = 'typiclust', 'density', 'k_centre'
ACQUISITIONS = (*BY_SCORE, 'bald', *BY_COMPARISON, 'random')


class Settings(NamedTuple):
  """Settings of the learner's process."""

  store: str
  images: str
  acquire: str = 'entropy'
  method: str | None = None
  network: str | None = None
  steps: int = 200
  every: int = 10  # new answers that begin a round
  idle: float = 15.0  # seconds without answers that begin one
  image_size: int | None = None
  run: str | None = None  # whose weights begin
  features: str | None = None  # file of features to learn from
  seed: int = 0


class Learner:
  """Rounds of training and prediction.

  States, which `say` writes for the page:

    waiting     for images, then, between rounds, for enough new answers
    starting    until the first order or the predictions of a run are published
    training    a round has begun; `round` counts it
    predicting  its model predicts and scores all images, and publishes

  A process that begins again takes up model and round from the folder.
  """

  def __init__(self, settings: Settings):
    """Open the index and the store."""
    self.settings = settings
    self.folder = pathlib.Path(settings.store)
    self.root = pathlib.Path(settings.images)
    self.index = images_lib.Index(self.folder / images_lib.INDEX)
    self.round, self.model = 0, None
    self.unseen: dict[str, Any] = {}
    self._log: tuple[int, int] | None = None
    self._next = self._changed = 0.0  # times: to read again, of an answer
    self._given: dict[str, str] = {}  # labels
    self._done: dict[str, str] | None = None  # those of the last round
    self._said = ''
    self._state = store.State()
    self._rng = np.random.default_rng(settings.seed)
    self.rows: rows_lib.Pixels | rows_lib.Features | None = None

  # Progress.

  def say(self, state: str, **more: Any) -> None:
    """Write the status that the page shows."""
    said = {'state': state, 'round': self.round, 'time': time.time()} | more
    try:
      files.write_atomically(service.status(self.folder), json.dumps(said))
    except OSError:
      pass  # The page shows an older status.

  def run(self) -> None:
    """Learn until the process is ended."""
    self._wait_for_images()
    self._begin()
    while True:
      if self._is_due():
        self.learn()
      time.sleep(0.3)

  def _wait_for_images(self) -> None:
    self.say('waiting', message='waiting for images')
    while self.index.count() < 2:
      time.sleep(0.3)
    time.sleep(0.5)  # more of them are listed

  def _begin(self) -> None:
    """Publish predictions of the run, or an order to begin with."""
    self.say('starting', message='loading the library')
    from ssljax.distributed import placement

    placement.configure_cpu()
    _keep_compiled(self.folder / 'compiled')
    features = self.settings.features
    known = None if features is None else rows_lib.Features(features)
    self.model = self._first_model(None if known is None else known.shape)
    self.rows = known or self._pixels()
    earlier = suggestions.Suggestions(self.folder)
    earlier.refresh()
    self.round = int(earlier.meta.get('round') or 0)
    self.unseen = {path: (c, p) for path, c, p in earlier.unseen()}
    self._read_store()
    if earlier.meta.get('round'):
      if len(self._given) == earlier.meta.get('labels'):
        self._done = self._given
    elif self.model is not None:
      self.publish(self.model, list(self.model.classes), self._labels())
    else:
      self._publish_start()
      return
    self.say('waiting', message='waiting for answers')

  def _pixels(self) -> rows_lib.Pixels:
    """Return the decoded images."""
    if self.model is not None:
      shape = self.model.shape
    else:
      first = self.index.after(0, 100)
      shape = rows_lib.shape_of(self.root, first, self.settings.image_size)
    return rows_lib.Pixels(self.folder, self.root, shape)

  def _first_model(self, features: tuple[int, ...] | None):
    """Return the model of the last round, or of the run; None without one.

    Args:
      features: shape of a row of features; None for images.
    """
    from ssljax import api

    def suits(shape: tuple[int, ...]) -> bool:
      is_square = len(shape) == 3 and shape[0] == shape[1]
      return is_square if features is None else shape == features

    if (self.folder / 'model').is_dir():
      try:
        model = api.load(self.folder / 'model')
        if suits(model.shape):  # else it saw pixels, and these are features
          return model
      except InputError:  # of another version, or cut by a kill
        pass
    if self.settings.run is None:
      return None
    model = api.load(self.settings.run)
    wanted = 'square images' if features is None else f'features {features}'
    require(
      suits(model.shape),
      f'`run`={self.settings.run}: was trained on rows of shape {model.shape}, '
      f'not on {wanted}: give another run, or none',
    )
    return model

  def _read_store(self) -> None:
    """Read the answers, if there are new ones."""
    began = time.monotonic()
    if began < self._next:
      return
    try:
      status = os.stat(self.folder / store.NAME)
    except OSError:
      return
    identity = status.st_ino, status.st_size
    if identity != self._log:
      self._log = identity
      self._state = store.read(self.folder)
      self._given, self._changed = self._state.labels(), time.monotonic()
      # A long file is not read all the time.
      self._next = self._changed + 20 * (self._changed - began)

  def _labels(self) -> dict[str, str]:
    """Return the labels of files that have not changed since."""
    found = {}
    for path, resolved in self._state.resolved.items():
      if resolved.label is not None:
        entry = self.index.find(path)
        if entry and resolved.stamp in ('', entry.stamp):
          found[path] = resolved.label
    return found

  def _is_due(self) -> bool:
    """Return True once a round has something new to learn."""
    self._read_store()
    given, done = self._given, self._done or {}
    if given == self._done or len(set(given.values())) < 2:
      return False
    missing = self._missing()
    if missing:
      named = ', '.join(missing[:5])
      self._say_once(f'waiting for a label of each class of the run: {named}')
      return False
    new = sum(done.get(path) != label for path, label in given.items())
    quiet = time.monotonic() - self._changed > self.settings.idle
    return new >= self.settings.every or quiet

  def _missing(self) -> list[str]:
    """Return the classes of the run that have no label yet.

    A round without them would forget them.
    """
    if self.settings.run is None or self.model is None:
      return []
    labelled = set(self._given.values())
    names = map(self._state.current_name, self.model.classes)
    return [name for name in names if name and name not in labelled]

  def _say_once(self, message: str) -> None:
    if message != self._said:
      self._said = message
      self.say('waiting', message=message)

  # A round.

  def learn(self) -> None:
    """Train on the labels so far, and publish predictions."""
    began, known = time.monotonic(), self._labels()
    values, paths = self._pool(known)
    # Labels of files that have no row, or cannot be decoded, teach nothing.
    labels = {path: known[path] for path in paths if path in known}
    self._done, given = self._given, set(labels.values())
    if len(given) < 2:  # the others have changed, or cannot be read
      kind = 'pixels' if self.settings.features is None else 'features'
      self._say_once(f'waiting for labels of two classes on images with {kind}')
      return
    self.round += 1
    self.say('training', labels=len(labels))
    classes = [name for name in self._state.classes if name in given]
    if self.model is not None:
      # A renamed class keeps its weights, and so does another order.
      names = map(self._state.current_name, self.model.classes)
      self.model.classes = tuple(name or '' for name in names)
      if set(self.model.classes) == given:
        classes = list(self.model.classes)
    held = self._held_out(labels)
    seen = {path: y for path, y in labels.items() if path not in held}
    number = {name: k for k, name in enumerate(classes)}
    rows = [number[seen[p]] if p in seen else UNLABELLED for p in paths]
    model = self._train(values, np.array(rows), classes)
    trained = time.monotonic() - began
    self.say('predicting', labels=len(labels), training=round(trained, 1))
    self.publish(model, classes, labels, held)
    self.model = model
    model.save(self.folder / 'model')
    seconds = time.monotonic() - began
    self.say(
      'waiting',
      labels=len(labels),
      training=round(trained, 1),
      seconds=round(seconds, 1),
      message='waiting for answers',
    )

  def _held_out(self, labels: Mapping[str, str]) -> set[str]:
    """Return the labelled files that this round does not learn from."""
    if len(labels) < _HELD_FROM:
      return set()
    left: dict[str, int] = {}
    for label in labels.values():
      left[label] = left.get(label, 0) + 1
    held = set()
    for path, label in labels.items():
      part = int(hashlib.blake2b(path.encode()).hexdigest()[:8], 16) % _PARTS
      if part == self.round % _PARTS and left[label] > 2:
        left[label] -= 1
        held.add(path)
    return held

  def _train(self, values: np.ndarray, known: np.ndarray, classes: list[str]):
    """Return the model of a round.

    Args:
      values: `[N, ...]` of the images to train on.
      known: `[N]` their classes, or `UNLABELLED`.
      classes: names.
    """
    from ssljax import api
    from ssljax.runs import build

    asked, old = self.settings, self.model
    given: dict[str, Any] = {}
    network = self._network(classes)
    if network is not None:
      given['network'] = network
    continued = old
    if old is None or (list(old.classes), old.config.network.network) != (
      classes,
      network,
    ):
      continued = None  # begins from new weights
    if continued is not None:
      continued.save(self.folder / 'model')
      given['init_from'] = str(self.folder / 'model')
    default = 'madnn' if asked.features is None else 'laplacenet'
    if asked.run is not None and old is not None:
      default = old.config.method
    # Few sizes, so that compiled programs are used again.
    count = int((known != UNLABELLED).sum())
    given['batch_labelled'] = next(
      size for size in (32, 16, 8, 4, 2, 1) if size <= count
    )
    model = api.fit(
      values,
      known,
      method=asked.method or default,
      seed=asked.seed + self.round,
      classes=classes,
      steps=asked.steps,
      progress=False,
      **given,
    )
    require(
      asked.acquire != 'bald' or build.dropout_rate(model.config) > 0,
      f'`acquire`=bald: `network`={model.config.network.network} has no '
      'dropout, which it needs: give another of them',
    )
    if continued and _computes_as(model.config, continued.config):
      model.share_compiled(continued)
    return model

  def _network(self, classes: Sequence[str]) -> str | None:
    """Return the network of a round; None for the usual one.

    It is the one that was asked for, else that of the last round.
    """
    from ssljax.runs import build

    asked, old = self.settings, self.model
    if asked.network:
      return asked.network
    needs_dropout = asked.acquire == 'bald' and asked.features is not None
    if old is not None:
      network = old.config.network.network
      if asked.run is not None:
        return network
      has_dropout = build.dropout_rate(old.config) > 0
      if list(old.classes) == list(classes) and has_dropout >= needs_dropout:
        return network
    return 'mlp' if needs_dropout else None  # the usual one has no dropout

  def _pool(self, labels: Mapping[str, str]) -> tuple[np.ndarray, list[str]]:
    """Return images to train on, and their paths: always as many."""
    assert self.rows is not None
    entries = [e for path in labels if (e := self.index.find(path))]
    largest = self.index.largest()
    size = min(POOL, max(largest, len(entries)))
    rng = np.random.default_rng(self.settings.seed)
    if largest <= POOL:
      others = (e for part in self._chunks() for e in part)
    else:
      drawn = rng.choice(largest, size, replace=False) + 1
      others = (e for n in drawn if (e := self.index.entry(int(n))))
    taken = {e.path for e in entries}
    for entry in others:
      if len(entries) >= size:
        break
      if entry.path not in taken:
        entries.append(entry)
    values, good = self.rows.read(entries)
    return values[good], [
      e.path for e, ok in zip(entries, good, strict=True) if ok
    ]

  def _chunks(self) -> Iterator[list[images_lib.Entry]]:
    """Yield all files of the index in parts."""
    last = 0
    while entries := self.index.after(last, _CHUNK):
      last = entries[-1].id
      yield entries

  # Predictions.

  def publish(
    self,
    model,
    classes: Sequence[str],
    labels: Mapping[str, str],
    held: Set[str] = frozenset(),
  ) -> None:
    """Predict all images, score them and publish the result."""
    sample = _Sample(SAMPLE, self._rng)
    writer = suggestions.Writer(self.folder)
    try:
      for paths, p, embedding, scores in self._predicted(model):
        best, confidence = p.argmax(axis=-1), p.max(axis=-1)
        writer.add(zip(paths, best.tolist(), confidence.tolist(), strict=True))
        if self.settings.acquire not in BY_COMPARISON:
          free = [
            (path, each)
            for path, each in zip(paths, scores.tolist(), strict=True)
            if path not in labels
          ]
          writer.score(free)
        sample.add(paths, p, embedding)
        for path, label, share in zip(paths, best, confidence, strict=True):
          if path in held:
            self.unseen[path] = classes[label], float(share)
      if sample.paths:
        self._compare(writer, sample, labels)
        self._place(writer, sample.paths, sample.embedding)
      kept = [(p, *v) for p, v in self.unseen.items() if p in labels]
      writer.unseen(kept)
      writer.publish(
        round=self.round,
        classes=list(classes),
        labels=len(labels),
        method=model.config.method,
      )
    except BaseException:
      writer.abandon()
      raise

  def _predicted(self, model) -> Iterator['_Part']:
    """Yield the predictions of all images."""
    from ssljax.analysis import calibration

    assert self.rows is not None
    for entries in self._chunks():
      values, good = self.rows.read(entries)
      if good.any():
        values = values[good]
        logits, embedding = model.outputs(values)
        paths = [e.path for e, ok in zip(entries, good, strict=True) if ok]
        p = calibration.softmax(logits)
        yield _Part(paths, p, embedding, self._scores(model, values, p))

  def _scores(self, model, values: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return the scores `[M]` of images with probabilities `[M, C]`."""
    name = self.settings.acquire
    if name == 'random':
      return self._rng.random(len(p))
    if name == 'bald':
      from ssljax.active import acquisition

      return np.asarray(acquisition.bald(model.sampled(values)))
    return _scores(name, p) if name in BY_SCORE else np.zeros(len(p))

  def _compare(self, writer, sample: '_Sample', labels) -> None:
    """Score the images that a comparison of embeddings chooses."""
    if self.settings.acquire not in BY_COMPARISON:
      return
    labelled = np.array([path in labels for path in sample.paths])
    rows = _compared(
      self.settings.acquire, sample, labelled, SCORED, self.settings.seed
    )
    writer.score((sample.paths[r], -float(k)) for k, r in enumerate(rows))

  def _place(self, writer, paths: Sequence[str], values: np.ndarray) -> None:
    """Place a sample on the map by its two principal components."""
    paths, values = paths[:MAP], values[:MAP]
    if len(paths):
      xy = principal(values.reshape(len(values), -1), 2)
      least, most = xy.min(axis=0), xy.max(axis=0)
      xy = (xy - least) / np.maximum(most - least, 1e-12)
      writer.place(
        (path, float(x), float(y))
        for path, (x, y) in zip(paths, xy, strict=True)
      )

  def _publish_start(self) -> None:
    """Publish an order to begin with: typical images of large groups."""
    from ssljax.active import clusters

    assert self.rows is not None
    self.say('starting', message='choosing the first images')
    sample, writer = _Sample(SAMPLE, self._rng), suggestions.Writer(self.folder)
    try:
      seen = 0
      for entries in self._chunks():
        values, good = self.rows.read(entries)
        flat = _small(values[good])
        paths = [e.path for e, ok in zip(entries, good, strict=True) if ok]
        writer.add((path, None, None) for path in paths)
        sample.add(paths, np.zeros((len(paths), 1)), flat)
        seen += len(entries)
        if seen >= _DECODED_FIRST:
          break
      if len(sample.paths) > 1:
        embedding = principal(sample.embedding, 32)
        labels = self._labels()
        askable = np.array([path not in labels for path in sample.paths])
        size = min(100, int(askable.sum()))
        if size and self.settings.acquire != 'random':
          rows = clusters.typiclust(
            embedding, ~askable, askable, size, self.settings.seed
          )
          writer.score((sample.paths[r], -float(k)) for k, r in enumerate(rows))
        self._place(writer, sample.paths, embedding)
      writer.publish(round=0, classes=[], labels=0, method='')
    except BaseException:
      writer.abandon()
      raise
    self.say('waiting', message='waiting for labels of two classes')


def _computes_as(config, other) -> bool:
  """Return True if models of two configs share compiled functions."""
  return (
    config.network == other.network
    and config.augmentation.preprocess == other.augmentation.preprocess
  )


class _Part(NamedTuple):
  """Predictions of M images."""

  paths: list[str]
  p: np.ndarray  # [M, C] probabilities
  embedding: np.ndarray  # [M, D]
  scores: np.ndarray  # [M] of the acquisition function; high ones come first


class _Sample:
  """A uniform sample of all rows that are added, of at most so many."""

  def __init__(self, size: int, rng: np.random.Generator):
    self._size, self._rng, self._seen = size, rng, 0
    self.paths: list[str] = []
    self._p: list[np.ndarray] = []
    self._embedding: list[np.ndarray] = []

  @property
  def p(self) -> np.ndarray:
    """Probabilities `[M, C]`."""
    return np.stack(self._p)

  @property
  def embedding(self) -> np.ndarray:
    """Embeddings `[M, D]`."""
    return np.stack(self._embedding).astype(np.float32)

  def add(self, paths, p, embedding) -> None:
    """Add rows (reservoir sampling, Vitter 1985, algorithm R)."""
    for row in zip(paths, p, embedding, strict=True):
      self._seen += 1
      if len(self.paths) < self._size:
        self.paths.append(row[0])
        self._p.append(row[1].copy())
        self._embedding.append(row[2].copy())
        continue
      place = int(self._rng.integers(self._seen))
      if place < self._size:
        self.paths[place], self._p[place] = row[0], row[1].copy()
        self._embedding[place] = row[2].copy()


def _scores(name: str, p: np.ndarray) -> np.ndarray:
  """Return the scores `[M]` of probabilities `[M, C]`."""
  from ssljax import ranking
  from ssljax.active import acquisition

  if p.shape[-1] < 2:
    return np.zeros(len(p))
  statistics = ranking.sampled(p[None])
  return np.asarray(getattr(acquisition, name)(statistics), np.float64)


def _compared(name, sample: _Sample, labelled, size: int, seed: int):
  """Return rows of a sample, those to label first at the beginning."""
  import jax

  from ssljax import ranking, registry
  from ssljax.active import clusters

  askable = ~labelled
  size = min(size, int(askable.sum()))
  if not size:
    return []
  embedding = sample.embedding
  if name == 'typiclust':
    # Clusters are as many as labels and choices: few choices are enough.
    size = min(size, 50)
    return clusters.typiclust(embedding, labelled, askable, size, seed)
  if name == 'density':
    score = _scores('entropy', sample.p)
    score = clusters.density_weighted(score, embedding, askable)
    return np.argsort(-np.where(askable, score, -np.inf), kind='stable')[:size]
  statistics = ranking.sampled(sample.p[None])
  labels = np.where(labelled, 0, UNLABELLED)
  choose = registry.ACQUISITIONS[name]
  key = jax.random.key(seed)
  return np.asarray(choose(statistics, embedding, labels, askable, size, key))


def _small(values: np.ndarray) -> np.ndarray:
  """Return images `[M, H, W, c]` as rows `[M, D]` of at most 1,024 values.

  Features `[M, D]` stay as they are.
  """
  if values.ndim == 2:
    return values
  step = 1
  while values[0:1, ::step, ::step].size > _FLAT:
    step += 1
  return values[:, ::step, ::step].reshape(len(values), -1) / np.float32(255)


def principal(values: np.ndarray, count: int) -> np.ndarray:
  """Return the first principal components `[M, count]` of rows `[M, D]`."""
  centred = np.asarray(values, np.float64) - values.mean(axis=0)
  count = min(count, *centred.shape)
  if centred.shape[1] > centred.shape[0]:  # the smaller matrix
    squares, vectors = np.linalg.eigh(centred @ centred.T)
    found = (vectors * np.sqrt(np.maximum(squares, 0)))[:, ::-1][:, :count]
  else:
    _, vectors = np.linalg.eigh(centred.T @ centred)
    found = centred @ vectors[:, ::-1][:, :count]
  return np.pad(found, ((0, 0), (0, max(0, 2 - count))))


def _keep_compiled(folder: pathlib.Path) -> None:
  """Keep compiled programs: most rounds after the first need no compiler.

  A round's initial weights are part of a small program, so the folder grows.
  """
  import jax

  size = sum(p.stat().st_size for p in folder.glob('*') if p.is_file())
  if size > _COMPILED:
    shutil.rmtree(folder, ignore_errors=True)
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)


def _end_with(parent: int) -> None:
  """End this process when its parent has ended, however it did."""

  def watch():
    while os.getppid() == parent:
      time.sleep(0.5)
    os._exit(0)

  threading.Thread(target=watch, daemon=True).start()


def main() -> None:
  """Learn with the settings of the first argument, a JSON object."""
  settings = Settings(**json.loads(sys.argv[1]))
  _end_with(int(sys.argv[2]))
  # The page comes first.
  os.nice(10)
  warnings.filterwarnings('ignore', module=r'PIL\.Image')
  try:
    Learner(settings).run()
  except InputError as error:
    print(str(error), file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  main()
