"""Collective operations of a compiled program, parsed from its HLO text.

The parser expects programs that XLA has compiled for CPUs, where every
collective is one instruction. An accelerator's compiler may combine several
collectives into one, which then moves the same number of bytes.
"""

from collections.abc import Iterable, Iterator
import math
import re
from typing import NamedTuple

KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
)
_HEAD = re.compile(r'(?:ENTRY )?%?([\w.-]+) \(.*\{$')
_COLLECTIVE = re.compile(rf' = (.*?) ({"|".join(KINDS)})\(')
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')
_CALLED = re.compile(
  r'(?:body|condition|calls|to_apply|true_computation|false_computation)='
  r'%?([\w.-]+)|branch_computations=\{([^}]*)\}'
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
  """One instruction that moves data between devices."""

  kind: str  # one of `KINDS`
  bytes: int  # of a device's result; of its operand for a reduce-scatter
  group: int  # number of devices that take part together
  times: int  # executions in one call of the program

  @property
  def sent(self) -> float:
    """Bytes that a device sends in one call, if its group forms a ring."""
    others = 1 - 1 / self.group
    share = {'all-reduce': 2 * others, 'collective-permute': 1.0}
    return self.times * self.bytes * share.get(self.kind, others)


class Total(NamedTuple):
  """Sum over all collectives of a kind in one call of a program."""

  calls: int
  bytes: int


def find_collectives(text: str) -> list[Collective]:
  """Return the collectives of a compiled program.

  A collective in a loop counts once per iteration if the number of iterations
  is known, else once. All branches of a conditional count.

  Args:
    text: from `jax.stages.Compiled.as_text`.
  """
  blocks, entry = _split_computations(text)
  devices = re.search(r'num_partitions=(\d+)', text)
  return list(_walk(blocks, entry, 1, int(devices[1]) if devices else 1))


def totals(found: Iterable[Collective]) -> dict[str, Total]:
  """Return count and bytes of each kind present, in the order of `KINDS`."""
  found = list(found)
  by_kind = {k: [e for e in found if e.kind == k] for k in KINDS}
  return {
    kind: Total(
      sum(e.times for e in some), sum(e.times * e.bytes for e in some)
    )
    for kind, some in by_kind.items()
    if some
  }


def _split_computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Return the lines of every computation by name, and the entry's name."""
  blocks: dict[str, list[str]] = {}
  entry, lines = '', list[str]()
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      blocks[head[1]] = lines = []
      entry = head[1] if line.startswith('ENTRY') else entry
    else:
      lines.append(line)
  return blocks, entry


def _walk(blocks, name: str, times: int, devices: int) -> Iterator[Collective]:
  """Yield the collectives of a computation and of the computations it calls.

  Args:
    blocks: lines of all computations by name.
    name: of the computation.
    times: executions in one call of the program.
    devices: number of all devices.
  """
  for line in blocks[name]:
    found = _COLLECTIVE.search(line)
    if found:  # the computation it calls is the sum of two numbers
      group = _group_size(line, devices)
      yield _make_collective(found[1], found[2], group, times)
      continue
    trips = _TRIPS.search(line)
    inner = times * int(trips[1]) if trips else times
    for single, branches in _CALLED.findall(line):
      for called in [single] if single else re.findall(r'[\w.-]+', branches):
        yield from _walk(blocks, called, inner, devices)


def _make_collective(
  result: str, kind: str, group: int, times: int
) -> Collective:
  """Return the collective whose HLO result type is, e.g., 'f32[8,16]'."""
  size = sum(_bytes(*array) for array in _ARRAY.findall(result))
  moved = size * group if kind == 'reduce-scatter' else size
  return Collective(kind, moved, group, times)


def _bytes(dtype: str, shape: str) -> int:
  """Return the bytes of an array given as, e.g., 'f32' and '8,16'."""
  digits = re.search(r'\d+', dtype)
  bits = int(digits[0]) if digits else 8  # 'pred' has none
  return math.prod(int(n) for n in shape.split(',') if n) * bits // 8


def _group_size(line: str, devices: int) -> int:
  """Return the number of devices per group; all if the line has no groups.

  The three notations '{{0,1},{2,3}}', '[2,2]<=[4]' and
  "mesh['a'=2,'b'=2] {'b'}" all have groups of 2.
  """
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', line)
  if listed:
    return len(listed[1].split(','))
  tiled = re.search(r'replica_groups=\[\d+,(\d+)\]', line)
  if tiled:
    return int(tiled[1])
  named = re.search(r'replica_groups=mesh\[(.*?)\] ?\{(.*?)\}', line)
  if named:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  return devices
