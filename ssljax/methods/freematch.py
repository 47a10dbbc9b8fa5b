"""FreeMatch: FixMatch with thresholds that follow the model's confidence.

Wang, Chen, Heng, Hou, Fan, Wu, Wang, Savvides, Shinozaki, Raj, Schiele, Xie,
ICLR 2023. Moving averages over the unlabelled batches, with q_b the predictions
of the weak views and Q_b those of the strong ones:

  τ ← m τ + (1 − m) mean_b max q_b,  τ_0 = 1/C
  p̃ ← m p̃ + (1 − m) mean_b q_b,  p̃_0 = 1/C
  h̃ ← m h̃ + (1 − m) Hist_b(argmax q_b),  h̃_0 = 1/C
  τ(c) = p̃(c) / max_c p̃(c) · τ
  L_u = 1/μB Σ_b 1[max q_b ≥ τ(argmax q_b)] CE(argmax q_b, Q_b)
  L_f = −H(SumNorm(p̃ / h̃), SumNorm(p̄ / h̄))

p̄ and h̄ are the mean of Q_b and the histogram of argmax Q_b over the images that
L_u selects; H(a, b) = −Σ a log b. A step minimises L_s + w_u L_u + w_f L_f.
The averages are updated before they are used. Gradients flow through Q_b alone.
The rest is FixMatch.

Departures from the paper:
  - Those of `fixmatch`.
  - The paper writes > in L_u; the authors' code has ≥.
  - A class with h̃ or h̄ = 0 has the ratio 0, the logarithm adds 1e-12, and L_f
    is 0 if no image is selected, as in the authors' code.
"""

from collections.abc import Sequence

from flax import struct
import jax
import jax.numpy as jnp

from ssljax.core import BatchSpec, Loss, Method, Stage
from ssljax.errors import fraction, non_negative
from ssljax.methods import consistency
from ssljax.methods.fixmatch import DEFAULTS as FIXMATCH

EPSILON = 1e-12  # in the logarithm of L_f


class Averages(struct.PyTreeNode):
  """The memory."""

  threshold: jax.Array  # [] τ
  classes: jax.Array  # [C] p̃
  histogram: jax.Array  # [C] h̃


def init_averages(key, params, stats, spec) -> Averages:
  """Return the memory before the first step."""
  del key, params, stats
  uniform = jnp.full(spec.classes, 1 / spec.classes)
  return Averages(jnp.float32(1 / spec.classes), uniform, jnp.copy(uniform))


def update_averages(averages: Averages, q, m: float) -> Averages:
  """Update τ, p̃ and h̃.

  Args:
    averages: memory before the step.
    q: `[U, C]` predictions of the weak views.
    m: decay.
  """
  label = jnp.argmax(q, axis=-1)
  histogram = jnp.mean(jax.nn.one_hot(label, q.shape[-1]), axis=0)
  new = Averages(jnp.mean(jnp.max(q, axis=-1)), jnp.mean(q, axis=0), histogram)
  return jax.tree.map(lambda old, new: m * old + (1 - m) * new, averages, new)


def thresholds(averages: Averages) -> jax.Array:
  """Compute τ(c) `[C]`, the thresholds of the classes."""
  shares = averages.classes / jnp.max(averages.classes)
  return shares * averages.threshold


def is_used(p, averages: Averages) -> jax.Array:
  """Return the mask `[U]` of the images that L_u learns from.

  Args:
    p: `[U, C]` probabilities.
    averages: memory.
  """
  q = consistency.pseudo_labels(p)
  return q.confidence >= thresholds(averages)[q.label]


def _ratio(p, h) -> jax.Array:
  """Compute SumNorm(p / h) `[C]`, with 0 where h is 0."""
  ratio = jnp.where(h > 0, p / jnp.where(h > 0, h, 1.0), 0.0)
  total = jnp.sum(ratio)
  return ratio / jnp.where(total > 0, total, 1.0)


def fairness(averages: Averages, strong, mask) -> jax.Array:
  """Compute L_f `[]`; 0 if no image is selected.

  Args:
    averages: memory after its update.
    strong: `[U, C]` logits of the strong views.
    mask: `[U]` bool, the images that L_u selects.
  """
  selected = mask.astype(strong.dtype)[:, None]
  count = jnp.maximum(jnp.sum(selected), 1.0)
  p = jax.nn.softmax(strong)
  predicted = jax.nn.one_hot(jnp.argmax(p, axis=-1), p.shape[-1])
  mean = lambda x: jnp.sum(selected * x, axis=0) / count
  target = _ratio(averages.classes, averages.histogram)
  ours = _ratio(mean(p), mean(predicted))
  loss = jnp.sum(target * jnp.log(ours + EPSILON))
  return jnp.where(jnp.any(mask), loss, 0.0)


def freematch_loss(net, weight: float, fair: float, m: float) -> Loss:
  """Return the loss of the stage; the arguments are those of `freematch`."""

  def loss(params, state, batch, key):
    logits, stats = consistency.forward(net, params, state.stats, batch, key)
    labelled = consistency.labelled_cross_entropy(logits.labelled, state, batch)
    p = consistency.probabilities(logits.weak)
    averages = update_averages(state.memory, p, m)
    limits, q = thresholds(averages), consistency.pseudo_labels(p)
    mask = q.confidence >= limits[q.label]
    metrics = {
      'cross_entropy': labelled,
      'consistency': consistency.weighted_cross_entropy(
        logits.strong, q.label, mask
      ),
      'fairness': fairness(averages, logits.strong, mask),
      'mask': jnp.mean(mask.astype(labelled.dtype)),
      'confidence': jnp.mean(q.confidence),
      'threshold': averages.threshold,
      'least_threshold': jnp.min(limits),
    }
    total = (
      labelled + weight * metrics['consistency'] + fair * metrics['fairness']
    )
    return total, (state.replace(stats=stats, memory=averages), metrics)

  return loss


def freematch(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  weight: float = 1.0,
  fairness_weight: float = 0.001,
  threshold_ema: float = 0.999,
  strong_augment: Sequence[str] = ('randaugment:2:10', 'cutout'),
  ema: float = 0.999,
) -> Method:
  """Return FreeMatch with the constants of its code on CIFAR-10.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step; their ratio is μ.
    steps: length of the only stage.
    weight: w_u, weight of the loss on unlabelled images.
    fairness_weight: w_f, weight of the fairness loss L_f.
    threshold_ema: m, decay of the averages τ, p̃ and h̃.
    strong_augment: augmentations of the strong view, after the run's own.
    ema: decay of the average of the weights that is evaluated; 0 leaves it to
      `average`.
  """
  consistency.check(batch_spec, steps)
  non_negative(weight=weight, fairness_weight=fairness_weight)
  fraction(threshold_ema=threshold_ema)
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=freematch_loss(net, weight, fairness_weight, threshold_ema),
    views=(consistency.strong_view(strong_augment),),
  )
  return Method(
    name='freematch',
    stages=(stage,),
    init=init_averages,
    averaging=consistency.averaging(ema),
    quality=consistency.predicted_quality(net, is_used),
  )


DEFAULTS = FIXMATCH  # on CIFAR-10
