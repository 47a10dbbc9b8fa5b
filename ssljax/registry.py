"""Names of methods, networks, augmentations and preprocessings.

A name in a flag, in `config.json` or in `result.json` resolves here and nowhere
else. `config.register_method` and the functions below add a user's own.
"""

from collections.abc import Callable, Mapping
import functools
import inspect
import re
from typing import Any, Literal, NamedTuple

from ssljax.active import acquisition
from ssljax.augment import named, preprocess
from ssljax.errors import InputError, choose
from ssljax.methods import (
  association,
  deepbass,
  fixmatch,
  flexmatch,
  freematch,
  ict,
  laplacenet,
  llp,
  llp_fixmatch,
  madnn,
  mean_teacher,
  mixmatch,
  pi_model,
  pseudo_label,
  r2d2,
  r2d2_fixmatch,
  softmatch,
  supervised,
  temporal_ensembling,
  uda,
  vat,
)
from ssljax.networks import (
  convlarge,
  elu,
  heads,
  layers,
  lenet,
  resnet,
  resnet9,
  shakeshake,
  small,
  wide_resnet,
)
from ssljax.networks import deepbass as deepbass_networks


class MethodEntry(NamedTuple):
  """A method as a run trains it."""

  factory: Callable  # (net, tx, batch_spec, steps, *, ...) -> Method
  baselines: tuple[str, ...] = ()  # names of methods trained beside it
  defaults: Mapping[str, Any] = {}  # of settings, where its paper's differ


METHODS: dict[str, MethodEntry] = {
  'supervised': MethodEntry(supervised.supervised),
  'madnn': MethodEntry(madnn.madnn, ('supervised',)),
  'association': MethodEntry(
    association.association, ('supervised',), association.DEFAULTS
  ),
  'r2d2': MethodEntry(r2d2.r2d2, (), r2d2.DEFAULTS),
  'llp': MethodEntry(llp.llp, ('supervised',), llp.DEFAULTS),
  'deepbass': MethodEntry(deepbass.deepbass, (), deepbass.DEFAULTS),
  'pseudo_label': MethodEntry(
    pseudo_label.pseudo_label, ('supervised',), pseudo_label.DEFAULTS
  ),
  'pi_model': MethodEntry(
    pi_model.pi_model, ('supervised',), pi_model.DEFAULTS
  ),
  'temporal_ensembling': MethodEntry(
    temporal_ensembling.temporal_ensembling,
    ('supervised',),
    temporal_ensembling.DEFAULTS,
  ),
  'mean_teacher': MethodEntry(
    mean_teacher.mean_teacher, ('supervised',), mean_teacher.DEFAULTS
  ),
  'vat': MethodEntry(vat.vat, ('supervised',), vat.DEFAULTS),
  'ict': MethodEntry(ict.ict, ('supervised',), ict.DEFAULTS),
  'mixmatch': MethodEntry(
    mixmatch.mixmatch, ('supervised',), mixmatch.DEFAULTS
  ),
  'uda': MethodEntry(uda.uda, ('supervised',), uda.DEFAULTS),
  'fixmatch': MethodEntry(
    fixmatch.fixmatch, ('supervised',), fixmatch.DEFAULTS
  ),
  'flexmatch': MethodEntry(
    flexmatch.flexmatch, ('supervised',), flexmatch.DEFAULTS
  ),
  'freematch': MethodEntry(
    freematch.freematch, ('supervised',), freematch.DEFAULTS
  ),
  'softmatch': MethodEntry(
    softmatch.softmatch, ('supervised',), softmatch.DEFAULTS
  ),
  'laplacenet': MethodEntry(
    laplacenet.laplacenet, ('supervised',), laplacenet.DEFAULTS
  ),
  'llp_fixmatch': MethodEntry(
    llp_fixmatch.llp_fixmatch, ('supervised',), llp_fixmatch.DEFAULTS
  ),
  'r2d2_fixmatch': MethodEntry(
    r2d2_fixmatch.r2d2_fixmatch, ('supervised',), r2d2_fixmatch.DEFAULTS
  ),
}
_OWN_METHODS = frozenset(METHODS)
AUGMENTATIONS = named.AUGMENTATIONS
augmentation = named.chosen  # with parameters: 'translate:4'
PREPROCESS = {
  'none': preprocess.identity,
  'standardize': preprocess.standardize,
  'image_standardize': preprocess.image_standardize,
  'gcn': preprocess.gcn,
  'zca': preprocess.zca,
  'gcn_zca': preprocess.gcn_zca,
  'imagenet': preprocess.imagenet,
}
FITTED = ('standardize', 'zca', 'gcn_zca')  # fitted to training images
NETWORKS: dict[str, Callable] = {
  'digits': functools.partial(small.small, widths=(32,), embedding=64),
  'digits_heads': functools.partial(
    small.small, widths=(32,), embedding=64, head=64
  ),
  'mnist': small.small,
  'mnist_heads': functools.partial(small.small, head=128),
  'deepbass_mnist': deepbass_networks.deepbass,
  'deepbass_toy': deepbass_networks.mlp,
  'elu_digits': functools.partial(elu.elu, widths=(32, 64)),
  'elu_mnist': elu.elu,
  'elu_svhn': functools.partial(elu.elu, depth=3, normalize='variance'),
  'elu_stl10': elu.elu_stl10,
  'lenet': lenet.lenet,
  'shakeshake': shakeshake.shakeshake,
  'resnet18': resnet.resnet18,
  'resnet18_small': functools.partial(resnet.resnet18, stem='small'),
  'resnet18v2': functools.partial(resnet.resnet_v2, embedding=128),
  'resnet18v2_small': functools.partial(
    resnet.resnet_v2, stem='small', embedding=128
  ),
  'resnet50v2': functools.partial(resnet.resnet_v2, depth=50, embedding=128),
  'linear': heads.linear,
  'linear_probe': heads.linear_probe,
  'mlp': heads.mlp,
  'wrn28_2': wide_resnet.wide_resnet,
  'wrn28_8': functools.partial(wide_resnet.wide_resnet, widen=8),
  'wrn37_2': functools.partial(wide_resnet.wide_resnet, stages=4),
  'resnet9': resnet9.resnet9,
  'resnet9_wide': functools.partial(resnet9.resnet9, width=64),
}
_norm: Literal['batch', 'weight', 'weight_batch']
for _name, _norm in (
  ('convlarge', 'batch'),
  ('convlarge_weightnorm', 'weight'),
  ('convlarge_pytorch', 'weight_batch'),
):
  NETWORKS[_name] = functools.partial(
    convlarge.convlarge, norm=_norm, momentum=convlarge.MOMENTUM[_norm]
  )
