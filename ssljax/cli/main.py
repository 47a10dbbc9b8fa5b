"""Start and end of every program, and the programs that train a method.

Exit statuses: 0 done, 2 invalid input (one line), 3 waiting for labels, 1
anything else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import errno
import gc
import importlib.util
import logging as standard_logging
import os
import pathlib
import re
import sys
import textwrap
import threading
import time
from typing import Any
import warnings

from absl import app, flags, logging

from ssljax import config
from ssljax.cli import config_flags
from ssljax.errors import InputError, require
from ssljax.files import as_path

STARTED = time.monotonic()  # about when the program started
_PRESETS = 'ssljax.experiments'  # the package whose folder has them
_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
_TITLES = {
  'data': 'Data',
  'split': 'Label splits',
  'network': 'Network',
  'parameters': 'Method',
  'optimizer': 'Optimiser',
  'batch': 'Batch',
  'imbalance': 'Rare classes',
  'augmentation': 'Augmentation and preprocessing',
  'active': 'Active learning',
  'run': 'Run',
  'hosts': 'Several hosts',
}


def presets_folder() -> pathlib.Path | None:
  """Return the folder of the presets, if it is installed."""
  spec = importlib.util.find_spec(_PRESETS)
  if spec is None or not spec.submodule_search_locations:
    return None
  return pathlib.Path(next(iter(spec.submodule_search_locations))) / 'presets'


# Programs that train a method.


def train(
  method: str | Callable,
  *,
  name: str | None = None,
  baselines: Sequence[str] = ('supervised',),
  defaults: Mapping[str, Any] | None = None,
) -> None:
  """Run the program of a method, and exit.

  Without a --flagfile and a data set it starts from
  `presets/METHOD.digits.flags`, if there is one. Without a --flagfile, but with
  a data set, its defaults suit the data (`runs.defaults`).

  Args:
    method: name of a method in the registry, or a factory, which becomes known
      by its name.
    name: of the program; the method's if None.
    baselines: of a factory, see `config.register_method`.
    defaults: likewise.
  """
  if not isinstance(method, str):
    config.register_method(
      method.__name__, method, baselines=baselines, defaults=defaults
    )
    method = method.__name__
  command = MethodCommand(method)
  run(name or method, command.act, command.parse, command.help)


class MethodCommand:
  """The command line of a method: flags, and the `Config` they stand for."""

  def __init__(self, method: str):
    """Define the flags of a method."""
    self.method = method
    self.schema = config.schema(method)
    self.values = config_flags.new_values()
    for part in self.schema.values():
      config_flags.define(self.values, part.values())
    self.names = [name for part in self.schema.values() for name in part]
    self.preset: pathlib.Path | None = None
    self.fits_data = False  # defaults come from the data, not from a preset

  def parse(self, argv: Sequence[str]) -> list[str]:
    """Parse arguments; without a --flagfile the digits preset comes first.

    A data set that is not digits takes its place.
    """
    argv = list(argv)
    folder = presets_folder()
    preset = folder and folder / f'{self.method}.digits.flags'
    has_flagfile = any(a.lstrip('-').startswith('flagfile') for a in argv)
    self.fits_data = not has_flagfile and names_data(argv)
    is_default = not has_flagfile and not self.fits_data
    if is_default and preset and preset.is_file():
      self.preset = preset
      argv = [argv[0], f'--flagfile={preset}', *argv[1:]]
    rest = self.values(argv)
    self._refuse_length(argv[1:])
    self._prefer_command_line(argv[1:], 'steps', 'epochs')
    return rest

  def _refuse_length(self, arguments) -> None:
    """Raise `InputError` for a time budget beside a length."""
    budget = self.values['minutes'].value
    for name in ('steps', 'epochs'):
      require(
        budget is None or not config_flags.is_given(name, arguments),
        f'`minutes`={budget}: decides the lengths: leave `{name}` out',
      )

  def _prefer_command_line(self, arguments, *alternatives: str) -> None:
    """Let the command line win over a preset among exclusive flags."""
    given = [n for n in alternatives if config_flags.is_given(n, arguments)]
    if len(given) == 1:
      for name in set(alternatives) - set(given):
        self.values[name].value = None

  def given(self) -> dict[str, Any]:
    """Return the settings that the command line or a preset gives."""
    return config_flags.present(self.values, self.names)

  def config(self) -> config.Config:
    """Return the config that the flags stand for, without any data."""
    return config.from_values(self.method, self.given())

  def help(self) -> str:
    """Return the flags, by part, with the defaults this command would use."""
    lines = []
    for part in sorted(self.schema, key=list(_TITLES).index):
      lines.append(f'\n{_TITLES[part]}:')
      for name in self.schema[part]:
        lines += help_lines(self.values[name])
    return '\n'.join(lines)

  def act(self) -> None:
    """Train the run that the flags describe."""
    from ssljax.cli import train_command

    if self.fits_data:
      train_command.run_on_data(self.method, self.given())
    else:
      train_command.run(self.method, self.config())


def names_data(argv: Sequence[str]) -> bool:
  """Return True if a command line names a data set other than digits."""
  ahead = flags.FlagValues()
  for name in ('dataset', 'images', 'source', 'target'):
    flags.DEFINE_string(name, None, '', flag_values=ahead)
  with contextlib.suppress(flags.Error):  # reported when all flags are parsed
    ahead(list(argv), known_only=True)
  named = ahead.dataset not in (None, 'digits')
  return named or bool(ahead.images or ahead.source or ahead.target)


def help_lines(flag) -> list[str]:
  """Return the help of a flag: its name, type, text and default."""
  name = f'[no]{flag.name}' if flag.boolean else flag.name
  default = flag.serialize() if flag.value is not None else ''
  default = default.split('=', 1)[-1] if not flag.boolean else str(flag.value)
  shown = f" (default: '{default}')" if flag.value is not None else ''
  first = flag.help[:1]
  said = (first.upper() if first.isascii() else first) + flag.help[1:]
  text = textwrap.wrap(f'{marked_as_flags(said)}{shown}', 74)
  return [f'  --{name}:', *(f'    {line}' for line in text)]


# How every program starts and ends.


def run(
  program: str,
  act: Callable[[], None],
  parse: Callable[[Sequence[str]], list[str]],
  describe: Callable[[], str],
) -> None:
  """Parse the flags, act, and exit; invalid input is one line.

  Args:
    program: its name.
    act: does what the flags say.
    parse: arguments -> those that are no flags.
    describe: returns the help of the flags.
  """

  def parse_or_fail(argv):
    asks = {'--help', '-help', '-h', '--helpshort', '--helpfull', '--h'}
    try:
      if asks & set(argv[1:]):
        parse([arg for arg in argv if arg not in asks])
        _print_help(program, describe)
        sys.exit(0)
      flags.FLAGS(argv[:1])  # absl's own are parsed.
      check_arguments(argv[1:])
      return parse(argv)
    except (flags.Error, InputError) as error:
      fail(program, f'{as_flags(error)} (--help lists the flags)')

  def begin(argv):
    # Slow to import, and --help has no need of them.
    from ssljax.active import oracle
    from ssljax.distributed import preemption

    if not flags.FLAGS['verbosity'].present:
      quieten_orbax()
      shorten_warnings()
      # Of large images, which `decode` refuses by a limit of its own.
      warnings.filterwarnings('ignore', module=r'PIL\.Image')
    try:
      require(
        len(argv) == 1, f'"{argv[-1]}" is not a flag: flags begin with --'
      )
      act()
    except InputError as error:
      fail(program, as_flags(error))
    except OSError as error:
      if not _is_of_a_place(error, sys.argv[1:]):
        raise
      where = os.fsdecode(error.filename)
      fail(program, f'{where}: {error.strerror}: give another place')
    except oracle.WaitingError as waiting:
      _print_error(program, waiting)
      sys.exit(3)
    except preemption.PreemptedError as preempted:
      _print_error(program, preempted)
      # Nothing is wrong; but Ctrl-C ends a shell's loop, too.
      sys.exit(130 if preempted.signal == 'SIGINT' else 0)
    except KeyboardInterrupt:  # where there is no step to save
      said = 'interrupted (SIGINT): run the same command again'
      _print_error(program, InputError(said))
      sys.exit(130)

  app.run(begin, flags_parser=parse_or_fail)


def _is_of_a_place(error: OSError, arguments: Sequence[str]) -> bool:
  """Return True for a full disk, and for an error of a path the user named.

  An error of any other file is one of the program, and is not hidden.

  Args:
    error: with the path it is about.
    arguments: of the program.
  """
  if not isinstance(error.filename, str | bytes) or not error.strerror:
    return False
  path = _absolute(os.fsdecode(error.filename))
  is_above_all = _absolute(os.curdir).is_relative_to(path)
  return error.errno in _FULL or any(
    path.is_relative_to(named)
    # A folder above the named one, which could not be made.
    or (named.is_relative_to(path) and not is_above_all)
    for named in map(_absolute, _values(arguments))
  )


def _absolute(path: str) -> pathlib.Path:
  return pathlib.Path(os.path.abspath(os.path.expanduser(path)))


def _values(arguments: Sequence[str]) -> Iterator[str]:
  """Yield the values in arguments and flag files, and the items of lists."""
  for number, argument in enumerate(arguments):
    name, _, value = argument.strip().partition('=')
    if name.lstrip('-') == 'flagfile':
      where = value or ''.join(arguments[number + 1 : number + 2])
      yield from _values(_flag_lines(os.path.expanduser(where)))
    text = value if name.startswith('-') else argument
    yield from filter(None, {text, *text.split(',')})


def _print_error(program: str, error: Exception) -> None:
  logging.flush()
  print(f'{program}: {as_flags(error)}', file=sys.stderr)


def _print_help(program: str, describe: Callable[[], str]) -> None:
  """Print the docstring of the program, and its flags."""
  doc = sys.modules['__main__'].__doc__ or program
  print(f'{doc.strip()}\n\nflags:\n{describe()}')


def as_flags(error: Exception) -> str:
  """Return the message of an error with parameters shown as flags."""
  return marked_as_flags(getattr(error, 'marked', str(error)))


def marked_as_flags(text: str) -> str:
  """Return a text with the names between backticks shown as flags."""
  text = re.sub(r'`(\w+)=True`', r'--\1', text)
  text = re.sub(r'`(\w+)=False`', r'--no\1', text)
  return re.sub(r'`(\w+)`', r'--\1', text)


def quieten_orbax() -> None:
  """Drop the log lines of Orbax's threads: their failures are raised here."""
  logging.set_verbosity(logging.WARNING)
  # asyncio reports the same failures a second time.
  quiet = 'orbax', 'asyncio'
  logging.get_absl_handler().addFilter(
    lambda line: not any(name in line.pathname for name in quiet)
  )
  in_thread, unraisable = threading.excepthook, sys.unraisablehook

  def unless_orbax(problem):
    if not type(problem.thread).__module__.startswith('orbax'):
      in_thread(problem)

  def unless_closed(problem):  # coroutines of an abandoned save
    if 'orbax' not in repr(problem.object) and not isinstance(
      problem.exc_value, RuntimeError
    ):
      unraisable(problem)

  threading.excepthook, sys.unraisablehook = unless_orbax, unless_closed


