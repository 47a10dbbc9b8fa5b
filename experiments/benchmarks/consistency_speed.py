"""Benchmark consistency methods: FixMatch's step, RandAugment, overheads."""

from collections.abc import Callable
import functools
import importlib.util
import inspect
import os
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from ssljax import optimizers, registry
from ssljax.augment import named
from ssljax.core import BatchSpec, Method
from ssljax.experiments.benchmarks import steps as steps_lib
from ssljax.experiments.benchmarks import timing, torch_steps
from ssljax.methods.fixmatch import fixmatch
from ssljax.networks import small, wide_resnet

LABELLED, RATIO, SIDE, CLASSES = 16, 7, 32, 10
UNLABELLED = LABELLED * RATIO
IMAGES = LABELLED + 2 * UNLABELLED  # that FixMatch's network sees in a step
WEAK = ('flip', 'translate:4')
STRONG = (*WEAK, 'randaugment:2:10', 'cutout:0.5')
PAIRS = 512  # images of an augmentation's measurement
METHODS = (
  *('pseudo_label', 'pi_model', 'temporal_ensembling', 'mean_teacher', 'vat'),
  *('ict', 'mixmatch', 'uda', 'fixmatch', 'flexmatch', 'freematch'),
  *('softmatch', 'laplacenet'),
)


def part_consistency(rounds: int) -> None:
  """Measure FixMatch's step, augmentation and the methods' overheads.

  Args:
    rounds: number of measurements.
  """
  has_torch = importlib.util.find_spec('torch') is not None
  if not has_torch:
    print('\nPyTorch is left out: it is not installed (pip install torch)')
  print(f'load of the machine: {os.getloadavg()[0]:.1f}')
  show_step(rounds, has_torch)
  show_pairs(rounds, has_torch)
  show_overheads(rounds)


# FixMatch's step.


def show_step(rounds: int, has_torch: bool) -> None:
  """Print the rates of FixMatch's step, and the time of the first call."""
  net, spec = wide_resnet.wide_resnet(CLASSES), BatchSpec(LABELLED, UNLABELLED)
  tx = functools.partial(
    optimizers.optimizer, learning_rate=0.03, weight_decay=5e-4, clip=0.0
  )
  make = lambda strong: steps_lib.training_step(
    fixmatch(net, tx, spec, 1000, strong_augment=strong), net, SIDE, 3
  )
  steps = {
    'ours': make(()),
    'ours, with RandAugment': make(('randaugment:2:10', 'cutout')),
  }
  against = []
  if has_torch:
    for layout in ('contiguous_format', 'channels_last'):
      steps[f'PyTorch {layout}'] = torch_fixmatch(layout)
  first = {name: first_call(step) for name, step in steps.items()}
  measured = timing.rates(steps, dict.fromkeys(steps, IMAGES), rounds)
  if has_torch:
    against = [max(list(measured)[2:], key=measured.get)]
  steps_lib.show(
    f'FixMatch with WRN-28-2, {LABELLED} + {UNLABELLED} + {UNLABELLED} images '
    f'of {SIDE}x{SIDE}; the views are given, unless RandAugment is named',
    measured,
    *against,
  )
  cached = ' (with a compilation cache)' if has_cache() else ''
  for name, seconds in first.items():
    print(f'  first call of {name}: {seconds:.1f} s{cached}')


def has_cache() -> bool:
  """Return True if compiled programs are taken from a folder."""
  return jax.config.jax_compilation_cache_dir is not None


def first_call(step: Callable) -> float:
  """Return the seconds of the first call of a step, which compiles it."""
  began = time.perf_counter()
  step()
  return time.perf_counter() - began


