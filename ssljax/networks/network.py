"""The interface between networks and methods: four pure functions.

`from_linen` makes a `Network` of a Flax linen module, `from_nnx` of a Flax NNX
one. Letters: B images of a batch, C classes, D numbers of an embedding, F of a
feature.
"""

from collections.abc import Callable
import contextlib
import functools
import inspect
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from flax import linen as nn
from flax import nnx, traverse_util
import jax
import jax.numpy as jnp

from ssljax.errors import require

Params: TypeAlias = Any  # nested dicts of arrays, trained by the optimiser
Stats: TypeAlias = Any  # nested dicts of arrays, e.g. running averages


class Outputs(NamedTuple):
  """The outputs of a network for a batch."""

  logits: jax.Array  # [B, C]
  embedding: jax.Array  # [B, D], compared by methods
  # [B, F], the input of the layers for logits and embedding, which probes read;
  # None if it is the embedding.
  feature: jax.Array | None = None


class Init(Protocol):
  """`Network.init`."""

  def __call__(self, key: jax.Array, image: jax.Array) -> tuple[Params, Stats]:
    """Return the initial parameters and statistics.

    Args:
      key: random key.
      image: `[B, H, W, c]` float32, for shapes and data-dependent values.

    Raises:
      InputError: the network cannot take images of this size.
    """


class Train(Protocol):
  """`Network.train`."""

  def __call__(
    self, params: Params, stats: Stats, image: jax.Array, key: jax.Array
  ) -> tuple[Outputs, Stats]:
    """Return the outputs in training mode and the updated statistics.

    Args:
      params: parameters, to be differentiated with respect to.
      stats: statistics before the step.
      image: `[B, H, W, c]` float32.
      key: random key of dropout.
    """


class Infer(Protocol):
  """`Network.infer`."""

  def __call__(self, params: Params, stats: Stats, image: jax.Array) -> Outputs:
    """Return the outputs in evaluation mode, a function of each image alone.

    Args:
      params: parameters.
      stats: statistics; normalisation uses the running averages.
      image: `[B, H, W, c]` float32.
    """


class Sample(Protocol):
  """`Network.sample`."""

  def __call__(
    self, params: Params, stats: Stats, image: jax.Array, key: jax.Array
  ) -> Outputs:
    """Return the outputs of one pass of Monte-Carlo dropout.

    Args:
      params: parameters.
      stats: statistics; normalisation uses the running averages.
      image: `[B, H, W, c]` float32.
      key: random key of dropout, which is active.
    """


class Network(NamedTuple):
  """A network as pure functions of (params, stats)."""

  init: Init
  train: Train
  infer: Infer
  sample: Sample
  smallest: int = 1  # the least H and W of its images


def as_outputs(value, name: str) -> Outputs:
  """Return what a module returned as `Outputs`.

  Args:
    value: `Outputs`, logits `[B, C]`, or a pair (logits, embedding `[B, D]`).
      Without an embedding the logits are the embedding.
    name: of the module, for messages.

  Raises:
    InputError: it is none of these.
  """
  parts = tuple(value) if isinstance(value, tuple) else (value, value)
  if not isinstance(value, Outputs):
    shapes = [getattr(part, 'shape', type(part).__name__) for part in parts]
    require(
      len(parts) == 2 and all(hasattr(part, 'ndim') for part in parts),
      f'`network`: {name} returns {_described(value)}; return logits [B, C], a '
      'pair (logits, embedding), or network.Outputs',
    )
    require(
      all(part.ndim == 2 for part in parts),
      f'`network`: {name} returns arrays of shapes {shapes}; return logits '
      '[B, C] and embeddings [B, D]',
    )
  return Outputs(*parts)


def _described(value) -> str:
  if isinstance(value, tuple):
    return f'a tuple of {", ".join(type(v).__name__ for v in value)}'
  return f'a {type(value).__name__}'


def refuse_too_small(image, smallest: int, name: str) -> None:
  """Refuse images `[B, H, W, c]` with a side below `smallest`."""
  side = min(image.shape[1:3])
  require(
    side >= smallest,
    f'`network`: {name} needs images of at least {smallest}x{smallest} pixels, '
    f'these have {side}; choose a smaller network, or enlarge the images with '
    '`image_size`',
  )


def _accepted(call: Callable, **arguments) -> dict[str, Any]:
  """Return the arguments that a module's `__call__` names."""
  named = inspect.signature(call).parameters
  return {k: v for k, v in arguments.items() if k in named}


ComputeDtype = Literal['float32', 'bfloat16']


