"""Train LLP and the supervised baseline.

python experiments/llp.py
python experiments/llp.py --flagfile=experiments/presets/llp.cifar10-4000.flags
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('llp')
