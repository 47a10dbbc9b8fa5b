"""Compare label propagation methods on given embeddings (Table 5 of LLP).

python experiments/propagate.py
python experiments/propagate.py --embeddings=FILE.npz --out=table.json

FILE.npz holds the arrays `test [N, D]` and `test_labels [N]`, or `train` and
`train_labels` with --part=train. Labels are whole numbers from 0 on, and -1 for
no label. Other arrays are ignored. All methods of
`ssljax.analysis.propagation` are given the same subsamples.
"""

from collections.abc import Callable
import pathlib
from typing import Any, NamedTuple
import zipfile
import zlib

from absl import flags
import numpy as np
import scipy
import sklearn

from ssljax import progress, signatures
from ssljax.analysis import propagation
from ssljax.cli import config_flags, main, tool
from ssljax.core import UNLABELLED
from ssljax.data import datasets
from ssljax.errors import InputError, non_negative, positive, require
from ssljax.runs import run_folder, summary


class Competitor(NamedTuple):
  """A propagation method, a row of Table 5."""

  propagate: Callable  # (embeddings, known, C, *, ...) -> classes
  paper: str  # accuracy on embeddings of ResNet-50, 10 % of ImageNet labelled


COMPETITORS = {
  'LS': Competitor(propagation.label_spreading, '84.6 ± 3.4'),
  'LP': Competitor(propagation.label_propagation, '87.7 ± 2.2'),
  'LP_CMN': Competitor(propagation.mass_normalized, '–'),
  'LP_DMT': Competitor(propagation.metric_transfer, '88.2 ± 2.3'),
  'LP_DLP': Competitor(propagation.deep_propagation, '89.2 ± 2.4'),
  'LLP': Competitor(propagation.local_propagation, '88.1 ± 2.3'),
}
MOST_SUBSAMPLES = 10_000  # all are drawn before the first is measured
# The subsamples of the paper.
PROTOCOL = {'classes': 50, 'images': 50, 'labels': 5, 'subsamples': 10}


class Embeddings(NamedTuple):
  """Embeddings of labelled images."""

  name: str
  vectors: np.ndarray  # [N, D] float
  labels: np.ndarray  # [N] int32


# Loading.


def read_embeddings(path: pathlib.Path, part: str) -> Embeddings:
  """Return the embeddings in an .npz file.

  Args:
    path: the file.
    part: 'train' or 'test'.

  Raises:
    InputError: the file is missing, damaged or has other arrays.
  """
  prefix = f'`embeddings`={path}: '
  require(path.is_file(), prefix + 'no such file: give an .npz file')
  require(zipfile.is_zipfile(path), prefix + 'not an .npz file: give one')
  wanted = (part, f'{part}_labels')
  try:
    with np.load(path) as file:
      present = list(file)
      arrays = [file[name] for name in wanted if name in present]
  except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
    raise InputError(
      f'{prefix}cannot be read ({error}): write the file again'
    ) from error
  require(
    len(arrays) == 2,
    f'{prefix}has {", ".join(present) or "no array"}, not both '
    f'{" and ".join(wanted)}: give another file, or another `part`',
  )
  found = Embeddings(str(path), *arrays)
  check_arrays(found, part, prefix)
  return found._replace(labels=found.labels.astype(np.int32))


def check_arrays(found: Embeddings, part: str, prefix: str) -> None:
  """Raise `InputError` for arrays that are not embeddings and their labels."""
  shape, count = found.vectors.shape, found.labels.shape
  require(
    len(shape) == 2 and count == shape[:1],
    f'{prefix}{part} is {list(shape)}, {part}_labels {list(count)}: give '
    '[N, D] and [N]',
  )
  require(
    np.issubdtype(found.labels.dtype, np.integer)
    and np.issubdtype(found.vectors.dtype, np.floating),
    f'{prefix}{part} is of {found.vectors.dtype}, {part}_labels of '
    f'{found.labels.dtype}: give floats and whole numbers',
  )
  require(
    np.all(found.labels >= UNLABELLED),
    f'{prefix}{part}_labels has {found.labels.min(initial=0)}: give numbers '
    'from 0 on, or -1 for no label',
  )
  not_finite = np.flatnonzero(~np.isfinite(found.vectors).all(axis=1))
  require(
    not len(not_finite),
    f'{prefix}row {not_finite[0] if len(not_finite) else 0} of {part} is not '
    'finite: write the file again',
  )


def digits(part: str) -> Embeddings:
  """Return the pixels of the embedded digits, used as embeddings."""
  dataset = datasets.load('digits')
  source = getattr(dataset, part)
  pixels = source.read(np.arange(len(source.labels)))
  return Embeddings(
    "pixels of scikit-learn's digits, as no --embeddings are given",
    pixels.reshape(len(pixels), -1).astype(np.float32),
    source.labels,
  )


# The comparison.


def draw_subsamples(labels, asked: dict[str, Any]) -> list:
  """Return the subsamples that the flags describe, of images `[N]`."""
  sizes = asked['classes'], asked['images'], asked['labels']
  return [
    propagation.draw_subsample(labels, *sizes, asked['seed'], number)
    for number in range(asked['subsamples'])
  ]


