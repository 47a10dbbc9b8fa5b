"""Benchmark a user's images: decoding a folder, and predicting.

Both sides of a ratio are measured in turn, and the median over the rounds is
printed: of processor time, of all threads together, so that other programs on
the machine do not count, and of wall time. Pillow decodes on one thread; its
rate in wall time is multiplied by the number of cores.
"""

import io
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import PIL.Image

from ssljax import api, prediction
from ssljax import model as model_lib
from ssljax.data import arrays, folder
from ssljax.experiments.benchmarks import stream_speed, timing

_SIDE = 64  # of the decoded images
_PREDICTED, _PIXELS, _NETWORK = 10_000, 32, 'digits'
_FILES, _TIMES = 2_000, (1, 10)  # the peak memory is of so many files, 10 times
_MEMORY = """
import sys
from ssljax.experiments.benchmarks import folder_speed
folder_speed.print_peak(sys.argv[1], int(sys.argv[2]))
"""


def part_folder(
  rounds: int,
  count: int = 192,
  predicted: int = _PREDICTED,
  files: int = _FILES,
) -> None:
  """Compare our speed with that of Pillow, and of the network.

  Args:
    rounds: number of measurements.
    count: number of JPEG files.
    predicted: number of images that are predicted.
    files: number of files of the measurement of memory.
  """
  cores = len(os.sched_getaffinity(0))
  print(f'\n{count} JPEG files of about 500x375 pixels to {_SIDE}x{_SIDE}')
  _show(_decoding(rounds, count), count, cores)
  print(f'\n{predicted} images of {_PIXELS}x{_PIXELS}, a small network')
  _show(_predicting(rounds, predicted), predicted, 1)
  print(f'\npeak memory of predicting a folder of {_PIXELS}x{_PIXELS} images')
  for images, mebibytes in _memory(files).items():
    print(f'  {images:6} images {mebibytes:6.0f} MiB')


def _clocks() -> np.ndarray:
  """Return processor time and wall time in seconds."""
  return np.array([time.process_time(), time.perf_counter()])


def _show(found: dict[str, list], count: int, cores: int) -> None:
  """Print the rates of two sides, and their ratios.

  Args:
    found: processor and wall time of every round, ours first.
    count: of images.
    cores: on which ours works, and the other one does not.
  """
  for name, times in found.items():
    own, wall = count / np.median(times, axis=0)
    print(f'  {name:20} {own:9.1f} images/s of a core {wall:9.1f} images/s')
  ours, others = map(np.array, found.values())
  own, wall = np.median(others / ours / [1, cores], axis=0)
  print(f'  ratio: {own:.2f} of processor time, {wall:.2f} of wall time')


def _pillow(path: pathlib.Path) -> np.ndarray:
  """Decode an image as `decode.centre` does, with Pillow alone."""
  with PIL.Image.open(io.BytesIO(path.read_bytes())) as image:
    image.draft('RGB', (2 * _SIDE, 2 * _SIDE))
    image = image.convert('RGB')
    scale = _SIDE / min(image.size)
    image = image.resize([round(side * scale) for side in image.size])
    return np.asarray(image.crop((0, 0, _SIDE, _SIDE)))


def _decoding(rounds: int, count: int) -> dict[str, list]:
  """Return the times of a folder, and of Pillow on one core."""
  with tempfile.TemporaryDirectory() as root:
    paths = []
    for row, content in enumerate(stream_speed.jpegs(count)):
      path = pathlib.Path(root, f'class{row % 2}', f'{row}.jpg')
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(content)
      paths.append(path)
    steps = {
      'a folder': lambda: folder.load(root, image_size=_SIDE),
      'Pillow alone': lambda: [_pillow(path) for path in paths],
    }
    return timing.each_round(steps, rounds, _clocks)


def _predictor(network: str) -> prediction.Predictor:
  """Return a predictor of a network that is hardly trained."""
  shape = 64, _PIXELS, _PIXELS, 3
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  labels = np.arange(64) % 2
  model = api.fit(
    images,
    labels,
    method='supervised',
    network=network,
    steps=1,
    progress=False,
  )
  dataset = arrays.from_arrays(images, labels)
  return prediction.Predictor((model,), dataset, np.ones(64, bool))


def _predicting(rounds: int, count: int) -> dict[str, list]:
  """Return the times of a file of predictions, and of the forward passes."""
  shape = count, _PIXELS, _PIXELS, 3
  pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  predictor = _predictor(_NETWORK)
  (model,) = predictor.models
  nowhere = np.full(count, -1, np.int32)
  images = prediction.of_source(predictor, arrays.in_memory(pixels, nowhere))
  size = model_lib._BATCH
  batches = [
    jax.device_put(np.resize(pixels[i : i + size], (size, *shape[1:])))
    for i in range(0, count, size)
  ]
  with tempfile.TemporaryDirectory() as root:
    out = pathlib.Path(root, 'predictions.csv')
    steps = {
      'predict, a file': lambda: prediction.write(predictor, images, out),
      'the forward pass': lambda: jax.block_until_ready(
        [model._infer(*model.weights, batch) for batch in batches]
      ),
    }
    return timing.each_round(steps, rounds, _clocks)


def _memory(files: int) -> dict[int, float]:
  """Return the peak memory in MiB by the number of predicted images."""
  rng, found = np.random.default_rng(0), {}
  with tempfile.TemporaryDirectory() as root:
    for row in range(files):
      pixels = rng.integers(0, 256, (_PIXELS, _PIXELS, 3), np.uint8)
      PIL.Image.fromarray(pixels).save(pathlib.Path(root, f'{row}.png'))
    for times in _TIMES:
      command = [sys.executable, '-c', _MEMORY, root, str(times)]
      shown = subprocess.run(command, check=True, stdout=subprocess.PIPE)
      found[files * times] = float(shown.stdout.split()[-1])
  return found


def print_peak(root: str, times: int) -> None:
  """Predict the images of a folder; print the peak memory in MiB.

  Args:
    root: the folder.
    times: each image is predicted so often.
  """
  predictor = _predictor('mlp')
  images = folder.to_predict(root, (_PIXELS, _PIXELS, 3))
  count, read = len(images.names), images.read
  images = images._replace(
    names=images.names * times,
    given=images.given * times,
    read=lambda rows: read([row % count for row in rows]),
  )
  with tempfile.TemporaryDirectory() as out:
    path = pathlib.Path(out, 'predictions.csv')
    prediction.write(predictor, images, path)
    lines = path.read_text().count('\n')
  assert lines == count * times + 1, lines
  scale = 2**10 if sys.platform == 'darwin' else 1  # bytes there, else KiB
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  print(peak / scale / 2**10)
