"""Label images in a browser while a model learns.

python experiments/label.py --images=DIR --classes=cat,dog
python experiments/label.py --images=DIR --run=runs/FOLDER
python experiments/label.py --images=DIR --export=labels.csv
python experiments/label.py --questions=runs/FOLDER/questions

Prints the address of a page on this machine. Every answer is saved in the
folder --store before it is acknowledged; the same command continues. A process
beside the page trains from the last weights whenever there are --every new
labels, and orders the images by --acquire; a share --random of them is drawn at
random, to estimate the error. labels.csv is a --labels_file of every training
command, and --labels_file here adds labels (CSV, Label Studio, COCO).
--questions shows the questions of a run with --oracle=people, and fills in its
files; the command of the run then continues.
"""

import contextlib
import pathlib
import re
import sys
from typing import Any

from absl import flags

from ssljax import files
from ssljax.errors import InputError, fraction, positive, require

# Imports of JAX take seconds; the page is there before.
ACQUISITIONS = (
  *('entropy', 'margin', 'least_confidence', 'bald', 'typiclust', 'density'),
  *('k_centre', 'random'),
)
FORMATS = 'csv', 'labelstudio', 'coco', 'folders'


def define_flags(values: flags.FlagValues) -> None:
  """Define the flags of this program."""
  for name, default, text in (
    ('images', None, 'Folder of images.'),
    ('run', None, 'Finished run or saved model that learning begins from.'),
    ('features', None, 'Features of ssljax embed to learn from, not pixels.'),
    ('questions', None, 'Folder `questions` of a run with --oracle=people.'),
    ('store', None, 'Folder of the answers; runs/label-NAME if unset.'),
    ('labels_file', None, 'Labels to add: CSV, Label Studio or COCO JSON.'),
    ('export', None, 'File, or folder, to write the labels to, and end.'),
    ('format', 'csv', f'Of --export: {", ".join(FORMATS)}.'),
    ('acquire', 'entropy', f'Order of images: {", ".join(ACQUISITIONS)}.'),
    (
      *('method', None),
      "Method to learn with; the run's, or madnn; laplacenet with --features.",
    ),
    ('network', None, 'Network to learn with; one that suits the images.'),
    ('host', '127.0.0.1', 'Address to listen on.'),
  ):
    flags.DEFINE_string(name, default, text, flag_values=values)
  flags.DEFINE_list('classes', [], 'Names of classes.', flag_values=values)
  for name, number, text in (
    ('port', None, 'Port; 8470, or one that is free, if unset.'),
    ('steps', 200, 'Training steps of a round.'),
    ('every', 10, 'New labels that begin a round.'),
    ('image_size', None, 'Side of the images to learn from, in pixels.'),
    ('seed', 0, 'Seed of learning.'),
  ):
    flags.DEFINE_integer(name, number, text, flag_values=values)
  flags.DEFINE_float(
    'random', 0.2, 'Share of random images.', flag_values=values
  )
  flags.DEFINE_boolean(
    'learn', True, 'Learn while people label.', flag_values=values
  )


def check(asked: dict[str, Any]) -> None:
  """Raise `InputError` for values that cannot work."""
  given = asked['images'], asked['questions']
  require(
    given.count(None) == 1,
    '`images`: give a folder of images'
    if given == (None, None)
    else f'`images`={given[0]}, `questions`={given[1]}: give one',
  )
  for name, known in (('acquire', ACQUISITIONS), ('format', FORMATS)):
    require(
      asked[name] in known,
      f'`{name}`={asked[name]}: give one of {", ".join(known)}',
    )
  positive(steps=asked['steps'], every=asked['every'])
  if asked['image_size'] is not None:
    positive(image_size=asked['image_size'])
  fraction(random=asked['random'])
  port = asked['port'] or 0
  require(0 <= port < 2**16, f'`port`={port}: give 0 to 65535')


def store_of(asked: dict[str, Any], root: pathlib.Path) -> pathlib.Path:
  """Return the folder of the answers."""
  if asked['store'] is not None:
    return files.as_path('store', asked['store'])
  if asked['questions'] is not None:
    return root / '.label'
  name = re.sub(r'[^\w.-]+', '_', root.name).strip('_.') or 'images'
  return pathlib.Path('runs') / f'label-{name}'


