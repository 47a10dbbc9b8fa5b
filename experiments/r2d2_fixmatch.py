"""Train R2-D2-FixMatch and the supervised baseline.

python experiments/r2d2_fixmatch.py
python experiments/r2d2_fixmatch.py --dataset=mnist --labels=10
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('r2d2_fixmatch')
