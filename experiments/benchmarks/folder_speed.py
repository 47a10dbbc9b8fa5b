"""Benchmark a user's images: decoding a folder, and predicting.

Rates are images per second of processor time, of all threads together, so that
other programs on the machine do not count: the ratio of two rates is the share
of the processor that does the work itself.
"""

import io
import pathlib
import resource
import sys
import tempfile
import time

import jax
import numpy as np
import PIL.Image

from ssljax import api
from ssljax.data import folder
from ssljax.experiments.benchmarks import stream_speed, timing

_SIDE = 64  # of the decoded images
_PREDICTED, _PIXELS = 10_000, 32


def part_folder(rounds: int, count: int = 192) -> None:
  """Compare our speed with that of Pillow, and of the network.

  Args:
    rounds: number of measurements.
    count: number of JPEG files.
  """
  decoded, alone = _decoding(rounds, count)
  print(f'\n{count} JPEG files of about 500x375 pixels to {_SIDE}x{_SIDE}')
  print(f'  a folder            {decoded:9.1f} images/s of a core')
  print(f'  Pillow alone        {alone:9.1f} images/s of a core')
  print(f'  ratio: {decoded / alone:.2f}')
  predicted, forward = _predicting(rounds)
  print(f'\n{_PREDICTED} images of {_PIXELS}x{_PIXELS}, a small network')
  print(f'  Model.predict       {predicted:9.1f} images/s of a core')
  print(f'  its forward pass    {forward:9.1f} images/s of a core')
  print(f'  ratio: {predicted / forward:.2f}')
  scale = 2**10 if sys.platform == 'darwin' else 1  # bytes there, else KiB
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale / 2**10
  pixels = _PREDICTED * _PIXELS**2 * 3 / 2**20
  print(f'\npeak memory {peak:.0f} MiB, {peak / pixels:.1f} times the pixels')


def _pillow(path: pathlib.Path) -> np.ndarray:
  """Decode an image as `decode.centre` does, with Pillow alone."""
  with PIL.Image.open(io.BytesIO(path.read_bytes())) as image:
    image.draft('RGB', (2 * _SIDE, 2 * _SIDE))
    image = image.convert('RGB')
    scale = _SIDE / min(image.size)
    image = image.resize([round(side * scale) for side in image.size])
    return np.asarray(image.crop((0, 0, _SIDE, _SIDE)))


def _decoding(rounds: int, count: int) -> tuple[float, float]:
  """Return images per second of a folder, and of Pillow on one core."""
  with tempfile.TemporaryDirectory() as root:
    paths = []
    for row, content in enumerate(stream_speed.jpegs(count)):
      path = pathlib.Path(root, f'class{row % 2}', f'{row}.jpg')
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(content)
      paths.append(path)
    steps = {
      'folder': lambda: folder.load(root, image_size=_SIDE),
      'Pillow': lambda: [_pillow(path) for path in paths],
    }
    counts = dict.fromkeys(steps, count)
    found = timing.rates(steps, counts, rounds, time.process_time)
  return found['folder'], found['Pillow']


def _predicting(rounds: int) -> tuple[float, float]:
  """Return images per second of a model, and of its compiled function."""
  shape = _PREDICTED, _PIXELS, _PIXELS, 3
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  labels = np.arange(64) % 2
  model = api.fit(
    images[:64],
    labels,
    method='supervised',
    network='digits',
    steps=1,
    progress=False,
  )
  batches = [
    jax.device_put(images[i : i + api._BATCH])
    for i in range(0, _PREDICTED - api._BATCH + 1, api._BATCH)
  ]
  steps = {
    'predict': lambda: model.predict(images),
    'forward': lambda: jax.block_until_ready(
      [model._infer(*model.weights, batch) for batch in batches]
    ),
  }
  sizes = {'predict': _PREDICTED, 'forward': len(batches) * api._BATCH}
  found = timing.rates(steps, sizes, rounds, time.process_time)
  return found['predict'], found['forward']
