"""Train FlexMatch and the supervised baseline.

python experiments/flexmatch.py
python experiments/flexmatch.py --dataset=mnist --labels=10
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('flexmatch')
