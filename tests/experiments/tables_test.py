"""The papers' tables as data, and the comparison with our results."""

import csv
import io
import json
import math

import binary
import pytest

from ssljax.errors import InputError
from ssljax.experiments.figures import catalogue
from ssljax.experiments.papers import readme_tables, runs, tables

# Numbers in the papers: tables, and figures that show data.
HEADINGS = {
  'madnn': ((1, 2), (3, 4, 5, 6)),
  'association': ((1, 2, 3, 4, 5), (2, 3, 4)),
  'r2d2': ((1, 2, 3, 4, 5, 6, 7, 8), (2,)),
  'llp': ((1, 2, 3, 4, 5, 6), (2,)),
  'deepbass': ((1, 2, 3), (1, 2, 3)),
}
TABLE = tables.Table(
  'madnn/1', 'a paper', 'it', 'mean (std)', 'test error in %', 'mean', (), ()
)
MEDIANS = TABLE._replace(centre='median')


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
def test_a_table_has_presets_and_the_papers_numbers(name):
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
        check_flags(runs.run_of(sized))
        changed = (sized.preset, sized.flags) != (row.preset, row.flags)
        assert bool(sized.smaller) == changed, row
        check_take(sized)
  assert all(0 < row.paper < 100 and not row.preset for row in table.quoted)


def test_every_preset_of_r2d2s_tables_has_a_row_and_its_splits_are_counted():
  rows = [
    (table.name, row)
    for table in tables.all_tables().values()
    for row in table.rows
    if table.name.startswith('r2d2/')
  ]
  used = {row.preset for _, row in rows}
  columns = {f'r2d2.cifar10-4000-{column}' for column in 'abcde'}
  assert columns <= used
  # The means and deviations of these tables are over five splits.
  for name, row in rows:
    if name in ('r2d2/6', 'r2d2/7', 'r2d2/8'):
      assert row.n == 5, row
  # Column e of Table 1 is a row of Tables 2 to 4: it is trained once.
  shared = [
    runs.run_of(row)
    for name, row in rows
    if row.paper == 5.78 and name in ('r2d2/1', 'r2d2/2', 'r2d2/3', 'r2d2/4')
  ]
  assert len(shared) == 4 and len(set(shared)) == 1


def test_r2d2_has_a_row_with_the_labels_of_the_released_script():
  rows = tables.all_tables()['r2d2/7'].rows
  flags = [row.flags for row in rows]
  assert ('--finetune_labels=repredicted',) in flags


def check_flags(run):
  """The preset exists, and its program has every flag."""
  name = run.preset.split('.')[0]
  known = binary.flag_names(name)
  for line in run.lines:
    flag = line.split('=')[0].removeprefix('--')
    assert flag in known or flag.removeprefix('no') in known, (run, line)


def check_take(row):
  """The stage or method that a row takes its number from exists."""
  method = row.preset.split('.')[0]
  kind, _, rest = row.take.partition(':')
  if kind == 'after':
    assert rest in {
      'r2d2': ('supervised', 'decipher', 'repeated', 'finetuned'),
      'association': ('pretrain', 'association'),
      'deepbass': ('labelled', 'iterations'),
    }.get(method, ()), row
  elif kind == 'arm':
    assert rest in ('supervised:last', 'supervised:averaged'), row
  elif kind not in ('probe', 'propagate'):
    assert kind in ('last', 'averaged', 'median_last', 'minimum'), row
  if kind == 'minimum':  # the name of the row or of the table says so
    said = '--report_minimum' in runs.run_of(row).lines
    assert said or 'smallest over training' in row.name, row


@pytest.mark.parametrize('name', tables.all_figures())
def test_a_figure_has_as_many_runs_as_its_drawing_compares(name):
  figure = tables.all_figures()[name]
  for budget in ('paper', *tables.BUDGETS):
    sized = figure.at(budget)
    for part in sized.parts if sized else ():
      drawing = catalogue.FIGURES[part.drawn]
      assert 1 <= len(part.runs) <= drawing.runs, part
      assert sized.seeds == 1 or drawing.merges, part
    for run in runs.runs_of(sized) if sized else ():
      check_flags(run)
      method = run.preset.split('.')[0]
      drawings = [catalogue.FIGURES[part.drawn] for part in sized.parts]
      others = {method for drawing in drawings for method in drawing.others}
      assert method in {name.split('/')[0]} | others


def test_madnns_ablations_train_no_baseline():
  # Six rows of Table 2 and three of section 4.2; the full rows have one.
  rows = tables.all_tables()['madnn/2'].rows
  ablations = [row for row in rows if 'without' in row.name]
  assert len(ablations) == 9
  for row in ablations:
    for budget in ('paper', 'cpu'):
      sized = row.at(budget)
      assert sized is None or '--nobaseline' in sized.flags, row


