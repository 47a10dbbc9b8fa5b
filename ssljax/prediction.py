"""Predictions of a finished run, with calibrated confidences.

The models of all splits of a run vote: their probabilities are averaged, and
sharpened or smoothed by one temperature. It is fitted to labelled images that
were held out (`splits.hold_out`, or `validation`): each is predicted by the
models that were not trained on it alone. The same predictions give the error,
and tell labels that are probably wrong. Letters: M images, C classes.
"""

from collections.abc import Iterator, Sequence
from concurrent import futures
import csv
import dataclasses
import io
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from ssljax import api, files, intervals, progress
from ssljax.analysis import calibration
from ssljax.core import UNLABELLED
from ssljax.data import datasets
from ssljax.data.types import Images
from ssljax.errors import InputError, fraction, require
from ssljax.runs import load as load_lib
from ssljax.runs import run_folder

CHUNK = 512  # images that are read and predicted at once
_PARTS = 5  # what is fitted to four fifths is measured on the last
_TINY = 1e-12  # least probability


class HeldOut(NamedTuple):
  """Predictions of labelled images by models that were not trained on them."""

  rows: np.ndarray  # [M] int, sorted rows of the training images
  labels: np.ndarray  # [M] int, given classes
  logits: np.ndarray  # [M, C] log-probabilities


class Candidate(NamedTuple):
  """Models of a run that could be delivered: one for each split."""

  name: str  # of the method, and of the stage if it is not the last
  models: tuple[api.Model, ...]
  held_out: HeldOut | None  # None if no labelled image was held out


@dataclasses.dataclass(frozen=True)
class Predictor:
  """The models of a run.

  Attributes:
    models: one for each split.
    dataset: of the run.
    labelled: `[N]` bool, training images whose label the run was given.
    name: of the models that were chosen, see `choose`.
    reason: why others than the run's last ones were chosen; '' if they were.
    held_out: predictions of held-out images, None if there are none.
    temperature: of the probabilities; 1 without held-out images.
    threshold: least probability of a class in a prediction set; 0 likewise.
    measured: error, calibration and coverage on held-out images; {} likewise.
  """

  models: tuple[api.Model, ...]
  dataset: datasets.Dataset
  labelled: np.ndarray
  name: str = ''
  reason: str = ''
  held_out: HeldOut | None = None
  temperature: float = 1.0
  threshold: float = 0.0
  measured: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def classes(self) -> tuple[str, ...]:
    """Names `[C]` of the classes."""
    return self.models[0].classes

  def predict_proba(self, images) -> np.ndarray:
    """Return calibrated probabilities `[M, C]` of images `[M, ...]`."""
    logits = _mean_logits([model.logits(images) for model in self.models])
    return calibration.softmax(logits, self.temperature)


def load(
  folder: str | os.PathLike,
  *,
  data_dir: str | None = None,
  coverage: float = 0.9,
) -> Predictor:
  """Return the predictor of a finished run.

  Args:
    folder: of the run.
    data_dir: folder of prepared data sets; the run's own if None.
    coverage: share of the prediction sets that contain the true class.

  Raises:
    InputError: the run is not finished, or its data have changed.
  """
  fraction(coverage=coverage)
  folder = files.as_place('run', str(folder))
  found, dataset, labelled = candidates(folder, data_dir)
  chosen, reason = choose(found)
  reason = reason or _stopped(load_lib.finished_result(folder))
  predictor = Predictor(chosen.models, dataset, labelled, chosen.name, reason)
  if chosen.held_out is None:
    return predictor
  logits, labels = chosen.held_out.logits, chosen.held_out.labels
  measured = measure(logits, labels, coverage)
  temperature, threshold = _fitted(
    logits, labels, coverage, measured['calibrated']
  )
  return dataclasses.replace(
    predictor,
    held_out=chosen.held_out,
    temperature=temperature,
    threshold=threshold,
    measured=measured,
  )


