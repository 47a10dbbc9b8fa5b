"""Pretrained networks that turn images into features, from other libraries.

A backbone is an ONNX file, run by ONNX Runtime, or a model of timm, run by
PyTorch. Both are optional. Letters: B images of a batch, D features.
"""

from collections.abc import Callable, Sequence
import hashlib
import importlib
import pathlib
from typing import Any, NamedTuple

import numpy as np

from ssljax import files
from ssljax.data.arrays import MAX_SIDE
from ssljax.data.tfds_reader import few, one_line
from ssljax.errors import InputError, positive, require

TIMM = 'timm:'
SIDE = 224  # of the input, where the backbone leaves it open
# Of the pixels of ImageNet in [0, 1], red, green and blue.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PIXELS = {'tensor(float)': np.float32, 'tensor(float16)': np.float16}


class Preprocessing(NamedTuple):
  """Preprocessing of a backbone: x = (pixel / 255 − mean) / std.

  The shorter side is resized to side / crop, and the centre is cropped.
  """

  side: int
  crop: float  # in (0, 1]
  mean: tuple[float, ...]  # one value, or one for each of three channels
  std: tuple[float, ...]

  @property
  def resized(self) -> int:
    """The length of the shorter side before the centre is cropped."""
    return round(self.side / self.crop)


class Backbone(NamedTuple):
  """A function of images, and what it expects."""

  name: str
  fingerprint: str  # of the weights
  preprocessing: Preprocessing
  channels: int
  # uint8 [B, resized, resized, c] -> float32 [B, D]
  apply: Callable[[np.ndarray], np.ndarray]


class Asked(NamedTuple):
  """Settings that a user gave; None takes those of the backbone."""

  image_size: int | None = None
  crop: float | None = None
  mean: Sequence[float] | None = None
  std: Sequence[float] | None = None
  output: str | None = None


_NOTHING = Asked()


def load(name: str, asked: Asked = _NOTHING) -> Backbone:
  """Return a backbone.

  Args:
    name: FILE.onnx, or timm:NAME.
    asked: settings.

  Raises:
    InputError: there is no such backbone, it cannot be used, or a library is
      missing.
  """
  _check(asked)
  if name.startswith(TIMM):
    return _timm(name, asked)
  return _onnx(name, asked)


def _check(asked: Asked) -> None:
  """Raise `InputError` for settings that no backbone can have."""
  if asked.image_size is not None:
    positive(image_size=asked.image_size)
  if asked.crop is not None:
    require(
      0 < asked.crop <= 1,
      f'`crop`={asked.crop}: give the share of the side that is kept, above 0 '
      'and at most 1',
    )
  for what, values in (('mean', asked.mean), ('std', asked.std)):
    require(
      values is None or len(values) in (1, 3),
      f'`{what}`: has {len(values or ())} numbers; give one, or three for red, '
      'green and blue',
    )
    require(
      values is None or bool(np.isfinite(values).all()),
      f'`{what}`={few(values or (), 3)}: give finite numbers',
    )
  require(
    asked.std is None or min(asked.std) > 0,
    f'`std`={few(asked.std or (), 3)}: give numbers above 0',
  )


def _preprocessing(asked: Asked, side: int, crop, mean, std) -> Preprocessing:
  """Return the settings that were asked for, else the given ones."""
  found = Preprocessing(
    asked.image_size or side,
    asked.crop or crop,
    tuple(asked.mean or mean),
    tuple(asked.std or std),
  )
  require(
    found.resized <= MAX_SIDE,
    f'`image_size`={found.side}: images would be resized to {found.resized} '
    f'pixels; give a side of at most {MAX_SIDE}',
  )
  return found


def _centre(images: np.ndarray, side: int) -> np.ndarray:
  """Return the centres `[B, side, side, c]` of images."""
  first = (images.shape[1] - side) // 2
  return images[:, first : first + side, first : first + side]


