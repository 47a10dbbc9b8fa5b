"""Parts of HTML pages."""

import base64
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import PIL.Image
import pytest

from ssljax.experiments.figures import page

SVG = '{http://www.w3.org/2000/svg}'


def test_a_chart_draws_the_mean_at_its_place_and_a_band_of_one_deviation():
  lines = [
    page.Line('a <b>', {0: [10.0, 30.0], 5: [0.0, 0.0], 10: [40.0, 40.0]}),
    page.Line('without values', {}),
  ]
  root = ET.fromstring(page.chart(lines, 'error in %'))
  (line,) = root.findall('polyline')
  points = [tuple(map(float, p.split(','))) for p in line.get('points').split()]
  right, bottom = page.WIDTH - page.RIGHT, page.HEIGHT - page.BOTTOM
  assert [x for x, _ in points] == [page.LEFT, (page.LEFT + right) / 2, right]
  # The axis begins at 0, and heights are in proportion.
  heights = [bottom - y for _, y in points]
  assert heights[1] == pytest.approx(0, abs=0.1)
  assert heights[2] == pytest.approx(2 * heights[0], rel=0.01)
  (band,) = root.findall('polygon')
  first = float(band.get('points').split()[0].split(',')[1])
  spread = np.std([10.0, 30.0], ddof=1)
  assert bottom - first == pytest.approx(
    heights[0] * (20 + spread) / 20, rel=0.01
  )
  texts = [text.text for text in root.findall('text')]
  assert {'a <b>', 'error in %', 'step', '20', '40'} <= set(texts)
  assert 'without values' not in texts


@pytest.mark.parametrize(
  ('low', 'high', 'wanted'),
  [
    (0, 100, [0, 20, 40, 60, 80, 100]),
    (0.3, 1.1, [0.4, 0.6, 0.8, 1.0]),
    (-3, 7, [-2, 0, 2, 4, 6]),
  ],
)
def test_the_numbers_at_an_axis_are_round(low, high, wanted):
  assert page.ticks(low, high) == pytest.approx(wanted)


def test_a_small_image_is_enlarged_and_floats_are_scaled():
  image = np.array([[[0.5], [-1.5]]])  # [1, 2, 1]
  data = page.as_png(image).removeprefix('data:image/png;base64,')
  drawn = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))
  assert drawn.shape == (48, 96)
  assert (drawn[:, :48] == 255).all() and (drawn[:, 48:] == 0).all()


def test_a_confusion_matrix_is_shaded_by_the_share_of_its_row():
  html = page.confusion(np.array([[3, 1], [0, 0]]), ['cat', '<dog>'])
  shades = re.findall(r'rgba\(0,114,178,([\d.]+)\)', html)
  assert shades == ['0.75', '0.25', '0.00', '0.00']
  assert '&lt;dog&gt;' in html and '>3</td>' in html and '>0</td>' not in html


def test_cells_are_escaped_and_long_ones_may_wrap():
  html = page.as_table([['a'], ['<b>'], ['long ' * 9]])
  assert '&lt;b&gt;' in html and html.count('class="short"') == 2