def candidates(
  folder: pathlib.Path, data_dir: str | None = None
) -> tuple[list[Candidate], datasets.Dataset, np.ndarray]:
  """Return the models that a run could deliver, its data set and labelled rows.

  The models are those at the end of the run, first; at the ends of earlier
  stages that it kept; and of its baselines.

  Args:
    folder: of the run.
    data_dir: folder of prepared data sets; the run's own if None.

  Returns:
    Models, data set, and the mask `[N]` bool of images whose label was given.
  """
  result = load_lib.finished_result(folder)
  method = result['method']
  parts: dict[str, Any] = {}
  arms = [method, *(arm for arm in result['arms'] if arm != method)]
  found: dict[str, tuple[list[api.Model], dict[int, list]]] = {}
  given: set[int] = set()
  for arm in arms:
    for seed in result['seeds']:
      finished = load_lib.load(folder, seed, data_dir, arm=arm, **parts)
      parts.setdefault('dataset', finished.dataset)  # opened once
      split = finished.split
      for rows in (split.labelled, split.test, split.validation):
        given.update(rows.tolist())
      for name, step in _ends(finished, arm, own=arm == method):
        models, logits = found.setdefault(name, ([], {}))
        model = api.model_of_finished(finished, step=step)
        first = next(iter(found.values()))[0]
        if first:  # One compiled function serves the weights of all.
          model.share_compiled(first[0])
        models.append(model)
        for row, values in _predict_held_out(finished, model).items():
          logits.setdefault(row, []).append(values)
  train = finished.dataset.train
  made = [
    Candidate(name, tuple(models), _held_out(train.labels, logits))
    for name, (models, logits) in found.items()
  ]
  labelled = np.zeros(len(train.labels), bool)
  labelled[list(given)] = True
  return made, finished.dataset, labelled


def _ends(finished, arm: str, own: bool) -> list[tuple[str, int]]:
  """Return the name and step of the models of an arm, the last ones first."""
  ends = list(finished.stage_ends.items())
  earlier = [
    (f'{arm} after its stage {name}', step)
    for name, step in ends[:-1]
    if own and step in finished.kept
  ]
  return [(arm, finished.steps), *earlier]


def _predict_held_out(finished, model: api.Model) -> dict[int, np.ndarray]:
  """Return the logits `[C]` of each labelled row that a split holds out."""
  rows, train = _held_rows(finished.split), finished.dataset.train
  if not len(rows):
    return {}
  images = train.read(rows).reshape(-1, *train.row_shape)
  return dict(zip(rows.tolist(), model.logits(images), strict=True))


def _held_rows(split) -> np.ndarray:
  """Return the labelled rows that a split holds out."""
  return split.test if len(split.test) else split.validation


def _held_out(
  labels: np.ndarray, logits: dict[int, list[np.ndarray]]
) -> HeldOut | None:
  """Return the predictions of held-out rows; None if there are none."""
  if not logits:
    return None
  rows = np.array(sorted(logits))
  mean = [_mean_logits(logits[row]) for row in rows.tolist()]
  return HeldOut(rows, labels[rows], np.stack(mean))


def choose(found: Sequence[Candidate]) -> tuple[Candidate, str]:
  """Return the candidate to deliver, and why if it is not the first.

  It is the first unless another one has fewer errors on the held-out images,
  and the 95 % interval of the paired difference is above 0.

  Args:
    found: candidates; the run's last models come first.
  """
  own = found[0]
  if own.held_out is None:
    return own, ''
  wrong = {
    each.name: held_out.logits.argmax(axis=-1) != held_out.labels
    for each in found
    if (held_out := each.held_out) is not None
  }
  best = min(found, key=lambda each: wrong[each.name].mean())
  worse = wrong[own.name].astype(float) - wrong[best.name]
  if intervals.paired(worse).low <= 0 or best is own:
    return own, ''
  shown = lambda name: f'{wrong[name].mean():.1%}'
  return best, (
    f'{own.name} has an error of {shown(own.name)} on {len(worse)} held-out '
    f'labelled images, {best.name} {shown(best.name)}: the predictions are of '
    'the latter'
  )


def _stopped(result: dict[str, Any]) -> str:
  """Return which seeds of a run deliver an earlier stage; '' if none does."""
  stops = result['arms'][result['method']].get('stopped_early', [])
  return '; '.join(
    f'seed {stop["seed"]} was stopped after its stage {stop["stage"]}, with an '
    f'error of {stop["error"]:.1f} % on {stop["images"]} held-out labelled '
    f'images: its predictions are of stage {stop["delivered"]} '
    f'({stop["delivered_error"]:.1f} %)'
    for stop in stops
  )


def _mean_logits(logits: Sequence[np.ndarray]) -> np.ndarray:
  """Return the log of the mean probabilities of logits `[..., C]`."""
  p = np.mean([calibration.softmax(each) for each in logits], axis=0)
  return np.log(np.maximum(p, _TINY))


