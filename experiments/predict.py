"""Predict the classes of images by a finished run.

python experiments/predict.py --run=runs/FOLDER --out=predictions.csv
python experiments/predict.py --run=runs/FOLDER --images=DIR --out=new.csv
python experiments/predict.py --run=runs/FOLDER --dataset=f.npz --out=new.csv

Without --images or --dataset the training images are predicted, the labelled
ones too. A line of the CSV file has

  file        path in the folder, or row number
  label       most probable class; confidence: its probability, calibrated on
              held-out labelled images; margin: its lead over the second class
  second, third  and their probabilities
  set         classes of the prediction set, which contains the true class of
              the share --coverage of all images
  given       label that was given
  disagrees   1 if the models that did not see this label predict another class:
              probably a wrong label

An interrupted command continues. Images that cannot be decoded are listed.
"""

import json
from typing import Any

from absl import flags

from ssljax import prediction
from ssljax.cli import main, tool
from ssljax.data import datasets, folder, parquet
from ssljax.errors import fraction, require


def define_flags(values: flags.FlagValues) -> None:
  """Define the flags of this program."""
  for name, text in {
    'run': 'Folder of a finished run.',
    'images': 'Folder of images to predict.',
    'dataset': 'Data set to predict: FILE.npz, or a TFDS set.',
    'split': "Split of the data set; 'test' if unset, of FILE.npz 'train' if "
    'it has no test rows.',
    'data_dir': "Folder of prepared TFDS data sets; the run's if unset.",
    'out': 'CSV file to write.',
  }.items():
    flags.DEFINE_string(name, None, text, flag_values=values)
  flags.DEFINE_float(
    'coverage',
    0.9,
    'Share of prediction sets that contain the true class.',
    flag_values=values,
  )


def images_of(predictor, asked: dict[str, Any]) -> prediction.Images:
  """Return the images that the flags name."""
  shape = predictor.models[0].shape
  if asked['images'] is not None:
    require(
      len(shape) == 3 and shape[0] == shape[1],
      f'`images`={asked["images"]}: the run was trained on rows of shape '
      f'{shape}, not on square images: give a `dataset`; the program '
      'embed turns images into features',
    )
    found = folder.to_predict(asked['images'], shape)
    classes = predictor.classes
    given = [name if name in classes else None for name in found.given]
    return found._replace(given=given)
  if asked['dataset'] is None:
    return prediction.training_images(predictor)
  name = asked['dataset']
  is_file = name.endswith('.npz') or parquet.is_parquet(name)
  from_file = asked['split'] is None and is_file
  data = datasets.load(
    asked['dataset'],
    asked['data_dir'],
    train_split='train' if from_file else asked['split'] or 'test',
    with_test=from_file,
    image_size=shape[0] if len(shape) == 3 else None,
    strict=False,
  )
  tests = from_file and len(data.test.labels)
  return prediction.of_source(
    predictor, data.test if tests else data.train, data.classes
  )


def report(predictor) -> str:
  """Return what was measured on held-out images."""
  found = predictor.measured
  if not found:
    return (
      'no labelled image was held out: confidences are not calibrated, and '
      'there are no prediction sets; train with `validation`=N to measure'
    )
  low, high = found['accuracy_interval']
  how = f'after temperature {predictor.temperature:.2f}'
  if not found['calibrated']:
    how = 'after (a fitted temperature did not help and is not used)'
  return (
    f'{found["images"]} held-out labelled images: accuracy '
    f'{found["accuracy"]:.1%} [{low:.1%}, {high:.1%}], calibration error '
    f'{found["calibration_error_before"]:.3f} before and '
    f'{found["calibration_error_after"]:.3f} {how}, their '
    f'prediction sets of {found["mean_set_size"]:.1f} classes, fitted to four '
    f'fifths of the images at a time, contain the true one of '
    f'{found["coverage"]:.1%} (asked: {found["coverage_asked"]:.0%})'
  )


def act(asked: dict[str, Any]) -> None:
  """Predict and write what the flags select."""
  run = tool.finished_run(asked['run'])
  require(asked['out'] is not None, '`out`: give a CSV file to write')
  fraction(coverage=asked['coverage'])
  require(
    asked['images'] is None or asked['dataset'] is None,
    f'`images`={asked["images"]}, `dataset`={asked["dataset"]}: give one',
  )
  require(
    asked['split'] is None or asked['dataset'] is not None,
    f'`split`={asked["split"]}: is a part of a `dataset`: give it too',
  )
  out = main.as_output('out', asked['out'])
  predictor = prediction.load(
    run, data_dir=asked['data_dir'], coverage=asked['coverage']
  )
  images = images_of(predictor, asked)
  key = json.dumps({k: v for k, v in asked.items() if k != 'out'})
  reasons = prediction.write(predictor, images, out, key=key)
  if predictor.reason:
    print(predictor.reason)
  print(main.marked_as_flags(report(predictor)))
  if reasons:
    listed = '\n'.join(f'  {name}: {why}' for name, why in reasons.items())
    print(
      f'{len(reasons)} images cannot be decoded and have no line:\n{listed}'
    )
  print(f'{len(images.names) - len(reasons)} predictions written to {out}')


if __name__ == '__main__':
  tool.start('predict', define_flags, act)
