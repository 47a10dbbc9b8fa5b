import jax
import jax.numpy as jnp
import logit_net
import numpy as np
import pytest

from ssljax.core import init_state
from ssljax.errors import InputError
from ssljax.methods import flexmatch as m

# Ten images, of which rows 0 and 3 have a label.
LABELS = [1, -1, -1, 2, -1, -1, -1, -1, -1, -1]
TAU = 0.8


def make(**settings):
  settings = dict(strong_augment=(), threshold=TAU) | settings
  return logit_net.make_method(m.flexmatch, 2, 4, **settings)


def steps(seed=0, count=12):
  """Rows, weak and strong logits of some steps."""
  rng = np.random.default_rng(seed)
  for _ in range(count):
    rows = np.concatenate([[0, 3], rng.choice([1, 2, 4, 5, 6, 7, 8, 9], 4)])
    # Class 0 is preferred, and seldom class 2.
    weak = rng.normal(size=(6, 3)) * 2 + [2.0, 0.5, -0.5]
    yield rows, weak, rng.normal(size=(4, 3))


def numpy_step(last, rows, weak, strong, warmup):
  """One step as a loop over images, from the definitions.

  Args: the last confident prediction by row of the unlabelled images, or None.
  Returns: loss on unlabelled images, mask, thresholds; `last` is updated.
  """
  sigma = [sum(c == k for c in last.values()) for k in range(3)]
  unused = sum(c is None for c in last.values())
  largest = max(max(sigma), unused) if warmup else max(max(sigma), 1)
  beta = [s / largest for s in sigma]
  limits = [b / (2 - b) * TAU for b in beta]
  terms, mask, seen = [], [], set()
  for b, row in enumerate(rows[2:]):
    q = logit_net.softmax(weak[2 + b])
    c = int(q.argmax())
    mask.append(float(q[c] >= limits[c]))
    terms.append(mask[-1] * logit_net.cross_entropy(strong[b], c))
    if row not in seen and q[c] >= TAU:
      last[row] = c
    seen.add(row)
  return np.mean(terms), np.mean(mask), limits


@pytest.mark.parametrize('warmup', [True, False])
def test_steps_equal_a_numpy_loop(warmup):
  method = make(weight=0.6, warmup=warmup)
  state = logit_net.make_state(method, LABELS, 3)
  last = {row: None for row in range(10) if LABELS[row] < 0}
  raised = 0
  for rows, weak, strong in steps():
    batch = logit_net.make_batch(weak, labelled=2, rows=rows, strong=strong)
    want, mask, limits = numpy_step(last, rows, weak, strong, warmup)
    total, state, metrics = logit_net.call(method, state, batch)
    np.testing.assert_allclose(metrics['consistency'], want, rtol=1e-5)
    np.testing.assert_allclose(metrics['mask'], mask, rtol=1e-6)
    np.testing.assert_allclose(metrics['threshold'], np.mean(limits), rtol=1e-5)
    np.testing.assert_allclose(
      metrics['least_threshold'], min(limits), rtol=1e-5
    )
    np.testing.assert_allclose(
      total, metrics['cross_entropy'] + 0.6 * want, rtol=1e-5
    )
    table = [m.ABSENT if LABELS[row] >= 0 else m.NONE for row in range(10)]
    for row, c in last.items():
      table[row] = m.NONE if c is None else c
    np.testing.assert_array_equal(state.memory.label, table)
    counts = [sum(c == k for c in last.values()) for k in range(3)]
    np.testing.assert_array_equal(state.memory.counts, counts)
    assert int(state.memory.unused) == sum(c is None for c in last.values())
    raised += min(limits) > 0
  assert raised and len(set(counts)) == 3  # the thresholds of classes differ


def test_thresholds_by_hand():
  # σ = (4, 2, 0) and 1 unused image: β = (1, ½, 0), M(β) = (1, ⅓, 0).
  memory = m.Confident(
    np.zeros(0, np.int32), np.array([4, 2, 0], np.int32), np.int32(1)
  )
  np.testing.assert_allclose(
    m.thresholds(memory, 0.9), [0.9, 0.3, 0], rtol=1e-6
  )
  # 8 unused images: β = (½, ¼, 0).
  memory = memory.replace(unused=np.int32(8))
  want = [0.9 / 3, 0.9 * 0.25 / 1.75, 0]
  np.testing.assert_allclose(m.thresholds(memory, 0.9), want, rtol=1e-6)
  np.testing.assert_allclose(
    m.thresholds(memory, 0.9, warmup=False), [0.9, 0.3, 0], rtol=1e-6
  )


def test_an_image_that_changes_its_class_moves_from_one_count_to_the_other():
  method = make()
  state = logit_net.make_state(method, LABELS, 3)
  one = np.array([5, 5, 5, 7], np.int32)  # the first of equal rows counts
  sure = np.ones(4, bool)
  memory = m.record(state.memory, one, np.array([2, 1, 0, 1], np.int32), sure)
  np.testing.assert_array_equal(memory.counts, [0, 1, 1])
  assert int(memory.unused) == int(state.memory.unused) - 2
  memory = m.record(memory, one[3:], np.array([0], np.int32), sure[3:])
  np.testing.assert_array_equal(memory.counts, [1, 0, 1])
  memory = m.record(memory, one[3:], np.array([1], np.int32), ~sure[3:])
  np.testing.assert_array_equal(memory.counts, [1, 0, 1])


def test_images_that_no_step_draws_do_not_count():
  method = make()
  state = init_state(
    method,
    logit_net.NET,
    jax.random.key(0),
    jnp.asarray(LABELS, jnp.int32),
    jnp.zeros([1, 1, 1, 3]),
    admitted=jnp.array([0, 1, 3, 5, 8], jnp.int32),
  )
  wanted = np.full(10, m.ABSENT)
  wanted[[1, 5, 8]] = m.NONE  # rows 0 and 3 have a label
  np.testing.assert_array_equal(state.memory.label, wanted)
  assert int(state.memory.unused) == 3


def test_gradients_flow_through_strong_views_alone():
  method = make()
  state = logit_net.make_state(method, LABELS, 3)
  rows, weak, strong = next(steps())
  batch = logit_net.make_batch(weak, labelled=2, rows=rows, strong=strong)
  slopes = logit_net.slopes(method, state, batch)
  # All thresholds are 0 at first.
  assert (slopes['strong'] != 0).all() and (slopes['image'][2:] == 0).all()


@pytest.mark.parametrize(
  'settings', [dict(threshold=-0.1), dict(weight=-1.0), dict(ema=1.0)]
)
def test_bad_settings_are_named(settings):
  ((name, value),) = settings.items()
  with pytest.raises(InputError, match=f'{name}={value}'):
    make(**settings)
