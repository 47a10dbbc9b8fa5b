"""R2-D2; its first stage is the supervised baseline.

python experiments/r2d2.py
python experiments/r2d2.py \
    --flagfile=experiments/presets/r2d2.mnist-1000.flags
"""

from ssljax.cli import main
from ssljax.methods.r2d2 import r2d2

ARMS = {'r2d2': r2d2}
# Its code's, on CIFAR-10.
DEFAULTS = {
  'batch_labelled': 128,
  'batch_unlabelled': 384,
  'learning_rate': 0.12,
  'decay': 'constant',
  'weight_decay': 2e-4,
  'clip': 0.0,
  'average': 0.0,
  'preprocess': 'standardize',
  'augment': ['translate4', 'flip'],
}

if __name__ == '__main__':
  main.main('r2d2', ARMS, **DEFAULTS)
