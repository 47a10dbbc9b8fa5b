"""What every experiment shares: its flags, and how it starts and ends."""

from collections.abc import Callable, Mapping
import contextlib
import functools
import gc
import pathlib
import re
import sys
import threading

from absl import app, flags, logging

from ssljax import optimizers
from ssljax.active.oracle import WaitingError
from ssljax.cli import active_flags, method_flags
from ssljax.distributed import multihost, placement, watchdog
from ssljax.distributed.preemption import PreemptedError
from ssljax.errors import InputError, fraction, non_negative, positive, require
import ssljax.experiments
from ssljax.runs import build, run_folder, summary

FLAGS = flags.FLAGS

# Flags that decide where and how fast, not what: a resume may change them.
FREE = (
  *('workdir', 'overwrite', 'checkpoint_seconds', 'data_dir', 'corrupt'),
  *('multihost', 'coordinator', 'processes', 'process', 'hang_minutes'),
)


def define_data_flags() -> None:
  """Defines the flags that every experiment has: what it is trained on."""
  flags.DEFINE_string(
    'dataset', 'digits', '"digits" (embedded), or the name of a TFDS data set.'
  )
  flags.DEFINE_string('source', None, 'Data set of the labels, not --dataset.')
  flags.DEFINE_string('target', None, 'Data set to adapt to and test on.')
  flags.DEFINE_string('data_dir', None, 'Where TFDS data sets are prepared.')
  flags.DEFINE_string(
    'train_split', 'train', 'TFDS split to train on (of both).'
  )
  flags.DEFINE_string('test_split', None, 'TFDS split to test on.')
  flags.DEFINE_integer('image_size', None, 'Resize images to this many pixels.')
  flags.DEFINE_integer('corrupt', 0, 'How many corrupt images to tolerate.')
  flags.DEFINE_string('labels', '10', 'Labelled images per class, or "all".')
  flags.DEFINE_string(
    'unlabelled',
    'rest',
    'Images seen without a label: "rest", "all", N of the rest, all:N of all.',
  )
  flags.DEFINE_integer('validation', 0, 'Images held out (of the source).')


def define_training_flags() -> None:
  """Defines the rest of them: how it is trained, and where it is kept."""
  flags.DEFINE_bool('baseline', True, 'Run the baselines too, if any.')
  flags.DEFINE_integer('seeds', 1, 'How many label splits.')
  flags.DEFINE_integer('seed', 0, 'Number of the first split.')
  flags.DEFINE_integer('seeds_at_once', 1, 'Splits trained in one program.')
  flags.DEFINE_integer('steps', None, 'Length of the training, in steps.')
  flags.DEFINE_float('epochs', None, 'Its length in passes over the images.')
  flags.DEFINE_enum(
    'network', 'convlarge', list(build.NETWORKS), 'The network.'
  )
  flags.DEFINE_float('dropout', None, "Its rate; the network's own if unset.")
  flags.DEFINE_float(
    'bn_momentum', None, "Of running averages; the network's own if unset."
  )
  flags.DEFINE_integer('batch_labelled', 50, 'Labelled images per step.')
  flags.DEFINE_integer(
    'batch_per_class', None, 'As many of each class, not --batch_labelled.'
  )
  flags.DEFINE_integer('batch_unlabelled', 50, 'Unlabelled images per step.')
  flags.DEFINE_list(
    'augment',
    [],
    f'Augmentations in order, of {", ".join(build.AUGMENTATIONS)}.',
  )
  flags.DEFINE_enum(
    'preprocess',
    'none',
    list(build.PREPROCESS),
    'Of every image; fitted to the training images, but for imagenet.',
  )
  flags.DEFINE_enum(
    'feed', 'auto', ['auto', 'resident', 'stream'], 'Where the images wait.'
  )
  flags.DEFINE_string('workdir', None, "The run's folder; dated if unset.")
  flags.DEFINE_bool('overwrite', False, 'Start the run in --workdir anew.')
  flags.DEFINE_integer('evaluate_every', None, 'Steps; a tenth if unset.')
  flags.DEFINE_bool(
    'report_minimum', False, 'Also the least test error over training.'
  )
  flags.DEFINE_integer(
    'record_every', None, 'Steps; a hundredth, at most 100, if unset.'
  )
  flags.DEFINE_float('checkpoint_seconds', 60.0, 'Between two checkpoints.')
  flags.DEFINE_bool(
    'keep_stages', False, 'Keep the checkpoint at the end of every stage.'
  )
  flags.DEFINE_integer(
    'keep_every', None, 'Keep a checkpoint every so many steps of a stage.'
  )
  flags.DEFINE_integer(
    'steps_per_call', None, '1 on CPU or streaming, else 50.'
  )


