"""The quality of pseudo-labels against loops over images."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ssljax.core import UNLABELLED, UsedLabels
from ssljax.training import quality
from ssljax.training.compiled import Program

CLASSES = 4


def some(seeds=2, images=50, seed=0):
  """Labels, weights, chosen images and truth at random."""
  rng = np.random.default_rng(seed)
  shape = seeds, images
  # A label outside the classes where nothing is used, as LLP has.
  weight = np.round(rng.random(shape), 2) * (rng.random(shape) < 0.7)
  label = np.where(weight > 0, rng.integers(0, CLASSES - 1, shape), 99)
  truth = rng.integers(-1, CLASSES, images)
  return UsedLabels(label, weight.astype(np.float32)), (
    rng.random(shape) < 0.8,
    truth,
  )


def numpy_quality(label, weight, chosen, truth):
  """Coverage, accuracy and balance of one seed, image by image."""
  total = known = right = count = 0.0
  votes = [0.0] * CLASSES
  for i in range(len(label)):
    if not chosen[i]:
      continue
    count, total = count + 1, total + weight[i]
    if weight[i]:
      votes[label[i]] += weight[i]
    if truth[i] >= 0:
      known += weight[i]
      right += weight[i] * (label[i] == truth[i])
  shares = [vote / total for vote in votes]
  entropy = -sum(r * math.log(r) for r in shares if r)
  return total / count, right / known, entropy / math.log(CLASSES)


def test_the_quality_equals_a_loop_over_images():
  used, (chosen, truth) = some()
  found = quality.measure(used, chosen, truth, CLASSES)
  for seed in range(2):
    wanted = numpy_quality(
      used.label[seed], used.weight[seed], chosen[seed], truth
    )
    np.testing.assert_allclose(
      [found[k][seed] for k in ('coverage', 'accuracy', 'balance')],
      wanted,
      rtol=1e-6,
    )


def test_the_quality_by_hand():
  # Of five images three are used, two of them rightly: classes 0, 0, 1.
  used = UsedLabels(
    np.array([[0, 0, 1, 2, 2]]), np.array([[1.0, 1, 1, 0, 0]], np.float32)
  )
  chosen, truth = np.ones([1, 5], bool), np.array([0, 1, 1, 2, 2])
  found = quality.measure(used, chosen, truth, 3)
  entropy = math.log(3) - 2 / 3 * math.log(2)
  assert found['coverage'] == [pytest.approx(3 / 5)]
  assert found['accuracy'] == [pytest.approx(2 / 3)]
  assert found['balance'] == [pytest.approx(entropy / math.log(3))]


@pytest.mark.parametrize('truth', [None, np.full(50, UNLABELLED)])
def test_without_a_truth_there_is_no_accuracy(truth):
  used, (chosen, _) = some()
  found = quality.measure(used, chosen, truth, CLASSES)
  assert set(found) == {'coverage', 'balance'}


def test_unused_pseudo_labels_have_neither_accuracy_nor_balance():
  used, (chosen, truth) = some()
  used = used._replace(weight=np.zeros_like(used.weight))
  found = quality.measure(used, chosen, truth, CLASSES)
  assert found == {
    'coverage': [0.0, 0.0],
    'balance': [None, None],
    'accuracy': [None, None],
  }


def test_one_class_has_balance_0_and_equal_ones_have_1():
  chosen = np.ones([2, 6], bool)
  label = np.array([[1] * 6, [0, 1, 2] * 2])
  used = UsedLabels(label, np.ones([2, 6], np.float32))
  found = quality.measure(used, chosen, None, 3)
  assert found['balance'] == [0.0, pytest.approx(1.0)]


def test_a_sample_is_of_hidden_images_and_the_same_for_any_other_seeds():
  hidden = np.random.default_rng(0).random([3, 400]) < 0.9
  chosen = quality.sample(hidden, 50)
  assert (chosen.sum(axis=1) == 50).all() and not (chosen & ~hidden).any()
  for i in range(3):
    alone = quality.sample(hidden[i : i + 1], 50)
    np.testing.assert_array_equal(alone[0], chosen[i])
  few = np.zeros([1, 400], bool)
  few[0, [3, 7]] = True
  np.testing.assert_array_equal(quality.sample(few, 50), few)
  # Neither the first rows nor evenly spaced ones.
  assert chosen[0].nonzero()[0].max() > 300


def dictator(state, rows, image):
  """Label by row number, weight by the first pixel."""
  pixel = image[:, 0, 0, 0]
  return UsedLabels((rows % tiny.CLASSES).astype(jnp.int32), pixel)


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('feed', ['resident', 'stream'])
def test_unlabelled_images_of_each_seed_are_measured(
  devices, feed, monkeypatch
):
  where = {'make_feed': tiny.streamed} if feed == 'stream' else {}
  job = tiny.make_job(
    'supervised', seeds=(0, 1), devices=devices, shared=False, **where
  )
  program = job.program
  method = program.method._replace(quality=dictator)
  program = Program(
    method, tiny.NET, program.data, program.mesh, seeds=2, batch=8
  )
  state, _ = tiny.initial(job)
  # Between two steps the first seed acquires the label of a row.
  row = job.splits[0].unlabelled[4]
  state = state.replace(labels=state.labels.at[0, row].set(1))
  found = program.measure_quality(state, job.splits)
  images, truth = tiny.images()
  for i, split in enumerate(job.splits):
    rows = np.setdiff1d(split.unlabelled, [row] if i == 0 else [])
    weight = images[rows, 0, 0, 0] / 255
    right = rows % tiny.CLASSES == truth[rows]
    np.testing.assert_allclose(found['coverage'][i], weight.mean(), rtol=1e-5)
    np.testing.assert_allclose(
      found['accuracy'][i], (weight * right).sum() / weight.sum(), rtol=1e-5
    )


def test_validation_images_are_not_measured():
  job = tiny.make_job('supervised', validation=9, shared=False)
  seen = []

  def spy(state, rows, image):
    jax.debug.callback(lambda rows: seen.extend(rows.tolist()), rows)
    return dictator(state, rows, image)

  program = job.program
  program.method = program.method._replace(quality=spy)
  state, _ = tiny.initial(job)
  program.measure_quality(state, job.splits)
  jax.effects_barrier()
  assert set(seen) == set(job.splits[0].unlabelled)
  assert not set(seen) & set(job.splits[0].validation)
