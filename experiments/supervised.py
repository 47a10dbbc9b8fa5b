"""Supervised training on the labelled images alone.

python experiments/supervised.py
python experiments/supervised.py --labels=all
"""

import common

from ssljax.methods.supervised import supervised

ARMS = {'supervised': supervised}

if __name__ == '__main__':
  common.main('supervised', ARMS)
