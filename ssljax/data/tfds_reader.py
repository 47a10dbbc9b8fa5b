"""Open data sets in the TFDS layout and find their image and label features."""

from collections.abc import Callable
import difflib
import importlib.util
import logging
import operator
import os
import pathlib
import re
from typing import Any, NamedTuple

from ssljax import files
from ssljax.data.types import MAX_CLASSES
from ssljax.errors import InputError, require

_LOG = logging.getLogger(__name__)

_FILE_NAMES = ('file_name', 'filename', 'image/filename')


def open_builder(name: str, data_dir: str | None):
  """Return the TFDS builder of a data set, preparing the set if necessary."""
  root = _root(name, data_dir)
  builder, is_prepared = _find(name, root)
  if is_prepared:
    _note_configurations(name, root, builder)
    return builder
  named = _parts(name).get('config')
  if _configurations(root / builder.name) and not (
    named and tensorflow_is_installed()
  ):  # the user means one of those, or has to name another to prepare it
    raise InputError(f'`dataset`={name}: {_on_disk_as(name, root)}')
  return _prepare(name, root, builder)


def on_disk(name: str, data_dir: str):
  """Return the TFDS builder of a data set if it is prepared, else None."""
  builder, is_prepared = _find(name, _root(name, data_dir))
  return builder if is_prepared else None


def _find(name: str, root):
  """Return the TFDS builder of a data set, and True if it is prepared."""
  import tensorflow_datasets as tfds  # slow to import; `digits` needs none

  _refuse_irregular(name, root)
  try:
    builder = _builder(name, root)
    return builder, builder.is_prepared() and bool(builder.info.splits)
  except tfds.core.DatasetNotFoundError as error:
    raise InputError(_unknown_name(name, root)) from error
  except Exception as error:  # TFDS's parsers and imports raise many kinds
    found = _on_disk_as(name, root)
    raise InputError(
      f'`dataset`={name}: {found}'
      if found
      else f'`dataset`={name}: TFDS cannot open it in `data_dir`={root} '
      f'({one_line(cause(error))}); give name, name/config or name:version, '
      "prepare it again, or pip install 'ssljax[prepare]'"
    ) from error


def _refuse_irregular(name: str, root) -> None:
  """Raise `InputError` if the folder of a data set holds a FIFO or a device.

  TFDS would block when it opens one. Only local folders can hold them.
  """
  plain = _parts(name).get('set')
  if plain is None or '://' in str(root):
    return
  folder = os.path.join(root, plain)
  for where, folders, names in os.walk(folder):
    if len(pathlib.Path(where).relative_to(folder).parts) > 1:
      folders.clear()  # SET/CONFIGURATION/VERSION is the deepest
    for path in (os.path.join(where, file) for file in names):
      require(
        files.is_regular(path) or not os.path.exists(path),
        f'`dataset`={name}: {path} is no regular file: remove it, or copy the '
        'data set again',
      )


def _builder(name: str, root):
  """Return a builder of the version that TFDS's class of the set names.

  If that version is not on disk, the newest one that is; if none is, a builder
  of a set that is not prepared.
  """
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(name, data_dir=str(root))
  except tfds.core.DatasetNotFoundError:
    raise
  except Exception:  # the class may import packages only preparation needs
    newest = _newest(root / name)
    if newest is None:
      raise
    return tfds.builder_from_directory(newest)
  if builder.is_prepared() or ':' in name:
    return builder
  config = builder.builder_config
  newest = _newest(root / builder.name / (config.name if config else ''))
  return tfds.builder_from_directory(newest) if newest else builder


def _root(name: str, data_dir: str | None):
  """Return `data_dir` as an existing folder, local or in the cloud."""
  from etils import epath

  if not data_dir:
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    plain = re.split('[/:]', name)[0]
    require(plain in known, _unknown_name(name, None))
    raise InputError(
      f'`data_dir`: `dataset`={name} needs it; give the folder that holds '
      'prepared TFDS data sets, for example `data_dir`=~/tensorflow_datasets'
    )
  if files.in_bucket(data_dir):
    files.as_place('data_dir', data_dir)  # refuses one that cannot be read
  root = epath.Path(data_dir).expanduser()
  require(
    root.is_dir(),
    f'`data_dir`={data_dir}: no such folder; give one that holds prepared TFDS '
    'data sets, or create it',
  )
  return root


