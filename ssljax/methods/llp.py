"""LLP: local label propagation over a bank of embeddings.

Zhuang, Ding, Murli, Yamins, 2019. An image has an embedding v on the unit
sphere and logits ŷ; a bank holds a running average v̄ of every image's
embedding, and with it a pseudo-label y and a confidence c, which are 1 and the
truth where the label is given. Per step, on images drawn from all:

  1. descend  mean c·(L_C + L_A)                                       Eq. 4
       L_C = CE(y, softmax ŷ), L_A = −log P(A|v), A = {i: y_i = y},    Eq. 3
       P(i|v) = exp(v̄_i·v/τ) / Σ_j exp(v̄_j·v/τ)                        Eq. 1
  2. v̄ ← unit(m v̄ + (1−m) v)
  3. propagate, from the labelled rows of the bank before 2:
       ω_i = exp(v̄_i·v/τ) / ρ_i, of the K rows with the largest,       Eq. 7
       w_j = Σ_{y_i = j} ω_i, y ← argmax w, c ← max w / Σ w          Eq. 6, 8
  and before each epoch ρ_i = Σ_{T nearest of i} exp(v̄_i·v̄_j/τ), of all rows.

Until it has been propagated to, an image's pseudo-label is an index of its own
and L_C leaves it out: L_A is then instance recognition. That alone is the
first stage, `warm`, which hands over weights and bank.

Readings, of the authors' code where the paper is silent: the loss sees y and c
of the image's visit before, the bank before it is written to, and no normaliser
in ρ; a row is its own nearest. The released step takes the classifier's
prediction for a pseudo-label instead of 3: `pseudo_labels`.

Departures: a row that is drawn twice in a batch is written once, from where it
stands first; weight decay is of kernels alone.
"""

import functools
from typing import Literal, NamedTuple

import chex
from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ssljax import losses, neighbours, optimizers
from ssljax.core import UNLABELLED, BatchSpec, Method, Stage, add_labels
from ssljax.errors import fraction, non_negative, positive, require

ABSENT = -1  # the label of a row that only fills up a device


@struct.dataclass
class Bank:
  """The memory; N images and M labelled ones, rounded up over the devices."""

  rows: jax.Array  # [N, D] v̄
  labels: jax.Array  # [N] int32: a class, C + the row's own number, or ABSENT
  confidence: jax.Array  # [N] c
  known: jax.Array  # [M, D] rows of the labelled images, once more
  known_rows: jax.Array  # [M] int32 in rising order; N where rounded up
  log_density: jax.Array  # [M] log ρ


LAYOUT = Bank(
  rows=P('data'),
  labels=P('data'),
  confidence=P('data'),
  known=P('data'),
  known_rows=P(),
  log_density=P('data'),
)


class Arms(NamedTuple):
  """What Table 6 switches, and its numbers."""

  neighbours: int  # K
  density_neighbours: int  # T
  temperature: float  # τ
  bank_momentum: float  # m
  confidence: bool
  categorize: bool
  density: bool
  pseudo_labels: str
  bank_dtype: str


def unit(x: jax.Array) -> jax.Array:
  """Rows `[..., D]` of length 1."""
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def propagate(v, known, classes, log_density, k: int, tau: float, count: int):
  """Pseudo-labels `[B]` int32 and confidences `[B]`, Eq. 5–8.

  Args:
    v: `[B, D]` of length 1.
    known: `[M, D]` rows of the labelled images.
    classes: `[M]` int32; UNLABELLED rows have no vote.
    log_density: `[M]` log ρ.
    k: K, at most M.
    tau: τ.
    count: C.
  """
  chex.assert_rank([v, known, classes, log_density], [2, 2, 1, 1])
  bias = jnp.where(classes == UNLABELLED, -jnp.inf, -tau * log_density)
  values, at = neighbours.nearest(v, known, k, bias)
  votes = jax.nn.softmax(values / tau)  # ω over its sum
  shares = jnp.sum(
    votes[..., None] * jax.nn.one_hot(classes[at], count), axis=1
  )
  label = jnp.argmax(shares, axis=-1).astype(jnp.int32)
  return label, jnp.max(shares, axis=-1)


