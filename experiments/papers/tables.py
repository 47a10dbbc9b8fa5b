"""Tables of the papers: their numbers beside ours, with a comparison.

`tables/METHOD.toml` holds a paper's tables and figures as data. Every row has
the paper's number, the preset and flags of the run that reproduces it, and the
place of our number in the result of that run.

The comparison depends on the paper's statistic:

  means      our mean minus the paper's, with a 95 % confidence interval:
             Welch's interval for two samples if the paper gives a standard
             deviation and a number of splits, else Student's interval of our
             mean alone
  medians    our median minus the paper's, the number of our splits below the
             paper's median, and the p-value of a two-sided sign test

A run with reduced settings is not compared: its difference to the paper's
number would be that of the settings.
"""

import csv
import functools
import io
import math
import operator
import statistics
import tomllib
from typing import Any, NamedTuple

from scipy import stats

from ssljax import experiments, registry

FOLDER = experiments.FOLDER / 'tables'
PAPERS = ('madnn', 'association', 'r2d2', 'llp', 'deepbass')
NONE = '–'  # an empty cell
BUDGETS = ('cpu', 'gpu')  # may reduce the settings of a row; 'paper' does not


class Row(NamedTuple):
  """A number in a table."""

  name: str
  paper: float | None = None  # the paper's error in percent
  std: float | None = None  # standard deviation of the paper's number
  n: int | None = None  # number of splits of the paper's number
  preset: str | None = None  # None: quoted by the paper, or not reproducible
  flags: tuple[str, ...] = ()  # flags after the preset
  take: str = 'last'  # place of our number, see `our_values`
  probe: tuple[str, ...] = ()  # flags of probe.py, if it measures the number
  propagate: tuple[str, ...] = ()  # flags of propagate.py, likewise
  data: tuple[str, ...] = ()  # data sets needed beside those of the run
  missing: str = ''  # reason why the row is not reproducible
  seeds: int | None = None  # number of our splits, if not the preset's
  smaller: str = ''  # settings that are reduced compared with the paper's
  sizes: dict[str, dict] = {}  # noqa: RUF012  fields that a budget changes

  @property
  def measurement(self) -> str:
    """Name of the measurement of the finished run, '' if there is none.

    It is the program with its flags, as 'probe,step=4'.
    """
    kind = self.take.split(':')[0]
    own = {'probe': self.probe, 'propagate': self.propagate}.get(kind)
    if own is None:
      return ''
    return ','.join([kind, *(flag.lstrip('-') for flag in own)])

  @property
  def arm(self) -> str | None:
    """Name of the trained method, None for the run's own method."""
    kind, _, rest = self.take.partition(':')
    return rest.split(':')[0] if kind == 'arm' else None

  def at(self, budget: str) -> 'Row | None':
    """Return the row with the settings of a budget; None if it has none."""
    if self.preset is None or (budget == 'cpu' and 'cpu' not in self.sizes):
      return None
    changed = dict(self.sizes.get(budget, {}))
    # Flags of another preset replace the row's, else they follow them.
    own = () if 'preset' in changed and 'flags' in changed else self.flags
    flags = own + changed.pop('flags', ())
    return self._replace(flags=flags, **changed)


class Table(NamedTuple):
  """A table of a paper."""

  name: str  # METHOD/NUMBER
  source: str  # title and authors of the paper
  title: str
  statistic: str  # meaning of the paper's numbers
  measure: str  # meaning of our numbers
  centre: str  # 'mean' or 'median'
  rows: tuple[Row, ...]  # results of the paper itself
  quoted: tuple[Row, ...]  # results that the paper quotes from others


class Panel(NamedTuple):
  """A picture of a figure."""

  drawn: str  # key of `catalogue.FIGURES`
  runs: tuple[tuple[str, ...], ...]  # preset and flags of each run shown
  arguments: tuple[str, ...] = ()  # flags of figures.py


class Figure(NamedTuple):
  """A figure of a paper that shows data."""

  name: str  # METHOD/NUMBER
  title: str
  parts: tuple[Panel, ...]
  first: int = 0  # seed of the first split shown
  seeds: int = 1  # number of splits shown
  smaller: str = ''  # settings that are reduced compared with the paper's
  sizes: dict[str, dict] = {}  # noqa: RUF012  fields that a budget changes

  @property
  def note(self) -> str:
    """The reduced settings in parentheses, '' if there are none."""
    return f' ({self.smaller})' if self.smaller else ''

  def at(self, budget: str) -> 'Figure | None':
    """Return the figure with the settings of a budget; None if it has none."""
    if budget == 'cpu' and 'cpu' not in self.sizes:
      return None
    return self._replace(**self.sizes.get(budget, {}))


