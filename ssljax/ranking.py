"""The images of a finished run to label next.

The models of all splits of a run are the votes that acquisition functions
compare (`active.acquisition`): a deep ensemble (Lakshminarayanan et al. 2017;
Beluch et al. 2018) instead of passes with dropout. Letters: N training images,
C classes, D dimensions of an embedding, S splits.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from ssljax import registry
from ssljax.active import acquisition, clusters
from ssljax.analysis import calibration
from ssljax.core import UNLABELLED
from ssljax.errors import positive, require
from ssljax.prediction import Predictor

DENSITY, TYPICLUST = 'density', 'typiclust'
_DISAGREEMENT = 'bald', 'variation_ratios', 'mean_std'  # need several votes
_BATCH = 1024  # images that are read at once
REASONS = {
  'random': 'drawn at random',
  'above_average': 'entropy above the mean of all images',
  'above_labelled': 'entropy above the mean of labelled images',
  'k_centre': 'furthest from labelled and earlier chosen images',
  DENSITY: 'uncertain, and similar to many unlabelled images',
  TYPICLUST: 'typical of a large group without labels',
}


def strategies() -> tuple[str, ...]:
  """Return the names of all strategies."""
  return (*registry.ACQUISITIONS, DENSITY, TYPICLUST)


class Ranked(NamedTuple):
  """Images to label, the first one first."""

  rows: np.ndarray  # [Q] int, of the training images
  names: list[str]  # [Q] file names, or row numbers
  predicted: list[str]  # [Q] class names
  confidence: np.ndarray  # [Q] calibrated probability of the class
  reason: str


class _Votes(NamedTuple):
  """Predictions of all training images by the models of a run."""

  p: np.ndarray  # [S, N, C]
  embedding: np.ndarray  # [N, D], of the first model


def check(strategy: str, count: int) -> None:
  """Raise `InputError` for an unknown strategy or no image."""
  registry.choose('strategy', strategy, dict.fromkeys(strategies()))
  positive(count=count)


def rank(
  predictor: Predictor, strategy: str, count: int, seed: int = 0
) -> Ranked:
  """Choose the training images to label next.

  Args:
    predictor: of the run.
    strategy: one of `strategies()`.
    count: Q, number of images.
    seed: of strategies that draw.

  Raises:
    InputError: the strategy needs several splits, or there are fewer images
      without a label.
  """
  check(strategy, count)
  train = predictor.dataset.train
  askable = ~predictor.labelled
  require(
    count <= askable.sum(),
    f'`count`={count}: {askable.sum()} training images have no label: give at '
    'most that',
  )
  several = len(predictor.models) > 1
  require(
    several or strategy not in _DISAGREEMENT,
    f'`strategy`={strategy}: compares the models of several splits, the run '
    'has one: train with `seeds`=5, or give another `strategy`',
  )
  votes = _votes(predictor)
  given = np.where(askable, UNLABELLED, train.labels)
  rows = _chosen(strategy, votes, given, askable, count, seed)
  mean = np.log(np.maximum(votes.p[:, rows].mean(axis=0), 1e-12))
  p = calibration.softmax(mean, predictor.temperature)
  names = train.names if train.names is not None else np.arange(len(askable))
  return Ranked(
    rows,
    [str(name) for name in names[rows]],
    [predictor.classes[c] for c in p.argmax(axis=-1)],
    p.max(axis=-1),
    REASONS.get(strategy, f'high {strategy.replace("_", " ")}'),
  )


def _votes(predictor: Predictor) -> _Votes:
  """Return probabilities and embeddings of all training images."""
  train = predictor.dataset.train
  shape, count = predictor.models[0].shape, len(train.labels)
  p: list[list[np.ndarray]] = [[] for _ in predictor.models]
  embedding = []
  for start in range(0, count, _BATCH):
    rows = np.arange(start, min(start + _BATCH, count))
    images = train.read(rows).reshape(-1, *shape)
    for k, model in enumerate(predictor.models):
      outputs = model.outputs(images)
      p[k].append(calibration.softmax(outputs[0]))
      if k == 0:
        embedding.append(outputs[1])
  stacked = np.stack([np.concatenate(parts) for parts in p])
  return _Votes(stacked, np.concatenate(embedding))


def sampled(p: np.ndarray) -> acquisition.Sampled:
  """Return the statistics of votes `[S, N, C]` that scores are made of."""
  votes = np.eye(p.shape[-1])[p.argmax(axis=-1)]
  entropies = np.asarray(acquisition.entropy_in_nats(p))
  means: list[Any] = [x.mean(axis=0) for x in (p, entropies, votes, p**2)]
  return acquisition.Sampled(*means)


def _chosen(
  strategy: str, votes: _Votes, labels, askable, count: int, seed: int
) -> np.ndarray:
  """Return the rows `[Q]` of a strategy."""
  embedding = votes.embedding.astype(np.float32)
  if strategy == TYPICLUST:
    labelled = labels != UNLABELLED
    return clusters.typiclust(embedding, labelled, askable, count, seed)
  statistics = sampled(votes.p)
  if strategy == DENSITY:
    score = np.asarray(acquisition.entropy(statistics))
    score = clusters.density_weighted(score, embedding, askable)
    score = np.where(askable, score, -np.inf)
    return np.argsort(-score, kind='stable')[:count]
  choose = registry.ACQUISITIONS[strategy]
  key = jax.random.key(seed)
  rows = choose(statistics, embedding, labels, askable, count, key)
  return np.asarray(rows)
