from collections import Counter

import chex
import jax
import numpy as np
import pytest
import tiny

from ssljax.augment import preprocess
from ssljax.core import UNLABELLED, BatchSpec
from ssljax.data import datasets, sampling, splits
from ssljax.data import feeds as feeds_lib
from ssljax.distributed import placement
from ssljax.errors import InputError

TRUTH = np.arange(60, dtype=np.int32) % 3
SPLIT = splits.draw_split(TRUTH, 3, per_class=4, seed=0)  # 12 and 48 rows


def epoch(sampler, number):
  steps = sampler.epoch_steps
  return np.stack([sampler.rows(number * steps + i) for i in range(steps)])


def test_the_first_rows_are_labelled_and_the_others_admitted():
  rows = epoch(sampling.Sampler(BatchSpec(5, 8), SPLIT), 0)
  assert rows.shape == (6, 13) and rows.dtype == np.int32
  assert set(rows[:, :5].ravel()) <= set(SPLIT.labelled)
  assert set(rows[:, 5:].ravel()) <= set(SPLIT.unlabelled)


def test_an_epoch_visits_each_unlabelled_row_once():
  sampler = sampling.Sampler(BatchSpec(5, 8), SPLIT)
  for number in (0, 3):
    others = epoch(sampler, number)[:, 5:].ravel()
    assert sorted(others) == sorted(SPLIT.unlabelled)


def test_an_epoch_may_visit_the_labelled_rows_too():
  sampler = sampling.Sampler(BatchSpec(5, 6, include_labelled=True), SPLIT)
  for number in (0, 2):
    others = epoch(sampler, number)[:, 5:].ravel()
    assert sorted(others) == list(range(60))


def test_labelled_rows_come_round_evenly():
  # 6 steps of 5 are two and a half rounds of the 12 labelled rows.
  counts = Counter(
    epoch(sampling.Sampler(BatchSpec(5, 8), SPLIT), 0)[:, :5].ravel()
  )
  assert set(counts) == set(SPLIT.labelled)
  assert set(counts.values()) == {2, 3}


def test_without_an_unlabelled_part_an_epoch_is_of_the_labelled_rows():
  sampler = sampling.Sampler(BatchSpec(4), SPLIT)
  assert sampler.epoch_steps == 3
  assert sorted(epoch(sampler, 2).ravel()) == sorted(SPLIT.labelled)


def test_rows_are_a_function_of_split_stage_and_step():
  sampler = sampling.Sampler(BatchSpec(5, 8), SPLIT)
  again = sampling.Sampler(BatchSpec(5, 8), SPLIT)
  # Asked for in another order, the rows are the same.
  later = [again.rows(step) for step in (17, 3, 30)]
  np.testing.assert_array_equal(
    later, [sampler.rows(step) for step in (17, 3, 30)]
  )
  assert not np.array_equal(sampler.rows(0), sampler.rows(sampler.epoch_steps))
  other_stage = sampling.Sampler(BatchSpec(5, 8), SPLIT, stage=1)
  assert not np.array_equal(sampler.rows(0), other_stage.rows(0))
  other_seed = sampling.Sampler(BatchSpec(5, 8), SPLIT._replace(seed=1))
  assert not np.array_equal(sampler.rows(0), other_seed.rows(0))


PARTS = {
  'labelled': (BatchSpec(5, 8), slice(0, 5)),
  'unlabelled': (BatchSpec(5, 8), slice(5, 13)),
  'labelled alone': (BatchSpec(4), slice(0, 4)),
  'balanced': (BatchSpec(6, 8, classes=3), slice(0, 6)),
  'with the labelled': (
    BatchSpec(5, 8, include_labelled=True),
    slice(5, 13),
  ),
}


@pytest.mark.parametrize(('batch_spec', 'part'), PARTS.values(), ids=PARTS)
def test_each_part_of_a_batch_is_of_another_order_in_each_epoch_and_seed(
  batch_spec, part
):
  epochs = []
  for seed in range(2):
    sampler = sampling.Sampler(batch_spec, SPLIT._replace(seed=seed))
    epochs += [epoch(sampler, number)[:, part] for number in range(3)]
  # 2 seeds of 3 epochs; the rows of the split are the same ones.
  assert len({rows.tobytes() for rows in epochs}) == 6