def test_madnn_has_the_ablation_of_the_values():
  # Section 4.2: errors rise by 0.69, 1.94 and 2.78 without value embeddings.
  rows = tables.all_tables()['madnn/2'].rows
  full = {row.preset: row.paper for row in rows if 'full' in row.name}
  without = {row.preset: row for row in rows if '--novalues' in row.flags}
  rises = {name: row.paper - full[name] for name, row in without.items()}
  assert rises == pytest.approx(
    {
      'madnn.svhn-1000': 0.69,
      'madnn.cifar10-4000': 1.94,
      'madnn.cifar100-10000': 2.78,
    }
  )


def test_figure_3_of_madnn_trains_the_supervised_network_by_its_labels():
  figure = tables.all_figures()['madnn/3']
  steps = {}
  for run in runs.runs_of(figure):
    if run.preset.startswith('supervised'):
      found = dict(x[2:].partition('=')[::2] for x in run.lines)
      assert found['batch_labelled'] == '100'
      steps[found['labels']] = int(found['steps'])
    else:
      assert '--nobaseline' in run.flags
  # 200 epochs of full batches of 100: 250, 1,000 and 73,257 labelled images.
  assert steps == {'25': 200 * 2, '100': 200 * 10, 'all': 200 * 732}


@pytest.mark.parametrize('number', '456')
def test_figures_of_madnn_begin_with_the_initial_state(number):
  figure = tables.all_figures()[f'madnn/{number}']
  for budget in ('paper', 'cpu'):
    for part in figure.at(budget).parts:
      assert part.arguments[0].startswith('--steps=0,'), part


def test_the_interval_is_students_if_the_paper_gives_no_deviation():
  # Mean 2, variance 2, so a standard error of 1; t of 1 degree, 97.5 %: tan(π
  # 0.475).
  found = tables.compare_means([1, 3], 1, None, 10)
  t = math.tan(math.pi * 0.475)
  assert found[:3] == pytest.approx((1, 1 - t, 1 + t))


def test_the_interval_of_two_means_is_welchs():
  # Squared standard errors 1 and 4/4: together √2, with 4 / (1 + 1/3) = 3
  # degrees; t of 3 degrees, 97.5 %: 3.182446 (any table).
  found = tables.compare_means([4, 6], 2, 2, 4)
  half = 3.182446 * math.sqrt(2)
  assert found[:3] == pytest.approx((3, 3 - half, 3 + half), rel=1e-6)


def test_one_split_and_equal_ones_have_no_interval():
  assert tables.compare_means([4], 1, 0.5, 10) == tables.Difference(3)
  assert tables.compare_means([4, 4], 1, None, None) == tables.Difference(3)


def test_medians_are_compared_by_signs():
  # Three of four below: (C(4,0) + C(4,1)) / 2⁴ on either side.
  found = tables.compare_medians([1, 2, 3, 9], 5)
  assert found == tables.Difference(
    -2.5, below=3, apart=4, probability=2 * 5 / 16
  )
  assert tables.as_text(found) == '-2.50, 3 of 4 below (p 0.62)'
  # Equal values are not counted.
  assert tables.compare_medians([5, 4], 5)[4:] == (1, 1, 1.0)
  row = tables.Row('', 5.0, 1.0, 10, 'madnn.digits')
  mine = tables.Ours((1, 2, 3, 9), (0, 1, 2, 3))
  assert tables.compare(MEDIANS, row, mine) == found
  assert tables.compare(TABLE, row, mine).below is None


def test_a_worse_row_is_shown_as_worse():
  row = tables.Row('hard', 2.0, 0.5, 4, 'madnn.digits')
  mine = tables.Ours(
    (4.0, 6.0), (0, 1), 120, 34.5, '1 x cpu', 'abc', data='CIFAR-10 (JPEG)'
  )
  cells = tables.cells_of(TABLE._replace(rows=(row,)), [mine])[0]
  low, high = tables.compare_means([4, 6], 2, 0.5, 4)[1:3]
  assert cells == [
    'hard',
    '2.00 ± 0.50',
    '5.00 ± 1.41 on CIFAR-10 (JPEG)',
    '2',
    f'+3.00 [{low:+.2f}, {high:+.2f}]',
    '120',
    '34',
    '1 x cpu',
    '–',
  ]


