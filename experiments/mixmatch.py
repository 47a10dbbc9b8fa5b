"""Train MixMatch and the supervised baseline.

python experiments/mixmatch.py
python experiments/mixmatch.py --dataset=mnist --labels=10
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('mixmatch')
