"""Lengths of a run that fit into a time budget (`minutes`).

A run is made at its nominal lengths, a few real steps of every stage of every
arm are timed (`training.rehearsal`), and all lengths are multiplied by one
factor, so that compilation, training and evaluation of all arms and splits end
within the budget. The stages keep their proportions, and a schedule ends where
its stage ends. The record of the run holds the resulting lengths: a resumed run
takes them from there and does not measure again.
"""

from collections.abc import Callable, Collection
import contextlib
import functools
import math
import pathlib
import time
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np

from ssljax import files
from ssljax.config import Config
from ssljax.core import Method, no_update
from ssljax.data import sampling
from ssljax.distributed import multihost
from ssljax.errors import InputError, require
from ssljax.runs import build, execute, run_folder
from ssljax.training import compiled, rehearsal

# Settings that are lengths in steps or epochs, of any method.
LENGTHS = (
  *('steps', 'epochs', 'pretrain', 'warm', 'finetune', 'iterations'),
  *('interval', 'repeat', 'repredict_every', 'decay_at'),
)
LEAST = 0.05  # a shorter run than this share of the nominal one is refused
_SAVING = 0.5  # seconds of a checkpoint at the end of a stage
_END = 3.0  # seconds from the last step to the end of the command
_OF_STAGE = 0.01  # share of the budget to time a stage for


class TooSmallError(InputError):
  """The budget is too small."""

  def __init__(self, message: str, minutes: float):
    """Keep the least budget in minutes."""
    super().__init__(message)
    self.minutes = minutes


def check(config: Config, given: Collection[str] = ()) -> None:
  """Raise `InputError` for a budget beside a length, or with queries.

  Args:
    config: of the run.
    given: names of settings that the user gives beside the budget.
  """
  minutes = config.run.minutes
  if minutes is None:
    return
  for name in ('steps', 'epochs'):
    require(
      name not in given,
      f'`minutes`={minutes:g}, `{name}`={config.values()[name]}: the budget '
      'decides the lengths: give one of the two',
    )
  require(
    config.active.acquire == 'none',
    f'`minutes`={minutes:g}, `acquire`={config.active.acquire}: the time of '
    'queries is not known beforehand: give `steps` instead of `minutes`',
  )


def recorded(config: Config, folder: pathlib.Path) -> Config:
  """Return a config with the lengths of the run that its folder holds.

  The config is returned as it is if the folder holds no run of the same method
  and budget.

  Args:
    config: of the run.
    folder: of the run; may be absent.
  """
  minutes = config.run.minutes
  if minutes is None or config.run.overwrite:
    return config
  if not files.exists(folder) or not run_folder.is_run(folder):
    return config
  there = run_folder.read_config(folder, config.method)
  if there.method != config.method or there.run.minutes != minutes:
    return config
  names = (*LENGTHS, 'bn_momentum')
  values = there.values()
  return config.replace(**{n: values[n] for n in names if n in values})


def scaled(config: Config, factor: float) -> Config:
  """Return a config whose lengths are multiplied by a factor."""
  return config.replace(**lengths(config.values(), factor))


def lengths(values: dict[str, Any], factor: float) -> dict[str, Any]:
  """Return the lengths among some settings, multiplied by a factor.

  A length of 0, which leaves a stage out, stays 0; others are at least 1.
  """
  found = {}
  for name in LENGTHS:
    value = values.get(name)
    if name == 'epochs' and value:
      found[name] = value * factor
    elif isinstance(value, tuple | list) and value:
      found[name] = tuple(max(1, round(each * factor)) for each in value)
    elif isinstance(value, int) and value:
      found[name] = max(1, round(value * factor))
  if found.get('repeat') and found.get('interval'):
    parts = values['repeat'] // values['interval']
    found['repeat'] = parts * found['interval']
  return found


def seconds_of(
  method: Method,
  cost: rehearsal.JobCost,
  factor: float,
  jobs: int,
  evaluate_every: int | None,
) -> float:
  """Return the seconds that a method takes under all splits.

  Args:
    method: at its nominal lengths.
    cost: of one job of it.
    factor: of the lengths.
    jobs: groups of splits that are trained one after the other.
    evaluate_every: as the user gives it.
  """
  steps = [stage.steps * factor for stage in method.stages]
  every = evaluate_every or max(1.0, sum(steps) / 10)
  stop_every = min(max(1.0, sum(steps) / 100), 100.0)
  once, each = cost.compiling, cost.start
  for stage, of_stage, length in zip(
    method.stages, cost.stages, steps, strict=True
  ):
    once += of_stage.compiling
    if stage.epochs:
      rounds = max(1.0, stage.epochs * factor)
      length = rounds * of_stage.epoch_steps
      evaluations = updates = rounds
    else:
      length, evaluations = max(1.0, length), 1 + length / every
      updates = 0.0 if stage.epoch_update is no_update else 1.0
      if updates and stage.every:
        updates = math.ceil(length / (of_stage.epoch_steps * stage.every))
    each += length * of_stage.step + evaluations * of_stage.evaluation
    each += updates * of_stage.update + _SAVING
    each += (length / stop_every + evaluations) * of_stage.stop
  return once + jobs * each


