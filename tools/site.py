"""Build the documentation site: docs/ with the parts that the repository has.

    python tools/site.py           write the pages, and build the site
    python tools/site.py --pages   write the pages alone, to build/docs

A page of docs/ may have these lines of its own, which are replaced:

  <!-- include: FILE -->         a Markdown file without its title
  <!-- include: FILE#anchor -->  the section under that heading
  <!-- include: FILE@name -->    from <!-- name --> to <!-- end -->
  <!-- method: NAME -->          a method: algorithm, departures, flags, results
  <!-- presets: NAME -->         "# ours" of every preset METHOD.NAME.flags
  <!-- methods -->               the pages of all methods
  <!-- flags -->                 the flags that every method has
  <!-- networks -->              networks, augmentations and preprocessings
  <!-- programs -->              the docstrings of the programs
  <!-- doc: FILE.py -->          the docstring of a Python file

Notebooks, docs/notebooks/*.py, become pages too: scripts with cells, in the
percent format of Jupytext.

So a fact has one place: the file that it is included from. Links of an included
text, and links of docs/ to files outside of docs/, are translated, and drawings
become a part of the page, where they take its colours.

The pages are plain Markdown for any generator that reads mkdocs.yml: Zensical,
or Material for MkDocs (`mkdocs build --strict`).
"""

import argparse
import ast
from collections.abc import Iterator
import functools
import html
import pathlib
import posixpath
import re
import shutil
import subprocess
import sys
import typing

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES_FOLDER = ROOT / 'build' / 'docs'
# Files outside docs/ that pages link to: the page that has their text.
PAGES = {
  'README.md': 'index.md',
  'CONTRIBUTING.md': 'extend.md',
  'CHANGELOG.md': 'changelog.md',
  'experiments/README.md': 'presets.md',
}
GENERATED = {
  'changelog.md': '# Changelog\n\n<!-- include: CHANGELOG.md -->\n',
  'presets.md': '# Presets and programs of the papers\n\n'
  '<!-- include: experiments/README.md -->\n',
}
# Files that are copied to the site as they stand.
COPIED = (
  'experiments/results/figures/*.png',
  'experiments/tables/*.toml',
  'LICENSE',
  'CITATION.cff',
)
MARKER = re.compile(r'^<!-- ([a-z]+)(?:: (\S+))? -->$', re.MULTILINE)
FENCE = re.compile(r'^(```.*?^```)', re.MULTILINE | re.DOTALL)
DRAWING = re.compile(r'!\[([^\]]*)\]\((?:\.\./)*drawings/(\w+)\.svg\)')
LINK = re.compile(r'(\]\()((?![a-z]+:|#|/)[^)\s]+)(\))')


def write_pages(folder: pathlib.Path) -> None:
  """Write all pages and files of the site to a folder."""
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(ROOT / 'docs', folder)
  for path in copied():
    target = folder / 'repository' / path
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / path, target)
  for here, text in sources():
    (folder / here).write_text(page(text, here))


def sources() -> Iterator[tuple[str, str]]:
  """Yield the path and the text of every page."""
  for path in sorted((ROOT / 'docs').rglob('*.md')):
    yield path.relative_to(ROOT / 'docs').as_posix(), path.read_text()
  for path in sorted((ROOT / 'docs' / 'notebooks').glob('*.py')):
    yield f'notebooks/{path.stem}.md', notebook(path.read_text(), path.name)
  yield from GENERATED.items()


def notebook(text: str, name: str) -> str:
  """Return the cells of a notebook as Markdown, with a link to its file."""
  _, *cells = re.split(r'^# %%(.*)\n', text, flags=re.MULTILINE)
  parts = []
  for kind, cell in zip(cells[::2], cells[1::2], strict=True):
    code = f'```python\n{cell.strip()}\n```'
    prose = re.sub(r'^# ?', '', cell.strip(), flags=re.MULTILINE)
    parts.append(prose if 'markdown' in kind else code)
  title, _, rest = parts[0].partition('\n')
  link = (
    f'[{name}]({name}) is this page as a notebook: open it in Jupyter with '
    '`pip install jupytext`, or run it with Python.'
  )
  return '\n\n'.join([title, link, rest.strip(), *parts[1:]]) + '\n'


