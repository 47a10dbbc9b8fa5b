"""What a run would take of each device, and move, before anything is made.

  python experiments/plan.py --method=llp --devices=32 \
      --dataset=imagenet2012 --network=resnet50v2
  python experiments/plan.py --method=r2d2 --devices=1,2,4,8 \
      --flagfile=experiments/presets/r2d2.cifar10-4000.flags

takes the flags of the method's own binary and, as it does, starts from its
digits preset where no --flagfile is given. The steps are compiled from shapes
alone, for so many virtual devices of this CPU, and what XLA says of them is
printed. They hold XLA's own convolutions, as on accelerators. A data set that
is not on disk is as large as TFDS says.

  lies            split over the devices, or whole on each
  activations     what a step needs beside all that stays
  between epochs  what is observed of all images before a refresh
  total           what stays, and the larger one of these
  all-reduce ...  how often in a step, and bytes of what they result in
  sent in a step  by each device, if they go around a ring
"""

from collections.abc import Sequence
import os
import sys

from absl import flags
import jax

from ssljax import core, registry
from ssljax.cli import main
from ssljax.distributed import placement
from ssljax.errors import require
from ssljax.planning import collectives
from ssljax.planning import plan as planning
from ssljax.planning.plan import Plan, Step, Subject

MOST = 1024  # virtual devices of a CPU that still start


def size(count: float) -> str:
  """'1.5 MiB' of a number of bytes."""
  units = ['B', 'KiB', 'MiB', 'GiB']
  while count >= 1000 and len(units) > 1:
    count /= 1024
    units.pop(0)
  digits = 0 if units[0] == 'B' or count >= 100 else 1 if count >= 10 else 2
  return f'{count:.{digits}f} {units[0]}'


def title(planned: Subject) -> str:
  """What is planned, in a line."""
  dataset, train = planned.dataset, planned.dataset.train
  sides = '×'.join(map(str, train.shape))
  return (
    f'{planned.method.name} with {planned.config.network.network} on {dataset.name}: '
    f'{len(train.labels):,} images of {sides}, '
    f'{"streamed" if planned.is_streamed else "resident"}, '
    f'{len(dataset.classes):,} classes, {planned.labelled:,} labels; images '
    f'of a step: {batch_sizes(planned.method)}'
  )


def batch_sizes(method: core.Method) -> str:
  """'128', or '40 (supervised), 512 (decipher … finetune)'."""
  names = {}
  for stage in method.stages:
    names.setdefault(stage.batch_spec.size, []).append(stage.name)
  if len(names) == 1:
    return str(method.stages[0].batch_spec.size)
  return ', '.join(f'{b} ({first_to_last(of)})' for b, of in names.items())


def memory_rows(plans: Sequence[Plan]) -> list[list[str]]:
  """Bytes of each part on a device, and of all."""
  rows = []
  for name, part in plans[0].fullest.parts.items():
    values = [size(plan.fullest.parts[name].bytes) for plan in plans]
    rows.append([name, 'split' if part.split else 'whole', *values])
  for number, step in enumerate(plans[0].steps):
    values = [size(plan.steps[number].activations) for plan in plans]
    rows.append([f'activations: {stages_of(step)}', '', *values])
    values = [size(plan.steps[number].observed) for plan in plans]
    if step.observed:
      rows.append([f'between epochs: {stages_of(step)}', 'split', *values])
  values = [f'**{size(plan.fullest.total)}**' for plan in plans]
  return [*rows, ['**total**', '', *values]]


def moved_rows(plans: Sequence[Plan]) -> list[list[str]]:
  """How often a step exchanges what, and what a device sends in it."""
  rows = []
  for number, step in enumerate(plans[0].steps):
    moved = [plan.steps[number].moved for plan in plans]
    totals = [collectives.totals(found) for found in moved]
    for kind in collectives.KINDS:
      if any(kind in total for total in totals):
        found = [total.get(kind) for total in totals]
        values = [f'{t.count}: {size(t.bytes)}' if t else '0' for t in found]
        rows.append([f'{kind}: {stages_of(step)}', '', *values])
    values = [size(sum(e.sent for e in found)) for found in moved]
    rows.append([f'sent in a step: {stages_of(step)}', '', *values])
  return rows


def stages_of(step: Step) -> str:
  """Those that step alike."""
  return first_to_last(step.stages)


def first_to_last(names: Sequence[str]) -> str:
  """'warm', or 'first … last' of several."""
  return ' … '.join(dict.fromkeys([names[0], names[-1]]))


def table(plans: Sequence[Plan]) -> str:
  """Markdown, a column per number of devices."""
  heads = [f'{p.devices} device{"s" * (p.devices > 1)}' for p in plans]
  rows = [['on each device', 'lies', *heads]]
  rows += memory_rows(plans) + moved_rows(plans)
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  rule = ['-' * width for width in widths[:2]]
  rule += ['-' * (width - 1) + ':' for width in widths[2:]]
  rows.insert(1, rule)
  line = lambda row: ' | '.join(
    cell.ljust(width) if i < 2 else cell.rjust(width)
    for i, (cell, width) in enumerate(zip(row, widths, strict=True))
  )
  return '\n'.join(f'| {line(row)} |' for row in rows)


# The program.


def device_counts(texts: Sequence[str]) -> list[int]:
  """Return the numbers of devices that --devices lists."""
  for text in texts or ['']:
    require(
      text.isdecimal() and 0 < int(text) <= MOST,
      f'`devices`={",".join(texts)}: give a number from 1 to {MOST}, or '
      'several, as 1,2,4,8',
    )
  return [int(text) for text in texts]


def make_devices(count: int) -> None:
  """Let this CPU stand for so many devices."""
  given = os.environ.get('XLA_FLAGS', '').split()
  other = 'xla_force_host_platform_device_count'  # the same by another flag
  os.environ['XLA_FLAGS'] = ' '.join(x for x in given if other not in x)
  os.environ['JAX_NUM_CPU_DEVICES'] = str(count)  # `placement` reads it
  placement.configure_cpu()
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', count)


class PlanCommand(main.MethodCommand):
  """The flags of a method's program, and --method and --devices."""

  def __init__(self, argv: Sequence[str]):
    """Define the flags of the method that the arguments name."""
    ahead = flags.FlagValues()
    _define_flags(ahead)
    try:
      ahead(list(argv), known_only=True)
    except flags.Error:
      pass  # Parsing all flags reports it.
    self.asked = ahead.method
    super().__init__(self.asked or 'supervised')
    _define_flags(self.values)

  def act(self) -> None:
    """Print the plan that the flags ask for."""
    known = ', '.join(registry.METHODS)
    require(bool(self.asked), f'`method`: give one of {known}')
    counts = device_counts(self.values.devices)
    config = self.config()
    dataset = planning.outline(config)
    make_devices(max(counts))
    planned = planning.subject(config, dataset)
    plans = [planning.make_plan(planned, count) for count in counts]
    print(f'{title(planned)}\n\n{table(plans)}')


def _define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_enum(
    'method',
    None,
    list(registry.METHODS),
    'Method whose run is planned.',
    flag_values=values,
  )
  flags.DEFINE_list(
    'devices',
    ['8'],
    'Number of devices; several as 1,2,4,8.',
    flag_values=values,
  )


if __name__ == '__main__':
  command = PlanCommand(sys.argv)
  main.run('plan', command.act, command.parse, command.help)
