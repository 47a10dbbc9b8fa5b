"""What a run would take of each device, from shapes alone.

No image is read, and nothing is put on a device: a data set is an outline, a
state its shapes, and the train steps are compiled for the devices there are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from ssljax import config as config_lib
from ssljax import core, registry
from ssljax.config import Config
from ssljax.data import catalog, datasets, feeds, sampling, splits
from ssljax.distributed import placement
from ssljax.errors import require
from ssljax.networks import network
from ssljax.networks.cpu import conv
from ssljax.planning import collectives
from ssljax.runs import build, queries
from ssljax.training import checkpoint, footprint
from ssljax.training import compiled as compiled_lib


class Subject(NamedTuple):
  """The run that is planned, without its data."""

  config: Config
  dataset: datasets.Dataset  # an outline
  net: network.Network
  methods: list[core.Method]  # as of `assembly.Run`
  labelled: int  # rows with a label

  @property
  def method(self) -> core.Method:
    """The one whose binary it is."""
    return self.methods[-1]

  @property
  def is_streamed(self) -> bool:
    """Whether the images are decoded during the training."""
    return build.is_streamed(self.dataset, self.config.run.feed)


class Step(NamedTuple):
  """A compiled train step, on each device."""

  stages: tuple[str, ...]  # that take it
  parts: dict[str, footprint.Part]  # what it is given and what else is there
  activations: int  # bytes, at most at once, that are gone after the step
  observed: int  # bytes of what a refresh between epochs is given
  moved: list[collectives.Collective]

  @property
  def total(self) -> int:
    """Bytes at most at once."""
    permanent = sum(part.bytes for part in self.parts.values())
    return permanent + max(self.activations, self.observed)


class Plan(NamedTuple):
  """All steps of a method over so many devices."""

  devices: int
  steps: list[Step]

  @property
  def fullest(self) -> Step:
    """The step that takes most."""
    return max(self.steps, key=lambda step: step.total)


# What is planned.


def outline(config: Config) -> datasets.Dataset:
  """Return the outline of the data set, or the two, that a config names."""
  data = config.data
  how = dict(
    data_dir=data.data_dir,
    train_split=data.train_split,
    image_size=data.image_size,
    crop='crop' in config.augmentation.augment,
  )
  if data.source:
    return catalog.joined(
      catalog.outline(data.source, with_test=False, **how),
      catalog.outline(data.target, test_split=data.test_split, **how),
    )
  dataset = catalog.outline(data.dataset, test_split=data.test_split, **how)
  if not dataset.train.is_images:
    build.refuse_image_settings(config, dataset.name)
  return dataset


def count_rows(config: Config, dataset: datasets.Dataset) -> tuple[int, int]:
  """Return the labelled rows, and those seen unlabelled, of a split.

  Every image of a data set is taken to have a label, and classes to be of equal
  size.

  Raises:
    InputError: there are fewer images than the split asks for.
  """
  split, classes = config.split, len(dataset.classes)
  each, at_most = config_lib.per_class('labels', split.labels)
  kind, count = config_lib.pool('unlabelled', split.unlabelled)
  # Of a domain adaptation, the images of the source have labels.
  every, first = len(dataset.train.labels), dataset.unlabelled_from
  known = first or every
  splits.refuse_validation(split.validation, known)
  known -= split.validation
  most = known // classes
  require(
    most > 0,
    f'`dataset`={dataset.name}: has {known} labelled training images for '
    f'{classes} classes; give a larger `train_split`',
  )
  require(
    each is None or (0 < each and (at_most or each <= most)),
    f'`labels`={split.labels}: a class has about {most} labelled images; give '
    f'1 to {most}, `labels`=up_to:{each or 1}, or `labels`=all',
  )
  labelled = known if each is None else min(each, most) * classes
  others = every - first if first else known
  if kind == 'rest' and not first:
    others -= labelled
  if count is not None:
    splits.refuse_count(kind, count, others)
    others = count
  return labelled, others


def subject(config: Config, dataset: datasets.Dataset) -> Subject:
  """Return what a config plans of a data set.

  Raises:
    InputError: a setting cannot work.
  """
  labelled, others = count_rows(config, dataset)
  rows = len(dataset.train.labels)

  def epoch_steps(batch_spec: core.BatchSpec) -> int:
    both = min(labelled + others, rows)
    return sampling.epoch_steps(
      batch_spec, labelled, both if batch_spec.include_labelled else others
    )

  net, methods = build.make_methods(config, dataset, epoch_steps)
  return Subject(config, dataset, net, methods, labelled)


# What is compiled, from shapes alone.


def abstract_placer(mesh):
  """As `parallel.Placer`, of shapes."""

  def place(array, axis: int | None) -> jax.ShapeDtypeStruct:
    spec = P() if axis is None else P(*[None] * axis, 'data')
    where = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

  return place


def images_of(source: datasets.Source) -> jax.ShapeDtypeStruct:
  """All images of a source, `[N, H, W, c]`."""
  shape = (len(source.labels), *source.shape)
  return jax.ShapeDtypeStruct(shape, source.dtype)


def make_program(planned: Subject, mesh, seeds: int) -> compiled_lib.Program:
  """The run's program; its preprocessing is not fitted, nor its truth known."""
  dataset, place = planned.dataset, abstract_placer(mesh)
  feed = lambda source: (
    feeds.stream(source, place)
    if planned.is_streamed
    else feeds.resident(images_of(source), place)
  )
  on_pixels, augmentation = build.make_augmentations(
    planned.config.augmentation.augment, dataset.train.crop is not None
  )
  data = compiled_lib.Data(
    feed(dataset.train),
    feed(dataset.test),
    None,
    None,
    registry.preprocess_of(
      planned.config.augmentation.preprocess, dataset.train.is_images
    ),
    (),
    augmentation,
    on_pixels,
  )
  return compiled_lib.Program(
    planned.method,
    planned.net,
    data,
    mesh,
    seeds=seeds,
    extra=queries.most_of(
      planned.config, len(dataset.train.labels) - planned.labelled
    ),
  )


