"""Draw a figure of a paper from the folder of a finished run.

python experiments/figures.py --list
python experiments/figures.py --figure=association/3 --run=runs/FOLDER

A figure is written as PNG and as PDF, and its data as CSV.
"""

from ssljax.cli import tool
from ssljax.experiments.figures import catalogue

if __name__ == '__main__':
  tool.start('figures', catalogue.define_flags, catalogue.act)
