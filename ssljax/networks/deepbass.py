"""The networks of DeepBASS: 14,970 parameters for MNIST, and for the plane.

Rottmann, Kahl, Gottschalk 2018 (arXiv:1803.01216), sections 4 and 5, with what
their code adds: Glorot-uniform weights, biases of 0, pooling without padding.
Dropout follows every layer but the last, so that passes with it differ
(`acquisition.sampler`). The embedding is the last layer's input.

Departures: the authors hand one seeded initialiser to all layers, so that
those of one shape start alike; here each has a key of its own, as everywhere.
They divide pixels by 256, we by 255.
"""

from flax import linen as nn

from ssljax import errors
from ssljax.networks import layers, network
from ssljax.networks.cpu import conv

_INIT = nn.initializers.glorot_uniform()


class DeepBass(nn.Module):
  """Per width: two 3×3 blocks and a pool; then the classifier."""

  classes: int
  widths: tuple[int, ...]
  dropout: float

  @nn.compact
  def __call__(self, image, *, train: bool, dropout: bool):
    """Maps images `[B, H, W, c]` to `Outputs`; D is 784 of 28×28 pixels."""
    x = image
    for width in self.widths:
      for _ in range(2):
        x = nn.Conv(
          width,
          (3, 3),
          kernel_init=_INIT,
          conv_general_dilated=conv.conv_general_dilated,
        )(x)
        x = layers.leaky_relu(x)
        x = layers.dropout(x, self.dropout, train=train, active=dropout)
      x = conv.max_pool(x, 2, 2)
    x = x.reshape(len(x), -1)
    return network.Outputs(nn.Dense(self.classes, kernel_init=_INIT)(x), x)


class Perceptron(nn.Module):
  """Per width a fully connected block; then the classifier."""

  classes: int
  widths: tuple[int, ...]
  dropout: float

  @nn.compact
  def __call__(self, image, *, train: bool, dropout: bool):
    """Maps images `[B, H, W, c]` to `Outputs` with D the last width."""
    x = image.reshape(len(image), -1)
    for width in self.widths:
      x = layers.leaky_relu(nn.Dense(width, kernel_init=_INIT)(x))
      x = layers.dropout(x, self.dropout, train=train, active=dropout)
    return network.Outputs(nn.Dense(self.classes, kernel_init=_INIT)(x), x)


def deepbass(
  classes: int,
  *,
  widths: tuple[int, ...] = (16, 16),
  dropout: float = 0.33,
) -> network.Network:
  """The paper's network for MNIST, section 5.

  Args:
    classes: C.
    widths: channels; every width halves the image once.
    dropout: its rate.
  """
  errors.fraction(dropout=dropout)
  return network.from_linen(
    DeepBass(classes, widths, dropout), 2 ** len(widths)
  )


def mlp(
  classes: int,
  *,
  widths: tuple[int, ...] = (50, 50, 50),
  dropout: float = 0.33,
) -> network.Network:
  """The paper's network for points in the plane, section 4.

  Args:
    classes: C.
    widths: of the hidden layers.
    dropout: its rate.
  """
  errors.fraction(dropout=dropout)
  return network.from_linen(Perceptron(classes, widths, dropout))
