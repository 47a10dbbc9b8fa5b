"""The papers' tables: what is printed there, and ours beside it.

`tables/METHOD.toml` holds a paper's tables and figures as data: of every number
what the paper has, the preset and flags of the run that is to reproduce it, and
where in the run's result ours is.

A row of ours is compared with the paper's by what the paper printed:

  means      ours − paper's and its 95 % interval: Welch's, of two samples with
             their standard deviations and sizes; where the paper does not give
             both, that of our mean alone (Student's)
  medians    how many of our splits are below the paper's, and the probability
             of a split as uneven if its median were ours (a sign test)
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

from ssljax import experiments
from ssljax.errors import InputError

FOLDER = experiments.FOLDER / 'tables'
PAPERS = ('madnn', 'association', 'r2d2', 'llp', 'deepbass')
BUDGETS = ('cpu', 'gpu')  # that may make a row smaller; 'paper' does not


class Row(NamedTuple):
  """A number that stands in a table."""

  name: str
  paper: float | None = None  # in % of error
  std: float | None = None
  n: int | None = None  # splits behind it
  preset: str | None = None  # None: the paper quotes it, or no program has it
  flags: tuple[str, ...] = ()  # after the preset
  take: str = 'last'  # where our number is, see `taken`
  probe: tuple[str, ...] = ()  # flags of probe.py, where that measures it
  propagate: tuple[str, ...] = ()  # and of propagate.py
  data: tuple[str, ...] = ()  # data sets on disk, beside those of the run
  missing: str = ''  # why no program has it
  seeds: int | None = None  # splits of ours, if not the preset's
  smaller: str = ''  # than the paper's: what is
  sizes: dict[str, dict] = {}  # noqa: RUF012  fields that a budget changes

  @property
  def look(self) -> str:
    """What looks at a finished run for it, with its flags; '' if nothing."""
    kind = self.take.split(':')[0]
    own = {'probe': self.probe, 'propagate': self.propagate}.get(kind)
    if own is None:
      return ''
    return ','.join([kind, *(flag.lstrip('-') for flag in own)])

  @property
  def arm(self) -> str | None:
    """The arm of a run that it is of, if not the run's own method."""
    kind, _, rest = self.take.partition(':')
    return rest.split(':')[0] if kind == 'arm' else None

  def at(self, budget: str) -> 'Row | None':
    """The row as a budget runs it, if it does."""
    if self.preset is None or (budget == 'cpu' and 'cpu' not in self.sizes):
      return None
    changed = dict(self.sizes.get(budget, {}))
    # With another preset they are its own, else they come after the row's.
    own = () if 'preset' in changed and 'flags' in changed else self.flags
    flags = own + changed.pop('flags', ())
    return self._replace(flags=flags, **changed)


class Table(NamedTuple):
  """A table of a paper."""

  name: str  # METHOD/NUMBER
  source: str  # the paper
  title: str
  statistic: str  # what the paper's numbers are
  measure: str  # what ours are
  centre: str  # 'mean' or 'median'
  rows: tuple[Row, ...]  # that the paper ran itself
  quoted: tuple[Row, ...]  # of other papers


class Part(NamedTuple):
  """A picture of a figure."""

  drawn: str  # among `figures.FIGURES`
  runs: tuple[tuple[str, ...], ...]  # that it shows: presets, and flags after
  arguments: tuple[str, ...] = ()  # of figures.py


class Figure(NamedTuple):
  """A figure of a paper that is of data, not a scheme."""

  name: str  # METHOD/NUMBER
  title: str
  parts: tuple[Part, ...]
  first: int = 0  # of the splits that are shown
  seeds: int = 1  # how many of them
  smaller: str = ''  # than the paper's: what is
  sizes: dict[str, dict] = {}  # noqa: RUF012  fields that a budget changes

  @property
  def note(self) -> str:
    """' (what is smaller than the paper's)', if anything is."""
    return f' ({self.smaller})' if self.smaller else ''

  def at(self, budget: str) -> 'Figure | None':
    """The figure as a budget has it, if it does."""
    if budget == 'cpu' and 'cpu' not in self.sizes:
      return None
    return self._replace(**self.sizes.get(budget, {}))


class Ours(NamedTuple):
  """What we have of a row."""

  values: tuple[float, ...] = ()  # of every split, or of its subsamples
  seeds: tuple[int, ...] = ()  # the splits
  steps: int | None = None  # of one, at most
  seconds: float | None = None  # in compiled steps of one, on average
  device: str = ''
  commit: str = ''
  smaller: str = ''  # than the paper's
  state: str = ''  # why there is none, or what is missing


