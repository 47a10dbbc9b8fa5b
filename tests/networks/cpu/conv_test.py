"""Convolution and pooling against XLA's own, in value and in gradients."""

import functools

import chex
from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from ssljax.distributed import placement
from ssljax.networks.cpu import conv, winograd
from ssljax.planning import collectives

LAYOUT = ('NHWC', 'HWIO', 'NHWC')
EXPLICIT = ((2, 1), (0, 3))


def normal(seed, shape, dtype=jnp.float32):
  """[*shape] standard normal."""
  values = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(values, dtype)


def value_and_gradients(f, *args):
  """Output of f and, for a fixed slope of it, the gradient of each argument."""
  y, back = jax.vjp(f, *args)
  return (y, *back(normal(9, y.shape, y.dtype)))


def ours_and_native(strides=(1, 1), padding='SAME', **kwargs):
  """The same convolution twice, as functions of (lhs, rhs)."""
  return [
    functools.partial(
      f,
      window_strides=strides,
      padding=padding,
      dimension_numbers=LAYOUT,
      **kwargs,
    )
    for f in (conv.conv_general_dilated, lax.conv_general_dilated)
  ]


def assert_same(f, g, *args, atol=1e-4, rtol=1e-4):
  """Two functions agree in value and in gradients."""
  chex.assert_trees_all_close(
    jax.jit(functools.partial(value_and_gradients, f))(*args),
    jax.jit(functools.partial(value_and_gradients, g))(*args),
    atol=atol,
    rtol=rtol,
  )


@pytest.mark.parametrize('stride', (1, 2))
@pytest.mark.parametrize('padding', ('SAME', 'VALID', EXPLICIT))
@pytest.mark.parametrize('size', (1, 3, 5, 7))
def test_convolution_equals_lax_in_value_and_gradients(size, padding, stride):
  x, w = normal(0, (4, 9, 8, 3)), normal(1, (size, size, 3, 2))
  assert_same(*ours_and_native((stride, stride), padding), x, w)


def test_windows_and_strides_need_not_be_square():
  x, w = normal(0, (2, 9, 7, 3)), normal(1, (2, 3, 3, 2))
  assert_same(*ours_and_native((1, 2), 'SAME_LOWER'), x, w)


def test_several_chunks_add_up(monkeypatch):
  monkeypatch.setattr(conv, '_CHUNK_BYTES', 1)
  x, w = normal(0, (6, 5, 5, 3)), normal(1, (3, 3, 3, 2))
  assert_same(*ours_and_native(), x, w)


def test_chunks_divide_the_batch_and_fit():
  # A pixel's patch has 100 bytes, an image's 5·5·100 = 2,500 of 4 MiB: 1,677
  # images would fit, and the largest divisor of 3,000 below that is 1,500.
  g = jax.ShapeDtypeStruct((3000, 5, 5, 2), jnp.float32)
  assert conv._images_per_chunk(g, 100) == 1500
  # Patches of one image larger than a chunk: one image at a time.
  assert conv._images_per_chunk(g, 1 << 30) == 1


def test_bfloat16_keeps_its_type_and_agrees_to_its_rounding():
  x, w = normal(0, (4, 5, 5, 3)), normal(1, (3, 3, 3, 2))
  x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
  ours, native = ours_and_native()
  got = value_and_gradients(ours, x, w)
  chex.assert_type(list(got), jnp.bfloat16)
  # 8 bits of mantissa, and sums of up to 100 terms of size one.
  as_float = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
  chex.assert_trees_all_close(
    as_float(got),
    as_float(value_and_gradients(native, x, w)),
    atol=0.1,
    rtol=0.05,
  )


def test_seeds_along_a_mapped_axis_are_separate_convolutions():
  x, w = normal(0, (3, 4, 5, 5, 2)), normal(1, (3, 3, 3, 2, 2))
  ours, native = ours_and_native()
  apart = [value_and_gradients(native, x[i], w[i]) for i in range(3)]
  together = jax.vmap(functools.partial(value_and_gradients, ours))
  # The slope is drawn inside the map: the same for every seed.
  chex.assert_trees_all_close(
    jax.jit(together)(x, w),
    jax.tree.map(lambda *a: jnp.stack(a), *apart),
    atol=1e-4,
  )


def test_gradients_pass_through_checkpoint_and_scan():
  x, w = normal(0, (2, 5, 5, 2)), normal(1, (2, 3, 3, 2, 2))

  def layers(f, x, w):
    step = jax.checkpoint(lambda x, w: (jnp.tanh(f(x, w)), None))
    return lax.scan(step, x, w)[0]

  ours, native = ours_and_native()
  assert_same(
    functools.partial(layers, ours), functools.partial(layers, native), x, w
  )


