"""FlexMatch: FixMatch with a threshold for each class.

Zhang, Wang, Hou, Wu, Wang, Okumura, Shinozaki, NeurIPS 2021. The memory has for
each of N unlabelled images the class of its last prediction q whose confidence
was at least τ. A class that is seldom predicted so has a lower threshold
(curriculum pseudo-labelling):

  σ(c) = number of images whose last confident prediction is c
  β(c) = σ(c) / max(max_c σ(c), N − Σ_c σ(c))
  T(c) = M(β(c)) τ,  M(x) = x / (2 − x)
  L_u = 1/μB Σ_b 1[max q_b ≥ T(argmax q_b)] CE(argmax q_b, p(𝒜(u_b)))

and the rest is FixMatch. The thresholds of a step are those before it; then the
images of the step whose confidence is at least τ are recorded.

Departures from the paper:
  - Those of `fixmatch`.
  - The paper writes > for the comparisons with thresholds; the authors' code
    has ≥.
  - N counts the images that have no label at the start or that were drawn as
    unlabelled and recorded, so labelled images that no step draws as unlabelled
    do not delay the warm-up. Images that no step draws, such as those held out
    for validation, do not count.
  - If an image occurs twice among the unlabelled images of a step, its first
    prediction is recorded.
"""

from collections.abc import Sequence
import functools

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ssljax import neighbours
from ssljax.core import UNLABELLED, BatchSpec, Loss, Method, Stage, layout
from ssljax.errors import non_negative, probability
from ssljax.methods import consistency
from ssljax.methods.fixmatch import DEFAULTS as FIXMATCH

NONE = -1  # no confident prediction yet
ABSENT = -2  # a labelled image, one that is not drawn, or padding


class Confident(struct.PyTreeNode):
  """The memory; N images, and padding."""

  label: jax.Array  # [N] int32, last confident prediction, NONE or ABSENT
  counts: jax.Array  # [C] int32 σ
  unused: jax.Array  # [] int32, number of images that are NONE


LAYOUT = layout(Confident, label=P('data'), counts=P(), unused=P())


def nothing_confident(key, params, stats, spec) -> Confident:
  """Return the memory before the first step."""
  del key, params, stats
  counted = (spec.labels == UNLABELLED) & spec.is_admitted()
  return Confident(
    label=jnp.where(counted, NONE, ABSENT).astype(jnp.int32),
    counts=jnp.zeros(spec.classes, jnp.int32),
    unused=jnp.sum(counted.astype(jnp.int32)),
  )


def thresholds(memory: Confident, tau: float, warmup: bool = True) -> jax.Array:
  """Compute T(c) `[C]`, the thresholds of the classes.

  Args:
    memory: memory before the step.
    tau: τ.
    warmup: False leaves N − Σ σ out of the maximum.
  """
  largest = jnp.max(memory.counts)
  if warmup:
    largest = jnp.maximum(largest, memory.unused)
  sigma = memory.counts.astype(jnp.float32)
  beta = sigma / jnp.maximum(largest, 1).astype(jnp.float32)
  return tau * beta / (2 - beta)


def is_used(p, memory: Confident, tau: float, warmup: bool) -> jax.Array:
  """Return the mask `[U]` of the images that L_u learns from.

  Args:
    p: `[U, C]` probabilities.
    memory: memory before the step.
    tau: τ.
    warmup: as in `thresholds`.
  """
  q = consistency.pseudo_labels(p)
  return q.confidence >= thresholds(memory, tau, warmup)[q.label]


def record(memory: Confident, rows, label, confident) -> Confident:
  """Record the confident predictions of a step.

  The counts change by the images of the step alone.

  Args:
    memory: memory before the step.
    rows: `[U]` int32 rows of the unlabelled images.
    label: `[U]` int32 predicted classes.
    confident: `[U]` bool, True where the confidence is at least τ.
  """
  new = confident & neighbours.first_of_each(rows)
  old = memory.label[rows]
  classes = len(memory.counts)
  of = lambda label, where: jnp.sum(
    jax.nn.one_hot(jnp.where(where, label, -1), classes, dtype=jnp.int32),
    axis=0,
  )
  freed = jnp.sum((new & (old == NONE)).astype(jnp.int32))
  place = jnp.where(new, rows, len(memory.label))
  return Confident(
    label=memory.label.at[place].set(label, mode='drop'),
    counts=memory.counts + of(label, new) - of(old, new),
    unused=memory.unused - freed,
  )


def flexmatch_loss(
  net, batch_spec: BatchSpec, tau: float, weight: float, warmup: bool
) -> Loss:
  """Return the loss of the stage; the arguments are those of `flexmatch`."""

  def loss(params, state, batch, key):
    logits, stats = consistency.forward(net, params, state.stats, batch, key)
    labelled = consistency.labelled_cross_entropy(logits.labelled, state, batch)
    p = consistency.probabilities(logits.weak)
    p, state = consistency.align(p, state, batch)
    q = consistency.pseudo_labels(p)
    limits = thresholds(state.memory, tau, warmup)
    mask = q.confidence >= limits[q.label]
    unlabelled = consistency.weighted_cross_entropy(
      logits.strong, q.label, mask
    )
    rows = batch.rows[batch_spec.labelled :]
    memory = record(state.memory, rows, q.label, q.confidence >= tau)
    metrics = {
      'cross_entropy': labelled,
      'consistency': unlabelled,
      'mask': jnp.mean(mask.astype(labelled.dtype)),
      'confidence': jnp.mean(q.confidence),
      'threshold': jnp.mean(limits),
      'least_threshold': jnp.min(limits),
    }
    total = labelled + weight * unlabelled
    return total, (state.replace(stats=stats, memory=memory), metrics)

  return loss


def flexmatch(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  threshold: float = 0.95,
  weight: float = 1.0,
  warmup: bool = True,
  strong_augment: Sequence[str] = ('randaugment:2:10', 'cutout'),
  distribution_alignment: bool = False,
  ema: float = 0.999,
) -> Method:
  """Return FlexMatch with the paper's constants.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step; their ratio is μ.
    steps: length of the only stage.
    threshold: τ, confidence of a prediction that is recorded, and largest
      threshold of a class.
    weight: weight of the loss on unlabelled images.
    warmup: let all thresholds rise from 0 while most images have no confident
      prediction.
    strong_augment: augmentations of the strong view, after the run's own.
    distribution_alignment: align the predictions that become pseudo-labels with
      the class frequencies of the labels (ReMixMatch).
    ema: decay of the average of the weights that is evaluated; 0 leaves it to
      `average`.
  """
  consistency.check(batch_spec, steps)
  probability(threshold=threshold)
  non_negative(weight=weight)
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=flexmatch_loss(net, batch_spec, threshold, weight, warmup),
    views=(consistency.strong_view(strong_augment),),
  )
  return Method(
    name='flexmatch',
    aligns=distribution_alignment,
    stages=(stage,),
    init=nothing_confident,
    layout=LAYOUT,
    uses_admitted=True,
    averaging=consistency.averaging(ema),
    quality=consistency.predicted_quality(
      net, functools.partial(is_used, tau=threshold, warmup=warmup)
    ),
  )


DEFAULTS = FIXMATCH  # on CIFAR-10