def read(paper: str) -> tuple[list[Table], list[Figure]]:
  """The tables and figures of a paper, in its order."""
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


def _fixed(entry: Any) -> Any:
  """Lists as tuples, through and through."""
  if isinstance(entry, dict):
    return {key: _fixed(value) for key, value in entry.items()}
  return tuple(map(_fixed, entry)) if isinstance(entry, list) else entry


def _row(entry: dict[str, Any]) -> Row:
  entry = _fixed(entry)
  sizes = {b: entry.pop(b) for b in BUDGETS if b in entry}
  return Row(**entry, sizes=sizes)


def _figure(paper: str, entry: dict[str, Any]) -> Figure:
  parts = lambda fields: {
    'parts' if k == 'part' else k: _parts(v) if k == 'part' else v
    for k, v in fields.items()
  }
  entry = _fixed(entry)
  sizes = {b: parts(entry.pop(b)) for b in BUDGETS if b in entry}
  name = f'{paper}/{entry.pop("number")}'
  return Figure(name, **parts(entry), sizes=sizes)


def _parts(entries) -> tuple[Part, ...]:
  return tuple(Part(**entry) for entry in entries)


def all_tables() -> dict[str, Table]:
  """Every table by its name."""
  return {table.name: table for paper in PAPERS for table in read(paper)[0]}


def own_tables() -> dict[str, Table]:
  """The tables that no paper has, by their names."""
  return {table.name: table for table in read('own')[0]}


def known_tables() -> dict[str, Table]:
  """The papers' and those that no paper has."""
  return all_tables() | own_tables()


def all_figures() -> dict[str, Figure]:
  """Every figure by its name."""
  return {figure.name: figure for paper in PAPERS for figure in read(paper)[1]}


def taken(result: dict, look: dict | None, take: str) -> list[float]:
  """Our numbers of one split: one, or one of every subsample.

  Args:
    result: its run's `result.json`.
    look: what the program wrote that looked at the run, if one did.
    take: 'last', 'averaged', 'median_last' or 'minimum' of the run's errors;
      'after:STAGE', the error at a stage's end; 'arm:NAME:last' of another arm;
      'probe:KEY', with dots for keys within keys; 'propagate:NAME', the errors
      of every subsample.
  """
  kind, _, rest = take.partition(':')
  if kind == 'propagate':
    return [100 - accuracy for accuracy in look['accuracy'][rest]]
  if kind == 'probe':
    return [functools.reduce(operator.getitem, rest.split('.'), look)]
  if kind == 'after':
    return result['test_error_after'][rest]
  if kind == 'arm':
    arm, _, measure = rest.partition(':')
    return result['arms'][arm]['test_error'][measure]
  return result['test_error'][take]


class Difference(NamedTuple):
  """Ours less the paper's."""

  value: float
  low: float | None = None  # of its 95 % interval
  high: float | None = None
  alone: bool = False  # whether the interval is that of our mean alone
  below: int | None = None  # of our splits, for a sign test
  apart: int | None = None  # splits that are not equal to the paper's
  probability: float | None = None


def interval(values, paper: float, std: float | None, n: int | None):
  """Mean of `values` − `paper`, and its 95 % interval where there is one."""
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


def signs(values, paper: float) -> Difference:
  """Median of `values` − `paper`, and a two-sided sign test."""
  apart = [value for value in values if value != paper]
  below = sum(value < paper for value in apart)
  test = stats.binomtest(below, len(apart)).pvalue if apart else 1.0
  value = statistics.median(values) - paper
  return Difference(
    value, below=below, apart=len(apart), probability=float(test)
  )


def difference(table: Table, row: Row, values) -> Difference | None:
  """Ours − the paper's, as the paper's statistic asks for."""
  if row.paper is None or not values:
    return None
  if table.centre == 'median':
    return signs(values, row.paper)
  return interval(values, row.paper, row.std, row.n)


def spread(centre: float | None, std: float | None) -> str:
  """'4.12 ± 0.30', or as much of it as there is."""
  if centre is None:
    return '–'
  return f'{centre:.2f}' + (f' ± {std:.2f}' if std is not None else '')


def centre(table: Table, values) -> tuple[float, float | None]:
  """Mean or median, as the paper's, and the standard deviation."""
  middle = statistics.median if table.centre == 'median' else statistics.fmean
  return middle(values), statistics.stdev(values) if len(values) > 1 else None


def in_words(found: Difference | None) -> str:
  """'+1.20 [+0.30, +2.10]', or '+1.20, 3 of 10 below (p 0.34)'."""
  if found is None:
    return '–'
  if found.below is not None:
    return (
      f'{found.value:+.2f}, {found.below} of {found.apart} below '
      f'(p {found.probability:.2g})'
    )
  if found.low is None:
    return f'{found.value:+.2f}'
  star = '*' if found.alone else ''
  return f'{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]{star}'


