"""The public Python API: `fit`, `load` and `Model`.

    import ssljax
    model = ssljax.fit(images, labels, method='madnn', seed=0)
    model.predict(new_images)

`images` are `[N, H, W, c]` or features `[N, D]`; `labels` are `[N]` integers
with -1 for an unlabelled image.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import functools
import hashlib
import inspect
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from ssljax import config as config_lib
from ssljax import files, optimizers, registry, signatures
from ssljax.analysis import calibration, classification
from ssljax.augment import standard
from ssljax.config import Config
from ssljax.core import UNLABELLED, Method
from ssljax.data import arrays, datasets
from ssljax.errors import InputError, require
from ssljax.networks import network as networks
from ssljax.networks.cpu import conv
from ssljax.runs import build, defaults, execute, run_folder
from ssljax.runs import load as load_lib
from ssljax.training import evaluate, metrics_writer

_MODEL, _WEIGHTS = 'model.json', 'weights.msgpack'
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

  def __new__(cls, *numbers, confusion=None):
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
  def row_shape(self) -> tuple[int, int, int]:
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

  def predict_proba(self, images) -> np.ndarray:
    """Return the probabilities `[M, C]` of images `[M, ...]`.

    Raises:
      InputError: their shape or values differ from the training images'.
    """
    return calibration.softmax(self.logits(images))

  def logits(self, images) -> np.ndarray:
    """Return the logits `[M, C]` float32 of images `[M, ...]`."""
    return self.outputs(images)[0]

  def predict(self, images) -> np.ndarray:
    """Return the most probable class `[M]` int of images `[M, ...]`."""
    return np.argmax(self.logits(images), axis=-1)

  def embed(self, images) -> np.ndarray:
    """Return the embeddings `[M, D]` of images `[M, ...]`."""
    return self.outputs(images)[1]

  def evaluate(self, images, labels) -> Evaluation:
    """Compare predictions with labels `[M]`; rows with label -1 are left out.

    Raises:
      InputError: there is no labelled image, or a label outside the classes.
    """
    labels = np.asarray(labels)
    require(
      labels.ndim == 1 and labels.dtype.kind in 'iu',
      f'`labels`: has shape {labels.shape} and dtype {labels.dtype}; give one '
      'integer class per image',
    )
    require(
      len(labels) == len(images),
      f'`labels`: has {len(labels)} rows, `images` {len(images)}; give one '
      'label per image',
    )
    known = labels != UNLABELLED
    require(known.any(), '`labels`: no image has a label; give some labels')
    labels = labels[known]
    require(
      labels.min() >= 0 and labels.max() < len(self.classes),
      f'`labels`: {labels.min()} to {labels.max()}; give classes 0 to '
      f'{len(self.classes) - 1}, or -1 where unlabelled',
    )
    p = self.predict_proba(np.asarray(images)[known])
    best = np.argmax(p, axis=-1)
    right = float(np.mean(best == labels))
    of_truth = np.take_along_axis(p, labels[:, None].astype(int), axis=-1)
    loss = -float(np.mean(np.log(np.maximum(of_truth, 1e-12))))
    matrix = evaluate.confusion(labels, best, len(self.classes))
    numbers = right, 100 * (1 - right), loss, len(labels)
    return Evaluation(*numbers, confusion=matrix)

  def outputs(self, images) -> tuple[np.ndarray, np.ndarray]:
    """Return logits `[M, C]` and embeddings `[M, D]` of images `[M, ...]`."""
    rows = arrays.convert(images, white=self._white)
    require(
      rows.shape[1:] == self.shape,
      f'`images`: rows have shape {rows.shape[1:]}, the model was trained on '
      f'{self.shape}: give images of that shape',
    )
    rows = rows.reshape(len(rows), *self._row_shape)
    found = []
    for start in range(0, len(rows), _BATCH):
      chunk = rows[start : start + _BATCH]
      padded = np.resize(chunk, (_BATCH, *chunk.shape[1:]))
      outputs = self._infer(self._params, self._stats, self._fitted, padded)
      found.append([np.asarray(x)[: len(chunk)] for x in outputs])
    logits, embedding = zip(*found, strict=True)
    return np.concatenate(logits), np.concatenate(embedding)

  @functools.cached_property
  def _infer(self) -> Callable:
    process = registry.preprocess_of(
      self.config.augmentation.preprocess, self._is_images
    )

    def infer(params, stats, fitted, pixels):
      image = standard.to_float(pixels)
      image = jax.vmap(process.apply, (None, 0))(fitted, image)
      outputs = self._net.infer(params, stats, image)
      return outputs.logits.astype(jnp.float32), outputs.embedding

    return jax.jit(infer, compiler_options=conv.compiler_options())

  def share_compiled(self, other: 'Model') -> None:
    """Use the compiled function of a model of the same run."""
    self._infer = other._infer

  def __getstate__(self):
    """Drop the functions, which cannot be pickled."""
    dropped = '_infer', '_net'
    return {k: v for k, v in self.__dict__.items() if k not in dropped}

  def __setstate__(self, state):
    """Make the network again, from its name or from the user's object."""
    self.__dict__.update(state)
    self._net = _network_of(self.config, self._given_network, len(self.classes))

  # Saving.

  def save(self, folder: str | os.PathLike) -> None:
    """Write the model to a folder, which `load` reads.

    Raises:
      InputError: the folder cannot be written.
    """
    folder = files.as_path('folder', str(folder))
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
      run_folder.write_json(folder / _MODEL, record)
    except OSError as error:
      raise InputError(
        f'`folder`={folder}: the model cannot be written ({error.strerror}): '
        'give another folder, or make room'
      ) from error


