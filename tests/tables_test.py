"""The papers' tables as data, and what ours are compared with."""

import math

import binary
import pytest
import tables

from ssljax.core import InputError

# The papers' own headings: tables, and figures that are of data.
HEADINGS = {
  'madnn': ((1, 2), (3, 4, 5, 6)),
  'association': ((1, 2, 3, 4, 5), (2, 3, 4)),
  'r2d2': ((1, 2, 3, 4, 5, 6, 7, 8), (2,)),
  'llp': ((1, 2, 3, 4, 5, 6), (2,)),
  'deepbass': ((1, 2, 3), (1, 2, 3)),
}
TABLE = tables.Table(
  'madnn/1', '', '', 'mean (std) of 4 splits', 'test error in %', (), ()
)
MEDIANS = TABLE._replace(statistic='median (std) of 10 splits')


def test_all_tables_and_figures_of_the_papers_are_there_and_no_others():
  headings = lambda which: [
    f'{paper}/{number}'
    for paper, of_paper in HEADINGS.items()
    for number in of_paper[which]
  ]
  assert list(tables.all_tables()) == headings(0)
  assert list(tables.all_figures()) == headings(1)
  assert len(headings(0)) == 24
  assert len(headings(1)) == 12


@pytest.mark.parametrize('name', tables.all_tables())
def test_a_table_is_of_presets_and_has_the_papers_numbers(name):
  table = tables.all_tables()[name]
  assert table.rows
  names = [row.name for row in (*table.rows, *table.quoted)]
  assert len(set(names)) == len(names)
  for row in table.rows:
    assert bool(row.preset) != bool(row.missing), row
    assert 0 < row.paper < 100, row
    for budget in ('paper', *tables.BUDGETS):
      sized = row.at(budget)
      if sized:
        path = binary.EXPERIMENTS / f'presets/{sized.preset}.flags'
        assert path.exists(), row
        assert all(flag.startswith('--') for flag in sized.flags), row
        assert budget != 'cpu' or sized.smaller or sized == row, row
  assert all(0 < row.paper < 100 and not row.preset for row in table.quoted)


def test_the_interval_of_a_mean_is_students_where_the_paper_has_no_deviation():
  # Mean 2, variance 2, so a standard error of 1; t of 1 degree, 97.5 %: tan(π
  # 0.475).
  found = tables.interval([1, 3], 1, None, 10)
  t = math.tan(math.pi * 0.475)
  assert found[:3] == pytest.approx((1, 1 - t, 1 + t))


def test_the_interval_of_two_means_is_welchs():
  # Squared standard errors 1 and 4/4: together √2, with 4 / (1 + 1/3) = 3
  # degrees; t of 3 degrees, 97.5 %: 3.182446 (any table).
  found = tables.interval([4, 6], 2, 2, 4)
  half = 3.182446 * math.sqrt(2)
  assert found[:3] == pytest.approx((3, 3 - half, 3 + half), rel=1e-6)


def test_one_split_has_no_interval_and_equal_ones_a_point():
  assert tables.interval([4], 1, 0.5, 10) == tables.Difference(3)
  assert tables.interval([4, 4], 1, None, None)[:3] == (3, 3, 3)


def test_medians_are_compared_by_signs():
  # Three of four below: (C(4,0) + C(4,1)) / 2⁴ on either side.
  found = tables.signs([1, 2, 3, 9], 5)
  assert found == tables.Difference(-2.5, below=3, probability=2 * 5 / 16)
  # What is equal counts for neither.
  assert tables.signs([5, 4], 5)[3:] == (1, 1.0)
  row = tables.Row('', 5.0, 1.0, 10, 'madnn.digits')
  assert tables.difference(MEDIANS, row, [1, 2, 3, 9]) == found
  assert tables.difference(TABLE, row, [1, 2, 3, 9]).below is None


def test_a_worse_row_is_shown_as_worse():
  row = tables.Row('hard', 2.0, 0.5, 4, 'madnn.digits')
  mine = tables.Ours((4.0, 6.0), 120, 34.5, '1 x cpu', 'abc', 'fewer images')
  cells = tables.lines(TABLE._replace(rows=(row,)), [mine])[0]
  low, high = tables.interval([4, 6], 2, 0.5, 4)[1:3]
  assert cells == [
    'hard',
    '2.00 ± 0.50',
    '5.00 ± 1.41',
    '2',
    f'+3.00 [{low:+.2f}, {high:+.2f}]',
    '120',
    '34',
    '1 x cpu',
    'fewer images',
  ]


def test_what_is_taken_is_where_the_row_says():
  result = {
    'test_error': {'last': [4, 5], 'averaged': [3, 2]},
    'test_error_after': {'labelled': [9, 8]},
    'arms': {'supervised': {'test_error': {'last': [7, 6]}}},
  }
  looks = [
    {
      'probe': {'test_error': {'nearest': 1.5}},
      'propagate': {'accuracy': {'LS': [90, 80]}},
    }
  ]
  taken = lambda take: tables.taken(result, looks, take)
  assert taken('last') == [[4], [5]]
  assert taken('averaged') == [[3], [2]]
  assert taken('after:labelled') == [[9], [8]]
  assert taken('arm:supervised:last') == [[7], [6]]
  assert taken('probe:test_error.nearest') == [[1.5]]
  assert taken('propagate:LS') == [[10, 20]]


def test_an_unknown_table_is_refused_by_name():
  with pytest.raises(InputError, match=r'--table=madnn/9: .*madnn/2'):
    tables.find('madnn/9', tables.all_tables(), 'table')
