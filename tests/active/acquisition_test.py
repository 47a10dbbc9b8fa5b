import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ssljax.active import acquisition
from ssljax.active.acquisition import ACQUISITIONS, NEEDS_EMBEDDING, Sampled
from ssljax.core import UNLABELLED
from ssljax.distributed import placement
from ssljax.errors import InputError
from ssljax.networks import layers
from ssljax.networks.network import Outputs, from_linen

PASSES = 7
LOG2 = np.log(2)
NAMES = sorted(ACQUISITIONS)


def network():
  """(params, stats, image [5, 4, 4, 1]) with large weights: passes disagree."""
  image = jax.random.uniform(jax.random.key(0), [5, 4, 4, 1])
  params, stats = tiny.NET.init(jax.random.key(1), image)
  return jax.tree.map(lambda p: 2 * p, params), stats, image


def passes_of(net, key):
  """p [T, B, C], computed pass by pass in float64."""
  params, stats, image = network()
  sample = jax.jit(net.sample)
  logits = [
    sample(params, stats, image, jax.random.fold_in(key, t)).logits
    for t in range(PASSES)
  ]
  e = np.exp(np.asarray(logits, np.float64))
  return e / e.sum(-1, keepdims=True)


def random_passes(rows=40, classes=4, passes=9, seed=0):
  """p [T, N, C]."""
  draws = np.random.default_rng(seed).dirichlet(
    np.full(classes, 0.7), (passes, rows)
  )
  return draws.astype(np.float32)


def summed(p):
  """`Sampled` for p [T, N, C], computed by loops over passes and rows."""
  passes, rows, classes = p.shape
  votes, h = np.zeros((rows, classes)), np.zeros(rows)
  for one in p:
    for row, q in enumerate(one):
      votes[row, q.argmax()] += 1 / passes
      h[row] -= sum(x * np.log(x) for x in q if x > 0) / passes
  both = p.mean(0), h, votes, (p**2).mean(0)
  return Sampled(*(jnp.asarray(x, jnp.float32) for x in both))


