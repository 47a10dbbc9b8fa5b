"""The abstraction that every method shares: state, stages and train step.

A semi-supervised method minimises a loss, updates a memory, and repeats some
work between epochs. A `Stage` holds these as data, a `Method` is a sequence of
stages over one memory, and `make_step` is the only train step.

Callbacks are typed by protocols; the docstring of `__call__` states the shapes.
They are pure functions without an axis for seeds: several seeds are trained
with `jax.vmap`.

Letters: N training images, B rows of a step, C classes, D numbers of an
embedding, S seeds.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax

from ssljax.errors import require

_T = TypeVar('_T')
UNLABELLED = -1  # scikit-learn's convention
DEFAULT_VIEW = 'image'  # name of the view in `Batch.image`


def rounded_up(count: int, multiple: int) -> int:
  """Return the smallest multiple of `multiple` that is at least `count`."""
  return -(-count // multiple) * multiple


# The state.


class Average(struct.PyTreeNode):
  """Moving average of the trained weights, see `update_average`."""

  count: jax.Array  # [] int32, updates so far
  params: Any  # as `TrainState.params`
  stats: Any  # as `TrainState.stats`; () if only parameters are averaged


class TrainState(struct.PyTreeNode, kw_only=True):
  """The complete state of a run.

  While several seeds are trained at once every array has a leading axis [S];
  callbacks never see that axis. The order of the fields numbers the arrays in
  the checksum of a checkpoint: do not change it.
  """

  step: jax.Array  # [] int32, counts over all stages
  key: jax.Array  # [] never consumed; folded with `step` for each step's keys
  params: Any
  stats: Any  # running statistics of batch norm
  opt_state: Any
  average: Any = ()  # `Average`, or () if the run averages nothing
  labels: jax.Array  # [rows of `MemorySpec`] int32, UNLABELLED if unknown
  memory: Any  # owned by the method: slots, pseudo-logits, bank, teacher
  # [C] moving average of the predictions of the unlabelled images, of a method
  # with `Method.aligns`; () of others.
  predicted: Any = ()
  images: int = struct.field(pytree_node=False)  # N; tables may be longer


class MemorySpec(NamedTuple):
  """Everything that the initial memory of a method may depend on."""

  images: int  # N training images
  labels: jax.Array  # [rows] int32 label table, padded with UNLABELLED after N
  labelled: int  # M images that have a label
  classes: int  # C
  embedding: int  # D
  multiple: int = 1  # sharded tables are padded to a multiple of this number
  extra: int = 0  # upper bound on the labels acquired during training
  # [A] int32 rows that a batch may contain, in rising order. None if these are
  # all N, or the method has not set `Method.uses_admitted`.
  admitted: jax.Array | None = None

  @property
  def rows(self) -> int:
    """Length of a table with one row per image, padding included."""
    return len(self.labels)

  def is_admitted(self) -> jax.Array:
    """Return the mask `[rows]` bool of the rows that a batch may contain."""
    if self.admitted is None:
      return jnp.arange(self.rows) < self.images
    return jnp.zeros(self.rows, bool).at[self.admitted].set(True)

  def padded(self, count: int) -> int:
    """Return the padded length of a table of `count` rows."""
    return rounded_up(count, self.multiple)


# The batch.


class BatchSpec(NamedTuple):
  """Composition of a batch: `labelled` rows first, then `unlabelled` rows."""

  labelled: int  # drawn from the rows with a label
  unlabelled: int = 0  # drawn from the rows that the run admits; labels unused
  classes: int = 0  # C for equally many labelled rows per class; 0: any class
  include_labelled: bool = False  # draw `unlabelled` from labelled rows as well
  flag: str = 'batch_labelled'  # parameter that sets `labelled`, for messages
  from_labelled: bool = False  # draw `unlabelled` from labelled rows alone
  # Draw labelled rows of all classes equally often over the steps; unlike with
  # `classes` a step may have any number of each.
  class_aware: bool = False

  @property
  def size(self) -> int:
    """B, the number of rows of a step."""
    return self.labelled + self.unlabelled

  def part(self, rows: Literal['all', 'labelled', 'unlabelled']) -> slice:
    """Return the positions in a batch of one kind of rows."""
    first = self.labelled if rows == 'unlabelled' else 0
    return slice(first, self.labelled if rows == 'labelled' else self.size)


class Augment(Protocol):
  """A random augmentation of one image."""

  def __call__(self, key: jax.Array, image: jax.Array, /) -> jax.Array:
    """Return an augmented copy of `image [H, W, c]` float32, same shape."""


class AdaptiveAugment(Protocol):
  """A random augmentation of one image that depends on the memory."""

  def __call__(
    self, key: jax.Array, image: jax.Array, memory: Any, /
  ) -> tuple[jax.Array, Any]:
    """Return an augmented copy of `image [H, W, c]`, and its record.

    Args:
      key: random key of the image and view.
      image: `[H, W, c]` in [0, 1], before preprocessing.
      memory: memory of the method before the step.

    Returns:
      The image, same shape, and a tree of arrays that the loss needs to know
      about its augmentation; () for nothing.
    """


class Recorded(NamedTuple):
  """The images of a view with an `AdaptiveAugment`."""

  image: jax.Array  # as in `Batch.views`
  record: Any  # tree of arrays with a leading axis of rows


class View(NamedTuple):
  """A randomly augmented version of the images of a step.

  `on_pixels` is applied before preprocessing, to values in [0, 1], and
  `augment` after it. Every view of a row has its own random key, which depends
  on the step, the row and the view's name, but not on the batch's composition.

  Exception: crops that the host makes while it decodes images of different
  sizes (`feeds.window_draws`) are shared by all views of a row.
  """

  name: str  # key in `Batch.views`; DEFAULT_VIEW configures `Batch.image`
  augment: Augment | None = None
  on_pixels: Augment | None = None
  rows: Literal['all', 'labelled', 'unlabelled'] = 'all'  # computed for these
  after_run: bool = True  # apply the run's own augmentations before the view's
  # The last augmentation before preprocessing. The view is then `Recorded`.
  adaptive: AdaptiveAugment | None = None


class Batch(NamedTuple):
  """Input of a step: row numbers and images, but no labels."""

  rows: jax.Array  # [B] int32 in 0..N-1
  image: jax.Array  # [B, H, W, c] float32, the default view
  label_mask: jax.Array  # [B] bool, True where the row's label may be used
  step: jax.Array | int = 0  # [] int32, 0 for the first step of the stage
  # Further views by name, float32: [B, H, W, c], or only the labelled or the
  # unlabelled rows of the batch, in the order of `rows`.
  views: Mapping[str, jax.Array | Recorded] = {}
  prior_logits: jax.Array | None = None  # [C], see `LogitAdjustment`

  def adjusted(self, logits: jax.Array) -> jax.Array:
    """Return the logits `[..., C]` of the cross-entropy of given labels.

    They are the same ones unless the run has a `LogitAdjustment`.
    """
    if self.prior_logits is None:
      return logits
    added = jnp.expand_dims(self.prior_logits, range(logits.ndim - 1))
    return logits + added


# Classes of different frequency.


class LogitAdjustment(NamedTuple):
  """Settings of the logit adjustment of a supervised cross-entropy.

  The loss is CE(y, softmax(f(x) + τ log π)) with the frequencies π of the
  labels, so that argmax f(x) is right about all classes equally often (Menon et
  al., ICLR 2021, Eq. 10).
  """

  strength: float  # τ
  classes: int  # C


def class_frequencies(labels: jax.Array, classes: int) -> jax.Array:
  """Return the frequencies π `[C]` of the classes of a label table.

  A class without a label counts as one with a single label.

  Args:
    labels: `[rows]` int32, UNLABELLED where unknown.
    classes: C.
  """
  place = jnp.where(labels == UNLABELLED, classes, labels)
  counts = jnp.zeros(classes).at[place].add(1.0, mode='drop')
  counts = jnp.maximum(counts, 1.0)
  return counts / jnp.sum(counts)


def prior_logits(
  adjustment: LogitAdjustment | None, labels: jax.Array
) -> jax.Array | None:
  """Return τ log π `[C]` of a label table; None without an adjustment."""
  if adjustment is None:
    return None
  frequencies = class_frequencies(labels, adjustment.classes)
  return adjustment.strength * jnp.log(frequencies)


# Callbacks of a stage.


class Loss(Protocol):
  """The objective of a stage."""

  def __call__(
    self, params: Any, state: TrainState, batch: Batch, key: jax.Array, /
  ) -> tuple[jax.Array, tuple[TrainState, dict[str, jax.Array]]]:
    """Compute the loss, which is differentiated with respect to `params`.

    Args:
      params: parameters of the network, equal to `state.params`.
      state: state before the step.
      batch: images `[B, H, W, c]` and their row numbers.
      key: random key of the step.

    Returns:
      The loss `[]`, and (state, metrics): the state with new `stats` and
      `memory` and nothing else changed, and scalars `[]` by name, one for each
      term of the loss. The name 'loss' is reserved.
    """


class PerExample(Protocol):
  """A function that is mapped over the training set between epochs."""

  def __call__(
    self, state: TrainState, image: jax.Array, key: jax.Array, /
  ) -> Any:
    """Return a tree of `[B, ...]` for `image [B, H, W, c]`, not augmented.

    The key is the same for all batches of one pass over the training set.
    """


class EpochUpdate(Protocol):
  """The work of a stage between epochs, without gradients."""

  def __call__(self, state: TrainState, mapped: Any, /) -> TrainState:
    """Return the state for the next epochs.

    Args:
      state: state at the end of an epoch.
      mapped: outputs `[rows, ...]` of `Stage.per_example`, one row for each row
        of the label table, zeros in the padding after N. A pair of outputs if
        the stage has `per_labelled_example`. None without `per_example`.
    """


class AfterUpdate(Protocol):
  """The last part of a train step, without gradients."""

  def __call__(self, state: TrainState, batch: Batch, /) -> TrainState:
    """Return the state after the step.

    Args:
      state: state with updated parameters, optimiser state, average and step.
      batch: the batch of the step.
    """


class Multiplicity(Protocol):
  """The sampling multiplicity of the images in an epoch."""

  def __call__(self, state: TrainState, /) -> jax.Array:
    """Return how often each row occurs per epoch: `[rows]` int32."""


class Measure(Protocol):
  """A measurement of a state."""

  def __call__(self, state: TrainState, /) -> jax.Array:
    """Return a number `[]`."""


class Readiness(NamedTuple):
  """A condition on the end of a stage, which the next stages rely on.

  A run that does not meet it goes on, and warns.
  """

  name: str  # of the measurement, in the metrics
  advice: str  # consequence and remedy, with names of settings in backticks
  least: float = -math.inf
  most: float = math.inf
  # None measures the mean loss since the last stop.
  measure: Measure | None = None

  def is_met(self, value: float) -> bool:
    """Return True unless a measurement violates the condition; NaN does not."""
    return not (value < self.least or value > self.most)


def no_update(state: TrainState, mapped: Any) -> TrainState:
  """Return the state unchanged: `epoch_update` of a stage without updates."""
  del mapped
  return state


class Stage(NamedTuple):
  """One phase of training, as data. Construct it with keywords."""

  name: str
  tx: optax.GradientTransformation
  batch_spec: BatchSpec
  loss: Loss
  steps: int = 0  # length in steps
  epochs: int = 0  # length in epochs, used instead of `steps` if not 0
  views: tuple[View, ...] = ()  # views beside the default one, or replacing it
  after_update: AfterUpdate | None = None
  per_example: PerExample | None = None
  # T > 0: `per_example` returns `acquisition.Sampled` of T passes by the
  # trained weights. A query with as many passes uses it instead of its own.
  sampled_passes: int = 0
  # As `per_example`, but only for rows with a label; zeros in the other rows.
  per_labelled_example: PerExample | None = None
  epoch_update: EpochUpdate = no_update
  every: int = 1  # epochs between updates; 0: only at the start of the stage
  # The `batch_spec.unlabelled` rows of a step are drawn with this multiplicity.
  multiplicity: Multiplicity | None = None
  acquire_labels: bool = True  # False: active learning pauses in this stage
  keep_optimizer: bool = False  # continue the previous stage's optimiser state
  readiness: Readiness | None = None  # for the stages after this one
  logit_adjustment: LogitAdjustment | None = None


def all_views(stage: Stage) -> tuple[View, ...]:
  """Return all views of a stage, the default one first.

  Raises:
    InputError: two views share a name, or a view has no rows.
  """
  names = [view.name for view in stage.views]
  require(
    len(set(names)) == len(names),
    f'`views`: {", ".join(names)}: give each view of stage {stage.name} a name '
    'of its own',
  )
  views = {DEFAULT_VIEW: View(DEFAULT_VIEW)}
  views |= zip(names, stage.views, strict=True)
  require(
    views[DEFAULT_VIEW].rows == 'all',
    f'`views`: view {DEFAULT_VIEW} of stage {stage.name} is the default one, '
    "of all rows: give `rows`='all', or the view another name",
  )
  require(
    views[DEFAULT_VIEW].adaptive is None,
    f'`views`: view {DEFAULT_VIEW} of stage {stage.name} has `adaptive`, whose '
    'record a default view cannot hold: give the view another name',
  )
  for view in views.values():
    part = stage.batch_spec.part(view.rows)
    require(
      part.start < part.stop,
      f'`views`: a batch of stage {stage.name} has no {view.rows} rows for '
      f'view {view.name}: give the view other `rows`',
    )
  return tuple(views.values())


# The moving average.


class Averaging(NamedTuple):
  """Settings of the moving average of a run's weights."""

  decay: float  # upper bound of the decay, in [0, 1)
  statistics: bool = False  # average batch norm's running statistics as well
  warmup: int = 10  # a in (1+t)/(a+t), the decay before the upper bound


