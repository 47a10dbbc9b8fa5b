"""How fast a training step is, as ratios within one run.

  python experiments/speed.py                 all parts
  python experiments/speed.py --part=conv     native convolutions, ours, PyTorch
  python experiments/speed.py --part=madnn    MA-DNN's step beside a supervised
  python experiments/speed.py --part=association  its step and its losses
  python experiments/speed.py --part=r2d2     D2's step beside a supervised
  python experiments/speed.py --part=mc       passes with dropout in one program
  python experiments/speed.py --part=seeds    seeds at once beside in turn
  python experiments/speed.py --part=bank     a bank of ImageNet's size
  python experiments/speed.py --part=stream   decoding and augmenting at 224

What is compared is measured in turn, round after round, in one process, and
the best round counts: a shared machine slows everything down alike, or only
some rounds. PyTorch, where it is installed, is measured in both memory formats.
"""

from collections.abc import Callable
import contextlib
import functools
import importlib.util
import itertools
import os
from unittest import mock

from absl import app, flags
import jax
import numpy as np

from ssljax import optimizers
from ssljax.active import acquisition
from ssljax.augment import preprocess
from ssljax.core import BatchSpec, Method, Stage
from ssljax.data import feeds, sampling, splits
from ssljax.distributed import placement
from ssljax.experiments.benchmarks import bank_speed, stream_speed, timing
from ssljax.methods import association
from ssljax.methods.madnn import madnn
from ssljax.methods.r2d2 import r2d2
from ssljax.methods.supervised import supervised_loss
from ssljax.networks import convlarge, deepbass, elu, small
from ssljax.networks.cpu import conv
from ssljax.training import compiled as compiled_lib

# name -> (network, image side, channels, batch)
NETWORKS = {
  'ConvLarge': (convlarge.convlarge, 32, 3, 64),
  'MNIST network': (small.small, 28, 1, 100),
}


def show(title: str, measured: dict[str, float], *against: str) -> None:
  """Prints a row per variant, with its ratio to some of them."""
  print(f'\n{title}')
  for name, rate in measured.items():
    ratios = [f'{rate / measured[a]:5.2f} x {a}' for a in against]
    print(f'  {name:24s}{rate:9.1f} images/s  {"  ".join(ratios)}')


def make_step(
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
) -> Callable:
  """A training step of a stage on random images, ready to call."""
  method = method._replace(averaging=optimizers.averaging(average=average))
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
    ((i, i + 1) for i in itertools.count()),
  )

  def step():
    nonlocal state
    pixels, rows = next(fetched)
    step_of = compiled.steps[stage]
    source, first = (pixels, compiled.fitted), np.int32(0)
    state, metrics = step_of(state, source, rows, first)
    jax.block_until_ready((state, metrics))

  return step


def supervised_on(
  net, batch_spec: BatchSpec, tx=optimizers.optimizer
) -> Method:
  """Cross-entropy alone, on the same images as a method of that draw."""
  stage = Stage(
    name='supervised',
    steps=1000,
    tx=tx(1000),
    batch_spec=batch_spec,
    loss=supervised_loss(net),
  )
  return Method(name='supervised', stages=(stage,))


def torch_step(name: str, batch: int, side: int, channels: int, layout: str):
  """The same network's step in PyTorch, in one of its memory formats."""
  import torch
  from torch import nn

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  layers = []

  def block(features, kernel=3, padding='same'):
    nonlocal channels
    convolution = nn.Conv2d(
      channels, features, kernel, padding=padding, bias=False
    )
    norm = nn.BatchNorm2d(features, eps=1e-3)
    layers.extend([convolution, norm, nn.LeakyReLU(0.1, inplace=True)])
    channels = features

  large = name == 'ConvLarge'
  for width in (128, 256) if large else (32, 64):
    for _ in range(3 if large else 2):
      block(width)
    layers.extend([nn.MaxPool2d(2, ceil_mode=True), nn.Dropout(0.5)])
  block(512 if large else 128, padding='valid')
  if large:
    block(256, 1)
    block(128, 1)
  head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)]
  memory = {'memory_format': getattr(torch, layout)}
  shape = (batch, NETWORKS[name][2], side, side)
  net = nn.Sequential(*layers, *head).to(**memory)
  tx = torch.optim.SGD(
    net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=4e-5
  )
  image, labels = torch.rand(shape).to(**memory), torch.arange(batch) % 10

  def step():
    tx.zero_grad()
    nn.functional.cross_entropy(net(image), labels).backward()
    nn.utils.clip_grad_value_(net.parameters(), 2.0)
    tx.step()

  return step


def part_conv(epochs: int) -> None:
  """Native, ours and PyTorch, of whole training steps."""
  for name, (make, side, channels, batch) in NETWORKS.items():
    net = make(10)
    method = supervised_on(net, BatchSpec(batch))
    steps = {}
    with conv.native():
      steps['native'] = make_step(method, net, side, channels)
      steps['native']()  # traced here, where it is native
    steps['ours'] = make_step(method, net, side, channels)
    against = ['native']
    if importlib.util.find_spec('torch'):
      for layout in ('contiguous_format', 'channels_last'):
        steps[f'PyTorch {layout}'] = torch_step(
          name, batch, side, channels, layout
        )
    measured = timing.rates(steps, dict.fromkeys(steps, batch), epochs)
    if len(steps) > 2:
      best = max(list(measured)[2:], key=measured.get)
      against.append(best)
    show(f'{name}, batch {batch}, {side}x{side}x{channels}', measured, *against)


