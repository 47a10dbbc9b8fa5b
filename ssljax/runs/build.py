"""From a `Config` to a `Run`: splits, network, methods, feeds."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from ssljax import optimizers, registry
from ssljax.augment import named
from ssljax.config import Config, per_class, pool, with_momentum
from ssljax.core import BatchSpec, LogitAdjustment, Method
from ssljax.data import (
  datasets,
  domain_pair,
  duplicates,
  feeds,
  folder,
  sampling,
  splits,
)
from ssljax.data.types import RESIDENT_BYTES
from ssljax.distributed import placement
from ssljax.errors import InputError, require
from ssljax.networks.network import Network, computing_in
from ssljax.runs import queries, summary
from ssljax.signatures import given, keywords
from ssljax.training import compiled, footprint

FITTING_BYTES = 2**30  # of the images a preprocessing is fitted to, at most


class Run(NamedTuple):
  """A run that is ready to be trained."""

  config: Config
  dataset: datasets.Dataset
  drawn: list[splits.Split]  # one per seed
  net: Network
  methods: list[Method]  # baselines first, the config's own method last
  data: compiled.Data  # of the first seed
  mesh: jax.sharding.Mesh
  # Test images that are also training images, see `duplicates`; None if that is
  # not known.
  copies: int | None = None
  fingerprint: str = ''  # of the data set, '' if it is not known
  # Data by seed, of a set in `datasets.REDRAWN`.
  data_by_seed: Mapping[int, compiled.Data] | None = None

  @property
  def group_size(self) -> int:
    """The number of splits that are trained at once."""
    tests = [split.test for split in self.drawn]
    differ = any(not np.array_equal(test, tests[0]) for test in tests)
    single = differ or self.data_by_seed
    return 1 if single else self.config.run.seeds_at_once

  def data_of(self, group: Sequence[splits.Split]) -> compiled.Data:
    """Return the data of splits that are trained at once."""
    return self.data_by_seed[group[0].seed] if self.data_by_seed else self.data

  def dataset_of(self, seed: int) -> datasets.Dataset:
    """Return the data set of a seed."""
    if not self.data_by_seed:
      return self.dataset
    return load_dataset(self.config, seed)


def build(
  config: Config,
  *,
  dataset: datasets.Dataset | None = None,
  net: Network | None = None,
  tx: Callable | None = None,
  augmentation: Callable | None = None,
) -> Run:
  """Make a run of a config. Nothing is written.

  Args:
    config: everything the run depends on.
    dataset: instead of the one the config names.
    net: instead of the network the config names.
    tx: `(steps, scale=1.0, **changes) -> optax.GradientTransformation` of a
      stage, instead of the optimiser of the config.
    augmentation: `(key, image [H, W, c]) -> image`, instead of the config's.

  Raises:
    InputError: a setting cannot work with this data.
  """
  if dataset is None:
    dataset = load_dataset(config)
  elif not dataset.train.is_images:
    refuse_image_settings(config, dataset.name)
  drawn = draw_splits(config, dataset)
  epoch_steps = lambda batch_spec: (
    sampling.Sampler(batch_spec, drawn[0]).epoch_steps
  )
  config = with_momentum(config, steps_of(config, dataset, epoch_steps))
  config = with_compute_dtype(config)
  net, methods = make_methods(config, dataset, epoch_steps, net=net, tx=tx)
  mesh = placement.make_mesh(
    [stage.batch_spec.size for method in methods for stage in method.stages],
    flags=summary.batch_settings(methods),
  )
  for method in methods:
    if method.uses_admitted:
      refuse_unequal(drawn, config.run.seeds_at_once, method)
    refuse_too_large(config, method, net, dataset, drawn[0], mesh)
  data, fed = make_data(config, dataset, drawn, mesh, augmentation)
  by_seed = None
  if dataset.name in datasets.REDRAWN:
    by_seed = {
      split.seed: make_data(
        config, load_dataset(config, split.seed), [split], mesh, augmentation
      )[0]
      for split in drawn
    }
    data = by_seed[config.split.seed]
  run = Run(
    config,
    dataset,
    drawn,
    net,
    methods,
    data,
    mesh,
    copies=fed.copies,
    fingerprint=fed.fingerprint,
    data_by_seed=by_seed,
  )
  queries.refuse(run, dropout_rate(config))
  return run


# The data.


def load_dataset(config: Config, seed: int | None = None) -> datasets.Dataset:
  """Open the data set, or the two of a domain adaptation, of a config.

  Args:
    config: of the run.
    seed: of a set in `datasets.REDRAWN`; the config's first if None.
  """
  data = config.data
  how: dict[str, Any] = dict(
    data_dir=data.data_dir,
    train_split=data.train_split,
    test_split=data.test_split,
    image_size=data.image_size,
    corrupt=data.corrupt,
    crop='crop' in config.augmentation.augment,
  )
  if data.source:
    return domain_pair.load(data.source, str(data.target), **how)
  if data.images:
    del how['data_dir'], how['corrupt']
    return folder.load(data.images, data.labels_file, **how)
  seed = config.split.seed if seed is None else seed
  dataset = datasets.load(str(data.dataset), seed=seed, **how)
  if not dataset.train.is_images:
    refuse_image_settings(config, dataset.name)
  return dataset


def refuse_image_settings(config: Config, name: str) -> None:
  """Raise `InputError` for settings that need images, of a set of features."""
  augment, preprocess = config.augmentation.augment, config.augmentation
  require(
    not augment,
    f'`augment`={",".join(augment)}: `dataset`={name} holds features, not '
    'images: give `augment`=',
  )
  require(
    preprocess.preprocess in ('none', 'standardize'),
    f'`preprocess`={preprocess.preprocess}: `dataset`={name} holds features, '
    'not images: give `preprocess`=none or standardize',
  )


def draw_splits(
  config: Config, dataset: datasets.Dataset
) -> list[splits.Split]:
  """Draw the label split of every seed."""
  split = config.split
  each, at_most = per_class('labels', split.labels)
  unlabelled, count = pool('unlabelled', split.unlabelled)
  rows = np.arange(len(dataset.train.labels))
  test_on = None
  if split.hold_out == 'auto' and not len(dataset.test.labels):
    equal = dataset.train.groups or dataset.train.digests
    test_on = equal() if equal else None
  return [
    splits.draw_split(
      dataset.train.labels,
      dataset.classes,
      per_class=each,
      at_most=at_most,
      seed=seed,
      unlabelled=unlabelled,
      count=count,
      among=rows >= dataset.unlabelled_from,
      validation=split.validation,
      test_on=test_on,
    )
    for seed in range(split.seed, split.seed + split.seeds)
  ]


def is_streamed(dataset: datasets.Dataset, kind: str) -> bool:
  """True if images are decoded during training, not kept on the devices."""
  if dataset.train.crop:
    require(
      kind != 'resident',
      '`feed`=resident: `augment`=crop cuts images that differ in size as '
      'they are decoded: give `feed`=stream',
    )
    return True
  count = len(dataset.train.labels) + len(dataset.test.labels)
  large = count * math.prod(dataset.train.shape) > RESIDENT_BYTES
  return kind == 'stream' or (kind == 'auto' and large)


def feed_maker(dataset: datasets.Dataset, kind: str, place) -> Callable:
  """Return `datasets.Source -> feeds.Feed`.

  Args:
    dataset: whose images are fed.
    kind: 'auto', 'resident' or 'stream'.
    place: a `placement.Placer`.
  """
  if is_streamed(dataset, kind):
    return lambda source: feeds.stream(source, place)
  return lambda source: feeds.resident(datasets.arrays(source), place)


def make_augmentations(
  names: tuple[str, ...], on_host: bool
) -> tuple[Callable | None, Callable | None]:
  """Return the augmentations before and after the preprocessing.

  Args:
    names: of augmentations, in order.
    on_host: the feed crops already.
  """
  if on_host:
    require(
      names.index('crop') == 0 and names.count('crop') == 1,
      f'`augment`={",".join(names)}: images that differ in size are cropped '
      'as they are decoded: give crop once, as the first',
    )
    names = names[1:]
  return named.split_chain(names)


def refuse_small_images(names, augmentations, shape: tuple[int, ...]) -> None:
  """Raise `InputError` for augmentations that images [H, W, c] cannot have."""
  one = jax.ShapeDtypeStruct(shape, np.float32)
  for augment in augmentations:
    try:
      jax.eval_shape(augment, jax.random.key(0), one)
    except InputError as error:
      raise InputError(f'`augment`={",".join(names)}: {error}') from error


def make_data(
  config: Config, dataset, drawn, mesh, augmentation: Callable | None = None
) -> tuple[compiled.Data, '_Fed']:
  """Put feeds, fitted preprocessing and truth on the devices of a mesh.

  Returns:
    The data, and what was found while its images were read.
  """
  source = dataset.train
  fed = _feed(dataset, config.run.feed, placement.Placer(mesh))
  names, chosen = config.augmentation.augment, config.augmentation.preprocess
  on_pixels, own = make_augmentations(names, source.crop is not None)
  refuse_small_images(names, filter(None, (on_pixels, own)), source.shape)
  processing = registry.preprocess_of(chosen, source.is_images)
  fitted, by_seed = (), None
  if chosen in registry.FITTED:
    seen = [split.seen(dataset.unlabelled_from) for split in drawn]
    values = math.prod(source.shape)
    fitted, by_seed = fit(processing, fed.read, seen, drawn, values)
  one = jax.ShapeDtypeStruct(source.shape, np.float32)
  any_fitted = next(iter(by_seed.values())) if by_seed else fitted
  jax.eval_shape(processing.apply, any_fitted, one)  # refuses grey images
  data = compiled.Data(
    fed.train,
    fed.test,
    dataset.test.labels,
    source.labels,
    processing,
    fitted,
    augmentation or own,
    on_pixels,
    by_seed,
    classes=len(dataset.classes),
  )
  return data, fed


def fit(
  processing, read: Callable, seen: Sequence[np.ndarray], drawn, values: int
) -> tuple[Any, dict[int, Any] | None]:
  """Fit a preprocessing to the training images that a run may see.

  Images that are held out for validation, and those that `unlabelled`=N leaves
  out, are not seen. Where the seeds see different images, each has a
  preprocessing of its own, so that a seed does not depend on the others.

  Args:
    processing: a `Preprocess`.
    read: `rows [B] -> images [B, H, W, c]`.
    seen: `[N]` bool per seed.
    drawn: the split of each seed.
    values: of an image.

  Returns:
    What is fitted for all seeds, and None; or () and what is fitted, by seed.
  """

  def fitted(mask: np.ndarray):
    rows = np.flatnonzero(mask)
    # Evenly spaced images, as many as fit: the same ones through either feed.
    every = -(-len(rows) * values // FITTING_BYTES)
    return processing.fit(read(rows[::every]))

  if all(np.array_equal(mask, seen[0]) for mask in seen):
    return fitted(seen[0]), None
  return (), {
    split.seed: fitted(mask) for split, mask in zip(drawn, seen, strict=True)
  }


class _Fed(NamedTuple):
  """The feeds of a data set, and what else its images are read for."""

  train: feeds.Feed
  test: feeds.Feed
  read: Callable  # training rows [B] -> images [B, H, W, c]
  copies: int | None  # test images that are training images, if that is known
  fingerprint: str  # of both splits, '' if it is not known


def _feed(dataset: datasets.Dataset, kind: str, place) -> _Fed:
  """Make the feeds of a data set; the arguments are those of `feed_maker`."""
  train, test = dataset.train, dataset.test
  if is_streamed(dataset, kind):
    encoded = None
    if train.digests and test.digests:
      encoded = train.digests(), test.digests()
    return _Fed(
      feeds.stream(train, place),
      feeds.stream(test, place),
      train.read,
      duplicates.count(*encoded) if encoded else None,
      duplicates.fingerprint(*encoded) if encoded else '',
    )
  images, tests = datasets.arrays(train), datasets.arrays(test)
  pixels = duplicates.digests(images), duplicates.digests(tests)
  # Encoded images identify the data set at any `image_size`.
  own = [
    source.digests() if source.digests else found
    for source, found in zip((train, test), pixels, strict=True)
  ]
  return _Fed(
    feeds.resident(images, place),
    feeds.resident(tests, place),
    images.__getitem__,
    duplicates.count(*pixels) if len(tests) else 0,
    duplicates.fingerprint(*own),
  )


# The network and the methods.


def with_compute_dtype(config: Config) -> Config:
  """Return a config that names the dtype of the network's layers.

  It depends on the device; the record of a run names it.

  Raises:
    InputError: bfloat16 is asked for, and the network is a user's own.
  """
  network = config.network
  is_own = registry.is_own_network(network.network) and not any(
    part.startswith('net') for part in config.custom
  )
  dtype = network.compute_dtype
  require(
    is_own or dtype != 'bfloat16',
    '`compute_dtype`=bfloat16: holds for the networks of ssljax: leave it out, '
    'and give the layers of your own network a dtype',
  )
  if dtype == 'auto':
    dtype = placement.compute_dtype() if is_own else 'float32'
  network = dataclasses.replace(network, compute_dtype=dtype)
  return dataclasses.replace(config, network=network)


def make_network(config: Config, classes: int) -> Network:
  """Make the network of a config for so many classes."""
  chosen = {
    'dropout': config.network.dropout,
    'momentum': config.network.bn_momentum,
  }
  chosen = {k: v for k, v in chosen.items() if v is not None}
  make = registry.NETWORKS[config.network.network]
  for keyword in chosen:
    require(
      keyword in inspect.signature(make).parameters,
      f'`{"bn_" if keyword == "momentum" else ""}{keyword}`: '
      f'`network`={config.network.network} has none: leave it out',
    )
  dtype = with_compute_dtype(config).network.compute_dtype
  assert dtype != 'auto'
  return computing_in(make(classes, **chosen), dtype)


def dropout_rate(config: Config) -> float:
  """Return the dropout rate of the config's network; 0 if it has none."""
  if config.network.dropout is not None:
    return config.network.dropout
  make = registry.NETWORKS[config.network.network]
  parameters = inspect.signature(make).parameters
  return parameters['dropout'].default if 'dropout' in parameters else 0.0


