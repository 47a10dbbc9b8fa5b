"""Networks for vectors of features: linear ones and a perceptron.

The features may come from a pretrained network or be measurements; images are
flattened. All networks end in a linear embedding of D numbers and a linear
classifier of the embedding, as in Learning by Association (`elu.py`):

  e = A h + a    logits = B e + b

so that a loss on embeddings also trains what the classifier reads. Without a
ReLU an embedding can point in all directions, which is needed by methods that
compare directions: LLP normalises embeddings, association takes their dot
products. A starts with variance 1 / (fan_in D), so that the squared length of e
is about 1: the softmax of association over dot products then starts soft.

The features themselves are batch-normalised first, because their columns may
have different units and scales; layer normalisation would mix the columns, and
keep no more than the order of two. Hidden layers have batch norm too, as the
convolutional networks here.

`linear_probe` is for the many features of a pretrained network, standardised
beforehand: its rows are scaled to length 1 instead. A small step size for
vectors of length √1,280 is a large one for a batch of 40: with the usual rate
of 0.1 the loss of `linear` on such features diverges.
"""

from collections.abc import Sequence

from flax import linen as nn

from ssljax import errors, neighbours
from ssljax.networks import layers, network

EPSILON = 1e-5  # of batch norm; columns of normalised features vary little


class FeatureNet(nn.Module):
  """Hidden layers, a linear embedding and a linear classifier."""

  classes: int
  widths: tuple[int, ...]  # of the hidden layers
  embedding: int
  momentum: float
  dropout: float
  unit_rows: bool = False  # instead of the batch norm of the features

  @nn.compact
  def __call__(self, image, *, train: bool, dropout: bool):
    """Map images `[B, H, W, c]` to `Outputs` with D = embedding."""
    x = image.reshape(image.shape[0], -1)
    if self.unit_rows:
      x = neighbours.l2_normalize(layers.widened(x)).astype(x.dtype)
    else:
      x = layers.BatchNorm(self.momentum, EPSILON, scaled=False)(x, train=train)
    for width in self.widths:
      x = nn.Dense(width, use_bias=False, promote_dtype=layers.as_input)(x)
      x = layers.BatchNorm(self.momentum, EPSILON)(x, train=train)
      x = layers.leaky_relu(x)
      x = layers.dropout(x, self.dropout, train=train, active=dropout)
    x = layers.widened(x)
    unit_length = nn.initializers.variance_scaling(
      1 / self.embedding, 'fan_in', 'normal'
    )
    embedding = nn.Dense(self.embedding, kernel_init=unit_length)(x)
    return network.Outputs(nn.Dense(self.classes)(embedding), embedding, x)


def linear(
  classes: int, *, embedding: int = 128, momentum: float = 0.99
) -> network.Network:
  """Return a linear classifier of features, by way of a linear embedding.

  Args:
    classes: C.
    embedding: D; at least C, or it limits the classifier.
    momentum: of the running averages of batch norm.
  """
  errors.positive(embedding=embedding)
  return network.from_linen(FeatureNet(classes, (), embedding, momentum, 0.0))


def linear_probe(classes: int, *, embedding: int = 128) -> network.Network:
  """Return a linear classifier of feature vectors of length 1.

  Args:
    classes: C.
    embedding: D; at least C, or it limits the classifier.
  """
  errors.positive(embedding=embedding)
  module = FeatureNet(classes, (), embedding, 0.0, 0.0, unit_rows=True)
  return network.from_linen(module)


def mlp(
  classes: int,
  *,
  widths: Sequence[int] = (256, 256),
  embedding: int = 128,
  momentum: float = 0.99,
  dropout: float = 0.5,
) -> network.Network:
  """Return a perceptron with batch norm, leaky ReLU and dropout.

  Args:
    classes: C.
    widths: of the hidden layers.
    embedding: D.
    momentum: of the running averages of batch norm.
    dropout: the rate after every hidden layer.
  """
  errors.positive(embedding=embedding)
  for width in widths:
    errors.positive(widths=width)
  errors.fraction(dropout=dropout)
  module = FeatureNet(classes, tuple(widths), embedding, momentum, dropout)
  return network.from_linen(module)
