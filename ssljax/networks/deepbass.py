"""The networks of DeepBASS, for MNIST (14,970 parameters) and for the plane.

Rottmann, Kahl, Gottschalk 2018 (arXiv:1803.01216), sections 4 and 5. Taken from
their code: Glorot-uniform weights, biases of 0, pooling without padding.
Dropout follows every layer but the last, for Monte-Carlo dropout
(`acquisition.sampler`). The embedding is the last layer's input.

Departures: the authors share one seeded initialiser among all layers, so that
layers of one shape start with equal weights; here each layer has its own key.
They divide pixels by 256, we by 255.
"""

from flax import linen as nn

from ssljax import errors
from ssljax.networks import layers, network
from ssljax.networks.cpu import conv

_INIT = nn.initializers.glorot_uniform()


class DeepBass(nn.Module):
  """Two 3×3 convolutions and a pool for each width; then the classifier."""

  classes: int
  widths: tuple[int, ...]
  dropout: float

  @nn.compact
  def __call__(self, image, *, train: bool, dropout: bool):
    """Map images `[B, H, W, c]` to `Outputs`; D = 784 for 28×28 pixels."""
    x = image
    for width in self.widths:
      for _ in range(2):
        x = nn.Conv(
          width,
          (3, 3),
          kernel_init=_INIT,
          promote_dtype=layers.as_input,
          conv_general_dilated=conv.conv_general_dilated,
        )(x)
        x = layers.leaky_relu(x)
        x = layers.dropout(x, self.dropout, train=train, active=dropout)
      x = conv.max_pool(x, 2, 2)
    x = layers.widened(x).reshape(x.shape[0], -1)
    return network.Outputs(nn.Dense(self.classes, kernel_init=_INIT)(x), x)


class Perceptron(nn.Module):
  """A fully connected layer for each width; then the classifier."""

  classes: int
  widths: tuple[int, ...]
  dropout: float

  @nn.compact
  def __call__(self, image, *, train: bool, dropout: bool):
    """Map images `[B, H, W, c]` to `Outputs` with D the last width."""
    x = image.reshape(image.shape[0], -1)
    for width in self.widths:
      dense = nn.Dense(width, kernel_init=_INIT, promote_dtype=layers.as_input)
      x = layers.leaky_relu(dense(x))
      x = layers.dropout(x, self.dropout, train=train, active=dropout)
    x = layers.widened(x)
    return network.Outputs(nn.Dense(self.classes, kernel_init=_INIT)(x), x)


def deepbass(
  classes: int,
  *,
  widths: tuple[int, ...] = (16, 16),
  dropout: float = 0.33,
) -> network.Network:
  """Return the paper's network for MNIST, section 5.

  Args:
    classes: C.
    widths: channels; the image is halved after each.
    dropout: the rate after every layer but the last.
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
  """Return the paper's network for points in the plane, section 4.

  Args:
    classes: C.
    widths: of the hidden layers.
    dropout: the rate after every hidden layer.
  """
  errors.fraction(dropout=dropout)
  return network.from_linen(Perceptron(classes, widths, dropout))