def steps_of(config: Config, dataset, epoch_steps: Callable) -> int:
  """Return the steps of a config, which may give epochs.

  The arguments are those of `make_methods`.
  """
  epoch = epoch_steps(make_batch_spec(config, len(dataset.classes)))
  return config.run.steps or max(1, round(config.run.epochs * epoch))


def make_batch_spec(config: Config, classes: int) -> BatchSpec:
  """Return the rows of a step that the config asks for."""
  supervised_only = list(registry.arms(config.method, True)) == ['supervised']
  batch = config.batch
  each = batch.batch_per_class
  return BatchSpec(
    each * classes if each else batch.batch_labelled or 0,
    0 if supervised_only else batch.batch_unlabelled,
    classes=classes if each else 0,
  )


def make_methods(
  config: Config,
  dataset: datasets.Dataset,
  epoch_steps: Callable,
  *,
  net: Network | None = None,
  tx: Callable | None = None,
) -> tuple[Network, list[Method]]:
  """Make the network, and every method with the settings of the config.

  Args:
    config: of the run.
    dataset: its shapes are read, no image is.
    epoch_steps: `BatchSpec -> steps of an epoch`; refuses impossible ones.
    net: instead of the network of the config.
    tx: instead of the optimiser of the config.
  """
  net = net or make_network(config, len(dataset.classes))
  image = jax.ShapeDtypeStruct((1, *dataset.train.shape), np.float32)
  check_network(net, image, len(dataset.classes))
  factories = config.factories
  batch_spec = make_batch_spec(config, len(dataset.classes))
  steps = steps_of(config, dataset, epoch_steps)
  if tx is None:
    chosen = given(optimizers.optimizer, config.optimizer)
    tx = functools.partial(optimizers.optimizer, **chosen)
  methods = [
    factory(net, tx, batch_spec, steps, **given(factory, config.parameters))
    for factory in factories.values()
  ]
  averaging = optimizers.averaging(
    **given(optimizers.averaging, config.optimizer)
  )
  methods = [
    method if method.averaging else method._replace(averaging=averaging)
    for method in methods
  ]
  methods = [
    with_rare_classes(method, config, len(dataset.classes))
    for method in methods
  ]
  refuse_class_aware(config, methods[-1])
  check_stages(methods, dataset, epoch_steps)
  return net, methods