def test_a_batch_split_over_devices_gives_the_whole_batch_s_gradients():
  mesh = jax.make_mesh((8,), ('data',))
  split, whole = NamedSharding(mesh, P('data')), NamedSharding(mesh, P())
  ours, native = ours_and_native()
  x, w = normal(0, (16, 5, 5, 3)), normal(1, (3, 3, 3, 2))

  f = jax.jit(
    functools.partial(
      value_and_gradients,
      lambda x, w: conv.max_pool(ours(x, w), 2, 2),
    ),
    in_shardings=(split, whole),
    out_shardings=(split, split, whole),
  )
  expected = value_and_gradients(
    lambda x, w: nn.max_pool(native(x, w), (2, 2), (2, 2)), x, w
  )
  chex.assert_trees_all_close(f(x, w), expected, atol=1e-4, rtol=1e-4)


def ours_by_winograd(monkeypatch):
  """Use Winograd's algorithm for narrow layers and few tiles too.

  Returns a list that grows by the decision on each layer that is traced.
  """
  decisions = []

  def suits(x, w, strides, pads):
    plain = strides == (1, 1) and min(map(min, pads)) >= 0
    decisions.append(w.shape[:2] == (3, 3) and plain)
    return decisions[-1]

  monkeypatch.setattr(winograd, 'suits', suits)
  return decisions


@pytest.mark.parametrize(
  'height, width, padding',
  ((8, 8, 'VALID'), (7, 4, 'SAME'), (3, 5, EXPLICIT), (4, 3, ((2, 1), (1, 2)))),
)
def test_winograd_equals_lax_in_value_and_gradients(
  height, width, padding, monkeypatch
):
  accepted = ours_by_winograd(monkeypatch)
  x, w = normal(0, (4, height, width, 3)), normal(1, (3, 3, 3, 2))
  assert_same(*ours_and_native((1, 1), padding), x, w)
  assert any(accepted)


def test_winograd_adds_up_over_chunks(monkeypatch):
  accepted = ours_by_winograd(monkeypatch)
  monkeypatch.setattr(winograd, '_CHUNK_BYTES', 1)
  x, w = normal(0, (6, 5, 5, 3)), normal(1, (3, 3, 3, 2))
  assert_same(*ours_and_native(), x, w)
  assert any(accepted)


def test_winograd_s_chunks_fit_in_their_bytes():
  # 5x5 tiles of 4x4 floats in 3 + 2 channels: 25·16·5·4 = 8,000 bytes an image
  # of 16 MiB. 2,097 fit, and the largest divisor of 3,000 below is 1,500.
  assert winograd._images_at_once(3000, (5, 5), (3, 2)) == 1500


WIDE = (8, 8, 8, 128)  # images, 8·4·4 = 128 tiles of them


def test_only_wide_float32_layers_of_stride_one_are_winograd_s():
  x, w = jnp.zeros(WIDE), jnp.zeros((3, 3, 128, 128))
  one, same = (1, 1), ((1, 1), (1, 1))
  assert winograd.suits(x, w, one, same)
  assert not winograd.suits(x, w, (2, 2), same)
  assert not winograd.suits(x, w[:, :, :, :127], one, same)
  assert not winograd.suits(x, w[:2], one, same)
  assert not winograd.suits(x, w, one, ((-1, 1), (1, 1)))
  assert not winograd.suits(x[:7], w, one, same)
  half = jnp.bfloat16
  assert not winograd.suits(x.astype(half), w.astype(half), one, same)
  # One output needs 9 multiplications of its own, of a tile 16.
  assert not winograd.suits(jnp.zeros((128, 3, 3, 128)), w, one, ((0, 0),) * 2)


def test_winograd_is_as_exact_as_lax():
  # Positive images, as behind a ReLU, and kernels of unit gain.
  x = jax.nn.relu(normal(0, (16, 8, 8, 128)))
  w = normal(1, (3, 3, 128, 128)) / (9 * 128) ** 0.5
  slope = normal(2, x.shape)
  ours, native = (
    jax.jit(lambda x, w, g, f=f: (f(x, w), *jax.vjp(f, x, w)[1](g)))
    for f in ours_and_native()
  )
  with jax.enable_x64(True):
    exact = native(*(np.asarray(a, np.float64) for a in (x, w, slope)))
    exact = [np.asarray(a) for a in exact]
  rms = lambda a: np.sqrt(np.mean(np.square(a, dtype=np.float64)))
  args = (x, w, slope)
  for y, z, c in zip(ours(*args), native(*args), exact, strict=True):
    assert c.dtype == np.float64
    assert rms(y - c) < 3 * rms(z - c)
    assert rms(y - c) < 1e-6 * rms(c)