# Training.


def fit(
  images,
  labels,
  *,
  method: str | Callable[..., Method] = 'madnn',
  seed: int = 0,
  classes: Sequence[str] | int | None = None,
  test: tuple[Any, Any] | None = None,
  validation: float = 0,
  network: Any = None,
  optimizer: Any = None,
  steps: int | None = None,
  augment: Sequence[str] | Callable | None = None,
  workdir: str | os.PathLike | None = None,
  progress: bool = True,
  callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
  **settings,
) -> Model:
  """Train a classifier on labelled and unlabelled images.

  Settings that are not given take values that suit the data
  (`runs.defaults`).

  Args:
    images: `[N, H, W, c]` uint8, or floats in [0, 1] or [0, 255]; `[N, H, W]`
      grey images; or features `[N, D]`.
    labels: `[N]` integers from 0; -1 for an unlabelled image.
    method: name of a method, or a factory `(net, tx, batch_spec, steps, *, ...)
      -> Method`, which becomes known by its name.
    seed: of initial weights, order and augmentations.
    classes: names `[C]` or number of the classes; from the labels if None.
    test: (images, labels) to measure the test error on while training.
    validation: labelled images to hold out and validate on: a number, or a
      share below 1.
    network: name of a network; a `Network`; a Flax linen module; or a
      constructor `(rngs) -> nnx.Module`.
    optimizer: name; settings of `optimizers.optimizer` as a dict; an
      `optax.GradientTransformation`; or a function `(steps, scale=1.0,
      **changes) -> optax.GradientTransformation`.
    steps: length of the training, of its main stage.
    augment: names of augmentations, or a function `(key, image [H, W, c]) ->
      image`.
    workdir: folder that records the run and its checkpoints. An interrupted run
      goes on from it. Without one nothing is written.
    progress: show a progress bar.
    callbacks: each is called with every measurement, a dict with 'step' and
      numbers by name.
    **settings: any other setting of `config.schema(method)`, by its flag's name
      (`batch_labelled=32`, `eta=0.3`).

  Raises:
    InputError: an argument cannot work; the message names it.
  """
  test_images, test_labels = _pair(test)
  callbacks = _callbacks(callbacks)
  dataset = arrays.from_arrays(
    images, labels, test_images, test_labels, classes=classes
  )
  name = _method_name(method)
  held_out = _held_out(validation, dataset)
  parts = _Parts.of(network, optimizer, augment, len(dataset.classes))
  given = settings | parts.settings
  given |= {'seed': seed} | ({} if steps is None else {'steps': steps})
  _refuse_unknown(name, given)
  config = defaults.complete(
    name,
    {'dataset': _dataset_name(dataset), 'validation': held_out}
    | {'baseline': False, 'workdir': None if workdir is None else str(workdir)}
    | given,
    defaults.facts_of(dataset, held_out),
    parts.custom,
  )
  white = arrays.white_of(images)
  return _train(config, dataset, parts, workdir, progress, callbacks, white)


