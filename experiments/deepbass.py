"""DeepBASS; its first stage is the supervised baseline.

python experiments/deepbass.py
python experiments/deepbass.py \
    --flagfile=experiments/presets/deepbass.mnist-100.flags
"""

from ssljax.cli import main
from ssljax.methods.deepbass import deepbass

ARMS = {'deepbass': deepbass}
# The paper's, and its code's.
DEFAULTS = {
  'unlabelled': 'all',
  'network': 'deepbass_mnist',
  'batch_labelled': 1,  # a step has no such part: any number of labels will do
  'batch_unlabelled': 256,
  'optimizer': 'adam',
  'learning_rate': 1e-3,
  'decay': 'constant',
  'weight_decay': 2e-3,  # Keras adds λ‖w‖², with no half
  'clip': 0.0,
  'average': 0.0,
  'acquire': 'entropy',
}

if __name__ == '__main__':
  main.main('deepbass', ARMS, **DEFAULTS)
