"""What a network is unsure of, and which images to ask about.

Monte-Carlo dropout (Gal, Ghahramani 2016): T passes over an image, each with
a dropout of its own, p_t = f^(t)(x, w) of C classes. Of the passes,

  p̃       = 1/T Σ_t p_t                             DeepBASS, Eq. 7
  H(p)    = −Σ_c p_c log p_c / log C  in [0, 1]     DeepBASS, Eq. 3

A score says how soon to ask about an image; a choice says which to ask about:

  entropy, bald, variation_ratios, mean_std   Gal, Islam, Ghahramani, ICML 2017
                                              (arXiv:1703.02910), section 4
  margin, least_confidence                    Settles 2009, section 3.1
  above_average                               DeepBASS, Eq. 14
  k_centre                                    Sener, Savarese, ICLR 2018
                                              (arXiv:1708.00489), Algorithm 1

Departure: the authors of DeepBASS compare an entropy with the mean of the
labelled images' in their code, with that of all in Eq. 14: 'above_labelled' and
'above_average'.

Letters: T passes, B images of a batch, N rows, C classes, D numbers of an
embedding, Q rows to ask about. Of N rows the last may be no image's: they are
not askable.
"""

from collections.abc import Callable
import functools
from typing import Literal, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
import jax.scipy.special as jsp

from ssljax import errors, losses
from ssljax.core import UNLABELLED

CENTRES = 64  # labelled rows whose distances are held at a time


class Sampled(NamedTuple):
  """What T passes with dropout say of B images, or of N rows."""

  mean: jax.Array  # [B, C] p̃ = 1/T Σ_t p_t, Eq. 7
  entropy: jax.Array  # [B] 1/T Σ_t −Σ_c p_tc log p_tc, in nats
  votes: jax.Array  # [B, C] the share of passes whose largest p_tc it is
  square: jax.Array  # [B, C] 1/T Σ_t p_t²


def nats(p) -> jax.Array:
  """−Σ_c p_c log p_c `[...]` of probabilities `[..., C]`; 0 log 0 = 0."""
  return jnp.sum(jsp.entr(p), axis=-1)


def normalised_entropy(p) -> jax.Array:
  """H(p) `[...]` of probabilities `[..., C]`, Eq. 3: 1 where all are equal."""
  return nats(p) / jnp.log(float(p.shape[-1]))


def one_pass(logits) -> Sampled:
  """What a single pass says, of logits `[B, C]`."""
  chex.assert_rank(logits, 2)
  p = jax.nn.softmax(logits)
  vote = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
  return Sampled(p, nats(p), vote, jnp.square(p))


def sampler(net, passes: int) -> Callable:
  """Monte-Carlo dropout with a memory that does not grow with the passes.

  Args:
    net: the `Network`.
    passes: T; each has the key folded with its number.

  Returns:
    `(params, stats, image [B, H, W, c], key) -> Sampled` of the B images.
  """
  errors.positive(passes=passes)

  def sample(params, stats, image, key) -> Sampled:
    def one(number) -> Sampled:
      own = jax.random.fold_in(key, number)
      return one_pass(net.sample(params, stats, image, own).logits)

    # A loop of forward convolutions is as fast on a CPU as they are apart,
    # other than that of kernel gradients: `experiments/speed.py --part=mc`.
    add = lambda number, sums: jax.tree.map(jnp.add, sums, one(number))
    empty = lambda x: jnp.zeros(x.shape, x.dtype)
    start = jax.tree.map(empty, jax.eval_shape(one, 0))
    sums = lax.fori_loop(0, passes, add, start)
    return jax.tree.map(lambda total: total / passes, sums)

  return sample


# Scores [N]: the higher, the sooner it is asked about.


def entropy(sampled: Sampled) -> jax.Array:
  """H(p̃) `[N]`, Eq. 3; "max. entropy" of DeepBASS and Gal et al."""
  return normalised_entropy(sampled.mean)


def bald(sampled: Sampled) -> jax.Array:
  """What a label would say of the weights `[N]`: entropy of p̃ − mean entropy.

  In nats. Houlsby et al. 2011; Gal et al., section 4.
  """
  return nats(sampled.mean) - sampled.entropy


def variation_ratios(sampled: Sampled) -> jax.Array:
  """The share of passes `[N]` that are outvoted, Freeman 1965.

  Of the passes' own classes, as section 4.1.3 of Gal's thesis has it; with the
  largest p̃_c instead of a vote it is `least_confidence`.
  """
  return 1 - jnp.max(sampled.votes, axis=-1)


def mean_std(sampled: Sampled) -> jax.Array:
  """1/C Σ_c √(1/T Σ_t p_tc² − p̃_c²) `[N]`, Gal et al., section 4."""
  variance = sampled.square - jnp.square(sampled.mean)
  # Rounding may leave it just below 0.
  return jnp.mean(jnp.sqrt(jnp.maximum(0.0, variance)), axis=-1)


def margin(sampled: Sampled) -> jax.Array:
  """−(p̃_1 − p̃_2) `[N]`, of the two largest."""
  largest = lax.top_k(sampled.mean, 2)[0]
  return largest[..., 1] - largest[..., 0]