def define_host_flags() -> None:
  """Defines those of a run of several processes, one per host."""
  flags.DEFINE_bool(
    'multihost', None, 'This is one of several processes; found out if unset.'
  )
  flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of the first one; a pod knows if unset.'
  )
  flags.DEFINE_integer('processes', None, 'How many; a pod knows if unset.')
  flags.DEFINE_integer('process', None, 'Which one; a pod knows if unset.')
  flags.DEFINE_float(
    'hang_minutes', 30.0, 'End, with every stack, after so long a standstill.'
  )


def define(arms: Mapping[str, Callable], **defaults) -> list[str]:
  """Defines all flags of a binary, with its own defaults; their names."""
  known = set(FLAGS)
  define_data_flags()
  define_training_flags()
  define_host_flags()
  active_flags.define()
  method_flags.define(
    *reversed(arms.values()), optimizers.optimizer, optimizers.averaging
  )
  for name, value in defaults.items():
    FLAGS.set_default(name, value)
  return sorted(set(FLAGS) - known)


def main(binary: str, arms: Mapping[str, Callable], **defaults) -> None:
  """Runs an experiment binary and exits.

  Without a --flagfile it starts from `presets/BINARY.digits.flags`.

  Args:
    binary: its name, and that of its presets.
    arms: name -> method factory; the last is the binary's own method, those
      before it the baselines it is compared with.
    **defaults: of flags, where its paper's differ from the others'.
  """
  placement.start()
  flags.disclaim_key_flags()  # They are the calling program's.
  names = define(arms, **defaults)

  def act():
    check_flags()
    join_others()
    awake = watchdog.awake(FLAGS.hang_minutes * 60)
    with multihost.ending_together(), awake:
      experiment(binary, arms, names)

  run(binary, act, functools.partial(parse_with_preset, binary))


def parse_with_preset(binary: str, argv) -> list[str]:
  """Parses arguments; without a --flagfile those of its digits come first."""
  presets = pathlib.Path(ssljax.experiments.__file__).parent / 'presets'
  preset = presets / f'{binary}.digits.flags'
  if not any(arg.lstrip('-').startswith('flagfile') for arg in argv):
    argv = [argv[0], f'--flagfile={preset}', *argv[1:]]
  rest = FLAGS(argv)
  prefer_command_line(argv[1:], 'steps', 'epochs')
  return rest


def run(binary: str, act: Callable, parse: Callable = FLAGS) -> None:
  """Parses the flags, acts, and exits; bad input is one line.

  Args:
    binary: its name.
    act: does what the flags say.
    parse: arguments -> those that are no flags.
  """

  def parse_or_fail(argv):
    try:
      return parse(argv)
    except flags.Error as error:
      fail(binary, f'{error} (--help lists the flags)')

  def begin(argv):
    if not FLAGS['verbosity'].present:
      quieten_orbax()
    try:
      require(
        len(argv) == 1, f'"{argv[-1]}" is not a flag: flags begin with --'
      )
      act()
    except InputError as error:
      fail(binary, error)
    except WaitingError as waiting:
      logging.flush()
      print(f'{binary}: {waiting}', file=sys.stderr)
      sys.exit(3)
    except PreemptedError as preempted:  # exit status 0: nothing is wrong
      logging.flush()
      print(f'{binary}: {preempted}', file=sys.stderr)

  app.run(begin, flags_parser=parse_or_fail)


def prefer_command_line(args, *alternatives: str) -> None:
  """Of flags that exclude each other, one on the command line wins."""
  given = [
    name
    for name in alternatives
    if any(arg.lstrip('-').split('=')[0] == name for arg in args)
  ]
  if len(given) == 1:
    for name in set(alternatives) - set(given):
      FLAGS[name].value = None


def quieten_orbax() -> None:
  """Leaves out what Orbax's threads say: what fails there is raised here."""
  logging.set_verbosity(logging.WARNING)
  # What it left to asyncio fails as well, and says so after the one line.
  quiet = 'orbax', 'asyncio'
  logging.get_absl_handler().addFilter(
    lambda line: not any(name in line.pathname for name in quiet)
  )
  in_thread, unraisable = threading.excepthook, sys.unraisablehook

  def unless_orbax(problem):
    if not type(problem.thread).__module__.startswith('orbax'):
      in_thread(problem)

  def unless_closed(problem):  # coroutines of a save that was given up
    if 'orbax' not in repr(problem.object) and not isinstance(
      problem.exc_value, RuntimeError
    ):
      unraisable(problem)

  threading.excepthook, sys.unraisablehook = unless_orbax, unless_closed


def fail(binary: str, error) -> None:
  """Says on one line what is wrong with the input; exit status 2."""
  logging.flush()
  print(f'{binary}: {error}', file=sys.stderr)
  gc.collect()  # what is half done goes before the interpreter does
  sys.exit(2)


@contextlib.contextmanager
def write_errors(out: pathlib.Path):
  """Makes one line of an --out that cannot be written."""
  try:
    yield
  except OSError as error:
    raise InputError(
      f'--out={out}: cannot be written ({error.strerror}): give another place'
    ) from error


