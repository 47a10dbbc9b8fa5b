"""The two feeds that bring the images of a step to the devices.

`resident` keeps all images on the devices and gathers rows inside the compiled
step. `stream` decodes images on the host ahead of the step, where it can crop
random windows of originals that differ in size. Both deliver the same rows of
`sampling.Sampler` under the same random keys.
"""

from collections.abc import Callable, Iterable, Iterator
import math
from typing import Any, NamedTuple, Protocol
import zlib

import jax
import numpy as np

from ssljax.augment import imagenet, standard
from ssljax.core import AdaptiveAugment, Recorded
from ssljax.data.splits import generator
from ssljax.distributed import placement

# Folded into the keys of augmentations before preprocessing; spells 'pixe'.
_ON_PIXELS = 0x70697865
_ADAPTIVE = 0x61646170  # likewise of adaptive ones; spells 'adap'
_AHEAD_BYTES = 2**29  # images that `stream` decodes ahead of the step, at most


def window_draws(rows, words) -> np.ndarray:
  """Return the random numbers that choose each image's crop window.

  They depend on the row number and the words, not on the position in the batch.

  Args:
    rows: `[..., B]` row numbers.
    words: `[..., 3]` of `Sampler.rng_words`.

  Returns:
    `[..., B, T, 4]` in [0, 1), the draws of `imagenet.window`.
  """
  draws = [
    [generator(*own, row).random((imagenet.TRIES, 4)) for row in some]
    for some, own in zip(
      rows.reshape(-1, rows.shape[-1]), words.reshape(-1, 3), strict=True
    )
  ]
  return np.reshape(draws, (*rows.shape, imagenet.TRIES, 4))


class Gather(Protocol):
  """`Feed.gather`, traced inside the compiled step."""

  def __call__(self, pixels: jax.Array, rows: jax.Array) -> jax.Array:
    """Return the images of rows `[B]`.

    Args:
      pixels: an array that `Feed.batches` yielded.
      rows: `[B]` int32.

    Returns:
      `[B, H, W, c]`, uint8 images or float32 features.
    """


class Batches(Protocol):
  """`Feed.batches`, called on the host."""

  def __call__(
    self, rows_of: Callable, calls: Iterable, words_of: Callable | None = None
  ) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yield (pixels, rows) of each call of the compiled step, on the devices.

    Args:
      rows_of: `call -> rows [..., B]`.
      calls: what `rows_of` takes, one for each pair to yield.
      words_of: `call -> words [..., 3]` of `Sampler.rng_words`. With it, images
        are cropped at random if the source has `crop`.
    """


class Feed(NamedTuple):
  """The images of one split, as the compiled step gets them."""

  size: int  # N
  gather: Gather
  pixels_are_shared: bool  # one array for all seeds, or one per batch
  batches: Batches


def resident(images: np.ndarray, place: placement.Placer) -> Feed:
  """Return a feed of images that are replicated on every device.

  Args:
    images: `[N, H, W, c]` of the whole split, uint8 images or float32 features.
    place: puts them on the devices.
  """
  pixels = place(images, None)

  def batches(rows_of: Callable, calls: Iterable, words_of=None) -> Iterator:
    del words_of  # resident images are cropped inside the compiled step
    for call in calls:
      rows = rows_of(call)
      yield pixels, place(rows, rows.ndim - 1)

  return Feed(
    size=len(images),
    gather=lambda pixels, rows: pixels[rows],
    pixels_are_shared=True,
    batches=batches,
  )


def stream(source, place: placement.Placer, *, threads: int = 16) -> Feed:
  """Return a feed that decodes images on the host while the devices work.

  Grain's threads decode ahead. Every process decodes the images of its own
  devices only.

  Args:
    source: a `datasets.Source`.
    place: puts the images on the devices.
    threads: the number of threads that read and decode.
  """
  import grain  # slow to import, and the resident feed does not need it

  def load(rows, words, mine):
    """Return the pixels of `rows [..., B]` at positions `mine`, and `rows`."""
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
    mine = place.local_indices(first.shape[-1])
    size = first[..., mine].size * math.prod(source.shape)  # of one call
    ahead = max(2, min(2 * threads, _AHEAD_BYTES // size))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    loaded = (
      grain.MapDataset.source(calls)
      .map(lambda call: load(rows_of(call), words_of and words_of(call), mine))
      .to_iter_dataset(options)
    )
    for pixels, rows in loaded:
      axis = rows.ndim - 1
      yield place.place_local(pixels, axis, rows.shape[axis]), place(rows, axis)

  return Feed(
    size=len(source.labels),
    gather=lambda pixels, rows: pixels,
    pixels_are_shared=False,
    batches=batches,
  )


def reader(
  feed: Feed,
  preprocess,
  augmentation: Callable | None,
  on_pixels: Callable | None = None,
  *,
  name: str | None = None,
  part: slice | None = None,
  adaptive: AdaptiveAugment | None = None,
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
    adaptive: the last augmentation before the preprocessing, or None.

  Returns:
    `((pixels, fitted), rows [B], key, memory=None) -> [B or part, H, W, c]`,
    float32; `Recorded` images with `adaptive`.
  """

  def read(source: tuple[Any, Any], rows, key, memory=None):
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
    if adaptive is not None:
      own = jax.vmap(jax.random.fold_in, (0, None))(keys, _ADAPTIVE)
      image, record = jax.vmap(adaptive, (0, 0, None))(own, image, memory)
    image = jax.vmap(preprocess.apply, (None, 0))(fitted, image)
    if augmentation is not None:
      image = jax.vmap(augmentation)(keys, image)
    return image if adaptive is None else Recorded(image, record)

  return read
