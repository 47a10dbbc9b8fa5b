"""Train a method by name, and its baselines.

python experiments/train.py --method=fixmatch
python experiments/train.py --method=madnn --dataset=mnist --labels=10

Takes the flags of the method's own program, and starts as that program does:
`ssljax train --method=fixmatch` is `ssljax fixmatch`.
"""

import sys

from ssljax.cli import main, selected

if __name__ == '__main__':
  command = selected.TrainCommand(sys.argv)
  main.run('train', command.act, command.parse, command.help)
