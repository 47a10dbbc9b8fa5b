"""Export the model of a finished run to a folder that needs no ssljax.

python experiments/export.py --run=runs/FOLDER --out=model/
python experiments/export.py --run=runs/FOLDER --format=onnx --out=model/

The folder has a function for CPU, CUDA and TPU (images in, probabilities out)
as StableHLO or as ONNX, the class names, a model card and an example program;
with StableHLO also the weights as safetensors. The function is compared with
the run on 256 training images before it is written. StableHLO needs `pip
install 'ssljax[export]'`, ONNX `pip install 'ssljax[onnx]'`.
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
    'format': 'stablehlo, onnx, or both with a comma between them.',
    'data_dir': "Folder of prepared TFDS data sets; the run's if unset.",
  }.items():
    default = 'stablehlo' if name == 'format' else None
    flags.DEFINE_string(name, default, text, flag_values=values)


def act(asked: dict[str, Any]) -> None:
  """Export what the flags select."""
  run = tool.finished_run(asked['run'])
  require(asked['out'] is not None, '`out`: give a folder for the model')
  formats = asked['format'].split(',')
  export.check(formats)
  out = main.as_output_folder('out', asked['out'])
  predictor = prediction.load(run, data_dir=asked['data_dir'])
  if predictor.reason:
    print(predictor.reason)
  written = export.write(predictor, out, formats)
  for name, found in written.items():
    print(
      f'written to {out}/model.{name}: {found["bytes"] / 2**20:.1f} MiB, its '
      f"probabilities differ from the run's by at most "
      f'{found["difference"]:.1e}'
    )


if __name__ == '__main__':
  tool.start('export', define_flags, act)
