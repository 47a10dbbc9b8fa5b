"""Questions of a run with `oracle=people`, answered on the page.

The run writes a folder of images and an `answers.csv` for each batch, see
`active.oracle`. The page shows the folder of all batches; as soon as every
image of a batch has an answer, its file is filled in. The file remains the only
connection, so people without a browser fill it in by hand.
"""

import csv
import io
import pathlib

from ssljax import files
from ssljax.active.page import store as store_lib
from ssljax.errors import InputError, require

STORE = '.label'  # folder of the answers, beside the batches


def batches(root: pathlib.Path) -> list[pathlib.Path]:
  """Return the files to fill in, in order."""
  return sorted(root.glob('seed-*/batch-*/answers.csv'))


def classes(root: pathlib.Path) -> list[str]:
  """Return the names of the classes of the run.

  Raises:
    InputError: the folder has no question.
  """
  found = batches(root)
  require(
    bool(found),
    f'`questions`={root}: has no seed-N/batch-N/answers.csv: give the folder '
    '`questions` of a run that waits for labels',
  )
  try:
    text = (found[-1].parent / 'classes.txt').read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(
      f'`questions`={root}: classes.txt of {found[-1].parent.name} cannot be '
      'read: restore it'
    ) from error
  lines = text.splitlines()
  if lines and lines[0].startswith('#'):
    return lines[1:]
  return [line.split(' ', 1)[-1] for line in lines]


def fill_in(root: pathlib.Path, state: store_lib.State) -> list[str]:
  """Fill in the batches that are answered; return those that were not before.

  A batch that a person has begun to fill in by hand is left alone.
  """
  from ssljax.active import oracle  # it imports JAX, which takes seconds

  filled = []
  for path in batches(root):
    try:
      with path.open(encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
      continue  # the run reports it
    if not rows or any((row.get('label') or '').strip() for row in rows):
      continue
    folder = path.parent.relative_to(root).as_posix()
    labels = [_label(state, f'{folder}/{row.get("image")}') for row in rows]
    if None in labels:
      continue
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(oracle.COLUMNS)
    for row, label in zip(rows, labels, strict=True):
      writer.writerow([row['row'], row['image'], label])
    files.write_atomically(path, text.getvalue())
    filled.append(folder)
  return filled


def _label(state: store_lib.State, file: str) -> str | None:
  """Return a class, 'skip' or 'unsure'; None for an image without an answer."""
  found = state.resolved.get(file)
  if found is None or (found.label is None and found.is_conflict):
    return None
  if found.label is not None:
    return found.label
  given = {answer.answer for answer in state.latest(file).values()}
  return store_lib.UNSURE if store_lib.UNSURE in given else store_lib.SKIP
