"""`Config`: everything a run depends on, as frozen dataclasses.

The command line makes one from flags and presets, Python from keyword
arguments, and `config.json` in a run's folder is its record. Every setting has
one name over all parts, its flag's name. The default of a method's or of the
optimiser's hyper-parameter is that of its factory's signature.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import difflib
import inspect
import json
import math
from typing import Any, Literal, get_type_hints

from ssljax import optimizers, registry
from ssljax.errors import (
  InputError,
  fraction,
  non_negative,
  positive,
  require,
)
from ssljax.signatures import Setting, check, parse, settings


def _setting(default: Any, text: str) -> Any:
  return dataclasses.field(default=default, metadata={'help': text})


@dataclasses.dataclass(frozen=True)
class Data:
  """The data set, or two of a domain adaptation."""

  dataset: str | None = _setting(
    'digits',
    '"digits" (embedded), the name of a TFDS data set, FILE.parquet or a '
    'folder of such files with images and labels, or FILE.npz with arrays '
    'train, train_labels, test, test_labels.',
  )
  images: str | None = _setting(
    None,
    'Folder of images, instead of `dataset`: CLASS/image, or any folder with a '
    '`labels_file`.',
  )
  labels_file: str | None = _setting(
    None,
    'CSV file with the columns file,label, or text lines "FILE LABEL", of '
    '`images`.',
  )
  source: str | None = _setting(
    None, 'Data set with the labels, instead of `dataset`.'
  )
  target: str | None = _setting(None, 'Data set to adapt to and to test on.')
  data_dir: str | None = _setting(None, 'Folder of prepared TFDS data sets.')
  train_split: str = _setting('train', 'TFDS split to train on (of both).')
  test_split: str | None = _setting(None, 'TFDS split to test on.')
  image_size: int | None = _setting(
    None, 'Side in pixels to which images are resized.'
  )
  corrupt: int = _setting(0, 'Number of corrupt images to tolerate.')


@dataclasses.dataclass(frozen=True)
class Split:
  """The label splits: which images have a label, per seed."""

  labels: str = _setting(
    '10',
    'Labelled images per class: a number, "all", or up_to:N, which takes fewer '
    'where a class has fewer.',
  )
  unlabelled: str = _setting(
    'rest',
    'Images seen without a label: "rest", "all", N of the rest, all:N of all.',
  )
  validation: int = _setting(
    0, 'Images held out for validation (of the source).'
  )
  hold_out: Literal['none', 'auto'] = _setting(
    'none',
    'Labelled images to test on where there are no test images: none, or auto '
    '(a fifth; one of five folds for each seed below 200 labels).',
  )
  seeds: int = _setting(1, 'Number of label splits.')
  seed: int = _setting(0, 'Number of the first split.')


@dataclasses.dataclass(frozen=True)
class Network:
  """The network."""

  network: str = _setting(
    'convlarge', f'Network: {", ".join(registry.NETWORKS)}.'
  )
  dropout: float | None = _setting(
    None, "Dropout rate; the network's own if unset."
  )
  bn_momentum: float | None = _setting(
    None,
    'Momentum of batch-norm statistics; if unset, 1 - 6 / steps, at most the '
    "network's own and at least 0.5.",
  )
  compute_dtype: Literal['auto', 'float32', 'bfloat16'] = _setting(
    'auto',
    'Dtype of convolutions, matrix products and activations: float32, '
    'bfloat16, or auto: bfloat16 on TPUs and recent GPUs, float32 elsewhere.',
  )


@dataclasses.dataclass(frozen=True)
class Batch:
  """The images of a step."""

  batch_labelled: int | None = _setting(50, 'Labelled images per step.')
  batch_per_class: int | None = _setting(
    None, 'Labelled images of each class per step, not `batch_labelled`.'
  )
  batch_unlabelled: int = _setting(50, 'Unlabelled images per step.')


@dataclasses.dataclass(frozen=True)
class Imbalance:
  """Classes with different numbers of labels."""

  logit_adjustment: float = _setting(
    0.0,
    'Strength of the logit adjustment of the supervised loss by the class '
    'frequencies of the labels (Menon et al. 2021); 0 for none, 1 as in the '
    'paper.',
  )
  sampling: Literal['images', 'classes'] = _setting(
    'images',
    'Labelled images of a step: all images equally often, or all classes.',
  )


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Changes of every image."""

  augment: tuple[str, ...] = _setting(
    (),
    f'Augmentations in order, of {", ".join(registry.AUGMENTATIONS)}. '
    'Parameters follow after colons: translate:4, randaugment:2:10.',
  )
  preprocess: str = _setting(
    'none',
    f'Preprocessing of every image: {", ".join(registry.PREPROCESS)}.',
  )


