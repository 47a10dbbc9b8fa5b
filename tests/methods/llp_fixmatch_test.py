import jax.numpy as jnp
import logit_net
import numpy as np
import pytest

from ssljax.core import UNLABELLED
from ssljax.errors import InputError
from ssljax.methods.llp_fixmatch import llp_fixmatch
from ssljax.methods.supervised import supervised

C, L, U, TAU, M = 3, 2, 4, 0.4, 0.3  # M: bank momentum
LABELS = [1, -1, -1, 2, -1, -1, 0, -1, 1]
# Two labelled rows; among the unlabelled ones is image 6, which has a label,
# and image 4 twice.
ROWS = [0, 3, 1, 4, 6, 4]
RNG = np.random.default_rng(1)
WEAK = RNG.normal(size=(L + U, C))
STRONG = RNG.normal(size=(U, C))
SMALL = dict(neighbours=3, density_neighbours=4, temperature=TAU)


def make(**settings):
  given = SMALL | dict(strong_augment=(), bank_momentum=M) | settings
  return logit_net.make_method(llp_fixmatch, L, U, **given)


def batch():
  return logit_net.make_batch(WEAK, labelled=L, rows=ROWS, strong=STRONG)


def example(method):
  """The state with a random bank, in which some images have pseudo-labels."""
  state = logit_net.make_state(method, LABELS, C)
  rng = np.random.default_rng(2)
  rows = rng.normal(size=(len(LABELS), C))
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  labels = np.asarray(state.memory.labels).copy()
  labels[[0, 3, 6, 8]] = [1, 2, 0, 1]
  labels[[4, 5]] = [2, 0]  # the others are classes of their own
  known = np.asarray(state.memory.known_rows)
  memory = state.memory.replace(
    rows=jnp.float32(rows),
    labels=jnp.asarray(labels),
    confidence=jnp.float32(rng.random(len(LABELS))),
    known=jnp.float32(rows[known]),
    log_density=jnp.float32(rng.normal(size=len(known))),
  )
  return state.replace(memory=memory)


def numpy_step(state, threshold, k=3):
  """Steps 1 to 3 of the docstring: loops over images, float64."""
  bank = np.asarray(state.memory.rows, np.float64)
  labels = np.asarray(state.memory.labels)
  sure = np.asarray(state.memory.confidence, np.float64)
  rho = np.exp(np.asarray(state.memory.log_density, np.float64))
  known = np.asarray(state.memory.known_rows)
  unit = lambda x: x / np.sqrt(x @ x)
  found = []  # (y, c) of the rows of the batch
  for b, image in enumerate(ROWS):
    v = unit(WEAK[b])
    votes = sorted(
      (np.exp(bank[i] @ v / TAU) / rho[j], LABELS[i])
      for j, i in enumerate(known)
    )[-k:]
    shares = [sum(w for w, y in votes if y == c) for c in range(C)]
    shares = np.array(shares) / sum(shares)
    own = LABELS[image]
    found.append(
      (shares.argmax(), shares.max()) if own == UNLABELLED else (own, 1.0)
    )
  cross = [logit_net.cross_entropy(WEAK[b], LABELS[ROWS[b]]) for b in range(L)]
  masks = [c >= threshold for _, c in found[L:]]
  consistency = [
    mask * logit_net.cross_entropy(STRONG[b], found[L + b][0])
    for b, mask in enumerate(masks)
  ]
  aggregation = []
  for b, image in enumerate(ROWS):
    p = np.exp(bank @ unit(WEAK[b]) / TAU)
    a = p[labels == labels[image]].sum() / p.sum()
    aggregation.append(-sure[image] * np.log(a + 1e-7))
  new, new_labels, new_sure = bank.copy(), labels.copy(), sure.copy()
  for b, image in enumerate(ROWS):
    if image not in ROWS[:b]:
      new[image] = unit(M * bank[image] + (1 - M) * unit(WEAK[b]))
      new_labels[image], new_sure[image] = found[b]
  terms = np.mean(cross), np.mean(consistency), np.mean(aggregation)
  return terms, masks, found, (new, new_labels, new_sure)


