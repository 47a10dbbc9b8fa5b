"""Train Mean Teacher and the supervised baseline.

python experiments/mean_teacher.py
python experiments/mean_teacher.py --dataset=mnist --labels=10
"""

from ssljax.cli import main

if __name__ == '__main__':
  main.train('mean_teacher')
