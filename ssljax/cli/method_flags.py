"""Flags from a factory's signature: a default lives in one place."""

from collections.abc import Callable, Mapping, Sequence
import inspect
import re
import types
import typing

from absl import flags

from ssljax.errors import require


def keywords(factory: Callable) -> dict[str, inspect.Parameter]:
  """The keyword-only parameters of a factory: its hyper-parameters."""
  parameters = inspect.signature(factory).parameters
  return {
    name: parameter
    for name, parameter in parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
  }


def argument_help(factory: Callable) -> dict[str, str]:
  """What the docstring's `Args:` says of each parameter."""
  text = inspect.getdoc(factory) or ''
  section = re.search(r'\nArgs:\n(.*?)(\n\S|\Z)', text, re.DOTALL)
  entries = re.split(r'\n  (?=\w+: )', '\n' + section.group(1))[1:]
  pairs = (entry.split(': ', 1) for entry in entries)
  return {name: ' '.join(words.split()) for name, words in pairs}


def define(*factories: Callable) -> None:
  """Defines a flag for every hyper-parameter of the factories, once each."""
  flags.disclaim_key_flags()  # They are the calling program's.
  for factory in factories:
    texts = argument_help(factory)
    hints = typing.get_type_hints(factory)
    for name, parameter in keywords(factory).items():
      if name not in flags.FLAGS:
        _define(name, hints[name], parameter.default, texts[name])


def define_unset(functions: Mapping[str, Callable]) -> None:
  """Defines a flag for every keyword of some functions, unset by default.

  One that several have is defined once; its help says whose default is what.

  Args:
    functions: by the name that the help calls each.
  """
  flags.disclaim_key_flags()
  hints, texts = {}, {}
  for owner, function in functions.items():
    says = argument_help(function)
    for name, parameter in keywords(function).items():
      hints[name] = typing.get_type_hints(function)[name]
      text = f'{owner}: {says[name]} Unset: {parameter.default!r}.'
      texts.setdefault(name, []).append(text)
  for name, hint in hints.items():
    _define(name, hint, None, ' '.join(texts[name]))


def _define(name: str, hint, default, text: str) -> None:
  if isinstance(hint, types.UnionType):  # `float | None`
    hint = typing.get_args(hint)[0]
  if hint == Sequence[int]:
    serializer = flags.CsvListSerializer(',')
    flags.DEFINE(_Integers(), name, default, text, serializer=serializer)
    return
  if typing.get_origin(hint) is typing.Literal:
    flags.DEFINE_enum(name, default, typing.get_args(hint), text)
    return
  makers = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
  }
  makers[hint](name, default, text)


class _Integers(flags.ArgumentParser):
  """'1,2' as (1, 2)."""

  def parse(self, argument) -> tuple[int, ...]:
    """Reads what the command line or a signature gives."""
    if isinstance(argument, str):
      argument = [part for part in argument.split(',') if part]
    return tuple(int(part) for part in argument)


def given(factory: Callable) -> dict:
  """The values the flags give to a factory's hyper-parameters."""
  return {name: flags.FLAGS[name].value for name in keywords(factory)}


def number(name: str, *words: str):
  """The value of a flag that is one of `words` or a whole number."""
  value = flags.FLAGS[name].value
  if value in words:
    return value
  require(
    value.isdecimal(),
    f'--{name}={value}: give {" or ".join(words)} or a number',
  )
  return int(value)


def pool(name: str) -> tuple[str, int | None]:
  """'rest', 'all', 'N' or 'all:N' as ('rest' or 'all', N or None)."""
  value = flags.FLAGS[name].value
  if value in ('rest', 'all'):
    return value, None
  kind = 'all' if value.startswith('all:') else 'rest'
  count = value.removeprefix('all:')
  require(
    count.isdecimal(),
    f'--{name}={value}: give rest, all, a number, or all:NUMBER',
  )
  return kind, int(count)
