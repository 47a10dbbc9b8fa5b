"""The numbers in a run's record and in its table."""

import optax
import tiny

from ssljax.methods.association import association
from ssljax.runs import summary
from ssljax.training.job import Progress


def method_of_two_stages():
  tx = lambda *_, **__: optax.sgd(0.1)
  return association(tiny.NET, tx, tiny.BALANCED, 4, pretrain=2)


def finished(seed):
  """The progress after both stages; the last one is evaluated twice."""
  at = lambda step, error: {'step': step, 'last': [error + seed]}
  return Progress(
    stage=1,
    step=6,
    ends=(2, 6),
    seconds=1.5,
    evaluations=(at(2, 90.0), at(4, 30.0), at(6, 20.0)),
  )


def recorded():
  """The entry of a method after two jobs of a seed each."""
  result = {'method': 'association', 'arms': {}}
  for seed in (0, 1):
    summary.add(result, method_of_two_stages(), finished(seed), minimum=True)
  return result


def test_the_errors_are_those_of_the_last_stage_seed_by_seed():
  entry = recorded()['arms']['association']
  # Of 30 and 20; the 90 after the first stage does not count.
  assert entry['test_error'] == {
    'last': [20.0, 21.0],
    'median_last': [25.0, 26.0],
    'minimum': [20.0, 21.0],
  }
  assert entry['test_error_after'] == {
    'pretrain': [90.0, 91.0],
    'associate': [20.0, 21.0],
  }
  assert entry['steps'] == 6 and entry['seconds'] == 3.0


def test_the_runs_own_method_is_at_the_top_of_the_record_and_no_other():
  result = recorded()
  assert result['test_error'] == result['arms']['association']['test_error']
  other = {'method': 'madnn', 'arms': {}}
  summary.add(other, method_of_two_stages(), finished(0), minimum=False)
  assert 'test_error' not in other


def test_queries_are_listed_for_each_seed():
  asked = (
    {'step': 2, 'rows': [[5, 7], [1]], 'labels': [[0, 1], [2]]},
    {'step': 4, 'rows': [[3], []], 'labels': [[2], []]},
  )
  result = {'method': 'association', 'arms': {}}
  progress = finished(0)._replace(asked=asked)
  summary.add(result, method_of_two_stages(), progress, minimum=False)
  assert result['asked'] == [
    {'rows': [5, 7, 3], 'labels': [0, 1, 2]},
    {'rows': [1], 'labels': [2]},
  ]


def test_a_deviation_is_that_of_a_sample():
  # Of 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, over two 7.
  assert summary.mean_std([1.0, 2.0, 6.0]) == '3.00 ± 2.65'
  assert summary.mean_std([4.125]) == '4.12'


def test_the_averaged_weights_stand_where_there_are_any():
  errors = {'last': [5.0, 6.0], 'averaged': [3.0, 4.0]}
  assert summary.errors_that_stand(errors) == [3.0, 4.0]
  assert summary.errors_that_stand({'last': [5.0, 6.0]}) == [5.0, 6.0]
  assert summary.by_seed(errors) == '3.00 4.00 (median 3.50)'
  chosen = summary.by_seed(errors | {'minimum': [1.0, 2.0]})
  assert chosen == '1.00 2.00 (median 1.50, minimum over training)'


def test_the_quality_of_pseudo_labels_is_that_of_the_last_evaluation():
  result = {'method': 'association', 'arms': {}}
  for seed, accuracy in enumerate((0.75, None)):
    first, *more, last = finished(seed).evaluations
    quality = {'coverage': [0.5 + seed / 4], 'accuracy': [accuracy]}
    first |= {'pseudo_labels': {'coverage': [0.1], 'accuracy': [0.2]}}
    last |= {'pseudo_labels': quality}
    progress = finished(seed)._replace(evaluations=(first, *more, last))
    summary.add(result, method_of_two_stages(), progress, minimum=False)
  wanted = {'coverage': [0.5, 0.75], 'accuracy': [0.75, None]}
  assert result['arms']['association']['pseudo_labels'] == wanted
  assert result['pseudo_labels'] == wanted
  result |= {'dataset': 'tiny', 'labels': '8', 'seeds': [0, 1]}
  table = summary.table(result, 'folder').splitlines()
  # Means over the seeds that have a value: (0.5 + 0.75) / 2, and 0.75.
  assert 'association pseudo-labels: coverage 0.62, accuracy 0.75' in table
