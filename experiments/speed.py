"""Benchmark training steps and parts of them.

  python experiments/speed.py                     all parts
  python experiments/speed.py --part=conv         convolutions: XLA, ours, torch
  python experiments/speed.py --part=madnn        MA-DNN and supervised steps
  python experiments/speed.py --part=association  association steps and losses
  python experiments/speed.py --part=r2d2         D2 and supervised steps
  python experiments/speed.py --part=mc           dropout passes in one program
  python experiments/speed.py --part=seeds        several seeds in one program
  python experiments/speed.py --part=bank         a bank of ImageNet's size
  python experiments/speed.py --part=stream       decoding, augmenting at 224
  python experiments/speed.py --part=consistency  FixMatch and RandAugment
  python experiments/speed.py --part=folder       a folder, and predictions

The variants of a part are measured in turn in one process, for several rounds,
and the best round of each counts, because other programs on a shared machine
slow down all variants or single rounds. PyTorch is measured in both memory
formats if it is installed.
"""

import contextlib
import functools
import importlib.util
from typing import Any
from unittest import mock

from absl import flags
import jax
import numpy as np

from ssljax import optimizers
from ssljax.active import acquisition
from ssljax.cli import main, tool
from ssljax.core import BatchSpec
from ssljax.errors import require
from ssljax.experiments.benchmarks import (
  bank_speed,
  consistency_speed,
  folder_speed,
  stream_speed,
  timing,
  torch_steps,
)
from ssljax.experiments.benchmarks.steps import (
  show,
  supervised_on,
  training_step,
)
from ssljax.experiments.figures import style
from ssljax.methods import association
from ssljax.methods.madnn import madnn
from ssljax.methods.r2d2 import r2d2
from ssljax.networks import convlarge, deepbass, elu, small
from ssljax.networks.cpu import conv

# Name -> (network, height and width, channels, images of a step).
NETWORKS = {
  'ConvLarge': (convlarge.convlarge, 32, 3, 64),
  'MNIST network': (small.small, 28, 1, 100),
}


def part_conv(rounds: int) -> None:
  """Compare training steps with XLA's, our and PyTorch's convolutions."""
  for name, (make, side, channels, batch) in NETWORKS.items():
    net = make(10)
    method = supervised_on(net, BatchSpec(batch))
    steps = {}
    with conv.native():
      steps['native'] = training_step(method, net, side, channels)
      steps['native']()  # Trace while `conv.native` is active.
    steps['ours'] = training_step(method, net, side, channels)
    against = ['native']
    if importlib.util.find_spec('torch'):
      for layout in ('contiguous_format', 'channels_last'):
        steps[f'PyTorch {layout}'] = torch_steps.supervised_step(
          torch_steps.NETWORKS[name](),
          (batch, channels, side, side),
          layout=layout,
          clip=2.0,
        )
    measured = timing.rates(steps, dict.fromkeys(steps, batch), rounds)
    if len(steps) > 2:
      best = max(list(measured)[2:], key=measured.get)
      against.append(best)
    show(f'{name}, batch {batch}, {side}x{side}x{channels}', measured, *against)


