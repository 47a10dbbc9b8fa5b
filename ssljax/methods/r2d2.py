"""R2-D2: repetitive reprediction deep decipher.

Wang, Wu, AAAI 2021. Beside the network's logits ŷ every image has pseudo-logits
ỹ of its own; p̂ = σ(ŷ) and p̃ = σ(ỹ), where σ is the softmax. The stages are

  supervised  cross-entropy on the labelled images alone
  decipher    ỹ ← ŷ, or 10·onehot(y) for labelled images, where ỹ never changes;
              then in every step
                minimise  L = α·KL(p̂‖p̃) + β·H(p̂)                        Eq. 2
                ỹ ← ỹ − λ ∂L/∂ỹ                                         Eq. 7
  repeat i    the same as `decipher` with a lower learning rate; the stage is
              split into parts, and each predicts ỹ ← ŷ again    (section "R2")
  finetune    cross-entropy of the hard labels argmax ỹ on all images

The network's gradient flows through both factors of the divergence. ỹ moves by
the gradient of the same forward pass.

Unit of λ: the authors' λ = 4000 multiplies the gradient of a mean over a batch
of 512, so the gradient of an image's own loss, Eq. 6, is multiplied by
4000 / 512 = 7.8125. This number is `pseudo_rate`, and it does not depend on the
batch size. (Eq. 7 as printed would move ỹ by λα = 400, more than any gradient.)

The quantities that the paper's theorems are about are reported during training,
for the unlabelled rows of the batch: the entropies of p̃ and p̂ (Theorem 2: p̃ is
flatter), the distance of Σ_j ỹ_j from its value at prediction (Eq. 13: it stays
0), and the distance of p̃ from the exponential link of Theorem 1.

Departures from the paper:
  - The unit of λ, see above; as in the authors' code.
  - Every stage starts a new optimiser state. The authors' combined script keeps
    one state through `decipher` and `repeat`.
  - Batch norm is over the labelled and unlabelled images of a batch together.
    In the authors' code each of four devices normalises its own images.
  - Only parameters of rank 2 or more decay (`optimizers.optimizer`); in the
    authors' code all parameters do. In `convlarge_pytorch` the scales and
    offsets of its norms have rank 2, and decay too.
  - The ConvLarge of Tables 6 and 8 is not published. Their presets have the one
    of other PyTorch code that trains it with SGD, `convlarge_pytorch`, with
    input noise of 0.15.
  - A row that occurs several times in a batch is augmented alike each time, as
    in all methods here: random keys depend on the step and the row.
  - Cutout in the first and the last stage, and the cosine schedules of these
    stages, follow the authors' code.
The paper's labels for `finetune` are the default. The authors' code predicts
them again at the start of the stage: `finetune_labels='repredicted'`.
"""

from typing import Any, Literal

import chex
from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ssljax import losses
from ssljax.augment import standard
from ssljax.core import (
  DEFAULT_VIEW,
  UNLABELLED,
  BatchSpec,
  Loss,
  Method,
  PerExample,
  Stage,
  UsedLabels,
  View,
  add_labels,
)
from ssljax.errors import non_negative, positive, require
from ssljax.methods.supervised import fitted, supervised_loss


class PseudoLabels(struct.PyTreeNode):
  """The memory; N images, and padding."""

  logits: jax.Array  # [N, C] ỹ
  sums: jax.Array  # [N] Σ_j ỹ_j when ỹ was predicted


Divergence = Literal['kl_reverse', 'kl', 'mse']
KNOWN = 10.0  # K, the pseudo-logit of a known label
# Learning rates of the parts of `repeat`, relative to that of `decipher`.
LOWERED = (1.0, 2 / 3, 1 / 3, 1 / 30)


def classification_loss(
  y_hat, y_tilde, kind: Divergence = 'kl_reverse'
) -> jax.Array:
  """Compute L_c `[B]`.

  Args:
    y_hat: `[B, C]` logits ŷ.
    y_tilde: `[B, C]` pseudo-logits ỹ.
    kind: 'kl_reverse' is KL(p̂‖p̃) of Eq. 2, 'kl' is KL(p̃‖p̂) and 'mse' is
      ‖p̃ − p̂‖² (Table 4).
  """
  chex.assert_equal_shape([y_hat, y_tilde])
  if kind == 'mse':
    log_hat, log_tilde = map(jax.nn.log_softmax, (y_hat, y_tilde))
    return jnp.sum(jnp.square(jnp.exp(log_tilde) - jnp.exp(log_hat)), axis=-1)
  pair = (y_tilde, y_hat) if kind == 'kl' else (y_hat, y_tilde)
  return losses.logit_kl_divergence(*pair)


def decipher_loss(
  y_hat, y_tilde, alpha: float, beta: float, kind: Divergence = 'kl_reverse'
) -> jax.Array:
  """Compute L `[B]`, Eq. 2, from ŷ and ỹ `[B, C]`."""
  classification = classification_loss(y_hat, y_tilde, kind)
  return alpha * classification + beta * losses.logit_entropy(y_hat)


