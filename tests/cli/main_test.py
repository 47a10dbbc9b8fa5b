import json
import re
import subprocess
import sys
from unittest import mock

import binary
from contract_test import lines
import fake_tfds
import jax
import numpy as np
import pytest

from ssljax import config, registry, signatures
from ssljax.cli import main
from ssljax.distributed import placement
from ssljax.methods.madnn import madnn
from ssljax.optimizers import optimizer
from ssljax.training import loop as loop_lib

EXPERIMENTS = binary.EXPERIMENTS
# Compiles in a second.
TINY = ('--network=digits', '--batch_labelled=8', '--batch_unlabelled=8')
SHORT = (*TINY, '--steps=4', '--seeds=2', '--evaluate_every=2')


def test_a_run_leaves_what_the_contract_names(tmp_path, capsys):
  folder = tmp_path / 'run'
  assert binary.run(*SHORT, f'--workdir={folder}') == 0
  out = capsys.readouterr().out
  assert '1197 seen as unlabelled (without the labelled ones)' in out
  assert str(folder) in out
  result = json.loads((folder / 'result.json').read_text())
  assert result['method'] == 'madnn' and result['dataset'] == 'digits'
  assert result['labels'] == '10' and result['seeds'] == [0, 1]
  assert result['steps'] == 4 and result['complete'] is True
  for key in ('seconds', 'device', 'versions', 'commit', 'command'):
    assert result[key]
  for arm in ('supervised', 'madnn'):
    errors = result['arms'][arm]['test_error']
    assert set(errors) == {'last', 'median_last', 'averaged'}
    assert all(len(v) == 2 for v in errors.values())
    row = re.search(rf'^{arm} +([\d.]+) ± ([\d.]+)', out, re.M)
    last = errors['last']
    assert float(row[1]) == pytest.approx(np.mean(last), abs=0.006)
    assert float(row[2]) == pytest.approx(np.std(last, ddof=1), abs=0.006)
  split = json.loads((folder / 'split.json').read_text())
  assert [len(s['labelled']) for s in split['splits']] == [100, 100]
  assert split['splits'][0]['hash'] == result['splits'][0]
  metrics = (folder / 'metrics.jsonl').read_text().splitlines()
  assert {json.loads(m)['seed'] for m in metrics} == {0, 1}
  assert list(folder.glob('checkpoints/madnn/seed-1/4'))
  assert list(folder.glob('events/madnn/seed-0/*tfevents*'))

  # Again: it says that it is complete, and changes nothing.
  before = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
  assert binary.run(*SHORT, f'--workdir={folder}') == 0
  again = capsys.readouterr().out
  assert 'complete' in again and out.split('test error')[1] in again
  assert before == {p: p.stat().st_mtime_ns for p in folder.rglob('*')}

  # Other flags: refused by name, nothing changed.
  line = binary.refused(capsys, *SHORT, f'--workdir={folder}', '--eta=0.3')
  assert '--eta=0.5 there, --eta=0.3 here' in line and '--overwrite' in line
  assert before == {p: p.stat().st_mtime_ns for p in folder.rglob('*')}

  # Its flags.txt is a --flagfile that runs the same again.
  assert (
    binary.run(f'--flagfile={folder}/flags.txt', f'--workdir={tmp_path}/2') == 0
  )
  same = json.loads((tmp_path / '2' / 'result.json').read_text())
  assert same['test_error'] == result['test_error']

  # Only --overwrite starts anew, and leaves a stranger's file alone.
  (folder / 'notes.md').write_text('mine')
  assert (
    binary.run(
      *SHORT, f'--workdir={folder}', '--eta=0.3', '--overwrite', '--steps=2'
    )
    == 0
  )
  assert json.loads((folder / 'result.json').read_text())['steps'] == 2
  assert (folder / 'notes.md').read_text() == 'mine'


