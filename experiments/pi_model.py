"""Train the Π-model and the supervised baseline.

python experiments/pi_model.py
python experiments/pi_model.py --dataset=mnist --labels=10
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('pi_model')
