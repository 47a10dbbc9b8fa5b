"""Repeats a step that failed, one operation at a time.

The steps from the newest checkpoint on are a function of it, so that the same
step fails again. It is then evaluated operation by operation, and the first one
with a result that is not finite is named.
"""

from collections.abc import Sequence
import traceback
from typing import Any, cast

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from ssljax.core import TrainState
from ssljax.training import checkpoint, loop, metrics_writer
from ssljax.training.compiled import Program
from ssljax.training.job import Job, Options
from ssljax.training.watch import Watch


class FoundError(Exception):
  """The step failed again; the message says where."""


class Replay(Watch):
  """Keeps the state before each step, and repeats the one that fails."""

  def __init__(self, program: Program, last: int):
    """Prepare.

    Args:
      program: of the job.
      last: the step that failed, over all stages, counted from 1.
    """
    self.program, self.last = program, last
    self.kept: tuple[Any, ...] = ()  # arguments of `first_operation`

  def before(self, stage, state, steps, *call) -> None:
    """Keep a copy of the state, which the step overwrites."""
    self.kept = stage, jax.tree.map(jnp.copy, state), call

  def after(self, state, steps, metrics) -> None:
    """Raise `FoundError` if the step failed, or was the last to look at."""
    loss = jax.device_get(metrics['loss'])
    with jax.transfer_guard('allow'):
      is_finite = checkpoint.examine(state)[0] and np.isfinite(loss).all()
      if is_finite and steps[1] < self.last:
        return
      if is_finite:
        raise FoundError(
          f'step {steps[1]} did not fail again: the loss is {np.ravel(loss)}'
        )
      found = first_operation(self.program, *self.kept)
    raise FoundError(
      f'step {steps[1]} failed again, loss {np.ravel(loss)}: {found}'
    )


class _ReadOnly:
  """Checkpoints that are restored, and not written."""

  def __init__(self, checkpoints: checkpoint.Checkpoints):
    self._checkpoints, self.folder = checkpoints, checkpoints.folder

  def restore(self, like, put_aside=True, step=None):
    """Restore, and rename nothing."""
    return self._checkpoints.restore(like, False, step)

  def save(self, *args) -> None:
    """Save nothing."""

  def wait(self) -> None:
    """Return at once."""


def replay(
  job: Job, options: Options, checkpoints: checkpoint.Checkpoints, step: int
) -> str:
  """Train a job from its newest checkpoint to a step that fails.

  Args:
    job: the job.
    options: of the job.
    checkpoints: of the job; none is written.
    step: the step, over all stages, counted from 1.

  Returns:
    What failed in it.
  """
  options = options._replace(
    watch=Replay(job.program, step), steps_per_call=1, progress=False
  )
  writer = metrics_writer.NoMetrics()
  try:
    restored = cast(checkpoint.Checkpoints, _ReadOnly(checkpoints))
    loop.fit(job, options, writer, restored)
  except FoundError as found:
    return str(found)
  return f'step {step} did not fail again'


def first_operation(
  program: Program, stage: int, state: TrainState, call: Any
) -> str:
  """Return a text that names the first operation of a step that fails.

  Args:
    program: of the job.
    stage: number of the stage.
    state: before the step.
    call: the other arguments of the step.
  """
  step = program.plain_step(program.method.stages[stage])
  found = []
  with jax.debug_nans(True), jax.disable_jit():
    try:
      step(state, *call)
    except FloatingPointError as error:
      place = _place(error)
      found.append(f'the first NaN result is of {_operation(error)}, {place}')
  traced = jax.make_jaxpr(step)(state, *call)
  try:
    _evaluate(traced.jaxpr, traced.consts, jax.tree.leaves((state, *call)))
  except _InfiniteError as error:
    found.append(f'the first infinite result is of {error}')
  return '; '.join(found) or (
    'every operation of it is finite where they are computed one by one: the '
    'compiled step differs in rounding'
  )


class _InfiniteError(Exception):
  """An operation on finite numbers has an infinite result."""


def _evaluate(jaxpr, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
  """Return the results of a traced function, computed one by one.

  `jax.debug_infs` would stop at constants: a maximum begins with -inf.

  Raises:
    _InfiniteError: the first operation with an infinite result, of finite
      numbers.
  """
  values = dict(zip(jaxpr.constvars, consts, strict=True))
  values |= dict(zip(jaxpr.invars, inputs, strict=True))
  read = lambda v: (
    v.val if isinstance(v, jax.extend.core.Literal) else values[v]
  )
  for equation in jaxpr.eqns:
    given = [read(v) for v in equation.invars]
    inner = equation.params.get('jaxpr')
    results: Sequence[Any]
    if equation.primitive.name in ('jit', 'pjit') and inner is not None:
      results = _evaluate(inner.jaxpr, inner.consts, given)
    else:
      results = _bind(equation, given)
      if _has_infinite(results) and not _has_infinite(given):
        trace = equation.source_info.traceback
        frames = traceback.extract_tb(trace and trace.as_python_traceback())
        own = [f for f in frames if _is_own(f.filename)]
        raise _InfiniteError(f'{equation.primitive.name}, {_line(own)}')
    values.update(zip(equation.outvars, results, strict=True))
  return [read(v) for v in jaxpr.outvars]


def _bind(equation, given: Sequence[Any]) -> Sequence[Any]:
  """Return the results of one operation."""
  primitive = equation.primitive
  bound = primitive.get_bind_params(equation.params)
  # Functions beside the parameters, or, in newer versions of JAX, among them.
  functions, more = bound if isinstance(bound, tuple) else ((), bound)
  found = primitive.bind(*functions, *given, **more)
  return found if primitive.multiple_results else [found]


def _has_infinite(values: Sequence[Any]) -> bool:
  """Return True if a float among some arrays is infinite."""
  numbers = [x for x in values if jnp.issubdtype(x.dtype, jnp.floating)]
  return any(bool(jnp.isinf(x).any()) for x in numbers)


def _operation(error: FloatingPointError) -> str:
  """Return the operation of an error of `jax.debug_nans`."""
  return str(error).split('encountered in ')[-1].split('\n')[0].rstrip('.')


def _place(error: BaseException) -> str:
  """Return the line of this package, or a user's, that the operation is in.

  The error of a derivative has the line of the function as its cause.
  """
  frames: list[traceback.FrameSummary] = []
  found: BaseException | None = error
  while found is not None:
    frames = traceback.extract_tb(found.__traceback__) or frames
    own = [f for f in frames if _is_own(f.filename)]
    if found.__cause__ is None and own:
      return _line(own)
    found = found.__cause__
  return _line([])


def _line(own: Sequence[traceback.FrameSummary]) -> str:
  """Return the innermost of some lines."""
  if not own:
    return 'at an unknown place'
  return f'{own[-1].filename}:{own[-1].lineno}: {own[-1].line}'


def _is_own(path: str) -> bool:
  """Return True for a file that is no other library's and not this one."""
  return 'site-packages' not in path and not path.endswith('replay.py')
