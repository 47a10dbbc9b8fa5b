"""Train FreeMatch and the supervised baseline.

python experiments/freematch.py
python experiments/freematch.py --dataset=mnist --labels=10
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('freematch')
