"""Settings that are read from a factory's signature, and their values."""

from typing import Literal

import pytest

from ssljax import signatures
from ssljax.errors import InputError


def factory(
  net,
  *,
  rate: float = 0.1,
  count: int = 3,
  kind: Literal['a', 'b'] = 'a',
  sure: bool = True,
  at: tuple[int, ...] = (),
  most: int | None = None,
  plain=2.5,
):
  """Return nothing.

  Args:
    net: no setting, because it is not given by name alone.
    rate: the rate, described
      on two lines.
    count: a number.
  """


SETTINGS = signatures.settings(factory)


def test_settings_are_the_keywords_with_default_type_and_description():
  names = 'rate', 'count', 'kind', 'sure', 'at', 'most', 'plain'
  assert tuple(SETTINGS) == names
  rate, plain = SETTINGS['rate'], SETTINGS['plain']
  assert rate.default == 0.1 and rate.hint is float
  assert rate.help == 'the rate, described on two lines.'
  assert plain.hint is float and plain.help == ''


@pytest.mark.parametrize(
  ('name', 'text', 'value'),
  [
    ('rate', '1e-3', 1e-3),
    ('count', '7', 7),
    ('kind', 'b', 'b'),
    ('sure', 'true', True),
    ('sure', 'False', False),
    ('sure', '1', True),
    ('sure', '0', False),
    ('at', '5,10', (5, 10)),
    ('at', '', ()),
    ('most', '4', 4),
  ],
)
def test_a_text_is_read_by_the_type_of_its_setting(name, text, value):
  found = signatures.parse(SETTINGS[name], text)
  assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
  ('name', 'text'),
  [
    ('rate', 'x'),
    ('count', '1.5'),
    ('kind', 'c'),
    ('sure', 'yes'),
    ('at', 'a'),
  ],
)
def test_a_text_that_is_no_value_is_refused_by_name(name, text):
  with pytest.raises(InputError, match=f'{name}='):
    signatures.parse(SETTINGS[name], text)


@pytest.mark.parametrize(
  ('name', 'given', 'value'),
  [
    ('rate', 1, 1.0),
    ('count', 4.0, 4),
    ('at', [5, 10], (5, 10)),
    ('most', None, None),
    ('sure', False, False),
  ],
)
def test_a_value_is_converted_where_nothing_is_lost(name, given, value):
  found = signatures.check(SETTINGS[name], given)
  assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
  ('name', 'given'),
  [
    ('count', 1.5),
    ('count', True),
    ('rate', '1'),
    ('rate', None),
    ('kind', 'c'),
    ('sure', 2),
    ('at', '5,10'),
  ],
)
def test_a_value_of_another_type_is_refused_by_name(name, given):
  with pytest.raises(InputError, match=f'{name}='):
    signatures.check(SETTINGS[name], given)