def _pair(test) -> tuple[Any, Any]:
  """Return the test images and labels that a user gave."""
  if test is None:
    return None, None
  require(
    isinstance(test, tuple | list) and len(test) == 2,
    '`test`: give a pair (images, labels)',
  )
  return tuple(test)


def _callbacks(callbacks) -> tuple[Callable, ...]:
  """Return the callbacks that a user gave."""
  found = (callbacks,) if callable(callbacks) else callbacks
  require(
    isinstance(found, tuple | list) and all(map(callable, found)),
    f'`callbacks`={callbacks!r:.100}: give a sequence of functions',
  )
  return tuple(found)


def _method_name(method) -> str:
  """Return the name of a method; a factory becomes known by its own."""
  if isinstance(method, str):
    registry.method(method)  # refuses an unknown one
    return method
  for name, entry in registry.METHODS.items():
    if entry.factory is method:
      return name
  require(
    callable(method) and hasattr(method, '__name__'),
    f'`method`={method!r}: give the name of a method, or a factory (net, tx, '
    'batch_spec, steps, *, ...) -> Method',
  )
  config_lib.register_method(method.__name__, method, replace=True)
  return method.__name__


def _held_out(validation: float, dataset: datasets.Dataset) -> int:
  """Return the number of images to hold out."""
  known = int((dataset.train.labels != UNLABELLED).sum())
  require(
    isinstance(validation, int | float | np.number) and 0 <= validation < known,
    f'`validation`={validation}: give a number of labelled images below '
    f'{known}, or a share below 1',
  )
  share = 0 < validation < 1
  return round(validation * known) if share else int(validation)


def _dataset_name(dataset: datasets.Dataset) -> str:
  """Return 'arrays-HASH', a name that tells arrays apart."""
  content = hashlib.sha256(repr(dataset.classes).encode())
  for source in (dataset.train, dataset.test):
    rows = len(source.labels)
    content.update(repr((rows, source.shape, str(source.dtype))).encode())
    content.update(source.labels.tobytes())
    for start in range(0, rows, 4096):
      read = source.read(np.arange(start, min(rows, start + 4096)))
      content.update(np.ascontiguousarray(read).tobytes())
  return f'arrays-{content.hexdigest()[:12]}'


def _refuse_unknown(method: str, given: Mapping[str, Any]) -> None:
  """Raise `InputError` for settings that `fit` decides itself, or unknown."""
  schema = config_lib.schema(method)
  known = {name for part in schema.values() for name in part}
  decided = {*schema['data'], *schema['hosts'], 'seeds', 'seeds_at_once'}
  for name in given:
    require(name in known, config_lib.unknown_setting(name, method, known))
    require(
      name not in decided,
      f'`{name}`: is no setting of a run on arrays: leave it out',
    )


class _Parts(NamedTuple):
  """Parts of a run that are Python objects, and settings that name others."""

  network: Any  # what the user gave, if it is an object
  build: dict[str, Any]  # keyword arguments of `build.build`
  settings: dict[str, Any]
  custom: tuple[str, ...]  # names of the parts that are objects

  @classmethod
  def of(cls, network, optimizer, augment, classes: int) -> '_Parts':
    """Sort the arguments of `fit`."""
    parts, settings = {}, {}
    if isinstance(network, str):
      settings['network'] = network
    elif network is not None:
      parts['net'] = networks.as_network(network, classes)
    if isinstance(optimizer, str):
      settings['optimizer'] = optimizer
    elif isinstance(optimizer, Mapping):
      settings |= _optimizer_settings(optimizer)
    elif optimizer is not None:
      parts['tx'] = _as_tx(optimizer)
    if callable(augment):
      parts['augmentation'] = augment
    elif augment is not None:
      settings['augment'] = (
        augment.split(',') if isinstance(augment, str) else tuple(augment)
      )
    given = network if 'net' in parts else None
    objects = {'net': network, 'tx': optimizer, 'augmentation': augment}
    custom = tuple(f'{name}:{_fingerprint(objects[name])}' for name in parts)
    return cls(given, parts, settings, custom)


