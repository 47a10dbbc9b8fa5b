"""DeepBASS: deep Bayesian active semi-supervised learning.

Rottmann, Kahl, Gottschalk, 2018. X are the images with a label g, X' the
others. f̃_T(x) is the mean of T softmax outputs with dropout, Eq. 7, and H an
entropy divided by log C, Eq. 3. Algorithm 3.1 trains on X alone (stage
`labelled`), and then repeats (stage `iterations`):

  1. ψ ← argmax f̃_T'(x'), Eq. 4, and its entropy, for all x' in X'.
  2. D ← D ∪ {x': H(f̃_T'(x')) < θ}, θ the mean of H(f̃_T(x)) over X    Eq. 8, 9
     (`membership='stepwise'`), or D ← X' at once (`membership='all'`).
  3. At intervals query the labels of the images with the largest entropy. This
     part is `training.active_loop` and works with any method.
  4. Minimise  mean CE(g or ψ, softmax f(x))  over X and D for an epoch.
                                                                     Eq. 2, 5, 6
An epoch has every image of X 20 times and every image of D once: this is the
weight μ of Eq. 6. The pseudo-labels of D are those of the latest step 1; the
labels of X never change. Parameters and optimiser state continue throughout.

Departures from the paper:
  - The last batch of an epoch is completed from another shuffle, because all
    batches have the same size; the authors' last batch is smaller.
  - The length of the stage `labelled` is given in steps; the authors train for
    100 epochs of 20 copies.
  - Predictions are evaluated without dropout, as in the authors' code.
  - In a pass with dropout all images share one mask (`layers.dropout`), so that
    a pass evaluates one function and costs no more than inference; in the
    authors' code each image has its own, as with `masks='per_image'`.

Section 5 also reports the method without dropout in step 1: `passes=0`.
"""

import functools
from typing import Literal

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ssljax import losses
from ssljax.active import acquisition
from ssljax.core import (
  UNLABELLED,
  BatchSpec,
  EpochUpdate,
  Loss,
  Method,
  PerExample,
  Stage,
  UsedLabels,
  layout,
)
from ssljax.errors import non_negative, positive
from ssljax.methods.supervised import fitted

Membership = Literal['all', 'stepwise', 'none']


class PseudoLabels(struct.PyTreeNode):
  """The memory; N images, and padding."""

  labels: jax.Array  # [N] int32 ψ
  entropy: jax.Array  # [N] H(f̃_T')
  member: jax.Array  # [N] bool, True for images in D
  threshold: jax.Array  # [] θ


LAYOUT = layout(
  PseudoLabels,
  labels=P('data'),
  entropy=P('data'),
  member=P('data'),
  threshold=P(),
)


def deepbass_loss(net) -> Loss:
  """Return the loss of both stages, Eq. 2 and 5."""

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    truth = state.labels[batch.rows]
    known, guess = truth != UNLABELLED, state.memory.labels[batch.rows]
    labels = jnp.where(known, truth, guess)
    terms = losses.cross_entropy(batch.adjusted(outputs.logits), labels)
    mean = jnp.mean(terms)
    metrics = {
      'cross_entropy': mean,
      'of_labelled': losses.mean_where(terms, known),
      'of_pseudo_labelled': losses.mean_where(terms, ~known),
      'labelled': jnp.mean(known.astype(mean.dtype)),
      'members': jnp.mean(state.memory.member.astype(mean.dtype)),
      'threshold': state.memory.threshold,
    }
    return mean, (state.replace(stats=stats), metrics)

  return loss


def sampled_with(
  net, passes: int, masks: acquisition.Masks = 'shared'
) -> PerExample:
  """Return the function that summarises predictions with dropout.

  Args:
    net: the `Network`.
    passes: number of passes, T or T'; 0 for one pass without dropout.
    masks: as in `acquisition.sampler`.
  """
  if not passes:
    return lambda state, image, key: acquisition.one_pass(
      net.infer(state.params, state.stats, image).logits
    )
  sample = acquisition.sampler(net, passes, masks)

  def per_example(state, image, key):
    return sample(state.params, state.stats, image, key)

  return per_example


def threshold(entropy, known) -> jax.Array:
  """Compute θ `[]`, Eq. 8: the mean of `entropy [N]` where `known [N]`."""
  return losses.mean_where(entropy, known)


