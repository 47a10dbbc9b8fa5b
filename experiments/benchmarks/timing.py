"""How long things take beside each other, on a machine that is shared."""

from collections.abc import Callable
import time


def seconds(
  steps: dict[str, Callable], rounds: int, clock: Callable = time.perf_counter
) -> dict[str, float]:
  """What each takes, the best of some rounds in turn."""
  best = dict.fromkeys(steps, float('inf'))
  for step in steps.values():
    step()  # compiles
  for _ in range(rounds):
    for name, step in steps.items():
      began = clock()
      step()
      best[name] = min(best[name], clock() - began)
  return best


def rates(
  steps: dict[str, Callable],
  images: dict[str, int],
  rounds: int,
  clock: Callable = time.perf_counter,
) -> dict[str, float]:
  """Images per second of each, measured likewise."""
  measured = seconds(steps, rounds, clock)
  return {name: images[name] / measured[name] for name in steps}
