"""Export of a run's model: one folder that needs no ssljax.

model.stablehlo      a function uint8 images [B, H, W, c] (or float32 features
[B, D]) -> probabilities [B, C] for any B, on CPU, CUDA
and TPU: preprocessing, the vote of all splits and the
temperature are inside
weights.safetensors  parameters, batch statistics and constants of the
preprocessing, with a leading axis [S] of the splits
classes.txt          a class name per line
README.md            model card
predict.py           an example that needs jax, flatbuffers and NumPy alone
"""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssljax import files, registry
from ssljax.augment import standard
from ssljax.errors import InputError, require
from ssljax.networks.cpu import conv
from ssljax.prediction import Predictor
from ssljax.runs import run_folder

PLATFORMS = 'cpu', 'cuda', 'tpu'
TOLERANCE = 1e-4  # of probabilities, to those of the run
_CHECKED = 256  # images
_PROGRAM = '''\
"""Predict images: python predict.py IMAGES.npy (needs jax, flatbuffers)."""
import pathlib, sys
import numpy as np
from jax import export

here = pathlib.Path(__file__).parent
model = export.deserialize((here / 'model.stablehlo').read_bytes())
classes = (here / 'classes.txt').read_text(encoding='utf-8').splitlines()
images = np.load(sys.argv[1])  # {row}
for i in range(0, len(images), 256):
  for p in np.asarray(model.call(images[i : i + 256])):
    print(classes[p.argmax()], f'{{p.max():.4f}}')
'''


def write(predictor: Predictor, folder: str | os.PathLike) -> dict[str, Any]:
  """Write the models of a run to a folder, and check what was written.

  Args:
    predictor: of a run.
    folder: is made; files of an earlier export are replaced.

  Returns:
    {'bytes': size of the function, 'difference': largest difference between
    its probabilities and the run's on up to 256 training images}.

  Raises:
    InputError: a library is missing, the network cannot be exported, or its
      probabilities differ.
  """
  safetensors = _library('safetensors.numpy', 'safetensors')
  _library('flatbuffers', 'flatbuffers')
  where = files.as_path('out', str(folder))
  model = predictor.models[0]
  weights = _stacked([m.weights for m in predictor.models])
  serialized = _function(predictor, weights)
  difference = _difference(predictor, serialized)
  require(
    difference <= TOLERANCE,
    f'the exported function differs from the run by {difference:.1e} in a '
    f'probability (at most {TOLERANCE:.0e} is accepted); report this network: '
    f'{model.config.network.network}',
  )
  flat = {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(weights)
  }
  row = (
    f'uint8 {("N", *model.shape)}'
    if len(model.shape) == 3
    else f'float32 {("N", *model.shape)}'
  ).replace("'", '')
  content = {
    'model.stablehlo': bytes(serialized),
    'weights.safetensors': safetensors.save(flat),
    'classes.txt': '\n'.join(predictor.classes).encode() + b'\n',
    'predict.py': _PROGRAM.format(row=row).encode(),
    'README.md': _card(predictor, row).encode(),
  }
  try:
    where.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
      run_folder.write_bytes(where / name, data)
  except OSError as error:
    raise InputError(
      f'`out`={where}: cannot be written ({error.strerror}): give another '
      'folder, or make room'
    ) from error
  return {'bytes': len(serialized), 'difference': difference}


def _library(module: str, package: str):
  """Import an optional library."""
  import importlib

  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise InputError(
      f"{package} is not installed: pip install 'ssljax[export]'"
    ) from error


def _stacked(trees: list[Any]) -> Any:
  """Return trees of arrays as one, with a leading axis [S]."""
  return jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), *trees)


def _function(predictor: Predictor, weights: Any) -> bytearray:
  """Return the serialized function of images `[B, ...]`."""
  from jax import export

  model, temperature = predictor.models[0], predictor.temperature
  height, width, channels = model.row_shape
  is_images = len(model.shape) == 3
  process = registry.preprocess_of(
    model.config.augmentation.preprocess, is_images
  )

  def probabilities(images):
    rows = images.reshape(-1, height, width, channels)
    pixels = standard.to_float(rows)

    def one(weights):
      params, stats, fitted = weights
      image = jax.vmap(process.apply, (None, 0))(fitted, pixels)
      logits = model.network.infer(params, stats, image).logits
      return jax.nn.softmax(logits.astype(jnp.float32))

    p = jnp.mean(jax.lax.map(one, weights), axis=0)
    return jax.nn.softmax(jnp.log(jnp.maximum(p, 1e-12)) / temperature)

  (batch,) = export.symbolic_shape('b')
  dtype = np.uint8 if is_images else np.float32
  argument = jax.ShapeDtypeStruct((batch, *model.shape), dtype)
  try:
    with conv.native():
      exported = export.export(jax.jit(probabilities), platforms=PLATFORMS)(
        argument
      )
    return exported.serialize()
  except Exception as error:  # tracing a user's network may raise anything
    raise InputError(
      f'the network {model.config.network.network} cannot be exported for any '
      f'batch size ({type(error).__name__}: {str(error)[:200]})'
    ) from error


def _difference(predictor: Predictor, serialized: bytearray) -> float:
  """Return the largest difference to the run on some training images."""
  from jax import export

  train, model = predictor.dataset.train, predictor.models[0]
  rows = np.arange(min(_CHECKED, len(train.labels)))
  images = train.read(rows).reshape(-1, *model.shape)
  call = export.deserialize(serialized).call
  both = [np.asarray(call(part)) for part in (images[:1], images)]
  expected = predictor.predict_proba(images)
  return float(
    max(np.abs(both[0] - expected[:1]).max(), np.abs(both[1] - expected).max())
  )


def _card(predictor: Predictor, row: str) -> str:
  """Return the model card."""
  model, data = predictor.models[0], predictor.dataset
  config, found = model.config, predictor.measured
  errors = model.result.get('test_error', {})
  test = ', '.join(f'{e:.2f}' for e in errors.get('last', ())) or 'not measured'
  lines = [
    f'# {predictor.name} on {pathlib.Path(data.name).name}',
    '',
    f'- Classes: {len(predictor.classes)}, listed in `classes.txt`.',
    f'- Input: {row}. Output: probabilities `[N, {len(predictor.classes)}]`.',
    f'- Training: {len(data.train.labels)} images, labels '
    f'{config.split.labels} per class, {predictor.name}, network '
    f'{config.network.network}, {config.run.steps} steps; the vote of '
    f'{len(predictor.models)} models, one for each label split.',
    f'- Test error of each split in %: {test}.',
  ]
  if found:
    low, high = found['accuracy_interval']
    lines += [
      f'- Accuracy on {found["images"]} held-out labelled images: '
      f'{found["accuracy"]:.1%}, 95 % interval {low:.1%} to {high:.1%}.',
      f'- Calibration error {found["calibration_error_after"]:.3f} at '
      f'temperature {predictor.temperature:.2f}.',
    ]
  return '\n'.join([*lines, '- Licence: not stated.', ''])
