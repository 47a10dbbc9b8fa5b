"""A network whose logits are chosen by a test: an image is its own logits.

An image has shape [1, 1, C]. With the initial parameters its logits are its
pixels, so that a test chooses the predictions for every view of every row.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssljax.core import (
  DEFAULT_VIEW,
  Batch,
  BatchSpec,
  init_average,
  init_state,
)
from ssljax.networks import network

KEY = jax.random.key(2)  # of a step, see `call`


def _logits(params, image):
  pixels = image.reshape(len(image), -1)
  return params['scale'] * pixels + params['bias'][None]


def _init(key, image):
  del key
  classes = image.shape[-1]
  params = {'scale': jnp.ones([]), 'bias': jnp.zeros(classes)}
  return params, {'mean': jnp.zeros([])}


def _train(params, stats, image, key):
  del key
  logits = _logits(params, image)
  # The statistic tells which images a pass has seen.
  return network.Outputs(logits, logits), {'mean': stats['mean'] + image.mean()}


def _infer(params, stats, image):
  del stats
  logits = _logits(params, image)
  return network.Outputs(logits, logits)


NET = network.Network(
  init=_init,
  train=_train,
  infer=_infer,
  sample=lambda params, stats, image, key: _infer(params, stats, image),
)


def as_images(logits):
  """Images [B, 1, 1, C] with logits [B, C]."""
  return jnp.asarray(logits, jnp.float32)[:, None, None, :]


def make_batch(logits, *, labelled, rows, step=0, **views):
  """A batch whose default view has the logits [B, C], the others theirs."""
  return Batch(
    rows=jnp.asarray(rows, jnp.int32),
    image=as_images(logits),
    label_mask=jnp.arange(len(rows)) < labelled,
    step=jnp.int32(step),
    views={name: as_images(view) for name, view in views.items()},
  )


def make_method(factory, labelled, unlabelled, *, steps=100, **settings):
  """A method for this network, trained by SGD with rate 1."""
  tx = lambda steps, *_, **__: optax.sgd(1.0)
  spec = BatchSpec(labelled, unlabelled)
  return factory(NET, tx, spec, steps, **settings)


def make_state(method, labels, classes):
  """The state before the first step, under a label table [N]."""
  image = jnp.zeros([1, 1, 1, classes])
  labels = jnp.asarray(labels, jnp.int32)
  known = int((np.asarray(labels) >= 0).sum())
  state = init_state(
    method, NET, jax.random.key(0), labels, image, labelled=known
  )
  average = init_average(method.averaging, state.params, state.stats)
  return state.replace(average=average)


def call(method, state, batch):
  """(loss, state, metrics) of the only stage."""
  loss = method.stages[-1].loss
  total, (state, metrics) = loss(state.params, state, batch, KEY)
  return total, state, metrics


def slopes(method, state, batch):
  """Gradients of the loss with respect to every view, [rows, C] by name."""

  def total(image, views):
    return call(method, state, batch._replace(image=image, views=views))[0]

  image, views = jax.grad(total, (0, 1))(batch.image, dict(batch.views))
  found = {DEFAULT_VIEW: image} | views
  return {k: np.asarray(v).reshape(len(v), -1) for k, v in found.items()}


# The same arithmetic in NumPy, in float64.


def softmax(logits):
  """Probabilities [..., C]."""
  e = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def cross_entropy(logits, label):
  """−log softmax(logits)_label of one image."""
  return -np.log(softmax(np.asarray(logits, np.float64))[label])
