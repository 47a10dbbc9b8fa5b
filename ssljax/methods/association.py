"""Learning by Association.

Haeusser, Mordvintsev, Cremers, CVPR 2017. Every step compares the embeddings A
of a labelled batch, with equally many images of each class, and the embeddings
B of an unlabelled batch:

  1. similarities  M_ij = A_i · B_j                                    Eq. 1
  2. transitions   P^ab = softmax_j M_ij,  P^ba likewise from Mᵀ       Eq. 2
  3. round trips   P^aba = P^ab P^ba                                   Eq. 3
  4. minimise L_walker + L_visit + L_classification                    Eq. 5
       L_walker = H(T, P^aba),  T_ij = [y_i = y_j] / #class(A_i)       Eq. 6–7
       L_visit  = H(V, P^visit),  P^visit_j = mean_i P^ab_ij,
                  V_j = 1/|B|                                          Eq. 8–10

Full gradients of all three losses flow through A and B. Embeddings are not
normalised and there is no temperature. H(T, ·) has a lower bound above 0:
log #class for the walker loss, log |B| for the visit loss.

Departures from the paper:
  - The three losses have weights, as in the authors' code (and section 4.5).
  - Logarithms add 1e-8 to a probability, after which the probabilities are
    normalised again, as in the authors' code.
  - In networks with batch norm the statistics are over A and B together.
  - A first stage (`pretrain`) implements section 4.6, where labelled and
    unlabelled images come from two data sets. The paper restores a network that
    was trained on the first one with the whole loss; that is
    `pretrain_loss='association'`, where B comes from the labelled images. The
    default is L_classification alone.
  - Label smoothing of L_classification is optional; the paper has none.
  - Weight decay does not apply to biases, and has one weight for all kernels:
    in the authors' code the classifier has 1e-4 of its own. On MNIST the paper
    states 1e-4 and the authors' code has 1e-3, which the presets take.
  - A row that occurs several times in a batch, as with fewer than ten labels of
    a class, is augmented alike each time, as in all methods here: random keys
    depend on the step and the row.
Table 4 reports that training on MNIST fails without the visit loss (weight 0:
5.68 %). That is not so here: with 1,000 labels and 400 steps the error is 2.4 %
with weight 0 and 1.8 % with weight 1.
"""

import functools
from typing import Literal, NamedTuple

import chex
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from ssljax import losses
from ssljax.core import (
  UNLABELLED,
  BatchSpec,
  Loss,
  Method,
  Stage,
  visible_labels,
)
from ssljax.errors import fraction, non_negative, positive, require
from ssljax.methods.supervised import fitted, supervised_loss

Similarity = Literal['dot', 'euclidean']
EPSILON = 1e-8  # in logarithms; a round trip of probability 0 costs 18.4
# Keeps the gradient of a square root finite at 0.
ROOT_EPSILON = 1e-10
_KEEP = jax.checkpoint_policies.save_only_these_names('p_aba')


def similarities(a, b, kind: Similarity = 'dot') -> jax.Array:
  """Compute M `[Na, Nb]`, Eq. 1.

  Args:
    a: `[Na, D]` embeddings.
    b: `[Nb, D]` embeddings.
    kind: 'euclidean' is −‖a − b‖, the alternative that the paper mentions.
  """
  chex.assert_rank([a, b], 2)
  # Full precision: without a temperature M is directly used as logits.
  products = jnp.matmul(a, b.T, precision='highest')
  if kind == 'dot':
    return products
  squares = lambda x: jnp.sum(jnp.square(x), axis=-1)
  square = squares(a)[:, None] + squares(b)[None] - 2 * products
  return -jnp.sqrt(jnp.maximum(square, 0.0) + ROOT_EPSILON)


