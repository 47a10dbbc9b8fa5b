"""Layers that several networks share."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax.networks import layers


class Dropped(nn.Module):
  """Dropout of a third, by the library's function or by linen's layer."""

  train: bool
  is_linen: bool

  @nn.compact
  def __call__(self, x):
    if self.is_linen:
      shared = () if self.train else (0,)
      return nn.Dropout(1 / 3, shared, deterministic=False)(x)
    return layers.dropout(x, 1 / 3, train=self.train, active=True)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('shape', [(6, 4, 4, 5), (6, 40)])
def test_dropout_has_the_bits_of_linens_layer(train, shape):
  x = jnp.arange(1, 1 + np.prod(shape), dtype=jnp.float32).reshape(shape)
  keys = {'dropout': jax.random.key(3)}
  ours, theirs = (
    np.asarray(Dropped(train, is_linen).apply({}, x, rngs=keys))
    for is_linen in (False, True)
  )
  np.testing.assert_array_equal(ours, theirs)
  dropped = ours == 0
  assert dropped.any() and not dropped.all()
  # One mask for all images, unless the network is in training.
  assert (dropped == dropped[:1]).all() == (not train)
