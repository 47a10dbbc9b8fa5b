"""The types of a data set: `Source` is one split, `Dataset` a pair of splits.

Letters: N rows of a split, B rows of one read, H x W x c the size of an image,
D the number of features.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Bytes of pixels that are kept in memory; more are decoded when they are read.
RESIDENT_BYTES = 4 * 2**30
MAX_CLASSES = 2**20  # of a data set; a larger number is taken for damage


class Source(NamedTuple):
  """The rows of one split, read by row number.

  A row is an image, or a vector of D features. Features are stored as float32
  images of shape (1, D, 1), so that every feed, batch and network handles both;
  `row_shape` is the shape that users see.
  """

  labels: np.ndarray  # [N] int32, the true classes, UNLABELLED where unknown
  shape: tuple[int, int, int]  # H, W, c of every row
  read: Callable[[Any], np.ndarray]  # rows [B] int -> dtype [B, H, W, c]
  # (rows [B], draws [B, T, 4] of `imagenet.window`) -> uint8 [B, H, W, c]: a
  # random window of each original image. None unless `load` was given `crop`.
  crop: Callable[[Any, np.ndarray], np.ndarray] | None = None
  dtype: Any = np.uint8  # uint8 for images, float32 for features
  names: np.ndarray | None = None  # [N] str, file names or ids, where known
  # () -> [N] uint64, hashes by which equal images are found, see `duplicates`:
  # of the encoded images of a TFDS set, of the pixels of others.
  digests: Callable[[], np.ndarray] | None = None
  # () -> [N] uint64, equal for near duplicates, which are held out together;
  # None where only equal images are.
  groups: Callable[[], np.ndarray] | None = None

  @property
  def is_images(self) -> bool:
    """True for images, False for features."""
    return self.dtype == np.uint8

  @property
  def row_shape(self) -> tuple[int, ...]:
    """(H, W, c) of an image, (D,) of a feature vector."""
    return self.shape if self.is_images else self.shape[1:2]


class Dataset(NamedTuple):
  """A training and a test split over the same C classes."""

  name: str
  train: Source
  test: Source  # without rows where there are no test images
  classes: tuple[str, ...]  # [C]
  # The first training row that may be used without its label; smaller ones are
  # only used labelled (the source images of domain adaptation).
  unlabelled_from: int = 0
  # A name such as 'CIFAR-10 (JPEG)' for a copy whose pixels differ from the
  # original's, '' for any other.
  variant: str = ''


class Images(NamedTuple):
  """N images to be predicted, read by row number."""

  names: Sequence[str]  # [N]
  given: Sequence[str | None]  # [N], class names where a label was given
  # rows -> (images [K, ...], {row: reason}); the K rows that can be read
  read: Callable[[Sequence[int]], tuple[np.ndarray, dict[int, str]]]
  # Classes by row, of predictions by models that were not trained on the label.
  unseen: Mapping[int, int] = {}
