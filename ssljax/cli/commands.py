"""The console script `ssljax`: a program by its name.

ssljax madnn --dataset=digits --labels=10
ssljax figures --run=runs/FOLDER --figure=madnn/4
"""

import difflib
import runpy
import sys

# Programs of `ssljax.experiments` that are not named after a method.
TOOLS = (
  'benchmark',
  'compare',
  'device_check',
  'embed',
  'export',
  'figures',
  'html_report',
  'label',
  'plan',
  'predict',
  'probe',
  'propagate',
  'rank',
  'reproduce',
  'speed',
  'sweep',
  'train',
)


def programs() -> tuple[str, ...]:
  """Return the names of all programs."""
  from ssljax import registry

  return *registry.METHODS, *TOOLS


def main() -> None:
  """Run the program that the first argument names."""
  # The methods are slow to import.
  names = TOOLS if sys.argv[1:2] == ['label'] else programs()
  if len(sys.argv) < 2 or sys.argv[1] in ('-h', '--help', 'help'):
    print(f'{__doc__}\nPrograms: {", ".join(names)}. --help lists their flags.')
    sys.exit(0)
  name = sys.argv[1]
  if name not in names:
    near = difflib.get_close_matches(name, names, 3) or names
    print(
      f'ssljax: {name}: no such program; give {" or ".join(near)}',
      file=sys.stderr,
    )
    sys.exit(2)
  sys.argv = [f'ssljax {name}', *sys.argv[2:]]
  module = f'ssljax.experiments.{name}'
  runpy.run_module(module, run_name='__main__', alter_sys=True)