@pytest.mark.parametrize('threshold', [0.0, 0.7, 0.95])
def test_a_step_equals_a_numpy_loop(threshold):
  method = make(threshold=threshold, weight=0.7, aggregation_weight=0.4)
  state = example(method)
  total, after, metrics = logit_net.call(method, state, batch())
  terms, masks, found, (bank, labels, sure) = numpy_step(state, threshold)
  assert np.mean(masks) == {0.0: 1.0, 0.7: 0.75, 0.95: 0.25}[threshold]
  got = [metrics[k] for k in ('cross_entropy', 'consistency', 'aggregation')]
  np.testing.assert_allclose(got, terms, rtol=1e-5)
  np.testing.assert_allclose(total, np.dot([1, 0.7, 0.4], terms), rtol=1e-5)
  np.testing.assert_allclose(metrics['mask'], np.mean(masks), rtol=1e-6)
  unknown = [c for (_, c), i in zip(found, ROWS, strict=True) if LABELS[i] < 0]
  np.testing.assert_allclose(metrics['confidence'], np.mean(unknown), rtol=1e-5)
  np.testing.assert_allclose(after.memory.rows, bank, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(after.memory.labels, labels)
  np.testing.assert_allclose(after.memory.confidence, sure, rtol=1e-5)
  known = np.asarray(after.memory.known_rows)
  np.testing.assert_allclose(after.memory.known, bank[known], rtol=1e-5)


def test_pseudo_labels_have_gradients_through_confident_strong_views_alone():
  method = make(threshold=0.7, weight=2.0, aggregation_weight=0.0)
  state = example(method)
  slopes = logit_net.slopes(method, state, batch())
  _, masks, found, _ = numpy_step(state, 0.7)
  # dCE/dlogits = p − onehot, over the 4 unlabelled rows, with weight 2.
  onehot = np.eye(C)[[y for y, _ in found[L:]]]
  want = 2 / U * np.array(masks)[:, None] * (logit_net.softmax(STRONG) - onehot)
  np.testing.assert_allclose(slopes['strong'], want, rtol=1e-4, atol=1e-7)
  assert (slopes['image'][L:] == 0).all()
  assert (slopes['image'][:L] != 0).all()


def test_aggregation_has_gradients_through_weak_views_alone():
  method = make(weight=0.0)
  slopes = logit_net.slopes(method, example(method), batch())
  assert (slopes['strong'] == 0).all()
  assert (np.abs(slopes['image']).max(axis=1) > 0).all()


def test_without_unlabelled_weights_the_loss_is_the_supervised_one():
  method = make(weight=0.0, aggregation_weight=0.0)
  total, _, metrics = logit_net.call(method, example(method), batch())
  alone = logit_net.make_method(supervised, L, 0)
  few = logit_net.make_batch(WEAK[:L], labelled=L, rows=ROWS[:L])
  state = logit_net.make_state(alone, LABELS, C)
  want, _, _ = logit_net.call(alone, state, few)
  assert total == want == metrics['cross_entropy']  # the same bits


def test_all_views_are_one_batch_for_the_statistics():
  method = make()
  _, after, _ = logit_net.call(method, example(method), batch())
  want = np.concatenate([WEAK, STRONG]).mean()
  np.testing.assert_allclose(after.stats['mean'], want, rtol=1e-6)


def test_the_densities_are_computed_before_each_epoch():
  (stage,) = make().stages
  state = example(make())
  after = stage.epoch_update(state, None)
  bank = np.asarray(state.memory.rows, np.float64)
  known = np.asarray(state.memory.known_rows)
  # The four largest products of each labelled row, its own among them.
  values = np.sort(np.exp(bank[known] @ bank.T / TAU), axis=1)[:, -4:]
  np.testing.assert_allclose(
    after.memory.log_density, np.log(values.sum(1)), rtol=1e-5
  )
  assert stage.every == 1


def test_acquired_labels_get_a_vote():
  method = make()
  state = example(method)
  memory = state.memory
  # A table with a place for another label, as `MemorySpec.extra` gives it.
  pad = lambda x, value: jnp.pad(
    x, ((0, 1), *[(0, 0)] * (x.ndim - 1)), constant_values=value
  )
  state = state.replace(
    memory=memory.replace(
      known=pad(memory.known, 0),
      known_rows=pad(memory.known_rows, len(LABELS)),
      known_classes=pad(memory.known_classes, UNLABELLED),
      log_density=pad(memory.log_density, 0),
    )
  )
  after = method.add_labels(state, jnp.int32([5]), jnp.int32([2]))
  np.testing.assert_array_equal(after.memory.known_rows, [0, 3, 5, 6, 8])
  np.testing.assert_array_equal(after.memory.known_classes, [1, 2, 2, 0, 1])


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(threshold=1.5), 'threshold=1.5'),
    (dict(weight=-1.0), 'weight=-1.0'),
    (dict(aggregation_weight=-1.0), 'aggregation_weight=-1.0'),
    (dict(temperature=0.0), 'temperature=0.0'),
    (dict(bank_momentum=1.0), 'bank_momentum=1.0'),
    (dict(neighbours=0), 'neighbours=0'),
    (dict(density_neighbours=0), 'density_neighbours=0'),
    (dict(steps=0), 'steps=0'),
  ],
)
def test_bad_settings_are_named(settings, message):
  with pytest.raises(InputError, match=message):
    make(**settings)


def test_too_few_labelled_images_are_refused():
  with pytest.raises(InputError, match='neighbours=5: there are 4 labelled'):
    logit_net.make_state(make(neighbours=5), LABELS, C)