def _newest(folder):
  """Return the folder of a data set's newest version in `folder`, or None."""
  versions = _versions(folder)
  return folder / versions[-1] if versions else None


def _versions(folder) -> list[str]:
  """Return the versions of a data set in `folder`, the newest last."""
  import tensorflow_datasets as tfds

  if not folder.is_dir():
    return []
  found = [
    path.name
    for path in folder.iterdir()
    if tfds.core.Version.is_valid(path.name)
    and (path / 'dataset_info.json').exists()
    and (path / 'features.json').exists()
  ]
  return sorted(found, key=tfds.core.Version)


def _configurations(folder) -> list[str]:
  """Return the names of the configurations of a data set in `folder`."""
  if not folder.is_dir():
    return []
  return sorted(path.name for path in folder.iterdir() if _versions(path))


def _parts(name: str) -> dict[str, str | None]:
  """Return 'set', 'config' and 'version' of a name; {} if it has others."""
  match = re.fullmatch(
    r'(?P<set>[\w-]+)(/(?P<config>[^/:]+))?(:(?P<version>[^/:]+))?', name
  )
  return match.groupdict() if match else {}


def _on_disk_as(name: str, root) -> str | None:
  """Return what is on disk of a set that cannot be opened under this name.

  Returns:
    The configurations or versions that are there, the name to give, or what a
    folder of this name lacks. None if that does not explain the failure.
  """
  parts = _parts(name)
  plain, config = parts.get('set'), parts.get('config')
  if not plain or root is None:
    return None
  try:
    there, folder = (root / plain).is_dir(), root / plain
    configs, versions = _configurations(folder), _versions(folder)
  except OSError:  # a name that is too long, or no permission to look
    return None
  if not there:
    return None
  if not configs and not versions:
    return (
      f'the folder {folder} holds no data set in the TFDS layout: a folder '
      'VERSION or CONFIGURATION/VERSION, as 1.0.0, with dataset_info.json and '
      'features.json'
    )
  if config not in configs and (config or not versions):
    if not configs:
      return f'has no configurations in `data_dir`={root}; give {plain}'
    several = 's' if len(configs) > 1 else ''
    return (
      f'has the configuration{several} {few(configs)} in `data_dir`={root}; '
      f'give {plain}/{configs[0]}'
    )
  if parts['version']:
    name = f'{plain}/{config}' if config else plain
    versions = _versions(root / name)
    several = 's' if len(versions) > 1 else ''
    return (
      f'has the version{several} {few(versions)} in `data_dir`={root}; give '
      f'{name}:{versions[-1]}'
    )
  return None


def _note_configurations(name: str, root, builder) -> None:
  """Log which configuration is used if several are there and none is named."""
  parts, config = _parts(name), builder.info.config_name
  if not config or not parts or parts['config']:
    return
  others = _configurations(root / parts['set'])
  if len(others) > 1:
    _LOG.warning(
      '%s: has the configurations %s and none is named; %s is used',
      name,
      few(others),
      config,
    )


def _prepare(name: str, root, builder):
  """Download and prepare a data set, which needs TensorFlow."""
  require(
    tensorflow_is_installed(),
    f'`dataset`={name}: is not prepared in `data_dir`={root} (which holds '
    f'{listed(_on_disk(root))}), and preparing it needs TensorFlow; '
    "pip install 'ssljax[prepare]' and run again, or copy a prepared set "
    '(array_record) into the folder',
  )
  _LOG.info('preparing %s in %s', name, root)
  try:
    builder.download_and_prepare(file_format='array_record')
  except Exception as error:  # network, disk and manual downloads may fail
    raise InputError(
      f'`dataset`={name}: cannot be prepared in `data_dir`={root} '
      f'({one_line(error)}); see '
      f'https://www.tensorflow.org/datasets/catalog/{builder.name}'
    ) from error
  return builder


def tensorflow_is_installed() -> bool:
  """Return True if data sets can be prepared."""
  return importlib.util.find_spec('tensorflow') is not None


def _on_disk(root) -> list[str]:
  """Return the names of the data sets under `root`."""
  if root is None:
    return []
  try:
    return sorted(
      path.name
      for path in root.iterdir()
      if _versions(path) or _configurations(path)
    )
  except OSError:  # no permission to look
    return []


