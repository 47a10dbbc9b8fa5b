"""Train on the labelled images alone.

python experiments/supervised.py
python experiments/supervised.py --labels=all
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('supervised')