class Ours(NamedTuple):
  """Our results of a row."""

  values: tuple[float, ...] = ()  # one per split, or one per subsample
  seeds: tuple[int, ...] = ()  # numbers of the splits
  steps: int | None = None  # largest number of steps of a split
  seconds: float | None = None  # in compiled steps, median over the splits
  device: str = ''
  commit: str = ''
  smaller: str = ''  # settings that are reduced compared with the paper's
  state: str = ''  # reason why results are missing or incomplete
  data: str = ''  # 'CIFAR-10 (JPEG)' for a copy that differs from the original

  @property
  def on(self) -> str:
    """' on CIFAR-10 (JPEG)', or '' for the data set that the preset names."""
    return f' on {self.data}' if self.data else ''


def read_paper(paper: str) -> tuple[list[Table], list[Figure]]:
  """Return the tables and figures of a paper, in its order."""
  content = tomllib.loads((FOLDER / f'{paper}.toml').read_text())
  tables = [
    Table(
      f'{paper}/{table["number"]}',
      content['paper'],
      table['title'],
      table.get('statistic', ''),
      table.get('measure', 'test error in %'),
      table.get('centre', 'mean'),
      tuple(map(_row, table.get('row', []))),
      tuple(map(_row, table.get('quoted', []))),
    )
    for table in content['table']
  ]
  figures = [_figure(paper, entry) for entry in content.get('figure', [])]
  return tables, figures


def _as_tuples(entry: Any) -> Any:
  """Return nested data with tuples instead of lists."""
  if isinstance(entry, dict):
    return {key: _as_tuples(value) for key, value in entry.items()}
  return tuple(map(_as_tuples, entry)) if isinstance(entry, list) else entry


def _row(entry: dict[str, Any]) -> Row:
  entry = _as_tuples(entry)
  sizes = {b: entry.pop(b) for b in BUDGETS if b in entry}
  return Row(**entry, sizes=sizes)


def _figure(paper: str, entry: dict[str, Any]) -> Figure:
  parts = lambda fields: {
    'parts' if k == 'part' else k: _parts(v) if k == 'part' else v
    for k, v in fields.items()
  }
  entry = _as_tuples(entry)
  sizes = {b: parts(entry.pop(b)) for b in BUDGETS if b in entry}
  name = f'{paper}/{entry.pop("number")}'
  return Figure(name, **parts(entry), sizes=sizes)


def _parts(entries) -> tuple[Panel, ...]:
  return tuple(Panel(**entry) for entry in entries)


def all_tables() -> dict[str, Table]:
  """Return the papers' tables by name."""
  tables = [table for paper in PAPERS for table in read_paper(paper)[0]]
  return {table.name: table for table in tables}


def own_tables() -> dict[str, Table]:
  """Return our own tables, which no paper has, by name."""
  return {table.name: table for table in read_paper('own')[0]}


def known_tables() -> dict[str, Table]:
  """Return the papers' and our own tables by name."""
  return all_tables() | own_tables()


def all_figures() -> dict[str, Figure]:
  """Return the papers' figures by name."""
  figures = [figure for paper in PAPERS for figure in read_paper(paper)[1]]
  return {figure.name: figure for figure in figures}


def our_values(
  result: dict, measurement: dict | None, take: str
) -> list[float]:
  """Return our numbers of one split: one, or one per subsample.

  Args:
    result: `result.json` of the run.
    measurement: content of `probe.json` or `propagate.json`, if needed.
    take: 'last', 'averaged', 'median_last' or 'minimum', an error of the run's
      method; 'after:STAGE', the error at the end of a stage; 'arm:NAME:last',
      an error of another trained method; 'probe:KEY', with dots between nested
      keys; 'propagate:NAME', the errors of all subsamples.
  """
  kind, _, rest = take.partition(':')
  if kind == 'propagate':
    return [100 - accuracy for accuracy in measurement['accuracy'][rest]]
  if kind == 'probe':
    return [functools.reduce(operator.getitem, rest.split('.'), measurement)]
  if kind == 'after':
    return result['test_error_after'][rest]
  if kind == 'arm':
    arm, _, measure = rest.partition(':')
    return result['arms'][arm]['test_error'][measure]
  return result['test_error'][take]