def make_plan(planned: Subject, devices: int) -> Plan:
  """Compiles every step of a method for so many devices.

  A run takes fewer if they do not divide its batches; so does the plan.
  """
  dataset = planned.dataset
  mesh = placement.make_mesh(
    [stage.batch_spec.size for m in planned.methods for stage in m.stages],
    devices,
  )
  config = planned.config
  seeds = min(config.split.seeds, config.run.seeds_at_once)
  made = make_program(planned, mesh, seeds)
  states = footprint.stage_shapes(
    planned.method,
    planned.net,
    dataset.train.shape,
    len(dataset.train.labels),
    labelled=planned.labelled,
    multiple=placement.row_multiple(mesh),
    extra=made.extra,
    seeds=seeds,
  )
  with conv.native():
    steps = [
      compile_step(planned, made, numbers, states[numbers[0]])
      for numbers in alike(planned.method.stages, states)
    ]
  return Plan(mesh.size, steps)


def alike(stages: Sequence[core.Stage], states) -> list[list[int]]:
  """Numbers of the stages, those together that differ in their rates alone."""
  groups = {}
  for number, (stage, state) in enumerate(zip(stages, states, strict=True)):
    shapes = jax.tree.structure(state.opt_state)
    key = (
      *(stage.loss, stage.batch_spec, stage.views, stage.after_update),
      shapes,
    )
    groups.setdefault(key, []).append(number)
  return list(groups.values())


def compile_step(planned: Subject, made, numbers, state) -> Step:
  """Compiles the step of some stages.

  Args:
    planned: what is planned.
    made: its `Program`.
    numbers: of the stages.
    state: its shapes in them.
  """
  stages = [planned.method.stages[number] for number in numbers]
  pixels, fitted, rows = step_inputs(planned, made, stages[0].batch_spec.size)
  first = jax.ShapeDtypeStruct((), np.int32, sharding=made.whole)
  state = checkpoint.abstract(state, made.sharding)
  compiled = (
    made.steps[numbers[0]].lower(state, (pixels, fitted), rows, first).compile()
  )
  parts = footprint.parts(state, made.sharding)
  parts['images of a step' if planned.is_streamed else 'images'] = _part(pixels)
  if not planned.is_streamed:
    place = abstract_placer(made.mesh)
    parts['test images'] = _part(place(images_of(planned.dataset.test), None))
  if fitted:
    parts['preprocessing'] = _part(fitted)
  return Step(
    tuple(stage.name for stage in stages),
    parts,
    compiled.memory_analysis().temp_size_in_bytes,
    max(observed(planned, made, stage, state) for stage in stages),
    collectives.find_collectives(compiled.as_text()),
  )


def _part(placed) -> footprint.Part:
  """What a tree of shapes with shardings takes."""
  shardings = jax.tree.map(lambda x: x.sharding, placed)
  return footprint.Part(
    placement.bytes_per_device(placed, shardings),
    any(any(where.spec) for where in jax.tree.leaves(shardings)),
  )


def observed(planned: Subject, made, stage: core.Stage, state) -> int:
  """Bytes on a device of what is observed of all images before a refresh."""
  first = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
  image = jax.ShapeDtypeStruct((1, *planned.dataset.train.shape), np.float32)
  state = jax.tree.map(first, state)
  rows = core.rounded_up(
    len(planned.dataset.train.labels), placement.row_multiple(made.mesh)
  )
  of_row = 0
  for per_example in filter(
    None, (stage.per_example, stage.per_labelled_example)
  ):
    seen = jax.eval_shape(per_example, state, image, jax.random.key(0))
    of_row += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(seen))
  return made.seeds * rows // made.mesh.size * of_row


def step_inputs(planned: Subject, made, size: int):
  """Shapes of a step's images, what the preprocessing has fitted, and rows.

  Args:
    planned: what is planned.
    made: its `Program`.
    size: B, images of the step.
  """
  place, source = abstract_placer(made.mesh), planned.dataset.train
  shape = made.seeds, size
  rows = place(jax.ShapeDtypeStruct(shape, np.int32), 1)
  pixels = place(images_of(source), None)
  if planned.is_streamed:
    shape = *shape, *source.shape
    pixels = place(jax.ShapeDtypeStruct(shape, source.dtype), 1)
  fitted = made.data.preprocess.shapes(source.shape)
  return pixels, jax.tree.map(lambda x: place(x, None), fitted), rows
