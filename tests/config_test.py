"""A `Config` from values, flags and JSON, and what it refuses."""

import dataclasses
import json

import pytest

from ssljax import config, experiments, registry
from ssljax.errors import InputError
from ssljax.runs import execute

VALUES = {'steps': 3}


@pytest.fixture
def register():
  """Registers methods, and forgets them."""
  known = dict(registry.METHODS)
  yield config.register_method
  registry.METHODS.clear()
  registry.METHODS.update(known)


def make(method='madnn', **values):
  return config.from_values(method, VALUES | values)


def test_settings_take_the_defaults_of_their_factory():
  made = make()
  assert made.parameters['eta'] == 0.5 and made.optimizer['clip'] == 2.0
  assert made.data.dataset == 'digits' and made.batch.batch_labelled == 50


def test_settings_take_the_defaults_of_their_methods_paper():
  made = make('association')
  assert made.optimizer['optimizer'] == 'adam'
  assert made.split.unlabelled == 'all'
  # Said once: the labelled part is so many images of each class.
  assert made.batch.batch_per_class == 10 and made.batch.batch_labelled is None
  assert make('association', unlabelled='rest').split.unlabelled == 'rest'


def test_labels_are_a_number_or_a_limit_or_all():
  parsed = {text: config.per_class('labels', text) for text in TEXTS}
  assert parsed == TEXTS


TEXTS = {'all': (None, False), '7': (7, False), 'up_to:7': (7, True)}


def test_a_config_cannot_be_changed_but_replaced():
  made = make(eta=0.3)
  with pytest.raises(dataclasses.FrozenInstanceError):
    made.data.dataset = 'mnist'
  other = made.replace(eta=0.4, seed=7)
  assert (other.parameters['eta'], other.split.seed) == (0.4, 7)
  assert made.parameters['eta'] == 0.3


@pytest.mark.parametrize(
  ('network', 'steps', 'momentum'),
  [
    # 1 − 6 / steps, at most the network's own: 0.9999, 0.99 and 0.9.
    ('convlarge', 600, 0.99),
    ('convlarge', 289_000, 0.9999),
    ('digits', 300, 0.98),
    ('digits', 600, 0.99),
    ('digits', 5000, 0.99),
    ('shakeshake', 30_000, 0.9),
    ('shakeshake', 30, 0.8),
    ('digits', 3, 0.5),  # at least
    ('elu_mnist', 600, None),  # no batch norm
  ],
)
def test_the_momentum_of_batch_norm_follows_the_length_and_is_recorded(
  network, steps, momentum
):
  made = make(network=network, steps=steps)
  recorded = config.to_json(made)['network']['bn_momentum']
  assert recorded == (momentum and pytest.approx(momentum, abs=1e-12))
  again = config.from_json(json.loads(json.dumps(config.to_json(made))))
  assert again == made
  if momentum:
    assert f'--bn_momentum={recorded}' in config.to_flags(made)
    assert make(network=network, bn_momentum=0.7).network.bn_momentum == 0.7


def test_the_momentum_of_batch_norm_follows_a_replaced_length():
  made = make(network='digits', steps=600)
  assert made.replace(steps=300).network.bn_momentum == 0.98
  assert made.replace(seed=1).network.bn_momentum == 0.99
  chosen = make(network='digits', steps=600, bn_momentum=0.9)
  assert chosen.replace(steps=300).network.bn_momentum == 0.9


def test_the_presets_of_the_papers_keep_their_momentum_of_batch_norm():
  own = {'convlarge': 0.9999, 'shakeshake': 0.9, 'resnet18': 0.9}
  own |= {'convlarge_pytorch': 0.9, 'resnet18v2': 0.997, 'resnet50v2': 0.997}
  own |= {'digits_heads': 0.99, 'mnist': 0.99}
  own |= {'mnist_heads': 0.99, 'elu_stl10': 0.99, 'resnet18v2_small': 0.997}
  checked = set()
  for path in (experiments.FOLDER / 'presets').glob('*.flags'):
    if path.stem.endswith(('.digits', '.digits-strong')):
      continue  # no paper's
    made = config.from_flags(
      path.stem.split('.')[0], path.read_text().splitlines()
    )
    if made.network.bn_momentum is not None:
      assert made.network.bn_momentum == own[made.network.network], path
      checked.add(made.network.network)
  assert {'convlarge', 'shakeshake', 'resnet18v2'} <= checked


