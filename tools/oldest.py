"""Write requirements-oldest.txt: the lower bound of every dependency.

    python tools/oldest.py

It is a file of constraints, of the dependencies and the extra `test`:
`pip install -e '.[test]' -c requirements-oldest.txt` installs the oldest
versions that pyproject.toml promises to work with.
"""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATH = ROOT / 'requirements-oldest.txt'
BOUND = re.compile(r'([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)')


def constraints() -> str:
  """Return the text of the file."""
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  needed = project['dependencies'] + project['optional-dependencies']['test']
  bounds = [BOUND.match(one).groups() for one in needed]
  lines = [f'{name}=={version}' for name, version in sorted(bounds)]
  return '# Written by tools/oldest.py\n' + '\n'.join(lines) + '\n'


if __name__ == '__main__':
  PATH.write_text(constraints())
