"""Two data sets as one: labelled images of a source, others of a target."""

import contextlib

import numpy as np

from ssljax.core import UNLABELLED
from ssljax.data import datasets
from ssljax.errors import InputError, require


def load(
  source: str,
  target: str,
  data_dir: str | None = None,
  *,
  train_split: str = 'train',
  test_split: str | None = None,
  image_size: int | None = None,
  corrupt: int = 0,
  crop: bool = False,
) -> datasets.Dataset:
  """The training images of both, and the target's test images.

  Args:
    source: name of the data set whose labels may be used.
    target: name of the data set to be tested on; the labels of its training
      images are not in what is returned.
    data_dir: as in `datasets.load`, for both.
    train_split: of both.
    test_split: of the target.
    image_size: of both; the larger of the two if None.
    corrupt: as in `datasets.load`, for each.
    crop: training images are cropped at random; refused if they differ in size.

  Raises:
    InputError: one of them cannot be read, or their classes differ.
  """
  require(source != target, f'`target`={target}: is the `source`: give another')

  def both(image_size):
    how = dict(
      train_split=train_split,
      image_size=image_size,
      corrupt=corrupt,
      crop=crop,
    )
    with _named('source'):
      # It is not tested on: its training images stand in for test images.
      first = datasets.load(source, data_dir, test_split=train_split, **how)
    with _named('target'):
      second = datasets.load(target, data_dir, test_split=test_split, **how)
    return first, second

  opened = both(image_size)
  for flag, dataset in zip(('source', 'target'), opened, strict=True):
    require(
      dataset.train.dtype == np.uint8,
      f'`{flag}`={dataset.name}: is of points, not of images: give another',
    )
  require(
    all(dataset.train.crop is None for dataset in opened),
    '`augment`=crop: of a `source` and a `target` images that differ in size '
    'are not cropped: leave crop out',
  )
  sides = {side for dataset in opened for side in dataset.train.shape[:2]}
  if len(sides) > 1:
    opened = both(max(sides))
  return join(*opened)


@contextlib.contextmanager
def _named(flag: str):
  """Has an error speak of the flag that named the data set."""
  try:
    yield
  except InputError as error:
    said = error.marked.replace('`dataset`', f'`{flag}`')
    raise InputError(said) from error


def join(source: datasets.Dataset, target: datasets.Dataset):
  """One data set of two with equal classes, heights and widths.

  Its training rows are the source's, then the target's without their labels;
  grey images become colour ones where the others are.
  """
  require(
    source.classes == target.classes,
    f'`target`={target.name}: its classes {_few(target.classes)} are not those '
    f'of `source`={source.name}, {_few(source.classes)}: give two data sets '
    'of the same classes, named alike and in the same order',
  )
  first = len(source.train.labels)
  hidden = np.full(len(target.train.labels), UNLABELLED, np.int32)
  channels = max(source.train.shape[-1], target.train.shape[-1])
  shape = (*source.train.shape[:2], channels)

  def read(rows) -> np.ndarray:  # [B] -> [B, H, W, c]
    rows = np.asarray(rows)
    images = np.empty((len(rows), *shape), np.uint8)
    of_target = rows >= first
    for of, part, start in (
      (~of_target, source.train, 0),
      (of_target, target.train, first),
    ):
      if of.any():
        images[of] = part.read(rows[of] - start)  # grey is broadcast
    return images

  def read_test(rows) -> np.ndarray:
    return np.broadcast_to(target.test.read(rows), (len(rows), *shape))

  return datasets.Dataset(
    f'{source.name}-{target.name}',
    datasets.Source(np.concatenate([source.train.labels, hidden]), shape, read),
    datasets.Source(target.test.labels, shape, read_test),
    source.classes,
    unlabelled_from=first,
  )


def _few(classes: tuple[str, ...]) -> str:
  """The first classes by name, and how many there are."""
  more = ', …' if len(classes) > 3 else ''
  return f'({", ".join(classes[:3])}{more}; {len(classes)})'