def write_npz(path, images, side=8):
  """Write a data set of two classes, of random images."""
  rng = np.random.default_rng(5)
  pixels = rng.integers(0, 256, (images, side, side, 1), np.uint8)
  labels = np.arange(images) % 2
  np.savez(
    path,
    train=pixels,
    train_labels=labels,
    test=pixels[:9] // 2,
    test_labels=labels[:9],
  )


def test_the_settings_of_a_named_data_set_suit_its_images(tmp_path, capsys):
  write_npz(tmp_path / 'mine.npz', images=90)
  where = f'--workdir={tmp_path}/run', f'--dataset={tmp_path}/mine.npz'
  assert binary.run(*where, '--labels=7', '--steps=3', '--seeds=1') == 0
  out = capsys.readouterr().out
  # 14 labelled images and 76 others: batches of 14 and 50.
  said = re.search('^settings for this data: (.*)', out, re.M)[1].split()
  assert {'--batch_labelled=14', '--batch_unlabelled=50'} <= set(said)
  assert '--network=digits' in said and '--steps=3' not in said
  found = config.read((tmp_path / 'run/config.json').read_text())
  assert found.batch.batch_labelled == 14 and found.split.labels == '7'
  assert found.run.steps == 3
  # The same command finds its run, complete.
  assert binary.run(*where, '--labels=7', '--steps=3', '--seeds=1') == 0
  assert 'holds this run, complete' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('arguments', 'named'),
  [
    ([], False),
    (['--dataset=digits'], False),
    (['--steps=3', '--dataset=mnist'], True),
    (['--dataset', 'mnist'], True),
    (['--dataset', 'digits'], False),
    (['--dataset=digits', '--dataset=mnist'], True),
    (['--source=mnist', '--target=digits'], True),
  ],
)
def test_only_another_data_set_replaces_the_digits_preset(arguments, named):
  command = main.MethodCommand('llp')
  command.parse(['llp.py', *arguments])
  assert command.fits_data == named
  assert (command.preset is None) == named
  given = command.given()
  assert ('warm' in given) != named


@pytest.mark.slow
def test_seeds_at_once_changes_no_result(tmp_path):
  for at_once in (1, 2):
    folder = tmp_path / str(at_once)
    binary.run(*SHORT, f'--workdir={folder}', f'--seeds_at_once={at_once}')
  one, two = (
    json.loads((tmp_path / n / 'result.json').read_text()) for n in '12'
  )
  assert one['test_error'] == two['test_error']


def test_epochs_are_passes_over_the_unlabelled_images(tmp_path):
  # 1197 unlabelled images in batches of 399: half an epoch is 1.5 steps.
  binary.run(
    *TINY,
    '--batch_unlabelled=399',
    '--epochs=0.7',
    '--seeds=1',
    '--nobaseline',
    f'--workdir={tmp_path}/run',
  )
  assert json.loads((tmp_path / 'run/result.json').read_text())['steps'] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
  'network', ['convlarge', 'convlarge_weightnorm', 'convlarge_pytorch']
)
def test_convlarge_takes_a_step_from_the_command_line(
  network, tmp_path, capsys
):
  # 9×9 is the smallest image it takes.
  status = binary.run(
    f'--network={network}',
    '--image_size=9',
    '--steps=1',
    '--labels=1',
    '--batch_labelled=8',
    '--seeds=1',
    f'--workdir={tmp_path}/run',
    binary='supervised',
  )
  assert status == 0, capsys.readouterr().err


@pytest.mark.slow
def test_both_feeds_train_alike_from_the_command_line(sets, tmp_path):
  losses = []
  for feed in ('resident', 'stream'):
    folder = tmp_path / feed
    assert (
      binary.run(
        *TINY,
        '--nobaseline',
        '--dataset=cifar10',
        f'--data_dir={sets}',
        '--labels=1',
        '--steps=3',
        '--seeds=1',
        '--record_every=1',
        f'--feed={feed}',
        '--augment=crop,grey,jitter,flip,translate',
        '--preprocess=standardize',
        f'--workdir={folder}',
      )
      == 0
    )
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    losses.append([m['loss'] for m in map(json.loads, lines) if 'loss' in m])
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_flag_of_a_hyper_parameter_comes_from_the_signature():
  assert set(signatures.keywords(madnn)) == {
    'eta',
    'weight',
    'distance',
    'model_entropy',
    'divergence',
    'values',
    'smoothing',
    'strong_augment',
  }
  for factory in (madnn, optimizer):
    texts = signatures.argument_help(factory)
    assert set(signatures.keywords(factory)) <= set(texts)
  assert signatures.argument_help(madnn)['eta'].startswith('η of Eq. 3')


