"""Decode an image to pixels [H, W, c]: its centre, or a random window.

Pixels are those that a viewer shows:

  16 bits        the high byte of each value, as TensorFlow decodes them
  transparency   composited on white
  EXIF           the orientation is applied

An image that cannot be shown so raises an exception, of any kind: truncated
files, floating-point pixels, more than `MAX_PIXELS` pixels.
"""

from collections.abc import Iterator
import contextlib
import io
import threading

import numpy as np
import PIL.Image

# Pixels of an image as it is decoded, at most, and of all images that are
# decoded at the same time: 256 MiB. A small file may decode to gigabytes.
MAX_PIXELS = 2**26
# Bytes that Pillow allocates at once. Blocks above 32 MiB go back to the
# operating system when they are freed; smaller ones may stay in the C library's
# pool of each thread, which adds up to gigabytes after a few large images.
PIL.Image.core.set_block_size(2**26)
# Ratio of the resized shorter side to the crop at its centre, 256 / 224.
MARGIN = 8 / 7
# Pillow asks its formats in the order in which they were registered: the common
# ones first, which saves a tenth of the time for a small JPEG.
PIL.Image.preinit()
PIL.Image.init()
WHITE = 255  # the background of transparent images
_BILINEAR = PIL.Image.Resampling.BILINEAR
_ORIENTATION = 0x0112  # an EXIF tag
_TRANSPOSE = PIL.Image.Transpose
_TURNS = {
  2: _TRANSPOSE.FLIP_LEFT_RIGHT,
  3: _TRANSPOSE.ROTATE_180,
  4: _TRANSPOSE.FLIP_TOP_BOTTOM,
  5: _TRANSPOSE.TRANSPOSE,
  6: _TRANSPOSE.ROTATE_270,
  7: _TRANSPOSE.TRANSVERSE,
  8: _TRANSPOSE.ROTATE_90,
}
_SWAPPED = range(5, 9)  # orientations that exchange height and width
_WITH_ALPHA = ('LA', 'La', 'PA', 'RGBA', 'RGBa')


def centre(
  encoded: bytes, shape: tuple[int, int, int], shorter: int | None
) -> np.ndarray:
  """Decode a PNG, JPEG or similar file, resize it and crop its centre.

  Args:
    encoded: the file's bytes.
    shape: H, W, c of the result; a square if `shorter` is given.
    shorter: the length that the shorter side is resized to before the centre is
      cropped; None leaves the image as it is.

  Returns:
    uint8 `[H, W, c]`.
  """
  with PIL.Image.open(io.BytesIO(encoded)) as image:
    if shorter is not None:
      # A large JPEG is decoded at 1/2, 1/4, 1/8 where that leaves enough.
      image.draft(_mode(shape), (2 * shorter, 2 * shorter))
    with _reserved(image):
      orientation = _orientation(image)
      turned = _turned(_colours(image, shape), orientation)
      return _pixels(
        turned if shorter is None else fit(turned, shape[0], shorter), shape
      )


def crop(
  encoded: bytes, shape: tuple[int, int, int], draws: np.ndarray
) -> np.ndarray:
  """Decode a PNG, JPEG or similar file and resize a random window of it.

  Args:
    encoded: the file's bytes.
    shape: H, W, c of the result.
    draws: `[imagenet.TRIES, 4]` in [0, 1), see `imagenet.window`.

  Returns:
    uint8 `[H, W, c]`.
  """
  from ssljax.augment import imagenet  # slow to import

  with (
    PIL.Image.open(io.BytesIO(encoded)) as image,
    contextlib.ExitStack() as stack,
  ):
    # The size of a JPEG is known after the draft, that of others before.
    if not _has_draft(image):
      stack.enter_context(_reserved(image))
    orientation = _orientation(image)
    sides = image.size if orientation in _SWAPPED else image.size[::-1]
    top, left, height, width = imagenet.window(draws, *sides)
    scale = _draft(image, shape, min(height / shape[0], width / shape[1]))
    if _has_draft(image):
      stack.enter_context(_reserved(image))
    box = np.array([left, top, left + width, top + height]) * scale
    turned = _turned(_colours(image, shape), orientation)
    return _pixels(turned.resize(shape[1::-1], _BILINEAR, tuple(box)), shape)


def shrink(encoded: bytes, side: int) -> PIL.Image.Image:
  """Decode an image whose longer side is at most `side`, as it is shown.

  Args:
    encoded: the file's bytes.
    side: a larger image is resized, with its aspect ratio.
  """
  with PIL.Image.open(io.BytesIO(encoded)) as image:
    image.draft('RGB', (side, side))
    with _reserved(image):
      orientation = _orientation(image)
      small = _turned(_colours(image, (side, side, 3)), orientation).copy()
      small.thumbnail((side, side))
      return small


