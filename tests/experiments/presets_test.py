"""Every preset is a valid run of its method."""

import json
import re
from unittest import mock

import binary
import pytest

from ssljax import config
from ssljax.methods import madnn
from ssljax.runs import execute

PRESETS = sorted((binary.EXPERIMENTS / 'presets').glob('*.flags'))
# Flags that shorten the stages of a preset and need few labels per class.
SHORT = {
  'association': (
    '--batch_unlabelled=8',
    '--batch_per_class=1',
    '--pretrain=0',
    '--unlabelled=all',
    '--evaluate_every=2',
    '--nobaseline',
  ),
  # The small network has no dropout, which acquisition needs.
  'deepbass': (
    '--batch_unlabelled=8',
    '--iterations=0',
    '--acquire=none',
    '--train_split=train',
  ),
  'laplacenet': (
    '--batch_labelled=8',
    '--batch_unlabelled=8',
    '--pretrain=1',
    '--neighbours=2',
    '--nobaseline',
  ),
  'llp': (
    '--batch_labelled=8',
    '--batch_unlabelled=8',
    '--warm=1',
    '--negatives=8',
    '--neighbours=2',
    '--density_neighbours=2',
    '--unlabelled=all',
    '--nobaseline',
  ),
  'llp_fixmatch': (
    '--batch_labelled=8',
    '--batch_unlabelled=8',
    '--neighbours=2',
    '--density_neighbours=2',
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


def start(preset, sets, folder, *more):
  name = preset.stem.split('.')[0]
  # ConvLarge has its own test.
  size = ('--image_size=16',) if 'imagenet' in preset.stem else ()
  return binary.run(
    f'--flagfile={preset}',
    f'--data_dir={sets}',
    '--network=digits',
    '--labels=1',
    *size,
    *more,
    f'--workdir={folder}',
    binary=name,
  )


def shortened(preset):
  name = preset.stem.split('.')[0]
  usual = '--batch_labelled=8', '--batch_unlabelled=8', '--unlabelled=rest'
  return '--steps=2', '--seeds=1', *SHORT.get(name, usual)


def put_together(preset, sets, folder, *more):
  """The methods of a run that is stopped before training."""
  made = []

  def stop(run, folder, **more):
    del folder, more
    made.extend(run.methods)
    raise SystemExit

  with mock.patch.object(execute, 'train', stop):
    start(preset, sets, folder, *more)
  return made


@pytest.mark.parametrize('preset', PRESETS, ids=lambda p: p.stem)
def test_a_run_can_be_built_from_every_preset(preset, sets, tmp_path):
  header = preset.read_text()
  # The header states the paper's number and ours.
  assert re.search(r'^# +paper:', header, re.M), preset
  assert re.search(r'^# +ours:', header, re.M), preset
  methods = put_together(preset, sets, tmp_path / 'run', *shortened(preset))
  assert methods[-1].name == preset.stem.split('.')[0]


@pytest.mark.parametrize('preset', PRESETS, ids=lambda p: p.stem)
def test_every_preset_takes_two_steps(preset, sets, tmp_path, capsys):
  status = start(preset, sets, tmp_path / 'run', *shortened(preset))
  assert status == 0, capsys.readouterr().err
  result = json.loads((tmp_path / 'run/result.json').read_text())
  name = preset.stem.split('.')[0]
  assert result['steps'] == {'r2d2': 4, 'llp': 3, 'laplacenet': 3}.get(name, 2)
  assert result['method'] == name


def settings_of(name):
  """Return the flags of a preset by name."""
  path = binary.EXPERIMENTS / f'presets/{name}.flags'
  lines = [x for x in path.read_text().splitlines() if x.startswith('--')]
  return dict(line[2:].partition('=')[::2] for line in lines)


def test_r2d2_crops_and_standardizes_imagenet():
  # Images of ImageNet differ in size: without a crop their centres are used.
  found = settings_of('r2d2.imagenet-10')
  assert found['augment'] == 'crop,flip'
  assert found['preprocess'] == 'imagenet'


@pytest.mark.parametrize('name', ['cifar100-10000', 'svhn-1000'])
def test_r2d2_has_the_convlarge_of_pytorch_with_noise(name):
  found = settings_of(f'r2d2.{name}')
  assert found['network'] == 'convlarge_pytorch'
  flip = ['flip'] if name.startswith('cifar') else []
  assert found['augment'].split(',') == ['translate4', *flip, 'noise']


def test_the_docstring_of_madnn_lists_its_departures_and_addressing():
  said = ' '.join(madnn.__doc__.split())
  for departure in (
    'no weight norm, no noise, and images in [0, 1] without ZCA',
    'several times in a batch',
    'running averages of batch norm',
  ):
    assert departure in said
  names = {p.stem.split('.')[1] for p in PRESETS if p.stem[:6] == 'madnn.'}
  kind = lambda name: settings_of(f'madnn.{name}').get('distance', 'euclidean')
  euclidean = {name for name in names if kind(name) == 'euclidean'}
  assert euclidean == {'digits', 'digits-strong', 'mnist-100'}
  assert '`digits` and `mnist-100` have the Euclidean one' in said
  for name in names - euclidean:
    assert kind(name) == 'l1'
    # As in the paper's code: raw images and no noise.
    found = settings_of(f'madnn.{name}')
    assert 'noise' not in found['augment'] and 'preprocess' not in found


# Training images and images per batch of the last stage, which keeps the last
# batch of an epoch (CIFAR-10: ⌈50,000 / 512⌉ = 98).
LAST_STAGE = {
  'cifar10-4000': (50_000, 512),
  'cifar100-10000': (50_000, 128),
  'svhn-1000': (73_257, 128),
}


@pytest.mark.parametrize('name', LAST_STAGE)
def test_r2d2_ends_with_fifty_epochs_of_all_batches(name):
  images, batch = LAST_STAGE[name]
  found = {k: s.default for k, s in config.schema('r2d2')['parameters'].items()}
  found |= settings_of(f'r2d2.{name}')
  assert int(found['finetune']) == 50 * -(-images // batch)


OF_R2D2 = [preset for preset in PRESETS if preset.stem.startswith('r2d2.')]


@pytest.mark.parametrize('preset', OF_R2D2, ids=lambda p: p.stem)
def test_a_preset_of_r2d2_has_the_stages_of_its_column(preset, sets, tmp_path):
  # The data sets are small, but the stages keep their lengths.
  small = '--batch_labelled=8', '--batch_unlabelled=8', '--pretrain_batch=8'
  made = put_together(
    preset, sets, tmp_path / 'run', '--unlabelled=rest', *small
  )
  stages = {stage.name: stage for stage in made[0].stages}
  repeated = [n for n in stages if n.startswith('repeat')]
  column = preset.stem.split('-')[-1]
  assert len(repeated) == {'a': 0, 'b': 1}.get(column, 4)
  predicted = [stages[name].per_example is not None for name in repeated]
  assert predicted == [column not in 'bd'] * len(repeated)
  # In the paper's size the repetitions are as long as the decipher stage.
  ours = {'r2d2.digits', 'r2d2.mnist-1000', 'r2d2.cifar10-4000-cpu'}
  if repeated and preset.stem not in ours:
    length = sum(stages[name].steps for name in repeated)
    assert length == stages['decipher'].steps


# Presets of the paper; the one on digits is our own.
OF_DEEPBASS = [
  preset
  for preset in PRESETS
  if re.match(r'deepbass\.(mnist|yin)', preset.stem)
]
# Number of labels at the end of a run.
ENDS_WITH = {'yin-yang-8': 80, 'mnist-100': 300, 'mnist-1000': 1000}


@pytest.mark.parametrize('preset', OF_DEEPBASS, ids=lambda p: p.stem)
def test_a_preset_of_deepbass_has_the_schedule_of_its_paper(preset):
  lines = preset.read_text().splitlines()
  given = dict(line[2:].split('=') for line in lines if line.startswith('--'))
  number = lambda name: int(given[name])
  name = preset.stem.removeprefix('deepbass.')
  labels = number('labels') * (2 if name.startswith('yin') else 10)
  # A hundred epochs of twenty copies, in full batches of 256.
  assert number('steps') == 100 * -(-labels * 20 // 256)
  if number('iterations'):
    questions = -(-number('iterations') // number('query_every'))
    labels += questions * number('query_size')
    assert labels == ENDS_WITH[name.removesuffix('-cpu')]
