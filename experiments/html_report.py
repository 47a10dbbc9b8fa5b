"""Write an HTML report of a finished run.

python experiments/html_report.py --run=runs/FOLDER

RUN/report.html is one self-contained file: the errors beside the baselines',
precision and recall of every class, the predictions of the unlabelled images
with the most confident and the most doubtful ones, the confusion matrix, labels
that are probably wrong, every metric over training, and those figures of the
method's paper that show one run. Sections that the data cannot fill are left
out; the paper's figures are of data whose unlabelled images have known classes,
and need matplotlib.
"""

import base64
from collections.abc import Iterator, Sequence
import io
import pathlib
from typing import Any, NamedTuple

from absl import flags
import numpy as np

from ssljax import api, files, prediction
from ssljax.analysis import calibration
from ssljax.cli import main, tool
from ssljax.core import UNLABELLED
from ssljax.data.types import Images
from ssljax.errors import InputError, require
from ssljax.experiments.figures import catalogue, page, style
from ssljax.experiments.figures.page import as_table, note, section
from ssljax.runs import load, run_folder, summary
from ssljax.training import evaluate, metrics_writer

MISTAKES = 24  # number of images in a section
MOST_PREDICTED = 2048  # unlabelled images that are predicted
FIRST = ('test_error', 'validation_error')  # in the charts of errors


# Errors and settings.


def settings_section(result: dict[str, Any], folder: pathlib.Path) -> str:
  """Return the data, splits, length, device, versions and flags of a run."""
  versions = ', '.join(f'{k} {v}' for k, v in result['versions'].items())
  rows = [
    ['data', f'{result["dataset"]}, {result["labels"]} labels per class'],
    ['label splits', ', '.join(map(str, result['seeds']))],
    ['steps', f'{result["steps"]:,}'],
    ['seconds in steps', f'{result["seconds"]:,.0f}, without the baselines'],
    ['device', result['device']],
    ['commit', result['commit']],
    ['versions', versions],
    ['command', result['command']],
  ]
  with load.damage(folder, 'flags.txt'):
    text = page.html.escape((folder / 'flags.txt').read_text())
  return as_table([['setting', 'value'], *rows]) + (
    f'<details><summary>all flags</summary><pre>{text}</pre></details>'
  )


def errors_section(result: dict[str, Any]) -> str:
  """Return the errors of every trained method and of every split."""
  kind = _kind(result)
  kinds = ('last', 'averaged', 'median_last', 'minimum')
  known = [name for name in kinds if name in result[kind]]
  rows = [['method', *known, 'by split (last)']]
  for arm, entry in result['arms'].items():
    found = entry[kind]
    cells = [summary.mean_std(found[k]) if k in found else '–' for k in known]
    splits = ' '.join(f'{value:.2f}' for value in found['last'])
    rows.append([arm, *cells, splits])
    if kind == 'test_error':
      rows += [
        [f'{arm}, after stage {stage}', summary.mean_std(values)]
        + [''] * len(known)
        for stage, values in entry.get('test_error_after', {}).items()
      ]
  lines = [
    note(f'{arm}: {summary.accuracy_line(*reports)}')
    for arm, entry in result['arms'].items()
    if (reports := summary.reports(entry, kind))
  ]
  return as_table(rows) + '\n'.join(
    [
      note(
        f'{kind.replace("_", " ").capitalize()} in percent, mean ± standard '
        'deviation over label splits. last: at the last step; averaged: of the '
        'averaged weights at the last step; median_last: median of the last '
        'five evaluations; minimum: smallest error over training, a choice '
        'made on the test set.'
      ),
      *lines,
    ]
  )


def _kind(result: dict[str, Any]) -> str:
  """Return the kind of error of a run: of test images, if it has any."""
  return 'test_error' if result['test_error'] else 'validation_error'


def classes_section(result: dict[str, Any]) -> Iterator[str]:
  """Yield precision, recall and F1 of the classes, if the run has them."""
  rows = summary.class_rows(result, _kind(result))
  if rows:
    few = len(rows) - 1 < len(result['classes'])
    some = ' The classes of least F1 are shown.' if few else ''
    yield section(
      f'Classes, {result["method"]}',
      as_table(rows),
      note(
        'In percent, with 95 % intervals (Wilson) over the images. recall: '
        'share of the images of the class that are predicted as it; precision: '
        f'share of the images predicted as the class that are of it.{some}'
      ),
    )


