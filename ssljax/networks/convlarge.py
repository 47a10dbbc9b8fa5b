"""ConvLarge: a ten-layer network, common in semi-supervised learning.

Laine & Aila 2017 (Temporal Ensembling), Table 5, with weight norm and mean-only
batch norm; MA-DNN's authors use the same layers with ordinary batch norm. The
PyTorch versions that are trained with SGD (Athiwaratkun et al. 2019, Iscen et
al. 2019) have both weight norm and ordinary batch norm, and Gaussian noise on
the input, which is an augmentation here (`noise`). It has nine convolutions and
a linear classifier, 3.1 million parameters.
"""

from flax import linen as nn

from ssljax.networks import layers, network
from ssljax.networks.cpu import conv

# The authors' momentum of the running averages; PyTorch writes 0.9 as 0.1.
MOMENTUM = {'batch': 0.9999, 'weight': 0.999, 'weight_batch': 0.9}


class ConvLarge(nn.Module):
  """Nine convolutions, their mean over pixels, and a classifier.

  Channels: 3×[128] pool dropout 3×[256] pool dropout 512 256 128.
  """

  classes: int
  norm: layers.Norm
  momentum: float
  dropout: float

  @nn.compact
  def __call__(self, image, *, train: bool, dropout: bool):
    """Map images `[B, H, W, c]` to `Outputs` with D = 128."""
    block = lambda features, kernel=3, padding='SAME': layers.ConvBlock(
      features, kernel, padding, self.norm, self.momentum
    )
    x = image
    for width in (128, 256):
      for _ in range(3):
        x = block(width)(x, train=train)
      x = conv.max_pool(x, 2, 2, 'SAME')
      x = layers.dropout(x, self.dropout, train=train, active=dropout)
    x = block(512, 3, 'VALID')(x, train=train)
    x = block(256, 1)(x, train=train)
    x = block(128, 1)(x, train=train)
    embedding = layers.pooled_mean(x)
    if self.norm == 'batch':
      init = nn.initializers.normal(0.05)
      logits = nn.Dense(self.classes, kernel_init=init)(embedding)
    elif self.norm == 'weight_batch':
      last = layers.WeightNorm(self.classes, from_kernel=True, bias=True)
      logits = last(embedding)
    else:
      logits = layers.WeightNorm(self.classes)(embedding)
      logits = layers.BatchNorm(self.momentum, mean_only=True)(
        logits, train=train
      )
    return network.Outputs(logits, embedding)


def convlarge(
  classes: int,
  *,
  norm: layers.Norm = 'batch',
  momentum: float | None = None,
  dropout: float = 0.5,
) -> network.Network:
  """Return ConvLarge, for images of at least 9×9 pixels.

  Args:
    classes: C.
    norm: 'batch', as in MA-DNN's code; 'weight', as in Temporal Ensembling:
      weight norm, mean-only batch norm, data-dependent initialisation;
      'weight_batch', as in the PyTorch versions: weight norm and batch norm,
      whose scales and offsets decay like kernels, and PyTorch's initial values.
    momentum: of the running averages; by default that of `MOMENTUM`.
    dropout: the rate after each pooling.
  """
  if momentum is None:
    momentum = MOMENTUM[norm]
  return network.from_linen(ConvLarge(classes, norm, momentum, dropout), 9)
