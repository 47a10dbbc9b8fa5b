"""Train SoftMatch and the supervised baseline.

python experiments/softmatch.py
python experiments/softmatch.py --dataset=mnist --labels=10
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('softmatch')
