"""Label propagation alone: Table 5 of LLP, on any embeddings.

python experiments/propagate.py
python experiments/propagate.py --embeddings=FILE.npz --out=table.json

FILE has the arrays `test [N, D]` and `test_labels [N]`, or those of
--part=train, whole numbers from 0 on and -1 for no label; what else it has is
not looked at. Every method of `ssljax/propagation.py` sees the same subsamples.
"""

from collections.abc import Callable
import pathlib
from typing import NamedTuple
import zipfile
import zlib

from absl import flags
import numpy as np
import scipy
import sklearn
import tqdm

from ssljax.analysis import propagation
from ssljax.cli import main as main_lib
from ssljax.cli import method_flags
from ssljax.core import UNLABELLED
from ssljax.data import datasets
from ssljax.distributed import placement
from ssljax.errors import InputError, non_negative, positive, require
from ssljax.runs import run_folder, summary

FLAGS = flags.FLAGS


class Row(NamedTuple):
  """A row of Table 5."""

  propagate: Callable  # (embeddings, known, C, *, ...) -> classes
  paper: str  # of embeddings of LLP's ResNet-50 with 10 % of ImageNet's labels


TABLE = {
  'LS': Row(propagation.label_spreading, '84.6 ± 3.4'),
  'LP': Row(propagation.label_propagation, '87.7 ± 2.2'),
  'LP_DMT': Row(propagation.metric_transfer, '88.2 ± 2.3'),
  'LP_DLP': Row(propagation.deep_propagation, '89.2 ± 2.4'),
  'LLP': Row(propagation.local_propagation, '88.1 ± 2.3'),
}
# How the paper draws its images.
PROTOCOL = {'classes': 50, 'images': 50, 'labels': 5, 'subsamples': 10}


class Embedded(NamedTuple):
  """Embeddings of images."""

  name: str
  embeddings: np.ndarray  # [N, D] float
  labels: np.ndarray  # [N] int32


# Loading.


def read(path: pathlib.Path, part: str) -> Embedded:
  """The embeddings of a part in a file."""
  refused = f'--embeddings={path}: '
  require(path.is_file(), refused + 'is not there: give an .npz file')
  require(zipfile.is_zipfile(path), refused + 'is not an .npz file: give one')
  wanted = (part, f'{part}_labels')
  try:
    with np.load(path) as file:
      there = list(file)
      arrays = [file[name] for name in wanted if name in there]
  except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
    raise InputError(
      f'{refused}cannot be read ({error}): write it anew'
    ) from error
  require(
    len(arrays) == 2,
    f'{refused}has {", ".join(there) or "no array"}, not both '
    f'{" and ".join(wanted)}: give another file, or another --part',
  )
  found = Embedded(str(path), *arrays)
  check_arrays(found, part, refused)
  return found._replace(labels=found.labels.astype(np.int32))


def check_arrays(found: Embedded, part: str, refused: str) -> None:
  """Refuses arrays that are not embeddings and their labels."""
  shape, count = found.embeddings.shape, found.labels.shape
  require(
    len(shape) == 2 and count == shape[:1],
    f'{refused}{part} is {list(shape)}, {part}_labels {list(count)}: give '
    '[N, D] and [N]',
  )
  require(
    np.issubdtype(found.labels.dtype, np.integer)
    and np.issubdtype(found.embeddings.dtype, np.floating),
    f'{refused}{part} is of {found.embeddings.dtype}, {part}_labels of '
    f'{found.labels.dtype}: give floats and whole numbers',
  )
  require(
    np.all(found.labels >= UNLABELLED),
    f'{refused}{part}_labels has {found.labels.min(initial=0)}: give numbers '
    'from 0 on, or -1 for no label',
  )
  strange = np.flatnonzero(~np.isfinite(found.embeddings).all(axis=1))
  require(
    not len(strange),
    f'{refused}row {strange[0] if len(strange) else 0} of {part} is not '
    'finite: write it anew',
  )


def digits(part: str) -> Embedded:
  """Pixels of the embedded digits, as if they were embeddings."""
  dataset = datasets.load('digits')
  source = getattr(dataset, part)
  pixels = source.read(np.arange(len(source.labels)))
  return Embedded(
    "pixels of scikit-learn's digits, as no --embeddings are given",
    pixels.reshape(len(pixels), -1).astype(np.float32),
    source.labels,
  )


# The comparison.


def draw(labels) -> list[propagation.Subsample]:
  """The subsamples that the flags ask for, of images of classes `[N]`."""
  return [
    propagation.draw_subsample(
      labels, FLAGS.classes, FLAGS.images, FLAGS.labels, FLAGS.seed, number
    )
    for number in range(FLAGS.subsamples)
  ]


def compare(embeddings, drawn, shared: dict) -> dict[str, list[float]]:
  """Accuracies in percent by method, one for each subsample.

  Args:
    embeddings: `[N, D]`.
    drawn: subsamples of these.
    shared: values of hyper-parameters, for the methods that have them.
  """
  accuracies = {name: [] for name in TABLE}
  for some in tqdm.tqdm(drawn, desc='subsamples', disable=None):
    hidden = some.known == UNLABELLED
    for name, row in TABLE.items():
      own = method_flags.keywords(row.propagate)
      chosen = {k: value for k, value in shared.items() if k in own}
      classes = row.propagate(
        embeddings[some.rows], some.known, FLAGS.classes, **chosen
      )
      right = classes[hidden] == some.truth[hidden]
      accuracies[name].append(100 * float(np.mean(right)))
  return accuracies


