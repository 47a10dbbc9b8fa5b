"""Presets and rows of LLP's tables have the schedules of the paper's runs."""

import inspect
import tomllib

import binary
import pytest

from ssljax.methods import llp

IMAGES, CLASSES = 1_281_167, 1000  # of ImageNet
PRESETS = binary.EXPERIMENTS / 'presets'
TABLES = tomllib.loads((binary.EXPERIMENTS / 'tables/llp.toml').read_text())
ROWS = [row for table in TABLES['table'] for row in table.get('row', [])]


def settings(preset, flags=()):
  """The flags of a preset, and further ones, as a dict."""
  lines = (PRESETS / f'{preset}.flags').read_text().splitlines()
  lines = [line for line in [*lines, *flags] if line.startswith('--')]
  return dict(line[2:].partition('=')[::2] for line in lines)


RUNS = {
  (row['preset'], *row.get('flags', ()))
  for row in ROWS
  if row.get('preset', '').startswith('llp.imagenet')
}


@pytest.mark.parametrize('run', sorted(RUNS), ids=','.join)
def test_instance_recognition_takes_ten_epochs_of_the_admitted_images(run):
  given = settings(run[0], run[1:])
  default = inspect.signature(llp.llp).parameters['warm'].default
  batch = llp.DEFAULTS['batch_unlabelled']
  images = IMAGES
  if 'unlabelled' in given:  # beside the labelled ones
    images = int(given['unlabelled']) + CLASSES * int(given['labels'])
    assert round(images / IMAGES, 5) in (0.3, 0.7)
  assert int(given.get('warm', default)) == 10 * (images // batch)


@pytest.mark.parametrize('share', [1, 3, 5, 10])
def test_a_supervised_row_has_the_recipe_of_the_papers_baseline(share):
  (row,) = (r for r in ROWS if r['name'] == f'Supervised, {share} % labels')
  given = settings(row['preset'], row.get('flags', ()))
  assert row['preset'].startswith('supervised.')
  assert int(given['labels']) * 10 == 130 * share
  assert (given['batch_labelled'], given['steps']) == ('256', '401000')
  assert given['decay_at'] == '160000,310000'
  assert (given['learning_rate'], given['decay']) == ('0.1', 'steps')
  assert given['weight_decay'] == '0.0001' and 'nonesterov' in given


def test_table_6_looks_the_neighbour_up_in_the_bank():
  (table,) = (t for t in TABLES['table'] if t['number'] == 6)
  taken = {row['take'] for row in table['row']}
  assert taken == {'probe:test_error.nearest_in_bank'}


def test_figure_2d_has_resnet_18_on_the_x_axis():
  (part,) = (p for p in TABLES['figure'][0]['part'] if p['drawn'] == 'llp/2cd')
  x, y = (settings(run[0])['network'] for run in part['runs'])
  assert (x, y) == ('resnet18v2', 'resnet50v2')
