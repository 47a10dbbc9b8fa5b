"""LeNet with two-dimensional features: R2-D2's toy example on MNIST.

R2-D2 (Wang, Wu, AAAI 2021), section "A toy example" and Figure 2: "the LeNet as
backbone structure and add two FC layers, in which the first FC layer learns a
2-D feature and the second FC layer projects the feature onto the class space".

[inferred], as no code was released: LeNet is Caffe's (examples/mnist), whose
only nonlinearities are max-pooling and the ReLU of its 500 units. The two
layers replace its classifier; both have a bias, and the 2-d feature is linear,
so that it covers the plane. Weights start as Caffe's 'xavier', U(−√(3 /
fan_in), √(3 / fan_in)), biases at 0.
"""

from flax import linen as nn

from ssljax import errors
from ssljax.networks import layers, network
from ssljax.networks.cpu import conv


class LeNet(nn.Module):
  """C20 P C50 P FC500 ReLU, a linear embedding, a linear classifier.

  Cn is a 5×5 convolution of n channels, P a pool of 2×2.
  """

  classes: int
  embedding: int

  @nn.compact
  def __call__(self, image, *, train: bool, dropout: bool):
    """Map images `[B, H, W, c]` to `Outputs` with D = embedding."""
    del train, dropout  # the network has no batch norm and no dropout
    init = nn.initializers.lecun_uniform()  # Caffe's 'xavier'
    dense = lambda features: nn.Dense(features, kernel_init=init)
    x = image
    for features in (20, 50):
      x = nn.Conv(
        features,
        (5, 5),
        padding='VALID',
        kernel_init=init,
        promote_dtype=layers.as_input,
        conv_general_dilated=conv.conv_general_dilated,
      )(x)
      x = conv.max_pool(x, 2, 2)
    x = layers.widened(x).reshape(x.shape[0], -1)
    x = nn.relu(dense(500)(x))
    embedding = dense(self.embedding)(x)
    return network.Outputs(dense(self.classes)(embedding), embedding)


def lenet(classes: int, *, embedding: int = 2) -> network.Network:
  """Return LeNet with a small linear embedding, for at least 16×16 pixels.

  Args:
    classes: C.
    embedding: D; 2 in Figure 2, which plots it.
  """
  errors.positive(embedding=embedding)
  # 16 pixels become 12, 6, 2 and 1.
  return network.from_linen(LeNet(classes, embedding), 16)
