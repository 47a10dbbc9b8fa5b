"""Intervals contain the true value as often as they say: a simulation."""

import importlib.util
import pathlib

import numpy as np
import pytest

from ssljax import intervals

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def simulated():
  """Return the tool that prints the table of these simulations."""
  path = ROOT / 'tools/intervals.py'
  spec = importlib.util.spec_from_file_location('simulated', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize('accuracy', [0.6, 0.85, 0.97])
@pytest.mark.parametrize('images', [20, 60, 500])
def test_wilsons_interval_contains_the_accuracy(simulated, images, accuracy):
  rng = np.random.default_rng(0)
  # The standard error of 4,000 simulations is 0.3 %. Few images have few
  # possible intervals, so that the share cannot be 95 % exactly.
  share = simulated.wilson(images, accuracy, 4000, rng)
  assert 0.94 < share < (0.995 if images < 500 else 0.965)


@pytest.mark.parametrize('images', [20, 60, 500])
def test_the_paired_interval_contains_the_difference(simulated, images):
  rng = np.random.default_rng(0)
  share = simulated.difference(images, 0.85, 1000, rng)
  assert 0.93 < share and (images < 500 or share < 0.975)


@pytest.mark.parametrize('seeds', [3, 5])
def test_students_interval_contains_the_mean_over_seeds(simulated, seeds):
  share = simulated.student(seeds, 0.85, 500, np.random.default_rng(0))
  assert 0.92 < share < 0.98


@pytest.mark.parametrize('images', [60, 500])
def test_sets_contain_the_class_of_other_images(simulated, images):
  coverage, size = simulated.sets(images, 200, np.random.default_rng(0))
  assert 0.88 < coverage < 0.93 and 1 < size < 3


def test_a_temperature_lowers_the_calibration_error(simulated):
  before, after = simulated.errors(500, 10, np.random.default_rng(0))
  assert before > 0.15 and after < 0.08


def test_wilson_by_its_formula():
  low, high = intervals.wilson(8, 10)
  z, n, share = 1.959964, 10, 0.8
  centre = (share + z * z / (2 * n)) / (1 + z * z / n)
  half = (
    z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
  )
  assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-6)
  assert intervals.wilson(0, 0) == (0, 1)


def test_the_interval_contains_the_true_share_as_often_as_it_says():
  rng = np.random.default_rng(0)
  inside = []
  for hits in rng.binomial(60, 0.85, size=2000):
    low, high = intervals.wilson(hits, 60)
    inside.append(low <= 0.85 <= high)
  assert 0.93 < np.mean(inside) < 0.98
