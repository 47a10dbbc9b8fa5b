"""Supervised training on the labelled rows alone: the common baseline.

  descend  mean over the labelled rows of CE(y, softmax f(x))

with the network, optimiser and steps of the method it is compared with.
"""

from ssljax import losses, optimizers
from ssljax.core import UNLABELLED, BatchSpec, Method, Stage, visible_labels
from ssljax.errors import fraction, positive


def supervised_loss(net, *, smoothing: float = 0.0):
  """The loss of a `Stage`: cross-entropy of the batch's labelled rows."""

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    labels = visible_labels(state, batch)
    terms = losses.cross_entropy(outputs.logits, labels, smoothing=smoothing)
    mean = losses.mean_where(terms, labels != UNLABELLED)
    return mean, (state.replace(stats=stats), {'cross_entropy': mean})

  return loss


def supervised(
  net, tx, batch_spec: BatchSpec, steps: int, *, smoothing: float = 0.0
) -> Method:
  """Trains on the labelled part of the draw.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: `batch_spec.unlabelled` is left out, since nothing is learned from it.
    steps: length of the only stage.
    smoothing: label smoothing of the cross-entropy.
  """
  positive(steps=steps, batch_labelled=batch_spec.labelled)
  fraction(smoothing=smoothing)
  loss = supervised_loss(net, smoothing=smoothing)
  stage = Stage(
    'supervised', steps, tx(steps), batch_spec._replace(unlabelled=0), loss
  )
  return Method('supervised', (stage,), weights=optimizers.weights)
