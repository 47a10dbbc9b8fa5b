import logit_net
import numpy as np
import pytest

from ssljax.errors import InputError
from ssljax.methods.temporal_ensembling import temporal_ensembling

LABELS = [1, -1, -1, 2, -1, -1]


def make(**settings):
  return logit_net.make_method(temporal_ensembling, 2, 2, **settings)


def steps(count=8, seed=0):
  """Rows, of which some occur twice in a step, and logits."""
  rng = np.random.default_rng(seed)
  for number in range(count):
    unlabelled = rng.choice([1, 2, 4, 5], 2, replace=number == 3)
    yield np.concatenate([[0, 3], unlabelled]), rng.normal(size=(4, 3)) * 2
  yield np.array([0, 3, 5, 5]), rng.normal(size=(4, 3))


def numpy_step(table, rows, logits, alpha):
  """Mean distance to the ensemble; `table` is row -> (Z, visits), updated.

  The bias is corrected by the number of visits, as in the paper.
  """
  terms = []
  for b, row in enumerate(rows):
    z = logit_net.softmax(logits[b])
    sums, visits = table.get(row, (np.zeros(3), 0))
    terms.append(0.0)
    if visits:
      target = sums / (1 - alpha**visits)
      terms[-1] = sum((z[c] - target[c]) ** 2 for c in range(3)) / 3
  for b, row in reversed(list(enumerate(rows))):  # the first occurrence wins
    if row in rows[:b]:
      continue
    sums, visits = table.get(row, (np.zeros(3), 0))
    z = logit_net.softmax(logits[b])
    table[row] = alpha * sums + (1 - alpha) * z, visits + 1
  return np.mean(terms)


def test_steps_equal_a_numpy_loop():
  alpha = 0.7
  method = make(weight=5.0, ramp=0.1, ensemble_decay=alpha, steps=100)
  state = logit_net.make_state(method, LABELS, 3)
  table = {}
  for number, (rows, logits) in enumerate(steps()):
    batch = logit_net.make_batch(logits, labelled=2, rows=rows, step=number)
    visited = np.mean([row in table for row in rows])
    want = numpy_step(table, rows, logits, alpha)
    total, state, metrics = logit_net.call(method, state, batch)
    np.testing.assert_allclose(metrics['consistency'], want, rtol=1e-4)
    np.testing.assert_allclose(metrics['visited'], visited)
    ramp = np.exp(-5 * (1 - number / 10) ** 2)
    labelled = np.mean(
      [logit_net.cross_entropy(logits[b], LABELS[rows[b]]) for b in range(2)]
    )
    np.testing.assert_allclose(total, labelled + 5 * ramp * want, rtol=1e-4)
    for row in range(6):
      sums, _ = table.get(row, (np.zeros(3), 0))
      np.testing.assert_allclose(state.memory[row], sums, rtol=1e-5)
  assert max(visits for _, visits in table.values()) > 2


def test_the_ensemble_is_a_constant_of_the_gradient():
  method = make(weight=5.0, ramp=0.0)
  state = logit_net.make_state(method, LABELS, 3)
  (rows, first), (_, logits) = list(steps())[:2]
  batch = lambda x: logit_net.make_batch(x, labelled=2, rows=rows)
  # Before the first visit unlabelled rows have no loss.
  assert (logit_net.slopes(method, state, batch(first))['image'][2:] == 0).all()
  _, state, _ = logit_net.call(method, state, batch(first))
  found = logit_net.slopes(method, state, batch(logits))['image']
  for b in (2, 3):
    z, target = logit_net.softmax(logits[b]), logit_net.softmax(first[b])
    outer = 5 * 2 / (4 * 3) * (z - target)
    want = z * (outer - (outer * z).sum())
    np.testing.assert_allclose(found[b], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  'settings', [dict(ensemble_decay=1.0), dict(weight=-1.0), dict(ramp=1.5)]
)
def test_bad_settings_are_named(settings):
  ((name, value),) = settings.items()
  with pytest.raises(InputError, match=f'{name}={value}'):
    make(**settings)
