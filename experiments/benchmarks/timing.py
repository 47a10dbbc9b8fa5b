"""Compare the run time of functions on a shared machine."""

from collections.abc import Callable
import time


def each_round(
  steps: dict[str, Callable], rounds: int, clock: Callable = time.perf_counter
) -> dict[str, list]:
  """Return the time of each function in every round.

  Args:
    steps: functions without arguments, by name; each is called once before the
      measurements, to compile it.
    rounds: number of measurements; each round calls all functions in turn.
    clock: returns the time in seconds, or an array of several times.
  """
  found: dict[str, list] = {name: [] for name in steps}
  for step in steps.values():
    step()
  for _ in range(rounds):
    for name, step in steps.items():
      began = clock()
      step()
      found[name].append(clock() - began)
  return found


def seconds(
  steps: dict[str, Callable], rounds: int, clock: Callable = time.perf_counter
) -> dict[str, float]:
  """Return the shortest time of each function; see `each_round`."""
  found = each_round(steps, rounds, clock)
  return {name: min(times) for name, times in found.items()}


def rates(
  steps: dict[str, Callable],
  images: dict[str, int],
  rounds: int,
  clock: Callable = time.perf_counter,
) -> dict[str, float]:
  """Return images per second of each function.

  Args:
    steps: as in `seconds`.
    images: number of images that a call of each function processes.
    rounds: as in `seconds`.
    clock: as in `seconds`.
  """
  measured = seconds(steps, rounds, clock)
  return {name: images[name] / measured[name] for name in steps}
