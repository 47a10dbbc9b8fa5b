"""`fit(method='auto')`: the choice, the final training and its record."""

import json

from flax import linen as nn
import numpy as np
import pytest

import ssljax
from ssljax import automatic
from ssljax.data import arrays
from ssljax.runs import auto


class Linear(nn.Module):
  """A network that compiles quickly."""

  @nn.compact
  def __call__(self, x):
    x = x.reshape(len(x), -1)
    return nn.Dense(2)(x), x


def make_rows(rows=60, known=20, seed=0):
  """Features `[rows, 3]` of two classes, and the labels of the first rows."""
  rng = np.random.default_rng(seed)
  truth = np.arange(rows) % 2
  x = rng.normal(size=(rows, 3)) + 2.5 * truth[:, None]
  labels = np.where(np.arange(rows) < known, truth, -1)
  return x.astype(np.float32), labels, truth


QUICK = dict(network=Linear(), progress=False)


def test_the_best_of_three_is_trained_on_all_labels(tmp_path):
  x, labels, truth = make_rows()
  fit = lambda: ssljax.fit(
    x, labels, method='auto', steps=20, workdir=tmp_path / 'run', **QUICK
  )
  model = fit()
  record = model.result['auto']
  assert json.loads((tmp_path / 'run/auto.json').read_text()) == record
  compared = {each['method']: each for each in record['compared']}
  assert set(compared) == set(auto._OF_FEATURES)
  # A fifth of ten labels of each class: 2 x 2 images.
  assert {each['images'] for each in compared.values()} == {4}
  least = min(each['error'] for each in compared.values())
  assert compared[record['chosen']]['error'] == least
  assert model.config.method == record['chosen']
  split = json.loads((tmp_path / 'run/split.json').read_text())
  assert len(split['splits'][0]['labelled']) == 20
  assert model.evaluate(x, truth).accuracy > 0.8
  for name in compared:
    there = tmp_path / 'run/candidates' / name / 'split.json'
    assert len(json.loads(there.read_text())['splits'][0]['labelled']) == 16
  # The same call trains nothing again.
  written = lambda: (tmp_path / 'run/metrics.jsonl').stat().st_mtime_ns
  before = written()
  again = fit()
  assert written() == before
  np.testing.assert_array_equal(again.logits(x), model.logits(x))


def test_copies_of_compared_images_are_not_trained_on():
  x, labels, _ = make_rows()
  twice = np.concatenate([x, x])
  source = arrays.from_arrays(
    twice, np.concatenate([labels, np.full(len(x), -1)])
  ).train
  held, rest = automatic._held_out(source, 0)
  assert len(held) == 4 and len(rest) == 2 * len(x) - 8
  assert not set(held % len(x)) & set(rest % len(x))


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'validation': 3}, "validation=3: method='auto' holds out labels itself"),
    ({'minutes': -1}, 'minutes=-1: give a number above 0'),
    (
      {'minutes': 0.001},
      r"minutes=0.001: a training of method='auto' gets 0.00012 of them, and "
      'needs .* here: give minutes=',
    ),
  ],
)
def test_wrong_use_is_refused(settings, message):
  x, labels, _ = make_rows()
  with pytest.raises(ssljax.InputError, match=message):
    ssljax.fit(x, labels, method='auto', **QUICK, **settings)


def test_one_label_of_each_class_is_too_few():
  x, labels, _ = make_rows(known=2)
  with pytest.raises(ssljax.InputError, match='no class has two of the 2'):
    ssljax.fit(x, labels, method='auto', steps=5, **QUICK)
