"""LLP beside the supervised baseline.

python experiments/llp.py
python experiments/llp.py --flagfile=experiments/presets/llp.cifar10-4000.flags
"""

from ssljax.cli import main
from ssljax.methods.llp import llp
from ssljax.methods.supervised import supervised

ARMS = {'supervised': supervised, 'llp': llp}
# The paper's, and its code's where the paper is silent.
DEFAULTS = {
  'unlabelled': 'all',
  'batch_labelled': 128,
  'batch_unlabelled': 128,
  'learning_rate': 0.03,
  'decay': 'constant',
  'nesterov': False,
  'weight_decay': 1e-4,
  'clip': 0.0,
  'average': 0.0,
}

if __name__ == '__main__':
  main.main('llp', ARMS, **DEFAULTS)
