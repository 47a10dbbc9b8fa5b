"""LLP: local label propagation over a bank of embeddings.

Zhuang, Ding, Murli, Yamins, 2019. An image has an embedding v on the unit
sphere and logits ŷ. For every image of the run a bank holds a running average v̄
of its embedding, a pseudo-label y and a confidence c; y is the true label and c
is 1 for labelled images. Every step draws a batch from all images, and

  1. minimises  mean c·(L_C + L_A)                                      Eq. 4
       L_C = CE(y, softmax ŷ), L_A = −log P(A|v), A = {i: y_i = y}      Eq. 3
       P(i|v) = exp(v̄_i·v/τ) / Σ_j exp(v̄_j·v/τ)                         Eq. 1
  2. updates v̄ ← l2_normalize(m v̄ + (1−m) v)
  3. propagates labels from the labelled rows of the bank before 2:
       ω_i = exp(v̄_i·v/τ) / ρ_i for the K rows with the largest value   Eq. 7
       w_j = Σ_{y_i = j} ω_i, y ← argmax w, c ← max w / Σ w          Eq. 6, 8

Before each epoch it computes ρ_i = Σ_{T nearest of i} exp(v̄_i·v̄_j/τ) over all
rows.

Before the first propagation to an image its pseudo-label is an index of its
own, and L_C leaves it out: L_A is then instance recognition. The first stage,
`warm`, consists of instance recognition alone and passes on weights and bank.

Readings of the paper, where it is silent, after the authors' code:
  - The loss uses y and c from the image's previous visit, and the bank before
    it is updated.
  - ρ has no normaliser, and a row counts as its own nearest neighbour.
  - The noise-contrastive loss of `warm` has a fixed normaliser, see `contrast`.
The code propagates the classifier's prediction instead of step 3:
`pseudo_labels='classifier'`.

Departures from the paper:
  - A row that occurs twice in a batch is written once, from its first place.
  - In `warm` all images of a step share one set of negatives, drawn from the
    images of the run; the authors draw a set for each image. The expected loss
    and gradient are the same, their variance over steps is larger. Sets of
    their own would gather B · `negatives` rows of a sharded bank each step.
  - Only parameters of rank 2 or more decay (`optimizers.optimizer`); in the
    authors' code all but those of batch norm do.
  - Optional: the softmax loss over the whole bank in `warm`
    (`warm_loss='softmax'`), a bank in bfloat16, and labelled images added to
    every step of `propagate` (`labelled_per_step`): among many images a step of
    the paper's has hardly any.
"""

import functools
from typing import Literal, NamedTuple

import chex
from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ssljax import losses, neighbours
from ssljax.core import (
  UNLABELLED,
  BatchSpec,
  EpochUpdate,
  Loss,
  Method,
  Quality,
  Readiness,
  Stage,
  UsedLabels,
  add_labels,
  layout,
)
from ssljax.errors import fraction, non_negative, positive, require

ABSENT = -1  # label of padding


class Bank(struct.PyTreeNode):
  """The memory; A images of a run, M labelled ones, and padding of both.

  The A images are those that a batch may contain, not the N of the training
  set: images that the run does not use would add noise to Eq. 1.
  """

  rows: jax.Array  # [A, D] v̄
  labels: jax.Array  # [A] int32: a class, C + the place in the bank, or ABSENT
  confidence: jax.Array  # [A] c
  known: jax.Array  # [M, D] a copy of the labelled images' rows
  # [M] int32 their image numbers in rising order, at least N in padding.
  known_rows: jax.Array
  log_density: jax.Array  # [M] log ρ
  # Version 0.1 has no such fields, see `upgrade`.
  known_classes: jax.Array | None = None  # [M] int32; UNLABELLED in padding
  # [A] int32 image numbers in rising order, no padding; None: A = N.
  admitted: jax.Array | None = None

  @property
  def images(self) -> int | None:
    """A, or None if A = N."""
    return None if self.admitted is None else len(self.admitted)

  def places(self, images: jax.Array) -> jax.Array:
    """Return the places `[B]` in the bank of `images [B]` of a batch."""
    if self.admitted is None:
      return images
    return places_of(images, self.admitted)


