"""Pretrained networks: ONNX files, and models of timm."""

import sys
import types

import numpy as np
import pytest

from ssljax.data import backbones
from ssljax.errors import InputError

onnx = pytest.importorskip('onnx', reason='makes the files: pip install onnx')
pytest.importorskip('onnxruntime', reason="pip install 'ssljax[embed]'")


def save(path, shape, nodes, outputs=('y',), kind='FLOAT', inputs=('x',)):
  """Write a network of the given nodes to a file."""
  helper, number = onnx.helper, getattr(onnx.TensorProto, kind)
  graph = helper.make_graph(
    [helper.make_node(*node[:3], **dict(node[3:])) for node in nodes],
    'g',
    [helper.make_tensor_value_info(name, number, shape) for name in inputs],
    [helper.make_tensor_value_info(name, number, None) for name in outputs],
  )
  opset = [helper.make_opsetid('', 17)]
  model = helper.make_model(graph, opset_imports=opset, ir_version=8)
  onnx.save(model, path)
  return str(path)


MEANS = [('GlobalAveragePool', ['x'], ['p']), ('Flatten', ['p'], ['y'])]
# One image of 2x2: red 0, 51, 102, 255; green 255; blue 0.
IMAGE = np.zeros((1, 2, 2, 3), np.uint8)
IMAGE[0, ..., 0] = [[0, 51], [102, 255]]
IMAGE[..., 1] = 255


def means(path, **asked):
  return backbones.load(path, backbones.Asked(image_size=2, **asked))


def test_pixels_are_normalised_with_the_mean_and_deviation_of_imagenet(
  tmp_path,
):
  path = save(tmp_path / 'm.onnx', ['n', 3, 'h', 'w'], MEANS)
  # The red values are 0, 0.2, 0.4 and 1, so their mean is 0.4.
  expected = [(0.4 - 0.485) / 0.229, (1 - 0.456) / 0.224, -0.406 / 0.225]
  np.testing.assert_allclose(means(path).apply(IMAGE)[0], expected, rtol=1e-5)
  symmetric = means(path, mean=[0.5], std=[0.5])
  np.testing.assert_allclose(symmetric.apply(IMAGE)[0], [-0.2, 1, -1], 1e-5)


def test_the_crop_is_the_centre_of_a_larger_image(tmp_path):
  path = save(tmp_path / 'm.onnx', ['n', 3, 'h', 'w'], MEANS)
  found = means(path, crop=0.5, mean=[0.0], std=[1.0])
  assert found.preprocessing.resized == 4
  large = np.pad(IMAGE, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=9)
  np.testing.assert_allclose(found.apply(large)[0], [0.4, 1, 0], 1e-5)


