"""The documentation: commands, code, links, drawings, and the site."""

import functools
from html import parser
import importlib
import importlib.util
import pathlib
import posixpath
import re
import shutil
import subprocess
import sys

from absl import flags
import pytest

import ssljax
from ssljax import config, registry
from ssljax.cli import commands, config_flags, main, selected

ROOT = pathlib.Path(__file__).parents[2]
# Programs that a command line may begin with, beside those of ssljax.
OTHERS = {'python', 'python3', 'pip', 'srun', 'gcloud', 'ssljax', 'ruff'}
PLACEHOLDERS = {'METHOD', 'NAME'}  # of programs
# Parts of the library that are described before they are merged. A name that
# is known to the library is checked whether it stands here or not.


def load(name: str):
  """Return a script of tools/ as a module."""
  spec = importlib.util.spec_from_file_location(name, ROOT / f'tools/{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


site = load('site')
WRITTEN = dict(site.sources())
PAGES = {here: site.page(text, here) for here, text in WRITTEN.items()}
BLOCKS = [
  (here, language, run, code)
  for here, text in PAGES.items()
  for run, language, code in re.findall(
    r'^(<!-- run -->\n)?```(\w*)\n(.*?)^```', text, re.MULTILINE | re.DOTALL
  )
]
SHELL = [
  (here, code)
  for here, kind, _, code in BLOCKS
  if kind in ('', 'bash') and '→' not in code  # a diagram
]
PYTHON = [
  (here, run, code) for here, kind, run, code in BLOCKS if kind == 'python'
]


def names(blocks):
  """Return a name for each block: its page, and the number on all pages."""
  return [f'{here}-{number}' for number, (here, *_) in enumerate(blocks)]


# Commands.


@functools.cache
def known_flags(program: str, *arguments: str) -> frozenset[str]:
  """Return the flags of a program, with the negations of boolean ones."""
  argv = [program, *arguments]
  if program in registry.METHODS:
    values = main.MethodCommand(program).values
  elif program == 'train':
    values = selected.TrainCommand(argv).values
  else:
    where = 'figures.catalogue' if program == 'figures' else program
    module = importlib.import_module(f'ssljax.experiments.{where}')
    if hasattr(module, 'PlanCommand'):
      values = module.PlanCommand(argv).values
    elif hasattr(module, 'Command'):
      values = module.Command().values
    else:
      values = config_flags.new_values()
      module.define_flags(values)
  found = {*values, *flags.FLAGS, 'flagfile', 'help'}
  return frozenset(found | {f'no{name}' for name in found})


def called(code: str):
  """Yield (program, arguments) of each command of ssljax in a block."""
  code = re.sub(r'\\\n\s*', ' ', code)
  code = re.sub(r'(?m)^\s*#.*$| # .*$|\s+#  .*$', '', code)
  for line in re.split(r'\n|&&|\|\||;', code):
    found = re.search(
      r'(?:\bssljax|python\S* experiments/|ssljax\.experiments\.)\s?'
      r'([A-Za-z_]\w*)(?:\.py)?((?: .*)?)$',
      line,
    )
    if found and not re.search(r'git|pip|cd|-m venv', line[: found.start()]):
      yield found[1], re.findall(r'(?<=\s)--?(\w+)', found[2])


@pytest.mark.parametrize(('here', 'code'), SHELL, ids=names(SHELL))
def test_a_shell_block_is_a_command_with_known_flags(here, code):
  done = subprocess.run(
    ['bash', '-n'], input=code, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  for program, given in called(code):
    if program in PLACEHOLDERS:
      continue
    exists = program in (*registry.METHODS, *commands.TOOLS) or (
      f'experiments/{program}.py' in code
      and (ROOT / 'experiments' / f'{program}.py').is_file()
    )
    assert exists, f'{program} is no program'
    asked = re.findall(r'--(?:method|methods)=[\w,]+', code)
    known = known_flags(program, *asked)
    if program in ('compare', 'sweep'):
      known |= known_flags('madnn')
    assert {*given} <= known


def test_every_flag_that_a_page_names_exists():
  known = {'worker'}  # of gcloud
  called_files = re.findall(r'experiments/(\w+)\.py', ''.join(PAGES.values()))
  for program in {*registry.METHODS, *commands.TOOLS, *called_files}:
    if program not in PLACEHOLDERS:
      known |= known_flags(program)
  for here, text in WRITTEN.items():
    text = site.FENCE.sub('', text)
    inline = ' '.join(re.findall(r'`([^`\n]+)`', text))
    found = set(re.findall(r'(?<![\w-])--(\w+)', inline))
    assert found <= known, here


# Code.


@pytest.mark.parametrize(('here', 'run', 'code'), PYTHON, ids=names(PYTHON))
def test_a_python_block_compiles(here, run, code):
  assert compile(code, here, 'exec').co_code


RUN = [(here, code) for here, run, code in PYTHON if run]
RUN = [
  pytest.param(
    *block,
    id=name,
    marks=[pytest.mark.slow] if 'ssljax.fit' in block[1] else [],
  )
  for block, name in zip(RUN, names(RUN), strict=True)
]


@pytest.mark.parametrize(('here', 'code'), RUN)
def test_a_marked_python_block_runs(here, code, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr


# Links.


def anchors(text: str) -> set[str]:
  """Return the anchors of a page."""
  plain = site.FENCE.sub('', text)
  own = re.findall(r'\{ #([\w-]+) \}', plain)
  return {*own, *(anchor for _, anchor, _ in site.headings(text))}


@pytest.mark.parametrize('here', PAGES)
def test_links_of_a_page_lead_somewhere(here):
  text = site.FENCE.sub('', PAGES[here])
  for link in re.findall(r'\]\((?![a-z]+:)([^)\s]+)\)', text):
    path, _, anchor = link.partition('#')
    target = posixpath.normpath(
      posixpath.join(posixpath.dirname(here), path or posixpath.basename(here))
    )
    if target in PAGES:
      assert not anchor or anchor in anchors(PAGES[target]), link
    else:
      copied = {f'repository/{path}' for path in site.copied()}
      assert target in copied or (ROOT / 'docs' / target).is_file(), link


def test_no_page_is_left_out_of_the_navigation():
  listed = re.findall(r'(\S+\.md)$', (ROOT / 'mkdocs.yml').read_text(), re.M)
  assert sorted(listed) == sorted(PAGES)


def test_no_marker_is_left_over():
  for here, text in PAGES.items():
    for kind, value in site.MARKER.findall(site.FENCE.sub('', text)):
      is_left = kind in ('include', 'method', 'presets', 'doc') and value
      assert not is_left, (here, kind, value)


# Completeness.


def test_every_method_has_a_page():
  assert set(site.method_pages()) == set(registry._OWN_METHODS)


def test_every_public_name_is_in_the_reference():
  text = WRITTEN['reference/api.md']
  assert set(re.findall(r'heading: ssljax\.(\w+)', text)) == set(ssljax.__all__)


def test_every_flag_of_a_method_is_on_its_page():
  for name, here in site.method_pages().items():
    for setting in config.schema(name)['parameters']:
      if setting in registry.METHODS[name].factory.__kwdefaults__:
        assert re.search(rf'`--(\[no\])?{setting}`', PAGES[here]), setting


def test_drawings_are_those_of_the_program():
  drawings = load('drawings')
  for name, draw in drawings.DRAWINGS.items():
    assert (drawings.FOLDER / f'{name}.svg').read_text() == draw(), (
      'run `python tools/drawings.py`'
    )


# The site.


class Links(parser.HTMLParser):
  """The links and anchors of an HTML page."""

  def __init__(self, text: str):
    """Read a page."""
    super().__init__()
    self.links, self.anchors = set(), set()
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    """Note the links and the anchor of a tag."""
    given = dict(attrs)
    self.anchors |= {given[key] for key in ('id', 'name') if given.get(key)}
    if tag != 'link' or given.get('rel') != 'canonical':
      self.links |= {given[k] for k in ('href', 'src') if given.get(k)}


def test_the_site_builds_without_warnings_and_its_links_resolve(tmp_path):
  if not importlib.util.find_spec('zensical'):
    pytest.skip("needs pip install 'ssljax[docs]'")
  site.write_pages(tmp_path / 'docs')
  text = (ROOT / 'mkdocs.yml').read_text().replace('build/', '')
  (tmp_path / 'mkdocs.yml').write_text(text.replace('[.]', f'[{ROOT}]'))
  done = subprocess.run(
    [sys.executable, '-m', 'zensical', 'build', '--strict'],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  built = tmp_path / 'site'
  pages = {path: Links(path.read_text()) for path in built.rglob('*.html')}
  assert len(pages) > len(PAGES)  # and one for errors
  for path, page in pages.items():
    if path.name == '404.html':
      continue
    for link in page.links:
      if re.match(r'[a-z]+:', link):
        assert not link.startswith('http:'), link
        continue
      where, _, anchor = link.partition('#')
      target = (path.parent / where).resolve() if where else path
      target = target / 'index.html' if target.is_dir() else target
      assert target.is_file(), (path.name, link)
      if anchor and target in pages:
        assert anchor in pages[target].anchors, (path.name, link)
  shutil.rmtree(built)
