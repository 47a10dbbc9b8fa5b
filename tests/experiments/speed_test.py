import importlib.util
import math

import jax
import jax.numpy as jnp
import PIL.Image
import pytest

from ssljax.core import BatchSpec
from ssljax.experiments.benchmarks import (
  consistency_speed,
  folder_speed,
  torch_steps,
)
from ssljax.networks import network, small, wide_resnet


def test_without_pytorch_our_parts_are_measured_alone(monkeypatch, capsys):
  called = []
  for name in ('show_step', 'show_pairs', 'show_overheads'):
    call = lambda *arguments, name=name: called.append((name, *arguments))
    monkeypatch.setattr(consistency_speed, name, call)
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, *more: None if name == 'torch' else find(name, *more),
  )
  consistency_speed.part_consistency(2)
  assert called == [
    ('show_step', 2, False),
    ('show_pairs', 2, False),
    ('show_overheads', 2),
  ]
  assert 'PyTorch is left out: it is not installed' in capsys.readouterr().out


def test_pytorch_trains_the_same_network():
  pytest.importorskip('torch')
  theirs = torch_steps.wide_resnet()
  net = wide_resnet.wide_resnet(10)
  image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  params, stats = jax.eval_shape(net.init, jax.random.key(0), image)
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  assert sum(p.numel() for p in theirs.parameters()) == count(params) == 1467610
  # Running means and variances; ours may also count the updates.
  running = [b.numel() for b in theirs.buffers() if b.is_floating_point()]
  assert sum(running) <= count(stats) <= sum(running) + len(running)


def test_the_images_of_every_pass_are_counted():
  net = small.small(3, widths=(2,), embedding=2)
  counting, passes = consistency_speed.counted(net)
  assert isinstance(counting, network.Network)
  image = lambda count: jax.ShapeDtypeStruct((count, 8, 8, 1), jnp.float32)
  key = jax.random.key(0)
  params, stats = jax.eval_shape(counting.init, key, image(2))
  jax.eval_shape(counting.train, params, stats, image(6), key)
  jax.eval_shape(counting.train, params, stats, image(4), key)
  jax.eval_shape(counting.infer, params, stats, image(5))
  assert passes.trained == [6, 4] and passes.inferred == [5]


@pytest.mark.parametrize('name', consistency_speed.METHODS)
def test_the_measured_methods_do_not_augment_their_strong_views(name):
  net = small.small(3, widths=(2,), embedding=2)
  method = consistency_speed.without_augmentation(name, net, BatchSpec(4, 8))
  views = [view for stage in method.stages for view in stage.views]
  assert all(v.augment is None and v.on_pixels is None for v in views)


@pytest.mark.slow
def test_a_folder_and_predictions_are_measured(monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(folder_speed, '_NETWORK', 'mlp')  # compiles quickly

  def memory(files):  # in this process: another one takes long to start
    image = PIL.Image.new('RGB', (32, 32))
    for row in range(files):
      image.save(tmp_path / f'{row}.png')
    folder_speed.print_peak(str(tmp_path), 2)
    return {2 * files: 1.0}

  monkeypatch.setattr(folder_speed, '_memory', memory)
  folder_speed.part_folder(1, count=4, predicted=8, files=3)
  shown = capsys.readouterr().out
  assert shown.count('ratio: ') == 2 and '  6 images ' in shown
