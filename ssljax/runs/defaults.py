"""Settings that suit a data set: network, batch sizes and lengths.

A preset states every setting of an experiment. Here are the defaults for data
that no preset knows. They depend on the numbers of images and of labels, on the
shape of an image, and on the method. Images of a folder are resized to the
median of their shorter sides, at most 64 pixels (`data.folder`), and augmented
as `augmentation_for` says; those of a file or a prepared set are neither.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ssljax import config as config_lib
from ssljax import registry
from ssljax.config import Config
from ssljax.core import UNLABELLED
from ssljax.data import datasets, parquet
from ssljax.data.splits import Split
from ssljax.runs import build

_TINY, _SMALL, _MIDDLE = 5, 12, 40  # sides in pixels
# Without batch norm a network diverges at the rate of those that have it.
_RATEWITHOUT_NORM = 0.01
WITHOUT_NORM = (
  *('deepbass_mnist', 'deepbass_toy', 'lenet', 'linear'),
  *('elu_digits', 'elu_mnist', 'elu_svhn', 'elu_stl10'),
)
# Features from which a vector is taken for a pretrained network's. Errors in %
# on 1,280 features of CIFAR-10 (other images than those of docs/results.md), 40
# and 250 labels, by labels alone: mlp 56.8 38.5, linear_probe 54.1 35.5.
_EMBEDDING = 256
_PHOTOGRAPH = 24  # side in pixels; smaller images lose too much at a border
# Settings that exclude each other: one that is given unsets the other.
_ALTERNATIVES = (
  ('epochs', 'steps'),
  ('batch_labelled', 'batch_per_class'),
  ('batch_per_class', 'batch_labelled'),
)


class Facts(NamedTuple):
  """The properties of a training set that its defaults depend on."""

  images: int  # N
  labelled: int  # L of them have a label
  least: int  # labelled images of the rarest class
  classes: int  # C
  shape: tuple[int, int, int]  # H, W, c
  is_images: bool  # False for features
  # Images that the unlabelled part of a batch is drawn from; 0 if not known.
  pool: int = 0

  @property
  def unlabelled(self) -> int:
    """Images without a label."""
    return self.images - self.labelled


def load(config: Config) -> tuple[datasets.Dataset, Facts]:
  """Open the data set of a config, and return the facts of its first split."""
  dataset = build.load_dataset(config)
  split = build.draw_splits(config, dataset)[0]
  return dataset, facts_of_split(dataset, split)


class Chosen(NamedTuple):
  """A config that suits its data."""

  config: Config
  dataset: datasets.Dataset
  names: frozenset[str]  # of the settings that were chosen for the data


def facts_of(dataset: datasets.Dataset, held_out: int = 0) -> Facts:
  """Return the facts of a training set, `held_out` labelled images less."""
  labels = dataset.train.labels
  known = labels[labels != UNLABELLED]
  counts = np.bincount(known, minlength=len(dataset.classes))
  share = 1 - held_out / max(1, len(known))
  return Facts(
    len(labels) - held_out,
    len(known) - held_out,
    max(1, int(np.min(counts) * share)),
    len(dataset.classes),
    dataset.train.shape,
    dataset.train.is_images,
  )


def facts_of_split(dataset: datasets.Dataset, split: Split) -> Facts:
  """Return the facts of the training images that a split admits."""
  known = split.labels[split.labelled]
  counts = np.bincount(known, minlength=len(dataset.classes))
  return Facts(
    int(split.seen(dataset.unlabelled_from).sum()),
    len(known),
    max(1, int(np.min(counts))),
    len(dataset.classes),
    dataset.train.shape,
    dataset.train.is_images,
    len(split.unlabelled),
  )


def complete(
  method: str,
  given: Mapping[str, Any],
  facts: Facts,
  custom: Sequence[str] = (),
) -> Config:
  """Return the config of some settings; the others suit the data.

  Args:
    method: name of a method in the registry.
    given: settings by name.
    facts: of the training set.
    custom: see `Config.custom`.
  """
  if given.get('unlabelled') == 'rest' and not facts.pool:
    facts = facts._replace(pool=facts.unlabelled)
  suggested = suggest(method, facts, given.get('network'))
  own = _without_alternatives(given)
  return config_lib.from_values(method, suggested | own, custom)


def _without_alternatives(given: Mapping[str, Any]) -> dict[str, Any]:
  """Return the settings that are given, and unset those they exclude."""
  unset = {
    other: None
    for one, other in _ALTERNATIVES
    if given.get(one) is not None and given.get(other) is None
  }
  return unset | dict(given)


def for_data(
  method: str,
  given: Mapping[str, Any],
  load: Callable[[Config], tuple[datasets.Dataset, Facts]],
) -> Chosen:
  """Return the config of some settings and of the data that they name.

  Args:
    method: name of a method in the registry.
    given: settings by name.
    load: opens the data set of a config, and returns its facts too.
  """
  # Any length will do to open the data. Of features no image is augmented.
  first = {'steps': 1, 'augment': (), 'preprocess': 'none'}
  # Where a later stage makes the predictions worse, the earlier one is used.
  first |= {'hold_out': 'auto', 'keep_stages': True, 'stop_early': True}
  is_folder = given.get('images') is not None
  if is_folder or parquet.is_parquet(given.get('dataset') or ''):
    first |= {'labels': 'all'}
  opened = config_lib.from_values(method, first | _without_alternatives(given))
  dataset, facts = load(opened)
  own = {'labels': opened.split.labels} | dict(given)
  if not len(dataset.test.labels):
    own.setdefault('hold_out', opened.split.hold_out)
    own.setdefault('keep_stages', opened.run.keep_stages)
    own.setdefault('stop_early', opened.run.stop_early)
  if is_folder:
    own.setdefault('image_size', dataset.train.shape[0])
  suggested = suggest(method, facts, own.get('network'))
  names = suggested.keys() - own.keys()
  if is_folder:
    own.setdefault('augment', augmentation_for(facts))
  return Chosen(complete(method, own, facts), dataset, frozenset(names))


def suggest(
  method: str, facts: Facts, network: str | None = None
) -> dict[str, Any]:
  """Return settings that suit a training set with all its labels.

  Args:
    method: name of a method in the registry.
    facts: of the training set.
    network: name of the network, if it is given.
  """
  defaults = registry.method(method).defaults
  everything = facts.unlabelled == 0 or defaults.get('unlabelled') == 'all'
  seen = facts.images if everything else facts.unlabelled
  batch = min(50, facts.labelled)
  others = min(max(50, defaults.get('batch_unlabelled', 50)), seen)
  found = {
    'labels': 'all',
    'unlabelled': 'all' if everything else 'rest',
    'network': network_for(method, facts),
    'batch_labelled': batch,
    'batch_unlabelled': others,
    'steps': _steps(25, seen, others, 600, 2500),
    'preprocess': 'none' if facts.is_images else 'standardize',
    'augment': (),
  }
  own = _OWN[method](facts, found) if method in _OWN else dict(defaults)
  found |= own
  if facts.pool:
    others = min(found['batch_unlabelled'], facts.pool)
    found['batch_unlabelled'] = others
  has_rate = 'learning_rate' in {*defaults, *found}
  if (network or found['network']) in WITHOUT_NORM and not has_rate:
    found['learning_rate'] = _RATEWITHOUT_NORM
  return found


def _steps(
  epochs: float, images: int, batch: int, least: int, most: int
) -> int:
  """Return the steps of so many passes over some images, within bounds.

  The lower bound lets a network converge on few images. The upper bound keeps
  a run on 20,000 small images within some minutes on two CPU cores.
  """
  return int(np.clip(round(epochs * images / batch), least, most))


def network_for(method: str, facts: Facts) -> str:
  """Return the name of a network that suits the shape of an image."""
  if not facts.is_images:
    # Association, which trains embeddings alone at first, gains by more layers:
    # 31.4 instead of 33.4 with 250 labels.
    is_wide = (
      is_embedding(facts.is_images, facts.shape) and method != 'association'
    )
    return 'linear_probe' if is_wide else 'mlp'
  # Methods that compare embeddings need some that point in all directions.
  with_heads = 'association', 'llp', 'llp_fixmatch'
  heads = '_heads' if method in with_heads else ''
  side = min(facts.shape[:2])
  if side < _TINY:
    return 'mlp'
  if side <= _SMALL:
    return f'digits{heads}'
  if method == 'deepbass' and side <= _MIDDLE:
    return 'deepbass_mnist'
  return f'mnist{heads}'


def is_embedding(is_images: bool, shape: tuple[int, ...]) -> bool:
  """Return True for features that may be a pretrained network's.

  Args:
    is_images: False for features.
    shape: (1, D, 1) of a vector of D features.
  """
  return not is_images and shape[1] >= _EMBEDDING


def augmentation_for(facts: Facts) -> tuple[str, ...]:
  """Return the names of augmentations that suit a folder of images.

  Colour images of 24 pixels or more are taken for photographs, whose class
  does not change in a mirror or at another place: they are mirrored and shifted
  by up to an eighth of their side, as is usual for CIFAR-10 (4 of 32 pixels).
  Grey images may be digits or letters, and smaller ones lose too much: no
  augmentation.
  """
  side = min(facts.shape[:2])
  is_colour = facts.is_images and facts.shape[-1] == 3
  if not is_colour or side < _PHOTOGRAPH:
    return ()
  return 'flip', f'translate:{side // 8}'


def _madnn(facts: Facts, found) -> dict[str, Any]:
  # On features the memory's own mistakes outweigh the labels at full weight.
  if facts.is_images:
    return {}
  return {'weight': 0.1 if is_embedding(False, facts.shape) else 0.3}


def _association(facts: Facts, found) -> dict[str, Any]:
  each = max(1, min(10, facts.least))
  others = min(max(100, each * facts.classes), facts.images)
  return {
    'batch_labelled': None,
    'batch_per_class': each,
    'batch_unlabelled': others,
    'steps': _steps(40, facts.images, others, 1000, 2000),
  }


def _r2d2(facts: Facts, found) -> dict[str, Any]:
  # Pseudo-labels repeat what the first stage has learned, so that one which is
  # too short makes every reprediction worse.
  batch = min(32, facts.labelled)
  seen = facts.images if found['unlabelled'] == 'all' else facts.unlabelled
  # The last stage draws the sum of both from all images.
  others = max(1, min(96, seen, facts.images - batch))
  batch = max(1, min(batch, facts.images - others))
  part = _steps(1.6, seen, others, 60, 200)
  return {
    'batch_labelled': batch,
    'batch_unlabelled': others,
    'pretrain_batch': batch,
    'pretrain': _steps(10, facts.labelled, batch, 1500, 5000),
    'steps': _steps(8, seen, others, 300, 1000),
    'interval': part,
    'repeat': 4 * part,
    'finetune': _steps(3.2, seen, others, 120, 400),
    'cutout': 0,
  }


def _llp(facts: Facts, found) -> dict[str, Any]:
  # Propagation needs embeddings that tell images apart: the first stage takes
  # most of the time. At a rate of 0.1 instead of the paper's 0.03, labelled
  # images of one class are rarely neighbours after it: on MNIST at 16x16 (7,000
  # training images, 5,000 others to choose with, splits 2 and 3) the errors are
  # 9.4 and 11.0 instead of 6.2 and 6.7.
  batch = min(128, facts.images)
  expected = batch * facts.labelled / facts.images  # labelled ones in a batch
  return {
    'batch_labelled': min(64, facts.labelled),
    'batch_unlabelled': batch,
    'temperature': 0.2,
    'neighbours': min(10, facts.labelled),
    'density_neighbours': min(25, facts.images),
    'warm_loss': 'softmax',
    'warm': _steps(50, facts.images, batch, 1500, 3000),
    'steps': _steps(26, facts.images, batch, 1000, 1500),
    # Among many images a batch of all has hardly any labelled ones.
    'labelled_per_step': min(32, facts.labelled) if expected < 4 else 0,
    'learning_rate': 0.03,
    'decay': 'cosine',
  }


def _deepbass(facts: Facts, found) -> dict[str, Any]:
  batch = min(256, facts.images)
  epoch = facts.images + 20 * facts.labelled  # images of an iteration
  return {
    'acquire': 'none',
    'batch_labelled': 1,
    'batch_unlabelled': batch,
    'steps': _steps(50, 20 * facts.labelled, batch, 300, 600),
    'iterations': int(np.clip(round(160_000 / epoch), 5, 40)),
  }


def _consistency(facts: Facts, found) -> dict[str, Any]:
  seen = facts.images if found['unlabelled'] == 'all' else facts.unlabelled
  others = max(1, min(150, seen))
  return {
    'batch_unlabelled': others,
    'steps': _steps(25, seen, others, 1000, 2500),
  }


def _pseudo_label(facts: Facts, found) -> dict[str, Any]:
  # A linear network that learns all its own predictions ends at few classes:
  # 78.9 % on the embeddings above with 40 labels, 53.7 with these settings.
  chosen = _consistency(facts, found)
  if not is_embedding(facts.is_images, facts.shape):
    return chosen
  return chosen | {'distribution_alignment': True, 'threshold': 0.8}


def _ict(facts: Facts, found) -> dict[str, Any]:
  # The paper's weight of 100, reached after some steps, can make a short run
  # diverge.
  return _consistency(facts, found) | {'weight': 20.0}


def _mixmatch(facts: Facts, found) -> dict[str, Any]:
  # The paper's weight of 75 after 16,384 steps keeps a network that has seen
  # few images at equal probabilities for all classes.
  return _consistency(facts, found) | {'weight': 10.0, 'ramp': 0.3}


def _strong_view(facts: Facts, found) -> dict[str, Any]:
  chosen = _consistency(facts, found)
  if not facts.is_images:
    return chosen  # and the run is refused with its remedies
  small = min(facts.shape[:2]) <= _SMALL
  strong = 'translate:1' if small else 'randaugment:2:10'
  return chosen | {'strong_augment': (strong, 'cutout:0.25')}


def _laplacenet(facts: Facts, found) -> dict[str, Any]:
  # Its pseudo-labels come from a graph, so that features need no strong view.
  views = {} if facts.is_images else {'strong_augment': ()}
  return (
    _strong_view(facts, found)
    | views
    | {
      'samples': 1,
      'pretrain': _steps(
        20, facts.labelled, found['batch_labelled'], 300, 1000
      ),
      'neighbours': max(1, min(20, facts.images - 1)),
    }
  )


def _llp_fixmatch(facts: Facts, found) -> dict[str, Any]:
  return _strong_view(facts, found) | {
    'temperature': 0.2,
    'neighbours': min(10, facts.labelled),
    'density_neighbours': min(25, facts.images),
  }


_OWN: dict[str, Callable] = {
  'madnn': _madnn,
  'association': _association,
  'r2d2': _r2d2,
  'llp': _llp,
  'deepbass': _deepbass,
  **dict.fromkeys(
    ('pi_model', 'temporal_ensembling', 'mean_teacher', 'vat'),
    _consistency,
  ),
  'pseudo_label': _pseudo_label,
  'ict': _ict,
  'mixmatch': _mixmatch,
  **dict.fromkeys(
    ('uda', 'fixmatch', 'flexmatch', 'freematch', 'softmatch'), _strong_view
  ),
  'laplacenet': _laplacenet,
  'llp_fixmatch': _llp_fixmatch,
  'r2d2_fixmatch': _strong_view,
}
