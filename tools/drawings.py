"""Draw the SVG files of the documentation, docs/drawings/*.svg.

    python tools/drawings.py [--check]

The site puts the drawings into its pages, where text and lines take the colours
of the page, light or dark. With --check nothing is written; the exit status is
1 if a file is out of date. `errors.svg` has the numbers of
experiments/results/own-digits.paper.csv.
"""

import argparse
import csv
import html
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'docs' / 'drawings'
RESULTS = ROOT / 'experiments' / 'results' / 'own-digits.paper.csv'
WIDTH = 600
INK = 'var(--md-default-fg-color, #222)'
FAINT = 'var(--md-default-fg-color--light, #777)'
BLUE, ORANGE, GREEN, GREY = '#4c78d8', '#d9822b', '#3a9d6e', '#8a8f98'
# Pairs of rows of RESULTS: labels alone, with the unlabelled images.
PAIRS = (
  ('MA-DNN', 'labels alone', 'MA-DNN'),
  (
    'Association',
    "labels alone, association's network",
    'Learning by Association',
  ),
  ('R2-D2', 'R2-D2, its supervised stage', 'R2-D2'),
  ('LLP', "labels alone, LLP's network", 'LLP'),
)


class Drawing:
  """An SVG drawing, as a list of elements."""

  def __init__(self, height: int, width: int = WIDTH):
    """Begin an empty drawing."""
    self.height, self.width = height, width
    self.parts = []

  def text(self, x, y, words, *, size=13, anchor='start', color=INK, bold=0):
    """Write words, with their baseline at y."""
    weight = ' font-weight="600"' if bold else ''
    self.parts.append(
      f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"'
      f'{weight} style="fill:{color}">{html.escape(words)}</text>'
    )

  def box(self, x, y, width, height, color, words='', *, solid=False, dash=''):
    """Draw a rectangle with lines of words in its middle."""
    opacity = 0.9 if solid else 0.16
    dashed = f' stroke-dasharray="{dash}"' if dash else ''
    self.parts.append(
      f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" '
      f'fill="{color}" fill-opacity="{opacity}" stroke="{color}"{dashed}/>'
    )
    lines = words.split('\n') if words else []
    middle = y + height / 2 + 4.5 - 8 * (len(lines) - 1)
    for number, line in enumerate(lines):
      self.text(
        *(x + width / 2, middle + 16 * number, line),
        anchor='middle',
        size=12,
        color='#fff' if solid else INK,
      )

  def line(self, x1, y1, x2, y2, *, arrow=False, color=FAINT, width=1.4):
    """Draw a line, with an arrow at its end."""
    self.parts.append(
      f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" '
      f'style="stroke:{color}" stroke-width="{width}"/>'
    )
    if arrow:
      length = max(abs(x2 - x1), abs(y2 - y1))
      dx, dy = 6 * (x2 - x1) / length, 6 * (y2 - y1) / length
      self.parts.append(
        f'<path d="M{x2:g},{y2:g} L{x2 - dx - dy / 2:.1f},'
        f'{y2 - dy + dx / 2:.1f} L{x2 - dx + dy / 2:.1f},'
        f'{y2 - dy - dx / 2:.1f} Z" style="fill:{color}"/>'
      )

  def dot(self, x, y, color, radius=6):
    """Draw a filled circle."""
    self.parts.append(
      f'<circle cx="{x:g}" cy="{y:g}" r="{radius}" fill="{color}"/>'
    )

  def svg(self) -> str:
    """Return the text of the file."""
    head = (
      f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} '
      f'{self.height}" font-family="system-ui, sans-serif">\n'
    )
    return head + '\n'.join(self.parts) + '\n</svg>\n'


