"""MA-DNN: Semi-Supervised Deep Learning with Memory.

Chen, Zhu, Gong, ECCV 2018. Per step, on a batch of labelled and unlabelled
images with features x and predictions p = softmax f(x):

  1. update the memory from the labelled images of each class j      Eq. 3
       k_j ← k_j − η Σ_i (k_j − x_i) / (1 + n_j)
       v_j ← v_j − η Σ_i (v_j − p_i) / (1 + n_j),   normalised to Σ v_j = 1
  2. read it: p̂ = Σ_j w_j v_j                                        Eq. 4
       labelled:   w = onehot(y)                                     Eq. 5
       unlabelled: w = softmax_j(−dist(x, k_j))                      Eq. 6
  3. descend  CE(y, p) + λ mean[H(p̂) + max(p̂) D_KL(p‖p̂)]          Eq. 7–10

The means are over the labelled images for CE and over all for the rest. No
gradient flows through the update, all of step 2 has one (max(p̂) too).

Departures: label smoothing, gradient clipping, weight decay and averaged
weights at test time are the authors' code's, not the paper's. That code also
reads `dist` as L1 (`distance='l1'`); the paper's Euclidean is the default.
"""

from typing import Literal

import chex
from flax import struct
import jax
import jax.numpy as jnp

from ssljax import losses, optimizers
from ssljax.core import UNLABELLED, BatchSpec, Method, Stage, visible_labels
from ssljax.errors import fraction, non_negative, positive

Distance = Literal['euclidean', 'l1']
# Keeps the slope of a square root finite at 0.
EPSILON = 1e-10


@struct.dataclass
class Slots:
  """The memory: one slot per class; C classes, D features."""

  keys: jax.Array  # [C, D] running mean feature
  values: jax.Array  # [C, C] running mean prediction, rows sum to 1


def empty_slots(classes: int, embedding: int) -> Slots:
  """Keys 0 and uniform values: no prior knowledge."""
  return Slots(
    jnp.zeros([classes, embedding]),
    jnp.full([classes, classes], 1 / classes, jnp.float32),
  )


def update(slots: Slots, x, p, labels, *, eta: float) -> Slots:
  """Eq. 3; a class absent from the batch keeps its slot.

  Args:
    slots: the memory before this step.
    x: `[B, D]` features.
    p: `[B, C]` predictions.
    labels: `[B]`, rows that are UNLABELLED count for no class.
    eta: η, the memory's learning rate.
  """
  chex.assert_rank([x, p, labels], [2, 2, 1])
  member = jax.nn.one_hot(labels, p.shape[-1])  # [B, C], 0 for UNLABELLED
  n = jnp.sum(member, axis=0)[:, None]  # [C, 1]

  def towards(slot, sample):  # [C, E], [B, E]
    return slot - eta * (n * slot - member.T @ sample) / (1 + n)

  values = towards(slots.values, p)
  values /= jnp.sum(values, axis=-1, keepdims=True)
  return jax.lax.stop_gradient(Slots(towards(slots.keys, x), values))


def distance(x, keys, kind: Distance) -> jax.Array:
  """dist(x_b, k_j) `[B, C]` of features `[B, D]` and keys `[C, D]`."""
  square = jnp.square(x[:, None] - keys[None])
  if kind == 'l1':
    return jnp.sum(jnp.sqrt(square + EPSILON), axis=-1)
  return jnp.sqrt(jnp.sum(square, axis=-1) + EPSILON)


def assimilate(
  slots: Slots, x, labels, *, kind: Distance = 'euclidean', values: bool = True
) -> jax.Array:
  """The memory's predictions p̂ `[B, C]`, Eq. 4–6.

  Args:
    slots: the updated memory.
    x: `[B, D]` features.
    labels: `[B]`; a labelled row is addressed by position, an UNLABELLED one
      by content.
    kind: the distance of Eq. 6.
    values: False reads the addresses themselves: p̂ = w (section 4.2).
  """
  content = jax.nn.softmax(-distance(x, slots.keys, kind))
  position = jax.nn.one_hot(labels, slots.keys.shape[0])
  w = jnp.where((labels == UNLABELLED)[:, None], content, position)
  return w @ slots.values if values else w


def memory_terms(p, p_hat) -> tuple[jax.Array, jax.Array]:
  """The two terms of Eq. 7 per image, each `[B]`.

  Returns:
    H(p̂), the model entropy (Eq. 8), and max(p̂)·D_KL(p‖p̂), the weighted
    memory-network divergence (Eq. 9).
  """
  divergence = losses.kl_divergence(p, p_hat)
  return losses.entropy(p_hat), jnp.max(p_hat, axis=-1) * divergence


def madnn(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  eta: float = 0.5,
  weight: float = 1.0,
  distance: Distance = 'euclidean',
  model_entropy: bool = True,
  divergence: bool = True,
  values: bool = True,
  smoothing: float = 0.01,
) -> Method:
  """MA-DNN with the paper's constants.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage of that many steps.
    batch_spec: labelled and unlabelled images per step.
    steps: length of the only stage.
    eta: η of Eq. 3, the memory's learning rate.
    weight: λ of Eq. 10, weight of the memory loss.
    distance: of Eq. 6; 'euclidean' is the paper, 'l1' its code.
    model_entropy: the term H(p̂) of Eq. 7 (Table 2).
    divergence: the term max(p̂)·D_KL(p‖p̂) of Eq. 7 (Table 2).
    values: read value embeddings; without, p̂ = w (section 4.2).
    smoothing: label smoothing of the cross-entropy; the authors' code has
      0.001·C.
  """
  positive(steps=steps, eta=eta)
  positive(
    batch_labelled=batch_spec.labelled, batch_unlabelled=batch_spec.unlabelled
  )
  non_negative(weight=weight)
  fraction(smoothing=smoothing)

  def init(key, params, stats, spec):
    del key, params, stats
    return empty_slots(spec.classes, spec.embedding)

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    x, p = outputs.embedding, jax.nn.softmax(outputs.logits)
    labels = visible_labels(state, batch)

    slots = update(state.memory, x, p, labels, eta=eta)
    p_hat = assimilate(slots, x, labels, kind=distance, values=values)
    terms = losses.cross_entropy(outputs.logits, labels, smoothing=smoothing)
    entropies, divergences = memory_terms(p, p_hat)

    metrics = {
      'cross_entropy': losses.mean_where(terms, labels != UNLABELLED),
      'model_entropy': jnp.mean(entropies),
      'divergence': jnp.mean(divergences),
    }
    memory_loss = (
      float(model_entropy) * metrics['model_entropy']
      + float(divergence) * metrics['divergence']
    )
    state = state.replace(stats=stats, memory=slots)
    total = metrics['cross_entropy'] + weight * memory_loss
    return total, (state, metrics)

  stage = Stage('semi-supervised', steps, tx(steps), batch_spec, loss)
  return Method('madnn', (stage,), init, weights=optimizers.weights)
