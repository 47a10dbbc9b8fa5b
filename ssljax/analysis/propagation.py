"""Label propagation alone: the classes of all images from those of a few.

The methods of LLP's Table 5 (Zhuang, Ding, Murli, Yamins, 2019). Each is a pure
function of given embeddings `[M, D]`, which it brings to length 1, of the known
classes `[M]` int32, UNLABELLED but for a few, and of C:

  LLP     local_propagation  labelled neighbours vote, divided by the density
  LP      label_propagation  Zhu, Ghahramani 2002: known classes are clamped
  LS      label_spreading    Zhou et al. 2004: (I − αS) F = (1 − α) Y
  LP_DMT  metric_transfer    Deep Metric Transfer (Liu et al. 2018,
                             arXiv:1812.08781): a biased normalised cut
  LP_DLP  deep_propagation   Deep Label Propagation (Iscen et al. 2019,
                             arXiv:1904.04717): LS over nearest neighbours

The paper gives no hyper-parameter but LLP's; those of the others are inferred:
LP and LS have scikit-learn's own, LP_DMT and LP_DLP the constants of their
authors' code. scikit-learn's γ = 20 weighs a pair of vectors of length 1 by
exp((cos − 1)/τ) with τ = 1/(2γ) = 0.025. LLP's τ = 0.07, that of a vote of ten
neighbours, was tried for LP and LS first, with the α = 0.99 of LS's paper, and
given up for what came of it on digits (experiments/README.md): in a sum over
all pairs those far away, which are many, outweighed the near. Where a method
wants more neighbours than there are, it has all.

Letters: M images, D numbers, C classes, E pairs, v embeddings of length 1.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg, sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import cg
from sklearn import preprocessing, semi_supervised
from sklearn.metrics import pairwise
from sklearn.neighbors import kneighbors_graph

from ssljax import neighbours
from ssljax.core import UNLABELLED
from ssljax.data import splits
from ssljax.errors import require
from ssljax.methods import llp

# λ of a graph that falls apart is 0, of a connected one in DMT's code 0.02.
LEAST_EIGENVALUE = 1e-3


# Which images.


class Subsample(NamedTuple):
  """Images of some classes, a few of them labelled."""

  rows: np.ndarray  # [M] of the data set
  truth: np.ndarray  # [M] int32 in 0..C-1
  known: np.ndarray  # [M] int32, UNLABELLED where a method must not know


def draw_subsample(
  labels, classes: int, images: int, labelled: int, seed: int, number: int
) -> Subsample:
  """As many images of each of some classes, drawn at random.

  Args:
    labels: `[N]` int32; UNLABELLED rows are not drawn.
    classes: C, how many classes.
    images: of each class.
    labelled: of these; the first ones of more.
    seed: of all subsamples.
    number: of this one.
  """
  names, counts = np.unique(labels[labels != UNLABELLED], return_counts=True)
  require(
    len(names) >= classes,
    f'`classes`={classes}: the embeddings are of {len(names)} classes: give '
    'at most that many',
  )
  least = int(np.argmin(counts))
  require(
    counts[least] >= images,
    f'`images`={images}: class {names[least]} has {counts[least]}: give at '
    'most that many',
  )
  word = functools.partial(splits.generator, seed, splits.SUBSAMPLE, number)
  chosen = np.sort(word().permutation(names)[:classes])
  rows = [
    word(1 + name).permutation(np.flatnonzero(labels == name))[:images]
    for name in chosen
  ]
  truth = np.repeat(np.arange(classes, dtype=np.int32), images)
  first = np.tile(np.arange(images) < labelled, classes)
  known = np.where(first, truth, UNLABELLED).astype(np.int32)
  return Subsample(np.concatenate(rows), truth, known)


# Local.


def local_propagation(
  embeddings,
  known,
  count: int,
  *,
  neighbours: int = 10,
  density_neighbours: int = 25,
  temperature: float = 0.07,
) -> np.ndarray:
  """Classes `[M]` by LLP, Eq. 5–8.

  Args:
    embeddings: `[M, D]`.
    known: `[M]` int32.
    count: C.
    neighbours: K labelled neighbours that vote.
    density_neighbours: T neighbours that a labelled image's density is over.
    temperature: τ, of the votes and of the density.
  """
  v = jnp.asarray(unit(embeddings), jnp.float32)
  rows = np.flatnonzero(known != UNLABELLED)
  return np.asarray(
    _vote(
      v,
      v[rows],
      jnp.asarray(known[rows]),
      count,
      neighbours,
      density_neighbours,
      temperature,
    )
  )


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _vote(v, labelled, classes, count, k, nearest, tau):
  """Classes `[M]` from labelled rows `[L, D]` of classes `[L]`."""
  density = neighbours.log_density(labelled, v, nearest, tau)
  return llp.propagate(v, labelled, classes, density, k, tau, count)[0]


# Over all pairs.


def label_propagation(
  embeddings, known, count: int, *, gamma: float = 20.0
) -> np.ndarray:
  """Classes `[M]` by label propagation: F_U = (I − P_UU)⁻¹ P_UL Y_L.

  Zhu, Ghahramani, 2002: where their iteration F ← P F, labelled rows put back,
  ends; P the weights over their rows' sums, U and L the images without and with
  a label. scikit-learn's `LabelPropagation` iterates, which takes thousands of
  steps where an image is much nearer to itself than to all others.

  Args:
    embeddings: `[M, D]`.
    known: `[M]` int32.
    count: C.
    gamma: γ of a pair's weight exp(−γ|v_i − v_j|²).
  """
  weights = pairwise.rbf_kernel(unit(embeddings), gamma=gamma)
  np.fill_diagonal(weights, 0)  # what an image tells itself cancels
  p = preprocessing.normalize(weights, norm='l1')
  f, hidden = members(known, count), known == UNLABELLED
  system = np.eye(np.sum(hidden)) - p[np.ix_(hidden, hidden)]
  f[hidden] = np.linalg.solve(system, p[hidden] @ f)
  return np.argmax(f, axis=1)


def label_spreading(
  embeddings, known, count: int, *, gamma: float = 20.0, alpha: float = 0.2
) -> np.ndarray:
  """Classes `[M]` by label spreading: F ← αSF + (1 − α)Y.

  Zhou, Bousquet, Lal, Weston, Schölkopf, 2004, in scikit-learn's form, S = D^−½
  W D^−½ of the weights W but for a diagonal of 0. The paper's own α is 0.99.

  Args:
    embeddings: `[M, D]`.
    known: `[M]` int32.
    count: C, which is not asked for here.
    gamma: γ of a pair's weight exp(−γ|v_i − v_j|²).
    alpha: α, the share that comes from neighbours.
  """
  del count
  method = semi_supervised.LabelSpreading(
    gamma=gamma,
    alpha=alpha,
    max_iter=1000,  # α = 0.2 ends after ten
  )
  return method.fit(unit(embeddings), known).transduction_


# Over a graph of nearest neighbours.


def metric_transfer(
  embeddings,
  known,
  count: int,
  *,
  nearest: int = 20,
  scale: float = 0.2,
  eigenvectors: int = 200,
) -> np.ndarray:
  """Classes `[M]` by the propagation of Deep Metric Transfer.

  A normalised cut for each class, biased to its labelled images: `biased_cut`,
  each of the same length, over pairs of weight exp((cos − 1)/scale).

  Inferred from the authors' code for CIFAR-10: that for ImageNet has k = 500,
  ten times what a class has here. Links of an image with itself are left out.

  Args:
    embeddings: `[M, D]`.
    known: `[M]` int32.
    count: C.
    nearest: k others that an image is linked with.
    scale: temperature of a pair's weight.
    eigenvectors: how many of the graph's enter.
  """
  weigh = lambda cosine: np.exp((cosine - 1) / scale)
  graph = affinity(unit(embeddings), nearest, weigh)
  return np.argmax(biased_cut(graph, known, count, eigenvectors), axis=1)


def deep_propagation(
  embeddings,
  known,
  count: int,
  *,
  nearest: int = 50,
  power: float = 3.0,
  alpha: float = 0.99,
  iterations: int = 20,
) -> np.ndarray:
  """Classes `[M]` by the propagation of Deep Label Propagation.

  A pair weighs max(0, cos)^γ, a class 1 over its labelled images.

  Args:
    embeddings: `[M, D]`.
    known: `[M]` int32.
    count: C.
    nearest: k others that an image is linked with.
    power: γ.
    alpha: α, the share that comes from neighbours.
    iterations: of conjugate gradients, at most; the authors' code has 20.
  """
  weigh = lambda cosine: np.maximum(0, cosine) ** power
  graph = affinity(unit(embeddings), nearest, weigh)
  start = members(known, count)
  z = diffuse(graph, start / start.sum(axis=0), alpha, iterations)
  return np.argmax(z, axis=1)


def affinity(v, nearest: int, weigh: Callable):
  """W = A + Aᵀ, sparse `[M, M]`: a_ij if j is of the nearest others of i.

  Args:
    v: `[M, D]`.
    nearest: k; all others where there are fewer.
    weigh: cosines `[E]` -> weights a `[E]`, not below 0.
  """
  nearest = min(nearest, len(v) - 1)
  graph = kneighbors_graph(v, nearest, mode='distance', metric='cosine')
  graph.data = weigh(1 - graph.data)
  return graph + graph.T


def diffuse(graph, start, alpha: float, iterations: int) -> np.ndarray:
  """Z `[M, C]` of (I − αS) Z = Y, S = D^−½ W D^−½, by conjugate gradients.

  Args:
    graph: W, sparse `[M, M]`.
    start: Y `[M, C]`.
    alpha: α.
    iterations: at most.
  """
  laplacian = csgraph.laplacian(graph, normed=True).tocsr()  # I − S
  system = (1 - alpha) * sparse.eye_array(len(start)) + alpha * laplacian
  solve = lambda y: cg(system, y, rtol=1e-6, maxiter=iterations)[0]
  return np.stack([solve(y) for y in start.T], axis=1)


def biased_cut(graph, known, count: int, eigenvectors: int) -> np.ndarray:
  """Columns x_c = Σ_i u_i u_i·s_c / λ_i of the same length, `[M, C]`.

  λ_i, u_i the least eigenvalues of I − D^−½ W D^−½ and their vectors: Maji,
  Vishnoi, Malik, 2011, with γ = 0. The least of all needs not be
  left out: `cut_bias` is orthogonal to its vector.

  Args:
    graph: W, sparse `[M, M]`.
    known: `[M]` int32.
    count: C.
    eigenvectors: how many; all where there are fewer.
  """
  laplacian, root = csgraph.laplacian(graph, normed=True, return_diag=True)
  last = min(eigenvectors, len(known)) - 1
  values, vectors = linalg.eigh(laplacian.toarray(), subset_by_index=[0, last])
  shares = vectors.T @ cut_bias(root, known, count)
  weights = 1 / np.maximum(values, LEAST_EIGENVALUE)
  return preprocessing.normalize(vectors @ (weights[:, None] * shares), axis=0)


def cut_bias(root, known, count: int) -> np.ndarray:
  """s_c = D^½ (1_c / vol(c) − 1_c̄ / vol(c̄)) of length 1, `[M, C]`.

  c and c̄ the images labelled with a class and with another, vol the sum of
  their degrees.

  Args:
    root: D^½ `[M]`.
    known: `[M]` int32.
    count: C.
  """
  inside = members(known, count)
  outside = (known != UNLABELLED)[:, None] - inside
  volume = lambda part: root**2 @ part
  bias = inside / volume(inside) - outside / volume(outside)
  return preprocessing.normalize(root[:, None] * bias, axis=0)


def members(known, count: int) -> np.ndarray:
  """1 where an image of `known [M]` is labelled with a class, `[M, C]`."""
  chex.assert_rank(known, 1)
  return (known[:, None] == np.arange(count)).astype(np.float64)


def unit(embeddings) -> np.ndarray:
  """Embeddings `[M, D]` brought to length 1, in float64; 0 stays 0."""
  chex.assert_rank(embeddings, 2)
  return preprocessing.normalize(np.asarray(embeddings, np.float64))
