"""Which candidates of `--method=auto` are trained, and for how long."""

import pytest

from ssljax.cli import auto_command
from ssljax.config import from_values
from ssljax.errors import InputError
from ssljax.runs import auto, budget


@pytest.fixture
def trained(monkeypatch, tmp_path):
  """Train nothing; fail below the minutes that each method needs."""
  calls = []

  def train(needs, minutes):
    def fake(config, dataset, began):
      del dataset, began
      if config.run.minutes < needs[config.method]:
        raise budget.TooSmallError('too small', needs[config.method])
      calls.append((config.method, round(config.run.minutes, 4)))

    configs = {
      name: from_values(
        name,
        {
          'minutes': auto.minutes_of(name, list(needs), minutes),
          'steps': 600,
          'workdir': str(tmp_path / name),
        },
      )
      for name in needs
    }
    monkeypatch.setattr(auto_command, '_train', fake)
    monkeypatch.setattr(
      auto_command,
      '_recorded',
      lambda config: config.replace(minutes=dict(calls)[config.method]),
    )
    monkeypatch.setattr(
      auto, 'errors_of', lambda folder: auto.Errors(folder.name, {0: 0.0}, 1, 1)
    )
    found = auto_command._trained(configs, None, minutes)
    return calls, [each.method for each in found]

  return train


def test_each_candidate_gets_its_part(trained):
  calls, compared = trained({'supervised': 0.9, 'madnn': 1.9, 'r2d2': 2.0}, 5)
  assert calls == [('supervised', 1.0), ('madnn', 2.0), ('r2d2', 2.0)]
  assert compared == ['supervised', 'madnn', 'r2d2']


def test_a_candidate_that_does_not_fit_is_left_out(trained, capsys):
  calls, compared = trained({'supervised': 0.9, 'madnn': 1.9, 'r2d2': 2.8}, 5)
  assert calls == [('supervised', 1.0), ('madnn', 2.0)]
  assert compared == ['supervised', 'madnn']
  # 1.1 times 2.8 minutes are 3.08, of which 5 minutes give 2: 7.7 in all.
  said = (
    'r2d2 is left out: it gets 2 of 5 minutes, and needs 2.8 here; '
    '--minutes=8 would do'
  )
  assert said in capsys.readouterr().out


def test_the_baseline_gets_what_it_needs_and_the_others_the_rest(
  trained, capsys
):
  calls, _ = trained({'supervised': 2.0, 'madnn': 1.2, 'r2d2': 1.3}, 5)
  # 1.1 times 2.0 minutes; (5 - 2.2) / 2 are left for each of the others.
  assert calls == [('supervised', 2.2), ('madnn', 1.4), ('r2d2', 1.4)]
  assert 'supervised gets 2.2 of 5 minutes' in capsys.readouterr().out


def test_a_budget_below_twice_the_need_of_the_baseline_is_refused(trained):
  with pytest.raises(InputError, match=r'needs 2\.4 here: give minutes=6 or'):
    trained({'supervised': 2.4, 'madnn': 1.0, 'r2d2': 1.0}, 5)


def test_a_run_of_another_command_is_kept(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'result.json').write_text('{"method": "madnn"}')
  given = {'images': str(tmp_path), 'workdir': str(tmp_path)}
  with pytest.raises(InputError, match='has not made: give another'):
    auto_command.run(given)
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    'config.json',
    'result.json',
  ]
  assert (tmp_path / 'result.json').read_text() == '{"method": "madnn"}'