def first_of_each(rows: jax.Array) -> jax.Array:
  """Whether a row of `rows [B]` has not been seen before it, `[B]` bool."""
  same = rows[:, None] == rows[None]
  return ~jnp.any(jnp.tril(same, -1), axis=1)


def places_of(rows, known_rows) -> jax.Array:
  """Where each of `rows [B]` stands, or would stand, in `known_rows [M]`.

  Every device looks up its own: left to the compiler, all of them exchange
  something at each halving.
  """
  search = lambda rows, known_rows: jnp.searchsorted(known_rows, rows)
  if not jax.sharding.get_abstract_mesh().empty:
    search = jax.shard_map(
      search, in_specs=(P('data'), P()), out_specs=P('data'), check_vma=False
    )
  return search(rows, known_rows)


def write(memory: Bank, rows, v, labels, confidence, momentum: float) -> Bank:
  """The bank with a batch's embeddings, pseudo-labels and confidences.

  Args:
    memory: as it was.
    rows: `[B]` of the batch.
    v: `[B, D]` their embeddings.
    labels: `[B]` int32.
    confidence: `[B]`.
    momentum: m.
  """
  old = memory.rows[rows].astype(v.dtype)
  new = unit(momentum * old + (1 - momentum) * v).astype(memory.rows.dtype)
  first = first_of_each(rows)
  place = jnp.where(first, rows, len(memory.rows))
  at = places_of(rows, memory.known_rows)
  at = jnp.minimum(at, len(memory.known_rows) - 1)
  is_known = first & (memory.known_rows[at] == rows)
  known_place = jnp.where(is_known, at, len(memory.known_rows))
  put = lambda whole, place, part: whole.at[place].set(part, mode='drop')
  return memory.replace(
    rows=put(memory.rows, place, new),
    labels=put(memory.labels, place, labels),
    confidence=put(memory.confidence, place, confidence),
    known=put(memory.known, known_place, new),
  )


def known_classes(state) -> jax.Array:
  """Classes `[M]` of the labelled rows; UNLABELLED where rounded up."""
  rows = state.memory.known_rows
  inside = rows < len(state.labels)
  clipped = jnp.minimum(rows, len(state.labels) - 1)
  return jnp.where(inside, state.labels[clipped], UNLABELLED)


def aggregate(v, own, memory: Bank, tau: float) -> jax.Array:
  """L_A `[B]` of embeddings `[B, D]` with labels `own [B]`, Eq. 3."""
  return neighbours.aggregation_loss(v, own, memory.rows, memory.labels, tau)


def infer(v, logits, state, arms: Arms) -> tuple[jax.Array, jax.Array]:
  """Pseudo-labels and confidences `[B]` of embeddings and logits."""
  if arms.pseudo_labels == 'classifier':
    p = jax.nn.softmax(logits)
    return jnp.argmax(p, axis=-1).astype(jnp.int32), jnp.max(p, axis=-1)
  memory = state.memory
  density = (
    memory.log_density if arms.density else jnp.zeros_like(memory.log_density)
  )
  return propagate(
    v,
    memory.known,
    known_classes(state),
    density,
    arms.neighbours,
    arms.temperature,
    logits.shape[-1],
  )


def llp_loss(net, arms: Arms):
  """The loss of a `Stage`, Eq. 4, which propagates to the batch's rows."""

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    v, memory = unit(outputs.embedding), state.memory
    own, sure = memory.labels[batch.rows], memory.confidence[batch.rows]
    of_class = own < outputs.logits.shape[-1]
    known = jnp.where(of_class, own, UNLABELLED)
    aggregation = aggregate(v, own, memory, arms.temperature)
    entropy = losses.cross_entropy(outputs.logits, known)
    weight = sure if arms.confidence else jnp.ones_like(sure)
    parts = {'aggregation': jnp.mean(weight * aggregation)}
    if arms.categorize:
      parts['cross_entropy'] = jnp.mean(weight * entropy)

    v, logits = jax.lax.stop_gradient((v, outputs.logits))
    labels, sure = infer(v, logits, state, arms)
    truth = state.labels[batch.rows]
    unknown = truth == UNLABELLED
    labels = jnp.where(unknown, labels, truth)
    sure = jnp.where(unknown, sure, 1.0)
    memory = write(memory, batch.rows, v, labels, sure, arms.bank_momentum)
    share = lambda x: jnp.mean(x.astype(v.dtype))
    metrics = parts | {
      'confidence': losses.mean_where(sure, unknown),
      'propagated': share(of_class),
      'changed': share(of_class & (labels != own)),
    }
    state = state.replace(stats=stats, memory=memory)
    return sum(parts.values()), (state, metrics)

  return loss


