import logit_net
import numpy as np
import pytest

from ssljax.errors import InputError
from ssljax.methods.pi_model import pi_model

LABELS = [1, -1, -1, 2]
ROWS = [0, 3, 1, 2]  # two labelled, two unlabelled
ONE = np.array([[0.3, 1.0, -0.4], [0.9, 0.1, 0.2], [0, 1, 5], [0.5, 0.6, 0.4]])
TWO = np.array([[0.1, 0.7, 0.2], [1.2, 0.0, 0.3], [1, 0, 3], [-0.5, 0.2, 0.9]])


def make(**settings):
  return logit_net.make_method(pi_model, 2, 2, **settings)


def batch(step=0):
  return logit_net.make_batch(ONE, labelled=2, rows=ROWS, step=step, second=TWO)


@pytest.mark.parametrize('step', [0, 10, 40, 90])
def test_the_loss_equals_a_numpy_loop(step):
  method = make(weight=7.0, ramp=0.4, steps=100)
  state = logit_net.make_state(method, LABELS, 3)
  total, after, metrics = logit_net.call(method, state, batch(step))
  labelled = np.mean(
    [logit_net.cross_entropy(ONE[b], LABELS[ROWS[b]]) for b in range(2)]
  )
  distance = 0.0
  for b in range(4):
    z, z_tilde = logit_net.softmax(ONE[b]), logit_net.softmax(TWO[b])
    distance += sum((z[c] - z_tilde[c]) ** 2 for c in range(3)) / (3 * 4)
  ramp = np.exp(-5 * (1 - step / 40) ** 2) if step < 40 else 1.0
  np.testing.assert_allclose(metrics['weight'], 7 * ramp, rtol=1e-5)
  np.testing.assert_allclose(metrics['consistency'], distance, rtol=1e-5)
  np.testing.assert_allclose(total, labelled + 7 * ramp * distance, rtol=1e-5)
  # Both passes are one batch.
  want = np.concatenate([ONE, TWO]).mean()
  np.testing.assert_allclose(after.stats['mean'], want, rtol=1e-6)


def test_gradients_flow_through_both_passes():
  method = make(weight=7.0, ramp=0.0)
  state = logit_net.make_state(method, LABELS, 3)
  slopes = logit_net.slopes(method, state, batch())
  # ∂/∂z̃_k of 7/(3·4) Σ_c (z_c − z̃_c)², through the softmax of z̃.
  for b in range(4):
    z, z_tilde = logit_net.softmax(ONE[b]), logit_net.softmax(TWO[b])
    outer = 2 * 7 / 12 * (z_tilde - z)
    want = z_tilde * (outer - (outer * z_tilde).sum())
    np.testing.assert_allclose(slopes['second'][b], want, rtol=1e-4, atol=1e-6)
    if b >= 2:  # without a label
      want = z * (-outer + (outer * z).sum())
      np.testing.assert_allclose(slopes['image'][b], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('settings', [dict(weight=-1.0), dict(ramp=1.5)])
def test_bad_settings_are_named(settings):
  ((name, value),) = settings.items()
  with pytest.raises(InputError, match=f'{name}={value}'):
    make(**settings)