class Difference(NamedTuple):
  """Our number minus the paper's."""

  value: float
  low: float | None = None  # bounds of the 95 % confidence interval
  high: float | None = None
  alone: bool = False  # the interval is that of our mean alone
  below: int | None = None  # sign test: our splits below the paper's number
  apart: int | None = None  # our splits that differ from the paper's number
  probability: float | None = None  # p-value


def compare_means(
  values, paper: float, std: float | None, n: int | None
) -> Difference:
  """Return our mean minus the paper's, with a 95 % confidence interval.

  A single split or equal splits have no interval.

  Args:
    values: errors of our splits.
    paper: the paper's mean.
    std: the paper's standard deviation, if known.
    n: the paper's number of splits, if known.
  """
  value = statistics.fmean(values) - paper
  if len(values) < 2 or len(set(values)) < 2:
    return Difference(value)
  ours = statistics.variance(values) / len(values)
  alone = std is None or not n or n < 2
  theirs = 0.0 if alone else std**2 / n
  # Welch and Satterthwaite's degrees of freedom.
  weight = ours**2 / (len(values) - 1)
  weight += 0.0 if alone else theirs**2 / (n - 1)
  freedom = (ours + theirs) ** 2 / weight
  half = stats.t.ppf(0.975, freedom) * math.sqrt(ours + theirs)
  return Difference(value, value - half, value + half, alone)


def compare_medians(values, paper: float) -> Difference:
  """Return our median minus the paper's, with a two-sided sign test.

  Args:
    values: errors of our splits.
    paper: the paper's median.
  """
  apart = [value for value in values if value != paper]
  below = sum(value < paper for value in apart)
  test = stats.binomtest(below, len(apart)).pvalue if apart else 1.0
  value = statistics.median(values) - paper
  return Difference(
    value, below=below, apart=len(apart), probability=float(test)
  )


def compare(table: Table, row: Row, mine: Ours) -> Difference | None:
  """Compare our splits with the paper's number by the paper's statistic.

  Returns:
    None without a number of either side, and for reduced settings.
  """
  if row.paper is None or not mine.values or mine.smaller:
    return None
  if table.centre == 'median':
    return compare_medians(mine.values, row.paper)
  return compare_means(mine.values, row.paper, row.std, row.n)


def with_std(centre: float | None, std: float | None) -> str:
  """Return '4.12 ± 0.30', '4.12' without `std`, or '–' without `centre`."""
  if centre is None:
    return NONE
  return f'{centre:.2f}' + (f' ± {std:.2f}' if std is not None else '')


def centre_and_std(table: Table, values) -> tuple[float, float | None]:
  """Return the mean or median, as in the paper, and the standard deviation."""
  middle = statistics.median if table.centre == 'median' else statistics.fmean
  return middle(values), statistics.stdev(values) if len(values) > 1 else None


def our_number(table: Table, mine: Ours) -> str:
  """Return our mean or median with the standard deviation, as '4.12 ± 0.30'."""
  return with_std(*centre_and_std(table, mine.values))


def as_text(found: Difference | None) -> str:
  """Return '+1.20 [+0.30, +2.10]', or '+1.20, 3 of 10 below (p 0.34)'."""
  if found is None:
    return NONE
  if found.below is not None:
    return (
      f'{found.value:+.2f}, {found.below} of {found.apart} below '
      f'(p {found.probability:.2g})'
    )
  if found.low is None:
    return f'{found.value:+.2f}'
  star = '*' if found.alone else ''
  return f'{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]{star}'


QUOTED = 'quoted by the paper'
HEADER = (
  'row',
  'paper',
  'ours',
  'n',
  'ours − paper',
  'steps',
  'seconds per split',
  'device',
  'reduced settings',
)


def cells_of(table: Table, ours: list[Ours]) -> list[list[str]]:
  """Return the cells of a table: the paper's own rows, then quoted rows."""
  cells = []
  for row, mine in zip(table.rows, ours, strict=True):
    paper = with_std(row.paper, row.std)
    if not mine.values:
      cells.append([row.name, paper, mine.state, *[NONE] * 6])
      continue
    state = f' ({mine.state})' if mine.state else ''
    cells.append(
      [
        row.name,
        paper,
        our_number(table, mine) + mine.on + state,
        str(len(mine.values)),
        as_text(compare(table, row, mine)),
        NONE if mine.steps is None else f'{mine.steps:,}',
        NONE if mine.seconds is None else f'{mine.seconds:,.0f}',
        mine.device,
        mine.smaller or NONE,
      ]
    )
  return cells + [
    [row.name, with_std(row.paper, row.std), QUOTED, *[NONE] * 6]
    for row in table.quoted
  ]


