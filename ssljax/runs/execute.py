"""Trains a run, with or without a folder that records it."""

import collections
from collections.abc import Callable, Sequence
import contextlib
import functools
import itertools
import pathlib
import sys
import time
from typing import Any

import jax
import tqdm

from ssljax import config as config_lib
from ssljax import files, registry
from ssljax.core import Method, TrainState
from ssljax.data import feeds, splits
from ssljax.distributed import multihost, preemption, watchdog
from ssljax.errors import InputError, require
from ssljax.runs import queries, run_folder, run_lock, summary
from ssljax.runs.build import Run
from ssljax.training import (
  checkpoint,
  compiled,
  jax_settings,
  loop,
  metrics_writer,
  profile,
)
from ssljax.training import job as job_lib
from ssljax.training import replay as replay_lib

ACCELERATOR_STEPS = 50  # per call; on CPU a loop of convolutions is slow


def seed_range(group) -> str:
  """Return '3' or '3-5': the seeds of a group of splits."""
  first, last = group[0].seed, group[-1].seed
  return str(first) if first == last else f'{first}-{last}'


def checkpoint_folder(folder: pathlib.Path, method: Method, group):
  """Return the folder of the checkpoints of a method and a group of splits."""
  return folder / 'checkpoints' / method.name / f'seed-{seed_range(group)}'


def groups_of(run: Run) -> list[list[splits.Split]]:
  """Return the splits that are trained at once, group by group."""
  size = run.group_size
  return [run.drawn[i : i + size] for i in range(0, len(run.drawn), size)]


def jobs_of(
  run: Run, parts: Sequence[int] = ()
) -> list[tuple[Method, list[splits.Split]]]:
  """Return the methods and groups of splits to train, in order.

  Args:
    run: the run.
    parts: numbers of splits that the run had before splits were added, rising.
      All methods are trained under these first, so that no job is inserted
      before a finished one.
  """
  bounds = [0, *parts, len(run.drawn)]
  groups, first = groups_of(run), run.drawn[0].seed
  return [
    (method, group)
    for low, high in itertools.pairwise(bounds)
    for method in run.methods
    for group in groups
    if low <= group[0].seed - first < high
  ]


class NoCheckpoints:
  """Checkpoints of a run without a folder: saves nothing, restores nothing."""

  folder = None

  def save(self, step: int, state: TrainState, progress: dict) -> None:
    """Save nothing."""

  def restore(self, *args, **kwargs) -> None:
    """Return None: there is no checkpoint."""

  def wait(self) -> None:
    """Return at once."""

  def close(self) -> None:
    """Close nothing."""


def settings_of(config: config_lib.Config) -> dict[str, Any]:
  """Return the settings that a resumed run must not change, by name."""
  values = {'method': config.method} | config.values()
  network = config.network.network
  # As in checkpoints of earlier versions, which knew no other default.
  if values['bn_momentum'] == registry.own_momentum(network):
    values['bn_momentum'] = None
  # A job has its own splits, however many others there are.
  left_out = *config_lib.FREE, 'seeds'
  return {k: v for k, v in values.items() if k not in left_out}


