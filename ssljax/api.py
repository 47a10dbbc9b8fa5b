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
import logging
import os
import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from ssljax import automatic, files, optimizers, registry, signatures
from ssljax import config as config_lib
from ssljax import model as model_lib
from ssljax.config import Config
from ssljax.core import UNLABELLED, Method
from ssljax.data import arrays, datasets
from ssljax.errors import InputError, require
from ssljax.model import Evaluation, Model
from ssljax.networks import network as networks
from ssljax.runs import budget, build, defaults, execute, run_folder
from ssljax.runs import load as load_lib
from ssljax.training import metrics_writer

_LOG = logging.getLogger(__name__)

# Training.


def fit(
  images: ArrayLike,
  labels: ArrayLike,
  *,
  method: str | Callable[..., Method] = 'madnn',
  seed: int = 0,
  classes: Sequence[str] | int | None = None,
  test: tuple[Any, Any] | None = None,
  validation: float = 0,
  network: Any = None,
  optimizer: Any = None,
  steps: int | None = None,
  minutes: float | None = None,
  augment: Sequence[str] | Callable[..., Any] | None = None,
  workdir: str | os.PathLike[str] | None = None,
  progress: bool = True,
  callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
  **settings: Any,
) -> Model:
  """Train a classifier on labelled and unlabelled images.

  Settings that are not given take values that suit the data
  (`runs.defaults`).

  Args:
    images: `[N, H, W, c]` uint8, or floats in [0, 1] or [0, 255]; `[N, H, W]`
      grey images; or features `[N, D]`.
    labels: `[N]` integers from 0; -1 for an unlabelled image.
    method: name of a method; or a factory `(net, tx, batch_spec, steps, *, ...)
      -> Method`, which becomes known by its name; or 'auto' to compare three
      methods on held-out labels and train the best one (`automatic`).
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
    minutes: time budget of the call, instead of `steps`: all lengths follow
      from some timed steps (`runs.budget`). Of 'auto' it is 10 by default.
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
  if isinstance(method, str) and method == 'auto':
    require(
      not validation,
      f"`validation`={validation}: `method`='auto' holds out labels itself: "
      'leave it out',
    )
    return automatic.fit(
      fit,
      images,
      labels,
      minutes=minutes,
      steps=steps,
      workdir=workdir,
      classes=classes,
      test=test,
      seed=seed,
      network=network,
      optimizer=optimizer,
      augment=augment,
      progress=progress,
      callbacks=callbacks,
      **settings,
    )
  began = time.monotonic()
  test_images, test_labels = _pair(test)
  callbacks = _callbacks(callbacks)
  dataset = arrays.from_arrays(
    images, labels, test_images, test_labels, classes=classes
  )
  name = _method_name(method)
  held_out = _held_out(validation, dataset)
  parts = _Parts.of(network, optimizer, augment, len(dataset.classes))
  given = settings | parts.settings
  lengths = {'steps': steps, 'minutes': minutes}
  given |= {k: v for k, v in lengths.items() if v is not None}
  given |= {'seed': seed}
  _refuse_unknown(name, given)
  config = defaults.complete(
    name,
    {'dataset': _dataset_name(dataset), 'validation': held_out}
    | {'baseline': False, 'workdir': None if workdir is None else str(workdir)}
    | given,
    defaults.facts_of(dataset, held_out),
    parts.custom,
  )
  budget.check(config, given)
  white = arrays.white_of(images)
  run_of = functools.partial(
    _make_run, dataset=dataset, parts=parts, began=began
  )
  return _train(
    config, dataset, parts, workdir, progress, callbacks, white, run_of
  )


def _pair(test: Any) -> tuple[Any, Any]:
  """Return the test images and labels that a user gave."""
  if test is None:
    return None, None
  require(
    isinstance(test, tuple | list) and len(test) == 2,
    '`test`: give a pair (images, labels)',
  )
  images, labels = test
  return images, labels


def _callbacks(callbacks: Any) -> tuple[Callable[..., Any], ...]:
  """Return the callbacks that a user gave."""
  found = (callbacks,) if callable(callbacks) else callbacks
  require(
    isinstance(found, tuple | list) and all(map(callable, found)),
    f'`callbacks`={callbacks!r:.100}: give a sequence of functions',
  )
  return tuple(found)


def _method_name(method: Any) -> str:
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
  decided = {
    *(*schema['data'], *schema['hosts'], 'seeds', 'seeds_at_once'),
    *('replay', 'compile_cache'),  # of programs
  }
  for name in given:
    config_lib.require_known(name, method, known)
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
  def of(
    cls, network: Any, optimizer: Any, augment: Any, classes: int
  ) -> '_Parts':
    """Sort the arguments of `fit`."""
    parts: dict[str, Any] = {}
    settings: dict[str, Any] = {}
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


def _fingerprint(part: Any) -> str:
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


def _as_tx(optimizer: Any) -> Callable[..., Any]:
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


def _make_run(
  config: Config,
  *,
  dataset: datasets.Dataset,
  parts: _Parts,
  began: float,
  is_new: bool,
) -> build.Run:
  """Make the run of a config on arrays.

  Args:
    config: of the run.
    dataset: of the arrays.
    parts: of the run.
    began: time at which `fit` was called, on the monotonic clock.
    is_new: the lengths are to be fitted to the budget, if there is one.
  """
  made = parts.build
  net = warm_network(config, dataset, made.get('net'))
  run = build.build(config, dataset=dataset, **(made | {'net': net}))
  warn_of_seen(run)
  if config.run.minutes is None or not is_new:
    return run
  return budget.fit(run, began, tx=made.get('tx'), net=net, say=_LOG.info)


def _train(
  config: Config,
  dataset: datasets.Dataset,
  parts: _Parts,
  workdir: str | os.PathLike[str] | None,
  progress: bool,
  callbacks: Sequence[Callable[[dict[str, Any]], None]],
  white: Any,
  run_of: Callable[..., build.Run],
) -> Model:
  """Train the run of a config on arrays."""
  history: list[dict[str, Any]] = []
  found: dict[str, Any] = {}

  def note(measurement: dict[str, Any]) -> None:
    history.append(measurement)
    for callback in callbacks:
      callback(measurement)

  def finish(program: Any, splits: Any, state: Any) -> None:
    found.update(program=program, state=state)

  how: dict[str, Any] = dict(
    on_finish=finish, on_measurement=note, progress=progress
  )
  if workdir is None:
    made = run_of(config, is_new=True)
    result = execute.train(made, **how)
    return _model_of(made, parts, found, result, history, white)
  folder = files.as_place('workdir', str(workdir))
  config = budget.recorded(config, folder)
  is_new = config.run.overwrite or not run_folder.is_run(folder)
  make_run = functools.partial(run_of, config, is_new=is_new)
  result, run = execute.train_in_folder(
    make_run, config, folder, say=lambda text: None, **how
  )
  if run is not None:
    model = _model_of(run, parts, found, result, history, white)
    model.save(folder / 'model')
  elif (folder / 'model' / model_lib.MODEL).is_file():
    model = model_lib.load_saved(folder / 'model', parts.network)
  else:  # It was interrupted between its result and its model.
    finished = load_lib.load(folder, dataset=dataset, **parts.build)
    model = model_of_finished(finished, white)
    model.save(folder / 'model')
  model.history = metrics_writer.read(folder, config.method)
  return model


def warn_of_seen(run: build.Run) -> None:
  """Warn if held-out images have a label in the run that `init_from` names.

  Its weights were trained with these labels, so that the error on the images is
  too low. Images are compared by number, if both runs are of one data set.
  """
  source = run.config.run.init_from
  if source is None:
    return
  path = files.as_place('init_from', source) / 'split.json'
  found = run_folder.read_json(path) if files.exists(path) else None
  data = run.dataset.name, len(run.dataset.train.labels)
  if not found or (found['dataset'], found['images']) != data:
    return
  labelled = found['splits'][0]['labelled']
  rows_there = range(data[1]) if labelled == 'all' else map(int, labelled)
  trained = np.array(list(rows_there))
  for split in run.drawn:
    rows = np.concatenate([split.test, split.validation])
    seen = int(np.isin(rows, trained).sum())
    if seen:
      _LOG.warning(
        '`init_from`=%s: %d of %d images held out under seed %d have a label '
        'in that run: the error on them is too low; give test images of their '
        'own (a folder test/), or leave `init_from` out',
        *(source, seen, len(rows), split.seed),
      )


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
  run: build.Run,
  parts: _Parts,
  found: Mapping[str, Any],
  result: dict[str, Any],
  history: list[dict[str, Any]],
  white: Any,
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
  folder: str | os.PathLike[str],
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
  folder = files.as_place('folder', str(folder))
  saved = next(
    (f for f in (folder, folder / 'model') if (f / model_lib.MODEL).is_file()),
    None,
  )
  if saved is not None and seed is None:
    return model_lib.load_saved(saved, network)
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


__all__ = ['Evaluation', 'Model', 'fit', 'load']