class _Short(standard_logging.Formatter):
  """Formats a log line as 'warning: text', and a traceback after it."""

  def formatMessage(self, record) -> str:  # noqa: N802 (of the base class)
    return f'{record.levelname.lower()}: {record.message}'


class _Once(standard_logging.Filter):
  """Drops a log line whose text was printed before."""

  def __init__(self):
    super().__init__()
    self.seen: set[str] = set()

  def filter(self, record) -> bool:
    text = record.getMessage()
    is_new = text not in self.seen
    self.seen.add(text)
    return is_new


_ONCE = _Once()


def shorten_warnings() -> None:
  """Print each log line once, without its time and the file it comes from.

  A command may read a data set twice, to continue another run for example.
  """
  _ONCE.seen.clear()
  handler = logging.get_absl_handler()
  handler.setFormatter(_Short())
  handler.addFilter(_ONCE)


def fail(program: str, message: str) -> None:
  """Print one line about invalid input, and exit with status 2."""
  logging.flush()
  print(f'{program}: {one_line(message)}', file=sys.stderr)
  gc.collect()  # Finalise what is half done before the interpreter exits.
  sys.exit(2)


def one_line(text: str) -> str:
  """Return a text with line breaks and other control characters escaped."""
  return ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode() for c in text
  )


