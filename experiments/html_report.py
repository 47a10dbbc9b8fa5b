"""Write an HTML report of a finished run.

python experiments/html_report.py --run=runs/FOLDER

RUN/report.html is one self-contained file: the settings, the errors beside the
baselines', every metric over training, the confusion matrix, the most confident
mistakes, the quality of the labels that the method gives to unlabelled images,
and those figures of its paper that show one run.
"""

import base64
from collections.abc import Callable, Iterator
import html
import io
import pathlib
from typing import Any

from absl import flags
import numpy as np

from ssljax.cli import main, tool
from ssljax.core import UNLABELLED
from ssljax.errors import InputError, require
from ssljax.experiments.figures import association as association_figures
from ssljax.experiments.figures import catalogue, style
from ssljax.runs import load, run_folder, summary
from ssljax.training import metrics_writer

MISTAKES = 24  # number of the most confident mistakes that are shown
PER_ROW = 12  # images in a row of mistakes
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .5rem 0; }
td, th { padding: .15rem .9rem .15rem 0; text-align: left;
         vertical-align: top; }
th { border-bottom: 1px solid #999; }
td { border-bottom: 1px solid #e5e5e5; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto;
      font-size: .85rem; }
p.note { color: #666; margin: .2rem 0; }
"""


# HTML.


def as_table(rows: list[list[str]]) -> str:
  """Return rows of cells as an HTML table; the first row is the header."""
  line = lambda cells, tag: ''.join(
    f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells
  )
  head, *body = rows
  lines = ''.join(f'<tr>{line(cells, "td")}</tr>\n' for cells in body)
  return f'<table><tr>{line(head, "th")}</tr>\n{lines}</table>'


def as_image(figure, description: str) -> str:
  """Return a matplotlib figure as an embedded SVG with a description."""
  file = io.BytesIO()
  figure.savefig(file, format='svg', metadata={'Date': None})
  data = base64.b64encode(file.getvalue()).decode()
  words = html.escape(description, quote=True)
  return f'<img alt="{words}" src="data:image/svg+xml;base64,{data}">'


def section(title: str, *parts: str) -> str:
  """Return a part of the page under a heading."""
  return f'<h2>{html.escape(title)}</h2>\n' + '\n'.join(parts) + '\n'


def note(text: str) -> str:
  """Return a paragraph in grey."""
  return f'<p class="note">{html.escape(text)}</p>'


# Settings and errors.


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
    text = html.escape((folder / 'flags.txt').read_text())
  return as_table([['setting', 'value'], *rows]) + (
    f'<details><summary>all flags</summary><pre>{text}</pre></details>'
  )


def errors_section(result: dict[str, Any]) -> str:
  """Return the test errors of every trained method and of every split."""
  kinds = ('last', 'averaged', 'median_last', 'minimum')
  known = [kind for kind in kinds if kind in result['test_error']]
  rows = [['method', *known, 'by split (last)']]
  for arm, entry in result['arms'].items():
    found = entry['test_error']
    cells = [summary.mean_std(found[k]) if k in found else '–' for k in known]
    splits = ' '.join(f'{value:.2f}' for value in found['last'])
    rows.append([arm, *cells, splits])
    rows += [
      [f'{arm}, after stage {stage}', summary.mean_std(values)]
      + [''] * len(known)
      for stage, values in entry.get('test_error_after', {}).items()
    ]
  return as_table(rows) + note(
    'Test error in percent, mean ± standard deviation over label splits. last: '
    'at the last step; averaged: of the averaged weights at the last step; '
    'median_last: median of the last five evaluations; minimum: smallest error '
    'over training, a choice made on the test set.'
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


def metrics_figure(found: dict[str, dict]):
  """Return a figure with a panel per metric and a line per trained method.

  Test errors come first, then the loss, then the other metrics by name.

  Args:
    found: as from `read_metrics`.
  """
  from matplotlib import figure, lines

  first = lambda name: (not name.endswith(('last', 'averaged')), name != 'loss')
  names = sorted(found, key=lambda name: (*first(name), name))
  columns = 4
  rows = -(-len(names) // columns)
  drawn = figure.Figure(figsize=(8.4, 1.5 * rows + 0.3), layout='constrained')
  panels = drawn.subplots(rows, columns, squeeze=False).ravel()
  arms = list(dict.fromkeys(arm for name in names for arm in found[name]))
  for axes, name in zip(panels, names, strict=False):
    for arm, of_arm in found[name].items():
      steps = sorted(of_arm)
      mean = np.array([np.mean(of_arm[step]) for step in steps])
      deviations = [style.deviation(of_arm[step]) for step in steps]
      colour = f'C{arms.index(arm)}'
      style.plot_band(axes, steps, mean, np.array(deviations), colour)
    axes.set_title(name.replace('_', ' '))
    axes.margins(x=0.01)
  for axes in panels[len(names) :]:
    axes.axis('off')
  handles = [
    lines.Line2D([], [], color=f'C{i}', label=arm) for i, arm in enumerate(arms)
  ]
  drawn.legend(
    handles=handles, loc='outside lower right', ncols=len(arms), frameon=False
  )
  return drawn


# Predictions on test images.


def predict_test_images(finished) -> tuple[np.ndarray, np.ndarray]:
  """Return probabilities `[M, C]` of the test images and true labels `[M]`."""
  feed = finished.program.data.test
  logits = finished.infer(finished.state, feed, np.arange(feed.size)).logits
  e = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True), finished.dataset.test.labels


def confusion_figure(p, truth, names):
  """Return the confusion matrix as a figure, with counts if C is small.

  Args:
    p: probabilities `[M, C]`.
    truth: true labels `[M]`.
    names: names of the classes.
  """
  from matplotlib import figure

  counts = association_figures.confusion(truth, p.argmax(axis=-1), len(names))
  share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
  few = len(names) <= style.MANY_CLASSES
  side = 4.2 if few else 5.5
  drawn = figure.Figure(figsize=(side + 0.6, side), layout='constrained')
  axes = drawn.subplots()
  image = axes.imshow(share, cmap='Blues', vmin=0, vmax=1)
  axes.set(xlabel='predicted', ylabel='true')
  if few:
    axes.set_xticks(range(len(names)), names, rotation=45, ha='right')
    axes.set_yticks(range(len(names)), names)
    for (y, x), count in np.ndenumerate(counts):
      if count:
        ink = 'w' if share[y, x] > 0.6 else 'k'
        axes.text(x, y, count, ha='center', va='center', size=6, color=ink)
  drawn.colorbar(image, ax=axes, shrink=0.8, label='share of the true class')
  return drawn


def most_confident_mistakes(p, truth) -> np.ndarray:
  """Return the rows of the most confident mistakes, most confident first."""
  wrong = np.flatnonzero(p.argmax(axis=-1) != truth)
  return wrong[np.argsort(-p[wrong].max(axis=-1), kind='stable')][:MISTAKES]


def mistakes_figure(images, truth, p, names):
  """Return a figure of misclassified images with true and predicted class.

  Args:
    images: `[E, H, W, c]`.
    truth: true labels `[E]`.
    p: probabilities `[E, C]`.
    names: names of the classes.
  """
  from matplotlib import figure

  pitch, line = 0.68, 0.36
  rows = -(-len(images) // PER_ROW)
  size = pitch * PER_ROW + 0.1, rows * (pitch + line) + 0.05
  drawn = figure.Figure(figsize=size)
  for row in range(rows):
    top = row * (pitch + line)
    axes = style.add_images(drawn, 0.05, top, pitch, PER_ROW, 1)
    part = slice(row * PER_ROW, (row + 1) * PER_ROW)
    shown = zip(images[part], truth[part], p[part], strict=True)
    for x, (image, label, of_image) in enumerate(shown):
      style.place(axes, image, x, 0)
      guess = of_image.argmax()
      words = f'{names[label]} → {names[guess]}\n{100 * of_image[guess]:.0f} %'
      axes.text(x, 0.52, words, ha='center', va='top', size=6)
  return drawn


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


def or_reason(make: Callable[[], str]) -> str:
  """Return a part of the page, or the reason why this run has none."""
  try:
    return make()
  except InputError as error:
    return note(f'Not available: {main.as_flags(error)}')


def own_figures(finished) -> Iterator[str]:
  """Yield the figures of the method that show a single run."""
  method = finished.program.method.name
  for name, drawing in catalogue.FIGURES.items():
    if name.startswith(f'{method}/') and drawing.alone:
      draw = lambda d=drawing: as_image(d.draw(finished)[0], d.shows)
      yield section(f'{name}: {drawing.shows}', or_reason(draw))


# The page.


def page(finished, result: dict[str, Any]) -> str:
  """Return the report of a finished run under one split, as HTML."""
  folder, seed = finished.folder, finished.split.seed
  metrics = metrics_figure(read_metrics(folder, result))
  parts = [
    section('Settings', settings_section(result, folder)),
    section('Errors', errors_section(result)),
    section(
      'Metrics over training',
      as_image(metrics, 'every metric over the steps'),
      note(
        'Mean over the label splits, with a band of one standard deviation.'
      ),
    ),
    *prediction_sections(finished),
    section(
      f'Labels predicted for unlabelled images, split {seed}',
      or_reason(lambda: label_quality(finished)),
    ),
    *own_figures(finished),
  ]
  title = html.escape(f'{result["method"]} on {result["dataset"]}')
  reported = summary.errors_that_stand(result['test_error'])
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    f'<title>{title}</title>\n<style>{STYLE}</style></head>\n'
    f'<body><h1>{title}: {summary.mean_std(reported)} % test error</h1>\n'
    f'{"".join(parts)}</body></html>\n'
  )


def prediction_sections(finished) -> Iterator[str]:
  """Yield the confusion matrix and, if there are mistakes, some of them."""
  dataset = finished.dataset
  p, truth = predict_test_images(finished)
  yield section(
    f'Confusion matrix, split {finished.split.seed}',
    as_image(confusion_figure(p, truth, dataset.classes), 'confusion matrix'),
  )
  rows = most_confident_mistakes(p, truth)
  if len(rows):
    images = dataset.test.read(rows)
    drawn = mistakes_figure(images, truth[rows], p[rows], dataset.classes)
    yield section(
      'Most confident mistakes',
      as_image(drawn, 'misclassified test images with the highest probability'),
    )


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
  style.check_matplotlib()
  folder = main.as_path('run', asked['run'])
  result = load.finished_result(folder)
  wanted = folder / 'report.html' if asked['out'] is None else asked['out']
  out = main.as_output('out', str(wanted))
  where = asked['seed'], asked['data_dir'], asked['corrupt']
  finished = load.load(folder, *where)
  with style.style():
    text = page(finished, result)
  with main.write_errors(out):
    run_folder.write_atomically(out, text)
  print(out)


if __name__ == '__main__':
  tool.start('html_report', define_flags, act)
