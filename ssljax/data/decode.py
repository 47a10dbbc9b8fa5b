"""One encoded image as pixels [H, W, c]: its centre, or a random window."""

import io

import numpy as np
import PIL.Image

from ssljax.augment import imagenet

_BILINEAR = PIL.Image.Resampling.BILINEAR


def centre(
  encoded: bytes, shape: tuple[int, int, int], shorter: int | None
) -> np.ndarray:
  """One PNG, JPEG ... -> uint8 [H, W, c].

  Args:
    encoded: the file's bytes.
    shape: H, W, c; a square where `shorter` is given.
    shorter: what the shorter side is resized to before the centre is cropped;
      None leaves the image as it is.
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
  """One PNG, JPEG ... -> a random window of it, resized to uint8 [H, W, c].

  Args:
    encoded: the file's bytes.
    shape: H, W, c of what is returned.
    draws: [imagenet.TRIES, 4] in [0, 1), see `imagenet.window`.
  """
  with PIL.Image.open(io.BytesIO(encoded)) as image:
    top, left, height, width = imagenet.window(draws, image.height, image.width)
    scale = _draft(image, shape, min(height / shape[0], width / shape[1]))
    box = np.array([left, top, left + width, top + height]) * scale
    image = _colours(image, shape)
    return _pixels(image.resize(shape[1::-1], _BILINEAR, tuple(box)), shape)


def _draft(image: PIL.Image.Image, shape, excess: float) -> float:
  """Has a JPEG decoded at 1/2, 1/4, 1/8 -> the scale, 1 for other formats.

  A window stays as large as what it becomes. Of 1600x1200 pixels to 224 this
  saves a quarter of the time in the most detailed images, a half in others, and
  changes a value by 1.3 and 0.4 of 256 levels (root mean square).

  Args:
    image: opened, not decoded.
    shape: H, W, c; of them the colours matter.
    excess: how much longer the window's sides are than what it becomes.
  """
  parts = next((n for n in (8, 4, 2) if n <= excess), 1)
  width, height = image.size
  drafted = image.draft(_mode(shape), (width // parts, height // parts))
  return drafted[1][2] / width if drafted else 1.0


def fit(image: PIL.Image.Image, size: int, shorter: int) -> PIL.Image.Image:
  """Resizes the shorter side to `shorter`, crops a square of `size`."""
  if image.size == (size, size) == (shorter, shorter):
    return image
  least = min(image.size)
  width, height = (max(size, round(s * shorter / least)) for s in image.size)
  image = image.resize((width, height), _BILINEAR)
  left, top = (width - size) // 2, (height - size) // 2
  return image.crop((left, top, left + size, top + size))


def _mode(shape: tuple[int, int, int]) -> str:
  """Pillow's name of the colours of [H, W, c]."""
  return 'L' if shape[-1] == 1 else 'RGB'


def _colours(image: PIL.Image.Image, shape) -> PIL.Image.Image:
  """The image in the colours of [H, W, c]."""
  mode = _mode(shape)
  return image if image.mode == mode else image.convert(mode)


def _pixels(image: PIL.Image.Image, shape) -> np.ndarray:
  """The image as uint8 [H, W, c], refused if it is of another size."""
  pixels = np.asarray(image)
  if pixels.shape[:2] != shape[:2]:
    raise ValueError(f'{pixels.shape[:2]} pixels where {shape[:2]} are stated')
  return pixels.reshape(shape)