def test_help_groups_the_flags_and_shows_the_defaults_in_use():
  # The real script, as a user would ask it.
  shown = subprocess.run(
    [sys.executable, EXPERIMENTS / 'madnn.py', '--help'],
    capture_output=True,
    text=True,
    timeout=300,
  ).stdout
  assert '--eta:' in shown and "(default: '0.5')" in shown
  # By part; the defaults are those of this command, with its digits preset.
  assert shown.index('flags:') < shown.index('Method:') < shown.index('--eta')
  assert re.search(r"--steps:\n.*default: '600'", shown)
  assert 'absl' not in shown


BAD = {
  '--dataset=mnits': '--dataset',
  '--dataset=mnist': '--data_dir',
  '--dataset=mnist --data_dir=/nonexistent': '--data_dir',
  '--dataset=mnist --data_dir={empty}': '--data_dir',
  '--labels=500': '--labels=500',
  '--labels=0': '--labels=0',
  '--labels=-1': '--labels=-1',
  '--labels=many': '--labels=many',
  '--labels=all': '--unlabelled=all',
  '--unlabelled=2000': '--unlabelled=2000',
  '--validation=5000': '--validation=5000',
  '--batch_labelled=101': '--batch_labelled=101',
  '--batch_unlabelled=5000': '--batch_unlabelled=5000',
  '--batch_labelled=0': '--batch_labelled=0',
  '--learning_rate=0': '--learning_rate=0',
  '--learning_rate=-1': '--learning_rate=-1',
  '--learning_rate=nan': '--learning_rate=nan',
  '--eta=0': '--eta=0',
  '--eta=nan': '--eta=nan',
  '--weight=-1': '--weight=-1',
  '--smoothing=1': '--smoothing=1',
  '--momentum=nan': '--momentum=nan',
  '--weight_decay=-1': '--weight_decay=-1',
  '--clip=-2': '--clip=-2',
  '--average=1': '--average=1',
  '--dropout=1': '--dropout=1',
  '--bn_momentum=nan': '--bn_momentum=nan',
  '--steps=0': '--steps=0',
  '--steps=-5': '--steps=-5',
  '--epochs=nan': '--epochs=nan',
  '--steps=5 --epochs=2': '--steps, --epochs',
  '--seeds=0': '--seeds=0',
  '--seed=-1': '--seed=-1',
  '--seed=4294967296': '--seed',
  '--seeds_at_once=0': '--seeds_at_once=0',
  '--evaluate_every=0': '--evaluate_every=0',
  '--network=convlarge': '--network',
  '--network=resnet': '--network',
  '--augment=spin': '--augment=spin',
  '--eat=3': 'eat',
  '--eta=much': 'eta',
  'madnn': 'is not a flag',
  '--flagfile=/nonexistent.flags': 'nonexistent.flags',
}


BAD_ASSOCIATION = {
  '--batch_per_class=0': '--batch_per_class=0',
  '--batch_per_class=-3': '--batch_per_class=-3',
  '--batch_unlabelled=0': '--batch_unlabelled=0',
  '--visit=-1': '--visit=-1',
  '--walker=nan': '--walker=nan',
  '--similarity=cosine': 'similarity',
  '--pretrain=-1': '--pretrain=-1',
  '--associate_rate=0': '--associate_rate=0',
  '--decay=steps': '--decay_at',
  '--decay=steps --decay_at=-5': '--decay_at=-5',
  '--decay=steps --decay_at=3000000000': '--decay_at=3000000000',
  '--batch_labelled=5': '--batch_per_class=10',
  '--unlabelled=0': 'supervised.py',
  '--source=digits --target=digits': '--target=digits',
  '--decay_at=10,20': '--decay_at',
  '--decay_at=soon --decay=steps': 'decay_at',
  '--unlabelled=all:9999': '--unlabelled=all:9999',
  '--unlabelled=some:3': '--unlabelled=some:3',
  '--network=elu_stl10': '--network',
  '--dropout=0.5': '--dropout',
  '--source=digits': '--source, --target',
  '--source=digits --target=mnits': '--target=mnits',
  '--source=mnits --target=digits': '--source=mnits',
}


