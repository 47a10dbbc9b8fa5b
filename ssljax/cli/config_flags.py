"""Flags from settings, and settings from flags.

A command has flags of its own in a `FlagValues`, not in the global one: every
setting of `config.schema`, or of a function's signature. Beside them stand
absl's logging flags.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import typing
from typing import Any

from absl import flags

from ssljax.signatures import (
  Setting,
  item_type,
  plain_type,
  settings,
)

_ABSL_MODULES = ('absl.app', 'absl.logging')


def new_values() -> flags.FlagValues:
  """Return the flags of a command: absl's logging flags, for a start."""
  values = flags.FlagValues()
  by_module = flags.FLAGS.flags_by_module_dict()
  for module in _ABSL_MODULES:
    for flag in by_module.get(module, []):
      values[flag.name] = flag  # Shared: parsing sets absl's own.
  return values


def define(values: flags.FlagValues, found: Iterable[Setting]) -> None:
  """Define a flag for every setting.

  Raises:
    flags.DuplicateFlagError: two settings have one name.
  """
  for setting in found:
    _define(values, setting)


def define_of(values: flags.FlagValues, function: Callable) -> None:
  """Define a flag for every keyword-only parameter of a function."""
  define(values, settings(function).values())


def define_unset(
  values: flags.FlagValues, functions: Mapping[str, Callable]
) -> None:
  """Define a flag for every keyword of some functions, unset by default.

  A keyword that several functions have is defined once; its help lists the
  default of each.

  Args:
    values: get the flags.
    functions: by the name that the help gives to each.
  """
  merged: dict[str, Setting] = {}
  for owner, function in functions.items():
    for name, setting in settings(function).items():
      text = f'{owner}: {setting.help} Unset: {setting.default!r}.'
      before = merged[name].help + ' ' if name in merged else ''
      merged[name] = setting._replace(default=None, help=before + text)
  define(values, merged.values())


def _define(values: flags.FlagValues, setting: Setting) -> None:
  name, default, text = setting.name, setting.default, setting.help
  hint = plain_type(setting.hint)
  item = item_type(hint)
  if item is str:
    value = None if default is None else list(default)
    flags.DEFINE_list(name, value, text, flag_values=values)
  elif item:
    parser, serializer = _Items(item), flags.CsvListSerializer(',')
    flags.DEFINE(parser, name, default, text, values, serializer)
  elif typing.get_origin(hint) is typing.Literal:
    choices = list(typing.get_args(hint))
    flags.DEFINE_enum(name, default, choices, text, flag_values=values)
  else:
    makers: dict[Any, Callable] = {
      bool: flags.DEFINE_bool,
      int: flags.DEFINE_integer,
      float: flags.DEFINE_float,
      str: flags.DEFINE_string,
    }
    makers[hint](name, default, text, flag_values=values)


class _Items(flags.ArgumentParser):
  """'1,2' as (1, 2)."""

  def __init__(self, item: type):
    self._item = item

  def parse(self, argument) -> tuple:
    """Return the items of a text or of a default."""
    if isinstance(argument, str):
      argument = argument.split(',') if argument else []
    return tuple(self._item(part) for part in argument)


def present(
  values: flags.FlagValues, names: Iterable[str]
) -> dict[str, typing.Any]:
  """Return the values of those flags that a command line or preset gives."""
  return {name: values[name].value for name in names if values[name].present}


def is_given(name: str, arguments: Sequence[str]) -> bool:
  """True if arguments give a flag."""
  return any(arg.lstrip('-').split('=')[0] == name for arg in arguments)
