"""Figure 2 of R2-D2, and what its theorems say of a run.

Wang, Wu, AAAI 2021:
  Figure 2, "A toy example"  `features`  2-d features before and after D2
  Theorems 1, 2, Eq. 13      `theorems`  what was measured of them in training

Each takes a `loading.Finished`. N training images, C classes.
"""

import numpy as np

from ssljax.errors import positive, require
from ssljax.experiments.figures import style

BEFORE = 'supervised'


# Figure 2.


def features(finished, *, stage: str = 'decipher', points: int = 10_000):
  """Figure 2: features of labelled and of all images, before and after a stage.

  Args:
    finished: the run.
    stage: after which stage the second row is drawn; the first is of the
      supervised stage's end.
    points: images drawn in the panels of all images, at most.
  """
  positive(points=points)
  ends = finished.stage_ends
  require(
    stage in ends,
    f'--stage={stage}: the run has {", ".join(ends)}: give one of them',
  )
  split, dataset = finished.split, finished.dataset
  seen = np.union1d(split.labelled, split.unlabelled)
  some = style.evenly(seen, points)
  rows = np.union1d(split.labelled, some)
  truth = dataset.train.labels[rows]
  labelled = np.isin(rows, split.labelled)
  panels = [
    (name, *look(finished, ends[name], rows)) for name in (BEFORE, stage)
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


def look(finished, step: int, rows) -> tuple[np.ndarray, float]:
  """Features `[M, 2]` of training rows `[M]` after a step, and the test error.

  Args:
    finished: the run.
    step: whose state it has kept.
    rows: of the training images.
  """
  state, data = finished.after(step), finished.program.data
  feature = finished.infer(state, data.train, rows).embedding
  require(
    feature.shape[1] == 2,
    f'--run: its network has {feature.shape[1]} features, which cannot be '
    'drawn as they are: train one with --network=lenet',
  )
  tested = finished.infer(state, data.test, np.arange(data.test.size))
  wrong = tested.logits.argmax(axis=-1) != finished.dataset.test.labels
  return feature, 100 * float(wrong.mean())


def draw_features(panels, truth, labelled, some, count: int, classes):
  """Four panels: labelled and all images, a row per stage.

  Args:
    panels: of each stage its name, features `[M, 2]`, and test error.
    truth: classes `[M]`.
    labelled: `[M]` bool.
    some: `[M]` bool, what is drawn of all images.
    count: how many images there are in all.
    classes: names.
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
  """Points `[M, 2]` in the colour of their class, named at its median."""
  from matplotlib import patheffects

  halo = [patheffects.withStroke(linewidth=2, foreground='w')]
  axes.scatter(
    *feature.T,
    s=size,
    c=[style.class_colour(c) for c in truth],
    linewidths=0,
    rasterized=True,  # thousands of points would fill a PDF
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

# Per panel: y axis, and what is drawn of the unlabelled images of a batch.
PANELS = (
  ('mean entropy in nats', {'pseudo_entropy': 'p̃', 'predicted_entropy': 'p̂'}),
  ('mean drift of a sum', {'sum_drift': '|Σ ỹ − Σ ỹ as predicted|, Eq. 13: 0'}),
  ('mean gap to Theorem 1', {'link_gap': '|p̃ₙ − exp(−L/α) p̂ₙ^(1−β/α)|'}),
)


def theorems(finished):
  """Theorems 1 and 2 and Eq. 13 as they were measured in training.

  Args:
    finished: the run.
  """
  measured = [m for m in finished.measured if 'link_gap' in m]
  require(bool(measured), '--run: its metrics.jsonl is gone or has other terms')
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
  """Three panels over the steps.

  Args:
    measured: of each measurement its step and its numbers by name.
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
    # Above the panel: inside there is no place without a line.
    axes.legend(
      frameon=False, ncols=2, loc='lower right', bbox_to_anchor=(1, 1)
    )
  panels[2].set_xlabel('step (dotted: ỹ ← ŷ)')
  return drawn
