"""Measure ssljax on an accelerator: results, speed, and short trainings.

  python experiments/device_check.py --part=tests,throughput,overheads,bank
  python experiments/device_check.py --part=train --data_dir=DIR --minutes=5

Every row of a part is written when it is measured, to --out, so that a machine
that is taken away loses one row. A part that is complete is not measured again
under the same --out. At the end the table is printed, and written beside the
rows. docs/pods.md says how to use a machine without a network.
"""

import json
import pathlib
import re
from typing import Any

from absl import flags
import jax

from ssljax.cli import main, tool
from ssljax.errors import require
from ssljax.experiments import reproduce
from ssljax.experiments.benchmarks import bank_speed, device_parts
from ssljax.runs import run_folder, summary


def default_out() -> pathlib.Path:
  """Return the folder of the results of this device."""
  kind = device_parts.accelerator()['device']
  name = re.sub(r'[^a-z0-9]+', '-', kind.lower()).strip('-')
  return reproduce.default_folders()['results'] / 'accelerators' / name


def run_part(name: str, asked: device_parts.Asked, out: pathlib.Path) -> None:
  """Run a part, and write its rows as they come."""
  path = out / f'{name}.json'
  record = device_parts.accelerator() | run_folder.provenance(
    jax.device_count()
  )
  record |= {'part': name, 'complete': False, 'rows': []}
  if path.exists() and json.loads(path.read_text())['complete']:
    print(f'{name}: complete in {path}')
    return
  for row in device_parts.PARTS[name](asked):
    record['rows'].append(row)
    print(json.dumps(row), flush=True)
    run_folder.write_json(path, record)
  run_folder.write_json(path, record | {'complete': True})


def table(out: pathlib.Path) -> str:
  """Return the rows of all parts in a folder as text."""
  texts = []
  for path in sorted(out.glob('*.json')):
    record = json.loads(path.read_text())
    rows = record['rows']
    if not rows:
      continue
    columns = [k for k, v in rows[0].items() if not isinstance(v, dict)]
    lines = [columns, *([_cell(r.get(k)) for k in columns] for r in rows)]
    state = '' if record['complete'] else ' (not complete)'
    heading = (
      f'{record["part"]}{state}: {record["device"]}, jax {record["jax"]}, '
      f'commit {record["commit"]}'
    )
    texts.append('\n'.join([heading, *summary.aligned(lines)]))
  return '\n\n'.join(texts)


def _cell(value) -> str:
  return '-' if value is None else str(value)


def define_flags(values: flags.FlagValues) -> None:
  """Define the flags of this program."""
  names = list(device_parts.PARTS)
  flags.DEFINE_list(
    'part',
    names[:-1],
    f'Parts to run, of {", ".join(names)}.',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'rounds',
    5,
    'Measurements of each variant; the best one counts.',
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_integer(
    'batch',
    None,
    "Images of a step; the network's own number if unset.",
    lower_bound=8,
    flag_values=values,
  )
  flags.DEFINE_list(
    'networks',
    list(device_parts.CASES),
    'Networks of the part throughput.',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'rows',
    bank_speed.ROWS,
    "Rows of LLP's bank.",
    lower_bound=1000,
    flag_values=values,
  )
  flags.DEFINE_list(
    'methods',
    ['madnn', 'fixmatch'],
    'Methods that the part train trains.',
    flag_values=values,
  )
  flags.DEFINE_float(
    'minutes', 4.0, 'Minutes of each training.', flag_values=values
  )
  flags.DEFINE_string(
    'data_dir', None, 'Folder of prepared TFDS data sets.', flag_values=values
  )
  flags.DEFINE_string(
    'out', None, "Folder of the results; the device's own.", flag_values=values
  )


def act(asked: dict[str, Any]) -> None:
  """Run the parts that the flags select, and print all results."""
  for kind, known in (
    ('part', device_parts.PARTS),
    ('networks', device_parts.CASES),
  ):
    for name in asked[kind]:
      require(
        name in known, f'`{kind}`={name}: give some of {", ".join(known)}'
      )
  out = main.as_output_folder('out', asked['out'] or default_out())
  where = asked['data_dir']
  wanted = device_parts.Asked(
    asked['rounds'],
    asked['batch'],
    tuple(asked['networks']),
    tuple(asked['methods']),
    asked['rows'],
    asked['minutes'],
    where and str(main.as_path('data_dir', where)),
    out / 'runs',
  )
  print(f'{device_parts.accelerator()["device"]}, jax {jax.__version__}')
  for name in asked['part']:
    run_part(name, wanted, out)
  text = table(out)
  (out / 'table.txt').write_text(text + '\n')
  print(f'\n{text}\n\nwritten to {out}')


if __name__ == '__main__':
  tool.start('device_check', define_flags, act)
