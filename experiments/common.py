"""What every experiment shares: flags, and the assembly of a run from them."""

from collections.abc import Callable, Mapping
import contextlib
import functools
import json
import math
import pathlib
import sys

from absl import app, flags, logging
import flagging
import jax
import numpy as np
import report

from ssljax import (
  augment,
  batches,
  checkpoint,
  datasets,
  optimizers,
  parallel,
  preprocess,
  record,
  splits,
  train,
  workdir,
)
from ssljax.core import (
  Draw,
  InputError,
  fraction,
  non_negative,
  positive,
  require,
)
from ssljax.networks import convlarge, small

FLAGS = flags.FLAGS

AUGMENTATIONS = {
  'flip': augment.flip,
  'translate': augment.translate(2),
  'crop_or_resize': augment.crop_or_resize(2),
  'distort': augment.distort,
  'rotate': augment.rotate(0.2),
  'noise': augment.noise(0.15),
}
PREPROCESS = {
  'none': preprocess.identity,
  'standardize': preprocess.standardize,
  'image_standardize': preprocess.image_standardize,
  'gcn': preprocess.gcn,
  'zca': preprocess.zca,
  'gcn_zca': preprocess.gcn_zca,
}
NETWORKS = {
  'digits': functools.partial(small.small, widths=(32,), embedding=64),
  'mnist': small.small,
  'convlarge': convlarge.convlarge,
  'convlarge_weightnorm': functools.partial(convlarge.convlarge, norm='weight'),
}
FITTED = ('standardize', 'zca', 'gcn_zca')  # need images to fit to
RESIDENT_BYTES = 4 * 2**30  # above it, `--feed=auto` streams
FITTING_BYTES = 2**30  # of images a preprocessing is fitted to, at most
ACCELERATOR_STEPS = 50  # per call; on CPU a loop of convolutions is slow
# Flags that decide where and how fast, not what: a resume may change them.
FREE = ('workdir', 'overwrite', 'checkpoint_seconds', 'data_dir')


def define_flags() -> None:
  """Defines the flags that every experiment has."""
  flags.DEFINE_string(
    'dataset', 'digits', '"digits" (embedded), or the name of a TFDS data set.'
  )
  flags.DEFINE_string('data_dir', None, 'Where TFDS data sets are prepared.')
  flags.DEFINE_string('train_split', 'train', 'TFDS split to train on.')
  flags.DEFINE_string('test_split', None, 'TFDS split to test on.')
  flags.DEFINE_integer('image_size', None, 'Resize images to this many pixels.')
  flags.DEFINE_integer('corrupt', 0, 'How many corrupt images to tolerate.')
  flags.DEFINE_string('labels', '10', 'Labelled images per class, or "all".')
  flags.DEFINE_string(
    'unlabelled', 'rest', '"rest", "all", or how many images of the rest.'
  )
  flags.DEFINE_integer('validation', 0, 'Images held out for validation.')
  flags.DEFINE_bool('baseline', True, 'Run the supervised baseline too.')
  flags.DEFINE_integer('seeds', 1, 'How many label splits.')
  flags.DEFINE_integer('seed', 0, 'Number of the first split.')
  flags.DEFINE_integer('seeds_at_once', 1, 'Splits trained in one program.')
  flags.DEFINE_integer('steps', None, 'Length of the training, in steps.')
  flags.DEFINE_float('epochs', None, 'Its length in passes over the images.')
  flags.DEFINE_enum('network', 'convlarge', list(NETWORKS), 'The network.')
  flags.DEFINE_float('dropout', None, "Its rate; the network's own if unset.")
  flags.DEFINE_float(
    'bn_momentum', None, "Of running averages; the network's own if unset."
  )
  flags.DEFINE_integer('batch_labelled', 50, 'Labelled images per step.')
  flags.DEFINE_integer('batch_unlabelled', 50, 'Unlabelled images per step.')
  flags.DEFINE_list(
    'augment', [], f'Augmentations in order, of {", ".join(AUGMENTATIONS)}.'
  )
  flags.DEFINE_enum(
    'preprocess', 'none', list(PREPROCESS), 'Fitted to the training images.'
  )
  flags.DEFINE_enum(
    'feed', 'auto', ['auto', 'resident', 'stream'], 'Where the images wait.'
  )
  flags.DEFINE_string('workdir', None, "The run's folder; dated if unset.")
  flags.DEFINE_bool('overwrite', False, 'Start the run in --workdir anew.')
  flags.DEFINE_integer('evaluate_every', None, 'Steps; a tenth if unset.')
  flags.DEFINE_integer('record_every', None, 'Steps; a hundredth if unset.')
  flags.DEFINE_float('checkpoint_seconds', 60.0, 'Between two checkpoints.')
  flags.DEFINE_integer('steps_per_call', None, '1 on CPU, 50 elsewhere.')


