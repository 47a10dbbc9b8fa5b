"""Programs that take a method by name: --method and the flags of the method."""

from collections.abc import Callable, Sequence

from absl import flags

from ssljax import registry
from ssljax.cli import main
from ssljax.errors import InputError, require

AUTO = 'auto'  # instead of a method: choose one by held-out labels


class SelectedCommand(main.MethodCommand):
  """The command line of the method that --method names."""

  others: tuple[str, ...] = ()  # values of --method that are no methods

  def __init__(
    self,
    argv: Sequence[str],
    define: Callable[[flags.FlagValues], None] = lambda values: None,
  ):
    """Define the flags of the method that the arguments select.

    Args:
      argv: arguments, the program first.
      define: defines the program's other flags.
    """
    ahead = flags.FlagValues()
    define_method(ahead)
    try:
      main.check_arguments(argv[1:])
      ahead(list(argv), known_only=True)
    except (flags.Error, InputError):
      pass  # Reported when all flags are parsed.
    self.chosen: str | None = ahead['method'].value
    known = self.chosen in registry.METHODS
    super().__init__(str(self.chosen) if known else 'supervised')
    define_method(self.values)
    define(self.values)

  def parse(self, argv: Sequence[str]) -> list[str]:
    """Parse arguments; a method must be known.

    Raises:
      InputError: the method is unknown.
    """
    if self.chosen is not None and self.chosen not in self.others:
      registry.method(self.chosen)
    return super().parse(argv)

  def require_method(self) -> None:
    """Raise `InputError` if no method is chosen."""
    known = ', '.join(registry.METHODS)
    require(self.chosen is not None, f'`method`: give one of {known}')


class TrainCommand(SelectedCommand):
  """Trains the chosen method, or chooses one."""

  others = (AUTO,)

  def act(self) -> None:
    """Train the run that the flags describe."""
    self.require_method()
    if self.chosen == AUTO:
      from ssljax.cli import auto_command

      require(
        self.fits_data,
        '`method`=auto: suits data of your own: give `images` or `dataset`',
      )
      auto_command.run(self.given())
    else:
      super().act()


def define_method(values: flags.FlagValues) -> None:
  """Define --method."""
  flags.DEFINE_string(
    'method',
    None,
    f'The method, one of {", ".join(registry.METHODS)}; `ssljax train` takes '
    '"auto", which compares the baseline and two methods on held-out labels.',
    flag_values=values,
  )
