"""Networks and supervised training steps in PyTorch, to compare speeds with.

The networks are those of `ssljax.networks`. PyTorch is imported by the
functions, since it is no dependency.
"""

from collections.abc import Callable
import contextlib
import functools
import os

CLASSES = 10


def supervised_step(
  net,
  shape: tuple[int, int, int, int],
  *,
  layout: str = 'channels_last',
  clip: float | None = None,
  device: str = 'cpu',
  bfloat16: bool = False,
  compiled: bool = False,
) -> Callable:
  """Return a function that trains one step of a network.

  Args:
    net: the network, a PyTorch module.
    shape: (B, c, H, W) of the images.
    layout: memory format, 'contiguous_format' or 'channels_last'.
    clip: largest value of a gradient; None clips nothing.
    device: 'cpu' or 'cuda'.
    bfloat16: compute under autocast.
    compiled: use `torch.compile`.
  """
  import torch
  from torch import nn

  if device == 'cpu':
    torch.set_num_threads(len(os.sched_getaffinity(0)))
  memory = {'memory_format': getattr(torch, layout)}
  net = net.to(device).to(**memory)
  tx = torch.optim.SGD(
    net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=4e-5
  )
  image = torch.rand(shape, device=device).to(**memory)
  labels = torch.arange(shape[0], device=device) % CLASSES
  cast = contextlib.nullcontext
  if bfloat16:
    cast = functools.partial(torch.autocast, device, torch.bfloat16)

  def loss_of():
    with cast():
      return nn.functional.cross_entropy(net(image), labels)

  if compiled:
    loss_of = torch.compile(loss_of)

  def step():
    tx.zero_grad()
    loss_of().backward()
    if clip is not None:
      nn.utils.clip_grad_value_(net.parameters(), clip)
    tx.step()
    if device == 'cuda':
      torch.cuda.synchronize()

  return step


def _stack(
  channels: int, large: bool, widths: tuple[int, ...], each: int, last: int
):
  """Return blocks of convolution, batch norm, leaky ReLU; the mean; a head.

  Args:
    channels: of an image.
    large: two more blocks of 1x1, as in ConvLarge.
    widths: of the blocks; each is followed by a pool and dropout.
    each: number of blocks per width.
    last: width of the unpadded block.
  """
  from torch import nn

  layers = []

  def block(before, features, kernel=3, padding='same'):
    layers.extend(
      [
        nn.Conv2d(before, features, kernel, padding=padding, bias=False),
        nn.BatchNorm2d(features, eps=1e-3),
        nn.LeakyReLU(0.1, inplace=True),
      ]
    )
    return features

  for width in widths:
    for _ in range(each):
      channels = block(channels, width)
    layers.extend([nn.MaxPool2d(2, ceil_mode=True), nn.Dropout(0.5)])
  channels = block(channels, last, padding='valid')
  if large:
    channels = block(block(channels, 256, 1), 128, 1)
  head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
  return nn.Sequential(*layers, *head)


def convlarge():
  """Return ConvLarge with batch norm, `networks.convlarge`."""
  return _stack(3, True, (128, 256), 3, 512)


def mnist():
  """Return the MNIST network, `networks.small`."""
  return _stack(1, False, (32, 64), 2, 128)


def wide_resnet(widen: int = 2):
  """Return WRN-28-`widen`, `networks.wide_resnet`."""
  from torch import nn

  def activation(width):
    return nn.Sequential(
      nn.BatchNorm2d(width, eps=1e-3, momentum=1e-3),
      nn.LeakyReLU(0.1, inplace=True),
    )

  class Block(nn.Module):
    def __init__(self, before, width, stride, first):
      super().__init__()
      conv = functools.partial(nn.Conv2d, bias=False)
      self.first = first
      self.before = activation(before)
      self.conv1 = conv(before, width, 3, stride, 1)
      self.between = activation(width)
      self.conv2 = conv(width, width, 3, 1, 1)
      changes = before != width or stride > 1
      self.shortcut = conv(before, width, 1, stride) if changes else None

    def forward(self, x):
      y = self.before(x)
      shortcut = y if self.first else x
      if self.shortcut is not None:
        shortcut = self.shortcut(shortcut)
      return shortcut + self.conv2(self.between(self.conv1(y)))

  layers, before = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)], 16
  for stage in range(3):
    width = 16 * widen * 2**stage
    for i in range(4):
      stride = 2 if stage and i == 0 else 1
      layers.append(Block(before, width, stride, stage == i == 0))
      before = width
  head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES)]
  return nn.Sequential(*layers, activation(before), *head)


def resnet50():
  """Return torchvision's ResNet-50, or None if torchvision is not installed.

  Ours is version 2; the convolutions are the same.
  """
  try:
    from torchvision.models import resnet50 as make
  except Exception:  # a build that does not fit PyTorch's fails in many ways
    return None
  return make(num_classes=CLASSES)


NETWORKS = {
  'ConvLarge': convlarge,
  'MNIST network': mnist,
  'WRN-28-2': wide_resnet,
  'WRN-28-8': functools.partial(wide_resnet, 8),
  'ResNet-50': resnet50,
}
