"""The table of settings that were chosen for a data set, and the reasons."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from ssljax import registry
from ssljax.config import Config
from ssljax.data import datasets, folder, parquet, splits
from ssljax.runs import defaults
from ssljax.runs.budget import LENGTHS

_GIVEN = 'given'


class Choice(NamedTuple):
  """A line of the table."""

  setting: str
  value: str
  why: str


def table(
  config: Config,
  dataset: datasets.Dataset,
  facts: defaults.Facts,
  given: Collection[str],
) -> list[Choice]:
  """Return what was chosen for a run, and why.

  Args:
    config: of the run.
    dataset: of the run.
    facts: of its first split.
    given: names of the settings that the user gives.
  """
  found = [
    _size(config, dataset, given),
    _network(config, facts, given),
    _augmentation(config, facts, given),
    _batch(config, facts, given),
    _lengths(config, facts, given),
    _rate(config, given),
    _momentum(config, given),
    _hold_out(config, dataset, given),
  ]
  return [choice for choice in found if choice]


def merged(tables: Mapping[str, list[Choice]]) -> list[Choice]:
  """Return the choices of several methods, those that all share once.

  Args:
    tables: of `table`, by the name of the method.
  """
  found: list[Choice] = []
  for name in dict.fromkeys(c.setting for t in tables.values() for c in t):
    own = {
      method: choice
      for method, choices in tables.items()
      for choice in choices
      if choice.setting == name
    }
    first, *others = own.values()
    if len(own) == len(tables) and all(other == first for other in others):
      found.append(first)
    else:
      found += [
        choice._replace(setting=f'{name} of {method}')
        for method, choice in own.items()
      ]
  return found


def lines(found: list[Choice]) -> list[list[str]]:
  """Return the cells of the table, its title first."""
  return [['setting', 'value', 'why'], *map(list, found)]


def _why(name: str, given: Collection[str], reason: str) -> str:
  return _GIVEN if name in given else reason


def _size(config, dataset, given) -> Choice:
  """Return the size of the images."""
  train = dataset.train
  if not train.is_images:
    return Choice('features', str(train.row_shape[0]), 'as stored')
  reason = 'as stored'
  if config.data.images or parquet.is_parquet(config.data.dataset or ''):
    reason = (
      f'median of the shorter sides, at most {folder.MAX_SIDE}; one colour '
      'channel if all are grey'
    )
  value = 'x'.join(map(str, train.shape))
  return Choice('image size', value, _why('image_size', given, reason))


def _network(config, facts, given) -> Choice:
  """Return the network."""
  side = min(facts.shape[:2])
  reason = f'for images of {side} pixels' if facts.is_images else 'for features'
  if config.network.network.endswith('_heads'):
    reason += ', with embeddings that the method compares'
  name = config.network.network
  return Choice('network', name, _why('network', given, reason))


def _augmentation(config, facts, given) -> Choice:
  """Return the augmentation."""
  value = ', '.join(config.augmentation.augment) or 'none'
  if config.augmentation.augment:
    reason = 'folder of colour images: mirrored, and shifted by 1/8 of the side'
  elif not facts.is_images:
    reason = 'features'
  elif facts.shape[-1] == 1:
    reason = 'grey images: a mirrored letter or digit is another one'
  else:
    reason = 'not known whether a mirrored image keeps its class'
  return Choice('augmentation', value, _why('augment', given, reason))


def _batch(config, facts, given) -> Choice:
  """Return the images of a step."""
  batch, names = config.batch, ('batch_labelled', 'batch_unlabelled')
  value = f'{batch.batch_labelled} labelled, '
  if batch.batch_per_class:
    value = f'{batch.batch_per_class} of each class, '
  value += f'{batch.batch_unlabelled} unlabelled'
  reason = (
    f'at most the {facts.labelled} labelled and {facts.unlabelled} other images'
  )
  chosen = [name for name in names if name not in given]
  return Choice('batch', value, reason if chosen else _GIVEN)


def _lengths(config, facts, given) -> Choice:
  """Return the lengths of all stages."""
  values = config.values()
  names = [n for n in LENGTHS if values.get(n) and n != 'interval']
  value = ', '.join(f'{name} {_text(values[name])}' for name in names)
  reason = f'passes over {facts.images} images, at least until it converges'
  if config.run.minutes is not None:
    reason = f'to be multiplied by a factor, for {config.run.minutes:g} minutes'
  elif all(name in given for name in names):
    reason = _GIVEN
  return Choice('lengths', value, reason)


def _text(value) -> str:
  return ','.join(map(str, value)) if isinstance(value, tuple) else f'{value:,}'


def _rate(config, given) -> Choice:
  """Return the learning rate and its decay."""
  value = f'{config.optimizer["learning_rate"]:g}, {config.optimizer["decay"]}'
  reason = f"{config.method}'s own"
  if config.network.network in defaults.WITHOUT_NORM:
    reason = 'of a network without batch norm'
  return Choice('learning rate', value, _why('learning_rate', given, reason))


def _momentum(config, given) -> Choice | None:
  """Return the momentum of batch norm; None without batch norm."""
  momentum = config.network.bn_momentum
  if momentum is None:
    return None
  own = registry.own_momentum(config.network.network)
  reason = f'1 - 6 / {config.run.steps} steps'
  if momentum == own:
    reason = "the network's own"
  why = _why('bn_momentum', given, reason)
  return Choice('batch-norm momentum', f'{momentum:g}', why)


def _hold_out(config, dataset, given) -> Choice:
  """Return which labelled images are held out."""
  tests = len(dataset.test.labels)
  if tests:
    return Choice('hold-out', 'none', f'there are {tests:,} test images')
  if config.split.hold_out == 'none':
    return Choice('hold-out', 'none', _why('hold_out', given, 'not asked for'))
  known = int((dataset.train.labels >= 0).sum())
  few = known < splits.FEW_LABELS
  value = 'one of five folds for each seed' if few else 'a fifth'
  why = f'no test images, {known:,} labels'
  return Choice('hold-out', value, _why('hold_out', given, why))
