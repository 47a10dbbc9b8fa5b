"""Nearest rows of a bank, and softmax sums over it, whole or sharded by rows.

A bank has n rows of D numbers. The functions hold at most a chunk of its
products with B queries at a time. If the mesh of `jax.set_mesh` has more than
one device, the bank is sharded over the axis 'data' by rows: every device
searches its own rows and the results are merged, so the bank is never moved.

Letters: B queries, D numbers, n rows, k neighbours, τ temperature.
"""

from collections.abc import Callable
import functools
import math

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

CHUNK = 8192  # rows whose products are held at a time
GROUP = 64  # rows of which only the best one enters the first search
EPSILON = 1e-7  # in the logarithm of a probability, as in LLP's code


def l2_normalize(x) -> jax.Array:
  """Scale rows `[..., D]` to length 1; a row of zeros stays 0."""
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def over_devices(f: Callable, split: int) -> Callable:
  """Return `f` with its first arguments sharded over the devices by rows.

  Args:
    f: function of arrays and of `merge`, the mesh axes for its collectives: ()
      or ('data',). Its results must be equal on all devices.
    split: number of arguments that are sharded; the others are replicated.
  """

  def call(*args):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape['data'] == 1:
      return f(*args, merge=())
    specs = tuple(P('data') if i < split else P() for i in range(len(args)))
    return jax.shard_map(
      functools.partial(f, merge=('data',)),
      in_specs=specs,
      out_specs=P(),
      check_vma=False,  # `f` makes the results equal on all devices
    )(*args)

  return call


def chunks_of(f: Callable, start, rows: int, size: int):
  """Fold `f(carry, first, length)` over chunks of rows; return the carry.

  Args:
    f: function of the carry, the first row (traced) and the number of rows.
    start: carry before the first chunk.
    rows: number of rows.
    size: rows of a chunk; the last one may be shorter.
  """
  whole = rows // size
  carry = start
  if whole:
    step = lambda i, carry: f(carry, i * size, size)
    carry = jax.lax.fori_loop(0, whole, step, carry)
  if rows % size:
    carry = f(carry, jnp.int32(whole * size), rows % size)
  return carry


def products(queries, bank, first, length) -> jax.Array:
  """Compute the products `[B, length]` of queries with rows of a bank.

  Args:
    queries: `[B, D]`.
    bank: `[n, D]`.
    first: first row (traced).
    length: number of rows.
  """
  rows = jax.lax.dynamic_slice_in_dim(bank, first, length)
  return jnp.matmul(queries, rows.astype(queries.dtype).T)


def first_of_each(rows: jax.Array) -> jax.Array:
  """Return True `[B]` for the first occurrence of each of `rows [B]`."""
  same = rows[:, None] == rows[None]
  return ~jnp.any(jnp.tril(same, -1), axis=1)


# Neighbours.


