"""Export of a run's model: one folder that needs no ssljax.

The folder holds

  model.stablehlo      a function uint8 images [B, H, W, c] (or float32 features
                       [B, D]) -> probabilities [B, C] for any B, on CPU, CUDA
                       and TPU: preprocessing, the vote of all splits and the
                       temperature are inside
  model.onnx           the same function for ONNX Runtime (`formats`)
  weights.safetensors  parameters, batch statistics and constants of the
                       preprocessing, with a leading axis [S] of the splits
  classes.txt          a class name per line
  README.md            model card
  predict.py           predicts arrays, and image files where Pillow is there;
                       it needs jax, flatbuffers and NumPy alone
  predict_onnx.py      the same with onnxruntime and NumPy alone
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssljax import files, registry
from ssljax.augment import standard
from ssljax.data.tfds_reader import one_line
from ssljax.errors import InputError, choose, require
from ssljax.networks.cpu import conv
from ssljax.prediction import Predictor
from ssljax.runs import run_folder

PLATFORMS = 'cpu', 'cuda', 'tpu'
TOLERANCE = 1e-4  # of probabilities, to those of the run
_CHECKED = 256  # images
# The example programs: the head of a format, how rows are read, and the end.
_HEADS = {
  'stablehlo': """\
\"""Predict {rows}: python predict.py PATH (needs jax and flatbuffers).

{paths}\"""
import pathlib, sys
import numpy as np
from jax import export

here = pathlib.Path(__file__).parent
model = export.deserialize((here / 'model.stablehlo').read_bytes())
predict = lambda x: np.asarray(model.call(x))
""",
  'onnx': """\
\"""Predict {rows}: python predict_onnx.py PATH (needs onnxruntime).

{paths}\"""
import pathlib, sys
import numpy as np
import onnxruntime

here = pathlib.Path(__file__).parent
model = onnxruntime.InferenceSession(str(here / 'model.onnx'))
predict = lambda x: model.run(None, {{'images': x}})[0]
""",
}
_FROM_ARRAY = """\
rows = np.load(sys.argv[1])
names, read = range(len(rows)), rows.__getitem__
"""
_FROM_IMAGES = """\
path, side = pathlib.Path(sys.argv[1]), {side}

def pixels(file):
  \"""Return an image as the model was trained on it.\"""
  from PIL import Image, ImageOps
  with Image.open(file) as image:
    image.draft('{mode}', (2 * side, 2 * side))
    image = ImageOps.exif_transpose(image)
  if image.mode.startswith('I'):  # 16 bits
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGB', image.size, 'white')
    white.paste(image, mask=image.getchannel('A'))
    image = white
  size = [max(side, round(s * side / min(image.size))) for s in image.size]
  left, top = ((s - side) // 2 for s in size)
  image = image.convert('{mode}').resize(size, Image.Resampling.BILINEAR)
  return image.crop((left, top, left + side, top + side))

if path.suffix == '.npy':
  rows = np.load(path)
  names, read = range(len(rows)), rows.__getitem__
else:
  files = path.rglob('[!.]*') if path.is_dir() else [path]
  names = sorted(file for file in files if file.is_file())
  read = lambda file: np.asarray(pixels(file)).reshape({shape})
"""
_END = """\
classes = (here / 'classes.txt').read_text(encoding='utf-8').splitlines()
for i in range(0, len(names), 256):
  found = {{}}
  for name in names[i : i + 256]:
    try:
      found[name] = read(name)
    except Exception as error:
      print(f'{{name}} is left out: {{error}}', file=sys.stderr)
  chances = predict(np.stack([*found.values()])) if found else ()
  for name, p in zip(found, chances):
    print(classes[p.argmax()], f'{{p.max():.4f}}', name, sep='\\t')
"""
_PROGRAMS = {'stablehlo': 'predict.py', 'onnx': 'predict_onnx.py'}


def check(formats: Sequence[str]) -> None:
  """Raise `InputError` for an unknown format, or if a library is missing."""
  for name in formats:
    for library in LIBRARIES[choose('format', name, FORMATS)]:
      _library(*library)