def instance_loss(net, arms: Arms, kind: str, negatives: int):
  """The loss of the first `Stage`: every image is a class of its own."""

  def loss(params, state, batch, key):
    net_key, negative_key = jax.random.split(key)
    outputs, stats = net.train(params, state.stats, batch.image, net_key)
    v, memory, tau = unit(outputs.embedding), state.memory, arms.temperature
    own = memory.labels[batch.rows]
    if kind == 'softmax':
      total = jnp.mean(aggregate(v, own, memory, tau))
    else:
      others = jax.random.randint(negative_key, (negatives,), 0, state.images)
      total = jnp.mean(
        contrast(
          v,
          memory.rows[batch.rows],
          memory.rows[others],
          state.images,
          tau,
        )
      )
    v = jax.lax.stop_gradient(v)
    sure = memory.confidence[batch.rows]
    memory = write(memory, batch.rows, v, own, sure, arms.bank_momentum)
    state = state.replace(stats=stats, memory=memory)
    return total, (state, {'instance': total})

  return loss


# Z of Eq. 1 over N, as the authors' fixed it on ImageNet.
NORMALISER = 2876934.2 / 1281167


def contrast(v, own, others, count: int, tau: float) -> jax.Array:
  """Noise-contrastive estimate `[B]` of −log P(i|v), P with a constant Z.

  Wu et al. 2018 (arXiv:1805.01978), Eq. 7–8, whose noise is uniform over N.

  Args:
    v: `[B, D]` of length 1.
    own: `[B, D]` the bank's rows of the same images.
    others: `[R, D]` rows of the bank, drawn uniformly.
    count: N.
    tau: τ.
  """
  noise = len(others) / count  # R P_n
  h = lambda p: p / (p + noise + neighbours.EPSILON)
  p = lambda s: jnp.exp(s / tau) / (NORMALISER * count)
  true = p(jnp.sum(v * own, axis=-1))
  false = p(jnp.matmul(v, others.T.astype(v.dtype)))
  return -jnp.log(h(true)) - jnp.sum(jnp.log1p(-h(false)), axis=-1)


def estimate_density(arms: Arms):
  """`epoch_update` of a `Stage`: ρ of the labelled rows, Eq. 7."""

  def epoch_update(state, observed):
    del observed
    memory = state.memory
    density = neighbours.log_density(
      memory.known,
      memory.rows,
      arms.density_neighbours,
      arms.temperature,
      memory.labels == ABSENT,
    )
    return state.replace(memory=memory.replace(log_density=density))

  return epoch_update


def empty_bank(arms: Arms, key, params, stats, spec) -> Bank:
  """Rows U(−s, s), s = √(3/D), every image with a label of its own."""
  del params, stats
  k, t, images = arms.neighbours, arms.density_neighbours, spec.images
  require(
    arms.pseudo_labels == 'classifier' or k <= spec.labelled,
    f'`neighbours`={k}: there are {spec.labelled} labelled images: give at '
    'most as many, or more `labels`',
  )
  require(
    not arms.density or t <= images,
    f'`density_neighbours`={t}: there are {images} images: give at most as '
    'many, or `density=False`',
  )
  bound = (3 / spec.embedding) ** 0.5
  drawn = jax.random.uniform(
    key, [images, spec.embedding], minval=-bound, maxval=bound
  )
  rows = jnp.pad(drawn, ((0, spec.rows - images), (0, 0)))
  number = jnp.arange(spec.rows, dtype=jnp.int32)
  labels = jnp.where(number < images, spec.classes + number, ABSENT)
  known = rows_of_labels(spec.labels, spec.padded(spec.labelled + spec.extra))
  rows = rows.astype(arms.bank_dtype)
  return Bank(
    rows,
    labels,
    jnp.ones(spec.rows),
    rows[jnp.minimum(known, spec.rows - 1)],
    known,
    jnp.zeros(len(known)),
  )


