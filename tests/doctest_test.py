"""The examples in docstrings give what they say."""

import doctest
import importlib
import pathlib

import pytest

import ssljax

FOLDER = pathlib.Path(ssljax.__file__).parent
WITH_EXAMPLES = [
  '.'.join(('ssljax', *path.relative_to(FOLDER).with_suffix('').parts))
  for path in sorted(FOLDER.rglob('*.py'))
  if '    >>> ' in path.read_text()
]


@pytest.mark.parametrize('name', WITH_EXAMPLES)
def test_the_examples_of_a_module_are_right(name):
  failed, tried = doctest.testmod(importlib.import_module(name))
  assert tried and not failed


def test_the_public_functions_that_need_no_training_have_examples():
  public = {'ssljax.losses', 'ssljax.data.datasets', 'ssljax.data.splits'}
  assert public <= set(WITH_EXAMPLES)