def computing_in(network: Network, dtype: ComputeDtype) -> Network:
  """Return a network whose layers compute in a dtype.

  The layers of `ssljax.networks` compute in the dtype of the images that they
  are given. Parameters, statistics of batch norm, embeddings and logits are
  float32 all the same.

  Args:
    network: one of `ssljax.networks`.
    dtype: of convolutions, matrix products and activations.
  """
  if dtype == 'float32':
    return network
  cast = lambda image: image.astype(dtype)
  return network._replace(
    train=lambda params, stats, image, key: network.train(
      params, stats, cast(image), key
    ),
    infer=lambda params, stats, image: network.infer(
      params, stats, cast(image)
    ),
    sample=lambda params, stats, image, key: network.sample(
      params, stats, cast(image), key
    ),
  )


# Flax linen.


def from_linen(module: nn.Module, smallest: int = 1) -> Network:
  """Return the network of a linen module.

  The module is called as `module(image, train=bool, dropout=bool)`, with those
  of the two arguments that its `__call__` names. `train` normalises by the
  statistics of the batch and updates the running ones, in the collection
  'batch_stats'. `dropout` drops, with keys of the stream 'dropout'. A module
  without `dropout` drops when it trains, and in `Network.sample` its
  `nn.Dropout` layers drop.

  Args:
    module: returns `Outputs`, or another value that `as_outputs` takes.
    smallest: the least height and width of an image that it accepts.
  """
  require(
    isinstance(module, nn.Module),
    f'`network`: from_linen was given {module!r:.100}; give an instance of '
    'flax.linen.Module',
  )
  name, call = type(module).__name__, type(module).__call__
  takes_dropout = bool(_accepted(call, dropout=True))

  def apply(params, stats, image, train, dropout, **more):
    variables = {'params': params, 'batch_stats': stats}
    modes = _accepted(call, train=train, dropout=dropout)
    return module.apply(variables, image, **modes, **more)

  def init(key, image):
    refuse_too_small(image, smallest, name)
    modes = _accepted(call, train=True, dropout=False)
    variables = module.init(key, image, **modes)
    return _params_and_stats(variables, name, 'train' in modes)

  def train(params, stats, image, key):
    how = dict(rngs={'dropout': key}, mutable=['batch_stats'])
    value, updated = apply(params, stats, image, True, True, **how)
    return as_outputs(value, name), updated.get('batch_stats', {})

  def infer(params, stats, image):
    return as_outputs(apply(params, stats, image, False, False), name)

  def sample(params, stats, image, key):
    forced = contextlib.nullcontext()
    if not takes_dropout:
      forced = nn.intercept_methods(_drop_always)
    with forced:
      value = apply(params, stats, image, False, True, rngs={'dropout': key})
    return as_outputs(value, name)

  return Network(
    init=init, train=train, infer=infer, sample=sample, smallest=smallest
  )


def _params_and_stats(variables, name: str, takes_train: bool):
  """Return the parameters and statistics of a module's initial variables."""
  others = variables.keys() - {'params', 'batch_stats'}
  require(
    not others,
    f'`network`: {name} has variables in {sorted(others)}; use the collections '
    "'params' and 'batch_stats' alone",
  )
  stats = variables.get('batch_stats', {})
  require(
    not stats or takes_train,
    f'`network`: {name} has running averages (batch_stats) but no argument '
    '`train`; add `train: bool` to its __call__',
  )
  return variables.get('params', {}), stats


def _drop_always(call, args, kwargs, context):
  """Make `nn.Dropout` drop in evaluation mode; an interceptor of linen."""
  layer = context.module
  if (
    not isinstance(layer, nn.Dropout)
    or context.method_name != '__call__'
    or layer.deterministic is False  # it is the copy made below
  ):
    return call(*args, **kwargs)
  key = layer.make_rng(layer.rng_collection)
  active = layer.clone(parent=None, deterministic=False)
  return active.apply({}, args[0], rngs={layer.rng_collection: key})


# Flax NNX.


def from_nnx(
  make: Callable[[nnx.Rngs], nnx.Module] | nnx.Module, smallest: int = 1
) -> Network:
  """Return the network of an NNX module.

  The module is called as `module(image)`, in the modes of `module.train()` and
  `module.eval()`; `rngs` and `train` are passed too if its `__call__` names
  them. Its `nnx.Param` variables are the parameters; all others except random
  streams are the statistics. Random streams start from the key that is given to
  `Network.train` or `Network.sample`. The latter is evaluation mode with
  `deterministic=False`, so that `nnx.Dropout` drops.

  Args:
    make: a class or function that makes the module, called as `make(rngs)` or
      `make(rngs=rngs)`, so that each seed has its own initial parameters. Or a
      module, whose variables are the initial ones of all seeds.
    smallest: the least height and width of an image that it accepts.
  """
  make = _maker(make)
  abstract = nnx.eval_shape(make, nnx.Rngs(0))
  name = type(abstract).__name__
  require(
    isinstance(abstract, nnx.Module),
    f'`network`: from_nnx was given a function that returns a {name}; return '
    'an instance of flax.nnx.Module',
  )
  like = _split(abstract)

  def apply(params, stats, image, key, *, train, dropout):
    """Return the module's outputs, and the module after the call."""
    module = _merged(like, params, stats, key)
    module.set_attributes(
      use_running_average=not train,
      deterministic=not dropout,
      raise_if_not_found=False,
    )
    more = _accepted(module.__call__, rngs=nnx.Rngs(key), train=train)
    return as_outputs(module(image, **more), name), module

  def init(key, image):
    refuse_too_small(image, smallest, name)
    parts = _split(make(nnx.Rngs(key)))
    return _to_dict(parts.params), _to_dict(parts.stats)

  def train(params, stats, image, key):
    outputs, module = apply(params, stats, image, key, train=True, dropout=True)
    return outputs, _to_dict(_split(module).stats, like.stats)

  def infer(params, stats, image):
    unused = jax.random.key(0)  # nothing is random in evaluation mode
    return apply(params, stats, image, unused, train=False, dropout=False)[0]

  def sample(params, stats, image, key):
    return apply(params, stats, image, key, train=False, dropout=True)[0]

  return Network(
    init=init, train=train, infer=infer, sample=sample, smallest=smallest
  )


