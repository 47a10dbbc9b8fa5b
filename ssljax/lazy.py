"""Modules that are imported when they are first used."""

import importlib
import types


class _Lazy(types.ModuleType):
  """Stands for a module; the first attribute that is read imports it."""

  def __getattr__(self, name: str):
    return getattr(importlib.import_module(self.__name__), name)


def module(name: str) -> types.ModuleType:
  """Return a stand-in for a module that is slow to import.

  Args:
    name: of the module, with its packages.
  """
  return _Lazy(name)
