"""`Model`: a trained classifier, and its record in a folder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ssljax import config as config_lib
from ssljax import files, registry
from ssljax.active import acquisition
from ssljax.analysis import calibration, classification
from ssljax.augment import standard
from ssljax.config import Config
from ssljax.core import UNLABELLED
from ssljax.data import arrays
from ssljax.errors import InputError, require
from ssljax.networks import network as networks
from ssljax.networks.cpu import conv
from ssljax.runs import build, run_folder
from ssljax.training import evaluate

MODEL, _WEIGHTS = 'model.json', 'weights.msgpack'
_BATCH = 256  # images per compiled call of a prediction


class _Evaluation(NamedTuple):
  accuracy: float  # share of correct predictions, 0 to 1
  error: float  # percent
  loss: float  # mean cross-entropy in nats
  images: int  # M


class Evaluation(_Evaluation):
  """The quality of predictions on labelled images.

  It is the tuple (accuracy, error, loss, images): share of correct predictions,
  error in percent, mean cross-entropy in nats, and number of images.

  Attributes:
    report: accuracy, balanced accuracy and macro F1, and precision, recall, F1
      and support of each class, with 95 % intervals; a dict by these names, see
      `classification.report`.
    confusion: `[C, C]` images by true (rows) and predicted class (columns).
  """

  report: dict[str, Any]
  confusion: np.ndarray

  def __new__(
    cls, *numbers: Any, confusion: np.ndarray | None = None
  ) -> 'Evaluation':
    """Hold the numbers of an evaluation, and its confusion matrix."""
    made = super().__new__(cls, *numbers)
    if confusion is not None:
      made.confusion = confusion
      made.report = classification.report(evaluate.counts_of(confusion))
    return made

  @property
  def balanced_accuracy(self) -> float:
    """Mean recall of the classes that have images, 0 to 1."""
    return self.report['balanced_accuracy']

  @property
  def macro_f1(self) -> float:
    """Mean F1 of the classes that have images or predictions, 0 to 1."""
    return self.report['macro_f1']


class Model:
  """A trained classifier.

  Attributes:
    classes: `[C]` names of the classes.
    shape: (H, W, c) of an image, or (D,) of a feature vector.
    config: the settings of the run that trained it.
    result: the content of the run's `result.json`.
    history: the measurements of the training, in order.
  """

  classes: tuple[str, ...]
  config: Config
  result: dict[str, Any]
  history: list[dict[str, Any]]

  def __init__(
    self,
    net: networks.Network,
    params: Any,
    stats: Any,
    *,
    config: Config,
    classes: Sequence[str],
    shape: tuple[int, ...],
    is_images: bool,
    fitted: Any = (),
    result: Mapping[str, Any] | None = None,
    history: Sequence[dict[str, Any]] = (),
    network: Any = None,
    white: float | None = None,
  ):
    """Hold a network and its weights; `fit` and `load` make models.

    Args:
      net: the network.
      params: its parameters.
      stats: its batch statistics.
      config: the settings of the run.
      classes: names `[C]`.
      shape: (H, W, c) as the network sees an image.
      is_images: False for feature vectors.
      fitted: what the preprocessing was fitted to.
      result: the content of `result.json`.
      history: the measurements of the training.
      network: what the user gave as the network, if it was a Python object.
      white: value of white in float images, if it was trained on some.
    """
    self.config, self.classes = config, tuple(classes)
    self.result, self.history = dict(result or {}), list(history)
    self._net, self._params, self._stats = net, params, stats
    self._row_shape, self._is_images = tuple(shape), is_images
    self._fitted, self._given_network, self._white = fitted, network, white

  @property
  def network(self) -> networks.Network:
    """The network."""
    return self._net

  @property
  def weights(self) -> tuple[Any, Any, Any]:
    """Parameters, batch statistics, and constants of the preprocessing."""
    return self._params, self._stats, self._fitted

  @property
  def row_shape(self) -> tuple[int, ...]:
    """(H, W, c) as the network sees an image; (1, D, 1) of features."""
    return self._row_shape

  @property
  def shape(self) -> tuple[int, ...]:
    """(H, W, c) of an image, or (D,) of a feature vector."""
    height, width, channels = self._row_shape
    return (height, width, channels) if self._is_images else (width,)

  def __repr__(self) -> str:
    """Name the method, the network and the classes."""
    named = self.config.network.network
    network = (
      type(self._given_network).__name__ if self._given_network else named
    )
    return (
      f'Model(method={self.config.method!r}, network={network!r}, '
      f'classes={len(self.classes)}, shape={self.shape})'
    )

  def predict_proba(self, images: ArrayLike) -> np.ndarray:
    """Return the probabilities `[M, C]` of images `[M, ...]`.

    Raises:
      InputError: their shape or values differ from the training images'.
    """
    return calibration.softmax(self.logits(images))

  def logits(self, images: ArrayLike) -> np.ndarray:
    """Return the logits `[M, C]` float32 of images `[M, ...]`."""
    return self.outputs(images)[0]

  def predict(self, images: ArrayLike) -> np.ndarray:
    """Return the most probable class `[M]` int of images `[M, ...]`."""
    return np.argmax(self.logits(images), axis=-1)

  def embed(self, images: ArrayLike) -> np.ndarray:
    """Return the embeddings `[M, D]` of images `[M, ...]`."""
    return self.outputs(images)[1]

  def evaluate(self, images: ArrayLike, labels: ArrayLike) -> Evaluation:
    """Compare predictions with labels `[M]`; rows with label -1 are left out.

    Raises:
      InputError: there is no labelled image, or a label outside the classes.
    """
    images, y = np.asarray(images), np.asarray(labels)
    require(
      y.ndim == 1 and y.dtype.kind in 'iu',
      f'`labels`: has shape {y.shape} and dtype {y.dtype}; give one '
      'integer class per image',
    )
    require(
      len(y) == len(images),
      f'`labels`: has {len(y)} rows, `images` {len(images)}; give one '
      'label per image',
    )
    known = y != UNLABELLED
    require(known.any(), '`labels`: no image has a label; give some labels')
    y = y[known]
    require(
      y.min() >= 0 and y.max() < len(self.classes),
      f'`labels`: {y.min()} to {y.max()}; give classes 0 to '
      f'{len(self.classes) - 1}, or -1 where unlabelled',
    )
    p = self.predict_proba(images[known])
    best = np.argmax(p, axis=-1)
    right = float(np.mean(best == y))
    of_truth = np.take_along_axis(p, y[:, None].astype(int), axis=-1)
    loss = -float(np.mean(np.log(np.maximum(of_truth, 1e-12))))
    matrix = evaluate.confusion(y, best, len(self.classes))
    numbers = right, 100 * (1 - right), loss, len(y)
    return Evaluation(*numbers, confusion=matrix)

  def outputs(self, images: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return logits `[M, C]` and embeddings `[M, D]` of images `[M, ...]`."""
    return self._in_batches(self._infer, images)

  def sampled(
    self, images: ArrayLike, passes: int = 10, seed: int = 0
  ) -> acquisition.Sampled:
    """Return statistics of passes with dropout (Gal, Ghahramani 2016).

    Acquisition functions such as `active.acquisition.bald` compare them.
    Without dropout in the network all passes agree.

    Args:
      images: `[M, ...]`.
      passes: T.
      seed: of the dropout masks, which all images of a pass share.
    """
    key = jax.random.key(seed)
    sample = self._sample

    def infer(*values: Any) -> acquisition.Sampled:
      return sample(*values, key, passes)

    return acquisition.Sampled(*self._in_batches(infer, images))

  def _in_batches(self, infer: Callable[..., Any], images: ArrayLike) -> Any:
    """Return the outputs of a function of a batch for images `[M, ...]`."""
    rows = arrays.convert(images, white=self._white)
    require(
      rows.shape[1:] == self.shape,
      f'`images`: rows have shape {rows.shape[1:]}, the model was trained on '
      f'{self.shape}: give images of that shape',
    )
    rows = rows.reshape(len(rows), *self._row_shape)
    found = []
    for start in range(0, max(1, len(rows)), _BATCH):
      chunk = rows[start : start + _BATCH]
      padded = np.resize(chunk, (_BATCH, *chunk.shape[1:]))
      outputs = infer(self._params, self._stats, self._fitted, padded)
      found.append([np.asarray(x)[: len(chunk)] for x in outputs])
    return tuple(map(np.concatenate, zip(*found, strict=True)))

  def _preprocessed(self, fitted: Any, pixels: jax.Array) -> jax.Array:
    """Return images `[B, H, W, c]` as the network sees them."""
    process = registry.preprocess_of(
      self.config.augmentation.preprocess, self._is_images
    )
    image = standard.to_float(pixels)
    return jax.vmap(process.apply, (None, 0))(fitted, image)

  @functools.cached_property
  def _infer(self) -> Callable[..., Any]:
    def infer(
      params: Any, stats: Any, fitted: Any, pixels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
      image = self._preprocessed(fitted, pixels)
      outputs = self._net.infer(params, stats, image)
      return outputs.logits.astype(jnp.float32), outputs.embedding

    return jax.jit(infer, compiler_options=conv.compiler_options())

  @functools.cached_property
  def _sample(self) -> Callable[..., acquisition.Sampled]:
    def sample(
      params: Any,
      stats: Any,
      fitted: Any,
      pixels: jax.Array,
      key: jax.Array,
      passes: int,
    ) -> acquisition.Sampled:
      image = self._preprocessed(fitted, pixels)
      run = acquisition.sampler(self._net, passes)
      return run(params, stats, image, key)

    options = conv.compiler_options()
    return jax.jit(sample, static_argnums=5, compiler_options=options)

  def share_compiled(self, other: 'Model') -> None:
    """Use the compiled functions of a model of the same run."""
    self._infer, self._sample = other._infer, other._sample

  def __getstate__(self) -> dict[str, Any]:
    """Drop the functions, which cannot be pickled."""
    dropped = '_infer', '_sample', '_net'
    return {k: v for k, v in self.__dict__.items() if k not in dropped}

  def __setstate__(self, state: Mapping[str, Any]) -> None:
    """Make the network again, from its name or from the user's object."""
    self.__dict__.update(state)
    self._net = network_of(self.config, self._given_network, len(self.classes))

  # Saving.

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Write the model to a folder, which `load` reads.

    Raises:
      InputError: the folder cannot be written.
    """
    folder = files.as_place('folder', str(folder))
    weights = flax.serialization.to_bytes(
      {'params': self._params, 'stats': self._stats, 'fitted': self._fitted}
    )
    record = {
      'format': 1,
      'classes': list(self.classes),
      'shape': list(self._row_shape),
      'is_images': self._is_images,
      'white': self._white,
      'sha256': hashlib.sha256(weights).hexdigest(),
      'config': config_lib.to_json(self.config),
      'result': self.result,
    }
    try:
      folder.mkdir(parents=True, exist_ok=True)
      run_folder.write_bytes(folder / _WEIGHTS, weights)
      run_folder.write_json(folder / MODEL, record)
    except OSError as error:
      raise InputError(
        f'`folder`={folder}: the model cannot be written ({error.strerror}): '
        'give another folder, or make room'
      ) from error


# Loading.


@contextlib.contextmanager
def _damage(folder: pathlib.Path) -> Iterator[None]:
  """Turn whatever a damaged model makes foreign code raise into one line."""
  try:
    yield
  except InputError:
    raise
  except Exception as error:  # msgpack, JSON and NumPy raise many kinds
    raise InputError(
      f'`folder`={folder}: the model is incomplete or damaged '
      f'({type(error).__name__}: {str(error)[:80]!r}): save it again'
    ) from error


def load_saved(folder: pathlib.Path, network: Any = None) -> Model:
  """Load the model that `Model.save` wrote to a folder.

  Args:
    folder: written by `Model.save`.
    network: the user's object, if the network is no named one.

  Raises:
    InputError: the folder is incomplete or damaged.
  """
  with _damage(folder):
    record = json.loads((folder / MODEL).read_text())
    weights = (folder / _WEIGHTS).read_bytes()
    require(
      hashlib.sha256(weights).hexdigest() == record['sha256'],
      f'`folder`={folder}: {_WEIGHTS} does not match its checksum in {MODEL}: '
      'save the model again',
    )
    config = config_lib.from_json(record['config'])
    net = network_of(config, network, len(record['classes']))
    tree = _restored(net, record, weights)
    return Model(
      net,
      tree['params'],
      tree['stats'],
      config=config,
      classes=record['classes'],
      shape=tuple(record['shape']),
      is_images=record['is_images'],
      fitted=tree['fitted'],
      result=record['result'],
      network=network,
      white=record['white'],
    )


def network_of(config: Config, network: Any, classes: int) -> networks.Network:
  """Return the network of a model.

  Args:
    config: names the network, unless it was a Python object.
    network: the user's object, or None.
    classes: C.
  """
  if network is not None:
    return networks.as_network(network, classes)
  require(
    not any(part.startswith('net:') for part in config.custom),
    '`network`: the model was trained with a network that is a Python object: '
    'give the same one to load',
  )
  return build.make_network(config, classes)


def _restored(
  net: networks.Network, record: Mapping[str, Any], weights: bytes
) -> dict[str, Any]:
  """Return the weights in the structure that the network gives them."""
  shape: Any = tuple(record['shape'])
  image = jax.ShapeDtypeStruct((1, *shape), np.float32)
  params, stats = jax.eval_shape(net.init, jax.random.key(0), image)
  zeros = lambda tree: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
  process = registry.preprocess_of(
    record['config']['augmentation']['preprocess'], record['is_images']
  )
  like = {
    'params': zeros(params),
    'stats': zeros(stats),
    'fitted': zeros(process.shapes(shape)),
  }
  return flax.serialization.from_bytes(like, weights)
