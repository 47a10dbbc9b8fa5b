"""Invalid user input: one error class, and the checks that raise it."""

from collections.abc import Collection
import difflib
import math
import re

_MARKED = re.compile(r'`(\w+(?:=\w+)?)`')


class InputError(ValueError):
  """Invalid user input. The message names the parameter and a remedy.

  Attributes:
    marked: the message with names of parameters between backticks, also with
      a value, as in "`overwrite=True`". The command line shows these as flags;
      `str(error)` shows them as Python does.
  """

  def __init__(self, message: str):
    super().__init__(_MARKED.sub(r'\1', message))
    self.marked = message

  def __reduce__(self):
    return type(self), (self.marked,)


def require(condition: object, message: str) -> None:
  """Raise `InputError(message)` unless `condition` is true."""
  if not condition:
    raise InputError(message)


def positive(**parameters: float) -> None:
  """Raise `InputError` for a value that is not finite or not above 0."""
  for name, value in parameters.items():
    good = math.isfinite(value) and value > 0
    require(good, f'`{name}`={value}: give a number above 0')


def non_negative(**parameters: float) -> None:
  """Raise `InputError` for a value that is not finite or below 0."""
  for name, value in parameters.items():
    good = math.isfinite(value) and value >= 0
    require(good, f'`{name}`={value}: give 0 or a number above it')


def fraction(**parameters: float) -> None:
  """Raise `InputError` for a value outside [0, 1)."""
  for name, value in parameters.items():
    require(0 <= value < 1, f'`{name}`={value}: give a number in [0, 1)')


def probability(**parameters: float) -> None:
  """Raise `InputError` for a value outside [0, 1]."""
  for name, value in parameters.items():
    require(0 <= value <= 1, f'`{name}`={value}: give a number from 0 to 1')


def choose(setting: str, name, known: Collection[str]) -> str:
  """Return a name that is known.

  Raises:
    InputError: it is not; the message lists the nearest names.
  """
  if name in known:
    return name
  near = difflib.get_close_matches(str(name), known, 3) or known
  more = ', or register it first' if setting in ('method', 'network') else ''
  raise InputError(
    f'`{setting}`={name}: there is no such {setting}; give '
    f'{" or ".join(near) if len(near) < 4 else ", ".join(near)}{more}'
  )
