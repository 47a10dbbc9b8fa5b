"""VAT: virtual adversarial training, with entropy minimisation.

Miyato, Maeda, Koyama, Ishii, TPAMI 2018. With probabilities p(x) that are
constants, the direction in which the prediction for x changes most is found by
power iteration, and the change is made small:

  d ← a random direction of length 1
  d ← g / ‖g‖,  g = ∇_r D_KL(p(x)‖p(x + r)) at r = ξ d;  K times
  LDS(x) = D_KL(p(x)‖p(x + ε d))
  L = mean CE(y, p(x)) over labelled images
      + α mean LDS(x) over all images + mean H(p(x)) over all images

where the last term is entropy minimisation (VAT+EntMin), and no gradient flows
through d. All passes of a step have the same masks of dropout, and each
normalises by the statistics of its own batch. The running statistics are those
of the clean pass.

Departures from the paper:
  - ξ = 0.01. The authors' 1e-6 is below the resolution of float32: p(x + ξ d)
    then differs from p(x) by rounding.
  - The clean pass is over the labelled and unlabelled images together, and its
    statistics are kept. In the authors' code the two are passes of their own,
    and the statistics are those of the labelled images.
  - The authors' code sums LDS and H over the unlabelled images alone, which
    contain the labelled ones, as `unlabelled`=all does; the paper's sums are
    over both.
  - The learning rate decays as the run says (`decay`). The authors' falls
    linearly from epoch 460 of 500 on, while Adam's β₁ falls to 0.5.
"""

import jax
import jax.numpy as jnp

from ssljax import losses
from ssljax.core import BatchSpec, Loss, Method, Stage
from ssljax.errors import non_negative, positive
from ssljax.methods import consistency


def unit(d) -> jax.Array:
  """Scale every image of `d [B, H, W, c]` to length 1; zeros stay 0."""
  axes = tuple(range(1, d.ndim))
  # The largest value first, so that no square underflows.
  d = d / (jnp.max(jnp.abs(d), axis=axes, keepdims=True) + 1e-30)
  square = jnp.sum(jnp.square(d), axis=axes, keepdims=True)
  return d * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def adversarial_direction(
  logits_at, images, logits, key, xi: float, iterations: int
) -> jax.Array:
  """Return d `[B, H, W, c]` of length 1 for each image, a constant.

  Args:
    logits_at: images `[B, H, W, c]` -> logits `[B, C]`.
    images: x.
    logits: `[B, C]` logits of x.
    key: random key of the first direction.
    xi: ξ.
    iterations: K.
  """
  logits = jax.lax.stop_gradient(logits)
  d = unit(jax.random.normal(key, images.shape, images.dtype))
  change = lambda r: jnp.sum(
    losses.logit_kl_divergence(logits, logits_at(images + r))
  )
  for _ in range(iterations):
    d = unit(jax.grad(change)(xi * d))
  return jax.lax.stop_gradient(d)


def vat_loss(
  net,
  batch_spec: BatchSpec,
  epsilon: float,
  xi: float,
  iterations: int,
  weight: float,
  entropy_weight: float,
) -> Loss:
  """Return the loss of the stage; the arguments are those of `vat`."""

  def loss(params, state, batch, key):
    pass_key, direction_key = jax.random.split(key)
    run = lambda params, images: net.train(
      params, state.stats, images, pass_key
    )
    outputs, stats = run(params, batch.image)
    logits = outputs.logits
    labelled = consistency.labelled_cross_entropy(
      logits[: batch_spec.labelled], state, batch
    )
    constant = jax.lax.stop_gradient(params)
    d = adversarial_direction(
      lambda images: run(constant, images)[0].logits,
      batch.image,
      logits,
      direction_key,
      xi,
      iterations,
    )
    moved = run(params, batch.image + epsilon * d)[0].logits
    smoothness = losses.logit_kl_divergence(
      jax.lax.stop_gradient(logits), moved
    )
    metrics = {
      'cross_entropy': labelled,
      'smoothness': jnp.mean(smoothness),
      'entropy': jnp.mean(losses.logit_entropy(logits)),
    }
    total = (
      labelled
      + weight * metrics['smoothness']
      + entropy_weight * metrics['entropy']
    )
    return total, (state.replace(stats=stats), metrics)

  return loss


def vat(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  epsilon: float = 8.0,
  xi: float = 0.01,
  iterations: int = 1,
  weight: float = 1.0,
  entropy_weight: float = 1.0,
) -> Method:
  """Return VAT+EntMin with the authors' constants on augmented CIFAR-10.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step.
    steps: length of the only stage.
    epsilon: ε, length of the perturbation of an image.
    xi: ξ, length of the step at which the gradient of the divergence is taken.
    iterations: K, steps of the power iteration.
    weight: α, weight of the smoothness LDS.
    entropy_weight: weight of the entropy; 0 is VAT alone.
  """
  consistency.check(batch_spec, steps)
  positive(epsilon=epsilon, xi=xi, iterations=iterations)
  non_negative(weight=weight, entropy_weight=entropy_weight)
  stage = Stage(
    name='semi-supervised',
    steps=steps,
    tx=tx(steps),
    batch_spec=batch_spec,
    loss=vat_loss(
      net, batch_spec, epsilon, xi, iterations, weight, entropy_weight
    ),
  )
  return Method(
    name='vat',
    stages=(stage,),
    quality=consistency.predicted_quality(net, consistency.use_all),
  )


# Settings of the authors' code on CIFAR-10 that differ from the defaults of
# other runs.
DEFAULTS = {
  'unlabelled': 'all',
  'batch_labelled': 32,
  'batch_unlabelled': 128,
  'optimizer': 'adam',
  'learning_rate': 1e-3,
  'decay': 'constant',
  'weight_decay': 0.0,
  'clip': 0.0,
  'average': 0.0,
  'preprocess': 'zca',
  'augment': ['flip', 'translate'],
}