def test_monte_carlo_dropout_is_a_loop_over_the_passes():
  key = jax.random.key(3)
  sampled = jax.jit(acquisition.sampler(tiny.NET, PASSES))(*network(), key)
  p = passes_of(tiny.NET, key)
  # The passes differ; otherwise a single pass would equal the mean.
  assert p.std(0).max() > 0.1
  assert np.ptp(p.argmax(-1), axis=0).any()
  chex.assert_trees_all_close(sampled, summed(p), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('masks', ['shared', 'per_image'])
def test_the_samples_of_an_image_do_not_depend_on_other_images(masks):
  params, stats, image = network()
  sample = jax.jit(acquisition.sampler(tiny.NET, PASSES, masks))
  key = jax.random.key(3)
  whole = sample(params, stats, image, key)
  parts = [sample(params, stats, part, key) for part in np.split(image, [2])]
  chex.assert_trees_all_close(
    whole, jax.tree.map(lambda *x: jnp.concatenate(x), *parts), rtol=1e-5
  )


def test_images_share_a_mask_or_have_their_own():
  # A network that outputs its mask: dropout of ones.
  class Mask(nn.Module):
    @nn.compact
    def __call__(self, image, *, train, dropout):
      nn.Dense(1)(image[:, 0, 0])
      ones = jnp.ones([len(image), 64])
      x = layers.dropout(ones, 0.5, train=train, active=dropout)
      return Outputs(x, x)

  net = from_linen(Mask())
  image = jax.random.uniform(jax.random.key(0), [7, 4, 4, 1])
  image = image.at[6].set(image[0])
  params, stats = net.init(jax.random.key(1), image)
  key = jax.random.key(2)
  shared = np.asarray(net.sample(params, stats, image, key).logits)
  assert (shared == shared[0]).all()
  own = acquisition.sample_with_own_masks(net)
  own = np.asarray(own(params, stats, image, key).logits)
  assert len(np.unique(own, axis=0)) == 6  # equal images have equal masks
  # Half of 6 · 64 values are dropped, ± 4 standard deviations.
  assert abs((own[:6] == 0).mean() - 0.5) < 4 * 0.5 / np.sqrt(6 * 64)


def test_scores_of_disagreement_are_0_for_a_single_pass():
  sampled = jax.jit(acquisition.sampler(tiny.NET, 1))(
    *network(), jax.random.key(3)
  )
  for score in ('bald', 'variation_ratios', 'mean_std'):
    zero = getattr(acquisition, score)(sampled)
    # mean_std is the square root of a difference with rounding errors.
    np.testing.assert_allclose(zero, 0, atol=1e-3)
  assert acquisition.entropy(sampled).min() > 0.01


def test_the_memory_of_a_sampler_does_not_grow_with_its_passes():
  params, stats, image = network()

  def temporary(passes):
    sample = jax.jit(acquisition.sampler(tiny.NET, passes))
    compiled = sample.lower(params, stats, image, jax.random.key(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(10) == temporary(100) > 0


def test_0_passes_are_refused_by_name():
  with pytest.raises(InputError, match='passes=0'):
    acquisition.sampler(tiny.NET, 0)


def test_the_entropy_is_1_where_all_classes_are_equal_and_0_where_one_is_sure():
  p = jnp.array([[0.25] * 4, [0, 1, 0, 0], [0.5, 0.5, 0, 0]])
  # log 2 / log 4 = 1/2.
  h = acquisition.normalised_entropy(p)
  np.testing.assert_allclose(h, [1, 0, 0.5], rtol=1e-6, atol=1e-7)


def test_scores_by_hand():
  # Row 0: two confident passes that disagree. Row 1: two undecided passes.
  # Row 2: two confident passes that agree.
  p = np.array([[[1, 0], [0.5, 0.5], [0, 1]], [[0, 1], [0.5, 0.5], [0, 1]]])
  sampled = summed(p)
  expected = {
    'entropy': [1, 1, 0],
    'bald': [LOG2, 0, 0],  # only row 0 has information about the weights
    'variation_ratios': [0.5, 0, 0],
    'mean_std': [0.5, 0, 0],  # √(1/2 − 1/4) for both classes
    'margin': [0, 0, -1],
    'least_confidence': [0.5, 0.5, 0],
  }
  for name, values in expected.items():
    score = getattr(acquisition, name)(sampled)
    np.testing.assert_allclose(score, values, atol=1e-6, err_msg=name)


def test_scores_agree_with_numpy_over_the_passes():
  p = random_passes().astype(np.float64)
  sampled = summed(p)
  mean = p.mean(0)
  log = lambda p: np.log(np.maximum(p, 1e-300))
  h = -(mean * log(mean)).sum(-1)
  inner = np.mean([-(q * log(q)).sum(-1) for q in p], 0)
  ordered = np.sort(mean, -1)
  votes = [np.bincount(row, minlength=4).max() for row in p.argmax(-1).T]
  expected = {
    'entropy': h / np.log(4),
    'bald': h - inner,
    'variation_ratios': 1 - np.array(votes) / len(p),
    'mean_std': p.std(0).mean(-1),
    'margin': ordered[:, -2] - ordered[:, -1],
    'least_confidence': 1 - ordered[:, -1],
  }
  for name, values in expected.items():
    score = getattr(acquisition, name)(sampled)
    np.testing.assert_allclose(score, values, 1e-4, 1e-5, err_msg=name)


@pytest.mark.oracle
def test_scores_agree_with_baal(import_oracle):
  heuristics = import_oracle('baal.active.heuristics.heuristics')
  p = random_passes()
  sampled = summed(p)
  by_row = p.transpose(1, 2, 0)  # [N, C, T]
  # baal: entropy in nats, the confidence itself, the largest minus the second.
  for theirs, ours in (
    (heuristics.BALD().compute_score(by_row), acquisition.bald(sampled)),
    (
      heuristics.Entropy().compute_score(by_row),
      acquisition.entropy_in_nats(p.mean(0)),
    ),
    (
      1 - heuristics.Certainty().compute_score(by_row),
      acquisition.least_confidence(sampled),
    ),
    (
      -heuristics.Margin().compute_score(by_row),
      acquisition.margin(sampled),
    ),
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.oracle
def test_scores_agree_with_scikit_activeml(import_oracle):
  pool = import_oracle('skactiveml.pool')
  committee = import_oracle('skactiveml.pool._query_by_committee')
  p = random_passes()
  sampled = summed(p)
  theirs = lambda method: pool.uncertainty_scores(p.mean(0), method=method)
  for expected, ours in (
    (theirs('entropy') / np.log(4), acquisition.entropy(sampled)),
    (theirs('least_confident'), acquisition.least_confidence(sampled)),
    # scikit-activeml has 1 − (p̃_1 − p̃_2).
    (theirs('margin_sampling') - 1, acquisition.margin(sampled)),
    (
      committee.variation_ratios(p.argmax(-1).T),
      acquisition.variation_ratios(sampled),
    ),
  ):
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_highest_scores_are_taken_and_the_lower_row_in_a_tie():
  score = jnp.array([0.1, 0.9, 0.5, 0.9, 0.9, 0.3])
  every = jnp.ones(6, bool)
  np.testing.assert_array_equal(acquisition.top(score, every, 4), [1, 3, 4, 2])
  askable = jnp.array([True, False, True, False, True, True])
  np.testing.assert_array_equal(acquisition.top(score, askable, 3), [4, 2, 5])


def test_rows_whose_score_is_nan_are_chosen_last():
  score = jnp.array([jnp.nan, 0.1, -jnp.inf, jnp.inf, 0.2])
  askable = jnp.array([True, True, True, False, True])
  np.testing.assert_array_equal(
    acquisition.top(score, askable, 4), [4, 1, 0, 2]
  )


def of_entropies(h):
  """`Sampled` [N] over two classes with the normalised entropies h."""
  grid = np.linspace(0, 0.5, 100_001)[1:]
  bits = -grid * np.log2(grid) - (1 - grid) * np.log2(1 - grid)
  p = np.interp(h, bits, grid)
  return summed(np.stack([1 - p, p], -1)[None])


def chosen(name, sampled, labels, askable, size, keys):
  """Rows [K, Q] under K keys."""
  choose = lambda key: ACQUISITIONS[name](
    sampled, None, labels, askable, size, key
  )
  return np.asarray(jax.vmap(choose)(jax.random.split(jax.random.key(0), keys)))


def test_above_average_draws_uniformly_from_the_rows_of_eq_14():
  # Rows 0 and 1 are labelled. Their mean is 0.35; the mean of all eight is
  # (0.6 + 0.1 + 0.9 + 0.5 + 0.2 + 0.8 + 0.7 + 0.2) / 8 = 0.5.
  h = [0.6, 0.1, 0.9, 0.501, 0.2, 0.8, 0.7, 0.2]
  labels = jnp.array([1, 0] + [UNLABELLED] * 6)
  askable = labels == UNLABELLED
  sampled = of_entropies(h)
  for name, admitted in (
    ('above_average', {2, 3, 5, 6}),
    ('above_labelled', {2, 3, 5, 6}),
  ):
    rows = chosen(name, sampled, labels, askable, 2, 400)
    assert set(rows.ravel()) == admitted
    assert (rows[:, 0] != rows[:, 1]).all()
    # 400 pairs of four rows without repetition: each row is in a pair with
    # probability 1/2, so it occurs 200 times with a deviation of 10.
    counts = np.unique(rows, return_counts=True)[1]
    assert np.abs(counts - 200).max() < 50


def test_the_two_averages_differ_if_labelled_rows_are_confident():
  # The mean of all is (0.1 + 0.3 + 0.9 + 0.7) / 4 = 0.5, of the labelled 0.1.
  sampled = of_entropies([0.1, 0.3, 0.9, 0.7])
  labels = jnp.array([1, -1, -1, -1])
  rows = lambda name: chosen(name, sampled, labels, labels < 0, 1, 60)
  assert set(rows('above_average').ravel()) == {2, 3}
  assert set(rows('above_labelled').ravel()) == {1, 2, 3}


def test_above_average_continues_with_the_highest_entropies():
  # The mean is 0.4; only row 3 is above it.
  sampled = of_entropies([0.1, 0.3, 0.2, 1.0])
  labels = jnp.full(4, UNLABELLED)
  rows = chosen('above_average', sampled, labels, labels < 0, 3, 20)
  np.testing.assert_array_equal(rows, np.tile([3, 1, 2], (20, 1)))


def test_at_random_draws_askable_rows_uniformly():
  labels = jnp.full(6, UNLABELLED)
  askable = jnp.array([True, False, True, True, False, True])
  rows = chosen('random', None, labels, askable, 2, 400)
  # 400 pairs of four rows: each row is in 200 of them, with a deviation of 10.
  values, counts = np.unique(rows, return_counts=True)
  np.testing.assert_array_equal(values, [0, 2, 3, 5])
  assert np.abs(counts - 200).max() < 50


def greedy(x, centres, askable, size):
  """Algorithm 1 of Sener & Savarese, as loops."""
  centres, found = list(centres), []
  for _ in range(size):
    furthest, best = None, -1.0
    for row in np.flatnonzero(askable):
      if row in found:
        continue
      apart = [((x[row] - x[c]) ** 2).sum() for c in centres]
      nearest = min(apart, default=np.inf)
      if nearest > best:
        furthest, best = row, nearest
    centres.append(furthest)
    found.append(furthest)
  return found


@pytest.mark.parametrize('labelled', [0, 1, 64, 100])
def test_k_centre_is_a_greedy_loop(labelled):
  rng = np.random.default_rng(labelled)
  x = rng.normal(size=(180, 5)).astype(np.float32)
  labels = np.full(180, UNLABELLED, np.int32)
  labels[rng.choice(180, labelled, replace=False)] = 1
  askable = (labels == UNLABELLED) & (rng.random(180) < 0.8)
  rows = jax.jit(acquisition.k_centre, static_argnums=4)(
    None, x, labels, askable, 12, None
  )
  expected = greedy(x, np.flatnonzero(labels != UNLABELLED), askable, 12)
  np.testing.assert_array_equal(rows, expected)


@pytest.mark.oracle
def test_k_centre_agrees_with_scikit_activeml(import_oracle):
  core_set = import_oracle('skactiveml.pool._core_set')
  rng = np.random.default_rng(1)
  x = rng.normal(size=(90, 3)).astype(np.float32)
  labels = np.where(np.arange(90) < 20, 1, UNLABELLED)
  theirs, _ = core_set.k_greedy_center(
    x, labels, batch_size=10, missing_label=UNLABELLED
  )
  ours = acquisition.k_centre(None, x, labels, labels < 0, 10, None)
  np.testing.assert_array_equal(ours, theirs)


def test_k_centre_chooses_every_row_once_even_if_images_are_equal():
  x = jnp.zeros([5, 2])
  labels = jnp.array([1, -1, -1, -1, -1])
  rows = acquisition.k_centre(None, x, labels, labels < 0, 4, None)
  np.testing.assert_array_equal(rows, [1, 2, 3, 4])


def problem(seed):
  """(sampled, embedding, labels, askable) of 40 rows, 5 of padding last."""
  rng = np.random.default_rng(seed)
  sampled = summed(random_passes(seed=seed))
  last = jnp.arange(40) >= 35
  blank = lambda x: jnp.where(last.reshape(-1, *[1] * (x.ndim - 1)), 0.0, x)
  embedding = blank(jnp.asarray(rng.normal(size=(40, 3)), jnp.float32))
  labels = np.where(rng.random(40) < 0.3, 1, UNLABELLED).astype(np.int32)
  labels[35:] = UNLABELLED
  askable = np.zeros(40, bool)
  askable[rng.permutation(np.flatnonzero(labels[:35] < 0))[:8]] = True
  return jax.tree.map(blank, sampled), embedding, labels, askable


@pytest.mark.parametrize('name', NAMES)
def test_only_askable_rows_are_chosen_each_once(name):
  for seed in range(3):
    *parts, askable = problem(seed)
    if name not in NEEDS_EMBEDDING:
      parts[1] = None
    rows = ACQUISITIONS[name](*parts, askable, 8, jax.random.key(seed))
    assert rows.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(rows), np.flatnonzero(askable))


@pytest.mark.parametrize('name', NAMES)
def test_only_askable_rows_are_chosen_if_the_network_has_diverged(name):
  sampled, embedding, labels, askable = problem(0)
  lost = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), (sampled, embedding))
  rows = ACQUISITIONS[name](*lost, labels, askable, 8, jax.random.key(0))
  np.testing.assert_array_equal(np.sort(rows), np.flatnonzero(askable))


@pytest.mark.parametrize('name', NAMES)
def test_seeds_choose_the_same_rows_at_once_and_in_turn(name):
  problems = [problem(seed) for seed in range(3)]
  keys = jax.random.split(jax.random.key(0), 3)
  choose = jax.jit(lambda parts, key: ACQUISITIONS[name](*parts, 5, key))
  apart = [
    choose(parts, key) for parts, key in zip(problems, keys, strict=True)
  ]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *problems)
  at_once = jax.jit(jax.vmap(choose))(stacked, keys)
  np.testing.assert_array_equal(at_once, np.stack(apart))


@pytest.mark.parametrize('name', NAMES)
def test_rows_split_over_devices_give_the_same_choice(name):
  sampled, embedding, labels, askable = problem(1)
  by_rows = jax.sharding.NamedSharding(
    placement.make_mesh([8]), jax.sharding.PartitionSpec('data')
  )
  choose = jax.jit(
    lambda *parts: ACQUISITIONS[name](*parts, 5, jax.random.key(2))
  )
  split = jax.device_put((sampled, embedding), by_rows)
  np.testing.assert_array_equal(
    choose(*split, labels, askable),
    choose(sampled, embedding, labels, askable),
  )