def largest(scores, k: int) -> tuple[jax.Array, jax.Array]:
  """Return the k largest of `scores [B, n]` and their places, both `[B, k]`.

  The maximum of every `GROUP` places is found first: the k largest scores lie
  in the k groups with the largest maxima.
  """
  count = scores.shape[1]
  if count <= k * GROUP:
    return jax.lax.top_k(scores, k)
  padding = ((0, 0), (0, -count % GROUP))
  grouped = jnp.pad(scores, padding, constant_values=-jnp.inf)
  grouped = grouped.reshape(len(scores), -1, GROUP)
  _, groups = jax.lax.top_k(jnp.max(grouped, axis=-1), k)
  # In rising order, so that the first of equal values is taken.
  groups = jnp.sort(groups, axis=-1)
  some = jnp.take_along_axis(grouped, groups[..., None], axis=1)
  values, at = jax.lax.top_k(some.reshape(len(scores), -1), k)
  group = jnp.take_along_axis(groups, at // GROUP, axis=1)
  return values, group * GROUP + at % GROUP


def _merged(values, rows, k: int):
  """Return the k largest of `values [B, m]` and their `rows [B, m]`."""
  values, at = jax.lax.top_k(values, k)
  return values, jnp.take_along_axis(rows, at, axis=1)


def nearest(
  queries, bank, k: int, bias=None, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
  """Return the k rows of a bank with the largest products, in falling order.

  Args:
    queries: `[B, D]`, replicated on each device.
    bank: `[n, D]`.
    k: number of neighbours, at most n.
    bias: `[n]` added to the products; −inf excludes a row.
    chunk: rows whose products are held at a time.

  Returns:
    Values `[B, k]`, bias included, and rows `[B, k]` int32.
  """
  chex.assert_rank([queries, bank], 2)
  chex.assert_equal_shape_suffix([queries, bank], 1)
  if bias is None:
    bias = jnp.zeros(len(bank), queries.dtype)
  return over_devices(functools.partial(_nearest, k=k, chunk=chunk), 2)(
    bank, bias, queries
  )


def _nearest(bank, bias, queries, *, k, chunk, merge):
  """Search the rows of one device, and merge with those of the others."""
  few = min(k, len(bank))

  def look(found, first, length):
    biases = jax.lax.dynamic_slice_in_dim(bias, first, length)
    scores = products(queries, bank, first, length) + biases[None]
    values, rows = largest(scores, min(few, length))
    pairs = zip(found, (values, rows.astype(jnp.int32) + first), strict=True)
    return _merged(*(jnp.concatenate(p, axis=1) for p in pairs), few)

  shape = len(queries), few
  none = jnp.full(shape, -jnp.inf, queries.dtype), jnp.zeros(shape, jnp.int32)
  values, rows = chunks_of(look, none, len(bank), chunk)
  if not merge:
    return values, rows
  rows = rows + jax.lax.axis_index(merge[0]) * len(bank)
  return _merged(*_gathered(values, rows, merge[0]), k)


def _gathered(values, rows, axis: str):
  """Gather float32 `values [B, m]` and int32 `rows [B, m]` of all devices.

  One transfer carries both. Two independent ones could start in another order
  on each device, and a CPU with few threads would wait for ever.
  """
  bits = jax.lax.bitcast_convert_type(values, jnp.int32)
  pair = jax.lax.all_gather(jnp.stack([bits, rows]), axis, axis=2, tiled=True)
  return jax.lax.bitcast_convert_type(pair[0], values.dtype), pair[1]


# Softmax over a bank.


def aggregation_loss(
  v, own, bank, labels, tau: float, chunk: int = CHUNK
) -> jax.Array:
  """Compute L_A `[B]` = −log(P(A|v) + ε) of LLP, Eq. 3.

  A are the rows with the query's label, and P(i|v) = exp(v·v_i/τ) / Σ_j
  exp(v·v_j/τ) is over the whole bank, Eq. 1. Only v has a gradient, for which
  the products are computed a second time.

  Args:
    v: `[B, D]` queries.
    own: `[B]` int32 labels of the queries.
    bank: `[n, D]` of any float type.
    labels: `[n]` int32 labels of the rows; rows below 0 are excluded.
    tau: τ, the temperature.
    chunk: rows whose products are held at a time.
  """
  chex.assert_rank([v, own, bank, labels], [2, 1, 2, 1])
  return _aggregation(v, own, bank, labels, tau, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _aggregation(v, own, bank, labels, tau, chunk):
  return _aggregation_forward(v, own, bank, labels, tau, chunk)[0]


def _aggregation_forward(v, own, bank, labels, tau, chunk):
  sums = over_devices(functools.partial(_sums, tau=tau, chunk=chunk), 2)
  log_every, log_same = sums(bank, labels, v, own)
  p = jnp.exp(log_same - log_every)
  return -jnp.log(p + EPSILON), (v, own, bank, labels, log_every, p)


def _aggregation_backward(tau, chunk, residuals, slope):
  v, own, bank, labels, log_every, p = residuals
  pull = over_devices(functools.partial(_pull, tau=tau, chunk=chunk), 2)
  scale = slope / ((p + EPSILON) * tau)
  return pull(bank, labels, v, own, log_every, p, scale), None, None, None


_aggregation.defvjp(_aggregation_forward, _aggregation_backward)


def _logits(bank, labels, v, first, length, tau):
  """Compute v·v_i/τ `[B, length]` and the labels `[1, length]` of a chunk."""
  label = jax.lax.dynamic_slice_in_dim(labels, first, length)[None]
  scores = products(v / tau, bank, first, length)
  return jnp.where(label < 0, -jnp.inf, scores), label


def _sums(bank, labels, v, own, *, tau, chunk, merge):
  """Compute log Σ exp(v·v_i/τ) over all rows, and over rows of the label.

  Returns:
    Both sums, each `[B]`.
  """

  def add(carry, first, length):
    top, every, same = carry
    logits, label = _logits(bank, labels, v, first, length, tau)
    higher = jnp.maximum(top, jnp.max(logits, axis=1))
    terms = jnp.exp(logits - higher[:, None])
    shrink = jnp.exp(top - higher)
    of_label = jnp.where(label == own[:, None], terms, 0.0)
    return (
      higher,
      shrink * every + jnp.sum(terms, axis=1),
      shrink * same + jnp.sum(of_label, axis=1),
    )

  lowest = jnp.full(len(v), -1e30, v.dtype)  # −inf would give nan differences
  zero = jnp.zeros(len(v), v.dtype)
  top, every, same = chunks_of(add, (lowest, zero, zero), len(bank), chunk)
  if merge:
    highest = jax.lax.pmax(top, merge)
    shrink = jnp.exp(top - highest)
    every, same = jax.lax.psum((shrink * every, shrink * same), merge)
    top = highest
  return top + jnp.log(every), top + jnp.log(same)


def _pull(bank, labels, v, own, log_every, p, scale, *, tau, chunk, merge):
  """Compute `scale` · Σ_i q_i (P − [y_i = y]) v_i `[B, D]`, q_i = P(i|v)."""

  def add(total, first, length):
    logits, label = _logits(bank, labels, v, first, length, tau)
    q = jnp.exp(logits - log_every[:, None])
    same = (label == own[:, None]).astype(v.dtype)
    rows = jax.lax.dynamic_slice_in_dim(bank, first, length).astype(v.dtype)
    return total + jnp.matmul(q * (p[:, None] - same), rows)

  total = chunks_of(add, jnp.zeros_like(v), len(bank), chunk)
  if merge:
    total = jax.lax.psum(total, merge)
  return scale[:, None] * total


def log_density(
  queries, bank, k: int, tau: float, absent=None, batch: int = 64
) -> jax.Array:
  """Compute log ρ `[M]` = log Σ exp(v·v_i/τ) over the k nearest rows.

  LLP, Eq. 7.

  Args:
    queries: `[M, D]`; a query that is a row of the bank is its own nearest.
    bank: `[n, D]`.
    k: number of neighbours, at most n.
    tau: τ, the temperature.
    absent: `[n]` bool, True for rows to exclude.
    batch: queries that are searched at a time.
  """
  bias = None if absent is None else jnp.where(absent, -jnp.inf, 0.0)
  count = math.ceil(len(queries) / batch)
  # One batch is gathered at a time, so that sharded queries stay sharded.
  places = jnp.arange(count * batch) % len(queries)
  of_some = lambda places: jax.nn.logsumexp(
    nearest(queries[places], bank, k, bias)[0] / tau, axis=1
  )
  found = jax.lax.map(of_some, places.reshape(count, batch))
  return found.reshape(-1)[: len(queries)]
