"""Measures what the embeddings of a finished run are worth.

python experiments/probe.py --run=runs/FOLDER
python experiments/probe.py --run=runs/FOLDER --readout --dataset=places205
python experiments/probe.py --run=runs/FOLDER --out=embeddings.npz

It prints test errors in percent and writes them to RUN/probe.json, or beside
--out: of the nearest training image, its true label known or only that of the
labelled ones; of the classifier; of a linear readout; and how closely classes
lie together. With --out the embeddings are written too.
"""

import math
import pathlib
from typing import Any, NamedTuple

from absl import flags
import numpy as np

from ssljax import optimizers
from ssljax.analysis import embeddings
from ssljax.cli import main, tool
from ssljax.core import UNLABELLED
from ssljax.data import datasets
from ssljax.errors import positive, require
from ssljax.runs import build, load, run_folder

TOP = 5  # of the other error, where there are more classes


class Embedded(NamedTuple):
  """Images under the evaluated weights; K training and M test images."""

  rows: np.ndarray  # [K] of the training images
  train: np.ndarray  # [K, D] of length 1
  train_labels: np.ndarray  # [K] the truth
  labelled: np.ndarray  # [K] bool, the run knew it, from the start or told
  test: np.ndarray  # [M, D] of length 1
  test_labels: np.ndarray  # [M]


def embed(finished, state) -> tuple[Embedded, np.ndarray]:
  """The images that a run's network embeds, and its test logits `[M, C]`.

  Args:
    finished: the run.
    state: of it.
  """
  dataset, data = finished.dataset, finished.program.data
  rows = finished.known_rows
  tested = finished.infer(state, data.test, np.arange(data.test.size))
  return Embedded(
    rows,
    finished.embed(state, data.train, rows),
    dataset.train.labels[rows],
    np.asarray(state.labels)[0, rows] != UNLABELLED,
    embeddings.l2_normalize(tested.embedding),
    dataset.test.labels,
  ), tested.logits