def _draft(image: PIL.Image.Image, shape, excess: float) -> float:
  """Set a JPEG to decode at 1/2, 1/4 or 1/8 of its size, for speed.

  The window is never decoded smaller than the result it is resized to. From
  1600x1200 pixels to 224 this saves a quarter of the time for the most detailed
  images and half of it for others, and changes values by 1.3 and 0.4 of 256
  levels (root mean square).

  Args:
    image: opened, not decoded.
    shape: H, W, c of the result; only c is used.
    excess: the ratio of the window's side to the result's, the smaller of both
      axes.

  Returns:
    The scale of the decoded image, 1 for formats other than JPEG.
  """
  parts = next((n for n in (8, 4, 2) if n <= excess), 1)
  width, height = image.size
  drafted = image.draft(_mode(shape), (width // parts, height // parts))
  return drafted[1][2] / width if drafted else 1.0


def fit(image: PIL.Image.Image, size: int, shorter: int) -> PIL.Image.Image:
  """Resize the shorter side to `shorter`, then crop a centred square.

  Args:
    image: of any size.
    size: the side of the square.
    shorter: the length of the shorter side, at least `size`.

  Raises:
    ValueError: the resized image has more than `MAX_PIXELS` pixels.
  """
  if image.size == (size, size) == (shorter, shorter):
    return image
  least = min(image.size)
  width, height = (max(size, round(s * shorter / least)) for s in image.size)
  _refuse_large(width, height)
  image = image.resize((width, height), _BILINEAR)
  left, top = (width - size) // 2, (height - size) // 2
  return image.crop((left, top, left + size, top + size))


# Memory.


class _Reservations:
  """The pixels that may be decoded at the same time, over all threads."""

  def __init__(self, limit: int):
    self._free, self._changed = limit, threading.Condition()

  @contextlib.contextmanager
  def take(self, pixels: int) -> Iterator[None]:
    """Wait until so many pixels are free, at most the limit, and hold them."""
    with self._changed:
      self._changed.wait_for(lambda: pixels <= self._free)
      self._free -= pixels
    try:
      yield
    finally:
      with self._changed:
        self._free += pixels
        self._changed.notify_all()


_RESERVATIONS = _Reservations(MAX_PIXELS)


def _reserved(image: PIL.Image.Image):
  """Return a context in which an opened image may be decoded."""
  _refuse_large(*image.size)
  return _RESERVATIONS.take(image.width * image.height)


def _refuse_large(width: int, height: int) -> None:
  if width * height > MAX_PIXELS:
    raise ValueError(
      f'{width} x {height} pixels are more than the limit of {MAX_PIXELS}'
    )


# What a viewer shows.


def _has_draft(image: PIL.Image.Image) -> bool:
  """True for a JPEG, whose EXIF data are read without decoding it."""
  return image.format in ('JPEG', 'MPO')


def _orientation(image: PIL.Image.Image) -> int:
  """Return the EXIF orientation, 1 to 8; an image other than JPEG is decoded.

  Damaged EXIF data are ignored, as by viewers.
  """
  if not _has_draft(image):
    image.load()  # the EXIF data of a PNG may follow the pixels
  if image.format == 'TIFF':
    return 1  # Pillow has applied it
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except Exception:  # Pillow's parser raises many kinds
    return 1


def _turned(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
  """Apply an EXIF orientation."""
  turn = _TURNS.get(orientation)
  return image if turn is None else image.transpose(turn)


def _mode(shape: tuple[int, int, int]) -> str:
  """Return Pillow's colour mode of an image `[H, W, c]`."""
  return 'L' if shape[-1] == 1 else 'RGB'


def _colours(image: PIL.Image.Image, shape) -> PIL.Image.Image:
  """Decode an image in the colour mode of `[H, W, c]`, without transparency."""
  mode = _mode(shape)
  if image.mode == 'F':
    raise ValueError('its pixels are floating-point numbers')
  if image.mode.startswith('I'):
    image = _high_bytes(image)
  elif image.mode in _WITH_ALPHA or 'transparency' in image.info:
    image = _on_white(image)
  return image if image.mode == mode else image.convert(mode)


def _high_bytes(image: PIL.Image.Image) -> PIL.Image.Image:
  """Convert a grey image of 16 bits to 8 bits."""
  values = np.asarray(image)
  if values.min() < 0 or values.max() >= 2**16:
    raise ValueError('its pixels have more than 16 bits')
  grey = (values >> 8).astype(np.uint8)
  if 'transparency' in image.info:
    grey[values == image.info['transparency']] = WHITE
  return PIL.Image.fromarray(grey)


def _on_white(image: PIL.Image.Image) -> PIL.Image.Image:
  """Composite an image with an alpha channel or a transparent colour."""
  colour = image.info.get('transparency')
  if isinstance(colour, tuple) and max(colour) > WHITE:  # of 16 bits
    image.info['transparency'] = tuple(value >> 8 for value in colour)
  if image.mode != 'RGBA':
    image = image.convert('RGBA')
  result = PIL.Image.new('RGB', image.size, (WHITE,) * 3)
  result.paste(image, mask=image.getchannel('A'))
  return result


def _pixels(image: PIL.Image.Image, shape) -> np.ndarray:
  """Return the image as uint8 `[H, W, c]`; raise if its size differs."""
  pixels = np.asarray(image)
  if pixels.shape[:2] != shape[:2]:
    raise ValueError(f'{pixels.shape[:2]} pixels, but {shape[:2]} expected')
  return pixels.reshape(shape)