def init_average(
  averaging: Averaging | None, params: Any, stats: Any
) -> Average | tuple[()]:
  """Return the average before the first step: a copy of the weights."""
  if averaging is None:
    return ()
  # A copy, because the buffers of the weights are donated to the next step.
  copy = lambda tree: jax.tree.map(jnp.copy, tree)
  return Average(
    count=jnp.zeros([], jnp.int32),
    params=copy(params),
    stats=copy(stats) if averaging.statistics else (),
  )


def update_average(
  averaging: Averaging, average: Average, params: Any, stats: Any
) -> Average:
  """Update w̄ ← d·w̄ + (1−d)·w with d = min(decay, (1+t)/(warmup+t)).

  t counts the updates before this one. The default warm-up of 10 is that of
  TensorFlow's `ExponentialMovingAverage`.

  Args:
    averaging: settings.
    average: w̄ before the update.
    params: parameters w after the step.
    stats: running statistics w after the step.
  """
  t = average.count.astype(jnp.float32)
  d = jnp.minimum(averaging.decay, (1 + t) / (averaging.warmup + t))
  mean = lambda old, new: (d * old + (1 - d) * new).astype(old.dtype)
  average = average.replace(
    count=average.count + 1,
    params=jax.tree.map(mean, average.params, params),
  )
  if not averaging.statistics:
    return average
  return average.replace(stats=jax.tree.map(mean, average.stats, stats))


