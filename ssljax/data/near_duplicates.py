"""Near duplicates of images: the same picture, scaled, recompressed or cropped.

Two images are near duplicates if their perceptual hashes (pHash, 64 bits, of
the library imagehash) differ in at most 3 bits, and the values of their grey
thumbnails of 16x16 pixels by at most 8 of 255 levels in the mean. The second
test keeps different images apart that have few details, as drawings and digits.
A group holds all images that are connected by such pairs.

Only hashes of images whose contrast suffices are compared: the hash of a flat
image is noise. Letters: N images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image

BITS, LEVELS = 3, 8.0
SIDE = 16  # of a thumbnail
_CONTRAST = 4.0  # least standard deviation of a thumbnail, in levels
_BANDS = 4  # of 16 bits; two hashes that differ in 3 bits share one at least
_MOST = 64  # images of one band that are compared with one another
_SHOWN = 5  # groups that a message names
LARGEST = 200_000  # images of a set that is searched


class Look(NamedTuple):
  """Perceptual hash and thumbnail of an image."""

  hash: int  # 64 bits
  thumbnail: np.ndarray  # [SIDE, SIDE] uint8


def look(image: np.ndarray) -> Look:
  """Return the look of an image uint8 `[H, W, c]`."""
  import imagehash  # it imports SciPy, which takes seconds

  pixels = image[..., 0] if image.shape[-1] == 1 else image
  grey = PIL.Image.fromarray(pixels).convert('L')
  bits = imagehash.phash(grey).hash
  small = grey.resize((SIDE, SIDE), PIL.Image.Resampling.BILINEAR)
  packed = np.packbits(bits.ravel()).tobytes()
  return Look(int.from_bytes(packed, 'big'), np.asarray(small))


def groups(looks: Sequence[Look | None], digests: np.ndarray) -> np.ndarray:
  """Return one hash `[N]` uint64 for all images of a group.

  Args:
    looks: of the images; None of one that is compared with none.
    digests: `[N]` uint64 of the images' contents. Equal ones are a group, too,
      and the hash of a group is that of its first image.
  """
  from scipy import sparse
  from scipy.sparse import csgraph

  pairs = [*_equal(digests), *_near(looks)]
  first, second = np.array(pairs, int).reshape(-1, 2).T
  shape = len(digests), len(digests)
  graph = sparse.coo_array((np.ones(len(first)), (first, second)), shape)
  _, group = csgraph.connected_components(graph, directed=False)
  _, heads = np.unique(group, return_index=True)
  return digests[heads][group]


def _equal(digests: np.ndarray) -> list[tuple[int, int]]:
  """Return pairs of rows with equal hashes, each with the first one."""
  _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
  heads = first[inverse]
  return [
    (int(heads[i]), int(i))
    for i in np.flatnonzero(heads != np.arange(len(heads)))
  ]


def _near(looks: Sequence[Look | None]) -> list[tuple[int, int]]:
  """Return pairs of rows that are near duplicates."""
  found_looks = {
    row: own
    for row, own in enumerate(looks)
    if own is not None and own.thumbnail.std() >= _CONTRAST
  }
  rows = list(found_looks)
  if not 1 < len(rows) <= LARGEST:
    return []
  kept = list(found_looks.values())
  hashes = np.array([own.hash for own in kept], np.uint64)
  thumbnails = np.stack([own.thumbnail for own in kept]).astype(np.int16)
  found: set[tuple[int, int]] = set()
  for band in range(_BANDS):
    values = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
    order = np.argsort(values, kind='stable')
    ends = np.flatnonzero(np.diff(values[order])) + 1
    for part in np.split(order, ends):
      # Of many images in one band each is compared with the next ones only.
      for k in range(1, min(len(part), _MOST)):
        a, b = part[:-k], part[k:]
        bits = np.bitwise_count(hashes[a] ^ hashes[b])
        a, b = a[bits <= BITS], b[bits <= BITS]
        if len(a):
          apart = np.abs(thumbnails[a] - thumbnails[b]).mean(axis=(1, 2))
          near = apart <= LEVELS
          found.update(zip(a[near].tolist(), b[near].tolist(), strict=True))
  return [(rows[a], rows[b]) for a, b in sorted(found)]


def describe(groups: np.ndarray, digests: np.ndarray, names) -> list[str]:
  """Return a sentence on exact copies and one on near duplicates, if any.

  Args:
    groups: `[N]` of `groups`.
    digests: `[N]` of the images' contents.
    names: `[N]` of the images.
  """
  exact = _several(digests)
  near = [
    rows for rows in _several(groups) if len(set(digests[rows].tolist())) > 1
  ]
  said = []
  for kind, found in (('exact copies', exact), ('near duplicates', near)):
    if found:
      count = sum(map(len, found))
      said.append(
        f'{count} images are {kind} of one another, groups: {len(found)} '
        '(images to test on are held out group by group): '
        f'{_shown(found, names)}'
      )
  return said


def _several(keys: np.ndarray) -> list[list[int]]:
  """Return the rows of each key that several rows have."""
  by_key: dict[int, list[int]] = {}
  for row, key in enumerate(keys.tolist()):
    by_key.setdefault(key, []).append(row)
  return [rows for rows in by_key.values() if len(rows) > 1]


def _shown(found: list[list[int]], names) -> str:
  """Return the names of the first images of the first groups."""
  shown = '; '.join(
    ', '.join(str(names[row]) for row in rows[:4])
    + (f' and {len(rows) - 4} more' if len(rows) > 4 else '')
    for rows in found[:_SHOWN]
  )
  more = len(found) - _SHOWN
  return shown + (f'; and {more} more groups' if more > 0 else '')
