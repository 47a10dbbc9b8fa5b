"""Train LLP-FixMatch and the supervised baseline.

python experiments/llp_fixmatch.py
python experiments/llp_fixmatch.py --dataset=mnist --labels=10
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('llp_fixmatch')
