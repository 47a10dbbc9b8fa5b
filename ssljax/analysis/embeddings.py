"""Quality of embeddings and features, independent of the classifier.

The measures are those of LLP (Zhuang, Ding, Murli, Yamins, 2019) and apply to
the network of any method: the error of the nearest neighbour's label (Table 6),
of a linear readout of frozen features (Table 4), and how closely the images of
a class lie together (Fig. 2b–d).

Letters: N training images, M test images, C classes, D dimensions of an
embedding, F of a feature.
"""

from collections.abc import Iterator
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssljax import losses, neighbours
from ssljax.data.splits import generator
from ssljax.training import evaluate, metrics_writer

# Random stream of the readout, different from those of `splits` and `sampling`.
_READOUT = 60
STEPS_PER_CALL = 50  # steps of a readout per transfer of features from the host


def l2_normalize(vectors: np.ndarray) -> np.ndarray:
  """Scale vectors `[B, D]` to length 1; zero vectors stay zero."""
  lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
  return vectors / np.maximum(lengths, np.finfo(vectors.dtype).tiny)


def top_error(scores: np.ndarray, truth: np.ndarray, k: int) -> float:
  """Return the percentage of images whose class is not in the top k.

  Args:
    scores: `[M, C]`.
    truth: `[M]` the classes.
    k: number of classes with the best scores, at most C.
  """
  best = np.argsort(-scores, axis=1, kind='stable')[:, :k]
  return 100 * float((best != truth[:, None]).all(axis=1).mean())


# Nearest neighbours.


@jax.jit
def _nearest(queries, bank):
  """Return the row `[B]` of `bank [N, D]` with the largest dot product."""
  # Among many images, some distances differ only in the fourth digit, so TF32
  # and bfloat16 are not precise enough.
  with jax.default_matmul_precision('float32'):
    return neighbours.nearest(queries, bank, 1)[1][:, 0]


def nearest_rows(
  queries: np.ndarray, bank: np.ndarray, batch: int = 512
) -> np.ndarray:
  """Return for each query the row `[M]` of a bank with the largest product.

  Args:
    queries: `[M, D]`.
    bank: `[N, D]`.
    batch: number of queries at a time.
  """
  placed, count = jnp.asarray(bank), len(queries)
  index = np.resize(np.arange(count), -(-count // batch) * batch)
  found = [_nearest(queries[i], placed) for i in index.reshape(-1, batch)]
  return np.concatenate(jax.device_get(found))[:count]


def nearest_error(v, truth, bank, labels) -> float:
  """Return the error in percent of the nearest neighbour's label.

  Args:
    v: `[M, D]` embeddings of length 1.
    truth: `[M]` their classes.
    bank: `[N, D]` embeddings of length 1.
    labels: `[N]` their classes.
  """
  return evaluate.error(labels[nearest_rows(v, bank)][None], truth)[0]


# Aggregation.


def class_norms(v: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
  """Return the norm `[C]` of the mean embedding of each class: LLP, section 5.

  The norm is 1 if all images of a class have the same embedding, and nan for a
  class without images.

  Args:
    v: `[N, D]` embeddings of length 1.
    labels: `[N]` their classes.
    classes: C.
  """
  sums = np.zeros((classes, v.shape[1]))
  np.add.at(sums, labels, v)
  counts = np.bincount(labels, minlength=classes).astype(float)
  counts[counts == 0] = np.nan
  return np.linalg.norm(sums, axis=1) / counts


# A linear readout.


def shuffled_batches(count: int, batch: int, seed: int) -> Iterator[np.ndarray]:
  """Yield rows `[batch]` of one shuffle after another, forever.

  The rows of a shuffle that do not fill a batch are dropped.
  """
  draws = generator(seed, _READOUT)
  while True:
    order = draws.permutation(count)
    yield from order[: count - count % batch].reshape(-1, batch)


def apply_readout(layer, features) -> jax.Array:
  """Return the logits `[B, C]` of a linear layer for features `[B, F]`."""
  chex.assert_rank(features, 2)
  return jnp.matmul(features, layer['kernel']) + layer['bias'][None]


def fit_readout(
  features: np.ndarray,
  labels: np.ndarray,
  classes: int,
  tx: optax.GradientTransformation,
  steps: int,
  *,
  batch: int = 128,
  seed: int = 0,
) -> dict[str, jax.Array]:
  """Train a linear softmax classifier on frozen features.

  All weights start at 0, because the loss is convex.

  Args:
    features: `[N, F]`; they stay on the host.
    labels: `[N]` int32.
    classes: C.
    tx: optimiser of the mean cross-entropy.
    steps: number of updates.
    batch: images per step; all images if there are fewer.
    seed: of the order of the images.

  Returns:
    {'kernel': `[F, C]`, 'bias': `[C]`}.
  """

  def loss(layer, features, labels):
    logits = apply_readout(layer, features)
    return jnp.mean(losses.cross_entropy(logits, labels))

  def step(carry, batch):
    layer, opt_state = carry
    gradients = jax.grad(loss)(layer, *batch)
    updates, opt_state = tx.update(gradients, opt_state, layer)
    return (optax.apply_updates(layer, updates), opt_state), None

  train = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches)[0])
  zeros = lambda *shape: jnp.zeros(shape, features.dtype)
  layer = {'kernel': zeros(features.shape[1], classes), 'bias': zeros(classes)}
  carry = layer, tx.init(layer)
  batches = shuffled_batches(len(labels), min(batch, len(labels)), seed)
  with metrics_writer.progress_bar('readout', 0, steps) as bar:
    for done in range(0, steps, STEPS_PER_CALL):
      span = min(STEPS_PER_CALL, steps - done)
      rows = np.stack(list(itertools.islice(batches, span)))
      carry = train(carry, (features[rows], labels[rows]))
      bar.update(span)
  return jax.device_get(carry[0])
