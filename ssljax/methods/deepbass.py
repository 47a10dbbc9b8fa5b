"""DeepBASS: deep Bayesian active semi-supervised learning.

Rottmann, Kahl, Gottschalk, 2018. X are the images with a label g, X' the
others; f̃_T(x) is the mean of T softmax outputs with dropout, Eq. 7, and H their
entropy over log C, Eq. 3. Algorithm 3.1: train on X alone, then repeat

  1. ψ ← argmax f̃_T'(x'), Eq. 4, and its entropy, for all x' in X'
  2. D ← D ∪ {x': H(f̃_T'(x')) < θ}, θ the mean of H(f̃_T(x)) over X     Eq. 8, 9
     or all of X' at once
  3. every so often ask for the labels of those with the largest entropy
     (``acquire``, for this any other method: see `asking`)
  4. one epoch of  mean CE(g or ψ, softmax f(x))  over X and D         Eq. 2, 5

in which an image of X comes 20 times for once of X': that is the μ of Eq. 6.
The pseudo-labels of D are those of the last 1; the labels of X never change.
Weights and optimiser go on through all of it.

Departures: the last batch of an epoch is filled up from another shuffle, where
the authors' is smaller.
"""

import functools
from typing import Literal

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ssljax import losses, optimizers
from ssljax.active import acquisition
from ssljax.core import UNLABELLED, BatchSpec, Method, Stage, no_update
from ssljax.errors import non_negative, positive

Membership = Literal['all', 'stepwise', 'none']


@struct.dataclass
class PseudoLabels:
  """The memory; N images, rounded up over the devices."""

  labels: jax.Array  # [N] int32 ψ
  entropy: jax.Array  # [N] H(f̃_T')
  member: jax.Array  # [N] bool, whether it is in D
  threshold: jax.Array  # [] θ


LAYOUT = PseudoLabels(
  labels=P('data'), entropy=P('data'), member=P('data'), threshold=P()
)


def deepbass_loss(net):
  """The loss of a `Stage`, Eq. 2 and 5."""

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    truth = state.labels[batch.rows]
    known, guess = truth != UNLABELLED, state.memory.labels[batch.rows]
    labels = jnp.where(known, truth, guess)
    terms = losses.cross_entropy(outputs.logits, labels)
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


def sampled_with(net, passes: int):
  """`per_example` of a `Stage`: what so many passes with dropout say."""
  sample = acquisition.sampler(net, passes)

  def per_example(state, image, key):
    return sample(state.params, state.stats, image, key)

  return per_example


def threshold(entropy, known) -> jax.Array:
  """θ `[]`, Eq. 8: the mean of `entropy [N]` where `known [N]`."""
  return losses.mean_where(entropy, known)


def refresh_with(membership: Membership):
  """`epoch_update` of a `Stage`: pseudo-labels, and what is learned from them."""

  def epoch_update(state, observed):
    memory = state.memory
    sampled, theta = observed, memory.threshold
    if membership == 'stepwise':
      sampled, of_known = observed
      entropy = acquisition.entropy(of_known)
      theta = threshold(entropy, state.labels != UNLABELLED)
    entropy = acquisition.entropy(sampled)
    below = membership == 'all' or entropy < theta
    memory = PseudoLabels(
      jnp.argmax(sampled.mean, axis=-1).astype(jnp.int32),
      entropy,
      (memory.member | below) & (jnp.arange(len(entropy)) < state.images),
      theta,
    )
    return state.replace(memory=memory)

  return epoch_update


def no_pseudo_labels(key, params, stats, spec) -> PseudoLabels:
  """`init` of the method: D is empty before the second stage."""
  del key, params, stats
  zeros = jnp.zeros(spec.rows)
  return PseudoLabels(
    zeros.astype(jnp.int32), zeros, zeros.astype(bool), jnp.zeros([])
  )


def multiplicity(state, upsample: int) -> jax.Array:
  """How often `[N]` int32 an epoch has each row, of X and of D."""
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
) -> Method:
  """DeepBASS with the paper's constants.

  Args:
    net: the `Network`; it has dropout.
    tx: `steps -> optimiser` of both stages.
    batch_spec: `batch_spec.unlabelled` images per step, labelled or not.
    steps: length of the first stage, on the labelled images alone; the paper's
      is 100 epochs of their copies.
    iterations: of the second stage, an epoch each; 0 leaves it out.
    membership: which pseudo-labels are learned from: all, those that were ever
      below the threshold θ, or none (active learning alone).
    passes: T', with dropout, over all images.
    labelled_passes: T, over the labelled ones, for θ.
    upsample: copies of a labelled image for one of another.
  """
  positive(steps=steps, batch_unlabelled=batch_spec.unlabelled, passes=passes)
  positive(labelled_passes=labelled_passes, upsample=upsample)
  non_negative(iterations=iterations)
  often = functools.partial(multiplicity, upsample=upsample)
  first = Stage(
    'labelled',
    steps,
    tx(steps),
    BatchSpec(0, batch_spec.unlabelled, include_labelled=True),
    deepbass_loss(net),
    multiplicity=often,
    asks=False,
  )
  stepwise = membership == 'stepwise'
  second = first._replace(
    name='iterations',
    steps=0,
    epochs=iterations,
    asks=True,
    keep_optimizer=True,
    per_example=None if membership == 'none' else sampled_with(net, passes),
    per_labelled_example=sampled_with(net, labelled_passes)
    if stepwise
    else None,
    epoch_update=no_update
    if membership == 'none'
    else refresh_with(membership),
  )
  stages = (first, second) if iterations else (first,)
  return Method(
    'deepbass', stages, no_pseudo_labels, LAYOUT, optimizers.weights
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