@dataclasses.dataclass(frozen=True)
class Active:
  """Active learning: labels queried while training."""

  acquire: str = _setting(
    'none', f'Acquisition function: none, {", ".join(registry.ACQUISITIONS)}.'
  )
  query_every: int = _setting(10, 'Epochs between queries.')
  query_size: int = _setting(10, 'Images per query.')
  query_passes: int = _setting(
    10, 'Dropout passes over all images before each query.'
  )
  budget: int | None = _setting(
    None, 'Labels to query in all; no limit if unset.'
  )
  oracle: Literal['truth', 'people'] = _setting(
    'truth', "Who answers: the data set's labels, or people, in files."
  )


@dataclasses.dataclass(frozen=True)
class Run:
  """The length of the run, and where and how often it is recorded."""

  baseline: bool = _setting(True, 'Train the baselines too, if any.')
  steps: int | None = _setting(None, 'Length of the training in steps.')
  epochs: float | None = _setting(
    None, 'Length of the training in passes over the images.'
  )
  minutes: float | None = _setting(
    None,
    'Time budget of the whole command, instead of `steps`: after some timed '
    'steps all lengths are multiplied by one factor.',
  )
  seeds_at_once: int = _setting(1, 'Splits trained in one program.')
  feed: Literal['auto', 'resident', 'stream'] = _setting(
    'auto', 'Images on the devices, or decoded while training.'
  )
  workdir: str | None = _setting(None, "The run's folder; dated if unset.")
  init_from: str | None = _setting(
    None, 'Folder of a finished run whose weights are the initial ones.'
  )
  overwrite: bool = _setting(False, 'Restart the run in `workdir`.')
  writers: tuple[str, ...] = _setting(
    ('tensorboard',),
    'Where metrics go beside metrics.jsonl: tensorboard, wandb, trackio, with '
    'commas between them.',
  )
  evaluate_every: int | None = _setting(
    None, 'Steps between evaluations; a tenth of the run if unset.'
  )
  report_minimum: bool = _setting(
    False, 'Report the least test error over training too.'
  )
  record_every: int | None = _setting(
    None, 'Steps between records; a hundredth, at most 100, if unset.'
  )
  checkpoint_seconds: float = _setting(60.0, 'Seconds between checkpoints.')
  keep_stages: bool = _setting(
    False, 'Keep the checkpoint at the end of every stage.'
  )
  stop_early: bool = _setting(
    False,
    'Leave out the stages after one that is worse than an earlier one on the '
    'held-out labelled images, and deliver that one (needs `hold_out` or '
    '`validation`).',
  )
  keep_every: int | None = _setting(
    None, 'Keep a checkpoint every this many steps of a stage.'
  )
  keep_checkpoints: int = _setting(2, 'Number of newest checkpoints to keep.')
  keep_hours: float | None = _setting(
    None, 'Keep one checkpoint of every this many hours too.'
  )
  steps_per_call: int | None = _setting(
    None, 'Steps per compiled call: 1 on CPU or streaming, else 50.'
  )
  profile: str | None = _setting(
    None,
    'STEP:COUNT writes a trace of COUNT steps from STEP on for TensorBoard or '
    "Perfetto to the run's folder.",
  )
  compile_cache: str = _setting(
    'auto',
    'Folder of compiled programs, which later starts reuse: a folder, off, or '
    "auto: the user's cache folder, or what JAX_COMPILATION_CACHE_DIR names.",
  )
  replay: bool = _setting(
    False,
    'Repeat the step that failed in `workdir`, and name the first operation '
    'whose result is not finite.',
  )


