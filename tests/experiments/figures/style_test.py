"""Files of figures, on a disk and in a bucket."""

import pytest

from ssljax.experiments.figures import style


@pytest.mark.parametrize('kind', ['disk', 'bucket'])
def test_a_figure_and_its_data_are_written(kind, request, tmp_path):
  from matplotlib import figure

  on_disk = kind == 'disk'
  where = tmp_path if on_disk else request.getfixturevalue('bucket').folder
  drawn = figure.Figure(figsize=(1, 1))
  drawn.subplots().plot([0, 1])
  tables = {'errors': [('step', 'name'), (1, 'é,1')]}
  paths = style.save(where / 'madnn-3.seed-0', drawn, tables)
  png, pdf, table = (path.read_bytes() for path in paths)
  assert [path.name for path in paths] == [
    f'madnn-3.seed-0.{kind}' for kind in ('png', 'pdf', 'errors.csv')
  ]
  assert png.startswith(b'\x89PNG') and pdf.startswith(b'%PDF')
  assert table == 'step,name\n1,"é,1"\n'.encode()
  assert len(list(where.iterdir())) == 3


def test_a_large_png_gets_fewer_colours(monkeypatch):
  from matplotlib import figure
  import numpy as np

  drawn = figure.Figure(figsize=(3, 3))
  noise = np.random.default_rng(0).random((200, 200, 3))
  drawn.subplots().imshow(noise)
  whole = style.as_png(drawn)
  monkeypatch.setattr(style, 'LARGE_PNG', len(whole) - 1)
  assert len(style.as_png(drawn)) < len(whole)
