"""From flags to a run: splits, network, methods, feeds, jobs."""

from collections.abc import Callable, Mapping
import contextlib
import functools
import inspect
import json
import math
import pathlib
import time
from typing import NamedTuple

from absl import flags
from ssljax.cli import method_flags
from ssljax.planning import footprint
import jax
import numpy as np
from ssljax.cli import active_flags
from ssljax.runs import summary

from ssljax.augment import (geometric, imagenet, preprocess, standard)
from ssljax.data import (datasets, domain_pair, feeds, sampling, splits)
from ssljax.distributed import (multihost, placement, preemption)
from ssljax.runs import run_folder
from ssljax.training import (checkpoint, compiled, loop, metrics_writer)
from ssljax import optimizers
from ssljax.core import (BatchSpec, Method)
from ssljax.errors import require
from ssljax.networks import (convlarge, deepbass, elu, lenet, network, resnet, shakeshake, small)

FLAGS = flags.FLAGS

AUGMENTATIONS = {
  'flip': standard.flip,
  'translate': standard.translate(2),
  'translate4': standard.translate(4),
  'crop_or_resize': standard.crop_or_resize(2),
  'distort': standard.distort,
  'rotate': geometric.rotate(0.2),
  'turn_scale': geometric.turn_and_scale(),
  'noise': standard.noise(0.15),
  'affine': geometric.affine(),
  'blur': standard.blur(),
  'stl10': standard.stl10(),
  'cutout': standard.cutout(),
  'crop': imagenet.crop(),
  'grey': imagenet.grey(),
  'jitter': imagenet.jitter(),
}
# They and what is listed before them precede the preprocessing.
ON_PIXELS = ('crop', 'grey', 'jitter')
PREPROCESS = {
  'none': preprocess.identity,
  'standardize': preprocess.standardize,
  'image_standardize': preprocess.image_standardize,
  'gcn': preprocess.gcn,
  'zca': preprocess.zca,
  'gcn_zca': preprocess.gcn_zca,
  'imagenet': preprocess.imagenet,
}
NETWORKS = {
  'digits': functools.partial(small.small, widths=(32,), embedding=64),
  'digits_heads': functools.partial(
    small.small, widths=(32,), embedding=64, head=64
  ),
  'mnist': small.small,
  'mnist_heads': functools.partial(small.small, head=128),
  'deepbass_mnist': deepbass.deepbass,
  'deepbass_toy': deepbass.mlp,
  'elu_digits': functools.partial(elu.elu, widths=(32, 64)),
  'elu_mnist': elu.elu,
  'elu_svhn': functools.partial(elu.elu, depth=3, normalize='variance'),
  'elu_stl10': elu.elu_stl10,
  'lenet': lenet.lenet,
  'shakeshake': shakeshake.shakeshake,
  'resnet18': resnet.resnet18,
  'resnet18_small': functools.partial(resnet.resnet18, stem='small'),
  'resnet18v2': functools.partial(resnet.resnet_v2, embedding=128),
  'resnet18v2_small': functools.partial(
    resnet.resnet_v2, stem='small', embedding=128
  ),
  'resnet50v2': functools.partial(resnet.resnet_v2, depth=50, embedding=128),
  'convlarge': convlarge.convlarge,
  'convlarge_weightnorm': functools.partial(convlarge.convlarge, norm='weight'),
}
FITTED = ('standardize', 'zca', 'gcn_zca')  # need images to fit to
RESIDENT_BYTES = 4 * 2**30  # above it, `--feed=auto` streams
FITTING_BYTES = 2**30  # of images a preprocessing is fitted to, at most
ACCELERATOR_STEPS = 50  # per call; on CPU a loop of convolutions is slow


def draw_splits(dataset: datasets.Dataset) -> list[splits.Split]:
  """The label split of every seed."""
  per_class = method_flags.number('labels', 'all')
  unlabelled, count = method_flags.pool('unlabelled')
  rows = np.arange(len(dataset.train.labels))
  return [
    splits.draw_split(
      dataset.train.labels,
      dataset.classes,
      per_class=None if per_class == 'all' else per_class,
      seed=seed,
      unlabelled=unlabelled,
      count=count,
      among=rows >= dataset.unlabelled_from,
      validation=FLAGS.validation,
    )
    for seed in range(FLAGS.seed, FLAGS.seed + FLAGS.seeds)
  ]