def main(binary: str, arms: Mapping[str, Callable]) -> None:
  """Runs an experiment binary and exits.

  Without a --flagfile it starts from `presets/BINARY.digits.flags`.

  Args:
    binary: its name, and that of its presets.
    arms: name -> method factory; the last is the binary's own method, those
      before it the baselines it is compared with.
  """
  known = set(FLAGS)
  flags.disclaim_key_flags()  # They are the calling program's.
  define_flags()
  flagging.define(*reversed(arms.values()), optimizers.optimizer)
  names = sorted(set(FLAGS) - known)

  def parse(argv):
    preset = pathlib.Path(__file__).parent / f'presets/{binary}.digits.flags'
    if not any(arg.lstrip('-').startswith('flagfile') for arg in argv):
      argv = [argv[0], f'--flagfile={preset}', *argv[1:]]
    try:
      rest = FLAGS(argv)
      prefer_command_line(argv[1:], 'steps', 'epochs')
      return rest
    except flags.Error as error:
      fail(binary, f'{error} (--help lists the flags)')

  def run(argv):
    if not FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # Orbax informs at length.
    try:
      require(
        len(argv) == 1, f'"{argv[-1]}" is not a flag: flags begin with --'
      )
      with workdir.disk_errors(FLAGS.workdir):
        experiment(binary, arms, names)
    except InputError as error:
      fail(binary, error)

  app.run(run, flags_parser=parse)


def prefer_command_line(args, *alternatives: str) -> None:
  """Of flags that exclude each other, one on the command line wins."""
  given = [
    name
    for name in alternatives
    if any(arg.lstrip('-').split('=')[0] == name for arg in args)
  ]
  if len(given) == 1:
    for name in set(alternatives) - set(given):
      FLAGS[name].value = None


def fail(binary: str, error) -> None:
  """Says on one line what is wrong with the input; exit status 2."""
  logging.flush()
  print(f'{binary}: {error}', file=sys.stderr)
  sys.exit(2)


def check_flags() -> None:
  """Refuses values that no run can have, by name."""
  for name in ('seeds', 'seeds_at_once', 'batch_labelled', 'batch_unlabelled'):
    positive(**{name: FLAGS[name].value})
  for name in ('validation', 'seed', 'corrupt', 'checkpoint_seconds'):
    non_negative(**{name: FLAGS[name].value})
  for name in (
    'steps',
    'epochs',
    'image_size',
    'evaluate_every',
    'record_every',
    'steps_per_call',
  ):
    if FLAGS[name].value is not None:
      positive(**{name: FLAGS[name].value})
  for name in ('dropout', 'bn_momentum'):
    if FLAGS[name].value is not None:
      fraction(**{name: FLAGS[name].value})
  require(
    (FLAGS.steps is None) != (FLAGS.epochs is None),
    '--steps, --epochs: give one of the two',
  )
  unknown = [name for name in FLAGS.augment if name not in AUGMENTATIONS]
  require(
    not unknown,
    f'--augment={",".join(unknown)}: give {", ".join(AUGMENTATIONS)}',
  )


def number(name: str, *words: str):
  """The value of a flag that is one of `words` or a whole number."""
  value = FLAGS[name].value
  if value in words:
    return value
  require(
    value.isdecimal(),
    f'--{name}={value}: give {" or ".join(words)} or a number',
  )
  return int(value)


def experiment(binary: str, arms: Mapping[str, Callable], names) -> None:
  """One run: from flags to `result.json` and a table."""
  check_flags()
  folder = pathlib.Path(
    FLAGS.workdir or workdir.dated(f'{binary}-{FLAGS.dataset}')
  )
  decisive = {
    name: FLAGS[name].serialize() for name in names if name not in FREE
  }
  dataset = datasets.load(
    FLAGS.dataset,
    FLAGS.data_dir,
    train_split=FLAGS.train_split,
    test_split=FLAGS.test_split,
    image_size=FLAGS.image_size,
    corrupt=FLAGS.corrupt,
  )
  drawn = draw_splits(dataset)
  jobs = make_jobs(arms, dataset, drawn)
  finished = workdir.claim(folder, decisive, FLAGS.overwrite)
  if finished:
    print(f'{folder} holds this run, complete:')
    print(report.table(finished, folder))
    return
  keep_splits(folder, dataset, drawn)
  print(report.opening(dataset, drawn, folder))
  result = run_jobs(jobs, dataset, folder)
  print(report.table(result, folder))


def draw_splits(dataset: datasets.Dataset) -> list[splits.Split]:
  """The label split of every seed."""
  per_class = number('labels', 'all')
  return [
    splits.draw_split(
      dataset.train.labels,
      dataset.classes,
      per_class=None if per_class == 'all' else per_class,
      seed=seed,
      unlabelled=number('unlabelled', 'rest', 'all'),
      validation=FLAGS.validation,
    )
    for seed in range(FLAGS.seed, FLAGS.seed + FLAGS.seeds)
  ]


