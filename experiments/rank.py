"""Rank the images of a finished run that should be labelled next.

python experiments/rank.py --run=runs/FOLDER --count=50 --out=next.csv
python experiments/rank.py --run=runs/FOLDER --strategy=typiclust --out=next.csv

Writes a CSV file with the columns rank, file, label (empty, to be filled in),
predicted, confidence and reason. A file with the filled lines serves as
--labels_file of the next run. Of a run with several splits the models vote.
"""

import csv
import io
from typing import Any

from absl import flags

from ssljax import prediction, ranking
from ssljax.cli import main, tool
from ssljax.errors import require
from ssljax.runs import run_folder


def define_flags(values: flags.FlagValues) -> None:
  """Define the flags of this program."""
  for name, default, text in (
    ('run', None, 'Folder of a finished run.'),
    ('out', None, 'CSV file to write.'),
    ('strategy', 'entropy', f'One of {", ".join(ranking.strategies())}.'),
    (
      'data_dir',
      None,
      "Folder of prepared TFDS data sets; the run's if unset.",
    ),
  ):
    flags.DEFINE_string(name, default, text, flag_values=values)
  flags.DEFINE_integer('count', 50, 'Number of images.', flag_values=values)
  flags.DEFINE_integer(
    'seed', 0, 'Seed of strategies that draw.', flag_values=values
  )


def as_csv(ranked: ranking.Ranked) -> str:
  """Return the content of the file."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(
    ['rank', 'file', 'label', 'predicted', 'confidence', 'reason']
  )
  lines = zip(ranked.names, ranked.predicted, ranked.confidence, strict=True)
  for number, (name, predicted, confidence) in enumerate(lines, 1):
    row = [number, name, '', predicted, f'{confidence:.4f}', ranked.reason]
    writer.writerow(row)
  return text.getvalue()


def act(asked: dict[str, Any]) -> None:
  """Rank and write what the flags select."""
  run = tool.finished_run(asked['run'])
  require(asked['out'] is not None, '`out`: give a CSV file to write')
  ranking.check(asked['strategy'], asked['count'])
  out = main.as_output('out', asked['out'])
  predictor = prediction.load(run, data_dir=asked['data_dir'])
  ranked = ranking.rank(
    predictor, asked['strategy'], asked['count'], asked['seed']
  )
  with main.write_errors(out.parent):
    run_folder.write_atomically(out, as_csv(ranked))
  print(
    f'{len(ranked.rows)} images to label ({ranked.reason}) written to {out}'
  )


if __name__ == '__main__':
  tool.start('rank', define_flags, act)