class Run(NamedTuple):
  """Everything that the flags name, ready to be trained."""

  dataset: datasets.Dataset
  drawn: list[splits.Split]  # one per seed
  net: network.Network
  methods: list[Method]  # baselines first, the binary's own method last
  data: compiled.Data
  mesh: jax.sharding.Mesh


def load_dataset() -> datasets.Dataset:
  """The data set, or the two of a domain adaptation, that the flags name."""
  how = {
    name: FLAGS[name].value
    for name in (
      'data_dir',
      'train_split',
      'test_split',
      'image_size',
      'corrupt',
    )
  }
  how['crop'] = 'crop' in FLAGS.augment
  if FLAGS.source:
    return domain_pair.load(FLAGS.source, FLAGS.target, **how)
  dataset = datasets.load(FLAGS.dataset, **how)
  if dataset.train.dtype != np.uint8:
    refuse_of_points(dataset)
  return dataset


def refuse_of_points(dataset: datasets.Dataset) -> None:
  """Refuses flags that are of images, where there are none."""
  for flag, none in (('augment', []), ('preprocess', 'none')):
    value = FLAGS[flag].value
    shown = ','.join(value) if flag == 'augment' else value
    require(
      value == none,
      f'`{flag}`={shown}: `dataset`={dataset.name} is of points, not of '
      f'images: give `{flag}`={"" if flag == "augment" else none}',
    )


def assemble(arms: Mapping[str, Callable]) -> Run:
  """Makes a run of the flags, refusing what cannot work."""
  dataset = load_dataset()
  drawn = draw_splits(dataset)
  epoch_steps = lambda batch_spec: sampling.Sampler(batch_spec, drawn[0]).epoch_steps
  net, methods = make_methods(arms, dataset, epoch_steps)
  mesh = placement.make_mesh(
    [stage.batch_spec.size for method in methods for stage in method.stages],
    flags=summary.batch_flags(methods),
  )
  for method in methods:
    refuse_too_large(method, net, dataset, drawn[0], mesh)
  data = make_data(dataset, drawn, mesh)
  run = Run(dataset, drawn, net, methods, data, mesh)
  active_flags.refuse(run, dropout_rate())
  return run


def refuse_too_large(method, net, dataset, split, mesh) -> None:
  """Refuses a memory that cannot be, or does not fit, before it is made."""
  states = footprint.stage_shapes(
    method,
    net,
    dataset.train.shape,
    len(dataset.train.labels),
    labelled=len(split.labelled),
    multiple=placement.row_multiple(mesh),
    extra=active_flags.most(split),
    seeds=min(FLAGS.seeds, FLAGS.seeds_at_once),
  )
  footprint.refuse_too_large(method, states[0], mesh)


def refuse_other_splits(folder: pathlib.Path, run: Run) -> None:
  """Refuses a `split.json` that differs from the run's splits."""
  path = folder / 'split.json'
  if path.exists():
    there = [split['hash'] for split in json.loads(path.read_text())['splits']]
    require(
      there == [split.digest for split in run.drawn],
      f'`workdir`={folder}: its split.json is of other labelled images than '
      'these flags draw now (another data set or version): give another '
      'folder, or `overwrite=True`',
    )


def keep_splits(folder: pathlib.Path, run: Run) -> None:
  """Writes `split.json`, unless it is there."""
  path = folder / 'split.json'
  if not path.exists():
    described = {
      'dataset': run.dataset.name,
      'images': len(run.dataset.train.labels),
      'classes': list(run.dataset.classes),
      'splits': [splits.describe(split) for split in run.drawn],
    }
    run_folder.write_json(path, described)


def make_network(classes: int):
  """The network that the flags name."""
  chosen = {'dropout': FLAGS.dropout, 'momentum': FLAGS.bn_momentum}
  chosen = {k: v for k, v in chosen.items() if v is not None}
  make = NETWORKS[FLAGS.network]
  for keyword in chosen:
    require(
      keyword in inspect.signature(make).parameters,
      f'--{"bn_" if keyword == "momentum" else ""}{keyword}: '
      f'`network`={FLAGS.network} has none: leave it out',
    )
  return make(classes, **chosen)


def dropout_rate() -> float:
  """Of the network that the flags name; 0 if it has none."""
  if FLAGS.dropout is not None:
    return FLAGS.dropout
  parameters = inspect.signature(NETWORKS[FLAGS.network]).parameters
  return parameters['dropout'].default if 'dropout' in parameters else 0.0


