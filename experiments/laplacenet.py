"""Train LaplaceNet and the supervised baseline.

python experiments/laplacenet.py
python experiments/laplacenet.py --dataset=mnist --labels=10
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('laplacenet')
