"""`fit(method='auto')`: chooses a method by labels that are held out.

A fifth of the labelled rows of each class, and copies of them, are put aside.
The supervised baseline and two methods (`runs.auto`) are trained on the other
rows for part of the budget, and tested on these. The method with the least
error is trained on all rows for the rest of the budget: that model is returned.
"""

from collections.abc import Callable
import logging
import pathlib
from typing import Any

import numpy as np

from ssljax import files
from ssljax.core import UNLABELLED
from ssljax.data import arrays, splits
from ssljax.errors import InputError, positive, require
from ssljax.model import Model
from ssljax.runs import auto, budget, run_folder, summary

_LOG = logging.getLogger(__name__)
_COMPARED = 0.6  # share of the budget that the comparison gets
_FINAL = 'final'  # the last training's folder among the candidates


def fit(
  train: Callable[..., Model],
  images,
  labels,
  *,
  minutes: float | None,
  steps: int | None,
  workdir,
  classes,
  test,
  **given,
) -> Model:
  """Compare methods on held-out labels, and train the best on all rows.

  Args:
    train: `api.fit`.
    images: as in `api.fit`, as all the others.
    labels: `[N]` integers, -1 where unlabelled.
    minutes: budget of the comparison and the final training.
    steps: of every training, instead of `minutes`.
    workdir: folder of the final run; the others are in `candidates/` there. The
      same call resumes.
    classes: names or number of the classes.
    test: only the final training sees it.
    **given: the other arguments, the same for all trainings.

  Raises:
    InputError: an argument cannot work; the message names it.
  """
  if steps is None:
    minutes = auto.MINUTES if minutes is None else minutes
    positive(minutes=minutes)
  dataset = arrays.from_arrays(images, labels, classes=classes)
  held, rest = _held_out(dataset.train, given['seed'])
  images, labels = np.asarray(images), np.asarray(labels)
  names = auto.candidates_of(dataset)
  folder = None if workdir is None else files.as_place('workdir', str(workdir))
  given |= {'steps': steps, 'classes': dataset.classes}

  def trained(rows, method: str, share: float, where, **more: Any) -> Model:
    part = None if minutes is None else share * minutes
    how = dict(method=method, minutes=part, workdir=where)
    try:
      return train(images[rows], labels[rows], **how, **more, **given)
    except budget.TooSmallError as error:
      raise _too_small(error, minutes, part) from error

  found = []
  for name in names:
    share = _COMPARED * auto.minutes_of(name, names, 1.0)
    where = folder and folder / auto.CANDIDATES / name
    model = trained(rest, name, share, where)
    wrong = model.predict(images[held]) != labels[held]
    entry = model.result['arms'][name]
    errors = dict(zip(held.tolist(), wrong.astype(float), strict=True))
    found.append(auto.Errors(name, errors, entry['steps'], entry['seconds']))
  record = auto.compare(found)
  compared = '\n'.join(summary.aligned(auto.table(record)))
  _LOG.info('errors on %d held-out labels:\n%s', len(held), compared)
  where = folder and _final(folder)
  everything = np.arange(len(labels))
  model = trained(everything, record['chosen'], 1 - _COMPARED, where, test=test)
  if folder is not None:
    auto.keep(folder, record, _FINAL)
  model.result['auto'] = record
  return model


def _held_out(source, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Return the rows to compare on, and those to train on."""
  known = int((source.labels != UNLABELLED).sum())
  digests = source.digests()
  held = splits.hold_out(source.labels, digests, seed)
  require(
    len(held) > 0,
    f"`method`='auto': no class has two of the {known} labelled images: give "
    'more labels, or a method',
  )
  copies = np.isin(digests, digests[held])
  return held, np.flatnonzero(~copies)


def _too_small(
  error: budget.TooSmallError, minutes: Any, part: Any
) -> InputError:
  """Return the error for a budget of which a training gets too small a part."""
  needed = 1.1 * error.minutes * minutes / part
  return InputError(
    f"`minutes`={minutes:g}: a training of `method`='auto' gets {part:.2g} of "
    f'them, and needs {error.minutes:.1f} here: give `minutes`={needed:.0f} or '
    'more'
  )


def _final(folder: pathlib.Path) -> pathlib.Path:
  """Return the folder of the final run, which another call may have moved."""
  record = auto.decided(folder)
  if record is not None:
    auto.keep(folder, record, _FINAL)
  is_moved = run_folder.is_run(folder)
  return folder if is_moved else folder / auto.CANDIDATES / _FINAL
