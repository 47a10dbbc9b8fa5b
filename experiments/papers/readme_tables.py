"""Generated tables of the README.md files and docs/results.md.

The text between `<!-- results: TABLE BUDGET -->` and `<!-- end -->` holds the
rows of a table that have stored results. The text between `<!-- presets -->`
and `<!-- end -->` lists every preset with the paper's numbers and ours, that
between `<!-- claims -->` and `<!-- end -->` the claims of the papers, and that
between `<!-- benchmark: NAME -->` and `<!-- end -->` all methods alike.
"""

import re

from ssljax.errors import require
from ssljax.experiments import FOLDER
from ssljax.experiments.papers import benchmark, claims, runs, tables
from ssljax.runs import run_folder

PAGES = (
  FOLDER.parent / 'README.md',
  FOLDER.parent / 'docs' / 'results.md',
  FOLDER / 'README.md',
)
MARKS = re.compile(
  r'(?P<begin><!-- (?:results: (?P<table>\S+) (?P<budget>\S+)'
  r'|benchmark: (?P<benchmark>\S+)|(?P<other>presets|claims)) -->)\n'
  r'(?:(?!<!-- (?:results|benchmark|presets|claims)).)*?<!-- end -->',
  re.DOTALL,
)
BUDGETS = ('paper', *tables.BUDGETS)


def write_pages(store: runs.Store, fewer: bool = False) -> None:
  """Generate the tables of all pages.

  Args:
    store: the store of the results.
    fewer: replace tables also by some that show fewer results.

  Raises:
    InputError: the pages are missing, there are no results, a mark names no
      table or budget, or results would be lost.
  """
  for page in PAGES:
    require(
      page.is_file(),
      f'`pages`: {page} is missing: run it in a clone of the repository',
    )
  # Without results the tables of the pages would be lost.
  require(
    any(store.results.glob('*/seed-*/result.json')),
    f'`results`={store.results}: holds no results: give the folder of the '
    'stored results',
  )
  texts = {page: with_tables(page.read_text(), store) for page in PAGES}
  lost = []
  for page, text in texts.items():
    now = _shown(text)
    before = _shown(page.read_text()).items()
    lost += [f'{page.name} {n}' for n, count in before if now.get(n, 0) < count]
  more = ', ...' if len(lost) > 10 else ''
  require(
    fewer or not lost,
    f'`results`={store.results}: has fewer results than the pages show now '
    f'({", ".join(lost[:10])}{more}): give the folder that holds them, or '
    '`fewer=True` to replace the tables all the same',
  )
  for page, text in texts.items():
    run_folder.write_atomically(page, text)


def with_tables(text: str, store: runs.Store) -> str:
  """Return a page with newly generated tables.

  Args:
    text: the page.
    store: the store of the results.

  Raises:
    InputError: a mark names no table or budget.
  """

  def generate(match) -> str:
    if match['table']:
      body = results_table(match['table'], match['budget'], store)
    elif match['benchmark']:
      body = benchmark_table(match['benchmark'], store)
    elif match['other'] == 'claims':
      body = claims.markdown(store)
    else:
      body = presets_table(store)
    return f'{match["begin"]}\n{body}<!-- end -->'

  return MARKS.sub(generate, text)


def _shown(text: str) -> dict[str, int]:
  """Return the splits of our results in a page, by 'TABLE BUDGET: ROW'."""
  found = {}
  for match in MARKS.finditer(text):
    parts = match['table'], match['budget'], match['benchmark']
    name = ' '.join(filter(None, parts))
    lines = [line for line in match[0].splitlines() if line.startswith('|')]
    header, _, *rows = [x.strip('| ').split(' | ') for x in lines] or [[], []]
    for row in rows:
      cells = dict(zip(header, row, strict=False))
      counts = re.findall(r'\((\d+)\)', cells.get('ours', ''))
      counts = [cells['n']] if 'n' in cells else counts
      numbers = [int(count) for count in counts if count.isdecimal()]
      found[f'{name or "presets"}: {row[0]}'] = sum(numbers)
  return found


def results_table(name: str, budget: str, store: runs.Store) -> str:
  """Return the rows of a table that have results, as Markdown."""
  table = tables.find(name, tables.known_tables(), 'table')
  require(
    budget in BUDGETS,
    f'{name}: there is no budget {budget}: give one of {", ".join(BUDGETS)}',
  )
  found = [runs.ours(store, row, budget) for row in table.rows]
  return tables.markdown(table, found, budget, brief=True)


def benchmark_table(name: str, store: runs.Store) -> str:
  """Return the results of a benchmark of all methods, as Markdown."""
  found = tables.find(name, benchmark.read(), 'benchmark')
  return benchmark.markdown(found, benchmark.read_record(store.results, name))


def presets_table(store: runs.Store) -> str:
  """Return all presets with numbers, device and seconds, as Markdown."""
  header = 'preset', 'tables', 'paper', 'ours', 'device', 'seconds per split'
  lines, by_preset = [header, ['---'] * len(header)], rows_by_preset()
  for path in sorted((FOLDER / 'presets').glob('*.flags')):
    cells = preset_cells(by_preset.get(path.stem, {}), store)
    lines.append([f'`{path.stem}`', *cells])
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def rows_by_preset() -> dict[str, dict]:
  """Return preset -> number -> its rows as (table, row, budget).

  A number is identified by (run, take, measurement). Several rows may share
  one, for example in two tables of a paper.
  """
  found = {}
  for table in tables.known_tables().values():
    for row in table.rows:
      for budget in BUDGETS:
        sized = row.at(budget)
        if sized:
          number = runs.run_of(sized), sized.take, sized.measurement
          rows = found.setdefault(sized.preset, {}).setdefault(number, [])
          rows.append((table, row, budget))
  return found


def preset_cells(numbers: dict[tuple, list], store: runs.Store) -> list[str]:
  """Return the cells of a preset, in the order of its tables.

  Args:
    numbers: rows of the preset by number, as in `rows_by_preset`; a number that
      several rows share is listed once.
    store: the store of the results.
  """
  names = dict.fromkeys(t.name for rows in numbers.values() for t, _, _ in rows)
  rows = [rows[0] for rows in numbers.values()]
  papers = {
    (table.name, row.name): tables.with_std(row.paper, row.std)
    for table, row, _ in rows
    if row.paper is not None
  }
  there = [
    (table, row, mine)
    for table, row, budget in rows
    if (mine := runs.ours(store, row, budget)).values
  ]
  ours = [
    f'{row.name}: {tables.our_number(table, mine)} ({len(mine.values)})'
    f'{mine.on}'
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