def settle_alternatives() -> None:
  """Leaves unset what another flag decides, so that flags.txt says it once."""
  require(
    bool(FLAGS.source) == bool(FLAGS.target),
    '--source, --target: give both, or neither and a --dataset',
  )
  if FLAGS.source:
    FLAGS.dataset = None
  if FLAGS.batch_per_class is not None:
    require(
      not FLAGS['batch_labelled'].present,
      f'--batch_labelled={FLAGS.batch_labelled}: --batch_per_class='
      f'{FLAGS.batch_per_class} decides: change that one',
    )
    FLAGS.batch_labelled = None


def check_flags() -> None:
  """Refuses values that no run can have, by name."""
  settle_alternatives()
  require(
    '://' not in (FLAGS.workdir or ''),
    f'--workdir={FLAGS.workdir}: is no folder: mount the bucket (gcsfuse), or '
    'give a disk that all hosts share',
  )
  active_flags.check()
  for name in ('seeds', 'seeds_at_once', 'batch_unlabelled'):
    positive(**{name: FLAGS[name].value})
  for name in ('validation', 'seed', 'corrupt', 'checkpoint_seconds'):
    non_negative(**{name: FLAGS[name].value})
  for name in (
    'steps',
    'epochs',
    'batch_labelled',
    'batch_per_class',
    'image_size',
    'evaluate_every',
    'record_every',
    'keep_every',
    'steps_per_call',
    'hang_minutes',
    'processes',
  ):
    if FLAGS[name].value is not None:
      positive(**{name: FLAGS[name].value})
  for name in ('dropout', 'bn_momentum'):
    if FLAGS[name].value is not None:
      fraction(**{name: FLAGS[name].value})
  require(
    FLAGS.seed + FLAGS.seeds <= 2**32 and (FLAGS.steps or 0) < 2**31,
    '--seed, --steps: give seeds below 2**32 and steps below 2**31',
  )
  require(
    (FLAGS.steps is None) != (FLAGS.epochs is None),
    '--steps, --epochs: give one of the two',
  )
  unknown = [name for name in FLAGS.augment if name not in build.AUGMENTATIONS]
  require(
    not unknown,
    f'--augment={",".join(unknown)}: give {", ".join(build.AUGMENTATIONS)}',
  )


def join_others() -> None:
  """Joins the other processes, if there are any, as the flags say."""
  given = {
    name: FLAGS[name].value for name in ('coordinator', 'processes', 'process')
  }
  several = FLAGS.multihost
  if several is None:
    several = multihost.are_around() or any(
      x is not None for x in given.values()
    )
  if several:
    require(
      FLAGS.workdir is not None,
      '--workdir: several processes need one folder that all of them see',
    )
    require(
      re.fullmatch(r'.+:\d+', FLAGS.coordinator or 'a:1'),
      f'--coordinator={FLAGS.coordinator}: give HOST:PORT',
    )
    placement.order_exchanges(several=True)
    multihost.join(**given)


def data_name() -> str:
  """The data set, or 'source-target'."""
  return f'{FLAGS.source}-{FLAGS.target}' if FLAGS.source else FLAGS.dataset


def experiment(binary: str, arms: Mapping[str, Callable], names) -> None:
  """One run: from flags to `result.json` and a table."""
  folder = pathlib.Path(
    FLAGS.workdir or run_folder.dated(f'{binary}-{data_name()}')
  )
  decisive = {
    name: FLAGS[name].serialize() for name in names if name not in FREE
  }
  multihost.refuse_unlike(
    'what decides the result',
    (decisive, str(folder), FLAGS.overwrite, run_folder.commit()),
    'start the same command from the same commit on all hosts',
  )
  with run_folder.disk_errors(folder):
    look = functools.partial(run_folder.look, folder, decisive, FLAGS.overwrite)
    finished = multihost.once(look)
  say = print if multihost.is_first() else lambda text: None
  if finished:
    say(f'{folder} holds this run, complete:')
    say(summary.table(finished, folder))
    return
  # All that can be refused is refused before anything is written.
  run = build.assemble(arms)
  watchdog.alive()
  multihost.refuse_unlike(
    'the labels',
    [split.digest for split in run.drawn],
    'give all hosts the same data set in --data_dir',
  )
  with run_folder.disk_errors(folder):
    multihost.once(functools.partial(claim, folder, decisive, run))
    multihost.refuse_other_folders(folder)
    say(summary.opening(run, folder))
    result = build.train_all(run, folder)
  say(summary.table(result, folder))
  multihost.meet('everything is written')


def claim(folder: pathlib.Path, decisive: dict[str, str], run) -> None:
  """Makes the folder this run's own, with its splits in it."""
  if not FLAGS.overwrite:
    build.refuse_other_splits(folder, run)
  run_folder.claim(folder, decisive, FLAGS.overwrite)
  build.keep_splits(folder, run)