def page(text: str, here: str) -> str:
  """Return the text of a page with its markers, links and drawings replaced."""

  def replace(part):
    part = translated(DRAWING.sub(inlined, part), f'docs/{here}', here)
    return MARKER.sub(lambda found: expanded(found, here), part)

  return outside_fences(text, replace)


def inlined(found: re.Match) -> str:
  """Return a drawing as a part of the page."""
  alt, name = found.groups()
  svg = (ROOT / 'docs' / 'drawings' / f'{name}.svg').read_text().strip()
  label = html.escape(alt, quote=True)
  width = int(re.search(r'viewBox="0 0 (\d+)', svg)[1])
  sizes = f'style="min-width:{0.7 * width:.0f}px;max-width:{width}px"'
  svg = svg.replace('<svg ', f'<svg {sizes} ', 1)
  return f'<div class="drawing" role="img" aria-label="{label}">{svg}</div>'


# Markers.


def expanded(found: re.Match, here: str) -> str:
  """Return the text that a marker stands for."""
  kind, value = found.groups()
  makers = {
    'include': lambda: included(value, here),
    'method': lambda: method(value, here),
    'presets': lambda: presets(value, here),
    'doc': lambda: as_markdown(docstring(ROOT / value)),
  }
  plain = {
    'methods': lambda: methods(here),
    'flags': run_flags,
    'networks': named_parts,
    'programs': programs,
  }
  make = (makers if value else plain).get(kind)
  return make() if make else found[0]  # else it is a comment


def copied() -> Iterator[str]:
  """Yield the paths of the copied files."""
  for pattern in COPIED:
    for path in sorted(ROOT.glob(pattern)):
      yield path.relative_to(ROOT).as_posix()


def outside_fences(text: str, change) -> str:
  """Apply a function to the parts of a Markdown text that are no code."""
  parts = FENCE.split(text)
  return ''.join(
    part if n % 2 else change(part) for n, part in enumerate(parts)
  )


def translated(text: str, source: str, here: str) -> str:
  """Translate relative links.

  Args:
    text: Markdown.
    source: path of its file in the repository.
    here: the page of docs/ that shows it.
  """

  def translate(found):
    path, hash_, anchor = found[2].partition('#')
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if target in PAGES:
      target = PAGES[target]
      anchor = '' if target == 'index.md' else anchor
    elif target.startswith('docs/'):
      target = target.removeprefix('docs/')
    else:
      target = f'repository/{target}'
    link = posixpath.relpath(target, posixpath.dirname(here) or '.')
    return f'{found[1]}{link}{hash_ if anchor else ""}{anchor}{found[3]}'

  return LINK.sub(translate, text)


def included(value: str, here: str) -> str:
  """Return a part of a Markdown file."""
  path, kind, name = re.fullmatch(r'([^#@]+)(?:([#@])(.+))?', value).groups()
  text = (ROOT / path).read_text()
  if kind == '#':
    text = section(text, name)
  elif kind == '@':
    name = name.replace('=', ': ').replace('+', ' ')
    text = text.split(f'<!-- {name} -->\n', 1)[1].split('<!-- end -->', 1)[0]
  else:
    text = text.split('\n', 1)[1]
  return outside_fences(text.strip(), lambda part: translated(part, path, here))


def headings(text: str) -> Iterator[tuple[int, str, int]]:
  """Yield the level, the anchor and the line number of every heading."""
  in_code = False
  for number, line in enumerate(text.splitlines()):
    in_code ^= line.startswith('```')
    found = re.match(r'(#+) (.+)', line)
    if found and not in_code:
      yield len(found[1]), anchor_of(found[2]), number


def anchor_of(title: str) -> str:
  """Return the anchor of a heading, as Python-Markdown and GitHub make it."""
  plain = re.sub(r'[^\w\s-]', '', title).strip().lower()
  return re.sub(r'[-\s]+', '-', plain)


def section(text: str, anchor: str) -> str:
  """Return the text under a heading, down to the next one of its level."""
  found = list(headings(text))
  here = next(n for n, (_, name, _) in enumerate(found) if name == anchor)
  level, _, first = found[here]
  later = (line for depth, _, line in found[here + 1 :] if depth <= level)
  return '\n'.join(text.splitlines()[first + 1 : next(later, None)])


# Methods.


