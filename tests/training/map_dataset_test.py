"""Functions of the state that are mapped over the images of a data set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ssljax.distributed import placement
from ssljax.training import map_dataset

BATCH = 8  # of the programs of `tiny`


def brightness(state, image, key):
  """The sum of the pixels of each image: another one for each row."""
  del state, key
  return {'sum': image.sum((1, 2, 3))}


def noise(state, image, key):
  """One random number for the whole batch: the key of the pass."""
  del state
  return jnp.tile(jax.random.uniform(key), len(image))


def sums():
  return tiny.images()[0].astype(np.float32).sum((1, 2, 3)) / 255


@pytest.fixture(scope='module', params=[1, 8])
def job(request):
  return tiny.make_job('supervised', devices=request.param)


@pytest.fixture(scope='module')
def initial(job):
  return tiny.initial(job)[0]


@pytest.mark.parametrize('count', [1, 7, 8, 9, 16, 61])
def test_outputs_have_the_order_of_the_rows_and_zeros_after_them(
  job, initial, count
):
  rows = np.random.default_rng(count).permutation(tiny.ROWS)[:count]
  mapped = job.program.map_dataset(brightness, job.program.data.train)
  found = np.asarray(mapped(initial, rows)['sum'])
  multiple = placement.row_multiple(job.program.mesh)
  padding = -count % multiple
  assert found.shape == (1, count + padding)
  np.testing.assert_allclose(found[0, :count], sums()[rows], rtol=1e-5)
  assert (found[0, count:] == 0).all()


def test_batches_of_equal_size_hold_little_padding():
  size = map_dataset.even_batch
  assert size(12, 512, devices=1) == 32
  assert size(541, 512, devices=1) == 288  # 2 batches, not 2 of 512
  assert size(541, 512, devices=64) == 320
  assert size(500, 512, devices=8) == size(513 * 512, 512, devices=8) == 512


@pytest.mark.parametrize('count', [1, 9, 61])
def test_batches_of_equal_size_change_no_output(
  job, initial, count, monkeypatch
):
  monkeypatch.setattr(map_dataset, '_EVEN', 2)
  rows = np.random.default_rng(count).permutation(tiny.ROWS)[:count]
  mapped = job.program.map_dataset(brightness, job.program.data.train)
  usual, even = (mapped(initial, rows, even=even) for even in (False, True))
  np.testing.assert_array_equal(even['sum'], usual['sum'])


@pytest.mark.parametrize('count', [1, 9, 61])
def test_outputs_in_place_stand_at_their_rows_and_elsewhere_zeros(
  job, initial, count
):
  rows = np.random.default_rng(count).permutation(tiny.ROWS)[:count]
  mapped = job.program.map_dataset(brightness, job.program.data.train)
  found = np.asarray(mapped(initial, rows, in_place=True)['sum'])
  expected = np.zeros(found.shape[1], np.float32)
  expected[rows] = sums()[rows]
  assert len(expected) >= tiny.ROWS
  np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_a_pass_has_one_key_and_another_step_or_seed_has_another(job, initial):
  mapped = job.program.map_dataset(noise, job.program.data.train)
  draw = lambda state: np.asarray(mapped(state, np.arange(tiny.ROWS)))[0]
  first = draw(initial)[: tiny.ROWS]
  # All eight batches have the same mask of dropout.
  assert len(set(first)) == 1
  assert (draw(initial)[: tiny.ROWS] == first).all()
  later = initial.replace(step=initial.step + 1)
  key = jax.random.wrap_key_data(jax.random.key_data(initial.key) + 1)
  others = [draw(later)[0], draw(initial.replace(key=key))[0]]
  assert len({first[0], *others}) == 3


def test_a_function_is_called_before_each_batch_and_may_end_the_pass(
  job, initial
):
  mapped = job.program.map_dataset(brightness, job.program.data.train)
  calls = []

  def before():
    calls.append(True)
    if len(calls) == 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    mapped(initial, np.arange(tiny.ROWS), before=before)
  assert len(calls) == 3