def test_a_file_with_a_fixed_batch_gets_padded_batches(tmp_path):
  path = save(tmp_path / 'm.onnx', [2, 3, 2, 2], MEANS)
  three = np.stack([IMAGE[0], IMAGE[0] // 2, IMAGE[0] // 3])
  found = means(path, mean=[0.0], std=[1 / 255]).apply(three)
  np.testing.assert_allclose(found, three.mean((1, 2)), rtol=1e-5)


def test_maps_of_either_layout_are_averaged_over_the_pixels(tmp_path):
  same = [('Identity', ['x'], ['y'])]
  for shape in (['n', 3, 2, 2], ['n', 2, 2, 3]):
    path = save(tmp_path / 'i.onnx', shape, same)
    found = means(path, mean=[0.0], std=[1.0]).apply(IMAGE)
    np.testing.assert_allclose(found, [[0.4, 1, 0]], rtol=1e-5)


def test_inputs_of_bytes_are_not_normalised(tmp_path):
  same = [('Identity', ['x'], ['y'])]
  path = save(tmp_path / 'i.onnx', ['n', 2, 2, 3], same, kind='UINT8')
  np.testing.assert_allclose(means(path).apply(IMAGE), [[102, 255, 0]])
  with pytest.raises(InputError, match='is not normalised'):
    means(path, mean=[0.5])


def test_grey_images_and_grey_networks_meet(tmp_path):
  colour = save(tmp_path / 'c.onnx', ['n', 3, 'h', 'w'], MEANS)
  grey = np.full((1, 2, 2, 1), 51, np.uint8)
  found = means(colour, mean=[0.0], std=[1.0]).apply(grey)
  np.testing.assert_allclose(found, [[0.2, 0.2, 0.2]], rtol=1e-5)
  one = save(tmp_path / 'g.onnx', ['n', 1, 'h', 'w'], MEANS)
  # Luma: 0.299 r + 0.587 g + 0.114 b, rounded to a byte.
  bytes_ = np.floor([0.299 * r + 0.587 * 255 + 0.5 for r in (0, 51, 102, 255)])
  found = means(one, mean=[0.0], std=[1.0]).apply(IMAGE)
  np.testing.assert_allclose(found, [[bytes_.mean() / 255]], rtol=1e-5)


def test_what_cannot_be_a_backbone_is_refused_in_one_line(tmp_path):
  file = tmp_path / 'x.onnx'
  two = [*MEANS, ('Identity', ['x'], ['z'])]
  save(file, ['n', 3, 'h', 'w'], two, ('y', 'z'))
  fixed = save(tmp_path / 'f.onnx', ['n', 3, 4, 4], MEANS)
  flat = save(tmp_path / 'l.onnx', ['n', 12], [('Identity', ['x'], ['y'])])
  oblong = save(tmp_path / 'o.onnx', ['n', 3, 4, 6], MEANS)
  several = save(
    tmp_path / 's.onnx',
    ['n', 3, 2, 2],
    [('Add', ['x', 'w'], ['y'])],
    inputs=('x', 'w'),
  )
  text = tmp_path / 't.onnx'
  text.write_text('no network')
  Asked = backbones.Asked
  for name, asked, said in (
    (tmp_path / 'none.onnx', Asked(), 'there is no such file'),
    ('mobilenet', Asked(), 'neither a file nor timm:NAME'),
    (tmp_path, Asked(), 'neither a file nor timm:NAME'),
    (text, Asked(), 'is no ONNX file'),
    (flat, Asked(), r'its input is tensor\(float\) \[.n., 12\]'),
    (oblong, Asked(), 'with H = W'),
    (several, Asked(), 'has the inputs x, w'),
    (file, Asked(), 'has the outputs y, z; give one'),
    (file, Asked(output='q'), 'output=q: .* has the outputs y, z'),
    (fixed, Asked(image_size=8), 'has the side 4'),
    (fixed, Asked(image_size=0), 'above 0'),
    (fixed, Asked(crop=2), 'above 0 and at most 1'),
    (fixed, Asked(mean=[1, 2]), 'has 2 numbers'),
    (fixed, Asked(std=[0.0]), 'numbers above 0'),
  ):
    with pytest.raises(InputError, match=said) as raised:
      backbones.load(str(name), asked)
    assert '\n' not in str(raised.value), name


def test_a_size_that_the_network_cannot_compute_is_named(tmp_path):
  # A convolution without padding: 3x3 pixels do not fit into 2x2.
  pool = [('MaxPool', ['x'], ['y'], ('kernel_shape', [3, 3]))]
  path = save(tmp_path / 'p.onnx', ['n', 3, 'h', 'w'], pool)
  with pytest.raises(InputError, match='has no output at 2x2 pixels'):
    means(path).apply(IMAGE)
  # Rows of 2 values are multiplied by the 4 sizes of the input.
  wrong = [
    ('Shape', ['x'], ['s']),
    ('Cast', ['s'], ['f'], ('to', 1)),
    ('Mul', ['x', 'f'], ['y']),
  ]
  path = save(tmp_path / 'w.onnx', ['n', 3, 'h', 'w'], wrong)
  with pytest.raises(InputError, match='cannot be computed at 2x2 pixels'):
    means(path).apply(IMAGE)


@pytest.mark.parametrize('name', ['onnxruntime', 'timm'])
def test_a_missing_library_is_named_with_its_command(
  tmp_path, monkeypatch, name
):
  monkeypatch.setitem(sys.modules, name, None)  # importing it fails
  path = save(tmp_path / 'm.onnx', ['n', 3, 'h', 'w'], MEANS)
  command = r"'ssljax\[embed\]'" if name == 'onnxruntime' else 'timm'
  with pytest.raises(InputError, match=f'pip install {command}'):
    backbones.load(path if name == 'onnxruntime' else 'timm:resnet18')


def test_a_model_of_timm_gets_the_preprocessing_that_timm_names(monkeypatch):
  """timm and PyTorch are replaced by the calls that are made of them."""
  made = []

  class Model:
    def __call__(self, x):
      return types.SimpleNamespace(
        cpu=lambda: types.SimpleNamespace(numpy=lambda: x.mean((2, 3)))
      )

    eval = to = lambda self, *_: self
    state_dict = dict

  def create_model(name, **how):
    made.append((name, how))
    return Model()

  class Inference:
    __enter__ = __exit__ = lambda *_: None

  timm = types.ModuleType('timm')
  timm.create_model = create_model
  own = {
    'input_size': (3, 2, 2),
    'crop_pct': 0.5,
    'mean': (0.0,),
    'std': (2.0,),
  }
  timm.data = types.SimpleNamespace(resolve_model_data_config=lambda _: own)
  torch = types.ModuleType('torch')
  torch.cuda = types.SimpleNamespace(is_available=lambda: False)
  torch.inference_mode = Inference
  torch.from_numpy = lambda x: types.SimpleNamespace(to=lambda _: x)
  monkeypatch.setitem(sys.modules, 'timm', timm)
  monkeypatch.setitem(sys.modules, 'torch', torch)
  found = backbones.load('timm:some')
  assert made == [('some', {'pretrained': True, 'num_classes': 0})]
  assert found.preprocessing.resized == 4
  large = np.pad(IMAGE, [(0, 0), (1, 1), (1, 1), (0, 0)])
  np.testing.assert_allclose(found.apply(large), [[0.2, 0.5, 0]], rtol=1e-5)
