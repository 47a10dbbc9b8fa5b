"""Planned memory and communication, and `plan.py` from the command line."""

import contextlib
import functools
import subprocess
import sys
from unittest import mock

import binary
import jax
import jax.numpy as jnp
import optax
import pytest
import tiny

from ssljax import errors, registry
from ssljax.data import catalog
from ssljax.distributed import placement
from ssljax.experiments import plan as program
from ssljax.planning import plan
from ssljax.training import footprint


def leaf_bytes(tree):
  """Bytes of a tree of arrays on the first device."""
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return sum(
    (jax.random.key_data(x) if is_key(x) else x)
    .addressable_shards[0]
    .data.nbytes
    for x in jax.tree.leaves(tree)
  )


def shapes(name, devices, rows=tiny.ROWS):
  """Shapes and sharding of a tiny method's state before its first step."""
  mesh = placement.make_mesh([devices], devices)
  method = tiny.METHODS[name](lambda *_, **__: optax.sgd(0.1, 0.9), 6)
  states = footprint.stage_shapes(
    method,
    tiny.NET,
    (tiny.SIDE, tiny.SIDE, 1),
    rows,
    labelled=24,
    multiple=placement.row_multiple(mesh),
    extra=0,
    seeds=1,
  )
  return states[0], placement.state_sharding(mesh, method.layout, rows)


@pytest.mark.parametrize('name', ['llp', 'r2d2'])
def test_a_state_is_as_large_as_planned(name):
  job = tiny.make_job(name, devices=8)
  state, _ = tiny.initial(job)
  told = footprint.parts(*shapes(name, 8))
  assert sum(part.bytes for part in told.values()) == leaf_bytes(state)
  assert told['parameters'].bytes == leaf_bytes(state.params)
  assert told['optimiser'].bytes == leaf_bytes(state.opt_state)
  memory = [part for name, part in told.items() if name.startswith('memory')]
  assert sum(part.bytes for part in memory) == leaf_bytes(state.memory)


@pytest.mark.parametrize('name', tiny.METHODS)
def test_sharded_parts_are_divided_by_the_devices_and_no_others(name):
  alone, over8 = (footprint.parts(*shapes(name, n)) for n in (1, 8))
  for part, (size, split) in over8.items():
    assert alone[part] == (size * 8 if split else size, split)


def test_parts_that_grow_with_the_images_are_sharded():
  # Both are multiples of 256: no padding.
  for name in tiny.METHODS:
    few, many = (
      footprint.parts(*shapes(name, 8, rows)) for rows in (2**12, 2**13)
    )
    grown = {part: many[part].bytes - few[part].bytes for part in few}
    assert grown['labels'] == 4 * 2**12 / 8
    assert all(many[p].split for p, more in grown.items() if more)


@contextlib.contextmanager
def planned(*args):
  """The command line of plan.py with these arguments, and `Flat` networks."""
  networks = {'digits_heads': binary.flat, 'digits': binary.flat}
  with mock.patch.dict(registry.NETWORKS, networks):
    argv = ['plan.py', *args]
    command = program.PlanCommand(argv)
    command.parse(argv)
    yield command


LLP = (
  *('--method=llp', '--warm=0', '--preprocess=standardize'),
  '--network=digits_heads',
)


def subject(command):
  return plan.subject(*command.outlined())


def resident(rows):
  """A data set 'made' in TFDS's catalogue, of images of one pixel."""
  return mock.patch.dict(
    catalog.KNOWN, made=(10, (1, 1, 3), {'train': rows, 'test': 64})
  )


@functools.cache
def plan_of(rows, devices=4):
  """The plan of LLP on images of one pixel."""
  with planned(*LLP, '--dataset=made') as planner, resident(rows):
    return plan.make_plan(subject(planner), devices)


