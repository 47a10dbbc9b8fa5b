"""MA-DNN: Semi-Supervised Deep Learning with Memory.

Chen, Zhu, Gong, ECCV 2018. Every step takes a batch of labelled and unlabelled
images with features x and predictions p = softmax f(x), and performs
Algorithm 1:

  1. Update the memory with the labelled images of each class j:       Eq. 3
       k_j ← k_j − η Σ_i (k_j − x_i) / (1 + n_j)
       v_j ← v_j − η Σ_i (v_j − p_i) / (1 + n_j),  normalised to Σ v_j = 1
  2. Read the memory: p̂ = Σ_j w_j v_j                                  Eq. 4
       labelled images:    w = onehot(y)                               Eq. 5
       unlabelled images:  w = softmax_j(−dist(x, k_j))                Eq. 6
  3. Minimise CE(y, p) + λ mean[H(p̂) + max(p̂) D_KL(p‖p̂)].           Eq. 7–10

Departures from the paper:
  - The paper has the network of Laine and Aila (2017), which has weight norm,
    mean-only batch norm, input noise of 0.15 and, on CIFAR, ZCA. The presets
    follow the authors' code: `convlarge` with ordinary batch norm, no weight
    norm, no noise, and images in [0, 1] without ZCA.
  - Label smoothing, gradient clipping, weight decay and the evaluation of
    averaged weights follow the authors' code; the paper does not mention them.
  - The cross-entropy is averaged over the labelled images, the memory loss over
    all images of the batch, as in the authors' code; the paper leaves it open.
  - No gradient flows through step 1, and full gradients flow through step 2,
    the weight max(p̂) included, as in the authors' code.
  - Logarithms add 1e-8 to a probability, and square roots 1e-10 to their
    argument, so that gradients are finite.
  - The running averages of batch norm are divided by their accumulated weight;
    the authors' code does so for the mean alone. In runs of fewer than 60,000
    steps their momentum is below the authors' 0.9999 (`layers.momentum_for`).
  - A row that occurs several times in a batch, as with fewer labels than
    labelled rows, is augmented alike each time, as in all methods here: random
    keys depend on the step and the row.
  - The supervised baseline of a run has as many steps as the run. The authors'
    has epochs of the labelled images; `supervised` with its own steps does that
    (Figure 3).

Differences between the paper and the authors' code, where the default follows
the paper: the code computes `dist` as the L1 distance (`distance='l1'`), and
reads the transposed matrix of values in Eq. 4 (not available here). The presets
of the paper's tables on SVHN, CIFAR-10 and CIFAR-100, and `cifar10-4000-cpu`,
have the L1 distance; `digits` and `mnist-100` have the Euclidean one.

Optional, and not of the paper: a strong view 𝒜(u) of the unlabelled images
(`strong_augment`), as in FixMatch. The memory assigns p̂ to the weak view, and
the divergence of Eq. 9 pulls the prediction of the strong view to it: for
unlabelled images the term is max(p̂) D_KL(p(𝒜(u))‖p̂), where p̂ is a constant.
The entropy H(p̂) stays that of the weak view.
"""

from collections.abc import Sequence
from typing import Literal

import chex
from flax import struct
import jax
import jax.numpy as jnp

from ssljax import losses
from ssljax.core import (
  UNLABELLED,
  BatchSpec,
  Method,
  Stage,
  UsedLabels,
  visible_labels,
)
from ssljax.errors import fraction, non_negative, positive
from ssljax.methods import consistency

Distance = Literal['euclidean', 'l1']
# Keeps the gradient of a square root finite at 0.
EPSILON = 1e-10


class Slots(struct.PyTreeNode):
  """The memory: one slot per class; C classes, D features."""

  keys: jax.Array  # [C, D] running mean feature
  values: jax.Array  # [C, C] running mean prediction, rows sum to 1


def empty_slots(classes: int, embedding: int) -> Slots:
  """Return slots without prior knowledge: keys 0 and uniform values."""
  return Slots(
    jnp.zeros([classes, embedding]),
    jnp.full([classes, classes], 1 / classes, jnp.float32),
  )