def test_reduced_settings_are_not_compared_with_the_paper():
  row = tables.Row('small', 2.0, 0.5, 4, 'madnn.digits')
  mine = tables.Ours((4.0, 6.0), (0, 1), smaller='fewer images')
  table = TABLE._replace(rows=(row,))
  assert tables.compare(table, row, mine) is None
  assert tables.compare(MEDIANS, row, mine) is None
  cells = tables.cells_of(table, [mine])[0]
  assert cells[tables.HEADER.index('ours − paper')] == tables.NONE
  read = list(csv.DictReader(io.StringIO(tables.as_csv(table, [mine]))))
  assert read[0]['difference'] == read[0]['low'] == read[0]['high'] == ''
  assert (read[0]['ours'], read[0]['smaller']) == ('5.0', 'fewer images')
  text = tables.markdown(table, [mine], 'cpu')
  assert 'rows of reduced settings are not compared' in text


def test_a_table_says_what_its_numbers_contain():
  alone = tables.Row('one', 2.0, preset='madnn.digits')
  both = tables.Row('two', 2.0, 0.5, 4, preset='madnn.digits')
  mine = tables.Ours((4.0, 6.0), (0, 1), 120, 34.5, '1 x cpu', 'abc')
  text = tables.markdown(TABLE._replace(rows=(alone,)), [mine], 'cpu')
  assert '+3.00 [-9.71, +15.71]* |' in text  # t of 1 degree: 12.706
  assert text.startswith('a paper, Table 1: it; test error in %; paper: mean')
  assert text.endswith(
    '`python experiments/reproduce.py --table=madnn/1 --budget=cpu`; commits '
    'abc; ours: mean ± standard deviation over n splits; [ ]*: 95 % interval '
    '(Student) from the spread over our splits alone (labelled images, initial '
    "weights and order of the images); the paper's number is taken as exact; "
    'seconds: median over the splits\n'
  )
  text = tables.markdown(TABLE._replace(rows=(both,)), [mine], 'cpu')
  assert '(Welch), from the spread over our splits' in text
  assert '[ ]*' not in text
  medians = MEDIANS._replace(rows=(both,))
  text = tables.markdown(medians, [mine], 'paper')
  assert 'ours: median ± standard deviation' in text
  assert 'p: two-sided sign test' in text and '95 %' not in text


def test_our_number_is_taken_from_the_place_in_the_row():
  result = {
    'test_error': {'last': [4], 'averaged': [3]},
    'test_error_after': {'labelled': [9]},
    'arms': {'supervised': {'test_error': {'last': [7]}}},
  }
  taken = lambda take, look=None: tables.our_values(result, look, take)
  assert taken('last') == [4]
  assert taken('averaged') == [3]
  assert taken('after:labelled') == [9]
  assert taken('arm:supervised:last') == [7]
  probed = {'test_error': {'nearest': 1.5}}
  assert taken('probe:test_error.nearest', probed) == [1.5]
  assert taken('propagate:LS', {'accuracy': {'LS': [90, 80]}}) == [10, 20]


def stored(folder, preset, results):
  """Store results of a preset, one per split, as `reproduce.py` does."""
  run = runs.PresetRun(preset, ())
  store = runs.Store(folder / 'runs', folder / 'results')
  for seed, more in enumerate(results):
    entry = {'steps': 2, 'seconds': 11.0, 'test_error': {'last': [5.0]}} | more
    method = preset.split('.')[0]
    result = {'method': method, 'arms': {method: entry}, 'complete': True}
    result |= {'device': '1 x cpu', 'commit': 'abc'} | entry
    kept = store.result_folder(run, seed)
    kept.mkdir(parents=True)
    (kept / 'run.flags').write_text('\n'.join(run.lines) + '\n')
    (kept / 'result.json').write_text(json.dumps(result))
  return store


def test_a_stalled_split_does_not_change_the_seconds(tmp_path):
  # Five splits of which two stalled, as LLP's on digits once did.
  times = 11.0, 10.9, 700.0, 11.2, 750.0
  store = stored(tmp_path, 'llp.digits', [{'seconds': x} for x in times])
  row = tables.Row('LLP', preset='llp.digits', seeds=5)
  assert runs.ours(store, row, 'paper').seconds == 11.2


