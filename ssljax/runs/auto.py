"""The choice of a method by labelled images that are held out.

`ssljax train --method=auto` trains the supervised baseline and two methods as
ordinary runs in FOLDER/candidates/METHOD, for a fifth and twice two fifths of
the budget. The run with the least error on held-out labelled images becomes the
run in FOLDER, and FOLDER/auto.json records the comparison. Test images choose
nothing. The methods are those that did best with default settings on data that
these were not chosen on (docs/results.md): of images MA-DNN and R2-D2, of few
features association and R2-D2, of those of a pretrained network LaplaceNet and
LLP.
"""

from collections.abc import Mapping, Sequence
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from ssljax import files, intervals
from ssljax.core import UNLABELLED
from ssljax.data import datasets, splits
from ssljax.errors import require
from ssljax.runs import defaults, run_folder

MINUTES = 10.0  # without a budget of the user's
RECORD, CANDIDATES = 'auto.json', 'candidates'
_OF_IMAGES = 'supervised', 'madnn', 'r2d2'
_OF_FEATURES = 'supervised', 'association', 'r2d2'
_OF_EMBEDDINGS = 'supervised', 'laplacenet', 'llp'
_SHARES = {'supervised': 0.2}  # of the budget; the others share the rest
_FIFTH = 5


class Errors(NamedTuple):
  """Errors of a candidate on held-out images."""

  method: str
  wrong: dict[int, float]  # share of the splits that are wrong, by row
  steps: int
  seconds: float

  @property
  def rate(self) -> float:
    """Mean error, from 0 to 1."""
    return float(np.mean(list(self.wrong.values())))

  @property
  def interval(self) -> tuple[float, float]:
    """95 % interval of the error: Wilson's if each row has one prediction."""
    values = np.array(list(self.wrong.values()))
    if np.isin(values, (0, 1)).all():
      low, high = intervals.wilson(int(values.sum()), len(values))
      return low, high
    return _around(values)


def candidates_of(dataset: datasets.Dataset) -> tuple[str, ...]:
  """Return the names of the methods to compare, the simplest first."""
  train = dataset.train
  if train.is_images:
    return _OF_IMAGES
  is_embedding = defaults.is_embedding(False, train.shape)
  return _OF_EMBEDDINGS if is_embedding else _OF_FEATURES


def minutes_of(method: str, names: Sequence[str], minutes: float) -> float:
  """Return the part of the budget that a candidate gets."""
  rest = (1 - sum(_SHARES.values())) / (len(names) - len(_SHARES))
  return round(minutes * _SHARES.get(method, rest), 4)


def hold_out(
  dataset: datasets.Dataset, given: Mapping[str, Any]
) -> dict[str, Any]:
  """Return the settings that hold out labelled images for the choice.

  Args:
    dataset: of the run.
    given: settings that the user gives.

  Raises:
    InputError: labelled images would be held out that the run may not use.
  """
  known = int((dataset.train.labels != UNLABELLED).sum())
  found = {'stop_early': True, 'keep_stages': True, 'baseline': False}
  if not len(dataset.test.labels) and not given.get('validation'):
    few = known < splits.FEW_LABELS
    return found | {'hold_out': 'auto', 'seeds': splits.FOLDS if few else 1}
  if given.get('validation'):
    return found
  labels = given.get('labels', 'all')
  require(
    labels == 'all',
    f'`method`=auto, `labels`={labels}: the method is chosen by labelled '
    'images that are held out, and these would be beside the given ones: give '
    '`labels`=all, or their number as `validation`',
  )
  require(
    known >= _FIFTH,
    f'`method`=auto: the data have {known} labels: give at least {_FIFTH}',
  )
  return found | {'labels': 'all', 'validation': known // _FIFTH}


def errors_of(folder: pathlib.Path) -> Errors:
  """Return the errors of a finished candidate.

  Args:
    folder: of its run.
  """
  result = run_folder.read_result(folder) or {}
  entry = result['arms'][result['method']]
  described = run_folder.read_json(folder / 'split.json')['splits']
  found: dict[int, list[bool]] = {}
  for split, own in zip(described, entry['held_out'], strict=True):
    rows, wrong = split.get('test') or split['validation'], set(own['wrong'])
    for position, row in enumerate(rows):
      found.setdefault(row, []).append(position in wrong)
  shares = {row: float(np.mean(each)) for row, each in sorted(found.items())}
  return Errors(result['method'], shares, entry['steps'], entry['seconds'])


def _around(values: np.ndarray) -> tuple[float, float]:
  """Return the 95 % interval of a mean of independent values."""
  half = 1.96 * values.std() / math.sqrt(len(values))
  return float(values.mean() - half), float(values.mean() + half)


def compare(found: Sequence[Errors]) -> dict[str, Any]:
  """Return the content of `auto.json`.

  The method with the least error is chosen; the first of equal ones.

  Args:
    found: errors of the candidates on the same images, the simplest first.
  """
  best = min(found, key=lambda each: each.rate)
  compared = []
  for each in found:
    require(
      each.wrong.keys() == best.wrong.keys(),
      f'`method`=auto: {each.method} and {best.method} held out other images: '
      'give another `workdir`',
    )
    worse = np.array([each.wrong[row] - best.wrong[row] for row in best.wrong])
    compared.append(
      {
        'method': each.method,
        'images': len(each.wrong),
        'error': each.rate,
        'interval': list(each.interval),
        'difference_interval': list(intervals.paired(worse)),
        'steps': each.steps,
        'seconds': each.seconds,
      }
    )
  return {'chosen': best.method, 'compared': compared}


def table(record: Mapping[str, Any]) -> list[list[str]]:
  """Return the cells of the comparison, its title first."""
  percent = lambda pair: '[{:.1f}, {:.1f}]'.format(*(100 * x for x in pair))
  rows = [['method', 'error in %', '95 %', 'above the best', 'steps', '']]
  for each in record['compared']:
    chosen = each['method'] == record['chosen']
    rows.append(
      [
        each['method'],
        f'{100 * each["error"]:.1f}',
        percent(each['interval']),
        '' if chosen else percent(each['difference_interval']),
        f'{each["steps"]:,}',
        'chosen' if chosen else '',
      ]
    )
  return rows


def decided(folder: pathlib.Path) -> dict[str, Any] | None:
  """Return the record of a folder whose choice was made, or None."""
  path = folder / RECORD
  return run_folder.read_json(path) if files.exists(path) else None


def keep(
  folder: pathlib.Path, record: Mapping[str, Any], name: str | None = None
) -> None:
  """Record the choice, and make the chosen run that of the folder.

  An interrupted call is completed by another one.

  Args:
    folder: of the comparison.
    record: the content of `auto.json`.
    name: of the run among the candidates; that of the chosen method if None.
  """
  run_folder.write_json(folder / RECORD, record)
  source = folder / CANDIDATES / (name or record['chosen'])
  for name in run_folder.CONTENT:  # config.json, which makes it a run, is last
    if files.exists(source / name):
      files.move(source / name, folder / name)
