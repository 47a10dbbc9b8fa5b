import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from ssljax import neighbours
from ssljax.distributed import placement
from ssljax.planning import collectives

N, D, B = 1000, 16, 8
TAU = 0.07


def of_length_1(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def example(seed=0):
  """A bank, queries, labels of five classes, the queries' own."""
  rng = np.random.default_rng(seed)
  bank, v = (of_length_1(rng.normal(size=(n, D))) for n in (N, B))
  labels = rng.integers(0, 5, N).astype(np.int32)
  labels[-3:] = -1  # excluded
  return bank, v, labels, rng.integers(0, 5, B).astype(np.int32)


def numpy_loss(v, own, bank, labels):
  """Eq. 3 in loops, float64."""
  there = [i for i in range(len(bank)) if labels[i] >= 0]
  losses = []
  for query, label in zip(v, own, strict=True):
    p = {i: np.exp(bank[i] @ query / TAU) for i in there}
    same = sum(p[i] for i in there if labels[i] == label)
    losses.append(-np.log(same / sum(p.values()) + 1e-7))
  return np.array(losses)


@pytest.fixture(params=[1, 8])
def mesh(request):
  """One device, or eight."""
  return placement.make_mesh([request.param])


def on(mesh, f):
  """`f` compiled on a mesh."""
  return jax.jit(placement.on_mesh(f, mesh))


def rows_on(mesh, *arrays):
  """Arrays split over a mesh by rows."""
  split = NamedSharding(mesh, P('data'))
  return [jax.device_put(array, split) for array in arrays]


def test_rows_get_length_1_and_a_row_of_zeros_stays():
  v = neighbours.l2_normalize(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
  np.testing.assert_allclose(v, [[0.6, 0.8], [0, 0]], rtol=1e-6)
  assert v.dtype == np.float32


@pytest.mark.parametrize('chunk', [7, 125, 4096])
def test_the_aggregation_loss_and_its_slope_equal_a_loop(mesh, chunk):
  bank, v, labels, own = example()
  banks = rows_on(mesh, jnp.float32(bank), labels)
  loss = lambda v, bank, labels: neighbours.aggregation_loss(
    v, own, bank, labels, TAU, chunk
  )
  got = on(mesh, loss)(jnp.float32(v), *banks)
  np.testing.assert_allclose(got, numpy_loss(v, own, bank, labels), rtol=1e-5)
  slope = on(mesh, jax.grad(lambda *args: loss(*args).sum()))(
    jnp.float32(v), *banks
  )
  for axis in range(3):
    way = 1e-5 * np.eye(D)[axis]
    ends = [numpy_loss(v + s * way, own, bank, labels) for s in (1, -1)]
    want = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose(slope[:, axis], want, rtol=1e-3, atol=1e-4)


def test_the_loss_is_0_when_all_have_the_label_and_large_when_none_has():
  bank, v, _labels, _ = example()
  loss = lambda own, labels: neighbours.aggregation_loss(
    jnp.float32(v), own, jnp.float32(bank), labels, TAU
  )
  ones = np.ones(B, np.int32)
  np.testing.assert_allclose(loss(ones, np.ones(N, np.int32)), 0, atol=1e-6)
  none = loss(ones, np.zeros(N, np.int32))
  np.testing.assert_allclose(none, -np.log(1e-7), rtol=1e-5)


@pytest.mark.parametrize('tau', [0.07, 0.001])
def test_the_loss_stays_finite_at_low_temperatures(tau):
  bank, v, labels, own = example()
  f = lambda v: neighbours.aggregation_loss(
    v, own, jnp.float32(bank), labels, tau
  ).sum()
  value, slope = jax.value_and_grad(f)(jnp.float32(v))
  assert np.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize(('k', 'chunk'), [(1, 100), (10, 64), (10, 4096)])
def test_neighbours_are_scikit_learns(mesh, k, chunk):
  bank, v, _, _ = example()
  search = lambda v, bank: neighbours.nearest(v, bank, k, chunk=chunk)
  values, rows = on(mesh, search)(
    jnp.float32(v), *rows_on(mesh, jnp.float32(bank))
  )
  found = NearestNeighbors(n_neighbors=k, metric='cosine').fit(bank)
  distance, want = found.kneighbors(v)
  np.testing.assert_array_equal(rows, want)
  np.testing.assert_allclose(values, 1 - distance, atol=1e-6)


@pytest.mark.oracle
def test_neighbours_are_those_of_faiss(import_oracle):
  faiss = import_oracle('faiss')
  bank, v, _, _ = (np.float32(x) for x in example())
  index = faiss.IndexFlatIP(D)
  index.add(bank)
  values, rows = index.search(v, 10)
  ours = jax.jit(lambda v, bank: neighbours.nearest(v, bank, 10))(v, bank)
  np.testing.assert_array_equal(ours[1], rows)
  np.testing.assert_allclose(ours[0], values, atol=1e-6)


def test_a_bias_ranks_and_leaves_out():
  bank, v, labels, _ = example()
  bias = np.where(labels == 2, 0.0, -np.inf).astype(np.float32)
  bias[17] = 5.0
  values, rows = neighbours.nearest(jnp.float32(v), jnp.float32(bank), 5, bias)
  assert (np.asarray(rows)[:, 0] == 17).all()
  assert (labels[np.asarray(rows)[:, 1:]] == 2).all()
  np.testing.assert_allclose(values[:, 0], v @ bank[17] + 5, rtol=1e-5)


def test_equal_scores_are_taken_in_order():
  scores = jnp.zeros([2, 700]).at[1, 300].set(1.0)
  values, places = neighbours.largest(scores, 3)
  np.testing.assert_array_equal(places, [[0, 1, 2], [300, 0, 1]])
  np.testing.assert_array_equal(values, [[0, 0, 0], [1, 0, 0]])


def test_the_largest_are_those_of_a_sort():
  scores = np.random.default_rng(0).normal(size=(4, 3001)).astype(np.float32)
  values, places = neighbours.largest(scores, 20)
  want = np.argsort(-scores, axis=1)[:, :20]
  np.testing.assert_array_equal(places, want)
  np.testing.assert_array_equal(values, np.take_along_axis(scores, want, 1))


def test_a_split_bank_stays_where_it_is():
  mesh = placement.make_mesh([8])
  bank, v, labels, own = example()
  banks = rows_on(mesh, jnp.float32(bank), labels)

  def both(v, bank, labels):
    loss = lambda v: neighbours.aggregation_loss(
      v, own, bank, labels, TAU, 50
    ).sum()
    return jax.value_and_grad(loss)(v), neighbours.nearest(v, bank, 10)

  text = on(mesh, both).lower(jnp.float32(v), *banks).compile().as_text()
  moved = collectives.find_collectives(text)
  # Ten values and ten rows per device and query.
  assert 0 < max(exchange.bytes for exchange in moved) <= 2 * 4 * B * 8 * 10


@pytest.mark.parametrize('absent', [False, True])
def test_a_density_is_over_the_nearest(absent):
  bank, _, labels, _ = example()
  gone = labels < 0
  found = neighbours.log_density(
    jnp.float32(bank[:70]),
    jnp.float32(bank),
    6,
    TAU,
    jnp.asarray(gone) if absent else None,
  )
  there = bank[~gone] if absent else bank
  near = np.sort(bank[:70] @ there.T, axis=1)[:, -6:]
  np.testing.assert_allclose(
    found, np.log(np.exp(near / TAU).sum(axis=1)), rtol=1e-5
  )


def test_a_bfloat16_bank_is_near():
  bank, v, labels, own = example()
  loss = lambda bank: neighbours.aggregation_loss(
    jnp.float32(v), own, bank, labels, TAU
  )
  exact, near = loss(jnp.float32(bank)), loss(jnp.bfloat16(bank))
  # bfloat16 has 8 bits: products are rounded by at most 2⁻⁹ of their terms,
  # and are divided by τ.
  np.testing.assert_allclose(near, exact, atol=2**-8 / TAU)
