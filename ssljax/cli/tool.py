"""Programs that are no training: their own flags, given to a function."""

from collections.abc import Callable
import pathlib
from typing import Any

from absl import flags

from ssljax import files
from ssljax.cli import compile_cache, config_flags, main
from ssljax.distributed import placement
from ssljax.errors import InputError
from ssljax.runs import load


def define_run_flags(values: flags.FlagValues) -> None:
  """Define the flags of programs that look at finished runs."""
  flags.DEFINE_integer(
    'seed', None, "Number of the split; the run's first.", flag_values=values
  )
  flags.DEFINE_string(
    'data_dir',
    None,
    "Folder of prepared TFDS data sets; the run's if unset.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    'corrupt',
    None,
    "Number of corrupt images to tolerate; the run's if unset.",
    flag_values=values,
  )


def finished_run(run: str | None) -> pathlib.Path:
  """Return the folder of the finished run that --run names.

  Raises:
    InputError: there is none.
  """
  if run is None:
    raise InputError('`run`: give the folder of a finished run')
  folder = files.as_place('run', run)
  load.finished_result(folder)
  return folder


def start(
  name: str,
  define: Callable[[flags.FlagValues], None],
  act: Callable[[dict[str, Any]], Any],
  *,
  devices: bool = True,
) -> None:
  """Run a program, and exit.

  Args:
    name: of the program.
    define: defines its flags.
    act: gets the flags' values, by name.
    devices: the program computes by itself.
  """
  values = config_flags.new_values()
  known = set(values)
  define(values)
  own = [flag for flag in values if flag not in known]

  def look():
    placement.configure_cpu()
    if devices:
      compile_cache.use('auto')
      main.require_devices()
    act({flag: values[flag].value for flag in own})

  def describe():
    return '\n'.join(
      line for flag in own for line in main.help_lines(values[flag])
    )

  main.run(name, look, values, describe)