def test_winograd_is_mapped_over_seeds(monkeypatch):
  accepted = ours_by_winograd(monkeypatch)
  test_seeds_along_a_mapped_axis_are_separate_convolutions()
  assert any(accepted)


def test_winograd_passes_through_checkpoint_and_scan(monkeypatch):
  accepted = ours_by_winograd(monkeypatch)
  test_gradients_pass_through_checkpoint_and_scan()
  assert any(accepted)


@pytest.mark.parametrize('by_winograd', [False, True])
def test_devices_exchange_the_kernels_gradient_once(monkeypatch, by_winograd):
  # In several chunks: 4 images of each of 4 devices, one at a time. Exchanges
  # within the loop would not be ordered with those around it.
  if by_winograd:
    ours_by_winograd(monkeypatch)
  monkeypatch.setattr(conv, '_CHUNK_BYTES', 1)
  monkeypatch.setattr(winograd, '_CHUNK_BYTES', 1)
  mesh = placement.make_mesh([16], 4)
  split, whole = NamedSharding(mesh, P('data')), NamedSharding(mesh, P())
  ours, native = ours_and_native()
  x, w = normal(0, (16, 6, 6, 3)), normal(1, (3, 3, 3, 2))
  f = functools.partial(value_and_gradients, ours)
  f = jax.jit(
    placement.on_mesh(f, mesh),
    in_shardings=(split, whole),
    out_shardings=(split, split, whole),
  )
  compiled = f.lower(x, w).compile()
  moved = collectives.find_collectives(compiled.as_text())
  assert [(e.kind, e.times) for e in moved] == [('all-reduce', 1)]
  forward = jax.jit(
    placement.on_mesh(ours, mesh),
    in_shardings=(split, whole),
    out_shardings=split,
  )
  text = forward.lower(x, w).compile().as_text()
  assert not collectives.find_collectives(text)
  chex.assert_trees_all_close(
    f(x, w), value_and_gradients(native, x, w), atol=1e-4, rtol=1e-4
  )


def test_winograd_of_a_batch_split_over_devices(monkeypatch):
  accepted = ours_by_winograd(monkeypatch)
  test_a_batch_split_over_devices_gives_the_whole_batch_s_gradients()
  assert any(accepted)


def test_winograd_is_for_cpus_alone():
  ours, _ = ours_and_native()
  f = lambda x, w: jax.vjp(ours, x, w)[1](x)
  traced = jax.jit(f).trace(jnp.zeros(WIDE), jnp.zeros((3, 3, 128, 128)))
  cpu, cuda = (
    traced.lower(lowering_platforms=(platform,)).as_text()
    for platform in ('cpu', 'cuda')
  )
  assert 'stablehlo.while' in cpu and 'stablehlo.convolution' not in cpu
  assert 'stablehlo.while' not in cuda
  assert cuda.count('stablehlo.convolution') == 2


def test_linen_accepts_it():
  layer = functools.partial(nn.Conv, 2, (3, 3), strides=2, use_bias=False)
  x = normal(0, (2, 7, 7, 3))
  native, ours = layer(), layer(conv_general_dilated=conv.conv_general_dilated)
  params = native.init(jax.random.key(0), x)
  chex.assert_trees_all_close(
    ours.apply(params, x), native.apply(params, x), atol=1e-5
  )


@pytest.mark.parametrize(
  'kernel, kwargs',
  (
    ((3, 3, 4, 4), dict(rhs_dilation=(2, 2))),
    ((3, 3, 4, 4), dict(lhs_dilation=(2, 1), padding=EXPLICIT)),
    ((3, 3, 2, 4), dict(feature_group_count=2)),
    ((3, 3, 4, 4), dict(padding=((-1, 0), (0, 0)))),
    ((3, 3, 4, 4), dict(preferred_element_type=jnp.float32)),
  ),
)
def test_other_convolutions_are_lax_s_own(kernel, kwargs):
  ours, native = ours_and_native(**kwargs)
  x, w = normal(0, (2, 7, 7, 4)), normal(1, kernel)
  assert str(jax.make_jaxpr(ours)(x, w)) == str(jax.make_jaxpr(native)(x, w))


def test_integers_and_other_layouts_are_lax_s_own():
  ours, native = ours_and_native()
  x, w = jnp.ones((1, 4, 4, 1), jnp.int8), jnp.ones((3, 3, 1, 1), jnp.int8)
  chex.assert_trees_all_equal(ours(x, w), native(x, w))
  x, w = normal(0, (2, 3, 5, 5)), normal(1, (4, 3, 3, 3))
  chex.assert_trees_all_equal(
    conv.conv_general_dilated(x, w, (1, 1), 'SAME'),
    lax.conv_general_dilated(x, w, (1, 1), 'SAME'),
  )


