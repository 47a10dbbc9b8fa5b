"""Memory and communication of a run on each device, from shapes alone.

No image is read and no array is put on a device: the data set is an outline
(`data.catalog`) and the state a tree of shapes. The train steps are compiled
for the devices of this process.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
from ssljax.runs import build, defaults, queries
from ssljax.training import checkpoint, footprint
from ssljax.training import compiled as compiled_lib


class Subject(NamedTuple):
  """The planned run, without its data."""

  config: Config
  dataset: datasets.Dataset  # an outline
  net: network.Network
  methods: list[core.Method]  # baselines first, the config's method last
  labelled: int  # number of rows with a label
  trained: int  # number of rows that a batch may contain, at most

  @property
  def method(self) -> core.Method:
    """The method that is planned."""
    return self.methods[-1]

  @property
  def is_streamed(self) -> bool:
    """True if the images are decoded during training."""
    return build.is_streamed(self.dataset, self.config.run.feed)


class Step(NamedTuple):
  """Memory and communication of a compiled train step on each device."""

  stages: tuple[str, ...]  # names of the stages that use this step
  parts: dict[str, footprint.Part]  # permanent memory
  activations: int  # peak of the temporary memory in bytes
  mapped: int  # bytes of the outputs that an epoch update takes
  moved: list[collectives.Collective]

  @property
  def total(self) -> int:
    """Peak memory in bytes."""
    permanent = sum(part.bytes for part in self.parts.values())
    return permanent + max(self.activations, self.mapped)


class Plan(NamedTuple):
  """All train steps of a method on a number of devices."""

  devices: int
  steps: list[Step]

  @property
  def fullest(self) -> Step:
    """The step with the largest peak memory."""
    return max(self.steps, key=lambda step: step.total)


# The planned run.


def outline_of(config: Config) -> datasets.Dataset:
  """Return the outline of a config's data set, or of its source and target."""
  data = config.data
  how: dict[str, Any] = dict(
    data_dir=data.data_dir,
    train_split=data.train_split,
    image_size=data.image_size,
    crop='crop' in config.augmentation.augment,
  )
  if data.source:
    return catalog.joined(
      catalog.outline(data.source, with_test=False, **how),
      catalog.outline(str(data.target), test_split=data.test_split, **how),
    )
  if data.images:
    return build.load_dataset(config)
  dataset = catalog.outline(
    str(data.dataset), test_split=data.test_split, **how
  )
  if not dataset.train.is_images:
    build.refuse_image_settings(config, dataset.name)
  return dataset


