"""Choices that look at how images lie: density and clusters of embeddings.

  density_weighted   Settles, Craven, EMNLP 2008, section 3.4: a score times the
                     mean similarity to all unlabelled images
  typiclust          Hacohen, Dekel, Weinshall, ICML 2022, Algorithm 1: the most
                     typical image of each large cluster without a label; the
                     choice for a cold start

Letters: N images, D dimensions of an embedding, Q images to choose.
"""

import numpy as np

from ssljax.errors import positive

NEIGHBOURS = 20  # K of the typicality, as in TypiClust
MAX_CLUSTERS = 500  # likewise
_MANY = 50  # clusters from which on mini-batches are clustered, likewise
_SMALL = 5  # clusters with fewer images are used last, as in TypiClust
_BLOCK = 1024  # rows whose distances are computed at once


def normalised(embedding: np.ndarray) -> np.ndarray:
  """Return embeddings `[N, D]` of length 1."""
  length = np.linalg.norm(embedding, axis=1, keepdims=True)
  return embedding / np.maximum(length, 1e-12)


def density_weighted(
  score: np.ndarray, embedding: np.ndarray, askable: np.ndarray
) -> np.ndarray:
  """Return the score `[N]` times the mean cosine to all askable images.

  Similarities are (1 + cosine) / 2, in [0, 1].

  Args:
    score: `[N]`, at least 0.
    embedding: `[N, D]`.
    askable: `[N]` bool, images without a label.
  """
  unit = normalised(embedding)
  mean = unit[askable].mean(axis=0)  # the mean cosine is a product with it
  return score * (1 + unit @ mean) / 2


def typicality(embedding: np.ndarray, neighbours: int) -> np.ndarray:
  """Return 1 / (mean distance to the nearest other images) `[N]`.

  Args:
    embedding: `[N, D]`.
    neighbours: K; fewer if there are fewer other images.
  """
  count = len(embedding)
  nearest = min(neighbours, count - 1)
  if nearest < 1:
    return np.ones(count)
  square = (embedding**2).sum(axis=1)
  found = np.empty(count)
  for start in range(0, count, _BLOCK):
    part = slice(start, start + _BLOCK)
    distance = square[part, None] + square - 2 * embedding[part] @ embedding.T
    distance = np.sqrt(np.maximum(distance, 0))
    rows = np.arange(len(distance))
    distance[rows, start + rows] = np.inf  # not the image itself
    least = np.partition(distance, nearest - 1, axis=1)[:, :nearest]
    found[part] = 1 / np.maximum(least.mean(axis=1), 1e-12)
  return found


def typiclust(
  embedding: np.ndarray,
  labelled: np.ndarray,
  askable: np.ndarray,
  size: int,
  seed: int = 0,
) -> np.ndarray:
  """Choose the most typical images of large clusters without labels `[Q]`.

  Args:
    embedding: `[N, D]`.
    labelled: `[N]` bool.
    askable: `[N]` bool, at least `size` images.
    size: Q.
    seed: of the clusters.
  """
  from sklearn import cluster  # slow to import

  positive(size=size)
  unit = normalised(embedding)
  count = min(int(labelled.sum()) + size, MAX_CLUSTERS, len(unit))
  large = count > _MANY or len(unit) > 10_000
  kind = cluster.MiniBatchKMeans if large else cluster.KMeans
  member = kind(count, n_init=1, random_state=seed).fit_predict(unit)
  members = [np.flatnonzero(member == c) for c in range(count)]
  typical = np.zeros(len(unit))
  for rows in members:
    typical[rows] = typicality(unit[rows], NEIGHBOURS)
  covered = np.array([labelled[rows].sum() for rows in members])
  sizes = np.array([len(rows) for rows in members])
  left = askable.copy()
  chosen: list[int] = []
  while len(chosen) < size:
    open_ = np.array([left[rows].any() for rows in members])
    # The fewest labels first; of these tiny clusters last, the largest first.
    order = np.lexsort((-sizes, sizes < _SMALL, covered, ~open_))
    rows = members[order[0]]
    rows = rows[left[rows]]
    best = rows[np.argmax(typical[rows])]
    chosen.append(best)
    left[best] = False
    covered[order[0]] += 1
  return np.array(chosen)