def evaluated_weights(state: TrainState) -> tuple[Any, Any]:
  """Return (params, stats) to evaluate: averaged where there is an average."""
  average = state.average
  if not isinstance(average, Average):
    return state.params, state.stats
  return average.params, state.stats if average.stats == () else average.stats


# The method.


class InitMemory(Protocol):
  """The initial memory of a method."""

  def __call__(
    self, key: jax.Array, params: Any, stats: Any, spec: MemorySpec, /
  ) -> Any:
    """Return the memory before the first stage, a tree of arrays."""


class Weights(Protocol):
  """The weights that a method evaluates and predicts with."""

  def __call__(self, state: TrainState, /) -> tuple[Any, Any]:
    """Return (params, stats)."""


class AddLabels(Protocol):
  """The response of a method to acquired labels."""

  def __call__(
    self, state: TrainState, rows: jax.Array, labels: jax.Array, /
  ) -> TrainState:
    """Return the state with new labels.

    Args:
      state: state between two steps.
      rows: `[Q]` int32; rows past the end of the label table are padding.
      labels: `[Q]` int32, UNLABELLED where the oracle gave no answer.
    """


def no_memory(
  key: jax.Array, params: Any, stats: Any, spec: MemorySpec
) -> tuple[()]:
  """Return an empty memory."""
  del key, params, stats, spec
  return ()