@pytest.mark.parametrize('arguments', BAD_ASSOCIATION)
def test_bad_input_of_association_is_one_line_that_names_the_flag(
  arguments, tmp_path, capsys
):
  folder = tmp_path / 'run'
  line = binary.refused(
    capsys, *arguments.split(), f'--workdir={folder}', binary='association'
  )
  assert BAD_ASSOCIATION[arguments] in line
  assert not folder.exists()


def test_classes_that_differ_between_source_and_target_are_refused(
  sets, tmp_path, capsys
):
  line = binary.refused(
    capsys,
    '--source=cifar10',
    '--target=cifar100',
    f'--data_dir={sets}',
    f'--workdir={tmp_path}/run',
    binary='association',
  )
  assert '--target=cifar100' in line and '--source=cifar10' in line


def adapt(folder, sets, *more):
  """A short adaptation from digits; what was measured, and the result."""
  status = binary.run(
    '--source=digits',
    '--target=mnist',
    f'--data_dir={sets}',
    '--labels=all',
    '--batch_per_class=1',
    '--batch_unlabelled=10',
    '--network=digits',
    '--image_size=8',
    '--pretrain=2',
    '--steps=2',
    '--seeds=1',
    '--nobaseline',
    '--record_every=1',
    '--report_minimum',
    *more,
    f'--workdir={folder}',
    binary='association',
  )
  assert status == 0
  return json.loads((folder / 'result.json').read_text())


@pytest.mark.slow
def test_association_begins_with_its_papers_constants(tmp_path, capsys):
  folder = tmp_path / 'run'
  binary.run(f'--workdir={folder}', '--steps=1', binary='association')
  said = (folder / 'flags.txt').read_text().split()
  for flag in (
    '--batch_per_class=10',
    '--batch_unlabelled=100',
    '--unlabelled=all',
    '--optimizer=adam',
    '--learning_rate=0.001',
    '--momentum=0.9',
    '--decay=constant',
    '--clip=0.0',
    '--average=0.0',
    '--walker=1.0',
    '--visit=1.0',
    '--logit=1.0',
    '--similarity=dot',
  ):
    assert flag in said, flag
  # Said once: the size of the labelled part is that of each class.
  assert not any(flag.startswith('--batch_labelled') for flag in said)


BAD_R2D2 = [
  (['--alpha=0.03'], '--alpha=0.03, --beta=0.03: .* --force'),
  (['--pretrain=0'], '--pretrain=0'),
  (['--steps=0'], '--steps=0'),
  (['--finetune=0'], '--finetune=0'),
  (['--repeat=4', '--interval=5'], '--interval=5: .* --repeat=4 '),
  (['--cutout=8'], '--cutout: a square of 8 pixels can cover a whole image'),
  (['--pretrain_batch=101'], '--pretrain_batch=101 is larger than the 100 '),
  (['--batch_unlabelled=1198'], '--batch_unlabelled=1198'),
  (['--batch_labelled=0'], '--batch_labelled=0'),
  (['--divergence=js'], '--divergence'),
  (['--cutout=-1'], '--cutout=-1'),
  (['--labels=all'], '--batch_unlabelled'),
]


@pytest.mark.parametrize(('arguments', 'expected'), BAD_R2D2)
def test_bad_input_of_r2d2_is_one_line_that_names_the_flag(
  arguments, expected, tmp_path, capsys
):
  folder = tmp_path / 'run'
  where = '--network=digits', f'--workdir={folder}'
  line = binary.refused(capsys, *where, *arguments, binary='r2d2')
  assert re.search(expected, line), line
  assert not folder.exists()


