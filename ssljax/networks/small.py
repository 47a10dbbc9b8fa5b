"""Small networks for grey digits: seconds on a laptop core."""

from flax import linen as nn
import jax.numpy as jnp

from ssljax.networks import layers, network
from ssljax.networks.cpu import conv


class Small(nn.Module):
  """Per width: two 3×3 blocks, pool, drop; then a VALID block and the mean."""

  classes: int
  widths: tuple[int, ...]
  embedding: int
  head: int | None
  momentum: float
  dropout: float

  @nn.compact
  def __call__(self, image, *, train: bool, dropout: bool):
    """Maps images `[B, H, W, c]` to `Outputs`.

    D is `head`, or without one `embedding`, the numbers of the mean.
    """
    x = image
    block = lambda width, padding='SAME': layers.ConvBlock(
      width, padding=padding, momentum=self.momentum
    )
    for width in self.widths:
      x = block(width)(x, train=train)
      x = block(width)(x, train=train)
      x = conv.max_pool(x, 2, 2, 'SAME')
      x = layers.dropout(x, self.dropout, train=train, active=dropout)
    x = block(self.embedding, 'VALID')(x, train=train)
    pooled = jnp.mean(x, (1, 2))
    init = nn.initializers.normal(0.05)
    logits = nn.Dense(self.classes, kernel_init=init)(pooled)
    if self.head is None:
      return network.Outputs(logits, pooled)
    return network.Outputs(logits, nn.Dense(self.head)(pooled), pooled)


def small(
  classes: int,
  *,
  widths: tuple[int, ...] = (32, 64),
  embedding: int = 128,
  head: int | None = None,
  momentum: float = 0.99,
  dropout: float = 0.5,
) -> network.Network:
  """A small network; every width halves the image once.

  The defaults suit MNIST; `widths=(32,), embedding=64` suits 8×8 digits. The
  mean is of leaky ReLUs, so that all images lie to one side: a linear layer
  beside the classifier, with `head` numbers, lets them point in all directions,
  as LLP's ResNets have it.
  """
  # The last block is a VALID 3×3: 3 pixels must be left after the poolings.
  smallest = 2 ** (len(widths) + 1) + 1
  module = Small(classes, widths, embedding, head, momentum, dropout)
  return network.from_linen(module, smallest)
