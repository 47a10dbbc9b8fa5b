import subprocess
import sys

import folders
import numpy as np
import PIL.Image
import pytest

from ssljax import api, export, prediction
from ssljax.data import arrays
from ssljax.data import folder as data_folder
from ssljax.errors import InputError

# A process that has neither the library nor this folder.
_USE = """
import sys
sys.modules['ssljax'] = None
from jax import export
import numpy as np
call = export.deserialize(open(sys.argv[1], 'rb').read()).call
images = np.load(sys.argv[2])
p = [np.asarray(call(images[:n])) for n in (1, 64)]
np.savez(sys.argv[3], one=p[0], many=p[1])
"""


def predictor(network, rows, temperature, seeds=(0, 1), **settings):
  """A predictor of models of different seeds, hardly trained."""
  labels = np.arange(len(rows)) % 3
  models = [
    api.fit(
      rows,
      labels,
      method='supervised',
      network=network,
      steps=2,
      seed=seed,
      progress=False,
      **settings,
    )
    for seed in seeds
  ]
  dataset = arrays.from_arrays(rows, labels)
  labelled = np.ones(len(rows), bool)
  return prediction.Predictor(
    tuple(models), dataset, labelled, temperature=temperature
  )


@pytest.fixture(scope='module')
def images():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (64, 12, 12, 1), np.uint8)


def test_the_function_gives_the_votes_probabilities_without_the_library(
  images, tmp_path
):
  made = predictor('digits', images, 1.7, preprocess='standardize')
  found = export.write(made, tmp_path)['stablehlo']
  assert found['difference'] < 1e-5
  np.save(tmp_path / 'images.npy', images)
  command = [sys.executable, '-c', _USE, tmp_path / 'model.stablehlo']
  command += [tmp_path / 'images.npy', tmp_path / 'p.npz']
  subprocess.run(command, check=True, timeout=300, cwd=tmp_path)
  p, expected = np.load(tmp_path / 'p.npz'), made.predict_proba(images)
  np.testing.assert_allclose(p['many'], expected, atol=1e-5)
  np.testing.assert_allclose(p['one'], expected[:1], atol=1e-5)
  # Temperature and the second model matter.
  single = made.models[0].predict_proba(images)
  assert np.abs(single - expected).max() > 1e-3


def printed(folder, program, path='images.npy') -> str:
  """Return what an example program prints of the images beside it."""
  return subprocess.run(
    [sys.executable, folder / program, folder / path],
    capture_output=True,
    text=True,
    timeout=300,
    check=True,
  ).stdout


def test_the_example_program_predicts(images, tmp_path):
  made = predictor('digits', images, 1.0, seeds=(3,))
  export.write(made, tmp_path)
  np.save(tmp_path / 'images.npy', images[:4])
  shown = printed(tmp_path, 'predict.py')
  labels = [line.split()[0] for line in shown.splitlines()]
  assert labels == [made.classes[c] for c in made.models[0].predict(images[:4])]
  assert '12, 12, 1' in (tmp_path / 'README.md').read_text()


def photographs(root, rng):
  """Write images of several modes and sizes, and a file that is none."""
  noise = lambda *shape: PIL.Image.fromarray(
    rng.integers(0, 256, shape, np.uint8)
  )
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # rotated
  deep = PIL.Image.fromarray(rng.integers(0, 2**16, (9, 14), np.uint16))
  folders.write(
    root,
    {
      'cat/alpha.png': noise(20, 31, 4),
      'cat/grey.png': noise(12, 12),
      'cat/palette.gif': noise(15, 12, 3).convert('P'),
      'deep.png': deep,
      'large.jpg': noise(150, 97, 3),
      'no.png': b'no',
      '.hidden.png': b'no',
      'ink.tif': noise(13, 12, 3).convert('CMYK'),
    },
  )
  noise(16, 30, 3).save(root / 'turned.jpg', exif=exif)


