"""The abstraction every method shares: state, stages, and the train step.

A semi-supervised method is a scalar to descend, a memory it updates, and
something it redoes between epochs. `Stage` holds these as data, `Method` is a
sequence of stages, and `make_step` is the only train step there is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax

UNLABELLED = -1  # scikit-learn's convention


def rounded_up(count: int, multiple: int) -> int:
  """The least multiple that is not below `count`."""
  return -(-count // multiple) * multiple


@struct.dataclass
class TrainState:
  """Everything a run carries; N training images, C classes.

  While several seeds train at once every array has a leading axis [S]; the
  functions of a `Stage` never see that axis.
  """

  step: jax.Array  # [] int32, counts over all stages
  key: jax.Array  # [] folded with `step`, never consumed
  params: Any
  stats: Any  # batch-norm running averages
  opt_state: Any
  labels: (
    jax.Array
  )  # [rows of `MemorySpec`] int32, UNLABELLED until given, acquired
  memory: Any  # the method's own: slots, pseudo-logits, bank, teacher
  images: int = struct.field(pytree_node=False)  # N; tables may be longer


class Batch(NamedTuple):
  """What a step sees: row numbers and images, never labels."""

  rows: jax.Array  # [B] int32 in 0..N-1
  image: jax.Array  # [B, H, W, c] float32
  label_mask: jax.Array  # [B] bool, the row's label may be used


class BatchSpec(NamedTuple):
  """Which rows a step sees: the first `labelled`, then `unlabelled`."""

  labelled: int  # drawn from the rows that have a label
  unlabelled: int = 0  # drawn from the rows the run admits, labels unused
  classes: int = 0  # C: as many labelled rows of each, repeated where few
  include_labelled: bool = False  # draw `unlabelled` from the labelled rows too
  flag: str = 'batch_labelled'  # that says how many are `labelled`

  @property
  def size(self) -> int:
    """B, the rows of a step."""
    return self.labelled + self.unlabelled


class MemorySpec(NamedTuple):
  """What a memory may depend on."""

  images: int  # N training images
  labels: jax.Array  # [rows] int32 label table, UNLABELLED after the N
  labelled: int  # M of them have a label
  classes: int  # C
  embedding: int  # D
  multiple: int = 1  # of it are the lengths of tables split over devices
  extra: int = 0  # labels that may come while training

  @property
  def rows(self) -> int:
    """Length of a table with a row per image."""
    return len(self.labels)

  def padded(self, count: int) -> int:
    """Length of a table of which `count` rows are in use."""
    return rounded_up(count, self.multiple)


def no_update(state: TrainState, observed: Any) -> TrainState:
  """The refresh of a stage that re-estimates nothing."""
  del observed
  return state


class Stage(NamedTuple):
  """One phase of training, as data."""

  name: str
  steps: int  # its length, where it does not last `epochs`
  tx: optax.GradientTransformation
  batch_spec: BatchSpec
  loss: Callable  # (params, state, batch, key) -> scalar, (state, metrics)
  per_example: Callable | None = (
    None  # (state, image, key) -> pytree of [B, ...]
  )
  # (state, observed [rows of `MemorySpec`, ...], zeros after N; or None) -> state
  epoch_update: Callable = no_update
  every: int = 1  # epochs between refreshes; 0 for one, as the stage begins
  augment: Callable | None = None  # (key, image) -> image, after the run's own
  # state -> [rows of `MemorySpec`] int32, how often an epoch has each; the step's
  # `batch_spec.unlabelled` rows are of these.
  multiplicity: Callable | None = None
  epochs: int = 0  # the stage, with copies, lasts so many epochs; the last one
  # As `per_example`, but only of rows whose label is known, zeros in the others;
  # `epoch_update` then gets a pair.
  per_labelled_example: Callable | None = None
  asks: bool = True  # an oracle may be asked for labels meanwhile
  keep_optimizer: bool = False  # with the optimiser's state of the stage before


def raw_weights(state: TrainState) -> tuple[Any, Any]:
  """The weights as they are trained: (params, stats)."""
  return state.params, state.stats


def add_labels(state: TrainState, rows, labels) -> TrainState:
  """The state with acquired labels.

  Args:
    state: as it was.
    rows: `[Q]` int32; those behind the table's last are no one's.
    labels: `[Q]` int32; UNLABELLED where there was no answer.
  """
  labels = state.labels.at[rows].set(labels, mode='drop')
  return state.replace(labels=labels)


class Method(NamedTuple):
  """A named sequence of stages over one memory."""

  name: str
  stages: tuple[Stage, ...]
  init: Callable = lambda key, params, stats, spec: ()  # -> memory
  layout: Any = P()  # PartitionSpec prefix tree of the memory
  weights: Callable = raw_weights  # state -> (params, stats) to evaluate
  add_labels: Callable = add_labels  # (state, rows [Q], labels [Q]) -> state


def visible_labels(state: TrainState, batch: Batch) -> jax.Array:
  """Labels `[B]` a loss may use: UNLABELLED in the batch's other part."""
  return jnp.where(batch.label_mask, state.labels[batch.rows], UNLABELLED)


def init_state(
  method,
  net,
  key,
  labels,
  image,
  *,
  labelled: int = 0,
  multiple: int = 1,
  extra: int = 0,
) -> TrainState:
  """A fresh state, before its first stage.

  Args:
    method: the `Method` to train.
    net: the `Network` it trains.
    key: random key of this seed.
    labels: `[N]` int32 label table.
    image: `[B, H, W, c]` float32 images for data-dependent initialisation.
    labelled: as in `MemorySpec`, if there is a memory that depends on it.
    multiple: likewise.
    extra: likewise.
  """
  net_key, memory_key, train_key = jax.random.split(key, 3)
  params, stats = net.init(net_key, image)
  outputs = jax.eval_shape(net.infer, params, stats, image)
  images = len(labels)
  missing = rounded_up(images, multiple) - images
  labels = jnp.pad(labels, (0, missing), constant_values=UNLABELLED)
  spec = MemorySpec(
    images,
    labels,
    labelled,
    outputs.logits.shape[-1],
    outputs.embedding.shape[-1],
    multiple,
    extra,
  )
  memory = method.init(memory_key, params, stats, spec)
  step = jnp.zeros([], jnp.int32)
  return TrainState(step, train_key, params, stats, (), labels, memory, images)


def init_stage(stage: Stage, state: TrainState) -> TrainState:
  """Enters a stage: the optimiser's state is made anew, or goes on."""
  if stage.keep_optimizer:
    return state
  return state.replace(opt_state=stage.tx.init(state.params))


def make_step(stage: Stage, read: Callable) -> Callable:
  """The train step of a stage.

  Args:
    stage: the stage to step.
    read: `(source, rows [B], key) -> images [B, H, W, c]`, augmented.

  Returns:
    `(state, source, rows [B]) -> state, metrics`; metrics are scalars, with
    the descended one as `loss`.
  """

  def step(state, source, rows):
    key = jax.random.fold_in(state.key, state.step)
    read_key, loss_key = jax.random.split(key)
    given = jnp.arange(rows.shape[0]) < stage.batch_spec.labelled
    batch = Batch(rows, read(source, rows, read_key), given)
    descend = jax.value_and_grad(stage.loss, has_aux=True)
    (loss, (state, metrics)), slopes = descend(
      state.params, state, batch, loss_key
    )
    updates, opt_state = stage.tx.update(slopes, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = state.replace(
      step=state.step + 1, params=params, opt_state=opt_state
    )
    return state, metrics | {'loss': loss}

  return step
