"""Domain adaptation: two data sets joined as one.

The labelled images come from a source, the unlabelled ones from a target.
"""

import contextlib

import numpy as np

from ssljax.core import UNLABELLED
from ssljax.data import datasets
from ssljax.data.types import Dataset, Source
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
) -> Dataset:
  """Return the training images of both data sets and the target's test images.

  Args:
    source: name of the data set whose labels may be used.
    target: name of the data set to be tested on. The labels of its training
      images are left out.
    data_dir: as in `datasets.load`, for both.
    train_split: of both.
    test_split: of the target.
    image_size: of both; by default the larger size of the two.
    corrupt: as in `datasets.load`, for each.
    crop: whether training images are cropped at random, which is refused if
      they differ in size.

  Raises:
    InputError: a data set cannot be read, or their classes differ.
  """
  require(
    source != target,
    f'`target`={target}: is the `source` too; give another data set',
  )

  def load_both(image_size):
    how = dict(
      train_split=train_split,
      image_size=image_size,
      corrupt=corrupt,
      crop=crop,
    )
    with _named('source'):
      # The source's test images are not used, so it need not have any.
      first = datasets.load(source, data_dir, with_test=False, **how)
    with _named('target'):
      second = datasets.load(target, data_dir, test_split=test_split, **how)
    return first, second

  opened = load_both(image_size)
  for flag, dataset in zip(('source', 'target'), opened, strict=True):
    require(
      dataset.train.is_images,
      f'`{flag}`={dataset.name}: holds features, not images; give a data set '
      'of images',
    )
  require(
    all(dataset.train.crop is None for dataset in opened),
    '`augment`=crop: a `source` and a `target` whose images differ in size '
    'cannot be cropped at random; leave crop out',
  )
  sides = {side for dataset in opened for side in dataset.train.shape[:2]}
  if len(sides) > 1:
    opened = load_both(max(sides))
  return join(*opened)


@contextlib.contextmanager
def _named(flag: str):
  """Make errors name the parameter `flag` instead of `dataset`."""
  try:
    yield
  except InputError as error:
    message = error.marked.replace('`dataset`', f'`{flag}`')
    raise InputError(message) from error


def join(source: Dataset, target: Dataset) -> Dataset:
  """Join two data sets with equal classes, heights and widths.

  The training rows are the source's, followed by the target's without labels.
  If one of the two is in colour, the grey images of the other get three equal
  channels.
  """
  require(
    source.classes == target.classes,
    f'`target`={target.name}: its classes {_few(target.classes)} are not those '
    f'of `source`={source.name}, {_few(source.classes)}; give two data sets '
    'with the same class names in the same order',
  )
  first = len(source.train.labels)
  hidden = np.full(len(target.train.labels), UNLABELLED, np.int32)
  channels = max(source.train.shape[-1], target.train.shape[-1])
  shape = (*source.train.shape[:2], channels)

  def read(rows) -> np.ndarray:
    rows = np.asarray(rows)
    images = np.empty((len(rows), *shape), np.uint8)
    is_target = rows >= first
    for mask, part, start in (
      (~is_target, source.train, 0),
      (is_target, target.train, first),
    ):
      if mask.any():
        images[mask] = part.read(rows[mask] - start)  # broadcasts grey
    return images

  def read_test(rows) -> np.ndarray:
    return np.broadcast_to(target.test.read(rows), (len(rows), *shape))

  def digests() -> np.ndarray:
    of_source, of_target = source.train.digests, target.train.digests
    assert of_source and of_target  # as all images have them
    return np.concatenate([of_source(), of_target()])

  labels = np.concatenate([source.train.labels, hidden])
  return Dataset(
    f'{source.name}-{target.name}',
    Source(labels, shape, read, digests=digests),
    Source(target.test.labels, shape, read_test, digests=target.test.digests),
    source.classes,
    unlabelled_from=first,
    variant=', '.join(filter(None, (source.variant, target.variant))),
  )


def _few(classes: tuple[str, ...]) -> str:
  """Return the first class names and their number, for messages."""
  more = ', …' if len(classes) > 3 else ''
  return f'({", ".join(classes[:3])}{more}; {len(classes)})'
