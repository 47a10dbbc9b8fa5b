"""Writes `report.html` into the folder of a finished run.

python experiments/html_report.py --run=runs/FOLDER

One file that needs nothing else: what was run, errors beside the baseline's,
every measured term over training, which classes are taken for which, the most
confident mistakes, how good the labels are that a method gives to images
without one, and its figures that show one run.
"""

import base64
from collections.abc import Callable, Iterator
import html
import io
import pathlib
import re
from typing import Any

from absl import flags
import numpy as np

from ssljax.cli import main, tool
from ssljax.core import UNLABELLED
from ssljax.errors import InputError, require
from ssljax.experiments.figures import association as association_figures
from ssljax.experiments.figures import catalogue, style
from ssljax.experiments.figures import madnn as madnn_figures
from ssljax.methods import deepbass, llp, madnn, r2d2
from ssljax.runs import load, run_folder, summary
from ssljax.training import metrics_writer

CONFUSED = 24  # most confident mistakes that are shown
PER_ROW = 12  # of them
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
  """Rows of cells, the first of them the header."""
  line = lambda cells, tag: ''.join(
    f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells
  )
  head, *body = rows
  lines = ''.join(f'<tr>{line(cells, "td")}</tr>\n' for cells in body)
  return f'<table><tr>{line(head, "th")}</tr>\n{lines}</table>'


def as_image(figure, says: str) -> str:
  """A figure inside the page; what it shows in words beside it."""
  file = io.BytesIO()
  figure.savefig(file, format='svg', metadata={'Date': None})
  data = base64.b64encode(file.getvalue()).decode()
  words = html.escape(says, quote=True)
  return f'<img alt="{words}" src="data:image/svg+xml;base64,{data}">'


def section(title: str, *parts: str) -> str:
  """A part of the page under a heading."""
  return f'<h2>{html.escape(title)}</h2>\n' + '\n'.join(parts) + '\n'


def note(text: str) -> str:
  """A sentence in grey."""
  return f'<p class="note">{html.escape(text)}</p>'


# What was run, and how well it did.


def what(result: dict[str, Any], folder: pathlib.Path) -> str:
  """Data, splits, length, machine and command."""
  versions = ', '.join(f'{k} {v}' for k, v in result['versions'].items())
  rows = [
    ['data', f'{result["dataset"]}, {result["labels"]} labels per class'],
    ['label splits', ', '.join(map(str, result['seeds']))],
    ['steps', f'{result["steps"]:,}'],
    ['seconds in steps', f'{result["seconds"]:,.0f}, of the method alone'],
    ['device', result['device']],
    ['commit', result['commit']],
    ['versions', versions],
    ['command', result['command']],
  ]
  text = html.escape((folder / 'flags.txt').read_text())
  return as_table([['what', ''], *rows]) + (
    f'<details><summary>all flags</summary><pre>{text}</pre></details>'
  )


def errors(result: dict[str, Any]) -> str:
  """Test errors of every arm, and of every split."""
  kinds = ('last', 'averaged', 'median_last', 'minimum')
  known = [kind for kind in kinds if kind in result['test_error']]
  rows = [['method', *known, 'by split (last)']]
  for arm, entry in result['arms'].items():
    found = entry['test_error']
    cells = [summary.mean_std(found[k]) if k in found else '–' for k in known]
    splits = ' '.join(f'{value:.2f}' for value in found['last'])
    rows.append([arm, *cells, splits])
    rows += [
      [f'{arm}, after its stage {stage}', summary.mean_std(values)]
      + [''] * len(known)
      for stage, values in entry.get('test_error_after', {}).items()
    ]
  return as_table(rows) + note(
    'Test error in percent, mean ± standard deviation over the label splits: '
    'at the last step (last), of averaged weights there (averaged), the median '
    'of the last five evaluations (median_last), the least over training, a '
    'choice made on the test set (minimum).'
  )


# What was measured in training.


def curves(folder: pathlib.Path, arms: list[str]) -> dict[str, dict[str, dict]]:
  """By name of a term and by arm: step -> values of the splits."""
  skipped = {'job', 'step', 'stage', 'seed', *metrics_writer.TIMING}
  found = {}
  for arm in arms:
    for line in metrics_writer.read(folder, arm):
      for name in line.keys() - skipped:
        of_arm = found.setdefault(name, {}).setdefault(arm, {})
        of_arm.setdefault(line['step'], []).append(line[name])
  return found


def deviation(values: list[float]) -> float:
  """Standard deviation over the splits; 0 of a single one."""
  return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def draw_curves(found: dict[str, dict]):
  """A panel per term, a line per arm; test errors first, then the loss."""
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
      spread = np.array([deviation(of_arm[step]) for step in steps])
      colour = f'C{arms.index(arm)}'
      axes.plot(steps, mean, color=colour, linewidth=1)
      ends = mean - spread, mean + spread
      axes.fill_between(steps, *ends, color=colour, alpha=0.2, linewidth=0)
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


# What is taken for what.


def tested(finished) -> tuple[np.ndarray, np.ndarray]:
  """Probabilities `[M, C]` of the test images, and their classes `[M]`."""
  feed = finished.program.data.test
  logits = finished.infer(finished.state, feed, np.arange(feed.size)).logits
  e = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True), finished.dataset.test.labels


def draw_confusion(p, truth, names):
  """Which class is taken for which, as shares of the true one."""
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


def worst(p, truth) -> np.ndarray:
  """Rows of the most confident mistakes, the most confident first."""
  wrong = np.flatnonzero(p.argmax(axis=-1) != truth)
  return wrong[np.argsort(-p[wrong].max(axis=-1), kind='stable')][:CONFUSED]


