import numpy as np
import pytest

from ssljax.core import UNLABELLED
from ssljax.data import splits
from ssljax.errors import InputError

TRUTH = np.arange(60, dtype=np.int32) % 3


def make_split(per_class=4, seed=0, truth=TRUTH, classes=3, **more):
  return splits.draw_split(
    truth, classes, per_class=per_class, seed=seed, **more
  )


@pytest.mark.parametrize('per_class', [1, 7, 20])
def test_every_class_has_exactly_k_labels_and_they_are_true(per_class):
  split = make_split(per_class)
  known = split.labels[split.labelled]
  assert np.bincount(known).tolist() == [per_class] * 3
  np.testing.assert_array_equal(known, TRUTH[split.labelled])


def test_a_split_is_a_function_of_the_seed_alone():
  assert make_split(seed=3).digest == make_split(seed=3).digest
  assert make_split(seed=3).digest != make_split(seed=4).digest
  assert set(make_split(seed=3).labelled) != set(make_split(seed=4).labelled)


def test_fewer_labels_are_a_subset_of_more():
  assert set(make_split(3).labelled) < set(make_split(5).labelled)


def test_all_labels_every_row():
  np.testing.assert_array_equal(make_split(None).labels, TRUTH)


def test_the_rest_excludes_the_labelled_and_all_includes_them():
  split = make_split()
  assert not set(split.labelled) & set(split.unlabelled)
  assert len(split.unlabelled) == 60 - 12
  assert len(make_split(unlabelled='all').unlabelled) == 60


def test_a_number_of_unlabelled_rows_is_drawn_from_the_rest():
  split = make_split(count=10)
  assert len(split.unlabelled) == 10
  assert set(split.unlabelled) < set(make_split().unlabelled)
  # More rows contain fewer, and the labels do not depend on it.
  assert set(split.unlabelled) < set(make_split(count=20).unlabelled)
  np.testing.assert_array_equal(split.labels, make_split().labels)


def test_a_number_may_be_drawn_from_all_rows_the_labelled_ones_too():
  split = make_split(None, unlabelled='all', count=40)
  assert len(split.labelled) == 60 and len(split.unlabelled) == 40


def test_the_unlabelled_rows_may_be_confined_to_some():
  among = np.arange(60) >= 50
  labelled = set(make_split().labelled)
  for unlabelled, expected in (
    ('all', set(range(50, 60))),
    ('rest', set(range(50, 60)) - labelled),
  ):
    split = make_split(unlabelled=unlabelled, among=among)
    assert set(split.unlabelled) == expected
    assert set(split.labelled) == labelled


def test_validation_rows_are_neither_labelled_nor_seen_and_shared_by_seeds():
  for seen in (dict(), dict(unlabelled='all'), dict(count=5)):
    split = make_split(validation=9, **seen)
    held_out = set(split.validation)
    assert len(held_out) == 9
    assert not held_out & (set(split.labelled) | set(split.unlabelled))
    np.testing.assert_array_equal(
      split.validation, make_split(seed=5, validation=9).validation
    )


def test_held_out_rows_of_a_source_are_not_seen():
  # The first 40 rows are the source of a domain adaptation: only the others are
  # drawn from, but all are seen, apart from those held out.
  split = make_split(validation=9, among=np.arange(60) >= 40, count=5)
  held_out = set(split.validation)
  assert min(held_out) < 40 <= max(held_out)
  seen = set(range(40)) | set(split.labelled) | set(split.unlabelled)
  assert set(np.flatnonzero(split.seen(40))) == seen - held_out
  assert len(seen - held_out) < 60 - 9


def test_rows_without_truth_are_seen_but_never_labelled():
  truth = np.concatenate([TRUTH, np.full(30, UNLABELLED, np.int32)])
  split = make_split(None, truth=truth)
  assert split.labelled.max() < 60
  assert set(split.unlabelled) == set(range(60, 90))


