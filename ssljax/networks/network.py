"""What the methods know of a network: four pure functions."""

from collections.abc import Callable
from typing import NamedTuple

from flax import linen as nn
import jax

from ssljax.errors import require


class Outputs(NamedTuple):
  """What a network says about a batch of B images."""

  logits: jax.Array  # [B, C]
  embedding: jax.Array  # [B, D], what methods compare
  feature: jax.Array | None = None  # [B, F] before both; None: the embedding


class Network(NamedTuple):
  """A network as pure functions of (params, stats)."""

  init: Callable  # (key, image [B, H, W, c]) -> params, stats
  train: Callable  # (params, stats, image, key) -> Outputs, stats
  infer: Callable  # (params, stats, image) -> Outputs
  sample: Callable  # (params, stats, image, key) -> Outputs, see layers.dropout
  smallest: int  # the least H and W it accepts


def from_linen(module: nn.Module, smallest: int = 1) -> Network:
  """The interface of a linen module.

  Args:
    module: called as `module(image, train=bool, dropout=bool) -> Outputs`:
      `train` normalises by the batch's statistics and updates the running
      ones in the collection 'batch_stats', `dropout` drops with the stream
      'dropout'.
    smallest: the least height and width of an image it accepts.
  """

  def init(key, image):
    side = min(image.shape[1:3])
    require(
      side >= smallest,
      f'`network`: {type(module).__name__} needs images of at least '
      f'{smallest}x{smallest} pixels, these are {side}: choose a smaller '
      'network, or enlarge them with `image_size`',
    )
    variables = module.init(key, image, train=True, dropout=False)
    return variables['params'], variables.get('batch_stats', {})

  def train(params, stats, image, key):
    outputs, updated = module.apply(
      {'params': params, 'batch_stats': stats},
      image,
      train=True,
      dropout=True,
      rngs={'dropout': key},
      mutable=['batch_stats'],
    )
    return outputs, updated.get('batch_stats', {})

  def infer(params, stats, image):
    variables = {'params': params, 'batch_stats': stats}
    return module.apply(variables, image, train=False, dropout=False)

  def sample(params, stats, image, key):
    variables = {'params': params, 'batch_stats': stats}
    return module.apply(
      variables, image, train=False, dropout=True, rngs={'dropout': key}
    )

  return Network(init, train, infer, sample, smallest)