def write(
  predictor: Predictor,
  folder: str | os.PathLike[str],
  formats: Sequence[str] = ('stablehlo',),
) -> dict[str, dict[str, Any]]:
  """Write the models of a run to a folder, and check what was written.

  Args:
    predictor: of a run.
    folder: is made; files of an earlier export are replaced.
    formats: of `FORMATS`.

  Returns:
    By format, {'bytes': size of the function, 'difference': largest difference
    between its probabilities and the run's on up to 256 training images}.

  Raises:
    InputError: a library is missing, the network cannot be exported, its
      probabilities differ, or a file is there that no export has written.
  """
  check(formats)
  where = files.as_path('out', str(folder))
  for name in ('README.md', 'predict.py'):
    require(
      not (where / name).exists() or (where / 'classes.txt').exists(),
      f'`out`={where}: has a {name} that no export has written: give another '
      'folder',
    )
  content: dict[str, bytes] = {}
  found: dict[str, dict[str, Any]] = {}
  for name in dict.fromkeys(formats):
    model, call = FORMATS[name](predictor)
    found[name] = {'bytes': len(model)} | _checked(predictor, call)
    content |= _files(predictor, name, model)
  try:
    where.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
      run_folder.write_bytes(where / name, data)
  except OSError as error:
    raise InputError(
      f'`out`={where}: cannot be written ({error.strerror}): give another '
      'folder, or make room'
    ) from error
  return found


def _checked(predictor: Predictor, call: Callable[..., Any]) -> dict[str, Any]:
  """Compare an exported function with the run.

  Raises:
    InputError: it differs.
  """
  difference = _difference(predictor, call)
  require(
    difference <= TOLERANCE,
    f'the exported function differs from the run by {difference:.1e} in a '
    f'probability (at most {TOLERANCE:.0e} is accepted); report this network: '
    f'{predictor.models[0].config.network.network}',
  )
  return {'difference': difference}


def _files(predictor: Predictor, name: str, model: bytes) -> dict[str, bytes]:
  """Return the files of an export in a format."""
  shape = predictor.models[0].shape
  row = (
    f'uint8 {("N", *shape)}' if len(shape) == 3 else f'float32 {("N", *shape)}'
  ).replace("'", '')
  common = {
    'classes.txt': '\n'.join(predictor.classes).encode() + b'\n',
    'README.md': _card(predictor, row).encode(),
  }
  common[_PROGRAMS[name]] = _program(name, shape, row).encode()
  if name == 'onnx':
    return common | {'model.onnx': model}
  safetensors = _library('safetensors.numpy', 'safetensors', 'export')
  flat = {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(
      _stacked([m.weights for m in predictor.models])
    )
  }
  return common | {
    'model.stablehlo': model,
    'weights.safetensors': safetensors.save(flat),
  }


def _program(name: str, shape: tuple[int, ...], row: str) -> str:
  """Return the example program of a format.

  Args:
    name: of the format.
    shape: (H, W, c) of an image, or (D,).
    row: type and shape of the arrays it takes.
  """
  is_square = len(shape) == 3 and shape[0] == shape[1]
  paths = f'PATH is an .npy file: {row}'
  if is_square:
    paths += ', an image file or a folder of images (needs Pillow)'
  about = {'rows': 'images' if len(shape) == 3 else 'features', 'paths': paths}
  mode = 'L' if shape[-1] == 1 else 'RGB'
  read = _FROM_IMAGES if is_square else _FROM_ARRAY
  how = {'side': shape[0], 'mode': mode, 'shape': shape}
  return (_HEADS[name] + read + _END).format(**about, **how)


def _library(module: str, package: str, extra: str) -> Any:
  """Import an optional library."""
  import importlib

  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise InputError(
      f"{package} is not installed: pip install 'ssljax[{extra}]'"
    ) from error


def _stacked(trees: list[Any]) -> Any:
  """Return trees of arrays as one, with a leading axis [S]."""
  return jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), *trees)