def test_the_second_part_of_a_batch_can_be_drawn_from_the_labelled_rows():
  sampler = sampling.Sampler(BatchSpec(6, 8, 3, from_labelled=True), SPLIT)
  rows = epoch(sampler, 0)
  assert set(rows.ravel().tolist()) <= set(SPLIT.labelled.tolist())
  # A shuffle: no row twice in an epoch.
  second = rows[:, 6:].ravel()
  assert len(np.unique(second)) == len(second)
  assert sampler.epoch_steps == len(SPLIT.labelled) // 8
  many = BatchSpec(6, len(SPLIT.labelled) + 1, 3, from_labelled=True)
  with pytest.raises(InputError, match='labelled images; give a smaller one'):
    sampling.Sampler(many, SPLIT)


@pytest.mark.parametrize('total', [47, 48, 49])
def test_an_epoch_with_multiplicity_ends_with_a_full_batch(total):
  # Batches of 8: 47 and 48 rows are 6 of them, 49 are 7.
  multiplicity = np.zeros(60, int)
  multiplicity[SPLIT.unlabelled] = 1
  multiplicity[SPLIT.unlabelled[0]] += total - 48
  sampler = sampling.Sampler(BatchSpec(5, 8), SPLIT, multiplicity=multiplicity)
  assert sampler.epoch_steps == (7 if total == 49 else 6)
  counts = Counter(epoch(sampler, 0)[:, 5:].ravel())
  assert all(counts[row] >= multiplicity[row] for row in range(60))


def test_an_epoch_drops_what_does_not_fill_a_batch():
  # 48 rows in batches of 7 are 6 and a remainder of 6.
  sampler = sampling.Sampler(BatchSpec(5, 7), SPLIT)
  assert sampler.epoch_steps == 6
  others = epoch(sampler, 1)[:, 5:].ravel()
  assert len(set(others)) == 42
  assert sampling.Sampler(BatchSpec(5), SPLIT).epoch_steps == 2  # 12 rows


@pytest.mark.parametrize(
  ('batch_spec', 'flag'),
  [
    (BatchSpec(13, 8), 'batch_labelled=13'),
    (BatchSpec(4, 49), 'batch_unlabelled=49'),
  ],
)
def test_a_batch_larger_than_the_set_is_refused(batch_spec, flag):
  with pytest.raises(InputError, match=flag):
    sampling.Sampler(batch_spec, SPLIT)


def make_source(images):
  return datasets.Source(
    np.zeros(len(images), np.int32), images.shape[1:], lambda rows: images[rows]
  )


def test_both_feeds_bring_the_same_rows_and_images():
  images, _ = tiny.images()
  place = placement.Placer(placement.make_mesh([1]))
  sampler = sampling.Sampler(tiny.DRAW, tiny.make_splits()[0])
  rows_of = lambda call: sampler.rows(call[0])[None]
  calls = [(i, i + 1) for i in range(7)]
  feeds = [
    feeds_lib.resident(images, place),
    feeds_lib.stream(make_source(images), place, threads=2),
  ]
  seen = []
  for feed in feeds:
    fetched = list(feed.batches(rows_of, calls))
    pick = jax.vmap(feed.gather, (None if feed.pixels_are_shared else 0, 0))
    seen.append([(pick(pixels, rows), rows) for pixels, rows in fetched])
  chex.assert_trees_all_equal(*seen)
  np.testing.assert_array_equal(seen[0][3][1][0], sampler.rows(3))


def test_a_row_is_augmented_alike_in_any_batch():
  images, _ = tiny.images()
  place = placement.Placer(placement.make_mesh([1]))
  feed = feeds_lib.resident(images, place)
  read = feeds_lib.reader(feed, preprocess.identity(), tiny.brighten)
  source, key = (images, ()), jax.random.key(3)
  whole = read(source, np.arange(10, dtype=np.int32), key)
  part = read(source, np.array([7, 2], np.int32), key)
  chex.assert_trees_all_close(part, whole[np.array([7, 2])], rtol=1e-6)
  assert not np.allclose(
    part, read(source, np.array([7, 2]), jax.random.key(4))
  )


def test_an_error_while_reading_ahead_reaches_the_loop():
  def broken(rows):
    raise InputError('corrupt: image 3 is broken')

  source = datasets.Source(np.zeros(9, np.int32), (4, 4, 1), broken)
  feed = feeds_lib.stream(source, placement.Placer(placement.make_mesh([1])))
  with pytest.raises(InputError, match='image 3'):
    list(feed.batches(lambda call: np.zeros([1, 4], np.int32), [(0, 1)]))