BAD_LLP = [
  (['--neighbours=101'], '--neighbours=101: there are 100 labelled images'),
  (['--density_neighbours=1298'], '--density_neighbours=1298: .* 1297 images'),
  (['--temperature=0'], '--temperature=0'),
  (['--bank_momentum=1'], '--bank_momentum=1'),
  (['--warm=-1'], '--warm=-1'),
  (['--bank_dtype=int8'], '--bank_dtype'),
  (['--pseudo_labels=oracle'], '--pseudo_labels'),
]


@pytest.mark.parametrize(('arguments', 'expected'), BAD_LLP)
def test_bad_input_of_llp_is_one_line_that_names_the_flag(
  arguments, expected, tmp_path, capsys
):
  folder = tmp_path / 'run'
  line = binary.refused(capsys, f'--workdir={folder}', *arguments, binary='llp')
  assert re.search(expected, line), line
  assert not folder.exists()


POINTS = '--dataset=yin-yang', '--network=deepbass_toy', '--labels=4'


@pytest.mark.parametrize('feed', ['resident', 'stream'])
def test_points_are_trained_on_from_the_command_line(feed, tmp_path):
  folder = tmp_path / 'run'
  short = (
    f'--feed={feed}',
    '--steps=200',
    '--seeds=1',
    '--batch_labelled=8',
    '--learning_rate=0.05',
  )
  where = *POINTS, *short, f'--workdir={folder}'
  assert binary.run(*where, binary='supervised') == 0
  result = json.loads((folder / 'result.json').read_text())
  # A line through the middle is wrong about a quarter of both classes at most.
  assert result['test_error']['last'][0] < 35


@pytest.mark.parametrize(
  ('binary_name', 'arguments', 'expected'),
  [
    ('madnn', ['--augment=flip,noise'], '--augment=flip,noise: .* features'),
    ('madnn', ['--preprocess=zca'], '--preprocess=zca: .* --preprocess=none'),
    ('madnn', ['--image_size=8'], '--image_size=8: .* features, not images'),
    ('madnn', ['--train_split=all'], '--train_split=all.*train, test'),
    ('madnn', ['--network=convlarge'], '--network'),
    (
      'r2d2',
      ['--preprocess=none', '--augment=', '--cutout=2'],
      'yin-yang: holds features.*--cutout=0',
    ),
  ],
)
def test_what_is_of_images_is_refused_of_points(
  binary_name, arguments, expected, tmp_path, capsys
):
  folder = tmp_path / 'run'
  few = '--batch_labelled=8', '--batch_unlabelled=8', f'--workdir={folder}'
  more = ('--pretrain_batch=8',) if binary_name == 'r2d2' else ()
  where = *POINTS, *few, *more, *arguments
  line = binary.refused(capsys, *where, binary=binary_name)
  assert re.search(expected, line), line
  assert not folder.exists()


def test_a_bank_that_does_not_fit_is_refused_in_bytes_per_device(
  tmp_path, capsys
):
  with mock.patch.object(placement, 'device_bytes', lambda: 2**14):
    line = binary.refused(
      capsys, f'--workdir={tmp_path}/run', '--nobaseline', binary='llp'
    )
  need = int(re.search(r'the state of llp needs (\d+) bytes', line)[1])
  # N = 1297 is 1536 in use or not: rows of D = 8, two labels, a confidence; 256
  # labelled rows again, with a density, a number and a class.
  bank = 1536 * (8 + 3) + 256 * (8 + 3)
  with binary.small():
    net, image = registry.NETWORKS['digits_heads'](10), np.zeros([1, 8, 8, 1])
  params, stats = jax.eval_shape(net.init, jax.random.key(0), image)
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  # Weights and their momenta; a few numbers more, as the step's.
  rest = 2 * count(params) + count(stats)
  assert 4 * (bank + rest) <= need <= 4 * (bank + rest) + 64
  assert 'on each of 1 devices' in line and 'a device has 16384' in line
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_the_decay_of_r2d2_is_of_its_second_stage(tmp_path, capsys):
  short = '--pretrain=2', '--steps=2', '--repeat=0', '--finetune=2', '--seeds=1'
  where = f'--workdir={tmp_path}/run', '--network=digits'
  decay = '--decay=steps', '--decay_at=1', '--force', '--alpha=0.02'
  status = binary.run(*where, *short, *decay, binary='r2d2')
  assert status == 0, capsys.readouterr().err
  result = json.loads((tmp_path / 'run/result.json').read_text())
  assert list(result['test_error_after']) == [
    'supervised',
    'decipher',
    'finetune',
  ]


