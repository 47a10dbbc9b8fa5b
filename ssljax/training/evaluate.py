"""Test errors of the trained weights and of the averaged ones."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ssljax.core import Method, PerExample

MOST_CLASSES = 100  # C of the largest confusion matrix that is kept


def predictor(net, method: Method) -> PerExample:
  """Return the function that predicts the classes of images.

  Its outputs are {'last': [B] int32}, by the trained weights, and 'averaged'
  where `Method.weights` returns other weights.
  """

  def predict(state, image, key):
    del key
    weights = {'last': (state.params, state.stats)}
    params, stats = method.weights(state)
    if params is not state.params:
      weights['averaged'] = (params, stats)
    return {
      name: jnp.argmax(net.infer(*pair, image).logits, -1).astype(jnp.int32)
      for name, pair in weights.items()
    }

  return predict


class Predicted(NamedTuple):
  """Predictions of images of known classes."""

  truth: np.ndarray  # [M] classes
  classes: dict[str, np.ndarray]  # [S, M] by the weights that predict them


def errors(found: dict[str, Predicted]) -> dict[str, dict[str, list[float]]]:
  """Return the errors in percent `[S]` by split and weights.

  Args:
    found: predictions by split, of 'test' and 'validation'.
  """
  return {
    name: {w: error(c, split.truth) for w, c in split.classes.items()}
    for name, split in found.items()
  }


def tables(found: dict[str, Predicted], classes: int) -> dict[str, dict]:
  """Return the `table` of each seed, by split and weights.

  Args:
    found: as in `errors`.
    classes: C.
  """
  of = lambda truth, c: [table(truth, x, classes) for x in c]
  return {
    name: {w: of(split.truth, c) for w, c in split.classes.items()}
    for name, split in found.items()
  }


def confusion(truth, predicted, classes: int) -> np.ndarray:
  """Return the confusion matrix `[C, C]`: rows are true, columns predicted.

  Args:
    truth: `[M]` classes.
    predicted: `[M]` classes.
    classes: C.
  """
  pairs = np.asarray(truth, np.int64) * classes + predicted
  return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def counts_of(matrix: np.ndarray) -> np.ndarray:
  """Return the images of each class `[3, C]`: right, all, predicted as it.

  Args:
    matrix: confusion matrix `[C, C]`.
  """
  return np.stack([np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)])


def table(truth, predicted, classes: int) -> dict[str, list]:
  """Return the counts `[3, C]`, and the confusion matrix unless it is large.

  The arguments are those of `confusion`.
  """
  matrix = confusion(truth, predicted, classes)
  found = {'counts': counts_of(matrix).tolist()}
  small = {'confusion': matrix.tolist()} if classes <= MOST_CLASSES else {}
  return found | small


def error(predicted: np.ndarray, truth: np.ndarray) -> list[float]:
  """Return the error in percent of each seed.

  Args:
    predicted: `[S, M]` classes.
    truth: `[M]` classes.
  """
  wrong = predicted != truth[None]
  return [100.0 * float(share) for share in wrong.mean(axis=1)]


def summarize(
  evaluations: list[dict],
  last: int = 5,
  minimum: bool = False,
  prefix: str = '',
) -> dict:
  """Summarise the errors of a run for `result.json`.

  Args:
    evaluations: evaluations of the last stage in order, each {'step': int,
      'last': [S] percent}, and 'averaged' where the method averages weights;
      names of errors on validation images begin with 'validation_'.
    last: number of evaluations in the median.
    minimum: also report the smallest error over training, for papers whose
      protocol it is: on test images it is a choice made on the test set.
    prefix: 'validation_' for the errors on validation images.

  Returns:
    {'last', 'median_last'}, and 'averaged' and 'minimum' where they apply:
    lists over seeds. 'last' and 'averaged' are errors at the last step,
    'median_last' is the median of the last evaluations of the trained weights.
    Empty if there are no such images.
  """
  last_name, averaged = f'{prefix}last', f'{prefix}averaged'
  evaluations = [e for e in evaluations if last_name in e]
  if not evaluations:
    return {}
  final = evaluations[-1]
  history = np.array([e[last_name] for e in evaluations[-last:]])
  summary = {
    'last': final[last_name],
    'median_last': np.median(history, axis=0).tolist(),
  }
  if averaged in final:
    summary['averaged'] = final[averaged]
  if minimum:
    all_errors = [e[last_name] for e in evaluations]
    summary['minimum'] = np.min(all_errors, 0).tolist()
  return summary


def by_stage(
  evaluations: Sequence[dict], ends: dict[str, int]
) -> dict[str, list[float]]:
  """Return the test error `[S]` at the end of each stage, by its name.

  Args:
    evaluations: all evaluations of a run.
    ends: last step of each stage by its name.
  """
  errors = {e['step']: e['last'] for e in evaluations if 'last' in e}
  return {name: errors[end] for name, end in ends.items() if end in errors}