def crop_source():
  """Images that show which row they are and how they were cropped."""
  labels = np.zeros(60, np.int32)
  read = lambda rows: np.repeat(rows, 4).reshape(-1, 2, 2, 1).astype(np.uint8)

  def crop(rows, draws):
    images = read(rows)
    images[:, 1, :, 0] = 256 * draws[:, 0, :2]
    return images

  return datasets.Source(labels, (2, 2, 1), read, crop)


def streamed(sampler, calls):
  """Pixels and rows of each call, as arrays, cropped at random."""
  place = placement.Placer(placement.make_mesh([1]))
  feed = feeds_lib.stream(crop_source(), place, threads=2)
  fetched = feed.batches(
    lambda call: sampling.rows_of_call([sampler], call),
    calls,
    lambda call: sampling.rng_words_of_call([sampler], call),
  )
  return [jax.device_get(pair) for pair in fetched]


def test_a_resumed_stream_sees_the_same_crops():
  sampler = sampling.Sampler(BatchSpec(5, 8), SPLIT)
  calls = [(i, i + 1) for i in range(9)]
  whole = streamed(sampler, calls)
  chex.assert_trees_all_equal(streamed(sampler, calls[4:]), whole[4:])
  # Several steps of one call are as if each were its own.
  ((pixels, rows),) = streamed(sampler, [(0, 9)])
  chex.assert_trees_all_equal(
    (list(pixels), list(rows)), tuple(map(list, zip(*whole, strict=True)))
  )


def test_an_image_is_cropped_anew_in_every_step_seed_and_stage():
  sampler = sampling.Sampler(BatchSpec(12, 48), SPLIT)
  others = [
    sampling.Sampler(BatchSpec(12, 48), SPLIT, stage=1),
    sampling.Sampler(BatchSpec(12, 48), SPLIT._replace(seed=1)),
  ]
  seen = set()
  for which, call in [(sampler, (0, 1)), (sampler, (1, 2))] + [
    (other, (0, 1)) for other in others
  ]:
    ((pixels, rows),) = streamed(which, [call])
    row = pixels[0, rows[0] == SPLIT.unlabelled[0]]
    assert row[0, 0, 0, 0] == SPLIT.unlabelled[0]
    seen.add(tuple(row[0, 1, :, 0]))
  # Two pairs of bytes agree with chance 2^-16.
  assert len(seen) == 4


def test_a_row_that_is_repeated_in_a_step_is_cropped_alike():
  rows = np.array([[3, 7, 3], [7, 7, 3]])
  words = np.array([[0, 12, 5], [1, 12, 5]])
  draws = feeds_lib.window_draws(rows, words)
  assert draws.shape == (2, 3, 10, 4)
  assert (draws >= 0).all() and (draws < 1).all()
  np.testing.assert_array_equal(draws[0, 0], draws[0, 2])
  np.testing.assert_array_equal(draws[1, 0], draws[1, 1])
  for one, other in [((0, 0), (0, 1)), ((0, 0), (1, 2)), ((0, 1), (1, 0))]:
    assert not np.array_equal(draws[one], draws[other])


def test_without_words_the_centre_is_read():
  place = placement.Placer(placement.make_mesh([1]))
  feed = feeds_lib.stream(crop_source(), place)
  rows = np.array([4, 9], np.int32)
  ((pixels, _),) = feed.batches(lambda call: rows, [0])
  np.testing.assert_array_equal(pixels[:, 1, 1, 0], rows)


def test_pixels_are_augmented_before_and_after_the_preprocessing():
  images = np.full((3, 2, 2, 1), 51, np.uint8)  # 1/5
  place = placement.Placer(placement.make_mesh([1]))
  feed = feeds_lib.resident(images, place)
  double = preprocess.Preprocess(None, lambda fitted, image: 2 * image)
  add = lambda key, image: image + 1
  drawn = lambda key, image: image * 0 + jax.random.uniform(key)
  read = lambda *chains: feeds_lib.reader(feed, double, *chains)(
    (images, ()), np.array([1, 2]), jax.random.key(0)
  )
  # 2/5 + 1, 2 (1/5 + 1), and 2 (1/5 + 1) + 1.
  for chains, expected in [
    ((add,), 1.4),
    ((None, add), 2.4),
    ((add, add), 3.4),
  ]:
    np.testing.assert_allclose(read(*chains), expected, rtol=1e-6)
  before, after = read(None, drawn) / 2, read(drawn)
  # A key for each row and each of the two.
  assert len({float(x[0, 0, 0]) for x in (*before, *after)}) == 4


BALANCED = BatchSpec(9, 8, classes=3)


