"""Only images of the folder are indexed and read, whatever its content."""

import io
import os

import pages
import PIL.Image
import pytest

from ssljax.active.page import images as images_lib
from ssljax.errors import InputError


@pytest.fixture
def found(tmp_path):
  root = pages.draw(tmp_path / 'images', 5)
  (tmp_path / 'store').mkdir()
  made = images_lib.Images(root, tmp_path / 'store')
  made.scan()
  return made


def paths(found):
  return [entry.path for entry in found.index.after(0, 100)]


def test_images_in_subfolders_are_found_and_other_files_are_not(found):
  (found.root / 'sub').mkdir()
  pages.draw(found.root / 'sub' / 'deep', 2)
  for name in ('text.txt', '.hidden.png', 'Thumbs.db'):
    (found.root / name).write_bytes(b'x')
  os.mkfifo(found.root / 'fifo.png')
  found.scan()
  assert len(paths(found)) == 7 and found.complete
  assert 'sub/deep/001.png' in paths(found)


def test_numbers_stay_when_files_come_and_go(found, tmp_path):
  before = {e.path: e.id for e in found.index.after(0, 100)}
  (found.root / '002.png').unlink()
  PIL.Image.new('L', (8, 8)).save(found.root / 'new.png')
  again = images_lib.Images(found.root, tmp_path / 'store')
  again.scan()
  after = {e.path: e.id for e in again.index.after(0, 100)}
  assert after.keys() == before.keys() - {'002.png'} | {'new.png'}
  assert all(before.get(path, 6) == number for path, number in after.items())


def test_a_replaced_file_has_another_stamp(found):
  before = found.index.find('001.png')
  PIL.Image.new('RGB', (9, 9)).save(found.root / '001.png')
  found.scan()
  after = found.index.find('001.png')
  assert before.id == after.id and before.stamp != after.stamp


def test_links_are_left_out_and_not_followed(found, tmp_path):
  secret = tmp_path / 'secret'
  pages.draw(secret, 1)
  (found.root / 'link.png').symlink_to(secret / '000.png')
  (found.root / 'folder').symlink_to(secret)
  found.scan()
  assert found.links == 2 and len(paths(found)) == 5
  for path in ('link.png', 'folder/000.png'):
    with pytest.raises(images_lib.MissingError):
      found.read(path)


def test_a_file_that_became_a_link_is_not_read(found, tmp_path):
  pages.draw(tmp_path / 'secret', 1)
  (found.root / '001.png').unlink()
  (found.root / '001.png').symlink_to(tmp_path / 'secret' / '000.png')
  with pytest.raises(images_lib.MissingError):
    found.original(found.index.find('001.png'))


@pytest.mark.parametrize(
  'path',
  ['../secret/000.png', '/etc/passwd', 'a/../../x', '', '.', 'a//b', 'x\0y'],
)
def test_a_path_outside_is_not_read(path, found, tmp_path):
  pages.draw(tmp_path / 'secret', 1)
  with pytest.raises(images_lib.MissingError):
    found.read(path)


def test_the_original_bytes_are_sent_in_their_own_size(found):
  entry = found.index.find('003.png')
  made = found.original(entry)
  assert made.kind == 'image/png'
  assert made.content == (found.root / '003.png').read_bytes()
  assert found.thumbnail(entry) == made  # it is small


def test_a_format_that_browsers_lack_is_converted(found):
  pages.noise(0, (50, 40)).save(found.root / 'scan.tiff')
  found.scan()
  made = found.original(found.index.find('scan.tiff'))
  assert made.kind in ('image/png', 'image/jpeg')
  assert PIL.Image.open(io.BytesIO(made.content)).size == (50, 40)


def test_a_thumbnail_of_a_large_image_is_cached(found, monkeypatch):
  pages.noise(0, (600, 400)).save(found.root / 'large.png')
  found.scan()
  entry = found.index.find('large.png')
  made = found.thumbnail(entry)
  assert PIL.Image.open(io.BytesIO(made.content)).size == (192, 128)
  monkeypatch.setattr(found, 'read', None)
  assert found.thumbnail(entry) == made


@pytest.mark.parametrize(
  'content', [b'', b'no image', b'\x89PNG\r\n\x1a\n' + b'x' * 50]
)
def test_an_image_that_does_not_decode_is_told_with_the_reason(content, found):
  (found.root / 'bad.png').write_bytes(content)
  found.scan()
  with pytest.raises(ValueError, match=r'\w+'):
    found.thumbnail(found.index.find('bad.png'))


def test_a_file_that_is_gone_is_missing(found):
  entry = found.index.find('001.png')
  (found.root / '001.png').unlink()
  with pytest.raises(images_lib.MissingError, match='No such file'):
    found.original(entry)


def test_a_damaged_index_is_named(found, tmp_path):
  for path in (tmp_path / 'store').glob('index.sqlite*'):
    path.write_bytes(b'x' * 9000)
  with pytest.raises(InputError, match=r'index.sqlite is damaged'):
    images_lib.Images(found.root, tmp_path / 'store')


def test_a_folder_that_is_not_there_is_refused(tmp_path):
  with pytest.raises(InputError, match='is no folder'):
    images_lib.Images(tmp_path / 'none', tmp_path)
