"""Train UDA and the supervised baseline.

python experiments/uda.py
python experiments/uda.py --dataset=mnist --labels=10
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('uda')
