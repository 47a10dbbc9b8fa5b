"""The compiled parts of a job, and where its arrays lie."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from ssljax.augment import standard
from ssljax.core import (
  UNLABELLED,
  Method,
  Stage,
  TrainState,
  init_stage,
  init_state,
  make_step,
  no_update,
  rounded_up,
)
from ssljax.data import feeds
from ssljax.data.splits import Split
from ssljax.distributed import multihost, placement
from ssljax.networks.cpu import conv
from ssljax.networks.network import Network
from ssljax.training import evaluate, map_dataset


class Data(NamedTuple):
  """What all jobs of a run share; M test images, V held-out ones."""

  train: feeds.Feed
  test: feeds.Feed
  truth: np.ndarray  # [M] int32, of the test images
  validation_truth: np.ndarray  # [V] int32, of the rows in Split.validation
  preprocess: Any  # a `Preprocess`
  fitted: Any  # what it was fitted to
  augmentation: Callable | None
  on_pixels: Callable | None = None  # another, before the preprocessing


class Program:
  """The compiled parts of a method: made once, used for every seed."""

  def __init__(
    self,
    method: Method,
    net: Network,
    data: Data,
    mesh,
    *,
    seeds=1,
    batch=512,
    extra=0,
  ):
    """Nothing is compiled before it is first called.

    Args:
      method: what is trained.
      net: the network it trains.
      data: the feeds, which lie on the mesh.
      mesh: of `parallel.make_mesh`.
      seeds: S, how many are trained at once.
      batch: images per call of a sweep.
      extra: labels that may be acquired, under each split.
    """
    self.method, self.net, self.data, self.seeds = method, net, data, seeds
    self.mesh, self.extra = mesh, extra
    self.batch = rounded_up(batch, mesh.size)
    self.place = placement.Placer(mesh)
    self.sharding = placement.state_sharding(
      mesh, method.layout, data.train.size
    )
    self.whole = NamedSharding(mesh, P())  # on every device
    self.plain = feeds.reader(data.train, data.preprocess, None)
    self.fitted = jax.tree.map(lambda x: self.place(x, None), data.fitted)
    self._sweeps = {}
    self.called = set()  # steps that have been: the first call compiles

  def initial(self, splits: Sequence[Split], rows: np.ndarray) -> TrainState:
    """The state before the first step.

    Args:
      splits: S of them.
      rows: `[S, B]` of the first step, for data-dependent initialisation.
    """
    pixels, rows = next(iter(self.data.train.batches(lambda _: rows, [0])))
    seeds = np.array([split.seed for split in splits], np.uint32)
    labels = np.stack([split.labels for split in splits])
    return self._initial(len(splits[0].labelled))(  # as many in every split
      self.place(seeds, None),
      self.place(labels, None),
      (pixels, self.fitted),
      rows,
    )

  @functools.cache  # noqa: B019 (a program lasts as long as its process)
  def _initial(self, labelled: int) -> Callable:
    def one(seed, labels, source, rows):
      key = jax.random.key(seed)
      image = self.plain(source, rows, key)
      state = init_state(
        self.method,
        self.net,
        key,
        labels,
        image,
        labelled=labelled,
        multiple=placement.row_multiple(self.mesh),
        extra=self.extra,
      )
      return init_stage(self.method.stages[0], state)

    return self._compiled(one, (0, 0, (self._pixel_axis, None), 0))

  @property
  def _pixel_axis(self) -> int | None:
    return None if self.data.train.pixels_are_shared else 0

  def _compiled(self, f: Callable, in_axes: tuple, **options) -> Callable:
    """`f`, which returns a state, over the seeds."""
    mapped = placement.over_seeds(f, self.seeds, in_axes)
    mapped = placement.on_mesh(mapped, self.mesh)
    return jax.jit(mapped, out_shardings=self.sharding, **options)

  @functools.cached_property
  def steps(self) -> list[Callable]:
    """Per stage `(state, source, rows) -> state, metrics`, compiled."""
    made, steps = {}, []
    for stage in self.method.stages:  # those that step alike share one
      alike = stage.loss, stage.tx, stage.batch_spec, stage.augment
      if alike not in made:
        made[alike] = self._compile(stage)
      steps.append(made[alike])
    return steps

  def _compile(self, stage: Stage) -> Callable:
    data, augmentation = self.data, self.data.augmentation
    if stage.augment:
      both = filter(None, [augmentation, stage.augment])
      augmentation = standard.chain(*both)
    read = feeds.reader(
      data.train, data.preprocess, augmentation, data.on_pixels
    )
    step = placement.over_seeds(
      make_step(stage, placement.split_images(read)),
      self.seeds,
      (0, (self._pixel_axis, None), 0),
    )
    step = placement.on_mesh(step, self.mesh)

    def call(state, source, rows):
      if rows.ndim == 2:
        return step(state, source, rows)
      return jax.lax.scan(lambda s, r: step(s, source, r), state, rows)

    return jax.jit(
      call,
      donate_argnums=0,
      compiler_options=conv.compiler_options(),
      out_shardings=(self.sharding, self.whole),
    )

  @functools.cached_property
  def init_stage(self) -> list[Callable]:
    """Per stage `state -> state`, as `core.enter`."""
    return [self._init_stage(stage) for stage in self.method.stages]

  def _init_stage(self, stage: Stage) -> Callable:
    if stage.keep_optimizer:
      return lambda state: state
    init = jax.jit(
      placement.over_seeds(stage.tx.init, self.seeds, (0,)),
      out_shardings=self.sharding.opt_state,
    )
    # The rest stays where it is: a memory may be too large to be copied.
    return lambda state: state.replace(opt_state=init(state.params))

  def sweep(self, per_example: Callable, feed: feeds.Feed) -> Callable:
    """`(state, rows) -> observed`, compiled once per observe and feed."""
    if (per_example, id(feed)) not in self._sweeps:
      read = feeds.reader(feed, self.data.preprocess, None)
      self._sweeps[per_example, id(feed)] = map_dataset.make_sweep(
        per_example, feed, read, self.mesh, seeds=self.seeds, batch=self.batch
      )
    made = self._sweeps[per_example, id(feed)]
    return functools.partial(self._swept, made)

  def _swept(self, made: Callable, state, rows, **how):
    return made(state, self.fitted, rows, **how)

  @functools.cached_property
  def _predict(self) -> Callable:
    """What is swept over images to evaluate."""
    return evaluate.predictor(self.net, self.method)

  @functools.cached_property
  def epoch_update(self) -> list[Callable]:
    """Per stage `(state, before=None) -> state`: redoes what is due.

    It sweeps over all images, and calls `before` as `sweep.make_sweep` has it.
    """
    return [
      None if stage.epoch_update is no_update else self._epoch_update(stage)
      for stage in self.method.stages
    ]

  def _redo(self, stage: Stage) -> Callable:
    """`(state, observed) -> state`, compiled."""
    # The old memory's place is the new one's, even if it is not looked at.
    return self._compiled(
      stage.epoch_update, (0, 0), donate_argnums=0, keep_unused=True
    )

  def _epoch_update(self, stage: Stage) -> Callable:
    feed, redo = self.data.train, self._redo(stage)
    if stage.per_example is None:
      return lambda state, before=None: redo(state, None)
    per_example, rows = (
      self.sweep(stage.per_example, feed),
      np.arange(feed.size),
    )
    if stage.per_labelled_example is None:
      return lambda state, before=None: redo(
        state, per_example(state, rows, before=before)
      )
    per_labelled_example = self.sweep(stage.per_labelled_example, feed)

    def epoch_update(state, before=None):
      labels = multihost.fetch(state.labels)  # [S, N] and more
      known = np.flatnonzero((labels != UNLABELLED).any(axis=0))
      of_known = per_labelled_example(
        state, known, in_place=True, before=before
      )
      return redo(state, (per_example(state, rows, before=before), of_known))

    return epoch_update

  @functools.cached_property
  def multiplicity(self) -> list[Callable | None]:
    """Per stage `state -> [S, N and more]`, how often an epoch has each row."""
    over_seeds = lambda f: placement.over_seeds(f, self.seeds, (0,))
    split = self.sharding.labels
    return [
      s.multiplicity
      and jax.jit(over_seeds(s.multiplicity), out_shardings=split)
      for s in self.method.stages
    ]

  def evaluate(
    self, state: TrainState, held_out: np.ndarray
  ) -> dict[str, dict[str, list[float]]]:
    """Errors in percent: {'test': {'last': [S], ...}, 'validation': ...}.

    Args:
      state: with a leading axis [S].
      held_out: rows `[V]` of the training images to validate on, if any.
    """
    data = self.data
    todo = {}
    if data.test.size:
      todo['test'] = data.test, np.arange(data.test.size), data.truth
    if len(held_out):
      todo['validation'] = (data.train, held_out, data.validation_truth)
    errors = {}
    for name, (feed, rows, truth) in todo.items():
      predicted = multihost.fetch(self.sweep(self._predict, feed)(state, rows))
      errors[name] = {
        weights: evaluate.error(classes[:, : len(rows)], truth)
        for weights, classes in predicted.items()
      }
    return errors
