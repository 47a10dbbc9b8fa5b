"""Import and export of labels.

csv          file,label lines, as `labels_file` of any training command
labelstudio  Label Studio's JSON: one task per image; import also takes its
JSON-MIN form
coco         images, categories, and annotations without boxes
folders      copies of the images in a folder per class
"""

from collections.abc import Callable, Iterator
import csv
import hashlib
import io
import json
import pathlib
import re
from typing import Any, NamedTuple
import urllib.parse

from ssljax import files
from ssljax.active.page import images as images_lib
from ssljax.active.page import store as store_lib
from ssljax.errors import InputError, require

FILES = {
  'csv': ('labels.csv', 'text/csv'),
  'labelstudio': ('labelstudio.json', 'application/json'),
  'coco': ('coco.json', 'application/json'),
}
FORMATS = *FILES, 'folders'
_BATCH = 5000  # answers that are saved at once
_SHOWN = 3  # files that a message names


class Label(NamedTuple):
  """A label of a file that is imported."""

  where: str  # as the file calls the image
  label: str
  annotator: str


# Export.


def export(state: store_lib.State, kind: str) -> str:
  """Return the labels in a format of `FILES`."""
  labels = dict(sorted(state.labels().items()))
  if kind == 'csv':
    return _as_csv(labels)
  if kind == 'coco':
    return json.dumps(_as_coco(labels, state.classes), indent=1)
  return json.dumps(_as_label_studio(state), indent=1)


def _as_csv(labels: dict[str, str]) -> str:
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerows([('file', 'label'), *labels.items()])
  return text.getvalue()


def _as_coco(labels: dict[str, str], classes: list[str]) -> dict[str, Any]:
  number = {name: k for k, name in enumerate(classes, 1)}
  return {
    'images': [
      {'id': k, 'file_name': file} for k, file in enumerate(labels, 1)
    ],
    'categories': [{'id': k, 'name': name} for name, k in number.items()],
    'annotations': [
      {'id': k, 'image_id': k, 'category_id': number[label]}
      for k, label in enumerate(labels.values(), 1)
    ],
  }


def _as_label_studio(state: store_lib.State) -> list[dict[str, Any]]:
  """Return tasks with the answers of all annotators."""
  tasks = []
  for k, file in enumerate(sorted(state.resolved), 1):
    annotations = [
      {
        'completed_by': {'email': name},
        'created_at': answer.time,
        'was_cancelled': answer.label is None,
        'result': []
        if answer.label is None
        else [
          {
            'from_name': 'choice',
            'to_name': 'image',
            'type': 'choices',
            'value': {'choices': [answer.label]},
          }
        ],
      }
      for name, answer in sorted(state.latest(file).items())
    ]
    where = f'/data/local-files/?d={urllib.parse.quote(file)}'
    tasks.append(
      {'id': k, 'data': {'image': where}, 'annotations': annotations}
    )
  return tasks


def write_folders(
  state: store_lib.State, root: pathlib.Path, out: pathlib.Path
) -> int:
  """Copy the labelled images to a folder per class; return their number.

  Images without a label are not copied.

  Args:
    state: of the store.
    root: folder of the images.
    out: new or empty folder.

  Raises:
    InputError: the folder is not empty, or a class cannot name a folder.
  """
  for name in state.classes:
    require(
      not re.search(r'[/\\\0]', name) and not name.startswith('.'),
      f'`export`: the class {name!r} cannot name a folder; rename it, or give '
      '`format`=csv',
    )
  require(
    not out.exists() or (out.is_dir() and not any(out.iterdir())),
    f'`export`={out}: is there and not empty; give a new folder',
  )
  count = 0
  for file, label in state.labels().items():
    try:
      content = images_lib.read(root, file)
    except images_lib.MissingError:
      continue
    target = out / label / file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    count += 1
  return count


def write(
  state: store_lib.State, root: pathlib.Path, out: pathlib.Path, kind: str
) -> int:
  """Write the labels; return the number of files."""
  if kind == 'folders':
    return write_folders(state, root, out)
  files.write_atomically(out, export(state, kind))
  return len(state.labels())


# Import.