def count_rows(config: Config, dataset: datasets.Dataset) -> tuple[int, int]:
  """Return the numbers of labelled and of unlabelled rows of a split.

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


def outline_with_facts(
  config: Config,
) -> tuple[datasets.Dataset, defaults.Facts]:
  """Return the outline of a config's data set, and the facts of a split."""
  dataset = outline_of(config)
  labelled, others = count_rows(config, dataset)
  classes = len(dataset.classes)
  return dataset, defaults.Facts(
    min(labelled + others, len(dataset.train.labels)),
    labelled,
    max(1, labelled // classes),
    classes,
    dataset.train.shape,
    dataset.train.is_images,
  )


def subject(config: Config, dataset: datasets.Dataset) -> Subject:
  """Return the planned run of a config.

  Args:
    config: everything the run depends on.
    dataset: outline of the data set.

  Raises:
    InputError: a setting cannot work with this data set.
  """
  labelled, others = count_rows(config, dataset)
  rows = len(dataset.train.labels)
  trained = min(labelled + others, rows - config.split.validation)

  def epoch_steps(batch_spec: core.BatchSpec) -> int:
    pool = others
    if batch_spec.include_labelled:
      pool = min(labelled + others, rows)
    if batch_spec.from_labelled:
      pool = labelled
    return sampling.epoch_steps(batch_spec, labelled, pool)

  net, methods = build.make_methods(config, dataset, epoch_steps)
  return Subject(config, dataset, net, methods, labelled, trained)


# Compilation from shapes.


def abstract_placer(mesh):
  """Return a `placement.Placer` for shapes instead of arrays."""

  def place(array, axis: int | None) -> jax.ShapeDtypeStruct:
    spec = P() if axis is None else P(*[None] * axis, 'data')
    where = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

  return place


def images_of(source: datasets.Source) -> Any:
  """Return the shape `[N, H, W, c]` of all images, in the place of an array."""
  shape = (len(source.labels), *source.shape)
  return jax.ShapeDtypeStruct(shape, source.dtype)


def make_program(planned: Subject, mesh, seeds: int) -> compiled_lib.Program:
  """Return the program of a run, without fitted preprocessing or true labels.

  Args:
    planned: the planned run.
    mesh: the devices.
    seeds: S, number of seeds trained at once.
  """
  dataset, place = planned.dataset, abstract_placer(mesh)
  feed = lambda source: (
    feeds.stream(source, place)
    if planned.is_streamed
    else feeds.resident(images_of(source), place)
  )
  on_pixels, augmentation = build.make_augmentations(
    planned.config.augmentation.augment, dataset.train.crop is not None
  )
  no_labels: Any = None
  data = compiled_lib.Data(
    feed(dataset.train),
    feed(dataset.test),
    no_labels,
    no_labels,
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
  """Compile every train step of a method for a number of devices.

  Like a run, the plan uses fewer devices if their number does not divide the
  batches.

  Args:
    planned: the planned run.
    devices: number of devices, at most those of this process.
  """
  dataset = planned.dataset
  mesh = placement.make_mesh(
    [stage.batch_spec.size for m in planned.methods for stage in m.stages],
    devices,
  )
  config = planned.config
  seeds = min(config.split.seeds, config.run.seeds_at_once)
  program = make_program(planned, mesh, seeds)
  states = footprint.stage_shapes(
    planned.method,
    planned.net,
    dataset.train.shape,
    len(dataset.train.labels),
    labelled=planned.labelled,
    multiple=placement.row_multiple(mesh),
    extra=program.extra,
    seeds=seeds,
    trained=planned.trained,
  )
  with conv.native():
    steps = [
      compile_step(planned, program, numbers, states[numbers[0]])
      for numbers in group_stages(planned.method.stages, states)
    ]
  return Plan(mesh.size, steps)


def group_stages(stages: Sequence[core.Stage], states) -> list[list[int]]:
  """Group the numbers of stages that differ in length and learning rate alone.

  Args:
    stages: the stages.
    states: shapes of the state in each stage.
  """
  groups: dict[Any, Any] = {}
  for number, (stage, state) in enumerate(zip(stages, states, strict=True)):
    shapes = jax.tree.structure(state.opt_state)
    key = (
      *(stage.loss, stage.batch_spec, stage.views, stage.after_update),
      shapes,
    )
    groups.setdefault(key, []).append(number)
  return list(groups.values())


def compile_step(planned: Subject, program, numbers, state) -> Step:
  """Compile the train step that some stages share.

  Args:
    planned: the planned run.
    program: its `compiled.Program`.
    numbers: numbers of the stages.
    state: shapes of the state in these stages.
  """
  stages = [planned.method.stages[number] for number in numbers]
  size = stages[0].batch_spec.size
  pixels, fitted, rows = step_inputs(planned, program, size)
  state = checkpoint.abstract(state, program.sharding)
  first = jax.ShapeDtypeStruct((), np.int32, sharding=program.whole)
  step = program.steps[numbers[0]]
  compiled = step.lower(state, (pixels, fitted), rows, first).compile()
  parts = footprint.parts(state, program.sharding)
  parts['images of a step' if planned.is_streamed else 'images'] = _part(pixels)
  if not planned.is_streamed:
    place = abstract_placer(program.mesh)
    parts['test images'] = _part(place(images_of(planned.dataset.test), None))
  if fitted:
    parts['preprocessing'] = _part(fitted)
  return Step(
    tuple(stage.name for stage in stages),
    parts,
    compiled.memory_analysis().temp_size_in_bytes,
    max(mapped_bytes(planned, program, stage, state) for stage in stages),
    collectives.find_collectives(compiled.as_text()),
  )


def _part(placed) -> footprint.Part:
  """Return the memory of a tree of shapes with shardings."""
  shardings = jax.tree.map(lambda x: x.sharding, placed)
  return footprint.Part(
    placement.bytes_per_device(placed, shardings),
    any(any(where.spec) for where in jax.tree.leaves(shardings)),
  )


def mapped_bytes(planned: Subject, program, stage: core.Stage, state) -> int:
  """Return the bytes on a device of a stage's outputs for all training images.

  Args:
    planned: the planned run.
    program: its `compiled.Program`.
    stage: stage whose `per_example` and `per_labelled_example` are mapped.
    state: shapes of the state in this stage.
  """
  first = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
  image = jax.ShapeDtypeStruct((1, *planned.dataset.train.shape), np.float32)
  state = jax.tree.map(first, state)
  rows = core.rounded_up(
    len(planned.dataset.train.labels), placement.row_multiple(program.mesh)
  )
  row_bytes = 0
  for per_example in filter(
    None, (stage.per_example, stage.per_labelled_example)
  ):
    outputs = jax.eval_shape(per_example, state, image, jax.random.key(0))
    leaves = jax.tree.leaves(outputs)
    row_bytes += sum(x.size * x.dtype.itemsize for x in leaves)
  return program.seeds * rows // program.mesh.size * row_bytes


def step_inputs(planned: Subject, program, size: int):
  """Return the shapes of a step's inputs.

  Args:
    planned: the planned run.
    program: its `compiled.Program`.
    size: B, images of the step.

  Returns:
    Images, values fitted by the preprocessing, and rows.
  """
  place, source = abstract_placer(program.mesh), planned.dataset.train
  shape: tuple[int, ...] = program.seeds, size
  rows = place(jax.ShapeDtypeStruct(shape, np.int32), 1)
  pixels = place(images_of(source), None)
  if planned.is_streamed:
    shape = *shape, *source.shape
    pixels = place(jax.ShapeDtypeStruct(shape, source.dtype), 1)
  fitted = program.data.preprocess.shapes(source.shape)
  return pixels, jax.tree.map(lambda x: place(x, None), fitted), rows