@pytest.mark.parametrize(('network', 'size'), [('elu_svhn', 8)])
def test_the_papers_networks_train_from_the_command_line(
  network, size, tmp_path, capsys
):
  status = binary.run(
    f'--network={network}',
    f'--image_size={size}',
    '--batch_per_class=1',
    '--batch_unlabelled=10',
    '--steps=1',
    '--seeds=1',
    '--nobaseline',
    f'--workdir={tmp_path}/run',
    binary='association',
  )
  assert status == 0, capsys.readouterr().err


@pytest.mark.slow
def test_the_network_of_svhn_normalises_its_images():
  net = registry.NETWORKS['elu_svhn'](10)
  image = np.random.default_rng(0).random((1, 8, 8, 3)).astype(np.float32)
  params, stats = net.init(jax.random.key(0), image)
  plain, brighter, flatter = (
    net.infer(params, stats, x).logits for x in (image, image + 0.1, image / 2)
  )
  # A shift changes nothing. Half the contrast, divided by the variance, is
  # twice as much: the authors take no root.
  np.testing.assert_allclose(brighter, plain, rtol=1e-3, atol=1e-5)
  assert not np.allclose(flatter, plain, rtol=1e-3)


@pytest.mark.parametrize(
  ('value', 'expected'),
  [
    ('rest', ('rest', None)),
    ('all', ('all', None)),
    ('20', ('rest', 20)),
    ('all:20', ('all', 20)),
  ],
)
def test_the_unlabelled_pool_is_a_word_and_a_number(value, expected):
  assert config.pool('unlabelled', value) == expected


@pytest.mark.slow
def test_adaptation_streams_holds_out_and_trains_seeds_at_once(sets, tmp_path):
  result = adapt(
    tmp_path / 'run',
    sets,
    '--seeds=2',
    '--seeds_at_once=2',
    '--feed=stream',
    '--validation=20',
  )
  assert len(result['test_error']['last']) == 2
  split = json.loads((tmp_path / 'run/split.json').read_text())
  for drawn in split['splits']:
    assert len(drawn['validation']) == 20
    assert max(drawn['validation']) < 1297  # of the source


def test_adaptation_reports_the_target_before_and_after(sets, tmp_path, capsys):
  result = adapt(tmp_path / 'run', sets)
  out = capsys.readouterr().out
  assert 'digits-mnist: 1377 training images 8x8x1' in out
  assert '80 seen as unlabelled (without the labelled ones)' in out
  after = result['test_error_after']
  assert set(after) == {'pretrain', 'associate'}
  assert after['associate'] == result['test_error']['last']
  assert len(after['pretrain']) == 1
  # The stage before is none of its business.
  lines = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
  tested = [m for m in map(json.loads, lines) if 'test_error_last' in m]
  least = min(m['test_error_last'] for m in tested if m['step'] > 2)
  assert result['test_error']['minimum'] == [least]
  for text in ('association after pretrain: ', 'minimum over training'):
    assert text in out
  losses = [m for m in map(json.loads, lines) if 'loss' in m]
  assert [m['stage'] for m in losses] == (2 * ['pretrain'] + 2 * ['associate'])
  assert {'walker', 'visit', 'cross_entropy', 'correct_walks'} < set(losses[-1])


