"""RandAugment: which operations it draws, and how strong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from views import compiled, many, picture

from ssljax.augment import ops, randaugment
from ssljax.errors import InputError

# The paper's Table 12: the values at the smallest and the largest level.
TABLE = {
  'brightness': (0.95, 0.05),
  'color': (0.95, 0.05),
  'contrast': (0.95, 0.05),
  'posterize': (8, 4),
  'rotate': (0, 30),
  'sharpness': (0.95, 0.05),
  'shear_x': (0, 0.3),
  'shear_y': (0, 0.3),
  'solarize': (256, 0),
  'translate_x': (0, 0.3),
  'translate_y': (0, 0.3),
}


def test_the_operations_are_the_papers_fourteen():
  names = ops.OPS[: randaugment.COUNT]
  assert set(names) == {'autocontrast', 'equalize', 'identity', *TABLE}
  assert len(names) == 14


@pytest.mark.parametrize('name', TABLE)
@pytest.mark.parametrize('sign', [-1, 1])
def test_the_level_runs_over_the_papers_range(name, sign):
  low, high = TABLE[name]
  op = jnp.full(3, ops.NUMBER[name])
  got = randaugment.values(op, jnp.array([0, 0.5, 1]), jnp.full(3, 1.0 * sign))
  factor = sign if name in ('rotate',) or '_' in name else 1
  expected = factor * np.array([low, (low + high) / 2, high])
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def drawn(n, **more):
  """What is applied to 2,000 images: operations and values [2000, n]."""
  apply = randaugment.randaugment(n, **more)
  kept = randaugment.transform_all
  # An image of 2n numbers that shows what it would go through.
  randaugment.transform_all = lambda image, op, value: jnp.stack(
    [op.astype(jnp.float32), value], -1
  )
  try:
    keys = jax.random.split(jax.random.key(0), 2000)
    result = np.asarray(jax.jit(jax.vmap(apply, (0, None)))(keys, 0.0))
  finally:
    randaugment.transform_all = kept
  return result[..., 0].astype(int), result[..., 1]


def test_operations_are_equally_likely_and_independent():
  op, _ = drawn(2)
  counts = np.bincount(op.ravel(), minlength=14)
  # 4,000 draws: a count is off by 5 deviations with probability 14 · 6e-7.
  assert abs(counts - 4000 / 14).max() < 5 * (4000 / 14) ** 0.5
  # Both operations are the same in 1 of 14 images: 143 ± 5·11.5.
  assert abs((op[:, 0] == op[:, 1]).sum() - 2000 / 14) < 58


def test_magnitudes_are_drawn_up_to_the_largest():
  op, value = drawn(1, magnitude=5)
  angles = value[op == ops.NUMBER['rotate']]
  assert -15 <= angles.min() < -13 and 13 < angles.max() <= 15
  factors = value[op == ops.NUMBER['brightness']]
  # 0.95 - 0.9·0.5 = 0.5 at the largest magnitude.
  assert 0.5 <= factors.min() < 0.52 and 0.92 < factors.max() <= 0.95
  # About 143 uniform numbers: their mean is off by 5·0.13/√143 with 6e-7.
  assert abs(factors.mean() - 0.725) < 0.055


def test_a_fixed_magnitude_is_the_same_for_all_images():
  op, value = drawn(1, magnitude=5, fixed=True)
  np.testing.assert_allclose(
    np.unique(value[op == ops.NUMBER['rotate']]), [-15, 15], rtol=1e-6
  )
  np.testing.assert_allclose(value[op == ops.NUMBER['color']], 0.5, rtol=1e-6)


def test_operations_are_applied_in_turn():
  image = picture(9, 8, 3)
  op = jnp.array([ops.NUMBER['shear_x'], ops.NUMBER['invert']])
  value = jnp.array([0.3, 1.0])
  expected = ops.transform(jnp.asarray(image), op[0], value[0])
  expected = ops.transform(expected, op[1], value[1])
  got = compiled(randaugment.transform_all)(image, op, value)
  np.testing.assert_allclose(got, expected, atol=1e-6)
  # Inverted after the shear, the pixels that were outside are white.
  assert (got[-1, -1] == 1).all()


def test_a_row_depends_on_its_own_key_alone():
  image = picture(8, 8, 1)
  results = many(randaugment.randaugment(), image, 16)
  key = jax.random.split(jax.random.key(7), 16)[5]
  alone = compiled(randaugment.randaugment())(key, image)
  np.testing.assert_allclose(results[5], alone, atol=1e-6)
  assert len({result.tobytes() for result in results}) > 8


@pytest.mark.parametrize('channels', [1, 3])
def test_images_stay_images(channels):
  results = many(randaugment.randaugment(3), picture(10, 12, channels), 64)
  assert results.shape == (64, 10, 12, channels)
  assert results.dtype == np.float32
  assert np.isfinite(results).all()
  assert results.min() >= 0 and results.max() <= 1


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    (dict(ops=0), 'ops=0'),
    (dict(ops=2.5), r'ops=2\.5'),
    (dict(ops=100), 'ops=100'),
    (dict(magnitude=11), 'magnitude=11'),
    (dict(magnitude=-1), 'magnitude=-1'),
    (dict(magnitude=float('nan')), 'magnitude=nan'),
  ],
)
def test_a_bad_value_is_refused_by_name(bad, message):
  with pytest.raises(InputError, match=message):
    randaugment.randaugment(**bad)
