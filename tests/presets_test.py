import json
import re

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
