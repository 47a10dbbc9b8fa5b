"""The properties that all consistency methods share."""

import inspect

import logit_net
import numpy as np
import pytest

from ssljax import registry
from ssljax.core import DEFAULT_VIEW, BatchSpec
from ssljax.errors import InputError
from ssljax.methods import consistency
from ssljax.methods.supervised import supervised

LABELS = [1, -1, -1, 2, -1, -1, 0]
ROWS = [0, 3, 6, 1, 4, 5, 2]  # three labelled, four unlabelled
LOGITS = np.random.default_rng(0).normal(size=(7, 3)) * 3
# Settings with which nothing is learned from unlabelled images.
WITHOUT = {
  'pseudo_label': dict(weight=0.0),
  'pi_model': dict(weight=0.0),
  'temporal_ensembling': dict(weight=0.0),
  'mean_teacher': dict(weight=0.0),
  'vat': dict(weight=0.0, entropy_weight=0.0),
  'ict': dict(weight=0.0),
  'mixmatch': dict(weight=0.0, alpha=0.0),
  'uda': dict(weight=0.0),
  'fixmatch': dict(weight=0.0),
  'flexmatch': dict(weight=0.0),
  'freematch': dict(weight=0.0, fairness_weight=0.0),
  'softmatch': dict(weight=0.0),
}
FACTORIES = {name: registry.METHODS[name].factory for name in WITHOUT}
STRONG = [
  name
  for name, factory in FACTORIES.items()
  if 'strong_augment' in inspect.signature(factory).parameters
]


def make(name, **settings):
  if name in STRONG:
    settings = dict(strong_augment=()) | settings
  return logit_net.make_method(FACTORIES[name], 3, 4, **settings)


def make_batch(method):
  """A batch with all views of a method."""
  rng = np.random.default_rng(1)
  (stage,) = method.stages
  views = {}
  for view in stage.views:
    part = stage.batch_spec.part(view.rows)
    views[view.name] = rng.normal(size=(part.stop - part.start, 3)) * 3
  return logit_net.make_batch(LOGITS, labelled=3, rows=ROWS, step=50, **views)


@pytest.mark.parametrize('name', WITHOUT)
def test_without_unlabelled_weight_the_loss_is_the_supervised_one(name):
  method = make(name, **WITHOUT[name])
  state = logit_net.make_state(method, LABELS, 3)
  total, _, metrics = logit_net.call(method, state, make_batch(method))
  alone = logit_net.make_method(supervised, 3, 0)
  few = logit_net.make_batch(LOGITS[:3], labelled=3, rows=ROWS[:3])
  want, _, _ = logit_net.call(
    alone, logit_net.make_state(alone, LABELS, 3), few
  )
  assert total == want  # the same bits
  assert metrics['cross_entropy'] == want


@pytest.mark.parametrize('name', WITHOUT)
def test_unlabelled_images_change_the_loss_by_default(name):
  method = make(name)
  state = logit_net.make_state(method, LABELS, 3)
  batch = make_batch(method)
  # Ensembles and teachers differ from the student after a step.
  _, state, _ = logit_net.call(method, state, batch)
  batch = batch._replace(image=batch.image[..., ::-1])
  total, _, metrics = logit_net.call(method, state, batch)
  assert abs(total - metrics['cross_entropy']) > 1e-4


@pytest.mark.parametrize('name', STRONG)
def test_the_strong_view_is_of_the_unlabelled_rows_and_after_the_weak_one(name):
  settings = dict(strong_augment=('noise',))
  (stage,) = make(name, **settings).stages
  (view,) = stage.views
  assert (view.name, view.rows) == ('strong', 'unlabelled')
  assert view.after_run and view.augment and view.on_pixels is None


def test_an_unknown_strong_augmentation_is_named_with_its_setting():
  with pytest.raises(InputError, match='strong_augment=blurr'):
    consistency.strong_view(('blurr',))


def test_randaugment_of_the_strong_view_precedes_the_preprocessing():
  view = consistency.strong_view(('randaugment:2:10', 'cutout:0.5'))
  assert view.on_pixels and view.augment


