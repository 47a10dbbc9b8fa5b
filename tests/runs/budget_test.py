"""Lengths that fit into a time budget."""

import functools
import json
import types

import numpy as np
import optax
import pytest
import tiny

import ssljax
from ssljax import api, config
from ssljax.errors import InputError
from ssljax.runs import budget
from ssljax.training import guard, rehearsal
from ssljax.training.job import Options

# A step takes 10 ms, an evaluation 1 s, compiling a stage 2 s.
STAGE = rehearsal.StageCost(2.0, 0.01, 0.0, 1.0, 0.0, 4)
COST = rehearsal.JobCost(1.0, 0.5, (STAGE,))


def test_all_lengths_keep_their_proportions():
  values = {
    'steps': 300,
    'pretrain': 1500,
    'repeat': 240,
    'interval': 60,
    'finetune': 0,
    'epochs': None,
    'decay_at': (100, 200),
    'eta': 0.5,
  }
  assert budget.lengths(values, 0.5) == {
    'steps': 150,
    'pretrain': 750,
    'repeat': 120,
    'interval': 30,
    'decay_at': (50, 100),
  }
  # Four parts of 60 · 0.112 = 6.72 steps become four of 7.
  found = budget.lengths(values, 0.112)
  assert found['interval'] == 7 and found['repeat'] == 28
  assert budget.lengths({'epochs': 3, 'steps': None}, 0.5) == {'epochs': 1.5}
  assert budget.lengths({'steps': 3}, 0.01) == {'steps': 1}


def test_the_momentum_of_batch_norm_follows_the_length():
  made = config.from_values('supervised', {'network': 'digits', 'steps': 600})
  assert made.network.bn_momentum == pytest.approx(0.99)
  # 1 - 6 / 60
  shorter = budget.scaled(made, 0.1)
  assert shorter.run.steps == 60
  assert shorter.network.bn_momentum == pytest.approx(0.9)


def test_the_time_of_a_method_is_the_sum_of_its_parts():
  method = tiny.METHODS['supervised'](lambda *_, **__: optax.sgd(0.1), 1000)
  of = functools.partial(budget.seconds_of, method, COST)
  # Compiling 1 + 2; for each of 3 jobs: start 0.5, 1000 steps of 0.01, 10
  # evaluations and one at the end, a checkpoint.
  expected = 3 + 3 * (0.5 + 10 + 11 + 0.5)
  assert of(1.0, 3, None) == pytest.approx(expected)
  # Half the steps, with an evaluation every 100.
  expected = 3 + 3 * (0.5 + 5 + 6 + 0.5)
  assert of(0.5, 3, 100) == pytest.approx(expected)


def test_stages_of_equal_cost_are_measured_once():
  method = tiny.METHODS['r2d2'](lambda *_, **__: optax.sgd(0.1), 4)
  names = [stage.name for stage in method.stages]
  assert names == ['supervised', 'decipher', 'repeat 1', 'finetune']
  assert rehearsal.kinds(method) == [0, 1, 1, 3]


def test_a_rehearsal_measures_every_stage_and_trains_nothing_longer():
  job = tiny.make_job('llp', shared=False)
  options = Options(evaluate_every=2, record_every=2)
  cost = rehearsal.measure(job.program, job.splits, options, seconds=0.01)
  warm, propagation = cost.stages
  assert all(s.step > 0 and s.evaluation > 0 for s in cost.stages)
  assert warm.compiling > warm.step and propagation.update > 0
  # 61 rows, of which batches take 8 and 8.
  assert warm.epoch_steps >= 61 // 16


def test_a_rehearsal_does_not_warn_of_a_collapse(caplog, monkeypatch):
  """The few timed steps of a stage say nothing about its end."""
  always = lambda *_: ['seed 0: 100% of 9 images are predicted as class 3']
  monkeypatch.setattr(guard, 'collapses', always)
  job = tiny.make_job('supervised', shared=False)
  options = Options(evaluate_every=2, record_every=2)
  rehearsal.measure(job.program, job.splits, options, seconds=0.01)
  assert not caplog.records


def fit(folder, **settings):
  images, labels = tiny.images()
  return ssljax.fit(
    images,
    np.where(np.arange(len(labels)) < 24, labels, -1),
    method='supervised',
    network='linear',
    preprocess='none',
    workdir=folder,
    progress=False,
    **settings,
  )


def test_a_run_takes_its_lengths_from_its_record(tmp_path, monkeypatch):
  slow = COST._replace(stages=(STAGE._replace(step=0.1),))
  monkeypatch.setattr(rehearsal, 'measure', lambda *_: slow)
  for module in (api, budget):
    clock = types.SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr(module, 'time', clock)
  model = fit(tmp_path / 'run', minutes=0.5)
  steps = model.config.run.steps
  # 30 s = 3 at the end + 3 to compile + 0.5 + 0.5 + 11 evaluations + steps.
  assert steps == pytest.approx((30 - 18) / 0.1, abs=1)
  assert model.result['steps'] == steps
  record = json.loads((tmp_path / 'run/config.json').read_text())
  assert record['run']['steps'] == steps and record['run']['minutes'] == 0.5
  assert '--minutes' not in (tmp_path / 'run/flags.txt').read_text()

  def refuse(*_):
    raise AssertionError('measured again')

  monkeypatch.setattr(rehearsal, 'measure', refuse)
  again = fit(tmp_path / 'run', minutes=0.5)
  assert again.config.run.steps == steps
  with pytest.raises(InputError, match=r'minutes=0.5 there, minutes=9'):
    fit(tmp_path / 'run', minutes=9)


@pytest.mark.parametrize(
  ('settings', 'expected'),
  [
    ({'minutes': 0.1}, r'minutes=0.1: supervised under 1 split need at least'),
    ({'minutes': -1}, 'minutes=-1.0: give a number above 0'),
    ({'minutes': 1, 'steps': 5}, 'minutes=1, steps=5: the budget decides'),
    ({'minutes': 1, 'acquire': 'random'}, 'minutes=1, acquire=random: the'),
  ],
)
def test_a_budget_that_cannot_be_is_one_line(settings, expected, monkeypatch):
  monkeypatch.setattr(rehearsal, 'measure', lambda *_: COST)
  with pytest.raises(InputError, match=expected):
    fit(None, **settings)