def test_a_record_without_a_momentum_had_the_networks_own():
  # Records of earlier versions, which are resumed with what they began with.
  tree = config.to_json(make(network='digits', steps=300))
  assert tree['network']['bn_momentum'] == 0.98
  tree['network']['bn_momentum'] = None
  there = config.from_json(tree)
  assert there.network.bn_momentum == 0.99
  lines = [x for x in config.to_flags(there) if 'bn_momentum' not in x]
  assert config.from_flags('madnn', lines, recorded=True) == there
  assert config.from_flags('madnn', lines).network.bn_momentum == 0.98
  same = make(network='digits', steps=300, bn_momentum=0.99)
  assert execute.settings_of(same)['bn_momentum'] is None
  assert config.differences(there, same) == []
  assert config.differences(there, make(network='digits', steps=300)) == [
    '`bn_momentum`=0.99 there, `bn_momentum`=0.98 here'
  ]
  # A long run goes on as it is.
  long = make(network='digits', steps=6000)
  assert execute.settings_of(long)['bn_momentum'] is None


def test_a_run_of_epochs_can_be_resumed_without_naming_the_momentum():
  values = {'steps': None, 'epochs': 2.0, 'network': 'digits'}
  here = make(**values)
  assert here.network.bn_momentum is None  # its steps are not known yet
  there = config.with_momentum(here, 300)
  assert there.network.bn_momentum == 0.98
  assert config.differences(there, here) == []
  other = make(**values, bn_momentum=0.7)
  assert config.differences(there, other) == [
    '`bn_momentum`=0.98 there, `bn_momentum`=0.7 here'
  ]


ODD = {
  'eta': 0.25,
  'augment': ('flip', 'translate'),
  'decay': 'steps',
  'decay_at': (5, 9),
  'model_entropy': False,
  'steps': None,
  'epochs': 2.5,
  'budget': 7,
  'source': 'digits',
  'target': 'mnist',
}


def test_json_and_flags_hold_every_setting():
  made = make(**ODD)
  assert config.from_json(json.loads(json.dumps(config.to_json(made)))) == made
  lines = config.to_flags(made)
  assert '--nomodel_entropy' in lines and '--augment=flip,translate' in lines
  assert not [line for line in lines if line.startswith('--dataset')]
  assert config.from_flags('madnn', lines) == made


def test_flags_that_do_not_decide_the_result_are_left_out():
  lines = config.to_flags(make(workdir='x', data_dir='y', hang_minutes=2))
  for name in config.FREE:
    assert not [line for line in lines if line.startswith(f'--{name}')]


def test_the_differences_of_two_runs_are_named():
  there, here = make(eta=0.5, budget=None), make(eta=0.3, budget=4, workdir='a')
  assert config.differences(there, here) == [
    'no `budget` there, `budget`=4 here',
    '`eta`=0.5 there, `eta`=0.3 here',
  ]
  assert config.differences(there, there) == []
  assert '`method`=madnn there, `method`=llp here' in config.differences(
    there, make('llp')
  )