def test_the_digest_sees_every_field():
  split = make_split(validation=9)
  labels = split.labels.copy()
  labels[split.labelled[0]] = UNLABELLED
  admitted = split.admitted.copy()
  admitted[split.unlabelled[0]] = False
  changed = [
    split._replace(labels=labels),
    split._replace(admitted=admitted),
    split._replace(validation=split.validation[1:]),
    split._replace(seed=9),
  ]
  assert len({s.digest for s in [split, *changed]}) == 5


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (
      dict(per_class=21),
      "labels=21: class '0' has 20 labelled images; give at most 20, "
      'labels=up_to:21 to take fewer .*, or labels=all',
    ),
    (
      dict(per_class=20, validation=9),
      "labels=20: class '.' has 1. labelled images beside the 9 labelled "
      'images that are held out; give',
    ),
    (dict(per_class=0), 'labels=0: give at least 1 label'),
    (dict(per_class=0, at_most=True), 'labels=up_to:0: give at least 1 label'),
    (dict(classes=4), "labels=4: class '3' has no labelled image; label at"),
    (dict(per_class=None, classes=4), "labels=all: class '3' has no labelled"),
    (
      dict(at_most=True, classes=list('abcd')),
      "labels=up_to:4: class 'd' has no labelled image; label at least one",
    ),
    (dict(classes=2), 'row 2 has label 2, outside the 2 classes'),
    (dict(truth=TRUTH[:0]), 'empty'),
    (dict(truth=TRUTH - 2), 'outside the 3 classes'),
    (
      dict(count=49),
      'unlabelled=49: 48 images are available; give at most 48, or '
      'unlabelled=rest',
    ),
    (
      dict(unlabelled='all', count=61),
      'unlabelled=all:61: 60 images are available; give at most all:60',
    ),
    (
      dict(per_class=None, count=1),
      'unlabelled=1: 0 images are available; give unlabelled=rest',
    ),
    (dict(validation=60), 'validation=60: 60 images .*; give 0 to 59'),
    (dict(validation=-1), 'validation=-1: 60 images'),
    (
      dict(truth=np.array([0, -1], np.int32), validation=1),
      'validation=1: 1 images have a label; give 0$',
    ),
  ],
)
def test_impossible_splits_are_refused_by_name(arguments, message):
  with pytest.raises(InputError, match=message):
    make_split(**arguments)


RARE = np.repeat([0, 1, 2, 3], [60, 18, 3, 1]).astype(np.int32)


def test_rarer_classes_may_have_fewer_labels():
  draw = lambda count: make_split(count, truth=RARE, classes=4, at_most=True)
  split = draw(5)
  known = split.labels[split.labelled]
  np.testing.assert_array_equal(np.bincount(known), [5, 5, 3, 1])
  np.testing.assert_array_equal(known, RARE[split.labelled])
  # Fewer labels are a subset of more, and where all classes have enough the
  # split is that of the plain number.
  assert set(draw(2).labelled) < set(split.labelled) < set(draw(9).labelled)
  plain = make_split(3, truth=RARE[:-1], classes=3)
  some = make_split(3, truth=RARE[:-1], classes=3, at_most=True)
  assert plain.digest == some.digest
  np.testing.assert_array_equal(draw(99).labels, RARE)


def test_the_labels_of_each_class_are_said():
  say = lambda count, names='abcd', truth=RARE: splits.describe_labels(
    make_split(count, truth=truth, classes=list(names), at_most=True), names
  )
  assert say(1) == '1 of each class'
  assert say(5) == 'up to 5 of each class, fewer of d (1), c (3)'
  assert say(None) == 'up to 60 of each class, fewer of d (1), c (3), b (18)'
  many = np.repeat(np.arange(8), [9, 1, 1, 1, 1, 2, 2, 2]).astype(np.int32)
  said = say(9, 'abcdefgh', many)
  assert said.endswith('b (1), c (1), d (1), e (1), f (2) and 2 more classes')


def test_each_class_is_drawn_in_an_order_of_its_own():
  # Row 3 i + c is image i of class c: drawn in one order, all classes would be
  # labelled at the same places.
  labelled = make_split(8).labelled
  places = {label: labelled[labelled % 3 == label] // 3 for label in range(3)}
  assert len({tuple(places[label]) for label in range(3)}) == 3


def test_the_unlabelled_rows_depend_on_the_seed():
  # Of all rows, so that they do not depend on the seed by the labelled ones.
  drawn = [
    tuple(make_split(seed=seed, unlabelled='all', count=20).unlabelled)
    for seed in range(3)
  ]
  assert len(set(drawn)) == 3


def test_the_description_names_rows_labels_and_hash():
  split = make_split(1, validation=2)
  said = splits.describe(split)
  assert said['hash'] == split.digest
  assert {int(r): c for r, c in said['labelled'].items()} == {
    int(row): int(TRUTH[row]) for row in split.labelled
  }
  assert said['validation'] == split.validation.tolist()