def _fitted(
  logits, labels, coverage: float, calibrated: bool
) -> tuple[float, float]:
  """Return temperature and threshold that suit held-out images."""
  fit = calibration.fit_temperature
  temperature = fit(logits, labels) if calibrated else 1.0
  p = calibration.softmax(logits, temperature)
  return temperature, calibration.set_threshold(p, labels, coverage)


def _cross_fitted(
  logits, labels, coverage: float, calibrated: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Return probabilities and prediction sets `[M, C]` of held-out images.

  Those of an image come from what was fitted to four fifths of the others.
  """
  count = len(labels)
  part = np.arange(count) % _PARTS
  p, sets = calibration.softmax(logits), np.ones(logits.shape, bool)
  for k in range(min(_PARTS, count) if count > 1 else 0):
    fit, use = part != k, part == k
    temperature, threshold = _fitted(
      logits[fit], labels[fit], coverage, calibrated
    )
    p[use] = calibration.softmax(logits[use], temperature)
    sets[use] = calibration.prediction_sets(p[use], threshold)
  return p, sets


def measure(
  logits: np.ndarray, labels: np.ndarray, coverage: float
) -> dict[str, Any]:
  """Measure error, calibration and coverage on held-out images.

  Temperature and threshold are fitted to four fifths of the images and used on
  the others, five times, so that no image is measured by what it was fitted to.
  A temperature that makes the cross-entropy of the others worse, as that of few
  images may, is not used: `calibrated` is False then.

  Args:
    logits: `[M, C]`.
    labels: `[M]` classes.
    coverage: of the prediction sets.
  """
  count, rows = len(labels), np.arange(len(labels))
  surprise = lambda p: -np.log(np.maximum(p[rows, labels], _TINY)).mean()
  p, sets = _cross_fitted(logits, labels, coverage, calibrated=True)
  plain = calibration.softmax(logits)
  calibrated = bool(surprise(p) < surprise(plain))
  if not calibrated:
    p, sets = _cross_fitted(logits, labels, coverage, calibrated=False)
  right = int((plain.argmax(axis=-1) == labels).sum())
  inside = int(sets[rows, labels].sum())
  return {
    'images': count,
    'accuracy': right / count,
    'accuracy_interval': list(intervals.wilson(right, count)),
    'calibrated': calibrated,
    'calibration_error_before': calibration.calibration_error(plain, labels),
    'calibration_error_after': calibration.calibration_error(p, labels),
    'coverage_asked': coverage,
    'coverage': inside / count,
    'coverage_interval': list(intervals.wilson(inside, count)),
    'mean_set_size': float(sets.sum() / count),
  }


# Predictions of many images, in a file.


def training_images(predictor: Predictor) -> Images:
  """Return the images that a run was trained on, and their given labels."""
  train, labelled = predictor.dataset.train, predictor.labelled
  known = np.where(labelled, train.labels, UNLABELLED)
  images = of_source(predictor, train._replace(labels=known))
  held_out = predictor.held_out
  if held_out is None:
    return images
  best = held_out.logits.argmax(axis=-1).tolist()
  unseen = dict(zip(held_out.rows.tolist(), best, strict=True))
  return images._replace(unseen=unseen)


def of_source(
  predictor: Predictor,
  source: datasets.Source,
  classes: Sequence[str] | None = None,
) -> Images:
  """Return the rows of a split; its labels are given ones.

  Args:
    predictor: of the run.
    source: the split.
    classes: names of its labels, if they are not those of the run. A label
      whose name the run does not know is not given. Names that are numbers are
      taken for those of the run's classes.
  """
  shape = predictor.models[0].shape
  require(
    source.row_shape == shape,
    f'`dataset`: its rows have shape {source.row_shape}, the run was trained '
    f'on {shape}: give data of that shape',
  )
  count = len(source.labels)
  named = source.names if source.names is not None else map(str, range(count))
  known = predictor.classes
  if classes is None or tuple(classes) == tuple(map(str, range(len(classes)))):
    classes = known

  def read(rows: Sequence[int]) -> tuple[np.ndarray, dict[int, str]]:
    return source.read(np.asarray(rows)).reshape(-1, *shape), {}

  labels = [classes[y] if 0 <= y < len(classes) else '' for y in source.labels]
  given = [label if label in known else None for label in labels]
  return Images(list(named), given, read)


COLUMNS = (
  *('file', 'label', 'confidence', 'margin'),
  *('second', 'second_confidence', 'third', 'third_confidence'),
  *('set', 'given', 'disagrees'),
)


def lines(
  predictor: Predictor, images: Images, rows: Sequence[int], p: np.ndarray
) -> str:
  """Return the lines of a CSV file for some images.

  Args:
    predictor: of the run.
    images: of which `rows` are predicted.
    rows: `[M]`.
    p: probabilities `[M, C]`.
  """
  text, classes = io.StringIO(), predictor.classes
  writer = csv.writer(text, lineterminator='\n')
  order = np.argsort(-p, axis=-1, kind='stable')
  sizes = np.zeros(len(p), int)
  if predictor.held_out is not None:  # a set has the most probable classes
    sizes = calibration.prediction_sets(p, predictor.threshold).sum(axis=-1)
  # Python's numbers are much faster, one by one, than NumPy's.
  ranked = order[:, : max(3, sizes.max(initial=0))].tolist()
  confidences = np.take_along_axis(p, order[:, :3], axis=-1).tolist()
  for row, best, share, size in zip(
    rows, ranked, confidences, sizes.tolist(), strict=True
  ):
    top = [classes[c] for c in best[:3]] + [''] * (3 - len(share))
    shown = [f'{x:.4f}' for x in share] + [''] * (3 - len(share))
    given = images.given[row]
    compared = images.unseen.get(row, best[0])
    writer.writerow(
      [
        *(images.names[row], top[0], shown[0]),
        f'{share[0] - (share[1] if len(share) > 1 else 0.0):.4f}',
        *(top[1], shown[1], top[2], shown[2]),
        '|'.join(classes[c] for c in best[:size]),
        given or '',
        '' if given is None else int(classes[compared] != given),
      ]
    )
  return text.getvalue()


def write(
  predictor: Predictor,
  images: Images,
  out: str | os.PathLike[str],
  *,
  key: str = '',
) -> dict[str, str]:
  """Predict images, and write a CSV file with a line for each.

  The lines are written to OUT.partial while they are made, and a call with the
  same key continues there.

  Args:
    predictor: of the run.
    images: to predict.
    out: the file.
    key: tells predictions with other settings apart.

  Returns:
    The reason for each image that cannot be read, by name; it has no line.

  Raises:
    InputError: the file cannot be written.
  """
  out = pathlib.Path(out)
  partial = out.with_name(f'{out.name}.partial')
  note = partial.with_name(f'{partial.name}.json')
  count = len(images.names)
  done, reasons = _begun(partial, note, key, count)
  bar = progress.progress(count, 'predicting', done)
  try:
    with bar, partial.open('a' if done else 'w', encoding='utf-8') as file:
      if not done:
        file.write(','.join(COLUMNS) + '\n')
      for rows, pixels, found in _chunks(images, range(done, count)):
        if len(pixels):
          kept = [row for row in rows if row not in found]
          file.write(
            lines(predictor, images, kept, predictor.predict_proba(pixels))
          )
        file.flush()
        reasons |= {images.names[row]: why for row, why in found.items()}
        state = {'key': key, 'rows': rows[-1] + 1, 'reasons': reasons}
        state['bytes'] = file.tell()
        run_folder.write_atomically(note, json.dumps(state))
        bar.update(len(rows))
      os.fsync(file.fileno())
    os.replace(partial, out)
    note.unlink(missing_ok=True)
  except OSError as error:
    raise InputError(
      f'`out`={out}: cannot be written ({error.strerror}): give another file, '
      'or make room; the same command continues'
    ) from error
  return reasons


def _begun(
  partial: pathlib.Path, note: pathlib.Path, key: str, count: int
) -> tuple[int, dict[str, str]]:
  """Return the rows that a partial file has, and what could not be read.

  Lines after the last note are cut off.
  """
  try:
    state = json.loads(note.read_text(encoding='utf-8'))
    whole = partial.stat().st_size >= state['bytes']
    if state['key'] != key or state['rows'] > count or not whole:
      return 0, {}
    os.truncate(partial, state['bytes'])
    return state['rows'], dict(state['reasons'])
  except (OSError, ValueError, KeyError, TypeError):  # begin anew
    return 0, {}


def _chunks(
  images: Images, rows: range
) -> Iterator[tuple[range, np.ndarray, dict[int, str]]]:
  """Yield rows and their pixels; the next ones are read in the meantime."""
  parts = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
  with futures.ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
    ahead = [pool.submit(images.read, part) for part in parts[:2]]
    for k, part in enumerate(parts):
      if k + 2 < len(parts):
        ahead.append(pool.submit(images.read, parts[k + 2]))
      yield part, *ahead.pop(0).result()
