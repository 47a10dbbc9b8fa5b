"""Supervised training on the labelled images alone: the common baseline.

Minimises the mean over the labelled rows of CE(y, softmax f(x)), with the
network, the optimiser and the steps of the method that it is compared with.

A row that occurs several times in a batch is augmented alike each time, as in
all methods here: random keys depend on the step and the row.
"""

from ssljax import losses
from ssljax.core import (
  UNLABELLED,
  BatchSpec,
  Loss,
  Method,
  Readiness,
  Stage,
  visible_labels,
)
from ssljax.errors import fraction, positive

# Of a stage whose predictions become pseudo-labels, in nats. R2-D2 got worse by
# every reprediction after 0.26 on 100 labels of grey digits.
MOST_CROSS_ENTROPY = 0.2


def supervised_loss(net, *, smoothing: float = 0.0) -> Loss:
  """Return the loss of a stage: cross-entropy of the batch's labelled rows."""

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    labels = visible_labels(state, batch)
    logits = batch.adjusted(outputs.logits)
    terms = losses.cross_entropy(logits, labels, smoothing=smoothing)
    mean = losses.mean_where(terms, labels != UNLABELLED)
    return mean, (state.replace(stats=stats), {'cross_entropy': mean})

  return loss


def fitted(setting: str) -> Readiness:
  """Return the condition that a stage has fitted its labelled images.

  The stages after it learn from its predictions, and repeat its mistakes.

  Args:
    setting: that prolongs the stage.
  """
  return Readiness(
    name='training_cross_entropy',
    most=MOST_CROSS_ENTROPY,
    advice=f'the next stages learn from its predictions; raise {setting}',
  )


def supervised(
  net, tx, batch_spec: BatchSpec, steps: int, *, smoothing: float = 0.0
) -> Method:
  """Return the method that trains on the labelled part of the batch.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled images per step; its unlabelled part is left out,
      because nothing is learned from it.
    steps: length of the only stage.
    smoothing: label smoothing of the cross-entropy.
  """
  positive(steps=steps, batch_labelled=batch_spec.labelled)
  fraction(smoothing=smoothing)
  stage = Stage(
    name='supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec._replace(unlabelled=0),
    loss=supervised_loss(net, smoothing=smoothing),
  )
  return Method(name='supervised', stages=(stage,))
