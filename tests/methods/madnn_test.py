import chex
import jax
import jax.numpy as jnp
import logit_net
import numpy as np
import optax
import pytest
import tiny

from ssljax.core import UNLABELLED, Batch, BatchSpec, init_state
from ssljax.errors import InputError
from ssljax.methods import madnn as m
from ssljax.methods.supervised import supervised


def numpy_step(keys, values, x, p, y, eta, distance='euclidean', read=True):
  """Algorithm 1 as the paper prints it: loops in float64, no ε anywhere.

  Returns the updated slots, and per image p̂, H(p̂), max(p̂)·KL(p‖p̂).
  """
  keys, values = keys.copy(), values.copy()
  classes = len(keys)
  for j in range(classes):
    members = [i for i in range(len(x)) if y[i] == j]
    slope_k = sum((keys[j] - x[i] for i in members), np.zeros_like(keys[j]))
    slope_v = sum((values[j] - p[i] for i in members), np.zeros(classes))
    keys[j] = keys[j] - eta * slope_k / (1 + len(members))
    moved = values[j] - eta * slope_v / (1 + len(members))
    values[j] = moved / moved.sum()
  p_hats, entropies, divergences = [], [], []
  for i in range(len(x)):
    if y[i] >= 0:
      w = np.eye(classes)[y[i]]
    else:
      if distance == 'l1':
        d = np.array([np.abs(x[i] - k).sum() for k in keys])
      else:
        d = np.array([np.linalg.norm(x[i] - k) for k in keys])
      w = np.exp(-d) / np.exp(-d).sum()
    p_hat = sum(w[j] * values[j] for j in range(classes)) if read else w
    p_hats.append(p_hat)
    positive = p_hat[p_hat > 0]
    entropies.append(-(positive * np.log(positive)).sum())
    divergences.append(
      p_hat.max()
      * sum(p[i, c] * np.log(p[i, c] / p_hat[c]) for c in range(classes))
      if read
      else np.nan
    )
  return (
    keys,
    values,
    np.array(p_hats),
    np.array(entropies),
    np.array(divergences),
  )


def sample(seed=0, rows=7, classes=3, dim=4):
  rng = np.random.default_rng(seed)
  y = np.array([0, 0, 2, 2, 2, UNLABELLED, UNLABELLED], np.int32)[:rows]
  return (
    rng.normal(size=(classes, dim)),
    rng.dirichlet(np.ones(classes), classes),
    rng.normal(size=(rows, dim)),
    rng.dirichlet(np.ones(classes), rows),
    y,
  )


def test_one_update_by_hand():
  # N=4, C=2, D=2; η=½. Class 0 has two images: k = 0 − ½·Σ(0−x)/3 = Σx/6.
  # Class 1 has none: unchanged. Row 2, 3 are unlabelled: not counted.
  x = jnp.array([[6.0, 0.0], [0.0, 12.0], [9.0, 9.0], [9.0, 9.0]])
  p = jnp.array([[1.0, 0.0], [0.4, 0.6], [0.0, 1.0], [0.0, 1.0]])
  labels = jnp.array([0, 0, UNLABELLED, UNLABELLED])
  slots = m.update(m.empty_slots(2, 2), x, p, labels, eta=0.5)
  chex.assert_trees_all_close(
    slots.keys, jnp.array([[1.0, 2.0], [0.0, 0.0]]), rtol=1e-6
  )
  # v0 = ½ − ½·(½−1 + ½−0.4)/3 = 0.5 + 0.4/6.
  v = 0.5 + 0.4 / 6
  chex.assert_trees_all_close(
    slots.values, jnp.array([[v, 1 - v], [0.5, 0.5]]), rtol=1e-6
  )