def fit(
  run: build.Run,
  began: float,
  *,
  tx: Callable | None = None,
  net=None,
  say: Callable[[str], None] = print,
) -> build.Run:
  """Return a run whose lengths fit into the budget of its config.

  Args:
    run: at its nominal lengths.
    began: time at which the command began, on the monotonic clock.
    tx: as `build.build` takes it.
    net: likewise.
    say: gets a line about what was measured.

  Raises:
    InputError: the budget is too small.
  """
  config, budget = run.config, 60 * (run.config.run.minutes or 0)
  jobs = len(execute.groups_of(run))
  costs: list[rehearsal.JobCost] = []

  def needed(factor: float) -> float:
    return _END + sum(
      seconds_of(method, cost, factor, jobs, config.run.evaluate_every)
      for method, cost in zip(run.methods, costs, strict=False)
    )

  for method in run.methods:
    costs.append(_measured(run, method, budget))
    passed = time.monotonic() - began
    least = passed + needed(LEAST)
    # All processes of a run decide alike.
    if multihost.broadcast_bool(least > budget):
      least *= len(run.methods) / len(costs)
      raise TooSmallError(
        f'`minutes`={config.run.minutes:g}: {_arms(run)} need at least about '
        f'{_up(least)} minutes here ({_up(passed + needed(0.0))} to read the '
        f'data, compile and measure {method.name}): give '
        f'`minutes`={_up(least * 1.1)} or more, fewer `seeds`, or '
        '`baseline=False`',
        least / 60,
      )
  factor = multihost.on_main_process(lambda: _factor(needed, budget - passed))
  config = scaled(config, factor)
  epoch_steps = lambda spec: sampling.Sampler(spec, run.drawn[0]).epoch_steps
  net, methods = build.make_methods(
    config, run.dataset, epoch_steps, net=net, tx=tx
  )
  say(_said(run, config, costs, factor, passed + needed(factor)))
  return run._replace(config=config, net=net, methods=methods)


def _factor(needed: Callable[[float], float], seconds: float) -> float:
  """Return the factor of the lengths that needs so many seconds."""
  low, high = 0.0, 1.0
  while needed(high) < seconds and high < 1e4:
    low, high = high, 2 * high
  for _ in range(50):
    middle = (low + high) / 2
    low, high = (middle, high) if needed(middle) < seconds else (low, middle)
  return low


def _measured(run: build.Run, method: Method, budget: float):
  """Return the cost of a job of a method, measured on its first splits."""
  group = execute.groups_of(run)[0]
  program = compiled.Program(
    method, run.net, run.data_of(group), run.mesh, seeds=len(group)
  )
  program.use_splits(group)
  options = execute.make_options(run, method.stages, run.data.train)
  seconds = float(np.clip(_OF_STAGE * budget, 0.5, 5.0))
  with _without_cache():
    return rehearsal.measure(program, group, options, seconds)


@contextlib.contextmanager
def _without_cache():
  """Switch off JAX's cache on disk: it may lack what the real run compiles."""
  was_enabled = jax.config.jax_enable_compilation_cache
  switch = functools.partial(jax.config.update, 'jax_enable_compilation_cache')
  switch(False)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    switch(was_enabled)
    compilation_cache.reset_cache()


def _arms(run: build.Run) -> str:
  """Return 'madnn and supervised under 5 splits'."""
  names = ' and '.join(method.name for method in reversed(run.methods))
  splits = len(run.drawn)
  return f'{names} under {splits} {"split" if splits == 1 else "splits"}'


def _up(seconds: float) -> str:
  """Return minutes, rounded up to a tenth."""
  return f'{math.ceil(seconds / 6) / 10:g}'


def _said(run: build.Run, config: Config, costs, factor, seconds) -> str:
  """Return the line that tells the lengths and what they follow from."""
  values = config.values()
  names = lengths(values, 1.0)
  shown = ' '.join(f'`{name}`={_text(values[name])}' for name in names)
  rates = ', '.join(
    f'{method.name} {stage.name} {1e3 * cost.step:.3g} ms'
    for method, job in zip(run.methods, costs, strict=True)
    for number, (stage, cost) in enumerate(
      zip(method.stages, job.stages, strict=True)
    )
    if rehearsal.kinds(method)[number] == number
  )
  compiling = sum(
    job.compiling + sum(stage.compiling for stage in job.stages)
    for job in costs
  )
  return (
    f'lengths for {config.run.minutes:g} minutes ({factor:.2g} times the '
    f'nominal ones): {shown}\nmeasured: a step of {rates}; '
    f'{compiling:.0f} s to compile; expected in all: {seconds / 60:.1f} minutes'
  )


def _text(value) -> str:
  return ','.join(map(str, value)) if isinstance(value, tuple) else f'{value:g}'
