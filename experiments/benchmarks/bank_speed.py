"""Benchmark LLP's bank at ImageNet's size: rates, memory, growth, devices.

Rates count the multiply-adds of the matrix products alone. They are compared
with one plain matrix product of the same shapes. A row has D = 128 numbers, and
there are B = 128 queries.
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


@functools.cache
def example(rows: int = ROWS):
  """Return a bank `[rows, D]`, its labels, queries `[B, D]`, their labels."""
  rng = np.random.default_rng(0)
  bank = rng.standard_normal((rows, DIM), np.float32)
  bank /= np.linalg.norm(bank, axis=1, keepdims=True)
  labels = rng.integers(0, 1000, rows).astype(np.int32)
  some = rng.integers(0, rows, QUERIES)
  return bank, labels, bank[some] + np.float32(0.01), labels[some]


@jax.jit
def product(queries, bank):
  """Return the plain matrix product, the reference of all rates."""
  return queries @ bank.T


@jax.jit
def aggregation(v, own, bank, labels):
  """Return the loss of Eq. 3 and its gradient by the queries."""
  loss = lambda v: jnp.mean(
    neighbours.aggregation_loss(v, own, bank, labels, TAU)
  )
  return jax.value_and_grad(loss)(v)


@jax.jit
def search(queries, bank):
  """Return the K nearest rows of Eq. 8."""
  return neighbours.nearest(queries, bank, K)


def timed_call(f, *args):
  """Return a function that calls `f(*args)` and waits for the result."""
  return lambda: jax.block_until_ready(f(*args))


def part_bank(rounds: int, plot: str | None = None) -> None:
  """Measure rates, memory, growth with N and the split over devices.

  Args:
    rounds: number of measurements.
    plot: picture file of the cost over N, if any.
  """
  bank, labels, v, own = map(jnp.asarray, example())
  show_rates(bank, labels, v, own, rounds)
  show_memory(bank, labels, v, own)
  show_rounding(bank, labels, v, own)
  curves = show_growth(bank, labels, v, own, rounds)
  if plot:
    draw_growth(curves, plot)
  show_devices()


def show_rates(bank, labels, v, own, rounds: int) -> dict[str, float]:
  """Print rates as fractions of a plain product's, and compare with faiss.

  Returns:
    The fractions by name: 'aggregation' and 'search'.
  """
  known = bank[: max(K, len(bank) * LABELLED // ROWS)]
  steps = {
    'product': timed_call(product, v, bank),
    'aggregation': timed_call(aggregation, v, own, bank, labels),
    'small product': timed_call(product, v, known),
    'search': timed_call(search, v, known),
  }
  if importlib.util.find_spec('faiss'):
    import faiss

    index = faiss.IndexFlatIP(DIM)
    index.add(np.asarray(known))
    queries = np.asarray(v)
    steps['faiss'] = lambda: index.search(queries, K)
  taken = timing.seconds(steps, rounds)
  # The loss has three products: logits, logits again, and the gradient.
  times = {
    f'loss with gradient, N = {len(bank)}': (3, 'product', 'aggregation'),
    f'top {K} of {len(known)}': (1, 'small product', 'search'),
  }
  found = {}
  flops = 2 * QUERIES * DIM * len(bank) / taken['product']
  print(f'\nB = {QUERIES}, D = {DIM}; plain product: {flops / 1e9:.0f} GFLOP/s')
  for title, (products, plain, ours) in times.items():
    rate = found[ours] = products * taken[plain] / taken[ours]
    print(f'  {title}: {1e3 * taken[ours]:.0f} ms, {rate:.2f} x that rate')
  if 'faiss' in taken:
    print(f'  {taken["faiss"] / taken["search"]:.1f} x as fast as faiss')
  return found


def peak(f) -> int | None:
  """Return the growth of the process in bytes while `f()` runs, on Linux."""
  process = pathlib.Path('/proc/self')
  field = lambda name: next(
    1024 * int(line.split()[1])
    for line in (process / 'status').read_text().splitlines()
    if line.startswith(name)
  )
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    (process / 'clear_refs').write_text('5')  # reset the peak
    before = field('VmRSS')
    f()
    return field('VmHWM') - before
  return None


def show_memory(bank, labels, v, own) -> None:
  """Print the memory beside the bank, as a share of the bank."""
  programs = {
    'aggregation': (aggregation, v, own, bank, labels),
    'search': (search, v, bank[:LABELLED]),
  }
  print(f'\nmemory beside the bank of {bank.nbytes / 2**20:.0f} MiB')
  for name, (f, *args) in programs.items():
    share = lambda size: f'{100 * size / bank.nbytes:.1f} %'
    planned = f.lower(*args).compile().memory_analysis().temp_size_in_bytes
    grown = peak(timed_call(f, *args))
    measured = '' if grown is None else f', measured {share(grown)}'
    print(f'  {name:12s} planned {share(planned)}{measured}')


def show_rounding(bank, labels, v, own) -> None:
  """Compare a bank in bfloat16 with one in float32."""
  rounded = bank.astype(jnp.bfloat16)
  (exact, gradient), (loss, other) = (
    aggregation(v, own, b, labels) for b in (bank, rounded)
  )
  known = slice(LABELLED)
  same = search(v, bank[known])[1] == search(v, rounded[known])[1]
  change = jnp.linalg.norm(other - gradient) / jnp.linalg.norm(gradient)
  print(
    f'\na bank in bfloat16, half the bytes: loss {float(loss):.5f} instead of '
    f'{float(exact):.5f}, gradient changed by {100 * float(change):.2f} %, '
    f'{100 * float(jnp.mean(same)):.1f} % of the top {K} unchanged'
  )


def show_growth(bank, labels, v, own, rounds: int) -> dict[str, list[float]]:
  """Print and return milliseconds over N; linear growth is expected."""
  steps = {}
  for size in SIZES:
    steps[f'aggregation {size}'] = timed_call(
      aggregation, v, own, bank[:size], labels[:size]
    )
    steps[f'search {size}'] = timed_call(search, v, bank[:size])
  taken = timing.seconds(steps, rounds)
  print('\nms over N', *(f'{size:>10d}' for size in SIZES))
  curves = {
    name: [1e3 * taken[f'{name} {size}'] for size in SIZES]
    for name in ('aggregation', 'search')
  }
  for name, curve in curves.items():
    print(f'  {name:12s}', *(f'{ms:9.1f}' for ms in curve), end='')
    per_row = [ms / size for ms, size in zip(curve, SIZES, strict=True)]
    print(f'   per row {per_row[-1] / per_row[0]:.2f} x the first')
  return curves


def draw_growth(curves: dict[str, list[float]], path: str) -> None:
  """Save a picture of milliseconds over N."""
  with style.style():
    from matplotlib import figure

    drawn = figure.Figure(figsize=(3.4, 2.4), layout='constrained')
    axes = drawn.subplots()
    labels = {
      'aggregation': 'aggregation loss and gradient',
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
  """Print the bytes on each device of a bank split over 1, 2, 4, 8 devices."""
  script = (
    'from ssljax.experiments.benchmarks import bank_speed\n'
    f'bank_speed.print_devices({ROWS})'
  )
  done = subprocess.run(
    [sys.executable, '-c', script],
    capture_output=True,
    text=True,
    check=True,
    env=os.environ | {'JAX_NUM_CPU_DEVICES': '8', 'JAX_PLATFORMS': 'cpu'},
  )
  print('\ndevices   bytes of the bank   temporary   x 1 device')
  first = None
  for line in json.loads(done.stdout.splitlines()[-1]):
    devices, held, temporary = line
    first = first or held
    print(f'  {devices:5d}{held:22d}{temporary:12d}{held / first:13.3f}')


def print_devices(rows: int) -> None:
  """Print `[devices, bytes of the bank, temporary bytes]` as JSON."""
  placement.configure_cpu()
  print(json.dumps([on_devices(devices, rows) for devices in DEVICES]))


def on_devices(devices: int, rows: int) -> tuple[int, int, int]:
  """Return the bytes on each device of a bank and of the loss's program.

  Args:
    devices: number of devices.
    rows: N, rows of the bank.

  Returns:
    The number of devices, bytes of the bank and temporary bytes of the loss.
  """
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
