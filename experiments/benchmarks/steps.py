"""Training steps to measure: one step of a stage on random images."""

from collections.abc import Callable
import functools
import itertools

import jax
import numpy as np

from ssljax import optimizers
from ssljax.augment import preprocess
from ssljax.core import BatchSpec, Method, Stage
from ssljax.data import feeds, sampling, splits
from ssljax.distributed import placement
from ssljax.methods.supervised import supervised_loss
from ssljax.training import compiled as compiled_lib


def show(title: str, measured: dict[str, float], *against: str) -> None:
  """Print the rate of every variant and its ratio to some of them."""
  print(f'\n{title}')
  for name, rate in measured.items():
    ratios = [f'{rate / measured[a]:5.2f} x {a}' for a in against]
    print(f'  {name:24s}{rate:9.1f} images/s  {"  ".join(ratios)}')


def training_step(
  method: Method,
  net,
  side,
  channels,
  *,
  seeds=1,
  stage=0,
  rows=None,
  labelled=None,
  average=0.9999,
  at_once=1,
) -> Callable:
  """Return a function that trains a stage for a step on random images.

  It returns the metrics of the step.

  Args:
    method: method to train.
    net: its network.
    side: height and width of an image in pixels.
    channels: channels of an image.
    seeds: S, number of seeds trained at once.
    stage: number of the stage.
    rows: N, number of training images; four batches if None.
    labelled: number of images with a label; all if None.
    average: largest decay of the averaged weights; 0 averages nothing.
    at_once: number of steps in one call of the function.
  """
  batch_spec = method.stages[stage].batch_spec
  rows = rows or 4 * batch_spec.size
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (rows, side, side, channels), np.uint8)
  truth = np.arange(rows, dtype=np.int32) % 10
  drawn = [
    splits.draw_split(
      truth, 10, per_class=(labelled or rows) // 10, seed=seed, unlabelled='all'
    )
    for seed in range(seeds)
  ]
  mesh = placement.make_mesh([batch_spec.size])
  feed = feeds.resident(pixels, placement.Placer(mesh))
  data = compiled_lib.Data(
    feed, feed, truth, truth[:0], preprocess.identity(), (), None
  )
  compiled = compiled_lib.Program(method, net, data, mesh, seeds=seeds)
  samplers = [sampling.Sampler(batch_spec, split) for split in drawn]
  state = compiled.initial(drawn, sampling.rows_of_call(samplers, (0, 1)))
  state = compiled.init_stage[stage](state)
  fetched = feed.batches(
    functools.partial(sampling.rows_of_call, samplers),
    ((i, i + at_once) for i in itertools.count(0, at_once)),
  )

  def step():
    nonlocal state
    pixels, rows = next(fetched)
    step_of = compiled.steps[stage]
    source, first = (pixels, compiled.fitted), np.int32(0)
    state, metrics = step_of(state, source, rows, first)
    jax.block_until_ready((state, metrics))
    return metrics

  return step


def supervised_on(
  net, batch_spec: BatchSpec, tx=optimizers.optimizer
) -> Method:
  """Return supervised training on the batches that another method uses."""
  stage = Stage(
    name='supervised',
    steps=1000,
    tx=tx(1000),
    batch_spec=batch_spec,
    loss=supervised_loss(net),
  )
  return Method(name='supervised', stages=(stage,))