def draw_worst(images, truth, p, names):
  """Images `[E, H, W, c]`, below each its class, and what it was taken for."""
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


# How good the labels are that a method gives to images without one.


def said(finished, state, rows) -> dict[str, np.ndarray]:
  """By who says so, classes `[M]` of rows; UNLABELLED where nothing is said."""
  feed, memory = finished.program.data.train, state.memory
  logits = finished.infer(state, feed, rows).logits
  found = {'the classifier': logits.argmax(axis=-1)}
  classes, of_rows = logits.shape[-1], lambda x: np.asarray(x[0])[rows]
  if isinstance(memory, madnn.Slots):
    p_hat = madnn_figures.predicted(finished, state, rows)
    found['the memory'] = p_hat.argmax(axis=-1)
  elif isinstance(memory, r2d2.PseudoLabels):
    kept = of_rows(memory.logits)
    given = kept.any(axis=-1)  # zeros before they are first predicted
    found['the memory'] = np.where(given, kept.argmax(axis=-1), UNLABELLED)
  elif isinstance(memory, deepbass.PseudoLabels):
    found['the memory'] = np.where(
      of_rows(memory.member), of_rows(memory.labels), UNLABELLED
    )
  elif isinstance(memory, llp.Bank):
    kept = of_rows(memory.labels)  # before propagation, every row its own
    found['the memory'] = np.where(kept < classes, kept, UNLABELLED)
  return found


def quality(finished) -> str:
  """The error of these labels at every step the run has kept."""
  rows, cells = finished.hidden, []
  for step in finished.kept:
    state = finished.after(step)
    # What has been asked for since is no longer hidden.
    still = rows[np.asarray(state.labels[0])[rows] == UNLABELLED]
    truth = finished.dataset.train.labels[still]
    found = said(finished, state, still)
    errors = [error_of(labels, truth) for labels in found.values()]
    cells.append([f'{step:,}', *(cell for pair in errors for cell in pair)])
  header = ['step', *(cell for who in found for cell in (who, 'of images'))]
  return as_table([header, *cells]) + note(
    f'Error in percent of the labels given to {len(rows):,} training images '
    f'whose own was hidden, split {finished.split.seed}, and how many have '
    'one. A run trained with --keep_every has more steps.'
  )


def error_of(labels, truth) -> tuple[str, str]:
  """The error of the labels `[M]` that are given, and how many are."""
  given = labels != UNLABELLED
  count = np.count_nonzero(given)
  error = 100 * np.mean(labels[given] != truth[given]) if count else None
  return '–' if error is None else f'{error:.2f}', f'{count:,}'


# The method's own figures.


def or_why(make: Callable) -> str:
  """A part of the page, or why this run has none."""
  try:
    return make()
  except InputError as error:
    return note(f'Not of this run: {error}')


def own_figures(finished) -> Iterator[str]:
  """Those of `figures.FIGURES` that one run of its method can show."""
  method = finished.program.method.name
  for name, drawing in catalogue.FIGURES.items():
    if name.startswith(f'{method}/') and drawing.alone:
      shows = re.split(r' \(|;', drawing.shows)[0]  # not the flags it needs
      draw = lambda of=drawing: as_image(of.draw(finished)[0], of.shows)
      yield section(f'{name}: {shows}', or_why(draw))


# The page.


def page(finished, result: dict[str, Any]) -> str:
  """The whole report of a finished run, under one split."""
  dataset, folder = finished.dataset, finished.folder
  p, truth = tested(finished)
  rows = worst(p, truth)
  terms = draw_curves(curves(folder, list(result['arms'])))
  parts = [
    section('What was run', what(result, folder)),
    section('Errors', errors(result)),
    section(
      'In training',
      as_image(terms, 'every measured term over the steps'),
      note('Mean over the splits, and a standard deviation about it.'),
    ),
    section(
      f'What is taken for what, split {finished.split.seed}',
      as_image(draw_confusion(p, truth, dataset.classes), 'confusion matrix'),
    ),
  ]
  if len(rows):
    images = dataset.test.read(rows)
    worst_drawn = draw_worst(images, truth[rows], p[rows], dataset.classes)
    says = 'test images that are wrong with the highest probability'
    parts.append(
      section('The most confident mistakes', as_image(worst_drawn, says))
    )
  of_hidden = or_why(lambda: quality(finished))
  parts.append(section('Labels given to images without one', of_hidden))
  title = f'{result["method"]} on {result["dataset"]}'
  standing = summary.errors_that_stand(result['test_error'])
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    f'<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n'
    f'<body><h1>{html.escape(title)}: {summary.mean_std(standing)} % '
    f'test error</h1>\n{"".join(parts)}{"".join(own_figures(finished))}'
    '</body></html>\n'
  )


def define_flags(values: flags.FlagValues) -> None:
  """Defines this program's flags."""
  flags.DEFINE_string(
    'run', None, 'Folder of a finished run.', flag_values=values
  )
  flags.DEFINE_string(
    'out', None, 'RUN/report.html if unset.', flag_values=values
  )
  tool.define_run_flags(values)


def write(asked: dict[str, Any]) -> None:
  """Writes the report that the flags, by name, ask for."""
  require(asked['run'] is not None, '--run: give the folder of a finished run')
  style.check_matplotlib()
  folder = pathlib.Path(asked['run'])
  result = load.finished_result(folder)
  out = pathlib.Path(asked['out'] or folder / 'report.html')
  finished = load.load(
    folder, asked['seed'], asked['data_dir'], asked['corrupt']
  )
  with style.style():
    text = page(finished, result)
  with main.write_errors(out):
    out.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write_atomically(out, text)
  print(out)


if __name__ == '__main__':
  tool.start('html_report', define_flags, write)
