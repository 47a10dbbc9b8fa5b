"""Networks that compute in bfloat16."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax import config as config_lib
from ssljax import registry
from ssljax.distributed import placement
from ssljax.errors import InputError
from ssljax.networks import network
from ssljax.runs import build


def products(jaxpr) -> list[str]:
  """Return the dtypes of all matrix products and convolutions, in order."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name in ('dot_general', 'conv_general_dilated'):
      found.append(str(equation.invars[0].aval.dtype))
    for value in equation.params.values():
      inner = value if isinstance(value, list | tuple) else [value]
      for part in inner:
        part = getattr(part, 'jaxpr', part)
        if hasattr(part, 'eqns'):
          found += products(part)
  return found


def side_of(name: str) -> int:
  return {'mlp': 1, 'linear': 1, 'deepbass_toy': 1}.get(
    name, max(32, registry.NETWORKS[name](3).smallest)
  )


@pytest.mark.parametrize('name', registry.NETWORKS)
def test_layers_are_bfloat16_and_what_is_kept_float32(name):
  net = network.computing_in(registry.NETWORKS[name](3), 'bfloat16')
  side, key = side_of(name), jax.random.key(0)
  shape = (4, 1, 20, 1) if side == 1 else (4, side, side, 3)
  image = jax.ShapeDtypeStruct(shape, jnp.float32)
  params, stats = jax.eval_shape(net.init, key, image)

  def loss(params, stats, image):
    outputs, updated = net.train(params, stats, image, key)
    return outputs.logits.sum() + outputs.embedding.sum(), (outputs, updated)

  gradient = jax.grad(loss, has_aux=True)
  kept = (params, stats, jax.eval_shape(gradient, params, stats, image))
  kinds = {leaf.dtype.name for leaf in jax.tree.leaves(kept)}
  assert kinds == {'float32'}, name

  infer = jax.make_jaxpr(net.infer)(params, stats, image)
  dtypes = products(infer.jaxpr)
  narrow = dtypes.count('bfloat16')
  assert dtypes == ['bfloat16'] * narrow + ['float32'] * (len(dtypes) - narrow)
  heads = len(dtypes) - narrow
  assert 1 <= heads <= 3, dtypes
  assert narrow or name in ('linear', 'linear_probe')


def test_bfloat16_changes_the_outputs_by_its_rounding_alone():
  own = registry.NETWORKS['digits_heads'](3)
  image = np.random.default_rng(0).uniform(size=(16, 8, 8, 1))
  image = image.astype(np.float32)
  params, stats = jax.jit(own.init)(jax.random.key(0), image)
  apply = lambda net: jax.jit(net.train)(
    params, stats, image, jax.random.key(1)
  )
  exact, exact_stats = apply(own)
  rounded, rounded_stats = apply(network.computing_in(own, 'bfloat16'))
  same, _ = apply(network.computing_in(own, 'float32'))
  np.testing.assert_array_equal(same.logits, exact.logits)
  difference = np.abs(rounded.embedding - exact.embedding).max()
  assert 0 < difference < 0.05 * np.abs(exact.embedding).max()  # 2^-8 a layer
  for one, other in zip(
    jax.tree.leaves(rounded_stats), jax.tree.leaves(exact_stats), strict=True
  ):
    np.testing.assert_allclose(one, other, rtol=0.05, atol=1e-3)


def test_small_updates_are_not_lost_as_parameters_are_float32():
  own = registry.NETWORKS['linear'](3)
  net = network.computing_in(own, 'bfloat16')
  image = np.ones((2, 1, 4, 1), np.float32)
  params, stats = net.init(jax.random.key(0), image)
  kernel = params['Dense_1']['kernel']
  # 1e-4 of a weight is below bfloat16's resolution of 2^-8.
  params['Dense_1']['kernel'] = kernel * np.float32(1 + 1e-4)
  moved = net.infer(params, stats, image).logits
  params['Dense_1']['kernel'] = kernel
  assert not np.array_equal(moved, net.infer(params, stats, image).logits)


@pytest.mark.parametrize(
  ('platform', 'capability', 'expected'),
  [
    ('cpu', None, 'float32'),
    ('tpu', None, 'bfloat16'),
    ('gpu', '9.0', 'bfloat16'),
    ('gpu', '8.0', 'bfloat16'),
    ('gpu', '10.0', 'bfloat16'),
    ('gpu', '7.5', 'float32'),
    ('gpu', 'gfx90a', 'bfloat16'),
  ],
)
def test_the_default_is_the_dtype_the_devices_are_fast_in(
  platform, capability, expected, monkeypatch
):
  device = types.SimpleNamespace(
    platform=platform, compute_capability=capability
  )
  monkeypatch.setattr(placement.jax, 'devices', lambda: [device])
  assert placement.compute_dtype() == expected


def test_a_run_records_the_dtype_and_refuses_to_change_it():
  given = {'steps': 3, 'network': 'digits', 'dataset': 'digits'}
  asked = config_lib.from_values('supervised', given)
  assert build.with_compute_dtype(asked).network.compute_dtype == 'float32'
  other = config_lib.from_values(
    'supervised', given | {'compute_dtype': 'bfloat16'}
  )
  built = build.with_compute_dtype(other)
  assert '--compute_dtype=bfloat16' in config_lib.to_flags(built)
  here = build.with_compute_dtype(asked)
  assert config_lib.differences(built, here) == [
    '`compute_dtype`=bfloat16 there, `compute_dtype`=float32 here'
  ]
  # The device has not decided yet.
  assert not config_lib.differences(built, asked)


def test_records_without_a_dtype_are_of_float32():
  config = config_lib.from_values('supervised', {'steps': 3})
  tree = config_lib.to_json(config)
  del tree['network']['compute_dtype']
  assert config_lib.from_json(tree).network.compute_dtype == 'float32'


def test_a_network_of_the_user_decides_itself():
  given = {'steps': 3, 'compute_dtype': 'bfloat16'}
  config = config_lib.from_values('supervised', given, ['net: Mine'])
  with pytest.raises(InputError, match=r'compute_dtype=bfloat16.*own network'):
    build.with_compute_dtype(config)
