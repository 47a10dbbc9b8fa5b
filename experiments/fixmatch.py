"""Train FixMatch and the supervised baseline.

python experiments/fixmatch.py
python experiments/fixmatch.py --dataset=mnist --labels=10
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('fixmatch')
