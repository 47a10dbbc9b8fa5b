"""Train R2-D2; its first stage is the supervised baseline.

python experiments/r2d2.py
python experiments/r2d2.py \
    --flagfile=experiments/presets/r2d2.mnist-1000.flags
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('r2d2')