def torch_fixmatch(layout: str) -> Callable:
  """Return a function that trains one step of FixMatch in PyTorch.

  Args:
    layout: memory format, 'contiguous_format' or 'channels_last'.
  """
  import torch
  from torch import nn

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  memory = {'memory_format': getattr(torch, layout)}
  net = torch_steps.wide_resnet().to(**memory)
  average = [x.detach().clone() for x in net.state_dict().values()]
  tx = torch.optim.SGD(
    net.parameters(), 0.03, momentum=0.9, nesterov=True, weight_decay=5e-4
  )
  images = torch.rand(IMAGES, 3, SIDE, SIDE).to(**memory)
  labels = torch.arange(LABELLED) % CLASSES
  entropy = functools.partial(nn.functional.cross_entropy, reduction='none')

  def step():
    tx.zero_grad()
    logits = net(images)
    given, weak, strong = logits.split([LABELLED, UNLABELLED, UNLABELLED])
    confidence, label = weak.detach().softmax(-1).max(-1)
    mask = (confidence >= 0.95).float()
    loss = (
      entropy(given, labels).mean() + (entropy(strong, label) * mask).mean()
    )
    loss.backward()
    tx.step()
    with torch.no_grad():
      for old, new in zip(average, net.state_dict().values(), strict=True):
        if old.is_floating_point():
          old.lerp_(new, 0.001)

  return step


# Augmentation.


def show_pairs(rounds: int, has_torch: bool) -> None:
  """Print the weakly and strongly augmented pairs per second of a core."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (PAIRS, SIDE, SIDE, 3), np.uint8)
  on_cpu = jax.default_backend() == 'cpu'
  steps = {'ours': our_pairs(pixels)}
  if has_torch:
    steps |= torchvision_pairs(pixels) | kornia_pairs(pixels)
  # Processor time of all threads is the time of one core.
  clock = time.process_time if on_cpu else time.perf_counter
  measured = timing.rates(steps, dict.fromkeys(steps, PAIRS), rounds, clock)
  best = [max(list(measured)[1:], key=measured.get)] if len(steps) > 1 else []
  steps_lib.show(
    f'pairs of a weak view (flip, translate) and a strong one (also '
    f'RandAugment, n = 2, m = 10, and cutout), {SIDE}x{SIDE}x3, one core',
    measured,
    *best,
  )


def our_pairs(pixels: np.ndarray) -> Callable:
  """Return a function that makes a pair of views of every image.

  Args:
    pixels: uint8 `[N, H, W, 3]`.
  """
  chains = []
  for names in (WEAK, STRONG):
    found = [chain for chain in named.split_chain(names) if chain]
    chains.append(found)

  def pair(key, image):
    image = image.astype(jnp.float32) / 255
    views = []
    for number, chain in enumerate(chains):
      view = image
      for part, augment in enumerate(chain):
        view = augment(jax.random.fold_in(key, 10 * number + part), view)
      views.append(view)
    return views

  batch = jax.jit(jax.vmap(pair))
  keys = jax.random.split(jax.random.key(0), len(pixels))
  images = jax.device_put(pixels)
  return lambda: jax.block_until_ready(batch(keys, images))


def torchvision_pairs(pixels: np.ndarray) -> dict[str, Callable]:
  """Return functions of torchvision, on PIL images and on tensors."""
  if importlib.util.find_spec('torchvision') is None:
    print('torchvision is left out: it is not installed')
    return {}
  import torch

  v2 = torchvision_transforms()
  weak = [
    v2.RandomHorizontalFlip(),
    v2.RandomCrop(SIDE, 4, padding_mode='reflect'),
  ]
  strong = [*weak, v2.RandAugment(2, 10)]
  end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
  cutout = v2.RandomErasing(1.0, (0.25, 0.25), (1.0, 1.0))
  views = v2.Compose([*weak, *end]), v2.Compose([*strong, *end, cutout])
  pictures = [PIL.Image.fromarray(image) for image in pixels]
  tensors = list(torch.from_numpy(pixels).permute(0, 3, 1, 2))
  run = lambda images: one_thread(
    lambda: [view(image) for image in images for view in views]
  )
  return {
    'torchvision, PIL': run(pictures),
    'torchvision, tensors': run(tensors),
  }


def torchvision_transforms():
  """Return torchvision's module of transforms.

  A wheel for CUDA beside PyTorch for CPUs lacks its compiled operators. The
  transforms use none of them, but the import expects two to be declared.
  """
  import torch

  try:
    from torchvision.transforms import v2
  except RuntimeError:
    for name in [name for name in sys.modules if 'torchvision' in name]:
      del sys.modules[name]
    arguments = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
    for name in ('nms', 'qnms'):
      torch.library.define(f'torchvision::{name}', arguments)
    from torchvision.transforms import v2
  return v2


def kornia_pairs(pixels: np.ndarray) -> dict[str, Callable]:
  """Return a function of kornia, which draws the operations once a batch."""
  if importlib.util.find_spec('kornia') is None:
    print('kornia is left out: it is not installed')
    return {}
  from kornia import augmentation
  import torch

  weak = [
    augmentation.RandomHorizontalFlip(),
    augmentation.RandomCrop((SIDE, SIDE), padding=4, padding_mode='reflect'),
  ]
  strong = [
    *weak,
    augmentation.auto.RandAugment(2, 10),
    augmentation.RandomErasing((0.25, 0.25), (1.0, 1.0), p=1.0),
  ]
  views = [torch.nn.Sequential(*chain) for chain in (weak, strong)]
  images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
  # It draws the operations once for all images of a batch, ours for each one.
  parts = images.split(16)
  step = lambda: [view(part) for part in parts for view in views]
  return {'kornia, batches of 16': one_thread(step)}


def one_thread(step: Callable) -> Callable:
  """Return a function that runs PyTorch in one thread."""
  import torch

  def run():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
      step()
    torch.set_num_threads(threads)

  return run


# Overheads.


class Passes(NamedTuple):
  """The images of a step, by pass."""

  trained: list[int]  # of each pass in training mode
  inferred: list[int]  # of each pass in inference mode


def counted(net) -> tuple:
  """Return a network and its `Passes`, which are filled when it is traced."""
  passes = Passes([], [])

  def train(params, stats, image, *more, **kwargs):
    passes.trained.append(len(image))
    return net.train(params, stats, image, *more, **kwargs)

  def infer(params, stats, image, *more, **kwargs):
    passes.inferred.append(len(image))
    return net.infer(params, stats, image, *more, **kwargs)

  return net._replace(train=train, infer=infer), passes


def without_augmentation(name: str, net, spec: BatchSpec) -> Method:
  """Return a method whose strong views are not augmented."""
  factory = registry.METHODS[name].factory
  own = inspect.signature(factory).parameters
  more = {'strong_augment': ()} if 'strong_augment' in own else {}
  return factory(net, optimizers.optimizer, spec, 1000, **more)


class Overhead(NamedTuple):
  """The cost of a method's step."""

  ratio: float  # of its time and of a supervised step's
  size: int  # images of the supervised step: of the method's largest pass
  passes: Passes


