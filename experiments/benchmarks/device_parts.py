"""The measurements of `device_check.py`, one function per part.

Every part is a generator of rows, dicts of numbers and texts, so that what was
measured before a machine is taken away is kept.
"""

from collections.abc import Callable, Iterator
import functools
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssljax import registry
from ssljax.core import BatchSpec
from ssljax.experiments.benchmarks import (
  bank_speed,
  consistency_speed,
  timing,
  torch_steps,
)
from ssljax.experiments.benchmarks import steps as steps_lib
from ssljax.networks import convlarge, resnet, shakeshake, small, wide_resnet
from ssljax.networks import network as networks
from ssljax.networks.cpu import conv

CLASSES = 10
EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1]


class Case(NamedTuple):
  """A network and the images of a step."""

  make: Callable
  side: int
  channels: int
  batch: int


CASES = {
  'ConvLarge': Case(convlarge.convlarge, 32, 3, 512),
  'WRN-28-2': Case(wide_resnet.wide_resnet, 32, 3, 512),
  'WRN-28-8': Case(
    functools.partial(wide_resnet.wide_resnet, widen=8), 32, 3, 512
  ),
  'Shake-Shake': Case(shakeshake.shakeshake, 32, 3, 256),
  'ResNet-50': Case(functools.partial(resnet.resnet_v2, depth=50), 224, 3, 128),
  'MNIST network': Case(small.small, 28, 1, 1024),
}
DTYPES = 'float32', 'bfloat16'
# Dense bfloat16 products per second of a chip, from the makers' data sheets;
# the names are parts of `Device.device_kind`.
PEAKS = {
  'H100': 989e12,
  'H200': 989e12,
  'A100': 312e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v6': 918e12,
}


class Asked(NamedTuple):
  """What the flags of `device_check.py` ask for."""

  rounds: int
  batch: int | None = None  # images of a step; the case's if None
  networks: tuple[str, ...] = tuple(CASES)
  methods: tuple[str, ...] = ()  # to train
  rows: int = bank_speed.ROWS
  minutes: float = 4.0  # of each training
  data_dir: str | None = None
  runs: pathlib.Path = pathlib.Path()


def accelerator() -> dict[str, Any]:
  """Return the name, the number and the peak rate of the devices."""
  device = jax.devices()[0]
  peaks = [rate for name, rate in PEAKS.items() if name in device.device_kind]
  return {
    'device': f'{jax.device_count()} x {device.device_kind}',
    'platform': device.platform,
    'jax': jax.__version__,
    'peak': peaks[0] if peaks else None,
  }


# (a) Results that depend on the device.


def first_losses() -> dict[str, float]:
  """Return each method's loss in the third step of its first stage."""
  losses = {}
  net, spec = small.small(CLASSES), BatchSpec(16, 32)
  for name in ('madnn', 'r2d2', 'vat', 'fixmatch', 'freematch'):
    method = consistency_speed.without_augmentation(name, net, spec)
    step = steps_lib.training_step(method, net, 28, 1)
    for _ in range(3):
      metrics = step()
    losses[name] = float(np.asarray(metrics['loss']).ravel()[-1])
  return losses


