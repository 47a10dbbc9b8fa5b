"""MA-DNN beside the supervised baseline.

python experiments/madnn.py
python experiments/madnn.py --flagfile=experiments/presets/madnn.mnist-100.flags
"""

from ssljax.cli import main
from ssljax.methods.madnn import madnn
from ssljax.methods.supervised import supervised

ARMS = {'supervised': supervised, 'madnn': madnn}

if __name__ == '__main__':
  main.main('madnn', ARMS)