def add_labels(
  state: TrainState, rows: jax.Array, labels: jax.Array
) -> TrainState:
  """Write acquired labels into the label table, see `AddLabels`."""
  labels = state.labels.at[rows].set(labels, mode='drop')
  return state.replace(labels=labels)


class UpgradeMemory(Protocol):
  """The conversion of a memory from a checkpoint of an earlier version."""

  def __call__(self, state: TrainState, fresh: Any, /) -> Any:
    """Return the memory in the current layout, of the lengths of `fresh`.

    Args:
      state: restored state; fields that its checkpoint lacks are None.
      fresh: initial memory of the run, in the current layout.
    """


class UsedLabels(NamedTuple):
  """Pseudo-labels of some images, as the loss uses them."""

  label: jax.Array  # [B] int32
  # [B] in [0, 1], factor of the image's own term of the loss; 0: not used.
  weight: jax.Array


class Quality(Protocol):
  """The pseudo-labels of a method, whose quality a run reports.

  It is called at evaluations and changes nothing.
  """

  def __call__(
    self, state: TrainState, rows: jax.Array, image: jax.Array, /
  ) -> UsedLabels:
    """Return the pseudo-labels of unlabelled images.

    Args:
      state: state between two steps.
      rows: `[B]` int32 row numbers.
      image: `[B, H, W, c]`, not augmented.
    """


