import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.spatial.distance
import tiny

from ssljax.core import UNLABELLED, Batch, BatchSpec, init_state
from ssljax.errors import InputError
from ssljax.methods import association as m
from ssljax.methods.supervised import supervised

LABELS = np.array([0, 0, 0, 1, 1, 2])  # classes of unequal size
BALANCED = BatchSpec(9, 7, classes=tiny.CLASSES)


def sample(seed=0, b_rows=5, dim=3, scale=1.0):
  rng = np.random.default_rng(seed)
  a = scale * rng.normal(size=(len(LABELS), dim))
  return a, scale * rng.normal(size=(b_rows, dim))


def numpy_softmax(row):
  exps = [np.exp(v - max(row)) for v in row]
  return [e / sum(exps) for e in exps]


def numpy_losses(a, b, labels, kind='dot'):
  """Eq. 1–10 as the paper prints them, in loops; (walker, visit, correct)."""
  na, nb = len(a), len(b)
  m_ab = np.zeros((na, nb))
  for i in range(na):
    for j in range(nb):
      if kind == 'dot':
        m_ab[i, j] = sum(a[i, d] * b[j, d] for d in range(a.shape[1]))
      else:
        m_ab[i, j] = -np.sqrt(sum((a[i] - b[j]) ** 2))
  p_ab = [numpy_softmax(m_ab[i]) for i in range(na)]
  p_ba = [numpy_softmax(m_ab[:, j]) for j in range(nb)]
  walker = correct = 0.0
  for i in range(na):
    same = [j for j in range(na) if labels[j] == labels[i]]
    for j in same:
      p = sum(p_ab[i][k] * p_ba[k][j] for k in range(nb))
      walker -= np.log(p) / len(same) / na
      correct += p / na
  visit = 0.0
  for j in range(nb):
    visit -= np.log(sum(p_ab[i][j] for i in range(na)) / na) / nb
  return walker, visit, correct


def numpy_slopes(a, b, labels, kind, which):
  """Central differences of one of the losses, accurate to about 1e-9."""
  h = 1e-6
  slopes = []
  for x in (a, b):
    slope = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
      kept = x[index]
      x[index] = kept + h
      above = numpy_losses(a, b, labels, kind)[which]
      x[index] = kept - h
      below = numpy_losses(a, b, labels, kind)[which]
      x[index] = kept
      slope[index] = (above - below) / (2 * h)
    slopes.append(slope)
  return slopes


@pytest.mark.parametrize('kind', ['dot', 'euclidean'])
@pytest.mark.parametrize('seed', [0, 1])
def test_losses_and_slopes_equal_a_numpy_loop_of_the_paper(kind, seed):
  a, b = sample(seed)
  with jax.enable_x64(True):
    ours = m.associate(jnp.asarray(a), jnp.asarray(b), LABELS, kind)
    # The paper has no 1e-8 in its logarithms: 1e-8 / P is the difference.
    np.testing.assert_allclose(
      ours, numpy_losses(a, b, LABELS, kind), rtol=2e-6
    )
    slopes = jax.jacrev(
      lambda a, b: m.associate(a, b, LABELS, kind)[:2], argnums=(0, 1)
    )(jnp.asarray(a), jnp.asarray(b))
  assert ours.walker.dtype == np.float64
  for which in (0, 1):
    expected = numpy_slopes(a, b, LABELS, kind, which)
    for got, want in zip(slopes[which], expected, strict=True):
      assert np.abs(want).max() > 1e-3  # every loss moves both sides
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_float32_is_close_to_float64():
  a, b = sample(3, b_rows=40, dim=16)
  ours = m.associate(jnp.float32(a), jnp.float32(b), LABELS)
  np.testing.assert_allclose(ours, numpy_losses(a, b, LABELS), rtol=1e-4)


def test_two_images_of_each_by_hand():
  # M = [[ln 2, 0], [0, 0]] is symmetric, so P^ab = P^ba = [[⅔, ⅓], [½, ½]]
  # and P^aba = [[11/18, 7/18], [7/12, 5/12]]; column means 7/12, 5/12.
  a, b = jnp.array([[np.log(2.0)], [0.0]]), jnp.array([[1.0], [0.0]])
  got = m.associate(a.astype('f4'), b, np.array([0, 1]))
  log = np.log
  np.testing.assert_allclose(
    got,
    [
      -(log(11 / 18) + log(5 / 12)) / 2,
      -(log(7 / 12) + log(5 / 12)) / 2,
      (11 / 18 + 5 / 12) / 2,
    ],
    rtol=1e-5,
  )