def with_rare_classes(method: Method, config: Config, classes: int) -> Method:
  """Return a method with the settings of `config.Imbalance` in every stage.

  Args:
    method: as its factory makes it.
    config: of the run.
    classes: C.
  """
  chosen, strength = config.imbalance, config.imbalance.logit_adjustment
  changes = {}
  if strength:
    changes['logit_adjustment'] = LogitAdjustment(strength, classes)

  def changed(stage):
    spec = stage.batch_spec
    aware = chosen.sampling == 'classes' and spec.labelled and not spec.classes
    return stage._replace(
      batch_spec=spec._replace(class_aware=True) if aware else spec, **changes
    )

  return method._replace(stages=tuple(map(changed, method.stages)))


def refuse_class_aware(config: Config, method: Method) -> None:
  """Raise `InputError` if no stage of a method draws labelled images."""
  specs = [stage.batch_spec for stage in method.stages]
  require(
    config.imbalance.sampling == 'images'
    or any(spec.class_aware or spec.classes for spec in specs),
    f'`sampling`={config.imbalance.sampling}: {method.name} draws labelled and '
    'unlabelled images as one: leave it out',
  )


def check_stages(methods, dataset: datasets.Dataset, epoch_steps) -> None:
  """Raise `InputError` for stages that the splits or images cannot serve."""
  one = jax.ShapeDtypeStruct(dataset.train.shape, np.float32)
  for method in methods:
    for stage in method.stages:
      epoch_steps(stage.batch_spec)
      adapts = any(view.adaptive for view in stage.views)
      require(
        dataset.train.is_images or not adapts,
        needs_images(dataset, method, stage),
      )
      for augment in stage_augmentations(stage):
        require(dataset.train.is_images, needs_images(dataset, method, stage))
        try:
          jax.eval_shape(augment, jax.random.key(0), one)
        except InputError as error:
          if not has_strong_view(method.name):
            raise
          raise InputError(f'`strong_augment`: {error}') from error


