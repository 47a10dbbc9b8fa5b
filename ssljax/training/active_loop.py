"""Asking an oracle for labels in the middle of a run, whatever is trained.

As a round of a run begins, every image is looked at by T passes with dropout,
an acquisition function chooses Q of those whose label is not known, and what
the oracle answers goes into the label table. Shapes stay as they are: nothing
is compiled again.
"""

from collections.abc import Callable, Sequence
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssljax.active import acquisition
from ssljax.core import UNLABELLED, TrainState
from ssljax.data.splits import Split
from ssljax.distributed import multihost, placement
from ssljax.training.compiled import Program

_CHOICE = 0x61736B20  # 'ask ', in the keys of what is chosen at random


class Policy(NamedTuple):
  """How often, for how many and for which labels is asked."""

  acquire: str  # of `acquisition.ACQUISITIONS`
  every: int  # epochs
  size: int  # Q
  budget: int | None  # labels asked for in all, under one split
  passes: int  # T


class Asking:
  """A policy, compiled for a program, and whom it asks."""

  def __init__(
    self, policy: Policy, program: Program, oracle, among: np.ndarray
  ):
    """Nothing is compiled before it is first called.

    Args:
      policy: how it is asked.
      program: whose states choose.
      oracle: that is asked, see `ssljax.oracle`.
      among: `[N]` bool, the rows that it can answer for.
    """
    self.policy, self.every = policy, policy.every
    self._program, self._oracle, self._among = program, oracle, among
    feed = program.data.train
    self._observe = program.sweep(self._observer(), feed)
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

  def _observer(self) -> Callable:
    """What is swept over the images: `Sampled`, and embeddings if needed."""
    net, method = self._program.net, self._program.method
    sample = acquisition.sampler(net, self.policy.passes)
    embeds = self.policy.acquire in acquisition.NEEDS_EMBEDDING

    def per_example(state, image, key):
      weights = method.weights(state)
      sampled = sample(*weights, image, key)
      return sampled, net.infer(*weights, image).embedding if embeds else None

    return per_example

  def _choice(self, state: TrainState, observed, askable) -> jax.Array:
    """Rows `[Q]` of one seed; those that may not be asked for come last."""
    sampled, embedding = observed
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
    """Rows `[N]` bool of a split that may be asked about.

    Args:
      split: as the run began.
      asked: rows that have been, whatever the answer was.
    """
    unknown = self._among & split.admitted & (split.labels == UNLABELLED)
    unknown[np.asarray(asked, int)] = False
    return unknown

  def rows(
    self, state: TrainState, splits: Sequence[Split], past, before=None
  ) -> list:
    """Rows `[at most Q]` to ask about, per seed.

    Args:
      state: with a leading axis [S].
      splits: S of them, as the run began.
      past: what `ask` returned, each time.
      before: is called before each batch of the sweep, and may end it.
    """
    asked = [
      list(itertools.chain.from_iterable(p['rows'][i] for p in past))
      for i in range(len(splits))
    ]
    askable = np.stack(list(map(self.askable, splits, asked)))
    budget = self.policy.budget or len(self._rows)
    left = [min(self.policy.size, budget - len(some)) for some in asked]
    if not any(left) or not askable.any():
      return [[] for _ in splits]
    observed = self._observe(state, self._rows, before=before)
    chosen = jax.device_get(self._choose(state, observed, askable))
    return [
      rows[may[rows]][:count].tolist()
      for rows, may, count in zip(chosen, askable, left, strict=True)
    ]

  def ask(self, state: TrainState, splits: Sequence[Split], past, before=None):
    """Asks once.

    Args:
      state: with a leading axis [S].
      splits: S of them, as the run began.
      past: what this returned, each time.
      before: as of `rows`.

    Returns:
      The state with the answers, and {'rows': [S][Q], 'labels': [S][Q]}, or
      None if nothing is left to be asked.
    """
    rows = self.rows(state, splits, past, before)
    if not any(rows):
      return state, None
    labels = multihost.on_main_process(
      lambda: [
        self._oracle.ask(split.seed, len(past), some).tolist() if some else []
        for split, some in zip(splits, rows, strict=True)
      ]
    )
    # As many of each seed: rows behind the table's last are no one's.
    no_one = state.labels.shape[-1]
    padded = np.full([2, len(splits), self.policy.size], no_one)
    for i, pair in enumerate(zip(rows, labels, strict=True)):
      padded[:, i, : len(rows[i])] = pair
    state = self._add_labels(state, *padded.astype(np.int32))
    return state, {'rows': rows, 'labels': labels}