def method(name: str, here: str) -> str:
  """Return the reference of a method: docstring, flags and results."""
  from ssljax import registry, signatures

  entry = registry.METHODS[name]
  path = ROOT / 'ssljax' / 'methods' / f'{name}.py'
  parts = [
    as_markdown(docstring(path)),
    f'### Flags of {name} {{ #{name}-flags }}\n',
    settings_table(signatures.settings(entry.factory).values()),
  ]
  if entry.defaults:
    listed = ', '.join(
      f'`--{key}={shown(value)}`' for key, value in entry.defaults.items()
    )
    parts.append(f'\nDefaults of the run that follow the paper: {listed}.\n')
  preset = ROOT / 'experiments' / 'presets' / f'{name}.digits.flags'
  if preset.is_file():
    results = posixpath.relpath('results.md', posixpath.dirname(here) or '.')
    parts.append(
      f'\n### Results of {name} {{ #{name}-results }}\n\nTest error in % on '
      f'digits, 10 labels per class (`{preset.name}`): {ours(preset)}. All '
      f'tables: [Results]({results}).\n'
    )
  return '\n'.join(parts)


def docstring(path: pathlib.Path) -> str:
  """Return the docstring of a Python file."""
  return ast.get_docstring(ast.parse(path.read_text()))


def as_markdown(text: str) -> str:
  """Return a docstring as Markdown, with its title in bold."""
  title, _, rest = text.partition('\n')
  return f'**{escaped(title)}**\n\n{body(rest)}'


def body(text: str) -> str:
  """Return a docstring's text: indented lines are equations or lists."""
  blocks = []
  lines = text.strip('\n').split('\n')
  while lines:
    if not lines[0].strip():
      blocks.append(lines.pop(0))
      continue
    indented = lines[0].startswith('  ')
    block = []
    while lines and (
      (lines[0].startswith('  ') == indented and lines[0].strip())
      or (indented and not lines[0].strip() and lines[1][:2] == '  ')
    ):
      block.append(lines.pop(0))
    blocks += ['', *rendered(block, indented), '']
  return '\n'.join(blocks)


def rendered(block: list[str], indented: bool) -> list[str]:
  """Return lines of a docstring as Markdown lines."""
  if not indented:
    text = [escaped(line) for line in block]
    title = re.fullmatch(r'([A-Z][^.:]*):', block[-1])
    if title and re.match(r'Departures|Choices|Readings', block[-1]):
      text[-1] = f'**{text[-1]}**'
    return text
  if block[0].startswith('  - '):
    return [escaped(line[2:]) if line.strip() else '' for line in block]
  return ['```text', *(line[2:].rstrip() for line in block), '```']


def escaped(text: str) -> str:
  """Escape what Markdown would take for markup, outside of `code`."""
  parts = re.split(r'(`[^`]*`)', text)
  return ''.join(
    part if n % 2 else re.sub(r'(?<!^)([*_<\[\]|])', r'\\\1', part)
    for n, part in enumerate(parts)
  )


def shown(value) -> str:
  """Return a default as a flag's value."""
  if isinstance(value, (tuple, list)):
    return ','.join(map(str, value))
  return str(value)


def cell(text: str) -> str:
  """Return a text for a cell of a table."""
  return ' '.join(text.split()).replace('|', '\\|').replace('<', '&lt;')


def settings_table(settings) -> str:
  """Return flags, types, defaults and descriptions as a table."""
  settings = list(settings)
  if not settings:
    return 'It has no flags of its own.\n'
  rows = ['| flag | default | meaning |', '|---|---|---|']
  for one in settings:
    default = '' if one.default is None else f'`{shown(one.default)}`'
    default = '(empty)' if default == '``' else default
    values = choices(one.hint)
    meaning = cell(as_flags(one.help))
    meaning += f' One of {values}.' if values else ''
    name = f'[no]{one.name}' if one.hint is bool else one.name
    rows.append(f'| `--{name}` | {default} | {meaning} |')
  return '\n'.join(rows) + '\n'


def as_flags(text: str) -> str:
  """Return a description with the names of settings as flags."""
  from ssljax import config

  known = {name for part in config.schema('madnn').values() for name in part}
  return re.sub(
    r'`(\w+)`(=\w+)?',
    lambda found: (
      f'`--{found[1]}{found[2] or ""}`' if found[1] in known else found[0]
    ),
    text,
  )


def choices(hint) -> str:
  """Return the values of a `Literal`."""
  if typing.get_origin(hint) is not typing.Literal:
    return ''
  return ', '.join(f'`{value}`' for value in typing.get_args(hint))


