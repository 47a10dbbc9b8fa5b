import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from ssljax.distributed import placement
from ssljax.planning import collectives
from ssljax.planning.collectives import Collective, Total

# The program of each of eight devices. The loop runs 5 times.
PROGRAM = """\
HloModule jit_call, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[6])) -> (s32[], f32[6]) {
  %p = (s32[], f32[6]{0}) parameter(0)
  %got = f32[6]{0} get-tuple-element(%p), index=1
  %all-reduce.1 = f32[6]{0} all-reduce(%got), replica_groups={{0,1},{2,3}}, \
to_apply=%add
  ROOT %t = (s32[], f32[6]{0}) tuple(%i, %all-reduce.1)
}

%condition (p: (s32[], f32[6])) -> pred[] {
  ROOT %less = pred[] constant(true)
}

%branch (q: bf16[4]) -> bf16[4] {
  ROOT %cp = bf16[4]{0} collective-permute(%q), source_target_pairs={{0,1}}
}

ENTRY %main (x: f32[6], y: s8[3,2]) -> (f32[6], s8[24,2]) {
  %while = (s32[], f32[6]{0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0"}}
  %all-gather = s8[24,2]{1,0} all-gather(%y), replica_groups=[1,8]<=[8], \
dimensions={0}
  %both = (f32[3]{0}, /*index=1*/f32[]) all-reduce(%v, %w), \
replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  %rs = f32[2]{0} reduce-scatter(%x), replica_groups={}, to_apply=%add
  %c = bf16[4]{0} conditional(%which, %q, %q), \
branch_computations={%branch, %branch}
  ROOT %out = (f32[6]{0}, s8[24,2]{1,0}) tuple(%x, %all-gather)
}
"""


def test_every_collective_is_found_with_its_bytes():
  assert collectives.find_collectives(PROGRAM) == [
    Collective('all-reduce', 6 * 4, 2, 5),
    Collective('all-gather', 24 * 2, 8, 1),
    Collective('all-reduce', 3 * 4 + 4, 4, 1),
    # Every device has 8 x 2 numbers before and 2 after.
    Collective('reduce-scatter', 8 * 2 * 4, 8, 1),
    Collective('collective-permute', 4 * 2, 8, 1),
    Collective('collective-permute', 4 * 2, 8, 1),
  ]


def test_totals_are_per_call_of_the_program():
  assert collectives.totals(collectives.find_collectives(PROGRAM)) == {
    'all-reduce': Total(6, 5 * 24 + 16),
    'all-gather': Total(1, 48),
    'reduce-scatter': Total(1, 64),
    'collective-permute': Total(2, 16),
  }


def test_sent_bytes_are_counted_around_a_ring():
  # To add B bytes on g devices, each device sends g − 1 parts of B/g, and as
  # many again to distribute the sums. A gather or scatter is one of the two.
  found = collectives.find_collectives(PROGRAM)
  sent = [collective.sent for collective in found]
  assert sent == pytest.approx(
    [5 * 2 * 24 / 2, 7 * 48 / 8, 2 * 3 * 16 / 4, 7 * 64 / 8, 8, 8]
  )


@pytest.mark.parametrize(
  ('groups', 'expected'),
  [
    ("mesh['x'=8] {'x':(2)4}", 4),
    ("mesh['x'=2,'y'=3] {'x','y'}", 6),
    ('[4,2]<=[2,4]T(1,0)', 2),
    ('{{0,1,2}}', 3),
  ],
)
def test_the_group_size_is_parsed_in_all_notations(groups, expected):
  line = (
    f'  %x = f32[6]{{0}} all-reduce(%y), replica_groups={groups}, more={{}}'
  )
  text = f'HloModule m\n\nENTRY %main (y: f32[6]) -> f32[6] {{\n{line}\n}}\n'
  assert collectives.find_collectives(text) == [
    Collective('all-reduce', 24, expected, 1)
  ]


def test_a_compiled_sum_over_devices_is_one_collective_per_iteration():
  mesh = placement.make_mesh([4])
  over = functools.partial(
    jax.shard_map, mesh=mesh, in_specs=P('data'), out_specs=P(), check_vma=False
  )
  once = over(lambda x: jax.lax.psum(x, 'data'))
  # Each sum depends on the one before it.
  again = over(
    lambda x: jax.lax.fori_loop(
      0, 3, lambda i, y: jnp.sin(jax.lax.psum(y, 'data')), x
    )
  )
  x = jax.ShapeDtypeStruct((4 * 6,), np.float32)
  # A device has 6 numbers.
  for f, times in ((once, 1), (again, 3)):
    text = jax.jit(f).lower(x).compile().as_text()
    found = collectives.find_collectives(text)
    totals = collectives.totals(found)
    assert totals == {'all-reduce': Total(times, times * 24)}
    assert {collective.group for collective in found} == {4}
