"""Common look of all figures, and helpers to draw and save them.

In an axes of images (`add_images`) the unit of length is the distance between
the centres of two neighbouring images, and y points down.
"""

import contextlib
import csv
import io
import pathlib

import numpy as np
import PIL.Image

from ssljax import files
from ssljax.errors import InputError

# Widths are in inches as printed, for pages and columns of a paper.
# Colours are those of Okabe and Ito, which colour-blind readers distinguish:
# C0 blue, C1 vermilion, C2 green, C3 orange, C4 pink, C5 sky blue.
STYLE = {
  'font.family': 'sans-serif',
  'font.size': 8,
  'axes.titlesize': 8,
  'axes.labelsize': 8,
  'xtick.labelsize': 7,
  'ytick.labelsize': 7,
  'axes.linewidth': 0.6,
  'xtick.major.width': 0.6,
  'ytick.major.width': 0.6,
  'image.interpolation': 'nearest',
  'savefig.bbox': 'tight',
  'savefig.pad_inches': 0.03,
  'savefig.dpi': 140,
  'text.parse_math': False,  # names of classes may contain $
  'svg.hashsalt': 'ssljax',  # reproducible identifiers
  'pdf.fonttype': 42,  # text that can be edited and searched
}
LARGE_PNG = 200_000  # bytes
COLOURS = ('0072B2', 'D55E00', '009E73', 'E69F00', 'CC79A7', '56B4E9')
CLASS_COLOURS = (  # Paul Tol's muted palette for the colour-blind, and black
  '332288',
  'CC6677',
  '117733',
  'DDCC77',
  '88CCEE',
  'AA4499',
  '999933',
  '882255',
  '44AA99',
  '000000',
)
GREEN, RED, BLUE = 'C2', 'C1', 'C0'
MANY_CLASSES = 20  # with more classes, only this many are shown singly


def class_colour(label: int) -> str:
  """Return the colour of a class; colours repeat after ten classes."""
  return f'#{CLASS_COLOURS[label % len(CLASS_COLOURS)]}'


@contextlib.contextmanager
def style():
  """Apply the common look to the figures drawn in this context."""
  import matplotlib  # Slow to import, and an optional dependency.

  colours = matplotlib.cycler(color=[f'#{colour}' for colour in COLOURS])
  with matplotlib.rc_context(STYLE | {'axes.prop_cycle': colours}):
    yield


def check_matplotlib() -> None:
  """Raise `InputError` if matplotlib is not installed."""
  try:
    import matplotlib
  except ImportError as error:
    raise InputError(
      "matplotlib is not installed: run pip install 'ssljax[figures]'"
    ) from error
  matplotlib.use('Agg')  # Works without a display.


def save(stem: pathlib.Path, figure, tables: dict) -> list[pathlib.Path]:
  """Write a figure as PNG and PDF, and its data as CSV.

  Args:
    stem: common start of the files' paths.
    figure: a matplotlib `Figure`.
    tables: name -> rows, the first one the header.

  Returns:
    The paths of all files.
  """
  pdf, path_of = io.BytesIO(), lambda kind: stem.parent / f'{stem.name}.{kind}'
  # Without the date the file is reproducible.
  figure.savefig(pdf, format='pdf', metadata={'CreationDate': None})
  content = {'png': as_png(figure), 'pdf': pdf.getvalue()}
  for name, rows in tables.items():
    text = io.StringIO(newline='')
    csv.writer(text, lineterminator='\n').writerows(rows)
    content[f'{name}.csv'] = text.getvalue().encode()
  for kind, data in content.items():
    files.write_atomically(path_of(kind), data)
  return list(map(path_of, content))


def as_png(figure) -> bytes:
  """Return a PNG file, with fewer colours if it is larger than LARGE_PNG.

  The PDF file keeps all colours.
  """
  file = io.BytesIO()
  figure.savefig(file, format='png', pil_kwargs={'optimize': True})
  whole = PIL.Image.open(file).convert('RGB')
  for colours in (256, 64):
    if len(file.getvalue()) > LARGE_PNG:
      file = io.BytesIO()
      whole.quantize(colours).save(file, 'png', optimize=True)
  return file.getvalue()