def _fingerprint(part) -> str:
  """Return a short text that tells Python objects apart across processes.

  It is made of a module's fields, or of a function's source; values that a
  function closes over are not in it.
  """
  is_code = inspect.isfunction(part) or isinstance(part, type)
  source = getattr(part, '__qualname__', '') if is_code else repr(part)
  with contextlib.suppress(TypeError, OSError):  # typed at a prompt
    source += inspect.getsource(part if is_code else type(part))
  text = re.sub(r' at 0x[0-9a-f]+', '', source)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def _optimizer_settings(optimizer: Mapping[str, Any]) -> dict[str, Any]:
  """Return settings of the optimiser; refuse other ones."""
  own = {
    **signatures.keywords(optimizers.optimizer),
    **signatures.keywords(optimizers.averaging),
  }
  for name in optimizer:
    registry.choose('optimizer', name, own)
  return dict(optimizer)


def _as_tx(optimizer) -> Callable:
  """Return `(steps, scale, **changes) -> optimiser` of what a user gave."""
  if hasattr(optimizer, 'init') and hasattr(optimizer, 'update'):
    return lambda steps, scale=1.0, **changes: optimizer
  names = []
  if callable(optimizer):
    with contextlib.suppress(TypeError, ValueError):
      names = list(inspect.signature(optimizer).parameters)
  require(
    names[:1] == ['steps'],
    f'`optimizer`={optimizer!r:.100}: give a name, a dict of settings, an '
    'optax optimiser such as optax.adam(1e-3), or a function (steps, '
    'scale=1.0, **changes) -> optimiser',
  )
  return optimizer


def _train(
  config: Config, dataset, parts: _Parts, workdir, progress, callbacks, white
) -> Model:
  """Train the run of a config on arrays."""
  history, found = [], {}

  def make_run():
    made = parts.build
    net = warm_network(config, dataset, made.get('net'))
    return build.build(config, dataset=dataset, **(made | {'net': net}))

  def note(measurement):
    history.append(measurement)
    for callback in callbacks:
      callback(measurement)

  def finish(program, splits, state):
    found.update(program=program, state=state)

  how = dict(on_finish=finish, on_measurement=note, progress=progress)
  if workdir is None:
    run = make_run()
    result = execute.train(run, **how)
    return _model_of(run, parts, found, result, history, white)
  folder = files.as_path('workdir', str(workdir))
  result, run = execute.train_in_folder(
    make_run, config, folder, say=lambda text: None, **how
  )
  if run is not None:
    model = _model_of(run, parts, found, result, history, white)
    model.save(folder / 'model')
  elif (folder / 'model' / _MODEL).is_file():
    model = _load_saved(folder / 'model', parts.network)
  else:  # It was interrupted between its result and its model.
    finished = load_lib.load(folder, dataset=dataset, **parts.build)
    model = model_of_finished(finished, white)
    model.save(folder / 'model')
  model.history = metrics_writer.read(folder, config.method)
  return model


