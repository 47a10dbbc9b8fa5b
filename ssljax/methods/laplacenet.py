"""LaplaceNet: pseudo-labels by propagation over a graph of all images.

Sellars, Aviles-Rivero, Schönlieb, TNNLS 2022. A first stage trains on the
labelled images alone. Then before each epoch, with embeddings x_i of length 1:

  1. W_ij = max(x_i·x_j, 0) if j is one of the k nearest of i; W ← max(W, Wᵀ)
  2. solve (I − α D^(−1/2) W D^(−1/2)) F = Y by conjugate gradients, class by
     class; D are the row sums of W and Y the labels, 0 without one
  3. F ← max(F, 0), rows normalised to Σ_c F_ic = 1
  4. align the distribution: 100 times F_ic ← F_ic clip(ℓ_c / u_c, 0.99, 1.01)
     for images without a label, normalised again; ℓ_c is the share of class c
     among the labels, u_c among the pseudo-labels argmax_c F_ic

A step mixes all B images of a batch, with the labels and pseudo-labels y of
these, with a shuffle π, λ ~ Beta(a, a), and minimises the mean over i of

  λ CE(y_i, p_i) + (1 − λ) CE(y_π(i), p_i),  p_i = p(λ x_i + (1 − λ) x_π(i))

averaged over K samples: labelled images are augmented weakly, the others
strongly, anew for each sample, and π and λ are the same for all.

Departures from the paper and its code:
  - The K samples are one batch for batch norm; in the code each is a batch of
    its own.
  - An image that no label reaches has no loss. In the code it has class 0.
  - An image is left out of its own k + 1 nearest rows wherever it is found; the
    code leaves out the first.
  - The graph has the images that the run trains on: neither those held out for
    validation, nor those that `unlabelled` leaves out.
  - The learning rate is one schedule over both stages; in the code it falls by
    epochs, and the ten epochs of the first stage have ten passes each.
  - Optional: weights of the classes instead of step 4 (`balance`), inverse to
    the number of labels and pseudo-labels of a class (Iscen, Tolias, Avrithis,
    Chum, CVPR 2019).
"""

from collections.abc import Sequence
import functools
from typing import Literal, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ssljax import losses, neighbours
from ssljax.augment import mixup
from ssljax.core import (
  UNLABELLED,
  BatchSpec,
  EpochUpdate,
  Loss,
  Method,
  PerExample,
  Stage,
  UsedLabels,
  View,
  layout,
)
from ssljax.errors import fraction, non_negative, positive, require
from ssljax.methods import consistency

Balance = Literal['alignment', 'class_weights', 'none']
ROUNDS, CHANGE = 100, 0.01  # of the alignment
QUERIES = 64  # rows whose neighbours are searched at a time
TOLERANCE = 1e-3  # of the conjugate gradients


class Propagated(struct.PyTreeNode):
  """The memory; N images, and padding."""

  label: jax.Array  # [N] int32 pseudo-labels
  weight: jax.Array  # [N], 0 for images that no label reaches, and in padding
  reached: jax.Array  # [] share of the images without a label that one reaches
  shares: jax.Array  # [C] share of each class among labels and pseudo-labels
  admitted: jax.Array | None = None  # [N] bool, images of the run; None: all


LAYOUT = layout(
  Propagated,
  label=P('data'),
  weight=P('data'),
  reached=P(),
  shares=P(),
  admitted=P('data'),
)


def init_propagated(k: int, key, params, stats, spec) -> Propagated:
  """Return the initial memory, which the second stage replaces.

  Args:
    k: number of neighbours.
    key: see `core.InitMemory`.
    params: see `core.InitMemory`.
    stats: see `core.InitMemory`.
    spec: see `core.InitMemory`.

  Raises:
    InputError: there are not more images than neighbours.
  """
  del key, params, stats
  some = spec.admitted is not None
  images = len(spec.admitted) if some else spec.images
  require(
    k < images,
    f'`neighbours`={k}: there are {images} images: give a smaller number',
  )
  return Propagated(
    label=jnp.zeros(spec.rows, jnp.int32),
    weight=jnp.zeros(spec.rows),
    reached=jnp.zeros([]),
    shares=jnp.zeros(spec.classes),
    admitted=spec.is_admitted() if some else None,
  )