@dataclasses.dataclass(frozen=True)
class Hosts:
  """A run of several processes, one per host."""

  multihost: bool | None = _setting(
    None, 'True for one of several processes; detected if unset.'
  )
  coordinator: str | None = _setting(
    None, 'HOST:PORT of the first process; detected on a pod if unset.'
  )
  processes: int | None = _setting(
    None, 'Number of processes; detected on a pod if unset.'
  )
  process: int | None = _setting(
    None, 'Number of this process; detected on a pod if unset.'
  )
  hang_minutes: float = _setting(
    30.0, 'Exit with every stack after this long without progress.'
  )


PARTS = {
  'data': Data,
  'split': Split,
  'network': Network,
  'batch': Batch,
  'imbalance': Imbalance,
  'augmentation': Augmentation,
  'active': Active,
  'run': Run,
  'hosts': Hosts,
}
# Settings of where and how fast a run is made. A resumed run may change them.
FREE = (
  *('workdir', 'overwrite', 'checkpoint_seconds', 'data_dir', 'corrupt'),
  *('images', 'labels_file', 'writers', 'profile', 'replay'),
  *('compile_cache', 'keep_checkpoints', 'keep_hours'),
  *('multihost', 'coordinator', 'processes', 'process', 'hang_minutes'),
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything a run depends on.

  Attributes:
    method: name of the method in the registry.
    parameters: hyper-parameters of the method, and of its baselines where they
      share a name; complete.
    optimizer: keyword arguments of `optimizers.optimizer` and
      `optimizers.averaging`; complete.
    custom: names of the parts that Python objects replace, as `build.build`
      takes them: 'net', 'tx', 'augmentation'.
  """

  method: str
  parameters: Mapping[str, Any]
  optimizer: Mapping[str, Any]
  data: Data = Data()
  split: Split = Split()
  network: Network = Network()
  batch: Batch = Batch()
  imbalance: Imbalance = Imbalance()
  augmentation: Augmentation = Augmentation()
  active: Active = Active()
  run: Run = Run()
  hosts: Hosts = Hosts()
  custom: tuple[str, ...] = ()

  @property
  def data_name(self) -> str:
    """Name of the data set, or 'source-target'."""
    if self.data.source:
      return f'{self.data.source}-{self.data.target}'
    return self.data.images or str(self.data.dataset)

  @property
  def factories(self) -> dict[str, Callable[..., Any]]:
    """The factories that this run trains: baselines first, the method last."""
    return registry.arms(self.method, self.run.baseline)

  def values(self) -> dict[str, Any]:
    """Return every setting by its name, in the order of the parts."""
    found: dict[str, Any] = {}
    for part in PARTS:
      found |= dataclasses.asdict(getattr(self, part))
    return found | dict(self.parameters) | dict(self.optimizer)

  def replace(self, **changes: Any) -> 'Config':
    """Return a config with other values of some settings, by name.

    A momentum of batch norm that is the default for the length of the run
    follows a change of the length or of the network.
    """
    values, steps = self.values(), self.run.steps
    default = steps and registry.bn_momentum(self.network.network, steps)
    if {'steps', 'epochs', 'network'} & changes.keys():
      if values['bn_momentum'] == default:
        values['bn_momentum'] = None
    return from_values(self.method, values | changes, self.custom)


def schema(method: str) -> dict[str, dict[str, Setting]]:
  """Return the settings of a method's runs: part -> name -> setting.

  The defaults are those of the method's paper where the registry has some.

  Raises:
    InputError: the method is unknown, or two settings have one name.
  """
  entry = registry.method(method)
  parts = {part: _fields(cls) for part, cls in PARTS.items()}
  parts['optimizer'] = settings(optimizers.optimizer) | settings(
    optimizers.averaging
  )
  own: dict[str, Setting] = {}
  for factory in reversed(registry.arms(method, baselines=True).values()):
    own = {**settings(factory), **own}  # The method's default counts.
  parts['parameters'] = own
  _refuse_duplicates(method, parts)
  unknown = set(entry.defaults).difference(*map(set, parts.values()))
  require(
    not unknown,
    f'method {method!r}: its defaults name no settings: '
    f'{", ".join(sorted(unknown))}',
  )
  for found in parts.values():
    for name in found.keys() & entry.defaults.keys():
      default = check(found[name], entry.defaults[name])
      found[name] = found[name]._replace(default=default)
  return parts


def _fields(cls: Any) -> dict[str, Setting]:
  hints = get_type_hints(cls)
  return {
    field.name: Setting(
      field.name, hints[field.name], field.default, field.metadata['help']
    )
    for field in dataclasses.fields(cls)
  }


def _refuse_duplicates(
  method: str, parts: Mapping[str, Mapping[str, Setting]]
) -> None:
  """Raise `InputError` where two parts have a setting of one name."""
  owner = {'method': 'run'}
  for part, found in parts.items():
    for name in found:
      require(
        name not in owner,
        f'method {method!r}: its keyword {name!r} is a setting of '
        f'{owner.get(name)} already: rename it',
      )
      owner[name] = part


def register_method(
  name: str,
  factory: Callable[..., Any],
  *,
  baselines: Sequence[str] = ('supervised',),
  defaults: Mapping[str, Any] | None = None,
  replace: bool = False,
) -> None:
  """Make a method known by name, for `fit`, flags and loading.

  Args:
    name: of the method; `Method.name` of what the factory makes.
    factory: `(net, tx, batch_spec, steps, *, ...) -> Method`; its keyword-only
      parameters, each with a default, become settings.
    baselines: names of methods to train beside it on the command line.
    defaults: of settings, where they differ from the others'.
    replace: replace another factory that was registered under this name; the
      methods of ssljax are never replaced.

  Raises:
    InputError: another factory has this name, or a keyword of the factory is
      the name of another setting.
  """
  registry.check_free(name, factory, replace)
  require(
    inspect.isfunction(factory),
    f'method {name!r}: give a function (net, tx, batch_spec, steps, *, ...)',
  )
  known = registry.METHODS.get(name)
  entry = registry.MethodEntry(factory, tuple(baselines), dict(defaults or {}))
  registry.METHODS[name] = entry
  try:
    schema(name)
  except Exception:  # annotations are evaluated, and may raise anything
    del registry.METHODS[name]
    if known is not None:
      registry.METHODS[name] = known
    raise


def from_values(
  method: str, values: Mapping[str, Any], custom: Sequence[str] = ()
) -> Config:
  """Return the complete config of some settings.

  Args:
    method: name of the method in the registry.
    values: settings by name; the others take their defaults.
    custom: see `Config.custom`.

  Raises:
    InputError: a setting is unknown, or its value can never work.
  """
  parts = schema(method)
  known = {name: s for found in parts.values() for name, s in found.items()}
  for name in values:
    require_known(name, method, known)
  checked = {
    name: check(s, values[name]) if name in values else s.default
    for name, s in known.items()
  }
  config = _assembled(method, parts, _settled(checked, values))
  validate(config)
  config = dataclasses.replace(config, custom=tuple(custom))
  return config if config.run.steps is None else with_momentum(config)


def with_momentum(config: Config, steps: int | None = None) -> Config:
  """Return a config with a momentum of batch norm, if it names none.

  The default depends on the length of the run; so that the record shows the
  value, it is a part of the config.

  Args:
    config: may name a network that has no batch norm.
    steps: of the run; those of the config if None.
  """
  is_object = any(part.startswith('net') for part in config.custom)
  if config.network.bn_momentum is not None or is_object:
    return config
  length = steps or config.run.steps
  assert length is not None
  momentum = registry.bn_momentum(config.network.network, length)
  network = dataclasses.replace(config.network, bn_momentum=momentum)
  return dataclasses.replace(config, network=network)


def require_known(name: str, method: str, known: Collection[str]) -> None:
  """Raise `InputError` with near names if there is no such setting."""
  if name in known:
    return
  near = difflib.get_close_matches(name, known, 3)
  hint = f'did you mean {" or ".join(near)}?' if near else 'leave it out'
  raise InputError(f'`{name}`: {method} has no such setting: {hint}')


def _assembled(
  method: str,
  parts: Mapping[str, Mapping[str, Setting]],
  checked: Mapping[str, Any],
) -> Config:
  of = lambda part: {name: checked[name] for name in parts[part]}
  return Config(
    method,
    of('parameters'),
    of('optimizer'),
    **{part: cls(**of(part)) for part, cls in PARTS.items()},
  )


def _settled(
  values: dict[str, Any], named: Mapping[str, Any]
) -> dict[str, Any]:
  """Unset the settings that another one replaces, so that each is said once."""
  if values['source'] or values['target']:
    require(
      bool(values['source']) and bool(values['target']),
      '`source`, `target`: give both, or neither and a `dataset`',
    )
    values['dataset'] = None
  _settle_folder(values, named)
  if values['batch_per_class'] is not None:
    require(
      named.get('batch_labelled') is None,
      f'`batch_labelled`={values["batch_labelled"]}: `batch_per_class`='
      f'{values["batch_per_class"]} decides: change that one',
    )
    values['batch_labelled'] = None
  return values


def _settle_folder(values: dict[str, Any], named: Mapping[str, Any]) -> None:
  """Unset the data set if a folder of images is given."""
  if not values['images']:
    require(
      not values['labels_file'],
      f'`labels_file`={values["labels_file"]}: names images of a folder: give '
      'it as `images`',
    )
    return
  others = [n for n in ('dataset', 'source', 'target') if named.get(n)]
  require(
    not others,
    f'`images`={values["images"]}, {", ".join(f"`{n}`" for n in others)}: are '
    'different data: give one of them',
  )
  values['dataset'] = None


_POSITIVE = (
  *('seeds', 'seeds_at_once', 'steps', 'epochs', 'batch_labelled'),
  *('batch_per_class', 'batch_unlabelled', 'image_size', 'evaluate_every'),
  *('record_every', 'keep_every', 'steps_per_call', 'hang_minutes'),
  *('processes', 'query_every', 'query_size', 'query_passes', 'budget'),
  *('minutes', 'keep_checkpoints', 'keep_hours'),
)
_NOT_NEGATIVE = (
  *('validation', 'seed', 'corrupt', 'checkpoint_seconds'),
  'logit_adjustment',
)
_LATER = ('imbalance',)  # parts that earlier records lack
_MOST = 2**31 - 1  # steps, rows and sizes are int32 on the devices
_MOST_MINUTES = 10**6  # of `hang_minutes`: the system's timers end there
_MOST_SEEDS = 1000  # every split is drawn before the first is trained


def validate(config: Config) -> None:
  """Raise `InputError` for a value that no data set can make work."""
  values = config.values()
  _refuse_huge(values)
  some = lambda names: {n: values[n] for n in names if values[n] is not None}
  positive(**some(_POSITIVE))
  non_negative(**some(_NOT_NEGATIVE))
  fraction(**some(('dropout', 'bn_momentum')))
  require(
    values['seeds'] <= _MOST_SEEDS,
    f'`seeds`={values["seeds"]}: give at most {_MOST_SEEDS:,} splits, and '
    'others in another run, with another `seed`',
  )
  require(
    values['seed'] + values['seeds'] <= 2**32,
    f'`seed`={values["seed"]}: give seeds below 2**32',
  )
  require(
    (values['steps'] is None) != (values['epochs'] is None),
    '`steps`, `epochs`: give one of the two',
  )
  registry.choose('network', values['network'], registry.NETWORKS)
  registry.choose('preprocess', values['preprocess'], registry.PREPROCESS)
  registry.choose(
    'acquire', values['acquire'], ('none', *registry.ACQUISITIONS)
  )
  for name in values['augment']:
    registry.augmentation(name)  # raises
  if values['profile'] is not None:
    first_and_count('profile', values['profile'])
  per_class('labels', values['labels'])
  pool('unlabelled', values['unlabelled'])


def _refuse_huge(values: Mapping[str, Any]) -> None:
  """Raise `InputError` for a whole number that no device can hold."""
  for name, value in values.items():
    for one in value if isinstance(value, tuple) else (value,):
      most = 2**32 - 1 if name == 'seed' else _MOST
      require(
        not isinstance(one, int) or abs(one) <= most,
        f'`{name}`={one}: give a number of at most {most}',
      )
  epochs = values['epochs']
  require(
    epochs is None or not epochs > _MOST,
    f'`epochs`={epochs}: give a number of at most {_MOST}',
  )
  budget = values['minutes']
  require(
    budget is None or not budget > _MOST_MINUTES,
    f'`minutes`={budget}: give a number of at most {_MOST_MINUTES}',
  )
  minutes = values['hang_minutes']
  require(
    0.001 <= minutes <= _MOST_MINUTES,
    f'`hang_minutes`={minutes}: give a number above 0, from 0.001 to '
    f'{_MOST_MINUTES}',
  )


def per_class(name: str, value: str) -> tuple[int | None, bool]:
  """Return 'all', 'N' or 'up_to:N' as (N or None, a class may have fewer).

  Examples:
    >>> [per_class('labels', text) for text in ('all', '10', 'up_to:10')]
    [(None, False), (10, False), (10, True)]
  """
  if value == 'all':
    return None, False
  count = value.removeprefix('up_to:')
  require(
    _is_count(count),
    f'`{name}`={value}: give all, a number, or up_to:NUMBER',
  )
  return int(count), count != value


def first_and_count(name: str, value: str) -> tuple[int, int]:
  """Return 'STEP:COUNT' as two numbers above 0."""
  parts = value.split(':')
  good = len(parts) == 2 and all(_is_count(p) and int(p) > 0 for p in parts)
  require(
    good,
    f'`{name}`={value}: give STEP:COUNT, two whole numbers above 0, as 100:5 '
    'for the steps 100 to 104',
  )
  return int(parts[0]), int(parts[1])


def pool(name: str, value: str) -> tuple[Literal['rest', 'all'], int | None]:
  """Return 'rest', 'all', 'N' or 'all:N' as ('rest' or 'all', N or None).

  Examples:
    >>> [pool('unlabelled', text) for text in ('rest', '500', 'all:500')]
    [('rest', None), ('rest', 500), ('all', 500)]
  """
  kind: Literal['rest', 'all'] = 'all' if value.startswith('all') else 'rest'
  if value in ('rest', 'all'):
    return kind, None
  count = value.removeprefix('all:')
  require(
    _is_count(count),
    f'`{name}`={value}: give rest, all, a number, or all:NUMBER',
  )
  return kind, int(count)


def _is_count(text: str) -> bool:
  # `int` raises on very long numbers, and no data set has 10¹⁸ images.
  return text.isdecimal() and len(text) <= 18


# Records.


def to_json(config: Config) -> dict[str, Any]:
  """Return a config as `config.json` holds it."""
  return {
    'method': config.method,
    'parameters': dict(config.parameters),
    'optimizer': dict(config.optimizer),
    **{part: dataclasses.asdict(getattr(config, part)) for part in PARTS},
    'custom': list(config.custom),
  }


def from_json(tree: Mapping[str, Any]) -> Config:
  """Return the config of a parsed `config.json`.

  Raises:
    InputError: it is damaged, or of another version.
  """
  settings_of = {'parameters', 'optimizer', *PARTS}
  known = settings_of | {'method', 'custom'}
  if isinstance(tree, Mapping):
    tree = {**{part: {} for part in _LATER}, **tree}
  require(
    isinstance(tree, Mapping)
    and tree.keys() == known
    and all(isinstance(tree[name], Mapping) for name in settings_of)
    and isinstance(tree['method'], str)
    and isinstance(tree['custom'], list)
    and all(isinstance(name, str) for name in tree['custom']),
    f'config.json: expected the parts {", ".join(sorted(known))}',
  )
  values: dict[str, Any] = {}
  for part in settings_of:
    values |= tree[part]
  _as_recorded(values, tree['custom'])
  return from_values(tree['method'], values, tree['custom'])


def _as_recorded(values: dict[str, Any], custom: Sequence[str] = ()) -> None:
  """Complete the settings of a record, in place.

  Records of earlier versions name no momentum of batch norm: it was the
  network's own at any length. They name no dtype: it was float32.
  """
  network = values.get('network', Network().network)
  is_object = any(part.startswith('net') for part in custom)
  values.setdefault('compute_dtype', 'float32')
  unknown = values.get('bn_momentum') is None and not is_object
  if unknown and values.get('steps') is not None:
    registry.choose('network', network, registry.NETWORKS)
    values['bn_momentum'] = registry.own_momentum(network)


def to_flags(config: Config, among: Collection[str] | None = None) -> list[str]:
  """Return the lines of `flags.txt`: the settings that decide the result.

  A time budget is not one of them: the lengths that follow from it are.

  Args:
    config: of a run.
    among: names of settings; the others are left out. None leaves none out.
  """
  lines = []
  for name, value in config.values().items():
    if (
      name in (*FREE, 'minutes')
      or value is None
      or (among and name not in among)
    ):
      continue
    if isinstance(value, bool):
      lines.append(f'--{"" if value else "no"}{name}')
    elif isinstance(value, tuple):
      lines.append(f'--{name}={",".join(map(str, value))}')
    else:
      lines.append(f'--{name}={value}')
  return lines


def from_flags(
  method: str, lines: Sequence[str], *, recorded: bool = False
) -> Config:
  """Return the config of the lines of a `flags.txt` or a preset.

  Args:
    method: name of the method in the registry.
    lines: the lines; comments are skipped.
    recorded: they are the record of a run, not a command.

  Raises:
    InputError: a line is no setting of the method.
  """
  known = {n: s for part in schema(method).values() for n, s in part.items()}
  values = {}
  for line in lines:
    if not line.strip() or line.lstrip().startswith('#'):
      continue
    name, _, text = line.strip().lstrip('-').partition('=')
    if '=' in line:
      require_known(name, method, known)
      values[name] = parse(known[name], text)
    else:
      positive_name = name if name in known else name.removeprefix('no')
      if positive_name not in known:
        require_known(name, method, known)
      values[positive_name] = name in known
  if recorded:
    _as_recorded(values)
  return from_values(method, values)


def differences(there: Config, here: Config) -> list[str]:
  """Return a text for every setting in which two runs' results may differ."""
  values = [
    {'method': c.method, 'custom': c.custom} | c.values() for c in (there, here)
  ]
  shown = lambda name, value: (
    f'no `{name}`' if value is None else f'`{name}`={_text(value)}'
  )
  ignored = set(FREE)
  if here.run.steps is None and here.network.bn_momentum is None:
    # It follows from the number of steps, which a run of epochs does not know
    # before it is built.
    ignored.add('bn_momentum')
  if here.network.compute_dtype == 'auto':
    ignored.add('compute_dtype')  # the devices decide, when the run is built
  return [
    f'{shown(name, values[0].get(name))} there, '
    f'{shown(name, values[1].get(name))} here'
    for name in sorted(values[0].keys() | values[1].keys())
    if name not in ignored and not _same(*(v.get(name) for v in values))
  ]


def _same(a: Any, b: Any) -> bool:
  """True for equal values; a NaN equals itself."""
  both = (isinstance(x, float) and math.isnan(x) for x in (a, b))
  return a == b or all(both)


def _text(value: Any) -> str:
  if isinstance(value, tuple | list):
    return ','.join(map(str, value))
  return str(value)


def read(text: str) -> Config:
  """Return the config of the text of a `config.json`."""
  try:
    tree = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise InputError(f'config.json: is no JSON ({error})') from error
  return from_json(tree)


__all__ = [
  'Config',
  'differences',
  'from_flags',
  'from_json',
  'from_values',
  'register_method',
  'schema',
  'to_flags',
  'to_json',
  'validate',
]
