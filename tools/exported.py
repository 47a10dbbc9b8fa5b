"""Measure exported models in a process that has no ssljax.

    python tools/exported.py --run=runs/FOLDER [--out=runs/exported]

Exports the models of a finished run as StableHLO and as ONNX, and prints the
largest difference of their probabilities to the run's on 256 training images,
the size, and the milliseconds of a call on one image and on 64.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np

from ssljax import export, prediction

# The best of 20 calls, after a first one that compiles.
PROGRAM = """
import sys, time, json
sys.modules['ssljax'] = None
import numpy as np
images, kind = np.load(sys.argv[2]), sys.argv[3]
if kind == 'stablehlo':
  import jax
  from jax import export
  call = jax.jit(export.deserialize(open(sys.argv[1], 'rb').read()).call)
  predict = lambda x: np.asarray(call(x))
else:
  import onnxruntime
  session = onnxruntime.InferenceSession(sys.argv[1])
  predict = lambda x: session.run(None, {'images': x})[0]
def milliseconds(x):
  predict(x)
  best = float('inf')
  for _ in range(20):
    began = time.perf_counter()
    predict(x)
    best = min(best, time.perf_counter() - began)
  return 1000 * best
one, many = milliseconds(images[:1]), milliseconds(images[:64])
print(json.dumps({'one': one, 'many': many, 'p': predict(images).tolist()}))
"""


def main() -> None:
  """Export, measure and print the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--run', required=True)
  parser.add_argument('--data_dir')
  parser.add_argument('--out', type=pathlib.Path, default='runs/exported')
  asked = parser.parse_args()
  predictor = prediction.load(asked.run, data_dir=asked.data_dir)
  export.write(predictor, asked.out, list(export.FORMATS))
  train, shape = predictor.dataset.train, predictor.models[0].shape
  rows = np.arange(min(256, len(train.labels)))
  images = train.read(rows).reshape(-1, *shape)
  np.save(asked.out / 'images.npy', images)
  expected = predictor.predict_proba(images)
  print('| format | max difference | MiB | batch 1, ms | batch 64, ms |')
  print('| --- | --- | --- | --- | --- |')
  for kind in export.FORMATS:
    model = asked.out / f'model.{kind}'
    found = subprocess.run(
      [sys.executable, '-c', PROGRAM, model, asked.out / 'images.npy', kind],
      check=True,
      stdout=subprocess.PIPE,
    )
    got = json.loads(found.stdout)
    apart = np.abs(np.array(got['p']) - expected).max()
    size = model.stat().st_size / 2**20
    print(
      f'| {kind} | {apart:.1e} | {size:.2f} | {got["one"]:.2f} | '
      f'{got["many"]:.2f} |'
    )


if __name__ == '__main__':
  main()
