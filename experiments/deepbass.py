"""Train DeepBASS; its first stage is the supervised baseline.

python experiments/deepbass.py
python experiments/deepbass.py \
    --flagfile=experiments/presets/deepbass.mnist-100.flags
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('deepbass')
