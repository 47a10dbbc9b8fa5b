"""Train ICT and the supervised baseline.

python experiments/ict.py
python experiments/ict.py --dataset=mnist --labels=10
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('ict')
