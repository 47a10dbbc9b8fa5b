import jax
import numpy as np
import pytest

import ssljax
from ssljax import api
from ssljax.data import arrays
from ssljax.errors import InputError


@pytest.fixture(scope='module')
def digits():
  data = ssljax.load_data('digits').train
  return data.read(np.arange(200)), data.labels[:200]


def fit(digits, **settings):
  images, labels = digits
  return ssljax.fit(
    images, labels, method='supervised', progress=False, **settings
  )


def test_a_run_starts_from_the_evaluated_weights_of_another(digits, tmp_path):
  first = fit(digits, steps=5, average=0.5, workdir=tmp_path / 'a')
  # A learning rate of 1e-30 leaves the weights as they are.
  again = fit(
    digits,
    steps=2,
    learning_rate=1e-30,
    average=0.5,
    bn_momentum=first.config.network.bn_momentum,
    init_from=str(tmp_path / 'a'),
    seed=7,
  )
  for a, b in zip(
    jax.tree.leaves(first.weights[0]),
    jax.tree.leaves(again.weights[0]),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  other = fit(digits, steps=2, learning_rate=1e-30, seed=7)
  a, b = jax.tree.leaves(first.weights[0]), jax.tree.leaves(other.weights[0])
  assert any(np.abs(x - y).max() > 1e-3 for x, y in zip(a, b, strict=True))


def test_other_classes_and_networks_are_refused(digits, tmp_path):
  fit(digits, steps=2, network='mlp', workdir=tmp_path / 'a')
  images, labels = digits
  source = dict(init_from=str(tmp_path / 'a'), steps=2)
  with pytest.raises(InputError, match='this one linear for'):
    fit(digits, network='linear', **source)
  with pytest.raises(InputError, match=r'run has the classes 0, 1, .*9, these'):
    fit((images, labels % 5), network='mlp', **source)
  with pytest.raises(InputError, match=r'^init_from=.*: holds no model and'):
    fit(digits, steps=2, init_from=str(tmp_path))


def test_without_a_source_the_network_is_the_given_one(digits):
  dataset = arrays.from_arrays(*digits)
  config = fit(digits, steps=1).config
  assert api.warm_network(config, dataset) is None
  net = object()
  assert api.warm_network(config, dataset, net) is net
