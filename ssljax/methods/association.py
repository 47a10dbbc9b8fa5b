"""Learning by Association.

Haeusser, Mordvintsev, Cremers, CVPR 2017. Per step, on embeddings A of a
labelled batch, as many of each class, and B of an unlabelled one:

  1. similarities  M_ij = A_i · B_j                                    Eq. 1
  2. transitions   P^ab = softmax_j M_ij,  P^ba the same of Mᵀ         Eq. 2
  3. round trips   P^aba = P^ab P^ba                                   Eq. 3
  4. descend  L_walker + L_visit + L_classification                    Eq. 5
       L_walker = H(T, P^aba),  T_ij = [y_i = y_j] / #class(A_i)       Eq. 6–7
       L_visit  = H(V, P^visit),  P^visit_j = mean_i P^ab_ij,
                  V_j = 1/|B|                                          Eq. 8–10

All three have their full gradient through A and through B. The embeddings are
not normalised and there is no temperature. H(T, ·) has a floor that is not 0:
log #class for the walker, log |B| for the visit loss.

Departures: the weights of the three losses are the authors' code's; so is the
1e-8 inside the logarithms, after which the probabilities are normalised again.
Where the network has batch norm, its statistics are of A and B together. A
first stage on the labelled images alone (`pretrain`) is the paper's section
4.6, where labelled and unlabelled images are of two data sets.
"""

import functools
from typing import Literal, NamedTuple

import chex
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from ssljax import losses, optimizers
from ssljax.core import UNLABELLED, BatchSpec, Method, Stage, visible_labels
from ssljax.errors import fraction, non_negative, positive, require
from ssljax.methods.supervised import supervised_loss

Similarity = Literal['dot', 'euclidean']
EPSILON = 1e-8  # inside the logarithms: an absent round trip costs 18.4
# Keeps the slope of a square root finite at 0.
ROOT_EPSILON = 1e-10
_KEEP = jax.checkpoint_policies.save_only_these_names('p_aba')


def similarities(a, b, kind: Similarity = 'dot') -> jax.Array:
  """M `[Na, Nb]` of embeddings `a [Na, D]` and `b [Nb, D]`, Eq. 1.

  'euclidean' is −‖a − b‖, the alternative that the paper names.
  """
  chex.assert_rank([a, b], 2)
  # No temperature: an error of M is an error of a logit.
  products = jnp.matmul(a, b.T, precision='highest')
  if kind == 'dot':
    return products
  squares = lambda x: jnp.sum(jnp.square(x), axis=-1)
  square = squares(a)[:, None] + squares(b)[None] - 2 * products
  return -jnp.sqrt(jnp.maximum(square, 0.0) + ROOT_EPSILON)


def transitions(m: jax.Array) -> tuple[jax.Array, jax.Array]:
  """P^ab `[Na, Nb]` and P^ba `[Nb, Na]` of M `[Na, Nb]`, Eq. 2."""
  return jax.nn.softmax(m), jax.nn.softmax(m.T)


def same_class(labels: jax.Array) -> jax.Array:
  """Eq. 7 without its division: `[Na, Na]` bool, whether y_i = y_j."""
  return labels[:, None] == labels[None]


def cross_entropy(target: jax.Array, p: jax.Array) -> jax.Array:
  """H(target, p) `[...]` of distributions `[..., K]`; at least H(target)."""
  return -jnp.sum(target * jax.nn.log_softmax(jnp.log(EPSILON + p)), axis=-1)


def walker_loss(p_aba: jax.Array, labels: jax.Array) -> jax.Array:
  """L_walker `[]` of round trips `[Na, Na]` and the labels `[Na]`, Eq. 6."""
  same = same_class(labels).astype(p_aba.dtype)
  target = same / jnp.sum(same, axis=-1, keepdims=True)
  return jnp.mean(cross_entropy(target, p_aba))


def visit_loss(p_ab: jax.Array) -> jax.Array:
  """L_visit `[]` of transitions `[Na, Nb]`, Eq. 8–10."""
  visits = jnp.mean(p_ab, axis=0)
  return cross_entropy(jnp.full_like(visits, 1 / visits.size), visits)


class Association(NamedTuple):
  """What a round trip through the unlabelled batch says."""

  walker: jax.Array  # [] Eq. 6
  visit: jax.Array  # [] Eq. 8
  correct: jax.Array  # [] Eq. 4, the probability of a correct walk


def associate(a, b, labels, kind: Similarity = 'dot') -> Association:
  """Eq. 1–10, for a batch of each kind.

  Of what is computed only P^aba is kept for the backward pass. The similarities
  and transitions, each Na × Nb, are computed again from the embeddings: for
  that, one matrix product of 2 Na Nb D operations, beside 6 Na Nb (Na + D).

  Args:
    a: `[Na, D]` embeddings of the labelled batch.
    b: `[Nb, D]` embeddings of the unlabelled batch.
    labels: `[Na]` of the labelled batch.
    kind: the similarity of Eq. 1.
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
):
  """The loss of a `Stage`, Eq. 5; `weights` of walker, visit and logit."""

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    a, b = jnp.split(outputs.embedding, [batch_spec.labelled])
    labels = visible_labels(state, batch)
    trips = associate(a, b, labels[: batch_spec.labelled], similarity)
    terms = losses.cross_entropy(outputs.logits, labels, smoothing=smoothing)

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
  associate_rate: float = 1.0,
) -> Method:
  """Learning by Association with the paper's constants.

  Args:
    net: the `Network`.
    tx: `(steps, scale) -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: balanced labelled images, and unlabelled images, per step.
    steps: length of the stage that associates.
    walker: weight of the walker loss.
    visit: weight of the visit loss; less where the unlabelled images are of
      other classes too, or differ more (section 4.5).
    logit: weight of the classification loss.
    similarity: of Eq. 1.
    smoothing: label smoothing of the classification loss.
    pretrain: steps of a first stage on the labelled images alone (section
      4.6); 0 leaves it out.
    associate_rate: factor of the learning rate once it associates.
  """
  positive(steps=steps, associate_rate=associate_rate)
  non_negative(walker=walker, visit=visit, logit=logit, pretrain=pretrain)
  positive(batch_unlabelled=batch_spec.unlabelled)
  fraction(smoothing=smoothing)
  require(
    batch_spec.classes > 0,
    '`batch_per_class`: every class must be in the labelled batch of each '
    'step: give how many images of each, as `batch_per_class`=10',
  )

  weights = walker, visit, logit
  loss = association_loss(net, batch_spec, weights, similarity, smoothing)
  associating = Stage(
    'associate', steps, tx(steps, associate_rate), batch_spec, loss
  )
  alone = Stage(
    'pretrain',
    pretrain,
    tx(max(1, pretrain)),
    batch_spec._replace(unlabelled=0),
    supervised_loss(net, smoothing=smoothing),
  )
  stages = (alone, associating) if pretrain else (associating,)
  return Method('association', stages, weights=optimizers.weights)


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