def make_batch_spec(classes: int, supervised_only: bool) -> BatchSpec:
  """What the flags have a step see."""
  each = FLAGS.batch_per_class
  return BatchSpec(
    each * classes if each else FLAGS.batch_labelled,
    0 if supervised_only else FLAGS.batch_unlabelled,
    classes=classes if each else 0,
  )


def make_methods(
  arms, dataset, epoch_steps: Callable
) -> tuple[network.Network, list[Method]]:
  """The network, and the method of every arm with the flags' values.

  Args:
    arms: name -> factory; the last is the binary's own method.
    dataset: with images of a shape and of a dtype; none is read.
    epoch_steps: `draw -> steps of an epoch`; refuses what cannot be drawn.
  """
  net = make_network(len(dataset.classes))
  image = jax.ShapeDtypeStruct((1, *dataset.train.shape), np.float32)
  jax.eval_shape(net.init, jax.random.key(0), image)  # refuses a small one
  batch_spec = make_batch_spec(len(dataset.classes), list(arms) == ['supervised'])
  epoch = epoch_steps(batch_spec)
  steps = FLAGS.steps or max(1, round(FLAGS.epochs * epoch))
  chosen = list(arms.values()) if FLAGS.baseline else list(arms.values())[-1:]
  constants = method_flags.given(optimizers.optimizer)
  tx = functools.partial(optimizers.optimizer, **constants)
  methods = [
    factory(net, tx, batch_spec, steps, **method_flags.given(factory))
    for factory in chosen
  ]
  averaging = optimizers.averaging(**method_flags.given(optimizers.averaging))
  methods = [m if m.averaging else m._replace(averaging=averaging) for m in methods]
  one = jax.ShapeDtypeStruct(dataset.train.shape, np.float32)
  for method in methods:  # refuses what splits or images cannot serve
    for stage in method.stages:
      epoch_steps(stage.batch_spec)
      for augment in stage_augmentations(stage):
        require(
          dataset.train.dtype == np.uint8,
          f'`dataset`={dataset.name}: is of points, and the stage {stage.name} '
          f'of {method.name} changes images: switch that off (for R2-D2, '
          '`cutout`=0)',
        )
        jax.eval_shape(augment, jax.random.key(0), one)
  return net, methods


def stage_augmentations(stage) -> list[Callable]:
  """Return the augmentations that the views of a stage add to the run's own."""
  both = [(view.on_pixels, view.augment) for view in stage.views]
  return [augment for pair in both for augment in pair if augment]


def seed_range(group) -> str:
  """'3' or '3-5': the seeds of a group."""
  first, last = group[0].seed, group[-1].seed
  return str(first) if first == last else f'{first}-{last}'


def checkpoint_folder(folder: pathlib.Path, method: Method, group):
  """Where the job of a group of splits keeps its checkpoints."""
  return folder / 'checkpoints' / method.name / f'seed-{seed_range(group)}'


def feed_maker(dataset: datasets.Dataset, kind: str, place) -> Callable:
  """`datasets.Source -> batches.Feed`, as ``feed`=KIND` says of a data set.

  Args:
    dataset: whose images are fed.
    kind: 'auto', 'resident' or 'stream'.
    place: a `parallel.Placer`.
  """
  if is_streamed(dataset, kind):
    return lambda source: feeds.stream(source, place)
  return lambda source: feeds.resident(datasets.arrays(source), place)


def is_streamed(dataset: datasets.Dataset, kind: str) -> bool:
  """Whether the images are decoded during the training."""
  if dataset.train.crop:
    require(
      kind != 'resident',
      '`feed`=resident: `augment`=crop cuts images that differ in size as '
      'they are decoded: give `feed`=stream',
    )
    return True
  count = len(dataset.train.labels) + len(dataset.test.labels)
  large = count * math.prod(dataset.train.shape) > RESIDENT_BYTES
  return kind == 'stream' or (kind == 'auto' and large)


def make_augmentations(on_host: bool) -> list[Callable | None]:
  """What `augment` lists, before and after the preprocessing.

  Args:
    on_host: the feed crops already.
  """
  names = list(FLAGS.augment)
  if on_host:
    require(
      names.index('crop') == 0 and names.count('crop') == 1,
      f'`augment`={",".join(names)}: images that differ in size are cropped '
      'as they are decoded: give crop once, as the first',
    )
    names = names[1:]
  first = max(
    (i + 1 for i, name in enumerate(names) if name in ON_PIXELS), default=0
  )
  return [
    standard.chain(*(AUGMENTATIONS[name] for name in part)) if part else None
    for part in (names[:first], names[first:])
  ]


