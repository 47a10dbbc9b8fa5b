"""Test errors of the trained weights and of the averaged ones."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ssljax.core import Method, PerExample


class Predictions(NamedTuple):
  """Predicted classes of M images."""

  classes: dict[str, np.ndarray]  # [S, M] by weights: 'last', 'averaged'
  truth: np.ndarray  # [M] classes

  @property
  def evaluated(self) -> np.ndarray:
    """Classes `[S, M]` by the weights that the method evaluates."""
    return self.classes.get('averaged', self.classes['last'])


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
  evaluations: list[dict], ends: dict[str, int]
) -> dict[str, list[float]]:
  """Return the test error `[S]` at the end of each stage, by its name.

  Args:
    evaluations: all evaluations of a run.
    ends: last step of each stage by its name.
  """
  errors = {e['step']: e['last'] for e in evaluations if 'last' in e}
  return {name: errors[end] for name, end in ends.items() if end in errors}
