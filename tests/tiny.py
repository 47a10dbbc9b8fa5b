"""A tiny problem that compiles in seconds, shared by all tests of training."""

import functools

from flax import linen as nn
import jax
import numpy as np
import optax

from ssljax.augment import preprocess
from ssljax.core import BatchSpec
from ssljax.data import datasets, feeds, sampling, splits
from ssljax.distributed import placement
from ssljax.methods.association import association
from ssljax.methods.deepbass import deepbass
from ssljax.methods.fixmatch import fixmatch
from ssljax.methods.flexmatch import flexmatch
from ssljax.methods.freematch import freematch
from ssljax.methods.ict import ict
from ssljax.methods.laplacenet import laplacenet
from ssljax.methods.llp import llp
from ssljax.methods.llp_fixmatch import llp_fixmatch
from ssljax.methods.madnn import madnn
from ssljax.methods.mean_teacher import mean_teacher
from ssljax.methods.mixmatch import mixmatch
from ssljax.methods.pi_model import pi_model
from ssljax.methods.pseudo_label import pseudo_label
from ssljax.methods.r2d2 import r2d2
from ssljax.methods.r2d2_fixmatch import r2d2_fixmatch
from ssljax.methods.softmatch import softmatch
from ssljax.methods.supervised import supervised
from ssljax.methods.temporal_ensembling import temporal_ensembling
from ssljax.methods.uda import uda
from ssljax.methods.vat import vat
from ssljax.networks import layers, network
from ssljax.training import loop, snapshots
from ssljax.training.compiled import Data, Program

CLASSES, ROWS, SIDE = 3, 61, 4
DRAW = BatchSpec(8, 8)
BALANCED = BatchSpec(24, 8, classes=CLASSES)  # both parts divide by 8 devices


class Net(nn.Module):
  """Dense, batch norm, leaky ReLU, dropout, classifier."""

  @nn.compact
  def __call__(self, image, *, train, dropout):
    x = nn.Dense(5)(image.reshape(image.shape[0], -1))
    x = layers.leaky_relu(layers.BatchNorm(0.9)(x, train=train))
    x = layers.dropout(x, 0.2, train=train, active=dropout)
    return network.Outputs(nn.Dense(CLASSES)(x), x)


NET = network.from_linen(Net(), smallest=2)


def images(seed=0, rows=ROWS):
  """uint8 `[rows, 4, 4, 1]` of three classes that differ in brightness."""
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.arange(rows) % CLASSES).astype(np.int32)
  noise = rng.integers(0, 80, (rows, SIDE, SIDE, 1))
  return (noise + 80 * labels[:, None, None, None]).astype(np.uint8), labels


def truth():
  """Labels `[ROWS]` of the training images."""
  return images()[1]


def brighten(key, image):
  """A random augmentation."""
  return image + 0.1 * jax.random.normal(key)


STRONG = ('noise',)  # of methods with a strong view

METHODS = {
  'supervised': lambda tx, steps: supervised(NET, tx, DRAW, steps),
  'madnn': lambda tx, steps: madnn(NET, tx, DRAW, steps),
  'association': lambda tx, steps: association(NET, tx, BALANCED, steps),
  'adaptation': lambda tx, steps: association(
    NET, tx, BALANCED, steps, pretrain=3
  ),
  'llp': lambda tx, steps: llp(
    NET,
    tx,
    DRAW,
    steps,
    warm=3,
    warm_loss='softmax',
    neighbours=5,
    density_neighbours=4,
    temperature=0.5,
  ),
  'deepbass': lambda tx, steps: deepbass(
    NET, tx, DRAW, steps, iterations=3, passes=2, upsample=2
  ),
  'r2d2': lambda tx, steps: r2d2(
    NET,
    tx,
    DRAW,
    steps,
    pretrain=steps,
    pretrain_batch=8,
    repeat=2,
    interval=2,
    finetune=2,
    cutout=2,
  ),
  'pseudo_label': lambda tx, steps: pseudo_label(NET, tx, DRAW, steps),
  'pi_model': lambda tx, steps: pi_model(NET, tx, DRAW, steps, weight=1.0),
  'temporal_ensembling': lambda tx, steps: temporal_ensembling(
    NET, tx, DRAW, steps, weight=1.0
  ),
  'mean_teacher': lambda tx, steps: mean_teacher(
    NET, tx, DRAW, steps, weight=1.0
  ),
  # A larger ξ than the default, at which rounding turns the direction.
  'vat': lambda tx, steps: vat(NET, tx, DRAW, steps, epsilon=0.2, xi=1.0),
  'ict': lambda tx, steps: ict(NET, tx, DRAW, steps, weight=1.0),
  'mixmatch': lambda tx, steps: mixmatch(NET, tx, DRAW, steps, weight=1.0),
  'uda': lambda tx, steps: uda(
    NET, tx, DRAW, steps, threshold=0.5, strong_augment=STRONG
  ),
  'fixmatch': lambda tx, steps: fixmatch(
    NET, tx, DRAW, steps, threshold=0.5, strong_augment=STRONG
  ),
  'fixmatch_cta': lambda tx, steps: fixmatch(
    NET, tx, DRAW, steps, threshold=0.5, strong_augment=('ctaugment', *STRONG)
  ),
  'flexmatch': lambda tx, steps: flexmatch(
    NET, tx, DRAW, steps, threshold=0.5, strong_augment=STRONG
  ),
  'freematch': lambda tx, steps: freematch(
    NET, tx, DRAW, steps, strong_augment=STRONG
  ),
  'softmatch': lambda tx, steps: softmatch(
    NET, tx, DRAW, steps, strong_augment=STRONG
  ),
  'laplacenet': lambda tx, steps: laplacenet(
    NET,
    tx,
    DRAW,
    steps,
    pretrain=3,
    neighbours=5,
    samples=2,
    strong_augment=STRONG,
  ),
  'madnn_strong': lambda tx, steps: madnn(
    NET, tx, DRAW, steps, strong_augment=STRONG
  ),
  'llp_fixmatch': lambda tx, steps: llp_fixmatch(
    NET,
    tx,
    DRAW,
    steps,
    neighbours=5,
    density_neighbours=4,
    temperature=0.5,
    threshold=0.5,
    strong_augment=STRONG,
  ),
  'r2d2_fixmatch': lambda tx, steps: r2d2_fixmatch(
    NET,
    tx,
    DRAW,
    steps,
    threshold=0.5,
    repredict_every=2,
    strong_augment=STRONG,
  ),
}


