import json
import re
from unittest import mock

import assembly
import binary
import pytest

PRESETS = sorted((binary.EXPERIMENTS / 'presets').glob('*.flags'))


@pytest.mark.parametrize('preset', PRESETS, ids=lambda p: p.stem)
def test_every_preset_parses_and_takes_two_steps(
  preset, sets, tmp_path, capsys
):
  name = preset.stem.split('.')[0]
  header = preset.read_text()
  # Its header says what the paper has and what was measured here.
  assert re.search(r'^# +paper:', header, re.M), preset
  assert re.search(r'^# +ours:', header, re.M), preset
  small = ('--network=digits',)  # ConvLarge is compiled in its own test
  own = {
    'association': (
      '--batch_unlabelled=8',
      '--batch_per_class=1',
      '--pretrain=0',
      '--unlabelled=all',
      '--evaluate_every=2',
      '--nobaseline',
    ),
    'r2d2': (
      '--pretrain=1',
      '--pretrain_batch=4',
      '--batch_labelled=8',
      '--batch_unlabelled=8',
      '--unlabelled=rest',
      '--repeat=0',
      '--finetune=1',
    ),
  }
  if 'imagenet' in preset.stem:
    small += ('--image_size=16',)
  status = binary.run(
    f'--flagfile={preset}',
    f'--data_dir={sets}',
    *small,
    '--steps=2',
    '--labels=1',
    '--seeds=1',
    *own.get(name, ('--batch_labelled=8', '--batch_unlabelled=8')),
    f'--workdir={tmp_path}/run',
    binary=name,
  )
  assert status == 0, capsys.readouterr().err
  result = json.loads((tmp_path / 'run/result.json').read_text())
  assert result['steps'] == {'r2d2': 4}.get(name, 2)
  assert result['method'] == name


OF_R2D2 = [preset for preset in PRESETS if preset.stem.startswith('r2d2.')]


@pytest.mark.parametrize('preset', OF_R2D2, ids=lambda p: p.stem)
def test_a_preset_of_r2d2_has_the_stages_of_its_column(preset, sets, tmp_path):
  made = []

  def stop(run, folder):
    del folder
    made.extend(run.methods)
    raise SystemExit

  with mock.patch.object(assembly, 'train_all', stop):
    binary.run(
      f'--flagfile={preset}',
      f'--data_dir={sets}',
      # The sets are small, and so are their images; nothing is trained.
      '--network=digits',
      '--labels=1',
      '--unlabelled=rest',
      '--batch_labelled=8',
      '--batch_unlabelled=8',
      '--pretrain_batch=8',
      *(['--image_size=16'] if 'imagenet' in preset.stem else []),
      f'--workdir={tmp_path}/run',
      binary='r2d2',
    )
  stages = {stage.name: stage for stage in made[0].stages}
  repeated = [n for n in stages if n.startswith('repeat')]
  column = preset.stem.split('-')[-1]
  assert len(repeated) == {'a': 0, 'b': 1}.get(column, 4)
  predicted = [stages[name].observe is not None for name in repeated]
  assert predicted == [column not in 'bd'] * len(repeated)
  # Those of the paper's size repeat for as long as they deciphered.
  ours = {'r2d2.digits', 'r2d2.mnist-1000', 'r2d2.cifar10-4000-cpu'}
  if repeated and preset.stem not in ours:
    length = sum(stages[name].steps for name in repeated)
    assert length == stages['decipher'].steps
