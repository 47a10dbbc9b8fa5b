"""Comparisons of finished runs, which are written here and never trained."""

import json
import statistics

import pytest

from ssljax import config
from ssljax.errors import InputError
from ssljax.experiments import compare
from ssljax.experiments.papers import finished

COUNTS = [[3, 1], [4, 2], [4, 2]]  # right, all, predicted: recalls 3/4 and 1/2


def write(folder, method='madnn', errors=(4.0, 6.5), first=0, **changes):
  """Write the folder of a run; return its path as a text."""
  seeds = list(range(first, first + len(errors)))
  folder.mkdir()
  made = config.from_values(
    method,
    {'steps': 4, 'epochs': None, 'seed': first, 'seeds': len(seeds)},
  )
  (folder / 'config.json').write_text(json.dumps(config.to_json(made)))
  table = {'counts': [COUNTS] * len(seeds)}
  table['seeds'] = [{'accuracy': 4 / 6, 'balanced_accuracy': 0.625}] * len(
    seeds
  )
  entry = {
    'steps': 4,
    'seconds': 3.0 * len(seeds),
    'test_error': {'last': list(errors)},
    'test_classes': {'last': table},
  }
  result = {
    'method': method,
    'dataset': 'digits',
    'data_fingerprint': 'a',
    'labels': '10',
    'seeds': seeds,
    'splits': [f'split {seed}' for seed in seeds],
    'complete': True,
    'device': '1 x cpu',
    'commit': 'c0',
    'command': 'x',
    'versions': {},
    'arms': {method: entry},
  }
  result |= entry | changes
  (folder / 'result.json').write_text(json.dumps(result))
  lines = [
    {
      'job': method,
      'step': step,
      'seed': seed,
      'test_error_last': error + 8 / step,
    }
    for seed, error in zip(seeds, errors, strict=True)
    for step in (2, 4)
  ]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text)
  return str(folder)


def command(*given):
  made = compare.Command()
  assert made.parse(['compare.py', *given]) == ['compare.py']
  return made


def test_runs_are_compared_over_the_seeds_that_they_share(tmp_path, capsys):
  one = write(tmp_path / 'one', errors=(4.0, 6.5))
  # Seeds 1 to 3, of which the first run has only seed 1, and seeds 0 to 2.
  late = write(tmp_path / 'late', 'supervised', (9.0, 9.0, 9.0), first=1)
  other = write(tmp_path / 'other', 'supervised', (5.0, 9.0, 1.0))
  out = tmp_path / 'compare.html'
  command(one, late, other, f'--out={out}').act()
  printed = capsys.readouterr().out
  # Differences 1.0 and 2.5: Student's quantile of one degree is 12.706.
  half = 12.706 * statistics.stdev([1.0, 2.5]) / 2**0.5
  wanted = f'+1.75 [{1.75 - half:+.2f}, {1.75 + half:+.2f}], 2 splits'
  assert wanted in printed and '+2.50' in printed
  assert '62.50 ± 0.00' in printed and 'no difference shown' in printed
  page = out.read_text()
  assert wanted.split(',')[0] in page and page.count('<polyline') == 3
  # It needs no network and no script.
  assert 'http' not in page and '<script' not in page


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    (
      {'dataset': 'mnist', 'data_fingerprint': 'b'},
      'of mnist, .*one of digits',
    ),
    ({'data_fingerprint': 'b'}, 'with other images'),
    (
      {'splits': ['split 0', 'x'], 'labels': '5'},
      'seed 1 .labels=5. is another',
    ),
    ({'complete': False}, 'two: is not finished'),
    ({'test_error': {}}, 'no images in common'),
  ],
)
def test_runs_that_differ_in_more_than_settings_are_refused(
  tmp_path, changes, words
):
  one = write(tmp_path / 'one')
  two = write(tmp_path / 'two', **changes)
  with pytest.raises(InputError, match=words):
    command(one, two).act()


def test_runs_without_a_seed_in_common_or_a_second_run_are_refused(tmp_path):
  one, two = write(tmp_path / 'one'), write(tmp_path / 'two', first=7)
  with pytest.raises(InputError, match=r'two: has the seeds 7,8, .*one 0,1'):
    command(one, two).act()
  for given, words in (
    ([one], 'one run: give the folders of at least two'),
    ([one, one], 'names a run twice'),
    ([one, str(tmp_path)], 'holds no run'),
    ([one, two, '--seeds=3'], '--seeds: is for a comparison that trains'),
    ([one, two, '--eta=0.1'], '--eta=0.1: is for a comparison that trains'),
  ):
    with pytest.raises(InputError, match=words):
      command(*given).act()


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
  paths = [tmp_path / part / 'run' for part in ('a', 'b')]
  assert finished._names(paths) == ['a/run', 'b/run']
