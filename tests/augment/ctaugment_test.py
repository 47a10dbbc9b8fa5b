"""CTAugment compared with loops over its bins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from views import compiled, picture

from ssljax.augment import ctaugment, ops

RNG = np.random.default_rng(0)
RATES = RNG.uniform(0.3, 1, (len(ops.OPS), ctaugment.BINS)).astype(np.float32)
COUNTS = [{'posterize': 8, 'identity': 1}.get(name, 17) for name in ops.OPS]


def policies(rates, n=4000, **more):
  """Policies [n, depth] of n images."""
  keys = jax.random.split(jax.random.key(0), n)
  draw = lambda key: ctaugment.draw(key, rates, **more)
  return jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(keys))


def test_probabilities_are_those_of_a_loop():
  got = ctaugment.bin_probabilities(RATES)
  for op, count in enumerate(COUNTS):
    p = RATES[op, :count].astype(float) + 0.01
    p = p / p.max()
    p[p < 0.85] = 0
    np.testing.assert_allclose(got[op, :count], p / p.sum(), rtol=1e-5)
    assert (np.asarray(got[op, count:]) == 0).all()
  # Some bins are unlikely enough to be left out, some are not.
  assert 0.2 < (np.asarray(got) > 0).mean() < 0.8


def test_a_strong_view_draws_bins_by_their_rates():
  drawn = policies(RATES, 20_000)
  expected = np.asarray(ctaugment.bin_probabilities(RATES))
  for op, count in enumerate(COUNTS):
    bins = drawn.bins[drawn.ops == op]
    counts = np.bincount(bins, minlength=17)
    mean = len(bins) * expected[op]
    # 18·17 counts; 5 deviations have probability 6e-7 each.
    assert (abs(counts - mean) <= 5 * np.sqrt(mean) + 1e-6).all()
    assert bins.max() < count
  # 40,000 operations, each of 18 equally likely.
  counts = np.bincount(drawn.ops.ravel(), minlength=18)
  assert abs(counts - 40_000 / 18).max() < 5 * (40_000 / 18) ** 0.5


def test_the_level_lies_in_its_bin():
  for rates in (RATES, None):
    drawn = policies(rates)
    count = np.array(COUNTS)[drawn.ops]
    position = drawn.levels * count - drawn.bins
    assert position.min() > -1e-5 and position.max() < 1 + 1e-5
    assert abs(position.mean() - 0.5) < 0.02
    assert drawn.positions.shape == (4000, 2, 2)


def test_a_probe_draws_all_levels_whatever_the_rates():
  drawn = policies(None)
  levels = drawn.levels.ravel()
  # 8,000 uniform numbers in ten cells: 800 ± 5·28.
  assert abs(np.histogram(levels, 10, (0, 1))[0] - 800).max() < 142


def test_a_probe_returns_what_it_did():
  image = picture(9, 8, 3)
  key = jax.random.key(3)
  got, op, bins = compiled(ctaugment.probe)(key, image)
  policy = ctaugment.draw(key, None)
  np.testing.assert_array_equal(op, policy.ops)
  np.testing.assert_array_equal(bins, policy.bins)
  np.testing.assert_allclose(
    got, compiled(ctaugment.transform)(image, policy), atol=1e-6
  )


# At the levels 0, 0.5 and 1 (ReMixMatch's appendix D); posterize keeps
# 1 + int(7.999 l) bits in its code.
VALUES = {
  'autocontrast': (0, 0.5, 1),
  'brightness': (0.1, 1.05, 2),
  'posterize': (1, 4, 8),
  'rotate': (-45, 0, 45),
  'shear_x': (-0.3, 0, 0.3),
  'translate_y': (-0.3, 0, 0.3),
  'solarize': (0, 128, 256),
  'rescale': (0, 0.125, 0.25),
  'cutout': (0, 0.25, 0.5),
}


@pytest.mark.parametrize('name', VALUES)
def test_levels_are_turned_into_the_papers_values(name):
  image = jnp.asarray(picture(20, 16, 3))
  transform = compiled(ctaugment.transform)
  for level, value in zip((0.0, 0.5, 1.0), VALUES[name], strict=True):
    number = jnp.array([ops.NUMBER[name]])
    position = jnp.array([[0.3, 0.6]])
    policy = ctaugment.Policy(number, number, jnp.array([level]), position)
    expected = ops.transform(image, number[0], jnp.float32(value), position[0])
    got = transform(image, policy)
    assert (abs(got - expected).max(-1) > 1e-5).mean() < 0.02


def test_an_operation_of_every_kind_is_applied():
  image = picture(16, 16, 3)
  keys = jax.random.split(jax.random.key(0), 200)
  apply = lambda key: ctaugment.apply(key, image, RATES)
  images = compiled(jax.vmap(apply))(keys)
  assert images.shape == (200, 16, 16, 3)
  assert np.isfinite(images).all() and images.min() >= 0
  assert images.max() <= 1 + 1e-6
  same = (np.asarray(images) == image).all((1, 2, 3)).sum()
  assert same < 20  # both are the identity in 1 of 324


def test_updates_are_those_of_a_loop_over_rows():
  rows, depth = 40, 3
  # Few different cells, so that rows meet.
  op = RNG.integers(0, 3, (rows, depth)).astype(np.int32)
  bins = RNG.integers(0, 2, (rows, depth)).astype(np.int32)
  omega = RNG.random(rows).astype(np.float32)
  expected = RATES.astype(float)
  for row in range(rows):
    for i in range(depth):
      cell = op[row, i], bins[row, i]
      expected[cell] = 0.9 * expected[cell] + 0.1 * omega[row]
  got = jax.jit(lambda *a: ctaugment.update(*a, decay=0.9))(
    RATES, op, bins, omega
  )
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  assert (np.asarray(got) != RATES).sum() == 6


def test_the_match_is_1_for_a_certain_right_answer():
  p = jnp.array([[1.0, 0, 0], [0, 1, 0], [0.5, 0.25, 0.25]])
  y = jnp.array([[1.0, 0, 0], [1, 0, 0], [1, 0, 0]])
  # 1 - ½(0.5 + 0.25 + 0.25) = 0.5.
  np.testing.assert_allclose(ctaugment.match(p, y), [1, 0, 0.5])
