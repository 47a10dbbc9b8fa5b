"""Turn images into features by a pretrained network, for every method.

python experiments/embed.py --images=DIR --backbone=FILE.onnx --out=f.npz
python experiments/embed.py --images=DIR --backbone=timm:NAME --out=f.npz
python experiments/embed.py --dataset=NAME --data_dir=DIR --backbone=FILE.onnx
    --out=f.npz

The file holds features [N, D], labels, class names, file names and splits.
`--dataset=f.npz` trains any method on it in seconds; --images may be without
labels, for `ssljax predict --dataset=f.npz`. An ONNX file needs `pip install
'ssljax[embed]'`; its input is one batch of images, its output [N, D], maps or
tokens, which are averaged. A model of timm needs `pip install timm`, which
brings PyTorch. An interrupted command continues.
"""

from typing import Any

from absl import flags

from ssljax.cli import main, tool
from ssljax.data import backbones, datasets, embedding, folder
from ssljax.errors import InputError, positive, require


def define_flags(values: flags.FlagValues) -> None:
  """Define the flags of this program."""
  for name, text in {
    'images': 'Folder of images, as --images of the methods.',
    'labels_file': 'Names images of the folder and their classes.',
    'dataset': 'Data set: FILE.npz, or a TFDS set.',
    'data_dir': 'Folder of prepared TFDS data sets.',
    'test_split': 'The split to test on, as --test_split of the methods.',
    'backbone': 'FILE.onnx, or timm:NAME.',
    'out': 'FILE.npz to write.',
    'output': 'Name of the output of the ONNX file, if it has several.',
    'mean': 'One number, or three with commas, that are subtracted from pixels '
    "in [0, 1]; ImageNet's or the model's if unset. 0.5 with --std=0.5 gives "
    'inputs in [-1, 1], 0 with --std=0.00392157 in [0, 255].',
    'std': 'Numbers that the difference is divided by, likewise.',
  }.items():
    flags.DEFINE_string(name, None, text, flag_values=values)
  flags.DEFINE_string(
    'train_split', 'train', 'The split to train on.', flag_values=values
  )
  flags.DEFINE_integer(
    'image_size',
    None,
    f"Side of the input; the backbone's, or {backbones.SIDE}, if unset.",
    flag_values=values,
  )
  flags.DEFINE_float(
    'crop',
    None,
    "Share of the resized image's side that is kept at its centre; the "
    "model's, or 1, if unset.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    'batch', embedding.BATCH, 'Images embedded at once.', flag_values=values
  )


def numbers(name: str, text: str | None) -> list[float] | None:
  """Return the numbers of a flag's value."""
  if text is None:
    return None
  try:
    return [float(part) for part in text.split(',')]
  except ValueError as error:
    raise InputError(
      f'`{name}`={text}: give numbers with commas between them'
    ) from error


def read(asked: dict[str, Any], side: int) -> datasets.Dataset:
  """Return the data set that the flags name, with images of a side."""
  how = dict(
    train_split=asked['train_split'],
    test_split=asked['test_split'],
    image_size=side,
  )
  if asked['images'] is None:
    return datasets.load(asked['dataset'], asked['data_dir'], **how)
  return folder.load(
    asked['images'], asked['labels_file'], resident=False, strict=False, **how
  )


def act(asked: dict[str, Any]) -> None:
  """Embed what the flags select."""
  require(
    (asked['images'] is None) != (asked['dataset'] is None),
    '`images`, `dataset`: give one of them',
  )
  for name in ('backbone', 'out'):
    require(asked[name] is not None, f'`{name}`: give it')
  require(
    asked['out'].endswith('.npz'),
    f'`out`={asked["out"]}: give a file that ends in .npz',
  )
  positive(batch=asked['batch'])
  out = main.as_output('out', asked['out'])
  backbone = backbones.load(
    asked['backbone'],
    backbones.Asked(
      asked['image_size'],
      asked['crop'],
      numbers('mean', asked['mean']),
      numbers('std', asked['std']),
      asked['output'],
    ),
  )
  data = read(asked, backbone.preprocessing.resized)
  found = embedding.write(data, backbone, out, asked['batch'])
  print(
    f'{found["train"]} training and {found["test"]} test images, '
    f'{found["features"]} features each by {backbone.name} at '
    f'{backbone.preprocessing.side}x{backbone.preprocessing.side} pixels, '
    f'written to {out}'
  )


if __name__ == '__main__':
  tool.start('embed', define_flags, act, devices=False)
