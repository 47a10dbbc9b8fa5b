"""Export the model of a finished run to a folder that needs no ssljax.

python experiments/export.py --run=runs/FOLDER --out=model/

The folder has a StableHLO function for CPU, CUDA and TPU (images in,
probabilities out), the weights as safetensors, the class names, a model card
and an example program. Needs `pip install 'ssljax[export]'`.
"""

from typing import Any

from absl import flags

from ssljax import export, prediction
from ssljax.cli import main, tool
from ssljax.errors import require


def define_flags(values: flags.FlagValues) -> None:
  """Define the flags of this program."""
  for name, text in {
    'run': 'Folder of a finished run.',
    'out': 'Folder of the model.',
    'data_dir': "Folder of prepared TFDS data sets; the run's if unset.",
  }.items():
    flags.DEFINE_string(name, None, text, flag_values=values)


def act(asked: dict[str, Any]) -> None:
  """Export what the flags select."""
  run = tool.finished_run(asked['run'])
  require(asked['out'] is not None, '`out`: give a folder for the model')
  out = main.as_output_folder('out', asked['out'])
  predictor = prediction.load(run, data_dir=asked['data_dir'])
  if predictor.reason:
    print(predictor.reason)
  found = export.write(predictor, out)
  print(
    f'written to {out}: {found["bytes"] / 2**20:.1f} MiB, its probabilities '
    f"differ from the run's by at most {found['difference']:.1e}"
  )


if __name__ == '__main__':
  tool.start('export', define_flags, act)
