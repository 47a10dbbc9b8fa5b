import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import logit_net
import numpy as np
import pytest
import scipy.sparse.linalg

from ssljax.augment import mixup
from ssljax.core import UNLABELLED, init_state
from ssljax.distributed import placement
from ssljax.errors import InputError
from ssljax.methods import laplacenet as m


def sample(images=60, rows=70, classes=3, dim=4, seed=0):
  """Embeddings of length 1 around a direction per class, and a label table."""
  rng = np.random.default_rng(seed)
  truth = np.arange(images) % classes
  x = 2.5 * np.eye(classes, dim)[truth] + rng.normal(size=(images, dim))
  x = np.pad(x, ((0, rows - images), (0, 0)))  # padding
  norm = np.linalg.norm(x, axis=1, keepdims=True)
  x = x / np.where(norm > 0, norm, 1)
  labels = np.full(rows, UNLABELLED)
  labels[:9] = truth[:9]
  return x.astype(np.float32), labels, truth


def numpy_graph(x, images, k):
  """W [N, N] by the definition, in float64."""
  x = x[:images].astype(np.float64)
  w = np.zeros((images, images))
  for i in range(images):
    products = x @ x[i]
    products[i] = -np.inf
    for j in np.argsort(-products)[:k]:
      w[i, j] = max(products[j], 0)
  return np.maximum(w, w.T)


def numpy_propagation(x, labels, images, k, alpha, iterations, classes):
  w = numpy_graph(x, images, k)
  degree = w.sum(axis=1)
  scale = 1 / np.sqrt(np.where(degree > 0, degree, 1))
  system = np.eye(images) - alpha * scale[:, None] * w * scale[None]
  f = np.zeros((images, classes))
  for c in range(classes):
    y = (labels[:images] == c).astype(float)
    f[:, c], _ = scipy.sparse.linalg.cg(
      system, y, rtol=m.TOLERANCE, maxiter=iterations
    )
  f = np.maximum(f, 0)
  total = f.sum(axis=1, keepdims=True)
  return f / np.where(total > 0, total, 1)


def numpy_align(f, labels):
  f, classes = f.copy(), f.shape[1]
  known = labels >= 0
  wanted = [np.mean(labels[known] == c) for c in range(classes)]
  for _ in range(100):
    guess = f.argmax(axis=1)[~known]
    for c in range(classes):
      share = np.mean(guess == c)
      f[~known, c] *= np.clip(wanted[c] / (share + 1e-7), 0.99, 1.01)
    f /= f.sum(axis=1, keepdims=True)
  return f


def padded(values, rows):
  """Values [n, ...] followed by zeros."""
  missing = rows - len(values)
  return np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1))


@pytest.mark.parametrize('k', [3, 8])
def test_the_graph_equals_the_definition(k):
  x, _, _ = sample()
  graph = m.make_graph(jnp.asarray(x), jnp.arange(70) < 60, k)
  want = numpy_graph(x, 60, k)
  found = np.stack([graph @ row for row in jnp.eye(70)])
  np.testing.assert_allclose(found[:60, :60], want, rtol=1e-5, atol=1e-6)
  assert (found[60:] == 0).all() and (found[:, 60:] == 0).all()


@pytest.mark.parametrize('iterations', [2, 30])
def test_propagation_equals_scipy(iterations):
  x, labels, truth = sample()
  graph = m.make_graph(jnp.asarray(x), jnp.arange(70) < 60, 5)
  y = jax.nn.one_hot(labels, 3)
  found = m.normalised(
    jnp.maximum(m.propagate(graph, y, 0.99, iterations), 0.0)
  )
  want = numpy_propagation(x, labels, 60, 5, 0.99, iterations, 3)
  np.testing.assert_allclose(found[:60], want, rtol=1e-3, atol=1e-5)
  assert (found[60:] == 0).all()
  if iterations == 30:
    assert np.mean(want.argmax(axis=1) == truth) > 0.9


def test_alignment_equals_a_numpy_loop():
  rng = np.random.default_rng(3)
  f = rng.dirichlet([3.0, 1.0, 1.0], 60)  # class 0 is preferred
  labels = np.full(60, UNLABELLED)
  labels[:7] = [0, 1, 1, 2, 2, 2, 0]
  found = m.align(jnp.float32(f), jnp.asarray(labels), jnp.ones(60, bool))
  want = numpy_align(f, labels)
  known = labels >= 0
  np.testing.assert_allclose(found[~known], want[~known], rtol=2e-3)
  before = np.mean(f[~known].argmax(axis=1) == 0)
  after = np.mean(np.asarray(found)[~known].argmax(axis=1) == 0)
  assert abs(after - 2 / 7) < abs(before - 2 / 7)


