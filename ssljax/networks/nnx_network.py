"""Flax NNX modules as networks, see `network.from_nnx`."""

from collections.abc import Callable
import functools
import inspect
from typing import Any, NamedTuple

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp

from ssljax.errors import require
from ssljax.networks.network import (
  Network,
  accepted,
  as_outputs,
  refuse_too_small,
)


def from_module(
  make: Callable[[nnx.Rngs], nnx.Module] | nnx.Module, smallest: int = 1
) -> Network:
  """Return the network of an NNX module, see `network.from_nnx`."""
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
    more = accepted(module.__call__, rngs=nnx.Rngs(key), train=train)
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