def ours(preset: pathlib.Path) -> str:
  """Return the paragraph "# ours:" of a preset's header."""
  found = re.search(
    r'^# ours: (.*\n(?:#   .*\n)*)', preset.read_text(), re.MULTILINE
  )
  text = found[1] if found else 'not yet run'
  text = re.sub(r'\n#   at (?=\d)', '; at ', text).replace('\n#   ', ' ')
  return cell(text)


def presets(name: str, here: str) -> str:
  """Return the measured errors of all presets METHOD.`name`."""
  from ssljax import registry

  rows = ['| method | measured |', '|---|---|']
  for key in registry.METHODS:
    path = ROOT / 'experiments' / 'presets' / f'{key}.{name}.flags'
    if path.is_file():
      rows.append(f'| {method_link(key, here)} | {ours(path)} |')
  return '\n'.join(rows) + '\n'


@functools.cache
def method_pages() -> dict[str, str]:
  """Return the page of docs/ that describes each method."""
  found = {}
  for path in sorted((ROOT / 'docs').rglob('*.md')):
    for name in re.findall(r'^<!-- method: (\w+) -->', path.read_text(), re.M):
      found[name] = path.relative_to(ROOT / 'docs').as_posix()
  return found


def method_link(name: str, here: str) -> str:
  """Return a link to a method's part of its page."""
  page = posixpath.relpath(method_pages()[name], posixpath.dirname(here) or '.')
  return f'[`{name}`]({page}#{name})'


def methods(here: str) -> str:
  """Return a table of all methods."""
  from ssljax import registry

  rows = ['| method | in one line |', '|---|---|']
  for name in registry.METHODS:
    title = docstring(ROOT / 'ssljax' / 'methods' / f'{name}.py')
    rows.append(
      f'| {method_link(name, here)} | {escaped(title.splitlines()[0])} |'
    )
  return '\n'.join(rows) + '\n'


# Flags and programs.


def run_flags() -> str:
  """Return the flags that all methods have, by part."""
  from ssljax import config

  parts = []
  for part, settings in config.schema('supervised').items():
    if settings and part != 'parameters':
      parts += [f'## {part.capitalize()}\n', settings_table(settings.values())]
  return '\n'.join(parts)


def named_parts() -> str:
  """Return the names of networks, augmentations and preprocessings."""
  from ssljax import registry

  parts = {
    'Networks (`--network`)': registry.NETWORKS,
    'Augmentations (`--augment`, `--strong_augment`)': registry.AUGMENTATIONS,
    'Preprocessings (`--preprocess`)': registry.PREPROCESS,
    'Acquisition functions (`--acquire`)': registry.ACQUISITIONS,
  }
  return '\n\n'.join(
    f'{title}: {", ".join(f"`{name}`" for name in names)}.'
    for title, names in parts.items()
  )


def programs() -> str:
  """Return the docstrings of the programs that are no method."""
  from ssljax.cli import commands

  parts = []
  for name in commands.TOOLS:
    path = ROOT / 'experiments' / f'{name}.py'
    if name == 'figures':
      path = ROOT / 'experiments' / 'figures' / '__main__.py'
    text = docstring(path).replace(
      f'python experiments/{name}.py', f'ssljax {name}'
    )
    parts.append(f'## ssljax {name} {{ #{name} }}\n\n{program(text)}')
  return '\n'.join(parts)


def program(text: str) -> str:
  """Return the docstring of a program as Markdown: title, commands, text."""
  title, _, rest = text.partition('\n')
  first, _, rest = rest.strip('\n').partition('\n\n')
  if 'ssljax ' in first:
    first = re.sub(r'\n? {4,}(?=--)', ' ', first)  # continued lines
    lines = (line.strip() for line in first.split('\n'))
    kind = 'text' if re.search(r'\S  +\S', first) else ''  # with comments
    first = '\n'.join([f'```{kind}', *lines, '```'])
  return f'{escaped(title)}\n\n{first}\n\n{body(rest)}\n'


def main() -> int:
  """Write the pages and build the site."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--pages', action='store_true', help='build no site')
  only_pages = parser.parse_args().pages
  write_pages(PAGES_FOLDER)
  if only_pages:
    return 0
  command = [sys.executable, '-m', 'zensical', 'build', '--strict', '--clean']
  return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == '__main__':
  sys.exit(main())