def errors() -> str:
  """Test errors of four papers' methods beside those of the labels alone."""
  with RESULTS.open() as file:
    rows = {row['row']: row for row in csv.DictReader(file)}
  drawing = Drawing(270, 440)
  left, right, most = 100, 430, 12.5
  place = lambda error: left + (right - left) * error / most
  for tick in (0, 5, 10):
    drawing.line(place(tick), 52, place(tick), 212, color=FAINT, width=0.5)
    drawing.text(place(tick), 230, f'{tick}', anchor='middle', color=FAINT)
  drawing.text((left + right) / 2, 254, 'test error, %', anchor='middle')
  drawing.dot(left + 6, 22, GREY)
  drawing.text(left + 18, 26, 'labels alone')
  drawing.dot(left + 124, 22, BLUE)
  drawing.text(left + 136, 26, 'with the unlabelled images')
  for number, (name, alone, method) in enumerate(PAIRS):
    y = 72 + 40 * number
    before, after = (float(rows[row]['ours']) for row in (alone, method))
    drawing.text(left - 14, y + 4, name, anchor='end', bold=1)
    drawing.line(
      *(place(before) - 8, y, place(after) + 9, y),
      arrow=place(before) - place(after) > 30,
      color=BLUE,
      width=2,
    )
    drawing.dot(place(before), y, GREY)
    drawing.dot(place(after), y, BLUE)
    drawing.text(place(before) + 11, y + 4, f'{before:.2f}', color=FAINT)
    drawing.text(place(after) - 11, y + 4, f'{after:.2f}', anchor='end', bold=1)
  return drawing.svg()


def stages() -> str:
  """A run's stages, rounds, epochs and steps over time."""
  drawing = Drawing(262)
  left, middle, right = 70, 250, 590
  for y, name in ((20, 'stage'), (72, 'round'), (124, 'epoch'), (176, 'step')):
    drawing.text(left - 10, y + 24, name, anchor='end', bold=1)
  drawing.box(left, 20, middle - left - 4, 38, BLUE, 'stage 1\nsteps=18')
  drawing.box(middle, 20, right - middle, 38, BLUE, 'stage 2\nepochs=4')
  drawing.box(left, 72, middle - left - 4, 38, ORANGE, 'one round')
  width = (right - middle) / 4
  for number in range(4):
    x = middle + number * width
    drawing.box(x, 72, width - 4, 38, ORANGE, f'round {number + 1}')
    drawing.box(x, 124, width - 4, 38, GREEN, f'epoch {number + 1}')
    for step in range(6):
      drawing.box(x + step * width / 6, 176, width / 6 - 4, 38, GREY)
    drawing.line(x, 240, x, 217, arrow=True)
  width = (middle - left) / 3
  for number in range(3):
    x = left + number * width
    drawing.box(x, 124, width - 4, 38, GREEN, f'epoch {number + 1}')
    for step in range(6):
      drawing.box(x + step * width / 6, 176, width / 6 - 3, 38, GREY)
  drawing.line(left, 240, left, 217, arrow=True)
  drawing.text(
    *(left, 256, 'arrows: start of a round'),
    size=12,
    color=FAINT,
  )
  return drawing.svg()


def step() -> str:
  """The parts of one train step."""
  drawing = Drawing(232)
  parts = (
    ('rows\nof the step', GREY),
    ('read views\npreprocess', GREEN),
    ('loss\nmethod', BLUE),
    ('gradient\noptimiser', ORANGE),
    ('average,\nafter_update', BLUE),
  )
  for number, (words, color) in enumerate(parts):
    x = 6 + number * 120
    drawing.box(x, 60, 98, 52, color, words)
    if number < 4:
      drawing.line(x + 98, 86, x + 118, 86, arrow=True)
  drawing.box(
    126,
    158,
    338,
    46,
    GREY,
    'TrainState: parameters, statistics,\n'
    'optimiser, labels, memory of the method',
    dash='4 3',
  )
  for x in (175, 295, 415):
    drawing.line(x, 158, x, 116, arrow=True)
  drawing.line(535, 112, 535, 181)
  drawing.line(535, 181, 468, 181, arrow=True)
  drawing.text(535, 222, 'new state', anchor='middle', size=12, color=FAINT)
  drawing.text(
    6, 30, 'One compiled function for all methods: core.make_step', bold=1
  )
  return drawing.svg()