def part_madnn(epochs: int) -> None:
  """What the memory costs: the same images, with and without it."""
  for name, (make, side, channels, batch) in NETWORKS.items():
    net, batch_spec = make(10), BatchSpec(batch // 2, batch // 2)
    tx = optimizers.optimizer
    methods = {
      'supervised': supervised_on(net, batch_spec),
      'MA-DNN': madnn(net, tx, batch_spec, 1000),
      'MA-DNN, L1 distance': madnn(net, tx, batch_spec, 1000, distance='l1'),
    }
    steps = {k: make_step(m, net, side, channels) for k, m in methods.items()}
    measured = timing.rates(steps, dict.fromkeys(steps, batch), epochs)
    show(
      f'{name}, {batch_spec.labelled} + {batch_spec.unlabelled} images',
      measured,
      'supervised',
    )
    cost = measured['supervised'] / measured['MA-DNN']
    print(f'  a step of MA-DNN takes {cost:.3f} x a supervised one')


def part_association(epochs: int) -> None:
  """What association costs: of a step, and alone on large batches."""
  net, batch_spec = elu.elu(10), BatchSpec(100, 100, classes=10)
  tx = optimizers.optimizer
  steps = {
    'supervised': make_step(supervised_on(net, batch_spec), net, 28, 1),
    'association': make_step(
      association.association(net, tx, batch_spec, 1000), net, 28, 1
    ),
  }
  measured = timing.rates(steps, dict.fromkeys(steps, batch_spec.size), epochs)
  show('ELU network, 100 + 100 images, D = 128', measured, 'supervised')
  cost = measured['supervised'] / measured['association']
  print(f'  a step of association takes {cost:.3f} x a supervised one')
  association_losses(1000, 10_000, 128, epochs)


def association_losses(na: int, nb: int, dim: int, epochs: int) -> None:
  """The losses and their slopes: as they are, and keeping all intermediates."""
  rng = np.random.default_rng(0)
  a, b = (rng.normal(0, 0.2, (n, dim)).astype(np.float32) for n in (na, nb))
  labels = np.arange(na) % 10

  def losses(a, b):
    trips = association.associate(a, b, labels)
    return trips.walker + trips.visit

  descend = lambda: jax.jit(jax.value_and_grad(losses, (0, 1)))
  one = na * nb * 4  # bytes of the similarities
  steps, memory = {}, {}
  for name, keep in {'recomputed': False, 'kept': True}.items():
    patch = (
      mock.patch.object(jax, 'checkpoint', lambda f, **_: f)
      if keep
      else contextlib.nullcontext()
    )
    with patch:
      kept = jax.tree.leaves(jax.vjp(losses, a, b)[1])
      compiled = descend().lower(a, b).compile()
    steps[name] = lambda f=compiled: jax.block_until_ready(f(a, b))
    temporary = compiled.memory_analysis().temp_size_in_bytes
    residuals = sum(x.nbytes for x in kept)
    memory[name] = residuals / one, temporary / one
  print(f'\nlosses alone, Na = {na}, Nb = {nb}, D = {dim}')
  measured = timing.rates(steps, dict.fromkeys(steps, 1), epochs)
  for name, rate in measured.items():
    residuals, temporary = memory[name]
    print(
      f'  {name:12s}{1e3 / rate:8.0f} ms  {measured["kept"] / rate:5.2f} x kept'
      f'  kept for the backward pass {residuals:5.2f}, at most at once '
      f'{temporary:5.2f} x (Na x Nb)'
    )


def part_r2d2(epochs: int) -> None:
  """What pseudo-logits cost: the same images, with and without them."""
  net, batch_spec, rows = small.small(10), BatchSpec(32, 96), 60_000
  # As R2-D2 has it: momentum and weight decay, nothing else.
  tx = functools.partial(optimizers.optimizer, clip=0.0)
  make = functools.partial(
    make_step,
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
  measured = timing.rates(steps, dict.fromkeys(steps, batch_spec.size), epochs)
  show(f'MNIST network, 32 + 96 of {rows} images', measured, 'supervised')
  cost = measured['supervised'] / measured['D2']
  print(f'  a step of D2 takes {cost:.3f} x a supervised one')


def part_mc(epochs: int) -> None:
  """What T passes with dropout cost beside T calls of one, and of none."""
  passes, batch = 10, 512
  for name, make in {
    'MNIST network': small.small,
    "DeepBASS's network": deepbass.deepbass,
  }.items():
    calls, megabytes = dropout_passes(make(10), passes, batch)
    measured = timing.rates(calls, dict.fromkeys(calls, batch), epochs)
    show(f'{name}, batch {batch}', measured, *list(calls)[1:])
    for count, size in megabytes.items():
      print(f'  {count:3d} passes hold {size:8.2f} MiB at a time')


def dropout_passes(net, passes: int, batch: int) -> tuple[dict, dict]:
  """Calls that infer so many times, and MiB that 10 and 100 passes hold."""
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


def part_seeds(epochs: int) -> None:
  """Images per second of one seed, and of several in one program."""
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
      f'{seeds} at once': make_step(method, net, side, channels, seeds=seeds)
      for seeds in (1, 2, 5)
    }
    images = {k: batch_spec.size * int(k.split()[0]) for k in steps}
    show(
      f'{name}, seeds of MA-DNN',
      timing.rates(steps, images, epochs),
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
}
_PART = flags.DEFINE_enum('part', None, list(PARTS), 'One part; all if unset.')
_ROUNDS = flags.DEFINE_integer('rounds', 8, 'Measurements, the best counts.', 1)


def main(argv) -> None:
  """Runs the parts asked for."""
  del argv
  placement.configure_cpu()
  device = jax.devices()[0]
  print(f'{jax.device_count()} x {device.device_kind}, jax {jax.__version__}')
  for name, part in PARTS.items():
    if _PART.value in (None, name):
      part(_ROUNDS.value)


if __name__ == '__main__':
  app.run(main)