def softmax_errors(logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
  """Errors in percent of `logits [M, C]`, and of the best five if C > 5."""
  errors = {'softmax': embeddings.top_error(logits, truth, 1)}
  if logits.shape[1] > TOP:
    errors[f'softmax_top{TOP}'] = embeddings.top_error(logits, truth, TOP)
  return errors


def measure(seen: Embedded, logits: np.ndarray, classes) -> dict[str, Any]:
  """What is reported of embeddings.

  Args:
    seen: the embeddings.
    logits: `[M, C]` of the test images.
    classes: names `[C]`.
  """
  known = seen.labelled
  nearest = lambda bank, labels: embeddings.nearest_error(
    seen.test, seen.test_labels, bank, labels
  )
  norms = embeddings.class_norms(seen.train, seen.train_labels, len(classes))
  return {
    'train_images': len(seen.train),
    'labelled_images': int(known.sum()),
    'test_images': len(seen.test),
    'embedding': seen.train.shape[1],
    'test_error': {
      'nearest': nearest(seen.train, seen.train_labels),
      'nearest_labelled': nearest(seen.train[known], seen.train_labels[known]),
      **softmax_errors(logits, seen.test_labels),
    },
    'aggregation': float(np.nanmean(norms)),
    'aggregation_by_class': {
      name: float(norm)
      for name, norm in zip(classes, norms, strict=True)
      if not math.isnan(norm)
    },
  }


# The readout.


def readout(finished, state, asked: dict[str, Any]) -> dict[str, Any]:
  """What is reported of a linear readout of the frozen features.

  Args:
    finished: the run.
    state: of it.
    asked: the flags' values by name.
  """
  dataset, feeds = readout_data(finished, asked)
  labels = dataset.train.labels
  rows = np.flatnonzero(labels != UNLABELLED)
  if dataset is finished.dataset:
    rows = finished.known_rows
  train = finished.features(state, feeds[0], rows)
  test = finished.features(state, feeds[1], np.arange(feeds[1].size))
  steps, rate = asked['readout_steps'], asked['readout_rate']
  layer = embeddings.fit_readout(
    train,
    labels[rows],
    len(dataset.classes),
    readout_optimizer(steps, rate),
    steps,
    seed=finished.split.seed,
  )
  return {
    'dataset': dataset.name,
    'train_images': len(rows),
    'test_images': len(test),
    'feature': train.shape[1],
    'steps': steps,
    'rate': rate,
    'test_error': softmax_errors(
      np.asarray(embeddings.apply_readout(layer, test)), dataset.test.labels
    ),
  }


def readout_optimizer(steps: int, rate: float):
  """LLP's on Places205, whose rate falls twice by ten as validation stalls.

  Here it falls after a half and after three quarters of the steps.
  """
  return optimizers.optimizer(
    steps,
    learning_rate=rate,
    decay='steps',
    decay_at=(max(1, steps // 2), max(1, steps * 3 // 4)),
    nesterov=False,
    weight_decay=1e-4,
    clip=0.0,
  )


def readout_data(finished, asked: dict[str, Any]):
  """The data set that is read out, and its feeds of train and test.

  Args:
    finished: the run, whose own it is if no other is asked for.
    asked: the flags' values by name.
  """
  own, data = finished.dataset, finished.program.data
  if asked['dataset'] is None:
    return own, (data.train, data.test)
  height, width, _ = own.train.shape
  dataset = datasets.load(
    asked['dataset'],
    asked['data_dir'],
    image_size=height if height == width else None,
    corrupt=asked['corrupt'],
  )
  shown = lambda source: 'x'.join(map(str, source.shape))
  require(
    dataset.train.shape == own.train.shape,
    f'--dataset={asked["dataset"]}: its images are {shown(dataset.train)}, '
    f'those of the run {shown(own.train)}: give a data set like it',
  )
  feed = build.feed_maker(dataset, 'auto', finished.program.place)
  return dataset, (feed(dataset.train), feed(dataset.test))


# The binary.


def define_flags(values: flags.FlagValues) -> None:
  """Defines this program's flags."""
  flags.DEFINE_string(
    'run', None, 'Folder of the finished run.', flag_values=values
  )
  flags.DEFINE_string(
    'out', None, 'Embeddings go to this .npz file, if set.', flag_values=values
  )
  flags.DEFINE_integer(
    'step', None, 'Whose checkpoint was kept; the last.', flag_values=values
  )
  flags.DEFINE_bool(
    'readout', False, 'Fit a softmax layer to the features.', flag_values=values
  )
  flags.DEFINE_string(
    'dataset', None, "Read out this set, not the run's own.", flag_values=values
  )
  flags.DEFINE_integer(
    'readout_steps', 500_000, 'Of 128 images each.', flag_values=values
  )
  flags.DEFINE_float(
    'readout_rate', 0.01, 'Learning rate of the readout.', flag_values=values
  )
  tool.define_run_flags(values)


def check(asked: dict[str, Any]) -> None:
  """Refuses what no run can serve, before anything is loaded."""
  require(asked['run'] is not None, '--run: give the folder of a finished run')
  positive(
    readout_steps=asked['readout_steps'], readout_rate=asked['readout_rate']
  )
  require(
    asked['readout'] or asked['dataset'] is None,
    f'--dataset={asked["dataset"]}: is what a readout is of: give --readout '
    'too, or leave it out',
  )
  require(
    (asked['out'] or '.npz').endswith('.npz'),
    f'--out={asked["out"]}: give a file that ends in .npz',
  )


def chosen_step(finished, step: int | None) -> int:
  """The step whose checkpoint is looked at; the last one if None."""
  step, kept = finished.steps if step is None else step, finished.kept
  require(
    not kept or step in kept,
    f'--step={step}: the run has kept {", ".join(map(str, kept))}: give one of '
    'them',
  )
  return step


def report(finished, asked: dict[str, Any]) -> tuple[dict, Embedded]:
  """What is written of a run, and its embeddings.

  Args:
    finished: the run.
    asked: the flags' values by name.
  """
  step, dataset = chosen_step(finished, asked['step']), finished.dataset
  state = finished.after(step)
  seen, logits = embed(finished, state)
  result = {
    'run': str(finished.folder),
    'method': finished.program.method.name,
    'dataset': dataset.name,
    'seed': finished.split.seed,
    'step': step,
    **measure(seen, logits, dataset.classes),
  }
  if asked['readout']:
    result['readout'] = readout(finished, state, asked)
  return result | run_folder.provenance(finished.program.mesh.size), seen


def probe(asked: dict[str, Any]) -> None:
  """Measures what the flags, by name, ask for, and writes it."""
  check(asked)
  folder, out = pathlib.Path(asked['run']), asked['out']
  load.finished_result(folder)
  beside = pathlib.Path(out).parent if out else folder
  with main.write_errors(beside):
    beside.mkdir(parents=True, exist_ok=True)
  how = asked['seed'], asked['data_dir'], asked['corrupt']
  result, seen = report(load.load(folder, *how), asked)
  with main.write_errors(beside):
    if out:
      np.savez(out, **seen._asdict())
    run_folder.write_json(beside / 'probe.json', result)
  print(table(result))
  print(f'written to {beside / "probe.json"}' + (f', {out}' if out else ''))


def table(result: dict[str, Any]) -> str:
  """What was measured, a line each."""
  errors = result['test_error']
  lines = {
    f'nearest of {result["train_images"]} images': errors['nearest'],
    f'nearest of {result["labelled_images"]} labelled images': errors[
      'nearest_labelled'
    ],
    'softmax': errors['softmax'],
  }
  if f'softmax_top{TOP}' in errors:
    lines[f'softmax, best {TOP}'] = errors[f'softmax_top{TOP}']
  if 'readout' in result:
    read = result['readout']
    name = f'readout on {read["dataset"]}'
    lines[name] = read['test_error']['softmax']
    if f'softmax_top{TOP}' in read['test_error']:
      lines[f'{name}, best {TOP}'] = read['test_error'][f'softmax_top{TOP}']
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
  tool.start('probe', define_flags, probe)