def say(text: str) -> None:
  """Print a line, unless nobody reads the output any more."""
  with contextlib.suppress(BrokenPipeError):
    print(text.replace('`', ''), flush=True)


def report(batches: list[str]) -> None:
  """Say which questions of a run are answered."""
  for name in batches:
    say(f'{name} is answered: run the training again')


def classes_of(run: pathlib.Path) -> list[str]:
  """Return the classes of a run."""
  from ssljax import api  # slow to import

  return list(api.load(run).classes)


def features_of(path: str, root: pathlib.Path) -> str:
  """Return the file of the features of images in the folder."""
  from ssljax.active.page import rows

  file = str(files.as_path('features', path).resolve())
  found = rows.Features(file)

  def is_in_folder(name: str) -> bool:
    if name.startswith('/') or '..' in name.split('/'):
      return False
    with contextlib.suppress(OSError):  # a name that is too long
      return (root / name).is_file()
    return False

  require(
    any(map(is_in_folder, found.names)),
    f'`features`={path}: names no image of {root}: give the file that ssljax '
    'embed wrote for this folder',
  )
  say(f'learning from {len(found.names)} rows of features')
  return file


def act(asked: dict[str, Any]) -> None:
  """Show the page, or export."""
  check(asked)
  try:
    from ssljax.active.page import exchange, images, program, questions, store
  except ImportError as error:
    raise InputError(
      f'`images`: the page needs {error.name}: pip install "ssljax[label]"'
    ) from error
  is_asked = asked['questions'] is not None
  name = 'questions' if is_asked else 'images'
  root = files.as_path(name, asked[name])
  require(root.is_dir(), f'`{name}`={root}: is no folder: give a folder')
  root = root.resolve()
  folder = store_of(asked, root)
  if asked['export'] is not None:
    out = files.as_path('export', asked['export'])
    count = exchange.write(store.read(folder), root, out, asked['format'])
    say(f'{count} labels written to {out}')
    return
  classes = asked['classes']
  if is_asked:
    classes = questions.classes(root)
  if asked['run'] is not None:
    run = files.as_path('run', asked['run'])
    require(run.is_dir(), f'`run`={run}: is no folder: give a finished run')
    asked = asked | {'run': str(run.resolve())}
    classes = classes or classes_of(run)
  if asked['features'] is not None:
    asked = asked | {'features': features_of(asked['features'], root)}
  moved = asked['store'] is not None
  answers = store.Store(folder, str(root), classes, moved=moved)
  for name in classes:
    present = answers.state.current_name(name)
    if present != name:
      say(f'the class {name} is called {present} in {folder}')
  try:
    found = images.Images(root, folder)
    if asked['labels_file'] is not None:
      path = files.as_path('labels_file', asked['labels_file'])
      program.import_labels(answers, found, path, say)
    names = (
      *('acquire', 'method', 'network', 'steps', 'every', 'image_size'),
      *('run', 'features', 'seed'),
    )
    settings = {name: asked[name] for name in names}
    asked = asked | {'learn': asked['learn'] and not is_asked}
    settings |= {'store': str(folder.resolve()), 'images': str(root)}
    shown = (asked[n] for n in ('host', 'port', 'random', 'learn'))
    program.show(
      answers,
      found,
      program.Options(*shown),
      settings,
      say,
      (lambda state: report(questions.fill_in(root, state)))
      if is_asked
      else None,
    )
  finally:
    answers.close()


def main() -> None:
  """Start without JAX; help and invalid input are reported by the library."""
  values = flags.FlagValues()
  define_flags(values)
  try:
    rest = values(sys.argv)
    asked = {flag: values[flag].value for flag in values}
    if len(rest) == 1 and not {'-h', '--help'} & set(sys.argv):
      act(asked)
      sys.exit(0)
  except (flags.Error, InputError) as error:
    if isinstance(error, InputError):
      from ssljax.cli import main as cli_main

      cli_main.fail('label', cli_main.as_flags(error))
  from ssljax.cli import tool

  tool.start('label', define_flags, act, devices=False)


if __name__ == '__main__':
  main()