def part_tests(asked: Asked) -> Iterator[dict[str, Any]]:
  """Compare losses with those of a CPU, and the search with NumPy's."""
  del asked
  with jax.default_matmul_precision('highest'):
    ours = first_losses()
  script = (
    'import json, jax; from ssljax.experiments.benchmarks import device_parts\n'
    'print(json.dumps(device_parts.first_losses()))'
  )
  done = subprocess.run(
    [sys.executable, '-c', script],
    capture_output=True,
    text=True,
    check=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  theirs = json.loads(done.stdout.splitlines()[-1])
  for name, loss in ours.items():
    yield {
      'test': f'{name}, loss of step 3',
      'device': loss,
      'CPU': theirs[name],
      'passed': math.isclose(loss, theirs[name], rel_tol=2e-3, abs_tol=1e-4),
    }
  bank, _, queries, _ = bank_speed.example(4096)
  found = np.asarray(bank_speed.search(queries, bank)[1])
  exact = np.argsort(-(queries.astype(np.float64) @ bank.T))[:, : bank_speed.K]
  share = float(np.mean(found == exact))
  yield {
    'test': f'the {bank_speed.K} nearest rows, share equal to float64',
    'device': share,
    'CPU': 1.0,
    'passed': share > 0.999,
  }


# (b) Throughput.


def forward_flops(net, shape: tuple[int, ...]) -> int:
  """Return the floating-point operations of a pass in training mode.

  They are those of convolutions and matrix products: two per multiply-add.

  Args:
    net: the network.
    shape: [B, H, W, c] of the images.
  """
  key, image = jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32)
  params, stats = jax.eval_shape(net.init, key, image)
  with conv.native():
    traced = jax.make_jaxpr(net.train)(params, stats, image, key)
  return _flops(traced.jaxpr)


