"""Active learning during a run, for any method.

At the start of a round every image is passed T times through the network with
dropout, an acquisition function chooses Q images without a label, and the
oracle's answers are written into the label table. No shape changes, so nothing
is compiled again. If the method has just made such passes for its own update,
they are used again.
"""

from collections.abc import Callable, Sequence
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssljax.active import acquisition
from ssljax.core import (
  UNLABELLED,
  PerExample,
  Stage,
  TrainState,
  evaluated_weights,
)
from ssljax.data.splits import Split
from ssljax.distributed import multihost, placement
from ssljax.training.compiled import Program

_CHOICE = 0x61736B20  # folded into the random keys of acquisition functions


class Policy(NamedTuple):
  """Settings of the queries: their times, sizes and choice of images."""

  acquire: str  # name in `acquisition.ACQUISITIONS`
  every: int  # epochs between queries
  size: int  # Q, images of a query
  budget: int | None  # labels to acquire in total under one split
  passes: int  # T, passes with dropout


class ActiveLearning:
  """A policy, compiled for a program, and its oracle."""

  def __init__(
    self, policy: Policy, program: Program, oracle, among: np.ndarray
  ):
    """Prepare without compiling.

    Args:
      policy: when to query, and about what.
      program: program whose states choose the images.
      oracle: answers the queries, see `ssljax.active.oracle`.
      among: `[N]` bool, True for images that the oracle can label.
    """
    self.policy, self.every = policy, policy.every
    self._program, self._oracle, self._among = program, oracle, among
    feed = program.data.train
    self._score = program.map_dataset(self._per_example(), feed)
    self._rows = np.arange(feed.size)
    over_seeds = lambda f, count: placement.on_mesh(
      placement.over_seeds(f, program.seeds, (0,) * count), program.mesh
    )
    self._choose = jax.jit(
      over_seeds(self._choice, 3), out_shardings=program.whole
    )
    self._add_labels = jax.jit(
      over_seeds(program.method.add_labels, 3),
      donate_argnums=0,
      out_shardings=program.sharding,
    )

  def _per_example(self) -> PerExample:
    """Return the function that yields `Sampled`, and embeddings if needed."""
    net, method = self._program.net, self._program.method
    sample = acquisition.sampler(net, self.policy.passes)
    embeds = self.policy.acquire in acquisition.NEEDS_EMBEDDING

    def per_example(state, image, key):
      weights = method.weights(state)
      sampled = sample(*weights, image, key)
      return sampled, net.infer(*weights, image).embedding if embeds else None

    return per_example

  def can_use(self, stage: Stage) -> bool:
    """Return True if the outputs of a stage's `per_example` are those needed.

    They are of the trained weights, so the method must not average any.
    """
    method, policy = self._program.method, self.policy
    return (
      stage.sampled_passes == policy.passes
      and policy.acquire not in acquisition.NEEDS_EMBEDDING
      and method.averaging is None
      and method.weights is evaluated_weights
    )

  def _choice(self, state: TrainState, mapped, askable) -> jax.Array:
    """Choose rows `[Q]` of one seed; rows that are not askable come last."""
    sampled, embedding = mapped
    missing = len(state.labels) - len(askable)
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), _CHOICE)
    return acquisition.ACQUISITIONS[self.policy.acquire](
      sampled,
      embedding,
      state.labels,
      jnp.pad(askable, (0, missing)),
      self.policy.size,
      key,
    )

  def askable(self, split: Split, asked: Sequence[int]) -> np.ndarray:
    """Return `[N]` bool, True for images whose label may be queried.

    Args:
      split: split at the start of the run.
      asked: rows of earlier queries, whatever the answer was.
    """
    unknown = self._among & split.admitted & (split.labels == UNLABELLED)
    unknown[np.asarray(asked, int)] = False
    return unknown

  def choose(
    self,
    state: TrainState,
    splits: Sequence[Split],
    past: Sequence[dict],
    before: Callable | None = None,
    sampled: acquisition.Sampled | None = None,
  ) -> list[list[int]]:
    """Return the rows of a query, at most Q per seed.

    Args:
      state: state with a leading axis [S].
      splits: S splits at the start of the run.
      past: answers of all earlier queries, as returned by `query`.
      before: called before each batch of the pass over the data set; may raise.
      sampled: `[S, rows, ...]` of all images, to use instead of such a pass.
    """
    asked = [
      list(itertools.chain.from_iterable(p['rows'][i] for p in past))
      for i in range(len(splits))
    ]
    askable = np.stack(list(map(self.askable, splits, asked)))
    budget = self.policy.budget or len(self._rows)
    left = [min(self.policy.size, budget - len(rows)) for rows in asked]
    if not any(left) or not askable.any():
      return [[] for _ in splits]
    if sampled is None:
      mapped = self._score(state, self._rows, before=before)
    else:
      mapped = sampled, None
    chosen = jax.device_get(self._choose(state, mapped, askable))
    return [
      rows[may[rows]][:count].tolist()
      for rows, may, count in zip(chosen, askable, left, strict=True)
    ]

  def query(
    self,
    state: TrainState,
    splits: Sequence[Split],
    past: Sequence[dict],
    before: Callable | None = None,
    sampled: acquisition.Sampled | None = None,
  ) -> tuple[TrainState, dict | None]:
    """Query the oracle once.

    Args:
      state: state with a leading axis [S].
      splits: S splits at the start of the run.
      past: answers of all earlier queries, as returned by this function.
      before: as in `choose`.
      sampled: as in `choose`.

    Returns:
      The state with the answers, and {'rows': [S][Q], 'labels': [S][Q]}, or
      None if no image is left to query.
    """
    rows = self.choose(state, splits, past, before, sampled)
    if not any(rows):
      return state, None
    labels = multihost.on_main_process(
      lambda: [
        self._oracle.ask(split.seed, len(past), some).tolist() if some else []
        for split, some in zip(splits, rows, strict=True)
      ]
    )
    # Equally many for each seed: rows past the end of the table are dropped.
    padding = state.labels.shape[-1]
    padded = np.full([2, len(splits), self.policy.size], padding)
    for i, pair in enumerate(zip(rows, labels, strict=True)):
      padded[:, i, : len(rows[i])] = pair
    state = self._add_labels(state, *padded.astype(np.int32))
    return state, {'rows': rows, 'labels': labels}
