"""Learning by Association beside the supervised baseline.

python experiments/association.py
python experiments/association.py \
    --flagfile=experiments/presets/association.mnist-100.flags
"""

from ssljax.cli import main
from ssljax.methods.association import association
from ssljax.methods.supervised import supervised

ARMS = {'supervised': supervised, 'association': association}
# The paper's, and its code's where the paper is silent.
DEFAULTS = {
  'unlabelled': 'all',
  'batch_per_class': 10,
  'batch_unlabelled': 100,
  'optimizer': 'adam',
  'learning_rate': 1e-3,
  'decay': 'constant',
  'weight_decay': 1e-4,
  'clip': 0.0,
  'average': 0.0,
}

if __name__ == '__main__':
  main.main('association', ARMS, **DEFAULTS)
