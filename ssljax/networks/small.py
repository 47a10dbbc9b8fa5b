"""Small networks for grey digits, which train in seconds on a laptop."""

from flax import linen as nn

from ssljax.networks import layers, network
from ssljax.networks.cpu import conv


class Small(nn.Module):
  """Two 3×3 blocks, a pool and dropout for each width; a block and the mean.

  The last block is not padded.
  """

  classes: int
  widths: tuple[int, ...]
  embedding: int
  head: int | None
  momentum: float
  dropout: float

  @nn.compact
  def __call__(self, image, *, train: bool, dropout: bool):
    """Map images `[B, H, W, c]` to `Outputs`.

    D is `head`; if that is None, the embedding is the mean, D = embedding.
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
    pooled = layers.pooled_mean(x)
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
  """Return a small network.

  The defaults suit MNIST; `widths=(32,), embedding=64` suits 8×8 digits.

  Args:
    classes: C.
    widths: channels; the image is halved after each.
    embedding: channels of the last block, whose mean over pixels is the
      embedding unless there is a `head`.
    head: D of a linear embedding beside the classifier, as in LLP's ResNets.
      The mean is of leaky ReLUs and nearly positive, so that all images point
      in similar directions; a linear embedding can point in all directions.
    momentum: of the running averages.
    dropout: the rate after each pool.
  """
  # The last block is an unpadded 3×3: 3 pixels must be left after the pools.
  smallest = 2 ** (len(widths) + 1) + 1
  module = Small(classes, widths, embedding, head, momentum, dropout)
  return network.from_linen(module, smallest)
