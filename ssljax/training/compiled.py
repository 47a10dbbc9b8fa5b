"""The compiled functions of a method, and the placement of its arrays."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from ssljax.augment import standard
from ssljax.core import (
  DEFAULT_VIEW,
  UNLABELLED,
  Augment,
  Method,
  PerExample,
  Quality,
  Read,
  Stage,
  TrainState,
  UsedLabels,
  View,
  all_views,
  init_optimizer,
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
from ssljax.training import evaluate, quality
from ssljax.training import map_dataset as map_dataset_lib


class Data(NamedTuple):
  """Data that all jobs of a run share; N training images, M test images."""

  train: feeds.Feed
  test: feeds.Feed
  truth: np.ndarray  # [M] int32 labels of the test images
  # [N] int32 labels of the training images, UNLABELLED if unknown. Read by the
  # host at evaluations alone.
  train_truth: np.ndarray
  preprocess: Any  # a `Preprocess`
  fitted: Any  # its constants, fitted to training images
  augmentation: Augment | None  # the run's own, after preprocessing
  on_pixels: Augment | None = None  # the run's own, before preprocessing
  # By seed, instead of `fitted`, if the seeds see different training images.
  fitted_by_seed: Mapping[int, Any] | None = None
  classes: int = 0  # C


class Program:
  """The compiled functions of a method, shared by all seeds.

  Functions compile at their first call. Arrays of a state have a leading axis
  [S] of the seeds that are trained at once.
  """

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
    """Prepare a method without compiling it.

    Args:
      method: the method to train.
      net: its network.
      data: feeds on the mesh, and augmentation.
      mesh: mesh of `placement.make_mesh`.
      seeds: S, the number of seeds that are trained at once.
      batch: images per call in passes over a data set.
      extra: upper bound on the labels acquired under each split.
    """
    self.method, self.net, self.data, self.seeds = method, net, data, seeds
    self.mesh, self.extra = mesh, extra
    self.batch = rounded_up(batch, mesh.size)
    self.place = placement.Placer(mesh)
    self.sharding = placement.state_sharding(
      mesh, method.layout, data.train.size
    )
    self.whole = NamedSharding(mesh, P())  # replicated on every device
    self.plain = feeds.reader(data.train, data.preprocess, None)
    self.fitted = jax.tree.map(lambda x: self.place(x, None), data.fitted)
    by_seed = data.fitted_by_seed is not None and seeds > 1
    self._fitted_axis = 0 if by_seed else None
    self.called: set[Any] = set()  # compiled steps that have been called
    self._mapped: dict[Any, Callable] = {}  # compiled passes over a data set
    self._initials: dict[Any, Callable] = {}  # compiled initial states
    for stage in method.stages:
      all_views(stage)  # raises if they are invalid

  def use_splits(self, splits: Sequence[Split]) -> None:
    """Use the preprocessing that was fitted for these splits.

    Call before any other function, and again for other splits.

    Args:
      splits: S splits.
    """
    by_seed = self.data.fitted_by_seed
    if by_seed is None:
      return
    each = [by_seed[split.seed] for split in splits]
    fitted = each[0]
    if self._fitted_axis is not None:
      fitted = jax.tree.map(lambda *x: np.stack(x), *each)
    self.fitted = jax.tree.map(lambda x: self.place(x, None), fitted)

  def initial(
    self, splits: Sequence[Split], rows: np.ndarray, is_traced: bool = False
  ) -> TrainState:
    """Return the state before the first step.

    Args:
      splits: S splits.
      rows: `[S, B]` of the first step, for data-dependent initialisation.
      is_traced: the call is part of another function that is traced.
    """
    batches = self.data.train.batches(lambda _: rows, [0])
    pixels, placed = next(iter(batches))
    seeds = np.array([split.seed for split in splits], np.uint32)
    labels = np.stack([split.labels for split in splits])
    trained = None
    if self.method.uses_admitted and len(splits[0].trained) < labels.shape[1]:
      trained = np.stack([split.trained for split in splits]).astype(np.int32)
    # Both numbers are equal in every split.
    labelled = len(splits[0].labelled)
    key = labelled, None if trained is None else trained.shape, is_traced
    if key not in self._initials:
      # JAX takes options at the outermost function only.
      options = {} if is_traced else conv.run_once_options()
      has_admitted = trained is not None
      self._initials[key] = self._initial(labelled, has_admitted, options)
    return self._initials[key](
      self.place(seeds, None),
      self.place(labels, None),
      None if trained is None else self.place(trained, None),
      (pixels, self.fitted),
      placed,
    )

  def _initial(
    self, labelled: int, has_admitted: bool, options: Mapping[str, str]
  ) -> Callable:
    """Compile the initial state of splits.

    Args:
      labelled: number of labelled rows.
      has_admitted: the third argument is not None.
      options: of the compiler.
    """

    def one(seed, labels, admitted, source, rows):
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
        admitted=admitted,
      )
      return init_stage(self.method.stages[0], state, self.method.averaging)

    axis = 0 if has_admitted else None
    axes = 0, 0, axis, self._source_axes, 0
    return self.compile_state(one, axes, compiler_options=options)

  @property
  def _source_axes(self) -> tuple[int | None, int | None]:
    """The axes of the seeds of the pixels and of the preprocessing."""
    pixels = None if self.data.train.pixels_are_shared else 0
    return pixels, self._fitted_axis

  def compile_state(self, f: Callable, in_axes: tuple, **options) -> Callable:
    """Compile `f`, which returns a state, over the seeds.

    Args:
      f: function of one seed.
      in_axes: axis of the seeds in each argument, as in `jax.vmap`.
      **options: options of `jax.jit`.
    """
    mapped = placement.over_seeds(f, self.seeds, in_axes)
    mapped = placement.on_mesh(mapped, self.mesh)
    return jax.jit(mapped, out_shardings=self.sharding, **options)

  # Train steps.

  @functools.cached_property
  def steps(self) -> list[Callable]:
    """Per stage `(state, source, rows, first) -> state, metrics`, compiled.

    `rows` is [S, B] for one step, or [K, S, B] for K steps in one call, which
    return metrics [K, S]. The other arguments are as in `core.Step`; `first` is
    the same for all seeds. Stages with equal steps share one function.
    """
    made, steps = {}, []
    for stage in self.method.stages:
      key = (
        *(stage.loss, stage.tx, stage.batch_spec),
        *(stage.views, stage.after_update, stage.logit_adjustment),
      )
      if key not in made:
        made[key] = self._compile(stage)
      steps.append(made[key])
    return steps

  def plain_step(self, stage: Stage) -> Callable:
    """Return the step of a stage over the seeds, not compiled, as in `steps`.

    It takes rows of one step.
    """
    read = read_views(stage, self.data, self.mesh)
    return placement.over_seeds(
      make_step(stage, read, self.method.averaging),
      self.seeds,
      (0, self._source_axes, 0, None),
    )

  def _compile(self, stage: Stage) -> Callable:
    step = placement.on_mesh(self.plain_step(stage), self.mesh)

    def call(state, source, rows, first):
      if rows.ndim == 2:
        return step(state, source, rows, first)
      return jax.lax.scan(
        lambda state, rows: step(state, source, rows, first), state, rows
      )

    return jax.jit(
      call,
      donate_argnums=0,
      compiler_options=conv.compiler_options(),
      out_shardings=(self.sharding, self.whole),
    )

  # Stages.

  @functools.cached_property
  def init_stage(self) -> list[Callable]:
    """Per stage `state -> state`, as `core.init_stage`."""
    return [self._init_stage(stage) for stage in self.method.stages]

  def _init_stage(self, stage: Stage) -> Callable:
    if stage.keep_optimizer:
      return lambda state: state
    one = functools.partial(init_optimizer, stage, self.method.averaging)
    init = jax.jit(
      placement.over_seeds(one, self.seeds, (0, 0)),
      out_shardings=(self.sharding.opt_state, self.sharding.average),
    )

    # Only these fields pass through the compiler: a memory may be too large for
    # a copy.
    def enter(state):
      opt_state, average = init(state.params, state.stats)
      return state.replace(opt_state=opt_state, average=average)

    return enter

  def map_dataset(
    self,
    per_example: PerExample | Quality,
    feed: feeds.Feed,
    *,
    by_row: bool = False,
  ) -> Callable:
    """Return `(state, rows) -> outputs`, compiled once per function and feed.

    See `map_dataset.make_map`.
    """
    key = per_example, id(feed)
    if key not in self._mapped:
      read = feeds.reader(feed, self.data.preprocess, None)
      self._mapped[key] = map_dataset_lib.make_map(
        per_example,
        feed,
        read,
        self.mesh,
        seeds=self.seeds,
        batch=self.batch,
        fitted_axis=self._fitted_axis,
        by_row=by_row,
      )
    mapped = self._mapped[key]
    return lambda state, rows, **options: mapped(
      state, self.fitted, rows, **options
    )

  @functools.cached_property
  def epoch_update(self) -> list[Callable | None]:
    """Per stage `(state, before=None) -> (state, mapped)`: the epoch update.

    It maps functions over all images, and passes `before` to `make_map`.
    `mapped` are the outputs of `Stage.per_example`, None without it.
    """
    return [
      None if stage.epoch_update is no_update else _epoch_update(self, stage)
      for stage in self.method.stages
    ]

  @functools.cached_property
  def multiplicity(self) -> list[Callable | None]:
    """Per stage `state -> [S, rows]`, the sampling multiplicity of each row."""
    over_seeds = lambda f: placement.over_seeds(f, self.seeds, (0,))
    split = self.sharding.labels
    return [
      s.multiplicity
      and jax.jit(over_seeds(s.multiplicity), out_shardings=split)
      for s in self.method.stages
    ]

  @functools.cached_property
  def readiness(self) -> list[Callable | None]:
    """Per stage `state -> [S]`, the measurement of its `Readiness`."""
    measures = [s.readiness and s.readiness.measure for s in self.method.stages]
    return [
      measure
      and jax.jit(
        placement.on_mesh(
          placement.over_seeds(measure, self.seeds, (0,)), self.mesh
        ),
        out_shardings=self.whole,
      )
      for measure in measures
    ]

  # Evaluation.

  @functools.cached_property
  def _predict(self) -> PerExample:
    return evaluate.predictor(self.net, self.method)

  def predictions(
    self, state: TrainState, split: Split
  ) -> dict[str, 'evaluate.Predicted']:
    """Predict the held-out images, as {'test': ..., 'validation': ...}.

    Each of the two is there if there are such images.

    Args:
      state: state with a leading axis [S].
      split: whose held-out rows are evaluated; of any seed in the group.
    """
    data = self.data
    sets = {}
    if data.test.size:
      sets['test'] = data.test, np.arange(data.test.size), data.truth
    for name, rows in (('test', split.test), ('validation', split.validation)):
      if len(rows):
        sets[name] = data.train, rows, data.train_truth[rows]
    found = {}
    for name, (feed, rows, truth) in sets.items():
      mapped = self.map_dataset(self._predict, feed)(state, rows, even=True)
      found[name] = evaluate.Predicted(
        truth,
        {
          weights: classes[:, : len(rows)]
          for weights, classes in multihost.fetch(mapped).items()
        },
      )
    return found

  def pseudo_labels(self, state: TrainState, rows: np.ndarray) -> UsedLabels:
    """Return the pseudo-labels `[S, M]` of training images, on the host.

    Args:
      state: state with a leading axis [S].
      rows: `[M]`, rows that the run admits.
    """
    quality = self.method.quality
    assert quality is not None  # a method without it has no pseudo-labels
    mapped = self.map_dataset(quality, self.data.train, by_row=True)
    cut = lambda x: x[:, : len(rows)]
    return jax.tree.map(cut, multihost.fetch(mapped(state, rows, even=True)))

  def measure_quality(
    self, state: TrainState, splits: Sequence[Split]
  ) -> dict[str, list[float | None]]:
    """Return the quality of the pseudo-labels, see `quality.measure`.

    Args:
      state: state with a leading axis [S].
      splits: S splits.
    """
    if self.method.quality is None:
      return {}
    count = self.data.train.size
    labels = multihost.fetch(state.labels)[:, :count]
    admitted = np.stack([split.admitted for split in splits])
    chosen = quality.sample(admitted & (labels == UNLABELLED))
    rows = np.flatnonzero(chosen.any(axis=0))
    if not len(rows):
      return {}
    truth = self.data.train_truth
    return quality.measure(
      self.pseudo_labels(state, rows),
      chosen[:, rows],
      truth[rows],
      self.data.classes,
    )


# Views.


def read_views(stage: Stage, data: Data, mesh) -> Read:
  """Return the function that makes all views of a step's images."""
  reads = {v.name: _view(v, stage, data, mesh) for v in all_views(stage)}
  return lambda *args: {name: read(*args) for name, read in reads.items()}


