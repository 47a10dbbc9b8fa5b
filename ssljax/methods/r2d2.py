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
the entropies of p̃ and p̂ (Theorem 2: p̃ is the flatter), how far Σ_j ỹ_j is from
what it was predicted as (Eq. 13: nowhere), and how far p̃ is from the
exponential link of Theorem 1.

Departures: every stage has an optimiser state of its own; batch norm is over
the labelled and unlabelled images of a batch together (the authors' code, over
each of four devices' images); weight decay is of kernels alone.
"""

from typing import Literal

import chex
from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ssljax import losses, optimizers
from ssljax.augment import standard
from ssljax.core import UNLABELLED, BatchSpec, Method, Stage, add_labels
from ssljax.errors import non_negative, positive, require
from ssljax.methods.supervised import supervised_loss


@struct.dataclass
class PseudoLabels:
  """The memory; N images, rounded up to divide over the devices."""

  logits: jax.Array  # [N, C] ỹ
  sums: jax.Array  # [N] Σ_j ỹ_j as they were predicted


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


def of_predicted(y_hat, y) -> jax.Array:
  """σ(y)_n `[B]`, n the class that ŷ predicts, of logits `[B, C]`."""
  n = jnp.argmax(y_hat, axis=-1)[:, None]
  return jnp.take_along_axis(jax.nn.softmax(y), n, axis=-1)[:, 0]


def link(y_hat, y_tilde, alpha: float, beta: float) -> jax.Array:
  """exp(−L/α) p̂_n^(1−β/α) `[B]`: what p̃_n becomes, Theorem 1.

  Of logits and pseudo-logits `[B, C]`. L is that of KL(p̂‖p̃), whatever is
  descended.
  """
  loss = decipher_loss(y_hat, y_tilde, alpha, beta)
  p_n = of_predicted(y_hat, y_hat)
  return jnp.exp(-loss / alpha) * p_n ** (1 - beta / alpha)


def terms(y_hat, y_tilde, kind: Divergence) -> dict[str, jax.Array]:
  """L_c and L_e of Eq. 2, `[B]` each, of logits and pseudo-logits `[B, C]`."""
  return {
    'classification': classification_loss(y_hat, y_tilde, kind),
    'entropy': entropy(y_hat),
  }


def instruments(y_hat, y_tilde, sums, alpha, beta) -> dict[str, jax.Array]:
  """What the paper proves something of, `[B]` each.

  Args:
    y_hat: logits `[B, C]`.
    y_tilde: pseudo-logits `[B, C]`.
    sums: `[B]` of the pseudo-logits as they were predicted.
    alpha: α of Eq. 2.
    beta: β of Eq. 2.
  """
  return {
    'predicted_entropy': entropy(y_hat),
    'pseudo_entropy': entropy(y_tilde),
    'logit_sum': jnp.sum(y_hat, axis=-1),
    'sum_drift': jnp.abs(jnp.sum(y_tilde, axis=-1) - sums),
    'link_gap': jnp.abs(
      of_predicted(y_hat, y_tilde) - link(y_hat, y_tilde, alpha, beta)
    ),
  }


def deep_decipher_loss(net, alpha, beta, kind: Divergence, rate: float):
  """The loss of a `Stage`, Eq. 2, which moves ỹ by Eq. 7; `rate` is λ/B."""

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    y_hat, y_tilde = outputs.logits, state.memory.logits[batch.rows]
    of = lambda y: decipher_loss(y_hat, y, alpha, beta, kind)
    # The slope of each image's own loss; the network's is not of that slope.
    slope = jax.lax.stop_gradient(jax.grad(lambda y: of(y).sum())(y_tilde))
    unknown = state.labels[batch.rows] == UNLABELLED
    moved = jnp.where(unknown[:, None], -rate * slope, 0.0)
    logits = state.memory.logits.at[batch.rows].add(moved)

    sums = state.memory.sums[batch.rows]
    seen = instruments(y_hat, y_tilde, sums, alpha, beta)
    means = {k: losses.mean_where(x, unknown) for k, x in seen.items()}
    means |= {k: jnp.mean(x) for k, x in terms(y_hat, y_tilde, kind).items()}
    memory = state.memory.replace(logits=logits)
    state = state.replace(stats=stats, memory=memory)
    return jnp.mean(of(y_tilde)), (state, means)

  return loss


def hard_label_loss(net):
  """The loss of a `Stage`: cross-entropy of argmax ỹ."""

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    labels = jnp.argmax(state.memory.logits[batch.rows], axis=-1)
    mean = jnp.mean(losses.cross_entropy(outputs.logits, labels))
    return mean, (state.replace(stats=stats), {'cross_entropy': mean})

  return loss


def predict(net):
  """`per_example` of a `Stage`: the logits of images as they are."""

  def per_example(state, image, key):
    del key
    return {'logits': net.infer(state.params, state.stats, image).logits}

  return per_example


def no_pseudo_labels(key, params, stats, spec) -> PseudoLabels:
  """`init` of the method: there are none before the second stage."""
  del key, params, stats
  logits = jnp.zeros([spec.rows, spec.classes])
  return PseudoLabels(logits, jnp.zeros(spec.rows))


def predict_pseudo(state, observed):
  """`epoch_update` of a `Stage`: ỹ ← ŷ, or 10·onehot(y) where the label is given."""
  logits, labels = observed['logits'], state.labels  # [N, C] and [N]
  given = KNOWN * jax.nn.one_hot(labels, logits.shape[-1])
  known = (labels != UNLABELLED)[:, None]
  logits = jnp.where(known, given, logits)
  return state.replace(memory=PseudoLabels(logits, jnp.sum(logits, axis=-1)))


def take_labels(state, rows, labels):
  """`add_labels` of the method: ỹ is 10·onehot(y) from now on."""
  state, memory = add_labels(state, rows, labels), state.memory
  answered = jnp.where(labels == UNLABELLED, len(memory.sums), rows)
  logits = KNOWN * jax.nn.one_hot(labels, memory.logits.shape[-1])
  put = lambda whole, part: whole.at[answered].set(part, mode='drop')
  memory = PseudoLabels(put(memory.logits, logits), put(memory.sums, KNOWN))
  return state.replace(memory=memory)


def r2d2(
  net,
  tx,
  batch_spec: BatchSpec,
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
    batch_spec: labelled and unlabelled images per step of `decipher` and `repeat`.
    steps: length of the stage `decipher`. Its learning rate and decay, and
      those of each part of `repeat`, are the run's.
    alpha: α of Eq. 2, weight of the divergence.
    beta: β of Eq. 2, weight of the entropy; below α (Theorem 1).
    divergence: L_c: KL(p̂‖p̃), KL(p̃‖p̂) or the squared distance (Table 4).
    pseudo_rate: λ/B of Eq. 7: what an image's own slope is multiplied by; the
      authors' λ = 4000 at their batch of 512.
    pretrain: steps of the first stage, `supervised`.
    pretrain_batch: labelled images per step of the first stage.
    pretrain_rate: its learning rate, on a cosine of 7/6 of its length.
    repeat: steps of the second time; 0 leaves it out (Table 1, column a).
    interval: steps of each part of it; the authors' has four. One whole where
      there is neither `repredict` nor `lower` (column b).
    repredict: predict the pseudo-logits again at the start of each part
      (Table 1, columns c and e).
    lower: lower the learning rate from part to part (columns d and e), to 1,
      2/3, 1/3 and from the fourth on 1/30 of the run's.
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
  positive(
    batch_labelled=batch_spec.labelled, batch_unlabelled=batch_spec.unlabelled
  )
  require(
    force or alpha > beta,
    f'`alpha`={alpha}, `beta`={beta}: training fails unless alpha is above '
    'beta (Theorem 1): lower `beta`, or insist with `force=True`',
  )
  require(
    not repeat or (interval > 0 and repeat % interval == 0),
    f'`interval`={interval}: does not divide `repeat`={repeat} steps: give '
    'one that does, or `repeat`=0 to leave the stage out',
  )
  hole = standard.cutout(cutout) if cutout else None
  loss = deep_decipher_loss(net, alpha, beta, divergence, pseudo_rate)
  again = dict(per_example=predict(net), epoch_update=predict_pseudo, every=0)

  def decipher(name, length, share=1.0, predicting=True):
    stage = Stage(name, length, tx(length, share), batch_spec, loss)
    return stage._replace(**again) if predicting else stage

  part = interval if repredict or lower else repeat
  repeated = [
    decipher(
      f'repeat {number + 1}',
      part,
      LOWERED[min(number, len(LOWERED) - 1)] if lower else 1.0,
      repredict,
    )
    for number in range(repeat // part if repeat else 0)
  ]
  cosine = dict(decay='cosine', decay_at=())
  first = Stage(
    'supervised',
    pretrain,
    tx(pretrain * 7 // 6, learning_rate=pretrain_rate, **cosine),
    BatchSpec(pretrain_batch, flag='pretrain_batch'),
    supervised_loss(net),
    augment=hole,
  )
  last = Stage(
    'finetune',
    finetune,
    tx(finetune, learning_rate=finetune_rate, **cosine),
    BatchSpec(0, batch_spec.size, include_labelled=True),
    hard_label_loss(net),
    augment=hole,
  )
  if finetune_labels == 'repredicted':
    last = last._replace(**again)
  stages = (first, decipher('decipher', steps), *repeated, last)
  layout, weights = P('data'), optimizers.weights
  init, take = no_pseudo_labels, take_labels
  return Method('r2d2', stages, init, layout, weights, take)


# Settings of the authors' code on CIFAR-10 that differ from the defaults of
# other runs.
DEFAULTS = {
  'batch_labelled': 128,
  'batch_unlabelled': 384,
  'learning_rate': 0.12,
  'decay': 'constant',
  'weight_decay': 2e-4,
  'clip': 0.0,
  'average': 0.0,
  'preprocess': 'standardize',
  'augment': ['translate4', 'flip'],
}
