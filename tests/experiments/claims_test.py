import math

import pytest

from ssljax.errors import InputError
from ssljax.experiments.papers import claims, runs, tables


def test_the_effect_is_the_mean_paired_difference_with_students_interval():
  # Differences −3, −1, −2: mean −2, standard deviation 1. Student's quantile
  # for two degrees of freedom and 0.975 is 4.302653.
  found = claims.effect([1.0, 4.0, 7.0], [4.0, 5.0, 9.0])
  half = 4.302653 / math.sqrt(3)
  assert found.value == pytest.approx(-2) and found.splits == 3
  assert found.low == pytest.approx(-2 - half, rel=1e-6)
  assert found.high == pytest.approx(-2 + half, rel=1e-6)
  # The order of the splits matters: it is no comparison of two means.
  other = claims.effect([7.0, 4.0, 1.0], [4.0, 5.0, 9.0])
  assert other.value == found.value and other.high != found.high
  with pytest.raises(InputError, match='1 splits'):
    claims.effect([1.0], [2.0])


@pytest.mark.parametrize(
  ('low', 'high', 'verdict'),
  [
    (-2.0, -0.1, 'holds'),
    (-2.0, 0.1, 'does not show'),
    (0.1, 2.0, 'reversed'),
  ],
)
def test_the_verdict_says_where_the_interval_lies(low, high, verdict):
  assert claims.Effect((low + high) / 2, low, high, 8).verdict == verdict


def test_equal_differences_are_no_evidence():
  assert claims.effect([75.0, 70.0], [80.0, 75.0]).verdict == 'does not show'


def test_every_claim_names_runs_that_exist_and_differ():
  found = claims.read()
  assert {claim.paper for claim in found} == {
    *('MA-DNN', 'Learning by Association', 'R2-D2', 'LLP', 'DeepBASS')
  }
  for claim in found:
    rows = claim.with_part, claim.without_part
    assert rows[0] != rows[1]._replace(name='with')
    for row in rows:
      assert runs.run_of(row).lines and (row.seeds >= 8 or row.propagate)


def test_subsamples_of_a_run_are_paired_like_splits(monkeypatch):
  errors = {'propagate:LLP': (4.0, 6.0, 5.0), 'propagate:LS': (5.0, 9.0, 5.0)}
  found = lambda store, row, budget: tables.Ours(errors[row.take], seeds=(0,))
  monkeypatch.setattr(claims.runs, 'ours', found)
  (claim,) = [
    claim for claim in claims.read() if claim.without_part.take in errors
  ]
  effect = claims.measured(None, claim)
  # Differences -1, -3, 0.
  assert effect.value == pytest.approx(-4 / 3) and effect.splits == 3
