"""Finds a data set that TFDS has prepared, and its image and label in it."""

from collections.abc import Callable
import difflib
import importlib.util
import re
from typing import Any, NamedTuple

from absl import logging

from ssljax.errors import InputError, require

_FILE_NAMES = ('file_name', 'filename', 'image/filename')


def open_builder(name: str, data_dir: str | None):
  """The TFDS builder of a data set, which is prepared if it was not."""
  root = _root(name, data_dir)
  builder, prepared = _found(name, root)
  return builder if prepared else _prepared(name, root, builder)


def on_disk(name: str, data_dir: str):
  """The TFDS builder of a data set that is prepared, else None."""
  builder, prepared = _found(name, _root(name, data_dir))
  return builder if prepared else None


def _found(name: str, root):
  """The TFDS builder of a data set, and whether it is prepared."""
  import tensorflow_datasets as tfds  # slow to import; `digits` needs none

  try:
    builder = _builder(name, root)
    return builder, builder.is_prepared() and bool(builder.info.splits)
  except tfds.core.DatasetNotFoundError as error:
    raise InputError(_unknown_name(name, root)) from error
  except Exception as error:  # its parsers and imports raise nearly anything
    raise InputError(
      f'`dataset`={name}: TFDS cannot open it in `data_dir`={root} '
      f'({one_line(cause(error))}); give it as name, name/config or '
      "name:version, prepare it again, or pip install 'ssljax[prepare]'"
    ) from error


def _builder(name: str, root):
  """The class's own version, else the newest on disk, else unprepared."""
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(name, data_dir=str(root))
  except tfds.core.DatasetNotFoundError:
    raise
  except Exception:  # a class may import what only preparing it needs
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
  """`data_dir` as an existing folder; cloud addresses work too."""
  from etils import epath

  if not data_dir:
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    plain = re.split('[/:]', name)[0]
    require(plain in known, _unknown_name(name, None))
    raise InputError(
      f'`data_dir`: `dataset`={name} needs it; give the folder that holds '
      'prepared TFDS data sets, e.g. `data_dir`=~/tensorflow_datasets'
    )
  root = epath.Path(data_dir).expanduser()
  require(
    root.is_dir(),
    f'`data_dir`={data_dir}: there is no such folder; give one that holds '
    'prepared TFDS data sets, or make it',
  )
  return root


def _newest(folder):
  """The folder of the newest version of a data set in `folder`, or None."""
  import tensorflow_datasets as tfds

  if not folder.is_dir():
    return None
  found = [
    path
    for path in folder.iterdir()
    if tfds.core.Version.is_valid(path.name)
    and (path / 'dataset_info.json').exists()
    and (path / 'features.json').exists()
  ]
  return max(found, key=lambda p: tfds.core.Version(p.name), default=None)


def _prepared(name: str, root, builder):
  """Downloads and prepares a data set, which TensorFlow has to be there for."""
  require(
    tensorflow_is_there(),
    f'`dataset`={name}: it is not prepared in `data_dir`={root} (there: '
    f'{listed(_on_disk(root))}), and preparing it needs TensorFlow; '
    "pip install 'ssljax[prepare]' and run this again, or copy in a prepared "
    'one (array_record)',
  )
  logging.info('preparing %s in %s', name, root)
  try:
    builder.download_and_prepare(file_format='array_record')
  except Exception as error:  # the network, the disk, a manual download
    raise InputError(
      f'`dataset`={name}: it could not be prepared in `data_dir`={root}: '
      f'{one_line(error)}; see https://www.tensorflow.org/datasets/catalog/'
      f'{builder.name}'
    ) from error
  return builder


def tensorflow_is_there() -> bool:
  """Whether a data set can be prepared here."""
  return importlib.util.find_spec('tensorflow') is not None


def _on_disk(root) -> list[str]:
  """The data sets that seem to be under `root`."""
  if root is None:
    return []
  hidden = ('.', '_')
  paths = [p for p in root.iterdir() if not p.name.startswith(hidden)]
  return sorted(p.name for p in paths if p.is_dir() and p.name != 'downloads')


def _unknown_name(name: str, root) -> str:
  import tensorflow_datasets as tfds

  there = ['digits', *_on_disk(root)]
  known = [*there, *tfds.list_builders(with_community_datasets=False)]
  near = dict.fromkeys(difflib.get_close_matches(name, known, n=5))
  hint = f'did you mean {listed(near)}?' if near else f'try {listed(there)}'
  place = f' and not in `data_dir`={root}' if root else ''
  return f'`dataset`={name}: not a TFDS data set{place}; {hint}'


class Columns(NamedTuple):
  """How to take an example's parts out of a record."""

  feature: Any  # the image's TFDS feature
  classes: tuple[str, ...]  # [C]
  image: Callable[[bytes], bytes]  # the encoded image
  label: Callable[[bytes], int]
  title: Callable[[bytes], str]  # the example's file name, '' without one


def find_columns(name: str, info) -> Columns:
  """Finds image and label among the features of a data set."""
  from tensorflow_datasets import features as kinds

  features = info.features
  require(
    isinstance(features, kinds.FeaturesDict),
    f'`dataset`={name}: not an image classification set; name one with an '
    'image and a label',
  )
  images = [k for k, f in features.items() if type(f) is kinds.Image]
  labels = [k for k, f in features.items() if isinstance(f, kinds.ClassLabel)]
  keys = info.supervised_keys or (None, None)
  image = _only(name, 'image', images, keys[0])
  label = _only(name, 'label', labels, keys[1])
  require(
    bool(features[label].num_classes),
    f'`dataset`={name}: its label {label!r} states no classes; prepare it '
    'again with num_classes or names',
  )
  title = next((k for k in _FILE_NAMES if k in features), None)
  return Columns(
    features[image],
    tuple(features[label].names),
    _field(features, image, encoded=True),
    _field(features, label),
    _field(features, title) if title else lambda record: '',
  )


def _only(name: str, kind: str, found: list[str], supervised) -> str:
  """The one feature of a kind, or the one the data set names for learning."""
  require(
    bool(found),
    f'`dataset`={name}: not an image classification set, it has no {kind} '
    'feature; name one with an image and a label',
  )
  if isinstance(supervised, str) and supervised in found:
    return supervised
  require(
    len(found) == 1,
    f'`dataset`={name}: it has several {kind} features '
    f'({listed(sorted(found))}) and no supervised_keys to choose by; prepare '
    'it again with them',
  )
  return found[0]


def _field(features, key: str, encoded: bool = False) -> Callable[[bytes], Any]:
  """A function that parses one feature of a record and leaves the others."""
  import tensorflow_datasets as tfds

  alone = tfds.features.FeaturesDict({key: features[key]})
  decoders = {key: tfds.decode.SkipDecoding()} if encoded else None
  parse = alone.deserialize_example_np
  return lambda record: parse(record, decoders=decoders)[key]


def listed(names) -> str:
  """Names with commas between them."""
  return ', '.join(map(str, names)) or 'nothing'


def cause(error: BaseException) -> BaseException:
  """The error at the bottom of a chain of them."""
  while error.__cause__ is not None:
    error = error.__cause__
  return error


def one_line(error: BaseException) -> str:
  """What an error says, in at most one short line."""
  text = re.sub(' <[^<>]* at 0x[0-9a-f]+>', '', str(error))
  text = ' '.join(text.split()) or type(error).__name__
  text = re.sub('^Failed to construct dataset .*?}": ', '', text)
  return text if len(text) <= 200 else text[:197] + '...'
