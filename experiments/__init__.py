"""The command-line programs, and their presets, tables and figures.

Installed as `ssljax.experiments`: `python experiments/madnn.py`,
`python -m ssljax.experiments.madnn` and `ssljax madnn` are one program.
"""

import pathlib

FOLDER = pathlib.Path(__file__).parent
