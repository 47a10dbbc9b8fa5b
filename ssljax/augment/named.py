"""Augmentations by name, with parameters: 'flip', 'translate:4'.

A name is followed by the parameters of its factory, separated by colons. A
parameter that is left out takes its default:

  translate:AMOUNT              largest shift in pixels, 2
  crop_or_resize:PAD            pixels of padding, 2
  rotate:ANGLE                  largest angle in radians, 0.2
  turn_scale:DEGREES:SCALE      10 and 0.05
  noise:SIGMA                   0.15
  affine:SCALE:SHIFT            0.15 and 2
  blur:SIZE                     side of the kernel in pixels, odd, 7
  cutout:SIZE                   side of the square: a whole number of pixels,
                                16, or a share below 1 of the image's side, 0.5
  grey:PROBABILITY              0.2
  randaugment:OPS:MAGNITUDE     number of operations, 2, and largest magnitude
                                of 10, 10; magnitudes are drawn, as in FixMatch
  randaugment_fixed:OPS:MAGNITUDE
                                every operation has the magnitude given, as in
                                Cubuk et al.

The others have no parameters. `translate4` is `translate:4`.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import NamedTuple

from ssljax.augment import geometric, imagenet, randaugment, standard
from ssljax.core import Augment
from ssljax.errors import InputError, choose, require


class Factory(NamedTuple):
  """A function that makes an augmentation, and its parameters in order."""

  make: Callable[..., Augment]
  defaults: dict[str, float]


FACTORIES: dict[str, Factory] = {
  'translate': Factory(standard.translate, {'amount': 2}),
  'crop_or_resize': Factory(standard.crop_or_resize, {'pad': 2}),
  'rotate': Factory(geometric.rotate, {'angle': 0.2}),
  'noise': Factory(standard.noise, {'sigma': 0.15}),
  'turn_scale': Factory(
    geometric.turn_and_scale, {'degrees': 10.0, 'scale': 0.05}
  ),
  'affine': Factory(geometric.affine, {'scale': 0.15, 'shift': 2.0}),
  'blur': Factory(standard.blur, {'size': 7}),
  'cutout': Factory(standard.cutout, {'size': 16}),
  'grey': Factory(imagenet.grey, {'probability': 0.2}),
  'randaugment': Factory(
    randaugment.randaugment, {'ops': 2, 'magnitude': 10.0}
  ),
  'randaugment_fixed': Factory(
    functools.partial(randaugment.randaugment, fixed=True),
    {'ops': 2, 'magnitude': 10.0},
  ),
}


def _default(name: str) -> Augment:
  """Return the augmentation of a factory's defaults."""
  make, defaults = FACTORIES[name]
  return make(**defaults)


# Every name without parameters; users' own are added here.
AUGMENTATIONS: dict[str, Augment] = {
  'flip': standard.flip,
  'translate': _default('translate'),
  'translate4': standard.translate(4),
  'crop_or_resize': _default('crop_or_resize'),
  'distort': standard.distort,
  'rotate': _default('rotate'),
  'turn_scale': _default('turn_scale'),
  'noise': _default('noise'),
  'affine': _default('affine'),
  'blur': _default('blur'),
  'stl10': standard.stl10(),
  'cutout': _default('cutout'),
  'crop': imagenet.crop(),
  'grey': _default('grey'),
  'jitter': imagenet.jitter(),
  'randaugment': _default('randaugment'),
  'randaugment_fixed': _default('randaugment_fixed'),
}
# They and the augmentations listed before them precede the preprocessing.
ON_PIXELS = ('crop', 'grey', 'jitter', 'randaugment', 'randaugment_fixed')


def usage(name: str) -> str:
  """Return a name with its parameters in capitals.

  Examples:
    >>> usage('randaugment')
    'randaugment:OPS:MAGNITUDE'
  """
  parameters = FACTORIES[name].defaults if name in FACTORIES else ()
  return ':'.join([name, *map(str.upper, parameters)])


def chosen(name: str) -> Augment:
  """Return the augmentation of a name, which parameters may follow.

  Args:
    name: a key of `AUGMENTATIONS`; parameters follow after colons.

  Raises:
    InputError: there is no such augmentation, or it has no such parameters.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> cut = chosen('cutout:2')
    >>> image = cut(jax.random.key(0), jnp.ones((6, 6, 1)))
    >>> image.shape, bool((image == 0).any())
    ((6, 6, 1), True)
  """
  base, *texts = str(name).split(':')
  choose('augment', base, AUGMENTATIONS)
  if not texts:
    return AUGMENTATIONS[base]
  parameters = FACTORIES[base].defaults if base in FACTORIES else {}
  require(
    len(texts) <= len(parameters),
    f'`augment`={name}: too many parameters: give {usage(base)}',
  )
  values = [_number(name, base, text) for text in texts]
  given = dict(zip(parameters, values, strict=False))
  try:
    return FACTORIES[base].make(**(parameters | given))
  except InputError as error:
    raise InputError(f'`augment`={name}: {error}') from error


def _number(name: str, base: str, text: str) -> int | float:
  """Return the number that a text stands for, an int if it is whole."""
  if text.isdecimal() and len(text) < 10:
    return int(text)
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  require(
    math.isfinite(value) and '_' not in text,
    f'`augment`={name}: {text!r} is not a number: give {usage(base)}',
  )
  return value


def split_chain(
  names: Sequence[str],
) -> tuple[Augment | None, Augment | None]:
  """Return the augmentations before and after the preprocessing.

  The last name of `ON_PIXELS` and all names before it precede the
  preprocessing.

  Args:
    names: in the order of their application.

  Returns:
    Two chains, each of which is None if it would be empty.

  Raises:
    InputError: a name is unknown, or has wrong parameters.

  Examples:
    >>> before, after = split_chain(['grey:0.5', 'translate:4'])
    >>> before is not None, after is not None
    (True, True)
  """
  first = max(
    (i + 1 for i, name in enumerate(names) if _base(name) in ON_PIXELS),
    default=0,
  )
  before, after = (
    standard.chain(*map(chosen, part)) if part else None
    for part in (names[:first], names[first:])
  )
  return before, after


def _base(name: str) -> str:
  """Return a name without its parameters."""
  return name.partition(':')[0]