def _unknown_name(name: str, root) -> str:
  import tensorflow_datasets as tfds

  found = _on_disk_as(name, root)
  if found:
    return f'`dataset`={name}: {found}'
  available = ['digits', *_on_disk(root)]
  known = [*available, *tfds.list_builders(with_community_datasets=False)]
  near = dict.fromkeys(difflib.get_close_matches(name, known, n=6))
  near.pop(name, None)  # the name that is refused is no advice
  hint = f'did you mean {listed(near)}?' if near else f'try {listed(available)}'
  place = f' and not in `data_dir`={root}' if root else ''
  return f'`dataset`={name}: not a TFDS data set{place}; {hint}'


class Columns(NamedTuple):
  """The features of a data set, and functions that parse a record."""

  feature: Any  # the image's TFDS feature
  classes: tuple[str, ...]  # [C]
  image: Callable[[bytes], bytes]  # the encoded image
  label: Callable[[bytes], int]
  both: Callable[[bytes], tuple[bytes, int]]  # the encoded image, the label
  title: Callable[[bytes], str]  # the example's file name, or ''


def find_columns(name: str, info) -> Columns:
  """Find the image and the label among the features of a data set.

  Args:
    name: of the data set, for messages.
    info: its `tfds.core.DatasetInfo`.

  Raises:
    InputError: it is no image classification set.
  """
  from tensorflow_datasets import features as kinds

  features = info.features
  require(
    isinstance(features, kinds.FeaturesDict),
    f'`dataset`={name}: not an image classification set; give one with an '
    'image and a label',
  )
  images = [k for k, f in features.items() if type(f) is kinds.Image]
  labels = [k for k, f in features.items() if isinstance(f, kinds.ClassLabel)]
  keys = info.supervised_keys or (None, None)
  image = _only(name, 'image', images, keys[0])
  label = _only(name, 'label', labels, keys[1])
  count = features[label].num_classes
  require(
    bool(count) and count <= MAX_CLASSES,
    f'`dataset`={name}: its label {label!r} has {count or "no"} classes, at '
    f'most {MAX_CLASSES} are supported; prepare it again with the right '
    'num_classes or names',
  )
  title = next((k for k in _FILE_NAMES if k in features), None)
  encoded, numbered = _parser(features, image), _parser(features, label)
  both, titled = _parser(features, image, label), _parser(features, title)
  return Columns(
    features[image],
    tuple(features[label].names),
    lambda record: encoded(record)[image],
    lambda record: numbered(record)[label],
    lambda record: operator.itemgetter(image, label)(both(record)),
    lambda record: titled(record)[title] if title else '',
  )


def _only(name: str, kind: str, found: list[str], supervised) -> str:
  """Return the only feature of a kind, or the one in `supervised_keys`."""
  require(
    bool(found),
    f'`dataset`={name}: not an image classification set, it has no {kind} '
    'feature; give one with an image and a label',
  )
  if isinstance(supervised, str) and supervised in found:
    return supervised
  require(
    len(found) == 1,
    f'`dataset`={name}: has several {kind} features '
    f'({listed(sorted(found))}); prepare it again with supervised_keys, which '
    'select one',
  )
  return found[0]


def _parser(features, *keys: str | None) -> Callable[[bytes], dict]:
  """Return a function that parses some features of a record, not the others.

  An image is not decoded.
  """
  import tensorflow_datasets as tfds

  some = tfds.features.FeaturesDict({key: features[key] for key in keys if key})
  is_image = lambda key: isinstance(features[key], tfds.features.Image)
  skip = tfds.decode.SkipDecoding()
  decoders = {key: skip for key in some if is_image(key)}
  parse = some.deserialize_example_np
  return lambda record: parse(record, decoders=decoders)


def listed(names) -> str:
  """Return names joined by commas, or 'nothing'."""
  return ', '.join(map(str, names)) or 'nothing'


def few(names, most: int = 10) -> str:
  """Return the first names joined by commas, and the number of the others."""
  names = list(map(str, names))
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return listed(names[:most]) + more


def cause(error: BaseException) -> BaseException:
  """Return the first error of a chain of causes."""
  while error.__cause__ is not None:
    error = error.__cause__
  return error


def one_line(error: BaseException) -> str:
  """Return the message of an error in one line of at most 200 characters."""
  text = re.sub(' <[^<>]* at 0x[0-9a-f]+>', '', str(error))
  text = ' '.join(text.split()) or type(error).__name__
  text = re.sub('^Failed to construct dataset .*?}": ', '', text)
  return text if len(text) <= 200 else text[:197] + '...'