def _probabilities(
  predictor: Predictor, votes: Callable[..., Any]
) -> Callable[..., Any]:
  """Return the function of images `[B, ...]`.

  Args:
    predictor: of a run.
    votes: maps a function over the weights of all splits, to `[S, B, C]`.
  """
  model, temperature = predictor.models[0], predictor.temperature
  height, width, channels = model.row_shape
  process = registry.preprocess_of(
    model.config.augmentation.preprocess, len(model.shape) == 3
  )

  def probabilities(images: jax.Array) -> jax.Array:
    rows = images.reshape(-1, height, width, channels)
    pixels = standard.to_float(rows)

    def one(weights: tuple[Any, Any, Any]) -> jax.Array:
      params, stats, fitted = weights
      image = jax.vmap(process.apply, (None, 0))(fitted, pixels)
      logits = model.network.infer(params, stats, image).logits
      return jax.nn.softmax(logits.astype(jnp.float32))

    p = jnp.mean(votes(one), axis=0)
    return jax.nn.softmax(jnp.log(jnp.maximum(p, 1e-12)) / temperature)

  return probabilities


def _dtype(predictor: Predictor) -> Any:
  return np.uint8 if len(predictor.models[0].shape) == 3 else np.float32


@contextlib.contextmanager
def _unsupported(predictor: Predictor) -> Iterator[None]:
  """Turn a failure to convert a network into one line."""
  try:
    yield
  except Exception as error:  # tracing a user's network may raise anything
    raise InputError(
      f'the network {predictor.models[0].config.network.network} cannot be '
      f'exported for any batch size ({type(error).__name__}: '
      f'{one_line(error):.200})'
    ) from error


def _stablehlo(predictor: Predictor) -> tuple[bytes, Callable[..., Any]]:
  """Return the serialized function, and the function as it is loaded."""
  from jax import export

  weights = _stacked([m.weights for m in predictor.models])
  votes = lambda one: jax.lax.map(one, weights)
  (batch,) = export.symbolic_shape('b')
  argument = jax.ShapeDtypeStruct(
    (batch, *predictor.models[0].shape), _dtype(predictor)
  )
  with _unsupported(predictor), conv.native():
    exported = export.export(
      jax.jit(_probabilities(predictor, votes)), platforms=PLATFORMS
    )(argument)
    serialized = exported.serialize()
  return bytes(serialized), export.deserialize(serialized).call


def _onnx(predictor: Predictor) -> tuple[bytes, Callable[..., Any]]:
  """Return the function as an ONNX file, and as ONNX Runtime computes it."""
  converter = _library('jax2onnx', 'jax2onnx', 'onnx')
  runtime = _library('onnxruntime', 'onnxruntime', 'onnx')
  weights = [m.weights for m in predictor.models]
  votes = lambda one: jnp.stack([one(each) for each in weights])
  argument = types.SimpleNamespace(
    shape=('B', *predictor.models[0].shape), dtype=np.dtype(_dtype(predictor))
  )
  with _unsupported(predictor), conv.native(windows=False):
    model = converter.to_onnx(
      _probabilities(predictor, votes),
      inputs=[argument],
      input_names=['images'],
      output_names=['probabilities'],
      model_name='ssljax',
    ).SerializeToString()
    session = runtime.InferenceSession(
      model, providers=['CPUExecutionProvider']
    )

  def call(images: np.ndarray) -> np.ndarray:
    with _unsupported(predictor):
      return session.run(None, {'images': images})[0]

  return model, call


FORMATS = {'stablehlo': _stablehlo, 'onnx': _onnx}
# The modules, packages and extras that a format needs.
LIBRARIES = {
  'stablehlo': (
    ('safetensors.numpy', 'safetensors', 'export'),
    ('flatbuffers', 'flatbuffers', 'export'),
  ),
  'onnx': (
    ('jax2onnx', 'jax2onnx', 'onnx'),
    ('onnxruntime', 'onnxruntime', 'onnx'),
  ),
}


def _difference(predictor: Predictor, call: Callable[..., Any]) -> float:
  """Return the largest difference to the run on some training images."""
  train, model = predictor.dataset.train, predictor.models[0]
  rows = np.arange(min(_CHECKED, len(train.labels)))
  images = train.read(rows).reshape(-1, *model.shape)
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
