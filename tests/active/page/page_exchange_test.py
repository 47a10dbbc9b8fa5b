"""Labels are exchanged with other tools without loss."""

import json

import pages
import pytest

from ssljax.active.page import exchange
from ssljax.data import folder
from ssljax.errors import InputError


@pytest.fixture
def page(tmp_path):
  made = pages.open_page(tmp_path, count=6)
  yield made
  made.store.close()


def give(page, who, labels):
  page.answer(who, [{'file': f, 'label': y} for f, y in labels.items()], '')


def imported(page, path):
  return exchange.add(page.store, page.images, path)


@pytest.mark.parametrize('kind', exchange.FILES)
def test_every_format_can_be_read_back(kind, page, tmp_path):
  labels = {'000.png': 'cat', '003.png': 'dog', '005.png': 'cat'}
  give(page, 'ada', labels)
  out = tmp_path / exchange.FILES[kind][0]
  exchange.write(page.store.state, page.images.root, out, kind)
  other = pages.open_page(tmp_path / 'other', classes=(), count=6)
  assert imported(other, out) == 3
  assert other.store.state.labels() == labels
  assert imported(other, out) == 0  # a second time adds nothing
  other.store.close()


def test_an_exported_csv_file_is_a_labels_file(page, tmp_path):
  give(page, 'ada', {'000.png': 'cat', '003.png': 'dog'})
  out = tmp_path / 'labels.csv'
  exchange.write(page.store.state, page.images.root, out, 'csv')
  found = folder.load(str(page.images.root), str(out)).train
  given = dict(zip(found.names, found.labels, strict=True))
  assert given['000.png'] == 0 and given['003.png'] == 1
  assert sum(found.labels >= 0) == 2


def test_class_folders_hold_copies(page, tmp_path):
  give(page, 'ada', {'000.png': 'cat', '003.png': 'dog'})
  out = tmp_path / 'out'
  exchange.write(page.store.state, page.images.root, out, 'folders')
  assert sorted(p.relative_to(out).as_posix() for p in out.rglob('*.png')) == [
    'cat/000.png',
    'dog/003.png',
  ]
  with pytest.raises(InputError, match='not empty'):
    exchange.write(page.store.state, page.images.root, out, 'folders')


@pytest.mark.parametrize('name', ['a/b', '..', '.x', 'a\\b'])
def test_a_class_that_names_no_folder_is_refused(name, page, tmp_path):
  page.store.add_class(name)
  with pytest.raises(InputError, match='cannot name a folder'):
    exchange.write(
      page.store.state, page.images.root, tmp_path / 'out', 'folders'
    )


def task(image, *answers):
  """A task as Label Studio exports it."""
  return {
    'id': 7,
    'data': {'image': image},
    'annotations': [
      {
        'completed_by': who,
        'was_cancelled': choice is None,
        'result': []
        if choice is None
        else [
          {
            'from_name': 'choice',
            'to_name': 'image',
            'type': 'choices',
            'origin': 'manual',
            'value': {'choices': [choice]},
          }
        ],
      }
      for who, choice in answers
    ],
  }


def test_an_export_of_label_studio_is_read_with_its_annotators(page, tmp_path):
  tasks = [
    task('/data/upload/3/0a1b2c3d-000.png', (1, 'cat')),
    task('/data/local-files/?d=photos/001.png', ({'email': 'a@x.org'}, 'dog')),
    task('https://host/bucket/002.png', (1, 'cat'), (2, 'dog')),
    task('s3://bucket/003.png', (1, None)),
    {'image': '/data/upload/3/0a1b2c3d-004.png', 'choice': 'bird'},
  ]
  path = tmp_path / 'project.json'
  path.write_text(json.dumps(tasks))
  assert imported(page, path) == 5
  state = page.store.state
  assert state.labels() == {
    '000.png': 'cat',
    '001.png': 'dog',
    '004.png': 'bird',
  }
  assert state.conflicts == {'002.png'}
  assert {a.annotator for a in state.answers} == {
    'label studio 1',
    'label studio 2',
    'a@x.org',
    'import',
  }
  assert state.classes == ['cat', 'dog', 'bird']


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('x.json', '{', 'no export of Label Studio'),
    ('x.json', '[1]', 'no export of Label Studio'),
    ('x.json', '[]', 'has no labels'),
    ('x.json', '{"images": []}', 'no COCO file'),
    ('x.csv', 'a,b\n', 'lacks the columns'),
    ('x.csv', 'file,label\n', 'has no labels'),
    ('x.csv', 'file,label\nnone.png,cat\n', '1 images are not in the folder'),
    ('x.csv', 'file,label\n../000.png/x,cat\n', 'are not in the folder'),
    ('x.csv', b'\xff', 'not UTF-8'),
    ('missing.csv', None, 'cannot be read'),
  ],
)
def test_a_file_that_cannot_be_imported_is_one_line(
  name, content, message, page, tmp_path
):
  path = tmp_path / name
  if content is not None:
    path.write_bytes(
      content if isinstance(content, bytes) else content.encode()
    )
  with pytest.raises(InputError, match=message) as raised:
    imported(page, path)
  assert '\n' not in str(raised.value) and not page.store.state.answers