def views() -> str:
  """Three views of one image of a batch."""
  drawing = Drawing(254)
  drawing.box(6, 94, 110, 66, GREY, 'row 17\nimage\n[H, W, c]')
  for number, (name, chain, key) in enumerate(
    (
      ('image', 'flip, translate', 'key(step, row 17)'),
      ('weak', 'flip, translate', "key(step, row 17, 'weak')"),
      (
        'strong',
        'flip, translate,\nrandaugment, cutout',
        "key(step, row 17, 'strong')",
      ),
    )
  ):
    y = 20 + number * 82
    drawing.line(116, 127, 176, y + 30, arrow=True)
    drawing.box(180, y, 230, 60, GREEN, chain)
    drawing.text(182, y - 5, key, size=11, color=FAINT)
    drawing.line(410, y + 30, 446, y + 30, arrow=True)
    drawing.box(
      450,
      y,
      144,
      60,
      BLUE,
      'batch.image' if not number else f"batch.views\n['{name}']",
    )
  return drawing.svg()


def streams() -> str:
  """Random streams: everything is a function of seed, step, row and view."""
  drawing = Drawing(330)
  drawing.box(240, 10, 120, 38, ORANGE, 'seed')
  drawing.line(270, 48, 150, 80, arrow=True)
  drawing.line(330, 48, 445, 80, arrow=True)
  drawing.text(
    75, 74, 'host: NumPy Philox', anchor='middle', size=11, color=FAINT
  )
  drawing.text(
    506, 74, 'device: JAX keys', anchor='middle', size=11, color=FAINT
  )
  drawing.box(6, 84, 130, 52, GREY, 'label split\n(seed, part)')
  drawing.box(150, 84, 130, 52, GREY, 'order of rows\n(seed, stage, epoch)')
  drawing.box(330, 84, 240, 40, GREEN, 'fold_in(key, step)')
  drawing.line(390, 124, 390, 152, arrow=True)
  drawing.line(520, 124, 520, 152, arrow=True)
  drawing.box(330, 156, 120, 40, GREEN, 'read key')
  drawing.box(466, 156, 104, 40, GREEN, 'loss key')
  drawing.line(390, 196, 390, 218, arrow=True)
  drawing.box(330, 222, 120, 40, BLUE, 'fold_in(row)')
  drawing.line(390, 262, 390, 284, arrow=True)
  drawing.box(330, 288, 240, 34, BLUE, 'fold_in(name of the view)')
  drawing.text(478, 216, 'dropout, MixUp,', size=11, color=FAINT)
  drawing.text(478, 231, 'noise of the method', size=11, color=FAINT)
  drawing.text(
    6, 170, 'No stream depends on the number of', size=12, color=FAINT
  )
  drawing.text(
    6, 187, 'devices, on the order of computing, or', size=12, color=FAINT
  )
  drawing.text(
    6, 204, 'on an earlier step: a run resumes', size=12, color=FAINT
  )
  drawing.text(6, 221, 'from a step number.', size=12, color=FAINT)
  return drawing.svg()


def sharding() -> str:
  """Ten rows on four devices: three rows each, two of them padding."""
  drawing = Drawing(282)
  drawing.text(6, 20, 'N = 10 images, 4 devices: tables of 12 rows', bold=1)
  for device in range(4):
    x = 6 + device * 148
    drawing.box(x, 34, 140, 240, GREY, dash='4 3')
    drawing.text(x + 70, 54, f'device {device}', anchor='middle', bold=1)
    drawing.box(x + 10, 64, 120, 40, ORANGE, 'parameters,\nstatistics')
    for row in range(3):
      number = device * 3 + row
      y = 114 + row * 34
      if number < 10:
        drawing.box(x + 10, y, 120, 28, BLUE, f'row {number}')
      else:
        drawing.box(x + 10, y, 120, 28, GREY, 'padding, −1', dash='3 3')
    drawing.box(x + 10, 222, 120, 42, GREEN, 'rows of the\nbatch: B / 4')
  return drawing.svg()