# Metrics over training.


def read_metrics(
  folder: pathlib.Path, result: dict[str, Any]
) -> dict[str, dict[str, dict[int, list[float]]]]:
  """Return metric -> trained method -> step -> values of the splits."""
  skipped = {'job', 'step', 'stage', 'seed', *metrics_writer.TIMING}
  found = {}
  for arm in result['arms']:
    for line in load.read_metrics(folder, arm, result):
      for name in line.keys() - skipped:
        of_arm = found.setdefault(name, {}).setdefault(arm, {})
        of_arm.setdefault(line['step'], []).append(line[name])
  return found


def charts(found: dict[str, dict]) -> dict[str, str]:
  """Return a chart per metric by its name, with a line per trained method.

  Test errors come first, then the loss, then the other metrics by name.

  Args:
    found: as from `read_metrics`.
  """
  first = lambda name: (not name.startswith(FIRST), name != 'loss', name)
  drawn = {}
  for name in sorted(found, key=first):
    lines = [page.Line(arm, points) for arm, points in found[name].items()]
    label = name.replace('_', ' ')
    if name.startswith(FIRST):
      *words, weights = label.split()
      label = f'{" ".join(words)} ({weights}) in %'
    drawn[name] = page.chart(lines, label)
  return drawn


def metrics_section(found: dict[str, dict]) -> str:
  """Return the charts of the errors and the loss, and the others folded."""
  drawn = charts(found)
  is_main = lambda name: name.startswith(FIRST) or name == 'loss'
  shown = [drawn[name] for name in drawn if is_main(name)]
  folded = [drawn[name] for name in drawn if not is_main(name)]
  more = (
    f'<details><summary>{len(folded)} more metrics</summary>'
    f'{"".join(folded)}</details>'
  )
  return section(
    'Training',
    *shown,
    note('Mean over the label splits, with a band of one standard deviation.'),
    more if folded else '',
  )


# Predictions.


class Predicted(NamedTuple):
  """Predictions of some images."""

  images: Images
  rows: np.ndarray  # [M]
  p: np.ndarray  # [M, C]

  @property
  def best(self) -> np.ndarray:
    """Most probable classes `[M]`."""
    return self.p.argmax(axis=-1)

  @property
  def margin(self) -> np.ndarray:
    """Probability of the first class minus that of the second, `[M]`."""
    top = np.sort(self.p, axis=-1)[:, -2:]
    return top[:, 1] - top[:, 0]


