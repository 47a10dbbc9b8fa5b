"""Measure the embeddings of a finished run.

python experiments/probe.py --run=runs/FOLDER
python experiments/probe.py --run=runs/FOLDER --readout --dataset=places205
python experiments/probe.py --run=runs/FOLDER --out=embeddings.npz

Prints test errors in percent and writes them to RUN/probe.json, or to the
folder of --out: of the nearest training image's label, with all true labels or
with the run's labels alone, or of the nearest row of LLP's bank; of the
classifier; and of a linear readout. Also
reports how closely the images of a class lie together. With --out the
embeddings are written to an .npz file.
"""

from typing import Any

from absl import flags
import numpy as np

from ssljax.analysis import probing
from ssljax.cli import main, tool
from ssljax.data import datasets
from ssljax.errors import positive, require
from ssljax.runs import build, load, run_folder


def define_flags(values: flags.FlagValues) -> None:
  """Define the flags of this program."""
  for name, text in {
    'run': 'Folder of a finished run.',
    'out': 'An .npz file for the embeddings, if set.',
    'dataset': "Data set to fit the readout on; the run's own if unset.",
  }.items():
    flags.DEFINE_string(name, None, text, flag_values=values)
  flags.DEFINE_integer(
    'step',
    None,
    'Step of a kept checkpoint; the last step if unset.',
    flag_values=values,
  )
  flags.DEFINE_bool(
    'readout',
    False,
    'Fit a softmax layer to the features.',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'readout_steps',
    500_000,
    'Steps of the readout, of 128 images each.',
    flag_values=values,
  )
  flags.DEFINE_float(
    'readout_rate', 0.01, 'Learning rate of the readout.', flag_values=values
  )
  tool.define_run_flags(values)


def check_flags(asked: dict[str, Any]) -> None:
  """Raise `InputError` for values that no run can make work."""
  require(asked['run'] is not None, '`run`: give the folder of a finished run')
  positive(
    readout_steps=asked['readout_steps'], readout_rate=asked['readout_rate']
  )
  require(
    asked['readout'] or asked['dataset'] is None,
    f'`dataset`={asked["dataset"]}: is used by the readout alone: give '
    '`readout=True` too, or leave it out',
  )
  require(
    asked['out'] is None or asked['out'].endswith('.npz'),
    f'`out`={asked["out"]}: give a file that ends in .npz',
  )


def choose_step(finished, step: int | None) -> int:
  """Return the step to measure; the run's last step if None.

  Raises:
    InputError: the run kept no checkpoint of this step.
  """
  step, kept = finished.steps if step is None else step, finished.kept
  require(
    not kept or step in kept,
    f'`step`={step}: the run kept the checkpoints of steps '
    f'{", ".join(map(str, kept))}: give one of them',
  )
  return step


def open_readout(finished, asked: dict[str, Any]) -> probing.Readout | None:
  """Open the data set of the readout; None for the run's own.

  Raises:
    InputError: its images are not of the run's shape.
  """
  if asked['dataset'] is None:
    return None
  own = finished.dataset.train.shape
  height, width, _ = own
  dataset = datasets.load(
    asked['dataset'],
    asked['data_dir'] or finished.config.data.data_dir,
    image_size=height if height == width else None,
    corrupt=asked['corrupt'] or 0,
  )
  shown = lambda shape: 'x'.join(map(str, shape))
  shape = dataset.train.shape
  require(
    shape == own,
    f'`dataset`={asked["dataset"]}: has images of {shown(shape)}, but the run '
    f'{shown(own)}: give a data set with images of this shape',
  )
  feed = build.feed_maker(dataset, 'auto', finished.program.place)
  return probing.Readout(dataset, feed(dataset.train), feed(dataset.test))


def report(
  finished, asked: dict[str, Any]
) -> tuple[dict[str, Any], probing.Embedded]:
  """Return the content of `probe.json`, and the embeddings.

  Args:
    finished: the finished run.
    asked: values of the flags.
  """
  step, dataset = choose_step(finished, asked['step']), finished.dataset
  state = finished.after(step)
  embedded, logits = probing.embed(finished, state)
  result = {
    'run': str(finished.folder),
    'method': finished.program.method.name,
    'dataset': dataset.name,
    'seed': finished.split.seed,
    'step': step,
    **probing.measure(
      embedded, logits, dataset.classes, probing.bank_of(finished, state)
    ),
  }
  if asked['readout']:
    result['readout'] = probing.evaluate_readout(
      finished,
      state,
      on=open_readout(finished, asked),
      steps=asked['readout_steps'],
      rate=asked['readout_rate'],
    )
  return result | run_folder.provenance(finished.program.mesh.size), embedded


def act(asked: dict[str, Any]) -> None:
  """Measure and write what the flags select."""
  check_flags(asked)
  folder = main.as_path('run', asked['run'])
  load.finished_result(folder)
  out = None
  if asked['out'] is not None:
    out = main.as_output('out', asked['out'])
  target = out.parent if out else folder
  main.as_output('out', str(target / 'probe.json'))
  where = asked['seed'], asked['data_dir'], asked['corrupt']
  result, embedded = report(load.load(folder, *where), asked)
  with main.write_errors(target):
    if out:
      np.savez(out, **embedded._asdict())
    run_folder.write_json(target / 'probe.json', result)
  print(as_table(result))
  print(f'written to {target / "probe.json"}' + (f', {out}' if out else ''))


def as_table(result: dict[str, Any]) -> str:
  """Return the measurements as lines."""
  top = f'softmax_top{probing.TOP}'
  errors = result['test_error']
  lines = {
    f'nearest of {result["train_images"]} images': errors['nearest'],
    f'nearest of {result["labelled_images"]} labelled images': errors[
      'nearest_labelled'
    ],
    'nearest row of the bank': errors.get('nearest_in_bank'),
    'softmax': errors['softmax'],
    f'softmax, top {probing.TOP}': errors.get(top),
  }
  if 'readout' in result:
    name = f'readout on {result["readout"]["dataset"]}'
    errors = result['readout']['test_error']
    lines[name] = errors['softmax']
    lines[f'{name}, top {probing.TOP}'] = errors.get(top)
  lines = {name: error for name, error in lines.items() if error is not None}
  width = max(map(len, lines))
  title = (
    f'{result["method"]} on {result["dataset"]}, seed {result["seed"]}, step '
    f'{result["step"]}: test error in %'
  )
  return '\n'.join(
    [title]
    + [f'{name:<{width}}  {error:6.2f}' for name, error in lines.items()]
    + [f"mean norm of a class's mean embedding: {result['aggregation']:.3f}"]
  )


if __name__ == '__main__':
  tool.start('probe', define_flags, act)