def rows_of_labels(labels, size: int) -> jax.Array:
  """The rows `[size]` of `labels [N]` that have one; then N, that of no one."""
  (known,) = jnp.nonzero(
    labels != UNLABELLED, size=size, fill_value=len(labels)
  )
  return known.astype(jnp.int32)


def take_labels(arms: Arms, state, rows, labels):
  """`add_labels` of the method: the new rows have a vote from now on."""
  state = add_labels(state, rows, labels)
  memory = state.memory
  known = rows_of_labels(state.labels, len(memory.known_rows))
  some = memory.rows[jnp.minimum(known, len(state.labels) - 1)]
  memory = memory.replace(known=some, known_rows=known)
  return estimate_density(arms)(state.replace(memory=memory), None)


def llp(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  neighbours: int = 10,
  density_neighbours: int = 25,
  temperature: float = 0.07,
  bank_momentum: float = 0.5,
  confidence: bool = True,
  categorize: bool = True,
  density: bool = True,
  pseudo_labels: Literal['neighbours', 'classifier'] = 'neighbours',
  bank_dtype: Literal['float32', 'bfloat16'] = 'float32',
  warm: int = 100_090,
  warm_loss: Literal['nce', 'softmax'] = 'nce',
  negatives: int = 4096,
) -> Method:
  """LLP with the paper's constants.

  Args:
    net: the `Network`; its embedding is brought to length 1 here.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: `batch_spec.unlabelled` images per step, of all that the run admits, labelled or
      not.
    steps: length of the stage that propagates.
    neighbours: K labelled neighbours that vote.
    density_neighbours: T neighbours that a labelled row's density is over.
    temperature: τ.
    bank_momentum: m, the share of a row of the bank that stays.
    confidence: weigh an image's loss by its confidence (Table 6: not in woc).
    categorize: learn the classifier too (Table 6: wc).
    density: divide a vote by the density about it (Table 6: lw).
    pseudo_labels: of the neighbours, or the classifier's prediction and
      its probability, as in the released code.
    bank_dtype: of the bank's rows; 'bfloat16' takes half the memory, and rounds
      a product of unit rows by at most 2⁻⁸.
    warm: steps of a first stage of instance recognition; 0 leaves it out.
    warm_loss: its loss: noise-contrastive, or the softmax over the whole bank.
    negatives: rows of the bank that 'nce' contrasts a step's images with.
  """
  positive(
    steps=steps, batch_unlabelled=batch_spec.unlabelled, temperature=temperature
  )
  positive(neighbours=neighbours, density_neighbours=density_neighbours)
  positive(negatives=negatives)
  non_negative(warm=warm)
  fraction(bank_momentum=bank_momentum)
  arms = Arms(
    neighbours,
    density_neighbours,
    temperature,
    bank_momentum,
    confidence,
    categorize,
    density,
    pseudo_labels,
    bank_dtype,
  )
  every = BatchSpec(0, batch_spec.unlabelled, include_labelled=True)
  propagating = Stage('propagate', steps, tx(steps), every, llp_loss(net, arms))
  if density and pseudo_labels == 'neighbours':
    propagating = propagating._replace(epoch_update=estimate_density(arms))
  alone = Stage(
    'warm',
    warm,
    tx(max(1, warm)),
    every,
    instance_loss(net, arms, warm_loss, negatives),
    asks=False,
  )
  stages = (alone, propagating) if warm else (propagating,)
  init = functools.partial(empty_bank, arms)
  take = functools.partial(take_labels, arms)
  return Method('llp', stages, init, LAYOUT, optimizers.weights, take)


# Settings of the paper, or of its code where the paper is silent, that differ
# from the defaults of other runs.
DEFAULTS = {
  'unlabelled': 'all',
  'batch_labelled': 128,
  'batch_unlabelled': 128,
  'learning_rate': 0.03,
  'decay': 'constant',
  'nesterov': False,
  'weight_decay': 1e-4,
  'clip': 0.0,
  'average': 0.0,
}