def some_of_each(labels: np.ndarray, each: int, classes: int) -> np.ndarray:
  """Return the first `each` rows of each of the first classes of `[N]`."""
  return np.concatenate(
    [np.flatnonzero(labels == c)[:each] for c in range(classes)]
  )


def evenly(values: np.ndarray, count: int) -> np.ndarray:
  """Return at most `count` evenly spaced values of `[M, ...]`, in order."""
  if len(values) <= count:
    return values
  return values[np.linspace(0, len(values) - 1, count).round().astype(int)]


def deviation(values) -> np.ndarray:
  """Return the sample standard deviation `[...]` over the seeds of `[S, ...]`.

  It is 0 for a single seed.
  """
  values = np.asarray(values)
  if len(values) == 1:
    return np.zeros(values.shape[1:])
  return values.std(axis=0, ddof=1)


def plot_band(axes, x, mean, deviations, colour: str, **look) -> None:
  """Plot a line in a band of one standard deviation on each side."""
  axes.plot(x, mean, color=colour, linewidth=1, **look)
  ends = mean - deviations, mean + deviations
  axes.fill_between(x, *ends, color=colour, alpha=0.2, linewidth=0)


def add_images(drawn, left, top, pitch, width, height):
  """Add an axes of images, whose centres have integer coordinates (x, y).

  Args:
    drawn: the figure.
    left: distance from the figure's left side in inches.
    top: distance from the figure's top in inches.
    pitch: distance between the centres of two images in inches.
    width: width of the axes in images.
    height: height of the axes in images.
  """
  whole_width, whole_height = drawn.get_size_inches()
  axes = drawn.add_axes(
    (
      left / whole_width,
      1 - (top + pitch * height) / whole_height,
      pitch * width / whole_width,
      pitch * height / whole_height,
    )
  )
  axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
  axes.axis('off')
  return axes


def place(axes, image, x: float, y: float, *, ink='k', frame=None) -> None:
  """Draw an image with its centre at (x, y).

  Args:
    axes: an axes of images.
    image: `[H, W, c]` uint8; a grey image is drawn inverted, dark on white.
    x: coordinate of the centre.
    y: coordinate of the centre.
    ink: colour of the dark parts of a grey image.
    frame: colour of the frame; a faint grey if None.
  """
  from matplotlib import colors, patches

  half, look = 0.46, {}
  corner, extent = (
    (x - half, y - half),
    (x - half, x + half, y + half, y - half),
  )
  if image.shape[-1] == 1:
    tints = colors.LinearSegmentedColormap.from_list('', ['w', ink])
    image, look = image[..., 0], {'cmap': tints, 'vmin': 0, 'vmax': 255}
  limits = axes.axis()  # `imshow` changes them.
  axes.imshow(image, extent=extent, aspect='auto', zorder=3, **look)
  axes.axis(limits)
  edge = {'edgecolor': frame or '0.8', 'linewidth': 1.2 if frame else 0.3}
  axes.add_patch(
    patches.Rectangle(corner, 2 * half, 2 * half, fill=False, zorder=4, **edge)
  )


def legend_below(drawn, handles) -> None:
  """Add a legend below a figure with a constrained layout."""
  drawn.legend(
    handles=handles,
    loc='outside lower center',
    ncols=min(6, len(handles)),
    frameon=False,
    handletextpad=0.1,
    columnspacing=1.2,
    markerscale=0.7,
  )


def outlined(axes, x: float, y: float, text: str, **look):
  """Write text with a white outline, readable on an image."""
  from matplotlib import patheffects

  written = axes.text(x, y, text, zorder=6, **look)
  edge = patheffects.withStroke(linewidth=1.6, foreground='w')
  written.set_path_effects([edge])
