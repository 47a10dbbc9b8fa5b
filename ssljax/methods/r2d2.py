"""R2-D2: repetitive reprediction deep decipher.

Wang, Wu, AAAI 2021. Beside the network's logits ŷ every image has pseudo-logits
ỹ of its own; p̂ = σ(ŷ), p̃ = σ(ỹ), σ the softmax. In turn:

  1. supervised on the labelled images alone
  2. decipher   ỹ ← ŷ, or 10·onehot(y) where labelled, which never changes; then
                  descend  L = α·KL(p̂‖p̃) + β·H(p̂)                      Eq. 2
                  ỹ ← ỹ − λ ∂L/∂ỹ                                       Eq. 7
     repeat     the same once more, with ỹ ← ŷ again every few epochs and a
                learning rate that is lowered each time          (section R2)
  3. finetune   on the hard labels argmax ỹ of all images

The network's slope flows through both factors of the divergence; ỹ is moved by
the slope of the same forward pass.

The unit of λ: the authors' 4,000 multiplies the slope of a mean over a batch of
512, so that an image's own slope, Eq. 6, is multiplied by 4000 / 512 = 7.8125.
That number is `pseudo_rate`, and does not depend on the batch here. (Eq. 7 as
printed would move ỹ by λα = 400, past every finite slope.)

What the paper proves is reported in training, of the batch's unlabelled rows:
the entropies of p̃ and p̂ (Theorem 2: p̃ is the flatter), Σ_j ỹ_j and the most it
has moved (Eq. 12: not at all, between repredictions), and how far p̃ is from the
exponential link of Theorem 1.

Departures: every stage has an optimiser state of its own; batch norm is over
the labelled and unlabelled images of a batch together (the authors' code, over
each of four devices' images).
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ssljax import augment, losses, optimizers
from ssljax.core import (
  UNLABELLED,
  Draw,
  Method,
  Stage,
  non_negative,
  positive,
  require,
)
from ssljax.methods.supervised import supervised_loss

Divergence = Literal['kl_reverse', 'kl', 'mse']
KNOWN = 10.0  # K, the pseudo-logit of a given label
# Learning rates of the parts of `repeat`, as shares of that of `decipher`.
LOWERED = (1.0, 2 / 3, 1 / 3, 1 / 30)


def classification_loss(
  y_hat, y_tilde, kind: Divergence = 'kl_reverse'
) -> jax.Array:
  """L_c `[B]` of logits and pseudo-logits `[B, C]`.

  'kl_reverse' is KL(p̂‖p̃) of Eq. 2, 'kl' KL(p̃‖p̂) and 'mse' ‖p̃ − p̂‖²
  (Table 4).
  """
  chex.assert_equal_shape([y_hat, y_tilde])
  log_hat, log_tilde = map(jax.nn.log_softmax, (y_hat, y_tilde))
  if kind == 'mse':
    return jnp.sum(jnp.square(jnp.exp(log_tilde) - jnp.exp(log_hat)), axis=-1)
  if kind == 'kl':
    log_hat, log_tilde = log_tilde, log_hat
  return jnp.sum(jnp.exp(log_hat) * (log_hat - log_tilde), axis=-1)


def entropy(y: jax.Array) -> jax.Array:
  """H(σ(y)) `[B]` of logits `[B, C]`: L_e of Eq. 2 for ŷ."""
  log_p = jax.nn.log_softmax(y)
  return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def decipher_loss(
  y_hat, y_tilde, alpha: float, beta: float, kind: Divergence = 'kl_reverse'
) -> jax.Array:
  """L `[B]` of Eq. 2, of logits and pseudo-logits `[B, C]`."""
  return alpha * classification_loss(y_hat, y_tilde, kind) + beta * entropy(
    y_hat
  )


def link_gap(y_hat, y_tilde, alpha: float, beta: float) -> jax.Array:
  """|p̃_n − exp(−L/α) p̂_n^(1−β/α)| `[B]`, n the predicted class: Theorem 1.

  Of logits and pseudo-logits `[B, C]`, for the L of Eq. 2. 0 once the network
  has converged, for any L whose divergence is KL(p̂‖p̃).
  """
  n = jnp.argmax(y_hat, axis=-1)[:, None]
  of_n = lambda y: jnp.take_along_axis(jax.nn.log_softmax(y), n, -1)[:, 0]
  loss = decipher_loss(y_hat, y_tilde, alpha, beta)
  link = -loss / alpha + (1 - beta / alpha) * of_n(y_hat)
  return jnp.abs(jnp.exp(of_n(y_tilde)) - jnp.exp(link))


def instruments(y_hat, y_tilde, moved, unknown, alpha, beta, kind) -> dict:
  """What is reported of the images `[B]` in `unknown`.

  Args:
    y_hat: logits `[B, C]`.
    y_tilde: pseudo-logits `[B, C]` before they are moved.
    moved: what is added to them, `[B, C]`.
    unknown: `[B]` bool, the label is not given.
    alpha: α of Eq. 2.
    beta: β of Eq. 2.
    kind: L_c.
  """
  rows = {
    'classification': classification_loss(y_hat, y_tilde, kind),
    'entropy': entropy(y_hat),
    'pseudo_entropy': entropy(y_tilde),
    'logit_sum': jnp.sum(y_hat, axis=-1),
    'pseudo_sum': jnp.sum(y_tilde, axis=-1),
    'link_gap': link_gap(y_hat, y_tilde, alpha, beta),
  }
  means = {name: losses.mean_where(x, unknown) for name, x in rows.items()}
  return means | {'sum_moved': jnp.max(jnp.abs(jnp.sum(moved, axis=-1)))}


def deep_decipher_loss(net, alpha, beta, kind: Divergence, rate: float):
  """The loss of a `Stage`, Eq. 2, which moves ỹ by Eq. 7; `rate` is λ/B."""

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    y_hat, y_tilde = outputs.logits, state.memory[batch.rows]
    terms = lambda y: decipher_loss(y_hat, y, alpha, beta, kind)
    # ỹ's slope of each image's own loss; the network's is not of that slope.
    slope = jax.lax.stop_gradient(jax.grad(lambda y: terms(y).sum())(y_tilde))
    unknown = state.labels[batch.rows] == UNLABELLED
    moved = jnp.where(unknown[:, None], -rate * slope, 0.0)
    memory = state.memory.at[batch.rows].add(moved)
    metrics = instruments(y_hat, y_tilde, moved, unknown, alpha, beta, kind)
    state = state.replace(stats=stats, memory=memory)
    return jnp.mean(terms(y_tilde)), (state, metrics)

  return loss


def hard_label_loss(net):
  """The loss of a `Stage`: cross-entropy of argmax ỹ."""

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    labels = jnp.argmax(state.memory[batch.rows], axis=-1)
    mean = jnp.mean(losses.cross_entropy(outputs.logits, labels))
    return mean, (state.replace(stats=stats), {'cross_entropy': mean})

  return loss


def predict(net):
  """`observe` of a `Stage`: the logits of images as they are."""

  def observe(state, image, key):
    del key
    return {'logits': net.infer(state.params, state.stats, image).logits}

  return observe


def predict_pseudo(state, observed):
  """`refresh` of a `Stage`: ỹ ← ŷ, or 10·onehot(y) where the label is given."""
  logits = observed['logits']  # [N, C]; more rows where N was rounded up
  missing = logits.shape[0] - state.labels.shape[0]
  labels = jnp.pad(state.labels, (0, missing), constant_values=UNLABELLED)
  given = KNOWN * jax.nn.one_hot(labels, logits.shape[-1])
  known = (labels != UNLABELLED)[:, None]
  return state.replace(memory=jnp.where(known, given, logits))


def r2d2(
  net,
  tx,
  draw: Draw,
  steps: int,
  *,
  alpha: float = 0.1,
  beta: float = 0.03,
  divergence: Divergence = 'kl_reverse',
  pseudo_rate: float = 7.8125,
  pretrain: int = 30_000,
  pretrain_batch: int = 40,
  pretrain_rate: float = 0.05,
  repeat: int = 35_700,
  interval: int = 8_925,
  repredict: bool = True,
  lower: bool = True,
  finetune: int = 4_850,
  finetune_rate: float = 0.01,
  finetune_labels: Literal['pseudo', 'repredicted'] = 'pseudo',
  cutout: int = 16,
  force: bool = False,
) -> Method:
  """R2-D2 with the constants of its code on CIFAR-10.

  Args:
    net: the `Network`.
    tx: `(steps, scale, **changes) -> optimiser` of a stage, see
      `optimizers.optimizer`.
    draw: labelled and unlabelled images per step of `decipher` and `repeat`.
    steps: length of the stage `decipher`; the learning rate of the run is its,
      that of `supervised` and `finetune` falls on a cosine of their own.
    alpha: α of Eq. 2, weight of the divergence.
    beta: β of Eq. 2, weight of the entropy; below α (Theorem 1).
    divergence: L_c: KL(p̂‖p̃), KL(p̃‖p̂) or the squared distance (Table 4).
    pseudo_rate: λ/B of Eq. 7: what an image's own slope is multiplied by; the
      authors' λ = 4000 at their batch of 512.
    pretrain: steps of the first stage, `supervised`.
    pretrain_batch: labelled images per step of the first stage.
    pretrain_rate: its learning rate, on a cosine of 7/6 of its length.
    repeat: steps of the second time; 0 leaves it out (Table 1, column a).
    interval: steps of each part of it; the authors' has four.
    repredict: predict the pseudo-logits again at the start of each part
      (Table 1, columns c and e).
    lower: lower the learning rate from part to part (columns d and e).
    finetune: steps of the last stage.
    finetune_rate: its learning rate, on a cosine to 0.
    finetune_labels: argmax of the pseudo-logits as they are, or of the
      network's logits at the start of the stage.
    cutout: side of the hole in the images of the first and the last stage; 0
      for none.
    force: allow beta to be alpha or more.
  """
  positive(steps=steps, pretrain=pretrain, finetune=finetune)
  positive(pretrain_batch=pretrain_batch, pseudo_rate=pseudo_rate, alpha=alpha)
  positive(pretrain_rate=pretrain_rate, finetune_rate=finetune_rate)
  non_negative(beta=beta, repeat=repeat, cutout=cutout)
  positive(batch_labelled=draw.labelled, batch_unlabelled=draw.other)
  require(
    force or alpha > beta,
    f'--alpha={alpha}, --beta={beta}: training fails unless alpha is above '
    'beta (Theorem 1): lower --beta, or insist with --force',
  )
  require(
    not repeat or 0 < interval <= repeat,
    f'--interval={interval}: is not within --repeat={repeat} steps: give a '
    'smaller one, or --repeat=0 to leave the stage out',
  )
  hole = augment.cutout(cutout) if cutout else None
  loss = deep_decipher_loss(net, alpha, beta, divergence, pseudo_rate)
  again = dict(observe=predict(net), refresh=predict_pseudo, every=0)

  def decipher(name, length, share=1.0, predicting=True):
    stage = Stage(name, length, tx(length, share), draw, loss)
    return stage._replace(**again) if predicting else stage

  def repeated():
    for part, start in enumerate(range(0, repeat, interval)):
      share = LOWERED[min(part, len(LOWERED) - 1)] if lower else 1.0
      length = min(interval, repeat - start)
      yield decipher(f'repeat {part + 1}', length, share, repredict)

  cosine = dict(decay='cosine', decay_at=())
  first = Stage(
    'supervised',
    pretrain,
    tx(pretrain * 7 // 6, learning_rate=pretrain_rate, **cosine),
    Draw(pretrain_batch, flag='pretrain_batch'),
    supervised_loss(net),
    augment=hole,
  )
  last = Stage(
    'finetune',
    finetune,
    tx(finetune, learning_rate=finetune_rate, **cosine),
    Draw(0, draw.size, everything=True),
    hard_label_loss(net),
    augment=hole,
  )
  if finetune_labels == 'repredicted':
    last = last._replace(**again)
  init = lambda key, params, stats, spec: jnp.zeros([spec.rows, spec.classes])
  stages = (first, decipher('decipher', steps), *repeated(), last)
  return Method('r2d2', stages, init, P('data'), optimizers.weights)
