"""What a compiled program moves between its devices, read from its HLO text.

Of a program as XLA compiles it for CPUs, where every exchange is one
instruction; an accelerator's compiler may join several into one, and then has
fewer of the same bytes.
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
_EXCHANGE = re.compile(rf' = (.*?) ({"|".join(KINDS)})\(')
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')
_CALLED = re.compile(
  r'(?:body|condition|calls|to_apply|true_computation|false_computation)='
  r'%?([\w.-]+)|branch_computations=\{([^}]*)\}'
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Exchange(NamedTuple):
  """One instruction that moves something between devices."""

  kind: str  # of `KINDS`
  bytes: int  # of what every device ends up with, or scattered began with
  group: int  # devices that exchange with each other
  times: int  # in one call of the program

  @property
  def sent(self) -> float:
    """Bytes that a device sends in one call, around a ring of its group."""
    away = 1 - 1 / self.group
    share = {'all-reduce': 2 * away, 'collective-permute': 1.0}
    return self.times * self.bytes * share.get(self.kind, away)


class Total(NamedTuple):
  """All exchanges of a kind in one call of a program."""

  count: int
  bytes: int


def exchanges(text: str) -> list[Exchange]:
  """The exchanges of a compiled program.

  One in a loop counts as often as the loop is known to run, else once; of the
  branches of a conditional all count.

  Args:
    text: of `jax.stages.Compiled.as_text`.
  """
  blocks, entry = _blocks(text)
  every = re.search(r'num_partitions=(\d+)', text)
  return list(_walk(blocks, entry, 1, int(every[1]) if every else 1))


def totals(found: Iterable[Exchange]) -> dict[str, Total]:
  """Count and bytes of each kind that there is, in the order of `KINDS`."""
  found = list(found)
  of_kind = {k: [e for e in found if e.kind == k] for k in KINDS}
  return {
    kind: Total(
      sum(e.times for e in some), sum(e.times * e.bytes for e in some)
    )
    for kind, some in of_kind.items()
    if some
  }


def _blocks(text: str) -> tuple[dict[str, list[str]], str]:
  """Lines of every computation by its name, and the name of the first one."""
  blocks, entry, lines = {}, '', []
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      blocks[head[1]] = lines = []
      entry = head[1] if line.startswith('ENTRY') else entry
    else:
      lines.append(line)
  return blocks, entry


def _walk(blocks, name: str, times: int, every: int) -> Iterator[Exchange]:
  """The exchanges of a computation that runs so often, and of what it calls.

  Args:
    blocks: lines of all computations.
    name: of the computation.
    times: that it runs.
    every: devices there are.
  """
  for line in blocks[name]:
    found = _EXCHANGE.search(line)
    if found:  # what it calls adds two numbers
      yield _exchange(found[1], found[2], _group(line, every), times)
      continue
    trips = _TRIPS.search(line)
    inner = times * int(trips[1]) if trips else times
    for one, several in _CALLED.findall(line):
      for called in [one] if one else re.findall(r'[\w.-]+', several):
        yield from _walk(blocks, called, inner, every)


def _exchange(result: str, kind: str, group: int, times: int) -> Exchange:
  size = sum(_bytes(*array) for array in _ARRAY.findall(result))
  whole = size * group if kind == 'reduce-scatter' else size
  return Exchange(kind, whole, group, times)


def _bytes(dtype: str, shape: str) -> int:
  """Of an array, as 'f32' and '8,16'."""
  bits = int(re.search(r'\d+', dtype)[0]) if dtype != 'pred' else 8
  return math.prod(int(n) for n in shape.split(',') if n) * bits // 8


def _group(line: str, every: int) -> int:
  """Devices of a group, in whichever way a line says it; all if it does not.

  '{{0,1},{2,3}}', '[2,2]<=[4]' or "mesh['a'=2,'b'=2] {'b'}" are groups of 2.
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
  return every
