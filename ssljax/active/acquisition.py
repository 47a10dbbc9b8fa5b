"""Acquisition functions for active learning: which images to label next.

Monte-Carlo dropout (Gal, Ghahramani 2016) makes T passes over an image with
independent dropout masks, p_t = f^(t)(x, w) over C classes. From these passes

  p̃       = 1/T Σ_t p_t                             DeepBASS, Eq. 7
  H(p)    = −Σ_c p_c log p_c / log C  in [0, 1]     DeepBASS, Eq. 3

A score is a number per image; images with high scores are labelled first. A
choice returns the rows of the images to label:

  entropy, bald, variation_ratios, mean_std   Gal, Islam, Ghahramani, ICML 2017
                                              (arXiv:1703.02910), section 4
  margin, least_confidence                    Settles 2009, section 3.1
  above_average                               DeepBASS, Eq. 14
  k_centre                                    Sener, Savarese, ICLR 2018
                                              (arXiv:1708.00489), Algorithm 1

Departure: Eq. 14 of DeepBASS compares an entropy with the mean over all images
('above_average'), while the authors' code compares it with the mean over the
labelled images ('above_labelled'). Both are available.

Letters: T passes, B images of a batch, N rows, C classes, D dimensions of an
embedding, Q rows to choose. The last of the N rows may be padding; padding is
never askable.
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

CHUNK = 64  # labelled rows whose distances are computed at a time


class Sampled(NamedTuple):
  """Averages over T passes with dropout, for B images of a batch or N rows."""

  mean: jax.Array  # [B, C] mean probability p̃ = 1/T Σ_t p_t, Eq. 7
  entropy: jax.Array  # [B] mean entropy 1/T Σ_t −Σ_c p_tc log p_tc, in nats
  votes: jax.Array  # [B, C] share of passes in which the class is the argmax
  square: jax.Array  # [B, C] mean square 1/T Σ_t p_t²


def entropy_in_nats(p) -> jax.Array:
  """Return −Σ_c p_c log p_c `[...]` of `p [..., C]`, where 0 log 0 = 0."""
  return jnp.sum(jsp.entr(p), axis=-1)


def normalised_entropy(p) -> jax.Array:
  """Return H(p) `[...]` of `p [..., C]`, Eq. 3; 1 if all classes are equal."""
  return entropy_in_nats(p) / jnp.log(float(p.shape[-1]))


def one_pass(logits) -> Sampled:
  """Return the statistics of a single pass with logits `[B, C]`."""
  chex.assert_rank(logits, 2)
  p = jax.nn.softmax(logits)
  vote = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
  return Sampled(p, entropy_in_nats(p), vote, jnp.square(p))


Masks = Literal['shared', 'per_image']


def sampler(net, passes: int, masks: Masks = 'shared') -> Callable:
  """Return Monte-Carlo dropout whose memory use does not depend on T.

  Args:
    net: the `Network`.
    passes: T. The key of each pass is the given key folded with its number.
    masks: all images of a pass share a dropout mask, or each has its own.

  Returns:
    `(params, stats, image [B, H, W, c], key) -> Sampled` for the B images. The
    result for an image does not depend on the other images.
  """
  errors.positive(passes=passes)
  run = net.sample if masks == 'shared' else sample_with_own_masks(net)

  def sample(params, stats, image, key) -> Sampled:
    def run_pass(number) -> Sampled:
      pass_key = jax.random.fold_in(key, number)
      return one_pass(run(params, stats, image, pass_key).logits)

    # On a CPU, forward convolutions in a loop are as fast as unrolled ones;
    # kernel gradients are not. See `experiments/speed.py --part=mc`.
    add = lambda number, sums: jax.tree.map(jnp.add, sums, run_pass(number))
    zeros = lambda x: jnp.zeros(x.shape, x.dtype)
    start = jax.tree.map(zeros, jax.eval_shape(run_pass, 0))
    sums = lax.fori_loop(0, passes, add, start)
    return jax.tree.map(lambda total: total / passes, sums)

  return sample


def sample_with_own_masks(net) -> Callable:
  """Return `net.sample` with a dropout mask for each image.

  The key of an image is the given one folded with a hash of its pixels. So the
  masks do not depend on the batch, and equal images have equal masks.
  """

  def sample_one(params, stats, image, key):
    outputs = net.sample(params, stats, image[None], key)
    return jax.tree.map(lambda x: x[0], outputs)

  def sample(params, stats, image, key):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, pixel_hash(image))
    return jax.vmap(sample_one, (None, None, 0, 0))(params, stats, image, keys)

  return sample


def pixel_hash(image) -> jax.Array:
  """Return a hash `[B]` uint32 of the pixels of `image [B, H, W, c]`."""
  words = lax.bitcast_convert_type(image.reshape(len(image), -1), jnp.uint32)
  place = jnp.arange(words.shape[1], dtype=jnp.uint32)
  odd = place * jnp.uint32(0x9E3779B2) + jnp.uint32(0x85EBCA6B)
  mixed = (words ^ (words >> 15)) * odd[None]
  return jnp.sum(mixed ^ (mixed >> 13), axis=1, dtype=jnp.uint32)


# Scores [N]: images with the highest scores are labelled first.


def entropy(sampled: Sampled) -> jax.Array:
  """Return H(p̃) `[N]`, Eq. 3: "max. entropy" in DeepBASS and Gal et al."""
  return normalised_entropy(sampled.mean)


def bald(sampled: Sampled) -> jax.Array:
  """Return the entropy of p̃ minus the mean entropy `[N]`, in nats.

  This is the mutual information of the label and the weights: Houlsby et al.
  2011; Gal et al., section 4.
  """
  return entropy_in_nats(sampled.mean) - sampled.entropy


def variation_ratios(sampled: Sampled) -> jax.Array:
  """Return the share of passes `[N]` outside the majority class, Freeman 1965.

  Each pass votes for its own class, as in section 4.1.3 of Gal's thesis. With
  the largest p̃_c instead of votes the score would be `least_confidence`.
  """
  return 1 - jnp.max(sampled.votes, axis=-1)


def mean_std(sampled: Sampled) -> jax.Array:
  """Return 1/C Σ_c √(1/T Σ_t p_tc² − p̃_c²) `[N]`, Gal et al., section 4."""
  variance = sampled.square - jnp.square(sampled.mean)
  # Rounding may make the difference slightly negative.
  return jnp.mean(jnp.sqrt(jnp.maximum(0.0, variance)), axis=-1)


def margin(sampled: Sampled) -> jax.Array:
  """Return −(p̃_1 − p̃_2) `[N]` for the two largest probabilities."""
  largest = lax.top_k(sampled.mean, 2)[0]
  return largest[..., 1] - largest[..., 0]


def least_confidence(sampled: Sampled) -> jax.Array:
  """Return 1 − max_c p̃_c `[N]`."""
  return 1 - jnp.max(sampled.mean, axis=-1)


# Choices: rows [Q] int32.


def top(score, askable, size: int) -> jax.Array:
  """Return the askable rows `[Q]` with the highest scores.

  Of rows with equal scores the one with the lower number comes first.

  Args:
    score: `[N]`; NaN counts as the lowest score.
    askable: `[N]` bool, true for at least `size` rows.
    size: Q.
  """
  chex.assert_equal_shape([score, askable])
  lowest = jnp.finfo(score.dtype).min
  score = jnp.nan_to_num(score, nan=lowest, posinf=None, neginf=lowest)
  score = jnp.where(askable, score, -jnp.inf)
  return lax.top_k(score, size)[1].astype(jnp.int32)


def by_score(score: Callable) -> Callable:
  """Return the choice that takes the rows with the highest scores."""

  def choose(sampled, embedding, labels, askable, size: int, key):
    del embedding, labels, key
    return top(score(sampled), askable, size)

  return choose


def at_random(sampled, embedding, labels, askable, size: int, key):
  """Return uniformly drawn askable rows `[Q]`, the baseline."""
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
  """Draw askable rows `[Q]` whose entropy is above the mean, Eq. 14.

  If there are fewer than Q such rows, the rest are the other rows with the
  highest entropies. The mean is over the labelled and the askable rows, X ∪ X',
  or over the labelled rows alone as in the authors' code.
  """
  del embedding
  h = entropy(sampled)
  counted = labels != UNLABELLED
  counted = counted if average == 'labelled' else counted | askable
  threshold = losses.mean_where(h, counted)
  # Random scores above every entropy, which is at most 1 apart from rounding.
  scores = jax.random.uniform(key, h.shape, minval=2.0, maxval=4.0)
  return top(jnp.where(h > threshold, scores, h), askable, size)


def add_centres(distance, embedding, rows, valid) -> jax.Array:
  """Update the squared distances to the nearest centre for new centres.

  Args:
    distance: `[N]` squared distances to the nearest centre so far.
    embedding: `[N, D]`.
    rows: `[K]` the new centres, as rows of `embedding`.
    valid: `[K]` bool, false for rows to ignore.

  Returns:
    `[N]` squared distances.
  """
  centres = embedding[rows]
  # Norms and a matrix product: 100 times as fast as differences on a CPU.
  squares = jnp.sum(jnp.square(embedding), axis=-1)
  products = jnp.matmul(embedding, centres.T, precision='highest')
  new = squares[:, None] + squares[rows][None] - 2 * products
  new = jnp.where(valid[None], jnp.maximum(0.0, new), jnp.inf)
  return jnp.minimum(distance, jnp.min(new, axis=-1))


def distance_to_labelled(embedding, labelled) -> jax.Array:
  """Return squared distances `[N]` to the nearest labelled row; ∞ if none.

  Args:
    embedding: `[N, D]`.
    labelled: `[N]` bool.
  """
  centres, count = jnp.argsort(~labelled, stable=True), jnp.sum(labelled)

  def add_chunk(number, distance):
    index = number * CHUNK + jnp.arange(CHUNK)
    rows = centres.at[index].get(mode='clip')
    return add_centres(distance, embedding, rows, index < count)

  start = jnp.full(labelled.shape, jnp.inf, embedding.dtype)
  return lax.fori_loop(0, -(-count // CHUNK), add_chunk, start)


def k_centre(sampled, embedding, labels, askable, size: int, key):
  """Repeatedly choose the row that is furthest from all centres `[Q]`.

  Each chosen row becomes a centre. Distances are Euclidean between embeddings
  `[N, D]`, and the labelled rows are the first centres. Without labelled rows
  the first choice is the askable row with the lowest number.
  """
  del sampled, key
  chex.assert_rank(embedding, 2)
  embedding = jnp.asarray(embedding)

  def choose_next(number, carry):
    distance, free, rows = carry
    row = jnp.argmax(jnp.where(free, distance, -1.0)).astype(jnp.int32)
    distance = add_centres(distance, embedding, row[None], jnp.array([True]))
    return distance, free.at[row].set(False), rows.at[number].set(row)

  distance = distance_to_labelled(embedding, labels != UNLABELLED)
  start = distance, askable, jnp.zeros(size, jnp.int32)
  return lax.fori_loop(0, size, choose_next, start)[2]


# Choices by name: (Sampled of N rows, embedding [N, D] or None, labels [N]
# int32, askable [N] bool, Q, key) -> rows [Q] int32. If at least Q rows are
# askable, all chosen rows are. Q is a Python number; the other arguments may
# have a leading axis under vmap.
ACQUISITIONS: dict[str, Callable] = {
  'entropy': by_score(entropy),
  'above_average': above_average,
  'above_labelled': functools.partial(above_average, average='labelled'),
  'bald': by_score(bald),
  'variation_ratios': by_score(variation_ratios),
  'mean_std': by_score(mean_std),
  'margin': by_score(margin),
  'least_confidence': by_score(least_confidence),
  'k_centre': k_centre,
  'random': at_random,
}
NEEDS_EMBEDDING = frozenset({'k_centre'})  # choices that use the embedding
