"""Measurements of a finished run's embeddings, apart from its classifier.

`measure` reports the error of the nearest training image's label (Table 6 of
LLP; of an LLP run also of the nearest image in its bank, which is what the
paper measures), the classifier's error, and how closely the images of a class
lie together (LLP, Figure 2b-d). `evaluate_readout` reports the error of a
softmax layer on frozen features (LLP, Table 4).

LLP is Zhuang, Ding, Murli, Yamins, "Local Label Propagation for Large-Scale
Semi-Supervised Learning", 2019. A finished run is a `runs.load.Finished`.

Letters: K training images with known class, M test images, C classes, D numbers
of an embedding, F of a feature.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from ssljax import optimizers
from ssljax.analysis import embeddings
from ssljax.core import UNLABELLED, TrainState
from ssljax.data import datasets, feeds
from ssljax.errors import positive
from ssljax.methods import llp

TOP = 5  # k of the top-k error, reported if there are more classes


class Embedded(NamedTuple):
  """Embeddings of training and test images under the evaluated weights."""

  rows: np.ndarray  # [K] rows of the training images
  train: np.ndarray  # [K, D], each of length 1
  train_labels: np.ndarray  # [K] true labels
  labelled: np.ndarray  # [K] bool, the run knew the label at this step
  test: np.ndarray  # [M, D], each of length 1
  test_labels: np.ndarray  # [M] true labels


class Bank(NamedTuple):
  """Running averages of the embeddings of J training images, from a memory."""

  rows: np.ndarray  # [J, D], each of length 1
  labels: np.ndarray  # [J] true labels


class Readout(NamedTuple):
  """A data set to fit a readout on, with feeds of its images."""

  dataset: datasets.Dataset
  train: feeds.Feed
  test: feeds.Feed


def embed(finished, state: TrainState) -> tuple[Embedded, np.ndarray]:
  """Embed the images of a run.

  Args:
    finished: the finished run.
    state: a state of the run, as from `finished.state`.

  Returns:
    The embeddings, and the logits `[M, C]` of the test images.
  """
  dataset, data = finished.dataset, finished.program.data
  rows = finished.known_rows
  outputs = finished.infer(state, data.test, np.arange(data.test.size))
  embedded = Embedded(
    rows=rows,
    train=finished.embed(state, data.train, rows),
    train_labels=dataset.train.labels[rows],
    labelled=np.asarray(state.labels)[0, rows] != UNLABELLED,
    test=embeddings.l2_normalize(outputs.embedding),
    test_labels=dataset.test.labels,
  )
  return embedded, outputs.logits


def bank_of(finished, state: TrainState) -> Bank | None:
  """Return the bank of an LLP run, without images of unknown class.

  Args:
    finished: the finished run.
    state: as in `embed`.

  Returns:
    The bank, or None for another method.
  """
  if not isinstance(state.memory, llp.Bank):
    return None
  memory = jax.tree.map(lambda x: x[0], state.memory)  # of the only seed
  found = llp.averaged_embeddings(memory, state.images)
  numbers, rows = map(np.asarray, jax.device_get(found))
  labels = finished.dataset.train.labels[numbers]
  known = labels != UNLABELLED
  return Bank(rows[known], labels[known])


def softmax_errors(logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
  """Return the top-1 error in percent, and the top-5 error if C > 5.

  Args:
    logits: `[M, C]`.
    truth: `[M]` true labels.
  """
  errors = {'softmax': embeddings.top_error(logits, truth, 1)}
  if logits.shape[1] > TOP:
    errors[f'softmax_top{TOP}'] = embeddings.top_error(logits, truth, TOP)
  return errors


def measure(
  embedded: Embedded,
  logits: np.ndarray,
  classes: Sequence[str],
  bank: Bank | None = None,
) -> dict[str, Any]:
  """Return the errors and the aggregation of embeddings.

  Args:
    embedded: the embeddings.
    logits: `[M, C]` of the test images.
    classes: `[C]` names.
    bank: of an LLP run.

  Returns:
    Counts of images; `test_error` in percent: of the nearest training image,
    with all true labels known (`nearest`) or with the run's labels alone
    (`nearest_labelled`), of the nearest row of the bank with all true labels
    (`nearest_in_bank`), and of the classifier; and `aggregation`, the mean
    norm of the classes' mean embeddings, with its values by class.
  """
  known, in_bank = embedded.labelled, {}
  if bank is not None:
    in_bank['nearest_in_bank'] = embeddings.nearest_error(
      embedded.test, embedded.test_labels, bank.rows, bank.labels
    )
  norms = embeddings.class_norms(
    embedded.train, embedded.train_labels, len(classes)
  )
  return {
    'train_images': len(embedded.train),
    'labelled_images': int(known.sum()),
    'test_images': len(embedded.test),
    'embedding': embedded.train.shape[1],
    'test_error': {
      'nearest': _nearest_error(embedded, np.ones_like(known)),
      'nearest_labelled': _nearest_error(embedded, known),
      **in_bank,
      **softmax_errors(logits, embedded.test_labels),
    },
    'aggregation': float(np.nanmean(norms)),
    'aggregation_by_class': {
      name: float(norm)
      for name, norm in zip(classes, norms, strict=True)
      if not math.isnan(norm)
    },
  }


def _nearest_error(embedded: Embedded, chosen: np.ndarray) -> float:
  """Return the error in percent of the nearest of the `chosen [K]` images."""
  return embeddings.nearest_error(
    embedded.test,
    embedded.test_labels,
    embedded.train[chosen],
    embedded.train_labels[chosen],
  )


# The readout.


def evaluate_readout(
  finished,
  state: TrainState,
  *,
  on: Readout | None = None,
  steps: int = 500_000,
  rate: float = 0.01,
) -> dict[str, Any]:
  """Fit a softmax layer to frozen features and return its test errors.

  The layer learns from all true labels of the training images. Their features
  are computed once, without augmentation, and stay in the host's memory: 4 N F
  bytes, which is 20 GB for the 2.45 million images of Places205 and F = 2,048.
  This departs from training the layer on top of the network, where every epoch
  may have new random crops.

  Args:
    finished: the finished run.
    state: a state of the run.
    on: another data set with images of the same shape; the run's own if None.
    steps: steps of 128 images.
    rate: learning rate at the first step, see `readout_optimizer`.

  Returns:
    Counts, settings and `test_error` in percent.
  """
  positive(steps=steps, rate=rate)
  data = finished.program.data
  on = on or Readout(finished.dataset, data.train, data.test)
  labels, classes = on.dataset.train.labels, len(on.dataset.classes)
  if on.dataset is finished.dataset:
    rows = finished.known_rows
  else:
    rows = np.flatnonzero(labels != UNLABELLED)
  train = finished.features(state, on.train, rows)
  test = finished.features(state, on.test, np.arange(on.test.size))
  tx = readout_optimizer(steps, rate)
  layer = embeddings.fit_readout(
    train, labels[rows], classes, tx, steps, seed=finished.split.seed
  )
  logits = np.asarray(embeddings.apply_readout(layer, test))
  return {
    'dataset': on.dataset.name,
    'train_images': len(rows),
    'test_images': len(test),
    'feature': train.shape[1],
    'steps': steps,
    'rate': rate,
    'test_error': softmax_errors(logits, on.dataset.test.labels),
  }


def readout_optimizer(steps: int, rate: float):
  """Return the optimiser of the readout: LLP's on Places205.

  LLP divides the learning rate by ten twice, whenever the validation error
  stalls. Here it falls after a half and after three quarters of the steps.
  """
  return optimizers.optimizer(
    steps,
    learning_rate=rate,
    decay='steps',
    decay_at=(max(1, steps // 2), max(1, steps * 3 // 4)),
    nesterov=False,
    weight_decay=1e-4,
    clip=0.0,
  )
