"""Train Learning by Association and the supervised baseline.

python experiments/association.py
python experiments/association.py \
    --flagfile=experiments/presets/association.mnist-100.flags
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('association')