def predict_unlabelled(finished, predictor) -> Predicted | None:
  """Predict at most 2,048 unlabelled training images; None without any."""
  images = prediction.training_images(predictor)
  rows = load.hidden_rows(finished.split)
  rows = rows[:: -(-len(rows) // MOST_PREDICTED)] if len(rows) else rows
  parts, kept = [], []
  for start in range(0, len(rows), prediction.CHUNK):
    chunk = rows[start : start + prediction.CHUNK]
    pixels, unreadable = images.read(chunk.tolist())
    kept += [row for row in chunk.tolist() if row not in unreadable]
    parts.append(predictor.predict_proba(pixels))
  if not kept:
    return None
  return Predicted(images, np.array(kept), np.concatenate(parts))


def unlabelled_sections(finished, predicted: Predicted) -> Iterator[str]:
  """Yield the predicted classes, and confident and doubtful images."""
  names, seen = finished.dataset.classes, len(load.hidden_rows(finished.split))
  counts = np.bincount(predicted.best, minlength=len(names))
  some = len(predicted.rows) < seen
  yield section(
    'Predictions of unlabelled images',
    page.bars(
      list(zip(names, counts.tolist(), strict=True)),
      ('predicted class', 'images'),
    ),
    note(
      f'{len(predicted.rows):,} {f"of {seen:,} " if some else ""}unlabelled '
      'training images; mean confidence '
      f'{100 * predicted.p.max(axis=-1).mean():.1f} %.'
    ),
  )
  if not finished.dataset.train.is_images:
    return
  margin = predicted.margin
  surest = [
    at[np.argsort(-margin[at], kind='stable')][: max(1, MISTAKES // len(names))]
    for label in range(len(names))
    if len(at := np.flatnonzero(predicted.best == label))
  ]
  yield section(
    'Most confident unlabelled images of each class',
    _images(predicted, np.concatenate(surest)[: 4 * MISTAKES], names),
  )
  doubtful = np.argsort(margin, kind='stable')[:MISTAKES]
  yield section(
    'Most doubtful unlabelled images',
    _images(predicted, doubtful, names, second=True),
    note(
      'The two most probable classes are nearly equal: labels of these images '
      'say most (ssljax rank --run=... --strategy=margin lists more).'
    ),
  )


def _images(
  predicted: Predicted,
  chosen: np.ndarray,
  names: Sequence[str],
  second: bool = False,
) -> str:
  """Return images with their predicted class.

  Args:
    predicted: predictions.
    chosen: `[K]` positions in it.
    names: of the classes.
    second: name the second class as well.
  """
  pixels, _ = predicted.images.read(predicted.rows[chosen].tolist())
  shown = []
  for image, at in zip(pixels, chosen.tolist(), strict=True):
    order = np.argsort(-predicted.p[at], kind='stable')[: 2 if second else 1]
    words = ' or '.join(
      f'{names[c]} ({100 * predicted.p[at, c]:.0f} %)' for c in order
    )
    name = name_of(predicted.images, predicted.rows[at])
    shown.append((image, f'{words}\n{name}'))
  return page.images(shown)


def name_of(images: Images, row: int) -> str:
  """Return the file of an image, or 'row 12' of an image without one."""
  name = images.names[row]
  return f'row {name}' if name == str(row) else name


def tested(finished, result, predictor) -> tuple[np.ndarray, str] | None:
  """Return the confusion matrix `[C, C]` and its note; None without one."""
  held_out = predictor.held_out
  if held_out is not None:
    best = held_out.logits.argmax(axis=-1)
    classes = len(finished.dataset.classes)
    return (
      evaluate.confusion(held_out.labels, best, classes),
      f'{len(best):,} labelled images, each predicted by the models that were '
      'not trained on it.',
    )
  kept = result.get(f'{_kind(result).removesuffix("_error")}_confusion')
  if not kept:
    return None
  matrices = kept.get('averaged', kept['last'])
  return np.sum(matrices, axis=0), f'Sum over {len(matrices)} label splits.'


def confusion_sections(finished, result, predictor) -> Iterator[str]:
  """Yield the confusion matrix, if there is one, and the largest confusions."""
  found, names = tested(finished, result, predictor), finished.dataset.classes
  if found is None:
    return
  matrix, words = found
  off = matrix - np.diag(np.diag(matrix))
  worst = np.argsort(-off, axis=None, kind='stable')[:5]
  pairs = [np.unravel_index(i, off.shape) for i in worst if off.flat[i]]
  largest = '; '.join(
    f'{names[t]} taken for {names[k]}: {off[t, k]}' for t, k in pairs
  )
  shown = ''
  if len(names) <= style.MANY_CLASSES:
    shown = page.confusion(matrix, names)
  yield section(
    'Confusion matrix' if shown else 'Largest confusions',
    shown,
    note(f'{words} Largest confusions: {largest or "none"}.'),
  )


def label_sections(finished, predictor) -> Iterator[str]:
  """Yield the given labels that held-out predictions contradict."""
  held_out, names = predictor.held_out, finished.dataset.classes
  if held_out is None:
    return
  p = calibration.softmax(held_out.logits, predictor.temperature)
  best = p.argmax(axis=-1)
  wrong = np.flatnonzero(best != held_out.labels)
  # The probability that the given label is wrong, largest first.
  order = wrong[np.argsort(p[wrong, held_out.labels[wrong]], kind='stable')]
  if not len(order):
    return
  images = prediction.training_images(predictor)
  words = [
    f'given {names[held_out.labels[i]]}, predicted {names[best[i]]} '
    f'({100 * p[i, best[i]]:.0f} %)\n{name_of(images, held_out.rows[i])}'
    for i in order[:MISTAKES].tolist()
  ]
  body = as_table([['label'], *([line] for line in words)])
  if finished.dataset.train.is_images:
    pixels, _ = images.read(held_out.rows[order[:MISTAKES]].tolist())
    body = page.images(zip(pixels, words, strict=True))
  yield section(
    'Labels to check',
    body,
    note(
      f'{len(order)} of {len(best)} labels that were held out are contradicted '
      'by the models that did not see them, the least probable labels first. '
      'Each is a mistake of the model or of the label.'
    ),
  )


def mistakes_section(finished) -> Iterator[str]:
  """Yield the most confident mistakes on test images, if there are any."""
  dataset, feed = finished.dataset, finished.program.data.test
  if not feed.size:
    return
  logits = finished.infer(finished.state, feed, np.arange(feed.size)).logits
  p, truth = calibration.softmax(logits), dataset.test.labels
  rows = most_confident_mistakes(p, truth)
  if not len(rows) or not dataset.test.is_images:
    return
  names = dataset.classes
  words = [
    f'{names[truth[row]]} → {names[p[row].argmax()]} '
    f'({100 * p[row].max():.0f} %)'
    for row in rows
  ]
  pixels = dataset.test.read(np.sort(rows))
  pixels = pixels[np.argsort(np.argsort(rows))]
  yield section(
    f'Most confident mistakes on test images, split {finished.split.seed}',
    page.images(zip(pixels, words, strict=True)),
    note('True class → predicted class, with its probability.'),
  )


def most_confident_mistakes(p, truth) -> np.ndarray:
  """Return the rows of the most confident mistakes, most confident first."""
  wrong = np.flatnonzero(p.argmax(axis=-1) != truth)
  return wrong[np.argsort(-p[wrong].max(axis=-1), kind='stable')][:MISTAKES]


# Labels that the method gives to unlabelled images.


def predicted_labels(finished, state, rows) -> dict[str, np.ndarray]:
  """Return the labels `[M]` of unlabelled images, by source.

  Args:
    finished: the finished run.
    state: a state of the run.
    rows: `[M]` rows of training images.

  Returns:
    The predictions of the evaluated weights, and the pseudo-labels of the
    method, if it has any: UNLABELLED where it uses none.
  """
  program = finished.program
  logits = finished.infer(state, program.data.train, rows).logits
  found = {'classifier': logits.argmax(axis=-1)}
  if program.method.quality is not None:
    used = program.pseudo_labels(state, rows)
    found['pseudo-labels'] = np.where(
      used.weight[0] > 0, used.label[0], UNLABELLED
    )
  return found


def label_quality(finished) -> str:
  """Return the errors of predicted labels at every kept step, as a table."""
  rows, cells = finished.hidden, []
  for step in finished.kept:
    state = finished.after(step)
    # Labels acquired by this step are no longer hidden.
    hidden = rows[np.asarray(state.labels[0])[rows] == UNLABELLED]
    truth = finished.dataset.train.labels[hidden]
    found = predicted_labels(finished, state, hidden)
    errors = [label_error(labels, truth) for labels in found.values()]
    cells.append([f'{step:,}', *(cell for pair in errors for cell in pair)])
  header = ['step', *(cell for source in found for cell in (source, 'images'))]
  return as_table([header, *cells]) + note(
    'Error in percent of the predictions of the classifier, and of the '
    f'pseudo-labels of the method, for {len(rows):,} training images with '
    f'hidden labels, split {finished.split.seed}; images: number of labels. A '
    'run with --keep_every has more steps. The metrics above show the share, '
    'the accuracy and the balance of the pseudo-labels over training.'
  )


def label_error(labels, truth) -> tuple[str, str]:
  """Return the error in percent of predicted labels, and their number.

  Args:
    labels: `[M]`, UNLABELLED where none is predicted.
    truth: `[M]` true labels.
  """
  predicted = labels != UNLABELLED
  count = np.count_nonzero(predicted)
  if not count:
    return '–', '0'
  error = 100 * np.mean(labels[predicted] != truth[predicted])
  return f'{error:.2f}', f'{count:,}'


# The method's own figures.


def own_figures(finished) -> Iterator[str]:
  """Yield the figures of the method that show a single run."""
  method, left_out = finished.program.method.name, []
  for name, drawing in catalogue.FIGURES.items():
    if name.startswith(f'{method}/') and drawing.alone:
      try:
        style.check_matplotlib()
        with style.style():
          figure = drawing.draw(finished)[0]
          yield section(
            f'{name}: {drawing.shows}', as_image(figure, drawing.shows)
          )
      except InputError as error:
        left_out.append(f'{name} ({main.as_flags(error)})')
  if left_out:
    yield note(f'Figures of the paper that are left out: {"; ".join(left_out)}')


def as_image(figure, description: str) -> str:
  """Return a matplotlib figure as an embedded SVG with a description."""
  file = io.BytesIO()
  figure.savefig(file, format='svg', metadata={'Date': None})
  data = base64.b64encode(file.getvalue()).decode()
  words = page.html.escape(description, quote=True)
  return f'<img alt="{words}" src="data:image/svg+xml;base64,{data}">'


# The page.


def report(finished, result: dict[str, Any], predictor) -> str:
  """Return the report of a finished run as HTML.

  Args:
    finished: the run under one split.
    result: its `result.json`.
    predictor: its models.
  """
  title = (
    f'{result["method"]} on {result.get("data_variant") or result["dataset"]}'
  )
  heading, kind = title, _kind(result)
  parts = []
  if result[kind]:
    reported = summary.errors_that_stand(result[kind])
    words = kind.replace('_', ' ')
    heading = f'{title}: {summary.mean_std(reported)} % {words}'
    parts += [section('Errors', errors_section(result))]
    parts += classes_section(result)
  predicted = predict_unlabelled(finished, predictor)
  if predicted is not None:
    parts += unlabelled_sections(finished, predicted)
  parts += confusion_sections(finished, result, predictor)
  parts += label_sections(finished, predictor)
  parts += mistakes_section(finished)
  parts.append(metrics_section(read_metrics(finished.folder, result)))
  if knows_hidden(finished):
    parts.append(
      section(
        f'Labels predicted for unlabelled images, split {finished.split.seed}',
        label_quality(finished),
      )
    )
    parts += own_figures(finished)
  parts.append(section('Settings', settings_section(result, finished.folder)))
  return page.document(title, parts, heading)


def knows_hidden(finished) -> bool:
  """True if the classes of some unlabelled images are known."""
  rows = load.hidden_rows(finished.split)
  return bool((finished.dataset.train.labels[rows] != UNLABELLED).any())


# The program.


def define_flags(values: flags.FlagValues) -> None:
  """Define the flags of this program."""
  flags.DEFINE_string(
    'run', None, 'Folder of a finished run.', flag_values=values
  )
  flags.DEFINE_string(
    'out',
    None,
    'File of the report; RUN/report.html if unset.',
    flag_values=values,
  )
  tool.define_run_flags(values)


def act(asked: dict[str, Any]) -> None:
  """Write the report that the flags describe."""
  require(asked['run'] is not None, '`run`: give the folder of a finished run')
  folder = files.as_place('run', asked['run'])
  result = load.finished_result(folder)
  wanted = folder / 'report.html' if asked['out'] is None else asked['out']
  make = files.as_place if files.in_bucket(wanted) else main.as_output
  out = make('out', str(wanted))
  finished = load.load(
    folder, asked['seed'], asked['data_dir'], asked['corrupt']
  )
  predictor = predictor_of(finished, asked['data_dir'])
  text = report(finished, result, predictor)
  with main.write_errors(out):
    run_folder.write_atomically(out, text)
  print(out)


def predictor_of(finished, data_dir: str | None) -> prediction.Predictor:
  """Return the models of a run: of all splits if they hold images out."""
  split = finished.split
  if len(split.test) or len(split.validation):
    return prediction.load(finished.folder, data_dir=data_dir)
  labelled = np.zeros(len(finished.dataset.train.labels), bool)
  labelled[split.labelled] = True
  model = api.model_of_finished(finished)
  return prediction.Predictor((model,), finished.dataset, labelled)


if __name__ == '__main__':
  tool.start('html_report', define_flags, act)
