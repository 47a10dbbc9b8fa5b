"""The values of images that a learner trains on: pixels, or features.

Both kinds have `shape` of a row, and `read(entries)`, which returns the rows
`[M, *shape]` of images and `[M]` bool: there is a row.
"""

from collections.abc import Collection, Sequence
import hashlib
import os
import pathlib

import numpy as np

from ssljax.active.page import images as images_lib
from ssljax.errors import InputError, require

_MAX_SIDE = 32  # of an image that is trained on


class Pixels:
  """The decoded images, in a file that is made as they are asked for."""

  def __init__(self, folder: pathlib.Path, root: pathlib.Path, shape):
    """Open the files of images `[H, W, c]`, or make them."""
    self.shape, self._root = tuple(shape), root
    self._row = int(np.prod(self.shape))
    name = 'x'.join(map(str, self.shape))
    flags = os.O_RDWR | os.O_CREAT
    self._pixels = os.open(folder / f'pixels.{name}', flags, 0o600)
    self._marks = os.open(folder / f'pixels.{name}.marks', flags, 0o600)

  def read(
    self, entries: Sequence[images_lib.Entry]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels `[M, H, W, c]` uint8, and `[M]` bool: it can be decoded."""
    pixels = np.zeros((len(entries), *self.shape), np.uint8)
    good = np.zeros(len(entries), bool)
    for k, entry in enumerate(entries):
      mark = os.pread(self._marks, 8, 8 * entry.id)
      digest = hashlib.blake2b(entry.stamp.encode(), digest_size=7).digest()
      if mark[:7] != digest or mark[7:] not in (b'+', b'-'):
        good[k] = self._decode(entry, pixels[k])
        os.pwrite(self._pixels, pixels[k].tobytes(), entry.id * self._row)
        mark = digest + (b'+' if good[k] else b'-')
        os.pwrite(self._marks, mark, 8 * entry.id)
      elif mark[7:] == b'+':
        content = os.pread(self._pixels, self._row, entry.id * self._row)
        pixels[k] = np.frombuffer(content, np.uint8).reshape(self.shape)
        good[k] = True
    return pixels, good

  def _decode(self, entry: images_lib.Entry, out: np.ndarray) -> bool:
    from ssljax.data import decode

    try:
      content = images_lib.read(self._root, entry.path)
      out[:] = decode.centre(content, self.shape, self.shape[0])
    except Exception:  # codecs raise many kinds; the page tells the reason
      return False
    return True


def shape_of(
  root: pathlib.Path, entries: Sequence[images_lib.Entry], side: int | None
) -> tuple[int, int, int]:
  """Return the shape of the images to train on, from some of the files."""
  import PIL.Image

  sides, colours = [], False
  for entry in entries:
    try:
      with PIL.Image.open(root / entry.path) as image:
        sides.append(min(image.size))
        if image.mode not in ('1', 'L', 'LA', 'I', 'I;16') and not colours:
          pixels = np.asarray(image.convert('RGB').resize((64, 64)))
          colours = np.ptp(pixels, axis=-1).max() > 0
    except Exception:  # Pillow's parsers raise many kinds
      continue
  chosen = side or min(_MAX_SIDE, int(np.median(sides or [_MAX_SIDE])))
  return chosen, chosen, 3 if colours else 1


class Features:
  """Rows of a file of `ssljax embed`, by file name."""

  def __init__(self, path: str):
    """Read the file.

    Raises:
      InputError: it cannot be read, or has no features with file names.
    """
    parts = 'train', 'test'
    found = _arrays(path, [n for p in parts for n in (p, f'{p}_files')])
    kept = [p for p in parts if {p, f'{p}_files'} <= found.keys()]
    self._parts = [found[part] for part in kept]
    pairs = list(zip(kept, self._parts, strict=True))
    require(
      bool(kept)
      and all(x.ndim == 2 and x.shape[1] for x in self._parts)
      and all(found[f'{part}_files'].dtype.kind == 'U' for part in kept),
      f'`features`={path}: has no features with file names: write it with '
      'ssljax embed --images',
    )
    sizes = [(x.shape[:1], found[f'{p}_files'].shape) for p, x in pairs]
    widths = {x.shape[1] for x in self._parts}
    require(
      len(widths) == 1 and all(rows == names for rows, names in sizes),
      f'`features`={path}: rows and file names, or the widths of its parts, '
      'differ: write it with ssljax embed --images',
    )
    largest = np.finfo(np.float32).max
    require(
      all(
        x.dtype.kind == 'f' and (np.abs(x) <= largest).all()
        for x in self._parts
      ),
      f'`features`={path}: has values that are not finite float32 numbers: '
      'write it with ssljax embed --images',
    )
    self._place = {
      str(name): (k, row)
      for k, part in enumerate(kept)
      for row, name in enumerate(found[f'{part}_files'])
    }
    require(
      len(self._place) == sum(map(len, self._parts)),
      f'`features`={path}: names a file twice: write it with ssljax embed '
      '--images',
    )
    self.shape = self._parts[0].shape[1:]

  @property
  def names(self) -> Collection[str]:
    """The files that have a row."""
    return self._place.keys()

  def read(
    self, entries: Sequence[images_lib.Entry]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Return features `[M, D]` float32, and `[M]` bool: there is a row."""
    rows = np.zeros((len(entries), *self.shape), np.float32)
    good = np.zeros(len(entries), bool)
    for k, entry in enumerate(entries):
      if entry.path in self._place:
        part, row = self._place[entry.path]
        rows[k], good[k] = self._parts[part][row], True
    return rows, good


def _arrays(path: str, names: Sequence[str]) -> dict[str, np.ndarray]:
  from ssljax.data import npz

  try:
    with open(path, 'rb') as file:
      return npz.read(file, names)[0]
  except Exception as error:  # the zip and NumPy formats raise many kinds
    raise InputError(
      f'`features`={path}: cannot be read ({error}): write it with ssljax '
      'embed --images'
    ) from error