def test_rows_of_every_transition_matrix_sum_to_1():
  a, b = (x.astype('f4') for x in sample(0, 50, scale=3.0))
  p_ab, p_ba = m.transitions(m.similarities(a, b))
  chex.assert_shape([p_ab, p_ba], [(6, 50), (50, 6)])
  for p in (p_ab, p_ba, p_ab @ p_ba):
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
    assert (np.asarray(p) >= 0).all()


@pytest.mark.parametrize('scale', [0.0, 0.1, 1.0, 10.0, 1e3])
def test_losses_are_bounded_below_by_the_entropy_of_their_targets(scale):
  floor = np.log([3, 3, 3, 2, 2, 1]).mean()
  for seed in range(5):
    a, b = (x.astype('f4') for x in sample(seed, 7, scale=scale))
    got = m.associate(a, b, LABELS)
    assert got.walker >= floor - 1e-5
    assert got.visit >= np.log(7) - 1e-5


def test_the_bounds_are_reached_where_classes_are_far_apart():
  # Each class is a direction of its own, and half of B is in each.
  labels = np.array([0, 0, 1, 1])
  a = 10 * jnp.eye(2)[labels]
  got = m.associate(a, a, labels)
  np.testing.assert_allclose(got, [np.log(2), np.log(4), 1], rtol=1e-5)


