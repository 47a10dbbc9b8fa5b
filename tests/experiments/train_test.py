"""`train.py` trains any method by its name."""

import json

import binary
import pytest

from ssljax import registry

SHORT = '--steps=2', '--seeds=1', '--batch_labelled=8', '--batch_unlabelled=8'


def test_a_method_must_be_chosen(capsys):
  line = binary.refused(capsys, *SHORT, binary='train')
  assert line.startswith('train: --method: give one of supervised, madnn,')
  assert set(registry.METHODS) <= set(line.replace(',', ' ').split())


def test_an_unknown_method_is_named_with_the_nearest_ones(capsys):
  line = binary.refused(capsys, '--method=fixmach', binary='train')
  assert '--method=fixmach' in line and 'fixmatch' in line


@pytest.mark.parametrize('name', ['fixmatch', 'madnn'])
def test_it_is_the_program_of_the_method(name, tmp_path):
  lines = []
  for program, more in ((name, ()), ('train', [f'--method={name}'])):
    folder = tmp_path / program
    given = *SHORT, f'--workdir={folder}'
    assert binary.run(*more, *given, binary=program) == 0
    result = json.loads((folder / 'result.json').read_text())
    assert result['complete'] and result['method'] == name
    config = json.loads((folder / 'config.json').read_text())
    lines.append(str(config).replace(str(folder), ''))
  assert lines[0] == lines[1]


def test_a_strong_augmentation_that_the_images_cannot_have_is_named(
  capsys, tmp_path
):
  flags = '--method=fixmatch', '--strong_augment=cutout'  # of 16 pixels
  where = f'--workdir={tmp_path / "run"}'
  line = binary.refused(capsys, *SHORT, *flags, where, binary='train')
  assert '--strong_augment: ' in line and '8x8 pixels' in line


def test_a_flag_of_the_method_is_known(tmp_path):
  folder = tmp_path / 'run'
  flags = '--method=fixmatch', '--threshold=0.7', f'--workdir={folder}'
  assert binary.run(*SHORT, *flags, '--nobaseline', binary='train') == 0
  assert '--threshold=0.7' in (folder / 'flags.txt').read_text().splitlines()


@pytest.mark.parametrize(
  ('flags', 'expected'),
  [
    (['--method=auto'], 'suits data of your own'),
    (['--method=auto', '--dataset=x', '--overwrite'], 'takes neither --over'),
    (['--method=madnn', '--minutes=3', '--steps=2'], 'leave --steps out'),
    (['--method=madnn', '--minutes=0'], '--minutes=0.0: give a number above 0'),
  ],
)
def test_a_choice_or_a_budget_that_cannot_be_is_one_line(
  capsys, flags, expected
):
  assert expected in binary.refused(capsys, *flags, binary='train')