def warm_network(
  config: Config, dataset: datasets.Dataset, net: networks.Network | None = None
) -> networks.Network | None:
  """Return the network whose initial weights are those of `init_from`.

  They are the weights that the finished run evaluates, under its first split;
  everything else (optimiser, memory, order) begins as in any run.

  Args:
    config: of the run to be trained.
    dataset: of that run.
    net: instead of the network of the config.

  Returns:
    The network; `net` if the config starts from no run.

  Raises:
    InputError: the run has other classes, or a network of other shapes.
  """
  source = config.run.init_from
  if source is None:
    return net
  try:
    model = load(source, data_dir=config.data.data_dir)
  except InputError as error:
    message = error.marked.replace('`folder`', '`init_from`')
    raise InputError(message) from error
  where = f'`init_from`={source}'
  require(
    model.classes == dataset.classes,
    f'{where}: the run has the classes {", ".join(model.classes)}, these data '
    f'{", ".join(dataset.classes)}: give data of the same classes',
  )
  net = net or build.make_network(config, len(dataset.classes))
  weights = model.weights[:2]
  image = jax.ShapeDtypeStruct((1, *dataset.train.shape), np.float32)
  like = jax.eval_shape(net.init, jax.random.key(0), image)
  shapes = lambda tree: [
    (jax.tree_util.keystr(path), x.shape)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  ]
  require(
    shapes(weights) == shapes(like),
    f'{where}: its network is {model.config.network.network} for images of '
    f'{model.row_shape}, this one {config.network.network} for '
    f'{dataset.train.shape}: give the same `network` and `image_size`',
  )
  return net._replace(init=lambda key, image: weights)


def _model_of(
  run: build.Run, parts: _Parts, found, result, history, white
) -> Model:
  """Return the model of a run that has just been trained."""
  method, state = run.methods[-1], found['state']
  state = jax.tree.map(lambda x: x[0], state)
  params, stats = jax.device_get(method.weights(state))
  return Model(
    run.net,
    params,
    stats,
    config=run.config,
    classes=run.dataset.classes,
    shape=run.dataset.train.shape,
    is_images=run.dataset.train.is_images,
    fitted=jax.device_get(found['program'].fitted),
    result=result,
    history=history,
    network=parts.network,
    white=white,
  )


# Loading.


def load(
  folder: str | os.PathLike,
  *,
  network: Any = None,
  seed: int | None = None,
  data_dir: str | None = None,
) -> Model:
  """Load a saved model, or the model of a finished run.

  Args:
    folder: written by `Model.save`, or the folder of a finished run.
    network: as in `fit`, for a model whose network is a Python object.
    seed: number of a run's split; its first if None.
    data_dir: folder of prepared data sets, for a run.

  Raises:
    InputError: the folder holds neither, or is incomplete or damaged.
  """
  folder = files.as_path('folder', str(folder))
  saved = next(
    (f for f in (folder, folder / 'model') if (f / _MODEL).is_file()), None
  )
  if saved is not None and seed is None:
    return _load_saved(saved, network)
  require(
    run_folder.is_run(folder),
    f'`folder`={folder}: holds no model and no run: give a folder written by '
    "Model.save, or a run's folder",
  )
  finished = load_lib.load(folder, seed, data_dir)
  return model_of_finished(finished)


def model_of_finished(
  finished: load_lib.Finished,
  white: float | None = None,
  step: int | None = None,
) -> Model:
  """Return the model of a finished run under one of its splits.

  Args:
    finished: the run.
    white: as in `Model`.
    step: of a kept checkpoint; the last step if None.
  """
  program = finished.program
  state = finished.state if step is None else finished.after(step)
  state = jax.tree.map(lambda x: x[0], state)
  params, stats = jax.device_get(program.method.weights(state))
  return Model(
    program.net,
    params,
    stats,
    config=finished.config,
    classes=finished.dataset.classes,
    shape=finished.dataset.train.shape,
    is_images=finished.dataset.train.is_images,
    fitted=jax.device_get(program.fitted),
    result=load_lib.finished_result(finished.folder),
    history=finished.measured,
    white=white,
  )


@contextlib.contextmanager
def _damage(folder: pathlib.Path):
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


def _load_saved(folder: pathlib.Path, network) -> Model:
  with _damage(folder):
    record = json.loads((folder / _MODEL).read_text())
    weights = (folder / _WEIGHTS).read_bytes()
    require(
      hashlib.sha256(weights).hexdigest() == record['sha256'],
      f'`folder`={folder}: {_WEIGHTS} does not match its checksum in {_MODEL}: '
      'save the model again',
    )
    config = config_lib.from_json(record['config'])
    net = _network_of(config, network, len(record['classes']))
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


def _network_of(config: Config, network, classes: int) -> networks.Network:
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


def _restored(net, record, weights: bytes) -> dict[str, Any]:
  """Return the weights in the structure that the network gives them."""
  shape = tuple(record['shape'])
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
