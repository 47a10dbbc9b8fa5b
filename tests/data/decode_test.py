"""Windows and centres of encoded images, against Pillow on all pixels."""

import io

import fake_tfds
import numpy as np
import PIL.Image
import pytest

from ssljax.augment import imagenet
from ssljax.data import decode

BILINEAR = PIL.Image.Resampling.BILINEAR


def smooth(height, width, length=7):
  """A colour picture uint8 [H, W, 3] of waves, `length` pixels per radian."""
  y, x = np.mgrid[:height, :width] / length
  waves = [np.sin(x + i) * np.cos(y + 2 * i) for i in range(3)]
  return (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def draws_of(seed):
  return np.random.default_rng(seed).random((imagenet.TRIES, 4))


def slow_crop(pixels, draws, size):
  """A window of all pixels of the image, resized."""
  top, left, height, width = imagenet.window(draws, *pixels.shape[:2])
  box = left, top, left + width, top + height
  return PIL.Image.fromarray(pixels).resize((size, size), BILINEAR, box)


@pytest.mark.parametrize('height, width', [(60, 90), (31, 17), (8, 8)])
def test_a_window_is_cut_from_the_original(height, width):
  pixels = smooth(height, width)
  for seed in range(4):
    got = decode.crop(fake_tfds.encode(pixels), (24, 24, 3), draws_of(seed))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, slow_crop(pixels, draws_of(seed), 24))


# Windows of 640 x 960 pixels have sides of at least 305.
@pytest.mark.parametrize('size, least', [(290, 1), (140, 2), (70, 4), (16, 8)])
def test_a_large_jpeg_is_decoded_small_but_not_below_the_window(
  size, least, monkeypatch
):
  pixels, decoded = smooth(640, 960, 20), []
  encoded = io.BytesIO()
  PIL.Image.fromarray(pixels).save(encoded, 'jpeg', quality=95)
  pixels = np.asarray(PIL.Image.open(encoded))
  resize = PIL.Image.Image.resize

  def spy(image, size, resample, box):
    decoded.append((image.size, box))
    return resize(image, size, resample, box)

  monkeypatch.setattr(PIL.Image.Image, 'resize', spy)
  for seed in range(5):
    got = decode.crop(encoded.getvalue(), (size, size, 3), draws_of(seed))
    (width, height), (left, top, right, bottom) = decoded.pop()
    assert 960 / width == 640 / height >= least
    assert min(right - left, bottom - top) >= size
    expected = slow_crop(pixels, draws_of(seed), size)
    decoded.clear()
    difference = got.astype(int) - expected
    # A window that is one original pixel off differs by the waves' slope,
    # 100 / 20 · cos · cos, whose root mean square is 2.5.
    assert (difference**2).mean() ** 0.5 < 1


def test_a_window_of_another_colour_mode_is_converted():
  grey = decode.crop(
    fake_tfds.encode(np.full((9, 9, 3), 90, np.uint8)), (4, 4, 1), draws_of(0)
  )
  np.testing.assert_array_equal(grey, np.full((4, 4, 1), 90))
  colour = decode.crop(
    fake_tfds.encode(np.full((9, 9, 1), 90, np.uint8)), (4, 4, 3), draws_of(0)
  )
  np.testing.assert_array_equal(colour, np.full((4, 4, 3), 90))


def test_the_centre_is_cropped_from_the_resized_image():
  # 56 x 112 pixels become 8 x 16, and the centre crop keeps 7 x 7.
  pixels = smooth(56, 112)
  got = decode.centre(fake_tfds.encode(pixels), (7, 7, 3), 8)
  resized = PIL.Image.fromarray(pixels).resize((16, 8), BILINEAR)
  np.testing.assert_array_equal(got, np.asarray(resized)[0:7, 4:11])
  whole = decode.centre(fake_tfds.encode(pixels), (56, 112, 3), None)
  np.testing.assert_array_equal(whole, pixels)