LAYOUT = layout(
  Bank,
  rows=P('data'),
  labels=P('data'),
  confidence=P('data'),
  known=P('data'),
  known_rows=P(),
  log_density=P('data'),
  known_classes=P(),
  admitted=P(),
)


class Settings(NamedTuple):
  """Hyper-parameters, among them the ablations of Table 6; see `llp`."""

  neighbours: int  # K
  density_neighbours: int  # T
  temperature: float  # τ
  bank_momentum: float  # m
  confidence: bool
  categorize: bool
  density: bool
  pseudo_labels: str
  bank_dtype: str


def propagate(v, known, classes, log_density, k: int, tau: float, count: int):
  """Compute pseudo-labels `[B]` int32 and confidences `[B]`, Eq. 5–8.

  Args:
    v: `[B, D]` embeddings of length 1.
    known: `[M, D]` rows of the labelled images.
    classes: `[M]` int32 their classes; UNLABELLED rows have no vote.
    log_density: `[M]` log ρ.
    k: K, the number of neighbours that vote, at most M.
    tau: τ, the temperature.
    count: C, the number of classes.
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


def places_of(rows, known_rows) -> jax.Array:
  """Return the place `[B]` of each of `rows [B]` in `known_rows [M]`.

  A row that is not there gets the place at which it would be inserted. Every
  device looks up its own rows: without `shard_map` the compiler would exchange
  data at each step of the binary search.
  """
  search = lambda rows, known_rows: jnp.searchsorted(known_rows, rows)
  if not jax.sharding.get_abstract_mesh().empty:
    search = jax.shard_map(
      search, in_specs=(P('data'), P()), out_specs=P('data'), check_vma=False
    )
  return search(rows, known_rows)


def write(memory: Bank, images, v, labels, confidence, momentum) -> Bank:
  """Write a batch's embeddings, pseudo-labels and confidences into the bank.

  Args:
    memory: bank before the step.
    images: `[B]` int32 image numbers of the batch.
    v: `[B, D]` their embeddings.
    labels: `[B]` int32 their pseudo-labels.
    confidence: `[B]` their confidences.
    momentum: m, the share of the old row.
  """
  place = memory.places(images)
  old = memory.rows[place].astype(v.dtype)
  new = neighbours.l2_normalize(momentum * old + (1 - momentum) * v)
  new = new.astype(memory.rows.dtype)
  first = neighbours.first_of_each(images)
  place = jnp.where(first, place, len(memory.rows))
  at = places_of(images, memory.known_rows)
  at = jnp.minimum(at, len(memory.known_rows) - 1)
  is_known = first & (memory.known_rows[at] == images)
  known_place = jnp.where(is_known, at, len(memory.known_rows))
  put = lambda whole, place, part: whole.at[place].set(part, mode='drop')
  return memory.replace(
    rows=put(memory.rows, place, new),
    labels=put(memory.labels, place, labels),
    confidence=put(memory.confidence, place, confidence),
    known=put(memory.known, known_place, new),
  )


def classes_of(labels, images) -> jax.Array:
  """Return the classes `[M]` of `images [M]`; UNLABELLED in padding.

  Args:
    labels: `[rows]` int32 label table.
    images: `[M]` int32 image numbers, at least N in padding.
  """
  clipped = jnp.minimum(images, len(labels) - 1)
  return jnp.where(images < len(labels), labels[clipped], UNLABELLED)


def averaged_embeddings(memory: Bank, images: int) -> tuple:
  """Return image numbers `[A]` and their rows `[A, D]` of the bank.

  Args:
    memory: the bank.
    images: N.
  """
  numbers = jnp.arange(images) if memory.admitted is None else memory.admitted
  rows = memory.rows[: len(numbers)].astype(jnp.float32)
  return numbers, neighbours.l2_normalize(rows)


def aggregate(v, own, memory: Bank, tau: float) -> jax.Array:
  """Compute L_A `[B]`, Eq. 3.

  Args:
    v: `[B, D]` embeddings.
    own: `[B]` int32 their labels.
    memory: the bank.
    tau: τ, the temperature.
  """
  return neighbours.aggregation_loss(v, own, memory.rows, memory.labels, tau)


def infer(v, logits, state, settings: Settings) -> tuple[jax.Array, jax.Array]:
  """Compute pseudo-labels `[B]` int32 and confidences `[B]`.

  Args:
    v: `[B, D]` embeddings.
    logits: `[B, C]`.
    state: state before the step.
    settings: hyper-parameters.
  """
  if settings.pseudo_labels == 'classifier':
    p = jax.nn.softmax(logits)
    return jnp.argmax(p, axis=-1).astype(jnp.int32), jnp.max(p, axis=-1)
  memory = state.memory
  density = (
    memory.log_density
    if settings.density
    else jnp.zeros_like(memory.log_density)
  )
  return propagate(
    v,
    memory.known,
    memory.known_classes,
    density,
    settings.neighbours,
    settings.temperature,
    logits.shape[-1],
  )


def llp_loss(net, settings: Settings) -> Loss:
  """Return the loss of `propagate`, Eq. 4, which also updates the bank."""

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    v, memory = neighbours.l2_normalize(outputs.embedding), state.memory
    places = memory.places(batch.rows)
    own, sure = memory.labels[places], memory.confidence[places]
    of_class = own < outputs.logits.shape[-1]
    known = jnp.where(of_class, own, UNLABELLED)
    aggregation = aggregate(v, own, memory, settings.temperature)
    cross_entropy = losses.cross_entropy(batch.adjusted(outputs.logits), known)
    weight = sure if settings.confidence else jnp.ones_like(sure)
    parts = {'aggregation': jnp.mean(weight * aggregation)}
    if settings.categorize:
      parts['cross_entropy'] = jnp.mean(weight * cross_entropy)

    v, logits = jax.lax.stop_gradient((v, outputs.logits))
    labels, sure = infer(v, logits, state, settings)
    truth = state.labels[batch.rows]
    unknown = truth == UNLABELLED
    labels = jnp.where(unknown, labels, truth)
    sure = jnp.where(unknown, sure, 1.0)
    memory = write(memory, batch.rows, v, labels, sure, settings.bank_momentum)
    share = lambda x: jnp.mean(x.astype(v.dtype))
    metrics = parts | {
      'confidence': losses.mean_where(sure, unknown),
      'propagated': share(of_class),
      'changed': share(of_class & (labels != own)),
    }
    state = state.replace(stats=stats, memory=memory)
    return sum(parts.values()), (state, metrics)

  return loss


def propagated(net, settings: Settings) -> Quality:
  """Return the `Method.quality` of the labels in the bank.

  An image is not used before its first propagation. The weight of the others is
  their confidence.

  Args:
    net: the `Network`, whose number of classes is read.
    settings: hyper-parameters.
  """

  def quality(state, rows, image):
    outputs = jax.eval_shape(net.infer, state.params, state.stats, image)
    memory = state.memory
    places = memory.places(rows)
    label, sure = memory.labels[places], memory.confidence[places]
    if not settings.confidence:
      sure = jnp.ones_like(sure)
    of_class = label < outputs.logits.shape[-1]
    return UsedLabels(label, jnp.where(of_class, sure, 0.0))

  return quality


def instance_loss(net, settings: Settings, kind: str, negatives: int) -> Loss:
  """Return the loss of `warm`: every image is a class of its own.

  Args:
    net: the `Network`.
    settings: hyper-parameters.
    kind: 'nce' or 'softmax'.
    negatives: rows of the bank that 'nce' contrasts with.
  """

  def loss(params, state, batch, key):
    net_key, negative_key = jax.random.split(key)
    outputs, stats = net.train(params, state.stats, batch.image, net_key)
    v, memory = neighbours.l2_normalize(outputs.embedding), state.memory
    tau, count = settings.temperature, memory.images or state.images
    places = memory.places(batch.rows)
    own = memory.labels[places]
    if kind == 'softmax':
      total = jnp.mean(aggregate(v, own, memory, tau))
    else:
      others = jax.random.randint(negative_key, (negatives,), 0, count)
      total = jnp.mean(
        contrast(v, memory.rows[places], memory.rows[others], count, tau)
      )
    v = jax.lax.stop_gradient(v)
    sure = memory.confidence[places]
    memory = write(memory, batch.rows, v, own, sure, settings.bank_momentum)
    state = state.replace(stats=stats, memory=memory)
    return total, (state, {'instance': total})

  return loss


# The normaliser of Eq. 1 divided by N, as the authors fixed it on ImageNet.
NORMALISER = 2876934.2 / 1281167


def contrast(v, own, others, count: int, tau: float) -> jax.Array:
  """Compute a noise-contrastive estimate `[B]` of −log P(i|v).

  Wu et al. 2018 (arXiv:1805.01978), Eq. 7–8, with a constant normaliser and
  noise that is uniform over N.

  Args:
    v: `[B, D]` embeddings of length 1.
    own: `[B, D]` rows of the bank of the same images.
    others: `[R, D]` rows of the bank, drawn uniformly.
    count: N, the number of images.
    tau: τ, the temperature.
  """
  noise = len(others) / count  # R times the probability of a row
  h = lambda p: p / (p + noise + neighbours.EPSILON)
  p = lambda s: jnp.exp(s / tau) / (NORMALISER * count)
  true = p(jnp.sum(v * own, axis=-1))
  false = p(jnp.matmul(v, others.T.astype(v.dtype)))
  return -jnp.log(h(true)) - jnp.sum(jnp.log1p(-h(false)), axis=-1)


def estimate_density(settings: Settings) -> EpochUpdate:
  """Return the update of ρ of the labelled rows before each epoch, Eq. 7."""

  def epoch_update(state, mapped):
    del mapped
    memory = state.memory
    density = neighbours.log_density(
      memory.known,
      memory.rows,
      settings.density_neighbours,
      settings.temperature,
      memory.labels == ABSENT,
    )
    return state.replace(memory=memory.replace(log_density=density))

  return epoch_update


def init_bank(settings: Settings, key, params, stats, spec) -> Bank:
  """Return the initial bank, see `core.InitMemory`.

  Rows are U(−s, s) with s = √(3/D), and every image has a label of its own.

  Raises:
    InputError: there are fewer images than neighbours.
  """
  del params, stats
  k, t, images = settings.neighbours, settings.density_neighbours, spec.images
  if spec.admitted is not None:
    images = len(spec.admitted)
  require(
    settings.pseudo_labels == 'classifier' or k <= spec.labelled,
    f'`neighbours`={k}: there are {spec.labelled} labelled images: give at '
    'most as many, or more `labels`',
  )
  require(
    not settings.density or t <= images,
    f'`density_neighbours`={t}: there are {images} images: give at most as '
    'many, or `density=False`',
  )
  bound = (3 / spec.embedding) ** 0.5
  drawn = jax.random.uniform(
    key, [images, spec.embedding], minval=-bound, maxval=bound
  )
  size = spec.padded(images)
  number = jnp.arange(size, dtype=jnp.int32)
  known = rows_of_labels(spec.labels, spec.padded(spec.labelled + spec.extra))
  rows = jnp.pad(drawn, ((0, size - images), (0, 0)))
  rows = rows.astype(settings.bank_dtype)
  return Bank(
    rows=rows,
    labels=jnp.where(number < images, spec.classes + number, ABSENT),
    confidence=jnp.ones(size),
    known=rows_of_images(rows, known, spec.admitted),
    known_rows=known,
    log_density=jnp.zeros(len(known)),
    known_classes=classes_of(spec.labels, known),
    admitted=spec.admitted,
  )


def rows_of_images(rows, images, admitted) -> jax.Array:
  """Return the rows `[M, D]` of a bank for some images; any row in padding.

  Args:
    rows: `[A, D]` of the bank.
    images: `[M]` int32 image numbers, at least N in padding.
    admitted: `[A]` as in `Bank`, or None.
  """
  if admitted is not None:
    images = jnp.searchsorted(admitted, images)
  return rows[jnp.minimum(images, len(rows) - 1)]


def rows_of_labels(labels, size: int) -> jax.Array:
  """Return the rows of `labels [N]` with a label, padded with N to `[size]`."""
  (known,) = jnp.nonzero(
    labels != UNLABELLED, size=size, fill_value=len(labels)
  )
  return known.astype(jnp.int32)


# Embeddings that were not learned yet have an agreement of 0 ± 0.05.
LEAST_AGREEMENT = 0.1
PROBES = 1024  # labelled images, at most, whose neighbours are looked at


def neighbour_agreement(settings: Settings, state) -> jax.Array:
  """Compute how well labelled images find their own class, `[]`.

  The K nearest other labelled images vote with exp(v̄_i·v̄_j/τ). Returned is
  (a − e) / (1 − e): a is the mean share of the votes for the own class, and e
  its expectation if the classes were permuted. 0 is chance, 1 is perfect; NaN
  if every image is of one class or there is one image.

  Args:
    settings: hyper-parameters.
    state: state at the end of a stage.
  """
  memory = state.memory
  known, classes = memory.known.astype(jnp.float32), memory.known_classes
  is_known = classes != UNLABELLED
  queries = known[:PROBES]
  values, at = neighbours.nearest(
    queries,
    known,
    min(settings.neighbours + 1, len(known)),  # each finds itself
    jnp.where(is_known, 0.0, -jnp.inf),
  )
  itself = at == jnp.arange(len(queries))[:, None]
  votes = jnp.where(itself, -jnp.inf, values) / settings.temperature
  same = (classes[at] == classes[: len(queries), None]).astype(jnp.float32)
  share = jnp.sum(jax.nn.softmax(votes) * same, axis=-1)
  equal = (classes[:, None] == classes[None, : len(queries)]) & is_known[
    :, None
  ]
  others = jnp.sum(equal, axis=0) - 1
  chance = others / (jnp.sum(is_known) - 1)
  mean = lambda x: losses.mean_where(x, is_known[: len(queries)])
  return (mean(share) - mean(chance)) / (1 - mean(chance))


def add_voters(settings: Settings, state, rows, labels):
  """Give acquired labels a vote, see `core.AddLabels`."""
  state = add_labels(state, rows, labels)
  memory = state.memory
  known = rows_of_labels(state.labels, len(memory.known_rows))
  memory = memory.replace(
    known=rows_of_images(memory.rows, known, memory.admitted),
    known_rows=known,
    known_classes=classes_of(state.labels, known),
  )
  return estimate_density(settings)(state.replace(memory=memory), None)


def upgrade(state, fresh: Bank) -> Bank:
  """Convert a bank of version 0.1, see `core.UpgradeMemory`.

  It has a row for each of the N images and no classes of the labelled images.
  Rows that are not admitted are left out.
  """
  old, kept = state.memory, fresh.admitted
  bank = {name: getattr(old, name) for name in ('rows', 'labels', 'confidence')}
  if kept is not None:
    bank = {name: column[kept] for name, column in bank.items()}
    classes = fresh.labels[0]  # C: the first image of a new bank has label C
    place = classes + jnp.arange(len(kept), dtype=jnp.int32)
    has_class = bank['labels'] < classes
    bank['labels'] = jnp.where(has_class, bank['labels'], place)
  known_classes = classes_of(state.labels, old.known_rows)
  bank |= dict(
    known=old.known,
    known_rows=old.known_rows,
    log_density=old.log_density,
    known_classes=known_classes,
  )

  def put(column, padded):  # the padding depends on the number of devices
    count = min(len(column), len(padded))
    return padded.at[:count].set(column[:count])

  bank = {name: put(c, getattr(fresh, name)) for name, c in bank.items()}
  return fresh.replace(**bank)


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
  labelled_per_step: int = 0,
) -> Method:
  """Return LLP with the paper's constants.

  Args:
    net: the `Network`; this method normalises its embedding to length 1.
    tx: `steps -> optimiser` of a stage, see `optimizers.optimizer`.
    batch_spec: its unlabelled part is the number of images per step, drawn from
      all that the run admits, labelled or not.
    steps: length of the stage `propagate`.
    neighbours: K, labelled neighbours that vote.
    density_neighbours: T, neighbours in the density of a labelled row.
    temperature: τ, the temperature of all softmax functions over the bank.
    bank_momentum: m, the share of the old row when the bank is updated.
    confidence: weight an image's loss by its confidence (Table 6: not in woc).
    categorize: train the classifier as well (Table 6: wc).
    density: divide a vote by the local density (Table 6: lw).
    pseudo_labels: propagate from the neighbours, or take the classifier's
      prediction and its probability, as in the released code.
    bank_dtype: type of the bank's rows; 'bfloat16' halves the memory and rounds
      a product of normalised rows by at most 2⁻⁸.
    warm: steps of a first stage of instance recognition; 0 leaves it out.
    warm_loss: loss of the first stage: noise-contrastive, or the softmax over
      the whole bank.
    negatives: rows of the bank that 'nce' contrasts the images of a step with.
    labelled_per_step: labelled images that a step of `propagate` has beside
      those drawn from all images; 0 in the paper.
  """
  positive(
    steps=steps, batch_unlabelled=batch_spec.unlabelled, temperature=temperature
  )
  positive(neighbours=neighbours, density_neighbours=density_neighbours)
  positive(negatives=negatives)
  non_negative(warm=warm, labelled_per_step=labelled_per_step)
  fraction(bank_momentum=bank_momentum)
  settings = Settings(
    neighbours=neighbours,
    density_neighbours=density_neighbours,
    temperature=temperature,
    bank_momentum=bank_momentum,
    confidence=confidence,
    categorize=categorize,
    density=density,
    pseudo_labels=pseudo_labels,
    bank_dtype=bank_dtype,
  )
  all_images = BatchSpec(0, batch_spec.unlabelled, include_labelled=True)
  propagating = Stage(
    name='propagate',
    steps=steps,
    tx=tx(steps),
    batch_spec=all_images._replace(
      labelled=labelled_per_step, flag='labelled_per_step'
    ),
    loss=llp_loss(net, settings),
  )
  if density and pseudo_labels == 'neighbours':
    propagating = propagating._replace(epoch_update=estimate_density(settings))
  recognising = Stage(
    name='warm',
    steps=warm,
    tx=tx(max(1, warm)),
    batch_spec=all_images,
    loss=instance_loss(net, settings, warm_loss, negatives),
    acquire_labels=False,
    readiness=Readiness(
      'neighbour_agreement',
      'propagation would spread noise; raise `warm`, or `temperature`',
      least=LEAST_AGREEMENT,
      measure=functools.partial(neighbour_agreement, settings),
    ),
  )
  return Method(
    name='llp',
    stages=(recognising, propagating) if warm else (propagating,),
    init=functools.partial(init_bank, settings),
    layout=LAYOUT,
    add_labels=functools.partial(add_voters, settings),
    uses_admitted=True,
    upgrade_memory=upgrade,
    quality=propagated(net, settings),
  )


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