def test_a_balanced_batch_has_as_many_of_each_class():
  rows = epoch(sampling.Sampler(BALANCED, SPLIT), 0)
  assert rows.shape == (6, 17)
  np.testing.assert_array_equal(
    TRUTH[rows[:, :9]], np.broadcast_to([0, 0, 0, 1, 1, 1, 2, 2, 2], (6, 9))
  )
  assert set(rows[:, :9].ravel()) == set(SPLIT.labelled)
  # The other part is the one of an unbalanced batch.
  plain = epoch(sampling.Sampler(BatchSpec(5, 8), SPLIT), 0)
  np.testing.assert_array_equal(rows[:, 9:], plain[:, 5:])


def test_each_class_is_a_shuffled_queue_of_its_own():
  # 3 of 4 rows per step: any 4 in a row of a class's queue are all different,
  # counted from a multiple of 4, also across the epochs of 6 steps.
  sampler = sampling.Sampler(BALANCED, SPLIT)
  rows = np.concatenate([epoch(sampler, number) for number in range(3)])
  for label in range(3):
    queue = rows[:, 3 * label : 3 * label + 3].ravel()
    assert len(queue) == 54
    for start in range(0, 52, 4):
      assert len(set(queue[start : start + 4])) == 4
  ranks = rows[:, :9].reshape(18, 3, 3) // 3  # row 3 i + c is the i-th of c
  assert not np.array_equal(ranks[:, 0], ranks[:, 1])


def test_images_of_a_class_with_too_few_repeat_within_the_batch():
  sampler = sampling.Sampler(BatchSpec(30, 8, classes=3), SPLIT)  # 10 of each 4
  counts = Counter(sampler.rows(0)[:30])
  assert set(counts) == set(SPLIT.labelled)
  assert set(counts.values()) == {2, 3}


def test_a_balanced_batch_alone_has_at_least_one_step_per_epoch():
  sampler = sampling.Sampler(BatchSpec(30, classes=3), SPLIT)
  assert sampler.epoch_steps == 1
  assert not np.array_equal(sampler.rows(0), sampler.rows(1))


def test_classes_of_unequal_size_each_come_round_evenly():
  truth = np.repeat([0, 1], [5, 50]).astype(np.int32)
  split = splits.draw_split(truth, 2, per_class=None, seed=0, unlabelled='all')
  sampler = sampling.Sampler(BatchSpec(20, 5, classes=2), split)
  rows = np.concatenate([epoch(sampler, number) for number in range(2)])
  counts = Counter(rows[:, :20].ravel())  # 22 steps of 10 of each class
  assert {counts[row] for row in range(5)} == {44}
  assert {counts[row] for row in range(5, 55)} == {4, 5}


def test_a_class_without_a_labelled_image_is_refused():
  labels = np.where(TRUTH == 1, UNLABELLED, TRUTH)
  with pytest.raises(InputError, match='class 1 has no labelled image'):
    sampling.Sampler(BALANCED, SPLIT._replace(labels=labels))


def test_a_balanced_batch_must_divide_by_the_classes():
  with pytest.raises(InputError, match='batch_per_class'):
    sampling.Sampler(BatchSpec(8, 8, classes=3), SPLIT)


def test_class_aware_sampling_draws_all_classes_and_their_rows_equally_often():
  labels = np.full(60, UNLABELLED, np.int32)
  labels[:9], labels[9:12], labels[12] = 0, 1, 3  # none of class 2
  split = SPLIT._replace(labels=labels, admitted=labels == UNLABELLED)
  spec = BatchSpec(7, 8, class_aware=True)
  sampler = sampling.Sampler(spec, split)
  count = 9 * 3 * 7  # steps, over many epochs
  rows = [sampler.rows(step)[:7] for step in range(count)]
  drawn = Counter(np.concatenate(rows).tolist())
  each = count * 7 // 3
  assert drawn == {
    row: each // of_class
    for of_class, part in ((9, range(9)), (3, range(9, 12)), (1, [12]))
    for row in part
  }
  # A step begins and ends within a shuffle of the classes.
  for step in range(0, count, 10):
    of_step = Counter(labels[rows[step]].tolist())
    assert max(of_step.values()) - min(of_step.values()) <= 2
  # The order is a function of the step, of the seed and of the stage.
  again = sampling.Sampler(spec, split)
  np.testing.assert_array_equal(again.rows(50)[:7], rows[50])
  for other in (
    sampling.Sampler(spec, split._replace(seed=1)),
    sampling.Sampler(spec, split, stage=1),
  ):
    assert not np.array_equal(other.rows(50)[:7], rows[50])
