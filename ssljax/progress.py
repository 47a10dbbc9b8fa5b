"""The progress of long work on images: a bar, or lines in a log file."""

import sys

import tqdm

_SECONDS = 30  # between two lines


class _Lines:
  """Writes each state of a bar as a line of its own to stderr."""

  def write(self, text: str) -> None:
    """Write a state without what moves a terminal's cursor."""
    line = text.strip()
    if line:
      sys.stderr.write(f'{line}\n')

  def flush(self) -> None:
    """Flush stderr."""
    sys.stderr.flush()


def progress(
  total: int, doing: str, done: int = 0, unit: str = ' images'
) -> tqdm.tqdm:
  """Return the progress of some work, to be updated and closed.

  On a terminal it is a bar; elsewhere a line is written every half minute.

  Args:
    total: number of units.
    doing: what is done, a word for the line.
    done: units that are done already.
    unit: of the work.
  """
  how = dict(desc=doing, total=total, initial=done, unit=unit, leave=False)
  if sys.stderr.isatty():
    return tqdm.tqdm(**how, delay=1, dynamic_ncols=True)
  return tqdm.tqdm(
    **how,
    file=_Lines(),
    mininterval=_SECONDS,
    maxinterval=_SECONDS,
    delay=_SECONDS,
    bar_format='{desc}: {n} of {total}{unit}, {remaining} left',
  )