def overhead(name: str, rounds: int) -> Overhead:
  """Measure a method's step beside a supervised step on the same images.

  Args:
    name: of the method.
    rounds: number of measurements.
  """
  net, spec = small.small(CLASSES), BatchSpec(LABELLED, UNLABELLED)
  make = functools.partial(steps_lib.training_step, side=28, channels=1)
  counting, passes = counted(net)
  method = without_augmentation(name, counting, spec)
  step = make(method, counting, stage=len(method.stages) - 1)
  for counts in passes:
    counts.clear()
  step()  # traces it, which counts the passes
  size = max(passes.trained)
  plain = make(steps_lib.supervised_on(net, BatchSpec(size)), net)
  taken = timing.seconds({'own': step, 'plain': plain}, rounds)
  return Overhead(taken['own'] / taken['plain'], size, passes)


def show_overheads(rounds: int) -> None:
  """Print the time of every method's step over that of a supervised step."""
  print(
    f'\noverhead over a supervised step on the same images, MNIST network, '
    f'{LABELLED} + {UNLABELLED} images of 28x28; views are given'
  )
  for name in METHODS:
    found = overhead(name, rounds)
    trained, inferred = (' + '.join(map(str, p)) for p in found.passes)
    also = f', inference: {inferred}' if inferred else ''
    print(
      f'  {name:22s}{found.ratio:5.2f} x of {found.size}  passes: '
      f'{trained}{also}'
    )
