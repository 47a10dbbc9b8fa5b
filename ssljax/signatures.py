"""Settings read from a function's signature and docstring.

A hyper-parameter's default, type and description live in one place: the
keyword-only parameters of the factory that takes it, and its `Args:` section.
"""

from collections.abc import Callable, Mapping, Sequence
import inspect
import re
import types
import typing
from typing import Any, NamedTuple

from ssljax.errors import InputError


class Setting(NamedTuple):
  """A named value that a run may set."""

  name: str
  hint: Any  # a type: bool, int, float, str, Literal, tuple or `T | None`
  default: Any
  help: str


def keywords(function: Callable) -> dict[str, inspect.Parameter]:
  """Return the keyword-only parameters of a function, by name."""
  parameters = inspect.signature(function).parameters
  return {
    name: parameter
    for name, parameter in parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
  }


def argument_help(function: Callable) -> dict[str, str]:
  """Return the description of each parameter in the docstring's `Args:`."""
  text = inspect.getdoc(function) or ''
  section = re.search(r'\nArgs:\n(.*?)(\n\S|\Z)', text, re.DOTALL)
  if not section:
    return {}
  entries = re.split(r'\n  (?=\w+: )', '\n' + section.group(1))[1:]
  pairs = (entry.split(': ', 1) for entry in entries)
  return {name: ' '.join(words.split()) for name, words in pairs}


def settings(function: Callable) -> dict[str, Setting]:
  """Return the keyword-only parameters of a function as settings, by name.

  A parameter without an annotation takes the type of its default.
  """
  texts, hints = argument_help(function), typing.get_type_hints(function)
  found = {}
  for name, parameter in keywords(function).items():
    default = parameter.default
    if default is parameter.empty:
      raise TypeError(
        f'{function.__name__}: its keyword {name!r} needs a default'
      )
    hint = hints.get(name, str if default is None else type(default))
    found[name] = Setting(name, hint, default, texts.get(name, ''))
  return found


def given(function: Callable, values: Mapping[str, Any]) -> dict[str, Any]:
  """Return those of `values` that are keywords of a function."""
  return {name: values[name] for name in keywords(function) if name in values}


def is_optional(hint) -> bool:
  """True for `T | None`."""
  return types.NoneType in typing.get_args(hint)


def plain_type(hint):
  """Return T of `T | None`, else the type itself."""
  if typing.get_origin(hint) not in (types.UnionType, typing.Union):
    return hint
  return next(x for x in typing.get_args(hint) if x is not types.NoneType)


def item_type(hint):
  """Return T of `Sequence[T]` and `tuple[T, ...]`, or None of other types."""
  if typing.get_origin(hint) in (tuple, Sequence):
    return typing.get_args(hint)[0]
  return None


def parse(setting: Setting, text: str):
  """Return the value that a text, as on a command line, stands for.

  Raises:
    InputError: the text stands for no value of the setting.
  """
  hint = plain_type(setting.hint)
  item = item_type(hint)
  try:
    if item:
      return tuple(item(part) for part in text.split(',')) if text else ()
    if hint is bool:
      return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
    if typing.get_origin(hint) is typing.Literal:
      return check(setting, text)
    return hint(text)
  except (KeyError, ValueError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(
      f'`{setting.name}`={text}: give {described(setting.hint)}'
    ) from error


def check(setting: Setting, value):
  """Return a Python value as the setting holds it; sequences as tuples.

  Raises:
    InputError: the value is of another type, or none of the choices.
  """
  hint = plain_type(setting.hint)
  if value is None and (is_optional(setting.hint) or setting.default is None):
    return None
  item = item_type(hint)
  if item:
    try:
      if not isinstance(value, str | bytes):
        return tuple(item(part) for part in value)
    except (TypeError, ValueError):
      pass
  elif typing.get_origin(hint) is typing.Literal:
    if value in typing.get_args(hint):
      return value
  elif hint is bool or isinstance(value, bool):
    if hint is bool and value in (True, False):
      return bool(value)
  elif hint in (int, float, str):
    converted = _as_number(hint, value)
    if converted is not None:
      return converted
  else:
    return value
  raise InputError(
    f'`{setting.name}`={value!r}: give {described(setting.hint)}'
  )


def _as_number(hint, value):
  """Return the value as an int, a float or a text; None if it is neither."""
  if hint is str:
    return value if isinstance(value, str) else None
  try:
    converted = hint(value) if not isinstance(value, str) else None
  except (TypeError, ValueError, OverflowError):
    return None
  return converted if converted == value or value != value else None


def described(hint) -> str:
  """Return the values of a type in words."""
  plain = plain_type(hint)
  item = item_type(plain)
  if item:
    return f'a sequence of {described(item).removeprefix("a ")}s'
  if typing.get_origin(plain) is typing.Literal:
    return ' or '.join(map(str, typing.get_args(plain)))
  words = {
    bool: 'True or False',
    int: 'a whole number',
    float: 'a number',
    str: 'a text',
  }
  return words.get(plain, str(plain))
