import json
import math
import pathlib
import re
import statistics
from unittest import mock

import binary
import numpy as np
import pytest

from ssljax import optimizers, registry, signatures
from ssljax.cli import main
from ssljax.errors import InputError, require
from ssljax.experiments import benchmark as program
from ssljax.experiments import sweep
from ssljax.experiments.papers import (
  benchmark,
  paired,
  readme_tables,
  runs,
  tables,
)
from ssljax.runs import build

ENTRIES = [
  (found, entry)
  for found in benchmark.read().values()
  for entry in found.entries
]


def configs_of(entry):
  """Return the config of every cell of an entry."""
  for cell in sweep.parse_grid(entry.grid, entry.method):
    command = main.MethodCommand(entry.method)
    given = program.NO_PRESET, *entry.flags, *sweep.as_flags(cell)
    assert command.parse([entry.method, *given]) == [entry.method]
    yield command.config()


def test_every_method_is_tuned_by_as_many_cells():
  for found in benchmark.read().values():
    methods = {entry.method for entry in found.entries}
    assert methods <= set(registry.METHODS) and benchmark.BASELINE in methods
    assert len(methods) == len(found.entries) >= 19
    grids = [sweep.parse_grid(e.grid, e.method) for e in found.entries]
    assert {len(grid) for grid in grids} == {4}
    rates = {frozenset(c['learning_rate'] for c in grid) for grid in grids}
    assert rates == {frozenset(['0.03', '0.1'])}


@pytest.mark.parametrize('name', benchmark.read())
def test_all_methods_share_everything_but_their_own_settings(name):
  shared = (
    *('dataset', 'labels', 'image_size', 'network', 'dropout', 'preprocess'),
    *('optimizer', 'decay', 'momentum', 'nesterov', 'weight_decay', 'clip'),
    *('average', 'augment'),
  )
  seen, strong, decays = set(), set(), set()
  for entry in benchmark.read()[name].entries:
    for config in configs_of(entry):
      values = config.values()
      seen.add(tuple(values[key] for key in shared))
      strong.add(values.get('strong_augment'))
      decays |= {values.get(key, 0.98) for key in ('ema', 'teacher_ema')}
  assert len(seen) == 1
  assert len(strong - {None, ()}) == 1  # MA-DNN's is off
  assert decays == {0.98}


@pytest.mark.parametrize(('found', 'entry'), ENTRIES)
def test_all_methods_take_as_many_steps_on_as_many_images(found, entry):
  supervised = next(e for e in found.entries if e.method == 'supervised')
  base = next(configs_of(supervised))
  steps, labelled = base.run.steps, base.batch.batch_labelled
  images = labelled + base.batch.batch_unlabelled
  for config in configs_of(entry):
    net, factory = build.make_network(config, 10), config.factories
    factory = factory[entry.method]
    spec = build.make_batch_spec(config, 10)
    tx = lambda steps, *_, **__: optimizers.optimizer(steps)
    own = signatures.given(factory, config.values())
    method = factory(net, tx, spec, config.run.steps, **own)
    taken = sum(stage.steps for stage in method.stages)
    if entry.method == 'deepbass':
      # An iteration is an epoch of the unlabelled images, of which there are
      # 1,297 less the labelled ones for digits, and the copies of the others.
      classes, per_class = 10, int(config.split.labels)
      known = classes * per_class
      others = (
        1297 - known
        if config.data.dataset == 'digits'
        else int(config.split.unlabelled)
      )
      epoch = math.ceil((others + own['upsample'] * known) / images)
      taken += own['iterations'] * epoch
      assert taken == pytest.approx(steps, rel=0.02)
      share = own['upsample'] * known / (others + own['upsample'] * known)
      assert share == pytest.approx(1 / 3, abs=0.02)
      continue
    assert taken == steps
    for stage in method.stages:
      batch = stage.batch_spec
      assert batch.size in (labelled, images)
      assert batch.labelled in (labelled, 0)