def keep_splits(folder, dataset, drawn) -> None:
  """Writes `split.json`, or refuses one that differs from it."""
  path = folder / 'split.json'
  described = {
    'dataset': dataset.name,
    'images': len(dataset.train.labels),
    'classes': list(dataset.classes),
    'splits': [splits.describe(split) for split in drawn],
  }
  if path.exists():
    there = [split['hash'] for split in json.loads(path.read_text())['splits']]
    require(
      there == [split.digest for split in drawn],
      f'--workdir={folder}: its split.json is of other labelled images than '
      'these flags draw now (another data set or version): give another '
      'folder, or --overwrite',
    )
  else:
    workdir.write_json(path, described)


def make_network(classes: int):
  """The network that the flags name."""
  chosen = {'dropout': FLAGS.dropout, 'momentum': FLAGS.bn_momentum}
  chosen = {k: v for k, v in chosen.items() if v is not None}
  return NETWORKS[FLAGS.network](classes, **chosen)


def make_jobs(arms, dataset, drawn) -> dict[str, list[train.Job]]:
  """Per arm, a job for every group of seeds."""
  net = make_network(len(dataset.classes))
  image = jax.ShapeDtypeStruct((1, *dataset.train.shape), np.float32)
  jax.eval_shape(
    net.init, jax.random.key(0), image
  )  # refuses what is too small
  supervised_only = list(arms) == ['supervised']
  draw = Draw(
    FLAGS.batch_labelled, 0 if supervised_only else FLAGS.batch_unlabelled
  )
  epoch = batches.Order(draw, drawn[0]).epoch_steps
  steps = FLAGS.steps or max(1, round(FLAGS.epochs * epoch))
  size = FLAGS.seeds_at_once
  groups = [drawn[i : i + size] for i in range(0, len(drawn), size)]
  if not FLAGS.baseline:
    arms = dict([list(arms.items())[-1]])
  jobs = {}
  for arm, factory in arms.items():
    tx = optimizers.optimizer(steps, **flagging.given(optimizers.optimizer))
    method = factory(net, tx, draw, steps, **flagging.given(factory))
    jobs[arm] = [
      train.Job(f'{arm} seed {seed_range(group)}', method, net, group)
      for group in groups
    ]
  return jobs


def seed_range(group) -> str:
  """'3' or '3-5': the seeds of a group."""
  first, last = group[0].seed, group[-1].seed
  return str(first) if first == last else f'{first}-{last}'


def make_data(dataset: datasets.Dataset, drawn, mesh) -> train.Data:
  """Feeds, fitted preprocessing and truth, on the devices of a mesh."""
  place = parallel.placer(mesh)
  source = dataset.train
  count = len(source.labels) + len(dataset.test.labels)
  fits = count * math.prod(source.shape) <= RESIDENT_BYTES
  if FLAGS.feed == 'resident' or (FLAGS.feed == 'auto' and fits):
    make_feed = lambda s: batches.resident(datasets.arrays(s), place)
  else:
    make_feed = lambda s: batches.stream(s, place)
  chain = augment.chain(*(AUGMENTATIONS[name] for name in FLAGS.augment))
  processing = PREPROCESS[FLAGS.preprocess]()
  # Evenly spaced images, as many as fit: the same ones through either feed.
  rows = len(source.labels)
  every = -(-rows * math.prod(source.shape) // FITTING_BYTES)
  need = FLAGS.preprocess in FITTED
  sample = source.read(np.arange(0, rows, every)) if need else None
  return train.Data(
    make_feed(source),
    make_feed(dataset.test),
    dataset.test.labels,
    source.labels[drawn[0].validation],
    processing,
    processing.fit(sample) if need else (),
    chain if FLAGS.augment else None,
  )


def run_jobs(jobs, dataset, folder: pathlib.Path) -> dict:
  """Trains every job in turn, keeping `result.json` up to date."""
  stages = [stage for arm in jobs.values() for stage in arm[0].method.stages]
  mesh = parallel.make_mesh([sum(stage.draw) for stage in stages])
  drawn = [split for job in next(iter(jobs.values())) for split in job.splits]
  data = make_data(dataset, drawn, mesh)
  recorder = record.Recorder(folder)
  result = report.begin(dataset.name, FLAGS.labels, drawn)
  for arm, group in jobs.items():
    for job in group:
      where = folder / 'checkpoints' / arm / f'seed-{seed_range(job.splits)}'
      options = make_options(job.method.stages)
      with contextlib.closing(checkpoint.Checkpoints(where)) as checkpoints:
        _, progress = train.fit(job, data, options, recorder, checkpoints, mesh)
      report.add(result, arm, progress)
      workdir.write_json(folder / 'result.json', result)
  recorder.close()
  result['complete'] = True
  workdir.write_json(folder / 'result.json', result)
  return result


def make_options(stages) -> train.Options:
  """How often to look, from the flags and the length of a job."""
  steps = sum(stage.steps for stage in stages)
  on_cpu = jax.default_backend() == 'cpu'
  return train.Options(
    evaluate_every=FLAGS.evaluate_every or max(1, steps // 10),
    record_every=FLAGS.record_every or max(1, steps // 100),
    checkpoint_seconds=FLAGS.checkpoint_seconds,
    steps_per_call=FLAGS.steps_per_call or (1 if on_cpu else ACCELERATOR_STEPS),
  )
