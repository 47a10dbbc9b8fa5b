"""The folder of the transcript: what users' folders contain, mixed in."""

import importlib.util
import pathlib
import types

import numpy as np

from ssljax.data import datasets, folder

ROOT = pathlib.Path(__file__).parents[2]


def picture(seed):
  """An image [28, 28, 1] of 7x7 squares."""
  squares = np.random.default_rng(seed).integers(0, 256, (7, 7), np.uint8)
  return np.kron(squares, np.ones((4, 4), np.uint8))[..., None]


def test_unusual_files_are_read_and_copies_are_found(
  tmp_path, monkeypatch, caplog
):
  path = ROOT / 'tools/transcript.py'
  spec = importlib.util.spec_from_file_location('transcript', path)
  tool = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(tool)
  labels = np.arange(60_000) % 10
  train = types.SimpleNamespace(
    labels=labels, read=lambda rows: np.stack([picture(row) for row in rows])
  )
  monkeypatch.setattr(tool, 'IMAGES', 200)
  monkeypatch.setattr(
    datasets, 'load', lambda *_: types.SimpleNamespace(train=train)
  )
  truth = tool.write(tmp_path, 'DIR')
  found = folder.load(str(tmp_path)).train
  # Two copies and a rotated image more; a broken and a hidden one are not read.
  assert len(found.labels) == 203 and found.shape == (28, 28, 1)
  assert (found.labels >= 0).sum() == 62
  assert len(truth) == 200 - 60 and truth.keys() <= set(found.names.tolist())
  said = [record.getMessage() for record in caplog.records]
  assert 'unlabelled/broken.png' in said[0] and '.hidden' not in caplog.text
  assert said[1].endswith(', 3/copy.png') and '/larger.png' in said[2]
  # Alpha, palette, CMYK and 16 bits: pixels of the data set, whatever the file.
  rows = np.sort(np.random.default_rng(0).choice(60_000, 200, False))
  names = found.names.tolist()
  for number, suffix in enumerate(tool.TROUBLES):
    (name,) = [n for n in names if n.endswith(f'{number:03}-{suffix}')]
    own = found.read([names.index(name)])[0]
    np.testing.assert_array_equal(own, picture(rows[number]))