def has_strong_view(name: str) -> bool:
  """Return True if the method of a name takes `strong_augment`."""
  entry = registry.METHODS.get(name)
  return entry is not None and 'strong_augment' in keywords(entry.factory)


def needs_strong_view(name: str) -> bool:
  """Return True if the method of a name has a strong view by default."""
  entry = registry.METHODS[name]
  view = inspect.signature(entry.factory).parameters.get('strong_augment')
  return view is not None and bool(view.default)


def needs_images(dataset: datasets.Dataset, method, stage) -> str:
  """Return the message for a stage that changes images, of a set of features.

  Args:
    dataset: that holds features.
    method: that the stage belongs to.
    stage: whose views are augmented.
  """
  message = (
    f'`dataset`={dataset.name}: holds features, and the stage {stage.name} of '
    f'{method.name} changes images: '
  )
  if not has_strong_view(method.name):
    return f'{message}switch that off (for R2-D2, `cutout`=0)'
  others = [name for name in registry.METHODS if not needs_strong_view(name)]
  return (
    f'{message}give `strong_augment`= for none, or a method that needs none: '
    f'{", ".join(others)}'
  )


def stage_augmentations(stage) -> list[Callable]:
  """Return the augmentations that the views of a stage add to the run's own."""
  both = [(view.on_pixels, view.augment) for view in stage.views]
  return [augment for pair in both for augment in pair if augment]