def test_no_strong_augmentation_is_a_second_weak_view():
  view = consistency.strong_view(())
  assert view.augment is None and view.on_pixels is None
  assert view.name != DEFAULT_VIEW


@pytest.mark.parametrize('name', WITHOUT)
@pytest.mark.parametrize(
  ('labelled', 'unlabelled', 'message'),
  [(0, 4, 'batch_labelled=0'), (3, 0, 'batch_unlabelled=0')],
)
def test_a_batch_without_one_of_its_parts_is_refused(
  name, labelled, unlabelled, message
):
  with pytest.raises(InputError, match=message):
    FACTORIES[name](
      logit_net.NET, lambda steps: None, BatchSpec(labelled, unlabelled), 10
    )


def test_sharpening_by_hand():
  # (0.5, 0.3, 0.2)^2 = (0.25, 0.09, 0.04), sum 0.38.
  found = consistency.sharpen(np.float32([[0.5, 0.3, 0.2], [1, 0, 0]]), 0.5)
  want = [[0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38], [1, 0, 0]]
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize('name', ['fixmatch', 'uda', 'mixmatch'])
def test_a_logit_adjustment_changes_the_supervised_loss_alone(name):
  method = make(name, **WITHOUT[name])
  state = logit_net.make_state(method, LABELS, 3)
  prior = np.float32([0.5, -1.0, 2.0])
  batch = make_batch(method)._replace(prior_logits=prior)
  total, _, _ = logit_net.call(method, state, batch)
  known = zip(LOGITS[:3] + prior, [1, 2, 0], strict=True)
  wanted = np.mean([logit_net.cross_entropy(*pair) for pair in known])
  assert total == pytest.approx(wanted, rel=1e-5)


ALIGNED = ('fixmatch', 'flexmatch', 'uda', 'pseudo_label', 'mixmatch')


@pytest.mark.parametrize('name', ALIGNED)
def test_alignment_follows_the_average_of_the_predictions(name):
  method = make(name, distribution_alignment=True)
  state = logit_net.make_state(method, LABELS, 3)
  np.testing.assert_allclose(state.predicted, [1 / 3] * 3, rtol=1e-6)
  batch = make_batch(method)
  q = logit_net.softmax(LOGITS[3:])  # of the weak views
  if name == 'mixmatch':
    second = np.asarray(batch.views['second']).reshape(4, 3)
    q = (q + logit_net.softmax(second.astype(float))) / 2
  _, after, _ = logit_net.call(method, state, batch)
  old = state.predicted
  wanted = 0.99 * np.asarray(old) + 0.01 * q.mean(axis=0)
  np.testing.assert_allclose(after.predicted, wanted, rtol=1e-5)
  _, after, _ = logit_net.call(method, state, batch._replace(step=0))
  np.testing.assert_allclose(after.predicted, q.mean(axis=0), rtol=1e-5)


def test_alignment_by_hand():
  method = make('fixmatch', distribution_alignment=True)
  # Two labels of class 0, one of class 1 and none, which counts as one, of 2.
  state = logit_net.make_state(method, [0, -1, 1, 0], 3)
  state = state.replace(predicted=np.float32([0.2, 0.3, 0.5]))
  q = np.float32([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
  wanted = q * ([0.5, 0.25, 0.25] / np.array([0.2, 0.3, 0.5]))
  wanted /= wanted.sum(axis=1, keepdims=True)
  found = consistency.aligned(q, state)
  np.testing.assert_allclose(found, wanted, rtol=1e-4)
  logits = consistency.aligned_logits(np.log(q), state)
  np.testing.assert_allclose(logit_net.softmax(logits), wanted, rtol=1e-4)


def test_without_alignment_predictions_and_state_are_the_same_objects():
  method = make('fixmatch')
  state = logit_net.make_state(method, LABELS, 3)
  assert state.predicted == ()
  q = np.float32([[0.5, 0.3, 0.2]])
  found, after = consistency.align(q, state, make_batch(method))
  assert found is q and after is state