def update(slots: Slots, x, p, labels, *, eta: float) -> Slots:
  """Update the memory, Eq. 3. A class that is not in the batch keeps its slot.

  Args:
    slots: memory before this step.
    x: `[B, D]` features.
    p: `[B, C]` predictions.
    labels: `[B]` int32; UNLABELLED rows belong to no class.
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
  """Compute dist(x_b, k_j) `[B, C]`.

  Args:
    x: `[B, D]` features.
    keys: `[C, D]` keys.
    kind: distance of Eq. 6.
  """
  square = jnp.square(x[:, None] - keys[None])
  if kind == 'l1':
    return jnp.sum(jnp.sqrt(square + EPSILON), axis=-1)
  return jnp.sqrt(jnp.sum(square, axis=-1) + EPSILON)


def assimilate(
  slots: Slots, x, labels, *, kind: Distance = 'euclidean', values: bool = True
) -> jax.Array:
  """Compute the memory's predictions p̂ `[B, C]`, Eq. 4–6.

  Args:
    slots: memory after this step's update.
    x: `[B, D]` features.
    labels: `[B]` int32; a labelled row is addressed by position, an UNLABELLED
      row by content.
    kind: distance of Eq. 6.
    values: False returns the addresses: p̂ = w (section 4.2).
  """
  content = jax.nn.softmax(-distance(x, slots.keys, kind))
  position = jax.nn.one_hot(labels, slots.keys.shape[0])
  w = jnp.where((labels == UNLABELLED)[:, None], content, position)
  return w @ slots.values if values else w


def memory_terms(p, p_hat) -> tuple[jax.Array, jax.Array]:
  """Compute the two terms of Eq. 7 for each image.

  Args:
    p: `[B, C]` predictions of the network.
    p_hat: `[B, C]` predictions of the memory.

  Returns:
    The model entropy H(p̂) `[B]` (Eq. 8), and the weighted memory-network
    divergence max(p̂)·D_KL(p‖p̂) `[B]` (Eq. 9).
  """
  divergence = losses.kl_divergence(p, p_hat)
  return losses.entropy(p_hat), jnp.max(p_hat, axis=-1) * divergence


def strong_divergences(p, p_hat, p_strong) -> jax.Array:
  """Compute the weighted divergence `[B]` of Eq. 9 with a strong view.

  Args:
    p: `[B, C]` predictions of the weak views.
    p_hat: `[B, C]` predictions of the memory for them; constants for the
      unlabelled images.
    p_strong: `[U, C]` predictions of the strong views of the unlabelled images,
      the last of the batch.
  """
  first = len(p) - len(p_strong)
  target = jax.lax.stop_gradient(p_hat[first:])
  _, labelled = memory_terms(p[:first], p_hat[:first])
  _, unlabelled = memory_terms(p_strong, target)
  return jnp.concatenate([labelled, unlabelled])


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
  strong_augment: Sequence[str] = (),
) -> Method:
  """Return MA-DNN with the paper's constants.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step.
    steps: length of the only stage.
    eta: η of Eq. 3, the memory's learning rate.
    weight: λ of Eq. 10, weight of the memory loss.
    distance: distance of Eq. 6; 'euclidean' follows the paper, 'l1' its code.
    model_entropy: include the term H(p̂) of Eq. 7 (Table 2).
    divergence: include the term max(p̂)·D_KL(p‖p̂) of Eq. 7 (Table 2).
    values: read value embeddings; without them p̂ = w (section 4.2).
    smoothing: label smoothing of the cross-entropy; 0.001·C in the authors'
      code.
    strong_augment: augmentations of a strong view of the unlabelled images,
      after the run's own; () for no such view, as in the paper.
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
    images = jnp.concatenate([batch.image, *batch.views.values()])
    outputs, stats = net.train(params, state.stats, images, key)
    weak, strong = jnp.split(outputs.logits, [len(batch.image)])
    x, p = outputs.embedding[: len(weak)], jax.nn.softmax(weak)
    labels = visible_labels(state, batch)

    slots = update(state.memory, x, p, labels, eta=eta)
    p_hat = assimilate(slots, x, labels, kind=distance, values=values)
    logits = batch.adjusted(weak)
    terms = losses.cross_entropy(logits, labels, smoothing=smoothing)
    entropies, divergences = memory_terms(p, p_hat)
    if strong_augment:
      divergences = strong_divergences(p, p_hat, jax.nn.softmax(strong))

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

  def quality(state, rows, image):
    del rows
    x = net.infer(state.params, state.stats, image).embedding
    unknown = jnp.full(len(x), UNLABELLED, jnp.int32)
    p_hat = assimilate(state.memory, x, unknown, kind=distance, values=values)
    label = jnp.argmax(p_hat, axis=-1).astype(jnp.int32)
    return UsedLabels(label, jnp.max(p_hat, axis=-1))

  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=loss,
  )
  if strong_augment:
    stage = stage._replace(views=(consistency.strong_view(strong_augment),))
  return Method(name='madnn', stages=(stage,), init=init, quality=quality)