def association() -> str:
  """Walks from labelled images to unlabelled ones and back."""
  drawing = Drawing(212, 440)
  drawing.text(60, 20, 'labelled, A', anchor='middle', bold=1)
  drawing.text(230, 20, 'unlabelled, B', anchor='middle', bold=1)
  drawing.text(390, 20, 'labelled, A', anchor='middle', bold=1)
  left = ((52, BLUE), (92, BLUE), (132, ORANGE), (172, ORANGE))
  middle = 52, 92, 132, 172
  for one, other, color in (
    *((52, 52, BLUE), (52, 92, BLUE), (92, 92, BLUE), (132, 132, ORANGE)),
    *((172, 132, ORANGE), (172, 172, ORANGE)),
  ):
    drawing.line(70, one, 220, other, color=color)
    drawing.line(240, other, 378, one, arrow=True, color=color)
  for y, color in left:
    drawing.dot(60, y, color, 8)
    drawing.dot(390, y, color, 8)
  for y in middle:
    drawing.dot(230, y, GREY, 8)
  drawing.text(145, 204, 'P^ab', anchor='middle', color=FAINT)
  drawing.text(312, 204, 'P^ba', anchor='middle', color=FAINT)
  return drawing.svg()


def neighbours() -> str:
  """An unlabelled embedding and the votes of its nearest labelled rows."""
  drawing = Drawing(212, 440)
  x, y = 150, 104
  for there, up, color, width in (
    *((96, 62, BLUE, 5), (88, 122, BLUE, 4), (176, 44, BLUE, 3)),
    (236, 132, ORANGE, 2),
  ):
    drawing.line(x, y, there, up, color=color, width=width)
    drawing.dot(there, up, color, 8)
  for there, up, color in (
    (30, 40, BLUE),
    (276, 84, ORANGE),
    (270, 170, ORANGE),
  ):
    drawing.dot(there, up, color, 8)
  for there, up in ((60, 170), (120, 176), (214, 84), (190, 178), (44, 96)):
    drawing.dot(there, up, GREY, 5)
  drawing.dot(x, y, GREY, 9)
  drawing.text(x - 4, y + 25, 'v', bold=1)
  drawing.text(320, 40, 'votes w', bold=1)
  drawing.box(320, 54, 92, 24, BLUE, '', solid=True)
  drawing.box(320, 86, 16, 24, ORANGE, '', solid=True)
  drawing.text(320, 138, 'y ← argmax w', size=12)
  drawing.text(320, 158, 'c ← max w / Σ w', size=12)
  drawing.text(6, 206, 'grey: images without a label', size=12, color=FAINT)
  return drawing.svg()


def thresholds() -> str:
  """Confidences of weak views, and which are learned on strong views."""
  drawing = Drawing(232, 440)
  base, scale, limit = 180, 140, 0.8
  for number, height in enumerate((0.98, 0.55, 0.9, 0.4, 0.84, 0.7)):
    is_learned = height >= limit
    x = 90 + number * 56
    drawing.box(
      *(x, base - scale * height, 38, scale * height),
      BLUE if is_learned else GREY,
      solid=is_learned,
    )
    words = 'learned' if is_learned else 'left out'
    drawing.text(x + 19, base + 18, words, size=11, anchor='middle')
  y = base - scale * limit
  drawing.line(78, y, 424, y, color=ORANGE, width=2)
  drawing.text(70, y + 5, 'τ', anchor='end', bold=1)
  drawing.line(78, base, 424, base)
  drawing.text(70, base - scale + 5, '1', anchor='end', color=FAINT)
  drawing.text(70, base + 5, '0', anchor='end', color=FAINT)
  drawing.text(
    *(251, 222, 'max q of the weak view of six images'),
    anchor='middle',
    color=FAINT,
  )
  return drawing.svg()


DRAWINGS = {
  one.__name__: one
  for one in (
    *(errors, stages, step, views, streams, sharding),
    *(association, neighbours, thresholds),
  )
}


def main() -> int:
  """Write or check the files."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--check', action='store_true')
  check = parser.parse_args().check
  old = []
  for name, draw in DRAWINGS.items():
    path = FOLDER / f'{name}.svg'
    text = draw()
    if not path.is_file() or path.read_text() != text:
      old.append(name)
      if not check:
        path.write_text(text)
  print(f'{"out of date" if check else "written"}: {", ".join(old) or "none"}')
  return int(check and bool(old))


if __name__ == '__main__':
  sys.exit(main())