def test_class_weights_by_hand():
  # Four images count: three of class 0, one of class 2. 1/size is 4/3 and 4:
  # their mean is (3·4/3 + 4)/4 = 2.
  label = jnp.array([0, 0, 2, 0, 1], jnp.int32)
  where = jnp.array([True, True, True, True, False])
  size = m.shares(label, where, 3)
  np.testing.assert_allclose(size, [0.75, 0, 0.25])
  np.testing.assert_allclose(
    m.class_weights(label, where, size), [2 / 3, 2 / 3, 2, 2 / 3, 0], rtol=1e-6
  )


def make(**settings):
  settings = dict(strong_augment=(), neighbours=5, pretrain=7) | settings
  return logit_net.make_method(m.laplacenet, 2, 3, **settings)


@pytest.mark.parametrize('balance', ['alignment', 'class_weights', 'none'])
def test_the_update_writes_the_pseudo_labels(balance):
  x, labels, _ = sample(images=60, rows=60)
  # The last image is alone: no label reaches it.
  x[-1] = [0, 0, 0, 1]
  x[:-1, 3] = 0
  x[:-1] /= np.linalg.norm(x[:-1], axis=1, keepdims=True)
  x[:-1] = np.abs(x[:-1])
  method = make(balance=balance)
  state = logit_net.make_state(method, labels, 3)
  state = method.stages[1].epoch_update(state, jnp.asarray(x))
  f = numpy_propagation(x, labels, 60, 5, 0.99, 30, 3)
  known, alone = labels >= 0, f.sum(axis=1) == 0
  assert alone[-1] and alone.sum() == 1
  if balance == 'alignment':
    f[~alone] = numpy_align(f[~alone], labels[~alone])
  label = np.where(known, labels, f.argmax(axis=1))
  np.testing.assert_array_equal(state.memory.label, label)
  weight = 1.0 - alone
  if balance == 'class_weights':
    sizes = np.bincount(label[~alone], minlength=3)
    weight = weight / sizes[label]
    weight /= weight[~alone].mean()
  np.testing.assert_allclose(state.memory.weight, weight, rtol=1e-5)
  np.testing.assert_allclose(state.memory.reached, 50 / 51, rtol=1e-6)
  shares = np.bincount(label[~alone], minlength=3) / 59
  np.testing.assert_allclose(state.memory.shares, shares, rtol=1e-5)


def test_the_graph_over_eight_devices_is_that_over_one():
  x, labels, _ = sample(rows=64)
  mesh = placement.make_mesh([8], 8)
  run = lambda x: m.propagate(
    m.make_graph(x, jnp.arange(64) < 60, 5), jax.nn.one_hot(labels, 3), 0.99, 30
  )
  one = jax.jit(run)(x)
  split = jax.device_put(x, NamedSharding(mesh, P('data')))
  eight = jax.jit(placement.on_mesh(run, mesh))(split)
  np.testing.assert_allclose(one, eight, rtol=1e-4, atol=1e-5)


def test_images_that_the_run_leaves_out_are_not_in_the_graph():
  x, labels, _ = sample(images=60, rows=60)
  out = np.arange(10, 60, 4)  # without a label
  some = np.setdiff1d(np.arange(60), out)
  x[out] = x[0]  # they would be near
  method = make()
  alone = logit_net.make_state(method, labels[some], 3)
  alone = method.stages[1].epoch_update(alone, jnp.asarray(x[some]))
  image, key = jnp.zeros([1, 1, 1, 3]), jax.random.key(0)
  state = init_state(
    method,
    logit_net.NET,
    key,
    jnp.asarray(labels, jnp.int32),
    image,
    admitted=jnp.asarray(some, jnp.int32),
  )
  shapes = jax.tree.map(jnp.shape, state.memory)
  state = method.stages[1].epoch_update(state, jnp.asarray(x))
  assert jax.tree.map(jnp.shape, state.memory) == shapes
  for name in ('label', 'weight'):
    np.testing.assert_array_equal(
      getattr(state.memory, name)[some], getattr(alone.memory, name)
    )
  assert (state.memory.weight[out] == 0).all()
  np.testing.assert_allclose(state.memory.shares, alone.memory.shares)
  np.testing.assert_allclose(state.memory.reached, alone.memory.reached)


def test_too_few_images_of_the_run_for_the_graph_are_refused():
  method = make(neighbours=3)
  labels, image = jnp.asarray(LABELS, jnp.int32), jnp.zeros([1, 1, 1, 3])
  with pytest.raises(InputError, match='neighbours=3: there are 3 images'):
    init_state(
      method,
      logit_net.NET,
      jax.random.key(0),
      labels,
      image,
      admitted=jnp.array([0, 3, 4], jnp.int32),
    )


