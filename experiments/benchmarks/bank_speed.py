"""LLP's bank at ImageNet's size: rates, memory, growth, devices.

What is searched or summed is counted in multiply-adds of the products alone,
and compared with one plain matrix product of the same shapes. D = 128 numbers
in a row, B = 128 queries.
"""

import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

from absl import flags
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from ssljax import neighbours
from ssljax.core import rounded_up
from ssljax.distributed import placement
from ssljax.experiments.benchmarks import timing
from ssljax.experiments.figures import style

ROWS, LABELLED, DIM, QUERIES, TAU, K = 1_281_167, 128_116, 128, 128, 0.07, 10
SIZES = tuple(ROWS // n for n in (8, 4, 2, 1))
DEVICES = (1, 2, 4, 8)

_PLOT = flags.DEFINE_string(
  'bank_plot', None, 'Picture of the cost over N, for --part=bank.'
)


@functools.cache
def example(rows: int = ROWS):
  """A bank `[rows, D]`, its labels, queries `[B, D]`, their labels."""
  rng = np.random.default_rng(0)
  bank = rng.standard_normal((rows, DIM), np.float32)
  bank /= np.linalg.norm(bank, axis=1, keepdims=True)
  labels = rng.integers(0, 1000, rows).astype(np.int32)
  some = rng.integers(0, rows, QUERIES)
  return bank, labels, bank[some] + np.float32(0.01), labels[some]


@jax.jit
def product(queries, bank):
  """What everything is compared with."""
  return queries @ bank.T


@jax.jit
def aggregation(v, own, bank, labels):
  """Eq. 3 with its slope by the queries."""
  loss = lambda v: jnp.mean(
    neighbours.aggregation_loss(v, own, bank, labels, TAU)
  )
  return jax.value_and_grad(loss)(v)


@jax.jit
def search(queries, bank):
  """The K nearest of Eq. 8."""
  return neighbours.nearest(queries, bank, K)


def call(f, *args):
  """`f` of arrays, ready to be timed."""
  return lambda: jax.block_until_ready(f(*args))


def part_bank(rounds: int) -> None:
  """Rates, memory, growth with N, and devices."""
  bank, labels, v, own = map(jnp.asarray, example())
  show_rates(bank, labels, v, own, rounds)
  show_memory(bank, labels, v, own)
  show_rounding(bank, labels, v, own)
  show_growth(bank, labels, v, own, rounds)
  show_devices()


def show_rates(bank, labels, v, own, rounds: int) -> None:
  """As fractions of a plain product's rate, and beside faiss."""
  known = bank[:LABELLED]
  steps = {
    'product': call(product, v, bank),
    'aggregation': call(aggregation, v, own, bank, labels),
    'small product': call(product, v, known),
    'search': call(search, v, known),
  }
  if importlib.util.find_spec('faiss'):
    import faiss

    index = faiss.IndexFlatIP(DIM)
    index.add(np.asarray(known))
    queries = np.asarray(v)
    steps['faiss'] = lambda: index.search(queries, K)
  taken = timing.seconds(steps, rounds)
  # Of the loss three products: logits, logits again, and the slope.
  times = {
    f'aggregation with slope, N = {len(bank)}': (3, 'product', 'aggregation'),
    f'top {K} of {LABELLED}': (1, 'small product', 'search'),
  }
  flops = 2 * QUERIES * DIM * len(bank) / taken['product']
  print(
    f'\nB = {QUERIES}, D = {DIM}; a plain product: {flops / 1e9:.0f} GFLOP/s'
  )
  for title, (products, plain, ours) in times.items():
    rate = products * taken[plain] / taken[ours]
    print(f'  {title}: {1e3 * taken[ours]:.0f} ms, {rate:.2f} x its rate')
  if 'faiss' in taken:
    print(f'  {taken["faiss"] / taken["search"]:.1f} x as fast as faiss')


def peak(f) -> int | None:
  """Bytes by which the process grows at most while `f()` runs; Linux alone."""
  process = pathlib.Path('/proc/self')
  field = lambda name: next(
    1024 * int(line.split()[1])
    for line in (process / 'status').read_text().splitlines()
    if line.startswith(name)
  )
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).malloc_trim(0)  # what was freed counts again
    (process / 'clear_refs').write_text('5')  # forgets the peak there was
    before = field('VmRSS')
    f()
    return field('VmHWM') - before
  return None


