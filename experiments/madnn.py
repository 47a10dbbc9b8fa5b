"""Train MA-DNN and the supervised baseline.

python experiments/madnn.py
python experiments/madnn.py --flagfile=experiments/presets/madnn.mnist-100.flags
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('madnn')