def _flops(jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    kind, out = equation.primitive.name, equation.outvars[0].aval
    if kind == 'conv_general_dilated':
      kernel = equation.invars[1].aval  # its last axis has the outputs
      total += 2 * out.size * kernel.size // kernel.shape[-1]
    elif kind == 'dot_general':
      (axes, _), _ = equation.params['dimension_numbers']
      shape = equation.invars[0].aval.shape
      total += 2 * out.size * math.prod(shape[i] for i in axes)
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        total += _flops(inner)
  return total


def part_throughput(asked: Asked) -> Iterator[dict[str, Any]]:
  """Measure supervised steps of the networks, beside PyTorch's."""
  peak = accelerator()['peak']
  on_cpu = jax.default_backend() == 'cpu'
  for name in asked.networks:
    case = CASES[name]
    batch = asked.batch or case.batch
    own = case.make(CLASSES)
    shape = (batch, case.side, case.side, case.channels)
    flops = 3 * forward_flops(own, shape) / batch  # the gradients cost twice it
    for dtype in DTYPES:
      rates, first = {}, {}
      for kind, make in _steps(name, case, batch, dtype).items():
        began = time.perf_counter()
        try:
          step, count = make()
          step()
        except Exception as error:  # out of memory, or a compiler that fails
          first[kind] = f'{type(error).__name__}: {str(error)[:80]}'
          continue
        first[kind] = round(time.perf_counter() - began, 1)
        rates |= timing.rates({kind: step}, {kind: count}, asked.rounds)
        del step  # frees the device's memory
      best = max((r for k, r in rates.items() if k != 'ours'), default=None)
      ours = rates.get('ours')
      yield {
        'network': name,
        'dtype': dtype,
        'batch': batch,
        'images per second': ours and round(ours, 1),
        'over PyTorch': ours and best and round(ours / best, 2),
        'of the bfloat16 peak': ours and peak and round(ours * flops / peak, 3),
        'GFLOP per image': round(flops / 1e9, 3),
        'seconds of the first call': first,
        'all': {kind: round(rate, 1) for kind, rate in rates.items()},
        'one step per call': on_cpu,
      }


def _steps(name: str, case: Case, batch: int, dtype: str) -> dict:
  """Return makers of (step, images of a call) of ours and of PyTorch's."""
  at_once = 1 if jax.default_backend() == 'cpu' else 10

  def ours():
    net = networks.computing_in(case.make(CLASSES), dtype)
    method = steps_lib.supervised_on(net, BatchSpec(batch))
    step = steps_lib.training_step(
      method, net, case.side, case.channels, at_once=at_once
    )
    return step, at_once * batch

  def theirs(compiled: bool):
    shape = (batch, case.channels, case.side, case.side)
    device = 'cuda' if jax.default_backend() == 'gpu' else 'cpu'
    step = torch_steps.supervised_step(
      torch_steps.NETWORKS[name](),
      shape,
      device=device,
      bfloat16=dtype == 'bfloat16',
      compiled=compiled,
    )
    return step, batch

  found = {'ours': ours}
  has_torch = importlib.util.find_spec('torch') is not None
  if has_torch and name in torch_steps.NETWORKS:
    found['PyTorch'] = functools.partial(theirs, False)
    if jax.default_backend() == 'gpu':
      found['PyTorch, compiled'] = functools.partial(theirs, True)
  return found


# (c) Overheads.


def part_overheads(asked: Asked) -> Iterator[dict[str, Any]]:
  """Measure each method's step over a supervised step on the same images."""
  for name in ('madnn', 'r2d2', *consistency_speed.METHODS):
    found = consistency_speed.overhead(name, asked.rounds)
    yield {
      'method': name,
      'ratio': round(found.ratio, 3),
      'images of the supervised step': found.size,
      'trained': found.passes.trained,
      'inferred': found.passes.inferred,
    }


# (d) LLP's bank.


def part_bank(asked: Asked) -> Iterator[dict[str, Any]]:
  """Measure LLP's loss and search as fractions of a plain product."""
  bank, labels, queries, own = map(jnp.asarray, bank_speed.example(asked.rows))
  for precision in ('default', 'highest'):
    jax.clear_caches()  # the precision is no part of what is cached
    with jax.default_matmul_precision(precision):
      rates = bank_speed.show_rates(bank, labels, queries, own, asked.rounds)
    yield {
      'rows': asked.rows,
      'matrix precision': precision,
      'loss with gradient, of a product': round(rates['aggregation'], 2),
      'search, of a product': round(rates['search'], 2),
    }


# (e), (f) Training.

PRESETS = {
  'madnn': 'madnn.cifar10-4000',
  'supervised': 'supervised.cifar10-4000',
  'r2d2': 'r2d2.cifar10-4000',
}
# FixMatch's settings for CIFAR-10 with WRN-28-2 (Sohn et al. 2020, Table 4).
FIXMATCH = (
  *('--dataset=cifar10', '--labels=400', '--unlabelled=all'),
  *('--network=wrn28_2', '--batch_labelled=64', '--batch_unlabelled=448'),
  *('--augment=flip,translate:4', '--preprocess=none', '--optimizer=sgd'),
  *('--learning_rate=0.03', '--nesterov', '--weight_decay=5e-4'),
  *('--decay=cosine716', '--ema=0.999'),
)


def training_flags(method: str, asked: Asked) -> list[str]:
  """Return the command that trains a method for so many minutes."""
  if method in PRESETS:
    preset = EXPERIMENTS / 'presets' / f'{PRESETS[method]}.flags'
    settings = [f'--flagfile={preset}']
  else:
    registry.choose('methods', method, ['fixmatch', *PRESETS])
    settings = list(FIXMATCH)
  return [
    *(sys.executable, str(EXPERIMENTS / f'{method}.py'), *settings),
    *(f'--minutes={asked.minutes}', '--seeds=1', '--nobaseline'),
    *([f'--data_dir={asked.data_dir}'] if asked.data_dir else []),
    f'--workdir={asked.runs / method}',
  ]


def part_train(asked: Asked) -> Iterator[dict[str, Any]]:
  """Train methods on CIFAR-10 with 4,000 labels, each for some minutes."""
  for method in asked.methods:
    began = time.perf_counter()
    done = subprocess.run(training_flags(method, asked), check=False)
    path = asked.runs / method / 'result.json'
    found = json.loads(path.read_text()) if path.exists() else {}
    yield {
      'method': method,
      'minutes': round((time.perf_counter() - began) / 60, 2),
      'exit status': done.returncode,
      'steps': found.get('steps'),
      'seconds of training': found.get('seconds'),
      'test error': found.get('test_error'),
    }


PARTS: dict[str, Callable[[Asked], Iterator[dict[str, Any]]]] = {
  'tests': part_tests,
  'throughput': part_throughput,
  'overheads': part_overheads,
  'bank': part_bank,
  'train': part_train,
}
