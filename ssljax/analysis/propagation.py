"""Label propagation on fixed embeddings, without training a network.

These are the methods of LLP's Table 5 (Zhuang, Ding, Murli, Yamins, 2019). Each
is a pure function of embeddings `[M, D]`, which it scales to length 1, of known
classes `[M]` int32, UNLABELLED for most images, and of C. It returns a class
for every image.

  LLP     local_propagation  labelled neighbours vote, divided by the density
  LP      label_propagation  Zhu, Ghahramani 2002: known classes are clamped
  LP_CMN  mass_normalized    LP and class mass normalization, same report
  LS      label_spreading    Zhou et al. 2004: (I − αS) F = (1 − α) Y
  LP_DMT  metric_transfer    Deep Metric Transfer (Liu et al. 2018,
                             arXiv:1812.08781): a biased normalised cut
  LP_DLP  deep_propagation   Deep Label Propagation (Iscen et al. 2019,
                             arXiv:1904.04717): LS over nearest neighbours

The paper gives the hyper-parameters of LLP only; the others are inferred. LP
and LS use scikit-learn's defaults, LP_DMT and LP_DLP the constants of their
authors' code. With scikit-learn's γ = 20, the weight of a pair of vectors of
length 1 is exp((cos − 1)/τ) with τ = 1/(2γ) = 0.025. For LP and LS we first
tried LLP's τ = 0.07, which is meant for a vote of ten neighbours, with the
α = 0.99 of LS's paper. The results on digits were poor (experiments/README.md):
in a sum over all pairs, the many distant pairs outweigh the near ones. A method
that asks for more neighbours than there are uses all.

With few labels among many images in many dimensions LP fails for a reason that
no γ removes: a random walk forgets its start before it meets a label, so that
all images have nearly the same scores. Their common part is the class's mass.
It is larger for classes whose labelled images have larger degrees (hubs), and
argmax gives most images to these classes. LP_CMN divides by the mass. On 2,000
images of CIFAR-10 (features of a MobileNetV2), 4 labels per class, the standard
deviation of a score over the images is 0.04, and the masses of the classes lie
between 47 and 662; the accuracy is 21 % for LP, 57 % for LP_CMN.

Letters: M images, D dimensions, C classes, E pairs, v embeddings of length 1.
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
from ssljax.analysis.embeddings import l2_normalize
from ssljax.core import UNLABELLED
from ssljax.data import splits
from ssljax.errors import require
from ssljax.methods import llp

# Lower limit for the divisors λ. The eigenvalue λ is 0 if the graph has several
# components; in DMT's code it is 0.02 for a connected graph.
MIN_EIGENVALUE = 1e-3
# Tolerance of the sum of an image's scores in label propagation, which is 1.
_EXACT = 1e-3


# Subsamples of a data set.


class Subsample(NamedTuple):
  """Images of some classes, a few of which are labelled."""

  rows: np.ndarray  # [M] rows of the data set
  truth: np.ndarray  # [M] int32 in 0..C-1
  known: np.ndarray  # [M] int32, UNLABELLED where the label is hidden


def draw_subsample(
  labels, classes: int, images: int, labelled: int, seed: int, number: int
) -> Subsample:
  """Draw classes at random, and equally many images of each.

  Args:
    labels: `[N]` int32; UNLABELLED rows are not drawn.
    classes: C, the number of classes to draw.
    images: number of images of each class.
    labelled: number of labelled images of each class. With the same seed and
      number, a larger subsample contains the smaller one with its labels.
    seed: of all subsamples.
    number: of this subsample.

  Raises:
    InputError: there are fewer classes or images.
  """
  names, counts = np.unique(labels[labels != UNLABELLED], return_counts=True)
  require(
    len(names) >= classes,
    f'`classes`={classes}: the embeddings are of {len(names)} classes: give '
    'at most that many',
  )
  rarest = int(np.argmin(counts))
  require(
    counts[rarest] >= images,
    f'`images`={images}: class {names[rarest]} has {counts[rarest]} images: '
    'give at most that many',
  )
  draws = functools.partial(splits.generator, seed, splits.SUBSAMPLE, number)
  chosen = np.sort(draws().permutation(names)[:classes])
  rows = [
    draws(1 + name).permutation(np.flatnonzero(labels == name))[:images]
    for name in chosen
  ]
  truth = np.repeat(np.arange(classes, dtype=np.int32), images)
  first = np.tile(np.arange(images) < labelled, classes)
  known = np.where(first, truth, UNLABELLED).astype(np.int32)
  return Subsample(np.concatenate(rows), truth, known)


# Local label propagation.


def local_propagation(
  embeddings,
  known,
  count: int,
  *,
  neighbours: int = 10,
  density_neighbours: int = 25,
  temperature: float = 0.07,
) -> np.ndarray:
  """Return classes `[M]` by LLP, Eq. 5–8.

  Args:
    embeddings: `[M, D]`.
    known: `[M]` int32.
    count: C.
    neighbours: K, the number of labelled neighbours that vote.
    density_neighbours: T, the number of neighbours that define the density at a
      labelled image.
    temperature: τ of the votes and of the density.
  """
  v = jnp.asarray(unit_rows(embeddings), jnp.float32)
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
  """Return classes `[M]` by a vote of labelled rows `[L, D]`, classes `[L]`."""
  density = neighbours.log_density(labelled, v, nearest, tau)
  return llp.propagate(v, labelled, classes, density, k, tau, count)[0]


# Propagation over all pairs.


def label_propagation(
  embeddings, known, count: int, *, gamma: float = 20.0
) -> np.ndarray:
  """Return classes `[M]` by label propagation, F_U = (I − P_UU)⁻¹ P_UL Y_L.

  Zhu, Ghahramani, 2002. This is the limit of their iteration F ← P F, in which
  labelled rows are reset after every step. P has the weights divided by their
  row sums; U and L are the unlabelled and the labelled images. scikit-learn's
  `LabelPropagation` iterates instead, which takes thousands of steps if the
  weight of an image with itself is much larger than with all others.

  Args:
    embeddings: `[M, D]`.
    known: `[M]` int32.
    count: C.
    gamma: γ in the weight exp(−γ|v_i − v_j|²) of a pair.

  Raises:
    InputError: γ is so large that images are cut off from all labelled ones.
  """
  return np.argmax(harmonic(embeddings, known, count, gamma), axis=1)


def mass_normalized(
  embeddings, known, count: int, *, gamma: float = 20.0
) -> np.ndarray:
  """Return classes `[M]` by label propagation and class mass normalization.

  Zhu, Ghahramani, 2002 (CMN): the scores F of a class on the unlabelled images
  are scaled so that their sum, its mass, is proportional to the class's share
  q_c of the labelled images: argmax_c q_c F_ic / Σ_j F_jc.

  Args:
    embeddings: `[M, D]`.
    known: `[M]` int32.
    count: C.
    gamma: as in `label_propagation`.

  Raises:
    InputError: as `label_propagation`.
  """
  f = harmonic(embeddings, known, count, gamma)
  return np.argmax(normalize_mass(f, known), axis=1)


def normalize_mass(f: np.ndarray, known: np.ndarray) -> np.ndarray:
  """Return scores `[M, C]` after class mass normalization.

  Args:
    f: F `[M, C]` of `harmonic`.
    known: `[M]` int32.
  """
  hidden = known == UNLABELLED
  mass = f[hidden].sum(axis=0)
  share = np.bincount(known[~hidden], minlength=f.shape[1])
  scale = np.where(share > 0, share / np.where(mass > 0, mass, 1), 0)
  return f * scale


def harmonic(embeddings, known, count: int, gamma: float) -> np.ndarray:
  """Return the scores F `[M, C]` of label propagation, rows that sum to 1.

  Args:
    embeddings: `[M, D]`.
    known: `[M]` int32.
    count: C.
    gamma: as in `label_propagation`.

  Raises:
    InputError: as `label_propagation`.
  """
  weights = pairwise.rbf_kernel(unit_rows(embeddings), gamma=gamma)
  np.fill_diagonal(weights, 0)  # the diagonal does not change the limit
  p = preprocessing.normalize(weights, norm='l1')
  f, hidden = one_hot(known, count), known == UNLABELLED
  system = np.eye(np.sum(hidden)) - p[np.ix_(hidden, hidden)]
  try:
    f[hidden] = np.linalg.solve(system, p[hidden] @ f)
    exact = bool(np.allclose(f.sum(axis=1), 1, atol=_EXACT))
  except np.linalg.LinAlgError:
    exact = False
  require(
    exact,
    f'`gamma`={gamma:g}: the weights that connect some images to labelled ones '
    'are lost in rounding; give a smaller one',
  )
  return f


def label_spreading(
  embeddings, known, count: int, *, gamma: float = 20.0, alpha: float = 0.2
) -> np.ndarray:
  """Return classes `[M]` by label spreading, F ← αSF + (1 − α)Y.

  Zhou, Bousquet, Lal, Weston, Schölkopf, 2004, as implemented by scikit-learn:
  S = D^−½ W D^−½ for weights W with a zero diagonal. The paper uses α = 0.99.

  Args:
    embeddings: `[M, D]`.
    known: `[M]` int32.
    count: C; unused, for the same signature as the other methods.
    gamma: γ in the weight exp(−γ|v_i − v_j|²) of a pair.
    alpha: α, the share of F that comes from neighbours.
  """
  del count
  method = semi_supervised.LabelSpreading(
    gamma=gamma,
    alpha=alpha,
    max_iter=1000,  # α = 0.2 converges after ten
  )
  return method.fit(unit_rows(embeddings), known).transduction_


# Propagation over a graph of nearest neighbours.


def metric_transfer(
  embeddings,
  known,
  count: int,
  *,
  nearest: int = 20,
  scale: float = 0.2,
  eigenvectors: int = 200,
) -> np.ndarray:
  """Return classes `[M]` by the propagation of Deep Metric Transfer.

  The score of a class is a normalised cut that is biased to its labelled images
  (`biased_cut`), scaled to the same length for every class. The weight of a
  pair is exp((cos − 1)/scale).

  [inferred] from the authors' code for CIFAR-10; their code for ImageNet has
  k = 500, which is ten times the images of a class here. An image has no edge
  to itself.

  Args:
    embeddings: `[M, D]`.
    known: `[M]` int32.
    count: C.
    nearest: k, the number of neighbours an image has an edge to.
    scale: temperature of the weight of a pair.
    eigenvectors: number of eigenvectors of the graph to use.
  """
  weight_of = lambda cosine: np.exp((cosine - 1) / scale)
  graph = affinity(unit_rows(embeddings), nearest, weight_of)
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
  """Return classes `[M]` by the propagation of Deep Label Propagation.

  The weight of a pair is max(0, cos)^γ. The weight of a labelled image is 1
  divided by the number of labelled images of its class.

  Args:
    embeddings: `[M, D]`.
    known: `[M]` int32.
    count: C.
    nearest: k, the number of neighbours an image has an edge to.
    power: γ.
    alpha: α, the share of a score that comes from neighbours.
    iterations: maximum number of conjugate gradient steps; 20 in the authors'
      code.
  """
  weight_of = lambda cosine: np.maximum(0, cosine) ** power
  graph = affinity(unit_rows(embeddings), nearest, weight_of)
  start = one_hot(known, count)
  z = diffuse(graph, start / start.sum(axis=0), alpha, iterations)
  return np.argmax(z, axis=1)


def affinity(v, nearest: int, weight_of: Callable):
  """Return W = A + Aᵀ, sparse `[M, M]`, for a graph of nearest neighbours.

  a_ij is the weight of the pair if j is one of the k nearest neighbours of i,
  else 0.

  Args:
    v: `[M, D]`.
    nearest: k; all other images if there are fewer.
    weight_of: maps cosines `[E]` to weights `[E]`, which are not negative.
  """
  nearest = min(nearest, len(v) - 1)
  graph = kneighbors_graph(v, nearest, mode='distance', metric='cosine')
  graph.data = weight_of(1 - graph.data)
  return graph + graph.T


def diffuse(graph, start, alpha: float, iterations: int) -> np.ndarray:
  """Solve (I − αS) Z = Y, S = D^−½ W D^−½, by conjugate gradients.

  Args:
    graph: W, sparse `[M, M]`.
    start: Y `[M, C]`.
    alpha: α.
    iterations: maximum number of steps.

  Returns:
    Z `[M, C]`.
  """
  laplacian = csgraph.laplacian(graph, normed=True).tocsr()  # I − S
  system = (1 - alpha) * sparse.eye_array(len(start)) + alpha * laplacian
  solve = lambda y: cg(system, y, rtol=1e-6, maxiter=iterations)[0]
  return np.stack([solve(y) for y in start.T], axis=1)


def biased_cut(graph, known, count: int, eigenvectors: int) -> np.ndarray:
  """Return columns x_c = Σ_i u_i u_i·s_c / λ_i `[M, C]`, scaled to length 1.

  λ_i are the smallest eigenvalues of I − D^−½ W D^−½ and u_i their
  eigenvectors: Maji, Vishnoi, Malik, 2011, with γ = 0. The smallest eigenvalue
  is included, because s_c of `cut_bias` is orthogonal to its eigenvector.

  Args:
    graph: W, sparse `[M, M]`.
    known: `[M]` int32.
    count: C.
    eigenvectors: number of eigenvectors; all if there are fewer.
  """
  laplacian, root = csgraph.laplacian(graph, normed=True, return_diag=True)
  last = min(eigenvectors, len(known)) - 1
  values, vectors = linalg.eigh(laplacian.toarray(), subset_by_index=[0, last])
  shares = vectors.T @ cut_bias(root, known, count)
  weights = 1 / np.maximum(values, MIN_EIGENVALUE)
  return preprocessing.normalize(vectors @ (weights[:, None] * shares), axis=0)


def cut_bias(root, known, count: int) -> np.ndarray:
  """Return s_c = D^½ (1_c / vol(c) − 1_c̄ / vol(c̄)) `[M, C]`, of length 1.

  c are the images labelled with the class, c̄ those labelled with another class,
  and vol is the sum of their degrees.

  Args:
    root: D^½ `[M]`.
    known: `[M]` int32.
    count: C.
  """
  inside = one_hot(known, count)
  outside = (known != UNLABELLED)[:, None] - inside
  volume = lambda part: root**2 @ part
  bias = inside / volume(inside) - outside / volume(outside)
  return preprocessing.normalize(root[:, None] * bias, axis=0)


def one_hot(known, count: int) -> np.ndarray:
  """Return one-hot rows `[M, C]` of `known [M]`; zeros for UNLABELLED."""
  chex.assert_rank(known, 1)
  return (known[:, None] == np.arange(count)).astype(np.float64)


def unit_rows(embeddings) -> np.ndarray:
  """Scale embeddings `[M, D]` to length 1 in float64; zero rows stay zero."""
  chex.assert_rank(embeddings, 2)
  return l2_normalize(np.asarray(embeddings, np.float64))