def table(images: str, accuracies: dict[str, list[float]]) -> str:
  """The methods under each other, beside the paper where it is comparable.

  Args:
    images: what they are of.
    accuracies: in percent, by method.
  """
  of_paper = all(FLAGS[name].value == n for name, n in PROTOCOL.items())
  paper = ['paper, on ImageNet'] if of_paper else []
  count = FLAGS.subsamples
  rows = [['method', f'accuracy in %, mean ± std (n={count})', *paper]]
  for name, values in accuracies.items():
    paper = [TABLE[name].paper] if of_paper else []
    rows.append([name, summary.mean_std(values), *paper])
  return '\n'.join(
    [
      f'{images}, part {FLAGS.part}',
      f'{count} subsamples of {FLAGS.classes} classes, {FLAGS.images} images '
      f'each, {FLAGS.labels} of them labelled; accuracy on the others',
      *summary.aligned(rows),
    ]
  )


def write(path: pathlib.Path, images: str, accuracies, names) -> None:
  """Keeps every number, and where it comes from.

  Args:
    path: a new file, or one to replace.
    images: what they are of.
    accuracies: in percent, by method.
    names: of the flags that decided.
  """
  origin = run_folder.provenance(devices=1)
  origin['versions'] |= {
    'scipy': scipy.__version__,
    'scikit-learn': sklearn.__version__,
  }
  result = {
    'images': images,
    'flags': {name: FLAGS[name].value for name in sorted(names)},
    'accuracy': accuracies,
  }
  with main_lib.write_errors(path):
    run_folder.write_json(path, result | origin)


# The binary.


def define_flags() -> None:
  """Defines this program's flags; LLP's own are the shared ones."""
  flags.DEFINE_string('embeddings', None, 'An .npz file; digits if unset.')
  flags.DEFINE_enum(
    'part',
    'test',
    ['train', 'test'],
    'Whose images; those of training have been learned from.',
  )
  flags.DEFINE_integer('classes', PROTOCOL['classes'], 'Classes drawn.')
  flags.DEFINE_integer('images', PROTOCOL['images'], 'Images of each.')
  flags.DEFINE_integer('labels', PROTOCOL['labels'], 'Labelled ones of these.')
  flags.DEFINE_integer('subsamples', PROTOCOL['subsamples'], 'How many.')
  flags.DEFINE_integer('seed', 0, 'Of the subsamples.')
  flags.DEFINE_string('out', None, 'A .json file for every number, if set.')
  method_flags.define(propagation.local_propagation)


def check_flags() -> None:
  """Refuses, by name, values that no embeddings can have."""
  for name in (
    *PROTOCOL,
    *method_flags.keywords(propagation.local_propagation),
  ):
    positive(**{name: FLAGS[name].value})
  non_negative(seed=FLAGS.seed)
  require(FLAGS.seed < 2**32, f'--seed={FLAGS.seed}: give one below 2**32')
  require(FLAGS.classes > 1, '--classes=1: give at least 2')
  require(
    FLAGS.labels < FLAGS.images,
    f'--labels={FLAGS.labels}: --images={FLAGS.images} are to have others to '
    'be tested on: give fewer labels',
  )


def check_sizes() -> None:
  """Refuses, by name, more neighbours than a subsample has."""
  sizes = {'neighbours': FLAGS.labels, 'density_neighbours': FLAGS.images}
  for name, per_class in sizes.items():
    asked, there = FLAGS[name].value, FLAGS.classes * per_class
    kind = 'labelled images' if name == 'neighbours' else 'images'
    require(
      asked <= there,
      f'--{name}={asked}: a subsample has {there} {kind}, {per_class} of each '
      f'of {FLAGS.classes} classes: give at most that many',
    )


def make_place(path: pathlib.Path) -> None:
  """Makes the folder of a file, before anything is computed."""
  require(not path.is_dir(), f'--out={path}: is a folder: give a file in it')
  with main_lib.write_errors(path):
    path.parent.mkdir(parents=True, exist_ok=True)


def propagate(names) -> None:
  """Compares the methods as the flags say.

  Args:
    names: of this program's flags.
  """
  check_flags()
  if FLAGS.embeddings is None:
    images = digits(FLAGS.part)
    if not FLAGS['classes'].present:
      FLAGS['classes'].value = len(np.unique(images.labels))
  else:
    images = read(pathlib.Path(FLAGS.embeddings), FLAGS.part)
  check_sizes()
  drawn = draw(images.labels)
  out = pathlib.Path(FLAGS.out) if FLAGS.out else None
  if out:
    make_place(out)
  shared = method_flags.given(propagation.local_propagation)
  accuracies = compare(images.embeddings, drawn, shared)
  if out:
    write(out, images.name, accuracies, names)
  print(table(images.name, accuracies))


def main() -> None:
  """Compares the methods and exits."""
  placement.configure_cpu()
  known = set(FLAGS)
  define_flags()
  names = set(FLAGS) - known
  main_lib.run('propagate', lambda: propagate(names))


if __name__ == '__main__':
  main()
