"""Supervised training on the labelled images alone.

python experiments/supervised.py
python experiments/supervised.py --labels=all
"""

from ssljax.cli import main
from ssljax.methods.supervised import supervised

ARMS = {'supervised': supervised}

if __name__ == '__main__':
  main.main('supervised', ARMS)