# The graph.


class Graph(NamedTuple):
  """W as directed edges: W = V + Vᵀ, V_ij = weights of j among `rows` of i."""

  rows: jax.Array  # [N, k] int32, neighbours of each row
  weights: jax.Array  # [N, k], halved where the edge occurs in both directions

  def __matmul__(self, f) -> jax.Array:
    """Return W f `[N]` for f `[N]`."""
    outwards = jnp.sum(self.weights * f[self.rows], axis=1)
    return outwards.at[self.rows].add(self.weights * f[:, None])


def make_graph(x, is_image, k: int) -> Graph:
  """Return the graph W of step 1.

  Args:
    x: `[N, D]` embeddings of length 1.
    is_image: `[N]` bool, False in padding and for images that are left out.
    k: number of neighbours.
  """
  count = -(-len(x) // QUERIES)
  bias = jnp.where(is_image, 0.0, -jnp.inf)
  places = (jnp.arange(count * QUERIES) % len(x)).reshape(count, QUERIES)
  found = jax.lax.map(
    lambda at: neighbours.nearest(x[at], x, k + 1, bias), places
  )
  values, rows = (y.reshape(-1, k + 1)[: len(x)] for y in found)

  def halved(at):
    """Return ½ for edges of the rows `at` that occur in both directions."""
    back = jnp.any(rows[rows[at]] == at[:, None, None], axis=-1)
    return jnp.where(back, 0.5, 1.0)

  halves = jax.lax.map(halved, places).reshape(-1, k + 1)[: len(x)]
  own = rows == jnp.arange(len(x))[:, None]
  kept = is_image[:, None] & ~own
  weights = jnp.where(kept, halves * jnp.maximum(values, 0.0), 0.0)
  return Graph(rows, weights)


def propagate(graph: Graph, y, alpha: float, iterations: int) -> jax.Array:
  """Solve (I − α D^(−1/2) W D^(−1/2)) F = Y for F `[N, C]`.

  Args:
    graph: W.
    y: `[N, C]` labels.
    alpha: α.
    iterations: largest number of conjugate gradient steps for each class.
  """
  degrees = graph @ jnp.ones(len(y), y.dtype)
  scale = jax.lax.rsqrt(jnp.where(degrees > 0, degrees, 1.0))
  system = lambda f: f - alpha * scale * (graph @ (scale * f))
  solve = lambda column: jax.scipy.sparse.linalg.cg(
    system, column, tol=TOLERANCE, maxiter=iterations
  )[0]
  return jax.lax.map(solve, y.T).T


def normalised(f) -> jax.Array:
  """Scale the rows of `f [N, C]`, at least 0, to a sum of 1; zeros stay 0."""
  total = jnp.sum(f, axis=-1, keepdims=True)
  return f / jnp.where(total > 0, total, 1.0)


def shares(labels, where, classes: int) -> jax.Array:
  """Return the share `[C]` of each class among `labels [N]` where `where`."""
  counts = jnp.sum(
    jax.nn.one_hot(jnp.where(where, labels, -1), classes), axis=0
  )
  return counts / jnp.maximum(jnp.sum(counts), 1.0)


def align(f, labels, is_image) -> jax.Array:
  """Return F `[N, C]` of images without a label after step 4.

  Args:
    f: `[N, C]` rows that sum to 1, or to 0.
    labels: `[N]` int32 label table.
    is_image: `[N]` bool, False in padding.
  """
  known = labels != UNLABELLED
  wanted = shares(labels, known, f.shape[-1])
  guessed = is_image & ~known & (jnp.sum(f, axis=-1) > 0)

  def step(_, f):
    now = shares(jnp.argmax(f, axis=-1), guessed, f.shape[-1])
    ratio = jnp.clip(wanted / (now + 1e-7), 1 - CHANGE, 1 + CHANGE)
    return normalised(f * ratio[None])

  return jax.lax.fori_loop(0, ROUNDS, step, f)


def class_weights(label, where, size) -> jax.Array:
  """Return weights `[N]` inverse to the size of an image's class, of mean 1.

  Args:
    label: `[N]` int32 labels and pseudo-labels.
    where: `[N]` bool, True for the images that count; others get 0.
    size: `[C]` share of each class among them.
  """
  weight = jnp.where(where, 1 / jnp.maximum(size[label], 1e-12), 0.0)
  return weight / jnp.maximum(losses.mean_where(weight, where), 1e-12)


# The stages.


def embed(net) -> PerExample:
  """Return the function that embeds images on the unit sphere."""

  def per_example(state, image, key):
    del key
    x = net.infer(state.params, state.stats, image).embedding
    return neighbours.l2_normalize(x)

  return per_example


def propagation(
  k: int, alpha: float, iterations: int, balance: Balance
) -> EpochUpdate:
  """Return the update before each epoch, steps 1–4; see `laplacenet`."""

  def epoch_update(state, x):
    known, memory = state.labels != UNLABELLED, state.memory
    classes = len(memory.shares)
    is_image = jnp.arange(len(x)) < state.images
    if memory.admitted is not None:
      is_image &= memory.admitted | known  # a label may be acquired
    y = jax.nn.one_hot(state.labels, classes)  # zeros without a label
    f = propagate(make_graph(x, is_image, k), y, alpha, iterations)
    f = normalised(jnp.maximum(f, 0.0))
    reached = is_image & ~known & (jnp.sum(f, axis=-1) > 0)
    if balance == 'alignment':
      f = align(f, state.labels, is_image)
    guess = jnp.argmax(f, axis=-1).astype(jnp.int32)
    label = jnp.where(known, state.labels, guess)
    weight = (known | reached).astype(f.dtype)
    size = shares(label, known | reached, classes)
    if balance == 'class_weights':
      weight = class_weights(label, known | reached, size)
    share = losses.mean_where(reached.astype(f.dtype), is_image & ~known)
    memory = memory.replace(
      label=label, weight=weight, reached=share, shares=size
    )
    return state.replace(memory=memory)

  return epoch_update


def propagated(state, rows, image) -> UsedLabels:
  """Return the propagated labels, see `core.Quality`.

  An image that no label reaches is not used. Weights of the classes are not
  taken into account.
  """
  del image
  weight = state.memory.weight[rows]
  return UsedLabels(state.memory.label[rows], (weight > 0).astype(weight.dtype))


def samples_of(batch, samples: int) -> jax.Array:
  """Return the K samples of the images of a batch, `[K·B, H, W, c]`."""
  weak = [batch.image] + [batch.views[f'weak{i}'] for i in range(1, samples)]
  if 'strong0' not in batch.views:  # only labelled images
    return jnp.concatenate(weak)
  strong = [batch.views[f'strong{i}'] for i in range(samples)]
  first = len(batch.image) - len(strong[0])
  pairs = zip(weak, strong, strict=True)
  return jnp.concatenate([x for w, s in pairs for x in (w[:first], s)])


def laplacenet_loss(net, samples: int, alpha: float) -> Loss:
  """Return the loss of both stages.

  Args:
    net: the `Network`.
    samples: K.
    alpha: a of MixUp's Beta distribution; 0 mixes nothing.
  """

  def loss(params, state, batch, key):
    pass_key, mix_key = jax.random.split(key)
    truth = state.labels[batch.rows]
    known, memory = truth != UNLABELLED, state.memory
    labels = jnp.where(known, truth, memory.label[batch.rows])
    weights = jnp.where(known, 1.0, memory.weight[batch.rows])
    count = len(batch.rows)
    mix = mixup.Mix(jnp.arange(count, dtype=jnp.int32), jnp.ones(count))
    if alpha:
      mix = mixup.draw_mix(mix_key, count, alpha, dominant=False, per_row=False)
    images = samples_of(batch, samples)
    images = images.reshape(samples, count, *images.shape[1:])
    mixed = jax.vmap(lambda x: mixup.combine(mix, x))(images)
    mixed = mixed.reshape(-1, *mixed.shape[2:])
    outputs, stats = net.train(params, state.stats, mixed, pass_key)
    logits = batch.adjusted(outputs.logits).reshape(samples, count, -1)
    of = lambda labels, weights: (
      weights
      * jnp.mean(
        jax.vmap(losses.cross_entropy, (0, None))(logits, labels), axis=0
      )
    )
    own, other = (
      of(labels[at], weights[at]) for at in (jnp.arange(count), mix.partner)
    )
    terms = mix.weight * own + (1 - mix.weight) * other
    metrics = {
      'cross_entropy': jnp.mean(terms),
      'of_labelled': losses.mean_where(own, known),
      'of_pseudo_labelled': losses.mean_where(own, ~known),
      'reached': memory.reached,
    }
    return metrics['cross_entropy'], (state.replace(stats=stats), metrics)

  return loss


def laplacenet(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  pretrain: int = 1300,
  neighbours: int = 50,
  propagation_alpha: float = 0.99,
  iterations: int = 30,
  balance: Balance = 'alignment',
  mixup_alpha: float = 1.0,
  samples: int = 3,
  strong_augment: Sequence[str] = ('randaugment:2:10', 'cutout'),
) -> Method:
  """Return LaplaceNet with the constants of its code on CIFAR-10.

  Args:
    net: the `Network`.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: labelled and unlabelled images per step.
    steps: length of the second stage.
    pretrain: steps of the first stage, on the labelled images alone.
    neighbours: k, neighbours of an image in the graph.
    propagation_alpha: α, share of the neighbours in a propagated label.
    iterations: largest number of conjugate gradient steps.
    balance: how classes are balanced: alignment of the distribution (step 4),
      weights of the classes in the loss, or none.
    mixup_alpha: a of MixUp's Beta distribution; 0 mixes nothing.
    samples: K, augmented samples of each image per step.
    strong_augment: augmentations of the strong views, after the run's own.
  """
  consistency.check(batch_spec, steps)
  positive(pretrain=pretrain, neighbours=neighbours, iterations=iterations)
  positive(samples=samples)
  fraction(propagation_alpha=propagation_alpha)
  non_negative(mixup_alpha=mixup_alpha)
  strong = consistency.strong_view(strong_augment)
  weak = [View(f'weak{i}', rows='labelled') for i in range(1, samples)]
  loss = laplacenet_loss(net, samples, mixup_alpha)
  whole = tx(pretrain + steps)
  first = Stage(
    name='labelled',
    steps=pretrain,
    tx=whole,
    batch_spec=batch_spec._replace(unlabelled=0),
    loss=loss,
    views=tuple(weak),
    acquire_labels=False,
  )
  second = Stage(
    name='propagation',
    steps=steps,
    tx=whole,
    batch_spec=batch_spec,
    loss=loss,
    views=(
      *weak,
      *(strong._replace(name=f'strong{i}') for i in range(samples)),
    ),
    keep_optimizer=True,
    per_example=embed(net),
    epoch_update=propagation(
      neighbours, propagation_alpha, iterations, balance
    ),
  )
  return Method(
    name='laplacenet',
    stages=(first, second),
    init=functools.partial(init_propagated, neighbours),
    layout=LAYOUT,
    uses_admitted=True,
    quality=propagated,
  )


# Settings of the authors' code on CIFAR-10 that differ from the defaults of
# other runs.
DEFAULTS = {
  'network': 'wrn28_2',
  'batch_labelled': 48,
  'batch_unlabelled': 252,
  'learning_rate': 0.03,
  'decay': 'cosine',
  'weight_decay': 5e-4,
  'clip': 0.0,
  'average': 0.0,
  'preprocess': 'standardize',
  'augment': ['flip', 'translate4'],
}