def update_with(membership: Membership) -> EpochUpdate:
  """Return the update of pseudo-labels and D before each epoch, Eq. 4, 8, 9.

  Args:
    membership: 'all' or 'stepwise', see `deepbass`.
  """

  def epoch_update(state, mapped):
    memory = state.memory
    sampled, theta = mapped, memory.threshold
    if membership == 'stepwise':
      sampled, of_known = mapped
      entropy = acquisition.entropy(of_known)
      theta = threshold(entropy, state.labels != UNLABELLED)
    entropy = acquisition.entropy(sampled)
    below = membership == 'all' or entropy < theta
    is_image = jnp.arange(len(entropy)) < state.images  # not padding
    memory = PseudoLabels(
      labels=jnp.argmax(sampled.mean, axis=-1).astype(jnp.int32),
      entropy=entropy,
      member=(memory.member | below) & is_image,
      threshold=theta,
    )
    return state.replace(memory=memory)

  return epoch_update


def of_members(state, rows, image) -> UsedLabels:
  """Return ψ, used for the images of D; see `core.Quality`."""
  del image
  memory = state.memory
  member = memory.member[rows].astype(memory.entropy.dtype)
  return UsedLabels(memory.labels[rows], member)


def no_pseudo_labels(key, params, stats, spec) -> PseudoLabels:
  """Return the initial memory: D is empty before the second stage."""
  del key, params, stats
  zeros = jnp.zeros(spec.rows)
  return PseudoLabels(
    labels=zeros.astype(jnp.int32),
    entropy=zeros,
    member=zeros.astype(bool),
    threshold=jnp.zeros([]),
  )


def multiplicity(state, upsample: int) -> jax.Array:
  """Return the sampling multiplicity `[N]` int32 of each row in an epoch.

  Args:
    state: state between two epochs.
    upsample: multiplicity of the images of X; that of D is 1.
  """
  member = state.memory.member.astype(jnp.int32)
  return jnp.where(state.labels != UNLABELLED, upsample, member)


def deepbass(
  net,
  tx,
  batch_spec: BatchSpec,
  steps: int,
  *,
  iterations: int = 200,
  membership: Membership = 'all',
  passes: int = 10,
  labelled_passes: int = 100,
  upsample: int = 20,
  masks: acquisition.Masks = 'shared',
) -> Method:
  """Return DeepBASS with the paper's constants.

  Args:
    net: the `Network`; it needs dropout.
    tx: `steps -> optimiser` of both stages, see `optimizers.optimizer`.
    batch_spec: its unlabelled part is the number of images per step, labelled
      or not.
    steps: length of the first stage, on the labelled images alone; the paper
      trains 100 epochs of their copies.
    iterations: length of the second stage in epochs; 0 leaves it out.
    membership: images whose pseudo-labels are learned from: all, those that
      were below the threshold θ at least once, or none (active learning alone).
    passes: T', passes with dropout over all images; 0 predicts pseudo-labels,
      and θ, without dropout. A query with `query_passes` = T' uses the same
      passes.
    labelled_passes: T, passes with dropout over the labelled images, for θ.
    upsample: multiplicity of a labelled image in an epoch.
    masks: all images of a pass share a dropout mask, or each has its own.
  """
  positive(steps=steps, batch_unlabelled=batch_spec.unlabelled)
  positive(labelled_passes=labelled_passes, upsample=upsample)
  non_negative(iterations=iterations, passes=passes)
  first = Stage(
    name='labelled',
    steps=steps,
    tx=tx(steps),
    batch_spec=BatchSpec(0, batch_spec.unlabelled, include_labelled=True),
    loss=deepbass_loss(net),
    multiplicity=functools.partial(multiplicity, upsample=upsample),
    acquire_labels=False,
    readiness=fitted('steps'),
  )
  second = first._replace(
    name='iterations',
    steps=0,
    epochs=iterations,
    acquire_labels=True,
    keep_optimizer=True,
    readiness=None,
  )
  if membership != 'none':
    second = second._replace(
      per_example=sampled_with(net, passes, masks),
      sampled_passes=passes,
      epoch_update=update_with(membership),
    )
  if membership == 'stepwise':
    second = second._replace(
      per_labelled_example=sampled_with(
        net, labelled_passes if passes else 0, masks
      )
    )
  return Method(
    name='deepbass',
    stages=(first, second) if iterations else (first,),
    init=no_pseudo_labels,
    layout=LAYOUT,
    quality=None if membership == 'none' else of_members,
  )


# Settings of the paper and its code that differ from the defaults of other
# runs.
DEFAULTS = {
  'unlabelled': 'all',
  'network': 'deepbass_mnist',
  'batch_labelled': 1,  # a step has no such part: any number of labels will do
  'batch_unlabelled': 256,
  'optimizer': 'adam',
  'learning_rate': 1e-3,
  'decay': 'constant',
  'weight_decay': 2e-3,  # Keras adds λ‖w‖², with no half
  'clip': 0.0,
  'average': 0.0,
  'acquire': 'entropy',
}