@pytest.mark.parametrize('channels', [1, 3])
def test_the_example_program_reads_images_as_the_run_does(channels, tmp_path):
  rng = np.random.default_rng(0)
  rows = rng.integers(0, 256, (30, 12, 12, channels), np.uint8)
  made = predictor('digits', rows, 1.0, seeds=(0,))
  export.write(made, tmp_path)
  photographs(tmp_path / 'photos', rng)
  found = data_folder.to_predict(str(tmp_path / 'photos'), (12, 12, channels))
  pixels, reasons = found.read(range(len(found.names)))
  names = [name for k, name in enumerate(found.names) if k not in reasons]
  assert len(names) == 7 and list(reasons.values())
  expected = dict(zip(names, made.predict_proba(pixels), strict=True))
  lines = printed(tmp_path, 'predict.py', 'photos').splitlines()
  assert len(lines) == 7
  for line in lines:
    label, p, name = line.split('\t')
    own = expected[name.split('/photos/')[1]]
    assert label == made.classes[own.argmax()]
    assert float(p) == pytest.approx(own.max(), abs=1e-4)
  one = printed(tmp_path, 'predict.py', 'photos/cat/grey.png')
  assert one.splitlines() == [lines[1]]
  chances = np.array([p.max() for p in expected.values()])
  assert len(set(chances.round(3).tolist())) > 3  # they depend on the pixels


@pytest.mark.slow
def test_features_are_exported_too(tmp_path):
  rows = np.random.default_rng(1).normal(size=(30, 5)).astype(np.float32)
  made = predictor('mlp', rows, 0.5)
  assert export.write(made, tmp_path)['stablehlo']['difference'] < 1e-5
  np.save(tmp_path / 'images.npy', rows[:2])
  shown = printed(tmp_path, 'predict.py').splitlines()
  best = made.predict_proba(rows[:2]).argmax(axis=1)
  assert [line.split()[0] for line in shown] == [made.classes[c] for c in best]


@pytest.mark.slow
def test_onnx_runtime_gives_the_votes_probabilities(images, tmp_path):
  pytest.importorskip('jax2onnx', reason="pip install 'ssljax[onnx]'")
  pytest.importorskip('onnxruntime', reason="pip install 'ssljax[onnx]'")
  made = predictor('digits', images, 1.7, preprocess='standardize')
  found = export.write(made, tmp_path, ['onnx'])
  assert set(found) == {'onnx'} and found['onnx']['difference'] < 1e-5
  assert not (tmp_path / 'model.stablehlo').exists()
  np.save(tmp_path / 'images.npy', images[:4])
  text = printed(tmp_path, 'predict_onnx.py')
  p = made.predict_proba(images[:4])
  shown = [line.split() for line in text.splitlines()]
  assert [line[0] for line in shown] == [made.classes[c] for c in p.argmax(1)]
  confidence = [float(line[1]) for line in shown]
  np.testing.assert_allclose(confidence, p.max(1), atol=1e-4)


def test_an_unknown_format_is_refused(images, tmp_path):
  made = predictor('digits', images[:6], 1.0, seeds=(0,))
  with pytest.raises(InputError, match=r'format=tflite: .* stablehlo or onnx'):
    export.write(made, tmp_path, ['tflite'])


def test_the_weights_are_those_of_all_splits(images, tmp_path):
  from safetensors import numpy as safetensors

  made = predictor('digits', images, 1.0)
  export.write(made, tmp_path)
  weights = safetensors.load_file(tmp_path / 'weights.safetensors')
  assert all(x.shape[0] == 2 for x in weights.values())
  total = sum(x[1].sum() for x in weights.values())
  import jax

  own = sum(np.sum(x) for x in jax.tree.leaves(made.models[1].weights))
  assert total == pytest.approx(own, rel=1e-5)


def test_a_function_that_differs_is_refused(images, tmp_path, monkeypatch):
  made = predictor('digits', images, 1.0)
  monkeypatch.setattr(export, '_difference', lambda *args: 0.01)
  with pytest.raises(InputError, match='differs from the run by'):
    export.write(made, tmp_path / 'model')
  assert not (tmp_path / 'model').exists()


def test_a_missing_library_is_named(images, tmp_path, monkeypatch):
  made = predictor('digits', images, 1.0)
  monkeypatch.setitem(sys.modules, 'flatbuffers', None)
  with pytest.raises(InputError, match=r"pip install 'ssljax\[export\]'"):
    export.write(made, tmp_path)
  monkeypatch.setitem(sys.modules, 'jax2onnx', None)
  with pytest.raises(InputError, match=r"pip install 'ssljax\[onnx\]'"):
    export.write(made, tmp_path, ['onnx'])


@pytest.mark.parametrize('name', ['README.md', 'predict.py'])
def test_a_file_of_the_users_own_is_kept(name, tmp_path):
  (tmp_path / name).write_text('own')
  with pytest.raises(InputError, match=f'has a {name} that no export'):
    export.write(None, tmp_path)
  assert (tmp_path / name).read_text() == 'own'
