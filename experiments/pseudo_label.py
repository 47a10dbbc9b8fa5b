"""Train Pseudo-Label and the supervised baseline.

python experiments/pseudo_label.py
python experiments/pseudo_label.py --dataset=mnist --labels=10
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('pseudo_label')