class Method(NamedTuple):
  """A sequence of stages over one memory. Construct it with keywords."""

  name: str
  stages: tuple[Stage, ...]
  init: InitMemory = no_memory
  layout: Any = P()  # prefix tree of `PartitionSpec` of the memory
  weights: Weights = evaluated_weights
  add_labels: AddLabels = add_labels
  uses_admitted: bool = False  # `init` gets `MemorySpec.admitted`
  # For memories with fields, None by default, that earlier versions lack.
  upgrade_memory: UpgradeMemory | None = None
  averaging: Averaging | None = None  # None: averages nothing
  quality: Quality | None = None  # None: gives unlabelled images no label
  aligns: bool = False  # the state has `predicted`


def layout(memory: Callable[..., _T], **specs: P) -> _T:
  """Return a memory with partition specs in the place of its arrays.

  Args:
    memory: the class of the memory.
    **specs: of its fields.
  """
  return memory(**specs)


def visible_labels(state: TrainState, batch: Batch) -> jax.Array:
  """Return the labels `[B]` that a loss may use, UNLABELLED in other rows."""
  return jnp.where(batch.label_mask, state.labels[batch.rows], UNLABELLED)


def init_state(
  method: Method,
  net: Any,
  key: jax.Array,
  labels: jax.Array,
  image: jax.Array,
  *,
  labelled: int = 0,
  multiple: int = 1,
  extra: int = 0,
  admitted: jax.Array | None = None,
) -> TrainState:
  """Return a new state, before `init_stage` of the first stage.

  Args:
    method: the method to train.
    net: the `Network` to train.
    key: random key of this seed.
    labels: `[N]` int32 label table.
    image: `[B, H, W, c]` float32 images for data-dependent initialisation.
    labelled: M of `MemorySpec`, for memories that depend on it.
    multiple: padding of `MemorySpec`.
    extra: number of labels to come, of `MemorySpec`.
    admitted: `[A]` int32, of `MemorySpec`.
  """
  net_key, memory_key, train_key = jax.random.split(key, 3)
  params, stats = net.init(net_key, image)
  outputs = jax.eval_shape(net.infer, params, stats, image)
  images = len(labels)
  missing = rounded_up(images, multiple) - images
  labels = jnp.pad(labels, (0, missing), constant_values=UNLABELLED)
  spec = MemorySpec(
    images=images,
    labels=labels,
    labelled=labelled,
    classes=outputs.logits.shape[-1],
    embedding=outputs.embedding.shape[-1],
    multiple=multiple,
    extra=extra,
    admitted=admitted,
  )
  return TrainState(
    step=jnp.zeros([], jnp.int32),
    key=train_key,
    params=params,
    stats=stats,
    opt_state=(),
    labels=labels,
    memory=method.init(memory_key, params, stats, spec),
    predicted=jnp.full(spec.classes, 1 / spec.classes) if method.aligns else (),
    images=images,
  )