def test_the_source_can_be_trained_by_association(sets, tmp_path):
  adapt(tmp_path / 'run', sets, '--pretrain_loss=association')
  lines = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
  losses = [m for m in map(json.loads, lines) if 'loss' in m]
  assert [m['stage'] for m in losses] == (2 * ['pretrain'] + 2 * ['associate'])
  for measured in losses:
    assert {'walker', 'visit', 'cross_entropy'} < set(measured)


def test_the_labels_of_the_targets_training_images_change_nothing(
  tmp_path_factory,
):
  rng = np.random.default_rng(0)
  images = list(rng.integers(0, 256, (80, 28, 28, 1)).astype(np.uint8))
  runs = []
  for turn in (0, 1):
    sets = tmp_path_factory.mktemp('sets')
    truth = np.arange(80) % 10
    truth[:60] = (truth[:60] + turn) % 10  # the test rows keep theirs
    splits = {'train': list(range(60)), 'test': list(range(60, 80))}
    fake_tfds.write(sets, 'mnist', images, truth, splits=splits)
    folder = sets / 'run'
    result = adapt(folder, sets)
    runs.append((lines(folder), result['test_error'], result['splits']))
  assert runs[0] == runs[1]


@pytest.mark.parametrize('arguments', BAD)
def test_bad_input_is_one_line_that_names_the_flag(arguments, tmp_path, capsys):
  (tmp_path / 'empty').mkdir()
  args = arguments.format(empty=tmp_path / 'empty').split()
  folder = tmp_path / 'run'
  line = binary.refused(capsys, *args, f'--workdir={folder}')
  assert BAD[arguments] in line
  assert not folder.exists()  # nothing was begun


def test_a_set_that_is_not_prepared_says_how_without_tensorflow(
  tmp_path, capsys
):
  (tmp_path / 'something').mkdir()
  line = binary.refused(
    capsys,
    '--dataset=mnist',
    f'--data_dir={tmp_path}',
    f'--workdir={tmp_path}/run',
  )
  assert 'prepare' in line


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
  (tmp_path / 'file').touch()
  line = binary.refused(capsys, *SHORT, f'--workdir={tmp_path}/file/run')
  assert '--workdir' in line


def test_a_folder_with_other_things_in_it_is_refused(tmp_path, capsys):
  (tmp_path / 'thesis.tex').write_text('years of work')
  line = binary.refused(capsys, *SHORT, f'--workdir={tmp_path}')
  assert '--workdir' in line and 'no run' in line
  line = binary.refused(capsys, *SHORT, f'--workdir={tmp_path}', '--overwrite')
  assert (tmp_path / 'thesis.tex').read_text() == 'years of work'


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path):
  # Files may grow to 64 KiB, too little for a checkpoint.
  limited = (
    'import resource, runpy, sys; '
    'resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); '
    'sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[2:]; '
    'runpy.run_path(sys.argv[0], run_name="__main__")'
  )
  script = EXPERIMENTS / 'madnn.py'
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      limited,
      EXPERIMENTS,
      script,
      *SHORT,
      '--seeds=1',
      f'--workdir={tmp_path}/run',
    ],
    capture_output=True,
    text=True,
    env=binary.environment(JAX_ENABLE_COMPILATION_CACHE='0'),
    timeout=300,
  )
  said = done.stderr.replace('\r', '\n').strip().split('\n')
  assert done.returncode == 2, done.stderr
  assert '--workdir' in said[-1] and 'the disk' in said[-1], done.stderr
  assert 'Traceback' not in done.stderr


def test_another_split_in_the_folder_is_refused(tmp_path, capsys):
  folder = tmp_path / 'run'
  assert binary.run(*SHORT, f'--workdir={folder}') == 0
  result = json.loads((folder / 'result.json').read_text())
  (folder / 'result.json').write_text(json.dumps(result | {'complete': False}))
  split = json.loads((folder / 'split.json').read_text())
  split['splits'][1]['hash'] = 'of other images'
  (folder / 'split.json').write_text(json.dumps(split))
  line = binary.refused(capsys, *SHORT, f'--workdir={folder}')
  assert '--workdir' in line and 'split.json' in line