def least_confidence(sampled: Sampled) -> jax.Array:
  """1 − max_c p̃_c `[N]`."""
  return 1 - jnp.max(sampled.mean, axis=-1)


# Choices: rows [Q] int32.


def top(score, askable, size: int) -> jax.Array:
  """The askable rows `[Q]` of the highest scores, the lower row in a tie.

  Args:
    score: `[N]`; NaN is the lowest.
    askable: `[N]` bool, at least `size` of them.
    size: Q.
  """
  chex.assert_equal_shape([score, askable])
  lowest = jnp.finfo(score.dtype).min
  score = jnp.nan_to_num(score, nan=lowest, posinf=None, neginf=lowest)
  score = jnp.where(askable, score, -jnp.inf)
  return lax.top_k(score, size)[1].astype(jnp.int32)


def by(score: Callable) -> Callable:
  """The choice of the rows where a score is the highest."""

  def choose(sampled, embedding, labels, askable, size: int, key):
    del embedding, labels, key
    return top(score(sampled), askable, size)

  return choose


def at_random(sampled, embedding, labels, askable, size: int, key):
  """Any askable rows `[Q]`, as the baseline of the others."""
  del sampled, embedding, labels
  return top(jax.random.uniform(key, askable.shape), askable, size)


def above_average(
  sampled,
  embedding,
  labels,
  askable,
  size: int,
  key,
  *,
  average: Literal['all', 'labelled'] = 'all',
):
  """Any askable rows `[Q]` whose entropy is above the mean, Eq. 14.

  Where there are fewer than Q, the highest entropies of the others follow. The
  mean is over the labelled and the askable rows, X ∪ X', or as in the authors'
  code over the labelled alone.
  """
  del embedding
  h = entropy(sampled)
  counted = labels != UNLABELLED
  counted = counted if average == 'labelled' else counted | askable
  threshold = losses.mean_where(h, counted)
  # Above every entropy, which is at most 1 but for rounding.
  chance = jax.random.uniform(key, h.shape, minval=2.0, maxval=4.0)
  return top(jnp.where(h > threshold, chance, h), askable, size)


def nearest(distance, embedding, rows, valid) -> jax.Array:
  """The lesser of a distance and that to the nearest of some rows, squared.

  Args:
    distance: `[N]`.
    embedding: `[N, D]`.
    rows: `[K]` of it.
    valid: `[K]` bool, those that count.
  """
  centres = embedding[rows]
  # Norms and a product: 100 times as fast as differences on a CPU.
  squares = jnp.sum(jnp.square(embedding), axis=-1)
  products = jnp.matmul(embedding, centres.T, precision='highest')
  apart = squares[:, None] + squares[rows][None] - 2 * products
  apart = jnp.where(valid[None], jnp.maximum(0.0, apart), jnp.inf)
  return jnp.minimum(distance, jnp.min(apart, axis=-1))


def to_labelled(embedding, labelled) -> jax.Array:
  """Squared distances `[N]` to the nearest labelled row; ∞ without any.

  Args:
    embedding: `[N, D]`.
    labelled: `[N]` bool.
  """
  centres, count = jnp.argsort(~labelled, stable=True), jnp.sum(labelled)

  def look(number, distance):
    places = number * CENTRES + jnp.arange(CENTRES)
    rows = centres.at[places].get(mode='clip')
    return nearest(distance, embedding, rows, places < count)

  start = jnp.full(labelled.shape, jnp.inf, embedding.dtype)
  return lax.fori_loop(0, -(-count // CENTRES), look, start)


def k_centre(sampled, embedding, labels, askable, size: int, key):
  """The row furthest from all centres `[Q]`, made a centre, and so on.

  Distances are Euclidean between embeddings `[N, D]`; the labelled rows are
  the first centres. Without any the first choice is the lowest askable row.
  """
  del sampled, key
  chex.assert_rank(embedding, 2)
  embedding = jnp.asarray(embedding)

  def pick(number, carry):
    distance, free, rows = carry
    row = jnp.argmax(jnp.where(free, distance, -1.0)).astype(jnp.int32)
    distance = nearest(distance, embedding, row[None], jnp.array([True]))
    return distance, free.at[row].set(False), rows.at[number].set(row)

  distance = to_labelled(embedding, labels != UNLABELLED)
  start = distance, askable, jnp.zeros(size, jnp.int32)
  return lax.fori_loop(0, size, pick, start)[2]


# name -> (Sampled of N rows, embedding [N, D] or None, labels [N] int32,
# askable [N] bool, Q, key) -> rows [Q] int32, each of them askable where at
# least Q are. Q is a number; the others may have a leading axis under vmap.
ACQUISITIONS: dict[str, Callable] = {
  'entropy': by(entropy),
  'above_average': above_average,
  'above_labelled': functools.partial(above_average, average='labelled'),
  'bald': by(bald),
  'variation_ratios': by(variation_ratios),
  'mean_std': by(mean_std),
  'margin': by(margin),
  'least_confidence': by(least_confidence),
  'k_centre': k_centre,
  'random': at_random,
}
EMBEDDED = frozenset({'k_centre'})  # those that look at the embedding