HEADER = (
  'row',
  'paper',
  'ours',
  'n',
  'ours − paper',
  'steps',
  'seconds a split',
  'device',
  'smaller than the paper',
)
NONE = '–'


def lines(table: Table, ours: list[Ours]) -> list[list[str]]:
  """The cells of a table, rows of the paper first, what it quotes last."""
  cells = []
  for row, mine in zip(table.rows, ours, strict=True):
    paper = spread(row.paper, row.std)
    if not mine.values:
      cells.append([row.name, paper, mine.state, *[NONE] * 6])
      continue
    state = f' ({mine.state})' if mine.state else ''
    cells.append(
      [
        row.name,
        paper,
        spread(*centre(table, mine.values)) + state,
        str(len(mine.values)),
        in_words(difference(table, row, mine.values)),
        NONE if mine.steps is None else f'{mine.steps:,}',
        NONE if mine.seconds is None else f'{mine.seconds:,.0f}',
        mine.device,
        mine.smaller or NONE,
      ]
    )
  return cells + [
    [row.name, spread(row.paper, row.std), 'quoted there', *[NONE] * 6]
    for row in table.quoted
  ]


def markdown(
  table: Table, ours: list[Ours], budget: str, brief: bool = False
) -> str:
  """A table as Markdown: what it is, its rows, and how they were made.

  Args:
    table: the table.
    ours: of its rows.
    budget: under which they are.
    brief: leaves out rows that there is nothing of ours of, and says how many.
  """
  cells = lines(table, ours)
  if brief:
    cells = [
      line for line, mine in zip(cells, ours, strict=False) if mine.values
    ]
  told = lambda i: any(line[i] != NONE for line in cells)
  used = [i for i in range(len(HEADER)) if i == 0 or told(i)]
  rows = [HEADER, ['---'] * len(HEADER), *cells]
  body = ''.join(f'| {" | ".join(row[i] for i in used)} |\n' for row in rows)
  body = body if cells else 'not yet run\n'
  paper, number = table.name.split('/')
  command = f'python experiments/reproduce.py --table={table.name}'
  command += f' --budget={budget}' if budget != 'paper' else ''
  notes = [f'`{command}`']
  left = len(table.rows) + len(table.quoted) - len(cells)
  notes += [f'{left} other rows are not run or not ours'] if left else []
  commits = sorted({c for mine in ours for c in mine.commit.split(', ') if c})
  notes += [f'commits {", ".join(commits)}'] if commits else []
  if '*' in body:
    notes.append('* the interval of our mean alone')
  heading = f'{table.title}; {table.measure}'
  if paper != 'own':
    heading = f'{table.source}, Table {number}: {heading}'
  heading += f'; paper: {table.statistic}' if table.statistic else ''
  return f'{heading}\n\n{body}\n{"; ".join(notes)}\n'


# Of the CSV; the numbers of every split last.
COLUMNS = (
  *('table', 'row', 'paper', 'paper_std', 'paper_n', 'ours', 'ours_std', 'n'),
  *('difference', 'low', 'high', 'alone', 'below', 'apart', 'probability'),
  *('steps', 'seconds', 'device', 'commit', 'smaller', 'state', 'seeds'),
  'values',
)


def as_csv(table: Table, ours: list[Ours]) -> str:
  """A table as CSV: numbers on their own, and every split's."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(COLUMNS)
  for row, mine in zip(table.rows, ours, strict=True):
    middle = centre(table, mine.values) if mine.values else (None, None)
    found = difference(table, row, mine.values)
    writer.writerow(
      [
        *(table.name, row.name, row.paper, row.std, row.n, *middle),
        *(len(mine.values), *(found or [None] * len(Difference._fields))),
        *(mine.steps, mine.seconds, mine.device, mine.commit, mine.smaller),
        *(mine.state, ' '.join(map(str, mine.seeds))),
        ' '.join(map(str, mine.values)),
      ]
    )
  for row in table.quoted:
    cells = [table.name, row.name, row.paper, row.std, row.n]
    empty = [''] * (len(COLUMNS) - len(cells) - 3)
    writer.writerow([*cells, *empty, 'quoted there', '', ''])
  return text.getvalue()


def find(name: str, known: dict[str, Any], flag: str):
  """The table or figure of a name; one line if there is none."""
  if name in known:
    return known[name]
  raise InputError(f'--{flag}={name}: give one of {", ".join(known)}')