def step_text(platform, wanted):
  """A program that takes one gradient, as lowered for a platform."""
  ours, _ = ours_and_native()
  f = lambda x, w: jnp.sum(jnp.tanh(conv.max_pool(ours(x, w), 2, 2)))
  traced = jax.jit(jax.grad(f, wanted)).trace(
    normal(0, (4, 6, 6, 2)), normal(1, (3, 3, 2, 2))
  )
  return traced.lower(lowering_platforms=(platform,)).as_text()


def test_native_makes_cpu_programs_use_xla_s_own_operations():
  with conv.native():
    text = step_text('cpu', 1)
    assert conv.compiler_options() == {}
  assert 'stablehlo.while' not in text
  assert 'stablehlo.select_and_scatter' in text
  assert 'stablehlo.select_and_scatter' not in step_text('cpu', 1)


def test_compiler_options_are_accepted_and_change_no_gradient():
  ours, native = ours_and_native()
  x, w = normal(0, (2, 5, 5, 32)), normal(1, (3, 3, 32, 32))
  f = jax.jit(
    functools.partial(value_and_gradients, ours),
    compiler_options=conv.compiler_options(),
  )
  expected = value_and_gradients(native, x, w)
  chex.assert_trees_all_close(f(x, w), expected, atol=1e-3, rtol=1e-3)


def test_an_option_that_this_xla_lacks_is_left_out(monkeypatch):
  def refuse(*args, **kwargs):
    raise jax.errors.JaxRuntimeError('No such compile option')

  monkeypatch.setattr(jax, 'jit', refuse)
  assert conv._cpu_options.__wrapped__() == {}


@pytest.mark.parametrize('platform', ('cuda', 'tpu'))
def test_accelerators_keep_their_own_operations(platform):
  text = step_text(platform, 1)
  assert 'select_and_scatter' in text and 'stablehlo.while' not in text
  # Forward, and the kernel's gradient.
  assert text.count('stablehlo.convolution') == 2


def test_cpus_have_neither_the_slow_gradient_nor_the_unused_one():
  text = step_text('cpu', 1)
  assert 'select_and_scatter' not in text and 'stablehlo.while' in text
  assert text.count('stablehlo.convolution') == 1


@pytest.mark.parametrize('levels', (3, 10**6), ids=('ties', 'no ties'))
@pytest.mark.parametrize('padding', ('SAME', 'VALID', ((1, 0), (0, 2))))
@pytest.mark.parametrize('window, strides', ((2, 2), ((3, 2), (3, 2)), (3, 2)))
def test_pooling_equals_flax_exactly(window, strides, padding, levels):
  # Few levels make ties: the first maximum, row by row, has the gradient.
  x = np.random.default_rng(0).integers(0, levels, (2, 8, 7, 3))
  x = jnp.asarray(x, jnp.float32)
  pair = lambda n: (n, n) if isinstance(n, int) else n
  native = lambda x: nn.max_pool(x, pair(window), pair(strides), padding)
  ours = lambda x: conv.max_pool(x, window, strides, padding)
  chex.assert_trees_all_equal(
    value_and_gradients(ours, x), value_and_gradients(native, x)
  )
  with conv.native(windows=False):  # for ONNX; a maximum of slices
    chex.assert_trees_all_equal(ours(x), native(x))


def test_the_first_of_equal_maxima_has_the_gradient():
  # One window [[1, 2], [2, 0]]: its maximum 2 is met first at (0, 1).
  x = jnp.array([[1.0, 2.0], [2.0, 0.0]]).reshape(1, 2, 2, 1)
  dx = jax.grad(lambda x: conv.max_pool(x, 2, 2).sum())(x)
  chex.assert_trees_all_equal(dx[0, :, :, 0], jnp.array([[0.0, 1], [0, 0]]))


def test_pooling_is_mapped_over_seeds_and_keeps_bfloat16():
  x = normal(0, (3, 2, 4, 4, 2), jnp.bfloat16)
  pool = lambda x: conv.max_pool(x, 2, 2)
  together = jax.vmap(functools.partial(value_and_gradients, pool))(x)
  apart = [value_and_gradients(pool, x[i]) for i in range(3)]
  chex.assert_type(list(together), jnp.bfloat16)
  chex.assert_trees_all_equal(
    together, jax.tree.map(lambda *a: jnp.stack(a), *apart)
  )
