"""The compiled parts of a job, and where its arrays lie."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from ssljax import batches, evaluate, parallel, sweep
from ssljax.core import Method, Stage, TrainState, enter, init_state, make_step
from ssljax.networks import conv
from ssljax.networks.network import Network
from ssljax.splits import Split


class Data(NamedTuple):
  """What all jobs of a run share; M test images, V held-out ones."""

  train: batches.Feed
  test: batches.Feed
  truth: np.ndarray  # [M] int32, of the test images
  validation_truth: np.ndarray  # [V] int32, of the rows in Split.validation
  preprocess: Any  # a `Preprocess`
  fitted: Any  # what it was fitted to
  augmentation: Callable | None


class Job(NamedTuple):
  """One method, its network, and the splits of the seeds it trains under."""

  name: str
  method: Method
  net: Network
  splits: Sequence[Split]


class Program:
  """The compiled parts of a job: made once, used for every seed."""

  def __init__(self, job: Job, data: Data, mesh, batch: int):
    """Nothing is compiled before it is first called.

    Args:
      job: what is trained.
      data: the feeds, which lie on the mesh.
      mesh: of `parallel.make_mesh`.
      batch: images per call of a sweep.
    """
    self.job, self.data = job, data
    self.batch = -(-batch // mesh.size) * mesh.size  # divides the devices
    self.seeds = len(job.splits)
    self.place = parallel.placer(mesh)
    self.sharding = parallel.state_sharding(mesh, job.method.layout)
    self.plain = batches.reader(data.train, data.preprocess, None)
    self.augmented = batches.reader(
      data.train, data.preprocess, data.augmentation
    )
    self.fitted = jax.tree.map(lambda x: self.place(x, None), data.fitted)
    self.orders = [
      [batches.Order(stage.draw, split, i) for split in job.splits]
      for i, stage in enumerate(job.method.stages)
    ]
    self._sweeps = {}

  def rows(self, stage: int, call: tuple[int, int]) -> np.ndarray:
    """Rows of a call: `[S, B]`, or `[K, S, B]` for K > 1 steps."""
    rows = np.stack(
      [
        [order.rows(step) for order in self.orders[stage]]
        for step in range(*call)
      ]
    )
    return rows if len(rows) > 1 else rows[0]

  def initial(self) -> TrainState:
    """The state before the first step."""
    method, net = self.job.method, self.job.net

    def one(seed, labels, source, rows):
      key = jax.random.key(seed)
      image = self.plain(source, rows, key)
      state = init_state(method, net, key, labels, image)
      return enter(method.stages[0], state)

    feed = self.data.train
    axis = None if feed.pixels_are_shared else 0
    mapped = parallel.over_seeds(one, self.seeds, (0, 0, (axis, None), 0))
    rows = self.rows(0, (0, 1))
    pixels, rows = next(iter(feed.batches(lambda _: rows, [0])))
    seeds = np.array([split.seed for split in self.job.splits], np.uint32)
    labels = np.stack([split.labels for split in self.job.splits])
    return jax.jit(mapped, out_shardings=self.sharding)(
      self.place(seeds, None),
      self.place(labels, None),
      (pixels, self.fitted),
      rows,
    )

  @functools.cached_property
  def steps(self) -> list[Callable]:
    """Per stage `(state, source, rows) -> state, metrics`, compiled."""
    return [self._compile(stage) for stage in self.job.method.stages]

  def _compile(self, stage: Stage) -> Callable:
    feed = self.data.train
    axis = None if feed.pixels_are_shared else 0
    step = parallel.over_seeds(
      make_step(stage, self.augmented), self.seeds, (0, (axis, None), 0)
    )

    def call(state, source, rows):
      if rows.ndim == 2:
        return step(state, source, rows)
      return jax.lax.scan(lambda s, r: step(s, source, r), state, rows)

    return jax.jit(
      call,
      donate_argnums=0,
      compiler_options=conv.compiler_options(),
      out_shardings=(self.sharding, None),
    )

  def enter(self, stage: int, state: TrainState) -> TrainState:
    """Makes the optimiser's state anew."""
    entered = functools.partial(enter, self.job.method.stages[stage])
    mapped = parallel.over_seeds(entered, self.seeds, (0,))
    return jax.jit(mapped, out_shardings=self.sharding)(state)

  def sweep(self, observe: Callable, feed: batches.Feed) -> Callable:
    """`rows -> observed`, compiled once per observe and feed."""
    if (observe, id(feed)) not in self._sweeps:
      read = batches.reader(feed, self.data.preprocess, None)
      self._sweeps[observe, id(feed)] = sweep.make_sweep(
        observe, feed, read, seeds=self.seeds, batch=self.batch
      )
    made = self._sweeps[observe, id(feed)]
    return lambda state, rows: made(state, self.fitted, rows)

  @functools.cached_property
  def _predict(self) -> Callable:
    """What is swept over images to evaluate."""
    return evaluate.predictor(self.job.net, self.job.method)

  def refresh(self, stage: Stage, state: TrainState) -> TrainState:
    """Sweeps the training images and redoes what the stage redoes."""
    feed = self.data.train
    observed = self.sweep(stage.observe, feed)(state, np.arange(feed.size))
    mapped = parallel.over_seeds(stage.refresh, self.seeds, (0, 0))
    return jax.jit(mapped, out_shardings=self.sharding)(state, observed)

  def evaluate(self, state: TrainState) -> dict[str, dict[str, list[float]]]:
    """Errors in percent: {'test': {'last': [S], ...}, 'validation': ...}."""
    data = self.data
    held_out = self.job.splits[0].validation
    todo = {'test': (data.test, np.arange(data.test.size), data.truth)}
    if len(held_out):
      todo['validation'] = (data.train, held_out, data.validation_truth)
    errors = {}
    for name, (feed, rows, truth) in todo.items():
      predicted = jax.device_get(self.sweep(self._predict, feed)(state, rows))
      errors[name] = {k: evaluate.error(p, truth) for k, p in predicted.items()}
    return errors