def test_the_smallest_error_is_taken_from_the_evaluations_of_the_run(tmp_path):
  preset = 'association.mnist-100'
  store = stored(tmp_path, preset, [{}, {}])
  run = runs.PresetRun(preset, ())
  for seed, errors in enumerate([(0.5, 4.0, 3.0, 5.0), (0.5, 2.0, 6.0, 5.0)]):
    stages = 'pretrain', *3 * ['associate']
    lines = [
      {'job': job, 'stage': stage, 'step': step, 'test_error_last': error}
      for job in ('supervised', 'association')
      for step, (stage, error) in enumerate(zip(stages, errors, strict=True))
    ]
    lines[3]['test_error_last'] = 1.0  # of the baseline
    lines.append({'job': 'association', 'stage': 'associate', 'loss': 0.1})
    text = '\n'.join(map(json.dumps, lines))
    (store.result_folder(run, seed) / 'metrics.jsonl').write_text(text)
  row = tables.Row('it', 1.0, preset=preset, take='minimum', seeds=2)
  assert runs.ours(store, row, 'paper').values == (3.0, 2.0)
  assert runs.ours(store, row._replace(take='last'), 'paper').values == (5, 5)


@pytest.mark.parametrize('cut', [1, 30, 120])
def test_the_smallest_error_is_not_taken_from_damaged_evaluations(
  cut, tmp_path
):
  preset = 'association.mnist-100'
  store = stored(tmp_path, preset, [{}])
  line = {'job': 'association', 'stage': 'associate', 'step': 1}
  text = '\n'.join(
    json.dumps(line | {'test_error_last': error}) for error in (3.0, 5.0)
  )
  path = store.result_folder(runs.PresetRun(preset, ()), 0) / 'metrics.jsonl'
  row = tables.Row('it', 1.0, preset=preset, take='minimum', seeds=1)
  path.write_text(text)
  assert runs.ours(store, row, 'paper').values == (3.0,)
  path.write_text(text[:-cut])
  with pytest.raises(InputError, match=r'metrics\.jsonl is damaged'):
    runs.ours(store, row, 'paper')


def test_association_reports_medians_at_the_end_and_the_smallest():
  table = tables.all_tables()['association/1']
  assert table.centre == 'median'
  takes = {}
  for row in table.rows:
    takes.setdefault(row.preset, []).append(row.take)
    assert row.n == 10
  assert takes == {
    f'association.mnist-{labels}': ['last', 'minimum']
    for labels in ('100', '1000', 'all')
  }
  # One run for both.
  assert len({runs.run_of(row) for row in table.rows}) == 3
  shown = [runs.run_of(row.at('cpu')) for row in table.rows if row.at('cpu')]
  assert len(shown) == 2 and len(set(shown)) == 1


def test_association_trains_the_source_as_section_4_says():
  rows = tables.all_tables()['association/5'].rows
  lines = {row.name: runs.run_of(row).lines for row in rows}
  assert '--pretrain_loss=association' in lines['source only']
  variants = [row for row in rows if row.flags]
  assert {row.flags for row in variants} == {('--pretrain_loss=supervised',)}
  assert [row.take for row in variants] == ['after:pretrain', 'minimum']


def test_the_copy_of_the_data_is_beside_the_number(tmp_path):
  jpeg = {'data_variant': 'CIFAR-10 (JPEG)'}
  preset = 'madnn.cifar10-4000'
  store = stored(tmp_path, preset, [jpeg, jpeg])
  row = tables.Row('CIFAR-10', 11.91, 0.22, 10, preset, seeds=2)
  mine = runs.ours(store, row, 'paper')
  assert mine.data == 'CIFAR-10 (JPEG)'
  table = TABLE._replace(rows=(row,))
  assert '| 5.00 ± 0.00 on CIFAR-10 (JPEG) | 2 |' in tables.markdown(
    table, [mine], 'paper'
  )
  read = list(csv.DictReader(io.StringIO(tables.as_csv(table, [mine]))))
  assert read[0]['data'] == 'CIFAR-10 (JPEG)'
  numbers = {(): [(table, row, 'paper')]}
  assert readme_tables.preset_cells(numbers, store)[2] == (
    'CIFAR-10: 5.00 ± 0.00 (2) on CIFAR-10 (JPEG)'
  )


def test_a_budgets_flags_follow_the_rows_or_replace_them_with_a_preset():
  row = tables.Row('', 1.0, preset='a.b', flags=('--x=1',))
  size = lambda **fields: row._replace(sizes={'cpu': fields}).at('cpu')
  assert row.at('cpu') is None and row.at('paper') == row
  assert size(flags=('--y=2',)).flags == ('--x=1', '--y=2')
  assert size(preset='a.c')[4:7] == ('a.c', ('--x=1',), 'last')
  assert size(preset='a.c', flags=())[4:6] == ('a.c', ())


def test_an_unknown_table_is_refused_by_name():
  with pytest.raises(InputError, match=r'^table=madnn/9: .*madnn/2'):
    tables.find('madnn/9', tables.all_tables(), 'table')
