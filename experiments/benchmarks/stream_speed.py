"""Benchmark the input pipeline of ImageNet per core, at 224x224 pixels."""

from collections.abc import Callable
import io
import sys
import tempfile
import time

import jax
import numpy as np
import PIL.Image

from ssljax import experiments
from ssljax.augment import imagenet, standard
from ssljax.data import datasets, feeds
from ssljax.errors import require
from ssljax.experiments.benchmarks import timing


def noise_picture(height: int, width: int, rng) -> np.ndarray:
  """Return noise of all wavelengths, uint8 `[H, W, 3]`.

  The image is as detailed as a photograph.
  """
  image = np.zeros((height, width, 3), np.float32)
  for octave in range(1, int(np.log2(max(height, width))) + 1):
    size = 2**octave * height // width + 1, 2**octave + 1
    coarse = rng.normal(0, 2 ** (-0.2 * octave), size)
    resized = PIL.Image.fromarray(coarse.astype(np.float32)).resize(
      (width, height), PIL.Image.Resampling.BICUBIC
    )
    # Every wavelength has its own colour.
    image += np.asarray(resized)[..., None] * rng.uniform(0.5, 1, 3)
  return np.clip(128 + 50 * image, 0, 255).astype(np.uint8)


def jpegs(count: int) -> list[bytes]:
  """Return JPEG files of sizes around 500 x 375, a quarter of them upright."""
  rng = np.random.default_rng(0)
  files = []
  for row in range(count):
    sides = np.array([375, 500]) * np.exp(rng.normal(0, 0.25))
    height, width = sides.astype(int)[:: -1 if row % 4 == 0 else 1]
    file = io.BytesIO()
    pixels = noise_picture(height, width, rng)
    PIL.Image.fromarray(pixels).save(file, 'jpeg', quality=95)
    files.append(file.getvalue())
  return files


def part_stream(rounds: int, size: int = 224, count: int = 64) -> None:
  """Measure images per second of a core: decoding, cropping, recolouring.

  Args:
    rounds: number of measurements.
    size: height and width in pixels after cropping.
    count: number of images.
  """
  files = jpegs(count)
  mean = sum(map(len, files)) / count / 1000
  print(
    f'\n{count} JPEGs of {mean:.0f} kB to {size}x{size}, one core of the host'
  )
  pixels = decoding(files, size, rounds)
  on_cpu = jax.default_backend() == 'cpu'
  print(f'compiled, {"one core" if on_cpu else "the device"}')
  augmenting(pixels, rounds, time.process_time if on_cpu else time.perf_counter)


def decoding(files: list[bytes], size: int, rounds: int) -> np.ndarray:
  """Measure the work of the streamed feed.

  Args:
    files: JPEG files of N images.
    size: height and width in pixels after cropping.
    rounds: number of measurements.

  Returns:
    Crops, uint8 `[N, size, size, 3]`.

  Raises:
    InputError: the module of the tests that writes data sets is missing.
  """
  tests = experiments.FOLDER.parent / 'tests'
  require(
    (tests / 'fake_tfds.py').is_file(),
    '`part`=stream: needs tests/fake_tfds.py: run it in a clone of the '
    'repository',
  )
  sys.path.append(str(tests))
  import fake_tfds  # Writes TFDS's file layout without TensorFlow.

  rows = np.arange(len(files))
  draws = feeds.window_draws(rows, np.array([0, 0, 0]))
  whole = lambda file: np.asarray(PIL.Image.open(io.BytesIO(file)))
  with tempfile.TemporaryDirectory() as folder:
    shape = None, None, 3
    fake_tfds.write(
      folder, 'mixed', files, rows % 10, encoding='jpeg', shape=shape
    )
    source = datasets.load('mixed', folder, image_size=size, crop=True).train
    steps = {
      'all pixels decoded': lambda: [whole(file) for file in files],
      'read, decoded, cropped': lambda: source.crop(rows, draws),
      'read, decoded, centred': lambda: source.read(rows),
    }
    # Processor time of all threads is the time of one core.
    images = dict.fromkeys(steps, len(files))
    per_core(timing.rates(steps, images, rounds, time.process_time))
    return source.crop(rows, draws)


def augmenting(pixels: np.ndarray, rounds: int, clock: Callable) -> None:
  """Measure the augmentations of the compiled step on uint8 `[N, H, W, 3]`."""
  views = standard.chain(imagenet.grey(), imagenet.jitter(), standard.flip)
  batch = jax.jit(jax.vmap(views))
  keys = jax.random.split(jax.random.key(0), len(pixels))
  image = jax.device_put(standard.to_float(pixels))
  name, images = 'grey, jitter, flip', len(pixels)
  step = lambda: jax.block_until_ready(batch(keys, image))
  per_core(timing.rates({name: step}, {name: images}, rounds, clock))


def per_core(measured: dict[str, float]) -> None:
  """Print images per second, and the cores needed for 1,000 per second."""
  for name, rate in measured.items():
    print(f'  {name:24s}{rate:9.1f} images/s  {1000 / rate:5.1f} for 1,000/s')
