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


# Right, all and predicted images of two classes, and those of another seed.
ONE, OTHER = [[8, 1], [10, 2], [9, 3]], [[10, 1], [10, 2], [11, 1]]


def with_classes(images):
  """A result with the classes of two seeds on so many different images."""
  result = {'method': 'association', 'classes': ['cat', 'dog'], 'arms': {}}
  for seed, counts in enumerate((ONE, OTHER)):
    tables = {'test': {'last': [{'counts': counts, 'confusion': [[seed]]}]}}
    progress = finished(seed)._replace(tables=tables)
    summary.add(
      result, method_of_two_stages(), progress, False, {'test': images}
    )
  return result


def test_the_classes_of_all_seeds_are_pooled_and_their_matrices_kept():
  result = with_classes(images=24)  # other images for each seed
  found = result['test_classes']['last']
  assert result['test_confusion'] == {'last': [[[0]], [[1]]]}
  assert [one['recall'] for one in found['seeds']] == [[0.8, 0.5], [1.0, 0.5]]
  pooled = found['pooled']
  assert pooled['recall'] == [18 / 20, 2 / 4] and pooled['images'] == 24
  assert pooled['precision'] == [18 / 20, 2 / 4]
  shared = with_classes(images=12)['test_classes']['last']['pooled']
  assert shared['support'] == [10, 2] and shared['accuracy'] == 20 / 24


def test_the_table_of_classes_and_the_accuracy_have_intervals():
  result = with_classes(images=24)
  title, head, cat, dog = summary.class_table(result, 'test_error')
  assert title.startswith('classes of association')
  assert head.split() == ['class', 'images', 'recall', 'precision', 'F1']
  # Wilson: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), z = 1.96.
  assert cat.split()[:4] == ['cat', '20', '90.0', '[69.9,']
  assert dog.split()[:5] == ['dog', '4', '50.0', '[15.0,', '85.0]']
  line = summary.accuracy_line(*summary.reports(result, 'test_error'))
  assert 'accuracy 83.3 [64.1, 93.3] % over 24 images' in line
  assert 'over 2 seeds; balanced accuracy 70.0 %' in line


def test_of_many_classes_the_worst_are_shown():
  result = with_classes(images=24)
  found = result['test_classes']['last']
  f1 = [0.5 + (c * 7 % 30) / 100 for c in range(30)]
  full = {name: f1 for name in ('f1', 'recall', 'precision', 'support')}
  full |= {
    f'{name}_interval': [[0, 1]] * 30 for name in ('recall', 'precision')
  }
  found['pooled'] |= full
  result['classes'] = [f'class{c}' for c in range(30)]
  title, _, *rows = summary.class_table(result, 'test_error')
  assert 'the 10 of least F1' in title and len(rows) == 10
  worst = sorted(range(30), key=lambda c: f1[c])[:10]
  assert [row.split()[0] for row in rows] == [f'class{c}' for c in worst]


def test_a_record_of_an_earlier_version_has_no_table_of_classes():
  assert summary.class_table(recorded(), 'test_error') == []
