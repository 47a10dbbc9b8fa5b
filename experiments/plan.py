"""Print the memory and communication of a run, without training it.

  python experiments/plan.py --method=llp --devices=32 \
      --dataset=imagenet2012 --network=resnet50v2
  python experiments/plan.py --method=r2d2 --devices=1,2,4,8 \
      --flagfile=experiments/presets/r2d2.cifar10-4000.flags

Takes the flags of the method's own program and, like that program, starts from
its digits preset, or from settings that suit a data set which is named, if no
--flagfile is given. The steps are compiled from shapes
alone, for virtual devices of this CPU and with XLA's own convolutions, as on
accelerators. The numbers are XLA's. The size of a data set that is not on disk
is the one that TFDS states.

  placement       split over the devices, or whole on each device
  activations     temporary memory of a step
  between epochs  outputs for all training images, input of the epoch update
  total           permanent memory plus the larger of the two above
  all-reduce ...  number of exchanges in a step, and bytes of their results
  sent in a step  bytes sent by each device if exchanges go around a ring
"""

from collections.abc import Sequence
import os
import sys

from absl import flags
import jax

from ssljax import core
from ssljax.cli import main, selected
from ssljax.config import Config
from ssljax.data import datasets
from ssljax.distributed import placement
from ssljax.errors import require
from ssljax.planning import collectives
from ssljax.planning import plan as planning
from ssljax.planning.plan import Plan, Subject
from ssljax.runs import defaults

MOST = 1024  # largest number of virtual devices that a CPU can start


def as_size(count: float) -> str:
  """Return a number of bytes as text, as '1.5 MiB'."""
  units = ['B', 'KiB', 'MiB', 'GiB']
  while count >= 1000 and len(units) > 1:
    count /= 1024
    units.pop(0)
  digits = 0 if units[0] == 'B' or count >= 100 else 1 if count >= 10 else 2
  return f'{count:.{digits}f} {units[0]}'


def title(planned: Subject) -> str:
  """Return a line that describes the planned run."""
  dataset, train = planned.dataset, planned.dataset.train
  sides = '×'.join(map(str, train.shape))
  network = planned.config.network.network
  return (
    f'{planned.method.name} with {network} on {dataset.name}: '
    f'{len(train.labels):,} images of {sides}, '
    f'{"streamed" if planned.is_streamed else "resident"}, '
    f'{len(dataset.classes):,} classes, {planned.labelled:,} labels; images '
    f'per step: {batch_sizes(planned.method)}'
  )


def batch_sizes(method: core.Method) -> str:
  """Return '128', or '40 (supervised), 512 (decipher … finetune)'."""
  names = {}
  for stage in method.stages:
    names.setdefault(stage.batch_spec.size, []).append(stage.name)
  if len(names) == 1:
    return str(method.stages[0].batch_spec.size)
  return ', '.join(f'{b} ({first_to_last(of)})' for b, of in names.items())


def memory_rows(plans: Sequence[Plan]) -> list[list[str]]:
  """Return the rows of bytes of each part on a device, and of the total."""
  rows = []
  for name, part in plans[0].fullest.parts.items():
    values = [as_size(plan.fullest.parts[name].bytes) for plan in plans]
    rows.append([name, 'split' if part.split else 'whole', *values])
  for number, step in enumerate(plans[0].steps):
    values = [as_size(plan.steps[number].activations) for plan in plans]
    stages = first_to_last(step.stages)
    rows.append([f'activations: {stages}', '', *values])
    values = [as_size(plan.steps[number].mapped) for plan in plans]
    if step.mapped:
      rows.append(
        [f'between epochs: {first_to_last(step.stages)}', 'split', *values]
      )
  values = [f'**{as_size(plan.fullest.total)}**' for plan in plans]
  return [*rows, ['**total**', '', *values]]


def moved_rows(plans: Sequence[Plan]) -> list[list[str]]:
  """Return the rows of exchanges in a step, and of bytes sent by a device."""
  rows = []
  for number, step in enumerate(plans[0].steps):
    stages = first_to_last(step.stages)
    moved = [plan.steps[number].moved for plan in plans]
    totals = [collectives.totals(found) for found in moved]
    for kind in collectives.KINDS:
      if any(kind in total for total in totals):
        found = [total.get(kind) for total in totals]
        values = [f'{t.count}: {as_size(t.bytes)}' if t else '0' for t in found]
        rows.append([f'{kind}: {stages}', '', *values])
    values = [as_size(sum(e.sent for e in found)) for found in moved]
    rows.append([f'sent in a step: {stages}', '', *values])
  return rows


def first_to_last(names: Sequence[str]) -> str:
  """Return 'warm' for one name, or 'first … last' for several."""
  return ' … '.join(dict.fromkeys([names[0], names[-1]]))


def as_table(plans: Sequence[Plan]) -> str:
  """Return a Markdown table with a column per number of devices."""
  heads = [f'{p.devices} device{"s" * (p.devices > 1)}' for p in plans]
  rows = [['on each device', 'placement', *heads]]
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
  """Return the numbers of devices that the flag lists."""
  for text in texts or ['']:
    require(
      text.isdecimal() and len(text) < 9 and 0 < int(text) <= MOST,
      f'`devices`={",".join(texts)}: give a number from 1 to {MOST}, or '
      'several numbers, as 1,2,4,8',
    )
  return [int(text) for text in texts]


def make_devices(count: int) -> None:
  """Split this CPU into virtual devices."""
  given = os.environ.get('XLA_FLAGS', '').split()
  # XLA's flag sets the same number.
  other = 'xla_force_host_platform_device_count'
  os.environ['XLA_FLAGS'] = ' '.join(x for x in given if other not in x)
  os.environ['JAX_NUM_CPU_DEVICES'] = str(count)  # read by `placement`
  placement.configure_cpu()
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', count)


class PlanCommand(selected.SelectedCommand):
  """The command line: --method, --devices and the flags of the method."""

  def __init__(self, argv: Sequence[str]):
    """Define the flags of the method that the arguments select."""
    super().__init__(argv, _define_flags)

  def outlined(self) -> tuple[Config, datasets.Dataset]:
    """Return the config that the flags stand for, and its data's outline."""
    if self.fits_data:
      config, dataset, _ = defaults.for_data(
        self.method, self.given(), planning.outline_with_facts
      )
      return config, dataset
    return self.config(), planning.outline_of(self.config())

  def act(self) -> None:
    """Print the plan of the run that the flags describe."""
    self.require_method()
    counts = device_counts(self.values.devices)
    config, dataset = self.outlined()
    make_devices(max(counts))
    planned = planning.subject(config, dataset)
    plans = [planning.make_plan(planned, count) for count in counts]
    print(f'{title(planned)}\n\n{as_table(plans)}')


def _define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_list(
    'devices',
    ['8'],
    'Number of devices, or several numbers, as 1,2,4,8.',
    flag_values=values,
  )


if __name__ == '__main__':
  command = PlanCommand(sys.argv)
  main.run('plan', command.act, command.parse, command.help)