def test_only_memory_labels_and_images_depend_on_how_many_images_there_are():
  # Each of four devices has a multiple of the 8,192 rows of a chunk.
  few, many = plan_of(2**17), plan_of(2**18)
  (before,), (after,) = few.steps, many.steps
  assert sorted(after.moved) == sorted(before.moved) != []
  # Exchanges in a loop would be repeated, and unordered on CPUs.
  assert all(exchange.times == 1 for exchange in before.moved)
  # The step copies at most a device's own pseudo-labels or confidences.
  copied = after.activations - before.activations
  assert 0 <= copied < 2 * 4 * 2**17 // 4
  more = {
    name: after.parts[name].bytes - part.bytes
    for name, part in before.parts.items()
    if after.parts[name].bytes != part.bytes
  }
  # 2¹⁷ more rows of D = 8, labels and confidences are split over four devices;
  # all images, of three bytes, are on each device.
  assert more == {
    'memory, rows': 2**17 * 8 * 4 // 4,
    'memory, labels': 2**17 * 4 // 4,
    'memory, confidence': 2**17 * 4 // 4,
    'labels': 2**17 * 4 // 4,
    'images': 2**17 * 3,
  }
  assert after.total - before.total == sum(more.values()) + copied


def test_the_parts_are_what_the_compiled_step_is_given():
  compiled = []
  exchanges = plan.collectives.find_collectives
  compile_ = jax.stages.Lowered.compile

  def spy(lowered, *args, **more):
    compiled.append(compile_(lowered, *args, **more))
    return compiled[-1]

  with mock.patch.object(jax.stages.Lowered, 'compile', spy):
    plan_of.cache_clear()
    (step,) = plan_of(2**17).steps
  sizes = compiled[-1].memory_analysis()
  given = sum(part.bytes for name, part in step.parts.items())
  given -= step.parts['test images'].bytes
  # Bytes of the batch's 128 rows, and of 32 labelled ones, on each of four.
  rows = (128 + 32) * 4 // 4
  assert sizes.argument_size_in_bytes == given + rows
  assert step.activations == sizes.temp_size_in_bytes
  assert step.moved == exchanges(compiled[-1].as_text())
  # The outputs reuse the memory of the inputs, except a few metrics.
  assert sizes.output_size_in_bytes - sizes.alias_size_in_bytes < 1024


def test_no_array_of_the_size_of_the_data_is_allocated():
  # The labels of 2³⁰ images alone would be 4 GiB.
  with planned('--method=r2d2', '--dataset=made') as planner, resident(2**30):
    made = subject(planner)
    assert plan.images_of(made.dataset.train).shape == (2**30, 1, 1, 3)
    mesh = placement.make_mesh([8])
    states = footprint.stage_shapes(
      made.method,
      made.net,
      made.dataset.train.shape,
      2**30,
      labelled=made.labelled,
      multiple=256,
      extra=0,
      seeds=1,
    )
    where = placement.state_sharding(mesh, made.method.layout, 2**30)
    parts = footprint.parts(states[1], where)
    assert parts['memory, logits'].bytes == 2**30 * 10 * 4 // 8


def test_a_bank_is_planned_for_the_images_of_the_run():
  few = '--unlabelled=300', '--labels=10', '--seeds=1'
  with planned(*LLP, *few) as planner:
    made = subject(planner)
    assert made.trained == 300 + 100
    (step,) = plan.make_plan(made, 1).steps
  # Padded to 512 images; labels are int32.
  assert step.parts['memory, labels'].bytes == 512 * 4