_OWN_NETWORKS = frozenset(NETWORKS)
ACQUISITIONS = acquisition.ACQUISITIONS


def method(name: str) -> MethodEntry:
  """Return the entry of a method.

  Raises:
    InputError: there is none of this name.
  """
  return METHODS[choose('method', name, METHODS)]


def is_own_network(name: str) -> bool:
  """True for the networks of ssljax, False for registered ones."""
  return name in _OWN_NETWORKS


def own_momentum(network: str) -> float | None:
  """Return a network's own momentum of batch norm, None if it has none.

  Args:
    network: name of the network.
  """
  keywords = inspect.signature(NETWORKS[network]).parameters
  own = keywords['momentum'].default if 'momentum' in keywords else None
  return own if isinstance(own, int | float) else None


def bn_momentum(network: str, steps: int) -> float | None:
  """Return the default momentum of batch norm in a run of so many steps.

  It is the network's own, or a smaller one for a short run, see
  `layers.momentum_for`; None if the network has none.

  Args:
    network: name of the network.
    steps: steps of the run.
  """
  own = own_momentum(network)
  return None if own is None else layers.momentum_for(steps, own)


def arms(name: str, baselines: bool) -> dict[str, Callable]:
  """Return the factories of a run by name: baselines first, the method last."""
  entry = method(name)
  others = entry.baselines if baselines else ()
  found = {other: method(other).factory for other in others}
  return found | {name: entry.factory}


def check_free(name: str, factory: Callable, replace: bool) -> None:
  """Raise `InputError` if another factory is registered under a name.

  Args:
    name: of a method.
    factory: of the method.
    replace: allow to replace a method, except those of ssljax.
  """
  if not (isinstance(name, str) and re.fullmatch(r'[A-Za-z]\w{0,79}', name)):
    raise InputError(
      f'`method`={name!r:.100}: give a name of letters, digits and _ that '
      'begins with a letter'
    )
  known = METHODS.get(name)
  fixed = known is not None and not replace and known.factory is not factory
  if name in _OWN_METHODS or fixed:
    raise InputError(
      f'`method`={name}: another method has this name: give another name'
    )


def _check_callable(setting: str, name, function) -> None:
  """Raise `InputError` for a name or a function that cannot be used."""
  if not (isinstance(name, str) and re.fullmatch(r'[A-Za-z][\w-]*', name)):
    raise InputError(
      f'`{setting}`={name!r:.100}: give a name of letters, digits, - and _'
    )
  if not callable(function):
    raise InputError(f'`{setting}`={name}: {function!r:.100} is no function')


def register_network(name: str, factory: Callable) -> None:
  """Make a network known by name.

  Args:
    name: of the network.
    factory: `(classes, *, ...) -> Network`.

  Raises:
    InputError: another network has this name.
  """
  _check_callable('network', name, factory)
  known = NETWORKS.get(name)
  if known is not None and known is not factory:
    raise InputError(
      f'`network`={name}: another network has this name: give another name'
    )
  NETWORKS[name] = factory


def register_augmentation(name: str, augmentation: Callable) -> None:
  """Make an augmentation known by name.

  Args:
    name: of the augmentation.
    augmentation: `(key, image [H, W, c] in [0, 1]) -> image`.

  Raises:
    InputError: another augmentation has this name.
  """
  _check_callable('augment', name, augmentation)
  known = AUGMENTATIONS.get(name)
  if known is not None and known is not augmentation:
    raise InputError(
      f'`augment`={name}: another augmentation has this name: give another name'
    )
  AUGMENTATIONS[name] = augmentation


def preprocess_of(name: str, is_images: bool) -> preprocess.Preprocess:
  """Return a preprocessing by name, of images or of feature vectors."""
  if name == 'standardize' and not is_images:
    return preprocess.standardize_features()
  return PREPROCESS[name]()