def measure_accuracies(
  embeddings, subsamples, classes: int, shared: dict[str, Any]
) -> dict[str, list[float]]:
  """Return accuracies in percent by method, one for each subsample.

  Args:
    embeddings: `[N, D]`.
    subsamples: `propagation.Subsample`s of these rows.
    classes: C, number of classes of a subsample.
    shared: hyper-parameters, passed to the methods that have them.
  """
  accuracies = {name: [] for name in COMPETITORS}
  bar = progress.progress(len(subsamples), 'propagating', unit=' subsamples')
  with bar:
    for subsample in subsamples:
      hidden = subsample.known == UNLABELLED
      vectors = embeddings[subsample.rows]
      for name, competitor in COMPETITORS.items():
        how = signatures.given(competitor.propagate, shared)
        found = competitor.propagate(vectors, subsample.known, classes, **how)
        correct = found[hidden] == subsample.truth[hidden]
        accuracies[name].append(100 * float(np.mean(correct)))
      bar.update()
  return accuracies


def as_table(
  images: str, accuracies: dict[str, list[float]], asked: dict[str, Any]
) -> str:
  """Return the methods as lines, with the paper's numbers if comparable.

  Args:
    images: description of the images.
    accuracies: in percent, by method.
    asked: values of the flags.
  """
  comparable = all(asked[name] == n for name, n in PROTOCOL.items())
  paper = ['paper, on ImageNet'] if comparable else []
  count = asked['subsamples']
  rows = [['method', f'accuracy in %, mean ± std (n={count})', *paper]]
  for name, values in accuracies.items():
    paper = [COMPETITORS[name].paper] if comparable else []
    rows.append([name, summary.mean_std(values), *paper])
  return '\n'.join(
    [
      f'{images}, part {asked["part"]}',
      f'{count} subsamples of {asked["classes"]} classes, {asked["images"]} '
      f'images each, {asked["labels"]} of them labelled; accuracy on the '
      'others',
      *summary.aligned(rows),
    ]
  )


def write_result(
  path: pathlib.Path,
  images: str,
  accuracies: dict[str, list[float]],
  asked: dict[str, Any],
) -> None:
  """Write every accuracy, the flags and the provenance as JSON.

  Args:
    path: file to create or replace.
    images: description of the images.
    accuracies: in percent, by method.
    asked: values of the flags.
  """
  origin = run_folder.provenance(devices=1)
  origin['versions'] |= {
    'scipy': scipy.__version__,
    'scikit-learn': sklearn.__version__,
  }
  result = {
    'images': images,
    'flags': dict(sorted(asked.items())),
    'accuracy': accuracies,
  }
  with main.write_errors(path):
    run_folder.write_json(path, result | origin)


# The program.


def define_flags(values: flags.FlagValues) -> None:
  """Define the flags; the keywords of LLP's propagation are flags too."""
  flags.DEFINE_string(
    'embeddings',
    None,
    'An .npz file with embeddings; the pixels of digits if unset.',
    flag_values=values,
  )
  flags.DEFINE_enum(
    'part',
    'test',
    ['train', 'test'],
    'Images that are used; a run was trained on those of train.',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'classes',
    None,
    f'Classes of a subsample; {PROTOCOL["classes"]} if unset, and all classes '
    'of the digits.',
    flag_values=values,
  )
  for name, text in {
    'images': 'Images of each class.',
    'labels': 'Labelled images of each class.',
    'subsamples': 'Number of subsamples.',
  }.items():
    flags.DEFINE_integer(name, PROTOCOL[name], text, flag_values=values)
  flags.DEFINE_integer(
    'seed', 0, 'Random seed of the subsamples.', flag_values=values
  )
  flags.DEFINE_string(
    'out', None, 'A .json file for all numbers, if set.', flag_values=values
  )
  config_flags.define_of(values, propagation.local_propagation)


def check_flags(asked: dict[str, Any]) -> None:
  """Raise `InputError` for values that no embeddings can make work."""
  own = signatures.keywords(propagation.local_propagation)
  positive(**{name: asked[name] for name in (*PROTOCOL, *own)})
  non_negative(seed=asked['seed'])
  require(
    asked['seed'] < 2**32, f'`seed`={asked["seed"]}: give one below 2**32'
  )
  require(
    asked['subsamples'] <= MOST_SUBSAMPLES,
    f'`subsamples`={asked["subsamples"]}: give at most {MOST_SUBSAMPLES:,}',
  )
  require(asked['classes'] > 1, '`classes`=1: give at least 2')
  require(
    asked['labels'] < asked['images'],
    f'`labels`={asked["labels"]}: `images`={asked["images"]} leaves no image '
    'to test on: give fewer labels',
  )
  sizes = {'neighbours': asked['labels'], 'density_neighbours': asked['images']}
  for name, per_class in sizes.items():
    there = asked['classes'] * per_class
    kind = 'labelled images' if name == 'neighbours' else 'images'
    require(
      asked[name] <= there,
      f'`{name}`={asked[name]}: a subsample has {there} {kind}, {per_class} '
      f'of each of {asked["classes"]} classes: give at most that many',
    )


def act(asked: dict[str, Any]) -> None:
  """Compare the methods as the flags describe."""
  if asked['embeddings'] is None:
    images = digits(asked['part'])
    default = len(np.unique(images.labels))
  else:
    path = main.as_path('embeddings', asked['embeddings'])
    images = read_embeddings(path, asked['part'])
    default = PROTOCOL['classes']
  if asked['classes'] is None:
    asked = asked | {'classes': default}
  check_flags(asked)
  subsamples = draw_subsamples(images.labels, asked)
  out = None
  if asked['out'] is not None:
    out = main.as_output('out', asked['out'])
  accuracies = measure_accuracies(
    images.vectors, subsamples, asked['classes'], asked
  )
  if out:
    write_result(out, images.name, accuracies, asked)
  print(as_table(images.name, accuracies, asked))


if __name__ == '__main__':
  tool.start('propagate', define_flags, act)
