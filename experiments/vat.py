"""Train VAT and the supervised baseline.

python experiments/vat.py
python experiments/vat.py --dataset=mnist --labels=10
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('vat')