def make_splits(seeds=(0,), validation=0):
  """One split per seed, 8 labels per class."""
  return [
    splits.draw_split(
      truth(), CLASSES, per_class=8, seed=seed, validation=validation
    )
    for seed in seeds
  ]


def streamed(images, place):
  """A feed that decodes nothing, on two threads."""
  source = datasets.Source(
    np.zeros(len(images), np.int32), images.shape[1:], lambda rows: images[rows]
  )
  return feeds.stream(source, place, threads=2)


def make_data(devices=1, make_feed=feeds.resident):
  """(data, mesh) over that many devices."""
  mesh = placement.make_mesh([devices])
  place = placement.Placer(mesh)
  train, _ = images()
  test, test_truth = images(1, 20)
  data = Data(
    make_feed(train, place),
    make_feed(test, place),
    test_truth,
    truth(),
    preprocess.identity(),
    (),
    brighten,
    classes=CLASSES,
  )
  return data, mesh


def make_program(name, steps, seeds, tx, extra=0, **where):
  """A program of a method of the table above; `where` is as in `make_data`."""
  data, mesh = make_data(**where)
  method = METHODS[name](lambda *_, **__: tx or optax.sgd(0.1, 0.9), steps)
  return Program(method, NET, data, mesh, seeds=seeds, batch=8, extra=extra)


# Compilation dominates the time of a test, so tests share programs.
shared_program = functools.cache(make_program)


def make_job(
  name, steps=6, seeds=(0,), tx=None, validation=0, shared=True, **where
):
  """A job of a method of the table above; `where` is as in `make_data`."""
  make = shared_program if shared else make_program
  program = make(name, steps, len(seeds), tx, **where)
  return loop.Job(name, program, make_splits(seeds, validation))


def initial(job):
  """(state before the first step, pixels and fitted, rows) of a job."""
  sampler = samplers(job)
  rows = sampling.rows_of_call(sampler, (0, 1))
  state = job.program.initial(job.splits, rows)
  return state, next(sources(job, sampler, [(0, 1)]))


def sources(job, sampler, calls):
  """(pixels and fitted, rows) of every call."""
  rows_of = lambda call: sampling.rows_of_call(sampler, call)
  for pixels, rows in job.program.data.train.batches(rows_of, calls):
    yield (pixels, job.program.fitted), rows


def samplers(job, stage=0):
  """The samplers of a job's stage, one per seed."""
  batch_spec = job.program.method.stages[stage].batch_spec
  return [sampling.Sampler(batch_spec, split) for split in job.splits]


class Wide(nn.Module):
  """A classifier of 1,000 classes on an embedding."""

  embedding: int

  @nn.compact
  def __call__(self, image, *, train, dropout):
    x = nn.Dense(self.embedding)(image.reshape(image.shape[0], -1))
    return network.Outputs(nn.Dense(1000)(x), x)


def imagenet_snapshots(method, net):
  """States of a job with as many images and classes as ImageNet, none made.

  The images have one pixel, over eight devices.
  """
  count, classes = 1_281_167, 1000
  mesh = placement.make_mesh([8])
  labels = np.arange(count, dtype=np.int32) % classes
  feed = feeds.resident(
    np.zeros([count, 1, 1, 1], np.uint8), placement.Placer(mesh)
  )
  data = Data(feed, feed, labels, labels, preprocess.identity(), (), None)
  split = splits.draw_split(labels, classes, per_class=128, seed=0)
  job = loop.Job('wide', Program(method, net, data, mesh), [split])
  return snapshots.Snapshots(job, None)
