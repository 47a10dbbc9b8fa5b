"""The tables in the two README.md, made from the results that are kept.

Between `<!-- results: TABLE BUDGET -->` and `<!-- end -->` stand the rows of a
table that there are results of; between `<!-- presets -->` and `<!-- end -->`
every preset, with the paper's numbers and ours.
"""

import re

from ssljax.errors import require
from ssljax.experiments import FOLDER
from ssljax.experiments.papers import runs, tables
from ssljax.runs import run_folder

PAGES = (FOLDER.parent / 'README.md', FOLDER / 'README.md')
MARKS = re.compile(
  r'(?P<begin><!-- (?:results: (?P<table>\S+) (?P<budget>\S+)|presets) -->)\n'
  r'(?:(?!<!-- (?:results|presets)).)*?<!-- end -->',
  re.DOTALL,
)
BUDGETS = ('paper', *tables.BUDGETS)


def write(store: runs.Store) -> None:
  """Makes the tables of both pages anew."""
  for page in PAGES:
    run_folder.write_atomically(page, with_tables(page.read_text(), store))


def with_tables(text: str, store: runs.Store) -> str:
  """A page with its tables made anew.

  Raises:
    InputError: a mark names no table, or no budget.
  """

  def made(match) -> str:
    body = (
      results(match['table'], match['budget'], store)
      if match['table']
      else presets(store)
    )
    return f'{match["begin"]}\n{body}<!-- end -->'

  return MARKS.sub(made, text)


def results(name: str, budget: str, store: runs.Store) -> str:
  """The rows of a table that there are results of."""
  table = tables.find(name, tables.known_tables(), 'table')
  require(budget in BUDGETS, f'{name}: has no budget {budget}')
  found = [runs.ours(store, row, budget) for row in table.rows]
  return tables.markdown(table, found, budget, brief=True)


def presets(store: runs.Store) -> str:
  """Every preset: the paper's numbers, ours, on what and how long."""
  header = 'preset', 'tables', 'paper', 'ours', 'device', 'seconds a split'
  lines, made = [header, ['---'] * len(header)], rows_by_preset()
  for path in sorted((FOLDER / 'presets').glob('*.flags')):
    cells = _cells(made.get(path.stem, {}), store)
    lines.append([f'`{path.stem}`', *cells])
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def rows_by_preset() -> dict[str, dict]:
  """By preset, and by what is run and taken: (table, row, budget) of each row.

  Several rows may be one number: a table's first row may be another's last.
  """
  found = {}
  for table in tables.known_tables().values():
    for row in table.rows:
      for budget in BUDGETS:
        sized = row.at(budget)
        if sized:
          number = runs.run_of(sized), sized.take, sized.look
          rows = found.setdefault(sized.preset, {}).setdefault(number, [])
          rows.append((table, row, budget))
  return found


def _cells(numbers: dict[tuple, list], store: runs.Store) -> list[str]:
  """What tables say of a preset's runs, in their order, no number twice."""
  names = dict.fromkeys(t.name for rows in numbers.values() for t, _, _ in rows)
  rows = [rows[0] for rows in numbers.values()]
  papers = {
    (table.name, row.name): tables.spread(row.paper, row.std)
    for table, row, _ in rows
    if row.paper is not None
  }
  there = [
    (table, row, mine)
    for table, row, budget in rows
    if (mine := runs.ours(store, row, budget)).values
  ]
  ours = [
    f'{row.name}: {tables.spread(*tables.centre(table, mine.values))} '
    f'({len(mine.values)})'
    for table, row, mine in there
  ]
  devices = sorted({mine.device for _, _, mine in there})
  seconds = sorted(round(m.seconds) for _, _, m in there if m.seconds)
  ends = sorted({*seconds[:1], *seconds[-1:]})
  return [
    ', '.join(names) or tables.NONE,
    '; '.join(papers.values()) or tables.NONE,
    '; '.join(ours) or 'not yet run',
    ', '.join(devices) or tables.NONE,
    ' to '.join(f'{end:,}' for end in ends) or tables.NONE,
  ]
