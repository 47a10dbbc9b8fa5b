"""Decode an image to pixels [H, W, c]: its centre, or a random window."""

import io

import numpy as np
import PIL.Image

from ssljax.augment import imagenet

_BILINEAR = PIL.Image.Resampling.BILINEAR


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
    image = _colours(image, shape)
    return _pixels(
      image if shorter is None else fit(image, shape[0], shorter), shape
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
  with PIL.Image.open(io.BytesIO(encoded)) as image:
    top, left, height, width = imagenet.window(draws, image.height, image.width)
    scale = _draft(image, shape, min(height / shape[0], width / shape[1]))
    box = np.array([left, top, left + width, top + height]) * scale
    image = _colours(image, shape)
    return _pixels(image.resize(shape[1::-1], _BILINEAR, tuple(box)), shape)


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
  """
  if image.size == (size, size) == (shorter, shorter):
    return image
  least = min(image.size)
  width, height = (max(size, round(s * shorter / least)) for s in image.size)
  image = image.resize((width, height), _BILINEAR)
  left, top = (width - size) // 2, (height - size) // 2
  return image.crop((left, top, left + size, top + size))


def _mode(shape: tuple[int, int, int]) -> str:
  """Return Pillow's colour mode of an image `[H, W, c]`."""
  return 'L' if shape[-1] == 1 else 'RGB'


def _colours(image: PIL.Image.Image, shape) -> PIL.Image.Image:
  """Convert an image to the colour mode of `[H, W, c]`."""
  mode = _mode(shape)
  return image if image.mode == mode else image.convert(mode)


def _pixels(image: PIL.Image.Image, shape) -> np.ndarray:
  """Return the image as uint8 `[H, W, c]`; raise if its size differs."""
  pixels = np.asarray(image)
  if pixels.shape[:2] != shape[:2]:
    raise ValueError(f'{pixels.shape[:2]} pixels, but {shape[:2]} expected')
  return pixels.reshape(shape)