def _coloured(images: np.ndarray, channels: int) -> np.ndarray:
  """Return images `[B, H, W, channels]`, grey ones in all channels."""
  if images.shape[-1] == channels:
    return images
  if channels == 3:
    return np.repeat(images, 3, axis=-1)
  weights = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as Pillow
  return (images @ weights + 0.5).astype(np.uint8)[..., None]


def normalized(images: np.ndarray, how: Preprocessing) -> np.ndarray:
  """Return the input float32 `[B, side, side, c]` of uint8 images."""
  mean, std = (np.asarray(x, np.float32) for x in (how.mean, how.std))
  if images.shape[-1] == 1:
    mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
  return (_centre(images, how.side) / np.float32(255) - mean) / std


def pooled(output: np.ndarray, channels_last: bool) -> np.ndarray:
  """Return features `[B, D]` of a network's output.

  Args:
    output: `[B, D]`; maps `[B, D, H, W]`, of which the mean over H and W is
      taken; or tokens `[B, T, D]`, of which the mean over T is taken.
    channels_last: maps are `[B, H, W, D]`.
  """
  if output.ndim == 4:
    output = output.mean(axis=(1, 2) if channels_last else (2, 3))
  elif output.ndim == 3:
    output = output.mean(axis=1)
  return np.asarray(output, np.float32).reshape(len(output), -1)


def _library(name: str, command: str, why: str) -> Any:
  """Import an optional library."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise InputError(
      f'`backbone`: {why} needs {name} ({one_line(error)}): {command}'
    ) from error


# ONNX.


class _Input(NamedTuple):
  """The image input of an ONNX file."""

  name: str
  dtype: Any
  channels_last: bool
  batch: int | None  # None where any
  side: int | None
  channels: int


def _session(where: str, path: pathlib.Path) -> Any:
  """Return ONNX Runtime's session of a file."""
  runtime = _library(
    'onnxruntime', "pip install 'ssljax[embed]'", 'an ONNX file'
  )
  options = runtime.SessionOptions()
  options.log_severity_level = 4
  # Waiting threads would take the cores that decode the images.
  options.add_session_config_entry('session.intra_op.allow_spinning', '0')
  try:
    return runtime.InferenceSession(
      str(path), options, providers=runtime.get_available_providers()
    )
  except Exception as error:  # ONNX Runtime raises kinds of its own
    raise InputError(
      f'{where}: is no ONNX file that ONNX Runtime can load '
      f'({one_line(error):.150}); export the network again'
    ) from error


def _onnx(name: str, asked: Asked) -> Backbone:
  """Return the backbone of an ONNX file."""
  where = f'`backbone`={name}'
  path = files.as_path('backbone', name)
  require(
    path.suffix.lower() == '.onnx' or files.is_regular(path),
    f'{where}: is neither a file nor timm:NAME; give FILE.onnx, or the name of '
    'a model of timm as timm:NAME',
  )
  require(
    files.is_regular(path),
    f'{where}: there is no such file; give an ONNX file',
  )
  session = _session(where, path)
  given = _input(where, session.get_inputs())
  output = _output(where, session.get_outputs(), asked.output)
  require(
    None in (given.side, asked.image_size) or given.side == asked.image_size,
    f'`image_size`={asked.image_size}: the input of {where} has the side '
    f'{given.side}; leave it out',
  )
  how = _preprocessing(asked, given.side or SIDE, 1.0, MEAN, STD)
  raw = given.dtype == np.uint8
  require(
    not raw or (asked.mean is None and asked.std is None),
    f'`mean`, `std`: the input of {where} is uint8, which is not normalised; '
    'leave them out',
  )

  def apply(images: np.ndarray) -> np.ndarray:
    images = _coloured(images, given.channels)
    x = _centre(images, how.side) if raw else normalized(images, how)
    if not given.channels_last:
      x = x.transpose(0, 3, 1, 2)
    x = np.ascontiguousarray(x, given.dtype)
    parts = []
    for first in range(0, len(x), given.batch or len(x)):
      part = x[first : first + (given.batch or len(x))]
      count = len(part)
      if given.batch:
        part = np.pad(part, [(0, given.batch - count)] + [(0, 0)] * 3)
      try:
        (found,) = session.run([output], {given.name: part})
      except Exception as error:  # ONNX Runtime raises kinds of its own
        raise InputError(
          f'{where}: cannot be computed at {how.side}x{how.side} pixels '
          f'({one_line(error):.150}); give another `image_size`'
        ) from error
      require(
        np.size(found) > 0,
        f'{where}: has no output at {how.side}x{how.side} pixels; give a '
        'larger `image_size`',
      )
      parts.append(pooled(np.asarray(found)[:count], given.channels_last))
    return np.concatenate(parts)

  digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
  return Backbone(path.name, digest, how, given.channels, apply)