def test_a_loss_that_diverges_is_one_line_and_keeps_the_checkpoint(
  tmp_path, capsys
):
  line = binary.refused(
    capsys,
    *TINY,
    '--steps=40',
    '--seeds=1',
    '--record_every=1',
    '--learning_rate=1e25',
    '--clip=0',
    '--decay=constant',
    '--checkpoint_seconds=0',
    f'--workdir={tmp_path}/run',
    binary='supervised',
  )
  assert '--learning_rate' in line and re.search(r'step \d+', line)


def test_a_corrupt_image_stops_a_streamed_run_unless_tolerated(
  tmp_path, capsys
):
  rng = np.random.default_rng(0)
  labels = np.arange(40) % 2
  images = list(rng.integers(0, 256, (40, 8, 8, 1)).astype(np.uint8))
  images[17] = b'no image at all'
  fake_tfds.write(
    tmp_path / 'sets',
    'broken',
    images,
    labels,
    splits={'train': 40, 'test': list(range(10))},
    file_names=None,
  )
  common_args = (
    *TINY,
    '--dataset=broken',
    f'--data_dir={tmp_path}/sets',
    '--labels=6',
    '--batch_unlabelled=20',
    '--steps=4',
    '--seeds=1',
    '--feed=stream',
    '--nobaseline',
  )
  line = binary.refused(capsys, *common_args, f'--workdir={tmp_path}/1')
  assert '17' in line and '--corrupt' in line
  # Without that image the run has other rows, and a folder of its own.
  assert binary.run(*common_args, '--corrupt=1', f'--workdir={tmp_path}/2') == 0


IMAGENET = (
  '--dataset=imagenet2012',
  '--network=digits',
  '--labels=1',
  '--seeds=1',
  '--batch_labelled=8',
  '--augment=crop,grey,jitter,flip',
  '--preprocess=imagenet',
)


def losses_of(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [m['loss'] for m in map(json.loads, lines) if 'loss' in m]


def test_imagenet_is_streamed_with_random_views_and_resumed(sets, tmp_path):
  args = (
    *IMAGENET,
    '--image_size=16',
    f'--data_dir={sets}',
    '--steps=2',
    '--feed=stream',
    '--record_every=1',
    '--checkpoint_seconds=0',
  )
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  assert binary.run(*args, f'--workdir={whole}', binary='supervised') == 0
  result = json.loads((whole / 'result.json').read_text())
  assert result['steps'] == 2 and result['complete']

  class InterruptedRunError(Exception):
    pass

  def interrupt(loop):
    save(loop)
    if loop.progress.step == 1:
      raise InterruptedRunError

  save = loop_lib._Loop.save
  with (
    mock.patch.object(loop_lib._Loop, 'save', interrupt),
    pytest.raises(InterruptedRunError),
  ):
    binary.run(*args, f'--workdir={parts}', binary='supervised')
  assert binary.run(*args, f'--workdir={parts}', binary='supervised') == 0
  assert losses_of(parts) == losses_of(whole) and len(losses_of(whole)) == 2


@pytest.mark.parametrize(
  'args, words',
  [
    (
      ('--image_size=16', '--feed=resident'),
      ('--feed=resident', '--feed=stream'),
    ),
    (
      ('--image_size=16', '--augment=flip,crop'),
      ('--augment=flip,crop', 'first'),
    ),
    (('--image_size=16', '--augment=crop,crop'), ('crop,crop', 'once')),
    ((), ('--image_size',)),
  ],
)
def test_crops_of_mixed_sizes_that_cannot_be_are_refused(
  args, words, sets, tmp_path, capsys
):
  line = binary.refused(
    capsys,
    *IMAGENET,
    *args,
    '--steps=1',
    f'--data_dir={sets}',
    f'--workdir={tmp_path}/run',
    binary='supervised',
  )
  assert all(word in line for word in words), line
  assert not (tmp_path / 'run').exists()
