"""Windows and centres of encoded images, against Pillow on all pixels."""

from concurrent import futures
import io
import threading
import time
import zlib

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


# What a viewer shows.


def encoded(image, kind='PNG', **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def grey_of(content, height, width):
  return decode.centre(content, (height, width, 1), None)[..., 0].tolist()


def test_sixteen_bits_keep_their_high_byte():
  deep = PIL.Image.fromarray(np.array([[0, 255], [3000, 65535]], np.uint16))
  # 255 / 256 = 0.996, 3000 / 256 = 11.7: the fraction is dropped.
  assert grey_of(encoded(deep), 2, 2) == [[0, 0], [11, 255]]
  assert grey_of(encoded(deep, 'TIFF'), 2, 2) == [[0, 0], [11, 255]]
  colour = decode.centre(encoded(deep), (2, 2, 3), None)
  assert colour[1].tolist() == [[11] * 3, [255] * 3]
  # A window of one pixel, cut from the whole.
  crop = decode.crop(encoded(deep), (2, 2, 1), np.zeros((imagenet.TRIES, 4)))
  assert crop.max() <= 255 and crop.dtype == np.uint8


@pytest.mark.parametrize('kind', ['I', 'F'])
def test_pixels_of_more_bits_or_floats_are_refused(kind):
  values = np.array([[0, 2**20]], np.int32)
  image = PIL.Image.fromarray(values.astype(dict(I=np.int32, F='f4')[kind]))
  with pytest.raises(ValueError, match='pixels'):
    decode.centre(encoded(image, 'TIFF'), (1, 2, 1), None)


def shape_in_alpha():
  """Black everywhere, opaque in the left half."""
  pixels = np.zeros((2, 4, 4), np.uint8)
  pixels[:, :2, 3] = 255
  return PIL.Image.fromarray(pixels)


def test_transparent_pixels_are_white():
  expected = [[0, 0, 255, 255]] * 2
  image = shape_in_alpha()
  assert grey_of(encoded(image), 2, 4) == expected
  assert grey_of(encoded(image.convert('LA')), 2, 4) == expected
  colour = decode.centre(encoded(image), (2, 4, 3), None)
  assert colour[..., 1].tolist() == expected
  # Half opaque black on white: 255 * 127 / 255.
  image.putalpha(128)
  assert grey_of(encoded(image), 2, 4) == [[127] * 4] * 2


def test_a_transparent_colour_is_white():
  grey = np.array([[7, 60]], np.uint8)
  one = PIL.Image.fromarray(grey)
  palette = PIL.Image.fromarray(np.array([[0, 1]], np.uint8))
  palette = palette.convert('P')
  palette.putpalette([9, 9, 9, 60, 60, 60])
  deep = PIL.Image.fromarray(grey.astype(np.uint16) * 256)
  for content in (
    encoded(one, transparency=7),
    encoded(one.convert('RGB'), transparency=(7, 7, 7)),
    encoded(deep, transparency=7 * 256),
    encoded(palette, transparency=0),
    encoded(palette, transparency=bytes([0, 255])),
    encoded(palette, 'GIF', transparency=0),
  ):
    assert grey_of(content, 1, 2) == [[255, 60]]


def test_a_transparent_window_is_white_too():
  clear = PIL.Image.new('RGBA', (9, 9))
  assert decode.crop(encoded(clear), (4, 4, 3), draws_of(0)).min() == 255


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'JPEG', 'WEBP'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_are_seen_upright(kind, orientation):
  # 16 x 32 pixels of four greys in quarters, which JPEG keeps.
  quarters = np.array([[0, 80], [160, 240]], np.uint8)
  image = PIL.Image.fromarray(quarters.repeat(8, 0).repeat(16, 1))
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  # As the EXIF standard names the side that the first row and column show.
  upright = {
    1: quarters,
    2: quarters[:, ::-1],
    3: quarters[::-1, ::-1],
    4: quarters[::-1],
    5: quarters.T,
    6: quarters[::-1].T,
    7: quarters[::-1, ::-1].T,
    8: quarters.T[::-1],
  }[orientation]
  content = encoded(image.convert('RGB'), kind, exif=exif)
  tall = orientation > 4
  height, width = (32, 16) if tall else (16, 32)
  whole = decode.centre(content, (height, width, 1), None)[..., 0]
  places = np.ix_([4, height - 4], [4, width - 4])
  np.testing.assert_allclose(whole[places].astype(int), upright, atol=3)
  # Resized to a square, and in a window: the same as of the upright image.
  again = encoded(PIL.Image.fromarray(whole))
  for decoded in (
    lambda content: decode.centre(content, (8, 8, 1), 8),
    lambda content: decode.crop(content, (8, 8, 1), draws_of(3)),
  ):
    np.testing.assert_allclose(
      decoded(content).astype(int), decoded(again), atol=6
    )


def test_damaged_exif_data_are_ignored():
  image = PIL.Image.fromarray(smooth(8, 9))
  content = encoded(image, 'JPEG', exif=b'Exif\0\0neither II nor MM')
  assert decode.centre(content, (8, 9, 3), None).shape == (8, 9, 3)


# Memory.


def claims(width, height):
  """A PNG of a few bytes that claims to be so large."""
  content = encoded(PIL.Image.new('L', (1, 1)))
  header = b'IHDR' + width.to_bytes(4, 'big') + height.to_bytes(4, 'big')
  header += content[24:29]
  crc = zlib.crc32(header).to_bytes(4, 'big')
  return content[:12] + header + crc + content[33:]


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('size', [(13_000, 13_000), (2**26 + 1, 1)])
def test_an_image_that_decodes_to_gigabytes_is_not_decoded(size, monkeypatch):
  content = claims(*size)
  monkeypatch.setattr(PIL.Image.Image, 'load', None)  # never called
  for decoded in (
    lambda: decode.centre(content, (8, 8, 1), 8),
    lambda: decode.crop(content, (8, 8, 1), draws_of(0)),
  ):
    with pytest.raises(ValueError, match=f'{size[0]} x {size[1]} pixels'):
      decoded()


def test_a_thin_image_is_not_resized_to_gigabytes():
  # 8 x 80,000 pixels, at a shorter side of 1,000.
  thin = encoded(PIL.Image.new('L', (80_000, 8)))
  with pytest.raises(ValueError, match='10000000 x 1000 pixels'):
    decode.centre(thin, (1000, 1000, 1), 1000)


def test_threads_wait_while_others_decode_as_much_as_allowed():
  reservations, lock, now, seen = (
    decode._Reservations(10),
    threading.Lock(),
    [],
    [],
  )

  def decoded(pixels):
    with reservations.take(pixels):
      with lock:
        now.append(pixels)
        seen.append(sum(now))
      time.sleep(0.001)
      with lock:
        now.remove(pixels)

  with futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(decoded, [4] * 20 + [10] * 3))
  assert max(seen) <= 10 and not now and len(seen) == 23