def init_optimizer(
  stage: Stage, averaging: Averaging | None, params: Any, stats: Any
) -> tuple[Any, Average | tuple[()]]:
  """Return a new optimiser state and a new average."""
  return stage.tx.init(params), init_average(averaging, params, stats)


def init_stage(
  stage: Stage, state: TrainState, averaging: Averaging | None
) -> TrainState:
  """Enter a stage: start its optimiser and average, or continue the old ones.

  Args:
    stage: stage to enter.
    state: state at the end of the stage before, or from `init_state`.
    averaging: settings of the method.
  """
  if stage.keep_optimizer:
    return state
  opt_state, average = init_optimizer(
    stage, averaging, state.params, state.stats
  )
  return state.replace(opt_state=opt_state, average=average)


# The train step.


class Read(Protocol):
  """A function that returns the images of a step."""

  def __call__(
    self, source: Any, rows: jax.Array, key: jax.Array, *memory: Any
  ) -> dict[str, jax.Array | Recorded]:
    """Return all views of `rows [B]` by name, DEFAULT_VIEW among them.

    The memory is given where a view of the stage has an `AdaptiveAugment`.
    """


class Step(Protocol):
  """A train step."""

  def __call__(
    self, state: TrainState, source: Any, rows: jax.Array, first: jax.Array, /
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Return the next state and the metrics.

    Args:
      state: state before the step.
      source: argument of `Read`.
      rows: `[B]` int32 row numbers.
      first: `[]` int32, `state.step` at the first step of the stage.

    Returns:
      The state, and scalars `[]` by name: the metrics of the loss, and 'loss'.
    """


def make_step(stage: Stage, read: Read, averaging: Averaging | None) -> Step:
  """Return the train step of a stage.

  Args:
    stage: the stage.
    read: returns the augmented images.
    averaging: settings of the method.
  """
  adapts = any(view.adaptive for view in stage.views)

  def step(
    state: TrainState, source: Any, rows: jax.Array, first: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    key = jax.random.fold_in(state.key, state.step)
    read_key, loss_key = jax.random.split(key)
    memory = (state.memory,) if adapts else ()
    views = dict(read(source, rows, read_key, *memory))
    image = views.pop(DEFAULT_VIEW)
    assert isinstance(image, jax.Array)  # not `Recorded`
    batch = Batch(
      rows=rows,
      image=image,
      label_mask=jnp.arange(rows.shape[0]) < stage.batch_spec.labelled,
      step=state.step - first,
      views=views,
      prior_logits=prior_logits(stage.logit_adjustment, state.labels),
    )
    descend = jax.value_and_grad(stage.loss, has_aux=True)
    (loss, (state, metrics)), slopes = descend(
      state.params, state, batch, loss_key
    )
    updates, opt_state = stage.tx.update(slopes, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = state.replace(
      step=state.step + 1, params=params, opt_state=opt_state
    )
    if averaging is not None:
      average = update_average(averaging, state.average, params, state.stats)
      state = state.replace(average=average)
    if stage.after_update is not None:
      state = stage.after_update(state, batch)
    return state, metrics | {'loss': loss}

  return step
