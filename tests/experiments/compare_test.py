import json
import pathlib
import re
import statistics
from unittest import mock

import binary
import numpy as np
import pytest

from ssljax.errors import InputError, require
from ssljax.experiments import compare
from ssljax.experiments.papers import paired

SET = frozenset(['a'])
ONE = paired.Outcome('madnn', 'mlp', {0: 3.0, 1: 5.0, 2: 4.0}, SET, 12.4)
ALONE = paired.Outcome('supervised', 'mlp', {0: 7.0, 1: 8.0, 2: 8.0}, SET, 3.0)


@pytest.fixture
def asked(tmp_path):
  """Run compare.py in this process; returns the commands that it called."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (60, 8, 8, 1), np.uint8)
  labels = np.arange(60) % 3
  np.savez(
    tmp_path / 'mine.npz',
    **dict(train=pixels, train_labels=labels),
    **dict(test=pixels[:30] // 2, test_labels=labels[:30]),
  )
  called = []

  def call(command, log=None):
    assert log is None  # shown
    called.append(command)
    program = pathlib.Path(command[1]).stem
    status = binary.run(*command[2:], binary=program)
    require(not status, f'{program}.py ended with status {status}')

  def ask(*more):
    command = compare.Command()
    rest = command.parse(
      ['compare.py', f'--folder={tmp_path}/runs', '--seeds=2', *more]
    )
    assert rest == ['compare.py']
    with mock.patch.object(paired, 'call', call):
      command.act()
    return called

  ask.folder, ask.data = tmp_path / 'runs', f'--dataset={tmp_path}/mine.npz'
  return ask


def test_methods_are_compared_with_the_baseline_of_their_network(asked, capsys):
  # The baseline has no such flag as --eta, and none is passed to it.
  given = asked.data, '--labels=4', '--steps=3', '--batch_unlabelled=8'
  given += ('--eta=0.3',)
  called = asked('--methods=madnn', *given)
  # Two splits of the method and of the baseline with the method's network.
  programs = [pathlib.Path(command[1]).stem for command in called]
  assert programs == ['madnn', 'madnn', 'supervised', 'supervised']
  assert all('--labels=4' in command for command in called)
  assert '--network=digits' in called[2]
  errors = {}
  for path in asked.folder.glob('*/seed-*/result.json'):
    result = json.loads(path.read_text())
    (errors[result['method'], result['seeds'][0]],) = result['test_error'][
      'averaged'
    ]
  difference = statistics.fmean(
    errors['madnn', seed] - errors['supervised', seed] for seed in (0, 1)
  )
  text = (asked.folder / 'comparison.md').read_text()
  (row,) = re.findall(r'^\| madnn \| digits \|.*$', text, re.M)
  assert f'| {difference:+.2f} [' in row and text in capsys.readouterr().out
  # The same command trains nothing; other data need another folder.
  page = asked.folder / 'page.html'
  asked('--methods=madnn', *given, f'--out={page}')
  assert len(called) == 4
  text = page.read_text()
  assert '>supervised-digits<' in text and text.count('<polyline') == 2
  with pytest.raises(InputError, match='holds a comparison with'):
    asked('--methods=madnn', '--labels=3', *given[:1])


def test_the_difference_is_paired_and_has_a_verdict():
  text = compare.markdown([(ONE, ALONE)], 'mine')
  # Differences −4, −3, −4: mean −3.67, standard deviation 0.577, and Student's
  # quantile 4.303 for two degrees of freedom: ± 1.43.
  assert '| madnn | mlp | 4.00 ± 1.00 | 7.67 ± 0.58 |' in text
  assert '| -3.67 [-5.10, -2.23] | better | 12 |' in text
  text = compare.markdown([(ALONE, ONE)], 'mine')
  assert '| +3.67 [+2.23, +5.10] | worse |' in text
  other = ONE._replace(errors={0: 6.0, 1: 9.5, 2: 7.6})
  assert '| no difference shown |' in compare.markdown([(other, ALONE)], 'm')


@pytest.mark.parametrize(
  ('given', 'words'),
  [
    ([], r'methods.*give some of'),
    (['--methods=madn'], r'methods.*madnn'),
    (['--methods=supervised'], r'methods=supervised.*leave it out'),
    (['--methods=madnn', '--seeds=0'], 'seeds'),
    (['--methods=madnn', '--workdir=x'], 'workdir.*leave it out'),
    (['--methods=madnn', '--nobaseline'], 'nobaseline.*leave it out'),
  ],
)
def test_a_comparison_that_cannot_work_is_refused(asked, given, words):
  with pytest.raises(InputError, match=words):
    asked(*given)


def test_a_program_that_fails_is_named(asked):
  with pytest.raises(InputError, match=r'madnn.py ended with status 2'):
    asked('--methods=madnn', asked.data, '--steps=0')


@pytest.mark.slow
def test_runs_on_changed_data_are_not_averaged(asked, tmp_path):
  given = '--methods=madnn', asked.data, '--labels=4', '--steps=2'
  asked(*given, '--seeds=1')
  arrays = dict(np.load(tmp_path / 'mine.npz'))
  arrays['test'] = arrays['test'][::-1]
  np.savez(tmp_path / 'mine.npz', **arrays)
  with pytest.raises(InputError, match='of different images'):
    asked(*given)


@pytest.mark.slow
def test_a_refused_command_does_not_claim_its_folder(asked):
  with pytest.raises(InputError, match='status 2'):
    asked('--methods=madnn', asked.data, '--steps=0')
  asked('--methods=madnn', '--seeds=1', asked.data, '--labels=4', '--steps=2')
  (asked.folder / 'compare.flags').write_bytes(b'\xff\xfe')
  with pytest.raises(InputError, match='damaged'):
    asked('--methods=madnn', '--seeds=1', asked.data, '--labels=4', '--steps=2')


def test_a_folder_without_a_name_is_one_for_each_set_of_flags(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  folders = {
    paired.as_name(given)
    for given in (
      [],
      ['--dataset=a.npz'],
      ['--dataset=b.npz'],
      ['--dataset=a.npz', '--labels=3'],
      [f'--augment={"translate:1," * 20}'],
      [f'--augment={"translate:2," * 20}'],
    )
  }
  assert len(folders) == 6 and 'digits' in folders
  assert all(len(name) < 120 and '/' not in name for name in folders)
  # The order of the flags and the place of the data decide no result.
  one = paired.as_name(['--eta=0.1', '--labels=3', '--data_dir=/here'])
  assert one == paired.as_name(['--labels=3', '--data_dir=/there', '--eta=0.1'])


@pytest.mark.slow
def test_splits_with_the_same_labels_are_said_to_be(asked):
  given = '--methods=madnn', asked.data, '--steps=2', '--batch_unlabelled=8'
  # The batch is of labelled images too: all images have a label.
  given += '--unlabelled=all', '--batch_labelled=8', '--network=digits'
  asked(*given, '--labels=all')
  text = (asked.folder / 'comparison.md').read_text()
  assert compare.SAME_LABELS in text.splitlines()[0]
  asked(*given, '--labels=4', f'--folder={asked.folder}-4')
  other = asked.folder.with_name('runs-4') / 'comparison.md'
  assert compare.SAME_LABELS not in other.read_text()


@pytest.mark.slow
def test_splits_of_one_run_have_the_errors_of_runs_of_their_own(asked):
  given = '--methods=madnn', asked.data, '--steps=2', '--labels=4'
  asked(*given)
  called = asked(*given, '--seeds_per_run=2', f'--folder={asked.folder}-2')
  assert len(called) == 4 + 2
  together = asked.folder.with_name('runs-2')
  errors = [
    json.loads((folder / 'result.json').read_text())['test_error']['averaged']
    for folder in (
      *(asked.folder / 'madnn' / f'seed-{seed}' for seed in (0, 1)),
      together / 'madnn' / 'seed-0-1',
    )
  ]
  assert errors[0] + errors[1] == errors[2]