def show_memory(bank, labels, v, own) -> None:
  """What is held beside the bank, as a share of it."""
  programs = {
    'aggregation': (aggregation, v, own, bank, labels),
    'search': (search, v, bank[:LABELLED]),
  }
  print(f'\nmemory beside the bank of {bank.nbytes / 2**20:.0f} MiB')
  for name, (f, *args) in programs.items():
    share = lambda size: f'{100 * size / bank.nbytes:.1f} %'
    planned = f.lower(*args).compile().memory_analysis().temp_size_in_bytes
    grown = peak(call(f, *args))
    measured = '' if grown is None else f', measured {share(grown)}'
    print(f'  {name:12s} planned {share(planned)}{measured}')


def show_rounding(bank, labels, v, own) -> None:
  """What a bank in bfloat16 changes."""
  rounded = bank.astype(jnp.bfloat16)
  (exact, slope), (loss, other) = (
    aggregation(v, own, b, labels) for b in (bank, rounded)
  )
  known = slice(LABELLED)
  same = search(v, bank[known])[1] == search(v, rounded[known])[1]
  change = jnp.linalg.norm(other - slope) / jnp.linalg.norm(slope)
  print(
    f'\na bank in bfloat16, half the bytes: loss {float(loss):.5f} for '
    f'{float(exact):.5f}, slope off by {100 * float(change):.2f} %, '
    f'{100 * float(jnp.mean(same)):.1f} % of the top {K} in the same place'
  )


def show_growth(bank, labels, v, own, rounds: int) -> None:
  """Milliseconds over N, which should be a straight line."""
  steps = {}
  for size in SIZES:
    steps[f'aggregation {size}'] = call(
      aggregation, v, own, bank[:size], labels[:size]
    )
    steps[f'search {size}'] = call(search, v, bank[:size])
  taken = timing.seconds(steps, rounds)
  print('\nms over N', *(f'{size:>10d}' for size in SIZES))
  curves = {
    name: [1e3 * taken[f'{name} {size}'] for size in SIZES]
    for name in ('aggregation', 'search')
  }
  for name, curve in curves.items():
    print(f'  {name:12s}', *(f'{ms:9.1f}' for ms in curve), end='')
    per_row = [ms / size for ms, size in zip(curve, SIZES, strict=True)]
    print(f'   per row {per_row[-1] / per_row[0]:.2f} x that of the first')
  if _PLOT.value:
    draw_growth(curves, _PLOT.value)


def draw_growth(curves: dict[str, list[float]], path: str) -> None:
  """Saves a picture of milliseconds over N."""
  with style.style():
    from matplotlib import figure

    drawn = figure.Figure(figsize=(3.4, 2.4), layout='constrained')
    axes = drawn.subplots()
    labels = {
      'aggregation': 'aggregation loss and slope',
      'search': f'top {K}',
    }
    millions = [size / 1e6 for size in SIZES]
    for name, curve in curves.items():
      axes.plot(millions, curve, 'o-', markersize=3, label=labels[name])
    axes.set(xlabel='rows of the bank, in millions', ylabel='ms')
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False)
    drawn.savefig(path)


def show_devices() -> None:
  """Bytes on a device, of a bank split over 1, 2, 4, 8."""
  script = f'import bank_speed; bank_speed.print_devices({ROWS})'
  done = subprocess.run(
    [sys.executable, '-c', script],
    capture_output=True,
    text=True,
    check=True,
    cwd=pathlib.Path(__file__).parent,
    env=os.environ | {'JAX_NUM_CPU_DEVICES': '8', 'JAX_PLATFORMS': 'cpu'},
  )
  print('\ndevices   bank, bytes on each   beside it   x 1 device')
  first = None
  for line in json.loads(done.stdout.splitlines()[-1]):
    devices, held, temporary = line
    first = first or held
    print(f'  {devices:5d}{held:22d}{temporary:12d}{held / first:13.3f}')


def print_devices(rows: int) -> None:
  """`[devices, bytes of the bank, of the program beside it]`, as JSON."""
  placement.configure_cpu()
  print(json.dumps([on_devices(devices, rows) for devices in DEVICES]))


def on_devices(devices: int, rows: int) -> tuple[int, int, int]:
  """What one of some devices holds of a bank, and of the loss's program."""
  mesh = placement.make_mesh([devices])
  count = rounded_up(rows, placement.row_multiple(mesh))
  split, whole = (NamedSharding(mesh, spec) for spec in (P('data'), P()))
  bank = jax.device_put(np.zeros((count, DIM), np.float32), split)
  labels = jax.device_put(np.zeros(count, np.int32), split)
  v = jax.device_put(np.zeros((QUERIES, DIM), np.float32), whole)
  own = jax.device_put(np.zeros(QUERIES, np.int32), whole)
  with jax.set_mesh(mesh):
    compiled = aggregation.lower(v, own, bank, labels).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  return devices, bank.addressable_shards[0].data.nbytes, temporary