# The loss.

LABELS = [1, -1, -1, 2, -1, -1]
ROWS = [0, 3, 1, 4, 5]  # two labelled, three unlabelled
WEAK = np.random.default_rng(0).normal(size=(2, 2, 3)) * 2  # sample, row
STRONG = np.random.default_rng(1).normal(size=(2, 3, 3)) * 2


def batch():
  first = np.concatenate([WEAK[0], np.full((3, 3), 99.0)])  # never used
  views = dict(weak1=WEAK[1], strong0=STRONG[0], strong1=STRONG[1])
  return logit_net.make_batch(first, labelled=2, rows=ROWS, **views)


def with_memory(state):
  memory = state.memory.replace(
    label=jnp.array([0, 2, 0, 0, 1, 0], jnp.int32),
    weight=jnp.array([9.0, 0.5, 0, 9.0, 2.0, 0.0]),
  )
  return state.replace(memory=memory)


@pytest.mark.parametrize('alpha', [0.0, 1.0])
def test_the_loss_equals_a_numpy_loop(alpha):
  method = make(samples=2, mixup_alpha=alpha)
  state = with_memory(logit_net.make_state(method, LABELS, 3))
  total, after, metrics = logit_net.call(method, state, batch())
  labels, weights = [1, 2, 2, 1, 0], [1, 1, 0.5, 2, 0]
  partner, lam = range(5), 1.0
  if alpha:
    # The keys of `logit_net.call` and of the loss.
    key = jax.random.split(logit_net.KEY)[1]
    mix = mixup.draw_mix(key, 5, alpha, dominant=False, per_row=False)
    partner, lam = np.asarray(mix.partner), float(mix.weight[0])
  terms, own, pixels = [], [], []
  for k in range(2):
    images = [*WEAK[k], *STRONG[k]]
    for i, j in enumerate(partner):
      x = lam * images[i] + (1 - lam) * images[j]
      one, two = (
        weights[n] * logit_net.cross_entropy(x, labels[n]) for n in (i, j)
      )
      terms.append(lam * one + (1 - lam) * two)
      own.append(one)
      pixels.append(x)
  np.testing.assert_allclose(total, np.mean(terms), rtol=1e-4)
  own = np.reshape(own, (2, 5)).mean(axis=0)
  np.testing.assert_allclose(metrics['of_labelled'], own[:2].mean(), rtol=1e-4)
  np.testing.assert_allclose(
    metrics['of_pseudo_labelled'], own[2:].mean(), rtol=1e-4
  )
  np.testing.assert_allclose(after.stats['mean'], np.mean(pixels), rtol=1e-4)


def test_the_first_stage_learns_from_the_labelled_images_alone():
  method = make(samples=2, mixup_alpha=0.0)
  first, second = method.stages
  assert (first.steps, first.batch_spec.unlabelled) == (7, 0)
  assert [v.name for v in first.views] == ['weak1']
  assert second.keep_optimizer and second.per_example
  state = logit_net.make_state(method, LABELS, 3)
  few = logit_net.make_batch(WEAK[0], labelled=2, rows=ROWS[:2], weak1=WEAK[1])
  total, _ = first.loss(state.params, state, few, logit_net.KEY)
  terms = [
    logit_net.cross_entropy(WEAK[k][b], LABELS[ROWS[b]])
    for k in range(2)
    for b in range(2)
  ]
  np.testing.assert_allclose(total, np.mean(terms), rtol=1e-5)


def test_images_that_no_label_reaches_have_no_gradient():
  method = make(samples=2, mixup_alpha=0.0)
  state = with_memory(logit_net.make_state(method, LABELS, 3))
  slopes = logit_net.slopes(method, state, batch())
  for name in ('strong0', 'strong1'):
    assert (slopes[name][:2] != 0).all() and (slopes[name][2] == 0).all()
  assert (slopes['image'][2:] == 0).all() and (slopes['weak1'] != 0).all()


def test_more_neighbours_than_images_are_refused():
  method = make(neighbours=6)
  with pytest.raises(InputError, match='neighbours=6: there are 6 images'):
    logit_net.make_state(method, LABELS, 3)


@pytest.mark.parametrize(
  'settings',
  [
    dict(pretrain=0),
    dict(neighbours=0),
    dict(propagation_alpha=1.0),
    dict(iterations=0),
    dict(mixup_alpha=-1.0),
    dict(samples=0),
  ],
)
def test_bad_settings_are_named(settings):
  ((name, value),) = settings.items()
  with pytest.raises(InputError, match=f'{name}={value}'):
    make(**settings)