def make_data(dataset: datasets.Dataset, drawn, mesh) -> compiled.Data:
  """Feeds, fitted preprocessing and truth, on the devices of a mesh."""
  source = dataset.train
  make_feed = feed_maker(dataset, FLAGS.feed, placement.Placer(mesh))
  on_pixels, augmentation = make_augmentations(source.crop is not None)
  processing = PREPROCESS[FLAGS.preprocess]()
  # Evenly spaced images, as many as fit: the same ones through either feed.
  rows = len(source.labels)
  every = -(-rows * math.prod(source.shape) // FITTING_BYTES)
  need = FLAGS.preprocess in FITTED
  sample = source.read(np.arange(0, rows, every)) if need else None
  fitted = processing.fit(sample) if need else ()
  one = jax.ShapeDtypeStruct(source.shape, np.float32)
  jax.eval_shape(processing.apply, fitted, one)  # refuses grey ones
  return compiled.Data(
    make_feed(source),
    make_feed(dataset.test),
    dataset.test.labels,
    source.labels[drawn[0].validation],
    processing,
    fitted,
    augmentation,
    on_pixels,
  )


def train_all(run: Run, folder: pathlib.Path) -> dict:
  """Trains every method under every split, keeping `result.json` up to date.

  Raises:
    PreemptedError: SIGTERM came; the checkpoint is of the step it came in, or
      of the one before the sweep it came in.
  """
  result = summary.begin(run, FLAGS.labels)
  earlier = multihost.once(lambda: run_folder.read_result(folder)) or {}
  result['started'] = earlier.get('started', round(time.time(), 3))
  keep_result(folder, result)
  size, extra = FLAGS.seeds_at_once, active_flags.most(run.drawn[0])
  groups = [run.drawn[i : i + size] for i in range(0, len(run.drawn), size)]
  metrics_start, stepping = 0, 0.0
  with (
    contextlib.closing(
      metrics_writer.MetricsWriter(folder) if multihost.is_first() else metrics_writer.NoMetrics()
    ) as recorder,
    preemption.Notice().awaited() as preempted,
  ):
    for method in run.methods:
      programs = {
        seeds: compiled.Program(
          method, run.net, run.data, run.mesh, seeds=seeds, extra=extra
        )
        for seeds in {len(group) for group in groups}
      }
      asks = {
        seeds: active_flags.make(run, made, folder)
        for seeds, made in programs.items()
      }
      for group in groups:
        name = f'{method.name} seed {seed_range(group)}'
        made = programs[len(group)]
        job = loop.Job(name, made, group, asks[len(group)])
        options = make_options(method.stages, run.data.train)
        options = options._replace(preempted=preempted)
        progress = run_job(job, options, recorder, folder, metrics_start)
        metrics_start = progress.metrics_bytes
        stepping += progress.seconds - progress.compiling
        summary.add(result, method, progress, FLAGS.report_minimum)
        keep_result(folder, result)
  result['complete'] = True
  wall = time.time() - result['started']
  result['goodput'] = round(stepping / wall, 3)
  keep_result(folder, result)
  return result


def keep_result(folder: pathlib.Path, result: dict) -> None:
  """Writes `result.json`, once for all processes."""
  multihost.once(lambda: run_folder.write_json(folder / 'result.json', result))


def run_job(
  job, options, recorder, folder: pathlib.Path, metrics_start: int
) -> loop.Progress:
  """Trains one job with checkpoints in a folder of its own."""
  method = job.program.method
  where = checkpoint_folder(folder, method, job.splits)
  permanent = loop.permanent(method, FLAGS.keep_stages, FLAGS.keep_every)
  kept = checkpoint.Checkpoints(where, permanent=permanent)
  with contextlib.closing(kept) as checkpoints:
    _, progress = loop.fit(job, options, recorder, checkpoints, metrics_start)
  return progress


def make_options(stages, feed: feeds.Feed) -> loop.Options:
  """How often to look, from the flags and the length of a job."""
  steps = sum(stage.steps for stage in stages)
  one = jax.default_backend() == 'cpu' or not feed.pixels_are_shared
  return loop.Options(
    evaluate_every=FLAGS.evaluate_every or max(1, steps // 10),
    record_every=FLAGS.record_every or min(max(1, steps // 100), 100),
    checkpoint_seconds=FLAGS.checkpoint_seconds,
    steps_per_call=FLAGS.steps_per_call or (1 if one else ACCELERATOR_STEPS),
    keep_every=FLAGS.keep_every,
  )
