"""Figure 2 of R2-D2, and its theorems measured in a run.

Wang, Wu, AAAI 2021:
  Figure 2, "A toy example"  `features`  2-d features before and after D2
  Theorems 1, 2, Eq. 13      `theorems`  measurements during training

Each function takes a `runs.load.Finished`.

Letters: M drawn training images, C classes.
"""

import numpy as np

from ssljax.errors import positive, require
from ssljax.experiments.figures import style

BEFORE = 'supervised'


# Figure 2.


def features(finished, *, stage: str = 'decipher', points: int = 10_000):
  """Draw Figure 2: features of labelled and of all images before and after D2.

  Args:
    finished: the finished run.
    stage: stage at whose end the second row of panels is drawn; the first row
      is drawn at the end of the supervised stage.
    points: largest number of images in the panels of all images.

  Returns:
    The figure, and its data as a table.

  Raises:
    InputError: the run has no such stage, or its features are not 2-d.
  """
  positive(points=points)
  ends = finished.stage_ends
  require(
    stage in ends,
    f'`stage`={stage}: the run has {", ".join(ends)}: give one of them',
  )
  split, dataset = finished.split, finished.dataset
  seen = np.union1d(split.labelled, split.unlabelled)
  some = style.evenly(seen, points)
  rows = np.union1d(split.labelled, some)
  truth = dataset.train.labels[rows]
  labelled = np.isin(rows, split.labelled)
  panels = [
    (name, *features_after(finished, ends[name], rows))
    for name in (BEFORE, stage)
  ]
  figure = draw_features(
    panels, truth, labelled, np.isin(rows, some), len(seen), dataset.classes
  )
  axes = [f'{name}_{axis}' for name in (BEFORE, stage) for axis in 'xy']
  coordinates = np.concatenate([feature for _, feature, _ in panels], axis=1)
  return figure, {
    'features': [
      ('train_row', 'class', 'labelled', *axes),
      *(
        (row, dataset.classes[c], int(known), *xy)
        for row, c, known, xy in zip(
          rows, truth, labelled, coordinates, strict=True
        )
      ),
    ]
  }


def features_after(finished, step: int, rows) -> tuple[np.ndarray, float]:
  """Return features `[M, 2]` after a step, and the test error in percent.

  Args:
    finished: the finished run.
    step: step of a kept checkpoint.
    rows: `[M]` rows of training images.

  Raises:
    InputError: the features are not 2-d.
  """
  state, data = finished.after(step), finished.program.data
  feature = finished.infer(state, data.train, rows).embedding
  require(
    feature.shape[1] == 2,
    f'`run`={finished.folder}: its network has {feature.shape[1]} features, '
    'but two are needed to draw them: train it with `network`=lenet',
  )
  tested = finished.infer(state, data.test, np.arange(data.test.size))
  wrong = tested.logits.argmax(axis=-1) != finished.dataset.test.labels
  return feature, 100 * float(wrong.mean())


def draw_features(panels, truth, labelled, some, count: int, classes):
  """Draw panels of the labelled and of all images, a row per stage.

  Args:
    panels: for each stage its name, features `[M, 2]`, and test error.
    truth: true labels `[M]`.
    labelled: `[M]` bool.
    some: `[M]` bool, images that are drawn in the panel of all images.
    count: number of all images.
    classes: names of the classes.
  """
  from matplotlib import figure

  drawn = figure.Figure(figsize=(5.2, 5.2), layout='constrained')
  axes = drawn.subplots(2, 2, sharex='row', sharey='row')
  letters = iter('abcd')
  for row, (name, feature, error) in zip(axes, panels, strict=True):
    scatter(row[0], feature[labelled], truth[labelled], classes, 3)
    scatter(row[1], feature[some], truth[some], classes, 0.6)
    row[0].set_title(f'({next(letters)}) {labelled.sum()} labelled images')
    shown = 'all' if some.sum() == count else f'{some.sum()} of'
    row[1].set_title(f'({next(letters)}) {shown} {count} images')
    row[0].set_ylabel(f'after {name}: test error {error:.2f} %')
  return drawn


def scatter(axes, feature, truth, classes, size: float) -> None:
  """Draw points `[M, 2]` coloured by class, with names at the medians."""
  from matplotlib import patheffects

  halo = [patheffects.withStroke(linewidth=2, foreground='w')]
  axes.scatter(
    *feature.T,
    s=size,
    c=[style.class_colour(c) for c in truth],
    linewidths=0,
    rasterized=True,  # Thousands of vector points make a large PDF.
  )
  for c in np.unique(truth):
    axes.text(
      *np.median(feature[truth == c], axis=0),
      classes[c],
      color=style.class_colour(c),
      weight='bold',
      ha='center',
      va='center',
      path_effects=halo,
    )
  axes.set_xticks([])
  axes.set_yticks([])


# Theorems 1 and 2, Eq. 13.

# Label of the y axis and lines of each panel: means over the unlabelled images
# of a batch.
PANELS = (
  ('mean entropy in nats', {'pseudo_entropy': 'p̃', 'predicted_entropy': 'p̂'}),
  ('mean drift of a sum', {'sum_drift': '|Σ ỹ − Σ ỹ as predicted|, Eq. 13: 0'}),
  ('mean gap to Theorem 1', {'link_gap': '|p̃ₙ − exp(−L/α) p̂ₙ^(1−β/α)|'}),
)


def theorems(finished):
  """Draw the quantities of Theorems 1 and 2 and Eq. 13 over training.

  Args:
    finished: the finished run.

  Returns:
    The figure, and its data as a table.

  Raises:
    InputError: `metrics.jsonl` is missing or has other metrics.
  """
  measured = [m for m in finished.measured if 'link_gap' in m]
  require(
    bool(measured),
    '`run`: its metrics.jsonl is missing or has other metrics: give another '
    'run',
  )
  ends = finished.stage_ends
  starts = dict(zip(ends, [0, *ends.values()], strict=False))
  reached = {m['stage'] for m in measured}
  predicted = [
    starts[stage.name]
    for stage in finished.program.method.stages
    if stage.per_example is not None and stage.name in reached
  ]
  columns = [name for _, panel in PANELS for name in panel]
  return draw_theorems(measured, predicted), {
    'theorems': [
      ('step', 'stage', *columns),
      *((m['step'], m['stage'], *(m[c] for c in columns)) for m in measured),
    ]
  }


def draw_theorems(measured, predicted):
  """Draw three panels over the steps.

  Args:
    measured: measurements, each with its step and numbers by name.
    predicted: steps after which the pseudo-logits were predicted.
  """
  from matplotlib import figure

  drawn = figure.Figure(figsize=(3.4, 5.0), layout='constrained')
  panels = drawn.subplots(3, 1, sharex=True)
  steps = [m['step'] for m in measured]
  for axes, (label, lines) in zip(panels, PANELS, strict=True):
    for step in predicted:
      axes.axvline(step, color='0.7', linewidth=0.6, linestyle=':')
    for colour, (column, name) in enumerate(lines.items()):
      values = [m[column] for m in measured]
      axes.plot(steps, values, color=f'C{colour}', linewidth=0.8, label=name)
    axes.set_ylabel(label)
    axes.margins(x=0.01)
    axes.set_ylim(bottom=0)
    # The legend is above the panel, where no line is covered.
    axes.legend(
      frameon=False, ncols=2, loc='lower right', bbox_to_anchor=(1, 1)
    )
  panels[2].set_xlabel('step (dotted: ỹ ← ŷ)')
  return drawn