def probability_of_predicted(y_hat, y) -> jax.Array:
  """Compute σ(y)_n `[B]`, where n is the class that ŷ predicts.

  Args:
    y_hat: `[B, C]` logits ŷ.
    y: `[B, C]` logits of the probability.
  """
  n = jnp.argmax(y_hat, axis=-1)[:, None]
  return jnp.take_along_axis(jax.nn.softmax(y), n, axis=-1)[:, 0]


def link(y_hat, y_tilde, alpha: float, beta: float) -> jax.Array:
  """Compute exp(−L/α) p̂_n^(1−β/α) `[B]`, the limit of p̃_n by Theorem 1.

  L contains KL(p̂‖p̃) in any case, also if another divergence is minimised.

  Args:
    y_hat: `[B, C]` logits ŷ.
    y_tilde: `[B, C]` pseudo-logits ỹ.
    alpha: α of Eq. 2.
    beta: β of Eq. 2.
  """
  loss = decipher_loss(y_hat, y_tilde, alpha, beta)
  p_n = probability_of_predicted(y_hat, y_hat)
  return jnp.exp(-loss / alpha) * p_n ** (1 - beta / alpha)


def terms(y_hat, y_tilde, kind: Divergence) -> dict[str, jax.Array]:
  """Compute L_c and L_e of Eq. 2, each `[B]`, from ŷ and ỹ `[B, C]`."""
  return {
    'classification': classification_loss(y_hat, y_tilde, kind),
    'entropy': losses.logit_entropy(y_hat),
  }


def instruments(y_hat, y_tilde, sums, alpha, beta) -> dict[str, jax.Array]:
  """Compute the quantities of the paper's theorems, each `[B]`.

  Args:
    y_hat: `[B, C]` logits ŷ.
    y_tilde: `[B, C]` pseudo-logits ỹ.
    sums: `[B]` sums of ỹ when it was predicted.
    alpha: α of Eq. 2.
    beta: β of Eq. 2.
  """
  p_tilde = probability_of_predicted(y_hat, y_tilde)
  return {
    'predicted_entropy': losses.logit_entropy(y_hat),
    'pseudo_entropy': losses.logit_entropy(y_tilde),
    'logit_sum': jnp.sum(y_hat, axis=-1),
    'sum_drift': jnp.abs(jnp.sum(y_tilde, axis=-1) - sums),
    'link_gap': jnp.abs(p_tilde - link(y_hat, y_tilde, alpha, beta)),
  }


def deep_decipher_loss(
  net, alpha: float, beta: float, kind: Divergence, rate: float
) -> Loss:
  """Return the loss of `decipher`, Eq. 2, which also moves ỹ, Eq. 7.

  Args:
    net: the `Network`.
    alpha: α of Eq. 2.
    beta: β of Eq. 2.
    kind: divergence of L_c.
    rate: λ/B, factor of the gradient of an image's own loss.
  """

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    y_hat, y_tilde = outputs.logits, state.memory.logits[batch.rows]
    of = lambda y: decipher_loss(y_hat, y, alpha, beta, kind)
    # Gradient of each image's own loss; the network's gradient stops here.
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


def hard_label_loss(net) -> Loss:
  """Return the loss of `finetune`: cross-entropy of argmax ỹ."""

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    labels = jnp.argmax(state.memory.logits[batch.rows], axis=-1)
    mean = jnp.mean(
      losses.cross_entropy(batch.adjusted(outputs.logits), labels)
    )
    return mean, (state.replace(stats=stats), {'cross_entropy': mean})

  return loss


def predict(net) -> PerExample:
  """Return the function that predicts logits without augmentation."""

  def per_example(state, image, key):
    del key
    return {'logits': net.infer(state.params, state.stats, image).logits}

  return per_example


def no_pseudo_labels(key, params, stats, spec) -> PseudoLabels:
  """Return the initial memory, zeros: the second stage predicts it."""
  del key, params, stats
  logits = jnp.zeros([spec.rows, spec.classes])
  return PseudoLabels(logits, jnp.zeros(spec.rows))


def predict_pseudo(state, mapped):
  """Set ỹ ← ŷ, or 10·onehot(y) for labelled images: an `EpochUpdate`.

  Args:
    state: state at the start of a stage.
    mapped: {'logits': [N, C]} ŷ of all images.
  """
  logits, labels = mapped['logits'], state.labels  # [N, C] and [N]
  given = KNOWN * jax.nn.one_hot(labels, logits.shape[-1])
  known = (labels != UNLABELLED)[:, None]
  logits = jnp.where(known, given, logits)
  return state.replace(memory=PseudoLabels(logits, jnp.sum(logits, axis=-1)))


def deciphered(state, rows, image) -> UsedLabels:
  """Return argmax ỹ, see `core.Quality`; not used before it is predicted."""
  del image
  logits = state.memory.logits[rows]
  predicted = jnp.any(logits != 0, axis=-1).astype(logits.dtype)
  return UsedLabels(jnp.argmax(logits, axis=-1).astype(jnp.int32), predicted)