def make_options(run: Run, stages, feed: feeds.Feed) -> job_lib.Options:
  """Return how often to record, evaluate and save, of stages of a method."""
  settings = run.config.run
  steps = sum(stage.steps for stage in stages)
  one = jax.default_backend() == 'cpu' or not feed.pixels_are_shared
  return job_lib.Options(
    evaluate_every=settings.evaluate_every or max(1, steps // 10),
    record_every=settings.record_every or min(max(1, steps // 100), 100),
    checkpoint_seconds=settings.checkpoint_seconds,
    steps_per_call=settings.steps_per_call or (1 if one else ACCELERATOR_STEPS),
    keep_every=settings.keep_every,
    stop_early=settings.stop_early,
  )


def train(
  run: Run,
  folder: pathlib.Path | None = None,
  *,
  lock: run_lock.RunLock | None = None,
  on_finish: Callable | None = None,
  on_measurement: Callable | None = None,
  progress: bool = True,
) -> dict[str, Any]:
  """Train every method under every split.

  With a folder, `result.json` is kept up to date, and an interrupted run goes
  on from its newest checkpoint.

  Args:
    run: of `build.build`.
    folder: of the run; without one nothing is written.
    lock: lock on the folder, in the main process.
    on_finish: `(program, splits, state)`, called when a method is trained under
      a group of splits; the state has a leading axis [S] of seeds.
    on_measurement: called with every measurement, a dict.
    progress: show a progress bar.

  Returns:
    The content of `result.json`.

  Raises:
    PreemptedError: SIGTERM came; the checkpoint holds the step it came in, or
      the step before the dataset pass it came in.
  """
  traced = run.config.run.profile
  require(
    not traced or not (folder is None or files.in_bucket(folder)),
    f'`profile`={traced}: the trace needs a folder on a disk of this machine: '
    'give such a `workdir`',
  )
  by_people = run.config.active.acquire != 'none'
  by_people &= run.config.active.oracle == 'people'
  require(
    folder is not None or not by_people,
    '`oracle`=people: questions need a folder: give `workdir`',
  )
  require(
    folder is not None or not run.config.run.stop_early,
    '`stop_early=True`: the better stage is restored from its checkpoint: give '
    '`workdir`',
  )
  result = summary.begin(run)
  earlier = folder and multihost.on_main_process(
    lambda: run_folder.read_result(folder)
  )
  result['started'] = (earlier or {}).get('started', round(time.time(), 3))
  keep_result(folder, result)
  recorder: Any = metrics_writer.NoMetrics()
  if folder and multihost.is_main_process():
    recorder = metrics_writer.MetricsWriter(folder, run.config.run.writers)
  if on_measurement:
    recorder = _Observed(recorder, on_measurement)
  with (
    _closing(recorder),
    _notice(folder) as preempted,
  ):
    if lock:
      preempted = _WhileHeld(lock, preempted)
    jobs = _Jobs(run, folder, recorder, preempted, result, on_finish)
    jobs.progress, parts = progress, _parts(folder)
    for method, group in jobs_of(run, parts):
      jobs.train_group(method, group)
  result['complete'] = True
  wall = time.time() - result['started']
  if not parts:  # Else the time before splits were added counts as lost.
    shares = {part: spent / wall for part, spent in jobs.spent.items()}
    shares['other'] = max(0.0, 1 - sum(shares.values()))
    result['goodput'] = round(shares.get('steps', 0.0), 3)
    result['goodput_parts'] = {k: round(v, 4) for k, v in shares.items()}
  keep_result(folder, result)
  return result


@contextlib.contextmanager
def _closing(recorder):
  """Close a recorder at the end; of two errors the first one is raised."""
  try:
    yield
  except BaseException:
    with contextlib.suppress(OSError):
      recorder.close()
    raise
  recorder.close()


def _notice(folder: pathlib.Path | None):
  """Listen to SIGTERM, if there is a folder in which a state can be saved."""
  if folder is None:
    return contextlib.nullcontext(lambda: False)
  return preemption.Notice().listen()


def _refuse_late(run: Run) -> None:
  """Raise `InputError` for a trace of steps after the end of the run."""
  traced, total = run.config.run.profile, loop.total_steps(run.methods[-1])
  if traced is None or total is None:
    return
  first, count = config_lib.first_and_count('profile', traced)
  require(
    first + count - 1 <= total,
    f'`profile`={traced}: {run.methods[-1].name} has {total} steps: give steps '
    'among these',
  )


class _WhileHeld:
  """A preemption notice that raises when the run has lost its lock."""

  def __init__(self, lock: Any, notice: Any):
    self._lock, self._notice = lock, notice

  def __call__(self) -> bool:
    """Return True once the run is interrupted."""
    self._lock.require_held()
    return self._notice()

  @property
  def signal(self) -> str:
    """Name of the signal that has interrupted the run."""
    return self._notice.signal


class _Jobs:
  """The jobs of a run, one after the other."""

  def __init__(self, run, folder, recorder, preempted, result, on_finish):
    self.run, self.folder, self.recorder = run, folder, recorder
    self.preempted, self.result, self.on_finish = preempted, result, on_finish
    self.metrics_start, self.progress = 0, True
    self.spent = collections.Counter()  # seconds by part, of all jobs
    self.left = len(run.methods) * len(groups_of(run))
    self.is_traced = run.config.run.profile is None
    self.made = {}  # programs of the current method, with their active learning

  def train_group(self, method: Method, group) -> None:
    """Train a method under a group of splits."""
    run, made = self.run, self.made
    name = f'{method.name} seed {seed_range(group)}'
    data = run.data_of(group)
    key = method.name, len(group), id(data)
    if key not in made:
      if any(owner != method.name for owner, *_ in made):
        made.clear()  # It frees the memory of the other method's programs.
      program = compiled.Program(
        method,
        run.net,
        data,
        run.mesh,
        seeds=len(group),
        extra=queries.most(run.config, run.drawn[0]),
      )
      made[key] = program, queries.make(run, program, self.folder)
    program, asks = made[key]
    program.use_splits(group)
    settings = settings_of(run.config)
    self.train_job(job_lib.Job(name, program, group, asks, settings))

  def train_job(self, job: job_lib.Job) -> None:
    """Train a method under a group of splits and add it to the result."""
    method, settings = job.program.method, self.run.config.run
    options = make_options(self.run, method.stages, self.run.data.train)
    self.left -= 1
    options = options._replace(
      preempted=self.preempted,
      progress=self.progress,
      following=f'; {self.left} more to follow' if self.left else '',
      watch=self.profile(method),
    )
    with (
      contextlib.closing(self.checkpoints(job)) as checkpoints,
      _outages(self.folder, checkpoints),
      _recorded_failure(self.run, self.folder),
    ):
      state, progress = loop.fit(
        job, options, self.recorder, checkpoints, self.metrics_start
      )
    self.metrics_start = progress.metrics_bytes
    self.spent.update(progress.by_part())
    summary.add(
      self.result,
      method,
      progress,
      settings.report_minimum,
      summary.evaluated_images(self.run),
    )
    if self.recorder.missing:
      self.result['metrics_missing'] = self.recorder.missing
    keep_result(self.folder, self.result)
    if self.on_finish:
      self.on_finish(job.program, job.splits, state)

  def profile(self, method: Method) -> profile.Profile | None:
    """Return what traces steps of the first job of the run's own method."""
    is_own = method.name == self.result['method']
    if self.is_traced or not is_own or not multihost.is_main_process():
      return None
    self.is_traced = True
    text = self.run.config.run.profile
    steps = config_lib.first_and_count('profile', text)
    say = functools.partial(tqdm.tqdm.write, file=sys.stderr)
    return profile.Profile(self.folder / 'profile', steps, say)

  def checkpoints(self, job: job_lib.Job):
    """Open the checkpoints of a job."""
    if self.folder is None:
      return NoCheckpoints()
    return open_checkpoints(self.run, self.folder, job)


def open_checkpoints(
  run: Run, folder: pathlib.Path, job: job_lib.Job
) -> checkpoint.Checkpoints:
  """Open the checkpoints of a job of a run, whose lock is held."""
  method, settings = job.program.method, run.config.run
  ends = settings.keep_stages or settings.stop_early
  permanent = loop.permanent(method, ends, settings.keep_every)
  where = checkpoint_folder(folder, method, job.splits)
  return checkpoint.Checkpoints(
    where,
    settings.keep_checkpoints,
    permanent,
    clean_up=True,
    keep_hours=settings.keep_hours,
  )


# A step that fails.

_FAILURE = 'failure.json'


@contextlib.contextmanager
def _recorded_failure(run: Run, folder: pathlib.Path | None):
  """Record what identifies a step that fails in the run's folder."""
  try:
    yield
  except loop.DivergedError as error:
    if folder is None or not error.record:
      raise
    record, names = dict(error.record), run.dataset.train.names
    if names is not None:
      record['files'] = [[str(names[r]) for r in x] for x in record['rows']]
    path = folder / _FAILURE
    multihost.on_main_process(lambda: run_folder.write_json(path, record))
    raise loop.DivergedError(
      f'{error.marked} ({_FAILURE} has the rows and keys of the step; the same '
      'command with `replay=True` repeats it)',
      record,
    ) from error


def replay(run: Run, folder: pathlib.Path) -> str:
  """Repeat the step that failed in a run's folder; return what was found.

  Raises:
    InputError: no step failed there.
  """
  require(
    not multihost.is_multiprocess(),
    '`replay=True`: repeats a step in one process: start one',
  )
  path = folder / _FAILURE
  require(
    files.exists(path),
    f'`replay=True`: no step has failed in {folder}: leave it out',
  )
  record = run_folder.read_json(path)
  method, group = _failed_job(run, record)
  program = compiled.Program(
    method,
    run.net,
    run.data_of(group),
    run.mesh,
    seeds=len(group),
    extra=queries.most(run.config, run.drawn[0]),
  )
  asks = queries.make(run, program, folder)
  program.use_splits(group)
  job = job_lib.Job(method.name, program, group, asks, settings_of(run.config))
  options = make_options(run, method.stages, run.data.train)
  with contextlib.closing(open_checkpoints(run, folder, job)) as checkpoints:
    found = replay_lib.replay(job, options, checkpoints, record['step'])
  return f'{found}\nimages and keys of the step: {path}'


def _failed_job(run: Run, record) -> tuple[Method, list[splits.Split]]:
  """Return the method and the splits of a `failure.json`."""
  for method, group in jobs_of(run):
    numbers = [split.seed for split in group]
    if method.name == record.get('method') and numbers == record.get('seeds'):
      return method, group
  raise InputError(
    f'`replay=True`: {_FAILURE} is of {record.get("method")} with the seeds '
    f'{record.get("seeds")}, which this command does not train: give the '
    'settings of the run'
  )


@contextlib.contextmanager
def _outages(folder: pathlib.Path | None, checkpoints):
  """Name the last checkpoint when the bucket of a run cannot be used."""
  try:
    yield
  except OSError as error:
    if folder is None or not files.in_bucket(folder):
      raise
    raise InputError(
      f'`workdir`={folder}: cannot be written ({error.strerror or error}): '
      f'{checkpoints.remedy()}'
    ) from error


class _Observed:
  """A recorder whose measurements are also given to a function."""

  def __init__(self, recorder, on_measurement: Callable):
    self._recorder, self._on_measurement = recorder, on_measurement

  def write(self, job: str, measurement: dict) -> None:
    """Record a measurement and hand it on."""
    self._recorder.write(job, measurement)
    self._on_measurement({'job': job} | measurement)

  def __getattr__(self, name: str):
    return getattr(self._recorder, name)


def keep_result(folder: pathlib.Path | None, result: dict) -> None:
  """Write `result.json`, once for all processes."""
  if folder:
    path = folder / 'result.json'
    multihost.on_main_process(lambda: run_folder.write_json(path, result))


def train_in_folder(
  make_run: Callable[[], Run],
  config,
  folder: pathlib.Path,
  *,
  say: Callable[[str], None] = print,
  **more,
) -> tuple[dict[str, Any], Run | None]:
  """Train a run in its folder, or go on with it, or return its result.

  Args:
    make_run: makes the run; called unless the folder holds it, complete.
    config: of the run.
    folder: of the run; made if absent.
    say: gets the opening and the final table.
    **more: as `train` takes it.

  Returns:
    The content of `result.json`, and the run, or None if it was complete.

  Raises:
    InputError: the folder holds another run, or cannot be written.
  """
  look = lambda: multihost.on_main_process(
    functools.partial(run_folder.look, folder, config, config.run.overwrite)
  )
  with run_folder.disk_errors(folder):
    finished = look()
  with contextlib.ExitStack() as stack:
    lock = None
    if not finished:
      lock = stack.enter_context(_locked(folder, config.run.workdir is None))
      finished = look()  # another process may have been here
    require(
      not config.run.replay or run_folder.is_run(folder),
      f'`replay=True`: {folder} holds no run: give the `workdir` of a run that '
      'failed',
    )
    if finished:
      say(f'{folder} holds this run, complete:')
      say(summary.table(finished, folder))
      return finished, None
    run = _begin(make_run, folder)
    with run_folder.disk_errors(folder):
      multihost.on_main_process(functools.partial(_claim, folder, run))
      multihost.require_shared_folder(folder)
      say(summary.opening(run, folder))
      if config.run.replay:
        say(replay(run, folder))
        return summary.begin(run), run
      result = train(run, folder, lock=lock, **more)
    say(summary.table(result, folder))
    multihost.barrier('everything is written')
  return result, run


def _begin(make_run: Callable[[], Run], folder: pathlib.Path) -> Run:
  """Make the run, and refuse what can be refused before it is recorded."""
  run = make_run()
  watchdog.reset()
  _refuse_late(run)
  multihost.require_same(
    'the labels',
    [split.digest for split in run.drawn],
    'give all hosts the same data set in `data_dir`',
  )
  multihost.require_same(
    'the settings of JAX',
    jax_settings.current(),
    'set the same JAX_ variables on all hosts',
  )
  if not run.config.run.overwrite:
    multihost.on_main_process(lambda: refuse_other_splits(folder, run))
  return run


@contextlib.contextmanager
def _locked(folder: pathlib.Path, is_new: bool):
  """Hold the lock on a folder; all processes of a run share it.

  A folder that is still empty at the end is removed, with its parents, if this
  call has made them, and likewise the dated folder of a new run.

  Args:
    folder: of the run; made if absent.
    is_new: the folder was made for this run.

  Yields:
    The lock in the main process, None in the others.
  """
  made, locks = [], []

  def take():
    if not files.in_bucket(folder):
      paths = [folder, *folder.parents]
      made.extend(p for p in paths if not files.exists(p))
    folder.mkdir(parents=True, exist_ok=True)
    locks.append(run_lock.take(folder))

  try:
    with run_folder.disk_errors(folder):
      multihost.on_main_process(take)
    yield locks[0] if locks else None
  finally:
    for lock in locks:
      lock.release()
    dated = [folder, folder.parent] if is_new and locks else []
    for path in made or dated:
      with contextlib.suppress(OSError):
        path.rmdir()


def _claim(folder: pathlib.Path, run: Run) -> None:
  """Make the folder this run's own, with its config and splits in it."""
  run_folder.claim(folder, run.config, run.config.run.overwrite)
  keep_splits(folder, run)


def refuse_other_splits(folder: pathlib.Path, run: Run) -> None:
  """Raise `InputError` if the folder's `split.json` has other splits."""
  path = folder / 'split.json'
  if files.exists(path):
    try:
      splits_there = run_folder.read_json(path)['splits']
      there = [split['hash'] for split in splits_there]
    except (KeyError, TypeError) as error:
      raise InputError(
        f'`workdir`={folder}: split.json is damaged: remove that file and run '
        'the same command again, it is written anew'
      ) from error
    here = [split.digest for split in run.drawn]
    both = min(len(there), len(here))  # Splits may have been added.
    require(
      both > 0 and there[:both] == here[:both],
      f'`workdir`={folder}: its split.json has other labelled images than '
      'these settings draw now (another data set or version): give another '
      'folder, or `overwrite=True`',
    )


def keep_splits(folder: pathlib.Path, run: Run) -> None:
  """Write `split.json`, unless it is there with all splits.

  `parts` are the numbers of splits that the run had before others were added.
  """
  path = folder / 'split.json'
  there = run_folder.read_json(path) if files.exists(path) else {}
  before = len(there.get('splits', ()))
  if before < len(run.drawn):
    described = {
      'dataset': run.dataset.name,
      'images': len(run.dataset.train.labels),
      'classes': list(run.dataset.classes),
      'splits': [splits.describe(split) for split in run.drawn],
    }
    if before:
      described['parts'] = [*there.get('parts', ()), before]
    run_folder.write_json(path, described)


def _parts(folder: pathlib.Path | None) -> list[int]:
  """Return `parts` of a folder's `split.json`, see `keep_splits`."""
  path = folder and folder / 'split.json'
  if not path or not files.exists(path):
    return []
  return list(run_folder.read_json(path).get('parts', ()))
