"""How every figure looks, and how it is saved.

In an axes of images the unit is the distance of two images, and y points down.
"""

import contextlib
import csv
import pathlib

import numpy as np
import PIL.Image

from ssljax.errors import InputError

# For pages and columns of a paper: widths are stated in inches, as printed.
# Colours are Okabe and Ito's, told apart by the colour-blind:
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
  'svg.hashsalt': 'ssljax',  # the same names every time
  'pdf.fonttype': 42,  # letters that can be edited and searched for
}
LARGE_PNG = 200_000  # bytes
COLOURS = ('0072B2', 'D55E00', '009E73', 'E69F00', 'CC79A7', '56B4E9')
CLASS_COLOURS = (  # Paul Tol's muted ones, for the colour-blind, and black
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
MANY_CLASSES = 20  # of more, only the first are shown one by one


def class_colour(label: int) -> str:
  """The colour of a class; after ten they come again."""
  return f'#{CLASS_COLOURS[label % len(CLASS_COLOURS)]}'


@contextlib.contextmanager
def style():
  """The look that all figures share."""
  import matplotlib  # slow to import, and an extra

  colours = matplotlib.cycler(color=[f'#{colour}' for colour in COLOURS])
  with matplotlib.rc_context(STYLE | {'axes.prop_cycle': colours}):
    yield


def check_matplotlib() -> None:
  """Refuses to begin where nothing can be drawn."""
  try:
    import matplotlib
  except ImportError as error:
    raise InputError(
      "--figure: needs matplotlib: pip install 'ssljax[figures]'"
    ) from error
  matplotlib.use('Agg')  # needs no display


def save(stem: pathlib.Path, figure, tables: dict) -> list[pathlib.Path]:
  """Writes a figure and its data, and says where.

  Args:
    stem: path of all files, up to their ending.
    figure: a matplotlib `Figure`.
    tables: name -> rows, the first of them the header.
  """
  paths = [stem.with_name(f'{stem.name}.{kind}') for kind in ('png', 'pdf')]
  png, pdf = paths
  save_png(png, figure)
  figure.savefig(pdf, metadata={'CreationDate': None})  # the same every time
  for name, rows in tables.items():
    paths.append(stem.with_name(f'{stem.name}.{name}.csv'))
    with open(paths[-1], 'w', newline='', encoding='utf-8') as file:
      csv.writer(file, lineterminator='\n').writerows(rows)
  return paths


def save_png(path: pathlib.Path, figure) -> None:
  """Writes a PNG; a large one with fewer colours, the PDF has them all."""
  figure.savefig(path, pil_kwargs={'optimize': True})
  with PIL.Image.open(path) as image:
    whole = image.convert('RGB')
  for colours in (256, 64):
    if path.stat().st_size > LARGE_PNG:
      whole.quantize(colours).save(path, optimize=True)


def some_of_each(labels: np.ndarray, each: int, classes: int) -> np.ndarray:
  """The first `each` rows of each of the first classes; `labels [N]`."""
  return np.concatenate(
    [np.flatnonzero(labels == c)[:each] for c in range(classes)]
  )


def evenly(values: np.ndarray, count: int) -> np.ndarray:
  """At most `count` of the values `[M, ...]`, in order."""
  if len(values) <= count:
    return values
  return values[np.linspace(0, len(values) - 1, count).round().astype(int)]


def add_images(drawn, left, top, pitch, width, height):
  """Adds an axes of images: at unit (x, y) lies the centre of one.

  Args:
    drawn: the figure.
    left: inches from its left.
    top: inches from its top.
    pitch: inches from one image to the next.
    width: of the axes, in images.
    height: of the axes, in images.
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
  """Draws an image `[H, W, c]` uint8 about (x, y).

  Args:
    axes: of images.
    image: a grey one is drawn dark on white, as ink on paper.
    x: of its centre.
    y: of its centre.
    ink: colour of what is dark.
    frame: colour of a frame about it; faint if None.
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
  limits = axes.axis()  # which `imshow` changes
  axes.imshow(image, extent=extent, aspect='auto', zorder=3, **look)
  axes.axis(limits)
  edge = {'edgecolor': frame or '0.8', 'linewidth': 1.2 if frame else 0.3}
  axes.add_patch(
    patches.Rectangle(corner, 2 * half, 2 * half, fill=False, zorder=4, **edge)
  )


def legend_below(drawn, handles) -> None:
  """A legend of points under a figure whose layout is constrained."""
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
  """Text that can be read on an image."""
  from matplotlib import patheffects

  written = axes.text(x, y, text, zorder=6, **look)
  edge = patheffects.withStroke(linewidth=1.6, foreground='w')
  written.set_path_effects([edge])