def part_madnn(rounds: int) -> None:
  """Measure the cost of the memory: a step with and without it."""
  for name, (make, side, channels, batch) in NETWORKS.items():
    net, batch_spec = make(10), BatchSpec(batch // 2, batch // 2)
    tx = optimizers.optimizer
    methods = {
      'supervised': supervised_on(net, batch_spec),
      'MA-DNN': madnn(net, tx, batch_spec, 1000),
      'MA-DNN, L1 distance': madnn(net, tx, batch_spec, 1000, distance='l1'),
    }
    steps = {
      k: training_step(m, net, side, channels) for k, m in methods.items()
    }
    measured = timing.rates(steps, dict.fromkeys(steps, batch), rounds)
    show(
      f'{name}, {batch_spec.labelled} + {batch_spec.unlabelled} images',
      measured,
      'supervised',
    )
    cost = measured['supervised'] / measured['MA-DNN']
    print(f'  a step of MA-DNN takes {cost:.3f} x a supervised step')


def part_association(rounds: int) -> None:
  """Measure the cost of association: in a step, and alone on large batches."""
  net, batch_spec = elu.elu(10), BatchSpec(100, 100, classes=10)
  tx = optimizers.optimizer
  steps = {
    'supervised': training_step(supervised_on(net, batch_spec), net, 28, 1),
    'association': training_step(
      association.association(net, tx, batch_spec, 1000), net, 28, 1
    ),
  }
  measured = timing.rates(steps, dict.fromkeys(steps, batch_spec.size), rounds)
  show('ELU network, 100 + 100 images, D = 128', measured, 'supervised')
  cost = measured['supervised'] / measured['association']
  print(f'  a step of association takes {cost:.3f} x a supervised step')
  association_losses(1000, 10_000, 128, rounds)


def association_losses(na: int, nb: int, dim: int, rounds: int) -> None:
  """Compare the losses and gradients with and without recomputation.

  Args:
    na: labelled embeddings.
    nb: unlabelled embeddings.
    dim: D, numbers of an embedding.
    rounds: number of measurements.
  """
  rng = np.random.default_rng(0)
  a, b = (rng.normal(0, 0.2, (n, dim)).astype(np.float32) for n in (na, nb))
  labels = np.arange(na) % 10

  def losses(a, b):
    trips = association.associate(a, b, labels)
    return trips.walker + trips.visit

  gradients = lambda: jax.jit(jax.value_and_grad(losses, (0, 1)))
  matrix = na * nb * 4  # bytes of the similarities
  steps, memory = {}, {}
  for name, store in {'recomputed': False, 'stored': True}.items():
    patch = (
      mock.patch.object(jax, 'checkpoint', lambda f, **_: f)
      if store
      else contextlib.nullcontext()
    )
    with patch:
      stored = jax.tree.leaves(jax.vjp(losses, a, b)[1])
      compiled = gradients().lower(a, b).compile()
    steps[name] = lambda f=compiled: jax.block_until_ready(f(a, b))
    temporary = compiled.memory_analysis().temp_size_in_bytes
    residuals = sum(x.nbytes for x in stored)
    memory[name] = residuals / matrix, temporary / matrix
  print(f'\nlosses alone, Na = {na}, Nb = {nb}, D = {dim}')
  measured = timing.rates(steps, dict.fromkeys(steps, 1), rounds)
  for name, rate in measured.items():
    residuals, temporary = memory[name]
    ratio = measured['stored'] / rate
    print(
      f'  {name:12s}{1e3 / rate:8.0f} ms  {ratio:5.2f} x stored  stored for '
      f'the backward pass {residuals:5.2f}, peak {temporary:5.2f} x (Na x Nb)'
    )


def part_r2d2(rounds: int) -> None:
  """Measure the cost of pseudo-logits: a step with and without them."""
  net, batch_spec, rows = small.small(10), BatchSpec(32, 96), 60_000
  # As in R2-D2: momentum and weight decay alone.
  tx = functools.partial(optimizers.optimizer, clip=0.0)
  make = functools.partial(
    training_step,
    net=net,
    side=28,
    channels=1,
    rows=rows,
    labelled=1000,
    average=0.0,
  )
  steps = {
    'supervised': make(supervised_on(net, batch_spec, tx)),
    'D2': make(r2d2(net, tx, batch_spec, 1000), stage=1),
  }
  measured = timing.rates(steps, dict.fromkeys(steps, batch_spec.size), rounds)
  show(f'MNIST network, 32 + 96 of {rows} images', measured, 'supervised')
  cost = measured['supervised'] / measured['D2']
  print(f'  a step of D2 takes {cost:.3f} x a supervised step')


def part_mc(rounds: int) -> None:
  """Compare T dropout passes in one program with T calls of one pass."""
  passes, batch = 10, 512
  for name, make in {
    'MNIST network': small.small,
    "DeepBASS's network": deepbass.deepbass,
  }.items():
    calls, megabytes = dropout_passes(make(10), passes, batch)
    measured = timing.rates(calls, dict.fromkeys(calls, batch), rounds)
    show(f'{name}, batch {batch}', measured, *list(calls)[1:])
    for count, size in megabytes.items():
      print(f'  {count:3d} passes need {size:8.2f} MiB')


def dropout_passes(net, passes: int, batch: int) -> tuple[dict, dict]:
  """Return functions that make several passes, and the memory these need.

  Args:
    net: the network.
    passes: T, number of passes.
    batch: B, images.

  Returns:
    The functions by name, and MiB by number of passes.
  """
  key = jax.random.key(0)
  image = jax.random.uniform(key, [batch, 28, 28, 1])
  params, stats = jax.jit(net.init)(key, image)
  options = conv.compiler_options()

  def compiled(f, *more):
    f = jax.jit(f, compiler_options=options)
    f = f.lower(params, stats, image, *more).compile()
    return f, lambda: f(params, stats, image, *more)

  def repeated(call):
    return lambda: jax.block_until_ready([call() for _ in range(passes)])

  loop, looped = compiled(acquisition.sampler(net, passes), key)
  longer, _ = compiled(acquisition.sampler(net, 100), key)
  calls = {
    f'{passes} passes': lambda: jax.block_until_ready(looped()),
    f'{passes} x 1 pass': repeated(compiled(net.sample, key)[1]),
    f'{passes} x inference': repeated(compiled(net.infer)[1]),
  }
  size = lambda f: f.memory_analysis().temp_size_in_bytes / 2**20
  return calls, {passes: size(loop), 100: size(longer)}


def part_seeds(rounds: int) -> None:
  """Compare one seed with several seeds in one program."""
  for name, (make, side, channels) in {
    'digits network': (
      lambda classes: small.small(classes, widths=(32,), embedding=64),
      8,
      1,
    ),
    'MNIST network': (small.small, 28, 1),
  }.items():
    net, batch_spec = make(10), BatchSpec(50, 50)
    method = madnn(net, optimizers.optimizer, batch_spec, 1000)
    steps = {
      f'{seeds} at once': training_step(
        method, net, side, channels, seeds=seeds
      )
      for seeds in (1, 2, 5)
    }
    images = {k: batch_spec.size * int(k.split()[0]) for k in steps}
    show(
      f'{name}, seeds of MA-DNN',
      timing.rates(steps, images, rounds),
      '1 at once',
    )


PARTS = {
  'conv': part_conv,
  'madnn': part_madnn,
  'association': part_association,
  'r2d2': part_r2d2,
  'mc': part_mc,
  'seeds': part_seeds,
  'bank': bank_speed.part_bank,
  'stream': stream_speed.part_stream,
  'consistency': consistency_speed.part_consistency,
  'folder': folder_speed.part_folder,
}


def define_flags(values: flags.FlagValues) -> None:
  """Define the flags of this program."""
  flags.DEFINE_enum(
    'part', None, list(PARTS), 'Part to run; all if unset.', flag_values=values
  )
  flags.DEFINE_integer(
    'rounds',
    8,
    'Measurements of each variant; the best one counts.',
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_string(
    'bank_plot',
    None,
    'Picture file of the cost over the rows of the bank, for --part=bank.',
    flag_values=values,
  )


def act(asked: dict[str, Any]) -> None:
  """Run the parts that the flags select."""
  device = jax.devices()[0]
  print(f'{jax.device_count()} x {device.device_kind}, jax {jax.__version__}')
  plot = asked['bank_plot']
  if plot is not None:
    require(
      asked['part'] in (None, 'bank'),
      f'`bank_plot`={plot}: is a picture of `part`=bank: leave one out',
    )
    style.check_matplotlib()
    plot = main.as_output('bank_plot', plot)
    require(
      plot.suffix.lower() in ('.png', '.pdf', '.svg'),
      f'`bank_plot`={plot}: give a file that ends in .png, .pdf or .svg',
    )
  with_plot = functools.partial(bank_speed.part_bank, plot=plot)
  for name, part in (PARTS | {'bank': with_plot}).items():
    if asked['part'] in (None, name):
      part(asked['rounds'])


if __name__ == '__main__':
  tool.start('speed', define_flags, act)