def transitions(m: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Compute P^ab `[Na, Nb]` and P^ba `[Nb, Na]` from M `[Na, Nb]`, Eq. 2."""
  return jax.nn.softmax(m), jax.nn.softmax(m.T)


def same_class(labels: jax.Array) -> jax.Array:
  """Return y_i = y_j `[Na, Na]` bool: T of Eq. 7 before normalisation."""
  return labels[:, None] == labels[None]


def walk_cross_entropy(target: jax.Array, p: jax.Array) -> jax.Array:
  """Compute H(target, p) `[...]`, which is at least H(target).

  Args:
    target: `[..., K]` probabilities.
    p: `[..., K]` probabilities.
  """
  return -jnp.sum(target * jax.nn.log_softmax(jnp.log(EPSILON + p)), axis=-1)


def walker_loss(p_aba: jax.Array, labels: jax.Array) -> jax.Array:
  """Compute L_walker `[]` from P^aba `[Na, Na]` and labels `[Na]`, Eq. 6."""
  same = same_class(labels).astype(p_aba.dtype)
  target = same / jnp.sum(same, axis=-1, keepdims=True)
  return jnp.mean(walk_cross_entropy(target, p_aba))


def visit_loss(p_ab: jax.Array) -> jax.Array:
  """Compute L_visit `[]` from P^ab `[Na, Nb]`, Eq. 8–10."""
  visits = jnp.mean(p_ab, axis=0)
  return walk_cross_entropy(jnp.full_like(visits, 1 / visits.size), visits)


class Association(NamedTuple):
  """Results of the round trips through the unlabelled batch."""

  walker: jax.Array  # [] L_walker, Eq. 6
  visit: jax.Array  # [] L_visit, Eq. 8
  correct: jax.Array  # [] probability of a correct walk, Eq. 4


def associate(a, b, labels, kind: Similarity = 'dot') -> Association:
  """Compute the walker and visit losses, Eq. 1–10.

  Only P^aba is stored for the backward pass. Similarities and transitions, each
  Na × Nb, are computed again from the embeddings. This adds one matrix product
  of 2 Na Nb D operations to the 6 Na Nb (Na + D) of the losses.

  Args:
    a: `[Na, D]` embeddings of the labelled batch.
    b: `[Nb, D]` embeddings of the unlabelled batch.
    labels: `[Na]` int32 of the labelled batch.
    kind: similarity of Eq. 1.
  """
  chex.assert_equal_shape_prefix([a, labels], 1)

  @functools.partial(jax.checkpoint, policy=_KEEP)
  def terms(a, b, labels):
    p_ab, p_ba = transitions(similarities(a, b, kind))
    p_aba = checkpoint_name(p_ab @ p_ba, 'p_aba')
    correct = jnp.sum(jnp.where(same_class(labels), p_aba, 0.0)) / len(labels)
    return Association(walker_loss(p_aba, labels), visit_loss(p_ab), correct)

  return terms(a, b, labels)


def association_loss(
  net, batch_spec: BatchSpec, weights, similarity: Similarity, smoothing: float
) -> Loss:
  """Return the loss of a stage, Eq. 5.

  Args:
    net: the `Network`.
    batch_spec: composition of the batch.
    weights: weights of L_walker, L_visit and L_classification.
    similarity: similarity of Eq. 1.
    smoothing: label smoothing of L_classification.
  """

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    a, b = jnp.split(outputs.embedding, [batch_spec.labelled])
    labels = visible_labels(state, batch)
    trips = associate(a, b, labels[: batch_spec.labelled], similarity)
    logits = batch.adjusted(outputs.logits)
    terms = losses.cross_entropy(logits, labels, smoothing=smoothing)

    metrics = {
      'cross_entropy': losses.mean_where(terms, labels != UNLABELLED),
      'walker': trips.walker,
      'visit': trips.visit,
      'correct_walks': trips.correct,
    }
    walker, visit, logit = weights
    total = (
      logit * metrics['cross_entropy']
      + walker * metrics['walker']
      + visit * metrics['visit']
    )
    return total, (state.replace(stats=stats), metrics)

  return loss


def association(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  walker: float = 1.0,
  visit: float = 1.0,
  logit: float = 1.0,
  similarity: Similarity = 'dot',
  smoothing: float = 0.0,
  pretrain: int = 0,
  pretrain_loss: Literal['supervised', 'association'] = 'supervised',
  associate_rate: float = 1.0,
) -> Method:
  """Return Learning by Association with the paper's constants.

  Args:
    net: the `Network`.
    tx: `(steps, scale) -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: class-balanced labelled images, and unlabelled images, per step.
    steps: length of the stage `associate`.
    walker: weight of the walker loss.
    visit: weight of the visit loss; choose a smaller one if the unlabelled
      images have more classes or vary more (section 4.5).
    logit: weight of the classification loss.
    similarity: similarity of Eq. 1.
    smoothing: label smoothing of the classification loss.
    pretrain: steps of a first stage on the labelled images alone (section
      4.6); 0 leaves it out.
    pretrain_loss: loss of the first stage: the classification loss, or all
      three losses with labelled images in both batches (section 4.6: "as
      described in Section 4").
    associate_rate: factor of the learning rate in the stage `associate`.
  """
  positive(steps=steps, associate_rate=associate_rate)
  non_negative(walker=walker, visit=visit, logit=logit, pretrain=pretrain)
  positive(batch_unlabelled=batch_spec.unlabelled)
  fraction(smoothing=smoothing)
  require(
    batch_spec.classes > 0,
    '`batch_per_class`: the labelled batch of each step must contain every '
    'class: give the number of images per class, as `batch_per_class`=10',
  )

  weights = walker, visit, logit
  loss = association_loss(net, batch_spec, weights, similarity, smoothing)
  associating = Stage(
    name='associate',
    steps=steps,
    tx=tx(steps, associate_rate),
    batch_spec=batch_spec,
    loss=loss,
  )
  alone = Stage(
    name='pretrain',
    steps=pretrain,
    tx=tx(max(1, pretrain)),
    batch_spec=batch_spec._replace(unlabelled=0),
    loss=supervised_loss(net, smoothing=smoothing),
    readiness=fitted('pretrain'),
  )
  if pretrain_loss == 'association':
    within = batch_spec._replace(from_labelled=True)
    alone = alone._replace(batch_spec=within, loss=loss)
  stages = (alone, associating) if pretrain else (associating,)
  return Method(name='association', stages=stages)


# Settings of the paper, or of its code where the paper is silent, that differ
# from the defaults of other runs.
DEFAULTS = {
  'unlabelled': 'all',
  'batch_per_class': 10,
  'batch_unlabelled': 100,
  'optimizer': 'adam',
  'learning_rate': 1e-3,
  'decay': 'constant',
  'weight_decay': 1e-4,
  'clip': 0.0,
  'average': 0.0,
}
