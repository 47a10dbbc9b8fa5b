"""Train Temporal Ensembling and the supervised baseline.

python experiments/temporal_ensembling.py
python experiments/temporal_ensembling.py --dataset=mnist --labels=10
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('temporal_ensembling')