def test_the_outputs_for_all_images_are_counted():
  # R2-D2 maps 1,297 images, padded to 1,536, to C = 10 logits on two devices.
  with planned('--method=r2d2') as planner:
    made = subject(planner)
    mesh = placement.make_mesh([2], 2)
    compiled = plan.make_program(made, mesh, 1)
    states = footprint.stage_shapes(
      made.method,
      made.net,
      (8, 8, 1),
      1297,
      labelled=100,
      multiple=256,
      extra=0,
      seeds=1,
    )
    seen = [
      plan.mapped_bytes(made, compiled, stage, state)
      for stage, state in zip(made.method.stages, states, strict=True)
    ]
  assert seen[:2] == [0, 1536 * 10 * 4 // 2]


def test_stages_that_differ_in_their_rates_alone_are_compiled_once():
  with planned('--method=r2d2', '--repeat=40', '--interval=20') as planner:
    stages = subject(planner).method.stages
  names = [stage.name for stage in stages]
  assert names == ['supervised', 'decipher', 'repeat 1', 'repeat 2', 'finetune']
  states = [mock.Mock(opt_state=stage.tx.init({})) for stage in stages]
  assert plan.group_stages(stages, states) == [[0], [1, 2, 3], [4]]


@pytest.mark.parametrize(
  ('args', 'expected'),
  [
    # digits: 1,297 images, 10 classes.
    (['--labels=10', '--unlabelled=rest'], (100, 1197)),
    (['--labels=10', '--unlabelled=all'], (100, 1297)),
    (['--labels=3', '--unlabelled=200', '--validation=7'], (30, 200)),
    (['--labels=all', '--unlabelled=all', '--validation=7'], (1290, 1290)),
    (['--labels=5', '--source=digits', '--target=mnist'], (50, 60000)),
  ],
)
def test_rows_are_counted_as_a_split_has_them(args, expected):
  with planned('--method=llp', *args) as planner:
    assert plan.count_rows(*planner.outlined()) == expected


def test_a_state_that_does_not_fit_is_refused_with_its_largest_part():
  state, _ = shapes('llp', 8, rows=2**20)
  method = tiny.METHODS['llp'](lambda *_: optax.sgd(0.1, 0.9), 6)
  mesh = placement.make_mesh([8])
  with mock.patch.object(placement, 'device_bytes', lambda: 10**6):
    with pytest.raises(errors.InputError) as error:
      footprint.refuse_too_large(method, state, mesh)
  told = str(error.value)
  assert f'most of them for memory, rows, {2**20 * 5 * 4 // 8}' in told
  assert 'experiments/plan.py has the details' in told


@pytest.mark.parametrize(
  ('args', 'expected'),
  [
    ([], '--method: give one of supervised, '),
    (['--method=llp', '--devices=0'], '--devices=0: give a number from 1'),
    (['--method=llp', '--devices=2,x'], '--devices=2,x: give a number'),
    (['--method=llp', '--devices='], '--devices=: give a number'),
    (['--method=elp'], '--method=elp: there is no such method'),
    (['--method=llp', '--dataset=a'], '--dataset=a: its size is not known'),
    (['--method=llp', '--eta=1'], "Unknown command line flag 'eta'"),
    (['--method=llp', '--train_split=a'], '--train_split=a: no such split'),
    (['--method=llp', '--steps=0'], '--steps=0: give a number above 0'),
  ],
)
def test_bad_input_is_one_line(args, expected, capsys):
  assert expected in binary.refused(capsys, *args, binary='plan')


def test_too_many_labels_are_refused():
  with planned('--method=llp', '--labels=130') as planner:
    with pytest.raises(errors.InputError, match=r'^labels=130: a class has'):
      subject(planner)


@pytest.mark.parametrize(
  ('count', 'expected'),
  [
    (0, '0 B'),
    (999, '999 B'),
    (1000, '0.98 KiB'),
    (2**20 * 3 // 2, '1.50 MiB'),
    (2**20 * 12.34, '12.3 MiB'),
    (2**30 * 5000, '5000 GiB'),
  ],
)
def test_sizes_are_short(count, expected):
  assert program.as_size(count) == expected


def test_several_numbers_of_devices_stand_side_by_side(capsys):
  few = '--method=supervised', '--devices=1,2', '--batch_labelled=8'
  with planned(*few) as planner:
    # This process has eight devices already.
    with mock.patch.object(program, 'make_devices', lambda count: None):
      planner.act()
  title, _, head, rule, *rows = capsys.readouterr().out.rstrip().split('\n')
  assert title.startswith('supervised with digits on digits: 1,297 images of')
  cells = lambda line: [cell.strip() for cell in line.strip('|').split('|')]
  head_cells = ['on each device', 'placement', '1 device', '2 devices']
  assert cells(head) == head_cells
  assert len({len(line) for line in (head, rule, *rows)}) == 1
  table = {cells(row)[0]: cells(row)[1:] for row in rows}
  # Dense layers 64 → 8 → 10, and a batch norm of 8 scales and 8 offsets.
  weights = program.as_size(4 * (64 * 8 + 8 + 8 + 8 * 10 + 10))
  assert table['parameters'] == ['whole', weights, weights]
  assert table['all-reduce: supervised'][1] == '0'
  assert table['sent in a step: supervised'][1] == '0 B'


def test_more_devices_than_this_machine_has_can_be_planned_for():
  script = (
    'import jax\n'
    'from ssljax.experiments import plan\n'
    'plan.make_devices(24)\n'
    'assert jax.device_count() == 24, jax.devices()\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