def check_arguments(arguments: Sequence[str]) -> None:
  """Raise `InputError` for text that is not UTF-8, and for bad flag files."""
  for argument in arguments:
    try:
      argument.encode()
    except UnicodeEncodeError as error:
      shown = argument.encode(errors='surrogateescape')
      raise InputError(f'{shown!r} is not UTF-8: give another text') from error
  check_flagfiles(arguments)


def check_flagfiles(arguments: Sequence[str], seen: Sequence[str] = ()) -> None:
  """Raise `InputError` for a flag file that cannot be read as text.

  Args:
    arguments: of a program, or the lines of a flag file.
    seen: flag files that these lines belong to.
  """
  for number, argument in enumerate(arguments):
    name, equals, value = argument.strip().lstrip('-').partition('=')
    if name != 'flagfile' or not argument.strip().startswith('-'):
      continue
    if not equals:
      value = arguments[number + 1] if number + 1 < len(arguments) else ''
    where = os.path.expanduser(value.strip().strip('\'"'))
    require(
      where not in seen, f'`flagfile`={value}: includes itself: leave it out'
    )
    check_flagfiles(_flag_lines(where), [*seen, where])


def _flag_lines(where: str) -> list[str]:
  """Return the lines of a flag file."""
  path, prefix = pathlib.Path(where), f'`flagfile`={where}: '
  if where == os.devnull:
    return []
  try:
    require(
      path.is_file(), f'{prefix}is no file: give a text file, a flag a line'
    )
    return path.read_text(encoding='utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or 'it is not a text file'
    raise InputError(
      f'{prefix}cannot be read ({reason}): give a text file, a flag a line'
    ) from error


# Paths and devices.


def as_output(name: str, text: str) -> pathlib.Path:
  """Return the path of a file to write, and make its folder.

  Args:
    name: of the flag.
    text: its value.

  Raises:
    InputError: no file can be written there.
  """
  path = as_path(name, text)
  require(
    path.is_file() or not os.path.lexists(path),
    f'`{name}`={text}: is a folder or no regular file: give the path of a file',
  )
  with write_errors(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    _require_writable(path.parent)
  return path


def as_output_folder(name: str, path: str | pathlib.Path) -> pathlib.Path:
  """Make a folder to write files in, and return it.

  Raises:
    InputError: nothing can be written there.
  """
  path = as_path(name, str(path))
  with write_errors(path):
    path.mkdir(parents=True, exist_ok=True)
    _require_writable(path)
  return path


def _require_writable(folder: pathlib.Path) -> None:
  """Raise `OSError` unless files can be made in a folder."""
  if not os.access(folder, os.W_OK | os.X_OK):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def require_devices() -> None:
  """Raise `InputError` if JAX finds no device of the wanted platform."""
  import jax

  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:
    wanted = getattr(jax.config, 'jax_platforms', None) or 'unset'
    reason = str(error).split('\n')[0] or 'there is none'
    raise InputError(
      f'JAX_PLATFORMS={wanted}: JAX cannot use such a device ({reason}): unset '
      'JAX_PLATFORMS, or install JAX for that device'
    ) from error


@contextlib.contextmanager
def write_errors(out: pathlib.Path):
  """Turn a failure to write --out into one line."""
  try:
    yield
  except OSError as error:
    raise InputError(
      f'`out`={out}: cannot be written ({error.strerror}): give another place'
    ) from error
