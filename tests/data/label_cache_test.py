"""Labels and digests that are kept on disk for the next start."""

import logging
import pathlib

import fake_tfds
import numpy as np
import pytest

from ssljax.data import datasets, records
from ssljax.distributed import multihost


def write(folder, labels=(0, 1, 2, 0, 1), name='pictures'):
  rng = np.random.default_rng(0)
  images = list(rng.integers(0, 256, (len(labels), 4, 4, 3)).astype(np.uint8))
  return fake_tfds.write(folder, name, images, list(labels), 3, shards=2)


@pytest.fixture
def reads(monkeypatch, tmp_path):
  """The splits whose records are read; the user's cache is in `tmp_path`."""
  found, read = [], records._read_share

  def counted(split, *args):
    found.append(split.name)
    return read(split, *args)

  monkeypatch.setattr(records, '_read_share', counted)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'user'))
  return found


def load(folder):
  return datasets.load('pictures', str(folder))


def test_the_second_start_reads_no_record(reads, tmp_path):
  version = write(tmp_path / 'data')
  first, again = load(tmp_path / 'data'), load(tmp_path / 'data')
  assert reads == ['train', 'test']  # once each
  for part in ('train', 'test'):
    one, other = getattr(first, part), getattr(again, part)
    np.testing.assert_array_equal(one.labels, [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(other.labels, one.labels)
    np.testing.assert_array_equal(other.digests(), one.digests())
    assert other.labels.dtype == np.int32
  assert len(list(pathlib.Path(version).glob('ssljax-labels-*.npz'))) == 2
  assert not (tmp_path / 'user').exists()


def test_another_split_of_the_same_files_has_its_own_labels(reads, tmp_path):
  write(tmp_path / 'data')
  load(tmp_path / 'data')
  folder = str(tmp_path / 'data')
  part = datasets.load('pictures', folder, train_split='train[1:3]')
  np.testing.assert_array_equal(part.train.labels, [1, 2])
  assert reads == ['train', 'test', 'train[1:3]']


def test_a_data_set_that_is_written_again_is_read_again(reads, tmp_path):
  write(tmp_path / 'data')
  load(tmp_path / 'data')
  write(tmp_path / 'new', (2, 2, 1, 0, 0))
  for path in (tmp_path / 'new').rglob('*'):
    if path.is_file():  # in place, beside the labels that are kept
      there = tmp_path / 'data' / path.relative_to(tmp_path / 'new')
      there.write_bytes(path.read_bytes())
  found = load(tmp_path / 'data')
  np.testing.assert_array_equal(found.train.labels, [2, 2, 1, 0, 0])
  assert reads == 2 * ['train', 'test']


@pytest.mark.parametrize('damage', [b'', b'no zip file', None])
def test_damaged_labels_are_read_again(damage, reads, tmp_path):
  version = pathlib.Path(write(tmp_path / 'data'))
  load(tmp_path / 'data')
  for path in version.glob('ssljax-labels-*.npz'):
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 255])
    changed = content[:middle] + flipped + content[middle + 1 :]
    path.write_bytes(changed if damage is None else damage)
  np.testing.assert_array_equal(
    load(tmp_path / 'data').train.labels, [0, 1, 2, 0, 1]
  )
  assert reads == 2 * ['train', 'test']
  load(tmp_path / 'data')
  assert len(reads) == 4  # they were written anew


def block(version):
  """Take the names beside the data, so that no file can be written there."""
  for path in pathlib.Path(version).glob('ssljax-labels-*.npz'):
    path.unlink()
    path.mkdir()


def test_labels_are_kept_for_the_user_where_the_data_cannot_be_changed(
  reads, tmp_path
):
  version = write(tmp_path / 'data')
  load(tmp_path / 'data')
  block(version)
  for _ in range(2):
    load(tmp_path / 'data')
  assert reads == 2 * ['train', 'test']
  assert len(list((tmp_path / 'user/ssljax/labels').rglob('*.npz'))) == 2


def test_without_a_place_for_labels_a_start_warns_and_goes_on(
  reads, tmp_path, caplog
):
  version = write(tmp_path / 'data')
  load(tmp_path / 'data')
  block(version)
  (tmp_path / 'user').write_text('no folder')
  with caplog.at_level(logging.WARNING):
    found = load(tmp_path / 'data')
  np.testing.assert_array_equal(found.train.labels, [0, 1, 2, 0, 1])
  said = [r.getMessage() for r in caplog.records if 'not kept' in r.message]
  assert len(said) == 2 and all('XDG_CACHE_HOME' in text for text in said)


@pytest.mark.parametrize('count', [0, 1, 5, 7])
def test_the_shares_of_the_processes_are_all_rows(count, monkeypatch):
  found = []
  for process in range(3):
    monkeypatch.setattr(multihost.jax, 'process_index', lambda p=process: p)
    monkeypatch.setattr(multihost.jax, 'process_count', lambda: 3)
    found.extend(multihost.share(count))
  assert found == list(range(count))