def _view(view: View, stage: Stage, data: Data, mesh) -> Callable:
  """Return the function that makes one view of a step's images."""
  part = stage.batch_spec.part(view.rows)
  before, after = data.on_pixels, data.augmentation  # the run's own
  if not view.after_run:
    before = after = None
  read = feeds.reader(
    data.train,
    data.preprocess,
    _chained(after, view.augment),
    _chained(before, view.on_pixels),
    name=None if view.name == DEFAULT_VIEW else view.name,
    part=None if view.rows == 'all' else part,
    adaptive=view.adaptive,
  )
  # The compiler shards a part that the devices do not divide as it likes.
  divides = (part.stop - part.start) % mesh.size == 0
  return placement.split_images(read) if divides else read


def _chained(run: Augment | None, own: Augment | None) -> Augment | None:
  """Return the run's augmentation followed by a view's own; None if neither.

  A view's own one always gets a part of the key, as in any chain.
  """
  return standard.chain(*filter(None, [run, own])) if own else run


# Updates between epochs.


def compile_update(program: Program, stage: Stage) -> Callable:
  """Compile `(state, mapped) -> state`, the update of a stage."""
  # The new memory takes the buffers of the old one, even if it is not read.
  return program.compile_state(
    stage.epoch_update, (0, 0), donate_argnums=0, keep_unused=True
  )


def _epoch_update(program: Program, stage: Stage) -> Callable:
  """Return `(state, before=None) -> ...`, see `Program.epoch_update`."""
  feed, update = program.data.train, compile_update(program, stage)
  if stage.per_example is None:
    return lambda state, before=None: (update(state, None), None)
  over_all = program.map_dataset(stage.per_example, feed)
  rows, over_labelled = np.arange(feed.size), None
  if stage.per_labelled_example is not None:
    over_labelled = program.map_dataset(stage.per_labelled_example, feed)

  def epoch_update(state, before=None):
    if over_labelled is None:
      mapped = over_all(state, rows, before=before)
      return update(state, mapped), mapped
    labels = multihost.fetch(state.labels)  # [S, rows]
    known = np.flatnonzero((labels != UNLABELLED).any(axis=0))
    labelled = over_labelled(state, known, in_place=True, before=before)
    mapped = over_all(state, rows, before=before)
    return update(state, (mapped, labelled)), mapped

  return epoch_update