def markdown(
  table: Table, ours: list[Ours], budget: str, brief: bool = False
) -> str:
  """Return a table as Markdown: a heading, the rows, and the command.

  Args:
    table: the table.
    ours: our results of its rows.
    budget: budget of these results.
    brief: leave out rows without our results, and state their number.
  """
  cells = cells_of(table, ours)
  if brief:
    cells = [
      line for line, mine in zip(cells, ours, strict=False) if mine.values
    ]
  filled = lambda i: any(line[i] != NONE for line in cells)
  used = [i for i in range(len(HEADER)) if i == 0 or filled(i)]
  rows = [HEADER, ['---'] * len(HEADER), *cells]
  body = ''.join(f'| {" | ".join(row[i] for i in used)} |\n' for row in rows)
  body = body if cells else 'not yet run\n'
  paper, number = table.name.split('/')
  command = f'python experiments/reproduce.py --table={table.name}'
  command += f' --budget={budget}' if budget != 'paper' else ''
  notes = [f'`{command}`']
  left = len(table.rows) + len(table.quoted) - len(cells)
  notes += [f'{left} rows without our results are left out'] if left else []
  commits = sorted({c for mine in ours for c in mine.commit.split(', ') if c})
  notes += [f'commits {", ".join(commits)}'] if commits else []
  notes += _explanations(table, cells)
  heading = f'{table.title}; {table.measure}'
  if paper != 'own':
    heading = f'{table.source}, Table {number}: {heading}'
  heading += f'; paper: {table.statistic}' if table.statistic else ''
  return f'{heading}\n\n{body}\n{"; ".join(notes)}\n'


# The spread that an interval is computed from.
SPREAD = 'labelled images, initial weights and order of the images'


def _explanations(table: Table, cells: list[list[str]]) -> list[str]:
  """Return notes on the numbers of a table: what each of them contains."""
  column = lambda name: [line[HEADER.index(name)] for line in cells]
  differences, notes = column('ours − paper'), []
  if any('±' in cell for cell in column('ours')):
    notes.append(f'ours: {table.centre} ± standard deviation over n splits')
  if any(cell.endswith(']') for cell in differences):
    notes.append(
      f'[ ]: 95 % interval of the difference of two means (Welch), from the '
      f"spread over our splits ({SPREAD}) and over the paper's"
    )
  if any(cell.endswith(']*') for cell in differences):
    notes.append(
      f'[ ]*: 95 % interval (Student) from the spread over our splits alone '
      f"({SPREAD}); the paper's number is taken as exact"
    )
  if any('(p ' in cell for cell in differences):
    notes.append(
      "p: two-sided sign test of our splits against the paper's median"
    )
  if any(cell != NONE for cell in column('seconds per split')):
    notes.append('seconds: median over the splits')
  if any(cell != NONE for cell in column('reduced settings')):
    notes.append(
      "rows of reduced settings are not compared with the paper's number"
    )
  return notes


# Columns of the CSV file; `values` are the numbers of all splits.
COLUMNS = (
  *('table', 'row', 'paper', 'paper_std', 'paper_n', 'ours', 'ours_std', 'n'),
  *('difference', 'low', 'high', 'alone', 'below', 'apart', 'probability'),
  *('steps', 'seconds', 'device', 'commit', 'smaller', 'data', 'state'),
  *('seeds', 'values'),
)


def as_csv(table: Table, ours: list[Ours]) -> str:
  """Return a table as CSV, with a column for each number."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(COLUMNS)
  for row, mine in zip(table.rows, ours, strict=True):
    centre = (None, None)
    if mine.values:
      centre = centre_and_std(table, mine.values)
    found = compare(table, row, mine)
    writer.writerow(
      [
        *(table.name, row.name, row.paper, row.std, row.n, *centre),
        *(len(mine.values), *(found or [None] * len(Difference._fields))),
        *(mine.steps, mine.seconds, mine.device, mine.commit, mine.smaller),
        *(mine.data, mine.state, ' '.join(map(str, mine.seeds))),
        ' '.join(map(str, mine.values)),
      ]
    )
  for row in table.quoted:
    cells = [table.name, row.name, row.paper, row.std, row.n]
    empty = [''] * (len(COLUMNS) - len(cells) - 3)
    writer.writerow([*cells, *empty, QUOTED, '', ''])
  return text.getvalue()


def find(name: str, known: dict[str, Any], setting: str):
  """Return the table or figure of a name.

  Raises:
    InputError: there is none; the message names the setting.
  """
  return known[registry.choose(setting, name, known)]
