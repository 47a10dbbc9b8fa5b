"""What embeddings and features are worth, apart from the classifier.

Zhuang, Ding, Murli, Yamins, 2019 (LLP): the nearest neighbour's label (Table
6), a linear readout of frozen features (Table 4), and how closely the images of
a class lie together (Fig. 2b–d). All of it is for any method's network.

Letters: N training images, M test images, C classes, D embedding, F feature.
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

_READOUT = 60  # a random stream above those of `splits` and `batches`
STEPS_PER_CALL = 50  # of a readout, whose features wait on the host


def unit(vectors: np.ndarray) -> np.ndarray:
  """Vectors `[B, D]` of length 1; of one that is 0, 0."""
  lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
  return vectors / np.maximum(lengths, np.finfo(vectors.dtype).tiny)


def top_error(scores: np.ndarray, truth: np.ndarray, k: int) -> float:
  """Images in percent whose class is not among the k with the best scores.

  Args:
    scores: `[M, C]`.
    truth: `[M]`.
    k: at most C.
  """
  best = np.argsort(-scores, axis=1, kind='stable')[:, :k]
  return 100 * float((best != truth[:, None]).all(axis=1).mean())


# Nearest neighbours.


@jax.jit
def _nearest(queries, bank):
  """The row `[B]` of `bank [N, D]` with the largest product with each query."""
  # Of many images two are as near to the third digit: no TF32, no bfloat16.
  with jax.default_matmul_precision('float32'):
    return neighbours.nearest(queries, bank, 1)[1][:, 0]


def nearest_rows(
  queries: np.ndarray, bank: np.ndarray, batch: int = 512
) -> np.ndarray:
  """The row `[M]` of a bank with the largest product with each query.

  Args:
    queries: `[M, D]`.
    bank: `[N, D]`.
    batch: queries at a time.
  """
  bank, count = jnp.asarray(bank), len(queries)
  places = np.resize(np.arange(count), -(-count // batch) * batch)
  found = [_nearest(queries[p], bank) for p in places.reshape(-1, batch)]
  return np.concatenate(jax.device_get(found))[:count]


def nearest_error(v, truth, bank, labels) -> float:
  """Error in percent of taking the label of the nearest row of a bank.

  Args:
    v: `[M, D]` of length 1.
    truth: `[M]` their classes.
    bank: `[N, D]` of length 1.
    labels: `[N]`.
  """
  return evaluate.error(labels[nearest_rows(v, bank)][None], truth)[0]


# Aggregation.


def class_norms(v: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
  """Norms `[C]` of the mean embedding of each class: LLP, section 5.

  1 where all images of a class have the same embedding; nan where there are
  none.

  Args:
    v: `[N, D]` of length 1.
    labels: `[N]`.
    classes: C.
  """
  sums = np.zeros((classes, v.shape[1]))
  np.add.at(sums, labels, v)
  counts = np.bincount(labels, minlength=classes).astype(float)
  counts[counts == 0] = np.nan
  return np.linalg.norm(sums, axis=1) / counts


# A linear readout.


def shuffled(count: int, batch: int, seed: int) -> Iterator[np.ndarray]:
  """Rows `[batch]` without end: shuffle after shuffle, the rest left out."""
  draws = generator(seed, _READOUT)
  while True:
    order = draws.permutation(count)
    yield from order[: count - count % batch].reshape(-1, batch)


def read_out(layer, features) -> jax.Array:
  """Logits `[B, C]` of a layer for features `[B, F]`."""
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
  """A softmax layer on frozen features: {'kernel': [F, C], 'bias': [C]}.

  It starts at 0: the loss is convex.

  Args:
    features: `[N, F]`, which stay on the host.
    labels: `[N]` int32.
    classes: C.
    tx: descends the mean cross-entropy of a step.
    steps: how many.
    batch: images per step, or all of them where there are fewer.
    seed: of the order.
  """

  def loss(layer, features, labels):
    return jnp.mean(losses.cross_entropy(read_out(layer, features), labels))

  def step(carry, some):
    layer, opt_state = carry
    slopes = jax.grad(loss)(layer, *some)
    updates, opt_state = tx.update(slopes, opt_state, layer)
    return (optax.apply_updates(layer, updates), opt_state), None

  descend = jax.jit(lambda carry, some: jax.lax.scan(step, carry, some)[0])
  zeros = lambda *shape: jnp.zeros(shape, features.dtype)
  layer = {'kernel': zeros(features.shape[1], classes), 'bias': zeros(classes)}
  carry = layer, tx.init(layer)
  rows = shuffled(len(labels), min(batch, len(labels)), seed)
  with metrics_writer.progress_bar('readout', 0, steps) as bar:
    for done in range(0, steps, STEPS_PER_CALL):
      span = min(STEPS_PER_CALL, steps - done)
      some = np.stack(list(itertools.islice(rows, span)))
      carry = descend(carry, (features[some], labels[some]))
      bar.update(span)
  return jax.device_get(carry[0])
