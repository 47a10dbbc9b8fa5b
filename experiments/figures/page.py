"""Self-contained HTML pages: tables, charts as inline SVG, and embedded images.

They need no network, no script and no matplotlib.
"""

import base64
from collections.abc import Iterable, Sequence
import html
import io
import math
from typing import NamedTuple

import numpy as np
import PIL.Image

from ssljax.experiments.figures import style

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .5rem 0; }
td, th { padding: .15rem .9rem .15rem 0; text-align: left;
         vertical-align: top; }
th { border-bottom: 1px solid #999; }
td { border-bottom: 1px solid #e5e5e5; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; } svg { width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: #333; }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto;
      font-size: .85rem; }
p.note { color: #666; margin: .2rem 0; }
.wide { overflow-x: auto; } .short { white-space: nowrap; }
table.confusion td, table.confusion th { padding: .2rem .45rem; border: 0;
      text-align: right; min-width: 1.6rem; }
table.confusion th { font-weight: 600; font-size: .85rem; }
.images { display: flex; flex-wrap: wrap; gap: .7rem .6rem; margin: .5rem 0; }
.images figure { margin: 0; width: 6.2rem; }
.images img { width: 6.2rem; image-rendering: pixelated;
      border: 1px solid #ddd; }
.images figcaption { font-size: .75rem; line-height: 1.25;
      overflow-wrap: anywhere; }
.bar { background: #0072B2; display: inline-block; height: .7rem;
      vertical-align: baseline; }
"""
WIDTH, HEIGHT = 860, 300  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 26, 42  # margins around the lines
SHORT = 30  # characters of a cell that is not wrapped
SIDE = 96  # pixels to which small images are enlarged


def document(title: str, parts: Iterable[str], heading: str = '') -> str:
  """Return a page.

  Args:
    title: of the window.
    parts: HTML of the sections, in order.
    heading: of the page; the title if empty.
  """
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n'
    f'<body><h1>{html.escape(heading or title)}</h1>\n'
    f'{"".join(parts)}</body></html>\n'
  )


def section(title: str, *parts: str) -> str:
  """Return a part of the page under a heading."""
  return f'<h2>{html.escape(title)}</h2>\n' + '\n'.join(parts) + '\n'


def note(text: str) -> str:
  """Return a paragraph in grey."""
  return f'<p class="note">{html.escape(text)}</p>'


def as_table(rows: Sequence[Sequence[str]]) -> str:
  """Return rows of cells as an HTML table; the first row is the header."""
  short = lambda cell: ' class="short"' if len(cell) <= SHORT else ''
  line = lambda cells, tag: ''.join(
    f'<{tag}{short(str(cell))}>{html.escape(str(cell))}</{tag}>'
    for cell in cells
  )
  head, *body = rows
  lines = ''.join(f'<tr>{line(cells, "td")}</tr>\n' for cells in body)
  table = f'<table><tr>{line(head, "th")}</tr>\n{lines}</table>'
  return f'<div class="wide">{table}</div>'


def bars(rows: Sequence[tuple[str, int]], header: tuple[str, str]) -> str:
  """Return a table of names and counts, each count with a bar.

  Args:
    rows: (name, count).
    header: of the two columns.
  """
  most = max((count for _, count in rows), default=0) or 1
  total = sum(count for _, count in rows) or 1
  lines = ''.join(
    f'<tr><td>{html.escape(name)}</td><td>{count:,}</td>'
    f'<td class="short">{100 * count / total:.1f} %</td><td><span class="bar" '
    f'style="width:calc({count / most:.3f} * min(18rem, 26vw))"></span></td>'
    '</tr>\n'
    for name, count in rows
  )
  head = ''.join(f'<th>{html.escape(name)}</th>' for name in (*header, '', ''))
  table = f'<table><tr>{head}</tr>\n{lines}</table>'
  return f'<div class="wide">{table}</div>'


def confusion(counts: np.ndarray, names: Sequence[str]) -> str:
  """Return a confusion matrix as a coloured table.

  Args:
    counts: `[C, C]`, rows are true classes.
    names: `[C]`.
  """
  share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
  cells = lambda c: ''.join(
    f'<td style="background:rgba(0,114,178,{share[c, k]:.2f});'
    f'color:{"#fff" if share[c, k] > 0.6 else "#222"}">'
    f'{counts[c, k] or ""}</td>'
    for k in range(len(names))
  )
  head = ''.join(f'<th>{html.escape(name)}</th>' for name in names)
  lines = ''.join(
    f'<tr><th>{html.escape(name)}</th>{cells(c)}</tr>\n'
    for c, name in enumerate(names)
  )
  table = (
    f'<table class="confusion"><tr><th>true \\ predicted</th>{head}</tr>\n'
    f'{lines}</table>'
  )
  return f'<div class="wide">{table}</div>'


# Images.


def as_png(image: np.ndarray) -> str:
  """Return an image as the address of an embedded PNG file.

  Args:
    image: `[H, W, c]` uint8, or floats of any range.
  """
  if image.dtype != np.uint8:
    low, high = float(image.min()), float(image.max())
    image = np.uint8(np.round(255 * (image - low) / max(high - low, 1e-9)))
  drawn = PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  factor = max(1, SIDE // max(drawn.size))
  size = drawn.width * factor, drawn.height * factor
  file = io.BytesIO()
  drawn.resize(size, PIL.Image.Resampling.NEAREST).save(file, 'PNG')
  data = base64.b64encode(file.getvalue()).decode()
  return f'data:image/png;base64,{data}'


def images(shown: Iterable[tuple[np.ndarray, str]]) -> str:
  """Return images `[H, W, c]`, each above the lines of its caption."""
  figures = (
    f'<figure><img alt="{html.escape(text, quote=True)}" src="{as_png(image)}">'
    f'<figcaption>{"<br>".join(html.escape(text).splitlines())}</figcaption>'
    '</figure>\n'
    for image, text in shown
  )
  return f'<div class="images">{"".join(figures)}</div>'


# Charts.


class Line(NamedTuple):
  """A line of a chart."""

  name: str
  points: dict[int, list[float]]  # step -> values, of which the mean is drawn


def chart(lines: Sequence[Line], y_label: str, x_label: str = 'step') -> str:
  """Return lines over steps as SVG, each with a band of one deviation.

  Args:
    lines: with at least one point in all.
    y_label: of the vertical axis.
    x_label: of the horizontal axis.
  """
  drawn = [line for line in lines if line.points]
  shapes, bounds = [], []
  for line in drawn:
    steps = sorted(line.points)
    mean = np.array([np.mean(line.points[s]) for s in steps], float)
    spread = np.array([_deviation(line.points[s]) for s in steps])
    shapes.append((steps, mean, spread))
    bounds += [*(mean - spread), *(mean + spread)]
  low, high = _range([x for x in bounds if math.isfinite(x)])
  last = max(steps[-1] for steps, *_ in shapes) or 1
  width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
  x = lambda step: LEFT + width * step / last
  y = lambda value: TOP + height * (high - value) / (high - low)
  parts = [_axes(low, high, last, x, y)]
  for number, (steps, mean, spread) in enumerate(shapes):
    colour = f'#{style.COLOURS[number % len(style.COLOURS)]}'
    known = [i for i in range(len(steps)) if math.isfinite(mean[i])]
    path = lambda values, known=known, steps=steps: ' '.join(
      f'{x(steps[i]):.1f},{y(values[i]):.1f}' for i in known
    )
    if np.any(spread[known] > 0):
      back = path(mean - spread).split()[::-1]
      points = f'{path(mean + spread)} {" ".join(back)}'
      parts.append(
        f'<polygon points="{points}" fill="{colour}" opacity="0.15"/>'
      )
    parts.append(
      f'<polyline points="{path(mean)}" fill="none" stroke="{colour}" '
      'stroke-width="1.8" stroke-linejoin="round"/>'
    )
  parts += _legend([line.name for line in drawn])
  middle = TOP + height / 2
  parts.append(
    f'<text x="14" y="{middle}" text-anchor="middle" '
    f'transform="rotate(-90 14 {middle})">{html.escape(y_label)}</text>'
    f'<text x="{LEFT + width / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
    f'{html.escape(x_label)}</text>'
  )
  words = html.escape(f'{y_label} over {x_label}', quote=True)
  return (
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">'
    f'{"".join(parts)}</svg>'
  )


def _deviation(values: Sequence[float]) -> float:
  """Return the sample standard deviation; 0 of one value."""
  return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _range(values: Sequence[float]) -> tuple[float, float]:
  """Return bounds of an axis around values."""
  low, high = min(values, default=0.0), max(values, default=1.0)
  if low >= 0:
    low = 0.0 if low < 0.5 * high else low
  margin = 0.03 * (high - low) or 0.5
  return (low if low == 0 else low - margin), high + margin


def ticks(low: float, high: float, most: int = 6) -> list[float]:
  """Return round numbers from low to high, at most so many."""
  least = (high - low) / most
  power = 10 ** math.floor(math.log10(least))
  step = next(power * k for k in (1, 2, 5, 10) if power * k >= least)
  first = math.ceil(low / step - 1e-9)
  found = (k * step for k in range(first, first + most + 2))
  return [tick for tick in found if tick <= high + 1e-9 * step]


def _axes(low: float, high: float, last: int, x, y) -> str:
  """Return the frame, grid and numbers of a chart."""
  right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
  parts = []
  for tick in ticks(low, high):
    at = y(tick)
    parts.append(
      f'<line x1="{LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}" '
      f'stroke="#e5e5e5"/><text x="{LEFT - 6}" y="{at + 4:.1f}" '
      f'text-anchor="end">{tick:.6g}</text>'
    )
  for tick in ticks(0, last, 8):
    parts.append(
      f'<line x1="{x(tick):.1f}" y1="{bottom}" x2="{x(tick):.1f}" '
      f'y2="{bottom + 4}" stroke="#999"/><text x="{x(tick):.1f}" '
      f'y="{bottom + 17}" text-anchor="middle">{tick:,.6g}</text>'
    )
  parts.append(
    f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#999"/>'
  )
  return ''.join(parts)


def _legend(names: Sequence[str]) -> list[str]:
  """Return the colours and names of the lines, in a row above them."""
  parts, at = [], LEFT
  for number, name in enumerate(names):
    colour = f'#{style.COLOURS[number % len(style.COLOURS)]}'
    parts.append(
      f'<line x1="{at}" y1="11" x2="{at + 18}" y2="11" stroke="{colour}" '
      f'stroke-width="2.5"/><text x="{at + 23}" y="15">{html.escape(name)}'
      '</text>'
    )
    at += 40 + 7 * len(name)
  return parts