@pytest.mark.parametrize(
  ('values', 'expected'),
  [
    ({'eat': 3}, r'eat: madnn has no such setting: did you mean eta\b'),
    ({'eta': 'much'}, r"eta='much': give a number"),
    ({'steps': 2.5}, r'steps=2\.5: give a whole number'),
    ({'steps': True}, r'steps=True: give a whole number'),
    ({'divergence': 'no'}, r"divergence='no': give True or False"),
    ({'distance': 'cosine'}, r"distance='cosine': give euclidean or l1"),
    (
      {'augment': ('spin',)},
      r'augment=spin: .*; give flip',
    ),
    ({'augment': 'flip'}, r"augment='flip': give a sequence"),
    ({'network': 'convlarg'}, r'network=convlarg: .* convlarge'),
    ({'preprocess': 'zcca'}, r'preprocess=zcca: .*zca'),
    ({'acquire': 'entropi'}, r'acquire=entropi: .*entropy'),
    ({'labels': 'many'}, r'labels=many: give all, a number, or up_to:NUMBER'),
    ({'labels': 'up_to:all'}, r'labels=up_to:all: give all, a number'),
    ({'labels': '9' * 5000}, r'labels=9+: give all, a number'),
    ({'unlabelled': '9' * 5000}, r'unlabelled=9+: give rest'),
    ({'unlabelled': 'some:3'}, r'unlabelled=some:3'),
    ({'seeds': 0}, r'seeds=0'),
    ({'steps': 3, 'epochs': 2.0}, r'steps, epochs: give one'),
    ({'steps': None}, r'steps, epochs: give one'),
    ({'batch_per_class': 2, 'batch_labelled': 4}, r'batch_labelled=4'),
    ({'source': 'digits'}, r'source, target: give both'),
    ({'dropout': 1.0}, r'dropout=1\.0'),
    ({'seed': 2**32}, r'seed=4294967296: give'),
    ({'seeds': 2**31 - 1}, r'seeds=2147483647: give at most 1,000'),
    ({'seeds': 2**31}, r'seeds=2147483648: give'),
    ({'steps': 2**31}, r'steps=2147483648: give'),
    ({'epochs': 1e300, 'steps': None}, r'epochs=1e\+300: give'),
    ({'image_size': 10**30}, r'image_size=10+: give'),
    ({'labels': '9' * 30}, r'labels=9+: give all'),
    ({'hang_minutes': 1e300}, r'hang_minutes=1e\+300: give'),
  ],
)
def test_values_that_cannot_work_are_refused_by_name(values, expected):
  with pytest.raises(InputError, match=expected):
    make(**values)


def test_an_unknown_method_is_refused_with_the_near_ones():
  with pytest.raises(InputError, match=r'method=madn: .*madnn'):
    make('madn')


@pytest.mark.parametrize(
  'text', ['', '[]', '{"method": "madnn"}', '{"method": 3', 'null', '7']
)
def test_a_damaged_record_is_refused(text):
  with pytest.raises(InputError, match=r'config\.json'):
    config.read(text)


def factory(net, tx, batch_spec, steps, *, decay: float = 0.99):
  """A Mean Teacher's constant, under the name of a schedule."""


def bare(net, tx, batch_spec, steps, *, rate):
  """A keyword without a default."""


def mine(net, tx, batch_spec, steps, *, gain: float = 2.0):
  """A method of a user.

  Args:
    net: the network.
    tx: the optimiser.
    batch_spec: rows of a step.
    steps: length.
    gain: a constant.
  """


def test_a_keyword_that_is_another_setting_is_refused(register):
  with pytest.raises(InputError, match=r"'decay' is a setting of optimizer"):
    register('co_training', factory)
  assert 'co_training' not in registry.METHODS


def test_a_keyword_needs_a_default(register):
  with pytest.raises(TypeError, match="'rate' needs a default"):
    register('bare', bare)


def test_the_keywords_of_a_users_method_are_settings(register):
  register('mine', mine, defaults={'learning_rate': 0.5})
  made = make('mine', gain=3.0)
  assert made.parameters['gain'] == 3.0
  assert made.optimizer['learning_rate'] == 0.5
  # Its baseline shares the settings of its own.
  assert made.parameters['smoothing'] == 0.0
  assert list(made.factories) == ['supervised', 'mine']
  assert list(make('mine', baseline=False).factories) == ['mine']
  assert config.schema('mine')['parameters']['gain'].help == 'a constant.'


def test_a_method_of_the_library_is_not_replaced(register):
  with pytest.raises(InputError, match='method=madnn'):
    register('madnn', mine, replace=True)


def test_every_setting_has_one_name_over_all_parts():
  for method in registry.METHODS:
    names = [n for part in config.schema(method).values() for n in part]
    assert len(names) == len(set(names))


def test_every_setting_has_a_help_text():
  for method in registry.METHODS:
    for part in config.schema(method).values():
      for setting in part.values():
        assert setting.help, (method, setting.name)


def test_a_record_from_before_the_settings_of_rare_classes_has_their_defaults():
  made = make()
  tree = config.to_json(made)
  assert tree.pop('imbalance') == {
    'logit_adjustment': 0.0,
    'sampling': 'images',
  }
  assert config.from_json(tree) == made
  other = make(logit_adjustment=1.0)
  assert config.differences(made, other) == [
    '`logit_adjustment`=0.0 there, `logit_adjustment`=1.0 here'
  ]
  with pytest.raises(InputError, match='logit_adjustment'):
    make(logit_adjustment=-1.0)