def read(path: pathlib.Path) -> list[Label]:
  """Return the labels of a file of any format.

  Raises:
    InputError: it cannot be read.
  """
  try:
    text = path.read_text('utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or 'it is not UTF-8'
    raise InputError(
      f'`labels_file`={path}: cannot be read ({reason}): give another file'
    ) from error
  found: list[Label]
  if path.suffix.lower() != '.json':
    found = list(_from_csv(text, path))
  else:
    try:
      tree = json.loads(text)
      is_coco = isinstance(tree, dict)
      found = list(_from_coco(tree) if is_coco else _from_label_studio(tree))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise InputError(
        f'`labels_file`={path}: is no export of Label Studio and no COCO file '
        f'({type(error).__name__}: {error!s:.80})'
      ) from error
  require(bool(found), f'`labels_file`={path}: has no labels')
  return found


def _from_csv(text: str, path: pathlib.Path) -> Iterator[Label]:
  reader = csv.DictReader(text.splitlines())
  columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
  require(
    {'file', 'label'} <= set(columns),
    f'`labels_file`={path}: lacks the columns file and label; begin it '
    'with the line file,label',
  )
  for row in reader:
    file, label = ((row[columns[c]] or '').strip() for c in ('file', 'label'))
    if file and label:
      where = pathlib.PurePosixPath(file.replace('\\', '/')).as_posix()
      yield Label(where, label, 'labels_file')


def _from_coco(tree: dict) -> Iterator[Label]:
  names = {each['id']: each['name'] for each in tree['categories']}
  paths = {each['id']: each['file_name'] for each in tree['images']}
  for each in tree['annotations']:
    yield Label(paths[each['image_id']], names[each['category_id']], 'coco')


def _from_label_studio(tree: list) -> Iterator[Label]:
  for task in tree:
    if 'annotations' not in task and 'completions' not in task:
      yield from _from_minimal(task)
      continue
    where = _reference(task['data'])
    for each in task.get('annotations') or task.get('completions') or ():
      if each.get('was_cancelled'):
        continue
      for result in each.get('result') or ():
        if result.get('type') == 'choices':
          label = result['value']['choices'][0]
          yield Label(where, label, _person(each.get('completed_by')))


def _from_minimal(task: dict) -> Iterator[Label]:
  """Yield the label of a task of the JSON-MIN form."""
  if isinstance(task.get('choice'), str):
    who = task.get('annotator')
    yield Label(_reference(task), task['choice'], _person(who))


def _reference(data: dict) -> str:
  """Return what a task says of its image."""
  for name in ('image', 'img', 'file', 'url'):
    if isinstance(data.get(name), str):
      return data[name]
  raise ValueError('a task names no image')


def _person(who) -> str:
  if isinstance(who, dict):
    who = who.get('email') or who.get('id')
  return f'label studio {who}' if isinstance(who, int) else str(who or 'import')


def add(
  store: store_lib.Store, images: images_lib.Images, path: pathlib.Path
) -> int:
  """Add the labels of a file to a store; return the number of new ones.

  Labels that were added before are not added again. Unknown classes are added.
  The index of the images must be complete.

  Raises:
    InputError: the file cannot be read, or names images that are not there.
  """
  by_person: dict[str, list[dict[str, Any]]] = {}
  missing = []
  find = _finder(images.index)
  for each in read(path):
    file = find(each.where)
    if file is None:
      missing.append(each.where)
      continue
    key = hashlib.sha256(f'{file}\n{each.label}\n{each.annotator}'.encode())
    by_person.setdefault(each.annotator.strip()[:100], []).append(
      {'file': file, 'label': each.label.strip(), 'key': key.hexdigest()[:32]}
      | {'stamp': images.stamp(file), 'shown': {'queue': 'import'}}
    )
  require(
    not missing,
    f'`labels_file`={path}: {len(missing)} images are not in the folder, or '
    f'not the only ones of their name ({", ".join(missing[:_SHOWN])}): give '
    'paths relative to the folder',
  )
  for given in by_person.values():
    for label in (answer['label'] for answer in given):
      if store.state.current_name(label) is None:
        store.add_class(label)
  saved = 0
  for name, given in sorted(by_person.items()):
    for start in range(0, len(given), _BATCH):
      part = given[start : start + _BATCH]
      saved += store.answer(name, part, f'import {path.name:.40} {start}')
  return saved


def _finder(index: images_lib.Index) -> Callable[[str], str | None]:
  """Return a function from a reference to a path of the index.

  Label Studio names an image by an address, and puts eight hexadecimal digits
  before the names of uploaded ones.
  """

  def find(reference: str) -> str | None:
    parts = urllib.parse.urlsplit(reference)
    given = urllib.parse.parse_qs(parts.query).get('d', [''])[0]
    path = given or urllib.parse.unquote(parts.path)
    for candidate in (reference, path, path.lstrip('/')):
      if index.find(candidate) is not None:
        return candidate
    pieces = path.strip('/').split('/')
    for k in range(1, len(pieces)):
      if index.find('/'.join(pieces[k:])) is not None:
        return '/'.join(pieces[k:])
    name = re.sub(r'^[0-9a-f]{8}-', '', pieces[-1])
    found = index.ending(name)
    return found[0] if len(found) == 1 else None

  return find
