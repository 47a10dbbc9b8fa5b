"""The rows of every step, and the two feeds that bring their images.

Order is arithmetic: the rows of step t are a pure function of (split, draw,
stage, t), so a resume needs a number and a process its own share. `resident`
keeps uint8 images on the devices and gathers inside the compiled step;
`stream` decodes them on the host, ahead of the step, where it may cut random
windows from originals that differ in size. Same rows, same keys.
"""

from collections.abc import Callable, Iterable, Iterator
import math
from typing import Any, NamedTuple
import zlib

import jax
import numpy as np

from ssljax.augment import imagenet, standard
from ssljax.data.splits import generator
from ssljax.distributed import placement

# Random streams of `epoch_rows`: above those of `splits`.
_ON_PIXELS = 0x70697865  # 'pixe', in the keys of what precedes preprocessing
_AHEAD_BYTES = 2**29  # of images that `stream` decodes ahead of the step


def window_draws(rows, words) -> np.ndarray:
  """Draws for the window that an image is cropped to, alike in any batch.

  Args:
    rows: `[..., B]`.
    words: `[..., 3]` of `Sampler.rng_words`.

  Returns:
    `[..., B, T, 4]` in [0, 1), as `imagenet.window` takes them.
  """
  draws = [
    [generator(*own, row).random((imagenet.TRIES, 4)) for row in some]
    for some, own in zip(
      rows.reshape(-1, rows.shape[-1]), words.reshape(-1, 3), strict=True
    )
  ]
  return np.reshape(draws, (*rows.shape, imagenet.TRIES, 4))


class Feed(NamedTuple):
  """Images of one data set, on their way to the compiled step."""

  size: int  # N
  # (pixels, rows [B]) -> uint8, or float32 that is fed as it is, [B, H, W, c];
  # traced
  gather: Callable
  pixels_are_shared: bool  # one array for all seeds, or one per batch
  # (rows of a call, calls, words of a call or None) -> iterator of (pixels,
  # rows); with words, images that the source can crop are cropped at random.
  batches: Callable


def resident(images: np.ndarray, place: placement.Placer) -> Feed:
  """All images `[N, H, W, c]` on the devices, whole on each.

  Args:
    images: uint8 of the whole data set, or float32 that is fed as it is.
    place: puts them on the devices.
  """
  pixels = place(images, None)

  def batches(rows_of: Callable, calls: Iterable, words_of=None) -> Iterator:
    del words_of  # what is resident is cropped inside the compiled step
    for call in calls:
      rows = rows_of(call)
      yield pixels, place(rows, rows.ndim - 1)

  return Feed(
    len(images),
    lambda pixels, rows: pixels[rows],
    True,
    batches,
  )


def stream(source, place: placement.Placer, *, threads: int = 16) -> Feed:
  """Images decoded on the host while the devices work, by Grain.

  Every process decodes those of its own devices.

  Args:
    source: a `datasets.Source`.
    place: puts them on the devices.
    threads: that read and decode ahead.
  """
  import grain  # Slow to import, and the resident feed has no need of it.

  def load(rows, words, mine):  # [..., B], [..., 3] or None, places of own rows
    own = rows[..., mine]
    flat = own.reshape(-1)
    if words is None or source.crop is None:
      pixels = source.read(flat)
    else:
      draws = window_draws(own, words)
      pixels = source.crop(flat, draws.reshape(len(flat), *draws.shape[-2:]))
    return pixels.reshape(*own.shape, *source.shape), rows

  def batches(rows_of: Callable, calls: Iterable, words_of=None) -> Iterator:
    calls = list(calls)
    if not calls:
      return
    first = rows_of(calls[0])
    mine = place.share(first.shape[-1])
    size = first[..., mine].size * math.prod(source.shape)
    ahead = max(2, min(2 * threads, _AHEAD_BYTES // size))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    loaded = (
      grain.MapDataset.source(calls)
      .map(lambda call: load(rows_of(call), words_of and words_of(call), mine))
      .to_iter_dataset(options)
    )
    for pixels, rows in loaded:
      axis = rows.ndim - 1
      yield place.own(pixels, axis, rows.shape[axis]), place(rows, axis)

  return Feed(
    len(source.labels),
    lambda pixels, rows: pixels,
    False,
    batches,
  )


def reader(
  feed: Feed,
  preprocess,
  augmentation: Callable | None,
  on_pixels: Callable | None = None,
  *,
  name: str | None = None,
  part: slice | None = None,
) -> Callable:
  """Return the function that makes one view of a step's images.

  Every row is augmented with its own key, folded from the step's key and the
  row number, so that an image does not depend on the batch it is in. A further
  view folds the CRC-32 of its name into that key. Windows that `Feed.batches`
  crops on the host are the same in all views: only the pixels that the host
  sends are augmented here.

  Args:
    feed: source of the pixels.
    preprocess: a `Preprocess`, applied before the augmentation.
    augmentation: `(key, image) -> image`, or None.
    on_pixels: another augmentation, applied before the preprocessing, or None.
    name: name of a further view; None for the default one.
    part: positions of the batch that the view has; None for all.

  Returns:
    `((pixels, fitted), rows [B], key) -> [B or part, H, W, c] float32`.
  """

  def read(source: tuple[Any, Any], rows, key):
    pixels, fitted = source
    image = feed.gather(pixels, rows)
    if part is not None:
      rows, image = rows[part], image[part]
    image = standard.to_float(image)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    if name is not None:
      number = np.uint32(zlib.crc32(name.encode()))
      keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    if on_pixels is not None:
      own = jax.vmap(jax.random.fold_in, (0, None))(keys, _ON_PIXELS)
      image = jax.vmap(on_pixels)(own, image)
    image = jax.vmap(preprocess.apply, (None, 0))(fitted, image)
    if augmentation is None:
      return image
    return jax.vmap(augmentation)(keys, image)

  return read