def test_a_permutation_of_b_changes_nothing():
  a, b = (x.astype('f4') for x in sample(0, 9))
  sampler = np.random.default_rng(1).permutation(9)
  total = lambda a, b: sum(m.associate(a, b, LABELS)[:2])
  (loss, (of_a, of_b)), (again, (of_a2, of_b2)) = (
    jax.value_and_grad(total, (0, 1))(a, x) for x in (b, b[sampler])
  )
  np.testing.assert_allclose(loss, again, rtol=1e-6)
  np.testing.assert_allclose(of_a, of_a2, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(of_b[sampler], of_b2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('kind', ['dot', 'euclidean'])
@pytest.mark.parametrize('scale', [0.0, 1e-20, 1e2, 1e6, 1e15])
def test_extreme_embeddings_stay_finite_in_value_and_slope(kind, scale):
  a, b = (x.astype('f4') for x in sample(0, 8, scale=scale))
  b[:6] = a  # distances of 0
  total = lambda a, b: sum(m.associate(a, b, LABELS, kind)[:2])
  chex.assert_tree_all_finite(jax.value_and_grad(total, (0, 1))(a, b))


def test_the_euclidean_similarity_is_minus_the_distance():
  a, b = sample(0, 20)
  expected = -scipy.spatial.distance.cdist(a, b)
  got = m.similarities(jnp.float32(a), jnp.float32(b), 'euclidean')
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_nothing_of_the_size_of_the_similarities_is_kept():
  a, b = jnp.ones([6, 3]), jnp.ones([50, 3])
  _, backward = jax.vjp(lambda a, b: m.associate(a, b, LABELS)[:2], a, b)
  kept = [x.size for x in jax.tree.leaves(backward)]
  assert kept and max(kept) <= b.size < 6 * 50


def test_only_the_similarities_are_computed_again():
  # Forward M and P^aba, backward two slopes of each: six products, and one
  # more for M.
  a, b = jnp.ones([6, 3]), jnp.ones([50, 3])
  total = lambda a, b: sum(m.associate(a, b, LABELS)[:2])
  lowered = jax.jit(jax.grad(total, (0, 1))).lower(a, b)
  assert lowered.as_text().count('dot_general') == 7


# The method.


def make(batch_spec=BALANCED, **arguments):
  tx = lambda steps, scale=1.0: optax.sgd(0.1 * scale)
  return m.association(tiny.NET, tx, batch_spec, 1, **arguments)


def example(method):
  """A state, and a batch of three given rows per class and seven others."""
  images, labels = tiny.images()
  given = [np.flatnonzero(labels == c)[:3] for c in range(3)]
  other = np.flatnonzero(labels == 1)[3:10]
  rows = np.concatenate([*given, other]).astype(np.int32)
  table = np.full(len(labels), UNLABELLED, np.int32)
  table[rows[:9]] = labels[rows[:9]]
  image = images.astype(np.float32) / 255
  state = init_state(
    method, tiny.NET, jax.random.key(0), jnp.asarray(table), image[:4]
  )
  batch = Batch(jnp.asarray(rows), jnp.asarray(image[rows]), jnp.arange(16) < 9)
  return state, batch


def one_loss(method):
  state, batch = example(method)
  loss = method.stages[-1].loss
  return jax.value_and_grad(loss, has_aux=True)(
    state.params, state, batch, jax.random.key(1)
  )


def test_the_whole_loss_equals_a_numpy_loop_of_the_paper():
  method = make(walker=0.7, visit=0.3, logit=2.0)
  state, batch = example(method)
  (ours, (_, metrics)), _ = one_loss(method)
  outputs, _ = tiny.NET.train(
    state.params, state.stats, batch.image, jax.random.key(1)
  )
  embedding = np.asarray(outputs.embedding, np.float64)
  y = np.repeat([0, 1, 2], 3)
  walker, visit, correct = numpy_losses(embedding[:9], embedding[9:], y)
  z = np.asarray(outputs.logits, np.float64)[:9]
  logit = np.mean([np.log(np.exp(r).sum()) - r[c] for r, c in zip(z, y)])  # noqa: B905
  np.testing.assert_allclose(
    ours, 0.7 * walker + 0.3 * visit + 2 * logit, rtol=1e-5
  )
  np.testing.assert_allclose(metrics['correct_walks'], correct, rtol=1e-5)


def test_without_its_weights_it_is_exactly_the_supervised_loss():
  (ours, _), slopes = one_loss(make(walker=0.0, visit=0.0, smoothing=0.1))
  plain = supervised(
    tiny.NET, lambda _: optax.sgd(0.1), BALANCED, 1, smoothing=0.1
  )
  (theirs, _), expected = one_loss(plain)
  assert ours == theirs
  chex.assert_trees_all_close(slopes, expected, rtol=1e-6, atol=1e-8)


def test_a_first_stage_sees_the_labelled_images_alone():
  method = make(pretrain=5, associate_rate=0.1)
  alone, associating = method.stages
  assert [s.steps for s in method.stages] == [5, 1]
  assert alone.batch_spec == BatchSpec(9, 0, classes=3)
  assert associating.batch_spec == BALANCED
  # A tenth of the learning rate, 0.1: a slope of 1 moves by −0.01.
  slope = jnp.ones([])
  updates, _ = associating.tx.update(slope, associating.tx.init(slope))
  np.testing.assert_allclose(updates, -0.01, rtol=1e-6)


def test_each_stage_has_a_schedule_of_its_own_length():
  # The rate of a stage is its length.
  tx = lambda steps, scale=1.0: optax.sgd(scale * steps)
  method = m.association(
    tiny.NET, tx, BALANCED, 7, pretrain=5, associate_rate=0.1
  )
  slope, moved = jnp.ones([]), []
  for stage in method.stages:
    updates, _ = stage.tx.update(slope, stage.tx.init(slope))
    moved.append(float(updates))
  np.testing.assert_allclose(moved, [-5, -0.7], rtol=1e-6)


def test_a_first_stage_can_associate_labelled_images_with_each_other():
  # Section 4.6: the network of the source is trained "as described in Section
  # 4", with all three losses.
  method = make(pretrain=5, pretrain_loss='association', visit=0.5)
  first, associating = method.stages
  assert (first.name, first.steps) == ('pretrain', 5)
  assert first.batch_spec == BALANCED._replace(from_labelled=True)
  assert associating.batch_spec == BALANCED
  state, batch = example(method)
  key = jax.random.key(1)
  chex.assert_trees_all_equal(
    first.loss(state.params, state, batch, key),
    associating.loss(state.params, state, batch, key),
  )
  (_, (_, metrics)) = first.loss(state.params, state, batch, key)
  assert {'walker', 'visit', 'cross_entropy'} < set(metrics)


@pytest.mark.parametrize(
  ('batch_spec', 'flag'),
  [
    (BatchSpec(9, 7), 'batch_per_class'),
    (BatchSpec(9, 0, classes=3), 'batch_unlabelled'),
  ],
)
def test_the_batch_needs_every_class_and_unlabelled_images(batch_spec, flag):
  with pytest.raises(InputError, match=flag):
    make(batch_spec)


@pytest.mark.parametrize('bad', [-1.0, float('nan'), float('inf')])
@pytest.mark.parametrize('name', ['walker', 'visit', 'logit', 'pretrain'])
def test_a_bad_hyper_parameter_is_refused_by_name(name, bad):
  with pytest.raises(InputError, match=f'{name}'):
    make(**{name: bad})