TOML = """
seeds = 3
tuning = 2

[methods.supervised]
name = "labels alone"
grid = "smoothing=0,0.1"

[methods.madnn]
name = "MA-DNN"
flags = ["--batch_unlabelled={more}", "--steps={steps:50}"]
grid = "eta=0.1 weight=0.5,1"

[methods.pi_model]
name = "a method that fails"
without = ["augment"]
flags = ["--steps=0"]
grid = "weight=1,2"

[data.mine]
title = "noise"
minutes = 1.5
steps = 4
labelled = 6
unlabelled = 6
more = 8
validation = 12
flags = ["--dataset=FILE", "--labels=4", "--network=digits"]

[common]
flags = [
  "--steps={steps}", "--batch_labelled={labelled}", "--augment=noise",
  "--batch_unlabelled={unlabelled}", "--average=0.9",
]
"""


@pytest.fixture
def asked(tmp_path):
  """Run benchmark.py in this process; returns the commands that it called."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (60, 8, 8, 1), np.uint8)
  labels = np.arange(60) % 3
  np.savez(
    tmp_path / 'mine.npz',
    **dict(train=pixels, train_labels=labels),
    **dict(test=pixels[:30] // 2, test_labels=labels[:30]),
  )
  text = TOML.replace('FILE', f'{tmp_path}/mine.npz')
  (tmp_path / benchmark.FILE).write_text(text)
  called = []

  def call(command, log):
    called.append(command)
    log.write_text('')
    status = binary.run(*command[2:], binary=pathlib.Path(command[1]).stem)
    require(not status, f'status {status}')

  def ask(**more):
    values = {'name': 'mine', 'methods': None, 'data_dir': None, 'list': False}
    values |= {'runs': f'{tmp_path}/runs', 'results': f'{tmp_path}/results'}
    with (
      mock.patch.object(tables, 'FOLDER', tmp_path),
      mock.patch.object(paired, 'call', call),
    ):
      program.act(values | more)
    return called

  ask.folder = tmp_path
  return ask


@pytest.mark.slow
def test_a_benchmark_tunes_tests_and_keeps_every_method(asked, capsys):
  with pytest.raises(InputError, match=r'^pi_model: failed'):
    asked()
  called = asked(methods=['supervised', 'madnn'])
  # Two cells and the chosen one for two methods, and the one that fails.
  assert len(called) == 3 + 3 + 1
  flags = [' '.join(command) for command in called]
  assert all('--flagfile=/dev/null' in command for command in flags)
  assert ['--validation=12' in x for x in flags[:3]] == [True, True, False]
  assert '--seeds=2 ' in flags[0] and '--seeds=3 ' in flags[2]
  # The numbers of the data set are filled in; a method's flags count.
  assert '--steps=4 ' in flags[0] and '--steps=2 ' in flags[3]
  assert '--batch_unlabelled=8' in flags[3]
  assert '--batch_unlabelled=6' not in flags[3]
  assert '--augment' not in flags[6]
  results = asked.folder / 'results'
  found = benchmark.read_record(results, 'mine')
  assert list(found) == ['supervised', 'madnn']
  for entry in found.values():
    # The chosen cell has the least mean validation error.
    means = [statistics.fmean(c['errors'].values()) for c in entry['cells']]
    assert len(means) == 2 and means == sorted(means)
    assert list(entry['test_error']) == ['0', '1', '2']
  chosen = sweep.as_flags(found['madnn']['cells'][0]['settings'])
  assert all(flag in called[5] for flag in chosen)
  # No paths of this machine but the data set's, which the test gives.
  text = (results / 'benchmark.mine.json').read_text()
  assert str(asked.folder) not in text.replace(f'{asked.folder}/mine.npz', '')
  shown = capsys.readouterr().out
  assert 'a method that fails' not in shown.split('| --- |')[-1]


def record(*errors, weight='1'):
  return {
    'cells': [
      {'settings': {'weight': weight}, 'errors': {'0': 4.0, '1': 5.0}},
      {'settings': {'weight': '9'}, 'errors': {'0': 8.0, '1': 9.0}},
    ],
    'test_error': {str(seed): error for seed, error in enumerate(errors)},
    'seconds': 12.4,
    'commit': 'abc',
    'device': '1 x cpu',
  }


def test_the_table_has_ranks_and_paired_differences_of_every_split():
  (found,) = [b for b in benchmark.read().values() if b.name == 'digits-10']
  text = benchmark.markdown(
    found,
    {
      'supervised': record(7.0, 8.0, 8.0),
      'madnn': record(3.0, 5.0, 4.0),
      'llp': record(3.0, 9.0, 3.0),
    },
  )
  rows = [line.split(' | ') for line in text.splitlines() if '±' in line][:3]
  rows = {row[0].strip('| '): row for row in rows}
  assert list(rows) == ['MA-DNN', 'LLP', 'labels alone']  # by mean error
  # Differences −4, −3, −4: mean −3.67, standard deviation 0.577, and Student's
  # quantile 4.303 for two degrees of freedom: ± 1.43.
  assert rows['MA-DNN'][1:3] == ['4.00 ± 1.00', '-3.67 [-5.10, -2.23]']
  # Ranks of MA-DNN: a tie for the first place, 1.5; then 1 and 2.
  assert rows['MA-DNN'][3:6] == ['1.5', '3', '3.0 5.0 4.0']
  # LLP: 1.5, 3, 1. The labels alone: 3, 2, 3.
  assert [rows[n][3] for n in ('LLP', 'labels alone')] == ['1.8', '2.7']
  assert rows['MA-DNN'][6] == 'weight 1'
  assert rows['MA-DNN'][7] == '4.50'  # of the chosen cell on validation
  assert rows['labels alone'][2] == tables.NONE
  assert 'the best of 4 cells' in text and 'commits abc' in text


def test_a_page_shows_the_stored_results_of_a_benchmark(tmp_path):
  path = benchmark.record_path(tmp_path, 'digits-10')
  methods = {'madnn': record(3.0, 5.0), 'supervised': record(7.0, 8.0)}
  path.write_text(json.dumps({'methods': methods}))
  store = runs.Store(tmp_path / 'runs', tmp_path)
  page = 'text\n<!-- benchmark: digits-10 -->\nold\n<!-- end -->\nmore\n'
  made = readme_tables.with_tables(page, store)
  assert re.search(r'\| MA-DNN \| 4\.00 ± 1\.41 \|', made)
  assert made.startswith('text\n<!-- benchmark: digits-10 -->\n')
  assert made.endswith('<!-- end -->\nmore\n') and 'old' not in made
  assert readme_tables.with_tables(made, store) == made
  # Fewer splits are noticed.
  assert readme_tables._shown(made)['digits-10: MA-DNN'] == 2
  other = page.replace('digits-10', 'digits-11')
  with pytest.raises(InputError, match=r'digits-11.*digits-10'):
    readme_tables.with_tables(other, store)


@pytest.mark.parametrize(
  'text',
  [
    '{"methods": {"madnn": {}}}',
    '{"methods": {"nothing": {}}}',
    '{"methods": {"madnn": {"cells": [], "test_error": {"0": 1}}}}',
    '{"methods": {"madnn": 3}}',
    '{}',
    '[]',
    '{',
  ],
)
def test_a_damaged_record_is_refused_in_one_line(tmp_path, text):
  path = benchmark.record_path(tmp_path, 'digits-10')
  path.write_text(text)
  with pytest.raises(InputError, match=re.escape(str(path))) as refused:
    benchmark.read_record(tmp_path, 'digits-10')
  assert '\n' not in str(refused.value)


def test_unknown_names_are_refused_with_near_ones(asked, capsys):
  with pytest.raises(InputError, match=r'name=mime: .*mine'):
    asked(name='mime')
  with pytest.raises(InputError, match=r'^name: give one of mine'):
    asked(name=None)
  with pytest.raises(InputError, match=r'methods=madn: .*madnn'):
    asked(methods=['madn'])
  asked(list=True)
  assert re.search(r'mine +noise +3 +2', capsys.readouterr().out)
