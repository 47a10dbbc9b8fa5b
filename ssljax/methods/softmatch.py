"""SoftMatch: FixMatch with a weight that falls smoothly with the confidence.

Chen, Tao, Fan, Wang, Wang, Schiele, Xie, Raj, Savvides, ICLR 2023. The weight
of an unlabelled image is a Gaussian in its confidence, truncated above the
mean, whose moments are moving averages over the batches:

  μ̂ ← m μ̂ + (1 − m) mean_b max q_b
  σ̂² ← m σ̂² + (1 − m) var_b max q_b,  unbiased
  λ(q) = exp(−(min(max q − μ̂, 0))² / (2 σ̂² / k²)),  k = 2 as in their code
  L_u = 1/μB Σ_b λ(q̄_b) CE(argmax q_b, p(𝒜(u_b)))

Uniform alignment replaces q by q̄ ∝ q · u / p̂ in λ and its moments,
with u = 1/C and p̂ ← m p̂ + (1 − m) mean_b q_b; the pseudo-label itself is that
of q. The averages are updated before they are used. The rest is FixMatch.

Departures from the paper:
  - Those of `fixmatch`.
  - Alignment adds 1e-6 to both distributions, p̂ starts as the first batch's
    mean, and k = 2, as in the authors' code. The paper's formula has k = 1.
  - The moments of a single unlabelled image per step have no variance: its
    variance counts as 0.
"""

from collections.abc import Sequence
import functools

from flax import struct
import jax
import jax.numpy as jnp

from ssljax.core import BatchSpec, Loss, Method, Stage
from ssljax.errors import fraction, non_negative, positive
from ssljax.methods import consistency
from ssljax.methods.fixmatch import DEFAULTS as FIXMATCH

EPSILON = 1e-6  # added to the distributions of the alignment


class Moments(struct.PyTreeNode):
  """The memory."""

  mean: jax.Array  # [] μ̂
  variance: jax.Array  # [] σ̂²
  classes: jax.Array  # [C] p̂


def init_moments(key, params, stats, spec) -> Moments:
  """Return the memory before the first step: μ̂ = 1/C, σ̂² = 1."""
  del key, params, stats
  uniform = jnp.full(spec.classes, 1 / spec.classes)
  return Moments(jnp.float32(1 / spec.classes), jnp.ones([]), uniform)


def align(moments: Moments, q, m: float, step) -> tuple[Moments, jax.Array]:
  """Update p̂ and return q̄ `[U, C]`, the aligned probabilities.

  Args:
    moments: memory before the step.
    q: `[U, C]` probabilities.
    m: decay of p̂.
    step: `[]` int32 within the stage; at the first, p̂ is the batch's mean.
  """
  mean = jnp.mean(q, axis=0)
  moved = m * moments.classes + (1 - m) * mean
  moments = moments.replace(classes=jnp.where(step == 0, mean, moved))
  return moments, aligned(moments, q)


def aligned(moments: Moments, q) -> jax.Array:
  """Return q̄ `[U, C]` of probabilities `q [U, C]` by p̂ of the memory."""
  classes = moments.classes
  ratio = (1 / q.shape[-1] + EPSILON) / (classes + EPSILON)
  p = q * ratio[None]
  return p / jnp.sum(p, axis=-1, keepdims=True)


def update_moments(moments: Moments, confidence, m: float) -> Moments:
  """Update μ̂ and σ̂².

  Args:
    moments: memory before the step.
    confidence: `[U]` largest probabilities.
    m: decay.
  """
  mean = jnp.mean(confidence)
  squares = jnp.sum(jnp.square(confidence - mean))
  variance = squares / max(len(confidence) - 1, 1)
  return moments.replace(
    mean=m * moments.mean + (1 - m) * mean,
    variance=m * moments.variance + (1 - m) * variance,
  )


def weights_of(moments: Moments, confidence, sigmas: float) -> jax.Array:
  """Compute λ `[U]`.

  Args:
    moments: memory after its update.
    confidence: `[U]` largest probabilities.
    sigmas: k.
  """
  below = jnp.minimum(confidence - moments.mean, 0.0)
  variance = jnp.maximum(moments.variance, 1e-12) / sigmas**2
  return jnp.exp(-jnp.square(below) / (2 * variance))


def predicted_weights(
  q, moments: Moments, sigmas: float, uniform: bool
) -> jax.Array:
  """Return λ `[U]` by the memory, without updating it.

  Args:
    q: `[U, C]` probabilities.
    moments: memory.
    sigmas: k.
    uniform: align the probabilities.
  """
  confidence = jnp.max(aligned(moments, q) if uniform else q, axis=-1)
  return weights_of(moments, confidence, sigmas)


def softmatch_loss(
  net, weight: float, m: float, sigmas: float, uniform: bool
) -> Loss:
  """Return the loss of the stage; the arguments are those of `softmatch`."""

  def loss(params, state, batch, key):
    logits, stats = consistency.forward(net, params, state.stats, batch, key)
    labelled = consistency.labelled_cross_entropy(logits.labelled, state, batch)
    q = consistency.probabilities(logits.weak)
    moments, q_bar = align(state.memory, q, m, batch.step)
    confidence = jnp.max(q_bar if uniform else q, axis=-1)
    moments = update_moments(moments, confidence, m)
    lambdas = weights_of(moments, confidence, sigmas)
    unlabelled = consistency.weighted_cross_entropy(
      logits.strong, consistency.pseudo_labels(q).label, lambdas
    )
    metrics = {
      'cross_entropy': labelled,
      'consistency': unlabelled,
      'mask': jnp.mean(lambdas),
      'confidence': jnp.mean(jnp.max(q, axis=-1)),
      'confidence_mean': moments.mean,
      'confidence_deviation': jnp.sqrt(moments.variance),
    }
    total = labelled + weight * unlabelled
    return total, (state.replace(stats=stats, memory=moments), metrics)

  return loss


def softmatch(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  weight: float = 1.0,
  moments_ema: float = 0.999,
  sigmas: float = 2.0,
  uniform_alignment: bool = True,
  strong_augment: Sequence[str] = ('randaugment:2:10', 'cutout'),
  ema: float = 0.999,
) -> Method:
  """Return SoftMatch with the constants of its code.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step; their ratio is μ.
    steps: length of the only stage.
    weight: weight of the loss on unlabelled images.
    moments_ema: m, decay of the averages μ̂, σ̂² and p̂.
    sigmas: k, factor of the distance to the mean in the weight of an image.
    uniform_alignment: align the confidences to equally many images per class.
    strong_augment: augmentations of the strong view, after the run's own.
    ema: decay of the average of the weights that is evaluated; 0 leaves it to
      `average`.
  """
  consistency.check(batch_spec, steps)
  non_negative(weight=weight)
  fraction(moments_ema=moments_ema)
  positive(sigmas=sigmas)
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=softmatch_loss(net, weight, moments_ema, sigmas, uniform_alignment),
    views=(consistency.strong_view(strong_augment),),
  )
  return Method(
    name='softmatch',
    stages=(stage,),
    init=init_moments,
    averaging=consistency.averaging(ema),
    quality=consistency.predicted_quality(
      net,
      functools.partial(
        predicted_weights, sigmas=sigmas, uniform=uniform_alignment
      ),
    ),
  )


DEFAULTS = FIXMATCH  # on CIFAR-10
