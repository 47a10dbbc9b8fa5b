"""`reproduce.py` from the command line, on a table of tiny runs."""

import csv
import pathlib
import re
from unittest import mock

from absl import flags
import binary
import PIL.Image
import pytest
import reproduce
import tables

from ssljax.core import InputError, require

TOML = """
paper = "a paper"

[[table]]
number = 1
title = "digits"
statistic = "mean (std) of 3 splits"

[[table.row]]
name = "one"
paper = 50.0
std = 2.0
n = 3
preset = "supervised.digits"
flags = ["--steps=2", "--network=digits"]
[table.row.cpu]
flags = ["--labels=1", "--batch_labelled=8"]
seeds = 2
smaller = "one label"

[[table.row]]
name = "its twin"
paper = 40.0
preset = "supervised.digits"
flags = ["--steps=2", "--network=digits"]
take = "median_last"
[table.row.cpu]
flags = ["--labels=1", "--batch_labelled=8"]
seeds = 2
smaller = "one label"

[[table.row]]
name = "far"
paper = 40.0
preset = "supervised.svhn-1000"
data = ["svhn_cropped"]
[table.row.cpu]
seeds = 1

[[table.row]]
name = "never"
paper = 30.0
missing = "no such method"

[[table.quoted]]
name = "theirs"
paper = 20.0

[[figure]]
number = 1
title = "curves"
drawn = ["deepbass/3"]
runs = [["deepbass.yin-yang-8"]]
[figure.cpu]
seeds = 2
runs = [
  ["deepbass.yin-yang-8", "--steps=2", "--iterations=1", "--acquire=none"],
  ["deepbass.yin-yang-8", "--steps=2", "--iterations=2", "--acquire=none"],
]
"""


@pytest.fixture
def asked(tmp_path):
  """Runs `reproduce.py` on that table; its exit status."""
  (tmp_path / 'supervised.toml').write_text(TOML)
  made = []

  def call(command):
    made.append(command)
    program = pathlib.Path(command[1]).stem
    # `binary.run` gives the flags of this program back.
    status = binary.run(*command[2:], binary=program)
    require(not status, f'status {status}')

  def run(*more):
    where = f'--runs={tmp_path}/runs', f'--results={tmp_path}/results'
    with (
      mock.patch.object(tables, 'FOLDER', tmp_path),
      mock.patch.object(tables, 'PAPERS', ('supervised',)),
    ):
      # As a module: `binary.run` would run a copy, whose `call` is real.
      return main('--table=supervised/1', '--budget=cpu', *where, *more)

  def main(*args):
    known = set(flags.FLAGS)
    reproduce.define_flags()
    own = set(flags.FLAGS) - known
    try:
      flags.FLAGS(['reproduce', *args])
      given = {name: flags.FLAGS[name].value for name in own}
    finally:
      for name in own:
        delattr(flags.FLAGS, name)
      flags.FLAGS.unparse_flags()
    with mock.patch.object(reproduce, 'call', call):
      reproduce.act(given)

  run.made, run.results = made, tmp_path / 'results'
  return run


def cells(asked):
  with open(asked.results / 'supervised-1.cpu.csv', encoding='utf-8') as file:
    return {row['row']: row for row in csv.DictReader(file)}


def test_a_table_is_run_once_and_extended_by_seeds(asked, capsys):
  asked()
  assert len(asked.made) == 1  # two rows of one run, two splits
  found = cells(asked)
  assert found['one']['n'] == '2'
  assert found['one']['smaller'] == 'one label'
  assert found['its twin']['n'] == '2'
  assert found['far']['state'] == 'not yet run'
  assert found['never']['state'] == 'no such method'
  assert found['theirs']['state'] == 'quoted there'
  out = capsys.readouterr().out
  assert 'far: left out, svhn_cropped is not in --data_dir' in out
  assert '| one | 50.00 ± 2.00 |' in out

  asked('--rows=1')
  assert len(asked.made) == 1
  asked('--seeds=3', '--rows=1')
  assert len(asked.made) == 2
  assert '--seed=2' in asked.made[1]
  assert '--seeds=1' in asked.made[1]
  now = cells(asked)
  assert now['one']['n'] == '3'
  assert now['one']['by_seed'].startswith(found['one']['by_seed'])
  asked('--seeds=1')
  assert cells(asked)['one']['by_seed'] == found['one']['by_seed'].split()[0]


def test_what_was_interrupted_goes_on_to_the_same_table(asked):
  asked('--rows=1')
  whole = cells(asked)
  results = asked.results
  results.rename(results.with_name('whole'))
  # Its run is there but for the copy: as if killed before the end.
  asked('--rows=1')
  assert len(asked.made) == 2
  kept = ('row', 'ours', 'ours_std', 'n', 'low', 'high', 'by_seed', 'steps')
  pick = lambda found: [[row[name] for name in kept] for row in found.values()]
  assert pick(cells(asked)) == pick(whole)


def test_a_row_that_fails_is_one_line_and_the_others_stand(asked, capsys):
  # Its folder holds something else.
  folder = asked.results.parent / 'runs/supervised.svhn-1000/seeds-0-0'
  (folder / 'mine').mkdir(parents=True)
  (asked.results.parent / 'data/svhn_cropped').mkdir(parents=True)
  data = f'--data_dir={asked.results.parent}/data'
  with pytest.raises(InputError, match='1 rows failed'):
    asked(data, '--rows=1,3')
  assert 'supervised/1, far: status 2' in capsys.readouterr().err
  assert cells(asked)['one']['n'] == '2'


def test_a_figure_is_of_runs_that_are_made_for_it(asked):
  asked('--table=', '--figure=supervised/1')
  (picture,) = (asked.results / 'figures').glob('*.png')
  assert picture.name == 'supervised-1.cpu.0.png'
  with PIL.Image.open(picture) as image:
    assert image.width > 300
  programs = [pathlib.Path(command[1]).stem for command in asked.made]
  assert programs == ['deepbass', 'deepbass', 'figures']


def test_the_list_says_how_far_each_is(asked, capsys):
  asked('--rows=1')
  capsys.readouterr()
  asked('--list', '--data_dir=.')
  lines = capsys.readouterr().out.splitlines()
  words = next(
    line for line in lines if line.startswith('supervised/1  digits')
  )
  assert '2 to run' in words.split('  ')[-2]
  assert words.endswith('2 done, 1 needs svhn_cropped, 1 no program')
  assert any(re.search(r'curves  to draw +to draw$', line) for line in lines)


def test_a_page_has_the_table_of_the_results_that_are_kept(asked, tmp_path):
  asked('--rows=1')
  page = tmp_path / 'page.md'
  begin = '<!-- results: supervised/1 cpu -->'
  page.write_text(f'before\n{begin}\nold\n<!-- end -->\nafter\n')
  with mock.patch.object(reproduce, 'PAGES', [page]):
    asked('--pages')
    once = page.read_text()
    asked('--pages')
  assert page.read_text() == once
  assert once.startswith(f'before\n{begin}\n| row |')
  assert once.endswith('<!-- end -->\nafter\n')
  assert (tmp_path / 'results/supervised-1.cpu.md').read_text() in once


@pytest.mark.parametrize('rows', ['0', '5', 'one'])
def test_a_row_that_is_not_there_is_refused_by_number(asked, rows):
  with pytest.raises(InputError, match=rf'--rows={rows}: .*1 one'):
    asked(f'--rows={rows}')