def _maker(make) -> Callable[[nnx.Rngs], nnx.Module]:
  """Return the argument of `from_nnx` as a function of random streams."""
  require(
    callable(make),
    f'`network`: from_nnx was given {make!r:.100}; give a function of '
    'flax.nnx.Rngs that returns a module',
  )
  if isinstance(make, nnx.Module):
    return lambda rngs: make
  called = make.func if isinstance(make, functools.partial) else make
  if isinstance(called, type):  # NNX hides the signature of its classes
    called = getattr(called, '__init__')  # noqa: B009
  if 'rngs' in inspect.signature(called).parameters:
    return lambda rngs: make(rngs=rngs)
  return make


class _Parts(NamedTuple):
  """An NNX module as its static graph and states."""

  graph: nnx.GraphDef
  params: nnx.State
  streams: nnx.State  # keys and counts of random streams
  stats: nnx.State  # all other variables


def _split(module: nnx.Module) -> _Parts:
  """Return the parts of a module."""
  parts: tuple[Any, ...] = nnx.split(module, nnx.Param, nnx.RngState, ...)
  return _Parts(*parts)


def _merged(like: _Parts, params, stats, key) -> nnx.Module:
  """Return the module of the structure of `like` with other values."""
  return nnx.merge(
    like.graph,
    _to_state(params, like.params),
    _started(like.streams, key),
    _to_state(stats, like.stats),
  )


def _paths(state) -> list[tuple[str, ...]]:
  """Return the path of every leaf of a state, in the order of its leaves."""
  leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(state))
  return [tuple(str(key.key) for key in path) for path, _ in leaves]


def _to_dict(state, like=None) -> dict:
  """Return a state as nested dicts with string keys, as checkpoints need them.

  Args:
    state: variables of a module.
    like: a state whose variables alone are kept; by default all.
  """
  leaves = dict(zip(_paths(state), jax.tree.leaves(state), strict=True))
  paths = leaves if like is None else _paths(like)
  return traverse_util.unflatten_dict({path: leaves[path] for path in paths})


def _to_state(nested: dict, like):
  """Return nested dicts of `_to_dict` as a state of the structure of `like`."""
  leaves = traverse_util.flatten_dict(nested)
  return jax.tree.unflatten(
    jax.tree.structure(like), [leaves[path] for path in _paths(like)]
  )


def _started(streams, key):
  """Return random streams that start from a key, folded with their number."""

  def start(number: int, leaf):
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jnp.zeros(leaf.shape, leaf.dtype)  # a count of draws
    own = jax.random.fold_in(key, number)
    return jax.random.split(own, leaf.shape) if leaf.shape else own

  leaves, structure = jax.tree.flatten(streams)
  return jax.tree.unflatten(structure, map(start, range(len(leaves)), leaves))


def as_network(network, classes: int) -> Network:
  """Return what a user gave as a network as a `Network`.

  Args:
    network: a `Network`; a linen or NNX module; a constructor `(rngs) ->
      nnx.Module`; or a factory `(classes, *, ...) -> Network`.
    classes: C.

  Raises:
    InputError: it is none of these.
  """
  if isinstance(network, Network):
    return network
  if isinstance(network, nn.Module):
    return from_linen(network)
  require(
    not (isinstance(network, type) and issubclass(network, nn.Module)),
    f'`network`={network!r:.100}: is a class of linen: give an instance',
  )
  require(
    callable(network),
    f'`network`={network!r:.100}: give a name, a Network, a flax module, or a '
    'constructor (rngs) -> nnx.Module',
  )
  is_function = not isinstance(network, type | nnx.Module)
  names = list(inspect.signature(network).parameters) if is_function else []
  if names[:1] == ['classes']:
    return network(classes)
  return from_nnx(network)