def refuse_unequal(
  drawn: Sequence[splits.Split], at_once: int, method: Method
) -> None:
  """Raise `InputError` for splits at once whose memories differ in length."""
  for first in range(0, len(drawn), at_once):
    sizes = {len(split.trained) for split in drawn[first : first + at_once]}
    require(
      len(sizes) == 1,
      f'`seeds_at_once`={at_once}: {method.name} trains on '
      f'{min(sizes)} images under one split and {max(sizes)} under another: '
      'give `seeds_at_once`=1',
    )


def refuse_too_large(config: Config, method, net, dataset, split, mesh) -> None:
  """Raise `InputError` for a state that does not fit on the devices."""
  states = footprint.stage_shapes(
    method,
    net,
    dataset.train.shape,
    len(dataset.train.labels),
    labelled=len(split.labelled),
    multiple=placement.row_multiple(mesh),
    extra=queries.most(config, split),
    seeds=min(config.split.seeds, config.run.seeds_at_once),
    trained=len(split.trained),
  )
  footprint.refuse_too_large(method, states[0], mesh)


def check_network(net: Network, image, classes: int) -> None:
  """Raise `InputError` for small images, and other outputs than classes."""
  params, stats = jax.eval_shape(net.init, jax.random.key(0), image)
  logits = jax.eval_shape(net.infer, params, stats, image).logits
  require(
    logits.shape == (1, classes),
    f'`network`: its logits have shape {logits.shape} for one image, there are '
    f'{classes} classes: give a network with {classes} outputs',
  )


def settings_of(config: Config, factory: Callable) -> Mapping:
  """Return the hyper-parameters that a config gives to a factory."""
  return given(factory, config.parameters)
