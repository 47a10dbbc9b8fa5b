"""Paths and growing files in a bucket, against an emulator on loopback."""

import importlib.util
import threading

import pytest

from ssljax import buckets, files
from ssljax.errors import InputError


def fails(times, status):
  """A fault that the next requests meet."""
  left = iter([status] * times)
  return lambda method, path: next(left, None)


def test_a_path_has_the_methods_of_a_local_one(bucket):
  folder = bucket.folder
  assert not folder.exists() and not files.exists(folder)
  files.write_atomically(folder / 'a' / 'one.json', 'é\r\n')
  (folder / 'two').write_bytes(b'\x00\xff\r\n')
  assert files.read_text(folder / 'a' / 'one.json') == 'é\r\n'
  assert (folder / 'two').read_bytes() == b'\x00\xff\r\n'
  assert folder.is_dir() and not folder.is_file()
  assert files.is_regular(folder / 'two') and not (folder / 'two').is_dir()
  assert sorted(p.name for p in folder.iterdir()) == ['a', 'two']
  # A name that begins like another is no folder of it.
  assert not (folder / 'tw').exists()
  (folder / 'a').rename(folder / 'b')
  assert [p.name for p in (folder / 'b').iterdir()] == ['one.json']
  assert not (folder / 'a').exists()
  files.move(folder / 'two', folder / 'twelve')
  assert not (folder / 'two').exists()
  files.move(folder / 'twelve', folder / 'two')
  assert (folder / 'two').read_bytes() == b'\x00\xff\r\n'
  (folder / 'two').unlink()
  with pytest.raises(FileNotFoundError) as absent:
    (folder / 'two').read_bytes()
  assert absent.value.filename == f'{folder}/two'
  (folder / 'two').unlink(missing_ok=True)
  folder.rmtree()
  assert not folder.exists()


def test_of_many_processes_one_creates_a_file(bucket):
  path, won = bucket.folder / 'lock', []

  def create(number):
    try:
      path.write_if(b'%d' % number, 0)
      won.append(number)
    except FileExistsError:
      pass

  threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(won) == 1
  data, generation, _ = path.read_with_generation()
  assert data == b'%d' % won[0]
  newer = path.write_if(b'again', generation)
  with pytest.raises(FileExistsError):
    path.write_if(b'late', generation)
  path.unlink(missing_ok=True, generation=generation)  # not this one
  assert path.read_with_generation()[:2] == (b'again', newer)


@pytest.mark.parametrize('status', [401, 429, 503])
def test_a_request_is_repeated_while_the_error_may_pass(bucket, status):
  bucket.fault = fails(1, status)
  (bucket.folder / 'x').write_bytes(b'1')
  bucket.fault = fails(1, status)
  assert (bucket.folder / 'x').read_bytes() == b'1'


@pytest.mark.parametrize('status', [401, 403, 503])
def test_an_error_that_stays_is_no_absent_file(bucket, status):
  (bucket.folder / 'x').write_bytes(b'1')
  bucket.fault = lambda method, path: status
  for ask in (files.exists, files.is_regular, lambda p: p.is_dir()):
    with pytest.raises(OSError) as failed:
      ask(bucket.folder / 'x')
    assert failed.value.filename == f'{bucket.folder}/x'
  assert isinstance(failed.value, PermissionError) == (status != 503)


def test_a_file_grows_by_parts_and_is_read_as_one(bucket, tmp_path):
  path, local = bucket.folder / 'metrics.jsonl', tmp_path / 'metrics.jsonl'
  local.write_bytes(b'')
  grows = buckets.GrowingFile(path)
  assert not path.exists()
  for text in (b'a\n', b'', b'bb\n', b'ccc\n'):
    with open(local, 'ab') as file:
      file.write(text)
    grows.update(local)
    assert not local.stat().st_size or path.read_bytes() == local.read_bytes()
  assert len(list(path.iterdir())) == 3  # nothing was written again
  assert files.is_regular(path)

  again = buckets.GrowingFile(path)  # of a process that goes on
  assert again.length == 9
  local.write_bytes(b'a\nbb\n')
  again.truncate(local, 5)
  assert path.read_bytes() == b'a\nbb\n'
  again.truncate(local, 5)  # nothing to remove
  local.write_bytes(b'a\nbb\nd\n')
  again.update(local)
  assert path.read_bytes() == b'a\nbb\nd\n'
  again.replace(b'x')
  assert path.read_bytes() == b'x'


def test_many_parts_become_one(bucket, tmp_path, monkeypatch):
  monkeypatch.setattr(buckets, 'MOST_PARTS', 3)
  path, local = bucket.folder / 'metrics.jsonl', tmp_path / 'metrics.jsonl'
  grows, text = buckets.GrowingFile(path), b''
  for number in range(8):
    text += b'%d\n' % number
    local.write_bytes(text)
    grows.update(local)
    assert path.read_bytes() == text
    assert len(list(path.iterdir())) <= 3


def test_a_write_that_fails_at_any_request_leaves_a_whole_file(bucket):
  path = bucket.folder / 'metrics.jsonl'
  buckets.GrowingFile(path).replace(b'old\n' * 3)
  for good in range(12):
    left = iter([None] * good)
    bucket.fault = lambda method, url, left=left: next(left, 403)
    try:
      buckets.GrowingFile(path).replace(b'new\n')
    except OSError:
      bucket.fault = lambda method, url: None
      assert path.read_bytes() in (b'old\n' * 3, b'new\n')
    else:
      break
  else:
    raise AssertionError('it never succeeded')
  bucket.fault = lambda method, url: None
  assert path.read_bytes() == b'new\n'


@pytest.mark.parametrize(
  'text, said',
  [
    ('gs://', 'give gs://BUCKET/FOLDER'),
    ('gs://bucket', 'give gs://BUCKET/FOLDER'),
    ('gs://bucket/', 'give gs://BUCKET/FOLDER'),
    ('gs://my bucket/x', 'give gs://BUCKET/FOLDER'),
    ('gs://nobucket/x', 'the bucket nobucket does not exist'),
    ('s3://bucket/x', 'is no path on a disk'),
  ],
)
def test_a_bad_place_is_refused_by_name(bucket, text, said):
  with pytest.raises(InputError, match=said) as refused:
    files.as_place('workdir', text)
  assert refused.value.marked.startswith(f'`workdir`={text}: ')


def test_a_bucket_without_permission_is_refused(bucket):
  bucket.fault = lambda method, path: 403
  with pytest.raises(InputError) as refused:
    files.as_place('workdir', 'gs://bucket/x')
  assert 'the bucket bucket cannot be used (no permission' in str(refused.value)
  assert 'storage.objects.list' in str(refused.value)
  assert '\n' not in str(refused.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda n: None if n == 'gcsfs' else find(n)
  )
  with pytest.raises(InputError, match=r"pip install 'ssljax\[bucket\]'"):
    files.as_place('workdir', 'gs://bucket/x')