@pytest.mark.parametrize('distance', ['euclidean', 'l1'])
def test_update_and_losses_equal_a_numpy_loop_of_the_paper(distance):
  keys, values, x, p, y = sample()
  expected = numpy_step(keys, values, x, p, y, 0.5, distance)
  with jax.enable_x64(True):
    slots = m.Slots(jnp.asarray(keys), jnp.asarray(values))
    slots = m.update(slots, jnp.asarray(x), jnp.asarray(p), y, eta=0.5)
    p_hat = m.assimilate(slots, jnp.asarray(x), y, kind=distance)
    terms = m.memory_terms(jnp.asarray(p), p_hat)
    ours = (slots.keys, slots.values, p_hat, *terms)
  for got, want in zip(ours, expected, strict=True):
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_sequence_of_steps_equals_the_numpy_loop_in_float32():
  keys, values, x, p, y = sample()
  slots = m.Slots(jnp.float32(keys), jnp.float32(values))
  for seed in range(5):
    _, _, x, p, _ = sample(seed)
    keys, values, *_ = numpy_step(keys, values, x, p, y, 0.3)
    slots = m.update(slots, jnp.float32(x), jnp.float32(p), y, eta=0.3)
  np.testing.assert_allclose(slots.keys, keys, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(slots.values, values, rtol=1e-5)


def test_without_values_the_prediction_is_the_address():
  keys, values, x, p, y = sample()
  *_, want, _, _ = numpy_step(keys, values, x, p, y, 0.0, read=False)
  slots = m.Slots(jnp.float32(keys), jnp.float32(values))
  got = m.assimilate(slots, jnp.float32(x), y, values=False)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_predictions_are_distributions_and_values_stay_so():
  keys, values, x, p, y = (jnp.asarray(v) for v in sample())
  slots = m.update(
    m.Slots(keys.astype('f4'), values.astype('f4')),
    x.astype('f4'),
    p.astype('f4'),
    y,
    eta=0.5,
  )
  p_hat = m.assimilate(slots, x.astype('f4'), y)
  ones = lambda a: jnp.ones(a.shape[0])
  chex.assert_trees_all_close(p_hat.sum(-1), ones(p_hat), rtol=1e-6)
  chex.assert_trees_all_close(
    slots.values.sum(-1), ones(slots.values), rtol=1e-6
  )


def test_an_unlabelled_feature_at_a_key_is_addressed_there():
  # The other key is 50 away: e^−50 is nothing.
  slots = m.Slots(jnp.array([[0.0, 0.0], [30.0, 40.0]]), jnp.eye(2))
  p_hat = m.assimilate(
    slots, jnp.array([[30.0, 40.0]]), jnp.array([UNLABELLED])
  )
  chex.assert_trees_all_close(p_hat, jnp.array([[0.0, 1.0]]), atol=1e-6)


def test_distances_by_hand():
  x, keys = jnp.array([[3.0, 4.0]]), jnp.zeros([1, 2])
  np.testing.assert_allclose(m.distance(x, keys, 'euclidean'), [[5.0]])
  np.testing.assert_allclose(m.distance(x, keys, 'l1'), [[7.0]], rtol=1e-5)


@pytest.mark.parametrize('distance', ['euclidean', 'l1'])
def test_a_feature_on_a_key_has_a_finite_slope(distance):
  keys = jnp.ones([2, 3])
  total = lambda x: m.distance(x, keys, distance).sum()
  chex.assert_tree_all_finite(jax.grad(total)(jnp.ones([1, 3])))


def test_no_gradient_flows_through_the_update():
  keys, values, x, p, y = (jnp.asarray(v) for v in sample())
  slots = m.Slots(keys.astype('f4'), values.astype('f4'))

  def through(x, p):
    moved = m.update(slots, x, p, y, eta=0.5)
    return moved.keys.sum() + jnp.square(moved.values).sum()

  slopes = jax.grad(through, (0, 1))(x.astype('f4'), p.astype('f4'))
  chex.assert_trees_all_equal(slopes, jax.tree.map(jnp.zeros_like, slopes))


def test_labelled_images_have_no_slope_through_the_memorys_prediction():
  # Position addressing makes p̂ = v_y, a constant of the features.
  keys, values, x, _, y = (jnp.asarray(v) for v in sample())
  slots = m.Slots(keys.astype('f4'), values.astype('f4'))
  total = lambda x: jnp.square(m.assimilate(slots, x, y)).sum()
  slope = jax.grad(total)(x.astype('f4'))
  assert jnp.all(slope[:5] == 0)
  assert jnp.all(jnp.abs(slope[5:]).sum(-1) > 0)


def example(method, seed=0):
  """A state, and a batch of four given rows and twelve others."""
  images, labels = tiny.images()
  rows = np.concatenate(
    [
      np.flatnonzero(labels == 0)[:2],
      np.flatnonzero(labels == 1)[:2],
      np.flatnonzero(labels == 2)[:12],
    ]
  ).astype(np.int32)
  table = np.full(len(labels), UNLABELLED, np.int32)
  table[rows[:4]] = labels[rows[:4]]
  image = images.astype(np.float32) / 255
  state = init_state(
    method, tiny.NET, jax.random.key(seed), jnp.asarray(table), image[:4]
  )
  batch = Batch(jnp.asarray(rows), jnp.asarray(image[rows]), jnp.arange(16) < 4)
  return state, batch


def one_loss(method):
  state, batch = example(method)
  loss = method.stages[0].loss
  return jax.value_and_grad(loss, has_aux=True)(
    state.params, state, batch, jax.random.key(1)
  ), state


def numpy_loss(state, batch, key, eta, weight, smoothing):
  """Eq. 2, 7 and 10 from the network's outputs, loops in float64."""
  outputs, _ = tiny.NET.train(state.params, state.stats, batch.image, key)
  z = np.asarray(outputs.logits, np.float64)
  p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
  y = np.asarray(state.labels)[np.asarray(batch.rows)]
  y = np.where(np.asarray(batch.label_mask), y, UNLABELLED)
  _, _, _, entropies, divergences = numpy_step(
    np.asarray(state.memory.keys, np.float64),
    np.asarray(state.memory.values, np.float64),
    np.asarray(outputs.embedding, np.float64),
    p,
    y,
    eta,
  )
  classes = p.shape[1]
  cross = []
  for i in np.flatnonzero(y >= 0):
    t = np.full(classes, smoothing / classes)
    t[y[i]] += 1 - smoothing
    cross.append(-(t * np.log(p[i])).sum())
  return np.mean(cross) + weight * np.mean(entropies + divergences)


@pytest.mark.parametrize('seed', [0, 1])
def test_the_whole_loss_equals_a_numpy_loop_of_the_paper(seed):
  method = make(eta=0.3, weight=0.7, smoothing=0.1)
  state, batch = example(method, seed)
  # Slots that are neither empty nor uniform.
  rng = np.random.default_rng(seed)
  state = state.replace(
    memory=m.Slots(
      jnp.float32(rng.normal(size=(3, 5))),
      jnp.float32(rng.dirichlet(np.ones(3), 3)),
    )
  )
  key = jax.random.key(7)
  ours, _ = method.stages[0].loss(state.params, state, batch, key)
  want = numpy_loss(state, batch, key, 0.3, 0.7, 0.1)
  np.testing.assert_allclose(ours, want, rtol=1e-5)


def test_the_label_of_a_row_in_the_other_part_is_not_looked_at():
  method = make()
  state, batch = example(method)
  _, truth = tiny.images()
  include_labelled = state.replace(labels=jnp.asarray(truth))
  loss = lambda s: method.stages[0].loss(s.params, s, batch, jax.random.key(1))
  (ours, (after, _)), (known, (after_known, _)) = (
    loss(state),
    loss(include_labelled),
  )
  assert ours == known
  chex.assert_trees_all_equal(after.memory, after_known.memory)


def make(**arguments):
  return m.madnn(tiny.NET, lambda _: optax.sgd(0.1), tiny.DRAW, 1, **arguments)


def test_weight_zero_is_exactly_the_supervised_loss():
  ((ours, _), slopes), _ = one_loss(make(weight=0.0, smoothing=0.1))
  plain = supervised(
    tiny.NET, lambda _: optax.sgd(0.1), tiny.DRAW, 1, smoothing=0.1
  )
  ((theirs, _), expected), _ = one_loss(plain)
  assert ours == theirs
  chex.assert_trees_all_close(slopes, expected, rtol=1e-6, atol=1e-8)


def test_the_terms_add_up_and_can_be_left_out():
  ((full, (_, terms)), _), _ = one_loss(make(weight=2.0))
  ((no_entropy, _), _), _ = one_loss(make(weight=2.0, model_entropy=False))
  ((no_divergence, _), _), _ = one_loss(make(weight=2.0, divergence=False))
  cross, entropy, divergence = (
    float(terms[k]) for k in ('cross_entropy', 'model_entropy', 'divergence')
  )
  expected = [
    cross + 2 * (entropy + divergence),
    cross + 2 * divergence,
    cross + 2 * entropy,
  ]
  np.testing.assert_allclose(
    [full, no_entropy, no_divergence], expected, rtol=1e-6
  )


def test_a_class_absent_from_the_batch_keeps_its_slot():
  ((_, (after, _)), _), before = one_loss(make())
  # The labelled rows are of classes 0 and 1.
  chex.assert_trees_all_equal(
    (after.memory.keys[2], after.memory.values[2]),
    (before.memory.keys[2], before.memory.values[2]),
  )
  assert jnp.all(jnp.any(after.memory.keys[:2] != 0, axis=-1))


def test_the_memory_is_read_after_it_is_updated():
  # With η=2 and one image per class the value is v − 2(v−p)/2 = p, so the
  # labelled images' own divergence vanishes in the step that wrote it.
  x = jnp.ones([2, 3])
  p = jnp.array([[0.9, 0.1], [0.3, 0.7]])
  y = jnp.array([0, 1])
  slots = m.update(m.empty_slots(2, 3), x, p, y, eta=2.0)
  _, divergence = m.memory_terms(p, m.assimilate(slots, x, y))
  chex.assert_trees_all_close(divergence, jnp.zeros(2), atol=1e-6)


@pytest.mark.parametrize('bad', [0.0, -1.0, float('nan'), float('inf')])
@pytest.mark.parametrize('name', ['eta', 'weight', 'smoothing'])
def test_a_bad_hyper_parameter_is_refused_by_name(name, bad):
  if bad == 0.0 and name != 'eta':  # 0 leaves the term out
    (stage,) = make(**{name: bad}).stages
    assert stage.name == 'semi-supervised'
  else:
    with pytest.raises(InputError, match=f'^{name}={bad}: '):
      make(**{name: bad})


@pytest.mark.parametrize('batch_spec', [BatchSpec(0, 4), BatchSpec(4, 0)])
def test_both_parts_of_the_batch_are_needed(batch_spec):
  with pytest.raises(InputError, match='batch_'):
    m.madnn(tiny.NET, lambda _: optax.sgd(0.1), batch_spec, 1)


# The strong view.

LABELS = [1, -1, -1, 2, -1, -1, 0]
ROWS = [0, 3, 6, 1, 4, 5, 2]  # three labelled, four unlabelled
WEAK, STRONG = np.split(np.random.default_rng(0).normal(size=(11, 3)), [7])


def strong_example(**settings):
  """A method with a strong view, its state with full slots, and a batch."""
  settings = dict(strong_augment=('noise',), eta=0.3, smoothing=0.1) | settings
  method = logit_net.make_method(m.madnn, 3, 4, **settings)
  rng = np.random.default_rng(1)
  slots = m.Slots(
    jnp.float32(rng.normal(size=(3, 3))),
    jnp.float32(rng.dirichlet(np.ones(3), 3)),
  )
  state = logit_net.make_state(method, LABELS, 3).replace(memory=slots)
  batch = logit_net.make_batch(WEAK, labelled=3, rows=ROWS, strong=STRONG)
  return method, state, batch


def numpy_strong(state):
  """p̂ of the weak views, H(p̂), and the divergences of the views compared."""
  y = np.array(LABELS)[ROWS]
  old = (np.asarray(x, np.float64) for x in jax.tree.leaves(state.memory))
  keys, values, p_hat, entropies, divergences = numpy_step(
    *old, WEAK, logit_net.softmax(WEAK), y, 0.3
  )
  for b in range(4):  # the unlabelled images
    q = logit_net.softmax(STRONG[b])
    target = p_hat[3 + b]
    kl = sum(q[c] * np.log(q[c] / target[c]) for c in range(3))
    divergences[3 + b] = target.max() * kl
  return keys, values, p_hat, entropies, divergences


def test_the_loss_with_a_strong_view_equals_a_numpy_loop():
  method, state, batch = strong_example(weight=0.7)
  total, after, metrics = logit_net.call(method, state, batch)
  keys, values, _, entropies, divergences = numpy_strong(state)
  cross = []
  for b in range(3):
    t = np.full(3, 0.1 / 3)
    t[LABELS[ROWS[b]]] += 0.9
    cross.append(-(t * np.log(logit_net.softmax(WEAK[b]))).sum())
  want = np.mean(cross), np.mean(entropies), np.mean(divergences)
  got = [metrics[k] for k in ('cross_entropy', 'model_entropy', 'divergence')]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(total, np.dot([1, 0.7, 0.7], want), rtol=1e-5)
  np.testing.assert_allclose(after.memory.keys, keys, rtol=1e-5)
  np.testing.assert_allclose(after.memory.values, values, rtol=1e-5)
  both = np.concatenate([WEAK, STRONG]).mean()
  np.testing.assert_allclose(after.stats['mean'], both, rtol=1e-6)


def test_the_divergence_pulls_the_strong_view_alone():
  method, state, batch = strong_example(weight=2.0, model_entropy=False)
  slopes = logit_net.slopes(method, state, batch)
  _, _, p_hat, _, _ = numpy_strong(state)
  q, target = logit_net.softmax(STRONG), p_hat[3:]
  ratio = np.log(q / target)
  each = q * (ratio - (q * ratio).sum(-1, keepdims=True))
  want = 2 / 7 * target.max(-1, keepdims=True) * each  # a mean over 7 images
  np.testing.assert_allclose(slopes['strong'], want, rtol=1e-4, atol=1e-6)
  assert (slopes['image'][3:] == 0).all()
  assert (slopes['image'][:3] != 0).all()


def test_weight_zero_with_a_strong_view_is_exactly_the_supervised_loss():
  method, state, batch = strong_example(weight=0.0)
  total, _, metrics = logit_net.call(method, state, batch)
  plain = logit_net.make_method(supervised, 3, 0, smoothing=0.1)
  few = logit_net.make_batch(WEAK[:3], labelled=3, rows=ROWS[:3])
  theirs = logit_net.make_state(plain, LABELS, 3)
  want, _, _ = logit_net.call(plain, theirs, few)
  assert total == want == metrics['cross_entropy']


def test_there_is_no_strong_view_by_default():
  assert make().stages[0].views == ()
  (view,) = make(strong_augment=('noise',)).stages[0].views
  assert (view.name, view.rows) == ('strong', 'unlabelled')