def _input(where: str, inputs) -> _Input:
  """Return the one input of images, or raise `InputError`."""
  require(
    len(inputs) == 1,
    f'{where}: has the inputs {few([i.name for i in inputs])}; give a network '
    'with one input, of images',
  )
  shape, kind = list(inputs[0].shape), inputs[0].type
  size = lambda axis: axis if isinstance(axis, int) and axis > 0 else None
  sizes = [size(axis) for axis in shape]
  known = {**_PIXELS, 'tensor(uint8)': np.uint8}
  colours = [
    axis for axis in (1, 3) if len(sizes) == 4 and sizes[axis] in (1, 3)
  ]
  fits = kind in known and bool(colours)
  last = fits and colours[0] == 3
  sides = sizes[1:3] if last else sizes[2:4]
  require(
    fits and len(set(sides) - {None}) < 2,
    f'{where}: its input is {kind} {shape}; images are float [N, 3, H, W] or '
    '[N, H, W, 3] with H = W',
  )
  side = next((s for s in sides if s), None)
  channels = sizes[colours[0]]
  assert channels is not None
  return _Input(inputs[0].name, known[kind], last, sizes[0], side, channels)


def _output(where: str, outputs, asked: str | None) -> str:
  """Return the name of the output to use."""
  names = [output.name for output in outputs]
  require(
    asked is not None or len(names) == 1,
    f'`output`: {where} has the outputs {few(names)}; give one',
  )
  require(
    asked is None or asked in names,
    f'`output`={asked}: {where} has the outputs {few(names)}; give one of them',
  )
  return asked or names[0]


# timm.


def _timm(name: str, asked: Asked) -> Backbone:
  """Return a pretrained model of timm without its classifier."""
  where = f'`backbone`={name}'
  timm = _library('timm', 'pip install timm', 'timm:NAME')
  torch = _library('torch', 'pip install torch', 'timm:NAME')
  require(
    asked.output is None, f'`output`: {where} has one output; leave it out'
  )
  try:
    model = timm.create_model(
      name.removeprefix(TIMM), pretrained=True, num_classes=0
    ).eval()
  except Exception as error:  # unknown names, networks and disks
    raise InputError(
      f'{where}: timm cannot make it ({one_line(error):.150}); '
      'timm.list_models(pretrained=True) lists the names, whose weights timm '
      'downloads once'
    ) from error
  own = timm.data.resolve_model_data_config(model)
  how = _preprocessing(
    asked, own['input_size'][-1], own['crop_pct'], own['mean'], own['std']
  )
  channels = own['input_size'][0]
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = model.to(device)

  def apply(images: np.ndarray) -> np.ndarray:
    x = normalized(_coloured(images, channels), how).transpose(0, 3, 1, 2)
    try:
      with torch.inference_mode():
        found = model(torch.from_numpy(np.ascontiguousarray(x)).to(device))
    except RuntimeError as error:
      raise InputError(
        f'{where}: cannot be computed at {how.side}x{how.side} pixels '
        f'({one_line(error):.150}); give another `image_size`'
      ) from error
    return pooled(found.cpu().numpy(), False)

  digest = hashlib.sha256()
  for key, value in sorted(model.state_dict().items()):
    digest.update(key.encode() + value.cpu().numpy().tobytes())
  return Backbone(name, digest.hexdigest()[:16], how, channels, apply)