def add_known_logits(state, rows, labels):
  """Set ỹ ← 10·onehot(y) for acquired labels, see `core.AddLabels`."""
  state, memory = add_labels(state, rows, labels), state.memory
  answered = jnp.where(labels == UNLABELLED, len(memory.sums), rows)
  logits = KNOWN * jax.nn.one_hot(labels, memory.logits.shape[-1])
  put = lambda whole, part: whole.at[answered].set(part, mode='drop')
  memory = PseudoLabels(put(memory.logits, logits), put(memory.sums, KNOWN))
  return state.replace(memory=memory)


def repeated_parts(
  repeat: int, interval: int, repredict: bool, lower: bool
) -> list[tuple[int, float]]:
  """Return (steps, factor of the learning rate) of each part of `repeat`.

  The arguments are those of `r2d2`.
  """
  require(
    not repeat or (interval > 0 and repeat % interval == 0),
    f'`interval`={interval}: does not divide `repeat`={repeat} steps: give '
    'one that does, or `repeat`=0 to leave the stage out',
  )
  steps = interval if repredict or lower else repeat
  count = repeat // steps if repeat else 0
  last = len(LOWERED) - 1
  return [
    (steps, LOWERED[min(part, last)] if lower else 1.0) for part in range(count)
  ]


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
  finetune: int = 4_900,
  finetune_rate: float = 0.01,
  finetune_labels: Literal['pseudo', 'repredicted'] = 'pseudo',
  cutout: int = 16,
  force: bool = False,
) -> Method:
  """Return R2-D2 with the constants of its code on CIFAR-10.

  Args:
    net: the `Network`.
    tx: `(steps, scale, **changes) -> optimiser` of a stage, see
      `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step of `decipher` and
      `repeat`.
    steps: length of the stage `decipher`. Its learning rate and decay, and
      those of each part of `repeat`, are the run's.
    alpha: α of Eq. 2, weight of the divergence.
    beta: β of Eq. 2, weight of the entropy; below α (Theorem 1).
    divergence: L_c: KL(p̂‖p̃), KL(p̃‖p̂) or the squared distance (Table 4).
    pseudo_rate: λ/B of Eq. 7, factor of the gradient of an image's own loss;
      the authors' λ = 4000 at their batch of 512.
    pretrain: steps of the first stage, `supervised`.
    pretrain_batch: labelled images per step of the first stage.
    pretrain_rate: learning rate of the first stage, with a cosine decay over
      7/6 of its length.
    repeat: steps of all parts of `repeat` together; 0 leaves them out (Table 1,
      column a).
    interval: steps of each part of `repeat`; the authors have four parts. There
      is a single part without `repredict` and `lower` (column b).
    repredict: predict the pseudo-logits again at the start of each part
      (Table 1, columns c and e).
    lower: lower the learning rate from part to part (columns d and e), to 1,
      2/3, 1/3 and from the fourth on 1/30 of the run's.
    finetune: steps of the last stage; the authors have 50 epochs of 98 batches.
    finetune_rate: learning rate of the last stage, with a cosine decay to 0.
    finetune_labels: argmax of the current pseudo-logits, or of the network's
      logits at the start of the stage.
    cutout: side of the square that is cut out of the images in the first and
      the last stage, in pixels; 0 for none.
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
  hole = (View(DEFAULT_VIEW, standard.cutout(cutout)),) if cutout else ()
  loss = deep_decipher_loss(net, alpha, beta, divergence, pseudo_rate)
  again: dict[str, Any] = dict(
    per_example=predict(net), epoch_update=predict_pseudo, every=0
  )

  def decipher(name, length, rate=1.0):
    return Stage(
      name=name,
      steps=length,
      tx=tx(length, rate),
      batch_spec=batch_spec,
      loss=loss,
    )

  parts = repeated_parts(repeat, interval, repredict, lower)
  repeated = [
    decipher(f'repeat {number + 1}', *part) for number, part in enumerate(parts)
  ]
  if repredict:
    repeated = [stage._replace(**again) for stage in repeated]
  deciphering = decipher('decipher', steps)._replace(**again)
  cosine = dict(decay='cosine', decay_at=())
  first = Stage(
    name='supervised',
    steps=pretrain,
    tx=tx(pretrain * 7 // 6, learning_rate=pretrain_rate, **cosine),
    batch_spec=BatchSpec(pretrain_batch, flag='pretrain_batch'),
    loss=supervised_loss(net),
    views=hole,
    readiness=fitted('pretrain'),
  )
  last = Stage(
    name='finetune',
    steps=finetune,
    tx=tx(finetune, learning_rate=finetune_rate, **cosine),
    batch_spec=BatchSpec(0, batch_spec.size, include_labelled=True),
    loss=hard_label_loss(net),
    views=hole,
  )
  if finetune_labels == 'repredicted':
    last = last._replace(**again)
  return Method(
    name='r2d2',
    stages=(first, deciphering, *repeated, last),
    init=no_pseudo_labels,
    layout=P('data'),
    add_labels=add_known_logits,
    quality=deciphered,
  )


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
